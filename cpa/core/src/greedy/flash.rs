//! A crowd: demand of some prefixes has jumped, and what can be resumed at once should be.
//!
//! ```text
//!  changed prefixes ─▶ their rows ─▶ candidates that hold the image, dormant: gain = Σ price · (now − there)
//!                                    the greatest first, while it exceeds an hour there and the resume ──▶ opened
//! ```
//!
//! Only rows of changed prefixes are looked at, so that a tick costs what changed and not what there is: others that
//! would gain too are moved by the next replan. Nothing is closed, for a crowd that falls may rise again; the hold and the
//! replan close.
//!
//! # Invariants
//! 1. A tick never raises the price of an hour: each opening saves more than it costs.
//! 2. What opening pays only falls as others open, so that the lazy heap takes the greatest each time.

use super::{Demand, Graph, LATENCY_MAX, NOWHERE, Pico, Placed, Prices, Problem, Wrong};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use vmatrix_model::MicroUsd;

/// What a request is charged that nobody answers: as long as a path may be.
const UNSERVED: u32 = LATENCY_MAX;
/// What all prefixes could gain together, [`Pico`]: below it no sum exceeds 64 bits.
const GAIN_MAX: u128 = 1 << 63;

/// One service between two replans.
#[derive(Debug, Clone)]
pub struct Flash<'g> {
    graph: &'g Graph,
    second: u64,
    demand: Vec<u64>,
    /// For each row, what a microsecond costs.
    price: Vec<u64>,
    /// For each row, how far it was served from at first, µs, at least 1: it only comes nearer.
    reach: Vec<u32>,
    /// The sum over rows of price · reach.
    total: u128,
    /// What the open networks cost, resumes included.
    spent: u64,
    /// For each network, what an hour there and a resume cost.
    opening: Vec<u64>,
    /// Networks that hold the image and are not open.
    dormant: Vec<bool>,
    /// For each row, who serves it and how far beyond its nearest.
    at: Vec<(u32, u32)>,
    /// The tick that last changed each row.
    changed: Vec<u64>,
    tick: u64,
    gain: Vec<u64>,
}

/// What a tick did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ticked {
    /// Networks to resume the service in, the most urgent first.
    pub opened: Vec<u32>,
    /// Placements made: changed prefixes for which it was decided who serves them, the same as before or not.
    pub decided: usize,
}

impl<'g> Flash<'g> {
    /// Begins from a placement. `holders` are the networks that hold the image; `resume` is what waking it costs there,
    /// as the part of it that an hour should bear (a resume that serves for two hours: half).
    ///
    /// # Errors
    /// The demand or the prices do not fit the graph or make no sense, or a holder does not exist.
    pub fn new(
        graph: &'g Graph,
        demand: &Demand,
        prices: &Prices,
        placed: &Placed,
        holders: &[u32],
        resume: MicroUsd,
    ) -> Result<Flash<'g>, Wrong> {
        let Problem { price, fixed, .. } = Problem::new(graph, demand, prices)?;
        let networks = fixed.len();
        let extra = u64::try_from(resume.0).map_err(|_| Wrong::Resume { price: resume })?;
        let marked = |list: &[u32]| -> Result<Vec<bool>, Wrong> {
            let mut marks = vec![false; networks];
            for &network in list {
                *marks.get_mut(network as usize).ok_or(Wrong::Holder { network, networks })? = true;
            }
            Ok(marks)
        };
        let open = marked(&placed.open)?;
        let mut dormant = marked(holders)?;
        dormant.iter_mut().zip(&open).for_each(|(d, &o)| *d &= !o);
        let nearest = |row: usize| {
            let first = graph.row(row).iter().find(|e| open[e.network as usize]);
            first.map_or((NOWHERE, UNSERVED), |e| (e.network, e.latency))
        };
        let at: Vec<(u32, u32)> = (0..graph.rows()).map(nearest).collect();
        let reach: Vec<u32> = at.iter().map(|a| a.1.max(1)).collect();
        let total = price.iter().zip(&reach).map(|(&p, &r)| u128::from(p) * u128::from(r)).sum();
        let flash = Flash {
            graph,
            second: u64::try_from(prices.latency_second.0).unwrap_or(0),
            demand: demand.weights.clone(),
            total,
            spent: fixed.iter().zip(&open).filter(|&(_, &o)| o).map(|(f, _)| f).sum(),
            opening: fixed.iter().map(|f| f.saturating_add(extra.saturating_mul(1_000_000))).collect(),
            dormant,
            at,
            reach,
            changed: vec![0; graph.rows()],
            tick: 0,
            gain: vec![0; networks],
            price,
        };
        if total > GAIN_MAX { Err(Wrong::TooDear) } else { Ok(flash) }
    }

    /// Hears the demand that some prefixes have now, in requests an hour, and opens at most `most` networks.
    ///
    /// # Errors
    /// A prefix that does not exist, or demand beyond all money: then nothing has changed.
    pub fn changed(&mut self, changes: &[(u32, u64)], most: usize) -> Result<Ticked, Wrong> {
        self.check(changes)?;
        self.tick += 1;
        let mut rows = Vec::with_capacity(changes.len());
        for &(prefix, demand) in changes {
            let old = std::mem::replace(&mut self.demand[prefix as usize], demand);
            let (row, _) = self.graph.of_prefix()[prefix as usize];
            if row == NOWHERE {
                continue;
            }
            let (before, now) = (old * self.second, demand * self.second);
            let price = &mut self.price[row as usize];
            *price = *price - before + now;
            let reach = u128::from(self.reach[row as usize]);
            self.total = self.total - u128::from(before) * reach + u128::from(now) * reach;
            if std::mem::replace(&mut self.changed[row as usize], self.tick) != self.tick {
                rows.push(row);
            }
        }
        let mut hopeful = Vec::new();
        for &row in &rows {
            let (price, near) = (self.price[row as usize], self.at[row as usize].1);
            for edge in self.graph.row(row as usize).iter().take_while(|e| e.latency < near && price > 0) {
                let network = edge.network as usize;
                if self.dormant[network] {
                    if self.gain[network] == 0 {
                        hopeful.push(edge.network);
                    }
                    self.gain[network] += price * u64::from(near - edge.latency);
                }
            }
        }
        let opened = self.greedy(&hopeful, most);
        hopeful.iter().for_each(|&network| self.gain[network as usize] = 0);
        Ok(Ticked { opened, decided: changes.len() })
    }

    /// Opens the network that pays most while one does.
    fn greedy(&mut self, hopeful: &[u32], most: usize) -> Vec<u32> {
        let mut opened = Vec::new();
        let pays = |flash: &Flash, network: u32| {
            let (gain, price) = (flash.gain[network as usize], flash.opening[network as usize]);
            (gain > price).then(|| (gain - price, Reverse(network)))
        };
        let mut heap: BinaryHeap<_> = hopeful.iter().filter_map(|&network| pays(self, network)).collect();
        while opened.len() < most
            && let Some(promised) = heap.pop()
        {
            let network = promised.1.0;
            match pays(self, network) {
                Some(now) if now == promised => {
                    self.open(network);
                    opened.push(network);
                }
                Some(now) => heap.push(now),
                None => {}
            }
        }
        opened
    }

    /// Opens a network and moves the changed rows that are nearer to it.
    fn open(&mut self, network: u32) {
        self.spent = self.spent.saturating_add(self.opening[network as usize]);
        self.dormant[network as usize] = false;
        for &(row, latency) in self.graph.back(network as usize) {
            let (price, near) = (self.price[row as usize], self.at[row as usize].1);
            if self.changed[row as usize] != self.tick || latency >= near {
                continue;
            }
            self.at[row as usize] = (network, latency);
            for edge in self.graph.row(row as usize).iter().take_while(|e| e.latency < near) {
                if self.dormant[edge.network as usize] {
                    self.gain[edge.network as usize] -= price * u64::from(near - edge.latency.max(latency));
                }
            }
        }
    }

    fn check(&self, changes: &[(u32, u64)]) -> Result<(), Wrong> {
        let mut total = self.total;
        for &(prefix, demand) in changes {
            let prefixes = self.demand.len();
            let &(row, _) = self.graph.of_prefix().get(prefix as usize).ok_or(Wrong::Prefix { prefix, prefixes })?;
            let reach = self.reach.get(row as usize).map_or(0, |&r| u128::from(r));
            let price = u128::from(demand) * u128::from(self.second);
            if price > GAIN_MAX {
                return Err(Wrong::TooDear);
            }
            total += price * reach;
        }
        if total > GAIN_MAX { Err(Wrong::TooDear) } else { Ok(()) }
    }

    /// The network that serves a prefix now.
    pub fn serves(&self, prefix: u32) -> u32 {
        let row = self.graph.of_prefix().get(prefix as usize).map_or(NOWHERE, |&(row, _)| row);
        self.at.get(row as usize).map_or(NOWHERE, |&(network, _)| network)
    }

    /// The price of an hour as things are: what is open (a resume included where a crowd opened it), and every way.
    pub fn price(&self) -> Pico {
        let way = |(&(row, base), &demand): (&(u32, u32), &u64)| {
            let beyond = self.at.get(row as usize)?.1;
            Some(demand.saturating_mul(self.second).saturating_mul(u64::from(base) + u64::from(beyond)))
        };
        let ways = self.graph.of_prefix().iter().zip(&self.demand).filter_map(way);
        Pico(ways.fold(self.spent, u64::saturating_add))
    }
}
