//! What time alone brings about: silence, lateness, ends.

use super::{Command, HEDGE_AFTER, Plan, Want};
use crate::Class;
use crate::error::Fault;
use crate::frame::How;
use std::time::Duration;
use vmatrix_model::Digest;

impl Plan {
    pub(super) fn tick(&mut self, now: Duration, commands: &mut Vec<Command>) {
        if self.keeps_up || !self.wants.is_empty() {
            self.connect_all(now, commands);
        }
        for slot in 0..self.sources.len() {
            let overdue = self.sources.get(slot).and_then(|s| s.overdue(now));
            if let Some(silent) = overdue {
                commands.push(Command::Close { slot });
                self.down(now, slot, Fault::Silent(silent.as_millis() as u64));
            }
        }
        while let Some((at, digest)) = self.deferred.first().copied().filter(|(at, _)| *at <= now) {
            self.deferred.remove(&(at, digest));
            if let Some(class) = self.wants.get(&digest).map(|w| w.class) {
                self.queue(class).push_back(digest);
            }
        }
        let late: Vec<Digest> = self.wants.iter().filter(|(_, w)| w.until <= now).map(|(d, _)| *d).collect();
        for digest in late {
            self.fail(&digest, commands);
        }
        self.hedge(now, commands);
    }

    /// Asks a second source for each miss that takes too long.
    fn hedge(&mut self, now: Duration, commands: &mut Vec<Command>) {
        let slow: Vec<Digest> = self
            .wants
            .iter()
            .filter(|(digest, want)| match want.asked.as_slice() {
                [one] if want.class == Class::Miss => {
                    self.sources.get(*one).is_some_and(|s| s.asked_for(now, digest) >= HEDGE_AFTER)
                }
                _ => false,
            })
            .map(|(digest, _)| *digest)
            .collect();
        for digest in slow {
            let Some(want) = self.wants.get(&digest) else { continue };
            let other = self.usable(now, want).into_iter().find(|slot| !want.asked.contains(slot));
            if let Some(slot) = other {
                self.ask(now, slot, digest, How::Insist, commands);
            }
        }
    }

    pub(super) fn fail(&mut self, digest: &Digest, commands: &mut Vec<Command>) {
        let Some(want) = self.wants.get(digest) else { return };
        let tried = self.tried(want);
        self.forget(digest, None, commands);
        commands.push(Command::Fail { digest: *digest, tried });
    }

    fn tried(&self, want: &Want) -> String {
        let said: Vec<String> = (self.sources.iter().enumerate())
            .filter_map(|(slot, source)| match &source.fault {
                _ if want.refused.contains(&slot) => Some(format!("{}: it is not there", source.address)),
                Some(fault) => Some(format!("{}: {fault}", source.address)),
                None if source.learnt => None,
                None => Some(format!("{}: no answer in time", source.address)),
            })
            .collect();
        if said.is_empty() { "no source is configured".to_owned() } else { said.join("; ") }
    }
}
