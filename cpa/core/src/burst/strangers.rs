//! A crowd or an attack? By the share of its client clusters that were never here before.
//!
//! ```text
//!  quiet: clients ─▶ known (today, yesterday, the day before)
//!  crowd: clients ─▶ each cluster once: known │ new ─▶ most known: Crowd; most new: Attack; else Unsure
//! ```
//!
//! People come to what they know: Jung, Krishnamurthy and Rabinovich (WWW 2002) found that most clusters of a flash
//! event had been to the site before it, and that most of an attack had not. It is a hint and no more: a service that
//! the whole world has just heard of draws strangers, and an attacker may come from where clients are. So it is for
//! operators to read and to weigh, and never by itself a reason to turn anybody away.
//!
//! Memory is bounded, whatever addresses a flood invents: [`CELLS`] cells of two bits, two for each cluster, hold on
//! how many days' turns a cluster is still known. Another cluster may have the same two; how often that is follows
//! from how full the cells are, and is taken out of the share. During a crowd nobody becomes known.

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// Cells of two bits: 64 KiB for each service. Half full, at 90,000 clusters in three days, one stranger in four
/// passes for known, and beyond that nothing is said.
const CELLS: usize = 1 << 18;
const CELLS_OF_WORD: usize = 32;
const WORDS: usize = CELLS / CELLS_OF_WORD;
/// Low bit of every cell of a word.
const LOW: u64 = 0x5555_5555_5555_5555;
/// What a cell holds after a visit: known on that day and the next two. Not everybody comes every day, and Fridays'
/// clients are back on Mondays.
const FRESH: u64 = 3;
/// Days that must have been seen: at every hour other people are awake.
const DAYS: u32 = 1;
/// Clusters a crowd must have before anything is said: a share of 100 is known to a twentieth.
const SAMPLE: u64 = 100;
/// A crowd if at least so many of a thousand are known, an attack if at most so many. Between them is room for five
/// times the sample's deviation.
const CROWD: u64 = 500;
const ATTACK: u64 = 250;

/// What a burst looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hint {
    /// Most of its clusters were here before.
    Crowd,
    /// Few of them were.
    Attack,
    /// Too few clusters, too little history, or something between the two.
    Unsure,
}

/// Who was here before, and who of a crowd was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strangers {
    /// So that nobody can choose addresses that pass for known.
    seed: u64,
    /// Days' turns a cell is known for, two bits each.
    known: Vec<u64>,
    /// Cells that are known for some time.
    filled: u64,
    /// Days seen, at most [`DAYS`].
    days: u32,
    burst: Option<Burst>,
}

/// The clusters of a burst, each counted once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Burst {
    /// As in `known`, of those that were counted.
    met: Vec<u64>,
    old: u64,
    new: u64,
}

impl Strangers {
    pub fn new(seed: u64) -> Strangers {
        Strangers { seed, known: vec![0; WORDS], filled: 0, days: 0, burst: None }
    }

    /// A client of this cluster (its /24) asked.
    pub fn client(&mut self, cluster: Ipv4Net) {
        let cells = self.cells(cluster);
        let Some(burst) = &mut self.burst else {
            self.filled += cells.iter().map(|c| u64::from(put(&mut self.known, *c))).sum::<u64>();
            return;
        };
        let first = cells.map(|c| put(&mut burst.met, c)).contains(&true);
        if first && cells.iter().all(|c| get(&self.known, *c) > 0) {
            burst.old += 1;
        } else if first {
            burst.new += 1;
        }
    }

    /// A burst has begun: from now on clusters are counted, and none becomes known.
    pub fn begin(&mut self) {
        if self.burst.is_none() {
            self.burst = Some(Burst { met: vec![0; WORDS], old: 0, new: 0 });
        }
    }

    /// The burst is over, or has become usual.
    pub fn end(&mut self) {
        self.burst = None;
    }

    /// A day has passed.
    pub fn day(&mut self) {
        for word in &mut self.known {
            // One less in each cell that is not at nothing: 3 to 2, 2 to 1, 1 to 0.
            let some = (*word | *word >> 1) & LOW;
            *word -= some;
        }
        self.filled = self.known.iter().map(|w| u64::from(((w | w >> 1) & LOW).count_ones())).sum();
        self.days = (self.days + 1).min(DAYS);
    }

    /// Known clusters of the burst in thousandths, without those that only pass for known.
    pub fn known_share(&self) -> Option<u64> {
        let burst = self.burst.as_ref()?;
        let (all, cells) = (burst.old + burst.new, CELLS as u64);
        // Of a thousand strangers, those whose two cells are both filled by others.
        let passing = self.filled * self.filled / cells * 1000 / cells;
        let old = (burst.old * 1000).checked_div(all)?;
        Some(old.saturating_sub(passing) * 1000 / (1000 - passing).max(1))
    }

    /// What the burst looks like so far.
    pub fn hint(&self) -> Hint {
        let sample = self.burst.as_ref().map_or(0, |b| b.old + b.new);
        let enough = sample >= SAMPLE && self.days >= DAYS && self.filled * 2 <= CELLS as u64;
        match self.known_share().filter(|_| enough) {
            Some(CROWD..) => Hint::Crowd,
            Some(..=ATTACK) => Hint::Attack,
            _ => Hint::Unsure,
        }
    }

    /// The two cells of a cluster, by two halves of a keyed mix (splitmix64's last steps).
    fn cells(&self, cluster: Ipv4Net) -> [usize; 2] {
        let mut z = u64::from(u32::from(cluster.network()) >> 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        [z as usize % CELLS, (z >> 32) as usize % CELLS]
    }
}

fn get(cells: &[u64], cell: usize) -> u64 {
    cells.get(cell / CELLS_OF_WORD).map_or(0, |w| w >> (cell % CELLS_OF_WORD * 2) & FRESH)
}

/// Fills a cell; whether it was empty.
fn put(cells: &mut [u64], cell: usize) -> bool {
    let empty = get(cells, cell) == 0;
    if let Some(word) = cells.get_mut(cell / CELLS_OF_WORD) {
        *word |= FRESH << (cell % CELLS_OF_WORD * 2);
    }
    empty
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn cluster(n: u32) -> Ipv4Net {
        Ipv4Net::new(Ipv4Addr::from(n << 8), 24).unwrap()
    }

    /// Clusters are generated: the recorded trace of requests has no addresses. `regulars` come every day for three
    /// days; then a burst has `old` of them and `new` that nobody has seen, each cluster ten times.
    fn burst(regulars: u32, old: u32, new: u32) -> Strangers {
        let mut strangers = Strangers::new(7);
        for _ in 0..3 {
            (0..regulars).for_each(|n| strangers.client(cluster(n)));
            strangers.day();
        }
        strangers.begin();
        for n in (0..old).map(|n| n * 7 % regulars.max(1)).chain(1 << 20..(1 << 20) + new) {
            (0..10).for_each(|_| strangers.client(cluster(n)));
        }
        strangers
    }

    #[test]
    fn those_who_were_here_are_a_crowd_and_strangers_an_attack() {
        // In the shares that the paper's logs have, roughly: four in five, and one in seven.
        assert_eq!(burst(20_000, 800, 200).hint(), Hint::Crowd);
        assert_eq!(burst(20_000, 140, 860).hint(), Hint::Attack);
        assert_eq!(burst(20_000, 370, 630).hint(), Hint::Unsure);
    }

    #[test]
    fn the_share_is_right_however_full_the_memory_is() {
        for regulars in [2_000, 20_000, 60_000, 85_000] {
            let share = burst(regulars, 400, 1_600).known_share().unwrap();
            assert!((160..=240).contains(&share), "{share} of 1000 with {regulars}");
        }
    }

    #[test]
    fn nothing_is_said_without_history_clusters_or_room() {
        let mut young = Strangers::new(7);
        (0..1000).for_each(|n| young.client(cluster(n)));
        young.begin();
        (0..1000).for_each(|n| young.client(cluster(n)));
        assert_eq!(young.hint(), Hint::Unsure, "no day has passed");
        assert_eq!(burst(20_000, 40, 40).hint(), Hint::Unsure, "80 clusters");
        assert_eq!(burst(150_000, 0, 1_000).hint(), Hint::Unsure, "the cells are full");
        assert_eq!(Strangers::new(7).hint(), Hint::Unsure, "no burst");
    }

    #[test]
    fn who_was_not_here_for_three_days_is_a_stranger() {
        let mut strangers = burst(1_000, 0, 0);
        strangers.end();
        (0..3).for_each(|_| strangers.day());
        assert_eq!(strangers.filled, 0);
    }

    #[test]
    fn an_attack_does_not_make_itself_known() {
        let mut strangers = burst(5_000, 0, 50_000);
        let before = strangers.known.clone();
        assert_eq!(strangers.hint(), Hint::Attack);
        strangers.end();
        assert_eq!(strangers.known, before);
        strangers.begin();
        (1 << 20..(1 << 20) + 1_000).for_each(|n| strangers.client(cluster(n)));
        assert_eq!(strangers.hint(), Hint::Attack, "the second time as well");
    }
}
