//! What only the kernel can do: random pool, clock, page cache.

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::time::Duration;

mod request {
    nix::ioctl_write_ptr!(add_entropy, b'R', 0x03, [i32; 2]);
    nix::ioctl_none!(reseed, b'R', 0x07);
}

/// `struct rand_pool_info` with its bytes.
#[repr(C)]
struct Entropy<const N: usize> {
    bits: i32,
    bytes: i32,
    pool: [u8; N],
}

/// Mixes fresh bytes into the random pool, counts them, and has the generator take them at once.
pub fn reseed<const N: usize>(seed: &[u8; N]) -> Result<(), String> {
    let random = random()?;
    let bytes = i32::try_from(N).map_err(|e| e.to_string())?;
    let entropy = Entropy { bits: bytes * 8, bytes, pool: *seed };
    // SAFETY: the kernel reads the two counts and then `bytes` bytes, all of which `entropy` holds.
    #[allow(unsafe_code)]
    let added = unsafe { request::add_entropy(random.as_raw_fd(), std::ptr::from_ref(&entropy).cast()) };
    added.map_err(|e| format!("RNDADDENTROPY: {e}"))?;
    // SAFETY: takes no argument.
    #[allow(unsafe_code)]
    let taken = unsafe { request::reseed(random.as_raw_fd()) };
    taken.map(drop).map_err(|e| format!("RNDRESEEDCRNG: {e}"))
}

/// The random pool, opened once: in a guest that wakes, finding a file takes milliseconds.
fn random() -> Result<&'static File, String> {
    static POOL: OnceLock<File> = OnceLock::new();
    if let Some(pool) = POOL.get() {
        return Ok(pool);
    }
    let pool = OpenOptions::new().write(true).open("/dev/urandom").map_err(|e| format!("/dev/urandom: {e}"))?;
    Ok(POOL.get_or_init(|| pool))
}

/// Makes ready what an awakening needs.
pub fn prepare() -> Result<(), String> {
    random().map(drop)
}

/// Steps the wall clock.
pub fn set_clock(unix_us: u64) -> Result<(), String> {
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from(Duration::from_micros(unix_us)))
        .map_err(|e| format!("clock_settime: {e}"))
}

/// The wall clock, microseconds since the epoch.
pub fn clock() -> Result<u64, String> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).map_err(|e| format!("clock_gettime: {e}"))?;
    u64::try_from(Duration::from(now).as_micros()).map_err(|e| e.to_string())
}

/// Writes what is dirty, gives the page cache back, and moves what is used together, so that free memory lies
/// in large blocks: see [`crate::memory`]. The host sends a few requests afterwards, so that what they read is there
/// again.
pub fn trim() -> Result<(), String> {
    nix::unistd::sync();
    // 3: page cache, inodes and directory entries.
    fs::write("/proc/sys/vm/drop_caches", "3").map_err(|e| format!("drop_caches: {e}"))?;
    // Not every kernel has it, and it only makes the image smaller.
    let _ = fs::write("/proc/sys/vm/compact_memory", "1");
    Ok(())
}
