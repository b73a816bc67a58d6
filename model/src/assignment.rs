//! One network's share of a placement: whole and numbered, never a change.

use crate::fleet::Backend;
use crate::{Generation, NetworkId, ServiceId, Span};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

/// What one VM agent is asked to make true.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assignment {
    pub generation: Generation,
    pub network: NetworkId,
    /// Services whose image is to be here; one that is not listed is to be gone.
    pub services: BTreeMap<ServiceId, ServiceShare>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceShare {
    /// Name of the image in the origin's store.
    pub image: String,
    /// Instances that are to run; 0 keeps the image dormant.
    pub instances: u32,
    pub memory_mib: u64,
    /// The public address of the service in this network.
    pub vip: Ipv4Addr,
    pub ports: Vec<u16>,
    /// Back ends its cells may reach through the tunnel.
    pub backends: Vec<Backend>,
    /// How long an instance out of rotation may keep its open connections.
    pub drain: Span,
    /// Where new connections go while nothing runs here: clients whose resolver kept an old answer.
    pub forward_to: Option<Ipv4Addr>,
    /// What is to become of it here, if it is a singleton.
    #[serde(default)]
    pub singleton: Option<Singleton>,
}

/// What a network is to do about a singleton.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Singleton {
    /// Whoever has it here keeps it; nobody here gets it.
    Keep,
    /// Begin it from its built image: it has never run.
    Begin,
    /// Take it over from the machine that gives chunks at this address: it holds it, or knows who does.
    Take(SocketAddr),
}
