//! The writes that were acknowledged, and whether they are found again. Pure.
//!
//! ```text
//! acknowledged ─▶ to read (through another network if there is one) ─▶ found │ lost
//! ```

use std::collections::{BTreeSet, VecDeque};
use vmatrix_model::{NetworkId, ServiceId};

/// A write that the service acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub service: ServiceId,
    /// Its own name: `{id}`.
    pub id: String,
    /// The network it was written through.
    pub through: NetworkId,
}

/// All acknowledged writes of a play. As long as the list of arrivals at most.
#[derive(Debug, Default)]
pub struct Ledger {
    acknowledged: Vec<Write>,
    unread: VecDeque<Write>,
    lost: BTreeSet<String>,
    across: u64,
}

impl Ledger {
    /// Notes an acknowledged write.
    pub fn acknowledge(&mut self, write: Write) {
        self.unread.push_back(write.clone());
        self.acknowledged.push(write);
    }

    /// A write of `service` to read back through `network`: the oldest that was written through
    /// another network, else the oldest.
    pub fn take_unread(&mut self, service: &ServiceId, network: &NetworkId) -> Option<Write> {
        let ours = |w: &Write| w.service == *service;
        let at = self
            .unread
            .iter()
            .position(|w| ours(w) && w.through != *network)
            .or_else(|| self.unread.iter().position(ours))?;
        self.unread.remove(at)
    }

    /// Notes what reading `write` through `network` showed.
    pub fn read(&mut self, write: &Write, network: &NetworkId, found: bool) {
        if !found {
            self.lost.insert(write.id.clone());
        } else if write.through != *network {
            self.across += 1;
        }
    }

    /// Every acknowledged write of `service`, in order.
    pub fn acknowledged<'a>(&'a self, service: &'a ServiceId) -> impl Iterator<Item = &'a Write> {
        self.acknowledged.iter().filter(move |w| w.service == *service)
    }

    /// Acknowledged writes.
    pub fn writes(&self) -> u64 {
        self.acknowledged.len() as u64
    }

    /// Writes that were not found at least once.
    pub fn lost(&self) -> u64 {
        self.lost.len() as u64
    }

    /// Reads that found a write through another network than it was written through.
    pub fn across(&self) -> u64 {
        self.across
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(id: &str, through: &str) -> Write {
        Write { service: "agenda".parse().unwrap(), id: id.into(), through: through.parse().unwrap() }
    }

    #[test]
    fn a_write_is_read_through_another_network_if_there_is_one() {
        let mut ledger = Ledger::default();
        ledger.acknowledge(write("a", "dublin"));
        ledger.acknowledge(write("b", "ashburn"));
        let dublin = "dublin".parse().unwrap();
        let agenda = "agenda".parse().unwrap();
        assert_eq!(ledger.take_unread(&agenda, &dublin).unwrap().id, "b");
        assert_eq!(ledger.take_unread(&agenda, &dublin).unwrap().id, "a");
        assert_eq!(ledger.take_unread(&agenda, &dublin), None);
    }

    #[test]
    fn a_write_that_is_missed_twice_is_lost_once() {
        let mut ledger = Ledger::default();
        let w = write("a", "dublin");
        ledger.acknowledge(w.clone());
        for network in ["dublin", "ashburn"] {
            ledger.read(&w, &network.parse().unwrap(), false);
        }
        assert_eq!((ledger.writes(), ledger.lost(), ledger.across()), (1, 1, 0));
    }
}
