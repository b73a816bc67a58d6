//! Does what `vmatrix-vma-core` decides: the VM agent of a network, and the machines it sends steps to.
//!
//! ```text
//!  cpa ──assignment──▶ vma ──step──▶ machine ──▶ cell, tunnel, QEMU
//!   ▲                  │ ▲              │  └───▶ image, chunk by chunk, from the origin
//!   └────inventory─────┘ └──────look────┘
//!                      └──edge config──▶ edge
//! ```
//!
//! Two daemons: [`run`] is the VM agent, [`machine::run`] a machine. Neither keeps anything in
//! memory that a look at the world would not show again, so each may be killed at any moment; VMs and
//! tunnels are processes of their own and go on.

pub mod config;
pub mod error;
mod http;
mod knock;
pub mod machine;
mod vma;

pub use error::Error;
pub use vma::run;

use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use vmatrix_model::Time;

/// Now, as the model counts it.
fn now() -> Time {
    Time(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX)))
}

/// Replaces a file: a reader, or a restart, sees the old content or the new, never half.
fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = std::fs::File::create(&beside)?;
    file.write_all(content)?;
    file.sync_data()?;
    std::fs::rename(&beside, path)
}
