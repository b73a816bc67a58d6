//! The suspended VM: cut into chunks, sealed, signed, kept; verified, put together, resumed.
//!
//! ```text
//! files, memory ─chunks, memory─▶ Store ─sign─▶ SignedManifest
//! SignedManifest ─sign::verify─▶ Manifest ─tables─▶ chunks ─▶ files, pages ─machine─▶ argv ─qmp, guest─▶ running
//! ```

pub mod accel;
mod bounds;
pub mod chunks;
pub mod error;
pub mod gc;
pub mod guest;
pub mod health;
pub mod inspect;
pub mod machine;
pub mod memory;
pub mod netns;
pub mod qmp;
pub mod seal;
pub mod sign;
pub mod store;

pub use error::{Error, Result};
pub use store::Store;
