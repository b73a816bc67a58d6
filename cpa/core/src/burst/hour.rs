//! What the last hour was like: its median, and how much more than chance a slot varies.
//!
//! ```text
//!  seconds ─┬▶ bins of 2 min ─▶ the last 30 that are older than 6 min ─▶ median: the usual rate
//!           └▶ slots of 10 s ─▶ (requests − expected)² / expected ─▶ slow mean: times Poisson's variance
//! ```
//!
//! A median, because minutes of another crowd or of an outage do not move it. Seconds of a crowd that was noticed are
//! left out. Until there are bins enough, nothing is said, and the mean of minutes that the ordinary round has must do.

use crate::forecast::{MilliRps, SLOT};
use serde::{Deserialize, Serialize};

/// Seconds of a bin: at the lowest rate that is told from silence, 24 requests.
const BIN: u64 = 120;
/// Bins the median is over: an hour. Half of them have to change before what is usual does, and in half an hour a
/// day's curve climbs by less than half.
const REACH: usize = 30;
/// The newest bins, which are not in it: a crowd that takes six minutes and more to double is not yet usual.
const YOUNG: usize = 3;
/// Bins before anything is said: with ten, the median's own noise is a twelfth at the lowest rate.
const ENOUGH: usize = 10 + YOUNG;
/// Slots the variance is a mean over: an hour, as above.
const SLOTS: u64 = 360;
/// Weight of Poisson's variance at first, in slots: enough that one odd slot does not double it.
const POISSON_SLOTS: u64 = 16;
/// One slot counts at most as three standard deviations: a beginning crowd must not excuse itself.
const SLOT_MOST: u64 = 9;
/// Poisson's variance, in thousandths of the mean.
const POISSON: u64 = 1000;

/// The last hour of one region, without its crowds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hour {
    /// Requests of each bin, oldest first; at most [`REACH`] + [`YOUNG`].
    bins: Vec<u64>,
    /// Requests and seconds of the bin and of the slot that are being filled.
    bin: (u64, u64),
    slot: (u64, u64),
    /// Median of the bins that count, once there are enough.
    median: Option<MilliRps>,
    /// A slot's variance in thousandths of its mean, and the slots that it was learned from.
    variance: (u64, u64),
}

impl Default for Hour {
    fn default() -> Hour {
        Hour { bins: vec![], bin: (0, 0), slot: (0, 0), median: None, variance: (POISSON, 0) }
    }
}

impl Hour {
    /// Learns from a second without a crowd, of which `expected` was what the minutes before let expect.
    pub fn second(&mut self, requests: u64, expected: MilliRps) {
        if self.slot_ends(requests) {
            self.vary(expected);
            self.slot = (0, 0);
        }
        self.bin = (self.bin.0.saturating_add(requests), self.bin.1 + 1);
        if self.bin.1 >= BIN {
            self.bins.push(self.bin.0);
            self.bin = (0, 0);
            let surplus = self.bins.len().saturating_sub(REACH + YOUNG);
            self.bins.drain(..surplus);
            self.median = self.middle();
        }
    }

    /// Notes a second in a crowd: one that does not see a slot's end may have been noise, and noise is to be learned.
    pub fn crowd_second(&mut self, requests: u64) {
        self.bin = (0, 0);
        if self.slot_ends(requests) {
            self.slot = (0, 0);
        }
    }

    fn slot_ends(&mut self, requests: u64) -> bool {
        self.slot = (self.slot.0.saturating_add(requests), self.slot.1 + 1);
        self.slot.1 >= SLOT.0 / 1_000_000
    }

    /// Learns how far the full slot is from what was expected.
    fn vary(&mut self, expected: MilliRps) {
        let (requests, seconds) = self.slot;
        let expected = u128::from(expected.max(super::FLOOR)) * u128::from(seconds);
        let off = (u128::from(requests) * 1000).abs_diff(expected);
        let (variance, slots) = self.variance;
        let most = variance.max(POISSON).saturating_mul(SLOT_MOST);
        let seen = u64::try_from(off.saturating_mul(off) / expected.max(1)).unwrap_or(u64::MAX).min(most);
        let weight = (slots + POISSON_SLOTS).min(SLOTS);
        let mean = (u128::from(variance) * u128::from(weight - 1) + u128::from(seen)) / u128::from(weight);
        self.variance = (u64::try_from(mean).unwrap_or(u64::MAX), (slots + 1).min(SLOTS));
    }

    fn middle(&self) -> Option<MilliRps> {
        if self.bins.len() < ENOUGH {
            return None;
        }
        let mut old: Vec<u64> = self.bins.iter().take(self.bins.len() - YOUNG).copied().collect();
        old.sort_unstable();
        old.get(old.len() / 2).map(|requests| requests.saturating_mul(1000) / BIN)
    }

    /// Takes over a rate at once: a crowd that stayed.
    pub fn become_usual(&mut self, rate: MilliRps) {
        (self.bin, self.slot) = ((0, 0), (0, 0));
        self.bins = vec![rate.saturating_mul(BIN) / 1000; ENOUGH];
        self.median = Some(rate);
    }

    /// The usual rate, once it is known.
    pub fn usual(&self) -> Option<MilliRps> {
        self.median
    }

    /// How many times Poisson's variance a slot has, thousandths, at least 1000.
    pub fn variance(&self) -> u64 {
        self.variance.0.max(POISSON)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(seconds: impl Iterator<Item = u64>) -> Hour {
        let mut hour = Hour::default();
        seconds.for_each(|n| hour.second(n, 10_000));
        hour
    }

    #[test]
    fn an_outage_of_ten_minutes_and_a_spike_change_nothing() {
        let steady = |s: u64| {
            if (5_000..5_600).contains(&s) {
                0
            } else if (6_000..6_120).contains(&s) {
                900
            } else {
                10
            }
        };
        assert_eq!(after((0..7200).map(steady)).usual(), Some(10_000));
    }

    #[test]
    fn nothing_is_said_before_there_is_enough_and_six_minutes_are_never_in_it() {
        assert_eq!(after((0..BIN * 13 - 1).map(|_| 10)).usual(), None);
        assert_eq!(after((0..BIN * 13).map(|s| if s < BIN * 10 { 10 } else { 99 })).usual(), Some(10_000));
    }

    #[test]
    fn a_lasting_change_is_usual_within_forty_minutes() {
        let step = |minutes: u64| after((0..3600 + minutes * 60).map(|s| if s < 3600 { 10 } else { 30 }));
        assert_eq!((step(30).usual(), step(40).usual()), (Some(10_000), Some(30_000)));
    }

    #[test]
    fn clumps_are_learned_and_evenness_is_not_rewarded() {
        assert_eq!(after((0..7200).map(|_| 10)).variance(), POISSON);
        // Every other slot twice as much, or nothing: (200 - 100)²/100 is a hundred times Poisson's.
        let clumps = after((0..7200).map(|s| if s / 10 % 2 == 0 { 20 } else { 0 }));
        assert!((90_000..=100_000).contains(&clumps.variance()), "{}", clumps.variance());
    }

    #[test]
    fn a_billion_requests_in_a_second_are_no_overflow() {
        let mut hour = after((0..7200).map(|_| u64::MAX));
        hour.become_usual(u64::MAX);
        assert!(hour.variance() >= POISSON);
    }
}
