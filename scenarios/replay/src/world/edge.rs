//! A simulated edge: the decisions of `edge/core` over a packet filter that is a value.
//!
//! ```text
//! EdgeConfig ─▶ nat table ◀─ connect (a slot is drawn, the client counted)
//! Steering   ─▶ answers   ◀─ resolve
//! ```
//!
//! Like a real one it consists of a kernel part (table, counters, connections), which survives its
//! daemon, and a daemon part (answers, reports), which does not.

use crate::chance::Chance;
use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use vmatrix_edge_core::demand::{Counters, increments};
use vmatrix_edge_core::dns::{self, ClientSubnet, Kind, Record};
use vmatrix_edge_core::nat::{self, Element, Rules, SLOTS, Table};
use vmatrix_edge_core::steering;
use vmatrix_model::demand::DemandReport;
use vmatrix_model::edge_config::{EdgeConfig, EdgeSeen};
use vmatrix_model::steering::Steering;
use vmatrix_model::{Bytes, Generation, NetworkId, ServiceId, Time};

pub struct Edge {
    network: NetworkId,
    gateway: Ipv4Addr,
    zone: String,
    /// Whether its daemon runs.
    pub up: bool,
    run: u64,
    sequence: u64,
    config: Option<EdgeConfig>,
    steering: Option<Steering>,
    answers: Option<steering::Table>,
    table: Table,
    counters: Counters,
    told: Counters,
    connections: BTreeMap<Ipv4Addr, u32>,
    chance: Chance,
}

/// Where a new connection goes.
pub enum Target {
    Cell(Ipv4Addr),
    /// To another network's public address.
    Elsewhere(Ipv4Addr),
}

impl Edge {
    pub fn new(network: &NetworkId, gateway: Ipv4Addr, zone: &str, seed: u64) -> Edge {
        Edge {
            network: network.clone(),
            gateway,
            zone: zone.to_owned(),
            up: true,
            run: 1,
            sequence: 0,
            config: None,
            steering: None,
            answers: None,
            table: Table::default(),
            counters: Counters::default(),
            told: Counters::default(),
            connections: BTreeMap::new(),
            chance: Chance::named(seed, &["edge", network.as_str()]),
        }
    }

    /// Its daemon was killed and begins anew: what it wrote down and what the kernel holds is there.
    pub fn restart(&mut self) {
        self.up = true;
        self.run += 1;
        self.sequence = 0;
        self.told = self.counters.clone();
    }

    /// Installs a config, unless a newer one is in force or it cannot be: then the one in force stays.
    pub fn configure(&mut self, config: EdgeConfig) -> EdgeSeen {
        let newer = self.config.as_ref().is_none_or(|old| old.generation <= config.generation);
        if newer && let Ok(wanted) = nat::wanted(&config, Rules { uplink: "wan0".into(), ..Rules::default() }) {
            let change = nat::plan(&self.table, &wanted);
            self.table = nat::apply(&self.table, &change);
            self.config = Some(config);
        }
        self.seen()
    }

    /// Takes new answers, unless newer ones are in force; says whether anything changed.
    pub fn steer(&mut self, steering: Steering) -> bool {
        if self.steering.as_ref().is_some_and(|old| old.generation >= steering.generation) {
            return false;
        }
        self.answers = Some(steering::Table::new(&steering));
        self.steering = Some(steering);
        true
    }

    /// What it has installed.
    pub fn seen(&self) -> EdgeSeen {
        EdgeSeen {
            network: self.network.clone(),
            config: self.config.as_ref().map_or(Generation(0), |c| c.generation),
            steering: self.steering.as_ref().map_or(Generation(0), |s| s.generation),
            connections: self.connections.clone(),
        }
    }

    /// The first address that a client gets for a service, and for how many seconds.
    pub fn resolve(&self, service: &ServiceId, resolver: Ipv4Addr) -> Option<(Ipv4Addr, u32)> {
        let name = format!("{service}.{}", self.zone);
        let subnet = ClientSubnet { address: IpAddr::V4(resolver), source: 24 };
        let answer = dns::answer(
            self.answers.as_ref(),
            &self.zone,
            self.gateway,
            &name,
            Kind::A,
            Some(subnet),
            IpAddr::V4(resolver),
        );
        let address = answer.records.iter().find_map(|r| if let Record::Address(a) = r { Some(*a) } else { None })?;
        Some((address, answer.ttl_s))
    }

    /// Draws a slot for a new connection of `client` to `vip:port`, counts it, and says where it goes;
    /// nowhere if no slot is filled: then the packet is dropped.
    pub fn connect(&mut self, client: Ipv4Addr, vip: Ipv4Addr, port: u16) -> Option<Target> {
        if !self.table.elements.contains(&Element::Declared { vip, port }) {
            return None;
        }
        *self.counters.requests.entry((cluster(client), vip)).or_default() += 1;
        let drawn = self.chance.under(u64::from(SLOTS)) as u32;
        let first = Element::Slot { vip, port, slot: drawn, to: Ipv4Addr::UNSPECIFIED };
        let to = match self.table.elements.range(first..).next()? {
            Element::Slot { vip: v, port: p, slot, to } if (*v, *p, *slot) == (vip, port, drawn) => *to,
            _ => return None,
        };
        if self.table.elements.contains(&Element::Elsewhere(to)) {
            return Some(Target::Elsewhere(to));
        }
        *self.connections.entry(to).or_default() += 1;
        Some(Target::Cell(to))
    }

    /// A connection to a cell has ended, after so many bytes to the client.
    pub fn disconnect(&mut self, cell: Ipv4Addr) {
        if let Some(open) = self.connections.get_mut(&cell) {
            *open -= 1;
            if *open == 0 {
                self.connections.remove(&cell);
            }
        }
    }

    /// Counts bytes sent to a client.
    pub fn count_bytes(&mut self, client: Ipv4Addr, vip: Ipv4Addr, bytes: Bytes) {
        *self.counters.bytes.entry((cluster(client), vip)).or_default() += bytes;
    }

    /// What was asked for since the last report.
    pub fn report(&mut self, now: Time) -> DemandReport {
        let services = self.config.iter().flat_map(|c| &c.services);
        let owners: BTreeMap<Ipv4Addr, ServiceId> = services.map(|(name, s)| (s.vip, name.clone())).collect();
        let counts = increments(&self.told, &self.counters, &owners);
        self.told = self.counters.clone();
        self.sequence += 1;
        DemandReport { network: self.network.clone(), sequence: self.sequence, run: self.run, at: now, counts }
    }

    /// The cells that new connections to any port of `service` may go to.
    pub fn rotation(&self, service: &ServiceId) -> Vec<Ipv4Addr> {
        let config = self.config.as_ref().and_then(|c| c.services.get(service));
        config.map_or(Vec::new(), |s| s.slots.iter().map(|slot| slot.cell).collect())
    }
}

/// The /24 that a client is counted under.
fn cluster(client: Ipv4Addr) -> Ipv4Net {
    let [a, b, c, _] = client.octets();
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), 24)
}
