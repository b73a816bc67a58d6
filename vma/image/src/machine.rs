//! The virtual machine as QEMU is told of it: Manifest ─▶ argv, and whether this host can resume it.
//!
//! QEMU takes a wrong CPU model or an extra device without a word and runs a broken guest, so
//! everything is pinned in the manifest and compared here, by name.

use crate::accel;
use crate::error::{Error, Result, io};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vmatrix_model::manifest::{MachineSpec, Manifest};

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";
/// Versioned: `q35` alone means another machine in another QEMU.
pub const MACHINE_TYPE: &str = "pc-q35-10.0";
/// Kind of network back end; a snapshot on another kind does not load.
pub const NETDEV: &str = "tap";
/// Whom a clone runs as: a user that owns nothing. It has a place in every Linux's list of users.
pub const CLONE_USER: &str = "nobody";
/// Seconds that a guest's read of its disk waits for an NBD server that is away, before it fails.
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

/// The devices of every guest, in order.
pub fn devices(mac: &str) -> Vec<String> {
    vec![
        "virtio-blk-pci,drive=disk0,id=blk0".to_owned(),
        format!("virtio-net-pci,netdev=net0,id=nic0,mac={mac},romfile="),
        "virtio-rng-pci,rng=rng0,id=random0".to_owned(),
        "virtio-serial-pci,id=serial0".to_owned(),
        format!("virtserialport,bus=serial0.0,chardev=agent0,id=port0,name={AGENT_PORT}"),
    ]
}

/// The devices of every guest that was imported as a disk, in order: it boots by itself, and at its first boot reads
/// from a second disk what it is to become.
pub fn imported_devices(mac: &str) -> Vec<String> {
    let mut devices = devices(mac);
    if let Some(disk) = devices.first_mut() {
        disk.push_str(",bootindex=0");
    }
    devices.push(SEED.to_owned());
    devices
}

const SEED: &str = "virtio-blk-pci,drive=seed0,id=blk1";
/// Bytes of every seed, so that what stands in its place when the guest is resumed has as many.
pub const SEED_SIZE: u64 = 64 << 20;

/// Whether a machine is one of a guest that was imported as a disk. It writes its root disk, into an overlay that
/// goes with the process: for replicas that is right; a singleton's next snapshot would have another disk than its
/// memory knows, so it must not be one.
pub fn is_imported(m: &MachineSpec) -> bool {
    m.devices.last().is_some_and(|device| device == SEED)
}

/// An image's parts as files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    pub memory: PathBuf,
    pub device: PathBuf,
    pub disk: PathBuf,
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

pub fn machine_arguments(m: &MachineSpec, files: &Files, run: &Run) -> Vec<String> {
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
        (
            "-drive",
            format!("file={},if=none,id=disk0,format=raw,{},file.locking=off", path(&files.disk), writes(m, run.start)),
        ),
        ("-netdev", format!("{},id=net0,fd={}", m.netdev, run.tap_fd)),
        ("-object", "rng-random,id=rng0,filename=/dev/urandom".to_owned()),
        ("-chardev", format!("socket,id=agent0,path={},server=on,wait=off", path(&run.guest_agent))),
        ("-qmp", format!("unix:{},server=on,wait=off", path(&run.qmp))),
        ("-serial", run.console.as_ref().map_or("null".to_owned(), |file| format!("file:{}", file.display()))),
        ("-display", "none".to_owned()),
        ("-sandbox", sandbox.to_owned()),
    ]
    .into_iter()
    .flat_map(|(flag, value)| [flag.to_owned(), value])
    .collect();
    if is_imported(m) {
        let seed = match run.start {
            Start::Boot => {
                let file = path(&files.seed());
                format!(
                    "driver=raw,node-name=seed0,read-only=on,file.driver=file,file.locking=off,file.filename={file}"
                )
            }
            // It was read long ago; what stands in its place answers zeros to a guest that looks again.
            Start::Clone | Start::Shared => {
                format!("driver=null-co,node-name=seed0,read-only=on,read-zeroes=on,size={SEED_SIZE}")
            }
        };
        argv.extend(["-blockdev".to_owned(), seed]);
    } else if run.start == Start::Boot {
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

/// What becomes of writes to the root disk. Whether it takes any is part of the state: a guest that was suspended
/// with the other kind does not load.
fn writes(m: &MachineSpec, start: Start) -> &'static str {
    match (is_imported(m), start) {
        // Replicas never write their disk: an overlay in guest memory takes the writes, and every clone shares
        // this file.
        (false, _) => "readonly=on",
        // Without the second word QEMU would open it again at the suspend, by a name that nobody may read.
        (true, Start::Boot) => "readonly=off,auto-read-only=off",
        // QEMU makes an overlay in `TMPDIR` (else /var/tmp) and takes its name away before the guest runs: no
        // clone leaves one behind, however it ends.
        (true, Start::Clone | Start::Shared) => "snapshot=on",
    }
}

/// As [`machine_arguments`], for a guest whose disk comes as it is read: from export `disk` of the NBD server at
/// `socket`. While that is away the guest's reads wait, for [`DISK_AWAY`] s at most.
pub fn lazy_arguments(m: &MachineSpec, memory: &Path, socket: &Path, run: &Run) -> Vec<String> {
    let files = Files { memory: memory.to_owned(), ..Files::within(Path::new("")) };
    let mut argv = machine_arguments(m, &files, run);
    // In the words of one option and of the other; only with the first does QEMU make an overlay.
    let (option, name, how) = match is_imported(m) {
        true => ("-drive", "if=none,id=disk0", writes(m, run.start)),
        false => ("-blockdev", "node-name=disk0", "read-only=on"),
    };
    let disk = format!(
        "driver=nbd,{name},server.type=unix,server.path={},export=disk,{how},reconnect-delay={DISK_AWAY},open-timeout={DISK_AWAY}",
        path(socket)
    );
    if let Some([flag, value]) = argv
        .iter()
        .position(|a| a == "-drive")
        .and_then(|at| argv.get_mut(at..at + 2))
        .and_then(|two| two.as_mut_array())
    {
        (*flag, *value) = (option.to_owned(), disk);
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
    let expected = if is_imported(m) { imported_devices } else { devices };
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
        ("devices", format!("{:?}", m.devices), format!("{:?}", expected(&manifest.guest.mac)), rebuild),
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
pub(crate) mod tests {
    use super::*;
    use vmatrix_model::manifest::{Blob, FORMAT, GuestSpec, Health, Measured, Memory, Part, PartKind, WorkingSet};
    use vmatrix_model::{Bytes, Digest};

    const MAC: &str = "52:54:00:12:34:56";

    pub(crate) fn manifest() -> Manifest {
        let blob = |plain: u64| Blob { digest: Digest::of(b"blob"), stored: Bytes(1), plain: Bytes(plain) };
        let part = |kind, size: u64| Part {
            kind,
            size: Bytes(size),
            chunk: Bytes(1 << 20),
            table: blob(4 * size.div_ceil(1 << 20)),
            stored: Bytes(0),
        };
        Manifest {
            format: FORMAT,
            name: "tiny".to_owned(),
            recipe: Digest::of(b"recipe"),
            parent: None,
            epoch: 0,
            seal: None,
            machine: MachineSpec {
                qemu_version: "10.0.2".to_owned(),
                machine_type: MACHINE_TYPE.to_owned(),
                cpu_model: "Nehalem".to_owned(),
                accelerator: "tcg".to_owned(),
                smp: 1,
                memory_mib: 128,
                devices: devices(MAC),
                netdev: NETDEV.to_owned(),
                append: "quiet".to_owned(),
            },
            guest: GuestSpec {
                address: [192, 168, 1, 10].into(),
                gateway: [192, 168, 1, 1].into(),
                mac: MAC.to_owned(),
                ports: vec![80],
                health: Health { port: 80, path: "/".to_owned(), status: 200 },
                backends: vec![],
                reseeds: true,
            },
            memory: Memory {
                size: Bytes(128 << 20),
                zero_pages: 32768,
                parent_pages: 0,
                first: blob(4),
                rest: blob(1),
                working_set: WorkingSet::default(),
                stored: Bytes(0),
            },
            device: blob(400_000),
            parts: vec![part(PartKind::Disk, 1 << 20), part(PartKind::Kernel, 5), part(PartKind::Initrd, 5)],
            measured: Measured { boot_ms: 1, answer_ms: 1 },
        }
    }

    fn argv(start: Start) -> String {
        let run = Run {
            name: "tiny-0,x".to_owned(),
            qmp: "/run/q".into(),
            guest_agent: "/run/a,b".into(),
            tap_fd: 9,
            console: None,
            start,
        };
        arguments(&manifest(), &Files::within(Path::new("/i")), &run).join(" ")
    }

    #[test]
    fn a_clone_maps_memory_privately_and_waits_a_boot_writes_it() {
        let clone = argv(Start::Clone);
        assert!(clone.contains("mem-path=/i/memory,share=off,readonly=on,rom=off"), "{clone}");
        assert!(clone.ends_with("-run-with user=nobody -incoming defer"), "{clone}");
        let boot = argv(Start::Boot);
        assert!(boot.contains("mem-path=/i/memory,share=on") && !boot.contains("-incoming"), "{boot}");
    }

    #[test]
    fn a_disk_that_comes_as_it_is_read_takes_the_place_of_the_file() {
        let run = Run {
            name: "tiny-0".to_owned(),
            qmp: "/run/q".into(),
            guest_agent: "/run/a".into(),
            tap_fd: 0,
            console: None,
            start: Start::Clone,
        };
        let lazy = lazy_arguments(&manifest().machine, Path::new("/m"), Path::new("/run/n,bd"), &run);
        let whole = arguments(&manifest(), &Files::within(Path::new("/i")), &run);
        assert_eq!(lazy.len(), whole.len());
        let differs: Vec<&String> = lazy.iter().zip(&whole).filter(|(l, w)| l != w).map(|(l, _)| l).collect();
        assert_eq!(differs.len(), 3, "memory, flag and disk: {differs:?}");
        assert!(
            differs[2].contains("server.path=/run/n,,bd,export=disk,read-only=on,reconnect-delay=30"),
            "{differs:?}"
        );
    }

    fn imported(start: Start) -> (MachineSpec, Run) {
        let mut m = manifest().machine;
        m.devices = imported_devices(MAC);
        let run = Run {
            name: "shop".to_owned(),
            qmp: "/run/q".into(),
            guest_agent: "/run/a".into(),
            tap_fd: 9,
            console: None,
            start,
        };
        (m, run)
    }

    #[test]
    fn an_imported_guest_boots_by_itself_and_writes_its_disk_a_clone_writes_over_it() {
        let argv = |start| {
            let (m, run) = imported(start);
            machine_arguments(&m, &Files::within(Path::new("/i")), &run).join(" ")
        };
        let (boot, clone) = (argv(Start::Boot), argv(Start::Clone));
        assert!(boot.contains("file=/i/disk,if=none,id=disk0,format=raw,readonly=off,auto-read-only=off,"), "{boot}");
        assert!(boot.contains("node-name=seed0,read-only=on,file.driver=file") && boot.contains("/i/seed"), "{boot}");
        assert!(clone.contains("file=/i/disk,if=none,id=disk0,format=raw,snapshot=on,"), "{clone}");
        assert!(clone.contains("driver=null-co,node-name=seed0,read-only=on") && !clone.contains("/i/seed"), "{clone}");
        let (m, run) = imported(Start::Clone);
        let lazy = lazy_arguments(&m, Path::new("/m"), Path::new("/s"), &run).join(" ");
        assert!(lazy.contains("-drive driver=nbd,if=none,id=disk0,server.type=unix,server.path=/s"), "{lazy}");
        assert!(lazy.contains("snapshot=on") && lazy.contains("null-co"), "{lazy}");
    }

    #[test]
    fn an_imported_guest_is_nobody_from_its_first_boot_on_and_brings_its_own_kernel() {
        for start in [Start::Boot, Start::Clone] {
            let (m, run) = imported(start);
            let argv = machine_arguments(&m, &Files::within(Path::new("/i")), &run).join(" ");
            assert!(!argv.contains("-kernel") && !argv.contains("-append") && !argv.contains("/i/initrd"), "{argv}");
            assert_eq!(argv.matches("-run-with user=nobody").count(), 1, "{argv}");
            assert!(argv.contains("-sandbox on,obsolete=deny,spawn=deny") && !argv.contains("elevate"), "{argv}");
            assert!(argv.contains("drive=disk0,id=blk0,bootindex=0") && argv.contains("drive=seed0,id=blk1"), "{argv}");
        }
        let host = Host { qemu_version: "10.0.2".to_owned(), accelerator: "tcg".to_owned() };
        let mut m = manifest();
        m.machine.devices = imported_devices(MAC);
        assert_eq!(check_host(&m, &host), Ok(()));
        m.machine.devices.insert(0, "virtio-balloon-pci".to_owned());
        assert!(check_host(&m, &host).is_err());
    }

    #[test]
    fn every_machine_is_the_same_but_for_its_start() {
        for argv in [argv(Start::Boot), argv(Start::Clone)] {
            assert!(argv.contains("-machine pc-q35-10.0,memory-backend=ram0"));
            assert!(argv.contains("-nodefaults -no-user-config") && argv.contains("-sandbox on"));
            assert!(argv.contains("file=/i/disk,if=none,id=disk0,format=raw,readonly=on"));
            assert!(argv.contains("-netdev tap,id=net0,fd=9"));
            assert!(argv.contains("tiny-0,,x") && argv.contains("path=/run/a,,b"), "a comma splits an option");
        }
    }

    #[test]
    fn a_machine_that_differs_is_refused_by_the_name_of_what_differs() {
        let host = Host { qemu_version: "10.0.2".to_owned(), accelerator: "tcg".to_owned() };
        assert_eq!(check_host(&manifest(), &host), Ok(()));
        let differs = |change: fn(&mut Manifest), what: &str| {
            let mut m = manifest();
            change(&mut m);
            let error = check_host(&m, &host).unwrap_err();
            assert_eq!(error.what, what, "{error}");
        };
        differs(|m| m.machine.machine_type = "pc-q35-9.2".to_owned(), "machine type");
        differs(|m| m.machine.cpu_model = "max".to_owned(), "CPU model");
        differs(|m| m.machine.accelerator = "kvm".to_owned(), "accelerator");
        differs(|m| m.machine.qemu_version = "9.2.0".to_owned(), "QEMU version");
        differs(|m| m.machine.netdev = "user".to_owned(), "network back end");
        differs(|m| m.machine.devices.push("virtio-balloon-pci".to_owned()), "devices");
        differs(|m| m.machine.devices = vec![m.machine.devices.join(" ")], "devices");
    }

    #[test]
    fn qemus_version_is_read_from_what_it_says() {
        let says = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
        assert_eq!(parse_version(says).as_deref(), Some("10.0.2"));
        assert_eq!(parse_version("no such thing"), None);
    }
}
