//! Takes a service from one set of networks to another without a moment in which nobody serves.
//!
//! ```text
//!             union in force                     answers turned          target in force
//!  adopted ──▶ Newcomers ──all seen serving──▶ Answers ──TTL + 1 s──▶ Leavers ──seen gone──▶ done
//!                  └──refused, or too long──▶ taken back (the set before is the new target)
//! ```
//!
//! Networks act on their assignments at once, so make-before-break is two generations: the first asks for
//! everything old and new, the second only for what is to stay. Between them the answers turn to
//! the newcomers, and every resolver that kept an old answer is given its whole time to live. One that keeps
//! it longer (paper §4.1: some enforce a minimum) is forwarded by the old network's edge. With no newcomer the first
//! state passes at once, with nobody leaving the last two do.

use crate::memory::{Seen, Shares};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::inventory::InstanceState;
use vmatrix_model::placement::Share;
use vmatrix_model::{Generation, NetworkId, ServiceId, Span, Time};

/// A network that was not heard of for so long is not waited for, and not counted as serving.
pub const SILENT: Span = Span::secs(5);
/// Beyond the answers' time to live: edges hear of a new steering within a second.
const TTL_MARGIN: Span = Span::secs(1);
/// How long newcomers may take beyond what the plan says: a resume that takes a minute more than measured has failed.
pub const PATIENCE: Span = Span::secs(60);

/// A service on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// The plan it carries out.
    pub plan: u64,
    pub began: Time,
    /// The generation that began it.
    pub generation: Generation,
    /// When newcomers that do not serve are given up.
    pub until: Time,
    pub before: Shares,
    pub target: Shares,
    /// When every newcomer was seen serving and the answers turned.
    pub turned: Option<Time>,
    /// Whether the target is in force.
    pub told: bool,
}

/// What a transition needs next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    Wait,
    /// Every newcomer serves: the answers may turn.
    Turn,
    /// Old answers have run out: put the target in force.
    Tell,
    /// Nothing is left to do.
    Done,
    /// The newcomers will not serve: take them back.
    Fail {
        network: NetworkId,
        reason: String,
    },
}

fn instances(shares: &Shares, network: &NetworkId) -> u32 {
    shares.get(network).map_or(0, |s| s.instances())
}

/// Everything old and everything new: for each network the greater share.
pub fn union(before: &Shares, target: &Shares) -> Shares {
    let networks: BTreeSet<&NetworkId> = before.keys().chain(target.keys()).collect();
    let greater = |n: &NetworkId| before.get(n).copied().max(target.get(n).copied()).unwrap_or(Share::Dormant);
    networks.into_iter().map(|n| (n.clone(), greater(n))).collect()
}

/// Instances of `service` that `network` is seen to have in rotation, if it was heard of lately.
pub fn serving(seen: &BTreeMap<NetworkId, Seen>, service: &ServiceId, network: &NetworkId, now: Time) -> u32 {
    seen.get(network).filter(|s| now.since(s.heard) <= SILENT).map_or(0, |s| serving_ever(s, service))
}

/// Instances of `service` in rotation when the network was last heard of.
pub fn serving_ever(seen: &Seen, service: &ServiceId) -> u32 {
    seen.inventory.instances.iter().filter(|i| i.id.service == *service && i.state == InstanceState::Serving).count()
        as u32
}

impl Transition {
    /// Networks that are to run more than before.
    pub fn newcomers(&self) -> impl Iterator<Item = &NetworkId> {
        self.target.keys().filter(|n| instances(&self.target, n) > instances(&self.before, n))
    }

    /// Networks that are to run nothing any more.
    pub fn leavers(&self) -> impl Iterator<Item = &NetworkId> {
        self.before.keys().filter(|n| instances(&self.before, n) > 0 && instances(&self.target, n) == 0)
    }

    fn shrinks(&self) -> bool {
        self.before.keys().any(|n| instances(&self.target, n) < instances(&self.before, n))
            || self.before.keys().any(|n| !self.target.contains_key(n))
    }

    /// Looks at what is there and says what is next. `answers_since` is when the answers last changed.
    pub fn next(&self, service: &ServiceId, seen: &BTreeMap<NetworkId, Seen>, ttl: Span, now: Time) -> Next {
        if self.told {
            return if self.leavers().all(|n| self.gone(service, n, seen, now)) { Next::Done } else { Next::Wait };
        }
        let Some(turned) = self.turned else {
            return self.newcomers_next(service, seen, now);
        };
        if !self.shrinks() {
            return Next::Done;
        }
        let nobody_leaves = self.leavers().next().is_none();
        if nobody_leaves || now.since(turned) > ttl + TTL_MARGIN { Next::Tell } else { Next::Wait }
    }

    fn newcomers_next(&self, service: &ServiceId, seen: &BTreeMap<NetworkId, Seen>, now: Time) -> Next {
        let knows = |n: &NetworkId| seen.get(n).is_some_and(|s| s.inventory.generation >= self.generation);
        let arrived = |n: &NetworkId| knows(n) && serving(seen, service, n, now) >= instances(&self.target, n);
        let missing: Vec<&NetworkId> = self.newcomers().filter(|n| !arrived(n)).collect();
        let Some(first) = missing.first() else { return Next::Turn };
        let nothing_before = self.before.values().all(|s| s.instances() == 0);
        if nothing_before {
            // There is nothing to go back to: the first copy is waited for as long as it takes.
            return Next::Wait;
        }
        let refusal =
            missing.iter().filter(|n| knows(n)).find_map(|n| Some((*n, seen.get(*n)?.inventory.refused.get(service)?)));
        if let Some((network, reason)) = refusal {
            return Next::Fail { network: network.clone(), reason: format!("refused: {reason}") };
        }
        if now > self.until {
            return Next::Fail {
                network: (*first).clone(),
                reason: format!("not serving {} after the order", now.since(self.began)),
            };
        }
        Next::Wait
    }

    /// Whether a leaver runs nothing any more; one that is silent is not waited for.
    fn gone(&self, service: &ServiceId, network: &NetworkId, seen: &BTreeMap<NetworkId, Seen>, now: Time) -> bool {
        let Some(s) = seen.get(network) else { return true };
        let silent = now.since(s.heard) > SILENT && now > self.until;
        silent
            || (s.inventory.generation > self.generation
                && !s.inventory.instances.iter().any(|i| i.id.service == *service))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(name: &str) -> NetworkId {
        name.to_owned().try_into().unwrap()
    }

    #[test]
    fn the_union_takes_nothing_away() {
        let before: Shares = [(n("a"), Share::Active(2)), (n("b"), Share::Dormant)].into();
        let target: Shares = [(n("a"), Share::Dormant), (n("b"), Share::Active(1))].into();
        let both = union(&before, &target);
        assert_eq!(both, [(n("a"), Share::Active(2)), (n("b"), Share::Active(1))].into());
    }
}
