//! What each client cluster will ask for: its usual day, at the level of the last day, bent by what it asks now.
//!
//! ```text
//!  usual(cluster, time of day): mean of past days, the last ones most
//!  forecast(cluster, k epochs ahead) = usual · level · (1 + (now − 1) · left(k))
//!      level: all of the last day over what was usual        now: the last epochs over usual · level
//!      left(k): what was left, so long after, of what was unusual: learned from the days before
//! ```
//! The level stays, for a service that grows goes on being larger; what is unusual now fades as it has faded before:
//! crowds of a service that is asked for an hour are over after an hour. A small cluster's own ratio is mostly noise, so
//! it is drawn towards that of all clusters by as many requests as Poisson noise makes worthless ([`TRUST`]).
//!
//! Nothing but sums, products and quotients of doubles in a fixed order: the same on every machine.

use serde::{Deserialize, Serialize};

/// Weight of the newest day in what is usual: three days count, as many as the noise of a day's shape needs and few
/// enough that a weekend is forgotten by Wednesday.
const DAY_WEIGHT: f64 = 1.0 / 3.0;
/// Weight of the newest epoch in what is asked now: it counts as much as all before it, and Poisson noise of more than a
/// hundred requests is small beside what changes within two epochs.
const NOW_WEIGHT: f64 = 0.5;
/// Requests of a cluster at which its own ratio counts as much as that of all clusters: Poisson noise is a tenth then.
const TRUST: f64 = 100.0;
/// Furthest that a ratio is believed: a cluster that never asked may begin to.
const RATIO_MAX: f64 = 50.0;
/// Hours after which it is learned how much of the unusual is left; between them by straight lines.
const AFTER: [usize; 6] = [1, 2, 4, 8, 16, 24];
/// Before anything was learned the unusual halves each two hours, as crowds do.
const LEFT: [f64; 6] = [0.7, 0.5, 0.25, 0.06, 0.0, 0.0];
/// Weight of a day in what was learned.
const LEARN_WEIGHT: f64 = 1.0 / 7.0;

/// Forecasts of one service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outlook {
    clusters: usize,
    /// Epochs a day, and an hour.
    day: usize,
    hour: usize,
    /// Epochs heard.
    heard: usize,
    /// `[time of day * clusters + cluster]`.
    usual: Vec<f64>,
    /// What all clusters asked in each epoch of the last day, and what was usual then.
    asked: Vec<f64>,
    expected: Vec<f64>,
    /// By cluster: what was asked and what was usual of late, the newest most.
    now: Vec<(f64, f64)>,
    /// By hour of the last day and cluster: how unusual it was, 0 if not at all, and how much was usual.
    odd: Vec<(f64, f64)>,
    /// By [`AFTER`]: products of how unusual it was before and after, and squares of before.
    learned: [(f64, f64); AFTER.len()],
}

impl Outlook {
    /// Of `clusters` that have not been heard; a day has `day` epochs.
    pub fn new(clusters: usize, day: usize) -> Outlook {
        let day = day.max(24) / 24 * 24;
        Outlook {
            clusters,
            day,
            hour: day / 24,
            heard: 0,
            usual: vec![0.0; clusters * day],
            asked: vec![0.0; day],
            expected: vec![0.0; day],
            now: vec![(0.0, 0.0); clusters],
            odd: vec![(0.0, 0.0); clusters * 24],
            learned: LEFT.map(|left| (left * 1e-9, 1e-9)),
        }
    }

    /// Learns what each cluster asked in the epoch that has ended.
    pub fn hear(&mut self, requests: &[u32]) {
        let slot = self.heard % self.day;
        let first = self.heard < self.day;
        let usual = &mut self.usual[slot * self.clusters..(slot + 1) * self.clusters];
        let (mut all, mut expected) = (0.0, 0.0);
        for ((usual, now), requests) in usual.iter_mut().zip(&mut self.now).zip(requests) {
            let requests = f64::from(*requests);
            all += requests;
            if first {
                *usual = requests;
            }
            expected += *usual;
            *now = (now.0 + (requests - now.0) * NOW_WEIGHT, now.1 + (*usual - now.1) * NOW_WEIGHT);
            *usual += (requests - *usual) * DAY_WEIGHT;
        }
        (self.asked[slot], self.expected[slot]) = (all, expected);
        self.heard += 1;
        if self.heard.is_multiple_of(self.hour) && !first {
            self.learn();
        }
    }

    /// Lets epochs pass of which nothing was heard: the usual is taken to have been asked. Before a whole day was heard
    /// it begins again, for a day with a hole in it is not one.
    pub fn skip(&mut self, epochs: usize) {
        if !self.knows() {
            *self = Outlook::new(self.clusters, self.day);
            return;
        }
        for slot in (self.heard..).take(epochs.min(self.day)).map(|heard| heard % self.day) {
            let usual: f64 = self.usual[slot * self.clusters..(slot + 1) * self.clusters].iter().sum();
            (self.asked[slot], self.expected[slot]) = (usual, usual);
        }
        self.now.fill((0.0, 0.0));
        self.odd.fill((0.0, 0.0));
        self.heard += epochs;
    }

    /// Whether a whole day was heard.
    pub fn knows(&self) -> bool {
        self.heard >= self.day
    }

    /// Compares how unusual clusters are with how unusual they were some hours ago.
    fn learn(&mut self) {
        let (level, of_all) = self.levels();
        let present = self.heard / self.hour;
        let odd: Vec<(f64, f64)> =
            self.now.iter().map(|now| (self.own(*now, level, of_all) - 1.0, now.1 * level)).collect();
        for (after, learned) in AFTER.iter().zip(&mut self.learned) {
            let at = (present + 24 - after) % 24 * self.clusters;
            let (mut product, mut square) = (0.0, 0.0);
            for (was, is) in self.odd[at..at + self.clusters].iter().zip(&odd) {
                // By what is at stake: requests, squared as the errors are.
                let weight = is.1 * is.1;
                product += weight * was.0 * is.0;
                square += weight * was.0 * was.0;
            }
            let keep = 1.0 - LEARN_WEIGHT / 24.0;
            *learned = (learned.0 * keep + product, learned.1 * keep + square);
        }
        let at = present % 24 * self.clusters;
        self.odd[at..at + self.clusters].copy_from_slice(&odd);
    }

    /// What all clusters ask, over what was usual: in the last day, and of late over that.
    fn levels(&self) -> (f64, f64) {
        let level = ratio(self.asked.iter().sum(), self.expected.iter().sum());
        let (asked, usual) = self.now.iter().fold((0.0, 0.0), |all, now| (all.0 + now.0, all.1 + now.1));
        (level, ratio(asked, usual * level))
    }

    /// What a cluster asks of late, over what is usual at this level.
    fn own(&self, now: (f64, f64), level: f64, of_all: f64) -> f64 {
        ((now.0 + TRUST * of_all) / (now.1 * level + TRUST)).min(RATIO_MAX)
    }

    /// What will be left of the unusual after so many epochs.
    fn left(&self, ahead: usize) -> f64 {
        let part = |n: usize| (self.learned[n].0 / self.learned[n].1).clamp(0.0, 1.0);
        let hours = ahead as f64 / self.hour as f64;
        let (mut before, mut left) = (0.0, 1.0);
        for (n, after) in AFTER.iter().enumerate() {
            let (after, then) = (*after as f64, part(n));
            if hours <= after {
                return left + (then - left) * (hours - before) / (after - before);
            }
            (before, left) = (after, then);
        }
        left
    }

    /// Requests of each cluster in steps to come, `[step * clusters + cluster]`; a step is so many epochs long.
    ///
    /// Before a whole day was heard, what was asked last goes on.
    pub fn forecast(&self, lengths: &[usize], into: &mut Vec<u32>) {
        into.clear();
        let (level, of_all) = self.levels();
        let young = !self.knows();
        let odd: Vec<f64> = self.now.iter().map(|now| self.own(*now, level, of_all) - 1.0).collect();
        let mut begins = 0;
        for length in lengths {
            let mut row = vec![0.0; self.clusters];
            for ahead in begins..begins + length {
                let left = self.left(ahead + 1);
                let slot = (self.heard + ahead) % self.day;
                let usual = &self.usual[slot * self.clusters..(slot + 1) * self.clusters];
                if young {
                    row.iter_mut().zip(&self.now).for_each(|(row, now)| *row += now.0);
                } else {
                    let each = row.iter_mut().zip(usual).zip(&odd);
                    each.for_each(|((row, usual), odd)| *row += usual * level * (1.0 + odd * left));
                }
            }
            into.extend(row.iter().map(|requests| requests.clamp(0.0, f64::from(u32::MAX)) as u32));
            begins += length;
        }
    }
}

fn ratio(is: f64, was: f64) -> f64 {
    if was > 0.0 { (is / was).min(RATIO_MAX) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A day of 24 epochs in which cluster 0 asks at all hours and cluster 1 in the evening.
    fn usual(hour: usize) -> [u32; 2] {
        [10_000, if hour % 24 >= 18 { 50_000 } else { 0 }]
    }

    #[test]
    fn a_usual_day_is_foreseen() {
        let mut outlook = Outlook::new(2, 24);
        (0..24 * 8).for_each(|hour| outlook.hear(&usual(hour)));
        let mut seen = vec![];
        outlook.forecast(&[6, 12, 6], &mut seen);
        assert_eq!(seen, [60_000, 0, 120_000, 0, 60_000, 300_000]);
    }

    #[test]
    fn a_service_that_grows_is_not_taken_for_a_crowd() {
        let mut outlook = Outlook::new(1, 24);
        (0..24 * 20).for_each(|hour| outlook.hear(&[10_000 * (1 + hour as u32 / 24)]));
        let mut seen = vec![];
        outlook.forecast(&[12, 12], &mut seen);
        // 200,000 an hour now, and it will be 210,000 tomorrow.
        assert!(seen.iter().all(|n| (2_200_000..2_700_000).contains(n)), "{seen:?}");
    }

    #[test]
    fn crowds_fade_as_they_have_faded_before() {
        let crowd = |hour: usize, hours: usize| if hour % 24 >= 12 && hour % 24 < 12 + hours { 5 } else { 1 };
        let left = |hours: usize| {
            let mut outlook = Outlook::new(2, 24);
            // Each third day another one of the two has a crowd, never at a time that is usual.
            for hour in 0..24 * 40 {
                let day = hour / 24;
                let shift = day * 7 % 12;
                let one = if day % 3 == 0 { crowd(hour + shift, hours) } else { 1 };
                outlook.hear(&[20_000 * one, 20_000]);
            }
            outlook.left(3)
        };
        assert!(left(1) < 0.2 && left(8) > left(1) + 0.2, "{} {}", left(1), left(8));
    }
}
