//! The placement itself: which networks are open, and moves that make it cheaper.
//!
//! ```text
//!  paid networks ──thin──▶ none can be closed at a profit ──polish──▶ nor opened, nor swapped for another
//!
//!  row:  ── first ──── second ──     opening k pays   gain[k] = Σ price · (first − k)⁺   − its price
//!                                    closing i pays   its price − loss[i],  loss[i] = Σ of rows first at i, price · (second − first)
//! ```
//!
//! # Invariants
//! 1. Every row with demand has an open candidate; `first` and `second` are its nearest two.
//! 2. `loss`, `alone` and (once counted) `gain` are exact after every move: a move looks only at the rows of its network.
//! 3. A move is only made if the price falls, so the search ends.

use super::{NOWHERE, Problem};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The two nearest open candidates of a row.
#[derive(Debug, Clone, Copy)]
struct Nearest {
    first: u32,
    near: u32,
    /// [`NOWHERE`] if only one is open; `next` is then the latency of the farthest candidate, open or not.
    second: u32,
    next: u32,
}

pub(super) struct Primal<'p> {
    problem: &'p Problem<'p>,
    open: Vec<bool>,
    nearest: Vec<Nearest>,
    /// For each open network, what its rows would pay more at their second.
    loss: Vec<u64>,
    /// For each open network, rows that have no second.
    alone: Vec<u32>,
    /// For each network, what rows would pay less there than at their first; empty until counted.
    gain: Vec<u64>,
    /// Networks whose closing or opening may have begun to pay.
    doubtful: Vec<u32>,
    wanted: Vec<u32>,
    /// Networks some row of which has moved since a swap was last looked for.
    moved: Vec<bool>,
}

impl<'p> Primal<'p> {
    /// Begins with these networks open: every row with demand must have a candidate among them (see [`cover`]).
    pub(super) fn new(problem: &'p Problem<'p>, open: Vec<bool>) -> Primal<'p> {
        let (rows, networks) = (problem.price.len(), problem.fixed.len());
        let mut primal = Primal {
            problem,
            open,
            nearest: vec![Nearest { first: NOWHERE, near: 0, second: NOWHERE, next: 0 }; rows],
            loss: vec![0; networks],
            alone: vec![0; networks],
            gain: Vec::new(),
            doubtful: Vec::new(),
            wanted: Vec::new(),
            moved: vec![true; networks],
        };
        for row in 0..rows {
            let price = problem.price[row];
            if price == 0 {
                continue;
            }
            let edges = problem.graph.row(row);
            let mut found = edges.iter().filter(|e| primal.open[e.network as usize]);
            let (first, second) = (found.next(), found.next());
            let Some(first) = first else { continue };
            let next = second.map_or(edges[edges.len() - 1].latency, |e| e.latency);
            let second = second.map_or(NOWHERE, |e| e.network);
            primal.nearest[row] = Nearest { first: first.network, near: first.latency, second, next };
            primal.loss[first.network as usize] += price * u64::from(next - first.latency);
            primal.alone[first.network as usize] += u32::from(second == NOWHERE);
        }
        primal
    }

    /// Closes networks while that pays, the one that pays most first.
    pub(super) fn thin(&mut self) {
        // What closing pays only falls as others close, so an old figure is an upper bound: the lazy heap is exact.
        let mut heap: BinaryHeap<(u64, Reverse<u32>)> =
            (0..self.open.len() as u32).filter_map(|i| self.saving(i as usize).map(|s| (s, Reverse(i)))).collect();
        while let Some((promised, Reverse(network))) = heap.pop() {
            match self.saving(network as usize) {
                Some(saving) if saving == promised => self.close(network as usize),
                Some(saving) => heap.push((saving, Reverse(network))),
                None => {}
            }
        }
        self.doubtful.clear();
    }

    /// Makes moves that pay: openings, each followed by the closings it makes possible, then swaps, in rounds.
    pub(super) fn polish(&mut self, rounds: usize) {
        self.count_gains();
        let mut best: Vec<(u64, Reverse<u32>)> =
            (0..self.open.len() as u32).filter_map(|k| self.worth(k as usize).map(|w| (w, Reverse(k)))).collect();
        best.sort_unstable();
        self.wanted.extend(best.iter().map(|&(_, Reverse(k))| k));
        self.doubtful = (0..self.open.len() as u32).filter(|&i| self.saving(i as usize).is_some()).collect();
        self.settle();
        let mut swap = Swap { extra: vec![0; self.open.len()], covers: vec![0; self.open.len()], touched: Vec::new() };
        for _ in 0..rounds {
            let mut any = false;
            for network in 0..self.open.len() {
                if self.open[network] && std::mem::take(&mut self.moved[network]) {
                    any |= self.swap(network, &mut swap);
                }
            }
            if !any {
                break;
            }
        }
    }

    /// What closing an open network pays, if it does and nobody depends on it.
    fn saving(&self, network: usize) -> Option<u64> {
        let pays = self.open[network] && self.alone[network] == 0 && self.problem.fixed[network] > self.loss[network];
        pays.then(|| self.problem.fixed[network] - self.loss[network])
    }

    /// What opening a closed network pays, if it does.
    fn worth(&self, network: usize) -> Option<u64> {
        let pays = !self.open[network] && self.gain[network] > self.problem.fixed[network];
        pays.then(|| self.gain[network] - self.problem.fixed[network])
    }

    fn count_gains(&mut self) {
        self.gain = vec![0; self.open.len()];
        for (row, nearest) in self.nearest.iter().enumerate() {
            let price = self.problem.price[row];
            if price == 0 {
                continue;
            }
            for edge in self.problem.graph.row(row) {
                if edge.latency >= nearest.near {
                    break;
                }
                self.gain[edge.network as usize] += price * u64::from(nearest.near - edge.latency);
            }
        }
    }

    /// Closes and opens what may have begun to pay, until nothing does.
    fn settle(&mut self) {
        loop {
            if let Some(network) = self.doubtful.pop() {
                if self.saving(network as usize).is_some() {
                    self.close(network as usize);
                }
            } else if let Some(network) = self.wanted.pop() {
                if self.worth(network as usize).is_some() {
                    self.open(network as usize);
                }
            } else {
                return;
            }
        }
    }

    /// A row's first is now at `to`: corrects what its candidates nearer than the farther of the two would gain.
    #[inline]
    fn regain(&mut self, row: usize, from: u32, to: u32) {
        if self.gain.is_empty() {
            return;
        }
        let price = self.problem.price[row];
        for edge in self.problem.graph.row(row) {
            if edge.latency >= from.max(to) {
                break;
            }
            let (before, now) = (from.saturating_sub(edge.latency), to.saturating_sub(edge.latency));
            let gain = &mut self.gain[edge.network as usize];
            *gain = *gain + price * u64::from(now) - price * u64::from(before);
            if now > before && *gain > self.problem.fixed[edge.network as usize] && !self.open[edge.network as usize] {
                self.wanted.push(edge.network);
            }
        }
    }

    fn open(&mut self, network: usize) {
        self.open[network] = true;
        self.moved[network] = true;
        let problem = self.problem;
        for &(row, latency) in problem.graph.back(network) {
            let (row, price) = (row as usize, problem.price[row as usize]);
            if price == 0 {
                continue;
            }
            let old = self.nearest[row];
            let here = (latency, network as u32);
            if here < (old.near, old.first) {
                self.leave(old, price);
                let now = Nearest { first: here.1, near: latency, second: old.first, next: old.near };
                self.nearest[row] = now;
                self.loss[network] += price * u64::from(now.next - now.near);
                self.regain(row, old.near, latency);
            } else if old.second == NOWHERE || here < (old.next, old.second) {
                self.leave(old, price);
                self.loss[old.first as usize] += price * u64::from(latency - old.near);
                self.nearest[row] = Nearest { second: here.1, next: latency, ..old };
            }
        }
    }

    /// Takes a row out of the sums of its first network.
    #[inline]
    fn leave(&mut self, old: Nearest, price: u64) {
        let first = old.first as usize;
        self.loss[first] -= price * u64::from(old.next - old.near);
        self.alone[first] -= u32::from(old.second == NOWHERE);
        self.moved[first] = true;
        if self.alone[first] == 0 && self.loss[first] < self.problem.fixed[first] {
            self.doubtful.push(first as u32);
        }
    }

    fn close(&mut self, network: usize) {
        self.open[network] = false;
        let problem = self.problem;
        for &(row, _) in problem.graph.back(network) {
            let (row, price) = (row as usize, problem.price[row as usize]);
            let old = self.nearest[row];
            if price == 0 || (old.first != network as u32 && old.second != network as u32) {
                continue;
            }
            let edges = problem.graph.row(row);
            let beyond = edges.partition_point(|e| (e.latency, e.network) <= (old.next, old.second));
            let third = edges[beyond..].iter().find(|e| self.open[e.network as usize]);
            let second = third.map_or(NOWHERE, |e| e.network);
            let next = third.map_or(edges[edges.len() - 1].latency, |e| e.latency);
            let was_first = old.first == network as u32;
            let (first, near) = if was_first { (old.second, old.next) } else { (old.first, old.near) };
            if was_first {
                self.loss[first as usize] += price * u64::from(next - near);
                self.regain(row, old.near, near);
            } else {
                self.loss[first as usize] += price * u64::from(next - old.next);
            }
            self.alone[first as usize] += u32::from(second == NOWHERE);
            self.moved[first as usize] = true;
            self.nearest[row] = Nearest { first, near, second, next };
        }
        (self.loss[network], self.alone[network]) = (0, 0);
    }

    /// Swaps an open network for the closed one that pays most, if any does.
    ///
    /// Opening k and closing i pays what either does, and what k saves the rows of i beyond that: price · (second −
    /// max(k, first)). So one look at the rows of i prices every k.
    fn swap(&mut self, network: usize, swap: &mut Swap) -> bool {
        let problem = self.problem;
        for &(row, latency) in problem.graph.back(network) {
            let (row, price) = (row as usize, problem.price[row as usize]);
            let nearest = self.nearest[row];
            if price == 0 || nearest.first != network as u32 {
                continue;
            }
            let only = nearest.second == NOWHERE;
            for edge in problem.graph.row(row) {
                if edge.latency >= nearest.next && !only {
                    break;
                }
                let k = edge.network as usize;
                if swap.extra[k] == 0 && swap.covers[k] == 0 {
                    swap.touched.push(edge.network);
                }
                swap.extra[k] += price * u64::from(nearest.next - edge.latency.max(latency));
                swap.covers[k] += u32::from(only);
            }
        }
        let (need, mut best) = (self.alone[network], None);
        let pay = i128::from(problem.fixed[network]) - i128::from(self.loss[network]);
        for k in swap.touched.drain(..) {
            let (extra, covers) = (&mut swap.extra[k as usize], &mut swap.covers[k as usize]);
            let (extra, covers) = (std::mem::take(extra), std::mem::take(covers));
            if self.open[k as usize] || covers < need {
                continue;
            }
            let gain = i128::from(self.gain[k as usize]) - i128::from(problem.fixed[k as usize]);
            let pays = pay + gain + i128::from(extra);
            if pays > 0 && best.is_none_or(|b| b < (pays, Reverse(k))) {
                best = Some((pays, Reverse(k)));
            }
        }
        let Some((_, Reverse(k))) = best else { return false };
        self.open(k as usize);
        self.close(network);
        self.settle();
        true
    }

    /// The latency beyond which a row would pay two open networks; no limit if it has only one.
    #[inline]
    pub(super) fn second(&self, row: usize) -> u64 {
        let nearest = self.nearest[row];
        if nearest.second == NOWHERE { u64::MAX } else { u64::from(nearest.next) }
    }

    /// The open networks, ascending.
    pub(super) fn opened(&self) -> Vec<u32> {
        (0..self.open.len() as u32).filter(|&i| self.open[i as usize]).collect()
    }

    /// Opening prices, and all ways beyond the nearest candidates.
    pub(super) fn cost(&self) -> u64 {
        let opening: u64 = (0..self.open.len()).filter(|&i| self.open[i]).map(|i| self.problem.fixed[i]).sum();
        let ways = self.nearest.iter().zip(&self.problem.price).map(|(n, p)| p * u64::from(n.near));
        opening + ways.sum::<u64>()
    }

    /// Who serves each prefix: the nearest open candidate, for prefixes without demand too.
    pub(super) fn serves(&self) -> Vec<u32> {
        let graph = self.problem.graph;
        let of_row = |row: u32| match self.nearest.get(row as usize) {
            None => NOWHERE,
            Some(n) if n.first != NOWHERE => n.first,
            Some(_) => {
                let mut edges = graph.row(row as usize).iter();
                edges.find(|e| self.open[e.network as usize]).map_or(NOWHERE, |e| e.network)
            }
        };
        graph.of_prefix().iter().map(|&(row, _)| of_row(row)).collect()
    }
}

/// Opens the nearest candidate of each row with demand that has none open.
pub(super) fn cover(problem: &Problem, open: &mut [bool]) {
    for row in (0..problem.price.len()).filter(|&r| problem.price[r] > 0) {
        let edges = problem.graph.row(row);
        if !edges.iter().any(|e| open[e.network as usize]) {
            open[edges[0].network as usize] = true;
        }
    }
}

/// Room for looking at swaps: per network, what it saves rows of the closing one, and how many of the lonely ones.
struct Swap {
    extra: Vec<u64>,
    covers: Vec<u32>,
    touched: Vec<u32>,
}
