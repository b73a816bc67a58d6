//! Whether the owner lives, readable without asking it: /readyz must not stand in the queue it reports on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// An owner that has not ticked for so long is stuck, on its disk as a rule; a sync of a busy one takes a second.
const STUCK: Duration = Duration::from_secs(5);

/// When the owner last ticked.
#[derive(Debug, Clone)]
pub(crate) struct Pulse {
    began: Instant,
    /// Milliseconds from `began` to the last tick, and one more; 0 before the first.
    last: Arc<AtomicU64>,
}

impl Pulse {
    pub(crate) fn new() -> Pulse {
        Pulse { began: Instant::now(), last: Arc::default() }
    }

    fn ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The owner has ticked.
    pub(crate) fn beat(&self) {
        self.last.store(self.ms().saturating_add(1), Ordering::Relaxed);
    }

    /// Whether it ticked lately.
    pub(crate) fn beats(&self) -> bool {
        let last = self.last.load(Ordering::Relaxed);
        last > 0 && u128::from(self.ms().saturating_sub(last)) < STUCK.as_millis()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_that_never_ticked_or_stopped_ticking_is_not_ready() {
        let mut pulse = Pulse::new();
        assert!(!pulse.beats());
        pulse.beat();
        assert!(pulse.beats());
        pulse.began -= STUCK + Duration::from_secs(1);
        assert!(!pulse.beats());
    }
}
