//! What happened: made by the lab from real clients and by the replay from simulated ones, summed up by one report.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmatrix_model::plan::Decision;
use vmatrix_model::{Bytes, NetworkId, RegionId, ServiceId, Span, Time};

/// Everything a play recorded. Times are since the start of the play.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Recording {
    /// `tcg`, `kvm`, or `replay`.
    pub accelerator: String,
    /// In order of `at`.
    pub requests: Vec<Request>,
    /// In order.
    pub decisions: Vec<Decision>,
    /// Running instances per (service, network), whenever that changed.
    pub instances: Vec<InstancesAt>,
    /// What was seen to happen besides, in order of `at`; may be empty.
    #[serde(default)]
    pub steps: Vec<StepAt>,
    /// Image bytes that crossed the WAN.
    pub bytes_moved: Bytes,
    /// Whether, at the end, each service ran at home alone and every other copy was dormant.
    pub returned_to_dormant: bool,
    /// Writes that were acknowledged, and of these the ones not found when read through another network.
    pub writes: u64,
    /// See [`Recording::writes`].
    pub lost_writes: u64,
    /// Reads that found a write through another network than it was written through.
    #[serde(default)]
    pub read_across: u64,
    /// Canary bytes found in the capture of the whole WAN.
    pub plaintext_bytes_on_wan: u64,
    /// Times the capture held the control, which is sent unencrypted: 0 would mean a blind capture.
    #[serde(default)]
    pub control_seen: u64,
    /// Undeclared ports that were knocked at before the play.
    #[serde(default)]
    pub ports: Ports,
    /// Why, in sentences.
    pub explain: Vec<String>,
    /// Anything else that a reader must know (a fault that was injected, a check that could not run).
    pub notes: Vec<String>,
}

/// Ports that nothing declares, so that none may answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ports {
    /// Public and gateway addresses, knocked at from a client region.
    pub tried_from_wan: u64,
    /// A neighbour's addresses, knocked at from inside a cell of the same machine.
    pub tried_from_cells: u64,
    /// Those that did answer.
    pub answered: u64,
}

/// One request of one client, and how it ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub at: Time,
    pub service: ServiceId,
    pub region: RegionId,
    /// The network whose public address answered.
    pub network: Option<NetworkId>,
    /// From the first packet of the connection to the last byte of the answer.
    pub took: Span,
    /// Why it failed, if it did.
    pub failed: Option<String>,
}

/// Something that a daemon did, or that was done to it, for the timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepAt {
    pub at: Time,
    /// One word: `announce`, `stage`, `resume`, `drain`, `suspend`, `kill`, `restart`.
    pub verb: String,
    /// What it was about, in a few words.
    pub what: String,
}

/// How many instances of a service serve where, from a moment on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstancesAt {
    pub at: Time,
    pub service: ServiceId,
    pub serving: BTreeMap<NetworkId, u32>,
}
