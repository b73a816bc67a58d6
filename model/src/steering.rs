//! Who is sent where: what every edge's DNS answers.

use crate::{Generation, ServiceId};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// The whole answer table. Only addresses that were seen serving stand in it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Steering {
    pub generation: Generation,
    /// `maps` is answered for `maps.<zone>`.
    pub zone: String,
    pub ttl_s: u32,
    pub services: BTreeMap<ServiceId, Answers>,
}

/// Answers of one service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answers {
    /// By client prefix; prefixes may nest, the longest wins.
    pub by_clients: BTreeMap<Ipv4Net, Vec<Ipv4Addr>>,
    /// For everyone else.
    pub otherwise: Vec<Ipv4Addr>,
}

impl Answers {
    /// Whether nobody would get an address.
    pub fn is_empty(&self) -> bool {
        self.otherwise.is_empty() && self.by_clients.values().all(Vec::is_empty)
    }
}
