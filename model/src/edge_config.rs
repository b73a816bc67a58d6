//! One network's whole wanted edge state: which cells stand behind which public address.

use crate::{NetworkId, ServiceId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// Sent by the VM agent to the edge of its network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeConfig {
    /// The VM agent's own count; after a restart it goes on from what the edge has.
    pub generation: crate::Generation,
    pub network: NetworkId,
    pub services: BTreeMap<ServiceId, EdgeService>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeService {
    /// The public address.
    pub vip: Ipv4Addr,
    /// TCP ports that answer; everything else is dropped.
    pub ports: Vec<u16>,
    /// Cells in rotation.
    pub slots: Vec<Slot>,
    /// Cells out of rotation that may still finish what they began.
    pub draining: Vec<Ipv4Addr>,
    /// Where new connections go while no cell is in rotation.
    pub forward_to: Option<Ipv4Addr>,
}

/// A cell in rotation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// The cell's address within the network.
    pub cell: Ipv4Addr,
    /// Share of new connections, 1 to 16.
    pub weight: u32,
}

/// What an edge has installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeSeen {
    pub network: NetworkId,
    /// Of the edge config in force.
    pub config: crate::Generation,
    /// Of the steering in force.
    pub steering: crate::Generation,
    /// Open connections per cell address.
    pub connections: BTreeMap<Ipv4Addr, u32>,
}
