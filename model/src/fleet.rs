//! What exists: the origin, the hosting networks, the client regions, the links between them, the services.
//!
//! The same file section serves the CPA, the lab and the replay.

use crate::{Mbit, MicroUsd, NetworkId, RegionId, ServiceId, SiteId, Span};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Everything the CPA places services over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// The zone the services live in: `maps` is reached as `maps.<zone>`.
    pub zone: String,
    /// Time to live of every answer, seconds. Short, for a move is visible only after it (paper §4.1).
    pub ttl_s: u32,
    pub origin: Origin,
    #[serde(rename = "network")]
    pub networks: Vec<Network>,
    #[serde(rename = "region")]
    pub regions: Vec<Region>,
    /// Links that differ from what distance says; see [`Fleet::link`].
    #[serde(rename = "link", default)]
    pub links: Vec<Link>,
    #[serde(rename = "service")]
    pub services: Vec<Service>,
}

/// The service owner's own network, where back-end databases and the image store stay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    pub name: SiteId,
    /// Degrees north, -90 to 90.
    pub lat: f64,
    /// Degrees east, -180 to 180.
    pub lon: f64,
    /// Public addresses of the site; the gateway is the first.
    pub prefix: Ipv4Net,
    /// The owner's private network, in which the databases and every tunnelled cell have addresses.
    pub intranet: Ipv4Net,
}

/// A hosting network: a site with machines, public addresses and prices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    pub name: NetworkId,
    pub lat: f64,
    pub lon: f64,
    /// Public addresses: the gateway is the first, service VIPs begin at the hundredth.
    pub prefix: Ipv4Net,
    /// Machines the network is expected to have.
    pub machines: u32,
    /// Memory each machine lends, MiB.
    pub machine_memory_mib: u64,
    /// What one running instance costs an hour.
    pub instance_hour_microusd: MicroUsd,
    /// What a gigabyte (10^9 bytes) sent out costs.
    pub egress_gb_microusd: MicroUsd,
    /// What keeping a gigabyte (10^9 bytes) of a dormant image costs an hour.
    #[serde(default)]
    pub storage_gb_hour_microusd: MicroUsd,
    /// Price of an instance-hour in per cent of `instance_hour_microusd`, by hour of the day (UTC); empty means 100 always.
    #[serde(default)]
    pub tariff_percent: Vec<u32>,
}

/// Clients that are near one another: a client cluster with a place on the map.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    pub name: RegionId,
    pub lat: f64,
    pub lon: f64,
    /// The prefix its clients have; demand is counted by it.
    pub prefix: Ipv4Net,
}

/// A link between two sites, the same in both directions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    pub between: [SiteId; 2],
    /// Round-trip time, milliseconds.
    pub rtt_ms: u32,
    /// Rate in each direction, Mbit/s.
    pub mbit: u32,
    /// Packets lost in each direction, millionths.
    #[serde(default)]
    pub loss_ppm: u32,
    /// Longest queue in each direction, milliseconds.
    #[serde(default = "default_queue_ms")]
    pub queue_ms: u32,
}

/// 200 ms: a bandwidth-delay product of the longest links here, what an ordinary router would have.
fn default_queue_ms() -> u32 {
    200
}

/// What an owner offers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    pub name: ServiceId,
    /// Name of the image (of its recipe) that every instance is resumed from.
    pub image: String,
    /// Whether it runs as many copies whose writes are thrown away, or as one whose state moves with it.
    #[serde(default)]
    pub kind: Kind,
    /// Services of one group are always in the same networks: they talk to each other, and move as one. The first of
    /// them in the file decides for all, by what all of them cost.
    #[serde(default)]
    pub group: Option<String>,
    /// Where the first instance runs, and where it returns to when demand says nothing else.
    pub home: NetworkId,
    /// Whether the CPA moves it by itself; if not, only an operator does.
    pub automatic: bool,
    /// 95th percentile of the response time that its users are promised, milliseconds.
    pub objective_ms: u32,
    /// What one second less of response time is worth, per request.
    pub latency_second_microusd: MicroUsd,
    /// Host number of its public address in every network's prefix, 2 to 254. Stated, so that a service that
    /// comes or goes does not renumber the others.
    pub vip_host: u32,
    /// Public TCP ports; nothing else answers.
    pub ports: Vec<u16>,
    /// Memory of one instance, MiB (SODA's resource unit).
    pub memory_mib: u64,
    /// Requests a second that one instance answers within its objective.
    pub instance_rps: u32,
    /// Most instances in one network.
    pub instances_max: u32,
    /// Packets of an answer (paper §5.1: N_B).
    pub response_packets: u32,
    /// The back end it needs, if any.
    #[serde(default)]
    pub backend: Option<Backend>,
    /// What was measured of its image.
    pub profile: Profile,
}

/// How a service runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// As copies of its image, as many as its users need; what a copy writes is thrown away.
    #[default]
    Replica,
    /// As one VM: where it moves, its memory, its data disk and its open connections move with it.
    Singleton,
}

/// A database that stays at the origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backend {
    pub name: String,
    /// Its address in the origin's intranet.
    pub address: Ipv4Addr,
    pub port: u16,
    /// Packets exchanged with it for one request (paper §5.1: N_C); an application may send 37 statements a page.
    pub packets: u32,
    /// Round trips to it for one request, one after the other.
    pub round_trips: u32,
}

/// Measured figures of an image that prices and the replay use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Median time an idle instance takes to answer, without the network, milliseconds.
    pub answer_ms: u32,
    /// From the order to resume at a network that holds the image, to healthy, milliseconds.
    pub resume_ms: u32,
    /// Bytes of the image as stored (compressed, deduplicated).
    pub image_mib: u64,
}

/// What is wrong with a fleet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadFleet {
    #[error("{what} {name:?} is there twice; names of networks, regions and the origin must differ")]
    Twice { what: &'static str, name: String },
    #[error("{whose} names {what} {name:?}, which does not exist{hint}")]
    Unknown { whose: String, what: &'static str, name: String, hint: String },
    #[error("prefixes {0} and {1} overlap; every site needs its own addresses")]
    Overlap(Ipv4Net, Ipv4Net),
    #[error("prefix {0} is too small: a site needs a /24 or larger")]
    Small(Ipv4Net),
    #[error("{whose}: {problem}")]
    Range { whose: String, problem: String },
    #[error("there is no {0}: at least one is needed")]
    None(&'static str),
}

/// Host numbers a service's public address may have: after the gateway, before the broadcast address of a /24.
const VIP_HOSTS: std::ops::RangeInclusive<u32> = 2..=254;
/// Longest time to live of an answer: a day. Above it no move would ever be seen.
const TTL_MAX_S: u32 = 86_400;
/// Highest price of anything of a network, millionths of a dollar: a thousand dollars.
const PRICE_MAX: i64 = 1_000_000_000;
/// Longest round trip and queue, milliseconds: to the moon and back is 2,600.
const DELAY_MAX_MS: u32 = 10_000;

impl Fleet {
    /// Checks what types cannot say: that names exist once, prefixes do not overlap, numbers are possible.
    ///
    /// # Errors
    /// The first thing wrong, with the nearest right name where there is one.
    pub fn check(&self) -> Result<(), BadFleet> {
        if self.networks.is_empty() {
            return Err(BadFleet::None("network"));
        }
        if self.regions.is_empty() {
            return Err(BadFleet::None("region"));
        }
        let name = |label: &str| label.parse::<SiteId>().is_ok();
        if self.zone.len() > 200 || !self.zone.split('.').all(name) {
            return Err(BadFleet::Range {
                whose: "zone".into(),
                problem: format!("{:?} is not a domain name such as \"vmatrix.test\"", self.zone),
            });
        }
        if self.ttl_s == 0 || self.ttl_s > TTL_MAX_S {
            return Err(BadFleet::Range {
                whose: "ttl_s".into(),
                problem: format!("{} must be 1 to {TTL_MAX_S} seconds", self.ttl_s),
            });
        }
        let mut seen = BTreeSet::new();
        for site in self.sites() {
            if !seen.insert(site.clone()) {
                return Err(BadFleet::Twice { what: "site", name: site.to_string() });
            }
        }
        let (mut services, mut vip_hosts) = (BTreeSet::new(), BTreeMap::new());
        for s in &self.services {
            if !services.insert(&s.name) {
                return Err(BadFleet::Twice { what: "service", name: s.name.to_string() });
            }
            let whose = format!("service {}", s.name);
            if self.network(&s.home).is_none() {
                return Err(self.unknown(whose, "network", s.home.as_str()));
            }
            let range = |problem: &str| Err(BadFleet::Range { whose: whose.clone(), problem: problem.into() });
            if !name(&s.image) {
                return range(&format!("image {:?} is not the name of a recipe", s.image));
            }
            if !VIP_HOSTS.contains(&s.vip_host) {
                return range(&format!("vip_host = {} must be 2 to 254", s.vip_host));
            }
            if let Some(other) = vip_hosts.insert(s.vip_host, &s.name) {
                return range(&format!("vip_host = {} is that of service {other} already", s.vip_host));
            }
            if s.ports.is_empty() || s.ports.contains(&0) {
                return range("ports must hold at least one port, and none may be 0");
            }
            if s.instance_rps == 0 || s.instances_max == 0 || s.objective_ms == 0 || s.memory_mib == 0 {
                return range("instance_rps, instances_max, objective_ms and memory_mib must be above 0");
            }
            if s.kind == Kind::Singleton && s.instances_max != 1 {
                return range(&format!("instances_max = {} of a singleton must be 1", s.instances_max));
            }
            if let Some(group) = &s.group {
                if !name(group) {
                    return range(&format!("group {group:?} is not a name"));
                }
                let alike = |o: &Service| o.home == s.home && o.automatic == s.automatic && o.kind == s.kind;
                if let Some(other) = self.group(s).find(|o| !alike(o)) {
                    return range(&format!("home, automatic and kind must be those of {}, of its group", other.name));
                }
            }
            if let Some(b) = &s.backend
                && !self.origin.intranet.contains(&b.address)
            {
                return range(&format!(
                    "back end {} at {} is outside the origin's intranet {}",
                    b.name, b.address, self.origin.intranet
                ));
            }
        }
        let places = std::iter::once((self.origin.name.to_string(), self.origin.lat, self.origin.lon))
            .chain(self.networks.iter().map(|n| (n.name.to_string(), n.lat, n.lon)))
            .chain(self.regions.iter().map(|r| (r.name.to_string(), r.lat, r.lon)));
        for (whose, lat, lon) in places {
            if !(-90.0..=90.0).contains(&lat) || !(-180.0..=180.0).contains(&lon) {
                return Err(BadFleet::Range { whose, problem: format!("lat {lat}, lon {lon} is not on the earth") });
            }
        }
        for n in &self.networks {
            if n.machines == 0 {
                return Err(BadFleet::Range {
                    whose: format!("network {}", n.name),
                    problem: "machines must be above 0".into(),
                });
            }
            let prices = [
                ("instance_hour_microusd", n.instance_hour_microusd),
                ("egress_gb_microusd", n.egress_gb_microusd),
                ("storage_gb_hour_microusd", n.storage_gb_hour_microusd),
            ];
            if let Some((key, price)) = prices.into_iter().find(|(_, p)| !(0..=PRICE_MAX).contains(&p.0)) {
                return Err(BadFleet::Range {
                    whose: format!("network {}", n.name),
                    problem: format!("{key} = {} must be 0 to {PRICE_MAX}", price.0),
                });
            }
            if !n.tariff_percent.is_empty() && n.tariff_percent.len() != 24 {
                return Err(BadFleet::Range {
                    whose: format!("network {}", n.name),
                    problem: format!("tariff_percent has {} hours, a day has 24", n.tariff_percent.len()),
                });
            }
        }
        let prefixes: Vec<Ipv4Net> = std::iter::once(self.origin.prefix)
            .chain(std::iter::once(self.origin.intranet))
            .chain(self.networks.iter().map(|n| n.prefix))
            .chain(self.regions.iter().map(|r| r.prefix))
            .collect();
        for (i, a) in prefixes.iter().enumerate() {
            if a.prefix_len() > 24 {
                return Err(BadFleet::Small(*a));
            }
            if let Some(b) = prefixes.iter().skip(i + 1).find(|b| a.contains(*b) || b.contains(a)) {
                return Err(BadFleet::Overlap(*a, *b));
            }
        }
        for link in &self.links {
            for end in &link.between {
                if !seen.contains(end) {
                    return Err(self.unknown("link".into(), "site", end.as_str()));
                }
            }
            let whose = format!("link {} - {}", link.between[0], link.between[1]);
            if link.between[0] == link.between[1] {
                return Err(BadFleet::Range { whose, problem: "both ends are the same site".into() });
            }
            if link.rtt_ms > DELAY_MAX_MS || link.queue_ms > DELAY_MAX_MS {
                return Err(BadFleet::Range {
                    whose,
                    problem: format!("rtt_ms and queue_ms must be at most {DELAY_MAX_MS}"),
                });
            }
            if link.mbit == 0 || link.loss_ppm >= 1_000_000 {
                return Err(BadFleet::Range {
                    whose,
                    problem: "mbit must be above 0 and loss_ppm below 1000000, else nothing arrives".into(),
                });
            }
        }
        Ok(())
    }

    fn unknown(&self, whose: String, what: &'static str, name: &str) -> BadFleet {
        let sites: Vec<SiteId> = self.sites().collect();
        let hint = crate::config::nearest(name, sites.iter().map(SiteId::as_str))
            .map_or(String::new(), |n| format!("\n\nhint: did you mean {n:?}?"));
        BadFleet::Unknown { whose, what, name: name.into(), hint }
    }

    /// The other services of the group of `service`, in the order of the file.
    pub fn group<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Service> + 'a {
        let same = move |o: &&Service| o.group.is_some() && o.group == service.group && o.name != service.name;
        self.services.iter().filter(same)
    }

    /// Who decides where `service` is: the first of its group, itself if it is in none.
    pub fn leader<'a>(&'a self, service: &'a Service) -> &'a Service {
        let leads = |o: &&Service| o.group.is_some() && o.group == service.group;
        self.services.iter().find(leads).unwrap_or(service)
    }

    /// Every site: the origin, then networks, then regions, in the file's order.
    pub fn sites(&self) -> impl Iterator<Item = SiteId> + '_ {
        std::iter::once(self.origin.name.clone())
            .chain(self.networks.iter().map(|n| SiteId::from(&n.name)))
            .chain(self.regions.iter().map(|r| SiteId::from(&r.name)))
    }

    pub fn network(&self, name: &NetworkId) -> Option<&Network> {
        self.networks.iter().find(|n| n.name == *name)
    }

    pub fn region(&self, name: &RegionId) -> Option<&Region> {
        self.regions.iter().find(|r| r.name == *name)
    }

    pub fn service(&self, name: &ServiceId) -> Option<&Service> {
        self.services.iter().find(|s| s.name == *name)
    }

    /// The region whose prefix holds `address`.
    pub fn region_of(&self, address: Ipv4Addr) -> Option<&Region> {
        self.regions.iter().find(|r| r.prefix.contains(&address))
    }

    /// The public address of `service` in `network`.
    pub fn vip(&self, service: &ServiceId, network: &NetworkId) -> Option<Ipv4Addr> {
        Some(host(self.network(network)?.prefix, self.service(service)?.vip_host))
    }

    /// The gateway address of a site: the first host of its prefix.
    pub fn gateway(&self, site: &SiteId) -> Option<Ipv4Addr> {
        let prefix = if *site == self.origin.name {
            self.origin.prefix
        } else {
            self.networks
                .iter()
                .find(|n| n.name.as_str() == site.as_str())
                .map(|n| n.prefix)
                .or_else(|| self.regions.iter().find(|r| r.name.as_str() == site.as_str()).map(|r| r.prefix))?
        };
        Some(host(prefix, 1))
    }

    /// The link between two sites: the one stated, else one that great-circle distance suggests.
    ///
    /// Without a stated link: 1 ms + 1.5 ms a 100 km of round trip (light in fibre needs 1.0; paths
    /// are about half again as long), 1000 Mbit/s, no loss.
    pub fn link(&self, a: &SiteId, b: &SiteId) -> Link {
        if let Some(l) =
            self.links.iter().find(|l| l.between == [a.clone(), b.clone()] || l.between == [b.clone(), a.clone()])
        {
            return l.clone();
        }
        let place = |s: &SiteId| self.places().get(s).copied().unwrap_or((0.0, 0.0));
        let km = great_circle_km(place(a), place(b));
        Link {
            between: [a.clone(), b.clone()],
            rtt_ms: 1 + (km * 0.015) as u32,
            mbit: 1000,
            loss_ppm: 0,
            queue_ms: default_queue_ms(),
        }
    }

    fn places(&self) -> BTreeMap<SiteId, (f64, f64)> {
        std::iter::once((self.origin.name.clone(), (self.origin.lat, self.origin.lon)))
            .chain(self.networks.iter().map(|n| (SiteId::from(&n.name), (n.lat, n.lon))))
            .chain(self.regions.iter().map(|r| (SiteId::from(&r.name), (r.lat, r.lon))))
            .collect()
    }

    /// Round-trip time between two sites.
    pub fn rtt(&self, a: &SiteId, b: &SiteId) -> Span {
        if a == b { Span::ZERO } else { Span::ms(u64::from(self.link(a, b).rtt_ms)) }
    }
}

impl Link {
    pub fn rate(&self) -> Mbit {
        Mbit(self.mbit)
    }
}

/// The `number`th address of a prefix.
pub fn host(prefix: Ipv4Net, number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(prefix.network().to_bits().saturating_add(number))
}

fn great_circle_km((lat1, lon1): (f64, f64), (lat2, lon2): (f64, f64)) -> f64 {
    let (a, b) = (lat1.to_radians(), lat2.to_radians());
    let half = |d: f64| (d / 2.0).sin().powi(2);
    let h = half(b - a) + a.cos() * b.cos() * half((lon2 - lon1).to_radians());
    6371.0 * 2.0 * h.sqrt().min(1.0).asin()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn london_to_tokyo_is_about_9600_km() {
        let km = great_circle_km((51.5, -0.1), (35.7, 139.7));
        assert!((9500.0..9700.0).contains(&km), "{km}");
    }
}
