//! Tells a flash crowd from noise within seconds, and its end as well.
//!
//! The argument. Requests of many independent clients are Poisson. Whether a region asks at its
//! usual rate u or at R times that is then a test between two Poisson rates, and the fastest test
//! there is for a given rate of false alarms is Page's cumulative sum of the log-likelihood ratio
//! (Lorden 1971, Moustakides 1986): after each second with n requests,
//!
//! ```text
//!   S := max(0, S + n · ln R − (R − 1) · u)          a crowd when S ≥ H
//! ```
//!
//! - It needs no window to be chosen: a great crowd fires in a second or two, a small one later.
//! - With R fixed, ln R is a constant, and everything is whole numbers.
//! - R = 4: the sum grows for anything above (R − 1)/ln R = 2.2 times the usual. In the WorldCup98
//!   logs crowds peak at 6.7 times (median), and one in ten doubles within a minute; what grows
//!   more slowly is the ordinary round's business.
//! - H = 9: the mean time between false alarms is at least e^H seconds = 2.2 h for each region
//!   (Lorden's bound; measured below). A false alarm costs one look at the prices, nothing more,
//!   for a move still has to pay.
//! - u is never taken below [`FLOOR`]: four requests out of silence are not a crowd.
//!
//! The end is the same test turned round: the crowd's own level c against c/R,
//! `D := max(0, D + (1 − 1/R) · c − n · ln R)`, so a crowd of 4 requests a second that stops is over after
//! about 4 s, and one that only halves goes on.

use crate::forecast::MilliRps;
use serde::{Deserialize, Serialize};
use vmatrix_model::{Span, Time};

/// R: how many times the usual rate the test is sharpest for.
const RATIO: u64 = 4;
/// ln R in thousandths.
const LN_RATIO: u64 = 1386;
/// H in thousandths.
const ALARM: u64 = 9_000;
/// The level below which rates count as silence: 0.2 requests a second.
const FLOOR: MilliRps = 200;
/// Weight of one second in the crowd's level: a mean over about 8 s. Slower, it would keep pricing the ramp's
/// beginning; faster, it would follow noise and the crowd's own end.
const LEVEL_WEIGHT: u64 = 8;
/// A crowd that stays this long has become usual.
pub const CROWD_MAX: Span = Span::secs(15 * 60);

/// Watches one region's demand for one service.
///
/// ```text
/// quiet ──S ≥ H──▶ crowd ──D ≥ H──▶ quiet
///                    └── CROWD_MAX ──▶ quiet, and the crowd's level is the usual rate from now on
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Watch {
    /// S while quiet, D in a crowd, thousandths.
    sum: u64,
    /// Requests and seconds since S last left zero: the best guess of when the crowd began.
    run: (u64, u64),
    crowd: Option<Crowd>,
    /// End of the last crowd.
    pub calm_since: Option<Time>,
}

/// A crowd that is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crowd {
    /// When it was noticed.
    pub since: Time,
    /// Requests a second now, smoothed.
    pub level: MilliRps,
    /// What was usual before.
    pub usual: MilliRps,
}

/// What a second brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    None,
    Began(Crowd),
    Ended,
    /// It went on so long that its level is usual now.
    Settled(MilliRps),
}

impl Watch {
    /// Judges one whole second with `requests`, ending at `now`, against the `usual` rate.
    pub fn second(&mut self, now: Time, requests: u64, usual: MilliRps) -> Change {
        match self.crowd {
            None => self.quiet_second(now, requests, usual),
            Some(crowd) => self.crowd_second(now, requests, crowd),
        }
    }

    fn quiet_second(&mut self, now: Time, requests: u64, usual: MilliRps) -> Change {
        let usual = usual.max(FLOOR);
        self.sum = (self.sum + requests.saturating_mul(LN_RATIO)).saturating_sub((RATIO - 1) * usual);
        self.run = if self.sum == 0 { (0, 0) } else { (self.run.0 + requests, self.run.1 + 1) };
        if self.sum < ALARM {
            return Change::None;
        }
        let level = self.run.0.saturating_mul(1000) / self.run.1.max(1);
        let crowd = Crowd { since: now, level, usual };
        *self = Watch { crowd: Some(crowd), ..Watch::default() };
        Change::Began(crowd)
    }

    fn crowd_second(&mut self, now: Time, requests: u64, mut crowd: Crowd) -> Change {
        self.sum = (self.sum + crowd.level * (RATIO - 1) / RATIO).saturating_sub(requests.saturating_mul(LN_RATIO));
        crowd.level = (crowd.level * (LEVEL_WEIGHT - 1) + requests.saturating_mul(1000)) / LEVEL_WEIGHT;
        // At the usual rate it is over, however slowly it faded.
        let faded = crowd.level <= crowd.usual + crowd.usual / 4;
        if self.sum >= ALARM || faded {
            *self = Watch { calm_since: Some(now), ..Watch::default() };
            return Change::Ended;
        }
        if now.since(crowd.since) >= CROWD_MAX {
            *self = Watch::default();
            return Change::Settled(crowd.level);
        }
        self.crowd = Some(crowd);
        Change::None
    }

    /// Every time it remembers.
    pub(crate) fn times(&mut self) -> impl Iterator<Item = &mut Time> {
        self.crowd.as_mut().map(|c| &mut c.since).into_iter().chain(&mut self.calm_since)
    }

    /// The crowd that is on, if one is.
    pub fn crowd(&self) -> Option<Crowd> {
        self.crowd
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::Usual;

    /// A small seeded generator (splitmix64) of Poisson counts, by Knuth's product of uniforms.
    struct Chance(u64);
    impl Chance {
        fn uniform(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        }
        fn poisson(&mut self, mean: f64) -> u64 {
            let (limit, mut product, mut n) = ((-mean).exp(), self.uniform(), 0);
            while product > limit {
                product *= self.uniform();
                n += 1;
            }
            n
        }
    }

    /// Plays seconds through the usual rate and the watch, as the CPA does; `rate` by second.
    fn play(seed: u64, seconds: u64, rate: impl Fn(u64) -> f64) -> Vec<(u64, Change)> {
        let (mut chance, mut usual, mut watch) = (Chance(seed), Usual::default(), Watch::default());
        let (mut slot, mut tainted, mut changes) = (0, false, vec![]);
        for s in 0..seconds {
            let n = chance.poisson(rate(s));
            slot += n;
            if usual.known() {
                let change = watch.second(Time((s + 1) * 1_000_000), n, usual.rate());
                if let Change::Settled(level) = change {
                    usual.become_usual(level);
                }
                if change != Change::None {
                    changes.push((s, change));
                }
            }
            tainted |= watch.crowd().is_some();
            if s % 10 == 9 {
                if !tainted {
                    usual.learn(slot);
                }
                (slot, tainted) = (0, watch.crowd().is_some());
            }
        }
        changes
    }

    #[test]
    fn noise_is_a_crowd_less_than_once_an_hour() {
        for rate in [0.2, 0.3, 0.4, 0.5, 2.0] {
            let hours = 100;
            let alarms = play(7, hours * 3600, |_| rate).iter().filter(|(_, c)| matches!(c, Change::Began(_))).count();
            assert!(alarms < hours as usize, "{alarms} false alarms in {hours} hours at {rate} requests a second");
        }
    }

    #[test]
    fn a_crowd_of_four_over_a_fifth_is_seen_within_three_seconds() {
        let onset = 25;
        let mut delays: Vec<u64> = (0..200)
            .map(|seed| {
                let changes = play(seed, 95, |s| if s >= onset { 4.2 } else { 0.2 });
                let first = changes.iter().find(|(s, c)| *s >= onset && matches!(c, Change::Began(_)));
                first.map_or(99, |(s, _)| s - onset + 1)
            })
            .collect();
        delays.sort_unstable();
        assert!(delays[100] <= 3, "median {} s", delays[100]);
        assert!(delays[190] <= 5, "95th percentile {} s", delays[190]);
        assert!(delays[199] <= 8, "slowest {} s", delays[199]);
    }

    #[test]
    fn a_crowd_is_over_within_ten_seconds_of_its_end_and_not_before() {
        let end = 95;
        let mut good = 0;
        for seed in 0..200 {
            let changes = play(seed, 120, |s| if (25..end).contains(&s) { 4.2 } else { 0.2 });
            let ended: Vec<u64> = changes.iter().filter(|(_, c)| *c == Change::Ended).map(|(s, _)| *s).collect();
            good += u32::from(ended.iter().any(|s| (end..end + 10).contains(s)) && ended.iter().all(|s| *s >= end));
        }
        assert!(good >= 195, "{good} of 200");
    }

    #[test]
    fn a_crowd_that_stays_becomes_usual() {
        let changes = play(3, 3600, |s| if s >= 100 { 8.0 } else { 0.2 });
        assert!(matches!(changes[..], [(_, Change::Began(_)), (_, Change::Settled(6000..10_000))]), "{changes:?}");
    }
}
