//! What each region will ask for next: its usual rate, or in a crowd the crowd's.
//!
//! ```text
//!  seconds ─▶ slots of 10 s ─▶ Usual (a slow mean) ─┐
//!                              Watch::level (a fast mean, only in a crowd) ─┴▶ rate
//! ```
//!
//! A mean over the last 16 slots moves slowly enough that Poisson noise at 0.2 requests a second
//! stays within a fifth of the truth, and fast enough to follow a day's curve. A slot in which a
//! region was in a crowd teaches nothing about what is usual and is left out; a crowd that
//! outlasts [`crate::burst::CROWD_MAX`] has become usual.

use serde::{Deserialize, Serialize};
use vmatrix_model::Span;

/// Requests a second in thousandths: a rate without a float.
pub type MilliRps = u64;

/// Length of a slot.
pub const SLOT: Span = Span::secs(10);
/// Slots the mean reaches back over: 160 s.
const REACH: u64 = 16;
/// What a region is taken to ask for before anything is known: one request in three seconds, with the
/// weight of [`PRIOR_SLOTS`] slots, so that the first few requests of a quiet region are no crowd.
const PRIOR: MilliRps = 330;
const PRIOR_SLOTS: u64 = 2;
/// Slots to see before a crowd can be told from an ordinary start.
pub const SLOTS_BEFORE_JUDGING: u64 = 2;

/// A region's usual demand for a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usual {
    /// Thousandths of the usual rate in thousandths: small steps must not be rounded away.
    micro: u64,
    /// Slots learned from, at most [`REACH`].
    slots: u64,
}

impl Default for Usual {
    fn default() -> Usual {
        Usual { micro: PRIOR * 1000, slots: 0 }
    }
}

impl Usual {
    /// Learns from a slot with so many requests.
    pub fn learn(&mut self, requests: u64) {
        let slot = requests.saturating_mul(1_000_000) / (SLOT.0 / 1_000_000);
        if self.slots == 0 && slot > 4 * PRIOR * 1000 {
            // Far above the prior: the first slot says better than the prior what is usual.
            self.micro = slot;
        } else {
            let weight = (self.slots + 1 + PRIOR_SLOTS).min(REACH);
            self.micro = (self.micro * (weight - 1) + slot) / weight;
        }
        self.slots = (self.slots + 1).min(REACH);
    }

    /// Takes over a rate at once: a crowd that stayed.
    pub fn become_usual(&mut self, rate: MilliRps) {
        self.micro = rate.saturating_mul(1000);
        self.slots = REACH;
    }

    /// The usual rate.
    pub fn rate(&self) -> MilliRps {
        self.micro / 1000
    }

    /// Whether enough was seen to call something unusual.
    pub fn known(&self) -> bool {
        self.slots >= SLOTS_BEFORE_JUDGING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_rate_is_reached_within_three_minutes() {
        let mut u = Usual::default();
        for _ in 0..18 {
            u.learn(20);
        }
        assert!((1700..=2000).contains(&u.rate()), "{}", u.rate());
    }

    #[test]
    fn a_quiet_region_fades_to_nothing() {
        let mut u = Usual::default();
        for _ in 0..100 {
            u.learn(0);
        }
        assert!(u.rate() < 2);
    }

    #[test]
    fn a_busy_first_slot_is_believed() {
        let mut u = Usual::default();
        u.learn(500);
        assert_eq!(u.rate(), 50_000);
    }
}
