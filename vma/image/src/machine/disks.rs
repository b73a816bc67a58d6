//! A guest's disks as QEMU is told of them: kinds of parts ─▶ devices; devices, files or a socket ─▶ argv.
//!
//! | kind | serial, in the guest | export | written by |
//! |---|---|---|---|
//! | `Disk` | `root` | `disk` | nobody; an imported guest, over it |
//! | `Base` | `base` | `base` | nobody |
//! | `Data` | `data` | `data` | its one guest; a clone, over it |
//!
//! Whether a disk takes writes is part of the state: a guest that was suspended with the other kind does not load.

use super::{DISK_AWAY, Files, Start, path};
use std::path::Path;
use vmatrix_model::manifest::{MachineSpec, PartKind};

// Each with a geometry of its own: QEMU would else guess one from the disk's first sector before it answers, and for
// that sector a table and a chunk would have to come. Nothing that runs today looks at it.
pub(super) const ROOT: &str = "virtio-blk-pci,drive=disk0,id=blk0,serial=root,cyls=16383,heads=16,secs=63";
pub(super) const SEED: &str = "virtio-blk-pci,drive=seed0,id=blk1,cyls=16383,heads=16,secs=63";
const BASE: &str = "virtio-blk-pci,drive=base0,id=blk2,serial=base,cyls=16383,heads=16,secs=63";
const DATA: &str = "virtio-blk-pci,drive=data0,id=blk3,serial=data,cyls=16383,heads=16,secs=63";
/// What a device of an image of an earlier builder may lack: none of it is part of the state, and a guest that has one
/// disk finds it without.
const LATER: [&str; 2] = [",serial=root", ",cyls=16383,heads=16,secs=63"];
/// Bytes of every seed, so that what stands in its place when the guest is resumed has as many.
pub const SEED_SIZE: u64 = 64 << 20;

/// By which name the guest finds the disk of a kind (`/sys/block/*/serial`); none for what is no disk of it.
pub fn serial(kind: PartKind) -> Option<&'static str> {
    match kind {
        PartKind::Disk => Some("root"),
        PartKind::Base => Some("base"),
        PartKind::Data => Some("data"),
        PartKind::Kernel | PartKind::Initrd | PartKind::BackendSeed => None,
    }
}

/// By which name an NBD server exports the disk of a kind; none for what is no disk of a guest.
pub fn export(kind: PartKind) -> Option<&'static str> {
    match kind {
        PartKind::Disk => Some("disk"),
        PartKind::Base => Some("base"),
        PartKind::Data => Some("data"),
        PartKind::Kernel | PartKind::Initrd | PartKind::BackendSeed => None,
    }
}

/// Whether a machine is one of a guest that was imported as a disk. It writes its root disk, into an overlay that
/// goes with the process: for replicas that is right; a singleton's next snapshot would have another disk than its
/// memory knows, so it must not be one.
pub fn is_imported(m: &MachineSpec) -> bool {
    has(m, "seed0")
}

/// Whether a machine has the disk of this name.
fn has(m: &MachineSpec, node: &str) -> bool {
    let begins = format!("virtio-blk-pci,drive={node},");
    m.devices.iter().any(|device| device.starts_with(&begins))
}

/// Takes from a device what the one of an earlier image lacks.
pub(super) fn as_before(device: &mut String, earlier: &str) {
    for word in LATER.iter().filter(|word| !earlier.contains(*word)) {
        *device = device.replacen(word, "", 1);
    }
}

/// The devices of the disks beside the root.
pub(super) fn beside(kinds: &[PartKind]) -> impl Iterator<Item = String> {
    let devices = [(PartKind::Base, BASE), (PartKind::Data, DATA)];
    devices.into_iter().filter(|(kind, _)| kinds.contains(kind)).map(|(_, device)| device.to_owned())
}

/// Where the bytes of the disks are.
#[derive(Debug, Clone, Copy)]
pub(super) enum From<'a> {
    Files,
    /// An NBD server's socket.
    Socket(&'a Path),
}

/// What becomes of the writes to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writes {
    /// There are none. Replicas never write their root: an overlay in guest memory takes the writes, and every
    /// clone shares this file.
    Refused,
    /// They reach the disk.
    Kept,
    /// They go into an overlay that QEMU makes in `TMPDIR` (else `/var/tmp`) and whose name it takes away before the
    /// guest runs: no clone leaves one behind, however it ends.
    ThrownAway,
}

/// The words for every disk that the machine's devices name.
pub(super) fn arguments(m: &MachineSpec, files: &Files, from: From, start: Start) -> Vec<String> {
    let clone = start == Start::Clone;
    let root = match (is_imported(m), start) {
        (false, _) => Writes::Refused,
        (true, Start::Boot) => Writes::Kept,
        (true, Start::Clone | Start::Shared) => Writes::ThrownAway,
    };
    let data = if clone { Writes::ThrownAway } else { Writes::Kept };
    let mut argv = one(from, "disk0", "disk", &files.disk, root).to_vec();
    if is_imported(m) {
        argv.extend(seed(files, start));
    }
    if has(m, "base0") {
        argv.extend(one(from, "base0", "base", &files.base, Writes::Refused));
    }
    if has(m, "data0") {
        argv.extend(one(from, "data0", "data", &files.data, data));
    }
    argv
}

/// One disk, under the name that its device asks for.
fn one(from: From, node: &str, export: &str, file: &Path, writes: Writes) -> [String; 2] {
    // Only `-drive` makes an overlay. With it a disk that is written needs the second word too, or QEMU would open it
    // again at the suspend, by a name that nobody may read.
    let (flag, name, how) = match (from, writes) {
        (From::Files, Writes::Refused) => ("-drive", "if=none,id", "readonly=on"),
        (From::Files, Writes::Kept) => ("-drive", "if=none,id", "readonly=off,auto-read-only=off"),
        (_, Writes::ThrownAway) => ("-drive", "if=none,id", "snapshot=on"),
        (From::Socket(_), Writes::Refused) => ("-blockdev", "node-name", "read-only=on"),
        (From::Socket(_), Writes::Kept) => ("-blockdev", "node-name", "read-only=off,auto-read-only=off"),
    };
    let value = match from {
        From::Files => format!("file={},{name}={node},format=raw,{how},file.locking=off", path(file)),
        From::Socket(socket) => format!(
            "driver=nbd,{name}={node},server.type=unix,server.path={},export={export},{how},\
             reconnect-delay={DISK_AWAY},open-timeout={DISK_AWAY}",
            path(socket)
        ),
    };
    [flag.to_owned(), value]
}

fn seed(files: &Files, start: Start) -> [String; 2] {
    let value = match start {
        Start::Boot => {
            let file = path(&files.seed());
            format!("driver=raw,node-name=seed0,read-only=on,file.driver=file,file.locking=off,file.filename={file}")
        }
        // It was read long ago; what stands in its place answers zeros to a guest that looks again.
        Start::Clone | Start::Shared => {
            format!("driver=null-co,node-name=seed0,read-only=on,read-zeroes=on,size={SEED_SIZE}")
        }
    };
    ["-blockdev".to_owned(), value]
}
