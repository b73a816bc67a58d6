//! Rent or buy: what a network would have saved is counted until it has missed the price of coming; what one wastes is
//! counted until it has wasted the price of coming back.
//!
//! ```text
//!  absent, dormant: regret += what it would have saved − what it would have cost     regret ≥ ship + resume ─▶ active
//!  active:           waste += what it cost − what it saved                            waste ≥ resume         ─▶ dormant
//!  dormant:           idle += storage                                                  idle ≥ ship            ─▶ absent
//! ```
//! No forecast: it looks back only. For one network by itself that is never more than twice what knowing the future
//! would cost (Karlin, Manasse, Rudolph, Sleator 1988); for all together it is a rule, kept because it is right where
//! forecasts are wrong.

use super::descent::Served;
use super::{Problem, State};

/// Where it stands.
#[derive(Debug, Clone)]
pub struct Renter {
    states: Vec<State>,
    /// Regret of who is not active, waste of who is.
    counted: Vec<i64>,
    idle: Vec<i64>,
}

impl Renter {
    pub fn new(from: Vec<State>) -> Renter {
        let (counted, idle) = (vec![0; from.len()], vec![0; from.len()]);
        Renter { states: from, counted, idle }
    }

    pub fn states(&self) -> &[State] {
        &self.states
    }

    /// Decides for the epoch that begins by the one that has ended: `ended` is that one, as a problem of one step.
    pub fn decide(&mut self, ended: &Problem) -> &[State] {
        let mut served = Served::of(ended, &self.states);
        let mut saves = [0_i64];
        // One at a time, the most regretted first: each that comes leaves less to be saved by others.
        let mut order: Vec<usize> = (0..ended.networks).collect();
        for network in &order {
            let stage = ended.stages[*network];
            served.saves(ended, *network, &self.states[*network..=*network], &mut saves);
            let gain = saves[0] - stage.active;
            let counted = &mut self.counted[*network];
            *counted = if self.states[*network] == State::Active { *counted - gain } else { *counted + gain }.max(0);
        }
        order.sort_by_key(|n| (std::cmp::Reverse(self.counted[*n]), *n));
        for network in order {
            let stage = ended.stages[network];
            let state = self.states[network];
            served.saves(ended, network, &self.states[network..=network], &mut saves);
            let gain = saves[0] - stage.active;
            if state != State::Active && gain > 0 && self.counted[network] >= stage.change(state, State::Active) {
                self.states[network] = State::Active;
                served.add(ended, network, 0);
                (self.counted[network], self.idle[network]) = (0, 0);
            } else if state == State::Active && gain < 0 && self.counted[network] >= stage.resume {
                if self.states.iter().filter(|s| **s == State::Active).count() == 1 {
                    continue;
                }
                self.states[network] = State::Dormant;
                served.remove(ended, network, 0, &self.states);
                self.counted[network] = 0;
            } else if state == State::Dormant {
                self.idle[network] += stage.dormant;
                if self.idle[network] >= stage.ship {
                    self.states[network] = State::Absent;
                    self.idle[network] = 0;
                }
            }
        }
        &self.states
    }
}
