//! Bytes of suspended VMs between agents: who a peer is, what it is asked, in which order it answers.
//!
//! ```text
//!             want(need, class)                     frames over TLS 1.3, both sides certified
//! pager ──▶ Sources ──▶ plan ──▶ link ═══════════════════════════════════▶ serve ──▶ Store
//!   ▲          │ local store first           Open, Get, Key, Cancel          │ outbox: misses first
//!   └── plain ◀┴── verified, kept ◀════════ Begin, Data, Missing, Elsewhere ◀┘ bucket: rate cap
//! ```
//!
//! # Invariants
//! 1. Nothing is handed on or kept that does not open to what was needed (`vmatrix_vma_image::chunks::open`).
//! 2. A peer that is no member of the fleet reads and writes nothing; an owner's key goes to machines only.
//! 3. A miss waits behind at most one frame of anything else, on either side of the wire.
//! 4. Questions beside chunks ([`Sources::ask`], [`Answerer`]) are answered to machines only, and bounded.
//! 5. What is allocated for a peer is bounded by what was asked of it.

mod bucket;
mod class;
mod error;
mod frame;
mod holders;
pub mod identity;
mod link;
mod outbox;
mod plan;
pub mod question;
mod serve;
mod socket;
mod sources;
mod tls;

pub use class::Class;
pub use error::{Error, Fault, Result};
pub use frame::ImageRef;
pub use serve::{Answerer, Sent, Server, ServerConfig, StoreConfig, run, run_answering, serve};
pub use sources::{Arrived, Ask, Fill, Limits, Opened, Pushed, SourceStatus, Sources, SourcesConfig};
#[cfg(test)]
mod tests;
