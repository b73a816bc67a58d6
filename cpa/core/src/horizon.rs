//! Where a service should be over the next hours, all networks at once: block-coordinate descent over exact paths.
//!
//! ```text
//!  demand by step, prices ─▶ Problem ─▶ for one network after the other, given all others:
//!        what it would save its clients in each step ─▶ cheapest path of states ─▶ Plan      until none changes
//! ```
//! A plan's price is that of all paths, and of every request at the cheapest network that is active in its step. Each
//! network's path is the best there is while the others stay, so that a sweep never makes a plan dearer, and one in
//! which nothing changed ends it. Pre-push falls out: an image travels in a cheap step before it is needed.
//!
//! How near to the best plan there is this comes is not claimed here but measured against a certified bound.

mod descent;
pub mod dual;
pub mod online;
pub mod outlook;
pub mod path;
pub mod rent;

pub use descent::{Plan, improve, otherwise};
pub use path::{Stage, State};

/// A price per request above which nobody is served: such a network does not reach the cluster.
pub const UNREACHED: u32 = u32::MAX;

/// One service over some steps of time. Networks and client clusters are numbered; money is in 10⁻¹² dollars.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    pub networks: usize,
    pub clusters: usize,
    pub steps: usize,
    /// Price of a request, network by network: `prices[network * clusters + cluster]`.
    pub prices: &'a [u32],
    /// Price of a request that no active network reaches: above what any network asks that does.
    pub unserved: u32,
    /// Requests during each step: `demand[step * clusters + cluster]`.
    pub demand: &'a [u32],
    /// What networks cost: `stages[network * steps + step]`.
    pub stages: &'a [Stage],
    /// What each network has before the first step.
    pub from: &'a [State],
}

impl<'a> Problem<'a> {
    pub(crate) fn prices_of(&self, network: usize) -> &'a [u32] {
        self.prices.get(network * self.clusters..(network + 1) * self.clusters).unwrap_or_default()
    }

    pub(crate) fn demand_in(&self, step: usize) -> &'a [u32] {
        self.demand.get(step * self.clusters..(step + 1) * self.clusters).unwrap_or_default()
    }

    pub(crate) fn stages_of(&self, network: usize) -> &'a [Stage] {
        self.stages.get(network * self.steps..(network + 1) * self.steps).unwrap_or_default()
    }

    pub(crate) fn before(&self, network: usize) -> State {
        self.from.get(network).copied().unwrap_or_default()
    }

    /// What the requests of one step cost if these networks are active.
    pub fn requests(&self, step: usize, active: &[usize]) -> i64 {
        let mut best = vec![self.unserved; self.clusters];
        for network in active {
            for (best, price) in best.iter_mut().zip(self.prices_of(*network)) {
                *best = (*best).min(*price);
            }
        }
        let each = best.iter().zip(self.demand_in(step)).map(|(price, n)| u64::from(*price) * u64::from(*n));
        i64::try_from(each.sum::<u64>()).unwrap_or(i64::MAX)
    }

    /// What a plan costs, counted anew.
    pub fn cost(&self, states: &[State]) -> i64 {
        let none = vec![0; self.steps];
        let paths: i64 = (0..self.networks)
            .map(|n| {
                let path = states.get(n * self.steps..(n + 1) * self.steps).unwrap_or_default();
                path::price(self.before(n), self.stages_of(n), &none, path)
            })
            .sum();
        let requests: i64 = (0..self.steps)
            .map(|step| {
                let active = (0..self.networks).filter(|n| states.get(n * self.steps + step) == Some(&State::Active));
                self.requests(step, &active.collect::<Vec<_>>())
            })
            .sum();
        paths + requests
    }
}

#[cfg(test)]
mod tests;
