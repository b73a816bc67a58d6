//! What a suspended VM is: the machine it must be resumed on, byte for byte, and where its bytes are.

use crate::{Bytes, Digest};
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Of this format: [`FORMAT`].
    pub format: u32,
    /// Name of the recipe it was built from.
    pub name: String,
    /// Digest of the recipe with everything it read; an image is built again when it changes.
    pub recipe: Digest,
    pub machine: MachineSpec,
    pub guest: GuestSpec,
    pub parts: Vec<Part>,
    pub measured: Measured,
}

/// The only manifest format so far.
pub const FORMAT: u32 = 1;
/// Largest manifest text: an 8 GiB image in 256 KiB chunks is 2.2 MiB of digests.
pub const MANIFEST_MAX: usize = 16 << 20;

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
    /// One entry a chunk, in order; a chunk of zeros has none.
    pub chunks: Vec<Option<Chunk>>,
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
    /// Guest memory.
    Memory,
    /// Device state, saved apart.
    Device,
    /// Root disk, read-only for ever.
    Disk,
    Kernel,
    Initrd,
    /// What the back end held when the guest was warmed: SQL, for the origin.
    BackendSeed,
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

    /// Stored bytes of the whole image, each chunk counted once.
    pub fn stored(&self) -> Bytes {
        let unique: std::collections::BTreeMap<Digest, Bytes> =
            self.parts.iter().flat_map(|p| p.chunks.iter().flatten()).map(|c| (c.digest, c.stored)).collect();
        unique.into_values().sum()
    }
}
