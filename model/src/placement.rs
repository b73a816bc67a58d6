//! What is wanted: how many instances of each service run in each network.

use crate::{Generation, NetworkId, ServiceId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Wanted instances per (service, network). Immutable and numbered.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    pub generation: Generation,
    pub services: BTreeMap<ServiceId, BTreeMap<NetworkId, Share>>,
}

/// One network's share of one service; a network that is not listed holds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Share {
    /// The image is there; nothing runs.
    Dormant,
    /// So many instances run (at least one).
    Active(u32),
}

impl Share {
    /// Instances that run.
    pub fn instances(self) -> u32 {
        match self {
            Share::Dormant => 0,
            Share::Active(n) => n,
        }
    }
}

impl Placement {
    /// The share of `service` that `network` has.
    pub fn share(&self, service: &ServiceId, network: &NetworkId) -> Option<Share> {
        self.services.get(service)?.get(network).copied()
    }

    /// The networks where `service` runs, in order of name.
    pub fn active<'a>(&'a self, service: &ServiceId) -> impl Iterator<Item = &'a NetworkId> {
        self.services.get(service).into_iter().flatten().filter(|(_, s)| s.instances() > 0).map(|(n, _)| n)
    }
}
