//! The slow loop: where a service should be over the next day, looked at anew every ten minutes.
//!
//! ```text
//!  slot closes ─▶ requests by region       epoch closes ─▶ planner hears ─▶ plan of a day (see [`crate::horizon`])
//!                                                                              │ its first step
//!  what may not be: failed, silent, too far from its back end, full ─▶ Plan, with what each network would cost ◀┘
//! ```
//!
//! It takes over from [the hour's prices](crate::solve) once a service was heard for a whole day. A crowd is not its
//! business: that is answered within seconds and put back to sleep when it is over ([`crate::hold`]). Singletons and
//! groups stay with the hour's prices: a singleton is in one network at a time, which the planner does not promise.

use crate::cpa::Cpa;
use crate::horizon::online::{Choice, Planner, Prices, Requests};
use crate::horizon::{Stage, State, UNREACHED, dual, otherwise};
use crate::memory::Shares;
use crate::rounds::running;
use crate::solve::{self, Rule, Size};
use crate::{cost, explain};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use vmatrix_model::fleet::{Fleet, Kind, Network, Service};
use vmatrix_model::placement::Share;
use vmatrix_model::plan::{Cause, Plan, Price, WhyNot};
use vmatrix_model::{MicroUsd, NetworkId, RegionId, ServiceId, Span, Time};

/// How long what was decided stays: long enough that a resume is small beside it, short enough that a morning's rise is
/// met in steps of a few per cent.
pub const EPOCH: Span = Span::secs(600);
/// Epochs a day, and an hour.
const DAY: usize = 144;
const HOUR: usize = DAY / 24;
/// Rounds of the dual at each look: twice as many cost twice as much and gain some thousandths.
const ROUNDS: usize = 30;
/// Sweeps of a clairvoyant plan: descent ends by itself long before.
const SWEEPS: usize = 50;
/// Money is counted so coarsely that the dearest request costs no more than this many units. What a request costs is
/// still told apart to a thousandth where it costs a thousandth of that, and 64 bits hold the sum of 2⁴¹ requests.
const UNITS_MAX: i64 = 1 << 20;
/// Most requests of a day that are believed, of all regions.
const REQUESTS_MAX: u64 = 1 << 41;
/// 10⁻¹² dollars in 10⁻⁶.
const PICO: i128 = 1_000_000;

/// What is remembered of one service for planning ahead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ahead {
    /// What the planner's numbers stand for.
    networks: Vec<NetworkId>,
    regions: Vec<RegionId>,
    planner: Planner,
    /// Requests of each region since the epoch began.
    asked: Vec<u64>,
    /// An epoch has closed and nothing was decided since.
    due: bool,
    /// Where it was last decided to be active.
    meant: BTreeSet<NetworkId>,
    /// Where it would be better since some epochs, and by how much.
    doubt: Doubt,
}

/// A move that was not made yet, for what it would have gained may be chance.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Doubt {
    /// Where the service would be active.
    towards: Vec<bool>,
    /// What was lost by staying, in units, and how far chance alone takes that, squared.
    lost: f64,
    chance: f64,
}

impl Ahead {
    /// Whether a day was heard, so that plans are made ahead.
    pub fn knows(&self) -> bool {
        self.planner.knows()
    }

    /// Whether a plan is to be made now.
    pub(crate) fn due(&self) -> bool {
        self.due && self.knows()
    }

    /// Whether a network is where the service was last meant to be.
    pub(crate) fn means(&self, network: &NetworkId) -> bool {
        self.meant.contains(network)
    }
}

impl Doubt {
    /// Whether the first step of a plan is worth doing now: staying as it is one epoch more, again and again, has lost
    /// more than the Poisson noise of the requests it is lost by.
    fn settled(&mut self, choice: &Choice, requests: &Requests) -> bool {
        let problem = choice.problem(requests);
        let first = choice.plan.states.iter().step_by(problem.steps.max(1));
        let active = |state: &State| *state == State::Active;
        let (towards, present): (Vec<bool>, Vec<bool>) =
            (first.map(active).collect(), problem.from.iter().map(active).collect());
        if towards == present {
            *self = Doubt::default();
            return true;
        }
        if self.towards != towards {
            *self = Doubt { towards, ..Doubt::default() };
        }
        let mut staying = choice.plan.states.clone();
        staying.iter_mut().step_by(problem.steps.max(1)).zip(problem.from).for_each(|(state, from)| *state = *from);
        self.lost += (problem.cost(&staying) - choice.plan.cost) as f64;
        for (cluster, asked) in problem.demand.iter().take(problem.clusters).enumerate() {
            let price = |among: &[bool]| {
                let prices = among.iter().enumerate().filter(|(_, a)| **a);
                let prices = prices.map(|(n, _)| problem.prices[n * problem.clusters + cluster]);
                f64::from(prices.min().unwrap_or(problem.unserved).min(problem.unserved))
            };
            let apart = price(&present) - price(&self.towards);
            self.chance += f64::from(*asked) * apart * apart;
        }
        let settled = self.lost > self.chance.sqrt();
        if settled {
            *self = Doubt::default();
        }
        settled
    }
}

/// Number of the epoch that a second lies in.
fn epoch_of(second: u64) -> usize {
    usize::try_from(second / (EPOCH.0 / 1_000_000)).unwrap_or(usize::MAX)
}

impl Cpa {
    /// Adds a slot's requests, and closes the epoch that ends with second `end`.
    pub(crate) fn hear_ahead(&mut self, now: Time, service: &Service, end: u64, length: u64) {
        if service.kind != Kind::Replica || self.fleet.group(service).next().is_some() {
            return;
        }
        let mut ahead = self.memory.ahead.remove(&service.name);
        let known = |a: &Ahead| {
            a.networks.iter().eq(self.fleet.networks.iter().map(|n| &n.name))
                && a.regions.iter().eq(self.fleet.regions.iter().map(|r| &r.name))
        };
        let closes = end.is_multiple_of(EPOCH.0 / 1_000_000);
        match ahead.as_mut().filter(|a| known(a)) {
            Some(ahead) => {
                let counts = self.memory.counts.get(&service.name);
                for (region, asked) in ahead.regions.iter().zip(&mut ahead.asked) {
                    let of_region = counts.and_then(|c| c.regions.get(region));
                    *asked += of_region.map_or(0, |a| a.all.sum(end, length));
                }
                if closes {
                    self.close_epoch(now, service, ahead, epoch_of(end));
                }
            }
            // It begins with a whole epoch, and anew where the fleet has other networks or regions than it knew.
            None if closes => ahead = Some(self.begin_ahead(service, epoch_of(end))),
            None => ahead = None,
        }
        self.memory.ahead.extend(ahead.map(|a| (service.name.clone(), a)));
    }

    fn begin_ahead(&self, service: &Service, epoch: usize) -> Ahead {
        let regions: Vec<RegionId> = self.fleet.regions.iter().map(|r| r.name.clone()).collect();
        Ahead {
            networks: self.fleet.networks.iter().map(|n| n.name.clone()).collect(),
            planner: Planner::new(regions.len(), DAY, epoch, self.states(service), ROUNDS),
            asked: vec![0; regions.len()],
            regions,
            due: false,
            meant: BTreeSet::new(),
            doubt: Doubt::default(),
        }
    }

    /// The epoch before `epoch` has ended.
    fn close_epoch(&self, now: Time, service: &Service, ahead: &mut Ahead, epoch: usize) {
        let missed = epoch.saturating_sub(ahead.planner.epoch() + 1);
        if ahead.planner.epoch() >= epoch || missed > 0 {
            // The CPA was away, or its clock was set: what was counted is a part of an epoch, or of several.
            let mut begun = self.begin_ahead(service, epoch);
            if missed > 0 {
                std::mem::swap(&mut begun.planner, &mut ahead.planner);
                begun.planner.skip(missed + 1);
            }
            *ahead = begun;
            return;
        }
        let most = REQUESTS_MAX / DAY as u64 / ahead.regions.len().max(1) as u64;
        let asked: Vec<u32> = ahead.asked.iter().map(|n| u32::try_from((*n).min(most)).unwrap_or(u32::MAX)).collect();
        ahead.planner.see(&self.states(service));
        ahead.planner.hear(&asked, &World::of(self, service, now, 0));
        ahead.asked.fill(0);
        ahead.due = true;
    }

    /// What each network has of a service, or is about to have.
    fn states(&self, service: &Service) -> Vec<State> {
        let aim = self.aim(&service.name);
        let of = |network: &NetworkId| match aim.get(network) {
            None => State::Absent,
            Some(Share::Dormant) => State::Dormant,
            Some(Share::Active(_)) => State::Active,
        };
        self.fleet.networks.iter().map(|n| of(&n.name)).collect()
    }

    /// Plans the day ahead; a plan to change something now, if that is the cheapest.
    pub(crate) fn look_ahead(&mut self, now: Time, service: &Service) -> Option<Plan> {
        let mut ahead = self.memory.ahead.remove(&service.name)?;
        ahead.due = false;
        ahead.planner.see(&self.states(service));
        let mut demand = vec![];
        ahead.planner.forecast(&mut demand);
        let most = u32::try_from(REQUESTS_MAX / demand.len().max(1) as u64).unwrap_or(u32::MAX);
        demand.iter_mut().for_each(|n| *n = (*n).min(most));
        let peak = peak(&demand, ahead.planner.lengths(), ahead.regions.len());
        let world = World::of(self, service, now, peak);
        let full = ahead.planner.epoch().is_multiple_of(HOUR);
        let choice = ahead.planner.choose(&demand, &world, full);
        let mut wanted = ahead.planner.wanted(&choice, &world);
        if !ahead.doubt.settled(&choice, &world.requests) {
            wanted.clone_from_slice(ahead.planner.states());
        }
        let target = self.possible(now, service, &wanted);
        ahead.meant = running(&target).into_keys().collect();
        let (plan, not) = self.explained(now, service, &world, &choice, &target, &ahead.planner.staying());
        self.memory.ahead.insert(service.name.clone(), ahead);
        self.memory.not.insert(service.name.clone(), not);
        plan.map(|plan| Plan { id: self.memory.next_plan(), ..plan })
    }

    /// The shares that come nearest to what is wanted: nothing leaves that has only just come, and somebody serves.
    fn possible(&self, now: Time, service: &Service, wanted: &[State]) -> Shares {
        let present = running(&self.aim(&service.name));
        let held = self.memory.holds.get(&service.name);
        let stays = |n: &NetworkId| present.contains_key(n) && held.is_some_and(|h| !h.may_leave(n, now));
        let each = self.fleet.networks.iter().map(|n| &n.name).zip(wanted);
        let mut active: BTreeSet<NetworkId> =
            each.filter(|(n, state)| **state == State::Active || stays(n)).map(|(n, _)| n.clone()).collect();
        if active.is_empty() {
            active.extend(present.into_keys());
        }
        self.sized(now, service, &active, wanted)
    }

    /// Shares of a service that is active in these networks; images lie where they are wanted. Where nothing but numbers
    /// of instances would change they stay, for the hour's prices decide them; else there are no fewer than were.
    fn sized(&self, now: Time, service: &Service, active: &BTreeSet<NetworkId>, wanted: &[State]) -> Shares {
        let present = running(&self.aim(&service.name));
        let size = if present.keys().eq(active) { Size::Given(&present) } else { Size::AtLeast(&present) };
        let rates = self.rates(&service.name);
        let case = self.case(service, Rule::Fastest, &rates, now);
        let mut shares = solve::shares(&self.fleet, &solve::price(case, active, size).shares);
        for (network, state) in self.fleet.networks.iter().zip(wanted) {
            if *state == State::Absent && shares.get(&network.name) == Some(&Share::Dormant) {
                shares.remove(&network.name);
            }
        }
        shares
    }

    /// The plan in words, none if nothing is to change, and why each other network is left as it is.
    fn explained(
        &self,
        now: Time,
        service: &Service,
        world: &World,
        choice: &Choice,
        target: &Shares,
        staying: &[State],
    ) -> (Option<Plan>, Vec<WhyNot>) {
        let rates = self.rates(&service.name);
        let case = self.case(service, Rule::Fastest, &rates, now);
        let aim = self.aim(&service.name);
        let sets: [BTreeSet<NetworkId>; 2] = [&aim, target].map(|s| running(s).into_keys().collect());
        let (before, after) = (world.split(choice, staying), world.split(choice, &choice.plan.states));
        let mut not = vec![];
        let mut words = vec![];
        for (n, network) in self.fleet.networks.iter().enumerate() {
            let (name, more) = (&network.name, world.without(choice, n));
            let (had, has) = (sets[0].contains(name), sets[1].contains(name));
            let said = match (had, has) {
                (false, true) => format!("without {name} the day would cost {more} more an hour"),
                (true, false) => format!("staying in {name} would cost {more} more an hour"),
                (true, true) => continue,
                (false, false) => {
                    let reason = world.why_not(choice, n, more);
                    not.push(WhyNot { service: service.name.clone(), network: name.clone(), reason });
                    continue;
                }
            };
            words.push((name.clone(), said));
        }
        if *target == aim {
            // No move is worth making: the usual answer.
            return (None, not);
        }
        let mut reason = "the day ahead: ".to_owned();
        if let Some(effect) = self.effect(case, &sets[0], &sets[1]) {
            reason += &format!("now {}; ", explain::effect(&effect));
        }
        reason += &explain::split(before, after);
        reason += &format!(", {} cheaper", before.total() - after.total());
        let mut moves = self.moves(service, target, before, after, &reason);
        for m in &mut moves {
            if let Some((_, said)) = words.iter().find(|(n, _)| *n == m.network) {
                m.reason += &format!("; {said}");
            }
        }
        let mut services: std::collections::BTreeMap<ServiceId, Shares> =
            self.memory.placement.services.keys().map(|s| (s.clone(), self.aim(s))).collect();
        services.insert(service.name.clone(), target.clone());
        let base = self.memory.placement.generation;
        let placed = vmatrix_model::placement::Placement { generation: base.next(), services };
        let plan = Plan { id: 0, at: now, cause: Cause::Epoch, base, moves, not: not.clone(), target: placed };
        (Some(plan), not)
    }
}

/// What a service costs, by numbers of networks and regions: see [`Requests`].
struct World<'a> {
    cpa: &'a Cpa,
    service: &'a Service,
    /// Length of an epoch.
    epoch: Span,
    /// 10⁻¹² dollars in a unit.
    unit: i128,
    requests: Requests,
    /// Parts of a request's price, in units: its latency is the rest.
    traffic: Vec<i64>,
    instances: Vec<i64>,
    /// Bringing what is missing of the image, in units.
    ship: Vec<i64>,
    /// A resume runs for so long before its clients have heard of it.
    ready: Vec<Span>,
    /// Why a network cannot be entered at any price.
    barred: Vec<Option<String>>,
}

impl<'a> World<'a> {
    /// Of a service that is asked `peak` requests in its busiest epoch, without the networks that cannot be entered.
    fn of(cpa: &'a Cpa, service: &'a Service, now: Time, peak: u64) -> World<'a> {
        let rates = cpa.rates(&service.name);
        let case = cpa.case(service, Rule::Fastest, &rates, now);
        let present: BTreeSet<NetworkId> = running(&cpa.aim(&service.name)).into_keys().collect();
        let barred = cpa.fleet.networks.iter().map(|n| cpa.barred(case, &n.name, &present)).collect();
        World::with(cpa, service, EPOCH, peak, barred)
    }

    fn with(cpa: &'a Cpa, service: &'a Service, epoch: Span, peak: u64, barred: Vec<Option<String>>) -> World<'a> {
        let networks = &cpa.fleet.networks;
        let pico = |price: MicroUsd| i128::from(price.0) * PICO;
        let of_latency = |response: Span| i128::from(service.latency_second_microusd.0) * i128::from(response.0);
        // Of so many instances as the busiest epoch would need in one network, the first is what being active costs; the
        // others come with the requests.
        let capacity = u128::from(service.instance_rps.max(1)) * u128::from(epoch.0) / 1_000_000;
        let further = |hour: MicroUsd| {
            let more = u128::from(peak).saturating_sub(capacity);
            per_epoch(pico(hour), epoch) / capacity.max(1) as i128 * more as i128 / u128::from(peak).max(1) as i128
        };
        let each = cost::bytes_served(service, 1000, Span::secs(1));
        let traffic: Vec<i128> = networks.iter().map(|n| pico_traffic(n.egress_gb_microusd, each.0)).collect();
        let instances: Vec<i128> = networks.iter().map(|n| further(n.instance_hour_microusd)).collect();
        let overloaded = of_latency(cost::OVERLOADED);
        let mut whole: Vec<Option<i128>> = vec![];
        for (n, network) in networks.iter().enumerate() {
            for region in &cpa.fleet.regions {
                let response = cpa.tables.response(&service.name, &region.name, &network.name);
                whole.push(response.map(|r| of_latency(r) + traffic[n] + instances[n]));
            }
        }
        let dearest = whole.iter().flatten().max().copied().unwrap_or(0).max(overloaded) + 1;
        let unit = (dearest / i128::from(UNITS_MAX)).max(1);
        let units = |pico: i128| i64::try_from(pico / unit).unwrap_or(i64::MAX / 4);
        let prices = whole.iter().enumerate().map(|(at, pico)| match (pico, &barred[at / cpa.fleet.regions.len()]) {
            (Some(pico), None) => u32::try_from(units(*pico)).unwrap_or(UNREACHED),
            _ => UNREACHED,
        });
        let requests = Requests {
            clusters: cpa.fleet.regions.len(),
            prices: prices.collect(),
            unserved: u32::try_from(units(dearest)).unwrap_or(UNREACHED - 1),
        };
        let home = cpa.fleet.network(&service.home);
        // Where the image is, all of it would be missing once it was dropped.
        let states = cpa.states(service);
        let lacking = |n: usize, name: &NetworkId| match states.get(n) {
            Some(State::Absent) | None => cpa.missing(service, name),
            Some(State::Dormant | State::Active) => cpa.image_bytes(service),
        };
        let ship = |n: usize, name: &NetworkId| home.map_or(MicroUsd(0), |h| cost::traffic_price(h, lacking(n, name)));
        World {
            cpa,
            service,
            epoch,
            unit,
            requests,
            traffic: traffic.into_iter().map(units).collect(),
            instances: instances.into_iter().map(units).collect(),
            ship: networks.iter().enumerate().map(|(n, network)| units(pico(ship(n, &network.name)))).collect(),
            ready: networks.iter().map(|n| cpa.ready_in(service, &n.name) + cpa.ttl()).collect(),
            barred,
        }
    }

    /// Units as a price an hour, where they are a day's.
    fn hourly(&self, units: i64) -> MicroUsd {
        let micro = i128::from(units) * self.unit / PICO / 24;
        MicroUsd(i64::try_from(micro).unwrap_or(i64::MAX))
    }

    /// How much more an hour of the day ahead would cost if a network were not as planned: active throughout where it is
    /// not to begin with, asleep throughout where it is.
    fn without(&self, choice: &Choice, network: usize) -> MicroUsd {
        let problem = choice.problem(&self.requests);
        let first = choice.plan.states.get(network * problem.steps).copied().unwrap_or_default();
        let other = if first == State::Active { State::Dormant } else { State::Active };
        let way = vec![(network, vec![other; problem.steps])];
        let cost = otherwise(&problem, &choice.plan, &way).first().copied().unwrap_or(choice.plan.cost);
        self.hourly(cost - choice.plan.cost)
    }

    /// Why a network that does not serve now does not.
    fn why_not(&self, choice: &Choice, network: usize, more: MicroUsd) -> String {
        if let Some(Some(words)) = self.barred.get(network) {
            return words.clone();
        }
        let steps = choice.problem(&self.requests).steps;
        let way = choice.plan.states.get(network * steps..(network + 1) * steps).unwrap_or_default();
        let later = way.iter().skip(1).any(|s| *s == State::Active);
        let words = format!("serving there too would cost {more} more an hour of the day ahead");
        if later { format!("{words}; it is to serve later in the day") } else { words }
    }

    /// What a plan costs, an hour of the day.
    fn split(&self, choice: &Choice, states: &[State]) -> Price {
        let problem = choice.problem(&self.requests);
        let (mut latency, mut traffic, mut instances) = (0_i64, 0_i64, 0_i64);
        for step in 0..problem.steps {
            let active: Vec<usize> = (0..problem.networks)
                .filter(|n| states.get(n * problem.steps + step) == Some(&State::Active))
                .collect();
            for (cluster, asked) in
                problem.demand[step * problem.clusters..(step + 1) * problem.clusters].iter().enumerate()
            {
                let asked = i64::from(*asked);
                let price = |n: usize| (problem.prices[n * problem.clusters + cluster], n);
                let best = active.iter().map(|n| price(*n)).min().filter(|(price, _)| *price < problem.unserved);
                match best {
                    Some((price, n)) => {
                        latency += asked * (i64::from(price) - self.traffic[n] - self.instances[n]);
                        traffic += asked * self.traffic[n];
                        instances += asked * self.instances[n];
                    }
                    None => latency += asked * i64::from(problem.unserved),
                }
            }
        }
        for network in 0..problem.networks {
            let mut before = problem.from[network];
            for step in 0..problem.steps {
                let at = network * problem.steps + step;
                let (stage, to) = (problem.stages[at], states.get(at).copied().unwrap_or_default());
                if before == State::Absent && to != State::Absent {
                    traffic += stage.ship;
                    instances -= stage.ship;
                }
                instances += stage.price(before, to);
                before = to;
            }
        }
        let [latency, traffic, instances] = [latency, traffic, instances].map(|units| self.hourly(units));
        Price { latency, instances, traffic }
    }
}

/// The part of an hour's price that is an epoch's.
fn per_epoch(hour: i128, epoch: Span) -> i128 {
    hour * i128::from(epoch.0) / 3_600_000_000
}

/// What sending so many bytes costs, in 10⁻¹² dollars.
fn pico_traffic(gb: MicroUsd, bytes: u64) -> i128 {
    i128::from(gb.0) * i128::from(bytes) / 1000
}

impl Prices for World<'_> {
    fn requests(&self) -> &Requests {
        &self.requests
    }

    fn stage(&self, network: usize, epoch: usize, epochs: usize) -> Stage {
        let Some(n) = self.cpa.fleet.networks.get(network) else { return Stage::default() };
        let begins = |epoch: usize| Time(self.epoch.0.saturating_mul(epoch as u64));
        let hour = |epoch: usize| i128::from(cost::instance_price(n, begins(epoch), 1).0) * PICO;
        let units = |pico: i128| i64::try_from(pico / self.unit).unwrap_or(i64::MAX / 4);
        let image = self.cpa.image_bytes(self.service);
        let stored = per_epoch(i128::from(cost::storage_price(n, image).0) * PICO * epochs as i128, self.epoch);
        let running = per_epoch((epoch..epoch + epochs).map(hour).sum(), self.epoch);
        let idle = self.ready.get(network).map_or(0, |ready| hour(epoch) * i128::from(ready.0) / 3_600_000_000);
        Stage {
            dormant: units(stored),
            active: units(running + stored),
            ship: self.ship.get(network).copied().unwrap_or(0),
            resume: units(idle),
        }
    }
}

/// Requests of the busiest epoch of a forecast.
fn peak(demand: &[u32], lengths: &[usize], clusters: usize) -> u64 {
    let rows = demand.chunks(clusters.max(1)).zip(lengths);
    rows.map(|(row, length)| row.iter().map(|n| u64::from(*n)).sum::<u64>() / *length as u64).max().unwrap_or(0)
}

/// Between what any placement must cost and what one costs that knows the future.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Certified: nothing costs less.
    pub lower: MicroUsd,
    pub upper: MicroUsd,
}

/// Bounds of what a service costs that is asked `demand[step * regions + region]` in steps of this length, beginning at
/// home with its image everywhere. Counted are latency, instances that serve and bytes by [`crate::cost`]: what a play is
/// charged for. Resumes under way, storage and instances beyond a network's first are left out, so that the lower bound
/// holds of any play.
pub fn bounds(fleet: &Fleet, service: &Service, step: Span, demand: &[u32], rounds: usize) -> Bounds {
    let cpa = Cpa::new(fleet.clone(), std::collections::BTreeMap::new());
    let world = World::with(&cpa, service, step, 0, vec![None; fleet.networks.len()]);
    let steps = demand.len() / fleet.regions.len().max(1);
    let has = |n: &Network| if n.name == service.home { State::Active } else { State::Dormant };
    let from: Vec<State> = fleet.networks.iter().map(has).collect();
    let charged = |(n, s)| {
        let stage = world.stage(n, s, 1);
        Stage { active: stage.active - stage.dormant, dormant: 0, resume: 0, ..stage }
    };
    let stages: Vec<Stage> = (0..from.len()).flat_map(|n| (0..steps).map(move |s| (n, s))).map(charged).collect();
    let problem = world.requests.problem(steps, demand, &stages, &from);
    let states: Vec<State> = from.iter().flat_map(|s| std::iter::repeat_n(*s, steps)).collect();
    let mut plan = crate::horizon::Plan { cost: problem.cost(&states), states };
    dual::upper(&problem, &mut plan, SWEEPS);
    let lower = dual::lower(&problem, plan.cost, dual::first_prices(&problem, &plan), rounds);
    let rounded = dual::rounded(&problem, &lower.active, SWEEPS);
    let whole = |units: i64| MicroUsd(i64::try_from(i128::from(units) * world.unit / PICO).unwrap_or(i64::MAX));
    Bounds { lower: whole(lower.value), upper: whole(plan.cost.min(rounded.cost)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> impl Strategy<Value = State> {
        (0..3usize).prop_map(|s| State::ALL[s])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn what_is_explained_is_what_is_charged(
            from in prop::collection::vec(state(), 3),
            demand in prop::collection::vec(0..100_000u32, 17 * 4),
            peak in 0..1_000_000u64,
            storage in 0..1_000_000i64,
        ) {
            let mut fleet = crate::cpa::testing::fleet();
            fleet.networks.iter_mut().for_each(|n| n.storage_gb_hour_microusd = MicroUsd(storage));
            let cpa = Cpa::new(fleet, std::collections::BTreeMap::new());
            let service = &cpa.fleet.services[0];
            let world = World::with(&cpa, service, EPOCH, peak, vec![None; 3]);
            let mut planner = Planner::new(4, DAY, 100, from, ROUNDS);
            prop_assert_eq!(planner.lengths().len(), 17);
            let choice = planner.choose(&demand, &world, true);
            let problem = choice.problem(&world.requests);
            for states in [&planner.staying(), &choice.plan.states] {
                // Each of the three parts is cut to a whole millionth.
                let (told, charged) = (world.split(&choice, states).total(), world.hourly(problem.cost(states)));
                prop_assert!(told.0.abs_diff(charged.0) <= 3, "{told} told, {charged} charged");
            }
            prop_assert_eq!(problem.cost(&choice.plan.states), choice.plan.cost);
            prop_assert!(choice.plan.cost <= problem.cost(&planner.staying()), "staying is a plan too");
            for network in 0..3 {
                // The alternative that is told of is really priced: another way of one network, all others as they are.
                let mut other = choice.plan.states.clone();
                let first = other[network * 17];
                other[network * 17..(network + 1) * 17]
                    .fill(if first == State::Active { State::Dormant } else { State::Active });
                let more = world.hourly(problem.cost(&other) - choice.plan.cost);
                prop_assert_eq!(world.without(&choice, network), more);
            }
        }
    }

    #[test]
    fn nothing_lies_below_the_bound_and_a_day_and_night_cost_less_for_who_knows_them() {
        let fleet = crate::cpa::testing::fleet();
        let service = &fleet.services[0];
        // Seoul, the third region, asks twelve hours of twenty-four.
        let demand: Vec<u32> = (0..DAY).flat_map(|e| [20, 10, if e < 72 { 2_000 } else { 0 }, 5]).collect();
        let bounds = super::bounds(&fleet, service, EPOCH, &demand, 100);
        // What no play is charged for is not in the bound either.
        let mut stored = fleet.clone();
        stored.networks.iter_mut().for_each(|n| n.storage_gb_hour_microusd = MicroUsd(1_000_000));
        assert_eq!(super::bounds(&stored, &stored.services[0], EPOCH, &demand, 100), bounds);
        assert!(bounds.lower <= bounds.upper, "{bounds:?}");
        assert!(bounds.upper.0 - bounds.lower.0 <= bounds.upper.0 / 100, "{bounds:?}");
        let cpa = Cpa::new(fleet.clone(), std::collections::BTreeMap::new());
        let world = World::with(&cpa, service, EPOCH, 0, vec![None; 3]);
        let from = [State::Active, State::Dormant, State::Dormant];
        let stages: Vec<Stage> =
            (0..3).flat_map(|n| (0..DAY).map(move |s| (n, s))).map(|(n, s)| world.stage(n, s, 1)).collect();
        let problem = world.requests.problem(DAY, &demand, &stages, &from);
        let at_home: Vec<State> = from.iter().flat_map(|s| std::iter::repeat_n(*s, DAY)).collect();
        let at_home = i128::from(problem.cost(&at_home)) * world.unit / PICO;
        assert!(i128::from(bounds.upper.0) < at_home * 3 / 4, "{bounds:?} {at_home}");
    }
}
