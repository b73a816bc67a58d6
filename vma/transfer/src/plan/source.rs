//! What is known of one source.

use super::window::Window;
use crate::Class;
use crate::error::Fault;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;
use vmatrix_model::Digest;

/// Chunks asked of one source; a server takes 2048.
const ASKED_MAX: usize = 1024;
/// The background leaves room for what is urgent.
const ASKED_BACKGROUND_MAX: usize = 512;
/// Stored bytes asked of one source that may itself have to wait for them: most of them are not on the way yet.
const PATIENT_MAX: u64 = 4 << 20;
/// A source that owes something it has, and sends nothing at all for so long, is gone.
const SILENCE_MAX: Duration = Duration::from_secs(4);
/// A source that sends, but not this, for so long.
const MISS_MAX: Duration = Duration::from_secs(5);
const CRITICAL_MAX: Duration = Duration::from_secs(20);
const BACKGROUND_MAX: Duration = Duration::from_secs(60);
/// Backoffs double with each failure, from the first to the last.
const LOST: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
const FOUL: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
const REFUSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Whether a source can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Away,
    Connecting,
    Up,
}

#[derive(Debug)]
struct Asked {
    at: Duration,
    class: Class,
    stored: u64,
    order: u64,
    /// Whether it may itself have to wait for this first: then the time it takes says nothing of the way.
    patient: bool,
}

/// One source.
#[derive(Debug)]
pub(super) struct Source {
    pub address: SocketAddr,
    /// Not of the list: another source sent us to it.
    pub learnt: bool,
    pub state: State,
    pub not_before: Duration,
    /// Until then others are asked first: it was too slow with a miss.
    pub slow_until: Duration,
    /// Failures since it last gave something.
    pub failures: u32,
    pub fault: Option<Fault>,
    pub heard: Duration,
    /// Stored bytes asked of it in the background, and those that it may itself be waiting for.
    pub background_bytes: u64,
    pub patient_bytes: u64,
    background: usize,
    /// Stored bytes that may be asked of it in the background.
    window: Window,
    gave: Duration,
    asked: HashMap<Digest, Asked>,
    order: u64,
}

impl Source {
    pub fn new(address: SocketAddr, learnt: bool) -> Source {
        Source {
            address,
            learnt,
            state: State::Away,
            not_before: Duration::ZERO,
            slow_until: Duration::ZERO,
            failures: 0,
            fault: None,
            heard: Duration::ZERO,
            background_bytes: 0,
            patient_bytes: 0,
            background: 0,
            window: Window::default(),
            gave: Duration::ZERO,
            asked: HashMap::new(),
            order: 0,
        }
    }

    pub fn has_room(&self, class: Class, stored: u64, patient: bool) -> bool {
        if class != Class::Background {
            return self.asked.len() < ASKED_MAX;
        }
        let urgent = self.asked.len() > self.background;
        let (bytes, room) = match patient {
            true => (self.patient_bytes, PATIENT_MAX),
            false => (self.background_bytes, self.window.room(urgent)),
        };
        self.background < ASKED_BACKGROUND_MAX && (bytes == 0 || bytes + stored <= room)
    }

    pub fn ask(&mut self, now: Duration, digest: Digest, class: Class, stored: u64, patient: bool) {
        self.unask(&digest);
        if class == Class::Background {
            *self.bytes_mut(patient) += stored;
            self.background += 1;
        }
        self.order += 1;
        self.asked.insert(digest, Asked { at: now, class, stored, order: self.order, patient });
    }

    /// It need not answer this any more; false if it was not asked.
    pub fn unask(&mut self, digest: &Digest) -> bool {
        let Some(asked) = self.asked.remove(digest) else { return false };
        if asked.class == Class::Background {
            *self.bytes_mut(asked.patient) -= asked.stored;
            self.background -= 1;
        }
        true
    }

    fn bytes_mut(&mut self, patient: bool) -> &mut u64 {
        if patient { &mut self.patient_bytes } else { &mut self.background_bytes }
    }

    /// The bytes of what it was asked for have come.
    pub fn sent(&mut self, now: Duration, digest: &Digest) {
        self.heard = now;
        if let Some(asked) = self.asked.get(digest).filter(|a| a.class == Class::Background && !a.patient) {
            self.window.came(now, now.saturating_sub(asked.at), asked.stored);
        }
    }

    /// They are right: it is good again.
    pub fn gave(&mut self, now: Duration) {
        self.gave = now;
        self.failures = 0;
        self.fault = None;
    }

    /// Another was faster with a miss that was asked of this one first, by far.
    pub fn was_slow(&mut self, now: Duration, owed: Duration) {
        self.failures = self.failures.saturating_add(1);
        self.slow_until = now + backoff(REFUSED, self.failures);
        self.fault = Some(Fault::Silent(owed.as_millis() as u64));
    }

    /// How long it owes this; zero if it does not.
    pub fn asked_for(&self, now: Duration, digest: &Digest) -> Duration {
        self.asked.get(digest).map_or(Duration::ZERO, |a| now.saturating_sub(a.at))
    }

    /// How long it has been silent, if that is too long.
    pub fn overdue(&self, now: Duration) -> Option<Duration> {
        let first = self.asked.values().filter(|a| !a.patient).map(|a| a.at).min();
        let silent = first.map_or(Duration::ZERO, |first| now.saturating_sub(first.max(self.heard)));
        if silent >= SILENCE_MAX {
            return Some(silent);
        }
        let owed = |asked: &Asked| {
            let (since, most) = match asked.class {
                Class::Miss => (asked.at, MISS_MAX),
                Class::Critical => (asked.at.max(self.gave), CRITICAL_MAX),
                Class::Background => (asked.at.max(self.gave), BACKGROUND_MAX),
            };
            Some(now.saturating_sub(since)).filter(|owed| *owed >= most)
        };
        self.asked.values().filter_map(owed).max()
    }

    /// It failed: what it was asked for, in the order it was asked.
    pub fn failed(&mut self, now: Duration, fault: Fault) -> Vec<Digest> {
        self.state = State::Away;
        self.failures = self.failures.saturating_add(1);
        let bounds = match &fault {
            fault if fault.is_foul() => FOUL,
            Fault::Handshake(_) | Fault::Refused(_) => REFUSED,
            _ => LOST,
        };
        self.not_before = now + backoff(bounds, self.failures);
        self.fault = Some(fault);
        self.background_bytes = 0;
        self.patient_bytes = 0;
        self.background = 0;
        self.window = Window::default();
        let mut asked: Vec<(u64, Digest)> = self.asked.drain().map(|(d, a)| (a.order, d)).collect();
        asked.sort_unstable();
        asked.into_iter().map(|(_, digest)| digest).collect()
    }
}

/// Doubled with each failure, from the first to the last.
fn backoff((first, last): (Duration, Duration), failures: u32) -> Duration {
    (first * 2u32.saturating_pow(failures.saturating_sub(1).min(16))).min(last)
}
