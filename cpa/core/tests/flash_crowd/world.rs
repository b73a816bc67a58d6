//! The toy world: VM agents that resume at once, resolvers that keep answers, Poisson clients.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use vmatrix_cpa_core::{Command, Cpa, Event, Refusal};
use vmatrix_model::assignment::{Assignment, Singleton};
use vmatrix_model::config::parse_toml;
use vmatrix_model::demand::{DemandCount, DemandReport};
use vmatrix_model::fleet::Fleet;
use vmatrix_model::inventory::{Holder, ImageSeen, InstanceSeen, InstanceState, Inventory};
use vmatrix_model::plan::{Action, Cause, Decision, Plan};
use vmatrix_model::steering::Steering;
use vmatrix_model::wire::Order;
use vmatrix_model::{Bytes, Digest, Generation, InstanceId, NetworkId, RegionId, ServiceId, Span, Time};

pub const STEP_MS: u64 = 100;

pub fn network(name: &str) -> NetworkId {
    name.parse().unwrap()
}
pub fn service(name: &str) -> ServiceId {
    name.parse().unwrap()
}

pub fn fleet() -> Fleet {
    #[derive(serde::Deserialize)]
    struct File {
        fleet: Fleet,
    }
    let fleet = parse_toml::<File>("flash-crowd.toml", include_str!("../../../../scenarios/library/flash-crowd.toml"))
        .unwrap()
        .fleet;
    fleet.check().unwrap();
    fleet
}

/// splitmix64
pub struct Chance(u64);
impl Chance {
    pub fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
    pub fn poisson(&mut self, mean: f64) -> u64 {
        let (limit, mut product, mut n) = ((-mean).exp(), self.uniform(), 0);
        while product > limit {
            product *= self.uniform();
            n += 1;
        }
        n
    }
}

#[derive(Clone)]
pub struct Vma {
    pub assignment: Option<Assignment>,
    /// When each service's instance will serve, or began to.
    pub up: BTreeMap<ServiceId, Time>,
    pub refuses: bool,
    pub silent: bool,
    /// Singletons its machine has.
    pub holds: BTreeMap<ServiceId, Holder>,
    /// Where that machine is asked for them.
    pub transfer: SocketAddr,
}

pub struct World {
    pub cpa: Cpa,
    pub now: Time,
    pub chance: Chance,
    pub vmas: BTreeMap<NetworkId, Vma>,
    pub steering: Steering,
    /// Resolvers: (service, region) to (network, until).
    pub cached: BTreeMap<(ServiceId, RegionId), (NetworkId, Time)>,
    pub counted: BTreeMap<NetworkId, BTreeMap<(ServiceId, RegionId), u64>>,
    pub sequence: u64,
    pub decisions: Vec<Decision>,
    /// (when, plan, moves) of plans as they were adopted.
    pub adopted: Vec<(Time, Plan)>,
    pub refusals: Vec<Refusal>,
    pub planned: Option<Plan>,
    pub failed: u64,
    pub demand: Vec<(&'static str, &'static str, f64)>,
    pub crowd: Option<(&'static str, u64, u64)>,
    /// A region that asks by day: nothing at midnight, twice its rate at noon.
    pub daily: Option<&'static str>,
    pub said: Vec<String>,
}

impl World {
    pub fn new(seed: u64) -> World {
        World::of(fleet(), seed)
    }

    pub fn of(fleet: Fleet, seed: u64) -> World {
        let vma = |i: usize| Vma {
            assignment: None,
            up: BTreeMap::new(),
            refuses: false,
            silent: false,
            holds: BTreeMap::new(),
            transfer: SocketAddr::from(([198, 19, i as u8, 1], 8452)),
        };
        let vmas = fleet.networks.iter().enumerate().map(|(i, n)| (n.name.clone(), vma(i))).collect();
        let demand = vec![
            ("maps", "new-york", 0.4),
            ("maps", "berlin", 0.2),
            ("maps", "seoul", 0.2),
            ("maps", "sao-paulo", 0.1),
            ("agenda", "new-york", 0.1),
            ("agenda", "berlin", 0.1),
        ];
        World {
            cpa: Cpa::new(fleet, BTreeMap::new()),
            now: Time(0),
            chance: Chance(seed),
            vmas,
            steering: Steering::default(),
            cached: BTreeMap::new(),
            counted: BTreeMap::new(),
            sequence: 0,
            decisions: vec![],
            adopted: vec![],
            refusals: vec![],
            planned: None,
            failed: 0,
            demand,
            crowd: None,
            daily: None,
            said: vec![],
        }
    }

    /// A Seoul (or other) crowd of 4 requests a second on maps.
    pub fn with_crowd(mut self, region: &'static str, from: u64, to: u64) -> World {
        self.crowd = Some((region, from, to));
        self
    }

    pub fn hear(&mut self, event: Event) {
        let commands = self.cpa.handle(self.now, event);
        for c in commands {
            self.said.push(format!("{} {c:?}", self.now.0));
            match c {
                Command::Assign(n, a) => self.assign(&n, a),
                Command::Announce(s) => {
                    assert!(s.generation >= self.steering.generation, "steering never runs backwards");
                    self.steering = s;
                }
                Command::Decided(d) => {
                    if !self.adopted.iter().any(|(_, p)| p.id == d.plan.id) {
                        self.adopted.push((self.now, d.plan.clone()));
                    }
                    self.decisions.retain(|o| o.plan.id != d.plan.id);
                    self.decisions.push(d);
                }
                Command::Planned(p) => self.planned = Some(p),
                Command::Refuse(r) => self.refusals.push(r),
                Command::Placed(p) => assert_eq!(vmatrix_cpa_core::check::lint(self.cpa.fleet(), &p), []),
            }
        }
    }

    pub fn assign(&mut self, network: &NetworkId, a: Assignment) {
        let now = self.now;
        let vma = self.vmas.get_mut(network).unwrap();
        assert!(
            vma.assignment.as_ref().is_none_or(|old| old.generation <= a.generation),
            "assignments never run backwards"
        );
        vma.up.retain(|s, _| a.services.get(s).is_some_and(|s| s.instances > 0));
        for (s, share) in &a.services {
            if share.instances > 0 && !vma.refuses {
                vma.up.entry(s.clone()).or_insert(now + Span::ms(1500));
            }
        }
        vma.assignment = Some(a.clone());
        for (service, share) in a.services.iter().filter(|(_, share)| share.instances > 0) {
            match share.singleton {
                Some(Singleton::Begin) => self.hold(network, service, 0),
                Some(Singleton::Take(from)) => self.take(network, service, from),
                Some(Singleton::Keep) | None => {}
            }
        }
    }

    fn hold(&mut self, network: &NetworkId, service: &ServiceId, epoch: u64) {
        let vma = self.vmas.get_mut(network).unwrap();
        vma.holds.entry(service.clone()).or_insert(Holder {
            machine: "m1".parse().unwrap(),
            transfer: vma.transfer,
            epoch,
        });
        let holders: Vec<_> = self.vmas.iter().filter(|(_, v)| v.holds.contains_key(service)).map(|(n, _)| n).collect();
        assert_eq!(holders.len(), 1, "{service} is held in {holders:?}");
    }

    /// A machine that is asked hands over; one that is silent does not.
    fn take(&mut self, network: &NetworkId, service: &ServiceId, from: SocketAddr) {
        let holder = self.vmas.values_mut().find(|v| v.transfer == from && !v.silent);
        if let Some(held) = holder.and_then(|v| v.holds.remove(service)) {
            self.hold(network, service, held.epoch + 1);
        }
    }

    pub fn inventory(&self, name: &NetworkId) -> Inventory {
        let vma = &self.vmas[name];
        let assignment = vma.assignment.as_ref();
        let image = |_| ImageSeen {
            digest: Digest::of(b"x"),
            present: Bytes(1),
            total: Bytes(1),
            fetched: Bytes(1),
            resumable: true,
        };
        let refused = |a: &Assignment| {
            a.services
                .iter()
                .filter(|(s, share)| share.instances > 0 && vma.refuses && !vma.up.contains_key(*s))
                .map(|(s, _)| (s.clone(), "no machine".to_owned()))
                .collect()
        };
        Inventory {
            network: name.clone(),
            at: self.now,
            generation: assignment.map_or(Generation(0), |a| a.generation),
            machines: vec![],
            images: assignment.iter().flat_map(|a| a.services.keys()).map(|s| (s.clone(), image(s))).collect(),
            instances: vma
                .up
                .iter()
                .map(|(s, t)| InstanceSeen {
                    id: InstanceId { service: s.clone(), number: 0 },
                    machine: "m1".parse().unwrap(),
                    state: if *t <= self.now { InstanceState::Serving } else { InstanceState::Resuming },
                    since: *t,
                    resumed_in: None,
                    trouble: None,
                })
                .collect(),
            holds: vma.holds.clone(),
            refused: assignment.map(refused).unwrap_or_default(),
        }
    }

    pub fn rate(&self, s: &str, r: &str) -> f64 {
        let steady: f64 = self.demand.iter().filter(|d| d.0 == s && d.1 == r).map(|d| d.2).sum();
        let second = self.now.0 as f64 / 1e6;
        let of_day = 1.0 - (std::f64::consts::TAU * second / 86_400.0).cos();
        let steady = if self.daily == Some(r) { steady * of_day } else { steady };
        let crowd = self.crowd.filter(|c| s == "maps" && c.0 == r && second >= c.1 as f64 && second < c.2 as f64);
        steady + crowd.map_or(0.0, |c| 4.0 * ((second - c.1 as f64) / 2.0).min(1.0))
    }

    pub fn request(&mut self, s: &ServiceId, r: &RegionId) {
        let key = (s.clone(), r.clone());
        let fleet = self.cpa.fleet();
        let ttl = Span::secs(u64::from(fleet.ttl_s));
        let cached = self.cached.get(&key).filter(|(_, until)| self.now < *until).map(|(n, _)| n.clone());
        let to = cached.or_else(|| {
            let vip = *self.steering.services.get(s)?.by_clients.get(&fleet.region(r)?.prefix)?.first()?;
            let n = fleet.networks.iter().find(|n| fleet.vip(s, &n.name) == Some(vip))?.name.clone();
            self.cached.insert(key.clone(), (n.clone(), self.now + ttl));
            Some(n)
        });
        match to {
            Some(n) if self.vmas[&n].up.get(s).is_some_and(|t| *t <= self.now) => {
                *self.counted.entry(n).or_default().entry(key).or_default() += 1
            }
            _ => self.failed += 1,
        }
    }

    /// Plays until `second`; demand begins once both services are answered.
    pub fn until(&mut self, second: u64) {
        let pairs: Vec<(ServiceId, RegionId)> =
            self.demand.iter().map(|d| (service(d.0), d.1.parse().unwrap())).collect();
        while self.now.0 < second * 1_000_000 {
            let ms = self.now.0 / 1000;
            let answered = self.steering.services.values().filter(|a| !a.is_empty()).count() == 2;
            for (s, r) in pairs.iter().filter(|_| answered) {
                for _ in 0..self.chance.poisson(self.rate(s.as_str(), r.as_str()) * STEP_MS as f64 / 1000.0) {
                    self.request(s, r);
                }
            }
            if ms % 1000 == 300 {
                self.sequence += 1;
                for name in self.vmas.keys().cloned().collect::<Vec<_>>() {
                    self.report(&name);
                    if !self.vmas[&name].silent {
                        self.hear(Event::Inventory(self.inventory(&name)));
                    }
                }
            }
            if ms.is_multiple_of(500) {
                self.hear(Event::Tick);
            }
            self.now = self.now + Span::ms(STEP_MS);
        }
    }

    pub fn report(&mut self, name: &NetworkId) {
        if self.vmas[name].silent {
            return;
        }
        let counted = self.counted.remove(name).unwrap_or_default();
        let fleet = self.cpa.fleet();
        let counts = counted
            .into_iter()
            .map(|((service, r), requests)| DemandCount {
                service,
                clients: fleet.region(&r).unwrap().prefix,
                requests,
                bytes: Bytes(0),
            })
            .collect();
        self.hear(Event::Demand(DemandReport {
            network: name.clone(),
            sequence: self.sequence,
            run: 1,
            at: self.now,
            counts,
        }));
    }

    pub fn running(&self, s: &str) -> Vec<String> {
        self.vmas.iter().filter(|(_, v)| v.up.contains_key(&service(s))).map(|(n, _)| n.to_string()).collect()
    }

    pub fn moves(&self, s: &str) -> Vec<(u64, String, Action)> {
        let adopted = self.adopted.iter().filter(|(_, p)| p.cause != Cause::Start);
        adopted
            .flat_map(|(t, p)| {
                p.moves
                    .iter()
                    .filter(|m| m.service == service(s))
                    .map(|m| (t.0 / 1_000_000, m.network.to_string(), m.action))
            })
            .collect()
    }

    pub fn order(&mut self, s: &str, at: &[(&str, u32)]) -> Option<Plan> {
        self.ask(Order { service: service(s), at: at.iter().map(|(n, i)| (network(n), *i)).collect(), fair: None })
    }

    pub fn ask(&mut self, order: Order) -> Option<Plan> {
        self.planned = None;
        self.hear(Event::Order(order));
        self.planned.clone()
    }
}
