//! What a guest is made in, whether it is built or imported: folders, a namespace and a process, which go with whoever
//! made them; and what all guests are given.
//!
//! ```text
//! Scratch (folders) + Cell (namespace) ─▶ Process (QEMU) ─▶ files of one moment ─owner's key─▶ an image
//! ```

mod cell;
mod owner;
mod process;
mod scratch;

pub use cell::{CLIENT, Cell};
pub use owner::key as owner_key;
pub use process::Process;
pub use scratch::Scratch;

use nix::sys::statvfs::statvfs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use vmatrix_vma_image::error::{Error, Result};

/// Every guest has this private address wherever it runs; its cell makes it unique (paper §4.1).
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 10);
/// Where a guest sends what is for others: its cell's bridge.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
/// Of every guest.
pub const MAC: &str = "52:54:00:12:34:56";
/// What lies beside guest memory, MiB: device state and a console's output, some hundred KiB; the rest is for others.
const BESIDE_MEMORY_MIB: u64 = 64;

/// Whether a process runs; one that has ended and that nobody asked how does not.
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
    // Its name, in brackets, may hold anything.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// A folder for a guest with `guest_mib` MiB. Memory that a guest writes belongs into memory. Where there is not enough
/// of it (a container's /dev/shm often has 64 MiB) the kernel would end QEMU in the middle of a boot, so a disk has to
/// do.
pub fn memory_place(guest_mib: u64) -> PathBuf {
    let shm = Path::new("/dev/shm");
    let free = statvfs(shm).map_or(0, |s| s.blocks_available().saturating_mul(s.fragment_size()));
    if free >> 20 >= guest_mib + BESIDE_MEMORY_MIB { shm.to_owned() } else { std::env::temp_dir() }
}

/// Runs what waits for programs and disks away from the runtime's own threads.
///
/// # Errors
/// The runtime ends first.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::Unhealthy(format!("a step was cut off: {e}")))
}
