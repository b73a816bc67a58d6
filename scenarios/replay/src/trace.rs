//! Demand traces: requests in each of equal steps of time.
//!
//! ```text
//! period,count CSV ─┐                                   ┌─▶ describe
//! own format ───────┼─▶ Trace ─▶ mask, clean, slice, resample ─▶ write
//! generate ─────────┘
//! ```
//!
//! Nothing here needs the place a request came from: the public traces do not tell it.

mod civil;
mod clean;
mod describe;
mod format;
mod generate;
mod lines;
#[cfg(test)]
mod recorded;
mod reshape;

pub use clean::{Change, Filling};
pub use describe::{Burst, Description};
pub use format::{Gap, Gaps, Imported, import, parse, read};
pub use generate::{Crowd, DAYS_MAX, Kind, generate};
pub use lines::TraceError;
pub(crate) use lines::{Bounds, Line, Lines, shown};

use vmatrix_model::Span;

/// Most requests of a step. The busiest sites answer some 10^8 a second, and a step may be hours.
pub const COUNT_MAX: u64 = 1_000_000_000_000;
/// Most steps of a trace: 19 years by the minute; their sum still fits 64 bits.
pub const STEPS_MAX: usize = 10_000_000;
/// Longest step: of a longer one nobody could tell at what hour the requests came.
pub const STEP_MAX: Span = Span::secs(86_400);
/// Longest name, bytes.
const NAME_MAX: usize = 128;

/// Requests in each of equal steps of time, one after the other.
///
/// # Invariants
/// What the readers and generators of this module return keeps these, and [`Trace::check`] tells of any other:
/// 1. At least one step, at most [`STEPS_MAX`]; each of at most [`COUNT_MAX`] requests.
/// 2. A step is a number of whole seconds, or a second is a number of steps; it is at most [`STEP_MAX`].
/// 3. It begins in the years 1970 to 9999, and ends there.
/// 4. The name is one line of 1 to 128 bytes, with no space at its ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    pub name: String,
    /// Unix seconds (UTC) at which the first step begins.
    pub begins: i64,
    pub step: Span,
    /// Requests of each step.
    pub counts: Vec<u64>,
}

impl Trace {
    /// What keeps this from being a trace.
    ///
    /// # Errors
    /// Names the first invariant that is broken.
    pub fn check(&self) -> Result<(), TraceError> {
        let problem = if self.name.is_empty() || self.name.len() > NAME_MAX {
            format!("its name must have 1 to {NAME_MAX} bytes")
        } else if self.name.trim() != self.name || self.name.chars().any(char::is_control) {
            "its name must be one line, with no space at its ends".to_owned()
        } else if let Some(problem) = bad_step(self.step) {
            problem
        } else if self.counts.is_empty() {
            "it has no steps".to_owned()
        } else if self.counts.len() > STEPS_MAX {
            format!("it has {} steps, at most {STEPS_MAX} are taken", self.counts.len())
        } else if let Some(at) = self.counts.iter().position(|c| *c > COUNT_MAX) {
            format!("step {at} has {} requests, at most {COUNT_MAX} are taken", self.counts[at])
        } else if self.begins < 0 || self.ends() > civil::END {
            "it must begin and end in the years 1970 to 9999".to_owned()
        } else {
            return Ok(());
        };
        Err(TraceError::Whole { file: format!("trace {}", shown(&self.name)), problem })
    }

    /// Unix seconds at which a step begins; a step of less than a second begins within that second.
    pub fn at(&self, step: usize) -> i64 {
        let since = u128::from(self.step.0) * step as u128 / 1_000_000;
        self.begins.saturating_add(i64::try_from(since).unwrap_or(i64::MAX))
    }

    /// Unix seconds at which the last step has ended.
    pub fn ends(&self) -> i64 {
        let length = (u128::from(self.step.0) * self.counts.len() as u128).div_ceil(1_000_000);
        self.begins.saturating_add(i64::try_from(length).unwrap_or(i64::MAX))
    }

    /// How long it is.
    pub fn length(&self) -> Span {
        self.step.times(self.counts.len() as u64)
    }

    /// All its requests.
    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0, |sum, c| sum.saturating_add(*c))
    }
}

/// What is wrong with a step, if anything is.
fn bad_step(step: Span) -> Option<String> {
    let even = step.0 > 0 && (step.0.is_multiple_of(1_000_000) || 1_000_000_u64.is_multiple_of(step.0));
    if !even {
        Some("its step must be whole seconds, or a second a number of whole steps".to_owned())
    } else if step > STEP_MAX {
        Some(format!("its step is {step}, at most {STEP_MAX} is taken"))
    } else {
        None
    }
}

/// A time of a trace for people: `1998-04-30 21:30:00`, UTC.
pub fn time_of(seconds: i64) -> String {
    civil::written(seconds)
}

/// Unix seconds of `YYYY-MM-DD HH:MM:SS`, UTC, from the year 1970 to 9999.
pub fn time(text: &str) -> Option<i64> {
    civil::seconds(text)
}
