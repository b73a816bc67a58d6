//! Who is sent where: for each service and client prefix, the address that serves those clients best.
//!
//! ```text
//!  placement, inventories, transitions ─▶ networks that may be named ─▶ best of them per region ─▶ Answers
//! ```
//!
//! An answer set is never emptied while anything may still be there. The first of these that is not empty is named:
//! 1. networks that are to run the service, stay, and are seen serving it;
//! 2. networks seen serving it, whatever they are to do;
//! 3. networks that are to run it and served it when last heard of: the CPA may be the one that is cut off;
//! 4. whatever is named now.

use crate::memory::Memory;
use crate::solve::{Rule, Tables};
use crate::toward::{SILENT, serving_ever};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use vmatrix_model::fleet::{Fleet, Service};
use vmatrix_model::steering::Answers;
use vmatrix_model::{NetworkId, Time};

/// Whether anything was heard of a network lately: from its VM agent or from its edge, for each outlives the other.
pub fn heard(memory: &Memory, network: &NetworkId, now: Time) -> bool {
    let lately = |t: Time| now.since(t) <= SILENT;
    memory.seen.get(network).is_some_and(|s| lately(s.heard))
        || memory.reports.get(network).is_some_and(|r| lately(r.heard))
}

/// The networks that `service` is answered with now.
pub fn named(memory: &Memory, service: &Service, now: Time) -> BTreeSet<NetworkId> {
    let transition = memory.transitions.get(&service.name);
    let turned = transition.filter(|t| t.turned.is_some());
    let leaves = |n: &NetworkId| turned.is_some_and(|t| t.leavers().any(|l| l == n));
    // A newcomer is named once it serves, not before all of them do: each one helps at once.
    let placed: BTreeSet<&NetworkId> = memory.placement.active(&service.name).collect();
    let served = |n: &NetworkId| memory.seen.get(n).is_some_and(|s| serving_ever(s, &service.name) > 0);
    let serves = |n: &NetworkId| heard(memory, n, now) && served(n);
    let first: BTreeSet<NetworkId> = placed.iter().filter(|n| !leaves(n) && serves(n)).map(|n| (*n).clone()).collect();
    if !first.is_empty() {
        return first;
    }
    let second: BTreeSet<NetworkId> = memory.seen.keys().filter(|n| serves(n)).cloned().collect();
    if !second.is_empty() {
        return second;
    }
    placed.iter().filter(|n| served(n)).map(|n| (*n).clone()).collect()
}

/// The answers of one service that is served from `networks`.
pub fn answers(
    fleet: &Fleet,
    tables: &Tables,
    service: &Service,
    rule: Rule,
    networks: &BTreeSet<NetworkId>,
) -> Answers {
    let vip = |n: &NetworkId| fleet.vip(&service.name, n);
    let best = |region| {
        tables.best(rule, &service.name, region, networks).and_then(vip).into_iter().collect::<Vec<Ipv4Addr>>()
    };
    let by_clients: BTreeMap<_, _> = fleet.regions.iter().map(|r| (r.prefix, best(&r.name))).collect();
    let first = networks.get(&service.home).or(networks.first());
    Answers { by_clients, otherwise: first.and_then(vip).into_iter().collect() }
}
