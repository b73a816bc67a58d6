//! Replays a scenario in virtual time through the cores that run live.

pub mod recording;
pub mod report;
pub mod scenario;
