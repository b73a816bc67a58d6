//! The shipped fleet in a toy world: VM agents that resume at once, resolvers that keep answers, Poisson clients.

#![allow(clippy::unwrap_used)] // A test may panic; the lint's own exception does not reach its helpers.

use std::collections::BTreeMap;
use vmatrix_cpa_core::{Command, Cpa, Event, Memory, Refusal};
use vmatrix_model::assignment::Assignment;
use vmatrix_model::config::parse_toml;
use vmatrix_model::demand::{DemandCount, DemandReport};
use vmatrix_model::fleet::Fleet;
use vmatrix_model::inventory::{ImageSeen, InstanceSeen, InstanceState, Inventory};
use vmatrix_model::plan::{Action, Cause, Decision, Plan};
use vmatrix_model::steering::Steering;
use vmatrix_model::wire::Order;
use vmatrix_model::{Bytes, Digest, Generation, InstanceId, NetworkId, RegionId, ServiceId, Span, Time};

const STEP_MS: u64 = 100;

fn network(name: &str) -> NetworkId {
    name.parse().unwrap()
}
fn service(name: &str) -> ServiceId {
    name.parse().unwrap()
}

fn fleet() -> Fleet {
    #[derive(serde::Deserialize)]
    struct File {
        fleet: Fleet,
    }
    let fleet = parse_toml::<File>("flash-crowd.toml", include_str!("../../../scenarios/library/flash-crowd.toml"))
        .unwrap()
        .fleet;
    fleet.check().unwrap();
    fleet
}

/// splitmix64
struct Chance(u64);
impl Chance {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
    fn poisson(&mut self, mean: f64) -> u64 {
        let (limit, mut product, mut n) = ((-mean).exp(), self.uniform(), 0);
        while product > limit {
            product *= self.uniform();
            n += 1;
        }
        n
    }
}

#[derive(Clone)]
struct Vma {
    assignment: Option<Assignment>,
    /// When each service's instance will serve, or began to.
    up: BTreeMap<ServiceId, Time>,
    refuses: bool,
    silent: bool,
}

struct World {
    cpa: Cpa,
    now: Time,
    chance: Chance,
    vmas: BTreeMap<NetworkId, Vma>,
    steering: Steering,
    /// Resolvers: (service, region) to (network, until).
    cached: BTreeMap<(ServiceId, RegionId), (NetworkId, Time)>,
    counted: BTreeMap<NetworkId, BTreeMap<(ServiceId, RegionId), u64>>,
    sequence: u64,
    decisions: Vec<Decision>,
    /// (when, plan, moves) of plans as they were adopted.
    adopted: Vec<(Time, Plan)>,
    refusals: Vec<Refusal>,
    planned: Option<Plan>,
    failed: u64,
    demand: Vec<(&'static str, &'static str, f64)>,
    crowd: Option<(&'static str, u64, u64)>,
    said: Vec<String>,
}

impl World {
    fn new(seed: u64) -> World {
        let fleet = fleet();
        let vma = Vma { assignment: None, up: BTreeMap::new(), refuses: false, silent: false };
        let vmas = fleet.networks.iter().map(|n| (n.name.clone(), vma.clone())).collect();
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
            said: vec![],
        }
    }

    /// A Seoul (or other) crowd of 4 requests a second on maps.
    fn with_crowd(mut self, region: &'static str, from: u64, to: u64) -> World {
        self.crowd = Some((region, from, to));
        self
    }

    fn hear(&mut self, event: Event) {
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

    fn assign(&mut self, network: &NetworkId, a: Assignment) {
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
        vma.assignment = Some(a);
    }

    fn inventory(&self, name: &NetworkId) -> Inventory {
        let vma = &self.vmas[name];
        let assignment = vma.assignment.as_ref();
        let image = |_| ImageSeen { digest: Digest::of(b"x"), present: Bytes(1), total: Bytes(1), fetched: Bytes(1) };
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
            refused: assignment.map(refused).unwrap_or_default(),
        }
    }

    fn rate(&self, s: &str, r: &str) -> f64 {
        let steady: f64 = self.demand.iter().filter(|d| d.0 == s && d.1 == r).map(|d| d.2).sum();
        let second = self.now.0 as f64 / 1e6;
        let crowd = self.crowd.filter(|c| s == "maps" && c.0 == r && second >= c.1 as f64 && second < c.2 as f64);
        steady + crowd.map_or(0.0, |c| 4.0 * ((second - c.1 as f64) / 2.0).min(1.0))
    }

    fn request(&mut self, s: &ServiceId, r: &RegionId) {
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
    fn until(&mut self, second: u64) {
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

    fn report(&mut self, name: &NetworkId) {
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

    fn running(&self, s: &str) -> Vec<String> {
        self.vmas.iter().filter(|(_, v)| v.up.contains_key(&service(s))).map(|(n, _)| n.to_string()).collect()
    }

    fn moves(&self, s: &str) -> Vec<(u64, String, Action)> {
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

    fn order(&mut self, s: &str, at: &[(&str, u32)]) -> Option<Plan> {
        self.planned = None;
        self.hear(Event::Order(Order { service: service(s), at: at.iter().map(|(n, i)| (network(n), *i)).collect() }));
        self.planned.clone()
    }
}

#[test]
fn every_service_begins_at_home_and_sleeps_everywhere_else() {
    let mut w = World::new(1);
    w.until(10);
    assert_eq!(w.running("maps"), ["ashburn"]);
    assert_eq!(w.running("agenda"), ["ashburn"]);
    let start = &w.adopted[0].1;
    assert_eq!(start.moves.iter().filter(|m| m.action == Action::Stage).count(), 4);
    assert!(w.decisions[0].done_at.is_some());
}

#[test]
fn a_crowd_in_seoul_wakes_tokyo_and_tokyo_sleeps_again() {
    for seed in 1..=20 {
        let mut w = World::new(seed).with_crowd("seoul", 25, 95);
        w.until(150);
        let moves = w.moves("maps");
        let [(up, tokyo, Action::Resume(1)), (down, tokyo_again, Action::Suspend(0))] = &moves[..] else {
            panic!("seed {seed}: {moves:?}")
        };
        assert_eq!((tokyo.as_str(), tokyo_again.as_str()), ("tokyo", "tokyo"), "seed {seed}");
        assert!((26..=31).contains(up), "seed {seed}: decided at {up} s");
        assert!((100..=112).contains(down), "seed {seed}: back to sleep at {down} s");
        assert_eq!(w.running("maps"), ["ashburn"], "seed {seed}");
        assert_eq!(w.failed, 0, "seed {seed}");
        assert!(w.moves("agenda").is_empty(), "seed {seed}: {:?}", w.moves("agenda"));
        assert!(matches!(w.adopted[1].1.cause, Cause::Burst { .. }));
    }
}

#[test]
fn a_crowd_in_berlin_wakes_dublin() {
    for seed in 1..=20 {
        let mut w = World::new(seed).with_crowd("berlin", 25, 95);
        w.until(150);
        let moves = w.moves("maps");
        let [(_, up, Action::Resume(1)), (_, down, Action::Suspend(0))] = &moves[..] else {
            panic!("seed {seed}: {moves:?}")
        };
        assert_eq!((up.as_str(), down.as_str()), ("dublin", "dublin"), "seed {seed}");
        assert_eq!(w.running("maps"), ["ashburn"]);
        assert_eq!(w.failed, 0);
    }
}

#[test]
fn without_a_crowd_nothing_moves_for_three_hours() {
    let mut w = World::new(5);
    w.until(3 * 3600);
    assert_eq!(w.moves("maps"), []);
    assert_eq!(w.moves("agenda"), []);
    assert_eq!(w.failed, 0);
}

#[test]
fn the_agenda_stays_for_nc_exceeds_nb_and_the_cpa_says_so() {
    let mut w = World::new(1);
    w.until(60);
    let lines = w.cpa.explain(w.now, &service("agenda")).unwrap().lines.join("\n");
    assert!(lines.contains("N_C = 40") && lines.contains("N_B = 8") && lines.contains("fails"), "{lines}");
}

#[test]
fn the_same_events_give_the_same_commands() {
    let play = || {
        let mut w = World::new(3).with_crowd("seoul", 25, 95);
        w.until(150);
        w.said
    };
    assert_eq!(play(), play());
}

#[test]
fn an_order_adds_and_the_rounds_leave_it_alone() {
    let mut w = World::new(2);
    w.until(50);
    let plan = w.order("agenda", &[("dublin", 1)]).unwrap();
    assert!(plan.not.iter().any(|n| n.reason.contains("N_C")), "{:?}", plan.not);
    assert_eq!(w.running("agenda"), ["ashburn"], "a plan moves nothing");
    w.hear(Event::Apply { plan: plan.id });
    w.until(120);
    assert_eq!(w.running("agenda"), ["ashburn", "dublin"]);
    let berlin = w.cpa.fleet().regions[1].prefix;
    let dublin = w.cpa.fleet().vip(&service("agenda"), &network("dublin")).unwrap();
    assert_eq!(
        w.steering.services[&service("agenda")].by_clients[&berlin],
        [dublin],
        "an ordered place is used by those near it"
    );
    assert_eq!(w.failed, 0);
    let after = w.order("agenda", &[("dublin", 0)]).unwrap();
    w.hear(Event::Apply { plan: after.id });
    w.until(140);
    assert_eq!(w.running("agenda"), ["ashburn"]);
    assert_eq!(w.failed, 0);
}

#[test]
fn an_ordered_move_is_made_before_the_old_place_is_broken() {
    let mut w = World::new(2);
    w.until(50);
    let plan = w.order("maps", &[("tokyo", 1), ("ashburn", 0)]).unwrap();
    w.hear(Event::Apply { plan: plan.id });
    assert_eq!(w.running("maps"), ["ashburn", "tokyo"], "first the union");
    w.until(53);
    assert_eq!(w.running("maps"), ["ashburn", "tokyo"], "resolvers still know the old address");
    w.until(80);
    assert_eq!(w.running("maps"), ["tokyo"]);
    let ashburn = w.vmas[&network("ashburn")].assignment.as_ref().unwrap();
    assert_eq!(ashburn.services[&service("maps")].forward_to, w.cpa.fleet().vip(&service("maps"), &network("tokyo")));
    assert_eq!(w.failed, 0);
    let d = w.decisions.iter().find(|d| d.plan.id == plan.id).unwrap();
    assert!(d.serving_at.unwrap() < d.done_at.unwrap());
}

#[test]
fn after_its_time_an_order_no_longer_binds() {
    let mut w = World::new(2);
    w.until(50);
    let plan = w.order("agenda", &[("dublin", 1)]).unwrap();
    w.hear(Event::Apply { plan: plan.id });
    w.until(50 + 590);
    assert_eq!(w.running("agenda"), ["ashburn", "dublin"]);
    w.until(50 + 700);
    assert_eq!(w.running("agenda"), ["ashburn"], "its back end is too far from dublin");
}

#[test]
fn a_stale_plan_is_refused_and_says_what_changed() {
    let mut w = World::new(2);
    w.until(50);
    let first = w.order("agenda", &[("dublin", 1)]).unwrap();
    let second = w.order("maps", &[("tokyo", 1)]).unwrap();
    w.hear(Event::Apply { plan: second.id });
    w.hear(Event::Apply { plan: first.id });
    let Some(Refusal::Stale { what, .. }) = w.refusals.first() else { panic!("{:?}", w.refusals) };
    assert!(what.contains("maps at tokyo"), "{what}");
    w.hear(Event::Apply { plan: 99 });
    assert!(matches!(w.refusals[1], Refusal::NoPlan { plan: 99 }));
}

#[test]
fn an_order_that_leaves_nothing_is_refused() {
    let mut w = World::new(2);
    w.until(20);
    assert!(w.order("maps", &[("ashburn", 0)]).is_none());
    assert_eq!(w.refusals.len(), 1);
}

#[test]
fn a_newcomer_that_refuses_is_taken_back() {
    let mut w = World::new(2).with_crowd("seoul", 25, 95);
    w.vmas.get_mut(&network("tokyo")).unwrap().refuses = true;
    w.until(90);
    assert_eq!(w.failed, 0);
    assert!(w.running("maps").contains(&"ashburn".to_owned()));
    let tokyo = w.moves("maps").iter().filter(|m| m.1 == "tokyo").count();
    assert_eq!(tokyo, 1, "not tried again at once: {:?}", w.moves("maps"));
    assert!(w.decisions.iter().any(|d| d.plan.not.iter().any(|n| n.reason.contains("no machine"))));
}

#[test]
fn a_lost_network_is_replaced() {
    let mut w = World::new(2);
    w.until(40);
    w.vmas.get_mut(&network("ashburn")).unwrap().silent = true;
    w.until(45);
    let maps = &w.steering.services[&service("maps")];
    assert!(!maps.is_empty(), "an address stays while nobody else serves");
    w.until(90);
    assert!(w.decisions.iter().any(|d| matches!(d.plan.cause, Cause::Loss { .. })));
    assert!(w.running("maps").len() > 1);
    let vip = w.cpa.fleet().vip(&service("maps"), &network("ashburn")).unwrap();
    assert!(w.steering.services[&service("maps")].by_clients.values().all(|v| !v.contains(&vip)));
}

#[test]
fn a_cpa_killed_at_any_moment_goes_on_where_it_was() {
    let whole = {
        let mut w = World::new(4).with_crowd("seoul", 25, 95);
        w.until(150);
        w.moves("maps").into_iter().map(|m| (m.1, m.2)).collect::<Vec<_>>()
    };
    for kill_at in [26, 28, 29, 30, 31, 33, 50, 96, 102, 105, 108] {
        let mut w = World::new(4).with_crowd("seoul", 25, 95);
        w.until(kill_at);
        let written = serde_json::to_string(w.cpa.memory()).unwrap();
        let memory: Memory = serde_json::from_str(&written).unwrap();
        assert_eq!(memory, *w.cpa.memory());
        w.now = w.now + Span::secs(2);
        w.cpa = Cpa::new(fleet(), BTreeMap::new());
        w.hear(Event::Restored(Box::new(memory)));
        w.until(150);
        let moves: Vec<_> = w.moves("maps").into_iter().map(|m| (m.1, m.2)).collect();
        assert_eq!(moves, whole, "killed at {kill_at}");
        assert_eq!(w.running("maps"), ["ashburn"], "killed at {kill_at}");
        assert_eq!(w.failed, 0, "killed at {kill_at}");
    }
}
