//! Disks that somebody brings, and disks that somebody takes away.
//!
//! ```text
//! raw, qcow2, vmdk, OVA ─source─▶ raw disk ─boot, health, warm, suspend─▶ image in a store
//! image in a store ─export─▶ raw, qcow2, OVA
//! ```
//! Every format is read by a strict reader of our own before any program sees the file.

mod boot;
mod cell;
mod convert;
pub mod digests;
pub mod error;
mod export;
mod field;
mod import;
mod iso;
mod lease;
pub mod ovf;
pub mod progress;
pub mod qcow2;
mod seed;
pub mod source;
pub mod tar;
pub mod vmdk;

pub use error::{Error, Result};
pub use export::{Exported, export};
pub use import::{Built, Options, import};
pub use progress::{Event, Observer};
pub use source::{Disk, Format};
