//! A raw disk ─▶ a guest that boots from it, serves, is warm, and then sleeps.
//!
//! ```text
//! power on ─health─▶ serves ─agent?─▶ reseeds, or not ─requests─▶ warm ─trim─▶ stop ─▶ memory, device state, disk
//! ```

use crate::cell::Cell;
use crate::error::{Error, Result, io};
use crate::progress::{Event, Observer};
use nix::unistd::{User, chown};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmatrix_model::manifest::{GuestSpec, Health, MachineSpec, Measured};
use vmatrix_vma_build::workshop::{Process, blocking};
use vmatrix_vma_image::machine::{CLONE_USER, Files, Run, Start, command, machine_arguments};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::{guest, health};

/// One question whether it serves.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// A warm request.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// How much of a console's end is shown.
const CONSOLE_TAIL: u64 = 4 << 10;

/// What is booted, and where its files are.
pub(crate) struct Guest<'a> {
    pub(crate) name: &'a str,
    pub(crate) spec: &'a MachineSpec,
    pub(crate) guest: &'a GuestSpec,
    pub(crate) files: &'a Files,
    /// In memory, with a short name, and open to be passed through.
    pub(crate) scratch: &'a Path,
    /// Paths asked for on the health check's port, and how often each.
    pub(crate) warm: &'a [String],
    pub(crate) times: u32,
    pub(crate) boot_limit: Duration,
    pub(crate) agent_limit: Duration,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slept {
    pub(crate) measured: Measured,
    /// Whether our agent answers in it.
    pub(crate) reseeds: bool,
}

impl Guest<'_> {
    /// Boots it, and leaves memory, device state and disk of one moment in its files.
    ///
    /// # Errors
    /// QEMU ends, the guest does not serve in time, or does not answer a request.
    pub(crate) async fn sleep(&self, cell: &Cell, observer: &Observer) -> Result<Slept> {
        self.lay()?;
        let tap = cell.tap()?;
        let run = Run {
            name: format!("import-{}", self.name),
            qmp: self.scratch.join("qmp"),
            guest_agent: self.scratch.join("agent"),
            tap_fd: tap.as_raw_fd(),
            console: Some(self.console()),
            start: Start::Boot,
        };
        let start = command(&machine_arguments(self.spec, self.files, &run), &tap);
        let mut process = Process::start(start, self.scratch)?;
        drop(tap);

        observer(Event::Step("boot the guest (a minute or two under TCG)"));
        let boot_ms = self.until_healthy(&mut process, cell).await?;
        observer(Event::Step("wait for the guest agent"));
        let reseeds = self.has_agent(&mut process, &run.guest_agent).await?;
        if !reseeds {
            observer(Event::Note(
                "identity: not reseeded. No agent of ours answers in this guest, so its clones begin with the same \
                 random numbers, at the time of the suspend",
            ));
        }
        observer(Event::Step("warm the guest"));
        let mut answer_ms = self.warm(cell, self.times).await?;
        if reseeds {
            guest::trim(&run.guest_agent).await?;
            // The trim gave back what nobody mapped; what an answer needs is read again.
            answer_ms = self.warm(cell, self.times.min(12)).await?;
        }
        observer(Event::Step("suspend"));
        // Packets on their way come in before the guest stops, or a clone would wake to half a connection.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut qmp = Qmp::connect(&run.qmp).await?;
        qmp.save_state(&self.files.device).await?;
        qmp.quit().await?;
        // Until it has ended it may still write to the disk.
        blocking(move || process.end()).await??;
        Ok(Slept { measured: Measured { boot_ms, answer_ms }, reseeds })
    }

    fn console(&self) -> PathBuf {
        self.scratch.join("console")
    }

    /// Makes the files that QEMU writes: memory, and device state, which it opens when it is nobody already.
    fn lay(&self) -> Result<()> {
        let memory = File::create_new(&self.files.memory).map_err(io("create", &self.files.memory))?;
        memory.set_len(self.spec.memory_mib << 20).map_err(io("size", &self.files.memory))?;
        let device = &self.files.device;
        File::create_new(device).map_err(io("create", device))?;
        let nobody = User::from_name(CLONE_USER).ok().flatten();
        let nobody = nobody.ok_or(Error::Missing { program: "the user nobody", package: "base-passwd" })?;
        chown(device, Some(nobody.uid), Some(nobody.gid)).map_err(|e| io("give away", device)(e.into()))
    }

    async fn until_healthy(&self, process: &mut Process, cell: &Cell) -> Result<u64> {
        let began = Instant::now();
        loop {
            let Err(why) = health::ask(&cell.path(), self.guest.address, &self.guest.health, ASK_LIMIT).await else {
                return Ok(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
            };
            self.runs(process)?;
            if began.elapsed() > self.boot_limit {
                let (address, gateway) = (self.guest.address, self.guest.gateway);
                let said = tail(&self.console());
                return Err(Error::Unhealthy { after: self.boot_limit, why: why.to_string(), address, gateway, said });
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    fn runs(&self, process: &mut Process) -> Result<()> {
        match process.ended() {
            None => Ok(()),
            Some(status) => {
                let said = tail(&self.scratch.join("stderr")) + &tail(&self.console());
                Err(Error::Ended { status: status.to_string(), said })
            }
        }
    }

    /// Whether our agent answers, within its limit. A question to a guest without one takes ten seconds.
    async fn has_agent(&self, process: &mut Process, socket: &Path) -> Result<bool> {
        let began = Instant::now();
        while began.elapsed() < self.agent_limit {
            if guest::awaken_same(socket).await.is_ok() {
                return Ok(true);
            }
            self.runs(process)?;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(false)
    }

    /// Asks for each path so many times; returns the median, milliseconds.
    async fn warm(&self, cell: &Cell, times: u32) -> Result<u64> {
        let own = &self.guest.health;
        let mut took = Vec::new();
        for _ in 0..times {
            for path in self.warm.iter().chain([&own.path]) {
                let asked = Health { path: path.clone(), ..own.clone() };
                took.push(health::ask(&cell.path(), self.guest.address, &asked, REQUEST_LIMIT).await?);
            }
        }
        took.sort_unstable();
        let median = took.get(took.len() / 2).map_or(0, Duration::as_millis);
        Ok(u64::try_from(median).unwrap_or(u64::MAX))
    }
}

/// The last lines of a file, without what would draw on a terminal.
fn tail(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let length = fs::metadata(path)?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(CONSOLE_TAIL)))?;
        let mut bytes = Vec::new();
        file.take(CONSOLE_TAIL).read_to_end(&mut bytes)?;
        std::io::Result::Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let plain: String = text.chars().filter(|c| *c == '\n' || !c.is_control()).collect();
    let lines: Vec<&str> = plain.lines().filter(|l| !l.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n")
}
