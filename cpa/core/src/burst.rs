//! Tells a flash crowd from noise within seconds, and its end as well.
//!
//! The argument. Requests of many independent clients are Poisson. Whether a region asks at its
//! usual rate u or at R times that is then a test between two Poisson rates, and the fastest test
//! there is for a given rate of false alarms is Page's cumulative sum of the log-likelihood ratio
//! (Lorden 1971, Moustakides 1986): after each second with n requests,
//!
//! ```text
//!   S := max(0, S + n · ln R − (R − 1) · u)          a crowd when S ≥ H · d
//! ```
//!
//! - It needs no window to be chosen: a great crowd fires in a second or two, a small one later.
//! - With R fixed, ln R is a constant, and everything is whole numbers.
//! - R = 4: the sum grows for anything above (R − 1)/ln R = 2.2 times the usual. In the WorldCup98
//!   logs crowds peak at 6.7 times (median). Beside it runs one with R = 3.4, for anything above 1.96 times: what
//!   doubles within ten minutes is seen as it does, also where a thousand requests a second leave chance no part in
//!   it. What grows less or more slowly is the ordinary round's business.
//! - H = 9: the mean time between false alarms is at least e^H seconds = 2.2 h for each region
//!   (Lorden's bound; measured below). A false alarm costs one look at the prices, nothing more,
//!   for a move still has to pay.
//! - u is never taken below [`FLOOR`]: four requests out of silence are not a crowd.
//!
//! What is usual is the median of the last hour ([`crate::burst::hour`]): the climb of a crowd that takes ten minutes,
//! or a dip, is not yet part of it, and a day's curve does not double in the half hour that it lies behind. And
//! requests are not as independent as that: a page brings its pictures, and at a high rate the rate itself wanders by
//! far more than chance. The variance of a slot is therefore learned, and d is how many times the mean it is; all
//! evidence counts a d-th (quasi-Poisson), and a few requests a second and thousands are judged alike.
//!
//! The end is the same test turned round: the crowd's own level c against c/R,
//! `D := max(0, D + (1 − 1/R) · c − n · ln R)`, so a crowd of 4 requests a second that stops is over after
//! about 4 s, and one that only shrinks to what is still a crowd goes on.

pub mod hour;
pub mod strangers;

use crate::forecast::MilliRps;
use hour::Hour;
use serde::{Deserialize, Serialize};
use vmatrix_model::{Span, Time};

/// One test: R, ln R and H, in thousandths.
struct Test {
    ratio: u64,
    ln_ratio: u64,
    alarm: u64,
}

/// For what is suddenly great: the sum grows for anything above 2.2 times the usual.
const SHARP: Test = Test { ratio: 4000, ln_ratio: 1386, alarm: 9_000 };
/// For what doubles: the sum grows for anything above (R − 1)/ln R = 1.96 times the usual, as little below twice as
/// leaves something to add up when it is twice. It waits for an hour's median: the mean of the last minutes climbs with
/// a crowd that takes ten to double, and is not exact enough for the difference to 2.2.
const WIDE: Test = Test { ratio: 3400, ln_ratio: 1224, alarm: 9_000 };
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
/// quiet ──S ≥ H·d──▶ crowd ──D ≥ H·d──▶ quiet
///                      └── CROWD_MAX ──▶ quiet, and the crowd's level is the usual rate from now on
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Watch {
    /// S while quiet, D in a crowd, thousandths.
    sum: u64,
    /// Requests and seconds since the sum last left zero: the best guess of when the crowd began, or ended.
    run: (u64, u64),
    /// The same of the wide test, while quiet.
    wide: u64,
    wide_run: (u64, u64),
    crowd: Option<Crowd>,
    /// End of the last crowd.
    pub calm_since: Option<Time>,
    /// What was usual in the last hour.
    hour: Hour,
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
    /// Judges one whole second with `requests`, ending at `now`. `recent` is the mean rate of the minutes before: what
    /// a slot's variance is measured from, and what is usual as long as an hour's median is not known.
    pub fn second(&mut self, now: Time, requests: u64, recent: MilliRps) -> Change {
        match self.crowd {
            None => self.quiet_second(now, requests, recent),
            Some(crowd) => self.crowd_second(now, requests, crowd),
        }
    }

    fn quiet_second(&mut self, now: Time, requests: u64, recent: MilliRps) -> Change {
        let usual = self.hour.usual().unwrap_or(recent).max(FLOOR);
        let sharp = SHARP.adds(&mut self.sum, &mut self.run, requests, usual);
        let wide = WIDE.adds(&mut self.wide, &mut self.wide_run, requests, usual);
        let variance = self.hour.variance();
        let run = if SHARP.fires(sharp, variance) {
            self.run
        } else if self.hour.usual().is_some() && WIDE.fires(wide, variance) {
            self.wide_run
        } else {
            self.hour.second(requests, recent);
            return Change::None;
        };
        let crowd = Crowd { since: now, level: mean(run), usual };
        self.hour.crowd_second(requests);
        *self = Watch { crowd: Some(crowd), hour: std::mem::take(&mut self.hour), ..Watch::default() };
        Change::Began(crowd)
    }

    fn crowd_second(&mut self, now: Time, requests: u64, mut crowd: Crowd) -> Change {
        self.hour.crowd_second(requests);
        let held = (u128::from(crowd.level) * u128::from(SHARP.ratio - 1000) / u128::from(SHARP.ratio)) as u64;
        self.sum = self.sum.saturating_add(held).saturating_sub(requests.saturating_mul(SHARP.ln_ratio));
        self.run = if self.sum == 0 { (0, 0) } else { (self.run.0.saturating_add(requests), self.run.1 + 1) };
        crowd.level = mean_with(crowd.level, requests);
        let mut over = SHARP.fires(self.sum, self.hour.variance());
        if over && SHARP.fires(SHARP.of(self.run, crowd.usual), self.hour.variance()) {
            // What is left would be noticed as a crowd: it has shrunk to a smaller one.
            crowd.level = mean(self.run);
            (self.sum, self.run, over) = (0, (0, 0), false);
        }
        // At the usual rate it is over, however slowly it faded.
        let faded = crowd.level <= crowd.usual.saturating_add(crowd.usual / 4);
        if over || faded {
            *self = Watch { calm_since: Some(now), hour: std::mem::take(&mut self.hour), ..Watch::default() };
            return Change::Ended;
        }
        if now.since(crowd.since) >= CROWD_MAX {
            self.hour.become_usual(crowd.level);
            *self = Watch { hour: std::mem::take(&mut self.hour), ..Watch::default() };
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

impl Test {
    /// Adds a second to the sum and to the run, which is the seconds since the sum last left zero.
    fn adds(&self, sum: &mut u64, run: &mut (u64, u64), requests: u64, usual: MilliRps) -> u64 {
        let (more, less) = self.evidence((requests, 1), usual);
        *sum = sum.saturating_add(more).saturating_sub(less);
        *run = if *sum == 0 { (0, 0) } else { (run.0.saturating_add(requests), run.1 + 1) };
        *sum
    }

    /// What so many requests in so many seconds say for a crowd and against it, thousandths.
    fn evidence(&self, (requests, seconds): (u64, u64), usual: MilliRps) -> (u64, u64) {
        let less = u128::from(self.ratio - 1000) * u128::from(usual) * u128::from(seconds) / 1000;
        (requests.saturating_mul(self.ln_ratio), u64::try_from(less).unwrap_or(u64::MAX))
    }

    /// The sum of a run alone.
    fn of(&self, run: (u64, u64), usual: MilliRps) -> u64 {
        let (more, less) = self.evidence(run, usual);
        more.saturating_sub(less)
    }

    /// Whether a sum is an alarm where a slot has so many thousandths of Poisson's variance.
    fn fires(&self, sum: u64, variance: u64) -> bool {
        sum >= (self.alarm / 1000).saturating_mul(variance)
    }
}

fn mean((requests, seconds): (u64, u64)) -> MilliRps {
    requests.saturating_mul(1000) / seconds.max(1)
}

/// The crowd's level after one more second.
fn mean_with(level: MilliRps, requests: u64) -> MilliRps {
    let sum = u128::from(level) * u128::from(LEVEL_WEIGHT - 1) + u128::from(requests) * 1000;
    u64::try_from(sum / u128::from(LEVEL_WEIGHT)).unwrap_or(u64::MAX)
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
        /// Nearly normal: the sum of twelve even numbers.
        fn normal(&mut self) -> f64 {
            (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
        }
        fn poisson(&mut self, mean: f64) -> u64 {
            if mean > 50.0 {
                return (mean + mean.sqrt() * self.normal()).max(0.0) as u64;
            }
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
        let mut chance = Chance(seed);
        judge(seconds, |s| chance.poisson(rate(s)))
    }

    /// The same with the requests of each second.
    fn judge(seconds: u64, mut requests: impl FnMut(u64) -> u64) -> Vec<(u64, Change)> {
        let (mut usual, mut watch) = (Usual::default(), Watch::default());
        let (mut slot, mut tainted, mut changes) = (0, false, vec![]);
        for s in 0..seconds {
            let n = requests(s);
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

    fn began(changes: &[(u64, Change)]) -> Vec<u64> {
        changes.iter().filter(|(_, c)| matches!(c, Change::Began(_))).map(|(s, _)| *s).collect()
    }

    const HOUR: u64 = 3600;

    #[test]
    fn pages_with_twenty_pictures_are_a_crowd_less_than_once_in_ten_hours() {
        let mut chance = Chance(5);
        let alarms = began(&judge(50 * HOUR, |_| 20 * chance.poisson(1.0)));
        // The first five minutes have to learn how requests clump.
        let later = alarms.iter().filter(|s| **s > 300).count();
        assert!(later <= 5, "{later} in 50 hours");
        assert!(alarms.len() <= later + 12, "{alarms:?}");
    }

    #[test]
    fn a_day_of_thousands_whose_minutes_wander_by_a_tenth_has_no_crowd() {
        let (mut chance, mut wander) = (Chance(9), 0.0);
        let alarms = began(&judge(48 * HOUR, |s| {
            if s % 60 == 0 {
                wander = 0.95 * wander + 0.31 * chance.normal();
            }
            let day = 1.0 + 0.5 * (s as f64 / (24 * HOUR) as f64 * std::f64::consts::TAU).sin();
            chance.poisson(5_000.0 * day * (1.0 + 0.1 * wander))
        }));
        assert_eq!(alarms, [0_u64; 0]);
    }

    #[test]
    fn what_doubles_in_ten_minutes_is_seen_before_it_has_at_any_height() {
        for height in [50.0, 5_000.0] {
            // From one to two and a half times in a quarter of an hour: twice after ten minutes.
            let onset = 2 * HOUR;
            let rate = |s: u64| height * (1.0 + s.saturating_sub(onset).min(900) as f64 / 600.0);
            let alarms = began(&play(3, onset + 900, rate));
            let mark = onset + 600;
            assert!(matches!(alarms[..], [s, ..] if (mark - 240..mark + 10).contains(&s)), "{alarms:?} at {height}");
        }
    }

    #[test]
    fn the_end_of_an_outage_is_not_a_crowd() {
        let alarms = began(&play(4, 3 * HOUR, |s| if (2 * HOUR..2 * HOUR + 600).contains(&s) { 0.0 } else { 400.0 }));
        assert_eq!(alarms, [0_u64; 0]);
    }

    #[test]
    fn a_crowd_of_thousands_that_shrinks_to_a_smaller_one_goes_on() {
        let rate =
            |s: u64| [1_000.0, 12_000.0, 3_000.0, 1_000.0][(s.saturating_sub(2 * HOUR - 300) / 300).min(3) as usize];
        let changes: Vec<Change> = play(6, 3 * HOUR, rate).into_iter().map(|(_, c)| c).collect();
        assert!(matches!(changes[..], [Change::Began(_), Change::Ended]), "{changes:?}");
    }

    #[test]
    fn a_memory_of_an_earlier_version_is_read() {
        let watch: Watch = serde_json::from_str(r#"{"sum":5,"run":[2,3],"crowd":null,"calm_since":null}"#).unwrap();
        assert_eq!((watch.sum, watch.hour), (5, Hour::default()));
    }
}
