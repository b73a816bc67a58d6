//! What clients ask for, counted at the edges.

use crate::{Bytes, NetworkId, ServiceId, Time};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// What one edge counted since its last report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DemandReport {
    pub network: NetworkId,
    /// Rises by one with each report of one run of an edge; a repeated number is not counted twice.
    pub sequence: u64,
    /// Names the run of the edge, so that its sequence may begin again after a restart.
    pub run: u64,
    /// End of the interval.
    pub at: Time,
    pub counts: Vec<DemandCount>,
}

/// New connections and bytes of one client cluster for one service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DemandCount {
    pub service: ServiceId,
    /// The clients' /24.
    pub clients: Ipv4Net,
    /// New connections.
    pub requests: u64,
    /// Bytes sent to the clients.
    pub bytes: Bytes,
}

/// Most counts in a report: 150 services would each need 400 clusters in one second.
pub const COUNTS_MAX: usize = 65_536;
