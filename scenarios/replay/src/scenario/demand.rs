//! What a region asks of a service when nothing special happens: evenly, by the hours of a day, or as was recorded.
//!
//! ```text
//! requests_per_s ─┬─ nothing else ─▶ the same at all times
//!                 ├─ hours ─▶ a day that bends, this its mean
//!                 └─ trace ─▶ steps of a recorded trace, this the mean of the part that is played
//! ```

use crate::trace::{self, Trace};
use serde::{Deserialize, Serialize};
use std::path::Path;
use vmatrix_model::{RegionId, ServiceId};

/// Highest value of an hour; they are compared with one another only.
const HOUR_MAX: f64 = 1e6;
const DAY_S: u32 = 86_400;

/// Demand of one region for one service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Demand {
    pub service: ServiceId,
    pub region: RegionId,
    /// On average, where it is not the same at all times.
    pub requests_per_s: f64,
    /// How much is asked in each of the 24 hours from the start, in any unit; from the middle of one to the next it
    /// changes evenly. None: the same at all hours.
    #[serde(default)]
    pub hours: Vec<f64>,
    /// A trace whose course it takes (`vmatrix trace`), named from the scenario's folder.
    #[serde(default)]
    pub trace: Option<String>,
    /// Seconds of the trace before the play begins.
    #[serde(default)]
    pub trace_from_s: u32,
    /// The part of the trace that is played, its mean one.
    #[serde(skip)]
    course: Course,
}

/// How many times the mean is asked, in equal steps of time.
#[derive(Debug, Clone, PartialEq, Default)]
struct Course {
    step_s: f64,
    times: Vec<f64>,
}

impl Demand {
    /// Requests a second at `second` (from the start).
    pub fn rate(&self, second: f64) -> f64 {
        if !self.course.times.is_empty() {
            let step = (second.max(0.0) / self.course.step_s) as usize;
            return self.requests_per_s * self.course.times.get(step).copied().unwrap_or(0.0);
        }
        let all: f64 = self.hours.iter().sum();
        if all <= 0.0 {
            return self.requests_per_s;
        }
        let hours = self.hours.len();
        // In hours since the middle of the day's first.
        let at = (second / 3600.0 - 0.5).rem_euclid(hours as f64);
        let (before, part) = (at as usize % hours, at.fract());
        let between = self.hours[before] * (1.0 - part) + self.hours[(before + 1) % hours] * part;
        self.requests_per_s * between * hours as f64 / all
    }

    /// A rate that is never exceeded.
    pub fn peak(&self) -> f64 {
        let most = |of: &[f64]| of.iter().copied().fold(0.0, f64::max);
        if !self.course.times.is_empty() {
            return self.requests_per_s * most(&self.course.times);
        }
        let all: f64 = self.hours.iter().sum();
        if all <= 0.0 {
            self.requests_per_s
        } else {
            self.requests_per_s * most(&self.hours) * self.hours.len() as f64 / all
        }
    }

    /// Requests expected in so many seconds, or a few more.
    pub fn requests_at_most(&self, length_s: u32) -> f64 {
        if !self.course.times.is_empty() {
            return self.requests_per_s * f64::from(length_s);
        }
        // Whole days ask their mean, the rest of one at most its peak.
        let (days, rest) = (f64::from(length_s / DAY_S * DAY_S), f64::from(length_s % DAY_S));
        self.requests_per_s * days + self.peak() * rest
    }

    /// Reads the trace, if one is named, from the folder of the scenario `file`.
    ///
    /// # Errors
    /// It cannot be read, it ends before the play does, or nothing is asked in that part of it.
    pub(super) fn load(&mut self, file: &str, length_s: u32) -> Result<(), String> {
        let Some(name) = &self.trace else {
            return if self.trace_from_s == 0 { Ok(()) } else { Err("trace_from_s is given and no trace".to_owned()) };
        };
        if !self.hours.is_empty() {
            return Err("hours and a trace are given: leave either out".to_owned());
        }
        let trace = trace::read(&Path::new(file).with_file_name(name)).map_err(|e| e.to_string())?;
        self.course = Course::of(&trace, self.trace_from_s, length_s)?;
        Ok(())
    }

    pub(super) fn fault(&self) -> Option<String> {
        if !self.hours.is_empty() && self.hours.len() != 24 {
            return Some(format!("hours has {} values, a day has 24", self.hours.len()));
        }
        let possible = |h: &f64| (0.0..=HOUR_MAX).contains(h);
        if let Some(bad) = self.hours.iter().find(|h| !possible(h)) {
            return Some(format!("hours has {bad}, which must be 0 to {HOUR_MAX}"));
        }
        let nothing = !self.hours.is_empty() && self.hours.iter().all(|h| *h == 0.0);
        nothing.then(|| "hours are all 0: leave the line out".to_owned())
    }
}

impl Course {
    fn of(trace: &Trace, from_s: u32, length_s: u32) -> Result<Course, String> {
        let step_s = trace.step.0 as f64 / 1e6;
        let first = (f64::from(from_s) / step_s) as usize;
        let count = (f64::from(length_s) / step_s).ceil() as usize;
        let Some(part) = trace.counts.get(first..first.saturating_add(count)) else {
            let has = trace.length().0 / 1_000_000;
            return Err(format!(
                "trace {} has {has} s, and the play needs {length_s} s of it from {from_s} s on",
                trace.name
            ));
        };
        let mean = part.iter().map(|n| *n as f64).sum::<f64>() / part.len().max(1) as f64;
        if mean <= 0.0 {
            return Err(format!("nothing is asked in that part of trace {}", trace.name));
        }
        Ok(Course { step_s, times: part.iter().map(|n| *n as f64 / mean).collect() })
    }
}

#[cfg(test)]
mod tests {
    use crate::arrivals::arrivals;
    use crate::scenario::Scenario;
    use crate::trace::{Kind, generate};
    use std::path::Path;

    /// The flash crowd's fleet, and New York asking for maps as a trace says.
    fn scenario(folder: &Path, demand: &str) -> Result<Scenario, String> {
        let text = include_str!("../../../library/flash-crowd.toml");
        let (fleet, _) = text.split_once("[[demand]]").unwrap();
        let text = format!(
            "{}[[demand]]\nservice = \"maps\"\nregion = \"new-york\"\n{demand}",
            fleet.replace("length_s = 120", "length_s = 86400")
        );
        Scenario::parse(folder.join("recorded.toml").to_str().unwrap(), &text).map_err(|e| e.to_string())
    }

    #[test]
    fn requests_come_as_the_trace_has_them_at_the_mean_that_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let trace = generate(Kind::Diurnal, 7, 3);
        let file = std::fs::File::create(folder.path().join("three-days.trace")).unwrap();
        trace.write("three-days.trace", file).unwrap();
        let demand = "requests_per_s = 2.0\ntrace = \"three-days.trace\"\ntrace_from_s = 86400\n";
        let scenario = scenario(folder.path(), demand).unwrap();
        let asked = arrivals(&scenario);
        let step = trace.step.0 / 1_000_000;
        let day = &trace.counts[(86_400 / step) as usize..(2 * 86_400 / step) as usize];
        // By six hours, so that chance has little part in it.
        for quarter in 0..4_u64 {
            let (from, to) = (quarter * 21_600, (quarter + 1) * 21_600);
            let seen = asked.iter().filter(|a| (from..to).contains(&(a.at.0 / 1_000_000))).count() as f64;
            let part: u64 = day[(from / step) as usize..(to / step) as usize].iter().sum();
            let wanted = 2.0 * 86_400.0 * part as f64 / day.iter().sum::<u64>() as f64;
            assert!((seen - wanted).abs() < 5.0 * wanted.sqrt(), "{quarter}: {seen} instead of {wanted}");
        }
    }

    #[test]
    fn a_trace_that_is_not_there_or_too_short_or_beside_hours_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |demand: &str| scenario(folder.path(), &format!("requests_per_s = 1.0\n{demand}")).unwrap_err();
        let said = refused("trace = \"nowhere.trace\"\n");
        assert!(said.contains("nowhere.trace") && said.contains("new-york"), "{said}");
        let file = std::fs::File::create(folder.path().join("day.trace")).unwrap();
        generate(Kind::Diurnal, 7, 1).write("day.trace", file).unwrap();
        let said = refused("trace = \"day.trace\"\ntrace_from_s = 60\n");
        assert!(said.contains("86400 s of it from 60 s on"), "{said}");
        let said = refused(&format!("trace = \"day.trace\"\nhours = {:?}\n", [1.0; 24]));
        assert!(said.contains("leave either out"), "{said}");
        let said = refused("trace_from_s = 60\n");
        assert!(said.contains("no trace"), "{said}");
    }
}
