//! What any placement must cost at least: prices that clients pay for being served, and plans made from them.
//!
//! ```text
//!  Problem, first prices ─▶ rounds: each network's best path at these prices ─▶ too many serve a cluster: less; nobody: more
//!                           └▶ bound, certified in whole numbers          └▶ how active each was on average ─▶ a plan
//! ```
//! # The certificate
//! Let every request of cluster j in step t pay v(j,t) to whoever serves it. A network that is active in step t earns
//! Σ_j d(j,t)·max(0, v(j,t) − w(i,j)), and its best path through time, found exactly, earns at most −P_i(v). Then no plan
//! costs less than Σ d·v + Σ_i P_i(v), whatever v is (Lagrangian relaxation of "each request is served once"; Geoffrion
//! 1974); no request pays more than it costs not to be served at all. So the bound does not depend on how v was found: it is counted anew in whole numbers at the end.
//!
//! v is found by the volume algorithm (Barahona and Anbil 2000): subgradients, averaged, with steps that depend on how
//! far the best bound is from the upper one.

use super::path::cheapest;
use super::{Plan, Problem, Stage, State, improve};

/// A lower bound and where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Lower {
    /// No plan costs less, 10⁻¹² dollars.
    pub value: i64,
    /// The certificate: `[step * clusters + cluster]`, a price per request.
    pub pays: Vec<u32>,
    /// How active each network was in each step, over the rounds: `[network * steps + step]`, 0 to 1. What the
    /// relaxed problem would do; rounded, a plan to begin with.
    pub active: Vec<f32>,
}

/// Of a network's mean activity in the rounds, what counts as active in a plan made from it: little, half, much.
const ROUND_AT: [f32; 3] = [0.3, 0.5, 0.7];

/// The cheapest of some plans made from what the relaxed problem would do, each improved.
pub fn rounded(problem: &Problem, active: &[f32], sweeps: usize) -> Plan {
    let at = |least: f32| {
        let mut states: Vec<State> =
            active.iter().map(|part| if *part >= least { State::Active } else { State::Absent }).collect();
        for (path, from) in states.chunks_mut(problem.steps).zip(problem.from) {
            // The image stays between two times of being active; the descent drops what does not pay.
            let mut has = *from != State::Absent;
            for state in path {
                has |= *state == State::Active;
                if has && *state == State::Absent {
                    *state = State::Dormant;
                }
            }
        }
        let mut plan = Plan { cost: problem.cost(&states), states };
        upper(problem, &mut plan, sweeps);
        plan
    };
    let [first, others @ ..] = ROUND_AT.map(at);
    others.into_iter().fold(first, |best, other| if other.cost < best.cost { other } else { best })
}

/// Improves a plan with all of the future known.
pub fn upper(problem: &Problem, plan: &mut Plan, sweeps: usize) {
    let order: Vec<usize> = (0..problem.networks).collect();
    improve(problem, plan, &order, sweeps);
}

/// The bound that these prices certify, in whole numbers.
pub fn certify(problem: &Problem, pays: &[u32]) -> i64 {
    let (clusters, steps) = (problem.clusters, problem.steps);
    let mut paid = 0_i64;
    for (pays, demand) in pays.chunks(clusters).zip(problem.demand.chunks(clusters)) {
        let each = pays.iter().zip(demand);
        paid += each.map(|(v, d)| i64::from((*v).min(problem.unserved)) * i64::from(*d)).sum::<i64>();
    }
    let (mut saves, mut path) = (vec![0_i64; steps], Vec::new());
    for network in 0..problem.networks {
        let prices = &problem.prices[network * clusters..(network + 1) * clusters];
        for ((saves, pays), demand) in saves.iter_mut().zip(pays.chunks(clusters)).zip(problem.demand.chunks(clusters))
        {
            let each = pays.iter().zip(prices).zip(demand);
            let earns = |v: u32, w: u32, d: u32| u64::from(v.min(problem.unserved).saturating_sub(w)) * u64::from(d);
            *saves = each.map(|((v, w), d)| earns(*v, *w, *d)).sum::<u64>() as i64;
        }
        paid += cheapest(problem.from[network], stages(problem, network), &saves, &mut path);
    }
    paid
}

fn stages<'a>(problem: &Problem<'a>, network: usize) -> &'a [Stage] {
    &problem.stages[network * problem.steps..(network + 1) * problem.steps]
}

/// Prices to begin with: between what a request costs in `plan` and what it would cost with its network gone, so far up
/// that each network earns just what it costs while it is active.
pub fn first_prices(problem: &Problem, plan: &Plan) -> Vec<f32> {
    let (clusters, steps) = (problem.clusters, problem.steps);
    let size = clusters * steps;
    let (mut best, mut who, mut second) =
        (vec![problem.unserved; size], vec![usize::MAX; size], vec![problem.unserved; size]);
    for network in 0..problem.networks {
        let prices = &problem.prices[network * clusters..(network + 1) * clusters];
        for step in (0..steps).filter(|s| plan.states[network * steps + s] == State::Active) {
            for (cluster, price) in prices.iter().enumerate() {
                let at = step * clusters + cluster;
                if *price < best[at] {
                    (second[at], best[at], who[at]) = (best[at], *price, network);
                } else if *price < second[at] {
                    second[at] = *price;
                }
            }
        }
    }
    let mut pays: Vec<f32> = best.iter().map(|b| *b as f32).collect();
    for network in 0..problem.networks {
        let states = &plan.states[network * steps..(network + 1) * steps];
        let mut from = 0;
        while from < steps {
            if states[from] != State::Active {
                from += 1;
                continue;
            }
            let to = (from..steps).find(|s| states[*s] != State::Active).unwrap_or(steps);
            let before = if from == 0 { problem.from[network] } else { states[from - 1] };
            let own = stages(problem, network);
            let runs: i64 = own[from..to].iter().map(|stage| stage.active).sum();
            let costs = (own[from].change(before, State::Active) + runs) as f64;
            let gained: f64 = (from * clusters..to * clusters)
                .filter(|at| who[*at] == network)
                .map(|at| f64::from(second[at] - best[at]) * f64::from(problem.demand[at]))
                .sum();
            let part = if gained > 0.0 { (costs / gained).min(1.0) } else { 0.0 };
            for at in from * clusters..to * clusters {
                if who[at] == network {
                    pays[at] += (f64::from(second[at] - best[at]) * part) as f32;
                }
            }
            from = to;
        }
    }
    pays
}

/// Finds a lower bound in so many `rounds`, beginning with `pays`; `upper` is what the best known plan costs.
pub fn lower(problem: &Problem, upper: i64, pays: Vec<f32>, rounds: usize) -> Lower {
    let risen = rise(problem, upper, pays, rounds);
    let pays: Vec<u32> = risen.pays.iter().map(|v| *v as u32).collect();
    Lower { value: certify(problem, &pays), pays, active: risen.active }
}

/// Prices that were found, and what networks do at them.
#[derive(Debug, Clone, PartialEq)]
pub struct Risen {
    pub pays: Vec<f32>,
    /// As in [`Lower`].
    pub active: Vec<f32>,
}

/// As [`lower`], without the certificate.
pub fn rise(problem: &Problem, upper: i64, pays: Vec<f32>, rounds: usize) -> Risen {
    let mut dual = Dual::new(problem);
    let mut best = pays;
    let (mut value, mut mean) = dual.look(&best);
    let mut active = dual.paths.clone();
    let (mut factor, mut failed) = (FACTOR, 0);
    let mut trial = best.clone();
    for _ in 0..rounds {
        let size: f64 =
            mean.iter().zip(problem.demand).map(|(g, d)| f64::from(*g) * f64::from(*g) * f64::from(*d)).sum();
        if size <= 0.0 {
            break;
        }
        let step = (factor * (upper as f64 - value).max(0.0) / size) as f32;
        for ((trial, best), g) in trial.iter_mut().zip(&best).zip(&mean) {
            // Not served at all is a price too, which nobody pays more than.
            *trial = (best + step * g).clamp(0.0, problem.unserved as f32);
        }
        let (seen, slope) = dual.look(&trial);
        let along: f64 = slope
            .iter()
            .zip(&mean)
            .zip(problem.demand)
            .map(|((a, b), d)| f64::from(*a) * f64::from(*b) * f64::from(*d))
            .sum();
        for (mean, slope) in mean.iter_mut().zip(&slope) {
            *mean += WEIGHT * (slope - *mean);
        }
        for (mean, seen) in active.iter_mut().zip(&dual.paths) {
            *mean += WEIGHT * (seen - *mean);
        }
        if seen > value {
            std::mem::swap(&mut best, &mut trial);
            value = seen;
            failed = 0;
            // It still goes up along the way that was gone: the step may be longer.
            if along > 0.0 {
                factor = (factor * 1.1).min(FACTOR_MAX);
            }
        } else {
            failed += 1;
            if failed >= PATIENCE {
                (factor, failed) = (factor * 0.66, 0);
            }
        }
    }
    Risen { pays: best, active }
}

/// Of the step, as Barahona and Anbil have it: it begins small, grows with success, and shrinks after failures in a row.
const FACTOR: f64 = 0.1;
const FACTOR_MAX: f64 = 2.0;
const PATIENCE: usize = 10;
/// Weight of the newest subgradient in the mean.
const WEIGHT: f32 = 0.1;

/// Looks at the dual function.
struct Dual<'a> {
    problem: &'a Problem<'a>,
    /// `[cluster * networks + network]`.
    prices: Vec<f32>,
    /// `[step * networks + network]`.
    earns: Vec<f32>,
    active: Vec<Vec<u32>>,
    /// `[network * steps + step]`: 1 where it is active.
    paths: Vec<f32>,
}

impl<'a> Dual<'a> {
    fn new(problem: &'a Problem<'a>) -> Dual<'a> {
        let (n, m) = (problem.networks, problem.clusters);
        let prices = (0..n * m).map(|at| problem.prices[at % n * m + at / n] as f32).collect();
        Dual {
            problem,
            prices,
            earns: vec![0.0; n * problem.steps],
            active: vec![Vec::new(); problem.steps],
            paths: vec![0.0; n * problem.steps],
        }
    }

    /// The dual's value at these prices, and for each of them whether it is too low (1: nobody serves) or too high.
    fn look(&mut self, pays: &[f32]) -> (f64, Vec<f32>) {
        let p = self.problem;
        let (n, m) = (p.networks, p.clusters);
        let mut value = 0.0;
        for (step, earns) in self.earns.chunks_mut(n).enumerate() {
            earns.fill(0.0);
            for cluster in 0..m {
                let (d, v) = (p.demand[step * m + cluster] as f32, pays[step * m + cluster]);
                value += f64::from(d) * f64::from(v);
                let prices = &self.prices[cluster * n..(cluster + 1) * n];
                for (earns, price) in earns.iter_mut().zip(prices) {
                    *earns += d * (v - price).max(0.0);
                }
            }
        }
        self.active.iter_mut().for_each(Vec::clear);
        let (mut saves, mut path) = (vec![0_i64; p.steps], Vec::new());
        for network in 0..n {
            for (saves, earns) in saves.iter_mut().zip(self.earns.iter().skip(network).step_by(n)) {
                *saves = *earns as i64;
            }
            value += cheapest(p.from[network], stages(p, network), &saves, &mut path) as f64;
            let own = self.paths.iter_mut().skip(network * p.steps);
            for ((active, state), own) in self.active.iter_mut().zip(&path).zip(own) {
                *own = f32::from(*state == State::Active);
                if *state == State::Active {
                    active.push(network as u32);
                }
            }
        }
        let mut slope = vec![1.0_f32; p.steps * m];
        for (step, active) in self.active.iter().enumerate() {
            for network in active {
                for cluster in 0..m {
                    let price = self.prices[cluster * n + *network as usize];
                    if price < pays[step * m + cluster] {
                        slope[step * m + cluster] -= 1.0;
                    }
                }
            }
        }
        (value, slope)
    }
}
