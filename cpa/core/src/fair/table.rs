//! What every network would be to the players: one pass over each player's row.
//!
//! ```text
//!                    n0   n1   n2
//!  team 0  player A  30   80  130 ┐
//!          player B  50   90    ? ┴▶ sum    80  170    ?
//!  team 1  player C 130   80   30 ─▶ sum   130   80   30
//!                                    worst 130   90    ?
//! ```

use super::{Figures, GRAIN_MAX, Match, NETWORKS_MAX, NoPlace, PLAYERS_MAX, TEAMS_MAX, UNKNOWN};
use vmatrix_model::{MicroUsd, Span};

/// What one player's place (a cluster of clients) has to the networks: round trips in microseconds, [`UNKNOWN`] where
/// there is none.
#[derive(Debug, Clone, Copy)]
pub enum Row<'a> {
    /// One for each network, in their order.
    Dense(&'a [u32]),
    /// (network, latency), rising by network; the others are unknown.
    Sparse(&'a [(u32, u32)]),
}

impl Row<'_> {
    pub(super) fn at(&self, network: usize) -> u32 {
        match self {
            Row::Dense(all) => all.get(network).copied(),
            Row::Sparse(some) => {
                some.binary_search_by_key(&network, |(n, _)| *n as usize).ok().and_then(|i| some.get(i)).map(|s| s.1)
            }
        }
        .unwrap_or(UNKNOWN)
    }

    /// Takes row number `row` into the worst latency and the sum of every network.
    fn add(&self, row: usize, worst: &mut [u32], sums: &mut [u64]) -> Result<(), NoPlace> {
        match self {
            Row::Dense(all) => {
                if all.len() != worst.len() {
                    return Err(NoPlace::Length { what: format!("row {row}"), seen: all.len(), networks: worst.len() });
                }
                for ((w, sum), &l) in worst.iter_mut().zip(sums).zip(*all) {
                    *w = (*w).max(l);
                    *sum += u64::from(l);
                }
            }
            Row::Sparse(some) => {
                let mut next = 0;
                for &(network, l) in *some {
                    let network = network as usize;
                    let order = || NoPlace::Order { row, network };
                    if network != next {
                        worst.get_mut(next..network).ok_or_else(order)?.fill(UNKNOWN);
                    }
                    let (w, sum) = worst.get_mut(network).zip(sums.get_mut(network)).ok_or_else(order)?;
                    *w = (*w).max(l);
                    *sum += u64::from(l);
                    next = network + 1;
                }
                worst.iter_mut().skip(next).for_each(|w| *w = UNKNOWN);
            }
        }
        Ok(())
    }
}

/// Worst latency per network, and sums of latencies per team and network: one pass over each player's row.
pub(super) struct Table<'a> {
    of: &'a Match<'a>,
    /// Parts of a microsecond in which means are compared.
    pub(super) grain: u64,
    worst: Vec<u32>,
    /// Team after team, each with one sum for every network.
    sums: Vec<u64>,
}

impl<'a> Table<'a> {
    pub(super) fn of(of: &'a Match<'a>) -> Result<Table<'a>, NoPlace> {
        let n = of.networks;
        let players = of.teams.iter().map(Vec::len).sum();
        for (what, seen, least, most) in [
            ("networks", n, 1, NETWORKS_MAX),
            ("teams", of.teams.len(), 1, TEAMS_MAX),
            ("players", players, 0, PLAYERS_MAX),
        ] {
            if !(least..=most).contains(&seen) {
                return Err(NoPlace::Size { what, seen, least, most });
            }
        }
        let lists = [
            ("the list of costs", of.cost.map(<[_]>::len)),
            ("the list of networks with room", of.room.map(<[_]>::len)),
        ];
        for (what, seen) in lists.into_iter().filter_map(|(what, seen)| Some((what, seen?))) {
            if seen != n {
                return Err(NoPlace::Length { what: what.into(), seen, networks: n });
            }
        }
        let mut worst: Vec<u32> = match of.room {
            Some(room) => room.iter().map(|has| if *has { 0 } else { UNKNOWN }).collect(),
            None => vec![0; n],
        };
        let mut sums = vec![0_u64; n * of.teams.len()];
        for (team, (players, sums)) in of.teams.iter().zip(sums.chunks_exact_mut(n)).enumerate() {
            if players.is_empty() {
                return Err(NoPlace::EmptyTeam { team });
            }
            for &row in players {
                let of_row = of.rows.get(row).ok_or(NoPlace::NoRow { team, row, rows: of.rows.len() })?;
                of_row.add(row, &mut worst, sums)?;
            }
        }
        // The least common multiple of the teams' sizes: so the means are whole numbers, and equal ones are equal.
        let grain = of
            .teams
            .iter()
            .fold(1, |all, team| (all / common(all, team.len() as u64) * team.len() as u64).min(GRAIN_MAX));
        Ok(Table { of, grain, worst, sums })
    }

    /// The best possible worst latency and the network that has it, the cheaper one of two, then the lower.
    pub(super) fn best(&self) -> Result<(u32, usize), NoPlace> {
        let worst = self.worst.iter().enumerate().filter(|(_, w)| **w != UNKNOWN);
        let (best, network) =
            worst.map(|(i, w)| (*w, self.cost(i), i)).min().map(|b| (b.0, b.2)).ok_or_else(|| self.unreached())?;
        match self.of.cap {
            Some(cap) if cap.0 < u64::from(best) => Err(NoPlace::Cap { cap, best: Span(u64::from(best)), network }),
            _ => Ok((best, network)),
        }
    }

    /// The worst latency that is allowed when `best` is possible.
    pub(super) fn limit(&self, best: u32) -> u32 {
        let slack = u64::from(best).saturating_mul(100 + u64::from(self.of.slack_percent)) / 100;
        let limit = self.of.cap.map_or(slack, |cap| slack.min(cap.0));
        limit.min(u64::from(UNKNOWN - 1)) as u32
    }

    pub(super) fn within(&self, limit: u32) -> impl Iterator<Item = (usize, u32)> {
        self.worst.iter().copied().enumerate().filter(move |(_, w)| *w <= limit)
    }

    pub(super) fn cost(&self, network: usize) -> MicroUsd {
        self.of.cost.and_then(|c| c.get(network)).copied().unwrap_or_default()
    }

    /// Mean latency of each team at a network, in parts of a microsecond.
    pub(super) fn means(&self, network: usize) -> impl Iterator<Item = u64> {
        let sums = self.sums.chunks_exact(self.of.networks).filter_map(move |s| s.get(network));
        self.of.teams.iter().zip(sums).map(|(team, sum)| sum * self.grain / team.len().max(1) as u64)
    }

    pub(super) fn gap(&self, network: usize) -> u64 {
        let (low, high) = self.means(network).fold((u64::MAX, 0), |(l, h), m| (l.min(m), h.max(m)));
        high - low.min(high)
    }

    pub(super) fn figures(&self, network: usize) -> Figures {
        Figures {
            network,
            means: self.means(network).map(|m| Span(m / self.grain)).collect(),
            gap: Span(self.gap(network) / self.grain),
            worst: Span(self.worst.get(network).map_or(0, |w| u64::from(*w))),
            cost: self.cost(network),
        }
    }

    fn unreached(&self) -> NoPlace {
        let players = || self.of.teams.iter().flatten().filter_map(|row| self.of.rows.get(*row));
        let room = |n: usize| self.of.room.and_then(|r| r.get(n)).copied().unwrap_or(true);
        let reached = |n: usize| if room(n) { players().filter(|row| row.at(n) != UNKNOWN).count() } else { 0 };
        let (reached, network) =
            (0..self.of.networks).rev().map(|n| (reached(n), n)).max_by_key(|r| r.0).unwrap_or_default();
        NoPlace::Unreached { network, reached, players: players().count() }
    }
}

/// The greatest number that divides both.
fn common(a: u64, b: u64) -> u64 {
    if b == 0 { a.max(1) } else { common(b, a % b) }
}
