//! From what counters say to what was asked for since the last look.
//!
//! ```text
//! counters before, counters now ─▶ increments ─▶ DemandCount per (service, clients)
//! ```
//!
//! A counter that is lower than before was removed by age or by a restart of the kernel's table and
//! began again, so all it says is new.

use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use vmatrix_model::demand::{COUNTS_MAX, DemandCount};
use vmatrix_model::{Bytes, ServiceId};

/// Clients (their /24) and the public address they asked.
pub type Key = (Ipv4Net, Ipv4Addr);

/// One reading of the edge's counters.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    /// New connections.
    pub requests: BTreeMap<Key, u64>,
    /// Bytes sent to the clients.
    pub bytes: BTreeMap<Key, Bytes>,
}

/// What was counted between two readings, for the services in `owners`; at most [`COUNTS_MAX`] counts.
pub fn increments(before: &Counters, now: &Counters, owners: &BTreeMap<Ipv4Addr, ServiceId>) -> Vec<DemandCount> {
    let mut counts: BTreeMap<(ServiceId, Ipv4Net), (u64, Bytes)> = BTreeMap::new();
    for (key, value) in &now.requests {
        let new = since(before.requests.get(key).copied().unwrap_or(0), *value);
        if let Some(service) = owners.get(&key.1).filter(|_| new > 0) {
            counts.entry((service.clone(), key.0)).or_default().0 += new;
        }
    }
    for (key, value) in &now.bytes {
        let new = since(before.bytes.get(key).map_or(0, |b| b.0), value.0);
        if let Some(service) = owners.get(&key.1).filter(|_| new > 0) {
            counts.entry((service.clone(), key.0)).or_default().1 += Bytes(new);
        }
    }
    counts
        .into_iter()
        .take(COUNTS_MAX)
        .map(|((service, clients), (requests, bytes))| DemandCount { service, clients, requests, bytes })
        .collect()
}

fn since(before: u64, now: u64) -> u64 {
    if now < before { now } else { now - before }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(requests: u64, bytes: u64) -> Counters {
        let key = ("10.1.2.0/24".parse().unwrap(), Ipv4Addr::new(198, 19, 1, 100));
        Counters { requests: BTreeMap::from([(key, requests)]), bytes: BTreeMap::from([(key, Bytes(bytes))]) }
    }

    fn between(before: &Counters, now: &Counters) -> Vec<(u64, u64)> {
        let owners = BTreeMap::from([(Ipv4Addr::new(198, 19, 1, 100), "maps".parse().unwrap())]);
        increments(before, now, &owners).iter().map(|c| (c.requests, c.bytes.0)).collect()
    }

    #[test]
    fn only_what_is_new_is_told() {
        assert_eq!(between(&Counters::default(), &reading(5, 900)), [(5, 900)]);
        assert_eq!(between(&reading(5, 900), &reading(7, 1000)), [(2, 100)]);
        assert_eq!(between(&reading(7, 1000), &reading(7, 1000)), []);
    }

    #[test]
    fn a_counter_that_began_again_is_new_altogether() {
        assert_eq!(between(&reading(50, 9000), &reading(3, 200)), [(3, 200)]);
    }

    #[test]
    fn what_no_service_owns_is_not_told() {
        assert_eq!(increments(&Counters::default(), &reading(5, 900), &BTreeMap::new()), []);
    }
}
