//! A scenario: a fleet and what happens to it. The lab plays it for real, the replay in virtual time.

mod demand;
mod orders;

pub use demand::Demand;
pub use orders::OrderLine;

use crate::expect::Expect;
use serde::{Deserialize, Serialize};
use vmatrix_model::config::{BadFile, parse_toml};
use vmatrix_model::fleet::{BadFleet, Fleet};
use vmatrix_model::{NetworkId, RegionId, ServiceId};

/// Times are seconds from the start; rates are requests a second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub name: String,
    /// One sentence for people.
    pub about: String,
    /// The only source of chance.
    pub seed: u64,
    /// How long it plays once every service serves at home.
    pub length_s: u32,
    /// Another scenario file in the same folder whose fleet and traffic are this one's too.
    #[serde(default)]
    pub fleet_of: Option<String>,
    pub fleet: Fleet,
    /// Clients' resolvers keep an answer at least so long, whatever it says of itself.
    #[serde(default)]
    pub resolver_ttl_s: u32,
    #[serde(rename = "traffic")]
    pub traffic: Vec<Traffic>,
    #[serde(rename = "demand")]
    pub demand: Vec<Demand>,
    #[serde(rename = "crowd", default)]
    pub crowds: Vec<Crowd>,
    #[serde(rename = "order", default)]
    pub orders: Vec<OrderLine>,
    #[serde(rename = "fault", default)]
    pub faults: Vec<Fault>,
    /// What the play must show; it fails where it does not.
    #[serde(rename = "expect", default)]
    pub expected: Vec<Expect>,
}

/// What a request of a service looks like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traffic {
    pub service: ServiceId,
    pub port: u16,
    #[serde(default)]
    pub tls: bool,
    /// `user:password` for HTTP basic authentication.
    #[serde(default)]
    pub user: Option<String>,
    /// Paths asked for, in turn.
    #[serde(default)]
    pub get: Vec<String>,
    /// Writes, each read back later through another network.
    #[serde(default)]
    pub write: Option<WriteBack>,
}

/// A write and how it is read back. `{id}` stands for the write's own name, `{canary}` for bytes
/// that must never be seen on the WAN.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WriteBack {
    pub path: String,
    pub content_type: String,
    pub body: String,
}

/// A flash crowd, on top of steady demand.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Crowd {
    pub service: ServiceId,
    pub region: RegionId,
    pub onset_s: u32,
    /// From onset to full rate.
    pub ramp_s: u32,
    pub end_s: u32,
    pub requests_per_s: f64,
}

/// A daemon killed (SIGKILL) and started again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// When, from the start; or
    #[serde(default)]
    pub at_s: Option<u32>,
    /// seconds after the first decision that a crowd caused.
    #[serde(default)]
    pub after_decision_s: Option<f64>,
    pub kill: Daemon,
    /// Of which network (for a VM agent or an edge).
    #[serde(default)]
    pub network: Option<NetworkId>,
    pub restart_after_s: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Daemon {
    Cpa,
    Vma,
    Machine,
    Edge,
    Origin,
}

/// A scenario that cannot be played.
#[derive(Debug, thiserror::Error)]
pub enum BadScenario {
    #[error("cannot read {file}\n\nhint: scenarios are TOML files; the library is in scenarios/library")]
    Read { file: String, source: std::io::Error },
    #[error(transparent)]
    Text(#[from] BadFile),
    #[error("{file}: {source}")]
    Fleet { file: String, source: BadFleet },
    #[error("{file}: {problem}")]
    Range { file: String, problem: String },
}

/// The text of a scenario with the fleet and the traffic of the one that it names, if it names one. They come last, so
/// that what is wrong before them is found where it stands.
fn whole(file: &str, text: &str) -> Result<String, BadScenario> {
    #[derive(Deserialize)]
    struct Head {
        fleet_of: Option<String>,
        fleet: Option<toml::Table>,
        traffic: Option<Vec<toml::Table>>,
    }
    let range = |problem: String| Err(BadScenario::Range { file: file.into(), problem });
    // A text that cannot be read at all is told of by whoever reads it next.
    let Ok(Head { fleet_of: Some(name), fleet, traffic }) = toml::from_str(text) else { return Ok(text.to_owned()) };
    if name.contains(['/', '\\']) || !name.ends_with(".toml") {
        return range(format!("fleet_of = {name:?} must be a scenario file of the same folder"));
    }
    if fleet.is_some() || traffic.is_some() {
        return range("fleet_of stands in place of [fleet] and [[traffic]]: leave either out".into());
    }
    let path = std::path::Path::new(file).with_file_name(&name);
    let other = path.display().to_string();
    let theirs = std::fs::read_to_string(&path).map_err(|source| BadScenario::Read { file: other.clone(), source })?;
    let mut theirs: toml::Table = parse_toml(&other, &theirs)?;
    if theirs.contains_key("fleet_of") {
        return range(format!("fleet_of = {name:?} has its own fleet of another file: name that one"));
    }
    theirs.retain(|key, _| matches!(key, "fleet" | "traffic"));
    match toml::to_string(&theirs) {
        Ok(theirs) => Ok(format!("{text}\n{theirs}")),
        Err(e) => range(format!("fleet_of = {name:?}: {e}")),
    }
}

/// Longest scenario: two weeks, of which the first day teaches what is usual.
const LENGTH_MAX_S: u32 = 14 * DAY_S;
const DAY_S: u32 = 86_400;
/// Highest rate of one line; the lab's clients are one process.
const RATE_MAX: f64 = 10_000.0;
/// Most machines of a network, as many as a VM agent takes.
const MACHINES_MAX: u32 = 256;
/// Most requests a scenario may be expected to make: a recording of them still fits 1 GiB.
pub const REQUESTS_MAX: u64 = 5_000_000;

impl Scenario {
    /// Reads and checks a scenario file.
    ///
    /// # Errors
    /// Says which key or value is wrong and where.
    pub fn read(path: &std::path::Path) -> Result<Scenario, BadScenario> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| BadScenario::Read { file: file.clone(), source })?;
        Scenario::parse(&file, &text)
    }

    /// Reads and checks the text of a scenario file.
    ///
    /// # Errors
    /// As [`Scenario::read`].
    pub fn parse(file: &str, text: &str) -> Result<Scenario, BadScenario> {
        let mut s: Scenario = parse_toml(file, &whole(file, text)?)?;
        s.fleet.check().map_err(|source| BadScenario::Fleet { file: file.into(), source })?;
        let range = |problem: String| Err(BadScenario::Range { file: file.into(), problem });
        if s.length_s == 0 || s.length_s > LENGTH_MAX_S {
            return range(format!("length_s = {} must be 1 to {LENGTH_MAX_S}", s.length_s));
        }
        let pairs = s
            .demand
            .iter()
            .map(|d| (&d.service, &d.region, d.requests_per_s))
            .chain(s.crowds.iter().map(|c| (&c.service, &c.region, c.requests_per_s)));
        for (service, region, rate) in pairs {
            if s.fleet.service(service).is_none() {
                return range(format!("demand for service {service}, which does not exist"));
            }
            if s.fleet.region(region).is_none() {
                let names = s.fleet.regions.iter().map(|r| r.name.as_str());
                let hint = vmatrix_model::config::nearest(region.as_str(), names)
                    .map_or(String::new(), |n| format!("\n\nhint: did you mean {n:?}?"));
                return range(format!("demand from region {region}, which does not exist{hint}"));
            }
            if !(0.0..=RATE_MAX).contains(&rate) {
                return range(format!("requests_per_s = {rate} must be 0 to {RATE_MAX}"));
            }
            if !s.traffic.iter().any(|t| t.service == *service) {
                return range(format!(
                    "there is demand for {service} and no [[traffic]] that says what its requests are"
                ));
            }
        }
        if s.resolver_ttl_s > DAY_S {
            return range(format!("resolver_ttl_s = {} must be 0 to {DAY_S}", s.resolver_ttl_s));
        }
        for d in &mut s.demand {
            if let Some(fault) = d.fault().or_else(|| d.load(file, s.length_s).err()) {
                return range(format!("demand from {} for {}: {fault}", d.region, d.service));
            }
        }
        if let Some(n) = s.fleet.networks.iter().find(|n| n.machines > MACHINES_MAX) {
            return range(format!(
                "network {} has {} machines, at most {MACHINES_MAX} can be played",
                n.name, n.machines
            ));
        }
        if s.requests_at_most() > REQUESTS_MAX as f64 {
            return range(format!("would make more than {REQUESTS_MAX} requests; lower length_s or requests_per_s"));
        }
        if let Some(c) = s.crowds.iter().find(|c| c.end_s > s.length_s || c.onset_s.saturating_add(c.ramp_s) >= c.end_s)
        {
            return range(format!(
                "crowd in {}: onset_s + ramp_s must lie before end_s, and end_s within length_s",
                c.region
            ));
        }
        for t in &s.traffic {
            let Some(service) = s.fleet.service(&t.service) else {
                return range(format!("traffic of service {}, which does not exist", t.service));
            };
            if !service.ports.contains(&t.port) {
                return range(format!(
                    "traffic of {} goes to port {}, which the service does not declare",
                    t.service, t.port
                ));
            }
            if t.get.is_empty() && t.write.is_none() {
                return range(format!("traffic of {} asks for nothing: give get or write", t.service));
            }
        }
        if let Some((o, fault)) = s.orders.iter().find_map(|o| Some((o, o.fault(&s.fleet)?))) {
            return range(format!("order at {} s {fault}", o.at_s));
        }
        for e in &s.expected {
            if let Some(fault) = e.fault() {
                return range(format!("an expectation {fault}"));
            }
            if let Some(unknown) = e.service.as_ref().filter(|service| s.fleet.service(service).is_none()) {
                return range(format!("an expectation names service {unknown}, which does not exist"));
            }
            let mut regions = e.gap.iter().flatten().flatten();
            if let Some(unknown) = regions.find(|region| s.fleet.region(region).is_none()) {
                return range(format!("an expectation names region {unknown}, which does not exist"));
            }
            if let Some(unknown) = e.network.as_ref().filter(|network| s.fleet.network(network).is_none()) {
                return range(format!("an expectation names network {unknown}, which does not exist"));
            }
        }
        for f in &s.faults {
            if f.at_s.is_some() == f.after_decision_s.is_some() {
                return range("a fault needs at_s or after_decision_s, one of them".into());
            }
            let needs_network = !matches!(f.kill, Daemon::Cpa | Daemon::Origin);
            if needs_network != f.network.is_some() {
                return range(
                    "a fault of a vma, machine or edge names its network; one of the cpa or the origin does not".into(),
                );
            }
            if f.network.as_ref().is_some_and(|n| s.fleet.network(n).is_none()) {
                return range("a fault names a network that does not exist".into());
            }
        }
        Ok(s)
    }

    /// The number of requests to expect, from above: every crowd at its full rate for as long as it lasts.
    fn requests_at_most(&self) -> f64 {
        let steady: f64 = self.demand.iter().map(|d| d.requests_at_most(self.length_s)).sum();
        let crowds: f64 =
            self.crowds.iter().map(|c| c.requests_per_s * f64::from(c.end_s.saturating_sub(c.onset_s))).sum();
        steady + crowds
    }

    /// A rate that [`Scenario::rate`] never exceeds.
    pub fn peak_rate(&self, service: &ServiceId, region: &RegionId) -> f64 {
        let steady = self.demand.iter().filter(|d| d.service == *service && d.region == *region).map(Demand::peak);
        let crowds =
            self.crowds.iter().filter(|c| c.service == *service && c.region == *region).map(|c| c.requests_per_s);
        steady.chain(crowds).sum()
    }

    /// Requests a second that `region` makes of `service` at `second` (from the start).
    pub fn rate(&self, service: &ServiceId, region: &RegionId, second: f64) -> f64 {
        let steady: f64 =
            self.demand.iter().filter(|d| d.service == *service && d.region == *region).map(|d| d.rate(second)).sum();
        let crowd: f64 = self
            .crowds
            .iter()
            .filter(|c| c.service == *service && c.region == *region)
            .filter(|c| (f64::from(c.onset_s)..f64::from(c.end_s)).contains(&second))
            .map(|c| c.requests_per_s * ((second - f64::from(c.onset_s)) / f64::from(c.ramp_s.max(1))).min(1.0))
            .sum();
        steady + crowd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_bend_a_rate_and_keep_its_mean() {
        let mut hours = vec![0.0; 24];
        hours[6..18].fill(3.0);
        let mut d: Demand = toml::from_str("service = 'maps'\nregion = 'seoul'\nrequests_per_s = 2.0").unwrap();
        d.hours = hours;
        assert_eq!([d.rate(3600.0 * 12.0), d.rate(3600.0), d.peak()], [4.0, 0.0, 4.0]);
        // Half way between the middles of two hours it is half way between their rates, and each day is alike.
        assert_eq!([d.rate(3600.0 * 6.0), d.rate(3600.0 * 54.0)], [2.0, 2.0]);
        let mean = (0..86_400).map(|s| d.rate(f64::from(s))).sum::<f64>() / 86_400.0;
        assert!((mean - 2.0).abs() < 1e-9, "{mean}");
    }

    #[test]
    fn the_library_can_be_read() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../library");
        let mut read = 0;
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "toml") {
                Scenario::read(&path).unwrap();
                read += 1;
            }
        }
        assert!(read > 0);
    }
}
