//! Where instances should be: single moves and exchanges of two, the best first, until none is worth its price.
//!
//! ```text
//!  greedy: the machine whose best move gains most, as it was last seen; seen again before it is believed
//!  polish: machine after machine, moves and exchanges, until a look at all of them finds none
//! ```
//! A search of places counts instances that are not where they were: an instance that is moved anyway may be sent
//! elsewhere for nothing, and one that goes back home gives its price back. A search of steps counts each move, and
//! each of its steps can be made in the order in which it was found.
//!
//! Up to [`ALL_PAIRS`] machines every pair is looked at. Beyond, each machine is looked at together with the
//! [`WINDOW`] machines that lie furthest on the other side of the mean, in each kind and altogether.

use super::ledger::{Ledger, NOTHING};
use super::order::{Hop, Planned};
use super::{KINDS, Limits};
use std::collections::{BTreeSet, BinaryHeap};

/// With so many machines, looking at every pair takes under a millisecond or two.
const ALL_PAIRS: usize = 128;
/// Five windows of so many machines make about as many pairs as there are instances on a machine times four.
const WINDOW: usize = 8;
/// Steps of one machine in a row; the others have their turn then.
const IN_A_ROW: usize = 4;
/// Looks at all machines. Each but the last improves the score by at least [`NOTHING`]; a handful is usual.
const LOOKS_MAX: usize = 1000;
/// How many moves are searched beyond a limit at most; to take one back is to look at all that moved.
const BEYOND_MAX: usize = 64;
/// What a change has to gain that makes no more instances move than before, as a part of the price of one that does:
/// what moves anyway could be sorted ever finer for nothing, and the search would go on for ever smaller gains.
const FREE: f64 = 0.5;

/// A change of who is where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Move {
        i: u32,
        to: u32,
    },
    /// `i` and `j` change places.
    Exchange {
        i: u32,
        j: u32,
    },
}

/// What a change is worth: its gain less its price.
type Worth = f64;

/// What a machine loses at least by one more: per unit of each kind, and however little it needs.
type Rise = ([f64; KINDS], f64);

/// Room to write in, kept from one look to the next.
#[derive(Debug, Default)]
struct Scratch {
    partners: Vec<u32>,
    rises: Vec<Rise>,
    least: Vec<f64>,
}

#[derive(Debug, Clone)]
pub(super) struct Search<'a> {
    ledger: Ledger<'a>,
    /// Where each instance was; empty when each move counts.
    home: Vec<u32>,
    /// Moves that count so far, and how many may.
    spent: usize,
    cap: usize,
    limits: Limits,
    extremes: Option<Extremes>,
    /// Steps made, when each move counts.
    plan: Vec<Planned>,
}

impl<'a> Search<'a> {
    /// A search for where instances should be in the end.
    pub fn of_places(ledger: Ledger<'a>, limits: &Limits) -> Search<'a> {
        let home = ledger.items.iter().map(|item| item.at).collect();
        Search { home, ..Search::of_steps(ledger, limits) }
    }

    /// A search for steps that can be made one after the other.
    pub fn of_steps(ledger: Ledger<'a>, limits: &Limits) -> Search<'a> {
        let extremes = (ledger.spots.len() > ALL_PAIRS).then(|| Extremes::new(&ledger));
        let (home, plan) = (Vec::new(), Vec::new());
        Search { ledger, home, spent: 0, cap: limits.moves, limits: *limits, extremes, plan }
    }

    /// Searches, and returns where each instance should be.
    ///
    /// Where the moves are limited it searches twice: within the limit, and beyond it, to take back what is missed
    /// least. The first moves of a short list are chosen better knowing the later ones; those of a long one are not.
    pub fn run(mut self) -> Vec<u32> {
        let beyond = self.clone();
        if self.cap > 0 {
            self.greedy();
            self.polish();
        }
        // Once more only if the limit was what ended it.
        if self.cap > 0 && self.spent >= self.cap {
            let other = beyond.beyond();
            if other.spent <= other.cap && other.ledger.score() < self.ledger.score() {
                self = other;
            }
        }
        self.ledger.items.iter().map(|item| item.at).collect()
    }

    fn beyond(mut self) -> Search<'a> {
        self.cap = self.cap.saturating_add((self.cap / 4).min(BEYOND_MAX));
        self.greedy();
        self.polish();
        self.cap = self.limits.moves;
        self.take_back();
        self.polish();
        self
    }

    /// Takes back what is missed least, until no more have moved than may.
    fn take_back(&mut self) {
        while self.spent > self.cap {
            let away = (0..self.home.len()).filter(|i| self.ledger.items[*i].at != self.home[*i]);
            let back = away.filter_map(|i| Some((self.ledger.gain_of(i as u32, self.home[i] as usize)?, i)));
            let best = back.fold(None, |best: Option<(Worth, usize)>, this| match best {
                Some(b) if b.0 >= this.0 => Some(b),
                _ => Some(this),
            });
            let Some((_, i)) = best else { return };
            let (from, to) = (self.ledger.items[i].at, self.home[i]);
            self.ledger.put(i as u32, to);
            self.spent -= 1;
            self.moved([from, to]);
        }
    }

    /// Where everything is now, and the steps there.
    pub fn into_plan(self) -> (Ledger<'a>, Vec<Planned>) {
        (self.ledger, self.plan)
    }

    /// Moves only: the machine with the best one first.
    fn greedy(&mut self) {
        let mut heap = BinaryHeap::new();
        let mut scratch = Scratch::default();
        for m in 0..self.ledger.spots.len() {
            if let Some((worth, _)) = self.best(m, false, &mut scratch) {
                heap.push((key(worth), std::cmp::Reverse(m)));
            }
        }
        while let Some((_, m)) = heap.pop() {
            let Some((worth, change)) = self.best(m.0, false, &mut scratch) else { continue };
            let now = (key(worth), m);
            if heap.peek().is_some_and(|next| *next > now) || self.make(change) {
                heap.push(now);
            }
        }
    }

    /// Moves and exchanges of each machine in turn, until none is worth it.
    pub fn polish(&mut self) {
        let all: Vec<u32> = (0..self.ledger.spots.len() as u32).collect();
        let (mut queue, mut scratch) = (all.clone(), Scratch::default());
        for _ in 0..LOOKS_MAX {
            if let Some(extremes) = &mut self.extremes {
                *extremes = Extremes::new(&self.ledger);
            }
            let whole = queue.len() == all.len();
            let mut touched = BTreeSet::new();
            self.worst_first(&mut queue);
            for m in &queue {
                for _ in 0..IN_A_ROW {
                    let Some((_, change)) = self.best(*m as usize, true, &mut scratch) else { break };
                    let places = self.places(change);
                    if !self.make(change) {
                        break;
                    }
                    touched.extend(places);
                }
            }
            if touched.is_empty() && whole {
                return;
            }
            queue = if touched.is_empty() { all.clone() } else { touched.into_iter().collect() };
        }
    }

    fn worst_first(&self, machines: &mut [u32]) {
        let ledger = &self.ledger;
        let far = |m: u32| (0..KINDS).map(|k| ledger.slope[k] * ledger.above(m as usize, k).abs()).sum::<f64>();
        machines.sort_by_cached_key(|m| (std::cmp::Reverse(key(far(*m))), *m));
    }

    /// The best change of a machine that is worth something. Ties go to lower numbers.
    fn best(&self, a: usize, exchanges: bool, scratch: &mut Scratch) -> Option<(Worth, Change)> {
        let windows = self.extremes.is_some();
        let Scratch { partners, rises, least } = scratch;
        match &self.extremes {
            Some(extremes) => extremes.partners(a, &self.ledger, partners),
            None => {
                partners.clear();
                partners.extend((0..self.ledger.spots.len() as u32).filter(|b| *b as usize != a));
            }
        }
        rises.clear();
        rises.extend(partners.iter().map(|b| self.ledger.rise(*b as usize)));
        let mut best = None;
        self.best_move(a, partners, rises, &mut best);
        if exchanges {
            let onto_a = [self.ledger.rise(a)];
            for b in partners.iter().map(|b| *b as usize) {
                if windows {
                    self.best_move(b, &[a as u32], &onto_a, &mut best);
                }
                self.best_exchange(a, b, least, &mut best);
            }
        }
        best
    }

    fn best_move(&self, a: usize, to: &[u32], rises: &[Rise], best: &mut Option<(Worth, Change)>) {
        let (ledger, none) = (&self.ledger, [0.0; KINDS]);
        let on_a = ledger.spots[a].here.len();
        for &i in &ledger.spots[a].here {
            let needs = &ledger.items[i as usize].needs;
            let parting = ledger.parting(i);
            let da = ledger.shift(a, &none, needs, on_a - 1);
            // Nobody's price is less than that of one who goes home.
            let promise = ledger.promise(a, &da) + parting + self.limits.gain;
            for (&b, (rise, alone)) in to.iter().zip(rises) {
                let floor = best.map_or(NOTHING, |(worth, _)| worth);
                let loss = rise[0] * needs[0] + rise[1] * needs[1] + rise[2] * needs[2] + rise[3] * needs[3] + alone;
                if promise - loss <= floor {
                    continue;
                }
                let cost = self.cost(i, b);
                let paid = self.price(cost);
                if promise - loss - self.limits.gain - paid <= floor || !self.may(cost) {
                    continue;
                }
                let db = ledger.shift(b as usize, needs, &none, ledger.spots[b as usize].here.len() + 1);
                let worth = ledger.gain(a, &da, b as usize, &db) + parting - paid;
                if worth > floor && ledger.takes(i, b as usize) {
                    *best = Some((worth, Change::Move { i, to: b }));
                }
            }
        }
    }

    fn best_exchange(&self, a: usize, b: usize, least: &mut Vec<f64>, best: &mut Option<(Worth, Change)>) {
        let ledger = &self.ledger;
        let (here, there) = (&ledger.spots[a].here, &ledger.spots[b].here);
        // What a unit of each kind gains, at most, that goes from a to b.
        let (from, to) = (ledger.relief(a), ledger.relief(b));
        let slope: [f64; KINDS] = std::array::from_fn(|k| from[k] - to[k]);
        let along = |i: u32| {
            let needs = &ledger.items[i as usize].needs;
            (0..KINDS).map(|k| slope[k] * needs[k]).sum::<f64>()
        };
        let floor = |best: &Option<(Worth, Change)>| best.map_or(NOTHING, |(worth, _)| worth);
        least.clear();
        least.extend(there.iter().map(|j| along(*j) - ledger.parting(*j)));
        // Two that go home at once give back as much as two prices.
        let low = least.iter().fold(f64::INFINITY, |low, l| low.min(*l)) - self.limits.gain * 2.0;
        for &i in here {
            let high = along(i) + ledger.parting(i);
            if high - low <= floor(best) {
                continue;
            }
            let cost_i = self.cost(i, b as u32);
            for (&j, least) in there.iter().zip(&*least) {
                let cost = cost_i + self.cost(j, a as u32);
                let paid = self.price(cost);
                if high - least - paid <= floor(best) || !self.may(cost) {
                    continue;
                }
                if let Some(gain) = self.judge_exchange(i, j)
                    && gain - paid > floor(best)
                {
                    *best = Some((gain - paid, Change::Exchange { i, j }));
                }
            }
        }
    }

    /// What changing places gains, if it can be done: one of the two has to fit beside the other for a while.
    fn judge_exchange(&self, i: u32, j: u32) -> Option<f64> {
        let ledger = &self.ledger;
        let (x, y) = (&ledger.items[i as usize], &ledger.items[j as usize]);
        let (a, b) = (x.at as usize, y.at as usize);
        let (on_a, on_b) = (ledger.spots[a].here.len(), ledger.spots[b].here.len());
        let both = ledger.fits(a, &y.needs, &x.needs, on_a) && ledger.fits(b, &x.needs, &y.needs, on_b);
        let first = ledger.takes_beside(i, b) || ledger.takes_beside(j, a);
        if !both || !first || ledger.alike(i, j) || ledger.meets(i, b, j) || ledger.meets(j, a, i) {
            return None;
        }
        let da = ledger.shift(a, &y.needs, &x.needs, on_a);
        let db = ledger.shift(b, &x.needs, &y.needs, on_b);
        Some(ledger.gain(a, &da, b, &db) + ledger.parting(i) + ledger.parting(j))
    }

    /// How many more moves there are when an instance goes to a machine.
    fn cost(&self, i: u32, to: u32) -> i32 {
        match self.home.get(i as usize) {
            Some(home) => i32::from(to != *home) - i32::from(self.ledger.items[i as usize].at != *home),
            None => 1,
        }
    }

    /// What a change has to gain. Less than what the same change would cost if all of its moves counted.
    fn price(&self, cost: i32) -> f64 {
        self.limits.gain * if cost > 0 { f64::from(cost) } else { f64::from(cost) + FREE }
    }

    fn may(&self, cost: i32) -> bool {
        cost <= 0 || self.spent.saturating_add(cost.unsigned_abs() as usize) <= self.cap
    }

    /// The machines of a change.
    fn places(&self, change: Change) -> [u32; 2] {
        let at = |i: u32| self.ledger.items[i as usize].at;
        match change {
            Change::Move { i, to } => [at(i), to],
            Change::Exchange { i, j } => [at(i), at(j)],
        }
    }

    /// Makes a change, unless it turns out to gain nothing once it is reckoned exactly.
    fn make(&mut self, change: Change) -> bool {
        let [a, b] = self.places(change);
        let hops = match change {
            Change::Move { i, .. } => vec![Hop { i, from: a, to: b }],
            Change::Exchange { i, j } => {
                let (there, back) = (Hop { i, from: a, to: b }, Hop { i: j, from: b, to: a });
                if self.ledger.takes_beside(i, b as usize) { vec![there, back] } else { vec![back, there] }
            }
        };
        let cost = hops.iter().map(|h| self.cost(h.i, h.to)).sum::<i32>();
        // The price is for what moves in the end, which in a search of places may be less than what moves here.
        let each = self.price(cost) / hops.len() as f64;
        let Some(step) = Planned::make(&mut self.ledger, hops, each) else { return false };
        self.spent = self.spent.saturating_add_signed(cost as isize);
        self.moved([a, b]);
        if self.home.is_empty() {
            self.plan.push(step);
        }
        true
    }

    /// Tells the orders that machines changed.
    fn moved(&mut self, machines: [u32; 2]) {
        if let Some(extremes) = &mut self.extremes {
            machines.iter().for_each(|m| extremes.update(&self.ledger, *m));
        }
    }
}

/// Worth as a whole number, to order by: a double has no order.
pub(super) fn key(worth: Worth) -> i64 {
    (worth * (1_u64 << 40) as f64) as i64
}

/// Machines in order of how far they are from the mean: of each kind, and of all by what they weigh.
#[derive(Debug, Clone)]
struct Extremes {
    orders: Vec<BTreeSet<(i64, u32)>>,
    keys: Vec<[i64; KINDS + 1]>,
    /// What a level of each kind counted when the order was made.
    mix: [f64; KINDS],
    /// Kinds that are in use.
    kinds: Vec<usize>,
}

impl Extremes {
    fn new(ledger: &Ledger) -> Extremes {
        let kinds = (0..KINDS).filter(|k| ledger.counts(*k)).collect();
        let mut extremes =
            Extremes { orders: vec![BTreeSet::new(); KINDS + 1], keys: Vec::new(), mix: ledger.slope, kinds };
        extremes.keys = (0..ledger.spots.len()).map(|m| extremes.key(ledger, m)).collect();
        for k in 0..=KINDS {
            extremes.orders[k] = extremes.keys.iter().enumerate().map(|(m, keys)| (keys[k], m as u32)).collect();
        }
        extremes
    }

    fn key(&self, ledger: &Ledger, m: usize) -> [i64; KINDS + 1] {
        std::array::from_fn(|k| match k {
            KINDS => key((0..KINDS).map(|k| self.mix[k] * ledger.above(m, k)).sum::<f64>()),
            _ => ledger.exact(m, k),
        })
    }

    fn update(&mut self, ledger: &Ledger, m: u32) {
        let (old, new) = (self.keys[m as usize], self.key(ledger, m as usize));
        for k in self.kinds.iter().copied().chain([KINDS]) {
            if old[k] != new[k] {
                self.orders[k].remove(&(old[k], m));
                self.orders[k].insert((new[k], m));
            }
        }
        self.keys[m as usize] = new;
    }

    /// The machines that lie furthest on the other side of the mean, ascending.
    fn partners(&self, a: usize, ledger: &Ledger, out: &mut Vec<u32>) {
        out.clear();
        for k in self.kinds.iter().copied().chain([KINDS]) {
            let above = if k == KINDS { self.keys[a][k] > 0 } else { ledger.above(a, k) > 0.0 };
            let order = &self.orders[k];
            if above {
                out.extend(order.iter().take(WINDOW).map(|(_, m)| *m));
            } else {
                out.extend(order.iter().rev().take(WINDOW).map(|(_, m)| *m));
            }
        }
        out.sort_unstable();
        out.dedup();
        out.retain(|m| *m as usize != a);
    }
}
