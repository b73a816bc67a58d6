//! The suspended VM: built from a recipe, signed, cut into chunks, verified, resumed.
//!
//! ```text
//! recipe ─build─▶ root fs, kernel ─boot, warm, suspend─▶ parts ─chunks─▶ Store ─sign─▶ SignedManifest
//! SignedManifest ─sign::verify─▶ Manifest ─chunks::PartFile─▶ Files ─machine─▶ argv ─qmp, guest─▶ running
//! ```

pub mod accel;
mod bounds;
pub mod build;
pub mod chunks;
mod cpio;
pub mod error;
pub mod guest;
pub mod health;
pub mod inspect;
pub mod machine;
pub mod netns;
pub mod postgres;
pub mod qmp;
pub mod recipe;
pub mod sign;
pub mod store;

pub use error::{Error, Result};
pub use store::Store;
