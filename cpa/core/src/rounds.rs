//! Thinks about one service: weighs every step, keeps what the holds allow, writes the plan.
//!
//! ```text
//!  a crowd is on ─▶ crowd():    adds and growth only, among networks that hold the image
//!  an epoch closed ─▶ look_ahead(): see [`crate::ahead`], once a whole day was heard; until then, and for singletons:
//!  a slot closed ─▶ ordinary(): adds, drops, swaps, other numbers; the best of three rounds
//!  nobody serves ─▶ lost():     any other network
//!  an order      ─▶ ordered():  what was ordered, with what the prices say against it
//! ```
//!
//! During a crowd nothing is taken away: a price of an hour at a crowd's rates says nothing about
//! what the quiet regions will want in a minute.

use crate::cpa::{Cpa, Policy};
use crate::explain::{self, Effect};
use crate::memory::Shares;
use crate::solve::{self, Case, Priced, Rates, Rule, Size, Step};
use crate::{check, cost, hold};
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::fleet::Service;
use vmatrix_model::placement::{Placement, Share};
use vmatrix_model::plan::{Action, Cause, Move, Plan, Price, WhyNot};
use vmatrix_model::{Bytes, MicroUsd, NetworkId, ServiceId, SiteId, Span, Time};

/// A step with its price and what speaks against it.
#[derive(Debug, Clone)]
struct Weighed {
    step: Step,
    after: Priced,
    /// How much less an hour costs.
    gain: MicroUsd,
    /// When the move will have paid for itself, if ever.
    payback: Option<Span>,
    /// Why it cannot be taken at any price.
    against: Option<String>,
}

impl Cpa {
    /// What is asked of `service`: the usual, or the crowd's level where there is one.
    pub(crate) fn rates(&self, service: &ServiceId) -> Rates {
        let usual = self.memory.usual.get(service);
        let watches = self.memory.watches.get(service);
        let rate = |region| {
            let crowd = watches.and_then(|w| w.get(region)).and_then(|w| w.crowd());
            crowd.map(|c| c.level).or_else(|| usual.and_then(|u| u.get(region)).map(|u| u.rate())).unwrap_or(0)
        };
        let elsewhere = self.memory.counts.get(service).map_or(0, |c| c.elsewhere.sum(self.memory.second, 10) * 100);
        Rates { regions: self.fleet.regions.iter().map(|r| (r.name.clone(), rate(&r.name))).collect(), elsewhere }
    }

    /// The shares a service has, or is on its way to.
    pub(crate) fn aim(&self, service: &ServiceId) -> Shares {
        let on_its_way = self.memory.transitions.get(service).map(|t| &t.target);
        on_its_way.or_else(|| self.memory.placement.services.get(service)).cloned().unwrap_or_default()
    }

    /// By what the clients of `service` are sent about: see [`Rule`].
    pub(crate) fn rule(&self, service: &ServiceId, now: Time) -> Rule {
        if self.ordered_until(service, now).is_some() { Rule::Nearest } else { Rule::Fastest }
    }

    /// Until when an operator's order holds.
    pub(crate) fn ordered_until(&self, service: &ServiceId, now: Time) -> Option<Time> {
        self.memory.ordered.get(service).copied().filter(|until| now < *until)
    }

    /// Stored bytes of a service's image.
    pub(crate) fn image_bytes(&self, service: &Service) -> Bytes {
        self.memory.images.get(&service.name).copied().unwrap_or(Bytes(service.profile.image_mib << 20))
    }

    /// Image bytes that `network` lacks.
    pub(crate) fn missing(&self, service: &Service, network: &NetworkId) -> Bytes {
        let seen = self.memory.seen.get(network).and_then(|s| s.inventory.images.get(&service.name));
        seen.map_or_else(|| self.image_bytes(service), |i| i.total - i.present)
    }

    /// From the order to serving: the missing bytes over the origin's link, then the resume.
    pub(crate) fn ready_in(&self, service: &Service, network: &NetworkId) -> Span {
        let link = self.tables.origin(network);
        let travel = link.map_or(Span::ZERO, |l| cost::transfer_time(self.missing(service, network), l));
        travel + Span::ms(u64::from(service.profile.resume_ms))
    }

    pub(crate) fn case<'a>(&'a self, service: &'a Service, rule: Rule, rates: &'a Rates, now: Time) -> Case<'a> {
        Case { fleet: &self.fleet, tables: &self.tables, service, rule, rates, now }
    }

    /// As [`solve::price`], with what the other services of its group would cost in the same networks.
    fn price(&self, case: Case, networks: &BTreeSet<NetworkId>, size: Size) -> Priced {
        let mut priced = solve::price(case, networks, size);
        for other in self.fleet.group(case.service) {
            let rates = self.rates(&other.name);
            let case = Case { service: other, rates: &rates, ..case };
            priced.price = priced.price + solve::price(case, networks, Size::ByLoad).price;
        }
        priced
    }

    /// What a service of a group has where another of that group is as `target` says.
    fn beside(&self, service: &Service, target: &Shares) -> Shares {
        let aim = self.aim(&service.name);
        let had = |n: &NetworkId| aim.get(n).map_or(0, |s| s.instances()).max(1);
        let share = |(n, s): (&NetworkId, &Share)| match s {
            Share::Active(_) => (n.clone(), Share::Active(had(n))),
            Share::Dormant => (n.clone(), Share::Dormant),
        };
        target.iter().map(share).collect()
    }

    /// The price of the move itself: its image bytes at the home's egress, and the newcomer running before it serves.
    fn move_price(&self, service: &Service, step: &Step, now: Time) -> MicroUsd {
        let Some(newcomer) = step.newcomer() else { return MicroUsd(0) };
        let bytes = self
            .fleet
            .network(&service.home)
            .map_or(MicroUsd(0), |home| cost::traffic_price(home, self.missing(service, newcomer)));
        let hour = self.fleet.network(newcomer).map_or(0, |n| cost::instance_price(n, now, 1).0);
        let idle = i128::from(hour) * i128::from(self.ready_in(service, newcomer).0) / 3_600_000_000;
        bytes + MicroUsd(i64::try_from(idle).unwrap_or(i64::MAX))
    }

    /// Prices `steps` from the present, cheapest first; ties go to the lower name.
    fn weigh(
        &self,
        case: Case,
        present: &BTreeMap<NetworkId, u32>,
        before: &Priced,
        size: Size,
        wanted: impl Fn(&Step) -> bool,
    ) -> Vec<Weighed> {
        let active: BTreeSet<NetworkId> = present.keys().cloned().collect();
        let weigh_one = |step: Step| {
            let after = self.price(case, &step.apply(&active), size);
            let gain = before.price.total() - after.price.total();
            let ready = step.newcomer().map_or(Span::ZERO, |n| self.ready_in(case.service, n));
            let payback = hold::payback(gain, self.move_price(case.service, &step, case.now), ready);
            let against = self.against(case, &step, &after, &active);
            Weighed { step, after, gain, payback, against }
        };
        let mut weighed: Vec<Weighed> =
            solve::steps(&self.fleet, case.service, &active).into_iter().filter(wanted).map(weigh_one).collect();
        weighed.retain(|w| w.step != Step::Resize || w.after.shares != *present);
        weighed.sort_by(|a, b| (a.after.price.total(), &a.step).cmp(&(b.after.price.total(), &b.step)));
        weighed
    }

    /// What makes a step impossible, in words.
    fn against(&self, case: Case, step: &Step, after: &Priced, active: &BTreeSet<NetworkId>) -> Option<String> {
        let shut = step.newcomer().and_then(|newcomer| self.shut(case, newcomer, active));
        shut.or_else(|| self.does_not_fit(case.service, &after.shares))
    }

    /// Why a network cannot be entered, in words, whatever it has room for.
    fn shut(&self, case: Case, newcomer: &NetworkId, active: &BTreeSet<NetworkId>) -> Option<String> {
        let held = self.memory.holds.get(&case.service.name);
        if held.is_some_and(|h| !h.may_try(newcomer, case.now)) {
            return Some(format!("{newcomer} failed to serve it less than {} ago", hold::AVOID));
        }
        if !crate::steering::heard(&self.memory, newcomer, case.now) {
            return Some(format!("nothing is heard of {newcomer}"));
        }
        self.two_tier(case, newcomer, active).err()
    }

    /// Why a network where the service is not active cannot be entered, in words.
    pub(crate) fn barred(&self, case: Case, network: &NetworkId, active: &BTreeSet<NetworkId>) -> Option<String> {
        if active.contains(network) {
            return None;
        }
        let mut with = active.clone();
        with.insert(network.clone());
        let shares = || solve::price(case, &with, Size::ByLoad).shares;
        self.shut(case, network, active).or_else(|| self.does_not_fit(case.service, &shares()))
    }

    /// Why old and new instances have no room beside one another, in words.
    fn does_not_fit(&self, service: &Service, instances: &BTreeMap<NetworkId, u32>) -> Option<String> {
        let mut placement = self.memory.placement.clone();
        for (name, t) in &self.memory.transitions {
            placement.services.insert(name.clone(), crate::toward::union(&t.before, &t.target));
        }
        let target = solve::shares(&self.fleet, instances);
        let present = placement.services.get(&service.name).cloned().unwrap_or_default();
        placement.services.insert(service.name.clone(), crate::toward::union(&present, &target));
        check::lint(&self.fleet, &placement).first().map(ToString::to_string)
    }

    /// The paper's condition (§5.1) for the region that gains most from `network`; `Err` if it fails for every region.
    fn two_tier(
        &self,
        case: Case,
        network: &NetworkId,
        active: &BTreeSet<NetworkId>,
    ) -> Result<Option<String>, String> {
        let Some(backend) = &case.service.backend else { return Ok(None) };
        let (nc, nb) = (backend.packets, case.service.response_packets);
        let of_region = |region| {
            // A joins the clients to the place they are nearest to now.
            let from = self.tables.best(Rule::Nearest, &case.service.name, region, active)?;
            let t = cost::two_tier(
                nc,
                nb,
                self.tables.client(region, from)?,
                self.tables.client(region, network)?,
                self.tables.origin(network)?,
            );
            Some((t, region))
        };
        let asking = case.rates.regions.iter().filter(|(_, rate)| **rate > 0).map(|(r, _)| r);
        let best = asking.filter_map(of_region).max_by(|(a, ra), (b, rb)| a.limit.cmp(&b.limit).then(rb.cmp(ra)));
        let Some((t, region)) = best else { return Ok(None) };
        let words = explain::two_tier(region, network, &backend.name, nc, nb, t);
        if t.holds() { Ok(Some(words)) } else { Err(words) }
    }

    /// What the change from one set of networks to another does for the region it changes most.
    pub(crate) fn effect(
        &self,
        case: Case,
        before: &BTreeSet<NetworkId>,
        after: &BTreeSet<NetworkId>,
    ) -> Option<Effect> {
        let of_region = |(region, rate): (&vmatrix_model::RegionId, &u64)| {
            let name = &case.service.name;
            let from = self.tables.best(case.rule, name, region, before)?;
            let to = self.tables.best(case.rule, name, region, after)?;
            let (b, a) = (self.tables.response(name, region, from)?, self.tables.response(name, region, to)?);
            let weight = cost::latency_price(case.service, *rate, Span(b.0.abs_diff(a.0)));
            (from != to).then(|| {
                (
                    weight,
                    Effect {
                        region: region.clone(),
                        rate: *rate,
                        from: from.clone(),
                        before: b,
                        to: to.clone(),
                        after: a,
                    },
                )
            })
        };
        let all = case.rates.regions.iter().filter_map(of_region);
        all.max_by(|(a, ea), (b, eb)| a.cmp(b).then(eb.region.cmp(&ea.region))).map(|(_, e)| e)
    }

    /// A crowd is on: resume a sleeping copy near it, or more of what runs.
    pub(crate) fn crowd(&mut self, now: Time, service: &Service, cause: Cause) -> Option<Plan> {
        let (rates, present) = (self.rates(&service.name), running(&self.aim(&service.name)));
        let case = self.case(service, Rule::Fastest, &rates, now);
        let active: BTreeSet<NetworkId> = present.keys().cloned().collect();
        let before = self.price(case, &active, Size::Given(&present));
        let grows = |s: &Step| matches!(s, Step::Add(_) | Step::Resize);
        let weighed = self.weigh(case, &present, &before, Size::AtLeast(&present), grows);
        let spent = |w: &Weighed| w.after.price.instances - before.price.instances;
        let pays = |w: &Weighed| {
            w.against.is_none()
                && hold::worthwhile(w.gain, MicroUsd(0), spent(w))
                && w.payback.is_some_and(|p| p <= hold::CROWD_HORIZON)
        };
        let chosen = weighed.iter().position(pays);
        let not = self.left(service, &before, &weighed, chosen, hold::CROWD_HORIZON);
        let Some(chosen) = chosen else {
            // Nobody comes to help a crowd: the operator will ask why.
            self.memory.not.insert(service.name.clone(), not);
            return None;
        };
        let plan = self.step_plan(case, &before, &weighed, chosen, cause, not);
        self.memory.holds.entry(service.name.clone()).or_default().called(now);
        Some(self.numbered(plan))
    }

    /// The ordinary round: `round` is true once a slot, false when it only asks whether a crowd's copy may sleep again.
    pub(crate) fn ordinary(&mut self, now: Time, service: &Service, round: bool) -> Option<Plan> {
        let (rates, present) = (self.rates(&service.name), running(&self.aim(&service.name)));
        let case = self.case(service, Rule::Fastest, &rates, now);
        let active: BTreeSet<NetworkId> = present.keys().cloned().collect();
        let before = self.price(case, &active, Size::Given(&present));
        let mut held = self.memory.holds.get(&service.name).cloned().unwrap_or_default();
        let spent = |w: &Weighed| MicroUsd((w.after.price.instances - before.price.instances).0.max(0));
        // Sleep is what a copy resumed for a crowd returns to: any saving will do.
        let after_crowd = held.calm(now) && active.len() > 1;
        // Where plans are made ahead, the hour's prices say how many instances, and when a crowd's copy sleeps again.
        let ahead = self.memory.ahead.get(&service.name).filter(|a| self.policy == Policy::Ahead && a.knows());
        let wanted = |step: &Step| {
            ahead.is_none_or(|ahead| match step {
                Step::Resize => true,
                Step::Drop(network) => after_crowd && !ahead.means(network),
                Step::Add(_) | Step::Swap { .. } => false,
            })
        };
        let planned = ahead.is_some();
        let weighed = self.weigh(case, &present, &before, Size::ByLoad, wanted);
        let to_sleep = |w: &Weighed| after_crowd && matches!(w.step, Step::Drop(_)) && w.gain.0 > 0;
        let pays = |w: &Weighed| {
            w.against.is_none()
                && (to_sleep(w) || hold::worthwhile(w.gain, before.price.total(), spent(w)))
                && w.payback.is_some_and(|p| p <= hold::EPOCH_HORIZON)
                && w.step.leaver().is_none_or(|n| held.may_leave(n, now))
        };
        let chosen = weighed.iter().position(pays);
        let not = self.left(service, &before, &weighed, chosen, hold::EPOCH_HORIZON);
        let ripe = match chosen.and_then(|c| weighed.get(c)) {
            Some(w) if to_sleep(w) => true,
            Some(w) => round && held.ripe(&w.step),
            None => {
                held.tempted = None;
                false
            }
        };
        let plan =
            chosen.filter(|_| ripe).map(|c| self.step_plan(case, &before, &weighed, c, Cause::Epoch, not.clone()));
        if plan.is_some() {
            held.tempted = None;
            let slept = chosen.and_then(|c| weighed.get(c)).filter(|w| to_sleep(w)).and_then(|w| w.step.leaver());
            // One that was lost was not put to sleep too early.
            if slept.is_some_and(|n| crate::steering::heard(&self.memory, n, now)) {
                held.slept_at = Some(now);
            }
        }
        self.memory.holds.insert(service.name.clone(), held);
        if !planned {
            self.memory.not.insert(service.name.clone(), not);
        }
        plan.map(|p| self.numbered(p))
    }

    /// Nothing of a service is seen to serve: resume it somewhere else.
    pub(crate) fn lost(&mut self, now: Time, service: &Service, network: NetworkId) -> Option<Plan> {
        let (rates, present) = (self.rates(&service.name), running(&self.aim(&service.name)));
        let case = self.case(service, Rule::Fastest, &rates, now);
        let before = self.price(case, &present.keys().cloned().collect(), Size::Given(&present));
        let weighed = self.weigh(case, &present, &before, Size::AtLeast(&present), |s| matches!(s, Step::Add(_)));
        let possible = |w: &&Weighed| w.step.newcomer().is_some_and(|n| self.two_tier_aside(case, w, n));
        let chosen = weighed.iter().find(possible)?.clone();
        let mut plan = self.step_plan(case, &before, &[chosen], 0, Cause::Loss { network: network.clone() }, vec![]);
        for m in &mut plan.moves {
            m.reason = format!(
                "no instance of {} is seen serving; it was last at {network}, of which nothing is heard",
                service.name
            );
        }
        Some(self.numbered(plan))
    }

    /// Whether a place will do when the choice is between a slow answer and none: the back end's distance is no objection then.
    fn two_tier_aside(&self, case: Case, w: &Weighed, newcomer: &NetworkId) -> bool {
        crate::steering::heard(&self.memory, newcomer, case.now)
            && (w.against.is_none() || self.two_tier(case, newcomer, &BTreeSet::new()).err() == w.against)
    }

    /// What an operator orders, priced, with what the prices say against it.
    pub(crate) fn ordered(&mut self, now: Time, service: &Service, target: &Shares) -> Plan {
        let (rates, aim) = (self.rates(&service.name), self.aim(&service.name));
        let (present, wanted) = (running(&aim), running(target));
        let case = self.case(service, Rule::Nearest, &rates, now);
        let sets: [BTreeSet<NetworkId>; 2] = [&present, &wanted].map(|m| m.keys().cloned().collect());
        let before = self.price(case, &sets[0], Size::Given(&present));
        let after = self.price(case, &sets[1], Size::Given(&wanted));
        let mut reason = "ordered by an operator; ".to_owned();
        reason += &explain::split(before.price, after.price);
        if let Some(e) = self.effect(case, &sets[0], &sets[1]) {
            reason += &format!("; {}", explain::effect(&e));
        }
        let mut not = vec![];
        let mut object = |network: &NetworkId, reason: String| {
            not.push(WhyNot { service: service.name.clone(), network: network.clone(), reason })
        };
        for newcomer in sets[1].difference(&sets[0]) {
            match self.two_tier(case, newcomer, &sets[0]) {
                Err(words) => object(newcomer, format!("the CPA would not: {words}")),
                Ok(_) if after.price.total() > before.price.total() => object(
                    newcomer,
                    format!(
                        "the CPA would not: {}",
                        explain::dearer(&Step::Add(newcomer.clone()), before.price, after.price)
                    ),
                ),
                Ok(_) => {}
            }
        }
        let plan = self.plan(case, Cause::Order, &before, &after, target.clone(), &reason, not);
        self.numbered(plan)
    }

    /// Every step that was weighed and left, one line for each network: the cheapest reason first.
    fn left(
        &self,
        service: &Service,
        before: &Priced,
        weighed: &[Weighed],
        chosen: Option<usize>,
        horizon: Span,
    ) -> Vec<WhyNot> {
        let taken = chosen.and_then(|c| weighed.get(c)).map(|w| &w.step);
        let mut by_network: BTreeMap<NetworkId, String> = BTreeMap::new();
        for w in weighed {
            let Some(network) = w.step.newcomer().or(w.step.leaver()) else { continue };
            if taken.is_some_and(|t| t.newcomer() == Some(network) || t.leaver() == Some(network)) {
                continue;
            }
            let reason = match (&w.against, w.payback) {
                (Some(words), _) => words.clone(),
                (None, None) => explain::dearer(&w.step, before.price, w.after.price),
                (None, Some(p)) if p > horizon => {
                    format!("{} would pay back after {p}, later than {horizon}", explain::step(&w.step))
                }
                (None, Some(_)) => format!(
                    "{} would save {} an hour: less than the best step, or not sure yet",
                    explain::step(&w.step),
                    w.gain
                ),
            };
            by_network.entry(network.clone()).or_insert(reason);
        }
        by_network
            .into_iter()
            .map(|(network, reason)| WhyNot { service: service.name.clone(), network, reason })
            .collect()
    }

    fn step_plan(
        &self,
        case: Case,
        before: &Priced,
        weighed: &[Weighed],
        chosen: usize,
        cause: Cause,
        not: Vec<WhyNot>,
    ) -> Plan {
        let w = &weighed[chosen];
        let second =
            weighed.iter().find(|o| o.step != w.step && o.against.is_none()).map(|o| (&o.step, o.after.price.total()));
        let (from, to) = (before.shares.keys().cloned().collect(), w.after.shares.keys().cloned().collect());
        let mut reason = String::new();
        if let Cause::Burst { service, region, .. } = &cause
            && let Some(c) = self.memory.watches.get(service).and_then(|w| w.get(region)).and_then(|w| w.crowd())
        {
            reason = format!(
                "a crowd in {region}: {} requests/s, usually {}; ",
                explain::rps(c.level),
                explain::rps(c.usual)
            );
        }
        reason += &explain::why(self.effect(case, &from, &to).as_ref(), before.price, w.after.price, w.payback, second);
        if let Some(Ok(Some(words))) = w.step.newcomer().map(|n| self.two_tier(case, n, &from)) {
            reason += &format!("; {words}");
        }
        self.plan(case, cause, before, &w.after, solve::shares(&self.fleet, &w.after.shares), &reason, not)
    }

    /// Writes a plan down: the moves from the present shares to `target`.
    #[allow(clippy::too_many_arguments)]
    fn plan(
        &self,
        case: Case,
        cause: Cause,
        before: &Priced,
        after: &Priced,
        target: Shares,
        reason: &str,
        not: Vec<WhyNot>,
    ) -> Plan {
        let mut moves = self.moves(case.service, &target, before.price, after.price, reason);
        let mut services: BTreeMap<ServiceId, Shares> =
            self.memory.placement.services.keys().map(|s| (s.clone(), self.aim(s))).collect();
        for other in self.fleet.group(case.service) {
            let beside = self.beside(other, &target);
            let reason = format!("it moves with {}: {reason}", case.service.name);
            moves.extend(self.moves(other, &beside, before.price, after.price, &reason));
            services.insert(other.name.clone(), beside);
        }
        services.insert(case.service.name.clone(), target);
        let base = self.memory.placement.generation;
        Plan { id: 0, at: case.now, cause, base, moves, not, target: Placement { generation: base.next(), services } }
    }

    fn numbered(&mut self, plan: Plan) -> Plan {
        Plan { id: self.memory.next_plan(), ..plan }
    }

    /// The moves from the shares a service has, or is on its way to, to `target`.
    pub(crate) fn moves(
        &self,
        service: &Service,
        target: &Shares,
        before: Price,
        after: Price,
        reason: &str,
    ) -> Vec<Move> {
        let aim = self.aim(&service.name);
        let mut moves = vec![];
        let networks: BTreeSet<&NetworkId> = aim.keys().chain(target.keys()).collect();
        for network in networks {
            let (old, new) = (aim.get(network), target.get(network));
            let (had, has) = (old.map_or(0, |s| s.instances()), new.map_or(0, |s| s.instances()));
            let missing = self.missing(service, network);
            let travel = self.tables.origin(network).map_or(Span::ZERO, |l| cost::transfer_time(missing, l));
            let (action, bytes, time) = match new {
                None if old.is_none() => continue,
                None => (Action::Drop, Bytes(0), self.ttl()),
                Some(_) if has > had => (Action::Resume(has), missing, self.ready_in(service, network)),
                Some(_) if has < had => (Action::Suspend(has), Bytes(0), self.ttl()),
                Some(_) if old.is_none() => (Action::Stage, missing, travel),
                Some(_) => continue,
            };
            moves.push(Move {
                service: service.name.clone(),
                network: network.clone(),
                action,
                bytes,
                time,
                before,
                after,
                reason: reason.to_owned(),
            });
        }
        moves
    }

    /// The first placement: every service at home, asleep everywhere else, so that a crowd needs no image bytes.
    pub(crate) fn first(&mut self, now: Time) -> Plan {
        let mut services = BTreeMap::new();
        let mut moves = vec![];
        for service in &self.fleet.services {
            let target: Shares = solve::shares(&self.fleet, &[(service.home.clone(), 1)].into());
            for mut m in self.moves(service, &target, Price::default(), Price::default(), "") {
                m.reason = match m.action {
                    Action::Resume(_) => format!("{} begins at home", service.name),
                    _ => "staged before any crowd, so that a resume here needs no image bytes (paper §5.4, pre-push)"
                        .into(),
                };
                moves.push(m);
            }
            services.insert(service.name.clone(), target);
        }
        let base = self.memory.placement.generation;
        let plan = Plan {
            id: 0,
            at: now,
            cause: Cause::Start,
            base,
            moves,
            not: vec![],
            target: Placement { generation: base.next(), services },
        };
        self.numbered(plan)
    }

    /// The nearest of `networks` to `from`, by round trip; ties go to the lower name.
    pub(crate) fn nearest<'a>(
        &self,
        from: &NetworkId,
        networks: impl Iterator<Item = &'a NetworkId>,
    ) -> Option<&'a NetworkId> {
        networks
            .filter(|n| *n != from)
            .map(|n| (self.fleet.rtt(&SiteId::from(from), &SiteId::from(n)), n))
            .min()
            .map(|(_, n)| n)
    }
}

/// The networks that run something, with how many.
pub(crate) fn running(shares: &Shares) -> BTreeMap<NetworkId, u32> {
    let some = |(n, s): (&NetworkId, &Share)| (s.instances() > 0).then(|| (n.clone(), s.instances()));
    shares.iter().filter_map(some).collect()
}
