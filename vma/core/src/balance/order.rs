//! In which order moves are made: never over a machine's room, each step better than the one before.
//!
//! ```text
//!  wanted machine of each instance ─▶ the move that gains most and fits ─▶ the next …
//!                                     └ none by itself? two that make room for one another, as one step
//! ```
//! What neither way allows stays where it is.

use super::ledger::{Ledger, NOTHING};
use super::search::key;
use super::{ALL, KINDS, Kind, Limits, Move, Step};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// An instance that goes from one machine to another, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hop {
    pub i: u32,
    pub from: u32,
    pub to: u32,
}

/// A step, by number.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    hops: Vec<Hop>,
    before: f64,
    after: f64,
    evens: Option<Kind>,
}

impl Planned {
    /// Makes a step of `hops`, each of which has to fit when its turn comes, if together they gain more than
    /// `gain` each. Otherwise leaves everything as it is.
    pub fn make(ledger: &mut Ledger, hops: Vec<Hop>, gain: f64) -> Option<Planned> {
        let (before, sharing) = (ledger.score(), ledger.sharing());
        let spread: [f64; KINDS] = std::array::from_fn(|k| ledger.spread(k));
        let fit = hops.iter().take_while(|hop| {
            ledger.takes(hop.i, hop.to as usize) && {
                ledger.put(hop.i, hop.to);
                true
            }
        });
        let made = fit.count();
        let after = ledger.score();
        if made < hops.len() || before - after - gain * hops.len() as f64 <= NOTHING / 2.0 {
            hops[..made].iter().rev().for_each(|hop| ledger.put(hop.i, hop.from));
            return None;
        }
        // Ties go to the earlier kind.
        let gains = ALL.into_iter().enumerate().map(|(k, kind)| (spread[k] - ledger.spread(k), Some(kind)));
        let parted = (sharing - ledger.sharing(), None);
        let most = gains.fold(parted, |best, this| if this.0 > best.0 { this } else { best });
        Some(Planned { hops, before, after, evens: most.1 })
    }

    /// How many instances move.
    pub fn len(&self) -> usize {
        self.hops.len()
    }

    /// The step, with names.
    pub fn named(&self, ledger: &Ledger) -> Step {
        let machine = |m: u32| ledger.machines[m as usize].id.clone();
        let instance = |i: u32| ledger.instances[i as usize].id.clone();
        let moves = self.hops.iter();
        let moves = moves.map(|h| Move { instance: instance(h.i), from: machine(h.from), to: machine(h.to) });
        Step { moves: moves.collect(), before: self.before, after: self.after, evens: self.evens }
    }
}

/// Moves instances to where they are wanted, as far as `limits` and room allow. Returns where they are then, and
/// the steps.
pub(super) fn order<'a>(mut ledger: Ledger<'a>, wanted: &[u32], limits: &Limits) -> (Ledger<'a>, Vec<Planned>) {
    let mut plan: Vec<Planned> = Vec::new();
    let mut moves = 0;
    let mut waiting: Vec<u32> = (0..wanted.len() as u32).filter(|i| elsewhere(&ledger, wanted, *i)).collect();
    loop {
        let before = moves;
        let mut heap: BinaryHeap<(i64, Reverse<u32>)> = BinaryHeap::new();
        for i in std::mem::take(&mut waiting) {
            match ledger.gain_of(i, wanted[i as usize] as usize) {
                Some(gain) => heap.push((key(gain), Reverse(i))),
                None => waiting.push(i),
            }
        }
        while let Some((_, Reverse(i))) = heap.pop() {
            let to = wanted[i as usize];
            let Some(gain) = ledger.gain_of(i, to as usize) else {
                waiting.push(i);
                continue;
            };
            let now = (key(gain), Reverse(i));
            if heap.peek().is_some_and(|next| *next > now) {
                heap.push(now);
                continue;
            }
            let hop = Hop { i, from: ledger.items[i as usize].at, to };
            let step = if moves < limits.moves { Planned::make(&mut ledger, vec![hop], limits.gain) } else { None };
            match step {
                Some(step) => {
                    plan.push(step);
                    moves += 1;
                }
                None => waiting.push(i),
            }
        }
        waiting.sort_unstable();
        if moves == before {
            let pair = if moves + 2 <= limits.moves { pair(&mut ledger, wanted, &waiting, limits) } else { None };
            let Some(pair) = pair else { return (ledger, plan) };
            plan.push(pair);
            moves += 2;
            waiting.retain(|i| elsewhere(&ledger, wanted, *i));
        }
    }
}

fn elsewhere(ledger: &Ledger, wanted: &[u32], i: u32) -> bool {
    ledger.items[i as usize].at != wanted[i as usize]
}

/// Two moves that are worth it together: one goes to where the other leaves.
fn pair(ledger: &mut Ledger, wanted: &[u32], waiting: &[u32], limits: &Limits) -> Option<Planned> {
    for &i in waiting {
        let to = wanted[i as usize];
        let leaving: Vec<u32> =
            ledger.spots[to as usize].here.iter().copied().filter(|j| elsewhere(ledger, wanted, *j)).collect();
        for j in leaving {
            let comes = Hop { i, from: ledger.items[i as usize].at, to };
            let goes = Hop { i: j, from: to, to: wanted[j as usize] };
            for hops in [vec![comes, goes], vec![goes, comes]] {
                if let Some(step) = Planned::make(ledger, hops, limits.gain) {
                    return Some(step);
                }
            }
        }
    }
    None
}
