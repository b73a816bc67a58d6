//! The content placement agent: hears one event at a time, keeps its memory, answers with commands.
//!
//! ```text
//!  Tick: judge whole seconds ─▶ close slots ─▶ settle transitions ─▶ think about each service ─▶ answers
//!  Inventory: look ─▶ settle ─▶ answers         Demand: count
//!  Order: plan      Apply: check, put in force  Restored: take over, say everything again
//! ```

use crate::clusters::second;
use crate::forecast::SLOT;
use crate::memory::{Memory, Seen, Shares};
use crate::solve::Tables;
use crate::toward::{PATIENCE, Transition, union};
use crate::{Command, Event, Refusal, check, orders, steering, toward};
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::fleet::{Fleet, Service};
use vmatrix_model::inventory::Inventory;
use vmatrix_model::placement::Placement;
use vmatrix_model::plan::{Cause, Decision, Plan, WhyNot};
use vmatrix_model::wire::Order;
use vmatrix_model::{Bytes, Generation, NetworkId, RegionId, ServiceId, Span, Time};

/// How long an instance out of rotation may keep its connections: longer than any answer here, short enough that a
/// crowd's copy sleeps within a minute.
pub(crate) const DRAIN: Span = Span::secs(20);
/// A service that nobody is seen to serve for so long is resumed elsewhere. A killed VM agent is back by then, and its
/// instances serve meanwhile.
const LOST: Span = Span::secs(15);
/// Furthest ahead of ours that another CPA's number is believed: at a thousand a second, the work of fifty days whose
/// journal was lost. Beyond it a daemon is broken or lies, and following it would use up the numbers.
pub(crate) const AHEAD_MAX: u64 = 1 << 32;

/// By what a service without a crowd is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// By the day ahead, once a day was heard: [`crate::ahead`].
    #[default]
    Ahead,
    /// By the hour's prices at all times: to compare with.
    Hourly,
}

/// The content placement agent of one fleet.
#[derive(Debug, Clone)]
pub struct Cpa {
    pub(crate) fleet: Fleet,
    pub(crate) policy: Policy,
    pub(crate) tables: Tables,
    pub(crate) memory: Memory,
}

impl Cpa {
    /// A CPA that has heard nothing. `images` are the stored sizes that are known; the fleet's profile stands in for the rest.
    pub fn new(fleet: Fleet, images: BTreeMap<ServiceId, Bytes>) -> Cpa {
        let tables = Tables::new(&fleet);
        Cpa { fleet, tables, policy: Policy::default(), memory: Memory { images, ..Memory::default() } }
    }

    /// The same, placing by another policy.
    pub fn under(self, policy: Policy) -> Cpa {
        Cpa { policy, ..self }
    }

    /// All it knows, to be written down.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The fleet it places services over.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// Hears one event. `now` should not run backwards; where it jumps, either way, what is remembered jumps with it.
    pub fn handle(&mut self, now: Time, event: Event) -> Vec<Command> {
        let mut commands = vec![];
        self.skip_gap(now);
        match event {
            Event::Tick => {
                self.begin(now, &mut commands);
                self.judge(now, &mut commands);
                self.settle(now, &mut commands);
                self.look_for_losses(now, &mut commands);
                self.steer(now, &mut commands);
            }
            Event::Demand(report) => self.count(now, &report),
            Event::Inventory(inventory) => {
                self.look(now, inventory, &mut commands);
                self.settle(now, &mut commands);
                self.steer(now, &mut commands);
            }
            Event::Answering { network, generation } => self.answering(network, generation, &mut commands),
            Event::Image(service, bytes) => {
                self.memory.images.insert(service, bytes);
            }
            Event::Order(order) => {
                commands.push(self.order(now, &order).map_or_else(Command::Refuse, Command::Planned))
            }
            Event::Apply { plan } => match self.apply(now, plan, &mut commands) {
                Ok(()) => self.steer(now, &mut commands),
                Err(refusal) => commands.push(Command::Refuse(refusal)),
            },
            Event::Restored(memory) => self.restore(now, *memory, &mut commands),
        }
        commands
    }

    /// Time to live of the answers.
    pub(crate) fn ttl(&self) -> Span {
        Span::secs(u64::from(self.fleet.ttl_s))
    }

    fn begin(&mut self, now: Time, commands: &mut Vec<Command>) {
        if self.memory.began.is_some() {
            return;
        }
        self.memory.began = Some(now);
        self.skip_to(now);
        let plan = self.first(now);
        self.adopt(now, plan, commands);
    }

    /// Takes over what the last run knew, and says again what is in force: the networks may not have heard it.
    fn restore(&mut self, now: Time, memory: Memory, commands: &mut Vec<Command>) {
        self.memory = memory;
        // Services and networks that the fleet no longer has are forgotten.
        let fleet = &self.fleet;
        self.memory.placement.services.retain(|s, _| fleet.service(s).is_some());
        self.memory.transitions.retain(|s, _| fleet.service(s).is_some());
        self.memory.seen.retain(|n, _| fleet.network(n).is_some());
        // While the CPA was away it heard nobody; that is not their silence.
        for seen in self.memory.seen.values_mut() {
            seen.heard = now;
        }
        for report in self.memory.reports.values_mut() {
            report.heard = now;
        }
        for held in self.memory.holds.values_mut() {
            held.served_at = held.served_at.map(|_| now);
        }
        self.skip_to(now);
        if self.memory.began.is_some() {
            self.welcome(now, commands);
            self.assign(commands);
            commands.push(Command::Announce(self.memory.steering.clone()));
        }
    }

    /// Gives a first placement to services that came into the fleet since the last run.
    fn welcome(&mut self, now: Time, commands: &mut Vec<Command>) {
        let new = |s: &Service| !self.memory.placement.services.contains_key(&s.name);
        if self.fleet.services.iter().any(new) {
            let mut plan = self.first(now);
            let known: BTreeSet<ServiceId> = self.memory.placement.services.keys().cloned().collect();
            plan.moves.retain(|m| !known.contains(&m.service));
            plan.target.services = plan
                .target
                .services
                .into_iter()
                .map(|(s, shares)| if known.contains(&s) { (s.clone(), self.aim(&s)) } else { (s, shares) })
                .collect();
            self.adopt(now, plan, commands);
        }
    }

    /// Remembers what a network has. One that works towards a placement newer than ours has it of a CPA whose journal
    /// was lost; ours is numbered after it, or that network would refuse it for ever.
    fn look(&mut self, now: Time, inventory: Inventory, commands: &mut Vec<Command>) {
        if self.fleet.network(&inventory.network).is_none() {
            return;
        }
        let newer = inventory.generation;
        if let Some(refusal) = absurd(&inventory.network, newer, self.memory.placement.generation) {
            commands.push(Command::Refuse(refusal));
            return;
        }
        let changed_hands = self.memory.note_holders(&inventory);
        self.memory.seen.insert(inventory.network.clone(), Seen { heard: now, inventory });
        if self.memory.began.is_some() && newer > self.memory.placement.generation {
            let placement = Placement { generation: newer.next(), services: self.memory.placement.services.clone() };
            self.put_in_force(placement, commands);
        } else if changed_hands && self.memory.began.is_some() {
            self.assign(commands);
        }
    }

    /// An edge has answers numbered after ours; number ours after its.
    fn answering(&mut self, network: NetworkId, newer: Generation, commands: &mut Vec<Command>) {
        let ours = &mut self.memory.steering;
        if let Some(refusal) = absurd(&network, newer, ours.generation) {
            commands.push(Command::Refuse(refusal));
        } else if newer > ours.generation {
            ours.generation = newer.next();
            commands.push(Command::Announce(ours.clone()));
        }
    }

    /// Judges every whole second since the last tick, closes slots, and thinks where there is something to think about.
    fn judge(&mut self, now: Time, commands: &mut Vec<Command>) {
        let present = second(now);
        while self.memory.second < present {
            let judged = self.memory.second;
            self.memory.second += 1;
            let closes = (judged + 1).is_multiple_of(SLOT.0 / 1_000_000);
            for service in self.fleet.services.clone() {
                self.watch(now, &service.name, judged);
                if closes {
                    self.close_slot(now, &service.name, judged + 1);
                    self.hear_ahead(now, &service, judged + 1, SLOT.0 / 1_000_000);
                }
                self.think(now, &service, closes, commands);
            }
        }
    }

    /// Thinks about one service, unless it is on its way, an operator's, or not up yet.
    fn think(&mut self, now: Time, service: &Service, round: bool, commands: &mut Vec<Command>) {
        let name = &service.name;
        if self.memory.transitions.contains_key(name) || !self.up(name, now) {
            return;
        }
        let leader = self.fleet.leader(service).name.clone();
        if leader != *name {
            return;
        }
        let leave =
            |network: &NetworkId, reason: String| WhyNot { service: name.clone(), network: network.clone(), reason };
        if !service.automatic || self.ordered_until(name, now).is_some() {
            let reason = if service.automatic {
                "the service is where an operator ordered it"
            } else {
                "automatic = false: only an operator moves it"
            };
            let others =
                self.fleet.networks.iter().filter(|n| self.aim(name).get(&n.name).is_none_or(|s| s.instances() == 0));
            let not = others.map(|n| leave(&n.name, reason.into())).collect();
            self.memory.not.insert(name.clone(), not);
            return;
        }
        let plan = match self.greatest_crowd(name) {
            Some((region, crowd)) => {
                let cause = Cause::Burst {
                    service: name.clone(),
                    region,
                    requests_per_100s: crowd.level / 10,
                    usual_per_100s: crowd.usual / 10,
                };
                self.crowd(now, service, cause)
            }
            None if self.policy == Policy::Ahead && self.memory.ahead.get(name).is_some_and(|a| a.due()) => {
                self.look_ahead(now, service)
            }
            None => {
                let just_calm = self
                    .memory
                    .holds
                    .get(name)
                    .and_then(|h| h.calm_since)
                    .is_some_and(|t| now.since(t) <= SLOT.times(3));
                let known = self.memory.usual.get(name).is_some_and(|u| u.values().all(|u| u.known()));
                if known && (round || just_calm) { self.ordinary(now, service, round) } else { None }
            }
        };
        if let Some(plan) = plan {
            self.adopt(now, plan, commands);
        }
    }

    /// The crowd with the most requests, if any is on; ties go to the lower name.
    fn greatest_crowd(&self, service: &ServiceId) -> Option<(RegionId, crate::burst::Crowd)> {
        let watches = self.memory.watches.get(service)?;
        let crowds = watches.iter().filter_map(|(r, w)| Some((r.clone(), w.crowd()?)));
        crowds.max_by(|(ra, a), (rb, b)| a.level.cmp(&b.level).then(rb.cmp(ra)))
    }

    fn up(&self, service: &ServiceId, now: Time) -> bool {
        self.fleet.networks.iter().any(|n| toward::serving(&self.memory.seen, service, &n.name, now) > 0)
    }

    /// Remembers who serves since when, and resumes elsewhere what nobody serves.
    fn look_for_losses(&mut self, now: Time, commands: &mut Vec<Command>) {
        for service in self.fleet.services.clone() {
            let serving: BTreeSet<NetworkId> = self
                .fleet
                .networks
                .iter()
                .map(|n| n.name.clone())
                .filter(|n| toward::serving(&self.memory.seen, &service.name, n, now) > 0)
                .collect();
            let edge_lives = self.memory.placement.active(&service.name).any(|n| {
                steering::heard(&self.memory, n, now)
                    && self.memory.seen.get(n).is_some_and(|s| now.since(s.heard) > toward::SILENT)
            });
            let held = self.memory.holds.entry(service.name.clone()).or_default();
            held.serving_since.retain(|n, _| serving.contains(n));
            for network in &serving {
                held.serving_since.entry(network.clone()).or_insert(now);
            }
            if !serving.is_empty() || edge_lives {
                held.served_at = Some(now);
            }
            let lost = held.served_at.is_some_and(|t| now.since(t) >= LOST);
            if lost && service.automatic && !self.memory.transitions.contains_key(&service.name) {
                let network = self.memory.placement.active(&service.name).next().unwrap_or(&service.home).clone();
                if let Some(plan) = self.lost(now, &service, network) {
                    self.adopt(now, plan, commands);
                }
            }
        }
    }

    fn order(&mut self, now: Time, order: &Order) -> Result<Plan, Refusal> {
        let fleet = self.fleet.clone();
        let (order, meeting) = self.meet(now, order)?;
        let (service, target) = orders::wanted(&fleet, &order, &self.aim(&order.service))?;
        let mut plan = self.ordered(now, service, &target);
        if let Some(meeting) = meeting {
            meeting.tell(&mut plan);
        }
        if let Some(fault) = check::lint(&self.fleet, &plan.target).first() {
            return Err(Refusal::Order {
                problem: fault.to_string(),
                hint: "order fewer instances, or take another service away first".into(),
            });
        }
        self.memory.keep(plan.clone());
        Ok(plan)
    }

    fn apply(&mut self, now: Time, id: u64, commands: &mut Vec<Command>) -> Result<(), Refusal> {
        let Some(plan) = self.memory.plans.iter().find(|p| p.id == id).cloned() else {
            return Err(Refusal::NoPlan { plan: id });
        };
        let in_force = self.memory.placement.generation;
        if plan.base != in_force {
            return Err(Refusal::Stale {
                plan: id,
                base: plan.base,
                now: in_force,
                what: self.changes_since(plan.base),
            });
        }
        self.memory.plans.retain(|p| p.id != id);
        let ordered: BTreeSet<ServiceId> = plan.moves.iter().map(|m| m.service.clone()).collect();
        if self.adopt(now, plan, commands) {
            self.memory.ordered.extend(ordered.into_iter().map(|s| (s, now + orders::HELD)));
        }
        Ok(())
    }

    /// What was put in force after `base`, in words.
    fn changes_since(&self, base: Generation) -> String {
        let moves = self.memory.decisions.iter().filter(|d| d.generation > base).flat_map(|d| &d.plan.moves);
        let words: Vec<String> = moves.map(|m| format!("{:?} {} at {}", m.action, m.service, m.network)).collect();
        if words.is_empty() { "a relocation that was under way has gone on".into() } else { words.join(", ") }
    }

    /// Puts the first half of a plan in force: everything old and everything new. False, and refused, if that does not fit.
    fn adopt(&mut self, now: Time, plan: Plan, commands: &mut Vec<Command>) -> bool {
        let mut placement = self.memory.placement.clone();
        placement.generation = placement.generation.next();
        let mut begun = vec![];
        for (service, target) in &plan.target.services {
            if *target == self.aim(service) {
                continue;
            }
            let before = self.memory.placement.services.get(service).cloned().unwrap_or_default();
            placement.services.insert(service.clone(), union(&before, target));
            let longest = plan.moves.iter().filter(|m| m.service == *service).map(|m| m.time).max().unwrap_or_default();
            let transition = Transition {
                plan: plan.id,
                began: now,
                generation: placement.generation,
                until: now + longest + PATIENCE,
                before,
                target: target.clone(),
                turned: None,
                told: false,
            };
            begun.push((service.clone(), transition));
        }
        let faults = check::lint(&self.fleet, &placement);
        if let (Some(fault), false) = (faults.first(), plan.cause == Cause::Start) {
            // Both halves together do not fit; nothing moves, and the plan says so.
            let hint = "take something away first, or lend the network more memory".into();
            commands.push(Command::Refuse(Refusal::Order {
                problem: format!("old and new places at once do not fit: {fault}"),
                hint,
            }));
            if let Some(m) = plan.moves.first() {
                let why = WhyNot { service: m.service.clone(), network: m.network.clone(), reason: fault.to_string() };
                self.memory.not.entry(m.service.clone()).or_default().push(why);
            }
            return false;
        }
        let nothing = begun.is_empty();
        let decision = Decision {
            plan,
            generation: placement.generation,
            serving_at: nothing.then_some(now),
            done_at: nothing.then_some(now),
        };
        self.memory.transitions.extend(begun);
        self.memory.decide(decision.clone());
        commands.push(Command::Decided(decision));
        self.put_in_force(placement, commands);
        true
    }

    pub(crate) fn put_in_force(&mut self, placement: Placement, commands: &mut Vec<Command>) {
        self.memory.placement = placement.clone();
        commands.push(Command::Placed(placement));
        self.assign(commands);
    }

    /// Announces new answers if they differ from those in force.
    fn steer(&mut self, now: Time, commands: &mut Vec<Command>) {
        let mut services = BTreeMap::new();
        for service in &self.fleet.services {
            let named = steering::named(&self.memory, service, now);
            let answers = if named.is_empty() {
                self.memory.steering.services.get(&service.name).cloned().unwrap_or_default()
            } else {
                steering::answers(&self.fleet, &self.tables, service, self.rule(&service.name, now), &named)
            };
            services.insert(service.name.clone(), answers);
        }
        let old = &mut self.memory.steering;
        if old.services == services && old.zone == self.fleet.zone && old.ttl_s == self.fleet.ttl_s {
            return;
        }
        *old = vmatrix_model::steering::Steering {
            generation: old.generation.next(),
            zone: self.fleet.zone.clone(),
            ttl_s: self.fleet.ttl_s,
            services,
        };
        commands.push(Command::Announce(old.clone()));
    }

    /// The shares of every service in force, for tests and reports.
    pub fn shares(&self, service: &ServiceId) -> Shares {
        self.memory.placement.services.get(service).cloned().unwrap_or_default()
    }

    /// Whether anything is on its way.
    pub fn moving(&self) -> bool {
        !self.memory.transitions.is_empty()
    }
}

/// Whether a number that `network` claims is too far ahead of the one in force to be believed.
fn absurd(network: &NetworkId, claimed: Generation, now: Generation) -> Option<Refusal> {
    let absurd = claimed.0.saturating_sub(now.0) > AHEAD_MAX;
    absurd.then(|| Refusal::Absurd { network: network.clone(), claimed, now })
}

#[cfg(test)]
pub(crate) mod testing {
    use vmatrix_model::config::parse_toml;
    use vmatrix_model::fleet::Fleet;

    #[derive(serde::Deserialize)]
    struct File {
        fleet: Fleet,
    }

    /// The fleet of the shipped scenario.
    pub fn fleet() -> Fleet {
        let text = include_str!("../../../scenarios/library/flash-crowd.toml");
        parse_toml::<File>("flash-crowd.toml", text).unwrap().fleet
    }
}
