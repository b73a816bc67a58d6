//! Memory and disks of a guest that runs before they have arrived.
//!
//! ```text
//! guest touches a page ─▶ userfaultfd (registered by the preloaded library) ─▶ Engine ─▶ fetch(pack, class)
//!        ▲                                                                        │
//!        └─────────────── woken, the page is in the one memory file ◀─────────────┘
//! guest reads a sector ─▶ NBD ─▶ Disk ─▶ fetch(chunk) ─▶ one sparse file; a singleton's writes of its data go there too
//! ```
//! # Invariants
//! 1. A guest sees the bytes of its image or it waits; it never runs on a page that is not there.
//! 2. One fetch serves every clone on the machine: pages go into the file that all of them map.
//! 3. A page that is present is never written again.
//! 4. What is present is read from the file, who is served from `/proc`: a pager that is killed and started again
//!    goes on from there.
//! 5. What a singleton was told is written is in the disk's file, and marked as written.

mod adopt;
mod bits;
mod config;
mod control;
mod dirty;
mod disk;
pub mod engine;
pub mod error;
mod nbd;
mod process;
mod pushed;
mod rate;
mod shim;
mod socket;
mod state;
mod window;

pub use config::{Config, DisksConfig};
pub use control::Control;
pub use engine::{Engine, Fetch, Options, Stall, Status};
pub use error::{Error, Result};
pub use process::run;
pub use pushed::PUSHED_VARIABLE;
pub use shim::{preload, shim};
pub use state::{Class, Hydrate, MISSED_MAX, RECORDED_MAX};
