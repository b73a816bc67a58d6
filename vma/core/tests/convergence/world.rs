//! A toy network for the properties: machines that do steps after a while, or fail, or forget; an edge
//! that confirms; clients whose connections end after a while.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::Ipv4Addr;
use vmatrix_model::assignment::{Assignment, ServiceShare, Singleton};
use vmatrix_model::edge_config::{EdgeConfig, EdgeSeen};
use vmatrix_model::inventory::{ImageSeen, InstanceState, Inventory, MachineSeen};
use vmatrix_model::{Bytes, Digest, Generation, InstanceId, MachineId, ServiceId, Span, Time};
use vmatrix_vma_core::steps::{CellSeen, Command, Event, Fault, Life, Seen, StagedSeen, Step};
use vmatrix_vma_core::{DRAIN_UNKNOWN, Doubt, Vma};

/// How finely the world's time passes.
const TICK: Span = Span::ms(100);

pub const IMAGE: Bytes = Bytes(100);
/// What a guest needs before it runs.
pub const CRITICAL: u64 = 20;

pub struct ToyMachine {
    pub seen: MachineSeen,
    pub cells: BTreeMap<InstanceId, CellSeen>,
    pub images: BTreeMap<String, u64>,
    sequence: u64,
    next_address: u32,
}

pub struct World {
    pub now: Time,
    pub vma: Vma,
    pub machines: BTreeMap<MachineId, ToyMachine>,
    /// Machines whose daemon is dead; their guests run on.
    pub mute: BTreeSet<MachineId>,
    pub edge: EdgeConfig,
    pub connections: BTreeMap<Ipv4Addr, u32>,
    pub inventory: Option<Inventory>,
    pub saved: Option<Assignment>,
    pub saved_leaving: BTreeMap<ServiceId, ServiceShare>,
    pub ever_healthy: BTreeSet<Ipv4Addr>,
    pub steps_sent: usize,
    /// Machines that no source gives anything, with why.
    pub barren: BTreeMap<MachineId, Fault>,
    /// The next so many steps fail.
    pub fail_next: u32,
    /// Looks of the edge that do not arrive yet.
    pub deaf_until: Time,
    pending: VecDeque<(Time, MachineId, Step)>,
    /// Machines subscribe each second, so a new agent does not hear of them at once.
    unsubscribed_until: Time,
}

pub fn service(name: &str, instances: u32) -> (ServiceId, ServiceShare) {
    let share = ServiceShare {
        image: name.into(),
        instances,
        memory_mib: 512,
        vip: [198, 19, 1, 100].into(),
        ports: vec![80],
        backends: vec![],
        drain: Span::secs(10),
        forward_to: None,
        singleton: None,
    };
    (name.parse().unwrap(), share)
}

pub fn assignment(generation: u64, services: &[(&str, u32)]) -> Assignment {
    Assignment {
        generation: Generation(generation),
        network: "tokyo".parse().unwrap(),
        services: services.iter().map(|(n, k)| service(n, *k)).collect(),
    }
}

/// An assignment of one singleton.
pub fn singleton(generation: u64, instances: u32, what: Singleton) -> Assignment {
    let mut assignment = assignment(generation, &[("maps", instances)]);
    assignment.services.values_mut().for_each(|share| share.singleton = Some(what));
    assignment
}

impl World {
    pub fn new(machines: u32) -> World {
        let network: vmatrix_model::NetworkId = "tokyo".parse().unwrap();
        let machines = (1..=machines)
            .map(|i| {
                let id: MachineId = format!("m{i}").parse().unwrap();
                let seen = MachineSeen {
                    id: id.clone(),
                    cpus: 2,
                    memory_mib: 2048,
                    free_mib: 2048,
                    accelerator: "tcg".into(),
                    qemu_version: "10.0.2".into(),
                    transfer: None,
                };
                (
                    id,
                    ToyMachine {
                        seen,
                        cells: BTreeMap::new(),
                        images: BTreeMap::new(),
                        sequence: 0,
                        next_address: i << 8,
                    },
                )
            })
            .collect();
        World {
            now: Time(0),
            vma: Vma::new(network.clone()),
            machines,
            mute: BTreeSet::new(),
            edge: EdgeConfig { generation: Generation(0), network, services: BTreeMap::new() },
            connections: BTreeMap::new(),
            inventory: None,
            saved: None,
            saved_leaving: BTreeMap::new(),
            ever_healthy: BTreeSet::new(),
            steps_sent: 0,
            barren: BTreeMap::new(),
            fail_next: 0,
            deaf_until: Time(0),
            pending: VecDeque::new(),
            unsubscribed_until: Time(0),
        }
    }

    pub fn tell(&mut self, event: Event) -> bool {
        if let Event::Assignment(a) = &event {
            let newer = self.saved.as_ref().is_none_or(|s| s.generation <= a.generation);
            if newer {
                self.saved_leaving = self.vma.leaving_after(a);
                self.saved = Some(a.clone());
            }
        }
        let mut accepted = true;
        for command in self.vma.handle(self.now, event) {
            match command {
                Command::Step { machine, step } => {
                    self.steps_sent += 1;
                    self.pending.push_back((self.now + Span::ms(300), machine, step));
                }
                Command::Edge(config) => self.install(config),
                Command::Report(inventory) => self.inventory = Some(inventory),
                Command::Refused { .. } => accepted = false,
            }
        }
        accepted
    }

    fn install(&mut self, config: EdgeConfig) {
        assert!(config.generation > self.edge.generation || config == self.edge, "the edge was told an old config");
        for slot in config.services.values().flat_map(|s| &s.slots) {
            assert!(self.ever_healthy.contains(&slot.cell), "{} was exposed and never healthy", slot.cell);
            *self.connections.entry(slot.cell).or_default() = 2;
        }
        self.edge = config;
        // Confirmed only at the next look, as over a wire.
    }

    /// The agent dies and begins anew, with what it had saved.
    pub fn restart(&mut self) {
        self.vma = Vma::with_leaving("tokyo".parse().unwrap(), self.saved_leaving.clone());
        self.inventory = None;
        self.unsubscribed_until = self.now + Span::secs(1);
        if let Some(a) = self.saved.clone() {
            self.tell(Event::Assignment(a));
        }
    }

    /// A tenth of a second passes.
    pub fn tick(&mut self) {
        self.now = self.now + TICK;
        let in_rotation: BTreeSet<Ipv4Addr> =
            self.edge.services.values().flat_map(|s| s.slots.iter().map(|s| s.cell)).collect();
        if self.now.0.is_multiple_of(1_000_000) {
            // Connections of cells out of rotation end, one a second.
            for (cell, n) in &mut self.connections {
                if !in_rotation.contains(cell) {
                    *n = n.saturating_sub(1);
                }
            }
        }
        while self.pending.front().is_some_and(|(at, _, _)| *at <= self.now) {
            let Some((_, machine, step)) = self.pending.pop_front() else { break };
            let result = if self.mute.contains(&machine) || !self.machines.contains_key(&machine) {
                Err(Fault { problem: "nobody answers".into(), hint: String::new(), lasting: false })
            } else if self.fail_next > 0 {
                self.fail_next -= 1;
                Err(Fault { problem: "it did not work".into(), hint: String::new(), lasting: false })
            } else {
                self.step(&machine, &step);
                Ok(())
            };
            self.look(&machine);
            self.tell(Event::StepDone { machine, step, result });
        }
        let ids: Vec<MachineId> = self.machines.keys().cloned().collect();
        for id in ids {
            let heard = self.now >= self.unsubscribed_until && !self.mute.contains(&id);
            if let Some(m) = self.machines.get_mut(&id).filter(|_| heard) {
                for present in m.images.values_mut().filter(|_| !self.barren.contains_key(&id)) {
                    *present = (*present + 10).min(IMAGE.0);
                }
                let seen = m.seen.clone();
                self.tell(Event::Subscribed(seen));
                self.look(&id);
            }
        }
        if self.now.0.is_multiple_of(1_000_000) {
            for Doubt { machine, instance, .. } in self.vma.doubts() {
                let answered = self.machines.get(&machine).and_then(|m| m.cells.get(&instance));
                let answered = answered.is_some_and(|c| c.life == Life::Healthy);
                self.tell(Event::Knocked { machine, instance, answered });
            }
        }
        if self.now < self.deaf_until {
            self.tell(Event::Tick);
            return;
        }
        let seen = EdgeSeen {
            network: self.edge.network.clone(),
            config: self.edge.generation,
            steering: Generation(0),
            connections: self.connections.clone(),
        };
        self.tell(Event::EdgeSeen(seen));
        self.tell(Event::Tick);
    }

    fn look(&mut self, id: &MachineId) {
        let Some(m) = self.machines.get_mut(id).filter(|_| !self.mute.contains(id)) else { return };
        m.sequence += 1;
        let images = m
            .images
            .iter()
            .map(|(name, present)| StagedSeen {
                image: name.clone(),
                seen: Some(ImageSeen {
                    digest: Digest::of(name.as_bytes()),
                    present: Bytes(*present),
                    total: IMAGE,
                    fetched: Bytes(*present),
                    resumable: *present >= CRITICAL,
                }),
                fetching: *present < IMAGE.0 && !self.barren.contains_key(id),
                trouble: self.barren.get(id).filter(|_| *present < IMAGE.0).cloned(),
            })
            .collect();
        let seen = Seen {
            machine: id.clone(),
            run: 1,
            sequence: m.sequence,
            cells: m.cells.values().cloned().collect(),
            images,
        };
        self.tell(Event::Seen(seen));
    }

    fn step(&mut self, id: &MachineId, step: &Step) {
        let in_rotation: BTreeSet<Ipv4Addr> =
            self.edge.services.values().flat_map(|s| s.slots.iter().map(|s| s.cell)).collect();
        let m = self.machines.get_mut(id).unwrap();
        match step {
            Step::Stage { image, .. } => {
                m.images.entry(image.clone()).or_insert(0);
            }
            Step::DropImage { image } => {
                m.images.remove(image);
            }
            Step::Prepare(spec) => {
                let next = &mut m.next_address;
                let used: u64 = m.cells.values().map(|c| c.memory_mib).sum();
                assert!(
                    m.cells.contains_key(&spec.instance) || used + spec.memory_mib <= m.seen.memory_mib,
                    "{id} was given more than it has"
                );
                if let Some(back) = m.cells.get_mut(&spec.instance).filter(|c| c.life == Life::Handed) {
                    back.life = Life::Ready;
                }
                m.cells.entry(spec.instance.clone()).or_insert_with(|| {
                    *next += 1;
                    let address = Ipv4Addr::from_bits(0x6440_0000 + *next);
                    CellSeen {
                        instance: spec.instance.clone(),
                        address,
                        life: Life::Ready,
                        memory_mib: spec.memory_mib,
                        resumed_in: None,
                        trouble: None,
                        holds: None,
                    }
                });
            }
            Step::Resume { instance } => {
                // As a machine does: it waits for what the guest needs first, and fetches that if nobody did.
                let present = m.images.entry(instance.service.to_string()).or_insert(0);
                *present = (*present).max(CRITICAL);
                if let Some(c) = m.cells.get_mut(instance) {
                    c.life = Life::Healthy;
                    self.ever_healthy.insert(c.address);
                }
            }
            Step::Suspend { instance } => {
                if let Some(c) = m.cells.get_mut(instance) {
                    assert!(!in_rotation.contains(&c.address), "{instance} was suspended in rotation");
                    c.life = Life::Ready;
                }
            }
            Step::Release { instance } => {
                if let Some(c) = m.cells.get(instance) {
                    let runs = !matches!(c.life, Life::Ready | Life::Building | Life::Handed);
                    assert!(!runs, "{instance} was released while it ran");
                    assert!(!in_rotation.contains(&c.address), "{instance} was released in rotation");
                }
                m.cells.remove(instance);
            }
        }
    }

    /// Runs until no step was sent for twenty seconds, at most two minutes.
    pub fn settle(&mut self) {
        let (mut sent, mut quiet) = (self.steps_sent, 0);
        // The longest wait in which nothing is sent is a drain of what nobody knows.
        let enough = DRAIN_UNKNOWN.as_ms() / TICK.as_ms() + 50;
        for _ in 0..2000 {
            self.tick();
            quiet = if self.steps_sent == sent && self.pending.is_empty() { quiet + 1 } else { 0 };
            sent = self.steps_sent;
            if quiet == enough {
                return;
            }
        }
    }

    pub fn serving(&self, name: &str) -> usize {
        let service: ServiceId = name.parse().unwrap();
        self.inventory
            .iter()
            .flat_map(|i| &i.instances)
            .filter(|i| i.id.service == service && i.state == InstanceState::Serving)
            .count()
    }

    pub fn slots(&self, name: &str) -> usize {
        let service: ServiceId = name.parse().unwrap();
        self.edge.services.get(&service).map_or(0, |s| s.slots.len())
    }

    /// Time passes.
    pub fn pass(&mut self, span: Span) {
        for _ in 0..span.as_ms() / 100 {
            self.tick();
        }
    }

    pub fn cells(&self) -> usize {
        self.machines.values().map(|m| m.cells.len()).sum()
    }
}
