//! Which source is asked for a want.
//!
//! ```text
//! queued ─▶ sent elsewhere? ─yes─▶ those, patiently, one after the other ─none gives it─▶ whoever sent us, insisting
//!               └no─▶ urgent: the best that is up; background: whoever owes least, within window and rate
//!                         └─ none is up ─▶ connect, wait for a backoff, ask another round, or fail
//! ```

use super::source::{Source, State};
use super::{Command, Plan, Slot, Want};
use crate::Class;
use crate::frame::How;
use std::time::Duration;
use vmatrix_model::Digest;

/// How often all sources are asked for what none of them has: one may be getting it.
const ROUNDS_MAX: u32 = 3;
const ROUND_PAUSE: Duration = Duration::from_millis(300);

/// What becomes of a queued want.
enum Choice {
    Ask(Slot, How),
    /// Its source is being connected, or is busy.
    Later,
    /// No source takes more of this class, so others of it need not be looked at.
    Full,
    /// Not before a time.
    Again(Duration),
    Fail,
}

impl Plan {
    /// Gives queued wants to sources, the urgent ones first.
    pub(super) fn assign(&mut self, now: Duration, commands: &mut Vec<Command>) {
        for class in Class::ALL {
            if class == Class::Background && self.paused {
                continue;
            }
            let waiting = self.queue(class).len();
            for _ in 0..waiting {
                let Some(digest) = self.queue(class).pop_front() else { break };
                match self.choose(now, &digest, commands) {
                    Choice::Ask(slot, how) => self.ask(now, slot, digest, how, commands),
                    Choice::Later => self.queue(class).push_back(digest),
                    Choice::Full => {
                        self.queue(class).push_front(digest);
                        break;
                    }
                    Choice::Again(at) => {
                        self.deferred.insert((at, digest));
                    }
                    Choice::Fail => self.fail(&digest, commands),
                }
            }
        }
    }

    pub(super) fn ask(&mut self, now: Duration, slot: Slot, digest: Digest, how: How, commands: &mut Vec<Command>) {
        let (Some(want), Some(source)) = (self.wants.get_mut(&digest), self.sources.get_mut(slot)) else { return };
        want.asked.push(slot);
        source.ask(now, digest, want.class, want.stored, how == How::Patient);
        commands.push(Command::Ask { slot, digest, stored: want.stored, class: want.class, how });
    }

    /// Sources that are up and have not refused: those of the list, the best first, then learnt ones; all of them
    /// before those that were slow.
    pub(super) fn usable(&self, now: Duration, want: &Want) -> Vec<Slot> {
        let up = |(slot, source): &(Slot, &Source)| source.state == State::Up && !want.refused.contains(slot);
        let mut usable: Vec<(Slot, &Source)> = self.sources.iter().enumerate().filter(up).collect();
        usable.sort_by_key(|(slot, source)| (source.slow_until > now, source.learnt, *slot));
        usable.into_iter().map(|(slot, _)| slot).collect()
    }

    fn choose(&mut self, now: Duration, digest: &Digest, commands: &mut Vec<Command>) -> Choice {
        // Hints first: whoever we were sent to.
        while let Some(hint) = self.wants.get(digest).and_then(|w| w.hints.front().copied()) {
            match self.reach(now, hint, commands) {
                State::Up if self.has_room(hint, digest, true) => {
                    self.next_hint(digest);
                    return Choice::Ask(hint, How::Patient);
                }
                State::Up | State::Connecting => return Choice::Later,
                State::Away => self.next_hint(digest),
            }
        }
        let Some(want) = self.wants.get(digest) else { return Choice::Later };
        let how = if want.sent_on { How::Insist } else { How::Plain };
        let up = self.usable(now, want);
        let listed: Vec<Slot> =
            up.iter().copied().filter(|s| self.sources.get(*s).is_some_and(|s| !s.learnt)).collect();
        if want.class != Class::Background {
            if let Some(slot) = up.into_iter().find(|slot| self.has_room(*slot, digest, false)) {
                return Choice::Ask(slot, how);
            }
        } else {
            let from = if listed.is_empty() { up } else { listed };
            let least = |slot: &Slot| self.sources.get(*slot).map_or(u64::MAX, |s| s.background_bytes);
            if let Some(slot) = from.iter().copied().filter(|s| self.has_room(*s, digest, false)).min_by_key(least) {
                return if self.pay(now, digest) { Choice::Ask(slot, how) } else { Choice::Full };
            }
            if !from.is_empty() {
                return Choice::Full;
            }
        }
        self.wait_or_fail(now, digest, commands)
    }

    /// Nobody who is up is left: others may come up, or all have been asked.
    fn wait_or_fail(&mut self, now: Duration, digest: &Digest, commands: &mut Vec<Command>) -> Choice {
        let mut soonest: Option<Duration> = None;
        for slot in 0..self.sources.len() {
            let skip = self.wants.get(digest).is_none_or(|w| w.refused.contains(&slot));
            if skip || self.sources.get(slot).is_none_or(|s| s.learnt) {
                continue;
            }
            match self.reach(now, slot, commands) {
                State::Up | State::Connecting => return Choice::Later,
                State::Away => {
                    let at = self.sources.get(slot).map(|s| s.not_before);
                    soonest = soonest.into_iter().chain(at).min();
                }
            }
        }
        let Some(want) = self.wants.get_mut(digest) else { return Choice::Later };
        if let Some(at) = soonest {
            return Choice::Again(at);
        }
        want.round += 1;
        if want.round >= ROUNDS_MAX || self.sources.is_empty() {
            return Choice::Fail;
        }
        want.refused.clear();
        Choice::Again(now + ROUND_PAUSE)
    }

    fn next_hint(&mut self, digest: &Digest) {
        if let Some(want) = self.wants.get_mut(digest) {
            want.hints.pop_front();
        }
    }

    /// The state of a source, which is connected if it may be.
    fn reach(&mut self, now: Duration, slot: Slot, commands: &mut Vec<Command>) -> State {
        let Some(source) = self.sources.get_mut(slot) else { return State::Away };
        if source.state == State::Away && source.not_before <= now {
            source.state = State::Connecting;
            commands.push(Command::Connect { slot, address: source.address });
        }
        source.state
    }

    fn has_room(&self, slot: Slot, digest: &Digest, patient: bool) -> bool {
        match (self.sources.get(slot), self.wants.get(digest)) {
            (Some(source), Some(want)) => source.has_room(want.class, want.stored, patient),
            _ => false,
        }
    }

    /// Pays the rate cap for a want, once.
    fn pay(&mut self, now: Duration, digest: &Digest) -> bool {
        let (Some(cap), Some(want)) = (self.cap.as_mut(), self.wants.get_mut(digest)) else { return true };
        if want.paid {
            return true;
        }
        match cap.take(now, want.stored) {
            Ok(()) => want.paid = true,
            Err(wait) => self.capped_until = now + wait,
        }
        want.paid
    }
}
