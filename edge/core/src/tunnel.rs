//! Which cell has which address in the owner's intranet, and for how long.
//!
//! ```text
//! grant(now, network, cell, key) ─▶ address (the same again renews), or a refusal
//! expire(now) ─▶ keys whose lease ran out;  release ─▶ the key that leaves
//! ```
//!
//! # Invariants
//! 1. No two leases share an address or a key.
//! 2. A cell keeps its address while its lease lasts, and most often gets the same one after the
//!    gateway's restart, for the search begins at a place its name gives.

use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use vmatrix_model::wire::Problem;
use vmatrix_model::{NetworkId, Span, Time};

/// Most leases of one gateway, whatever its prefix would hold: each costs a session and its keys.
pub const LEASES_MAX: usize = 4096;

/// A cell that is not heard of for so long is gone: six missed renewals.
pub const LEASE: Span = Span::secs(30);

/// A WireGuard public key.
pub type Key = [u8; 32];

/// One cell's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// The cell's address in the owner's intranet.
    pub address: Ipv4Addr,
    /// The key it is known by.
    pub key: Key,
    /// When it ends unless it is renewed.
    pub until: Time,
}

/// All places given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leases {
    first: u32,
    last: u32,
    by_cell: BTreeMap<(NetworkId, String), Lease>,
}

impl Leases {
    /// Leases in the upper half of `intranet`, its last address (the broadcast) left out.
    pub fn new(intranet: Ipv4Net) -> Leases {
        let (start, end) = (intranet.network().to_bits(), intranet.broadcast().to_bits());
        Leases { first: start + (end - start) / 2 + 1, last: end.saturating_sub(1), by_cell: BTreeMap::new() }
    }

    /// Gives `cell` of `network` a place for [`LEASE`], or renews it; a new key takes the old one's place.
    ///
    /// # Errors
    /// The cell's name is no name, another cell has the key, or every address is taken.
    pub fn grant(&mut self, now: Time, network: &NetworkId, cell: &str, key: Key) -> Result<Lease, Problem> {
        let good = !cell.is_empty()
            && cell.len() <= 60
            && cell.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if !good {
            return Err(problem(
                format!("cell name {:?} is not 1 to 60 of a-z, 0-9 and -", cell.chars().take(80).collect::<String>()),
                "name the cell after its instance, like agenda-0",
            ));
        }
        let id = (network.clone(), cell.to_owned());
        if let Some((other, _)) = self.by_cell.iter().find(|(other, lease)| lease.key == key && **other != id) {
            return Err(problem(
                format!("cell {}/{} has this key already", other.0, other.1),
                "make a key for every cell",
            ));
        }
        let address = match self.by_cell.get(&id) {
            Some(lease) => lease.address,
            None => self.free(&id)?,
        };
        let lease = Lease { address, key, until: now + LEASE };
        self.by_cell.insert(id, lease);
        Ok(lease)
    }

    fn free(&self, id: &(NetworkId, String)) -> Result<Ipv4Addr, Problem> {
        let size = self.last.saturating_sub(self.first).saturating_add(1);
        if self.by_cell.len() >= LEASES_MAX.min(size as usize) {
            return Err(problem(
                format!("all {} intranet addresses for cells are taken", self.by_cell.len()),
                "end cells that are not needed, or give the origin a larger intranet",
            ));
        }
        let taken: std::collections::BTreeSet<u32> = self.by_cell.values().map(|l| l.address.to_bits()).collect();
        // FNV-1a: the same name begins at the same place in every run.
        let name = [id.0.as_str(), "/", &id.1].concat();
        let start = name.bytes().fold(0x811c_9dc5u32, |hash, b| (hash ^ u32::from(b)).wrapping_mul(0x0100_0193)) % size;
        (0..size)
            .map(|n| self.first + (start + n) % size)
            .find(|a| !taken.contains(a))
            .map(Ipv4Addr::from_bits)
            .ok_or_else(|| problem("no intranet address is free".into(), "give the origin a larger intranet"))
    }

    /// Takes the place of `cell` back; the lease it had, if any.
    pub fn release(&mut self, network: &NetworkId, cell: &str) -> Option<Lease> {
        self.by_cell.remove(&(network.clone(), cell.to_owned()))
    }

    /// Takes back every place whose lease ran out by `now`.
    pub fn expire(&mut self, now: Time) -> Vec<Lease> {
        self.by_cell.extract_if(.., |_, lease| lease.until <= now).map(|(_, lease)| lease).collect()
    }

    /// The lease `cell` has now.
    pub fn of(&self, network: &NetworkId, cell: &str) -> Option<Lease> {
        self.by_cell.get(&(network.clone(), cell.to_owned())).copied()
    }

    /// Every lease, by network and cell.
    pub fn iter(&self) -> impl Iterator<Item = &Lease> {
        self.by_cell.values()
    }
}

fn problem(problem: String, hint: &str) -> Problem {
    Problem { problem, hint: hint.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn leases(net: &str) -> Leases {
        Leases::new(net.parse().unwrap())
    }

    fn lyon() -> NetworkId {
        "lyon".parse().unwrap()
    }

    #[test]
    fn a_cell_keeps_its_address_and_may_change_its_key() {
        let mut l = leases("172.21.162.0/24");
        let first = l.grant(Time(0), &lyon(), "agenda-0", [1; 32]).unwrap();
        let again = l.grant(Time(5), &lyon(), "agenda-0", [2; 32]).unwrap();
        assert_eq!(first.address, again.address);
        assert!(first.address.octets()[3] >= 128 && first.address.octets()[3] < 255);
        assert_eq!(l.iter().count(), 1);
    }

    #[test]
    fn the_gateway_gives_the_same_address_after_a_restart() {
        let one = leases("172.21.162.0/24").grant(Time(0), &lyon(), "agenda-0", [1; 32]).unwrap();
        let two = leases("172.21.162.0/24").grant(Time(0), &lyon(), "agenda-0", [2; 32]).unwrap();
        assert_eq!(one.address, two.address);
    }

    #[test]
    fn a_lease_that_is_not_renewed_ends() {
        let mut l = leases("172.21.162.0/24");
        l.grant(Time(0), &lyon(), "agenda-0", [1; 32]).unwrap();
        assert_eq!(l.expire(Time(LEASE.0 - 1)), []);
        assert_eq!(l.expire(Time(LEASE.0)).len(), 1);
        assert_eq!(l.iter().count(), 0);
    }

    #[test]
    fn a_key_belongs_to_one_cell() {
        let mut l = leases("172.21.162.0/24");
        l.grant(Time(0), &lyon(), "agenda-0", [1; 32]).unwrap();
        assert!(
            l.grant(Time(0), &lyon(), "agenda-1", [1; 32]).unwrap_err().problem.contains("lyon/agenda-0 has this key")
        );
    }

    #[test]
    fn names_that_are_no_names_are_refused() {
        for bad in ["", "a/b", "..", "A", &"a".repeat(61)] {
            assert!(leases("172.21.162.0/24").grant(Time(0), &lyon(), bad, [1; 32]).is_err(), "{bad:?} was taken");
        }
    }

    proptest! {
        #[test]
        fn no_two_cells_share_an_address_until_none_is_left(cells in proptest::collection::btree_set(0u16..500, 1..40)) {
            let mut l = leases("10.0.0.0/27");
            let mut given = BTreeSet::new();
            for (n, cell) in cells.iter().enumerate() {
                let mut key = [0; 32];
                key[..2].copy_from_slice(&cell.to_be_bytes());
                match l.grant(Time(0), &lyon(), &format!("c-{cell}"), key) {
                    Ok(lease) => prop_assert!(n < 15 && given.insert(lease.address)),
                    Err(_) => prop_assert_eq!(given.len(), 15),
                }
            }
        }
    }
}
