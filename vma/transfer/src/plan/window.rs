//! How much may be asked of a source in the background, so that a miss finds the way to it free.
//!
//! ```text
//! a chunk came, so long after it was asked ─▶ longer than the way takes? ─yes─▶ it waited in a queue: ask less
//!                                                                        └─no──▶ ask more
//! ```
//! A server sends a miss before the background, but what is under way already, in the queue before the narrowest
//! link, nobody can overtake. So that queue is kept short, as LEDBAT (RFC 6817) does: the shortest time seen is the
//! way, what is beyond it was spent waiting.

use std::time::Duration;

/// What may wait in queues: so much later a miss is answered. Shorter, and a busy host would seem a busy link.
const WAIT_MAX: Duration = Duration::from_millis(25);
/// What 25 Mbit/s and 80 ms hold, and 100 Mbit/s and 20 ms: with less these were not filled.
const FLOOR: u64 = 256 << 10;
/// While a miss is under way: one or two chunks, so that the background does not stop.
const FLOOR_URGENT: u64 = 128 << 10;
/// More than 1 Gbit/s and 30 ms hold.
const CEILING: u64 = 4 << 20;
const BEGIN: u64 = 512 << 10;
/// The way may change; the shortest time is of the last one or two of these.
const PERIOD: Duration = Duration::from_secs(10);

/// The window of one source.
#[derive(Debug, Clone)]
pub(super) struct Window {
    bytes: u64,
    /// Shortest times of this period and the one before.
    shortest: [Duration; 2],
    since: Duration,
}

impl Default for Window {
    fn default() -> Window {
        Window { bytes: BEGIN, shortest: [Duration::MAX; 2], since: Duration::ZERO }
    }
}

impl Window {
    /// Bytes that may be asked for; `urgent`: something that must not wait is under way.
    pub fn room(&self, urgent: bool) -> u64 {
        if urgent { FLOOR_URGENT } else { self.bytes }
    }

    /// A chunk of `stored` bytes came `took` after it was asked for.
    pub fn came(&mut self, now: Duration, took: Duration, stored: u64) {
        if now.saturating_sub(self.since) >= PERIOD {
            self.shortest = [Duration::MAX, self.shortest[0]];
            self.since = now;
        }
        self.shortest[0] = self.shortest[0].min(took);
        let way = self.shortest[0].min(self.shortest[1]);
        let waited = took.saturating_sub(way).min(2 * WAIT_MAX);
        // In proportion to how far it is off, at most by half of what came.
        let (off, grow) = if waited <= WAIT_MAX { (WAIT_MAX - waited, true) } else { (waited - WAIT_MAX, false) };
        let step = stored / 2 * off.as_micros() as u64 / WAIT_MAX.as_micros() as u64;
        self.bytes = if grow { self.bytes + step } else { self.bytes.saturating_sub(step) }.clamp(FLOOR, CEILING);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// A link of so many bytes a millisecond and so long a way, asked as the window says for `span`; how long the
    /// last chunk waited in the queue, and how much of the link was used in the second half.
    fn link(bytes_per_ms: u64, way: Duration, span: Duration) -> (Duration, u64) {
        let (mut window, chunk) = (Window::default(), 50_000);
        let (mut now, mut free_at, mut carried) = (Duration::ZERO, Duration::ZERO, 0);
        let mut under_way: VecDeque<(Duration, Duration)> = VecDeque::new();
        let mut waited = Duration::ZERO;
        while now < span {
            while (under_way.len() as u64 + 1) * chunk <= window.room(false) {
                let begins = free_at.max(now + way / 2);
                free_at = begins + Duration::from_micros(chunk * 1000 / bytes_per_ms);
                under_way.push_back((now, free_at + way / 2));
            }
            let Some((asked, comes)) = under_way.pop_front() else { break };
            now = comes;
            window.came(now, now - asked, chunk);
            waited = (now - asked).saturating_sub(way);
            carried += if now >= span / 2 { chunk } else { 0 };
        }
        (waited, carried * 100 / (bytes_per_ms * (span.as_millis() as u64 / 2)))
    }

    #[test]
    fn links_are_filled_and_their_queues_are_short() {
        for (mbit, way_ms) in [(25, 80), (100, 20), (100, 80), (1000, 5), (1000, 20)] {
            let (waited, used) = link(mbit * 125, Duration::from_millis(way_ms), Duration::from_secs(20));
            let chunk_takes = Duration::from_micros(50_000 * 8 / mbit);
            assert!(used >= 90, "{mbit} Mbit/s {way_ms} ms: {used} % used");
            assert!(waited <= 2 * WAIT_MAX + chunk_takes, "{mbit} Mbit/s {way_ms} ms: {waited:?} in the queue");
        }
    }

    #[test]
    fn a_window_is_bounded_and_small_beside_what_is_urgent() {
        let mut window = Window::default();
        for _ in 0..10_000 {
            window.came(Duration::from_secs(1), Duration::from_millis(1), 1 << 20);
        }
        assert_eq!((window.room(false), window.room(true)), (CEILING, FLOOR_URGENT));
        for _ in 0..10_000 {
            window.came(Duration::from_secs(2), Duration::from_secs(1), 1 << 20);
        }
        assert_eq!(window.room(false), FLOOR);
    }
}
