//! Prices every way to place one service that differs from the present one by a single add, drop or swap.
//!
//! ```text
//!  rates per region, set of networks ─▶ each region to its network ─▶ loads ─▶ instances ─▶ Price
//!  present set ─▶ all neighbours, priced, cheapest first (ties to the lower name)
//! ```
//!
//! One step at a time is enough for a fleet of a few networks, and each step can be explained in one
//! sentence. The price is of one hour at the forecast rates; there is no look-ahead, so what a
//! crowd's length will be is left to [`crate::hold`].

use crate::cost;
use crate::forecast::MilliRps;
use crate::memory::Shares;
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::fleet::{Fleet, Kind, Link, Service};
use vmatrix_model::placement::Share;
use vmatrix_model::plan::Price;
use vmatrix_model::{NetworkId, RegionId, ServiceId, SiteId, Span, Time};

/// What does not change while the fleet does not: links and response times, worked out once.
#[derive(Debug, Clone)]
pub struct Tables {
    /// Client links by region and network.
    client: BTreeMap<RegionId, BTreeMap<NetworkId, Link>>,
    /// Links to the origin.
    origin: BTreeMap<NetworkId, Link>,
    /// Response times by service, region and network.
    response: BTreeMap<ServiceId, BTreeMap<RegionId, BTreeMap<NetworkId, Span>>>,
}

impl Tables {
    pub fn new(fleet: &Fleet) -> Tables {
        let client: BTreeMap<RegionId, BTreeMap<NetworkId, Link>> = fleet
            .regions
            .iter()
            .map(|r| {
                (
                    r.name.clone(),
                    fleet
                        .networks
                        .iter()
                        .map(|n| (n.name.clone(), fleet.link(&SiteId::from(&r.name), &SiteId::from(&n.name))))
                        .collect(),
                )
            })
            .collect();
        let origin: BTreeMap<NetworkId, Link> = fleet
            .networks
            .iter()
            .map(|n| (n.name.clone(), fleet.link(&fleet.origin.name, &SiteId::from(&n.name))))
            .collect();
        let times = |s: &Service| {
            let of_region = |links: &BTreeMap<NetworkId, Link>| {
                links.iter().filter_map(|(n, l)| Some((n.clone(), cost::response_time(s, l, origin.get(n)?)))).collect()
            };
            client.iter().map(|(r, links)| (r.clone(), of_region(links))).collect()
        };
        let response = fleet.services.iter().map(|s| (s.name.clone(), times(s))).collect();
        Tables { client, origin, response }
    }

    /// The link from a region to a network.
    pub fn client(&self, region: &RegionId, network: &NetworkId) -> Option<&Link> {
        self.client.get(region)?.get(network)
    }

    /// The link from a network to the origin.
    pub fn origin(&self, network: &NetworkId) -> Option<&Link> {
        self.origin.get(network)
    }

    /// The response time clients of `region` get from `network`.
    pub fn response(&self, service: &ServiceId, region: &RegionId, network: &NetworkId) -> Option<Span> {
        self.response.get(service)?.get(region)?.get(network).copied()
    }

    /// Of `networks`, the one that clients of `region` are best served by; ties go to the lower name.
    pub fn best<'a>(
        &self,
        rule: Rule,
        service: &ServiceId,
        region: &RegionId,
        networks: impl IntoIterator<Item = &'a NetworkId>,
    ) -> Option<&'a NetworkId> {
        let worth = |n: &NetworkId| match rule {
            Rule::Fastest => self.response(service, region, n),
            Rule::Nearest => self.client(region, n).map(|l| Span::ms(u64::from(l.rtt_ms))),
        };
        networks.into_iter().filter_map(|n| Some((worth(n)?, n))).min().map(|(_, n)| n)
    }
}

/// By what clients are sent to one network rather than another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The least response time, back end included: what the prices count on.
    Fastest,
    /// The least round trip (paper §4.1, "closest to the user"): for a service an operator placed, who
    /// wants the place used, whatever the back end costs.
    Nearest,
}

/// What is asked of one service.
#[derive(Debug, Clone, Default)]
pub struct Rates {
    pub regions: BTreeMap<RegionId, MilliRps>,
    /// From clients of no known region; they go to the service's first network.
    pub elsewhere: MilliRps,
}

/// A set of networks with its price.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Priced {
    /// Instances per network.
    pub shares: BTreeMap<NetworkId, u32>,
    pub price: Price,
    /// Requests each network would answer.
    pub loads: BTreeMap<NetworkId, MilliRps>,
}

/// Everything a price depends on but the networks.
#[derive(Debug, Clone, Copy)]
pub struct Case<'a> {
    pub fleet: &'a Fleet,
    pub tables: &'a Tables,
    pub service: &'a Service,
    pub rule: Rule,
    pub rates: &'a Rates,
    pub now: Time,
}

/// How many instances a network is to have.
#[derive(Debug, Clone, Copy)]
pub enum Size<'a> {
    /// So many, as they are.
    Given(&'a BTreeMap<NetworkId, u32>),
    /// As many as its load needs, and no fewer than here.
    AtLeast(&'a BTreeMap<NetworkId, u32>),
    /// As many as its load needs.
    ByLoad,
}

/// Prices a service running in `networks` for an hour from now (paper §5, §6.1.3).
pub fn price(case: Case, networks: &BTreeSet<NetworkId>, size: Size) -> Priced {
    let Case { fleet, tables, service, rule, rates, now } = case;
    let mut loads: BTreeMap<NetworkId, MilliRps> = networks.iter().map(|n| (n.clone(), 0)).collect();
    let mut total = Price::default();
    for (region, rate) in &rates.regions {
        let Some(network) = tables.best(rule, &service.name, region, networks) else { continue };
        if let Some(load) = loads.get_mut(network) {
            *load += rate;
        }
        let response = tables.response(&service.name, region, network).unwrap_or_default();
        total.latency += cost::latency_price(service, *rate, response);
    }
    let first = if networks.contains(&service.home) { Some(&service.home) } else { networks.first() };
    if let Some(load) = first.and_then(|n| loads.get_mut(n)) {
        *load += rates.elsewhere;
    }
    let mut shares = BTreeMap::new();
    for (name, load) in &loads {
        let Some(network) = fleet.network(name) else { continue };
        let by_load = cost::instances_for(service, *load);
        let instances = match size {
            Size::Given(present) => present.get(name).copied().unwrap_or(by_load),
            Size::AtLeast(present) => present.get(name).copied().unwrap_or(0).max(by_load),
            Size::ByLoad => by_load,
        };
        total.instances += cost::instance_price(network, now, instances);
        total.traffic += cost::traffic_price(network, cost::bytes_served(service, *load, Span::secs(3600)));
        total.latency += cost::overload_price(service, cost::beyond(service, *load, instances));
        shares.insert(name.clone(), instances);
    }
    Priced { shares, price: total, loads }
}

/// One step from the present set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Add(NetworkId),
    Drop(NetworkId),
    Swap {
        from: NetworkId,
        to: NetworkId,
    },
    /// The same networks with other numbers of instances.
    Resize,
}

impl Step {
    /// The network that is to begin serving.
    pub fn newcomer(&self) -> Option<&NetworkId> {
        match self {
            Step::Add(n) | Step::Swap { to: n, .. } => Some(n),
            Step::Drop(_) | Step::Resize => None,
        }
    }

    /// The network that is to stop.
    pub fn leaver(&self) -> Option<&NetworkId> {
        match self {
            Step::Drop(n) | Step::Swap { from: n, .. } => Some(n),
            Step::Add(_) | Step::Resize => None,
        }
    }

    /// The set after the step.
    pub fn apply(&self, networks: &BTreeSet<NetworkId>) -> BTreeSet<NetworkId> {
        let mut after = networks.clone();
        after.extend(self.newcomer().cloned());
        if let Some(n) = self.leaver() {
            after.remove(n);
        }
        after
    }
}

/// Every step from `active` that leaves something running, in order of name. A singleton is swapped, for it can be
/// in one network only.
pub fn steps(fleet: &Fleet, service: &Service, active: &BTreeSet<NetworkId>) -> Vec<Step> {
    let names: BTreeSet<&NetworkId> = fleet.networks.iter().map(|n| &n.name).collect();
    let outside = || names.iter().filter(|n| !active.contains(**n));
    let adds = outside().map(|n| Step::Add((*n).clone()));
    let drops = active.iter().filter(|_| active.len() > 1).map(|n| Step::Drop(n.clone()));
    let swaps =
        active.iter().flat_map(|from| outside().map(move |to| Step::Swap { from: from.clone(), to: (*to).clone() }));
    match service.kind {
        Kind::Replica => adds.chain(drops).chain(swaps).chain([Step::Resize]).collect(),
        Kind::Singleton => swaps.collect(),
    }
}

/// Shares of a service that runs as `instances` says and sleeps everywhere else.
pub fn shares(fleet: &Fleet, instances: &BTreeMap<NetworkId, u32>) -> Shares {
    let share = |n: &NetworkId| instances.get(n).filter(|i| **i > 0).map_or(Share::Dormant, |i| Share::Active(*i));
    fleet.networks.iter().map(|n| (n.name.clone(), share(&n.name))).collect()
}
