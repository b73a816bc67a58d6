//! Equi-latency placement: the network that is fairest to teams of people who play or talk together (paper §2;
//! Awadallah and Rosenblum, "Equi-Ping Game Server Placement", AICCSA 2006).
//!
//! ```text
//!  latencies [player ─▶ networks] ─┬▶ worst per network ─▶ best possible ─▶ bound (10 % above it, and the cap)
//!                                  └▶ sum per team ─▶ gap between the means ─▶ least gap within the bound
//! ```
//!
//! The bound comes first, so no network is fair by being bad for all. Every network is looked at: the choice is the
//! optimum of this objective and not near it, and what is left of the gap is geography. Two things get further, each
//! by changing what is asked: [`halves`] moves the VM once in mid-match, [`split`] draws up the teams.
//!
//! People without teams (a call) are teams of one: the gap is then that between the best and the worst placed.

use std::fmt::Display;
use vmatrix_model::{MicroUsd, Span};

/// The latency of a network that a player does not reach, or of which nobody knows.
pub const UNKNOWN: u32 = u32::MAX;
/// How much worse than the best possible the worst latency may be for the sake of fairness, per cent. A tenth of what
/// fast games are played at (50 to 150 ms) is less than one frame of 60 a second.
pub const SLACK_PERCENT: u32 = 10;
/// Most networks, players and teams: at most 100,000 × 64 sums of 8 bytes, 51 MB.
const NETWORKS_MAX: usize = 100_000;
const PLAYERS_MAX: usize = 1_024;
const TEAMS_MAX: usize = 64;
/// Most players that [`split`] draws up teams of: 6,435 ways for 16, each looked at.
const SPLIT_MAX: usize = 16;
/// Finest part of a microsecond in which means are compared: 1,024 latencies of an hour each, times this, are an i64.
const GRAIN_MAX: u64 = 1_000_000;

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
    fn at(&self, network: usize) -> u32 {
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

/// Who is to meet, and where they may.
#[derive(Debug, Clone)]
pub struct Match<'a> {
    pub networks: usize,
    pub rows: &'a [Row<'a>],
    /// The row of each player, team by team. Players of one place share a row.
    pub teams: &'a [Vec<usize>],
    /// Which networks have room for one more instance; all of them if nothing is said.
    pub room: Option<&'a [bool]>,
    /// What an hour costs at each network, to tell apart those that are equally fair.
    pub cost: Option<&'a [MicroUsd]>,
    /// See [`SLACK_PERCENT`].
    pub slack_percent: u32,
    /// What the worst placed player must not be above, whatever is possible: a game's own limit.
    pub cap: Option<Span>,
}

impl<'a> Match<'a> {
    /// A match that may be at any network, within 10 % of the best possible.
    pub fn new(networks: usize, rows: &'a [Row<'a>], teams: &'a [Vec<usize>]) -> Match<'a> {
        Match { networks, rows, teams, room: None, cost: None, slack_percent: SLACK_PERCENT, cap: None }
    }
}

/// Why there is no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    #[error("there are {seen} {what}, and it takes {least} to {most}")]
    Size { what: &'static str, seen: usize, least: usize, most: usize },
    #[error("team {team} has no players\n\nhint: leave it out")]
    EmptyTeam { team: usize },
    #[error("a player of team {team} is in row {row}, and there are {rows} rows, counted from 0")]
    NoRow { team: usize, row: usize, rows: usize },
    #[error(
        "{what} has {seen} entries, and there are {networks} networks\n\nhint: one for each network, in their order"
    )]
    Length { what: String, seen: usize, networks: usize },
    #[error("row {row} names network {network} out of order or beyond the last\n\nhint: sort it, each network once")]
    Order { row: usize, network: usize },
    #[error(
        "no network with room reaches all {players} players; network {network} reaches {reached}\n\nhint: measure what is unknown, or leave out who cannot be reached"
    )]
    Unreached { network: usize, reached: usize, players: usize },
    #[error(
        "the worst latency may be {cap}, and the best possible is {best}, at network {network}\n\nhint: raise the cap, or make room nearer to the players"
    )]
    Cap { cap: Span, best: Span, network: usize },
}

/// What one network would be to the players.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    pub network: usize,
    /// Mean latency of each team.
    pub means: Vec<Span>,
    /// The largest mean less the smallest.
    pub gap: Span,
    /// Latency of the worst placed player.
    pub worst: Span,
    pub cost: MicroUsd,
}

/// The fairest network, and what it was weighed against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub chosen: Figures,
    /// The network at which the worst placed player is placed best.
    pub best: Figures,
    /// What the worst latency was allowed to be.
    pub limit: Span,
    /// Networks within the limit.
    pub within: usize,
    /// The next fairest within the limit.
    pub second: Option<Figures>,
}

/// Worst latency per network, and sums of latencies per team and network: one pass over each player's row.
struct Table<'a> {
    of: &'a Match<'a>,
    /// Parts of a microsecond in which means are compared.
    grain: u64,
    worst: Vec<u32>,
    /// Team after team, each with one sum for every network.
    sums: Vec<u64>,
}

impl<'a> Table<'a> {
    fn of(of: &'a Match<'a>) -> Result<Table<'a>, NoPlace> {
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
    fn best(&self) -> Result<(u32, usize), NoPlace> {
        let worst = self.worst.iter().enumerate().filter(|(_, w)| **w != UNKNOWN);
        let (best, network) =
            worst.map(|(i, w)| (*w, self.cost(i), i)).min().map(|b| (b.0, b.2)).ok_or_else(|| self.unreached())?;
        match self.of.cap {
            Some(cap) if cap.0 < u64::from(best) => Err(NoPlace::Cap { cap, best: Span(u64::from(best)), network }),
            _ => Ok((best, network)),
        }
    }

    /// The worst latency that is allowed when `best` is possible.
    fn limit(&self, best: u32) -> u32 {
        let slack = u64::from(best).saturating_mul(100 + u64::from(self.of.slack_percent)) / 100;
        let limit = self.of.cap.map_or(slack, |cap| slack.min(cap.0));
        limit.min(u64::from(UNKNOWN - 1)) as u32
    }

    fn within(&self, limit: u32) -> impl Iterator<Item = (usize, u32)> {
        self.worst.iter().copied().enumerate().filter(move |(_, w)| *w <= limit)
    }

    fn cost(&self, network: usize) -> MicroUsd {
        self.of.cost.and_then(|c| c.get(network)).copied().unwrap_or_default()
    }

    /// Mean latency of each team at a network, in parts of a microsecond.
    fn means(&self, network: usize) -> impl Iterator<Item = u64> {
        let sums = self.sums.chunks_exact(self.of.networks).filter_map(move |s| s.get(network));
        self.of.teams.iter().zip(sums).map(|(team, sum)| sum * self.grain / team.len().max(1) as u64)
    }

    fn gap(&self, network: usize) -> u64 {
        let (low, high) = self.means(network).fold((u64::MAX, 0), |(l, h), m| (l.min(m), h.max(m)));
        high - low.min(high)
    }

    fn figures(&self, network: usize) -> Figures {
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

/// The fairest network: the least gap between the teams' means, within the bound on the worst latency. Of two that are
/// equally fair, the one with the lower worst latency, then the cheaper, then the lower.
///
/// # Errors
/// Says what about the match cannot be; with a cap that cannot be met, what can.
pub fn choose(of: &Match) -> Result<Choice, NoPlace> {
    let table = Table::of(of)?;
    let (best, at_best) = table.best()?;
    let limit = table.limit(best);
    let (mut first, mut second, mut within) = (None, None, 0);
    for (network, worst) in table.within(limit) {
        within += 1;
        let worth = Some((table.gap(network), worst, table.cost(network), network));
        if first.is_none() || worth < first {
            (first, second) = (worth, first);
        } else if second.is_none() || worth < second {
            second = worth;
        }
    }
    Ok(Choice {
        chosen: table.figures(first.map_or(at_best, |f| f.3)),
        best: table.figures(at_best),
        limit: Span(u64::from(limit)),
        within,
        second: second.map(|s| table.figures(s.3)),
    })
}

/// Two networks for the two halves of a match, each within the bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Halves {
    /// The same network twice if moving would not make it fairer.
    pub halves: [Figures; 2],
    /// What is between the teams' means over the whole match.
    pub gap: Span,
}

/// Home and away: one network for each half of a match of two teams, so that what the first half gives to one team the
/// second gives to the other. The VM moves once. Every pair counts, found by walking inwards from both ends of the
/// networks in the order of who gains; of pairs that are equally fair the first met is taken.
///
/// # Errors
/// As [`choose`], and if there are not two teams.
pub fn halves(of: &Match) -> Result<Halves, NoPlace> {
    if of.teams.len() != 2 {
        return Err(NoPlace::Size { what: "teams", seen: of.teams.len(), least: 2, most: 2 });
    }
    let table = Table::of(of)?;
    let (best, at_best) = table.best()?;
    let gain = |network| table.means(network).fold(0_i64, |before, mean| mean as i64 - before);
    let mut order: Vec<_> =
        table.within(table.limit(best)).map(|(n, worst)| (gain(n), worst, table.cost(n), n)).collect();
    order.sort_unstable();
    let (mut least, mut pair, mut rest) = (u64::MAX, [at_best; 2], order.as_slice());
    while let (Some(low), Some(high)) = (rest.first(), rest.last()) {
        let sum = low.0 + high.0;
        if sum.unsigned_abs() < least {
            (least, pair) = (sum.unsigned_abs(), [low.3, high.3]);
        }
        rest = if sum < 0 { rest.get(1..) } else { rest.get(..rest.len() - 1) }.unwrap_or_default();
    }
    Ok(Halves { halves: pair.map(|n| table.figures(n)), gap: Span(least / 2 / table.grain) })
}

/// Two teams drawn up from players who have none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// The rows of each team's players.
    pub teams: [Vec<usize>; 2],
    pub figures: Figures,
}

/// Draws up two equal teams where that is free to choose (a public match): at the network that is best for the worst
/// placed player, which does not depend on the teams, the halving of the players with the least gap. All players
/// count, whatever team the match says; of halvings that are equally fair, the one that the earlier players begin.
///
/// # Errors
/// As [`choose`], and if the players are not 2 to 16 and even.
pub fn split(of: &Match) -> Result<Split, NoPlace> {
    let players: Vec<usize> = of.teams.iter().flatten().copied().collect();
    let seen = players.len();
    if !(2..=SPLIT_MAX).contains(&seen) || seen % 2 == 1 {
        return Err(NoPlace::Size { what: "players to halve", seen, least: 2, most: SPLIT_MAX });
    }
    let (_, network) = Table::of(of)?.best()?;
    let latency: Vec<u64> =
        players.iter().map(|row| of.rows.get(*row).map_or(0, |r| u64::from(r.at(network)))).collect();
    let all: u64 = latency.iter().sum();
    let sum = |team: u32| (0_u32..).zip(&latency).filter(|(i, _)| team >> i & 1 == 1).map(|(_, l)| l).sum::<u64>();
    // The first player is in the first team: the other half of the ways are the same with the names exchanged.
    let ways = (0..1_u32 << seen).filter(|team| team & 1 == 1 && team.count_ones() as usize * 2 == seen);
    let team = ways.min_by_key(|team| all.abs_diff(2 * sum(*team))).unwrap_or(0);
    let side =
        |side: u32| (0_u32..).zip(&players).filter(|(i, _)| team >> i & 1 == side).map(|(_, row)| *row).collect();
    let teams = [side(1), side(0)];
    let figures = Table::of(&Match { teams: &teams, ..of.clone() })?.figures(network);
    Ok(Split { teams, figures })
}

impl Choice {
    /// Why this network, in one sentence.
    pub fn why<N: Display>(&self, name: impl Fn(usize) -> N) -> String {
        let (c, b) = (&self.chosen, &self.best);
        let means: Vec<String> = c.means.iter().map(Span::to_string).collect();
        let mut words = format!(
            "{} is {} from {} on average, {} apart, and {} from the worst placed",
            name(c.network),
            means.join(" and "),
            if means.len() == 1 { "the team" } else { "the teams" },
            c.gap,
            c.worst
        );
        words += &if c.network == b.network {
            ", the best possible".to_owned()
        } else {
            format!("; {} is best for the worst placed, {} apart at {}", name(b.network), b.gap, b.worst)
        };
        words += &match &self.second {
            Some(s) => format!("; second best: {}, {} apart at {}", name(s.network), s.gap, s.worst),
            None => format!("; no other network is within {} of all", self.limit),
        };
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two teams of one half each of the rows, at networks "n0", "n1"...
    fn two(rows: usize) -> Vec<Vec<usize>> {
        vec![(0..rows / 2).collect(), (rows / 2..rows).collect()]
    }

    fn dense(table: &[Vec<u32>]) -> Vec<Row<'_>> {
        table.iter().map(|r| Row::Dense(r)).collect()
    }

    /// The choice for a table in milliseconds, the match set up by `with`.
    fn chosen(ms: &[&[u32]], with: impl Fn(&mut Match)) -> Result<Choice, NoPlace> {
        let table: Vec<Vec<u32>> =
            ms.iter().map(|r| r.iter().map(|l| if *l == UNKNOWN { UNKNOWN } else { l * 1000 }).collect()).collect();
        let (rows, teams) = (dense(&table), two(table.len()));
        let mut of = Match::new(ms.first().map_or(0, |r| r.len()), &rows, &teams);
        with(&mut of);
        choose(&of)
    }

    #[test]
    fn where_one_clan_has_30_ms_and_the_other_130_both_can_have_80() {
        let c = chosen(&[&[30, 80, 130], &[30, 80, 130], &[130, 80, 30], &[130, 80, 30]], |_| ()).unwrap();
        assert_eq!((c.chosen.network, c.chosen.gap, c.chosen.worst), (1, Span::ZERO, Span::ms(80)));
        assert_eq!(c.chosen.means, [Span::ms(80), Span::ms(80)]);
    }

    #[test]
    fn nobody_is_made_fair_by_being_bad_for_all() {
        let far = |slack| chosen(&[&[100, 108, 111], &[80, 108, 111]], |m| m.slack_percent = slack).unwrap();
        assert_eq!((far(10).chosen.network, far(10).within, far(10).limit), (1, 2, Span::ms(110)));
        assert_eq!(far(7).chosen.network, 0, "108 ms is above 107");
        let tie =
            chosen(&[&[109, 108, 108], &[109, 108, 108]], |m| m.cost = Some(&[MicroUsd(1), MicroUsd(3), MicroUsd(2)]));
        assert_eq!(tie.unwrap().chosen.network, 2, "the worst latency decides, then the cost");
        let tie = chosen(&[&[109, 108, 108], &[109, 108, 108]], |_| ()).unwrap();
        assert_eq!((tie.chosen.network, tie.second.unwrap().network), (1, 2), "and then the lower");
    }

    #[test]
    fn an_unknown_latency_and_a_full_network_are_never_chosen() {
        let c = chosen(&[&[10, 50, 90], &[UNKNOWN, 90, 50]], |m| m.room = Some(&[true, false, true])).unwrap();
        assert_eq!((c.chosen.network, c.within, c.second), (2, 1, None));
    }

    #[test]
    fn a_call_is_a_match_of_teams_of_one() {
        let table = [vec![10_000, 20_000], vec![20_000, 21_000], vec![21_000, 22_000]];
        let teams: Vec<Vec<usize>> = (0..3).map(|i| vec![i]).collect();
        let c = choose(&Match::new(2, &dense(&table), &teams)).unwrap();
        assert_eq!((c.chosen.network, c.chosen.gap), (1, Span::ms(2)));
    }

    #[test]
    fn what_cannot_be_is_said() {
        let says = |ms: &[&[u32]], with: &dyn Fn(&mut Match)| {
            chosen(ms, with).unwrap_err().to_string().lines().next().unwrap_or_default().to_owned()
        };
        let some: &[&[u32]] = &[&[10, 20], &[30, UNKNOWN]];
        assert_eq!(
            says(some, &|m| m.cap = Some(Span::ms(25))),
            "the worst latency may be 25 ms, and the best possible is 30 ms, at network 0"
        );
        assert_eq!(
            says(&[&[10, 20, UNKNOWN], &[UNKNOWN, UNKNOWN, UNKNOWN]], &|m| m.room = Some(&[false, true, true])),
            "no network with room reaches all 2 players; network 1 reaches 1"
        );
        assert_eq!(says(&[&[], &[]], &|_| ()), "there are 0 networks, and it takes 1 to 100000");
        assert_eq!(says(&[&[1]], &|_| ()), "team 0 has no players");
        assert_eq!(says(some, &|m| m.teams = &[]), "there are 0 teams, and it takes 1 to 64");
        assert_eq!(says(&[&[1, 2], &[1]], &|_| ()), "row 1 has 1 entries, and there are 2 networks");
        assert_eq!(
            says(some, &|m| m.rows = &[]),
            "a player of team 0 is in row 0, and there are 0 rows, counted from 0"
        );
        assert_eq!(
            says(some, &|m| m.room = Some(&[])),
            "the list of networks with room has 0 entries, and there are 2 networks"
        );
        for bad in [&[(1, 5), (0, 5)][..], &[(1, 5), (1, 5)], &[(2, 5)]] {
            let (rows, teams) = ([Row::Sparse(bad), Row::Sparse(bad)], two(2));
            let error = choose(&Match::new(2, &rows, &teams)).unwrap_err();
            assert!(matches!(error, NoPlace::Order { row: 0, .. }), "{error}");
        }
    }

    #[test]
    fn the_choice_explains_itself() {
        let why = |ms: &[&[u32]]| chosen(ms, |_| ()).unwrap().why(|n| ["lyon", "oslo", "rome"][n].to_owned());
        assert_eq!(
            why(&[&[70, 79, 78], &[100, 104, 105], &[60, 80, 74], &[62, 100, 70]]),
            "oslo is 91 ms and 90 ms from the teams on average, 1 ms apart, and 104 ms from the worst placed; \
             lyon is best for the worst placed, 24 ms apart at 100 ms; second best: rome, 19 ms apart at 105 ms"
        );
        assert_eq!(
            why(&[&[70, 99], &[80, 99]]),
            "lyon is 70 ms and 80 ms from the teams on average, 10 ms apart, and 80 ms from the worst placed, the best \
             possible; no other network is within 88 ms of all"
        );
    }

    #[test]
    fn a_second_half_gives_back_what_the_first_took() {
        let table = [vec![90_000, 60_000, 95_000], vec![60_000, 90_000, 80_000]];
        let (rows, teams) = (dense(&table), two(2));
        let of = Match::new(3, &rows, &teams);
        assert_eq!(choose(&of).unwrap().chosen.gap, Span::ms(15));
        let h = halves(&of).unwrap();
        assert_eq!((h.gap, h.halves[0].network, h.halves[1].network), (Span::ZERO, 0, 1));
    }

    #[test]
    fn teams_that_are_free_are_drawn_up_evenly() {
        let table: Vec<Vec<u32>> = [10, 20, 70, 80].map(|l| vec![l * 1000, 90_000]).into();
        let (rows, teams) = (dense(&table), two(4));
        let s = split(&Match::new(2, &rows, &teams)).unwrap();
        assert_eq!((s.teams, s.figures.gap, s.figures.worst), ([vec![0, 3], vec![1, 2]], Span::ZERO, Span::ms(80)));
        let three = [vec![0, 1, 2]];
        assert!(split(&Match::new(2, &rows, &three)).is_err());
    }

    prop_compose! {
        /// A table of 4 to 8 players, some of its entries unknown, in latencies that often tie.
        fn tables()(players in 2_usize..5, networks in 1_usize..40)(
            table in prop::collection::vec(prop::collection::vec(
                prop_oneof![9 => 1_u32..60, 1 => Just(UNKNOWN)], networks), players * 2),
            cut in 1..players * 2, slack in 0_u32..60,
        ) -> (Vec<Vec<u32>>, Vec<Vec<usize>>, u32) {
            let players = table.len();
            (table, vec![(0..cut).collect(), (cut..players).collect()], slack)
        }
    }

    proptest! {
        #[test]
        fn the_choice_is_the_best_of_all_that_are_allowed((table, teams, slack) in tables()) {
            let rows = dense(&table);
            let of = Match { slack_percent: slack, ..Match::new(table[0].len(), &rows, &teams) };
            // The same by its definition, in fractions: |sum A / a − sum B / b| times a·b.
            let sizes = [teams[0].len() as i64, teams[1].len() as i64];
            let sum = |t: usize, n: usize| teams[t].iter().map(|r| i64::from(table[*r][n])).sum::<i64>();
            let gain = |n: usize| sum(1, n) * sizes[0] - sum(0, n) * sizes[1];
            let worst = |n: usize| table.iter().map(|r| r[n]).max().unwrap();
            let reached: Vec<usize> = (0..of.networks).filter(|n| worst(*n) != UNKNOWN).collect();
            let Some(best) = reached.iter().map(|n| worst(*n)).min() else {
                prop_assert!(choose(&of).is_err() && halves(&of).is_err());
                return Ok(());
            };
            let allowed: Vec<usize> =
                reached.into_iter().filter(|n| u64::from(worst(*n)) * 100 <= u64::from(best) * (100 + u64::from(slack))).collect();
            let fairest = allowed.iter().copied().min_by_key(|n| (gain(*n).abs(), worst(*n), *n)).unwrap();
            let c = choose(&of).unwrap();
            prop_assert_eq!((c.chosen.network, c.within), (fairest, allowed.len()));
            prop_assert_eq!(c.best.worst, Span(u64::from(best)));

            let pairs = allowed.iter().flat_map(|a| allowed.iter().map(|b| (gain(*a) + gain(*b)).abs()));
            let [first, second] = halves(&of).unwrap().halves.map(|f| f.network);
            prop_assert!(allowed.contains(&first) && allowed.contains(&second));
            prop_assert_eq!((gain(first) + gain(second)).abs(), pairs.min().unwrap());

            let s = split(&of).unwrap();
            let drawn = Match { teams: &s.teams, slack_percent: 0, ..of.clone() };
            prop_assert_eq!(s.figures.worst, Span(u64::from(best)));
            prop_assert_eq!(s.figures.network, choose(&drawn).unwrap().best.network);
            let l: Vec<i64> = table.iter().map(|r| i64::from(r[s.figures.network])).collect();
            let halvings = (0_u32..1 << l.len()).filter(|m| m.count_ones() as usize * 2 == l.len());
            let apart = |m: u32| l.iter().enumerate().map(|(i, l)| if m >> i & 1 == 1 { *l } else { -l }).sum::<i64>().unsigned_abs();
            prop_assert_eq!(s.figures.gap, Span(halvings.map(apart).min().unwrap() / (l.len() as u64 / 2)));
        }

        #[test]
        fn a_sparse_table_is_the_dense_one_without_its_gaps((table, teams, slack) in tables()) {
            let rows = dense(&table);
            let known: Vec<Vec<(u32, u32)>> =
                table.iter().map(|r| (0..).zip(r.iter().copied()).filter(|e| e.1 != UNKNOWN).collect()).collect();
            let sparse: Vec<Row> = known.iter().map(|r| Row::Sparse(r)).collect();
            let of = Match { slack_percent: slack, ..Match::new(table[0].len(), &rows, &teams) };
            let as_sparse = Match { rows: &sparse, ..of.clone() };
            prop_assert_eq!(choose(&of), choose(&as_sparse));
            prop_assert_eq!(halves(&of), halves(&as_sparse));
            prop_assert_eq!(split(&of), split(&as_sparse));
        }
    }
}
