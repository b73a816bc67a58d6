//! A QEMU that waits for its guest: manifest, tap ─▶ a process whose memory is registered, ready to load.
//!
//! It can be started before a byte of the image is here: it maps an empty memory file, and asks for its disk when
//! the guest does.

use super::image::Known;
use super::memory::Folder;
use super::pager::DISK;
use super::process::{self, Process};
use anyhow::Context;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use vmatrix_vma_image::machine::{QEMU, Run, Start, lazy_arguments};

/// Where one guest's QEMU has its sockets and log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sockets {
    dir: PathBuf,
}

impl Sockets {
    /// Those in a cell's folder, or in that of a QEMU that waits for a cell.
    pub fn within(dir: PathBuf) -> Sockets {
        Sockets { dir }
    }

    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    pub fn agent(&self) -> PathBuf {
        self.dir.join("agent")
    }

    /// The folder they are in.
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    pub fn log(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }

    /// Has all of them where `to` is: the process goes on answering there.
    ///
    /// # Errors
    /// One cannot be moved.
    pub fn give(&self, to: &Sockets) -> std::io::Result<()> {
        std::fs::rename(self.qmp(), to.qmp())?;
        std::fs::rename(self.agent(), to.agent())?;
        std::fs::rename(self.log(), to.log())?;
        std::fs::remove_dir_all(&self.dir)
    }

    /// Removes what a QEMU that ended left.
    pub fn clear(&self) {
        for socket in [self.qmp(), self.agent()] {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// What a waiting QEMU is made of.
pub struct Waiting<'a> {
    pub known: &'a Known,
    /// Shown in the process list, and what it is found by.
    pub name: &'a str,
    pub sockets: &'a Sockets,
    pub memory: &'a Folder,
    /// The pager's folder, where the disk's socket is.
    pub pager: &'a Path,
    /// Whether it is a singleton, which writes to its memory file and whose writes are noted.
    pub shared: bool,
}

impl Waiting<'_> {
    /// Starts it, in a process group of its own so that it outlives this daemon.
    ///
    /// Its standard input is the tap and its standard output the pager's folder: those are the descriptors a child
    /// gets without a moment in which others get them too. By the folder it finds the disk's socket again when it
    /// is nobody and may not walk there.
    ///
    /// # Errors
    /// The library to preload or QEMU is missing, or it cannot be started.
    pub async fn spawn(&self, tap: OwnedFd) -> anyhow::Result<Process> {
        let run = Run {
            name: self.name.to_owned(),
            qmp: self.sockets.qmp(),
            guest_agent: self.sockets.agent(),
            tap_fd: 0,
            console: None,
            start: if self.shared { Start::Shared } else { Start::Clone },
        };
        let disk = Path::new("/proc/self/fd/1").join(DISK);
        let arguments = lazy_arguments(&self.known.manifest.machine, &self.memory.memory(), &disk, &run);
        let log = self.sockets.log();
        let output = std::fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let folder =
            std::fs::File::open(self.pager).with_context(|| format!("cannot open {}", self.pager.display()))?;
        self.sockets.clear();
        let mut command = tokio::process::Command::new(QEMU);
        command.args(&arguments).stdin(Stdio::from(tap)).stdout(Stdio::from(folder)).stderr(output).process_group(0);
        vmatrix_vma_pager::preload(command.as_std_mut(), &self.memory.memory(), self.shared)?;
        let child = command.spawn().with_context(|| {
            format!("cannot start {QEMU}; install it with `apt-get install -t bookworm-backports qemu-system-x86`")
        })?;
        // Dropped, not waited for: the runtime collects it when it ends.
        process::started(&child).await.with_context(|| format!("QEMU said: {:?}", words(self.sockets)))
    }
}

/// The QEMU that goes by a name.
pub fn find(running: &[Process], wanted: &str) -> Option<Process> {
    running.iter().find(|p| name(p) == Some(wanted)).cloned()
}

/// The name that a QEMU goes by; none of what is no QEMU.
pub fn name(process: &Process) -> Option<&str> {
    let is_qemu = process.arguments.first().is_some_and(|a| a.ends_with(QEMU));
    process.value("-name").and_then(|v| v.split(',').next()).filter(|_| is_qemu)
}

/// The end of what QEMU said.
pub fn words(sockets: &Sockets) -> String {
    process::tail(&sockets.log())
}
