//! What gets further than the fairest network, by asking for something else.
//!
//! ```text
//!  halves: first half at one network ─▶ the VM moves ─▶ second half at another that gives back what the first took
//!  split:  players without teams ─▶ the best network for the worst placed ─▶ the two teams that are nearest to equal
//! ```

use super::table::Table;
use super::{Figures, Match, NoPlace, SPLIT_MAX};
use vmatrix_model::Span;

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
