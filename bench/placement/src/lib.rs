//! `bench placement`: where and when, measured against what can be proven. Needs no VM and no privileges.
//!
//! ```text
//! traces, matrices (VMATRIX_DATA) ─▶ quality: online cost / certified bound   ─┐
//! worlds of a seed                ─▶ scale, burst, pools, fair, packing, speed ─┴▶ one JSON value
//! ```
//! Every figure that is a time is CPU time of this thread, so that others on the machine do not count.

pub mod burst;
pub mod fair;
pub mod packing;
pub mod pools;
pub mod quality;
pub mod scale;
pub mod speed;

use std::time::Duration;

/// CPU time that this thread has had.
pub fn cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
