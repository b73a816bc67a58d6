//! Replays a scenario in virtual time through the cores that run live, and sums up what happened,
//! there or in the lab.
//!
//! ```text
//! scenario ─▶ arrivals ─▶ replay (here) or lab (real) ─▶ recording ─▶ report, timeline, HTML
//! ```

pub mod arrivals;
pub mod chance;
pub mod expect;
pub mod journal;
pub mod matrix;
pub mod oracle;
pub mod policy;
pub mod prefixes;
pub mod recording;
pub mod report;
pub mod scenario;
pub mod timeline;
pub mod trace;
mod world;

pub use timeline::timeline;
pub use world::{replay, replay_under};
