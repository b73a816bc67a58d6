//! Quality: what online placement costs, over what any placement must cost.
//!
//! ```text
//!  trace (recorded) × matrix (recorded) × seed (where clients are) × weight (price of waiting) ─▶ World
//!  World ─▶ policies, epoch by epoch, knowing only the past ─▶ cost      ┐
//!        └▶ oracle: upper (knows the future), lower (certified) ─────────┴▶ rows
//! ```

use crate::{at_most, median, worst};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use vmatrix_cpa_core::horizon::online::{Planner, Prices, Requests};
use vmatrix_cpa_core::horizon::rent::Renter;
use vmatrix_cpa_core::horizon::{Plan, Problem, Stage, State, improve};
use vmatrix_replay::chance::Chance;
use vmatrix_replay::trace::{self, Trace};
use vmatrix_replay::{matrix, oracle};

/// Epochs a day: ten minutes each.
const DAY: usize = 144;
const HOUR: usize = DAY / 24;
/// Rounds of the dual at each look of our policy: twice as many cost twice as much and gain some thousandths.
const ROUNDS: usize = 30;
/// Most requests of an epoch: ten times the busiest of the recorded trace. So many in each of three months' epochs, at
/// the highest weight and 300 ms each, are still a sum that 64 bits hold (4.5 · 10¹⁸).
const REQUESTS_MAX: u64 = 20_000_000;
/// 10⁻¹² dollars in a dollar.
const DOLLAR: f64 = 1e12;

/// The recorded matrices.
const CLOUD: &str = "cloud-69";
const PLANETLAB: &str = "planetlab-490";
/// In the order of the table.
const POLICIES: [&str; 7] = ["mpc", "rent", "myopic", "static", "best-single", "none", "offline"];

/// A network's prices.
#[derive(Debug, Clone, Copy)]
struct Network {
    /// Machine for an hour; storage of the image for an hour; the image's way there; dollars.
    active: f64,
    dormant: f64,
    ship: f64,
    resume: f64,
    /// Hours east of the trace's clock.
    zone: usize,
}

/// One service's days.
pub struct World {
    networks: Vec<Network>,
    clusters: usize,
    epochs: usize,
    requests: Requests,
    demand: Vec<u32>,
    home: usize,
}

impl Prices for World {
    fn requests(&self) -> &Requests {
        &self.requests
    }

    fn stage(&self, network: usize, epoch: usize, epochs: usize) -> Stage {
        let n = &self.networks[network];
        let hour = |epoch: usize| (epoch / HOUR + n.zone) % 24;
        let tariff = |hour: usize| if (11..15).contains(&hour) { 0.85 } else { 1.0 };
        let active: f64 = (epoch..epoch + epochs).map(|e| n.active * tariff(hour(e)) + n.dormant).sum();
        let ship = if hour(epoch) < 6 { 0.6 * n.ship } else { n.ship };
        let pico = |dollars: f64| (dollars * DOLLAR) as i64;
        Stage {
            dormant: pico(n.dormant * epochs as f64 / HOUR as f64),
            active: pico(active / HOUR as f64),
            ship: pico(ship),
            resume: pico(n.resume),
        }
    }
}

impl World {
    fn from(&self) -> Vec<State> {
        let mut from = vec![State::Absent; self.networks.len()];
        from[self.home] = State::Active;
        from
    }

    fn stages(&self, length: usize) -> Vec<Stage> {
        let steps = self.epochs / length;
        (0..self.networks.len()).flat_map(|n| (0..steps).map(move |s| self.stage(n, s * length, length))).collect()
    }

    fn demand(&self, length: usize) -> Vec<u32> {
        let row = |step: usize, cluster: usize| {
            (0..length).map(|e| self.demand[(step * length + e) * self.clusters + cluster]).sum::<u32>()
        };
        (0..self.epochs / length).flat_map(|s| (0..self.clusters).map(move |c| row(s, c))).collect()
    }

    fn problem<'a>(&'a self, steps: usize, demand: &'a [u32], stages: &'a [Stage], from: &'a [State]) -> Problem<'a> {
        self.requests.problem(steps, demand, stages, from)
    }
}

/// What a policy came to.
#[derive(Debug, Clone, Default)]
struct Outcome {
    cost: i64,
    moves: usize,
    states: Vec<State>,
}

/// Plays a policy: `decide` has heard every epoch before the one it is asked for.
fn play(world: &World, mut decide: impl FnMut(usize, &[u32]) -> Vec<State>) -> Outcome {
    let n = world.networks.len();
    let mut before = world.from();
    let mut outcome = Outcome { states: vec![State::Absent; n * world.epochs], ..Outcome::default() };
    let mut heard: &[u32] = &[];
    for epoch in 0..world.epochs {
        let states = decide(epoch, heard);
        heard = &world.demand[epoch * world.clusters..(epoch + 1) * world.clusters];
        for (network, state) in states.iter().enumerate() {
            outcome.moves += usize::from(*state > before[network]);
            outcome.states[network * world.epochs + epoch] = *state;
        }
        before = states;
    }
    outcome.cost = whole(world, |problem| problem.cost(&outcome.states));
    outcome
}

fn whole<T>(world: &World, look: impl FnOnce(&Problem) -> T) -> T {
    let (stages, from) = (world.stages(1), world.from());
    look(&world.problem(world.epochs, &world.demand, &stages, &from))
}

fn mpc(world: &World, rounds: usize) -> Outcome {
    let mut planner = Planner::new(world.clusters, DAY, 0, world.from(), rounds);
    let mut demand = Vec::new();
    play(world, |epoch, heard| {
        if epoch > 0 {
            planner.hear(heard, world);
            planner.forecast(&mut demand);
            planner.decide(&demand, world, epoch % HOUR == 0);
        }
        planner.states().to_vec()
    })
}

fn rent(world: &World) -> Outcome {
    let mut renter = Renter::new(world.from());
    play(world, |epoch, heard| {
        if epoch == 0 {
            return renter.states().to_vec();
        }
        let stages: Vec<Stage> = (0..world.networks.len()).map(|n| world.stage(n, epoch - 1, 1)).collect();
        let from = renter.states().to_vec();
        renter.decide(&world.problem(1, heard, &stages, &from)).to_vec()
    })
}

/// Each hour by itself, as the last one was: the usual greedy placement run again and again.
fn myopic(world: &World) -> Outcome {
    let mut states = world.from();
    let mut last = vec![0; world.clusters];
    play(world, |epoch, heard| {
        last.iter_mut().zip(heard).for_each(|(last, n)| *last += n);
        if epoch > 0 && epoch % HOUR == 0 {
            let stages: Vec<Stage> = (0..world.networks.len()).map(|n| world.stage(n, epoch, HOUR)).collect();
            let from = states.clone();
            let problem = world.problem(1, &last, &stages, &from);
            let mut plan = Plan { cost: problem.cost(&states), states: states.clone() };
            improve(&problem, &mut plan, &(0..world.networks.len()).collect::<Vec<_>>(), 8);
            states = plan.states;
            last.fill(0);
        }
        states.clone()
    })
}

/// The best places that are never changed, chosen with all of the trace known: one, or as many as pay.
fn fixed(world: &World, single: bool) -> Outcome {
    let demand: Vec<u64> = (0..world.clusters)
        .map(|c| world.demand.iter().skip(c).step_by(world.clusters).map(|d| u64::from(*d)).sum())
        .collect();
    // Scaled into a step's range; prices with them, so that the choice is the same.
    let most = demand.iter().max().copied().unwrap_or(1).max(1);
    let scale = (most / u64::from(u32::MAX / 2)).max(1);
    let scaled: Vec<u32> = demand.iter().map(|d| (d / scale) as u32).collect();
    let stages: Vec<Stage> = (0..world.networks.len())
        .map(|n| {
            let s = world.stage(n, 0, world.epochs);
            let by = scale as i64;
            Stage { dormant: s.dormant / by, active: s.active / by, ship: s.ship / by, resume: s.resume / by }
        })
        .collect();
    let from = world.from();
    let problem = world.problem(1, &scaled, &stages, &from);
    let one = |network: usize| -> Vec<State> {
        (0..world.networks.len()).map(|n| if n == network { State::Active } else { State::Absent }).collect()
    };
    let best = (0..world.networks.len()).map(one).min_by_key(|states| problem.cost(states)).unwrap_or_default();
    let mut plan = Plan { cost: problem.cost(&best), states: best };
    if !single {
        improve(&problem, &mut plan, &(0..world.networks.len()).collect::<Vec<_>>(), 20);
    }
    play(world, |_, _| plan.states.clone())
}

/// A plan that knows the future, and the bound that no plan is below.
fn offline(world: &World, begin: &Outcome, rounds: (usize, usize)) -> (Outcome, i64) {
    whole(world, |problem| {
        let mut plan = Plan { cost: begin.cost, states: begin.states.clone() };
        oracle::upper(problem, &mut plan, 12);
        // First by the hour, where a round is cheap; then by epochs, from there.
        let (stages, demand, from) = (world.stages(HOUR), world.demand(HOUR), world.from());
        let coarse = world.problem(world.epochs / HOUR, &demand, &stages, &from);
        let hourly: Vec<State> = (0..world.networks.len())
            .flat_map(|n| plan.states[n * world.epochs..(n + 1) * world.epochs].iter().step_by(HOUR).copied())
            .collect();
        let mut by_hour = Plan { cost: coarse.cost(&hourly), states: hourly };
        oracle::upper(&coarse, &mut by_hour, 12);
        let pays = oracle::first_prices(&coarse, &by_hour);
        let pays = oracle::lower(&coarse, by_hour.cost, pays, rounds.0).pays;
        let fine: Vec<f32> = (0..world.epochs)
            .flat_map(|e| pays[e / HOUR * world.clusters..(e / HOUR + 1) * world.clusters].iter().map(|v| *v as f32))
            .collect();
        let lower = oracle::lower(problem, plan.cost, fine, rounds.1);
        let other = oracle::rounded(problem, &lower.active, 12);
        if other.cost < plan.cost {
            plan = other;
        }
        let up =
            |path: &[State], from: State| std::iter::once(&from).chain(path).zip(path).filter(|(a, b)| b > a).count();
        let moves = plan.states.chunks(world.epochs).zip(&from).map(|(path, from)| up(path, *from)).sum();
        (Outcome { cost: plan.cost, moves, states: plan.states }, lower.value)
    })
}

/// A matrix as this bench needs it.
pub struct Places {
    pub name: &'static str,
    pub count: usize,
    /// Round trips in microseconds, row by row.
    pub rtt_us: Vec<u32>,
    /// Dollars for a gigabyte from row to column.
    pub egress: Option<Vec<f64>>,
}

/// Days of a service: the trace's requests at places, drawn by a seed.
pub fn world(trace: &Trace, places: &Places, seed: u64, weight: f64) -> anyhow::Result<World> {
    let n = places.count;
    let minutes = (trace.step.0 / 60_000_000).max(1) as usize;
    let per = (24 * 60 / DAY)
        .checked_div(minutes)
        .filter(|n| *n > 0)
        .context("the trace's steps are longer than an epoch")?;
    let epochs = trace.counts.len() / per / HOUR * HOUR;
    if n == 0 || epochs == 0 {
        bail!("nothing to place: {n} places, {epochs} epochs");
    }
    let mut chance = Chance::named(seed, &["places"]);
    let rtt = |a: usize, b: usize| places.rtt_us[a * n + b];
    // Time zones: along the way between two places far from each other, near ones have near hours.
    let west = chance.under(n as u64) as usize;
    let east = (0..n).filter(|b| rtt(west, *b) != u32::MAX).max_by_key(|b| rtt(west, *b)).unwrap_or(west);
    let zones: Vec<usize> = (0..n)
        .map(|p| {
            let (w, e) = (f64::from(rtt(west, p)), f64::from(rtt(east, p)));
            (24.0 * w / (w + e).max(1.0)) as usize % 24
        })
        .collect();
    // Sizes of places: Zipf's law with the exponent 0.8 (cities' populations weighed as the finding has them).
    let mut rank: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        rank.swap(i, chance.under(i as u64 + 1) as usize);
    }
    let size: Vec<f64> = rank.iter().map(|r| 1.0 / (1.0 + *r as f64).powf(0.8)).collect();
    let sum = |counts: &[u64]| counts.iter().fold(0_u64, |sum, n| sum.saturating_add(*n));
    let totals: Vec<u64> = trace.counts.chunks(per).take(epochs).map(sum).collect();
    if let Some(epoch) = totals.iter().position(|total| *total > REQUESTS_MAX) {
        bail!(
            "trace {}: {} requests in the ten minutes from {}, more than {REQUESTS_MAX}; mask what is wrong there with \
             `vmatrix trace import --mask`",
            trace.name,
            totals[epoch],
            trace::time_of(trace.at(epoch * per))
        );
    }
    // What is above one and a half times the usual of three days is a crowd, and comes from two places and those near them.
    let mut demand = vec![0_u32; epochs * n];
    let mut drift = vec![0.0_f64; n];
    let mut crowd: Vec<f64> = vec![0.0; n];
    for (epoch, total) in totals.iter().enumerate() {
        if epoch % DAY == 0 {
            crowd.fill(0.0);
            for _ in 0..2 {
                let middle = chance.under(n as u64) as usize;
                let mut near: Vec<usize> = (0..n).collect();
                near.sort_by_key(|p| (rtt(middle, *p), *p));
                near.iter().take(1 + n / 33).for_each(|p| crowd[*p] += size[*p]);
            }
        }
        if epoch % HOUR == 0 {
            for drift in &mut drift {
                // Remembers six hours; a place asks for 0.6 to 1.7 times its share, most often.
                *drift = 0.85 * *drift + 0.26 * (2.0 * chance.fraction() - 1.0);
            }
        }
        let mut before: Vec<u64> = (1..=3).filter_map(|d| totals.get(epoch.checked_sub(d * DAY)?)).copied().collect();
        before.sort_unstable();
        let usual = before.get(before.len() / 2).map_or(*total, |m| m + m / 2).min(*total);
        let hour = epoch / HOUR;
        let share: Vec<f64> = (0..n)
            .map(|p| {
                // Asleep at four in the morning, at its height at eight in the evening.
                let local = (hour + zones[p]) % 24;
                let awake = [4, 3, 2, 2, 2, 3, 4, 6, 7, 8, 8, 9, 9, 9, 9, 9, 9, 10, 11, 12, 12, 11, 9, 6][local];
                size[p] * f64::from(awake) * (1.0 + drift[p]).clamp(0.2, 2.0)
            })
            .collect();
        let (all, of_crowd) = (share.iter().sum::<f64>(), crowd.iter().sum::<f64>());
        for p in 0..n {
            let requests = usual as f64 * share[p] / all + (total - usual) as f64 * crowd[p] / of_crowd.max(1e-9);
            demand[epoch * n + p] = (requests + 0.5) as u32;
        }
    }
    let home = chance.under(n as u64) as usize;
    let networks: Vec<Network> = (0..n)
        .map(|p| {
            let ship = match &places.egress {
                Some(egress) => 4.0 * egress[home * n + p],
                None => 4.0 * (0.03 + 0.06 * chance.fraction()),
            };
            let active = 0.08 + 0.05 * chance.fraction();
            Network { active, dormant: 0.0003, ship, resume: 0.002, zone: zones[p] }
        })
        .collect();
    // Dollars of a request: its round trip at the weight, and the bytes of its answer, as the trace's mean.
    let answer_gb = 3967.0 / 1e9;
    let price = |i: usize, j: usize| {
        let us = rtt(i, j);
        if us == u32::MAX {
            return u32::MAX;
        }
        let egress = places.egress.as_ref().map_or(0.0, |e| e[i * n + j]);
        ((weight * f64::from(us) / 1000.0 + egress * answer_gb) * DOLLAR) as u32
    };
    let prices: Vec<u32> = (0..n).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| price(i, j)).collect();
    // Ten seconds, when people give up.
    let unserved = (weight * 10_000.0 * DOLLAR).min(f64::from(u32::MAX / 2)) as u32;
    let requests = Requests { clusters: n, prices, unserved };
    Ok(World { networks, clusters: n, epochs, requests, demand, home })
}

/// Weights of latency, dollars for a request and a millisecond: few places pay, several, many.
pub const WEIGHTS: [f64; 3] = [6e-9, 2e-8, 6e-8];

/// Rows of one world: every policy, and the bounds.
fn rows(trace: &Trace, places: &Places, seed: u64, weight: f64, rounds: (usize, usize)) -> anyhow::Result<Vec<Value>> {
    let world = world(trace, places, seed, weight)?;
    let ours = mpc(&world, ROUNDS);
    let rented = rent(&world);
    let begin = if ours.cost <= rented.cost { &ours } else { &rented };
    let (best, lower) = offline(&world, begin, rounds);
    let row = |policy: &str, outcome: &Outcome| {
        json!({
            "trace": trace.name, "matrix": places.name, "seed": seed, "weight": weight, "policy": policy,
            "cost": outcome.cost / 1_000_000, "lower_bound": lower / 1_000_000,
            "ratio": outcome.cost as f64 / lower as f64, "moves": outcome.moves,
        })
    };
    let none = play(&world, |_, _| world.from());
    Ok(vec![
        row("mpc", &ours),
        row("rent", &rented),
        row("myopic", &myopic(&world)),
        row("static", &fixed(&world, false)),
        row("best-single", &fixed(&world, true)),
        row("none", &none),
        row("offline", &best),
    ])
}

/// All rows of a trace over some matrices, two worlds at a time.
pub fn all(trace: &Trace, matrices: &[Places], seeds: u64, rounds: (usize, usize)) -> anyhow::Result<Vec<Value>> {
    let jobs: Vec<(usize, u64, f64)> =
        (0..matrices.len()).flat_map(|m| (0..seeds).flat_map(move |s| WEIGHTS.map(move |w| (m, s + 1, w)))).collect();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                while let Some((m, seed, weight)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let rows = rows(trace, &matrices[*m], *seed, *weight, rounds);
                    found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(((*m, *seed, *weight), rows));
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    found.sort_by(|(a, _), (b, _)| a.0.cmp(&b.0).then(a.1.cmp(&b.1)).then(a.2.total_cmp(&b.2)));
    let mut all = Vec::new();
    for (_, rows) in found {
        all.extend(rows?);
    }
    Ok(all)
}

impl Places {
    /// The first so many of them.
    pub fn first(&self, count: usize) -> Places {
        let count = count.min(self.count);
        let rows =
            |all: &[u32]| (0..count).flat_map(|a| all[a * self.count..a * self.count + count].to_vec()).collect();
        Places { name: self.name, count, rtt_us: rows(&self.rtt_us), egress: None }
    }
}

/// The recorded trace; two weeks of it if it is to be quick.
pub fn recorded(data: &Path, quick: bool) -> anyhow::Result<Trace> {
    let mut trace = crate::burst::worldcup(&data.join(crate::burst::TRACE))?;
    trace.name = "worldcup98".to_owned();
    if quick {
        trace.name += ", two weeks";
        trace.counts = trace.counts.drain(40 * 1440..54 * 1440).collect();
    }
    Ok(trace)
}

/// The recorded matrix of 490 hosts.
pub fn planetlab(data: &Path) -> anyhow::Result<Places> {
    places(PLANETLAB, &data.join("netlatency/PlanetLabData_10"))
}

/// Plays our policy with requests counted minute by minute; a digest of every state and what each minute cost.
pub fn replay(trace: &Trace, world: &World) -> u64 {
    let ours = mpc(world, 0);
    let minutes = (trace.counts.len() / world.epochs).max(1);
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    let mut take = |value: u64| digest = (digest ^ value).wrapping_mul(0x0100_0000_01b3);
    let mut best = vec![0_u32; world.clusters];
    let mut active: Vec<usize> = Vec::new();
    for epoch in 0..world.epochs {
        let now: Vec<usize> =
            (0..world.networks.len()).filter(|n| ours.states[n * world.epochs + epoch] == State::Active).collect();
        if now != active {
            active = now;
            best.fill(world.requests.unserved);
            for network in &active {
                let prices = &world.requests.prices[network * world.clusters..(network + 1) * world.clusters];
                best.iter_mut().zip(prices).for_each(|(best, price)| *best = (*best).min(*price));
            }
        }
        let demand = &world.demand[epoch * world.clusters..(epoch + 1) * world.clusters];
        let all: u64 = demand.iter().map(|d| u64::from(*d)).sum();
        let each: u64 = demand.iter().zip(&best).map(|(d, price)| u64::from(*d) * u64::from(*price)).sum();
        for minute in 0..minutes {
            let requests = trace.counts.get(epoch * minutes + minute).copied().unwrap_or(0);
            // The epoch's mix of clients, at the minute's number of requests.
            take((u128::from(each) * u128::from(requests) / u128::from(all.max(1))) as u64);
        }
        active.iter().for_each(|network| take(*network as u64));
    }
    digest
}

/// A recorded matrix, with what is unknown filled in.
fn places(name: &'static str, path: &Path) -> anyhow::Result<Places> {
    let matrix = matrix::read(path)?.complete().matrix;
    let egress = matrix.egress.as_ref().map(|all| all.iter().map(|usd| usd.0 as f64 / 1e6).collect());
    Ok(Places { name, count: matrix.len(), rtt_us: matrix.rtt_us, egress })
}

/// Measures the matrices that are asked for, all if `only` is empty, with so many seeds.
///
/// # Errors
/// The recorded data is not there or cannot be read, or there is no such matrix.
pub fn measure(data: Option<&Path>, quick: bool, only: &[&str], seeds: Option<u64>) -> anyhow::Result<Value> {
    let data = data.context("the recorded traces and matrices are not there; name their folder in VMATRIX_DATA")?;
    let trace = recorded(data, quick)?;
    let of = |name: &str| match name {
        CLOUD => places(CLOUD, &data.join("skyplane")),
        PLANETLAB => planetlab(data),
        _ => bail!("there is no matrix {name:?} in this bench; there are {CLOUD} and {PLANETLAB}"),
    };
    let names = match (only, quick) {
        ([], true) => &[CLOUD][..],
        ([], false) => &[CLOUD, PLANETLAB],
        (only, _) => only,
    };
    let matrices = names.iter().map(|name| of(name)).collect::<anyhow::Result<Vec<_>>>()?;
    let (usual, rounds) = if quick { (1, (100, 50)) } else { (10, (200, 100)) };
    Ok(summary(all(&trace, &matrices, seeds.unwrap_or(usual), rounds)?))
}

/// What the worlds of both say; of one world the newer rows.
pub fn merged(before: &Value, found: &Value) -> Value {
    let world = |row: &Value| ["trace", "matrix", "seed", "weight"].map(|key| row[key].to_string());
    let rows = |of: &Value| of["rows"].as_array().cloned().unwrap_or_default();
    let newer = rows(found);
    let mut all = rows(before);
    all.retain(|row| newer.iter().all(|new| world(new) != world(row)));
    all.extend(newer);
    summary(all)
}

/// Every policy's ratios, and the goals, by the rows of all worlds.
fn summary(rows: Vec<Value>) -> Value {
    let of = |policy: &str, key: &str| -> Vec<f64> {
        rows.iter().filter(|r| r["policy"] == policy).filter_map(|r| r[key].as_f64()).collect()
    };
    let (ours, best) = (of("mpc", "ratio"), of("offline", "ratio"));
    let moves = of("mpc", "moves")
        .iter()
        .zip(of("offline", "moves"))
        .map(|(ours, best)| ours / best.max(1.0))
        .collect::<Vec<_>>();
    let mut worlds: Vec<[String; 2]> =
        rows.iter().map(|r| ["trace", "matrix"].map(|key| r[key].as_str().unwrap_or("-").to_owned())).collect();
    worlds.sort();
    worlds.dedup();
    let peers: Vec<Value> = (worlds.iter())
        .flat_map(|world| POLICIES.map(|policy| (world, policy)))
        .map(|(world, policy)| {
            let is_it = |r: &&Value| r["policy"] == policy && r["trace"] == world[0] && r["matrix"] == world[1];
            let ratios: Vec<f64> = rows.iter().filter(is_it).filter_map(|r| r["ratio"].as_f64()).collect();
            json!({
                "trace": world[0], "matrix": world[1], "policy": policy, "worlds": ratios.len(),
                "median": median(&ratios), "worst": worst(&ratios),
            })
        })
        .collect();
    json!({
        "offline": { "gap_median": median(&best), "gap_worst": worst(&best) },
        "policies": peers,
        "conditions": [
            "requests are the trace's; where clients are is drawn by seed, for the trace does not say: Zipf sizes, local time of day, a drift that remembers six hours, and crowds (what is above one and a half times the usual) at two places a day",
            "a policy decides each ten minutes and has heard what was asked until then; the bound is of that problem, with all of the future known",
            "an image of 4 GB; weights are dollars for a request and a millisecond",
        ],
        "goals": [
            at_most("online cost over the certified bound, median", 1.03, median(&ours)),
            at_most("online cost over the certified bound, worst", 1.08, worst(&ours)),
            at_most("cost with the future known, over the bound, worst", 1.005, worst(&best)),
            at_most("moves over those with the future known, median", 1.5, median(&moves)),
        ],
        "rows": rows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Twelve places on a plane, ten milliseconds a step.
    fn plane() -> Places {
        let at: Vec<(i32, i32)> = (0..12).map(|p| (p * 5 % 12, p * 7 % 11)).collect();
        let rtt = |a: &(i32, i32), b: &(i32, i32)| 10_000 * ((a.0 - b.0).abs() + (a.1 - b.1).abs()) as u32;
        let rtt_us = at.iter().flat_map(|a| at.iter().map(move |b| rtt(a, b))).collect();
        Places { name: "plane", count: at.len(), rtt_us, egress: None }
    }

    #[test]
    fn nothing_is_below_the_bound_and_planning_ahead_beats_what_does_not() {
        let trace = trace::generate(trace::Kind::Diurnal, 3, 6);
        let rows = all(&trace, &[plane()], 1, (100, 60)).unwrap();
        assert_eq!(rows.len(), 3 * 7);
        for weight in WEIGHTS {
            let of = |policy: &str| {
                let row = rows.iter().find(|r| r["weight"] == weight && r["policy"] == policy).unwrap();
                row["ratio"].as_f64().unwrap()
            };
            assert!(of("offline") >= 1.0 && of("offline") < 1.02, "{rows:?}");
            for policy in ["mpc", "rent", "myopic", "static", "best-single", "none"] {
                // Within the relaxed plan's own gap: a plan that knows the future is the best there is.
                assert!(of(policy) >= of("offline") - 0.005, "{policy}: {rows:?}");
            }
            assert!(of("mpc") <= of("myopic").min(of("none")).min(of("best-single")) + 0.005, "{rows:?}");
        }
    }

    #[test]
    fn worlds_measured_anew_take_the_place_of_the_same_worlds_and_the_goals_are_of_all() {
        let row = |seed: u64, ratio: f64| json!({ "trace": "t", "matrix": "m", "seed": seed, "weight": 1e-8, "policy": "mpc", "ratio": ratio });
        let (before, found) = (summary(vec![row(1, 1.5), row(2, 1.02)]), summary(vec![row(1, 1.01), row(3, 1.04)]));
        let all = merged(&before, &found);
        let seeds: Vec<u64> = all["rows"].as_array().unwrap().iter().filter_map(|r| r["seed"].as_u64()).collect();
        assert_eq!(seeds, [2, 1, 3]);
        assert_eq!((all["goals"][0]["seen"].as_f64(), all["goals"][1]["seen"].as_f64()), (Some(1.02), Some(1.04)));
        assert_eq!(all["policies"][0]["worlds"], 3);
    }

    #[test]
    fn a_world_is_of_its_seed_and_keeps_the_traces_requests() {
        let trace = trace::generate(trace::Kind::Diurnal, 3, 4);
        let [a, again, b] = [1, 1, 2].map(|seed| world(&trace, &plane(), seed, 2e-8).unwrap());
        assert!(a.demand == again.demand && a.demand != b.demand);
        let (drawn, recorded) = (a.demand.iter().map(|d| u64::from(*d)).sum::<u64>(), trace.counts.iter().sum::<u64>());
        // Each place's requests in an epoch are rounded to whole ones.
        assert!(drawn.abs_diff(recorded) <= a.demand.len() as u64, "{drawn} of {recorded}");
    }

    #[test]
    fn more_requests_than_can_be_summed_are_refused_by_time() {
        for many in [REQUESTS_MAX + 1, u64::MAX] {
            let mut trace = trace::generate(trace::Kind::Diurnal, 3, 1);
            trace.counts[25] = many;
            let said = world(&trace, &plane(), 1, 2e-8).err().unwrap().to_string();
            assert!(said.contains("2001-01-01 00:20:00") && said.contains("--mask"), "{said}");
        }
    }

    #[test]
    fn two_replays_are_the_same_bit_by_bit() {
        let trace = trace::generate(trace::Kind::Diurnal, 3, 4);
        let world = world(&trace, &plane(), 1, 2e-8).unwrap();
        assert_eq!(replay(&trace, &world), replay(&trace, &world));
    }
}
