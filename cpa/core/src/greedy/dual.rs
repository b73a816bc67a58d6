//! Bids: what each row would pay for being served, and the bound that their sum is.
//!
//! ```text
//!  level (µs beyond the nearest) · price a µs = what a row pays
//!
//!        level ─ ─ ─ ─ ─ ─ ─ ─ ┬ ─ ─ ─ ┬ ─ ─       what a row pays beyond the way to a candidate goes towards
//!                              │       │           opening it; no network is ever paid more than its price
//!    nearest     second ───────┘       │
//!       └──────────────────────────────┘
//! ```
//!
//! # Invariants
//! 1. For every network, the sum over rows of price · (level − latency)⁺, plus its slack, is its price. So the levels
//!    are feasible in the dual of the linear relaxation, and their sum is a lower bound on every placement.
//! 2. A row only rises as far as every candidate within its level has slack for.

use super::Problem;
use super::primal::Primal;

/// No limit: any row meets a network without slack before that.
const UNLIMITED: u64 = u64::MAX;
/// Where the first rise ends, microseconds beyond the nearest: a tenth of a millisecond is the jitter of a short path, so
/// candidates within it are one place.
const FIRST_RISE: u64 = 100;

pub(super) struct Dual<'p> {
    problem: &'p Problem<'p>,
    level: Vec<u64>,
    slack: Vec<u64>,
    /// Networks that stopped a row: they have been paid.
    paid: Vec<bool>,
    value: u64,
    best: (u64, Vec<u64>),
}

impl<'p> Dual<'p> {
    pub(super) fn new(problem: &'p Problem<'p>) -> Dual<'p> {
        Dual {
            problem,
            level: vec![0; problem.price.len()],
            slack: problem.fixed.clone(),
            paid: vec![false; problem.fixed.len()],
            value: 0,
            best: (0, vec![0; problem.price.len()]),
        }
    }

    /// Raises a row towards `cap` as far as the slack of its candidates goes. False if one of them stopped it.
    #[inline]
    fn raise(&mut self, row: usize, cap: u64) -> bool {
        let (price, from) = (self.problem.price[row], self.level[row]);
        if cap <= from {
            return true;
        }
        let edges = self.problem.graph.row(row);
        let (mut top, mut stopped) = (cap, super::NOWHERE);
        for edge in edges {
            let latency = u64::from(edge.latency);
            if latency >= top {
                break;
            }
            let base = latency.max(from);
            let slack = self.slack[edge.network as usize];
            if price.saturating_mul(top - base) > slack {
                top = base + slack / price;
                stopped = edge.network;
                if top <= from {
                    self.paid[stopped as usize] = true;
                    return false;
                }
            }
        }
        for edge in edges {
            let latency = u64::from(edge.latency);
            if latency >= top {
                break;
            }
            self.slack[edge.network as usize] -= price * (top - latency.max(from));
        }
        self.level[row] = top;
        self.value += price * (top - from);
        if stopped == super::NOWHERE {
            return true;
        }
        self.paid[stopped as usize] = true;
        false
    }

    /// Lowers a row to `to`, giving back what it paid beyond.
    #[inline]
    fn lower(&mut self, row: usize, to: u64) {
        let (price, from) = (self.problem.price[row], self.level[row]);
        if to >= from {
            return;
        }
        for edge in self.problem.graph.row(row) {
            let latency = u64::from(edge.latency);
            if latency >= from {
                break;
            }
            self.slack[edge.network as usize] += price * (from - latency.max(to));
        }
        self.level[row] = to;
        self.value -= price * (from - to);
    }

    /// Raises all rows together, in steps that grow fourfold, until each is stopped by a network that is paid.
    ///
    /// Together, so that no row takes what its neighbours could pay; in few
    /// steps, for each is a look at all. Finer steps take longer; how much bound they would add was not measured apart.
    pub(super) fn ascend(&mut self) {
        let mut rising: Vec<u32> =
            (0..self.level.len()).filter(|&r| self.problem.price[r] > 0).map(|r| r as u32).collect();
        let farthest = rising.iter().map(|&r| self.problem.graph.farthest(r as usize)).max().unwrap_or(0);
        let mut cap = FIRST_RISE;
        while !rising.is_empty() {
            rising.retain(|&row| self.raise(row as usize, cap));
            cap = if cap > u64::from(farthest) { UNLIMITED } else { cap * 4 };
        }
        self.keep();
    }

    /// Takes up earlier levels as far as no network is overpaid by them, then rises from there.
    pub(super) fn resume(&mut self, levels: &[u64]) {
        for (row, &level) in levels.iter().enumerate().take(self.level.len()) {
            if self.problem.price[row] > 0 {
                self.raise(row, level);
            }
        }
        self.ascend();
    }

    /// Takes back all bids; the best so far still counts.
    pub(super) fn restart(&mut self) {
        self.level.fill(0);
        self.slack.clone_from(&self.problem.fixed);
        self.paid.fill(false);
        self.value = 0;
    }

    /// Moves the bids towards those that fit a placement: where both are optimal, no row pays two open networks
    /// (complementary slackness). So what rows pay beyond their second nearest open network is given back, those rise
    /// that pay only one, then everybody. Once: a second time finds the same. The best sum counts.
    pub(super) fn guided(&mut self, primal: &Primal) {
        for row in 0..self.level.len() {
            self.lower(row, primal.second(row));
        }
        for row in 0..self.level.len() {
            if self.problem.price[row] > 0 {
                self.raise(row, primal.second(row));
            }
        }
        for row in 0..self.level.len() {
            if self.problem.price[row] > 0 {
                self.raise(row, UNLIMITED);
            }
        }
        self.keep();
    }

    fn keep(&mut self) {
        if self.value > self.best.0 {
            self.best.0 = self.value;
            self.best.1.clone_from(&self.level);
        }
    }

    /// The networks that stopped a row: every row with demand has one among its candidates.
    pub(super) fn paid(&self) -> &[bool] {
        &self.paid
    }

    /// The bids now.
    pub(super) fn levels(&self) -> &[u64] {
        &self.level
    }

    /// The best bound so far, without what no placement can save, and its levels.
    pub(super) fn best(self) -> (u64, Vec<u64>) {
        self.best
    }
}
