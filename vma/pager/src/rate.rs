//! A cap on a rate: a bucket that fills with time and may run into debt by one request.

use std::time::Duration;

/// Longest time that what was not used is kept for: a pause must not be followed by a burst.
const KEPT: Duration = Duration::from_millis(50);

/// Bytes that may be asked for.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    bytes_per_s: u64,
    /// Below zero: in debt.
    level: i64,
    at: Duration,
}

impl Bucket {
    /// Fills at `mbit` megabits a second; at least one.
    pub fn new(mbit: u64) -> Bucket {
        Bucket { bytes_per_s: mbit.clamp(1, 1 << 20) * 125_000, level: 0, at: Duration::ZERO }
    }

    /// Takes `bytes` at time `now` if it is not in debt. A request larger than what is there passes whole: it is
    /// paid for by waiting afterwards.
    pub fn take(&mut self, now: Duration, bytes: u64) -> bool {
        let passed = now.saturating_sub(self.at).min(Duration::from_secs(3600));
        let filled = |time: Duration| (u128::from(self.bytes_per_s) * time.as_micros() / 1_000_000) as i64;
        self.level = self.level.saturating_add(filled(passed)).min(filled(KEPT).max(1));
        self.at = self.at.max(now);
        if self.level <= 0 {
            return false;
        }
        self.level = self.level.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_a_second_no_more_passes_than_the_rate_and_one_request() {
        let (mut bucket, request) = (Bucket::new(8), 300_000);
        let passed = (0..1000).filter(|ms| bucket.take(Duration::from_millis(*ms), request)).count() as u64;
        assert!((3..=4).contains(&passed), "{passed} requests of {request} bytes at 1,000,000 bytes/s");
    }

    #[test]
    fn after_a_long_rest_only_a_moment_of_it_counts() {
        let mut bucket = Bucket::new(8);
        let now = Duration::from_secs(1000);
        let passed = (0..1000).filter(|_| bucket.take(now, 1000)).count();
        assert_eq!(passed, 50, "50 ms at 1 byte/µs, by the thousand");
    }
}
