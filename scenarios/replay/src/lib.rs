//! Replays a scenario in virtual time through the cores that run live, and sums up what happened,
//! there or in the lab.
//!
//! ```text
//! scenario ─▶ arrivals ─▶ replay (here) or lab (real) ─▶ recording ─▶ report, timeline, HTML
//! ```

pub mod arrivals;
mod chance;
pub mod recording;
pub mod report;
pub mod scenario;
pub mod timeline;
mod world;

pub use timeline::timeline;
pub use world::replay;
