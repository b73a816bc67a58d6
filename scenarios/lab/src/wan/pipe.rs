//! One direction of one link: a rate, a queue, a delay and a chance of loss. Pure.
//!
//! ```text
//! enter ─▶ queue (tail drop) ─▶ serialise at `mbit` ─▶ lost? ─▶ fly `delay_us` ─▶ leave
//! ```
//!
//! # Invariants
//! 1. Packets leave in the order they entered: the delay is constant and serialising is first come, first served.
//! 2. No packet waits longer than `queue_us` for its turn, so what a pipe holds is at most
//!    rate x (queue + delay), and never more than [`FLYING_MAX`] packets.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Most packets in one pipe: 1 Gbit/s of full packets for 0.3 s is 25,000; more are tiny packets, which are dropped.
pub const FLYING_MAX: usize = 65_536;

/// What one direction of a link is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wire {
    /// One way, microseconds.
    pub delay_us: u64,
    /// Rate, 10^6 bits a second; at least 1.
    pub mbit: u32,
    /// Packets lost, millionths.
    pub loss_ppm: u32,
    /// Longest wait for one's turn, microseconds; a packet that would wait longer is dropped.
    pub queue_us: u64,
}

/// Packets and bytes since the pipe began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Packets that entered.
    pub packets: u64,
    /// Bytes that entered.
    pub bytes: u64,
    /// Packets dropped because the queue was full.
    pub dropped: u64,
    /// Packets lost by chance.
    pub lost: u64,
}

/// What became of a packet that entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It will leave.
    Flies,
    /// The queue was full.
    Dropped,
    /// It was lost by chance.
    Lost,
}

/// One direction of a link, with what is in it.
#[derive(Debug)]
pub struct Pipe {
    wire: Wire,
    /// When the wire has sent everything that entered, nanoseconds.
    free_at: u64,
    flying: VecDeque<(u64, Box<[u8]>)>,
    chance: u64,
    counters: Counters,
}

impl Pipe {
    /// An empty pipe; `seed` decides which packets are lost.
    pub fn new(wire: Wire, seed: u64) -> Pipe {
        Pipe { wire, free_at: 0, flying: VecDeque::new(), chance: seed, counters: Counters::default() }
    }

    /// Takes a packet in at `now` (nanoseconds, never less than before).
    pub fn enter(&mut self, now: u64, packet: &[u8]) -> Fate {
        self.counters.packets += 1;
        self.counters.bytes += packet.len() as u64;
        let begins = self.free_at.max(now);
        if begins - now > self.wire.queue_us * 1000 || self.flying.len() >= FLYING_MAX {
            self.counters.dropped += 1;
            return Fate::Dropped;
        }
        self.free_at = begins + packet.len() as u64 * 8 * 1000 / u64::from(self.wire.mbit.max(1));
        // Lost on the way, not before: it has used the wire like any other.
        if self.wire.loss_ppm > 0 && self.roll() % 1_000_000 < u64::from(self.wire.loss_ppm) {
            self.counters.lost += 1;
            return Fate::Lost;
        }
        self.flying.push_back((self.free_at + self.wire.delay_us * 1000, packet.into()));
        Fate::Flies
    }

    /// When the next packet leaves, nanoseconds.
    pub fn next_due(&self) -> Option<u64> {
        self.flying.front().map(|(due, _)| *due)
    }

    /// The next packet that is due at `now`, if any.
    pub fn leave(&mut self, now: u64) -> Option<Box<[u8]>> {
        if self.next_due()? > now {
            return None;
        }
        self.flying.pop_front().map(|(_, packet)| packet)
    }

    /// What went through so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// SplitMix64: enough for coin tosses, and the same tosses for the same seed.
    fn roll(&mut self) -> u64 {
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn wire(delay_ms: u64, mbit: u32, loss_ppm: u32, queue_ms: u64) -> Wire {
        Wire { delay_us: delay_ms * 1000, mbit, loss_ppm, queue_us: queue_ms * 1000 }
    }

    #[test]
    fn a_lone_packet_takes_its_delay_and_its_serialisation() {
        let mut pipe = Pipe::new(wire(20, 100, 0, 200), 1);
        assert_eq!(pipe.enter(0, &[0; 1250]), Fate::Flies);
        // 10,000 bits at 100 Mbit/s are 0.1 ms.
        assert_eq!(pipe.next_due(), Some(20 * MS + MS / 10));
        assert!(pipe.leave(20 * MS).is_none());
        assert!(pipe.leave(20 * MS + MS / 10).is_some());
    }

    #[test]
    fn a_full_second_carries_its_rate_and_no_more() {
        let mut pipe = Pipe::new(wire(20, 100, 0, 100), 1);
        // Twice the rate is offered for a second.
        for i in 0..20_000_u64 {
            pipe.enter(i * MS / 20, &[0; 1250]);
        }
        let mut left = 0_u64;
        while pipe.leave(1020 * MS).is_some() {
            left += 1250;
        }
        assert!((left * 8).abs_diff(100_000_000) < 1_000_000, "{left} bytes");
        assert!(pipe.counters().dropped > 8_000, "{:?}", pipe.counters());
    }

    #[test]
    fn nothing_waits_longer_than_the_queue_allows() {
        let mut pipe = Pipe::new(wire(0, 1, 0, 50), 1);
        for _ in 0..1000 {
            pipe.enter(0, &[0; 1250]);
        }
        let mut last = 0;
        while let Some(due) = pipe.next_due() {
            last = due;
            pipe.leave(due);
        }
        // The one that waited 50 ms, and its own 10 ms.
        assert!(last <= 60 * MS, "{last}");
    }

    #[test]
    fn loss_is_as_stated_and_the_same_for_the_same_seed() {
        let run = |seed| {
            let mut pipe = Pipe::new(wire(0, 1000, 10_000, 200), seed);
            let mut one = |i: u64| {
                let fate = pipe.enter(i * MS, &[0; 100]);
                pipe.leave((i + 1) * MS);
                fate
            };
            (0..100_000).map(&mut one).collect::<Vec<_>>()
        };
        let lost = run(7).iter().filter(|f| **f == Fate::Lost).count();
        assert!((900..1100).contains(&lost), "{lost} of 100,000 at 1 %");
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }
}
