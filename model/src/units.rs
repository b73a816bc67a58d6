//! Quantities with their units in the type. Whole numbers only, so that a plan made twice is the same plan.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};

/// A point in time: microseconds since the epoch (live) or since the scenario began (replay).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Time(pub u64);

/// A length of time in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Span(pub u64);

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Bytes(pub u64);

/// Millionths of a US dollar; negative is a saving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct MicroUsd(pub i64);

/// A rate in megabits (10^6 bits) a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Mbit(pub u32);

impl Span {
    pub const ZERO: Span = Span(0);
    pub const fn ms(ms: u64) -> Span {
        Span(ms * 1000)
    }
    pub const fn secs(s: u64) -> Span {
        Span(s * 1_000_000)
    }
    /// Whole milliseconds, rounded down.
    pub const fn as_ms(self) -> u64 {
        self.0 / 1000
    }
    /// Seconds, for people and charts only: no decision reads a float.
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }
    pub fn times(self, n: u64) -> Span {
        Span(self.0.saturating_mul(n))
    }
}
impl Time {
    /// The time from `earlier` to this, zero if `earlier` is later.
    pub fn since(self, earlier: Time) -> Span {
        Span(self.0.saturating_sub(earlier.0))
    }
    /// Hour of the day (UTC), 0 to 23, for tariffs.
    pub fn hour(self) -> usize {
        ((self.0 / 3_600_000_000) % 24) as usize
    }
}
impl Add<Span> for Time {
    type Output = Time;
    fn add(self, s: Span) -> Time {
        Time(self.0.saturating_add(s.0))
    }
}
impl Sub<Span> for Time {
    type Output = Time;
    fn sub(self, s: Span) -> Time {
        Time(self.0.saturating_sub(s.0))
    }
}
impl Mbit {
    /// How long `bytes` take on an otherwise idle link of this rate, without its delay.
    pub fn time_for(self, bytes: Bytes) -> Span {
        Span((bytes.0.saturating_mul(8)).div_ceil(u64::from(self.0.max(1))))
    }
}
macro_rules! sums {
    ($($t:ident),*) => {$(
        impl Add for $t { type Output = $t; fn add(self, o: $t) -> $t { $t(self.0.saturating_add(o.0)) } }
        impl AddAssign for $t { fn add_assign(&mut self, o: $t) { *self = *self + o; } }
        impl Sub for $t { type Output = $t; fn sub(self, o: $t) -> $t { $t(self.0.saturating_sub(o.0)) } }
        impl Sum for $t { fn sum<I: Iterator<Item = $t>>(i: I) -> $t { i.fold($t(0), |a, b| a + b) } }
    )*};
}
sums!(Span, Bytes, MicroUsd);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            us if us < 1000 => write!(f, "{us} µs"),
            us if us < 1_000_000 => write!(f, "{} ms", us / 1000),
            us if us < 600_000_000 => write!(f, "{:.1} s", us as f64 / 1e6),
            us => write!(f, "{} min", us / 60_000_000),
        }
    }
}
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            b if b < 1 << 10 => write!(f, "{b} B"),
            b if b < 1 << 20 => write!(f, "{:.1} KiB", b as f64 / 1024.0),
            b if b < 1 << 30 => write!(f, "{:.1} MiB", b as f64 / f64::from(1 << 20)),
            b => write!(f, "{:.2} GiB", b as f64 / f64::from(1 << 30)),
        }
    }
}
impl fmt::Display for MicroUsd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let usd = self.0.unsigned_abs();
        if usd >= 1_000_000 {
            write!(f, "{sign}{:.2} $", usd as f64 / 1e6)
        } else {
            write!(f, "{sign}{:.2} m$", usd as f64 / 1e3)
        }
    }
}
impl fmt::Display for Mbit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} Mbit/s", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_t3_carries_4_gb_in_12_minutes() {
        // Paper §5.4 says "around 15 minutes" over a T3 of 44.736 Mbit/s, which implies 80 % goodput.
        let t = Mbit(45).time_for(Bytes(4_000_000_000));
        assert_eq!(t.0 / 60_000_000, 11);
    }

    #[test]
    fn time_never_runs_below_zero() {
        assert_eq!(Time(5).since(Time(9)), Span::ZERO);
        assert_eq!(Time(5) - Span(9), Time(0));
    }
}
