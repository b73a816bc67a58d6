//! The virtual machine as QEMU is told of it: Manifest ─▶ argv, and whether this host can resume it.
//!
//! QEMU takes a wrong CPU model or an extra device without a word and runs a broken guest, so
//! everything is pinned in the manifest and compared here, by name.

mod disks;

use crate::accel;
use crate::error::{Error, Result, io};
use disks::From;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vmatrix_model::manifest::{MachineSpec, Manifest, PartKind};

pub use disks::{SEED_SIZE, export, is_imported, serial};

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";
/// Versioned: `q35` alone means another machine in another QEMU.
pub const MACHINE_TYPE: &str = "pc-q35-10.0";
/// Kind of network back end; a snapshot on another kind does not load.
pub const NETDEV: &str = "tap";
/// Whom a clone runs as: a user that owns nothing. It has a place in every Linux's list of users.
pub const CLONE_USER: &str = "nobody";
/// Seconds that a guest's read or write of a disk waits for an NBD server that is away, before it fails.
pub const DISK_AWAY: u32 = 30;
/// The gateway's MAC in every cell, the builder's too: a guest remembers it over a suspend.
pub const BRIDGE_MAC: &str = "52:54:00:76:6d:fe";
/// Name of the guest agent's port inside the guest.
pub const AGENT_PORT: &str = "vmatrix.guest";

/// The processor pinned for an accelerator: the richest TCG has in full is Nehalem, the oldest server
/// still bought has what Skylake-Server has.
pub fn cpu_model(accelerator: &str) -> &'static str {
    if accelerator == "kvm" { "Skylake-Server-v4" } else { "Nehalem" }
}

/// The devices of a guest whose image has parts of these kinds, in order: its root disk first, what it reads or writes
/// besides that at the end, so that guests without it are what they would be if there were no such disks.
pub fn devices(mac: &str, kinds: &[PartKind]) -> Vec<String> {
    let mut devices = vec![
        disks::ROOT.to_owned(),
        format!("virtio-net-pci,netdev=net0,id=nic0,mac={mac},romfile="),
        "virtio-rng-pci,rng=rng0,id=random0".to_owned(),
        "virtio-serial-pci,id=serial0".to_owned(),
        format!("virtserialport,bus=serial0.0,chardev=agent0,id=port0,name={AGENT_PORT}"),
    ];
    devices.extend(disks::beside(kinds));
    devices
}

/// The devices of every guest that was imported as a disk, in order: it boots by itself, and at its first boot reads
/// from a second disk what it is to become.
pub fn imported_devices(mac: &str) -> Vec<String> {
    let mut devices = devices(mac, &[PartKind::Disk]);
    if let Some(disk) = devices.first_mut() {
        disk.push_str(",bootindex=0");
    }
    devices.push(disks::SEED.to_owned());
    devices
}

/// An image's parts as files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    pub memory: PathBuf,
    pub device: PathBuf,
    pub disk: PathBuf,
    /// Of an image on a base.
    pub base: PathBuf,
    /// Of an image that writes; it is the guest's own unless that is a clone.
    pub data: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl Files {
    /// What an imported guest reads at its first boot, and only then: beside its disk.
    pub fn seed(&self) -> PathBuf {
        self.disk.with_file_name("seed")
    }

    /// The files of an image that is laid out in `dir`.
    pub fn within(dir: &Path) -> Files {
        let file = |name: &str| dir.join(name);
        Files {
            memory: file("memory"),
            device: file("device"),
            disk: file("disk"),
            base: file("base"),
            data: file("data"),
            kernel: file("kernel"),
            initrd: file("initrd"),
        }
    }
}

/// How one process is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Shown in the process list: the instance.
    pub name: String,
    /// Where the QMP socket is made; at most 107 bytes.
    pub qmp: PathBuf,
    /// Where the guest agent's socket is made; at most 107 bytes.
    pub guest_agent: PathBuf,
    /// A tap descriptor that the process inherits under this number.
    pub tap_fd: RawFd,
    /// A file that gets what the guest writes to its serial console.
    pub console: Option<PathBuf>,
    pub start: Start,
}

/// From what the guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Powered on; memory is written to its file (`share=on`), so it can be suspended.
    Boot,
    /// Waits for `load_state`; memory is copy-on-write (`share=off`), so many clones share one file.
    Clone,
    /// Waits for `load_state`; memory is written to its file (`share=on`), so it can be suspended again.
    Shared,
}

/// QEMU's arguments, without the program.
pub fn arguments(manifest: &Manifest, files: &Files, run: &Run) -> Vec<String> {
    machine_arguments(&manifest.machine, files, run)
}

/// As [`arguments`], before there is a manifest.
pub fn machine_arguments(m: &MachineSpec, files: &Files, run: &Run) -> Vec<String> {
    start(m, files, From::Files, run)
}

/// As [`machine_arguments`], for a guest whose disks come as they are read: from the NBD server at `socket`, each by the
/// name that [`export`] gives it. While that server is away the guest's reads and writes wait, for [`DISK_AWAY`] s at
/// most.
pub fn lazy_arguments(m: &MachineSpec, memory: &Path, socket: &Path, run: &Run) -> Vec<String> {
    let files = Files { memory: memory.to_owned(), ..Files::within(Path::new("")) };
    start(m, &files, From::Socket(socket), run)
}

fn start(m: &MachineSpec, files: &Files, from: From, run: &Run) -> Vec<String> {
    let memory = match run.start {
        Start::Boot | Start::Shared => "share=on".to_owned(),
        // Read-only and private: no fault of a clone reaches the file that the others run from.
        Start::Clone => "share=off,readonly=on,rom=off".to_owned(),
    };
    // A clone runs code of somebody else: it opens what it is told to, then becomes nobody, without a
    // capability and (as every sandboxed process) unable to gain one. The sandbox that also denies the system
    // calls for changing users would deny that very step. A build runs its recipe's shell lines as root
    // anyway, and the kernel ends its guest with the builder only while their user stays the same. An imported
    // guest is code of somebody else from its first boot on.
    let is_foreign = run.start != Start::Boot || is_imported(m);
    let sandbox = match is_foreign {
        false => "on,obsolete=deny,elevateprivileges=deny,spawn=deny",
        true => "on,obsolete=deny,spawn=deny",
    };
    let accelerator = if m.accelerator == "tcg" { "tcg,thread=multi" } else { &m.accelerator };
    let mut argv: Vec<String> = [
        ("-name", format!("{},debug-threads=on", escape(&run.name))),
        ("-accel", accelerator.to_owned()),
        ("-cpu", m.cpu_model.clone()),
        ("-smp", m.smp.to_string()),
        ("-m", format!("{}M", m.memory_mib)),
        (
            "-object",
            format!("memory-backend-file,id=ram0,size={}M,mem-path={},{memory}", m.memory_mib, path(&files.memory)),
        ),
        ("-machine", format!("{},memory-backend=ram0", m.machine_type)),
    ]
    .map(|(flag, value)| [flag.to_owned(), value])
    .concat();
    argv.extend(disks::arguments(m, files, from, run.start));
    let rest = [
        ("-netdev", format!("{},id=net0,fd={}", m.netdev, run.tap_fd)),
        ("-object", "rng-random,id=rng0,filename=/dev/urandom".to_owned()),
        ("-chardev", format!("socket,id=agent0,path={},server=on,wait=off", path(&run.guest_agent))),
        ("-qmp", format!("unix:{},server=on,wait=off", path(&run.qmp))),
        ("-serial", run.console.as_ref().map_or("null".to_owned(), |file| format!("file:{}", file.display()))),
        ("-display", "none".to_owned()),
        ("-sandbox", sandbox.to_owned()),
    ];
    argv.extend(rest.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
    if !is_imported(m) && run.start == Start::Boot {
        let from = [
            ("-kernel", files.kernel.display().to_string()),
            ("-initrd", files.initrd.display().to_string()),
            ("-append", m.append.clone()),
        ];
        argv.extend(from.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
    }
    for device in &m.devices {
        argv.extend(["-device".to_owned(), device.clone()]);
    }
    argv.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    if is_foreign {
        argv.extend(["-run-with".to_owned(), format!("user={CLONE_USER}")]);
    }
    if run.start != Start::Boot {
        argv.extend(["-incoming", "defer"].map(str::to_owned));
    }
    argv
}

/// The process, ready to be spawned with its tap under the number that [`Run::tap_fd`] says; only this
/// child inherits it.
pub fn command(arguments: &[String], tap: &OwnedFd) -> Command {
    let mut command = Command::new(QEMU);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    let tap = tap.as_raw_fd();
    let inherit = move || {
        // SAFETY: the descriptor belongs to the caller, who holds it until after the spawn; `fcntl` may be
        // called between fork and exec.
        #[allow(unsafe_code)]
        let tap = unsafe { BorrowedFd::borrow_raw(tap) };
        fcntl(tap, FcntlArg::F_SETFD(FdFlag::empty())).map(drop).map_err(std::io::Error::from)
    };
    // SAFETY: `inherit` allocates nothing and takes no lock.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(inherit);
    }
    command
}

/// QEMU separates options by commas; a comma in a value is written twice.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}
fn path(path: &Path) -> String {
    escape(&path.display().to_string())
}

/// What this machine resumes with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub qemu_version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
}

/// Something a suspended VM needs otherwise than this host has it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image {image:?} needs {what} {needs:?}, this machine has {has:?}; {next}")]
pub struct Mismatch {
    pub image: String,
    /// `QEMU version`, `machine type`, `CPU model`, `devices`, `network back end` or `accelerator`.
    pub what: &'static str,
    pub needs: String,
    pub has: String,
    pub next: &'static str,
}

/// Whether `host` can resume the image.
///
/// # Errors
/// The first difference, by name.
pub fn check_host(manifest: &Manifest, host: &Host) -> std::result::Result<(), Mismatch> {
    let m = &manifest.machine;
    let kinds: Vec<PartKind> = manifest.parts.iter().map(|part| part.kind).collect();
    let mac = &manifest.guest.mac;
    let mut expected = if is_imported(m) { imported_devices(mac) } else { devices(mac, &kinds) };
    for (needs, has) in expected.iter_mut().zip(&m.devices) {
        disks::as_before(needs, has);
    }
    let rebuild = "build it again here (`vmatrix image build --again`), or resume it on a machine that has it";
    let compared = [
        ("accelerator", m.accelerator.clone(), host.accelerator.clone(), rebuild),
        (
            "QEMU version",
            m.qemu_version.clone(),
            host.qemu_version.clone(),
            "install that version, or build the image again",
        ),
        ("machine type", m.machine_type.clone(), MACHINE_TYPE.to_owned(), rebuild),
        ("CPU model", m.cpu_model.clone(), cpu_model(&host.accelerator).to_owned(), rebuild),
        ("network back end", m.netdev.clone(), NETDEV.to_owned(), rebuild),
        // Quoted, for a space within one device would make it look like two.
        ("devices", format!("{:?}", m.devices), format!("{expected:?}"), rebuild),
    ];
    match compared.into_iter().find(|(_, needs, has, _)| needs != has) {
        Some((what, needs, has, next)) => Err(Mismatch { image: manifest.name.clone(), what, needs, has, next }),
        None => Ok(()),
    }
}

/// Looks at this machine: QEMU's version, and KVM if it really runs a guest. Takes up to 3 s; ask once.
///
/// # Errors
/// QEMU is missing or does not say its version.
pub fn host() -> Result<Host> {
    let qemu_version = qemu_version()?;
    let accelerator = match accel::probe() {
        Ok(()) => "kvm",
        Err(why) => {
            tracing::warn!(%why, "KVM does not run guests here; using TCG, which is some ten times slower");
            "tcg"
        }
    };
    Ok(Host { qemu_version, accelerator: accelerator.to_owned() })
}

/// QEMU's version: `10.0.2`.
///
/// # Errors
/// QEMU is missing or does not say its version.
pub fn qemu_version() -> Result<String> {
    let output = Command::new(QEMU).arg("--version").output().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::Missing { program: QEMU.to_owned(), package: "-t bookworm-backports qemu-system-x86" }
        }
        _ => io("run", Path::new(QEMU))(e),
    })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    parse_version(&text).ok_or_else(|| Error::Tool {
        what: format!("{QEMU} --version"),
        status: output.status.to_string(),
        said: text.chars().take(200).collect(),
    })
}

/// "QEMU emulator version 10.0.2 (Debian …)" ─▶ "10.0.2".
fn parse_version(text: &str) -> Option<String> {
    let word = text.lines().next()?.split_whitespace().skip_while(|w| *w != "version").nth(1)?;
    word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.to_owned())
}

#[cfg(test)]
pub(crate) mod tests;
