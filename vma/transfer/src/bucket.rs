//! A rate cap: a bucket that fills with the rate and is emptied by what is sent.
//!
//! `Bucket` is pure: it is told the time. `Cap` shares one among connections and waits; while a more urgent class
//! waits for the bucket, a less urgent one does not take from it.

use crate::Class;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What fits into a bucket: so much of the rate may be saved up while nothing is sent.
const BURST: Duration = Duration::from_millis(10);
/// A bucket holds at least some frames, or a low rate could never send one.
const BURST_MIN: u64 = 32 << 10;

/// Bytes that may be sent, filling with the rate up to a burst.
#[derive(Debug, Clone)]
pub struct Bucket {
    bytes_per_sec: u64,
    burst: u64,
    /// Since the bucket's beginning: when it will be (or was) full again.
    full_at: Duration,
}

impl Bucket {
    /// A full one, of `mbit` Mbit/s (10^6 bits; at least 1).
    pub fn new(mbit: u64) -> Bucket {
        let bytes_per_sec = mbit.max(1).saturating_mul(1_000_000) / 8;
        let saved = bytes_per_sec.saturating_mul(BURST.as_millis() as u64) / 1000;
        Bucket { bytes_per_sec, burst: saved.max(BURST_MIN), full_at: Duration::ZERO }
    }

    /// Takes `bytes` at time `now`, or says how long to wait before there are so many. More than a burst is
    /// given when the bucket is full, and owed afterwards.
    pub fn take(&mut self, now: Duration, bytes: u64) -> Result<(), Duration> {
        let empty_for = self.full_at.saturating_sub(now);
        let room = self.span(self.burst.saturating_sub(bytes.min(self.burst)));
        if empty_for > room {
            return Err(empty_for - room);
        }
        self.full_at = self.full_at.max(now) + self.span(bytes);
        Ok(())
    }

    /// Puts back what was taken and not sent.
    pub fn put_back(&mut self, bytes: u64) {
        self.full_at = self.full_at.saturating_sub(self.span(bytes));
    }

    fn span(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_sec.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// One bucket for many connections.
#[derive(Debug)]
pub struct Cap {
    began: Instant,
    bucket: Mutex<Bucket>,
    waiting: [AtomicUsize; 3],
}

impl Cap {
    /// A cap of `mbit` Mbit/s.
    pub fn new(mbit: u64) -> Cap {
        Cap { began: Instant::now(), bucket: Mutex::new(Bucket::new(mbit)), waiting: Default::default() }
    }

    /// Takes `bytes` for `class`, or says how long to wait before asking again.
    pub fn take(&self, class: Class, bytes: u64) -> Result<(), Duration> {
        if self.waiting.iter().take(class.index()).any(|more_urgent| more_urgent.load(Ordering::Relaxed) > 0) {
            return Err(Duration::from_millis(1));
        }
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(self.began.elapsed(), bytes)
    }

    /// Puts back what was taken and not sent.
    pub fn put_back(&self, bytes: u64) {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).put_back(bytes);
    }

    /// Says that `class` waits, until the guard is dropped.
    pub fn waits(&self, class: Class) -> Waits<'_> {
        let counter = self.waiting.get(class.index());
        if let Some(counter) = counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        Waits(counter)
    }
}

/// Somebody waits for the bucket.
#[derive(Debug)]
pub struct Waits<'a>(Option<&'a AtomicUsize>);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if let Some(counter) = self.0 {
            counter.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn over_any_time_what_is_taken_is_the_rate_and_one_burst(
            mbit in 1u64..10_000,
            asks in prop::collection::vec((1u64..20_000, 0u64..50_000), 1..400),
        ) {
            let mut bucket = Bucket::new(mbit);
            let (rate, burst) = (bucket.bytes_per_sec, bucket.burst);
            let (mut now, mut taken) = (Duration::ZERO, 0u64);
            for (bytes, micros) in asks {
                now += Duration::from_micros(micros);
                while let Err(wait) = bucket.take(now, bytes) {
                    prop_assert!(wait > Duration::ZERO);
                    now += wait;
                }
                taken += bytes;
                let allowed = (now.as_nanos() * u128::from(rate) / 1_000_000_000) as u64 + burst + 1;
                prop_assert!(taken <= allowed, "{taken} of {allowed} bytes after {now:?}");
            }
        }
    }

    #[test]
    fn a_bucket_that_is_always_asked_gives_the_whole_rate() {
        let mut bucket = Bucket::new(100);
        let (mut now, mut taken) = (Duration::ZERO, 0u64);
        while now < Duration::from_secs(2) {
            match bucket.take(now, 16_384) {
                Ok(()) => taken += 16_384,
                Err(wait) => now += wait,
            }
        }
        let wanted = 25_000_000;
        assert!(taken.abs_diff(wanted) < wanted / 100, "{taken} bytes in 2 s of 100 Mbit/s");
    }

    #[test]
    fn background_takes_nothing_while_a_miss_waits() {
        let cap = Cap::new(1000);
        let miss = cap.waits(Class::Miss);
        assert!(cap.take(Class::Background, 1).is_err());
        assert!(cap.take(Class::Miss, 1).is_ok());
        drop(miss);
        assert!(cap.take(Class::Background, 1).is_ok());
    }
}
