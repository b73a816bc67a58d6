//! The daemons: real cores, and in place of their agents what carries events to them and commands from them.
//!
//! ```text
//! CPA (at the origin) ◀─half a round trip─▶ VM agent, edge (one network) ◀─near─▶ machines
//! ```
//!
//! The rhythms are those of the agents: see docs/api.md.

use super::machine::Begun;
use super::{Happening, NEAR, Site, ToCpa, World};
use crate::scenario::OrderLine;
use std::collections::BTreeMap;
use vmatrix_cpa_core::{Command as CpaCommand, Cpa, Event as CpaEvent, Memory, Policy};
use vmatrix_model::assignment::Assignment;
use vmatrix_model::edge_config::EdgeConfig;
use vmatrix_model::fleet::{Fleet, Service};
use vmatrix_model::plan::Cause;
use vmatrix_model::steering::Steering;
use vmatrix_model::{NetworkId, Span};
use vmatrix_vma_core::Vma;
use vmatrix_vma_core::steps::{Command as VmaCommand, Event as VmaEvent, Fault, Step};

const CPA_TICK: Span = Span::ms(500);
/// How often the CPA says its answers again.
const REPEAT: Span = Span::secs(2);
/// How often a VM agent looks at its machines and its edge: often while something is under way.
const LOOK_BUSY: Span = Span::ms(200);
const LOOK_IDLE: Span = Span::secs(1);
const SUBSCRIBE: Span = Span::secs(1);
const EDGE_REPORT: Span = Span::secs(1);

/// The CPA and its state directory.
pub struct CpaDaemon {
    /// By what it places services, in every run.
    pub policy: Policy,
    /// None while it is dead.
    pub core: Option<Cpa>,
    /// What its journal gives back: everything it heard and did, for a line is written before it counts.
    pub written: Memory,
    /// Each network's last share, to be said again until it is seen.
    assignments: BTreeMap<NetworkId, Assignment>,
    /// Its last answers; none until it made some.
    answers: Option<Steering>,
}

impl CpaDaemon {
    pub fn new(fleet: &Fleet, policy: Policy) -> CpaDaemon {
        CpaDaemon {
            core: Some(Cpa::new(fleet.clone(), BTreeMap::new()).under(policy)),
            policy,
            written: Memory::default(),
            assignments: BTreeMap::new(),
            answers: None,
        }
    }
}

/// A VM agent and its state directory.
pub struct VmaDaemon {
    /// None while it is dead.
    pub core: Option<Vma>,
    pub run: u64,
    /// How often it has looked.
    looks: u64,
    /// The last good assignment.
    pub written: Option<Assignment>,
}

impl VmaDaemon {
    pub fn new(network: &NetworkId) -> VmaDaemon {
        VmaDaemon { core: Some(Vma::new(network.clone())), run: 1, looks: 0, written: None }
    }
}

impl World {
    pub(super) fn cpa_tick(&mut self) {
        self.feed_cpa(CpaEvent::Tick);
        self.after(CPA_TICK, Happening::CpaTick);
    }

    pub(super) fn tell_cpa(&mut self, what: ToCpa) {
        match what {
            ToCpa::Demand(report) => self.feed_cpa(CpaEvent::Demand(report)),
            ToCpa::Inventory(inventory) => {
                let (network, seen) = (inventory.network.clone(), inventory.generation);
                self.feed_cpa(CpaEvent::Inventory(inventory));
                let kept = self.cpa.core.is_some().then(|| self.cpa.assignments.get(&network)).flatten();
                if let Some(missed) = kept.filter(|a| a.generation > seen).cloned() {
                    self.send_assignment(network, missed);
                }
            }
        }
    }

    fn send_assignment(&mut self, network: NetworkId, assignment: Assignment) {
        let way = self.sites.get(&network).map_or(NEAR, |s| s.to_origin);
        self.after(way, Happening::Assign(network, assignment));
    }

    /// An operator asks for a plan, reads it, and applies it.
    pub(super) fn order(&mut self, index: usize) {
        let Some(order) = self.scenario.orders.get(index).map(OrderLine::order) else { return };
        if self.cpa.core.is_none() {
            // The operator's command says that nobody listens, and the operator tries again.
            return self.after(Span::secs(1), Happening::Order(index));
        }
        for command in self.ask_cpa(CpaEvent::Order(order)) {
            match command {
                CpaCommand::Planned(plan) => self.feed_cpa(CpaEvent::Apply { plan: plan.id }),
                other => self.obey_cpa(other),
            }
        }
    }

    pub(super) fn feed_cpa(&mut self, event: CpaEvent) {
        for command in self.ask_cpa(event) {
            self.obey_cpa(command);
        }
    }

    fn ask_cpa(&mut self, event: CpaEvent) -> Vec<CpaCommand> {
        self.cpa.core.as_mut().map_or(Vec::new(), |core| core.handle(self.now, event))
    }

    fn obey_cpa(&mut self, command: CpaCommand) {
        match command {
            CpaCommand::Decided(decision) => {
                let crowd = matches!(decision.plan.cause, Cause::Burst { .. });
                if self.record.decision(decision) && crowd {
                    self.first_burst();
                }
            }
            CpaCommand::Assign(network, assignment) => {
                self.cpa.assignments.insert(network.clone(), assignment.clone());
                self.send_assignment(network, assignment);
            }
            CpaCommand::Announce(steering) => {
                self.check_answers(&steering);
                self.record.announced(self.now, &self.scenario.fleet, &steering);
                self.cpa.answers = Some(steering);
                self.say_answers();
            }
            CpaCommand::Refuse(refusal) => {
                self.record.note(format!("the CPA refused: {}", refusal.to_string().lines().next().unwrap_or_default()))
            }
            CpaCommand::Planned(_) | CpaCommand::Placed(_) => {}
        }
    }

    /// Notes answers that break what ARCHITECTURE.md promises: nothing is advertised that does not
    /// serve, and nobody's answer is empty. Before the play begins nothing serves yet.
    fn check_answers(&mut self, steering: &Steering) {
        if self.began.is_none() {
            return;
        }
        for (service, answers) in &steering.services {
            let serving = self.serving(service);
            let vips: Vec<_> = serving.keys().filter_map(|n| self.scenario.fleet.vip(service, n)).collect();
            let mut lists = answers.by_clients.values().chain(std::iter::once(&answers.otherwise));
            if lists.clone().any(Vec::is_empty) {
                self.record.bad_answers(service, "nowhere");
            }
            if lists.any(|l| l.iter().any(|vip| !vips.contains(vip))) {
                self.record.bad_answers(service, "to where nothing serves");
            }
        }
    }

    pub(super) fn repeat_answers(&mut self) {
        if self.cpa.core.is_some() {
            self.say_answers();
        }
        self.after(REPEAT, Happening::Repeat);
    }

    fn say_answers(&mut self) {
        let Some(steering) = self.cpa.answers.clone() else { return };
        let ways: Vec<(NetworkId, Span)> = self.sites.iter().map(|(n, s)| (n.clone(), s.to_origin)).collect();
        for (network, way) in ways {
            self.after(way, Happening::Steer(network, steering.clone()));
        }
    }

    pub(super) fn steer(&mut self, network: &NetworkId, steering: Steering) {
        if let Some(edge) = self.sites.get_mut(network).map(|s| &mut s.edge).filter(|e| e.up) {
            edge.steer(steering);
        }
    }

    pub(super) fn assign(&mut self, network: &NetworkId, assignment: Assignment) {
        let Some(vma) = self.sites.get_mut(network).map(|s| &mut s.vma).filter(|v| v.core.is_some()) else { return };
        if vma.written.as_ref().is_none_or(|old| old.generation <= assignment.generation) {
            vma.written = Some(assignment.clone());
        }
        self.feed_vma(network, VmaEvent::Assignment(assignment));
    }

    /// A VM agent looks at everything it has.
    pub(super) fn vma_look(&mut self, network: &NetworkId, number: u64) {
        // So much of an image that is on its way is seen as has come by now.
        self.take_in(network);
        let Some(site) = self.sites.get_mut(network).filter(|s| s.vma.looks == number) else { return };
        let machines = site.machines.iter_mut().filter(|m| m.up);
        let mut events: Vec<VmaEvent> = machines.map(|m| VmaEvent::Seen(m.seen())).collect();
        events.extend(Some(&site.edge).filter(|e| e.up).map(|e| VmaEvent::EdgeSeen(e.seen())));
        events.push(VmaEvent::Tick);
        for event in events {
            self.feed_vma(network, event);
        }
        self.look_again(network, false);
    }

    /// Sets the time of the next look: soon if there is reason to.
    fn look_again(&mut self, network: &NetworkId, soon: bool) {
        let Some(site) = self.sites.get_mut(network) else { return };
        site.vma.looks += 1;
        let number = site.vma.looks;
        let busy = site.vma.core.as_ref().is_some_and(Vma::is_busy);
        let pause = if soon {
            NEAR
        } else if busy {
            LOOK_BUSY
        } else {
            LOOK_IDLE
        };
        self.after(pause, Happening::VmaLook(network.clone(), number));
    }

    pub(super) fn subscribe(&mut self, network: &NetworkId) {
        let Some(site) = self.sites.get_mut(network) else { return };
        let events: Vec<VmaEvent> =
            site.machines.iter().filter(|m| m.up).map(|m| VmaEvent::Subscribed(m.subscription())).collect();
        for event in events {
            self.feed_vma(network, event);
        }
        self.after(SUBSCRIBE, Happening::Subscribe(network.clone()));
    }

    pub(super) fn edge_report(&mut self, network: &NetworkId) {
        if let Some(site) = self.sites.get_mut(network).filter(|s| s.edge.up) {
            let (report, way) = (site.edge.report(self.now), site.to_origin);
            self.after(way, Happening::ToCpa(Box::new(ToCpa::Demand(report))));
        }
        self.after(EDGE_REPORT, Happening::EdgeReport(network.clone()));
    }

    pub(super) fn feed_vma(&mut self, network: &NetworkId, event: VmaEvent) {
        let Some(site) = self.sites.get_mut(network) else { return };
        let (run, way) = (site.vma.run, site.to_origin);
        let Some(core) = &mut site.vma.core else { return };
        let was_busy = core.is_busy();
        let commands = core.handle(self.now, event);
        if core.is_busy() != was_busy {
            self.look_again(network, true);
        }
        for command in commands {
            match command {
                VmaCommand::Step { machine, step } => {
                    let Some(machine) =
                        self.sites.get(network).and_then(|s| s.machines.iter().position(|m| m.id == machine))
                    else {
                        continue;
                    };
                    self.after(NEAR, Happening::Step { network: network.clone(), machine, vma_run: run, step });
                }
                VmaCommand::Edge(config) => self.after(NEAR, Happening::Configure(network.clone(), config)),
                VmaCommand::Report(inventory) => {
                    self.after(way, Happening::ToCpa(Box::new(ToCpa::Inventory(inventory))))
                }
                VmaCommand::Refused { asked, in_force } => {
                    self.record.note(format!("{network} refused assignment {asked}: {in_force} is in force"))
                }
            }
        }
    }

    pub(super) fn configure(&mut self, network: &NetworkId, config: EdgeConfig) {
        let Some(edge) = self.sites.get_mut(network).map(|s| &mut s.edge).filter(|e| e.up) else { return };
        let seen = edge.configure(config);
        self.feed_vma(network, VmaEvent::EdgeSeen(seen));
        self.look_at_instances();
    }

    pub(super) fn begin_step(&mut self, network: &NetworkId, number: usize, vma_run: u64, step: Step) {
        let service = service_of(&self.scenario.fleet, &step).cloned();
        let Some(machine) = self.sites.get_mut(network).and_then(|s| s.machines.get_mut(number)) else { return };
        let begun = match service {
            _ if !machine.up => Err(Fault {
                problem: format!("{} does not answer", machine.id),
                hint: "start its daemon".into(),
                lasting: false,
            }),
            None => Err(Fault {
                problem: format!("nobody offers what {} is asked to {}", machine.id, step.verb()),
                hint: "check the fleet".into(),
                lasting: true,
            }),
            Some(service) => machine.begin(self.now, &step, &service, self.scenario.seed),
        };
        let machine_run = machine.run;
        let ends =
            Happening::StepEnds { network: network.clone(), machine: number, machine_run, vma_run, step: step.clone() };
        match begun {
            Ok(Begun::Takes(span)) => self.after(span, ends),
            Ok(Begun::Fetch { image, bytes }) => {
                let name = transfer_name(number, &image);
                if let Some(site) = self.sites.get_mut(network) {
                    site.wire.begin(self.now, &name, bytes);
                }
                self.transferred(network);
                self.after(NEAR, ends);
            }
            Err(fault) => self.after(
                NEAR,
                Happening::Outcome { network: network.clone(), machine: number, vma_run, step, result: Err(fault) },
            ),
        }
        self.look_at_instances();
    }

    pub(super) fn end_step(&mut self, network: &NetworkId, number: usize, machine_run: u64, vma_run: u64, step: Step) {
        let Some(machine) =
            self.sites.get_mut(network).and_then(|s| s.machines.get_mut(number)).filter(|m| m.run == machine_run)
        else {
            return;
        };
        machine.finish(self.now, &step);
        self.record.step(self.now, network, &step);
        self.look_at_instances();
        self.after(
            NEAR,
            Happening::Outcome { network: network.clone(), machine: number, vma_run, step, result: Ok(()) },
        );
    }

    pub(super) fn outcome(
        &mut self,
        network: &NetworkId,
        number: usize,
        vma_run: u64,
        step: Step,
        result: Result<(), Fault>,
    ) {
        let Some(site) = self.sites.get_mut(network).filter(|s| s.vma.run == vma_run) else { return };
        let Some(machine) = site.machines.get_mut(number) else { return };
        let id = machine.id.clone();
        // An answer brings a look with it, which is heard first: what the step changed is then known
        // when the next one is chosen.
        if let Some(seen) = machine.up.then(|| machine.seen()) {
            self.feed_vma(network, VmaEvent::Seen(seen));
        }
        self.feed_vma(network, VmaEvent::StepDone { machine: id, step, result });
    }

    /// Takes in what has arrived of images, and looks again when the next one should be whole.
    pub(super) fn transferred(&mut self, network: &NetworkId) {
        self.take_in(network);
        if let Some(end) = self.sites.get(network).and_then(|site| site.wire.next_end()) {
            self.queue.put(end, Happening::Transfer(network.clone()));
        }
    }

    /// Takes in what has arrived of images.
    fn take_in(&mut self, network: &NetworkId) {
        let Some(site) = self.sites.get_mut(network) else { return };
        let whole = site.wire.advance(self.now);
        let Site { machines, wire, .. } = site;
        for (number, machine) in machines.iter_mut().enumerate() {
            for (image, staged) in machine.images.iter_mut().filter(|(_, s)| s.fetching) {
                let name = transfer_name(number, image);
                let missing = wire.missing(&name).unwrap_or_default();
                let present = staged.total - missing;
                self.record.moved(present - staged.present);
                staged.present = present;
                staged.fetching = !whole.contains(&name);
            }
        }
    }

    /// Writes down where services serve, if that changed.
    pub(super) fn look_at_instances(&mut self) {
        let services: Vec<_> = self.scenario.fleet.services.iter().map(|s| s.name.clone()).collect();
        for service in services {
            let serving = self.serving(&service);
            self.record.instances(self.now, &service, serving);
        }
    }
}

fn transfer_name(machine: usize, image: &str) -> String {
    format!("{machine}/{image}")
}

fn service_of<'a>(fleet: &'a Fleet, step: &Step) -> Option<&'a Service> {
    match step {
        Step::Stage { service, .. } => fleet.service(service),
        Step::DropImage { image } => fleet.services.iter().find(|s| s.image == *image),
        Step::Prepare(_) | Step::Resume { .. } | Step::Suspend { .. } | Step::Release { .. } => {
            fleet.service(&step.instance()?.service)
        }
    }
}
