//! Better bids than an ascent finds, and networks worth a second look: the volume algorithm (Barahona, Anbil 2000).
//!
//! ```text
//!  levels ─▶ who is overpaid at these? ─▶ rows that pay n networks want to lower by n − 1, rows that pay none to rise
//!     ▲                                                    │ averaged over the steps so far
//!     └──── a step that way from the best levels yet ◀─────┘
//! ```
//!
//! An ascent ends where every row is stopped by somebody. Here networks may be overpaid on the way: what they get too
//! much counts against the bound ([`super::certify`]), so that it stays one. Most networks are never near being paid:
//! a step looks only at those that were, and after a few steps all are looked at for others.

use super::Problem;
use super::graph::Edge;

/// Steps between two looks at all networks: fewer at first, while bids still move far.
const STEPS: [usize; 7] = [5, 5, 10, 20, 30, 40, 40];
/// Share of a new direction in the average, as a shift: an eighth.
const AVERAGE: u32 = 3;
/// Fixed point of directions and step lengths.
const UNIT: i64 = 1 << 10;
/// The first step's length as a part of the gap, in [`UNIT`]s: a tenth. Half and a third of it, tried with other averages, ended lower or no higher.
const FIRST_STEP: u128 = 102;
/// Steps without progress after which they become shorter by three tenths.
const PATIENCE: u32 = 4;
/// The least level that a step scales with, µs: a row at 0 must be able to leave it.
const LEVEL_MIN: u64 = 100;

/// What was found: the levels of the best bound, and networks that were paid in full along the way.
pub(super) struct Found {
    pub(super) levels: Vec<u64>,
    pub(super) worthy: Vec<bool>,
}

/// The rows with demand, and the candidates that matter.
struct Core<'p> {
    problem: &'p Problem<'p>,
    rows: Vec<u32>,
    starts: Vec<u32>,
    edges: Vec<Edge>,
    member: Vec<bool>,
}

impl Core<'_> {
    fn gather(&mut self) {
        self.edges.clear();
        self.starts.clear();
        for &row in &self.rows {
            self.starts.push(self.edges.len() as u32);
            let edges = self.problem.graph.row(row as usize).iter();
            self.edges.extend(edges.filter(|e| self.member[e.network as usize]));
        }
        self.starts.push(self.edges.len() as u32);
    }

    fn row(&self, at: usize) -> &[Edge] {
        &self.edges[self.starts[at] as usize..self.starts[at + 1] as usize]
    }

    fn price(&self, at: usize) -> u64 {
        self.problem.price[self.rows[at] as usize]
    }
}

/// Searches from these levels, with the price of a known placement to measure steps by.
pub(super) fn search(problem: &Problem, levels: &[u64], member: Vec<bool>, known: u64) -> Found {
    let rows: Vec<u32> = (0..problem.price.len() as u32).filter(|&r| problem.price[r as usize] > 0).collect();
    let mut core = Core { problem, rows, starts: Vec::new(), edges: Vec::new(), member };
    let mut level: Vec<u64> = core.rows.iter().map(|&r| levels[r as usize]).collect();
    // No row need pay more than the nearest network alone.
    let caps: Vec<u64> = core.rows.iter().map(|&r| cap(problem, r as usize)).collect();
    let mut way = vec![UNIT; level.len()];
    let mut length = FIRST_STEP;
    let mut left: Vec<i128> = Vec::new();
    let (mut best, mut best_levels) = (i128::MIN, level.clone());
    let mut worthy = vec![false; problem.fixed.len()];
    for steps in STEPS.into_iter().map(Some).chain([None]) {
        let value = all(&core, &level, &mut left);
        if value > best {
            best = value;
            best_levels.clone_from(&level);
        } else if value < best - (i128::from(known) - best) {
            // Networks that nobody looked at are badly overpaid: back, and look at them from now on.
            level.clone_from(&best_levels);
            way.fill(UNIT);
        }
        let Some(steps) = steps else { break };
        for (network, &left) in left.iter().enumerate() {
            // Within a fiftieth of being paid: it may be after the next steps.
            core.member[network] |= left < i128::from(problem.fixed[network] / 50);
        }
        core.gather();
        worthy.fill(false);
        walk(&core, &caps, &mut level, &mut way, &mut length, steps, known, &mut worthy);
    }
    let mut levels = vec![0; problem.price.len()];
    for (&row, &level) in core.rows.iter().zip(&best_levels) {
        levels[row as usize] = level;
    }
    Found { levels, worthy }
}

fn cap(problem: &Problem, row: usize) -> u64 {
    let nearest = problem.graph.row(row).first().map_or(0, |e| problem.fixed[e.network as usize]);
    nearest / problem.price[row]
}

/// The bound at these levels with all networks looked at; `left` is what each still lacks, negative if overpaid.
fn all(core: &Core, level: &[u64], left: &mut Vec<i128>) -> i128 {
    left.clear();
    left.extend(core.problem.fixed.iter().map(|&f| i128::from(f)));
    for (at, &level) in level.iter().enumerate() {
        pay(core.problem.graph.row(core.rows[at] as usize), core.price(at), level, left);
    }
    sum(core, level, left)
}

#[inline]
fn pay(edges: &[Edge], price: u64, level: u64, left: &mut [i128]) {
    for edge in edges {
        let latency = u64::from(edge.latency);
        if latency >= level {
            break;
        }
        left[edge.network as usize] -= i128::from(price * (level - latency));
    }
}

fn sum(core: &Core, level: &[u64], left: &[i128]) -> i128 {
    let bids = level.iter().enumerate().map(|(at, &l)| i128::from(core.price(at) * l));
    bids.sum::<i128>() + left.iter().map(|&l| l.min(0)).sum::<i128>()
}

/// Some steps over the core; ends at the best levels seen.
#[expect(clippy::too_many_arguments, reason = "the state of the search between two looks at all networks")]
fn walk(
    core: &Core,
    caps: &[u64],
    level: &mut Vec<u64>,
    way: &mut [i64],
    length: &mut u128,
    steps: usize,
    known: u64,
    worthy: &mut [bool],
) {
    let (mut best, mut best_level, mut stuck) = (i128::MIN, level.clone(), 0);
    let mut left: Vec<i128> = Vec::new();
    for _ in 0..steps {
        left.clear();
        left.extend(core.problem.fixed.iter().map(|&f| i128::from(f)));
        for (at, &level) in level.iter().enumerate() {
            pay(core.row(at), core.price(at), level, &mut left);
        }
        let value = sum(core, level, &left);
        worthy.iter_mut().zip(&left).for_each(|(w, &l)| *w |= l < 0);
        let (mut along, mut norm) = (0_i128, 0_u128);
        for (at, &level) in level.iter().enumerate() {
            let paid = core.row(at).iter().take_while(|e| u64::from(e.latency) < level);
            let wish = 1 - paid.filter(|e| left[e.network as usize] < 0).count() as i64;
            along += i128::from(wish * way[at]) * i128::from(core.price(at) * level.max(LEVEL_MIN));
            way[at] += (wish * UNIT - way[at]) >> AVERAGE;
        }
        if value > best {
            if best != i128::MIN && along > 0 {
                *length = (*length * 13 / 10).min(2 * UNIT as u128);
            }
            (best, stuck) = (value, 0);
            best_level.clone_from(level);
        } else {
            stuck += 1;
            if stuck == PATIENCE {
                stuck = 0;
                *length = (*length * 7 / 10).max(1);
            }
        }
        for (at, &level) in best_level.iter().enumerate() {
            norm += u128::from((way[at] * way[at]) as u64) * u128::from(core.price(at) * level.max(LEVEL_MIN));
        }
        // length · gap / norm, with 30 bits after the point.
        let gap = u128::try_from(i128::from(known) - best).unwrap_or(0).min(1 << 62);
        let step = (((*length * gap) << 40) / norm.max(1)).min(1 << 40) as i128;
        for (at, level) in level.iter_mut().enumerate() {
            let by = (step * i128::from(way[at]) * i128::from(best_level[at].max(LEVEL_MIN))) >> 40;
            *level = u64::try_from(i128::from(best_level[at]) + by).unwrap_or(0).min(caps[at]);
        }
    }
    *level = best_level;
}
