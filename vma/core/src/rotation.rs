//! Which cells stand behind which public address: cells seen ─▶ the edge's whole config, and what it confirmed.

use crate::Vma;
use crate::steps::{Command, Life};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use vmatrix_model::edge_config::{EdgeConfig, EdgeSeen, EdgeService, Slot};
use vmatrix_model::{Generation, InstanceId, MachineId, NetworkId, ServiceId, Span, Time};

/// A config that was not confirmed is said again after so long.
const AGAIN: Span = Span::ms(500);

/// What the edge is to have, and what it has.
#[derive(Debug, Clone)]
pub struct Rotation {
    wanted: EdgeConfig,
    /// None until a config was wanted.
    sent: Option<Time>,
    seen: Option<EdgeSeen>,
    /// When it was last heard, or first missed.
    heard: Option<Time>,
    /// How often it was heard since it has what is wanted.
    looks: u32,
    /// Of the last config it confirmed.
    confirmed: Generation,
    /// Cells in rotation in that config and in every later one: whichever of them the edge has now, it sends
    /// new connections there.
    serving: BTreeSet<Ipv4Addr>,
}

/// A cell is idle when a look after the one that confirmed finds no connection: the edge may have
/// counted just before it took the cell out.
const LOOKS_MIN: u32 = 2;

impl Rotation {
    pub fn new(network: NetworkId) -> Rotation {
        Rotation {
            wanted: EdgeConfig { generation: Generation(0), network, services: BTreeMap::new() },
            sent: None,
            seen: None,
            heard: None,
            looks: 0,
            confirmed: Generation(0),
            serving: BTreeSet::new(),
        }
    }

    pub fn hear(&mut self, now: Time, seen: EdgeSeen) {
        self.heard = Some(now);
        let has_it = seen.config == self.wanted.generation;
        self.looks = if has_it { self.looks.saturating_add(1) } else { 0 };
        if has_it && self.sent.is_some() {
            self.confirmed = seen.config;
            self.serving = self.slots().collect();
        } else if seen.config < self.confirmed || seen.config > self.wanted.generation {
            // It lost what it had, or someone else told it something.
            self.serving.clear();
        }
        self.seen = Some(seen);
    }

    /// Wants these services; answers the config if the edge has to be told. Its generation goes on
    /// from the edge's own, so an agent that begins anew never says an old one.
    pub fn want(&mut self, now: Time, services: BTreeMap<ServiceId, EdgeService>) -> Option<Command> {
        self.heard.get_or_insert(now);
        let seen = self.seen.as_ref()?;
        let changed = self.sent.is_none() || services != self.wanted.services;
        let overtaken = seen.config > self.wanted.generation;
        let lost = seen.config < self.wanted.generation && self.sent.is_some_and(|at| now.since(at) >= AGAIN);
        if !(changed || overtaken || lost) {
            return None;
        }
        if changed || overtaken {
            self.wanted.generation = self.wanted.generation.max(seen.config).next();
            self.wanted.services = services;
            self.looks = 0;
            let slots: BTreeSet<Ipv4Addr> = self.slots().collect();
            self.serving.retain(|s| slots.contains(s));
        }
        self.sent = Some(now);
        Some(Command::Edge(self.wanted.clone()))
    }

    /// Whether the edge has what is wanted.
    pub fn is_confirmed(&self) -> bool {
        self.sent.is_some() && self.seen.as_ref().is_some_and(|s| s.config == self.wanted.generation)
    }

    /// Whether the edge was told something it has not confirmed.
    pub fn is_behind(&self) -> bool {
        self.sent.is_some() && !self.is_confirmed()
    }

    /// Whether the edge is there and has never had a config.
    pub fn is_blank(&self) -> bool {
        self.seen.as_ref().is_some_and(|s| s.config == Generation(0))
    }

    /// Whether the edge is known to send no new connection to `cell`.
    pub fn is_out(&self, cell: Ipv4Addr) -> bool {
        self.is_confirmed() && !self.slots().any(|s| s == cell)
    }

    /// Whether the edge is known to send new connections to `cell`.
    pub fn is_in(&self, cell: Ipv4Addr) -> bool {
        self.serving.contains(&cell)
    }

    /// Whether the edge has not been heard for so long that it holds up nothing.
    pub fn is_silent(&self, now: Time) -> bool {
        self.heard.is_some_and(|at| now.since(at) >= crate::EDGE_SILENCE)
    }

    /// Whether `cell` is out and has no connection left. The edge counts only what its config names.
    pub fn is_idle(&self, cell: Ipv4Addr) -> bool {
        let open = self.seen.as_ref().and_then(|s| s.connections.get(&cell).copied()).unwrap_or(0);
        let counted = self.wanted.services.values().any(|s| s.draining.contains(&cell));
        counted && self.is_out(cell) && self.looks >= LOOKS_MIN && open == 0
    }

    fn slots(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.wanted.services.values().flat_map(|s| s.slots.iter().map(|s| s.cell))
    }
}

/// The edge's whole wanted state: `keep` cells that are seen healthy in rotation, healthy ones that
/// go draining, everything else in neither.
pub fn services(vma: &Vma, keep: &BTreeSet<(MachineId, InstanceId)>) -> BTreeMap<ServiceId, EdgeService> {
    vma.shares()
        .map(|(service, share)| {
            let mut slots = BTreeSet::new();
            let mut draining = BTreeSet::new();
            for (machine, cell) in vma.all_cells().filter(|(_, c)| c.instance.service == *service) {
                let key = (machine.clone(), cell.instance.clone());
                let leaving = vma.cells.get(&key).is_some_and(|e| e.is_leaving());
                match cell.life {
                    Life::Healthy | Life::Handed if keep.contains(&key) && !leaving => {
                        slots.insert(Slot { cell: cell.address, weight: 1 });
                    }
                    Life::Healthy | Life::Sick | Life::Handed => {
                        draining.insert(cell.address);
                    }
                    Life::Building | Life::Ready | Life::Resuming | Life::Lost => {}
                }
            }
            let forward_to = share.forward_to.filter(|_| slots.is_empty());
            let edge = EdgeService {
                vip: share.vip,
                ports: share.ports.clone(),
                slots: slots.into_iter().collect(),
                draining: draining.into_iter().collect(),
                forward_to,
            };
            (service.clone(), edge)
        })
        .collect()
}
