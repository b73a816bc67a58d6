//! The nouns of vMatrix: data that the CPA, the VM agents, the edges and the replay exchange.
//!
//! ```text
//! fleet ─▶ demand, inventory ─▶ placement ─▶ plan ─▶ assignment ─▶ edge_config
//!  what exists   what is seen     wanted       moves    one share     one edge
//! ```
//!
//! Data only: no lock, no channel, no handle, no clock, no I/O. Whatever decides lives in a
//! `core`, whatever touches the world in an `agent`.

pub mod assignment;
pub mod config;
pub mod demand;
pub mod edge_config;
pub mod fleet;
pub mod ids;
pub mod inventory;
pub mod manifest;
pub mod placement;
pub mod plan;
pub mod steering;
pub mod units;
pub mod wire;

pub use ids::{Digest, Generation, InstanceId, KeyId, MachineId, NetworkId, RegionId, ServiceId, SiteId};
pub use units::{Bytes, Mbit, MicroUsd, Span, Time};
