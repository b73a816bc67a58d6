//! A machine as its VM agent knows it: subscriptions, looks, knocks ─▶ heard or silent, and which of its cells count.
//!
//! ```text
//!  heard ── not subscribed for LEASE ──▶ silent ── HOLD over, or no cell left ──▶ gone
//!    ▲                                     │ its healthy cells stay in rotation, for guests
//!    └───── subscribed, and looked at ─────┘ outlive their machine's daemon
//! ```
//!
//! What takes a silent machine's cell out of rotation: knocks at it that are not answered, an assignment
//! that wants fewer, and the machine's own word once it is back.

use crate::steps::{CellSeen, Life, Seen, StagedSeen};
use std::collections::BTreeMap;
use vmatrix_model::inventory::MachineSeen;
use vmatrix_model::{InstanceId, Span, Time};

/// A machine that does not renew its subscription within so long is silent: it gets no new work.
pub const LEASE: Span = Span::secs(5);
/// Healthy cells of a silent machine count for so long at most: guests that nobody can suspend, reseed or
/// ask for their health are not to serve for ever.
pub const HOLD: Span = Span::secs(300);
/// Knocks in a row that a cell of a silent machine may leave without an answer: one or two are missed in a crowd.
pub const KNOCKS_MAX: u32 = 3;

/// What is known of a machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// As it last subscribed.
    pub seen: MachineSeen,
    /// What it last had; of a silent machine, what still counts.
    pub has: Option<Seen>,
    lease_until: Time,
    silent: Option<Time>,
    /// Knocks in a row that were not answered.
    missed: BTreeMap<InstanceId, u32>,
}

impl Machine {
    pub fn new(now: Time, seen: MachineSeen) -> Machine {
        Machine { seen, has: None, lease_until: now + LEASE, silent: None, missed: BTreeMap::new() }
    }

    /// Renews the lease. One that was silent is heard again once it was also looked at: what it had may be gone.
    pub fn subscribe(&mut self, now: Time, seen: MachineSeen) {
        self.seen = seen;
        self.lease_until = now + LEASE;
    }

    /// Whether a look is newer than the last one, and so believed.
    pub fn is_news(&self, seen: &Seen) -> bool {
        self.has.as_ref().is_none_or(|old| old.run != seen.run || old.sequence < seen.sequence)
    }

    /// Takes a look at it.
    pub fn look(&mut self, now: Time, seen: Seen) {
        self.has = Some(seen);
        if self.lease_until > now {
            self.silent = None;
            self.missed.clear();
        }
    }

    /// Notes whether a cell answered on its port.
    pub fn knocked(&mut self, instance: &InstanceId, answered: bool) {
        if self.silent.is_none() || answered {
            self.missed.remove(instance);
        } else if self.cell(instance).is_some() {
            let missed = self.missed.entry(instance.clone()).or_default();
            *missed = missed.saturating_add(1);
        }
    }

    /// Lets time pass. Of a silent machine only cells count that were healthy, were not being put to
    /// sleep (`leaving`) and have not been knocked at in vain.
    pub fn expire(&mut self, now: Time, leaving: impl Fn(&InstanceId) -> bool) {
        if self.lease_until <= now {
            self.silent.get_or_insert(now);
        }
        let (true, Some(has)) = (self.silent.is_some(), &mut self.has) else { return };
        let missed = |i: &InstanceId| self.missed.get(i).is_some_and(|n| *n >= KNOCKS_MAX);
        has.cells.retain(|c| {
            matches!(c.life, Life::Healthy | Life::Handed) && !leaving(&c.instance) && !missed(&c.instance)
        });
    }

    /// Counts a cell of a silent machine no longer.
    pub fn give_up(&mut self, instance: &InstanceId) {
        if let Some(has) = &mut self.has {
            has.cells.retain(|c| c.instance != *instance);
        }
    }

    /// Whether it has not subscribed, or not been looked at since it subscribed again.
    pub fn is_silent(&self) -> bool {
        self.silent.is_some()
    }

    /// Whether nothing of it counts any more.
    pub fn is_gone(&self, now: Time) -> bool {
        let empty = self.has.as_ref().is_none_or(|h| h.cells.is_empty());
        self.silent.is_some_and(|since| now.since(since) >= HOLD || (empty && self.lease_until <= now))
    }

    pub fn cell(&self, instance: &InstanceId) -> Option<&CellSeen> {
        self.has.as_ref()?.cells.iter().find(|c| c.instance == *instance)
    }

    pub fn staged(&self, image: &str) -> Option<&StagedSeen> {
        self.has.as_ref()?.images.iter().find(|i| i.image == image)
    }

    /// Whether it has the image whole.
    pub fn holds(&self, image: &str) -> bool {
        self.staged(image).and_then(|s| s.seen.as_ref()).is_some_and(|s| s.complete())
    }
}
