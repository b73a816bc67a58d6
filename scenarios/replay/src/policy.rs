//! Other ways to place services, to compare with ours over the same requests.
//!
//! | policy | what it does |
//! |---|---|
//! | `mpc` | ours: a crowd within seconds, else the day ahead once a day was heard |
//! | `myopic` | ours without looking ahead: the hour's prices, round by round |
//! | `static` | where the mean of the whole scenario's demand is served cheapest, from the start, and never elsewhere |
//! | `best-single` | the same with one network |
//! | `none` | at home, and never elsewhere |
//!
//! `static` and `best-single` know the whole scenario beforehand, which nobody who runs a service does.

use crate::scenario::{OrderLine, Scenario};
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_cpa_core::ahead::{self, Bounds};
use vmatrix_cpa_core::solve::{self, Case, Rates, Rule, Size, Step, Tables};
use vmatrix_model::fleet::{Kind, Service};
use vmatrix_model::{MicroUsd, NetworkId, ServiceId, Span, Time};

/// Most steps of a bound, and rounds spent on it.
const STEPS_MAX: u32 = 2_000;
const ROUNDS: usize = 200;

/// A way to place services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    #[default]
    Mpc,
    Myopic,
    Static,
    BestSingle,
    None,
}

/// There is no such policy.
#[derive(Debug, thiserror::Error)]
#[error("there is no policy {0:?}\n\nhint: mpc, myopic, static, best-single or none")]
pub struct NoPolicy(String);

impl std::str::FromStr for Policy {
    type Err = NoPolicy;

    fn from_str(name: &str) -> Result<Policy, NoPolicy> {
        Policy::ALL.into_iter().find(|p| p.name() == name).ok_or_else(|| NoPolicy(name.to_owned()))
    }
}

impl Policy {
    pub const ALL: [Policy; 5] = [Policy::Mpc, Policy::Myopic, Policy::Static, Policy::BestSingle, Policy::None];

    pub fn name(self) -> &'static str {
        match self {
            Policy::Mpc => "mpc",
            Policy::Myopic => "myopic",
            Policy::Static => "static",
            Policy::BestSingle => "best-single",
            Policy::None => "none",
        }
    }

    /// What the CPA does under it.
    pub(crate) fn of_the_cpa(self) -> vmatrix_cpa_core::Policy {
        match self {
            Policy::Myopic => vmatrix_cpa_core::Policy::Hourly,
            Policy::Mpc | Policy::Static | Policy::BestSingle | Policy::None => vmatrix_cpa_core::Policy::Ahead,
        }
    }

    /// The scenario as it is played under it: one that never moves takes the services from the CPA.
    pub(crate) fn applied(self, mut scenario: Scenario) -> Scenario {
        let sizes = match self {
            Policy::Mpc | Policy::Myopic => return scenario,
            Policy::Static => usize::MAX,
            Policy::BestSingle => 1,
            Policy::None => 0,
        };
        scenario.orders.clear();
        for service in scenario.fleet.services.clone() {
            if service.kind == Kind::Replica && sizes > 0 {
                let mut at: BTreeMap<NetworkId, u32> = cheapest(&scenario, &service, sizes);
                at.entry(service.home.clone()).or_insert(0);
                scenario.orders.push(OrderLine { at_s: 0, service: service.name.clone(), at, fair: None });
            }
        }
        scenario.fleet.services.iter_mut().for_each(|s| s.automatic = false);
        scenario
    }
}

/// The networks, no more than so many, in which the mean of the scenario's demand is served cheapest: the best that
/// single adds, drops and swaps lead to from the best single one.
fn cheapest(scenario: &Scenario, service: &Service, most: usize) -> BTreeMap<NetworkId, u32> {
    let fleet = &scenario.fleet;
    let tables = Tables::new(fleet);
    let mean = |region| {
        let seconds = 0..scenario.length_s;
        let step = (scenario.length_s / 1000).max(1) as usize;
        let (sum, n) = seconds
            .step_by(step)
            .fold((0.0, 0), |(sum, n), s| (sum + scenario.rate(&service.name, region, f64::from(s)), n + 1));
        (sum * 1000.0 / f64::from(n)) as u64
    };
    let regions = fleet.regions.iter().map(|r| (r.name.clone(), mean(&r.name))).collect();
    let rates = Rates { regions, elsewhere: 0 };
    let case = Case { fleet, tables: &tables, service, rule: Rule::Fastest, rates: &rates, now: Time(0) };
    let price = |set: &BTreeSet<NetworkId>| -> MicroUsd { solve::price(case, set, Size::ByLoad).price.total() };
    let singles = fleet.networks.iter().map(|n| BTreeSet::from([n.name.clone()]));
    let Some(mut best) = singles.min_by_key(|set| price(set)) else { return BTreeMap::new() };
    // Each round is cheaper than the one before, of which there are finitely many.
    loop {
        let steps = solve::steps(fleet, service, &best).into_iter().filter(|s| *s != Step::Resize);
        let sets = steps.map(|s| s.apply(&best)).filter(|set| set.len() <= most);
        match sets.min_by_key(|set| price(set)).filter(|set| price(set) < price(&best)) {
            Some(set) => best = set,
            None => return solve::price(case, &best, Size::ByLoad).shares,
        }
    }
}

/// The services that the CPA may place in any number of networks.
pub fn placed(scenario: &Scenario) -> impl Iterator<Item = &Service> {
    scenario.fleet.services.iter().filter(|s| s.automatic && s.kind == Kind::Replica)
}

/// Bounds of what the automatic services of a scenario cost, each over the requests that it makes: see
/// [`vmatrix_cpa_core::ahead::bounds`].
pub fn bounds(scenario: &Scenario) -> BTreeMap<ServiceId, Bounds> {
    let fleet = &scenario.fleet;
    let arrivals = crate::arrivals::arrivals(scenario);
    // A step in which nothing is worth moving twice, and no more of them than a bound is found for in seconds.
    let step = Span::secs(u64::from(scenario.length_s.div_ceil(STEPS_MAX)).max(10));
    let steps = (u64::from(scenario.length_s) * 1_000_000).div_ceil(step.0) as usize;
    let of = |service: &Service| {
        let mut demand = vec![0_u32; steps * fleet.regions.len()];
        for arrival in arrivals.iter().filter(|a| a.service == service.name) {
            let region = fleet.regions.iter().position(|r| r.name == arrival.region);
            let at = region.map(|r| (arrival.at.0 / step.0) as usize * fleet.regions.len() + r);
            if let Some(asked) = at.and_then(|at| demand.get_mut(at)) {
                *asked += 1;
            }
        }
        (service.name.clone(), ahead::bounds(fleet, service, step, &demand, ROUNDS))
    };
    placed(scenario).map(of).collect()
}
