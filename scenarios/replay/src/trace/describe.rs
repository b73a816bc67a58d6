//! What a trace is like: how much, when, and how suddenly.
//!
//! ```text
//!        an hour: what is usual      ten minutes       five minutes: what is now
//!    ├─────────────────────────────┤├────────────┤├────┤
//! ```
//!
//! A burst is where now is [`RATIO`] times the usual. The ten minutes between are what a crowd is given to grow in; an
//! hour is the mean of enough that a short dip or a spike is not what is usual; five minutes are a crowd and not one
//! minute's robot. Bursts with less than [`APART`] between them are one.

use super::{Trace, civil};
use std::fmt;
use vmatrix_model::Span;

/// How many times the usual, as a fraction: 2.5, more than the curve of a day climbs in an hour and a quarter.
const RATIO: (u128, u128) = (5, 2);
const NOW: Span = Span::secs(5 * 60);
const GROWTH: Span = Span::secs(10 * 60);
const USUAL: Span = Span::secs(3600);
/// About a match, with what comes before and after; in which also the peak of a burst is looked for.
const APART: Span = Span::secs(3 * 3600);
/// Squared standard deviations by which Poisson noise lies below a burst: five, once in some 3·10^6 steps.
const NOISE: u128 = 25;
/// How many of the hours of the day are told.
const HOURS: usize = 3;

/// One burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Burst {
    /// Unix seconds at which it was one, and at which it last was.
    pub from: i64,
    pub to: i64,
    /// Usual requests of a step when it began.
    pub usual: u64,
    /// The highest step within three hours of its beginning, in thousandths of the usual.
    pub peak: u64,
}

/// What a trace is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    pub name: String,
    /// Unix seconds.
    pub begins: i64,
    pub ends: i64,
    pub steps: usize,
    pub step: Span,
    pub total: u64,
    /// Requests of a step, rounded.
    pub mean: u64,
    /// Unix seconds of the highest step (the first of equals), and its requests.
    pub peak: (i64, u64),
    /// The highest step in thousandths of the mean; 0 without requests.
    pub peak_ratio: u64,
    /// Unix seconds of the steepest growth within ten minutes, and what was of what was usual, in thousandths.
    pub steepest: Option<(i64, u64)>,
    /// `None` if the steps are too long to tell.
    pub bursts: Option<Vec<Burst>>,
    /// The busiest hours of the day (UTC) with the mean requests of a step in them, busiest first.
    pub busiest: Vec<(usize, u64)>,
}

/// What is now and what was usual, both as requests in [`NOW`].
struct Moment {
    step: usize,
    now: u128,
    /// At least one: after silence one request is no burst.
    usual: u128,
}

impl Moment {
    fn ratio(&self) -> u64 {
        u64::try_from(self.now * 1000 / self.usual).unwrap_or(u64::MAX)
    }

    /// Whether it is more than noise can be.
    fn is_sure(&self) -> bool {
        let more = self.now.saturating_sub(self.usual);
        more.saturating_mul(more) > NOISE.saturating_mul(self.usual)
    }

    fn is_burst(&self) -> bool {
        self.is_sure() && self.now * RATIO.1 >= self.usual * RATIO.0
    }
}

impl Trace {
    /// What this trace is like.
    pub fn describe(&self) -> Description {
        let (total, steps) = (self.total(), self.counts.len());
        let highest = self.counts.iter().enumerate().max_by_key(|(i, c)| (**c, std::cmp::Reverse(*i)));
        let (at, highest) = highest.map_or((0, 0), |(i, c)| (i, *c));
        let ratio = u128::from(highest) * 1000 * steps as u128 / u128::from(total.max(1));
        let steepest = self.moments().filter(Moment::is_sure).max_by_key(|m| (m.ratio(), std::cmp::Reverse(m.step)));
        Description {
            name: self.name.clone(),
            begins: self.begins,
            ends: self.ends(),
            steps,
            step: self.step,
            total,
            mean: rounded(total, steps as u64),
            peak: (self.at(at), highest),
            peak_ratio: u64::try_from(ratio).unwrap_or(u64::MAX),
            steepest: steepest.map(|m| (self.at(m.step), m.ratio())),
            bursts: (self.step <= NOW).then(|| self.bursts()),
            busiest: self.busiest(),
        }
    }

    fn bursts(&self) -> Vec<Burst> {
        let apart = self.steps_of(APART);
        // First and last step of each, and what was usual.
        let mut found: Vec<(usize, usize, u128)> = vec![];
        for moment in self.moments().filter(Moment::is_burst) {
            match found.last_mut() {
                Some((_, last, _)) if moment.step - *last <= apart => *last = moment.step,
                _ => found.push((moment.step, moment.step, moment.usual)),
            }
        }
        let now = self.steps_of(NOW) as u128;
        let burst = |(first, last, usual): (usize, usize, u128)| {
            // What is usual follows after an hour and ends the burst; the crowd may go on growing.
            let highest = self.counts.iter().skip(first).take(apart).max().copied().unwrap_or(0);
            Burst {
                from: self.at(first),
                to: self.at(last),
                usual: u64::try_from((usual + now / 2) / now).unwrap_or(u64::MAX),
                peak: u64::try_from(u128::from(highest) * 1000 * now / usual).unwrap_or(u64::MAX),
            }
        };
        found.into_iter().map(burst).collect()
    }

    /// Every step that has enough before it to say what is usual.
    fn moments(&self) -> impl Iterator<Item = Moment> {
        let (now, growth, usual) = (self.steps_of(NOW), self.steps_of(GROWTH), self.steps_of(USUAL));
        let mut before = Vec::with_capacity(self.counts.len() + 1);
        before.push(0_u128);
        for count in &self.counts {
            before.push(before.last().copied().unwrap_or(0) + u128::from(*count));
        }
        // Requests of so many steps, up to and with step `end`; nobody asks for more than there are.
        let sum = move |end: usize, steps: usize| before[end + 1] - before[end + 1 - steps];
        (growth + usual - 1..self.counts.len()).map(move |step| {
            let was = sum(step - growth, usual);
            Moment { step, now: sum(step, now), usual: (was * now as u128).div_ceil(usual as u128).max(1) }
        })
    }

    /// Steps in a span, at least one.
    fn steps_of(&self, span: Span) -> usize {
        (span.0 / self.step.0.max(1)).max(1) as usize
    }

    fn busiest(&self) -> Vec<(usize, u64)> {
        let mut hours = [(0_u64, 0_u64); 24];
        for (i, count) in self.counts.iter().enumerate() {
            let hour = &mut hours[(self.at(i).rem_euclid(civil::DAY_S) / 3600) as usize];
            *hour = (hour.0.saturating_add(*count), hour.1 + 1);
        }
        let mut hours: Vec<(usize, u64)> =
            (0..24).filter(|h| hours[*h].1 > 0).map(|h| (h, rounded(hours[h].0, hours[h].1))).collect();
        hours.sort_by_key(|(hour, mean)| (std::cmp::Reverse(*mean), *hour));
        hours.truncate(HOURS);
        hours
    }
}

fn rounded(sum: u64, parts: u64) -> u64 {
    sum.saturating_add(parts / 2) / parts.max(1)
}

/// Thousandths with one digit after the point.
fn times(thousandths: u64) -> String {
    let tenths = thousandths.saturating_add(50) / 100;
    format!("{}.{} times", tenths / 10, tenths % 10)
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (begins, ends) = (civil::written(self.begins), civil::written(self.ends));
        writeln!(f, "{}: {} steps of {}, {begins} to {ends} UTC", self.name, self.steps, self.step)?;
        writeln!(f, "requests  {}, mean {} a step", self.total, self.mean)?;
        let at = civil::written(self.peak.0);
        writeln!(f, "peak      {} at {at}, {} the mean", self.peak.1, times(self.peak_ratio))?;
        let hours = self.busiest.iter().map(|(hour, mean)| format!("{hour:02} h (mean {mean})"));
        writeln!(f, "busiest   {} UTC", hours.collect::<Vec<_>>().join(", "))?;
        if let Some((at, ratio)) = self.steepest {
            writeln!(f, "steepest  {} the usual within 10 min, at {}", times(ratio), civil::written(at))?;
        }
        match &self.bursts {
            None => writeln!(f, "bursts    cannot be told with steps of more than 5 min"),
            Some(bursts) => {
                writeln!(f, "bursts    {} of at least 2.5 times the usual within 10 min", bursts.len())?;
                bursts.iter().try_for_each(|b| {
                    let (from, peak) = (civil::written(b.from), times(b.peak));
                    writeln!(f, "  {from}  peak {peak} the usual {} a step", b.usual)
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Minutes from Monday 2001-01-01.
    fn minutes(counts: Vec<u64>) -> Trace {
        Trace { name: "some".into(), begins: 978_307_200, step: Span::secs(60), counts }
    }

    /// Two hours of 100 a minute, then so many.
    fn after_two_hours(then: &[u64]) -> Trace {
        minutes([&[100; 120][..], then, &[100; 240], then, &[100; 60]].concat())
    }

    #[test]
    fn figures_are_what_they_are_called() {
        let mut counts = vec![10; 2 * 24 * 60];
        counts[25 * 60] = 4000;
        let seen = minutes(counts).describe();
        assert_eq!((seen.total, seen.mean, seen.steps), (28_790 + 4000, 11, 2880));
        assert_eq!((seen.peak, seen.peak_ratio), ((978_307_200 + 25 * 3600, 4000), 351_326));
        assert_eq!(seen.busiest, [(1, 43), (0, 10), (2, 10)]);
        assert_eq!(seen.ends - seen.begins, 2 * 86_400);
        let said = seen.to_string();
        assert!(said.contains("some: 2880 steps of 60.0 s, 2001-01-01 00:00:00 to 2001-01-03 00:00:00 UTC"), "{said}");
        assert!(said.contains("peak      4000 at 2001-01-02 01:00:00, 351.3 times the mean"), "{said}");
    }

    #[test]
    fn a_crowd_within_ten_minutes_is_a_burst() {
        let crowd = [&[150, 200, 300, 500][..], &[600; 20], &[300; 9]].concat();
        let bursts = after_two_hours(&crowd).describe().bursts.unwrap();
        assert_eq!(bursts.len(), 2, "{bursts:?}");
        assert_eq!((bursts[0].usual, bursts[0].peak), (100, 6000));
        // 100 + 150 + 200 + 300 + 500 in five minutes is 2.5 times just so.
        assert_eq!(bursts[0].from - 978_307_200, 123 * 60);
    }

    #[test]
    fn a_slow_rise_and_one_loud_minute_are_none() {
        // Ten times in eight hours.
        let slow: Vec<u64> = (0..480).map(|i| 100 + i * 900 / 480).collect();
        assert_eq!(after_two_hours(&slow).describe().bursts.unwrap(), []);
        assert_eq!(after_two_hours(&[800]).describe().bursts.unwrap(), []);
        assert_eq!(minutes(vec![0; 300]).describe().bursts.unwrap(), []);
        let few = [&[0; 120][..], &[1, 1, 0, 1, 1], &[0; 60]].concat();
        assert_eq!(minutes(few).describe().bursts.unwrap(), [], "four requests after silence");
    }

    #[test]
    fn bursts_of_one_evening_are_one() {
        let two = [&[600; 20][..], &[100; 100], &[600; 20], &[100; 60]].concat();
        assert_eq!(minutes([&[100; 120][..], &two].concat()).describe().bursts.unwrap().len(), 1);
    }

    #[test]
    fn a_trace_of_any_length_and_step_is_described() {
        for (steps, step) in [(1, 60), (2, 86_400), (69, 60), (70, 60), (71, 60), (500, 3600), (500, 7)] {
            let trace = Trace { step: Span::secs(step), ..minutes(vec![super::super::COUNT_MAX; steps]) };
            let seen = trace.describe();
            assert_eq!(seen.bursts.is_none(), step > 300);
            assert!(!seen.to_string().is_empty());
        }
        let silent = minutes(vec![0]).describe();
        assert_eq!((silent.mean, silent.peak_ratio, silent.steepest), (0, 0, None));
    }
}
