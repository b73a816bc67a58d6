//! What a cluster will ask for in each of the next hours: what it asked at such hours before, at today's level.
//!
//! ```text
//!  hours so far ─▶ profile: same hour of yesterday, of some days, of a week ago, …
//!               ─▶ ratio: the last hour over its profile, of which less and less is left
//!                    └▶ profile · ratio: one expert ─┐
//!                                      other experts ┴▶ mean, by how right each was lately ─▶ forecast
//! ```
//!
//! Which days a day is like, nobody knows beforehand: a shop's Saturday is like the last one, a sudden fame like
//! yesterday, and some services have no hours at all. So there are several simple forecasters, each honest (it uses
//! hours that have passed, and nothing else), and their mean is weighted by what they said of the hours that have
//! come since: after each hour every expert loses credit by the error of what it would have said 1, 2, … 24 hours
//! before, for each of these distances apart, since who is right about the next hour need not be so about tomorrow.
//! Of what the wrong have left, some is shared out again, so that the best of last month does not rule for ever (the
//! variable share of Herbster and Warmuth 1998). An expert that cannot speak yet, as there was no week before, keeps its credit (Freund et al. 1997).
//!
//! The mean is one of logarithms: demand varies by factors, and one expert that sees tenfold must not drown the rest.
//! Logarithms are whole numbers of 2^-16 ([`scale`]), so the same hours give the same forecast everywhere.

mod scale;

use scale::{Lg, ONE, lg, pow2};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

const DAY: u64 = 24;
/// Hours ahead that are learned apart; what is farther away is as the last of them.
const AHEAD: usize = DAY as usize;
/// Hours remembered: an expert asked what it would have said a day ago compares the day before that with a week ago.
const KEPT: usize = 24 * 9 + 1;
/// Most requests of an hour that are believed: a hundred thousand times the busiest services, and far from overflow.
const MOST: u64 = 1 << 50;
/// A ratio is at most sixteen, or a sixteenth: as much as a crowd, or what is left in an outage's hour.
const RATIO_MOST: Lg = 4 * ONE;
/// What an expert says counts as at most four times what the one in the middle says, and as a fourth at least: who
/// sees silence would otherwise silence all.
const FAR: Lg = 2 * ONE;
/// Credit of all experts together for one distance.
const CREDIT: u64 = 1 << 32;
/// What an error costs: one of everything in one hour 2^12 of the credit, one of a tenth the half of it. What an
/// expert says 24 hours ahead is wrong for the same reason 24 times in a row, so there an hour costs a 24th.
const STAKE: Lg = 12 * ONE;
/// An error of everything gives this part of the credit that is left to all, and a smaller one less: who is not wrong
/// keeps what he has, so that a weekend's expert lives until the next one, and who is does not rule for ever.
const SHARED: u64 = 8;

/// One way to forecast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Expert {
    /// The same hour of so many days before; none: the last hour.
    days: &'static [u64],
    /// Hours in which half of the last hour's ratio is gone; 0: there is no ratio.
    half_life: u64,
    /// What the ratio goes to: the last day's over its profile, or 1.
    to_day: bool,
}

const YESTERDAY: &[u64] = &[1];
const THREE_DAYS: &[u64] = &[1, 2, 3];
const WEEK_AGO: &[u64] = &[7];
const BOTH: &[u64] = &[1, 7];
const WEEK: &[u64] = &[1, 2, 3, 4, 5, 6, 7];
/// A match, a storm, the news of an hour: a quarter of a day.
const PASSING: u64 = 6;
/// Another day than usual: a day.
const LASTING: u64 = 24;

const EXPERTS: [Expert; 10] = [
    Expert { days: &[], half_life: 0, to_day: false },
    Expert { days: YESTERDAY, half_life: 0, to_day: false },
    Expert { days: YESTERDAY, half_life: PASSING, to_day: false },
    Expert { days: YESTERDAY, half_life: LASTING, to_day: false },
    Expert { days: THREE_DAYS, half_life: LASTING, to_day: false },
    Expert { days: BOTH, half_life: LASTING, to_day: false },
    Expert { days: WEEK, half_life: LASTING, to_day: false },
    Expert { days: WEEK, half_life: PASSING, to_day: true },
    Expert { days: WEEK_AGO, half_life: LASTING, to_day: false },
    Expert { days: WEEK_AGO, half_life: PASSING, to_day: true },
];

/// Forecasts one cluster's demand for one service, hour by hour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Season {
    /// Requests of the last [`KEPT`] hours, oldest first.
    hours: VecDeque<u64>,
    /// Hours pushed in all.
    count: u64,
    /// Credit of each expert for each distance: [`CREDIT`] together.
    credit: Vec<[u64; EXPERTS.len()]>,
}

impl Default for Season {
    fn default() -> Season {
        let even = [CREDIT / EXPERTS.len() as u64; EXPERTS.len()];
        Season { hours: VecDeque::with_capacity(KEPT + 1), count: 0, credit: vec![even; AHEAD] }
    }
}

impl Season {
    /// Learns the requests of one more whole hour. An hour that was not counted is pushed as one thinks it was.
    pub fn push(&mut self, requests: u64) {
        self.hours.push_back(requests.min(MOST));
        self.count += 1;
        if self.hours.len() > KEPT {
            self.hours.pop_front();
        }
        self.judge();
    }

    /// Requests of each of the next hours; zeros before the first hour.
    pub fn forecast(&self, horizon: usize) -> Vec<u64> {
        let origin = Origin::new(self, self.count);
        (1..=horizon).map(|ahead| self.mean(&origin, ahead as u64)).collect()
    }

    /// The weighted mean of what the experts say of one hour.
    fn mean(&self, origin: &Origin, ahead: u64) -> u64 {
        let Some(credit) = self.credit.get((ahead as usize).clamp(1, AHEAD) - 1) else { return 0 };
        let mut said: Vec<(Lg, u64)> =
            origin.say(ahead).iter().zip(credit).filter_map(|(s, c)| Some(((*s)?, *c))).collect();
        said.sort_unstable();
        let all: u64 = said.iter().map(|(_, credit)| credit).sum();
        let mut below = 0;
        let middle = said.iter().find(|(_, credit)| {
            below += credit;
            below * 2 >= all
        });
        let Some((middle, _)) = middle else { return 0 };
        let near = |level: Lg| i128::from(level.clamp(middle - FAR, middle + FAR));
        let sum: i128 = said.iter().map(|(level, credit)| near(*level) * i128::from(*credit)).sum();
        if all == 0 { requests(*middle) } else { requests((sum / i128::from(all)) as Lg) }
    }

    /// Takes credit from the experts by what they would have said of the hour just pushed.
    fn judge(&mut self) {
        let came = self.hours.back().copied().unwrap_or(0);
        let mut credit = std::mem::take(&mut self.credit);
        for (ahead, credit) in (1_u64..).zip(&mut credit) {
            let Some(known) = self.count.checked_sub(ahead).filter(|known| *known > 0) else { break };
            let said = Origin::new(self, known).say(ahead);
            settle(credit, &said, came, ahead);
        }
        self.credit = credit;
    }

    /// Requests of the hour `at`, counted from the first that was pushed, if it is remembered.
    fn at(&self, at: u64) -> Option<u64> {
        let forgotten = self.count - self.hours.len() as u64;
        self.hours.get(at.checked_sub(forgotten)? as usize).copied()
    }
}

/// The experts' view when `known` hours had passed.
struct Origin<'a> {
    season: &'a Season,
    known: u64,
    /// Of each expert: the last hour over its profile, and what that goes to.
    ratios: [(Lg, Lg); EXPERTS.len()],
}

impl Origin<'_> {
    fn new(season: &Season, known: u64) -> Origin<'_> {
        let mut origin = Origin { season, known, ratios: [(0, 0); EXPERTS.len()] };
        origin.ratios = EXPERTS.map(|expert| {
            let last = if expert.half_life > 0 { origin.ratio(expert.days, 1) } else { 0 };
            (last, if expert.to_day { origin.ratio(expert.days, DAY) } else { 0 })
        });
        origin
    }

    /// The mean of the same hour on the `days` before, if they are all remembered. Only the first `known` hours count:
    /// an hour so far ahead that its yesterday is yet to come is as a day, or a week, before.
    fn profile(&self, hour: u64, days: &[u64], known: u64) -> Option<Lg> {
        let period = if days.len() == 1 { days.first().copied().unwrap_or(1) * DAY } else { DAY };
        let latest = days.iter().min().copied().unwrap_or(1) * DAY;
        let back = (hour + 1).saturating_sub(known + latest).div_ceil(period) * period;
        let mut found = (0_u64, 0_u64);
        for requests in days.iter().filter_map(|d| self.season.at(hour.checked_sub(d * DAY + back)?)) {
            found = (found.0 + requests, found.1 + 1);
        }
        // Before its oldest day there is no such profile.
        (found.1 == days.len() as u64).then(|| level(found.0, found.1))
    }

    /// The last `span` hours over what their profiles were before them.
    fn ratio(&self, days: &[u64], span: u64) -> Lg {
        let Some(before) = self.known.checked_sub(span) else { return 0 };
        let (mut came, mut expected) = (0, 0);
        for hour in before..self.known {
            let (Some(requests), Some(profile)) = (self.season.at(hour), self.profile(hour, days, before)) else {
                return 0;
            };
            came += requests;
            expected += self::requests(profile);
        }
        if came == 0 {
            // An outage, or nobody at all: of what comes after it, silence says nothing.
            return 0;
        }
        (level(came, span) - level(expected, span)).clamp(-RATIO_MOST, RATIO_MOST)
    }

    /// What each expert says of the hour `ahead` (1 is the next), as a level; `None` if it cannot.
    fn say(&self, ahead: u64) -> [Option<Lg>; EXPERTS.len()] {
        let hour = self.known + ahead - 1;
        std::array::from_fn(|e| {
            let (expert, (last, rest)) = (EXPERTS.get(e)?, self.ratios.get(e).copied()?);
            if expert.days.is_empty() {
                return self.season.at(self.known.checked_sub(1)?).map(|requests| level(requests, 1));
            }
            let left = match expert.half_life {
                0 => 0,
                half => pow2(-(ahead.min(40 * half) as Lg * ONE / half as Lg), 32) as i128,
            };
            let ratio = rest + ((i128::from(last - rest) * left) >> 32) as Lg;
            Some(self.profile(hour, expert.days, self.known)? + ratio)
        })
    }
}

/// A mean as a level: the logarithm of one more than it, so that silence has one too.
fn level(sum: u64, parts: u64) -> Lg {
    // In 256ths: means of few requests are no whole numbers.
    lg(sum.saturating_mul(256) / parts.max(1) + 256) - 8 * ONE
}

/// The requests of a level.
fn requests(level: Lg) -> u64 {
    (pow2(level, 8).saturating_add(128)).saturating_sub(256) / 256
}

/// Takes credit from those who spoke and shares some of it out among them; together they keep what they had.
fn settle(credit: &mut [u64; EXPERTS.len()], said: &[Option<Lg>; EXPERTS.len()], came: u64, ahead: u64) {
    let (mut had, mut left, mut spoke) = (0_u128, 0_u128, 0_u128);
    let mut errors = [None; EXPERTS.len()];
    for ((credit, said), error) in credit.iter_mut().zip(said).zip(&mut errors) {
        let Some(said) = said.map(requests) else { continue };
        let off = u128::from(said.abs_diff(came)) * ONE as u128;
        let part = (off / u128::from(said.saturating_add(came).max(1))) as u64 / ahead;
        let cost = part as Lg * STAKE / ONE;
        had += u128::from(*credit);
        *credit = ((u128::from(*credit) * u128::from(pow2(-cost, 32))) >> 32) as u64;
        left += u128::from(*credit);
        spoke += 1;
        *error = Some(part);
    }
    let mut given = 0;
    let spoken = || errors.iter().enumerate().filter_map(|(e, error)| Some((e, (*error)?)));
    for (e, error) in spoken() {
        // With nothing left everybody begins anew.
        let own = (u128::from(credit[e]) * had).checked_div(left).unwrap_or(had / spoke);
        let gives = (own * u128::from(error)) / (u128::from(SHARED) * ONE as u128);
        given += gives;
        credit[e] = (own - gives) as u64;
    }
    for (e, _) in spoken() {
        credit[e] += (given / spoke) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Requests of hour `t`: an evening twice as busy as the mean, at `level` of the day's number.
    fn curve(t: u64, level: impl Fn(u64) -> u64) -> u64 {
        let hour = t % 24;
        let shape = 100 + 100 * hour.min(24 - hour) / 12;
        shape * level(t / 24)
    }

    fn after(hours: u64, of: impl Fn(u64) -> u64) -> Season {
        let mut season = Season::default();
        (0..hours).for_each(|t| season.push(of(t)));
        season
    }

    /// The greatest error of a forecast in hundredths of what comes.
    fn worst(season: &Season, from: u64, of: impl Fn(u64) -> u64) -> u64 {
        let forecast = season.forecast(24);
        (0..24).map(|i| forecast[i as usize].abs_diff(of(from + i)) * 100 / of(from + i)).max().unwrap()
    }

    #[test]
    fn at_first_the_next_hours_are_as_the_last_one() {
        assert_eq!(Season::default().forecast(3), [0, 0, 0]);
        assert_eq!(after(1, |_| 500).forecast(3), [500, 500, 500]);
        assert_eq!(after(9, |_| 500).forecast(200), [500; 200]);
    }

    #[test]
    fn a_day_is_known_after_some_days() {
        let of = |t| curve(t, |_| 10);
        for hours in [24 * 5, 24 * 5 + 9, 24 * 30] {
            let error = worst(&after(hours, of), hours, of);
            assert!(error <= 5, "{error} % after {hours} h");
        }
    }

    #[test]
    fn a_weekend_is_known_after_some_weeks() {
        let of = |t| curve(t, |day| if day % 7 < 5 { 100 } else { 5 });
        // Friday's last hour has passed, then Sunday's.
        for end in [24 * (7 * 8 + 5), 24 * 7 * 9] {
            let error = worst(&after(end, of), end, of);
            assert!(error <= 15, "{error} % after day {}", end / 24);
        }
    }

    #[test]
    fn a_sudden_fame_is_followed_in_the_next_hour_and_lasts_if_it_lasted() {
        let of = |t| curve(t, |day| if day < 20 { 10 } else { 50 });
        let next = after(24 * 20 + 2, of).forecast(1)[0];
        assert!(next * 100 >= of(24 * 20 + 2) * 85, "{next} of {}", of(24 * 20 + 2));
        let error = worst(&after(24 * 23, of), 24 * 23, of);
        assert!(error <= 15, "{error} % three days later");
    }

    #[test]
    fn an_hour_of_silence_is_not_a_silent_tomorrow() {
        let of = |t| if t == 24 * 20 + 11 { 0 } else { curve(t, |_| 1000) };
        let season = after(24 * 20 + 12, of);
        let tomorrow = season.forecast(24)[23];
        assert!(tomorrow * 4 > of(24 * 21 + 11), "{tomorrow}");
    }

    #[test]
    fn credit_is_neither_made_nor_lost() {
        let season = after(24 * 60, |t| curve(t, |day| 1 + day * day % 13));
        for credit in &season.credit {
            let all: u64 = credit.iter().sum();
            assert!((CREDIT - CREDIT / 1000..=CREDIT).contains(&all), "{credit:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_forecast_that_is_far_from_all_that_was(hours in prop::collection::vec(0_u64..1 << 50, 1..300)) {
            let mut season = Season::default();
            hours.iter().for_each(|h| season.push(*h));
            let most = hours.iter().max().copied().unwrap() + 1;
            let forecast = season.forecast(48);
            prop_assert!(forecast.iter().all(|f| *f <= most.saturating_mul(17)), "{forecast:?}");
        }

        #[test]
        fn it_goes_on_from_what_was_written_down(hours in prop::collection::vec(0_u64..100_000, 1..60)) {
            let mut season = Season::default();
            hours.iter().for_each(|h| season.push(*h));
            let mut read: Season = serde_json::from_str(&serde_json::to_string(&season).unwrap()).unwrap();
            season.push(7);
            read.push(7);
            prop_assert_eq!(season.forecast(24), read.forecast(24));
        }
    }

    #[test]
    fn the_most_that_can_be_asked_is_no_overflow() {
        let season = after(24 * 10, |t| if t % 5 == 0 { 0 } else { u64::MAX });
        assert_eq!(season.forecast(24).len(), 24);
    }
}
