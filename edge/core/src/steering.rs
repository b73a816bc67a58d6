//! Which addresses a client gets, and for how many of its neighbours the same answer holds.
//!
//! ```text
//! Steering ─▶ Table: per service, the IPv4 space cut into runs of equal answers
//!             client ─▶ its run ─▶ addresses, and the largest block around it inside the run
//! ```
//!
//! # Invariants
//! 1. The runs of a service cover every IPv4 address once, and neighbours in the list differ.
//!    So the block returned with an answer holds no client that would get another one: nested
//!    prefixes are de-aggregated (RFC 7871 §7.2.1).
//! 2. While one address of a service is known, nobody gets an empty answer.

use ipnet::Ipv4Net;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use vmatrix_model::Generation;
use vmatrix_model::steering::{Answers, Steering};

/// Longest answer: 32 addresses are 512 bytes of records, well under what one datagram carries.
pub const ADDRESSES_MAX: usize = 32;

/// What every question is answered from; built once per steering, never changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Of the steering it was built from; also the serial of the zone.
    pub generation: Generation,
    /// The zone in lower case, without the last dot.
    pub zone: String,
    /// Time to live of positive and negative answers, seconds.
    pub ttl_s: u32,
    services: BTreeMap<String, Runs>,
}

/// The IPv4 space of one service, cut where the answer changes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Runs {
    /// First address of each run and the number of its answer, in rising order; the first is 0.
    starts: Vec<(u32, usize)>,
    /// Distinct answers.
    answers: Vec<Vec<Ipv4Addr>>,
    /// Number of the answer for clients that no IPv4 prefix describes.
    otherwise: usize,
}

/// Addresses for one client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// In the order this client gets them.
    pub addresses: Vec<Ipv4Addr>,
    /// Length of the largest prefix around the client in which everyone gets these addresses.
    pub scope: u8,
}

impl Table {
    /// Builds the table of `steering`.
    pub fn new(steering: &Steering) -> Table {
        Table {
            generation: steering.generation,
            zone: steering.zone.trim_end_matches('.').to_ascii_lowercase(),
            ttl_s: steering.ttl_s,
            services: steering.services.iter().map(|(name, a)| (name.as_str().to_owned(), Runs::new(a))).collect(),
        }
    }

    /// Whether `service` (lower case) is a name of the zone.
    pub fn knows(&self, service: &str) -> bool {
        self.services.contains_key(service)
    }

    /// The addresses of `service` for `client`; none if it is not served anywhere.
    pub fn choose(&self, service: &str, client: IpAddr) -> Option<Choice> {
        let runs = self.services.get(service)?;
        let (number, scope) = match client {
            IpAddr::V4(v4) => runs.at(v4.to_bits()),
            // Prefixes are IPv4 only. A /1 is the widest block that does not claim IPv4 clients too.
            IpAddr::V6(_) => (runs.otherwise, u8::from(runs.starts.iter().any(|(_, n)| *n != runs.otherwise))),
        };
        let addresses = runs.answers.get(number).filter(|a| !a.is_empty())?;
        Some(Choice { addresses: rotated(addresses, client), scope })
    }
}

impl Runs {
    fn new(answers: &Answers) -> Runs {
        let prefixes: BTreeMap<Ipv4Net, Vec<Ipv4Addr>> = answers
            .by_clients
            .iter()
            .filter(|(_, list)| !list.is_empty())
            .map(|(prefix, list)| (prefix.trunc(), distinct(list.iter())))
            .collect();
        // Invariant 2: who is in no prefix gets whatever serves somewhere.
        let otherwise = if answers.otherwise.is_empty() {
            distinct(prefixes.values().flatten())
        } else {
            distinct(answers.otherwise.iter())
        };
        let mut numbers: BTreeMap<&[Ipv4Addr], usize> = BTreeMap::from([(otherwise.as_slice(), 0)]);
        let mut cuts: BTreeSet<u32> = BTreeSet::from([0]);
        for prefix in prefixes.keys() {
            cuts.insert(prefix.network().to_bits());
            cuts.extend(prefix.broadcast().to_bits().checked_add(1));
        }
        let mut starts: Vec<(u32, usize)> = Vec::new();
        for cut in cuts {
            let number = longest(&prefixes, cut).map_or(0, |list| {
                let next = numbers.len();
                *numbers.entry(list).or_insert(next)
            });
            if starts.last().is_none_or(|(_, last)| *last != number) {
                starts.push((cut, number));
            }
        }
        let mut answers: Vec<(usize, Vec<Ipv4Addr>)> =
            numbers.into_iter().map(|(list, n)| (n, list.to_vec())).collect();
        answers.sort_unstable();
        Runs { starts, answers: answers.into_iter().map(|(_, list)| list).collect(), otherwise: 0 }
    }

    /// The number of the answer at `address`, and the length of the widest block that shares it.
    fn at(&self, address: u32) -> (usize, u8) {
        let next = self.starts.partition_point(|(start, _)| *start <= address);
        let (first, number) = self.starts.get(next.saturating_sub(1)).copied().unwrap_or((0, self.otherwise));
        let last = self.starts.get(next).map_or(u32::MAX, |(start, _)| start - 1);
        // A scope of 0 is good for every client of any family, so it must be what IPv6 clients get too.
        let widest = u8::from(number != self.otherwise);
        let scope = (widest..=32).find(|length| {
            let rest = u32::MAX.checked_shr(u32::from(*length)).unwrap_or(0);
            address & !rest >= first && address | rest <= last
        });
        (number, scope.unwrap_or(32))
    }
}

fn longest(prefixes: &BTreeMap<Ipv4Net, Vec<Ipv4Addr>>, address: u32) -> Option<&Vec<Ipv4Addr>> {
    (0..=32u8).rev().find_map(|length| {
        let prefix = Ipv4Net::new(Ipv4Addr::from_bits(address), length).ok()?.trunc();
        prefixes.get(&prefix)
    })
}

fn distinct<'a>(addresses: impl Iterator<Item = &'a Ipv4Addr>) -> Vec<Ipv4Addr> {
    let mut seen = BTreeSet::new();
    addresses.copied().filter(|a| seen.insert(*a)).take(ADDRESSES_MAX).collect()
}

/// Turns the list by the client's /24 (or /48), so that several addresses share the clients and one
/// client always begins with the same.
fn rotated(addresses: &[Ipv4Addr], client: IpAddr) -> Vec<Ipv4Addr> {
    let key = match client {
        IpAddr::V4(v4) => u64::from(v4.to_bits() >> 8),
        IpAddr::V6(v6) => (v6.to_bits() >> 80) as u64,
    };
    // Fibonacci hashing: neighbouring prefixes must not all begin with the same address.
    let turn = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % addresses.len().max(1);
    let mut list = addresses.to_vec();
    list.rotate_left(turn);
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(by: &[(&str, &[u8])], otherwise: &[u8]) -> Table {
        let list = |l: &[u8]| l.iter().map(|n| Ipv4Addr::new(203, 0, 113, *n)).collect::<Vec<_>>();
        let answers = Answers {
            by_clients: by.iter().map(|(p, l)| (p.parse().unwrap(), list(l))).collect(),
            otherwise: list(otherwise),
        };
        let services = BTreeMap::from([("maps".parse().unwrap(), answers)]);
        Table::new(&Steering { generation: Generation(1), zone: "Vmatrix.Test.".into(), ttl_s: 5, services })
    }

    fn choose(t: &Table, client: &str) -> (u8, u8) {
        let c = t.choose("maps", client.parse().unwrap()).unwrap();
        (c.addresses[0].octets()[3], c.scope)
    }

    #[test]
    fn the_longest_prefix_wins_and_the_scope_stops_at_the_nested_one() {
        let t = table(&[("10.0.0.0/8", &[1]), ("10.128.0.0/16", &[2])], &[3]);
        assert_eq!(choose(&t, "10.128.7.7"), (2, 16));
        assert_eq!(choose(&t, "10.1.1.1"), (1, 9));
        assert_eq!(choose(&t, "10.129.0.1"), (1, 16));
    }

    #[test]
    fn the_default_answer_holds_for_the_free_block_only() {
        let t = table(&[("10.0.0.0/8", &[1])], &[3]);
        assert_eq!(choose(&t, "11.0.0.1"), (3, 8));
        assert_eq!(choose(&t, "200.0.0.1"), (3, 1));
    }

    #[test]
    fn one_answer_for_all_has_scope_0() {
        assert_eq!(choose(&table(&[("10.0.0.0/8", &[3])], &[3]), "10.1.1.1"), (3, 0));
        assert_eq!(choose(&table(&[], &[3]), "2001:db8::1"), (3, 0));
    }

    #[test]
    fn an_answer_for_all_of_ipv4_does_not_claim_ipv6() {
        let t = table(&[("0.0.0.0/0", &[1])], &[3]);
        assert_eq!(choose(&t, "10.1.1.1"), (1, 1));
        assert_eq!(choose(&t, "2001:db8::1"), (3, 1));
    }

    #[test]
    fn nobody_gets_an_empty_answer_while_one_address_serves() {
        let t = table(&[("10.0.0.0/8", &[1]), ("10.5.0.0/16", &[])], &[]);
        assert_eq!(choose(&t, "99.0.0.1").0, 1);
        assert_eq!(choose(&t, "10.5.0.1").0, 1);
        assert_eq!(table(&[], &[]).choose("maps", "1.2.3.4".parse().unwrap()), None);
    }

    #[test]
    fn several_addresses_share_the_clients() {
        let t = table(&[], &[1, 2, 3]);
        let mut first = BTreeMap::<u8, u32>::new();
        for n in 0..300u32 {
            let client = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + (n << 8)));
            *first.entry(t.choose("maps", client).unwrap().addresses[0].octets()[3]).or_default() += 1;
        }
        assert!(first.len() == 3 && first.values().all(|n| (70..130).contains(n)), "{first:?}");
    }

    /// Prefixes packed into 10.0.0.0/24 and some wider ones, so that nesting is the rule.
    fn prefix() -> impl Strategy<Value = Ipv4Net> {
        (any::<u8>(), 22u8..=32)
            .prop_map(|(low, length)| Ipv4Net::new(Ipv4Addr::new(10, 0, 0, low), length).unwrap().trunc())
    }

    proptest! {
        #[test]
        fn answer_and_scope_agree_with_brute_force(
            by in proptest::collection::btree_map(prefix(), 0u8..4, 0..12), otherwise in 0u8..4, low: u8,
        ) {
            let address = |n: u8| Ipv4Addr::new(203, 0, 113, n);
            let answers = Answers {
                by_clients: by.iter().map(|(p, n)| (*p, vec![address(*n)])).collect(),
                otherwise: vec![address(otherwise)],
            };
            let services = BTreeMap::from([("maps".parse().unwrap(), answers)]);
            let t = Table::new(&Steering { generation: Generation(1), zone: "z".into(), ttl_s: 1, services });
            let oracle = |client: Ipv4Addr| by.iter().filter(|(p, _)| p.contains(&client))
                .max_by_key(|(p, _)| p.prefix_len()).map_or(otherwise, |(_, n)| *n);
            let client = Ipv4Addr::new(10, 0, 0, low);
            let choice = t.choose("maps", client.into()).unwrap();
            prop_assert_eq!(choice.addresses, vec![address(oracle(client))]);
            // Every prefix lies within 10.0.0.0/22, so a wider block differs only outside of it.
            let same = |length: u8| {
                let block = Ipv4Net::new(client, length).unwrap();
                let inside = block.hosts().chain([block.network(), block.broadcast()]).all(|c| oracle(c) == oracle(client));
                inside && (length >= 22 || oracle(client) == otherwise)
            };
            if choice.scope >= 22 {
                prop_assert!(same(choice.scope), "scope {} is too wide", choice.scope);
                prop_assert!(choice.scope == 22 || !same(choice.scope - 1), "scope {} is too narrow", choice.scope);
            } else {
                prop_assert!(same(22) && oracle(client) == otherwise && choice.scope == 0);
            }
        }
    }
}
