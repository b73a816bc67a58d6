//! Whom to ask for what, and when to stop believing them.
//!
//! ```text
//!                 ┌───────────── missing, lost, wrong, overdue: elsewhere or again ◀─────────┐
//! Want ─▶ queued ─┴▶ asked of one source (a slow miss: of two) ─▶ arrived ─▶ gone            │
//!             └─ nobody has it, or the time is up ─▶ Fail          └─ else ──────────────────┘
//!
//! source: Away ─Connect─▶ Connecting ─Up─▶ Up ─Down─▶ Away, not before its backoff has passed
//! ```
//! Pure: events and the time in, commands out. Misses go before what is critical, that before the background;
//! the background is bounded by a window per source and, if there is one, by a rate.
//!
//! # Invariants
//! 1. A want is queued, deferred, or asked of a source that is up.
//! 2. Nothing is asked of a source before its backoff has passed; backoffs are bounded.
//! 3. Every want ends: it arrives, fails with what was tried, or is not wanted any more.

mod choose;
mod source;
#[cfg(test)]
mod tests;
mod tick;
mod window;

use crate::Class;
use crate::bucket::Bucket;
use crate::error::Fault;
use crate::frame::How;
use source::{Source, State};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;
use vmatrix_model::Digest;

/// Which source: its place in the list.
pub type Slot = usize;

/// Sources learnt from others; with these each of 48 networks reaches all the others.
const LEARNT_MAX: usize = 64;
/// An urgent want fails after this long; longer, and a guest would seem to hang.
const URGENT_MAX: Duration = Duration::from_secs(30);
/// A background want outlives a cut link.
const BACKGROUND_MAX: Duration = Duration::from_secs(600);
/// A miss that takes longer is asked of a second source too.
const HEDGE_AFTER: Duration = Duration::from_secs(1);
/// How often time is looked at while anything is wanted.
const TICK: Duration = Duration::from_millis(250);

/// What the plan hears.
#[derive(Debug, Clone)]
pub enum Event {
    /// A chunk is wanted, or wanted more urgently than before.
    Want {
        digest: Digest,
        stored: u64,
        class: Class,
    },
    /// Nobody waits for it any more.
    Unwant {
        digest: Digest,
    },
    /// All listed sources are to be connected.
    Connect,
    /// And again whenever their connections end.
    KeepUp,
    /// The background is to rest, or to go on.
    Pause {
        paused: bool,
    },
    Up {
        slot: Slot,
    },
    /// A connection could not be made, ended, or is ended because of what came over it.
    Down {
        slot: Slot,
        fault: Fault,
    },
    /// Bytes came.
    Heard {
        slot: Slot,
    },
    /// The chunk's bytes came; they are not verified yet.
    Came {
        slot: Slot,
        digest: Digest,
    },
    /// They are what was wanted.
    Arrived {
        slot: Slot,
        digest: Digest,
    },
    Missing {
        slot: Slot,
        digest: Digest,
    },
    Elsewhere {
        slot: Slot,
        digest: Digest,
        addresses: Vec<SocketAddr>,
    },
    /// Time passes.
    Tick,
}

/// What the plan asks to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Connect {
        slot: Slot,
        address: SocketAddr,
    },
    Close {
        slot: Slot,
    },
    Ask {
        slot: Slot,
        digest: Digest,
        stored: u64,
        class: Class,
        how: How,
    },
    Cancel {
        slot: Slot,
        digest: Digest,
    },
    /// No source gave it, and what was tried.
    Fail {
        digest: Digest,
        tried: String,
    },
}

#[derive(Debug)]
struct Want {
    stored: u64,
    class: Class,
    until: Duration,
    /// Of whom it is asked.
    asked: Vec<Slot>,
    /// Who said in this round that it is not there.
    refused: BTreeSet<Slot>,
    /// Whom others sent us to.
    hints: VecDeque<Slot>,
    /// Whether somebody sent us elsewhere, so that the next to be asked is asked to insist.
    sent_on: bool,
    /// Whether the rate cap was paid.
    paid: bool,
    round: u32,
}

/// The whole plan.
#[derive(Debug)]
pub struct Plan {
    sources: Vec<Source>,
    wants: BTreeMap<Digest, Want>,
    queues: [VecDeque<Digest>; 3],
    /// Wants that wait for a time.
    deferred: BTreeSet<(Duration, Digest)>,
    cap: Option<Bucket>,
    /// When the rate cap gives again.
    capped_until: Duration,
    paused: bool,
    keeps_up: bool,
}

impl Plan {
    /// One over these sources, the best first, with a cap on background bytes.
    pub fn new(addresses: &[SocketAddr], background_mbit: Option<u64>) -> Plan {
        Plan {
            sources: addresses.iter().map(|at| Source::new(*at, false)).collect(),
            wants: BTreeMap::new(),
            queues: Default::default(),
            deferred: BTreeSet::new(),
            cap: background_mbit.map(Bucket::new),
            capped_until: Duration::ZERO,
            paused: false,
            keeps_up: false,
        }
    }

    /// Takes an event at time `now`, which never goes back.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Command> {
        let mut commands = Vec::new();
        match event {
            Event::Want { digest, stored, class } => self.want(now, digest, stored, class, &mut commands),
            Event::Unwant { digest } => self.forget(&digest, None, &mut commands),
            Event::Connect => self.connect_all(now, &mut commands),
            Event::KeepUp => {
                self.keeps_up = true;
                self.connect_all(now, &mut commands);
            }
            Event::Pause { paused } => self.paused = paused,
            Event::Up { slot } => self.up(now, slot),
            Event::Down { slot, fault } => self.down(now, slot, fault),
            Event::Heard { slot } => self.heard(now, slot),
            Event::Came { slot, digest } => {
                if let Some(source) = self.sources.get_mut(slot) {
                    source.sent(now, &digest);
                }
            }
            Event::Arrived { slot, digest } => {
                self.heard(now, slot);
                if let Some(source) = self.sources.get_mut(slot) {
                    source.gave(now);
                }
                self.outdone(now, slot, &digest);
                self.forget(&digest, Some(slot), &mut commands);
            }
            Event::Missing { slot, digest } => {
                self.heard(now, slot);
                self.refused(slot, &digest);
            }
            Event::Elsewhere { slot, digest, addresses } => {
                self.heard(now, slot);
                self.elsewhere(slot, &digest, &addresses);
            }
            Event::Tick => self.tick(now, &mut commands),
        }
        self.assign(now, &mut commands);
        commands
    }

    /// When to say that time has passed; `None`: nothing waits for time.
    pub fn next_tick(&self, now: Duration) -> Option<Duration> {
        let first = self.deferred.first().map(|(at, _)| *at);
        let capped = (self.capped_until > now && !self.paused).then_some(self.capped_until);
        let regular = (!self.wants.is_empty()).then_some(now + TICK);
        let away = |s: &&Source| self.keeps_up && !s.learnt && s.state == State::Away;
        let again = self.sources.iter().filter(away).map(|s| s.not_before.max(now)).min();
        [first, capped, regular, again].into_iter().flatten().min()
    }

    /// How urgently a chunk is wanted, if it is.
    pub fn class(&self, digest: &Digest) -> Option<Class> {
        self.wants.get(digest).map(|w| w.class)
    }

    /// The address of a source.
    pub fn address(&self, slot: Slot) -> Option<SocketAddr> {
        self.sources.get(slot).map(|s| s.address)
    }

    /// Sources that are connected, or the faults of those that are not; in the order of the list, learnt ones last.
    pub fn health(&self) -> impl Iterator<Item = (Slot, SocketAddr, bool, Option<&Fault>)> {
        self.sources.iter().enumerate().map(|(i, s)| (i, s.address, s.state == State::Up, s.fault.as_ref()))
    }

    /// Whether a source is of the list.
    pub fn is_listed(&self, slot: Slot) -> bool {
        self.sources.get(slot).is_some_and(|s| !s.learnt)
    }

    /// Whether every source of the list is connected, or known not to answer.
    pub fn settled(&self) -> bool {
        self.sources
            .iter()
            .filter(|s| !s.learnt)
            .all(|s| s.state == State::Up || s.state == State::Away && s.failures > 0)
    }

    fn want(&mut self, now: Duration, digest: Digest, stored: u64, class: Class, commands: &mut Vec<Command>) {
        let until = now + if class == Class::Background { BACKGROUND_MAX } else { URGENT_MAX };
        if let Some(want) = self.wants.get_mut(&digest) {
            if class >= want.class {
                return;
            }
            let before = std::mem::replace(&mut want.class, class);
            want.until = want.until.min(until);
            // A peer that we were sent to may not have it yet; who sent us there answers what is urgent.
            want.hints.clear();
            let learnt = |slot: &Slot| self.sources.get(*slot).is_some_and(|s| s.learnt);
            let (peers, listed): (Vec<Slot>, Vec<Slot>) = std::mem::take(&mut want.asked).into_iter().partition(learnt);
            for slot in &peers {
                self.unask(*slot, &digest);
                commands.push(Command::Cancel { slot: *slot, digest });
            }
            if listed.is_empty() {
                unqueue(self.queue(before), &digest);
                self.deferred.retain(|(_, d)| *d != digest);
                self.queue(class).push_back(digest);
            }
            // Asked again of the same source: there it moves ahead.
            for slot in listed {
                self.ask(now, slot, digest, How::Insist, commands);
            }
            return;
        }
        let want = Want {
            stored,
            class,
            until,
            asked: Vec::new(),
            refused: BTreeSet::new(),
            hints: VecDeque::new(),
            sent_on: false,
            paid: false,
            round: 0,
        };
        self.wants.insert(digest, want);
        self.queue(class).push_back(digest);
    }

    /// Ends a want; all but `but`, who gave it, are told.
    fn forget(&mut self, digest: &Digest, but: Option<Slot>, commands: &mut Vec<Command>) {
        let Some(want) = self.wants.remove(digest) else { return };
        for slot in want.asked {
            if let Some(source) = self.sources.get_mut(slot) {
                source.unask(digest);
                if Some(slot) != but {
                    commands.push(Command::Cancel { slot, digest: *digest });
                }
            }
        }
        unqueue(self.queue(want.class), digest);
        self.deferred.retain(|(_, d)| d != digest);
    }

    /// Marks those that owed a chunk for long when `by` gave it.
    fn outdone(&mut self, now: Duration, by: Slot, digest: &Digest) {
        let asked = self.wants.get(digest).map(|w| w.asked.clone()).unwrap_or_default();
        for slot in asked.into_iter().filter(|slot| *slot != by) {
            if let Some(source) = self.sources.get_mut(slot)
                && let owed = source.asked_for(now, digest)
                && owed >= HEDGE_AFTER
            {
                source.was_slow(now, owed);
            }
        }
    }

    fn connect_all(&mut self, now: Duration, commands: &mut Vec<Command>) {
        for (slot, source) in self.sources.iter_mut().enumerate().filter(|(_, s)| !s.learnt) {
            if source.state == State::Away && source.not_before <= now {
                source.state = State::Connecting;
                commands.push(Command::Connect { slot, address: source.address });
            }
        }
    }

    fn up(&mut self, now: Duration, slot: Slot) {
        if let Some(source) = self.sources.get_mut(slot) {
            source.state = State::Up;
            source.heard = now;
        }
    }

    fn heard(&mut self, now: Duration, slot: Slot) {
        if let Some(source) = self.sources.get_mut(slot) {
            source.heard = now;
        }
    }

    fn down(&mut self, now: Duration, slot: Slot, fault: Fault) {
        let Some(source) = self.sources.get_mut(slot) else { return };
        let asked = source.failed(now, fault);
        // In the order they were asked, before what came later.
        for digest in asked.into_iter().rev() {
            self.requeue(slot, &digest);
        }
    }

    /// Back to the front of its queue, unless somebody else is asked too.
    fn requeue(&mut self, slot: Slot, digest: &Digest) {
        let Some(want) = self.wants.get_mut(digest) else { return };
        want.asked.retain(|s| *s != slot);
        if want.asked.is_empty() {
            let class = want.class;
            self.queue(class).push_front(*digest);
        }
    }

    /// Takes `slot` off those asked; false if it was not.
    fn unask(&mut self, slot: Slot, digest: &Digest) -> bool {
        self.sources.get_mut(slot).is_some_and(|source| source.unask(digest))
    }

    fn refused(&mut self, slot: Slot, digest: &Digest) {
        if !self.unask(slot, digest) {
            return;
        }
        if let Some(want) = self.wants.get_mut(digest) {
            want.refused.insert(slot);
        }
        self.requeue(slot, digest);
    }

    fn elsewhere(&mut self, slot: Slot, digest: &Digest, addresses: &[SocketAddr]) {
        if !self.unask(slot, digest) {
            return;
        }
        let hints: Vec<Slot> = addresses.iter().filter_map(|at| self.learn(*at)).collect();
        if let Some(want) = self.wants.get_mut(digest) {
            want.sent_on = true;
            want.hints = hints.into_iter().filter(|hint| !want.refused.contains(hint)).collect();
        }
        self.requeue(slot, digest);
    }

    fn learn(&mut self, address: SocketAddr) -> Option<Slot> {
        if let Some(slot) = self.sources.iter().position(|s| s.address == address) {
            return Some(slot);
        }
        let learnt = self.sources.iter().filter(|s| s.learnt).count();
        if learnt >= LEARNT_MAX {
            // One that is away makes room.
            let slot = self.sources.iter().position(|s| s.learnt && s.state == State::Away)?;
            *self.sources.get_mut(slot)? = Source::new(address, true);
            return Some(slot);
        }
        self.sources.push(Source::new(address, true));
        Some(self.sources.len() - 1)
    }

    fn queue(&mut self, class: Class) -> &mut VecDeque<Digest> {
        let [miss, critical, background] = &mut self.queues;
        match class {
            Class::Miss => miss,
            Class::Critical => critical,
            Class::Background => background,
        }
    }
}

fn unqueue(queue: &mut VecDeque<Digest>, digest: &Digest) {
    if let Some(place) = queue.iter().position(|d| d == digest) {
        queue.remove(place);
    }
}
