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
//! [`meeting`] is the same for an operator's order: players are regions of the fleet, networks those that are open.
//!
//! People without teams (a call) are teams of one: the gap is then that between the best and the worst placed.

mod further;
pub mod meeting;
mod table;
#[cfg(test)]
mod tests;

pub use further::{Halves, Split, halves, split};
pub use table::Row;

use std::fmt::Display;
use table::Table;
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
