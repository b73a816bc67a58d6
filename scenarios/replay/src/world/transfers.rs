//! Bytes on their way over one link, which share its rate evenly.
//!
//! ```text
//! begin(name, bytes) ─▶ advance(now) ─▶ arrived(name) grows; next_end says when to look again
//! ```

use std::collections::BTreeMap;
use vmatrix_model::{Bytes, Mbit, Span, Time};

/// The transfers over one direction of one link.
#[derive(Debug, Clone)]
pub struct Transfers {
    rate: Mbit,
    /// Bits that have still to come, in millionths, so that a share of a microsecond's worth is exact enough.
    missing: BTreeMap<String, u128>,
    at: Time,
}

/// Parts of a bit.
const PARTS: u128 = 1_000_000;

impl Transfers {
    pub fn new(rate: Mbit) -> Transfers {
        Transfers { rate, missing: BTreeMap::new(), at: Time(0) }
    }

    /// Begins to carry `bytes`; one that is under way goes on as it is.
    pub fn begin(&mut self, now: Time, name: &str, bytes: Bytes) {
        self.advance(now);
        self.missing.entry(name.to_owned()).or_insert(u128::from(bytes.0) * 8 * PARTS);
    }

    /// Carries on until `now`, which is at most [`Transfers::next_end`], and returns what has arrived whole.
    pub fn advance(&mut self, now: Time) -> Vec<String> {
        let sharing = self.missing.len() as u128;
        let elapsed = u128::from(now.since(self.at).0);
        self.at = now.max(self.at);
        if sharing == 0 {
            return Vec::new();
        }
        // A megabit a second is a bit a microsecond.
        let carried = elapsed * u128::from(self.rate.0) * PARTS / sharing;
        for missing in self.missing.values_mut() {
            *missing = missing.saturating_sub(carried);
        }
        let done: Vec<String> = self.missing.iter().filter(|(_, m)| **m == 0).map(|(n, _)| n.clone()).collect();
        self.missing.retain(|_, m| *m > 0);
        done
    }

    /// Bytes of `name` that have still to come; none if it is not under way.
    pub fn missing(&self, name: &str) -> Option<Bytes> {
        self.missing.get(name).map(|m| Bytes(m.div_ceil(8 * PARTS) as u64))
    }

    /// When the next one ends if none begins before.
    pub fn next_end(&self) -> Option<Time> {
        let least = self.missing.values().min()?;
        let shared = least * self.missing.len() as u128;
        let micros = shared.div_ceil(u128::from(self.rate.0.max(1)) * PARTS);
        Some(self.at + Span(u64::try_from(micros).unwrap_or(u64::MAX)))
    }

    /// Breaks everything off.
    pub fn stop(&mut self) {
        self.missing.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_transfers_halve_each_others_rate() {
        let mut t = Transfers::new(Mbit(8));
        t.begin(Time(0), "a", Bytes(1_000_000));
        assert_eq!(t.next_end(), Some(Time(1_000_000)));
        t.begin(Time(500_000), "b", Bytes(1_000_000));
        assert_eq!(t.next_end(), Some(Time(1_500_000)));
        assert_eq!(t.advance(Time(1_500_000)), ["a"]);
        assert_eq!(t.missing("b"), Some(Bytes(500_000)));
        assert_eq!(t.next_end(), Some(Time(2_000_000)));
        assert_eq!(t.advance(Time(2_000_000)), ["b"]);
        assert_eq!(t.next_end(), None);
    }
}
