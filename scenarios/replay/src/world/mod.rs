//! The world in virtual time: the cores that run live, among simulated links, machines and clients.
//!
//! ```text
//!  arrivals ─▶ clients ─DNS, TCP─▶ edges ─▶ guests            one queue of happenings, in order of
//!                 demand │  ▲ config                          (time, sequence); nothing waits, and
//!                        ▼  │                                 nothing happens but by an entry in it
//!              CPA ◀─────── VMAs ─steps─▶ machines
//! ```
//!
//! # Invariants
//! 1. Nothing reads a clock or rolls dice but by the scenario's seed: the same scenario and seed give
//!    the same recording, byte for byte.
//! 2. A message between sites takes half a round trip; a killed daemon hears nothing.
//! 3. What a killed daemon knew is lost but for what it had written down.
//!
//! Deliberately absent: contention between images and answers on a link, and congestion control
//! beyond slow start. Neither decides anything in a scenario of a few megabits.

mod clients;
mod daemons;
mod edge;
mod fault;
mod machine;
mod queue;
mod record;
mod transfers;

use crate::arrivals::{Arrival, arrivals};
use crate::policy::Policy;
use crate::recording::Recording;
use crate::scenario::Scenario;
use clients::{Asked, Between};
use daemons::{CpaDaemon, VmaDaemon};
use edge::Edge;
use machine::Machine;
use queue::Queue;
use record::Recorder;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use transfers::Transfers;
use vmatrix_model::assignment::Assignment;
use vmatrix_model::demand::DemandReport;
use vmatrix_model::edge_config::EdgeConfig;
use vmatrix_model::inventory::Inventory;
use vmatrix_model::steering::Steering;
use vmatrix_model::{NetworkId, ServiceId, SiteId, Span, Time};
use vmatrix_vma_core::steps::{Fault as StepFault, Step};

/// The play begins once every service serves at home and no image travels, or after so long.
const WARM_UP_MAX: Span = Span::secs(900);
/// How often the world looks whether it is warm.
const WARM_LOOK: Span = Span::ms(500);
/// How long the end waits for answers that are under way: longer than any client does.
const PATIENCE: Span = Span::secs(120);
/// From one process to another within a site.
const NEAR: Span = Span::ms(1);

/// Replays `scenario` in virtual time, with another seed if one is given.
pub fn replay(scenario: &Scenario, seed: Option<u64>) -> Recording {
    let seed = seed.unwrap_or(scenario.seed);
    replay_under(Policy::default(), &Scenario { seed, ..scenario.clone() })
}

/// Replays `scenario` in virtual time, its services placed by some policy.
pub fn replay_under(policy: Policy, scenario: &Scenario) -> Recording {
    let mut world = World::new(policy.applied(scenario.clone()), policy);
    world.run();
    world.finish()
}

/// Something that will happen.
enum Happening {
    /// Looks whether the play may begin.
    Warm,
    /// The next client of the list wants something.
    Arrival(usize),
    /// A client asks its resolver, for the so-many-th time.
    Resolve {
        asked: u64,
        attempt: u32,
    },
    /// A connection's first packet reaches the edge, for the so-many-th time.
    Syn {
        asked: u64,
        attempt: u32,
    },
    /// The whole request reaches the guest.
    Reach {
        asked: u64,
    },
    /// The guest has the answer ready.
    Send {
        asked: u64,
    },
    /// The last byte of the answer reaches the client.
    Answered {
        asked: u64,
    },
    CpaTick,
    /// The CPA says its answers again, for edges that missed them.
    Repeat,
    /// A VM agent looks at what it has, unless it has looked since this was put down.
    VmaLook(NetworkId, u64),
    Subscribe(NetworkId),
    EdgeReport(NetworkId),
    ToCpa(Box<ToCpa>),
    Assign(NetworkId, Assignment),
    Steer(NetworkId, Steering),
    Configure(NetworkId, EdgeConfig),
    Step {
        network: NetworkId,
        machine: usize,
        vma_run: u64,
        step: Step,
    },
    StepEnds {
        network: NetworkId,
        machine: usize,
        machine_run: u64,
        vma_run: u64,
        step: Step,
    },
    /// A step's outcome reaches the VM agent that asked for it.
    Outcome {
        network: NetworkId,
        machine: usize,
        vma_run: u64,
        step: Step,
        result: Result<(), StepFault>,
    },
    /// A transfer of image bytes to a network may have ended.
    Transfer(NetworkId),
    Order(usize),
    Kill(usize),
    Restart(usize),
}

/// What other sites say to the CPA.
enum ToCpa {
    Demand(DemandReport),
    Inventory(Inventory),
}

/// A hosting network with what stands in it.
struct Site {
    edge: Edge,
    vma: VmaDaemon,
    machines: Vec<Machine>,
    /// Image bytes on their way here.
    wire: Transfers,
    /// From here to the origin.
    to_origin: Span,
}

struct World {
    scenario: Scenario,
    now: Time,
    queue: Queue<Happening>,
    cpa: CpaDaemon,
    sites: BTreeMap<NetworkId, Site>,
    origin_up: bool,
    /// When the play began, once it has.
    began: Option<Time>,
    arrivals: Vec<Arrival>,
    asked: BTreeMap<u64, Asked>,
    between: Between,
    /// Writes that reached the database, and those that were acknowledged to a client.
    written: BTreeSet<u64>,
    acknowledged: BTreeSet<u64>,
    record: Recorder,
}

impl World {
    fn new(scenario: Scenario, policy: Policy) -> World {
        let fleet = &scenario.fleet;
        let origin = &fleet.origin.name;
        let sites = fleet.networks.iter().map(|n| {
            let link = fleet.link(origin, &SiteId::from(&n.name));
            let gateway = fleet.gateway(&SiteId::from(&n.name)).unwrap_or(Ipv4Addr::UNSPECIFIED);
            let machines = (1..=n.machines).filter_map(|m| Some(Machine::new(fleet, &n.name, m, machine::name(m)?)));
            let site = Site {
                edge: Edge::new(&n.name, gateway, &fleet.zone, scenario.seed),
                vma: VmaDaemon::new(&n.name),
                machines: machines.collect(),
                wire: Transfers::new(link.rate()),
                to_origin: half(Span::ms(u64::from(link.rtt_ms))),
            };
            (n.name.clone(), site)
        });
        World {
            now: Time(0),
            queue: Queue::new(),
            cpa: CpaDaemon::new(fleet, policy.of_the_cpa()),
            sites: sites.collect(),
            origin_up: true,
            began: None,
            arrivals: arrivals(&scenario),
            asked: BTreeMap::new(),
            between: Between::default(),
            written: BTreeSet::new(),
            acknowledged: BTreeSet::new(),
            record: Recorder::default(),
            scenario,
        }
    }

    fn run(&mut self) {
        for network in self.sites.keys().cloned().collect::<Vec<_>>() {
            self.queue.put(self.now, Happening::Subscribe(network.clone()));
            self.queue.put(self.now, Happening::VmaLook(network.clone(), 0));
            self.queue.put(self.now, Happening::EdgeReport(network));
        }
        self.queue.put(self.now, Happening::CpaTick);
        self.queue.put(self.now, Happening::Repeat);
        self.queue.put(self.now, Happening::Warm);
        while let Some((at, happening)) = self.queue.take() {
            let past = self.began.map_or(Span::ZERO, |began| at.since(began + self.length()));
            if past > Span::ZERO && (self.asked.is_empty() || past > PATIENCE) {
                return;
            }
            self.now = at;
            self.happen(happening);
        }
    }

    fn length(&self) -> Span {
        Span::secs(u64::from(self.scenario.length_s))
    }

    fn after(&mut self, span: Span, happening: Happening) {
        self.queue.put(self.now + span, happening);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Warm => self.warm(),
            Happening::Arrival(index) => self.arrive(index),
            Happening::Resolve { asked, attempt } => self.resolve(asked, attempt),
            Happening::Syn { asked, attempt } => self.connect(asked, attempt),
            Happening::Reach { asked } => self.reach(asked),
            Happening::Send { asked } => self.send_answer(asked),
            Happening::Answered { asked } => self.answered(asked),
            Happening::CpaTick => self.cpa_tick(),
            Happening::Repeat => self.repeat_answers(),
            Happening::VmaLook(network, number) => self.vma_look(&network, number),
            Happening::Subscribe(network) => self.subscribe(&network),
            Happening::EdgeReport(network) => self.edge_report(&network),
            Happening::ToCpa(what) => self.tell_cpa(*what),
            Happening::Assign(network, assignment) => self.assign(&network, assignment),
            Happening::Steer(network, steering) => self.steer(&network, steering),
            Happening::Configure(network, config) => self.configure(&network, config),
            Happening::Step { network, machine, vma_run, step } => self.begin_step(&network, machine, vma_run, step),
            Happening::StepEnds { network, machine, machine_run, vma_run, step } => {
                self.end_step(&network, machine, machine_run, vma_run, step)
            }
            Happening::Outcome { network, machine, vma_run, step, result } => {
                self.outcome(&network, machine, vma_run, step, result)
            }
            Happening::Transfer(network) => self.transferred(&network),
            Happening::Order(index) => self.order(index),
            Happening::Kill(index) => self.kill(index),
            Happening::Restart(index) => self.restart(index),
        }
    }

    /// Begins the play once the first placement is reached.
    fn warm(&mut self) {
        let travelling = self.sites.values().any(|s| s.wire.next_end().is_some());
        let at_home = self
            .scenario
            .fleet
            .services
            .iter()
            .all(|s| self.serving(&s.name).get(&s.home).is_some_and(|n| *n > 0) && self.resolves(&s.name));
        let too_long = self.now.since(Time(0)) >= WARM_UP_MAX;
        if !too_long && (travelling || !at_home) {
            return self.after(WARM_LOOK, Happening::Warm);
        }
        if too_long {
            self.record
                .note(format!("the first placement was not reached within {WARM_UP_MAX}; the play began without it"));
        }
        let began = self.now;
        self.began = Some(began);
        for (index, arrival) in self.arrivals.iter().enumerate() {
            self.queue.put(began + arrival.at.since(Time(0)), Happening::Arrival(index));
        }
        for (index, order) in self.scenario.orders.iter().enumerate() {
            self.queue.put(began + Span::secs(u64::from(order.at_s)), Happening::Order(index));
        }
        for (index, fault) in self.scenario.faults.iter().enumerate() {
            if let Some(at) = fault.at_s {
                self.queue.put(began + Span::secs(u64::from(at)), Happening::Kill(index));
            }
        }
    }

    /// Whether every edge answers for `service`.
    fn resolves(&self, service: &ServiceId) -> bool {
        self.sites.values().all(|s| s.edge.resolve(service, Ipv4Addr::UNSPECIFIED).is_some())
    }

    /// Healthy instances of `service` that get new connections, per network.
    fn serving(&self, service: &ServiceId) -> BTreeMap<NetworkId, u32> {
        let per_site = self.sites.iter().map(|(network, site)| {
            let rotation = site.edge.rotation(service);
            let cells = site.machines.iter().flat_map(|m| m.cells.values());
            (network.clone(), cells.filter(|c| c.answers() && rotation.contains(&c.address)).count() as u32)
        });
        per_site.filter(|(_, n)| *n > 0).collect()
    }

    /// Whether each service serves at home alone and no other copy of it has as much as a cell.
    fn dormant_but_at_home(&self) -> bool {
        self.scenario.fleet.services.iter().all(|s| {
            let home_alone = self.serving(&s.name).keys().eq([&s.home]);
            let elsewhere = self.sites.iter().filter(|(n, _)| **n != s.home).flat_map(|(_, site)| &site.machines);
            home_alone && elsewhere.flat_map(|m| m.cells.keys()).all(|i| i.service != s.name)
        })
    }
}

/// Half a round trip: one way.
fn half(rtt: Span) -> Span {
    Span(rtt.0 / 2)
}
