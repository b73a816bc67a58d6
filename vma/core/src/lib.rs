//! The VM agent's decisions: what one network is to run, against what its machines are seen to run.
//!
//! ```text
//! assignment ─┐                                   ┌─▶ steps to machines
//! machines  ──┼─▶ which cells stay, which go, ────┼─▶ the edge's whole config
//! edge seen ──┘   one step towards each           └─▶ inventory to the CPA
//! ```
//!
//! One instance, as its state follows from what is seen (nothing is remembered that a look does not
//! show, so a restart of the agent needs no recovery):
//!
//! ```text
//!  wanted: (no cell) ─Prepare▶ Ready ─Resume▶ Healthy ─edge config▶ Serving
//!               ▲                ▲                                     │ no longer wanted
//!               │                └──── Lost, Sick: out of rotation,    ▼
//!               │                      suspended, resumed again     Draining
//!               └─Release─ Ready ◀─Suspend─ (no connection, or drain is over) ─┘
//! ```
//!
//! - no cell → Preparing: a machine has the memory free; it stages the image at the same time.
//! - Preparing → Resuming: the cell is seen whole.
//! - Resuming → Healthy: the VM is seen to answer.
//! - Healthy → Serving: the edge has confirmed a config that holds it.
//! - Serving → Draining: the assignment wants fewer; it is out of rotation, its connections stay.
//! - Draining → Suspending: the edge has confirmed, and no connection is left or `drain` is over.
//! - Suspending → dormant: VM and cell are seen gone.
//!
//! A machine whose daemon is dead is silent: it gets no step, and what serves on it goes on serving; see [`machine`].
//!
//! # Invariants
//! 1. An assignment older than the one in force is refused. One of the same generation replaces it: where
//!    stragglers are forwarded to may change while a placement is being reached.
//! 2. A cell is in rotation only while it was last seen Healthy.
//! 3. A cell that may be in rotation is not suspended.
//! 4. One step at a time for an instance.
//! 5. Nothing is dropped or drained before there is an assignment, nor before machines have had
//!    time to subscribe to an agent that just began.

pub mod balance;
pub mod cell;
pub mod machine;
pub mod pack;
mod report;
mod retry;
mod rotation;
pub mod steps;
pub mod tenure;
mod wanted;

use machine::Machine;
use retry::Effort;
use rotation::Rotation;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use steps::{CellSeen, Command, Event, Fault, Life, Seen, Step};
use vmatrix_model::assignment::{Assignment, ServiceShare, Singleton};
use vmatrix_model::inventory::Inventory;
use vmatrix_model::{Generation, InstanceId, MachineId, NetworkId, ServiceId, Span, Time};

/// How long an agent that just began waits for machines to subscribe (they do each second) before
/// it believes that what it does not see is not there.
pub const SETTLE: Span = Span::ms(2500);
/// An edge not heard of for so long no longer holds up a suspend.
const EDGE_SILENCE: Span = Span::secs(30);
/// How long a cell drains whose service nobody told this agent about: it was dropped from the assignment
/// before the agent began, and what the agent had kept of it is lost. The edge does not count its
/// connections, so it is given what an ordinary service is.
pub const DRAIN_UNKNOWN: Span = Span::secs(30);

/// The decisions of one network's VM agent. Fed by [`Vma::handle`]; never waits, dials or reads a clock.
#[derive(Debug, Clone)]
pub struct Vma {
    network: NetworkId,
    began: Option<Time>,
    assignment: Option<Assignment>,
    /// Shares of services that are to be gone and whose cells are not yet.
    leaving: BTreeMap<ServiceId, ServiceShare>,
    machines: BTreeMap<MachineId, Machine>,
    cells: BTreeMap<(MachineId, InstanceId), Effort>,
    stages: BTreeMap<(MachineId, String), Effort>,
    /// When each cell that is no longer wanted began to drain.
    drains: BTreeMap<(MachineId, InstanceId), Time>,
    rotation: Rotation,
    /// State, since when, and the order it came from, per instance.
    history: BTreeMap<InstanceId, report::History>,
    /// Wishes that cannot be granted now.
    refused: BTreeMap<ServiceId, String>,
    reported: Option<(Time, Inventory)>,
}

/// A cell whose machine is silent: whoever can reach it is to say whether it still answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doubt {
    pub machine: MachineId,
    pub instance: InstanceId,
    /// Where the edge reaches it.
    pub address: Ipv4Addr,
    /// A declared TCP port of its service.
    pub port: u16,
}

impl Vma {
    pub fn new(network: NetworkId) -> Vma {
        Vma {
            rotation: Rotation::new(network.clone()),
            network,
            began: None,
            assignment: None,
            leaving: BTreeMap::new(),
            machines: BTreeMap::new(),
            cells: BTreeMap::new(),
            stages: BTreeMap::new(),
            drains: BTreeMap::new(),
            history: BTreeMap::new(),
            refused: BTreeMap::new(),
            reported: None,
        }
    }

    /// An agent that begins anew: `leaving` is what [`Vma::leaving`] was, so that what drained goes on draining.
    pub fn with_leaving(network: NetworkId, leaving: BTreeMap<ServiceId, ServiceShare>) -> Vma {
        let leaving = leaving.into_iter().map(|(s, share)| (s, ServiceShare { instances: 0, ..share })).collect();
        Vma { leaving, ..Vma::new(network) }
    }

    /// The assignment in force.
    pub fn assignment(&self) -> Option<&Assignment> {
        self.assignment.as_ref()
    }

    /// Shares of services that are no longer assigned and whose cells are not gone yet.
    pub fn leaving(&self) -> &BTreeMap<ServiceId, ServiceShare> {
        &self.leaving
    }

    /// What [`Vma::leaving`] will be once `a` is in force.
    pub fn leaving_after(&self, a: &Assignment) -> BTreeMap<ServiceId, ServiceShare> {
        let old = self.assignment.iter().flat_map(|old| &old.services);
        let dropped = old.map(|(s, share)| (s.clone(), ServiceShare { instances: 0, ..share.clone() }));
        let leaving = self.leaving.iter().map(|(s, share)| (s.clone(), share.clone()));
        leaving.chain(dropped).filter(|(s, _)| !a.services.contains_key(s)).collect()
    }

    /// Cells in rotation that are to be knocked at: their machine does not say whether they answer. Each
    /// knock is told as [`Event::Knocked`].
    pub fn doubts(&self) -> Vec<Doubt> {
        let silent = self.machines.iter().filter(|(_, m)| m.is_silent());
        let cells = silent.flat_map(|(m, has)| has.has.iter().flat_map(move |s| s.cells.iter().map(move |c| (m, c))));
        cells
            .filter_map(|(m, c)| {
                let port = *self.share(&c.instance.service)?.ports.first()?;
                Some(Doubt { machine: m.clone(), instance: c.instance.clone(), address: c.address, port })
            })
            .collect()
    }

    /// What was last reported, or would be.
    pub fn inventory(&self, now: Time) -> Inventory {
        report::inventory(self, now)
    }

    /// Whether a step or a config is on its way or due: the agent then looks more often.
    pub fn is_busy(&self) -> bool {
        let on_its_way = self.cells.values().chain(self.stages.values()).any(|e| e.outstanding().is_some());
        on_its_way || !self.drains.is_empty() || self.rotation.is_behind()
    }

    /// Hears one event and answers what is to be done now. The same events at the same times give the same commands.
    pub fn handle(&mut self, now: Time, event: Event) -> Vec<Command> {
        self.began.get_or_insert(now);
        let mut commands = Vec::new();
        if let Event::Assignment(a) = event {
            if let Some(in_force) = self.assignment.as_ref().map(|a| a.generation).filter(|g| a.generation < *g) {
                return vec![Command::Refused { asked: a.generation, in_force }];
            }
            self.take(a);
        } else {
            self.hear(now, event);
        }
        self.expire(now);
        if self.is_settled(now) {
            self.work(now, &mut commands);
        }
        self.speak(now, &mut commands);
        commands
    }

    fn take(&mut self, a: Assignment) {
        self.leaving = self.leaving_after(&a);
        self.assignment = Some(a);
    }

    fn hear(&mut self, now: Time, event: Event) {
        match event {
            Event::Subscribed(seen) => match self.machines.get_mut(&seen.id) {
                Some(machine) => machine.subscribe(now, seen),
                None => {
                    self.machines.insert(seen.id.clone(), Machine::new(now, seen));
                }
            },
            Event::Knocked { machine, instance, answered } => {
                if let Some(machine) = self.machines.get_mut(&machine) {
                    machine.knocked(&instance, answered);
                }
            }
            Event::Seen(seen) => self.look(now, seen),
            Event::EdgeSeen(seen) => self.rotation.hear(now, seen),
            Event::StepDone { machine, step, result } => {
                let effort = match (&step, step.instance()) {
                    (_, Some(instance)) => self.cells.entry((machine, instance.clone())).or_default(),
                    (Step::Stage { image, .. } | Step::DropImage { image }, _) => {
                        self.stages.entry((machine, image.clone())).or_default()
                    }
                    _ => return,
                };
                effort.answered(now, result);
            }
            Event::Assignment(_) | Event::Tick => {}
        }
    }

    fn look(&mut self, now: Time, seen: Seen) {
        let Some(machine) = self.machines.get_mut(&seen.machine) else { return };
        if !machine.is_news(&seen) {
            return;
        }
        for image in &seen.images {
            let Some(effort) = self.stages.get_mut(&(seen.machine.clone(), image.image.clone())) else { continue };
            match &image.trouble {
                _ if image.seen.as_ref().is_some_and(|s| s.complete()) => effort.reached(),
                Some(fault) if !image.fetching && effort.is_armed() => effort.failed(now, fault.clone()),
                _ => {}
            }
        }
        self.cells.iter_mut().filter(|((m, _), _)| *m == seen.machine).for_each(|(_, e)| e.looked());
        machine.look(now, seen);
    }

    fn expire(&mut self, now: Time) {
        for (id, machine) in &mut self.machines {
            let effort = |i: &InstanceId| self.cells.get(&(id.clone(), i.clone()));
            machine.expire(now, |i| effort(i).is_some_and(Effort::is_leaving));
        }
        self.machines.retain(|_, m| !m.is_gone(now));
        let heard = |m: &MachineId| self.machines.get(m).is_some_and(|m| !m.is_silent());
        self.cells.retain(|(m, _), _| heard(m));
        self.stages.retain(|(m, _), _| heard(m));
        self.drains.retain(|(m, _), _| self.machines.contains_key(m));
    }

    /// Whether what is not seen may be taken as not there. An edge that has never had a config
    /// serves nobody, so there is nothing to lose by not waiting.
    fn is_settled(&self, now: Time) -> bool {
        self.assignment.is_some() && (self.has_waited(now) || self.reported.is_some() || self.rotation.is_blank())
    }

    /// Whether machines have had time to subscribe.
    fn has_waited(&self, now: Time) -> bool {
        self.began.is_some_and(|b| now.since(b) >= SETTLE)
    }

    fn share(&self, service: &ServiceId) -> Option<&ServiceShare> {
        self.assignment.as_ref().and_then(|a| a.services.get(service)).or_else(|| self.leaving.get(service))
    }

    /// Machines that may be given work.
    fn heard(&self) -> impl Iterator<Item = (&MachineId, &Machine)> {
        self.machines.iter().filter(|(_, m)| !m.is_silent())
    }

    /// Every share that still matters: those assigned, and those leaving.
    fn shares(&self) -> impl Iterator<Item = (&ServiceId, &ServiceShare)> {
        self.assignment.iter().flat_map(|a| &a.services).chain(&self.leaving)
    }

    fn all_cells(&self) -> impl Iterator<Item = (&MachineId, &CellSeen)> {
        self.machines.iter().flat_map(|(m, has)| has.has.iter().flat_map(move |s| s.cells.iter().map(move |c| (m, c))))
    }

    /// One round: choose, withdraw, step.
    fn work(&mut self, now: Time, commands: &mut Vec<Command>) {
        let mut chosen = wanted::choose(self);
        self.drains.retain(|key, _| !chosen.keep.contains(key));
        let going: Vec<(MachineId, InstanceId)> = self
            .all_cells()
            .map(|(m, c)| (m.clone(), c.instance.clone()))
            .filter(|key| !chosen.keep.contains(key))
            .collect();
        self.drains.retain(|key, _| going.contains(key));
        for key in going {
            self.drains.entry(key).or_insert(now);
        }
        let services = rotation::services(self, &chosen.keep);
        commands.extend(self.rotation.want(now, services));

        let mut steps = Vec::new();
        let mut given_up = Vec::new();
        for (machine, cell) in self.all_cells() {
            let key = (machine.clone(), cell.instance.clone());
            let step = if chosen.keep.contains(&key) {
                self.towards_serving(machine, cell)
            } else {
                self.towards_dormant(now, &key, cell)
            };
            match step {
                // What would now be suspended serves nobody; until its machine is back there is no more to do.
                Some(_) if self.machines.get(machine).is_some_and(Machine::is_silent) => given_up.push(key),
                Some(step) => steps.push((machine.clone(), step)),
                None => {}
            }
        }
        steps.extend(chosen.prepare.iter().map(|(m, spec)| (m.clone(), Step::Prepare(spec.clone()))));
        steps.append(&mut chosen.stage);
        steps.extend(self.unwanted_images());
        self.refused = chosen.refused;
        for (machine, instance) in given_up {
            if let Some(machine) = self.machines.get_mut(&machine) {
                machine.give_up(&instance);
            }
        }

        for (machine, step) in steps {
            let effort = match (&step, step.instance()) {
                (_, Some(instance)) => self.cells.entry((machine.clone(), instance.clone())).or_default(),
                (Step::Stage { image, .. } | Step::DropImage { image }, _) => {
                    self.stages.entry((machine.clone(), image.clone())).or_default()
                }
                _ => continue,
            };
            if effort.may_act(now) {
                effort.sent(now, step.clone());
                commands.push(Command::Step { machine, step });
            }
        }
        self.forget(now);
    }

    /// Efforts whose object is gone, and shares whose cells are.
    fn forget(&mut self, now: Time) {
        let there: Vec<(MachineId, InstanceId)> =
            self.all_cells().map(|(m, c)| (m.clone(), c.instance.clone())).collect();
        let healthy: Vec<(MachineId, InstanceId)> = self
            .all_cells()
            .filter(|(_, c)| matches!(c.life, Life::Healthy | Life::Handed))
            .map(|(m, c)| (m.clone(), c.instance.clone()))
            .collect();
        for key in &healthy {
            if let Some(effort) = self.cells.get_mut(key).filter(|e| e.outstanding().is_none()) {
                effort.reached();
            }
        }
        let wanted: Vec<ServiceId> = self.assignment.iter().flat_map(|a| a.services.keys().cloned()).collect();
        self.cells.retain(|key, e| there.contains(key) || e.outstanding().is_some() || wanted.contains(&key.1.service));
        let machines = &self.machines;
        let named: Vec<&String> = self.assignment.iter().flat_map(|a| a.services.values().map(|s| &s.image)).collect();
        self.stages.retain(|(m, image), e| {
            e.outstanding().is_some()
                || named.contains(&image)
                || machines.get(m).is_some_and(|m| m.staged(image).is_some())
        });
        let busy: Vec<ServiceId> = there
            .iter()
            .map(|(_, i)| i.service.clone())
            .chain(self.cells.keys().map(|(_, i)| i.service.clone()))
            .collect();
        // A cell not seen yet may be on a machine that has not subscribed yet.
        if self.has_waited(now) {
            self.leaving.retain(|s, _| busy.contains(s));
        }
    }

    fn towards_serving(&self, machine: &MachineId, cell: &CellSeen) -> Option<Step> {
        let instance = cell.instance.clone();
        let share = self.assignment.as_ref()?.services.get(&instance.service)?;
        match cell.life {
            Life::Building => Some(Step::Prepare(wanted::spec(instance, share))),
            // What is missing of its image comes meanwhile; where none will come there is nothing to resume from.
            Life::Ready | Life::Resuming | Life::Lost => {
                let holds = self.machines.get(machine).is_some_and(|m| m.holds(&share.image));
                (holds || !wanted::refuses(self, machine, &share.image)).then_some(Step::Resume { instance })
            }
            Life::Healthy => None,
            // It is wanted back.
            Life::Handed => {
                let take = matches!(share.singleton, Some(Singleton::Take(_)));
                take.then(|| Step::Prepare(wanted::spec(instance, share)))
            }
            Life::Sick => self.rotation.is_out(cell.address).then_some(Step::Suspend { instance }),
        }
    }

    fn towards_dormant(&self, now: Time, key: &(MachineId, InstanceId), cell: &CellSeen) -> Option<Step> {
        let instance = cell.instance.clone();
        let suspend = Some(Step::Suspend { instance: instance.clone() });
        match cell.life {
            Life::Building | Life::Ready => Some(Step::Release { instance }),
            Life::Resuming | Life::Lost => suspend,
            Life::Healthy | Life::Sick | Life::Handed => {
                let drain = self.share(&instance.service).map_or(DRAIN_UNKNOWN, |s| s.drain);
                let over = self.drains.get(key).is_none_or(|began| now.since(*began) >= drain);
                let out = self.rotation.is_out(cell.address);
                let idle = self.rotation.is_idle(cell.address);
                let given_up = over && self.rotation.is_silent(now);
                let end = if cell.life == Life::Handed { Some(Step::Release { instance }) } else { suspend };
                end.filter(|_| idle || (out && over) || given_up)
            }
        }
    }

    /// Images on machines that no share names and no cell runs.
    fn unwanted_images(&self) -> Vec<(MachineId, Step)> {
        let Some(assignment) = &self.assignment else { return Vec::new() };
        let named = |image: &str| assignment.services.values().chain(self.leaving.values()).any(|s| s.image == image);
        let mut steps = Vec::new();
        for (id, machine) in self.heard() {
            // A cell of a service nobody names any more may still run from an image nobody names.
            let Some(has) = machine
                .has
                .as_ref()
                .filter(|h| h.cells.iter().all(|c| assignment.services.contains_key(&c.instance.service)))
            else {
                continue;
            };
            for staged in has.images.iter().filter(|i| !named(&i.image)) {
                steps.push((id.clone(), Step::DropImage { image: staged.image.clone() }));
            }
        }
        steps
    }

    /// Tells the CPA at a change and each second.
    fn speak(&mut self, now: Time, commands: &mut Vec<Command>) {
        // A first report without what is there would look like a loss.
        let waited = self.began.is_some_and(|b| now.since(b) >= SETTLE + Span::secs(1));
        let ready = self.reported.is_some() || waited || (self.is_settled(now) && self.rotation.is_confirmed());
        if !ready {
            return;
        }
        report::note_changes(self, now);
        let inventory = report::inventory(self, now);
        let due = self.reported.as_ref().is_none_or(|(at, old)| {
            now.since(*at) >= report::EVERY || Inventory { at: old.at, ..inventory.clone() } != *old
        });
        if due {
            self.reported = Some((now, inventory.clone()));
            commands.push(Command::Report(inventory));
        }
    }

    fn generation(&self) -> Generation {
        self.assignment.as_ref().map_or(Generation(0), |a| a.generation)
    }

    fn stage_trouble(&self, image: &str) -> Option<(&MachineId, &Fault)> {
        self.stages
            .iter()
            .find(|((_, i), e)| i == image && e.trouble.is_some())
            .and_then(|((m, _), e)| Some((m, e.trouble.as_ref()?)))
    }
}
