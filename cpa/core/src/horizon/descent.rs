//! One network after the other, each the best path given all others.

use super::Problem;
use super::path::{State, cheapest, price};

/// Nobody.
const NONE: u32 = u32::MAX;

/// States of every network in every step, and what they cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// `states[network * steps + step]`.
    pub states: Vec<State>,
    pub cost: i64,
}

/// The two cheapest active networks of every cluster in every step.
pub(super) struct Served {
    /// `[step * clusters + cluster]`: the cheapest price, whose it is, and the cheapest of the others.
    best: Vec<u32>,
    who: Vec<u32>,
    second: Vec<u32>,
}

/// Improves a plan until no single network can: at most `sweeps` times through `order`.
///
/// `order` names the networks that may change; the others stay as they are. Answers how many paths changed.
pub fn improve(problem: &Problem, plan: &mut Plan, order: &[usize], sweeps: usize) -> usize {
    let mut served = Served::of(problem, &plan.states);
    let (mut saves, mut path) = (vec![0_i64; problem.steps], Vec::with_capacity(problem.steps));
    let mut changed = 0;
    // Who serves nobody and has no better way has none either while others only come, for then it would save less: how
    // often others had left when that was found.
    let mut idle_since: Vec<Option<usize>> = vec![None; problem.networks];
    let mut left = 0;
    for _ in 0..sweeps {
        let mut moved = 0;
        for network in order.iter().copied().filter(|n| *n < problem.networks) {
            if idle_since[network] == Some(left) {
                continue;
            }
            let own = network * problem.steps..(network + 1) * problem.steps;
            served.saves(problem, network, plan.states.get(own.clone()).unwrap_or_default(), &mut saves);
            let (from, stages) = (problem.before(network), problem.stages_of(network));
            let Some(present) = plan.states.get_mut(own) else { continue };
            let before = price(from, stages, &saves, present);
            let after = cheapest(from, stages, &saves, &mut path);
            if after >= before {
                idle_since[network] = present.iter().all(|s| *s != State::Active).then_some(left);
                continue;
            }
            let was = present.to_vec();
            present.copy_from_slice(&path);
            for (step, (was, is)) in was.iter().zip(&path).enumerate() {
                match (*was == State::Active, *is == State::Active) {
                    (false, true) => served.add(problem, network, step),
                    (true, false) => {
                        served.remove(problem, network, step, &plan.states);
                        left += 1;
                    }
                    _ => {}
                }
            }
            plan.cost += after - before;
            moved += 1;
        }
        changed += moved;
        if moved == 0 {
            break;
        }
    }
    changed
}

/// What plans would cost that differ from this one by another way of one network.
pub fn otherwise(problem: &Problem, plan: &Plan, ways: &[(usize, Vec<State>)]) -> Vec<i64> {
    let served = Served::of(problem, &plan.states);
    let mut saves = vec![0_i64; problem.steps];
    let one = |(network, way): &(usize, Vec<State>)| {
        let own = plan.states.get(network * problem.steps..(network + 1) * problem.steps).unwrap_or_default();
        served.saves(problem, *network, own, &mut saves);
        let (from, stages) = (problem.before(*network), problem.stages_of(*network));
        plan.cost - price(from, stages, &saves, own) + price(from, stages, &saves, way)
    };
    ways.iter().map(one).collect()
}

impl Served {
    pub(super) fn of(problem: &Problem, states: &[State]) -> Served {
        let size = problem.steps * problem.clusters;
        let (best, who, second) = (vec![problem.unserved; size], vec![NONE; size], vec![problem.unserved; size]);
        let mut served = Served { best, who, second };
        for network in 0..problem.networks {
            for step in 0..problem.steps {
                if states.get(network * problem.steps + step) == Some(&State::Active) {
                    served.add(problem, network, step);
                }
            }
        }
        served
    }

    pub(super) fn add(&mut self, problem: &Problem, network: usize, step: usize) {
        let row = step * problem.clusters..(step + 1) * problem.clusters;
        let (best, who, second) = (&mut self.best[row.clone()], &mut self.who[row.clone()], &mut self.second[row]);
        for (((best, who), second), price) in best.iter_mut().zip(who).zip(second).zip(problem.prices_of(network)) {
            if *price < *best {
                (*second, *best, *who) = (*best, *price, network as u32);
            } else if *price < *second {
                *second = *price;
            }
        }
    }

    /// Takes a network out of a step; `states` are those without it.
    pub(super) fn remove(&mut self, problem: &Problem, network: usize, step: usize, states: &[State]) {
        let active: Vec<usize> = (0..problem.networks)
            .filter(|n| *n != network && states.get(n * problem.steps + step) == Some(&State::Active))
            .collect();
        let row = step * problem.clusters;
        let gone = problem.prices_of(network);
        for (cluster, gone) in gone.iter().enumerate() {
            let at = row + cluster;
            if self.who[at] != network as u32 && *gone > self.second[at] {
                continue;
            }
            let (mut best, mut who, mut second) = (problem.unserved, NONE, problem.unserved);
            for n in &active {
                let price = problem.prices_of(*n).get(cluster).copied().unwrap_or(super::UNREACHED);
                if price < best {
                    (second, best, who) = (best, price, *n as u32);
                } else if price < second {
                    second = price;
                }
            }
            (self.best[at], self.who[at], self.second[at]) = (best, who, second);
        }
    }

    /// What clients would save in each step if this network were active in it, against the others alone.
    pub(super) fn saves(&self, problem: &Problem, network: usize, states: &[State], saves: &mut [i64]) {
        let prices = problem.prices_of(network);
        for (step, saves) in saves.iter_mut().enumerate() {
            let row = step * problem.clusters..(step + 1) * problem.clusters;
            let (best, demand) = (&self.best[row.clone()], problem.demand_in(step));
            let saved: u64 = if states.get(step) == Some(&State::Active) {
                let (who, second) = (&self.who[row.clone()], &self.second[row]);
                let others = best.iter().zip(who).zip(second);
                let others = others.map(|((b, w), s)| if *w == network as u32 { *s } else { *b });
                others.zip(prices).zip(demand).map(|((o, p), n)| u64::from(o.saturating_sub(*p)) * u64::from(*n)).sum()
            } else {
                let each = best.iter().zip(prices).zip(demand);
                each.map(|((b, p), n)| u64::from(b.saturating_sub(*p)) * u64::from(*n)).sum()
            };
            *saves = i64::try_from(saved).unwrap_or(i64::MAX);
        }
    }
}

/// What each network would save its clients over all steps if it were active throughout, less what that costs.
pub(super) fn gains(problem: &Problem, plan: &Plan) -> Vec<(i64, usize)> {
    let served = Served::of(problem, &plan.states);
    let mut saves = vec![0_i64; problem.steps];
    (0..problem.networks)
        .map(|network| {
            let own = plan.states.get(network * problem.steps..(network + 1) * problem.steps).unwrap_or_default();
            served.saves(problem, network, own, &mut saves);
            let each = saves.iter().zip(problem.stages_of(network)).map(|(saved, stage)| (saved - stage.active).max(0));
            // Where no step pays, the one that comes nearest.
            let least = saves.iter().zip(problem.stages_of(network)).map(|(saved, stage)| saved - stage.active).max();
            let sum: i64 = each.sum();
            (if sum > 0 { sum } else { least.unwrap_or(0) }, network)
        })
        .collect()
}
