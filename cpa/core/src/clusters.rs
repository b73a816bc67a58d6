//! Who asks: client prefixes to regions, and what each region asked for in each of the last seconds.
//!
//! ```text
//!  report of an edge ─▶ region of each /24 ─▶ seconds it covers ─▶ Series per region, per arrival network
//! ```
//!
//! A prefix in no region of the fleet has no place on the map, so it can pull a service nowhere: its
//! requests are counted under `elsewhere`, for load alone. That keeps the table as small as the fleet,
//! whatever addresses a flood invents.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmatrix_model::{NetworkId, RegionId, Time};

/// Seconds a series remembers: three slots, more than any window that is read.
pub const SECONDS: usize = 30;

/// What was asked of one service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    pub regions: BTreeMap<RegionId, Arrivals>,
    /// Clients of no known region.
    pub elsewhere: Series,
}

/// What one region asked for, and where it arrived.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Arrivals {
    pub all: Series,
    pub at: BTreeMap<NetworkId, Series>,
}

/// Requests in each of the last [`SECONDS`] seconds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Series {
    /// The newest second (whole seconds of the CPA's clock).
    newest: u64,
    /// Requests by second modulo [`SECONDS`]; empty until the first request.
    ring: Vec<u64>,
}

/// The second a time lies in.
pub fn second(t: Time) -> u64 {
    t.0 / 1_000_000
}

impl Series {
    /// Counts `requests` in `second`; a second older than the ring is dropped.
    pub fn add(&mut self, second: u64, requests: u64) {
        if requests == 0 {
            return;
        }
        self.ring.resize(SECONDS, 0);
        if second > self.newest {
            let stale = (second - self.newest).min(SECONDS as u64);
            for s in (0..stale).map(|i| second - i) {
                self.ring[(s % SECONDS as u64) as usize] = 0;
            }
            self.newest = second;
        }
        if self.newest - second < SECONDS as u64 {
            self.ring[(second % SECONDS as u64) as usize] += requests;
        }
    }

    /// Requests in one second.
    pub fn at(&self, second: u64) -> u64 {
        let remembered = second <= self.newest && self.newest - second < SECONDS as u64;
        if remembered { self.ring.get((second % SECONDS as u64) as usize).copied().unwrap_or(0) } else { 0 }
    }

    /// Requests in the `length` seconds before `end`.
    pub fn sum(&self, end: u64, length: u64) -> u64 {
        (end.saturating_sub(length)..end).map(|s| self.at(s)).sum()
    }
}

/// Spreads a count over the seconds of the interval it was counted in, as evenly as whole numbers allow.
///
/// A report that was late covers many seconds; put into one, it would look like a crowd.
pub fn spread(end: u64, length: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let length = length.clamp(1, SECONDS as u64);
    (0..length).map(move |i| {
        let share = count * (i + 1) / length - count * i / length;
        ((end + 1 + i).saturating_sub(length), share)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_report_does_not_look_like_a_crowd() {
        let mut s = Series::default();
        for (second, n) in spread(100, 10, 20) {
            s.add(second, n);
        }
        assert_eq!(s.sum(101, 10), 20);
        assert!((91..=100).all(|t| s.at(t) == 2));
    }

    #[test]
    fn a_second_older_than_the_ring_is_forgotten() {
        let mut s = Series::default();
        s.add(5, 7);
        s.add(5 + SECONDS as u64, 1);
        s.add(5, 9);
        assert_eq!(s.at(5), 0);
        assert_eq!(s.sum(6 + SECONDS as u64, SECONDS as u64), 1);
    }
}
