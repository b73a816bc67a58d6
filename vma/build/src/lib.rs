//! From a recipe to a suspended VM: built, booted, warmed, suspended, its working set recorded, cut, signed.
//!
//! ```text
//! recipe ─build─▶ root ─▶ disk ─▶ warm guest ─▶ suspend ─▶ record (which pages come first) ─▶ image in a store
//! ```

pub mod build;
mod cpio;
pub mod learn;
pub mod postgres;
pub mod recipe;
pub mod record;
pub mod snapshot;
pub mod workshop;

pub use build::{Built, Options, build};
