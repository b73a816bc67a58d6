//! What a suspended VM is: the machine it must be resumed on, byte for byte, and where its bytes are.

use crate::{Bytes, Digest, KeyId};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// The manifest as it is signed and sent: exactly these bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedManifest {
    /// The manifest's JSON text. Its BLAKE3 digest names the image.
    pub manifest: String,
    /// ed25519 signature of that text, 128 hex digits.
    pub signature: String,
    /// ed25519 public key, 64 hex digits.
    pub signer: String,
}

/// A suspended VM.
///
/// It names bytes by digest and holds no list of them: lists are blobs too ("tables"), so a manifest is a few
/// KiB whatever the size of the guest, and an order to resume waits for little.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Of this format: [`FORMAT`].
    pub format: u32,
    /// Name of the recipe it was built from.
    pub name: String,
    /// Digest of the recipe with everything it read; an image is built again when it changes.
    pub recipe: Digest,
    /// The image this is a snapshot of, by the digest of its manifest: what both have in common has the same
    /// digests in their tables.
    #[serde(default)]
    pub parent: Option<Digest>,
    /// Rises with each snapshot of a singleton; 0 for an image that was built or imported.
    #[serde(default)]
    pub epoch: u64,
    /// The owner's key, where memory and device state are sealed with one.
    #[serde(default)]
    pub seal: Option<KeyId>,
    pub machine: MachineSpec,
    pub guest: GuestSpec,
    pub memory: Memory,
    /// Device state, saved apart from memory.
    pub device: Blob,
    /// Files: disk, kernel, initrd, back-end seed.
    pub parts: Vec<Part>,
    pub measured: Measured,
}

/// The manifest format of this version.
pub const FORMAT: u32 = 2;
/// Largest manifest text.
pub const MANIFEST_MAX: usize = 256 << 10;

/// Bytes that the manifest names itself: a table, or device state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    /// BLAKE3 of the plain bytes.
    pub digest: Digest,
    /// Bytes as stored: zstd, and sealed where the image is.
    pub stored: Bytes,
    /// Bytes when unpacked.
    pub plain: Bytes,
}

/// Guest memory: pages of 4 KiB, each zero or in one pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Bytes of the guest's memory.
    pub size: Bytes,
    /// Zero pages: they are not stored, and answered without the network.
    pub zero_pages: u64,
    /// Pages that lie where the parent has them, unchanged.
    pub parent_pages: u64,
    /// Table of the zero pages and of the packs of the working set, in order of first touch: what is needed
    /// before the guest runs.
    pub first: Blob,
    /// Table of all other packs.
    pub rest: Blob,
    pub working_set: WorkingSet,
    /// Stored bytes of all packs, each counted once.
    pub stored: Bytes,
}

/// The pages that a resumed guest touches first, as they were recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    /// Pages in it.
    pub pages: u64,
    /// Stored bytes of its packs.
    pub stored: Bytes,
    /// Requests the guest answered while it was recorded; 0 if nothing was.
    pub requests: u32,
}

/// The virtual machine, pinned: QEMU takes a wrong CPU model or an extra device without a word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// `10.0.2`
    pub qemu_version: String,
    /// Versioned: `pc-q35-10.0`.
    pub machine_type: String,
    pub cpu_model: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    pub smp: u32,
    pub memory_mib: u64,
    /// The `-device` arguments in their order, with ids and flags.
    pub devices: Vec<String>,
    /// Kind of network back end: `tap`.
    pub netdev: String,
    /// Kernel command line.
    pub append: String,
}

/// What the guest expects round itself, the same wherever it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSpec {
    /// The private address it was built with (paper §4.1).
    pub address: Ipv4Addr,
    /// Its default gateway: the cell's bridge.
    pub gateway: Ipv4Addr,
    pub mac: String,
    /// TCP ports it answers on; only these are let in.
    pub ports: Vec<u16>,
    pub health: Health,
    /// Back ends it connects to, by address in the origin's intranet.
    pub backends: Vec<BackendSpec>,
    /// Whether a program inside takes fresh random bytes and the time when the guest wakes. Two clones of a
    /// guest without one begin with the same "random" numbers, at the time of the suspend.
    #[serde(default = "yes")]
    pub reseeds: bool,
}

fn yes() -> bool {
    true
}

/// How to tell that the guest serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Plain HTTP, asked from inside the cell; it need not be a declared port.
    pub port: u16,
    pub path: String,
    /// HTTP status that means healthy.
    pub status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendSpec {
    pub name: String,
    pub address: Ipv4Addr,
    pub port: u16,
}

/// One file of the image, cut into chunks of equal size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    pub kind: PartKind,
    /// Bytes of the whole file.
    pub size: Bytes,
    /// Bytes of every chunk but the last.
    pub chunk: Bytes,
    /// Table of its chunks, in order; a chunk of zeros has no entry of its own.
    pub table: Blob,
    /// Stored bytes of its chunks, each counted once.
    pub stored: Bytes,
}

/// A stored chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chunk {
    /// BLAKE3 of the plain bytes.
    pub digest: Digest,
    /// Bytes as stored (zstd).
    pub stored: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartKind {
    /// Root disk, read-only for ever; over a base, what the service adds to it.
    Disk,
    /// The operating system below the root disk, read-only for ever, and the same in all images on that base.
    Base,
    /// What a singleton writes: a disk of which a snapshot has the chunks that changed.
    Data,
    Kernel,
    Initrd,
    /// What the back end held when the guest was warmed: SQL, for the origin.
    BackendSeed,
}

impl PartKind {
    /// Whether a guest has it as a disk: then a guest that is resumed reads it, too.
    pub fn is_disk(self) -> bool {
        matches!(self, PartKind::Disk | PartKind::Base | PartKind::Data)
    }
}

/// What building measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// From power on to healthy, milliseconds.
    pub boot_ms: u64,
    /// Median answer of the warm guest, milliseconds.
    pub answer_ms: u64,
}

impl Manifest {
    pub fn part(&self, kind: PartKind) -> Option<&Part> {
        self.parts.iter().find(|p| p.kind == kind)
    }

    /// Stored bytes that a machine needs to have all of it: not what seeds the back end, nor what only a guest that
    /// is powered on reads.
    pub fn stored(&self) -> Bytes {
        let parts = self.parts.iter().filter(|p| p.kind != PartKind::BackendSeed);
        let chunks = |p: &Part| if p.kind.is_disk() { p.stored } else { Bytes(0) };
        parts.map(|p| chunks(p) + p.table.stored).sum::<Bytes>()
            + self.tables()
            + self.memory.stored
            + self.device.stored
    }

    /// Stored bytes that a machine needs before the guest runs: device state, first table, working set.
    pub fn critical(&self) -> Bytes {
        self.device.stored + self.memory.first.stored + self.memory.working_set.stored
    }

    fn tables(&self) -> Bytes {
        self.memory.first.stored + self.memory.rest.stored
    }

    /// 4 KiB pages of guest memory.
    pub fn pages(&self) -> u64 {
        self.memory.size.0 / 4096
    }
}
