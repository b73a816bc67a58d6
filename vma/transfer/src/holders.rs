//! Who has got which chunk from here: whom to send others to, so that many receivers cost few copies.
//!
//! ```text
//! background ask ─▶ sent to fewer than `copies` so far?  ─yes─▶ Send: the asker has it
//!                                                        ─no──▶ Elsewhere(who has it, or was sent for it before):
//!                                                               the asker will have it
//! urgent ask, or one that insists ─▶ Send
//! ```
//! So a chunk goes out once and spreads as a tree; of those who have it, or will, whoever others were sent to
//! least is named first, so that every receiver's way out is used alike. Nobody is sent to one that asked after
//! it, so nobody waits in a circle.
//!
//! Pure: it is told who asks, who leaves, and what was not sent after all.

use crate::Class;
use crate::frame::{ADDRESSES_MAX, How};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use vmatrix_model::Digest;

/// Chunks remembered: these are 4 GiB of guest memory in packs of 64 KiB. The oldest is forgotten, and sent again.
const CHUNKS_MAX: usize = 65_536;
/// Holders remembered of each.
const HOLDERS_MAX: usize = 6;

/// What to do with an ask.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    Send,
    Elsewhere(Vec<SocketAddr>),
}

#[derive(Debug, Clone, Copy)]
struct Holder {
    at: SocketAddr,
    /// It was sent from here; otherwise it was sent elsewhere for it.
    from_here: bool,
}

/// A peer that serves.
#[derive(Debug, Default)]
struct Peer {
    connections: usize,
    /// How often others were sent to it.
    sent_to: u64,
}

/// Who has got what.
#[derive(Debug)]
pub struct Holders {
    copies: usize,
    of: HashMap<Digest, Vec<Holder>>,
    order: VecDeque<Digest>,
    peers: HashMap<SocketAddr, Peer>,
}

impl Holders {
    /// Nobody yet; a chunk is sent to `copies` peers before others are sent to them.
    pub fn new(copies: usize) -> Holders {
        Holders { copies: copies.max(1), of: HashMap::new(), order: VecDeque::new(), peers: HashMap::new() }
    }

    /// A peer that serves at `at` has connected.
    pub fn came(&mut self, at: SocketAddr) {
        self.peers.entry(at).or_default().connections += 1;
    }

    /// One of its connections has ended.
    pub fn left(&mut self, at: SocketAddr) {
        if let Some(peer) = self.peers.get_mut(&at) {
            peer.connections -= 1;
            if peer.connections == 0 {
                self.peers.remove(&at);
            }
        }
    }

    /// Decides on an ask for `digest` by a peer, which serves at `asker` if it does.
    pub fn ask(&mut self, digest: Digest, class: Class, how: How, asker: Option<SocketAddr>) -> Turn {
        if class == Class::Background
            && how == How::Plain
            && let Some(addresses) = self.elsewhere(&digest, asker)
        {
            if let Some(at) = asker {
                self.remember(digest, Holder { at, from_here: false });
            }
            return Turn::Elsewhere(addresses);
        }
        if let Some(at) = asker {
            self.remember(digest, Holder { at, from_here: true });
        }
        Turn::Send
    }

    /// Whom to send the asker to, if it may be sent away.
    fn elsewhere(&mut self, digest: &Digest, asker: Option<SocketAddr>) -> Option<Vec<SocketAddr>> {
        let (holders, peers) = (self.of.get_mut(digest)?, &mut self.peers);
        holders.retain(|holder| peers.contains_key(&holder.at));
        // Whoever asks again for what it was to have has lost it.
        let asked_before = holders.iter().any(|holder| Some(holder.at) == asker);
        let sent = holders.iter().filter(|holder| holder.from_here).count();
        if asked_before || sent < self.copies {
            return None;
        }
        let mut addresses: Vec<SocketAddr> = holders.iter().map(|holder| holder.at).collect();
        // A stable sort: among equals whoever got it first.
        addresses.sort_by_key(|at| peers.get(at).map_or(0, |peer| peer.sent_to));
        addresses.truncate(ADDRESSES_MAX);
        if let Some(peer) = addresses.first().and_then(|at| peers.get_mut(at)) {
            peer.sent_to += 1;
        }
        Some(addresses)
    }

    /// What was to be sent to `asker` was not.
    pub fn unsent(&mut self, digest: &Digest, asker: SocketAddr) {
        if let Some(holders) = self.of.get_mut(digest) {
            holders.retain(|holder| holder.at != asker);
        }
    }

    fn remember(&mut self, digest: Digest, new: Holder) {
        let holders = self.of.entry(digest).or_insert_with(|| {
            self.order.push_back(digest);
            Vec::with_capacity(1)
        });
        if let Some(known) = holders.iter_mut().find(|holder| holder.at == new.at) {
            known.from_here |= new.from_here;
        } else if holders.len() < HOLDERS_MAX {
            holders.push(new);
        }
        if self.order.len() > CHUNKS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.of.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 7400))
    }

    fn connected(copies: usize, n: u8) -> Holders {
        let mut holders = Holders::new(copies);
        (1..=n).for_each(|i| holders.came(at(i)));
        holders
    }

    fn ask(holders: &mut Holders, n: u8, class: Class, how: How) -> Turn {
        holders.ask(Digest::of(b"x"), class, how, Some(at(n)))
    }

    fn sent(holders: &mut Holders, n: u8, class: Class, how: How) -> bool {
        ask(holders, n, class, how) == Turn::Send
    }

    #[test]
    fn twelve_receivers_cost_as_many_copies_as_are_allowed() {
        for copies in 1..=3 {
            let mut holders = connected(copies, 12);
            let sends = (1..=12).filter(|n| sent(&mut holders, *n, Class::Background, How::Plain)).count();
            assert_eq!(sends, copies);
        }
    }

    #[test]
    fn a_chunk_spreads_as_a_tree_and_nobody_is_sent_to_a_later_asker() {
        let mut holders = connected(1, 12);
        let mut load = [0; 13];
        assert!(sent(&mut holders, 1, Class::Background, How::Plain));
        for n in 2..=12 {
            let Turn::Elsewhere(to) = ask(&mut holders, n, Class::Background, How::Plain) else { panic!() };
            assert!(to.iter().all(|to| (1..n).any(|before| at(before) == *to)), "{n} was sent to {to:?}");
            let first = (1..n).find(|before| at(*before) == to[0]).unwrap();
            load[usize::from(first)] += 1;
        }
        assert!(load.iter().all(|l| *l <= 2), "one has to send it {load:?} times");
    }

    #[test]
    fn over_many_chunks_everybody_is_sent_to_alike() {
        let mut holders = connected(1, 12);
        for chunk in 0..300u32 {
            for n in 0..12u32 {
                let asker = at((1 + (n + chunk) % 12) as u8);
                holders.ask(Digest::of(&chunk.to_be_bytes()), Class::Background, How::Plain, Some(asker));
            }
        }
        let loads: Vec<u64> = holders.peers.values().map(|p| p.sent_to).collect();
        let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
        assert_eq!(loads.iter().sum::<u64>(), 300 * 11);
        assert!(most - least <= 300 * 11 / 12 / 10, "{loads:?}");
    }

    #[test]
    fn urgent_asks_and_insisting_ones_are_always_answered() {
        let mut holders = connected(1, 4);
        assert!(sent(&mut holders, 1, Class::Background, How::Plain));
        assert!(!sent(&mut holders, 2, Class::Background, How::Plain));
        assert!(sent(&mut holders, 2, Class::Background, How::Insist));
        assert!(sent(&mut holders, 3, Class::Critical, How::Plain));
        assert!(sent(&mut holders, 4, Class::Miss, How::Plain));
    }

    #[test]
    fn nobody_is_sent_to_who_left_or_did_not_get_it_or_to_itself() {
        let mut holders = connected(1, 3);
        assert!(sent(&mut holders, 1, Class::Background, How::Plain));
        assert!(sent(&mut holders, 1, Class::Background, How::Plain), "sent to itself");
        holders.left(at(1));
        assert!(sent(&mut holders, 2, Class::Background, How::Plain), "sent to one that left");
        holders.unsent(&Digest::of(b"x"), at(2));
        assert!(sent(&mut holders, 3, Class::Background, How::Plain), "sent to one that never got it");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut holders = connected(1, 1);
        for i in 0..CHUNKS_MAX as u32 + 10 {
            holders.ask(Digest::of(&i.to_be_bytes()), Class::Background, How::Plain, Some(at(1)));
        }
        assert_eq!((holders.of.len(), holders.order.len()), (CHUNKS_MAX, CHUNKS_MAX));
    }
}
