//! What a pause of the CPA, or a step of its clock, says about the world: nothing.
//!
//! ```text
//!  last tick ─────── gap ─────── now          a network heard 1 s before the last tick
//!         └──────── moved ────────┘           counts as heard 1 s before now
//! ```
//!
//! A stopped process, a suspended host and a clock set right all look alike from inside: the time of the next event
//! is far from that of the last tick, in either direction. Nobody was silent meanwhile, for nobody was listened to, so
//! everything remembered as a time keeps its distance to the last tick.

use crate::burst::Watch;
use crate::clusters::second;
use crate::cpa::Cpa;
use crate::forecast::SLOT;
use vmatrix_model::Time;

/// Seconds without a tick, or back in time, after which the gap is skipped: what was not counted says nothing about
/// demand, and silence that nobody could have broken says nothing about networks. As long as a network may be silent.
pub(crate) const GAP_MAX: u64 = 5;

impl Cpa {
    /// Judges no second before `now`.
    pub(crate) fn skip_to(&mut self, now: Time) {
        self.memory.second = second(now);
        self.memory.slot = now.0 / SLOT.0;
    }

    /// Notices a gap before anything is concluded from it: called with every event, for the first one after a pause
    /// need not be a tick.
    pub(crate) fn skip_gap(&mut self, now: Time) {
        let (last, present) = (self.memory.second, second(now));
        if self.memory.began.is_none() || last.abs_diff(present) <= GAP_MAX {
            return;
        }
        let then = Time(last * 1_000_000);
        let moved = |t: &mut Time| *t = now + t.since(then) - then.since(*t);
        let memory = &mut self.memory;
        memory.seen.values_mut().for_each(|s| moved(&mut s.heard));
        memory.reports.values_mut().for_each(|r| moved(&mut r.heard));
        memory.ordered.values_mut().for_each(moved);
        for held in memory.holds.values_mut() {
            let (since, failed) = (held.serving_since.values_mut(), held.failed.values_mut());
            let times = [&mut held.calm_since, &mut held.slept_at, &mut held.served_at];
            since.chain(failed).chain(times.into_iter().flatten()).for_each(moved);
        }
        for transition in memory.transitions.values_mut() {
            [&mut transition.began, &mut transition.until].into_iter().chain(&mut transition.turned).for_each(moved);
        }
        memory.watches.values_mut().flat_map(|w| w.values_mut()).flat_map(Watch::times).for_each(moved);
        if present < last {
            // Counted in seconds that are yet to come.
            memory.counts.clear();
        }
        self.skip_to(now);
    }
}
