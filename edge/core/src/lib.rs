//! What an edge decides: who is sent where, what the packet filter holds, what was asked for, which
//! cell has which place in the owner's intranet.
//!
//! ```text
//! Steering   ─▶ steering::Table ── question ──▶ dns::Answer
//! EdgeConfig ─▶ nat::Table ── minus installed ─▶ nat::Change (one transaction)
//! counters   ─▶ demand::increments ───────────▶ DemandCount
//! PeerRequest ─▶ tunnel::Leases ──────────────▶ address or refusal
//! ```
//!
//! No I/O, no clock, no randomness: the agent reads the world and does what is said here.

pub mod demand;
pub mod dns;
pub mod nat;
pub mod steering;
pub mod tunnel;
