//! What a collector wrote and no crowd can have done: found, or named by who knows, and filled.
//!
//! ```text
//! clean: runs of one count ─┐
//! mask: a named time ───────┴─▶ same time of the days around, at this day's level ─▶ Trace, Changes
//!                                else a line between the steps around
//! ```
//!
//! How long a run of equal counts has to be. Requests of many clients are Poisson, and whatever their rate, the
//! chance that a step has exactly k of them is at most 1/√(2πk): by Stirling's bound, k! ≥ √(2πk)·(k/e)^k. So at
//! any place of a trace, n steps in a row have k requests with a chance of at most (2πk)^(-(n-1)/2), also where the
//! rate changes. A run is taken out if that, times the number of places, is less than [`FALSE_ALARMS`]: with
//! 125,000 steps from 29 equal counts of 1 on, from 10 of 50, from 5 of 57,509.
//!
//! Zeros stay: silence is possible.

use super::{COUNT_MAX, Trace, TraceError, civil};
use std::fmt;
use std::ops::Range;
use vmatrix_model::Span;

/// Honest runs taken out for each trace looked at: one trace in a million loses one.
const FALSE_ALARMS: f64 = 1e-6;
/// On both sides of a hole, what the level of a day is taken from: with some requests a second, an hour's noise is
/// about a hundredth, and the curve of the day has hardly turned.
const AROUND: Span = Span::secs(3600);
const DAY: Span = Span::secs(86_400);

/// Where the new counts of a stretch came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filling {
    /// The same time of the day before, the day after or both, at the level of this day.
    Days,
    /// A line from the step before to the step after, or the one of them that there is.
    Line,
    /// There was nothing to go by, and it stayed as it was.
    Nothing,
}

/// One stretch that was taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Unix seconds at which it begins.
    pub from: i64,
    pub steps: u64,
    /// Requests of the whole stretch before and after.
    pub was: u64,
    pub now: u64,
    pub filling: Filling,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = civil::written(self.from);
        write!(f, "{from}: {} steps of {} requests in all ", self.steps, self.was)?;
        match self.filling {
            Filling::Days => write!(f, "replaced by {} as on the days around", self.now),
            Filling::Line => write!(f, "replaced by {} as in the steps around", self.now),
            Filling::Nothing => write!(f, "kept: nothing is known around them"),
        }
    }
}

impl Trace {
    /// The trace without runs of one count that chance cannot have made, and what was changed.
    pub fn clean(&self) -> (Trace, Vec<Change>) {
        self.fill(&runs(&self.counts))
    }

    /// The trace without the steps between two times (Unix seconds), for artefacts that somebody knows of.
    ///
    /// # Errors
    /// If no whole step lies between them.
    pub fn mask(&self, from: i64, to: i64) -> Result<(Trace, Change), TraceError> {
        let hole = self.between(from, to);
        // Says what is wrong if there is nothing between.
        self.slice(from, to)?;
        let (filled, changes) = self.fill(std::slice::from_ref(&hole));
        let whole =
            Change { from: self.at(hole.start), steps: hole.len() as u64, was: 0, now: 0, filling: Filling::Nothing };
        Ok((filled, changes.first().copied().unwrap_or(whole)))
    }

    /// Fills holes, which are in order and apart.
    fn fill(&self, holes: &[Range<usize>]) -> (Trace, Vec<Change>) {
        let mut known = vec![true; self.counts.len()];
        holes.iter().flat_map(|h| h.clone()).for_each(|i| known[i] = false);
        let (mut filled, mut changes) = (self.clone(), vec![]);
        for hole in holes {
            let days = self.days_around(hole, &known);
            let (new, filling) = match days {
                Some(new) => (new, Filling::Days),
                None => match self.line_across(hole, &known) {
                    Some(new) => (new, Filling::Line),
                    None => (self.counts[hole.clone()].to_vec(), Filling::Nothing),
                },
            };
            let sum = |counts: &[u64]| counts.iter().fold(0_u64, |sum, c| sum.saturating_add(*c));
            let was = sum(&self.counts[hole.clone()]);
            let (from, steps, now) = (self.at(hole.start), hole.len() as u64, sum(&new));
            filled.counts[hole.clone()].copy_from_slice(&new);
            changes.push(Change { from, steps, was, now, filling });
        }
        (filled, changes)
    }

    /// Counts of the days around, times what this day's level is of theirs in the hours around the hole.
    fn days_around(&self, hole: &Range<usize>, known: &[bool]) -> Option<Vec<u64>> {
        let step = self.step.0.max(1);
        if !DAY.0.is_multiple_of(step) {
            return None;
        }
        let (day, around) = ((DAY.0 / step) as isize, (AROUND.0 / step).max(1) as usize);
        let beside = (hole.start.saturating_sub(around)..hole.start)
            .chain(hole.end..hole.end.saturating_add(around).min(known.len()))
            .filter(|i| known[*i]);
        let beside: Vec<usize> = beside.collect();
        let shifted = |i: usize, by: isize| i.checked_add_signed(by).filter(|i| known.get(*i) == Some(&true));

        let (mut days, mut here, mut there) = (vec![], 0_u128, 0_u128);
        for by in [-day, day].into_iter().filter(|by| hole.clone().all(|i| shifted(i, *by).is_some())) {
            days.push(by);
            for (i, j) in beside.iter().filter_map(|i| shifted(*i, by).map(|j| (*i, j))) {
                here += u128::from(self.counts[i]);
                there += u128::from(self.counts[j]);
            }
        }
        let parts = there * days.len() as u128;
        if parts == 0 {
            return None;
        }
        let at =
            |i: usize| days.iter().filter_map(|by| shifted(i, *by)).map(|j| u128::from(self.counts[j])).sum::<u128>();
        let new = hole.clone().map(|i| (at(i).saturating_mul(here).saturating_add(parts / 2)) / parts);
        Some(new.map(|c| u64::try_from(c).unwrap_or(COUNT_MAX).min(COUNT_MAX)).collect())
    }

    /// Counts on a line from the known step before the hole to the one after it.
    fn line_across(&self, hole: &Range<usize>, known: &[bool]) -> Option<Vec<u64>> {
        let at = |i: usize| self.counts.get(i).copied().filter(|_| known.get(i) == Some(&true));
        let (before, after) = (hole.start.checked_sub(1).and_then(at), at(hole.end));
        let (from, to) = (before.or(after)?, after.or(before)?);
        let parts = hole.len() as u128 + 1;
        let on_line = |part: u128| (u128::from(from) * (parts - part) + u128::from(to) * part + parts / 2) / parts;
        Some((1..parts).map(|part| on_line(part) as u64).collect())
    }
}

/// Every run of one count, zero excepted, that is too long for chance.
fn runs(counts: &[u64]) -> Vec<Range<usize>> {
    let (mut found, mut start): (Vec<Range<usize>>, usize) = (vec![], 0);
    for run in counts.chunk_by(|a, b| a == b) {
        let range = start..start + run.len();
        start = range.end;
        if run.first().is_some_and(|count| *count > 0 && run.len() >= impossible(*count, counts.len())) {
            match found.last_mut() {
                // Two in a row are one hole, so that what is beside a hole is known.
                Some(Range { end, .. }) if *end == range.start => *end = range.end,
                _ => found.push(range),
            }
        }
    }
    found
}

/// Steps in a row with this count, which is not zero, that chance does not make in so many steps.
fn impossible(count: u64, steps: usize) -> usize {
    // Multiplication, division and the square root give the same bits everywhere.
    let each = (2.0 * std::f64::consts::PI * count as f64).sqrt();
    let (mut expected, mut run) = (steps as f64, 1);
    while expected >= FALSE_ALARMS {
        expected /= each;
        run += 1;
    }
    run
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chance::Chance;

    const HOUR: usize = 60;

    /// `days` days of minutes with noise about a level that doubles each day, day and night alike but for noon.
    fn days(days: usize) -> Trace {
        let mut chance = Chance::named(5, &["clean"]);
        let counts = (0..days * 24 * HOUR).map(|i| {
            let level = 1000 << (i / (24 * HOUR));
            let noon = if i % (24 * HOUR) / HOUR == 12 { 2 } else { 1 };
            noon * level + chance.under(level / 10)
        });
        Trace { name: "days".into(), begins: 0, step: Span::secs(60), counts: counts.collect() }
    }

    #[test]
    fn the_length_of_an_impossible_run_follows_from_its_level() {
        assert_eq!(impossible(1, 125_300), 29);
        assert_eq!(impossible(50, 125_300), 10);
        assert_eq!(impossible(57_509, 125_300), 5);
        // (2π·10^12)^-½ is 4·10^-7: two in a row by chance are one in a thousand traces of 2,500 steps, three none.
        assert_eq!(impossible(COUNT_MAX, 2_500), 3);
        assert!(impossible(1, 10_000_000) > impossible(1, 100));
    }

    #[test]
    fn noise_stays_as_it_is() {
        let noisy = days(3);
        assert_eq!(noisy.clean(), (noisy.clone(), vec![]));
        let silent = Trace { counts: vec![0; 5000], ..days(1) };
        assert_eq!(silent.clean(), (silent.clone(), vec![]));
    }

    #[test]
    fn a_stuck_counter_is_filled_from_the_days_around_at_this_days_level() {
        let whole = days(3);
        let mut stuck = whole.clone();
        let noon = 36 * HOUR;
        stuck.counts[noon - 30..noon + 30].fill(77_777);
        let (clean, changes) = stuck.clean();
        assert_eq!(changes.len(), 1);
        assert_eq!(
            (changes[0].from, changes[0].steps, changes[0].filling),
            ((noon as i64 - 30) * 60, 60, Filling::Days)
        );
        assert_eq!((changes[0].was, changes[0].now), (60 * 77_777, clean.counts[noon - 30..noon + 30].iter().sum()));
        for i in 0..whole.counts.len() {
            let (right, seen) = (whole.counts[i], clean.counts[i]);
            let around = (noon - 30..noon + 30).contains(&i);
            // Noise is a tenth; the day's level and the doubling at noon are right within it.
            assert!(
                if around { right.abs_diff(seen) * 100 <= right * 15 } else { right == seen },
                "{i}: {right} {seen}"
            );
        }
        assert!(
            changes[0].to_string().starts_with("1970-01-02 11:30:00: 60 steps of 4666620 requests in all replaced by ")
        );
    }

    #[test]
    fn with_no_days_around_a_line_is_drawn() {
        let trace = |counts: &[u64]| Trace { counts: counts.to_vec(), ..days(1) };
        let stuck = trace(&[100, 900, 900, 900, 900, 900, 900, 900, 900, 1000]);
        let (clean, changes) = stuck.clean();
        assert_eq!(clean.counts, [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]);
        assert_eq!(changes[0].filling, Filling::Line);
        let (clean, _) = trace(&[900, 900, 900, 900, 900, 900, 900, 900, 50]).clean();
        assert_eq!(clean.counts, [50; 9], "only one side is known");
        let (clean, changes) = trace(&[&[10][..], &[900; 20], &[700; 20], &[50]].concat()).clean();
        assert_eq!((changes.len(), clean.counts[1], clean.counts[40]), (1, 11, 49), "two runs in a row are one");
        let all = trace(&[900; 20]);
        let (clean, changes) = all.clean();
        assert_eq!((clean, changes[0].filling), (all, Filling::Nothing));
    }

    #[test]
    fn a_time_that_somebody_names_is_filled_too() {
        let whole = days(2);
        let mut surge = whole.clone();
        surge.counts[30 * HOUR..30 * HOUR + 7].copy_from_slice(&[15085, 25574, 57509, 46561, 55042, 27578, 16418]);
        let at = surge.at(30 * HOUR);
        let (masked, change) = surge.mask(at, at + 420).unwrap();
        assert_eq!((change.steps, change.filling), (7, Filling::Days), "there is no day after");
        let difference = masked.total().abs_diff(whole.total());
        assert!(difference < 7 * 2000 * 15 / 100, "{difference}");
        assert!(surge.mask(at, at + 59).unwrap_err().to_string().contains("no step lies between"));
    }
}
