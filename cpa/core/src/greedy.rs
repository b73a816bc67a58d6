//! Where one service should run, among ten thousand networks and for a hundred thousand client prefixes, and how far
//! from the best possible that is at most.
//!
//! ```text
//!  Graph (shared) ─┐             dual: every prefix bids until a network is paid ──▶ bound
//!  Demand, Prices ─┴▶ place ──▶  primal: paid networks, drop ▸ add ▸ swap ────────▶ Placed ──▶ Flash (crowds)
//!                                dual again, guided by what was placed ─────────────▶ bound
//!                         tighten ──▶ volume: better bids, and networks they pay ────────▶ Placed
//! ```
//!
//! The price of an hour is that of every open network and of every request's way to the nearest open one (paper
//! §6.1.3, inputs 1, 2 and 5): the uncapacitated facility location problem. Any bids (levels) that pay no network more
//! than its price prove a lower bound, their sum ([`certify`]); the dual ascent (Erlenkotter 1978) finds good ones in a
//! few sweeps over the graph, and the networks they pay in full are where to look for a placement.
//!
//! Whole numbers throughout: a price is in millionths of a micro-dollar ([`Pico`]), for one request and one
//! microsecond at one micro-dollar a second cost exactly 1. The same input gives the same output; what is alike goes to
//! the lower network. The order in which prefixes come does not matter, for the graph keeps an order of its own.
//!
//! Deliberately absent: capacities, and what moving costs. A network's price can carry both.

mod dual;
mod flash;
mod graph;
mod primal;
#[cfg(test)]
mod tests;
mod volume;

pub use flash::{Flash, Ticked};
pub use graph::{Graph, LATENCY_MAX};

use dual::Dual;
use primal::Primal;
use vmatrix_model::MicroUsd;

/// Millionths of a micro-dollar (10^-12 $): a request, a microsecond, a micro-dollar a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Pico(pub u64);

impl Pico {
    /// The same in micro-dollars, rounded down.
    pub fn micro_usd(self) -> MicroUsd {
        MicroUsd((self.0 / 1_000_000) as i64)
    }
}

/// No network.
pub const NOWHERE: u32 = u32::MAX;
/// Most that a service may cost in an hour were everything open and everyone sent to the farthest candidate: 4.6 million
/// dollars. Below it no sum in this module can overflow 64 bits.
const DEAREST: u128 = 1 << 62;
/// Rounds of swaps: a later one only looks at what the one before it changed. Two is a choice for time.
const ROUNDS: usize = 2;
/// How much wider a warm start's gap may be than that of the answer it started from, in millionths, before everything is
/// placed anew: two percent, the goal of a replan.
pub const WARM_GAP_PPM: u64 = 20_000;

/// What clients ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Demand {
    /// Requests an hour of each prefix.
    pub weights: Vec<u64>,
}

/// What is paid for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prices {
    /// An hour of the service in each network.
    pub open: Vec<MicroUsd>,
    /// A second that one request waits (paper §5.1).
    pub latency_second: MicroUsd,
}

/// Where a service runs, who is served from where, what that costs and what it must cost at least.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placed {
    /// The networks it runs in, ascending.
    pub open: Vec<u32>,
    /// The network that serves each prefix: the nearest open candidate, or [`NOWHERE`] if it has none (then nobody asks,
    /// or the prefix has no candidates at all).
    pub serves: Vec<u32>,
    /// Price of an hour.
    pub cost: Pico,
    /// No placement costs less. Never above `cost`.
    pub bound: Pico,
    /// The bids that prove it, for [`certify`] and the next warm start: microseconds beyond the nearest candidate, for
    /// each row of the graph.
    pub levels: Vec<u64>,
}

impl Placed {
    /// (cost − bound) / bound in millionths: how much could be saved at most.
    pub fn gap_ppm(&self) -> u64 {
        let above = u128::from(self.cost.0.saturating_sub(self.bound.0)) * 1_000_000;
        above.checked_div(u128::from(self.bound.0)).map_or(0, |g| u64::try_from(g).unwrap_or(u64::MAX))
    }
}

/// What is wrong with the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// A candidate that does not exist.
    #[error(
        "prefix {prefix}: candidate network {network}, and there are {networks}\n\nhint: number networks from 0 to {networks} - 1"
    )]
    Network { prefix: usize, network: u32, networks: u32 },
    /// A network twice among one prefix's candidates.
    #[error("prefix {prefix}: network {network} is listed twice\n\nhint: keep the shorter way")]
    Twice { prefix: usize, network: u32 },
    /// A latency beyond any path on earth.
    #[error(
        "prefix {prefix}: {latency} µs to network {network}\n\nhint: leave out candidates farther than {LATENCY_MAX} µs"
    )]
    Latency { prefix: usize, network: u32, latency: u32 },
    /// More candidates than can be numbered.
    #[error("more than {} candidates in all\n\nhint: give each prefix fewer", u32::MAX)]
    Candidates,
    /// A list that is not as long as the graph is wide.
    #[error("{have} {what} for {want}\n\nhint: give one for each, 0 where there is none")]
    Length { what: &'static str, have: usize, want: usize },
    /// A price below zero.
    #[error("an hour in network {network} costs {} µ$\n\nhint: prices are 0 or more", price.0)]
    Price { network: usize, price: MicroUsd },
    /// A price of latency below zero.
    #[error("a second of latency costs {} µ$\n\nhint: prices are 0 or more", price.0)]
    Second { price: MicroUsd },
    /// A price of waking an image below zero.
    #[error("a resume costs {} µ$\n\nhint: prices are 0 or more", price.0)]
    Resume { price: MicroUsd },
    /// A network that does not exist is said to hold the image, or to be open.
    #[error(
        "network {network} holds the image, and there are {networks}\n\nhint: number networks from 0 to {networks} - 1"
    )]
    Holder { network: u32, networks: usize },
    /// A change to a prefix that does not exist.
    #[error("demand of prefix {prefix}, and there are {prefixes}\n\nhint: number prefixes from 0 to {prefixes} - 1")]
    Prefix { prefix: u32, prefixes: usize },
    /// More money than there is.
    #[error("an hour of it could cost more than 4.6 million dollars\n\nhint: check demand, and the price of a second")]
    TooDear,
}

/// One service's problem over a graph: demand and prices, row by row.
pub(crate) struct Problem<'g> {
    graph: &'g Graph,
    /// For each row, what a microsecond of latency costs; 0 where nobody asks.
    price: Vec<u64>,
    /// For each network, what opening it costs.
    fixed: Vec<u64>,
    /// What the way to the nearest candidate costs, for all prefixes: no placement can save it.
    base: u64,
}

impl<'g> Problem<'g> {
    /// # Errors
    /// Lists of the wrong length, negative prices, or sums beyond [`DEAREST`].
    pub(crate) fn new(graph: &'g Graph, demand: &Demand, prices: &Prices) -> Result<Problem<'g>, Wrong> {
        let (prefixes, networks) = (graph.prefixes(), graph.networks() as usize);
        if demand.weights.len() != prefixes {
            return Err(Wrong::Length { what: "weights", have: demand.weights.len(), want: prefixes });
        }
        if prices.open.len() != networks {
            return Err(Wrong::Length { what: "opening prices", have: prices.open.len(), want: networks });
        }
        let second = prices.latency_second;
        let second = u64::try_from(second.0).map_err(|_| Wrong::Second { price: second })?;
        let (mut most, mut base) = (0_u128, 0_u128);
        let mut price = vec![0_u64; graph.rows()];
        for (&weight, &(row, nearest)) in demand.weights.iter().zip(graph.of_prefix()) {
            if let Some(of_row) = price.get_mut(row as usize) {
                let value = u128::from(weight) * u128::from(second);
                if value > DEAREST {
                    return Err(Wrong::TooDear);
                }
                *of_row = of_row.saturating_add(value as u64);
                base += value * u128::from(nearest);
                most += value * u128::from(nearest + 1);
                if most > DEAREST {
                    return Err(Wrong::TooDear);
                }
            }
        }
        for (row, &price) in price.iter().enumerate() {
            most += u128::from(price) * u128::from(graph.farthest(row));
        }
        let mut fixed = Vec::with_capacity(networks);
        for (network, &price) in prices.open.iter().enumerate() {
            let micro = u64::try_from(price.0).map_err(|_| Wrong::Price { network, price })?;
            most += u128::from(micro) * 1_000_000;
            fixed.push(micro.saturating_mul(1_000_000));
        }
        if most > DEAREST {
            return Err(Wrong::TooDear);
        }
        Ok(Problem { graph, price, fixed, base: base as u64 })
    }
}

/// Places one service, and says how far from the best possible that is at most. `warm` is an earlier answer for the same graph to start
/// from; the result's gap then is at most [`WARM_GAP_PPM`] wider than that answer's, or it is at least as good as without
/// it.
///
/// # Errors
/// The demand or the prices do not fit the graph, or make no sense.
pub fn place(graph: &Graph, demand: &Demand, prices: &Prices, warm: Option<&Placed>) -> Result<Placed, Wrong> {
    let problem = Problem::new(graph, demand, prices)?;
    let Some(warm) = warm else { return Ok(cold(&problem)) };
    let again = rewarmed(&problem, warm);
    if again.gap_ppm() <= warm.gap_ppm().saturating_add(WARM_GAP_PPM) {
        return Ok(again);
    }
    let mut best = cold(&problem);
    let bound = best.bound.max(again.bound);
    if again.cost < best.cost {
        best = again;
    }
    Ok(Placed { bound, ..best })
}

/// Places without knowing anything: bids from nothing, then the paid networks less those that are not needed.
fn cold(problem: &Problem) -> Placed {
    let mut dual = Dual::new(problem);
    dual.ascend();
    let mut primal = Primal::new(problem, dual.paid().to_vec());
    primal.thin();
    finish(problem, dual, primal)
}

/// Places from an earlier answer: its networks, and its bids as far as nothing is overpaid by them now.
fn rewarmed(problem: &Problem, warm: &Placed) -> Placed {
    let mut dual = Dual::new(problem);
    dual.resume(&warm.levels);
    let mut open = marked(problem, warm);
    primal::cover(problem, &mut open);
    let primal = Primal::new(problem, open);
    finish(problem, dual, primal)
}

fn finish(problem: &Problem, mut dual: Dual, mut primal: Primal) -> Placed {
    primal.polish(ROUNDS);
    dual.guided(&primal);
    answer(problem, dual, &primal)
}

fn answer(problem: &Problem, dual: Dual, primal: &Primal) -> Placed {
    let (open, serves) = (primal.opened(), primal.serves());
    let cost = Pico(primal.cost() + problem.base);
    let (bound, levels) = dual.best();
    Placed { open, serves, cost, bound: Pico(bound + problem.base), levels }
}

/// The open networks of an earlier answer, as far as they exist.
fn marked(problem: &Problem, placed: &Placed) -> Vec<bool> {
    let mut open = vec![false; problem.fixed.len()];
    for &network in &placed.open {
        if let Some(open) = open.get_mut(network as usize) {
            *open = true;
        }
    }
    open
}

/// Narrows the gap of a placement from both sides, for several times what [`place`] takes: better bids, and another look
/// at the networks which they pay.
///
/// # Errors
/// The demand or the prices do not fit the graph, or make no sense.
pub fn tighten(graph: &Graph, demand: &Demand, prices: &Prices, placed: &Placed) -> Result<Placed, Wrong> {
    let problem = Problem::new(graph, demand, prices)?;
    let mut dual = Dual::new(&problem);
    dual.resume(&placed.levels);
    let mut open = marked(&problem, placed);
    primal::cover(&problem, &mut open);
    let mut primal = Primal::new(&problem, open.clone());
    let core = open.iter().zip(dual.paid()).map(|(&o, &p)| o || p).collect();
    let found = volume::search(&problem, dual.levels(), core, primal.cost());
    dual.restart();
    dual.resume(&found.levels);
    open.iter_mut().zip(&found.worthy).for_each(|(o, &w)| *o |= w);
    let mut other = Primal::new(&problem, open);
    other.thin();
    other.polish(ROUNDS);
    if other.cost() < primal.cost() {
        primal = other;
    }
    dual.guided(&primal);
    Ok(answer(&problem, dual, &primal))
}

/// What any bids prove: their sum, less what they pay networks beyond their prices. No placement costs less.
///
/// Bids that are missing count as 0, and those of rows where nobody asks do not count.
///
/// # Errors
/// The demand or the prices do not fit the graph, or make no sense.
pub fn certify(graph: &Graph, demand: &Demand, prices: &Prices, levels: &[u64]) -> Result<Pico, Wrong> {
    let problem = Problem::new(graph, demand, prices)?;
    let mut paid = vec![0_u128; problem.fixed.len()];
    let mut sum = u128::from(problem.base);
    for (row, (&price, &level)) in problem.price.iter().zip(levels).enumerate() {
        sum += u128::from(price) * u128::from(level);
        for edge in graph.row(row).iter().take_while(|e| u64::from(e.latency) < level) {
            if let Some(paid) = paid.get_mut(edge.network as usize) {
                *paid += u128::from(price) * u128::from(level - u64::from(edge.latency));
            }
        }
    }
    let over: u128 = paid.iter().zip(&problem.fixed).map(|(&p, &f)| p.saturating_sub(u128::from(f))).sum();
    // Levels from outside may prove nothing, which is 0.
    Ok(Pico(u64::try_from(sum.saturating_sub(over)).unwrap_or(0)))
}
