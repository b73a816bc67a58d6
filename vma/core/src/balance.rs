//! Balance: which instances should move to which machines, in few moves (paper §6.1.2).
//!
//! ```text
//!  machines: room, pool ─┐             ┌─ place: n instances of M each ─▶ a machine for each, or why not
//!  instances: needs, at ─┼─▶ ledger ───┤
//!  rules: weights        ┘   (score)   └─ balance: search ─▶ order ─▶ steps, each with its gain
//! ```
//!
//! The score of a network is `Σ w · σ`: for each kind of resource the standard deviation, over machines, of how much
//! of the machine's pool is taken; and for each two instances of one service that share a machine and should not,
//! a fixed sum. 0 is a network whose machines are all equally full. Less is better.
//!
//! - [`ledger`]: who is where, and the score, kept as exact integers so that a change of one instance costs the same
//!   with ten machines and with ten thousand.
//! - [`search`]: where instances should be in the end: single moves and exchanges of two, the best first. What moves
//!   is priced, and going elsewhere costs nothing to an instance that moves anyway.
//! - [`order`]: the moves, in an order in which no machine is ever over its room and no step makes it worse.
//!
//! # Invariants
//! 1. No step puts more on a machine than it has room for, nor makes two instances share it that must not.
//! 2. Each step gains more than [`Limits::gain`] for each instance that moves.
//! 3. What [`balance`] has balanced it leaves alone, unless it stopped because of [`Limits::moves`].
//! 4. The order of the input does not matter: machines and instances are taken by name.

mod ledger;
mod order;
mod place;
mod search;

pub use place::{Apart, Lacks, Placed, Refused, Want, place};

use ledger::Ledger;
use search::Search;
use std::fmt;
use vmatrix_model::{InstanceId, MachineId};

/// How many kinds of resource there are.
pub const KINDS: usize = 4;

/// A kind of resource; the order is that of [`Amounts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Cpu,
    Memory,
    Disk,
    Load,
}

/// All kinds, in order.
pub const ALL: [Kind; KINDS] = [Kind::Cpu, Kind::Memory, Kind::Disk, Kind::Load];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Cpu => "CPU",
            Kind::Memory => "memory",
            Kind::Disk => "disk",
            Kind::Load => "load",
        })
    }
}

/// So much of each kind: what an instance needs, or what a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Amounts {
    /// Thousandths of one processor.
    pub cpu_millis: u64,
    pub memory_mib: u64,
    pub disk_mib: u64,
    /// How busy it is, as measured: thousandths of an ordinary instance, which is what one counts as of which
    /// nothing is known. Spreads instances that are alike on paper.
    pub load: u64,
}

impl Amounts {
    /// Room without end, for kinds that are not rationed.
    pub const ENDLESS: u64 = u64::MAX;

    pub(crate) fn by_kind(&self) -> [u64; KINDS] {
        [self.cpu_millis, self.memory_mib, self.disk_mib, self.load]
    }
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub id: MachineId,
    /// What instances may have of it altogether.
    pub room: Amounts,
    /// What its use is reckoned against; at least 1 of each kind that has a weight. Mostly the same as `room`; less
    /// where more is sold than is there.
    pub pool: Amounts,
}

impl Machine {
    /// A machine that is full when its room is taken. Its load is not bounded: `room.load` is what counts as one.
    pub fn new(id: MachineId, room: Amounts) -> Machine {
        // A machine without a disk is as full of it as any that has none taken.
        let pool = Amounts {
            cpu_millis: room.cpu_millis.max(1),
            memory_mib: room.memory_mib.max(1),
            disk_mib: room.disk_mib.max(1),
            load: room.load.max(1),
        };
        Machine { id, room: Amounts { load: Amounts::ENDLESS, ..room }, pool }
    }
}

/// An instance on a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub id: InstanceId,
    pub machine: MachineId,
    /// The machine configuration M of its service (SODA's `<n, M>`).
    pub needs: Amounts,
    /// Whether it is to share no machine with another instance of its service.
    pub apart: bool,
}

/// What is good.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// What one standard deviation of each kind counts, in the order of [`ALL`]; 0 to [`Rules::WEIGHT_MAX`].
    pub weights: [f64; KINDS],
    /// What each instance counts that shares a machine with another of its service and is to be apart.
    pub conflict: f64,
    /// How much more CPU the same work takes on a machine that several instances share, in hundredths (SODA's
    /// slow-down factor); 100 to 1000. An instance that has a machine to itself is not slowed down.
    pub slow_down: u64,
}

impl Rules {
    /// Heavier weights would leave nothing of the others in a double.
    pub const WEIGHT_MAX: f64 = 1e6;
}

impl Default for Rules {
    /// Every kind counts the same: a machine that is out of one is as useless as one that is out of another. Load
    /// has no bound and its deviation is of whole instances, not of fractions of a machine: a tenth. Sharing counts
    /// more than all of these can (the deviation of a fraction is at most one half). SODA measured guests that
    /// took up to half as long again; that is not assumed here: who measured it sets it.
    fn default() -> Rules {
        Rules { weights: [1.0, 1.0, 1.0, 0.1], conflict: 2.0, slow_down: 100 }
    }
}

/// When enough is enough.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// At most so many moves.
    pub moves: usize,
    /// What each move has to gain, in the unit of the score; at least 0.
    pub gain: f64,
}

impl Default for Limits {
    /// A relocation is a pause of a service, so it has to even out something that can be seen: a thousandth of the
    /// whole spread that one kind can have is about a machine in a thousand going from empty to full.
    fn default() -> Limits {
        Limits { moves: usize::MAX, gain: 0.001 }
    }
}

/// An instance that changes its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    pub instance: InstanceId,
    pub from: MachineId,
    pub to: MachineId,
}

/// What is done at once: one move, or two that are worth it only together (an exchange), to be made in this order.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    pub moves: Vec<Move>,
    /// The score before it.
    pub before: f64,
    /// The score after it.
    pub after: f64,
    /// The kind that it evens out most; none where it takes apart what should not share a machine.
    pub evens: Option<Kind>,
}

impl Step {
    /// What it gains.
    pub fn gain(&self) -> f64 {
        self.before - self.after
    }
}

impl fmt::Display for Step {
    /// `maps-0 from m1 to m2: 0.4120 to 0.3061, evens out memory`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, m) in self.moves.iter().enumerate() {
            let and = if nth > 0 { ", " } else { "" };
            write!(f, "{and}{} from {} to {}", m.instance, m.from, m.to)?;
        }
        write!(f, ": {:.4} to {:.4}, ", self.before, self.after)?;
        match self.evens {
            Some(kind) => write!(f, "evens out {kind}"),
            None => f.write_str("no longer shares a machine with its like"),
        }
    }
}

/// What should be done.
#[derive(Debug, Clone, PartialEq)]
#[must_use = "steps that nobody makes balance nothing"]
pub struct Balance {
    pub before: f64,
    pub after: f64,
    /// In the order in which they are to be made; empty is a normal answer.
    pub steps: Vec<Step>,
}

impl Balance {
    /// All moves, in order.
    pub fn moves(&self) -> impl Iterator<Item = &Move> {
        self.steps.iter().flat_map(|s| &s.moves)
    }
}

/// A network that cannot be reckoned with.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Odd {
    #[error("machine {0} is there twice; name each machine once")]
    MachineTwice(MachineId),
    #[error("instance {0} is there twice; name each instance once")]
    InstanceTwice(InstanceId),
    #[error("instance {instance} is on {machine}, which is not among the machines; add it or leave the instance out")]
    Unknown { instance: InstanceId, machine: MachineId },
    #[error("machine {machine} has a pool of 0 {kind}, which has a weight; give it a pool or weigh {kind} with 0")]
    NoPool { machine: MachineId, kind: Kind },
    #[error("{seen} {what} are more than the {max} that are reckoned with; split the network")]
    TooMany { what: &'static str, seen: usize, max: usize },
    #[error("instance {instance} needs {seen} of {kind}, more than any machine can have ({max}); mend its size")]
    TooLarge { instance: InstanceId, kind: Kind, seen: u64, max: u64 },
    #[error("weight or gain {0} is not a number from 0 to a million; mend the rules")]
    Weight(f64),
    #[error("a slow-down of {0} hundredths is not between 100 (none) and 1000; mend the rules")]
    SlowDown(u64),
}

/// The score of a network as it is.
///
/// # Errors
/// What is wrong with the input, and what to do about it.
pub fn score(machines: &[Machine], instances: &[Instance], rules: &Rules) -> Result<f64, Odd> {
    Ok(Ledger::new(machines, instances, rules)?.score())
}

/// Improves who is where, by few moves: each step gains more than `limits` asks for, and none is left that would.
///
/// # Errors
/// What is wrong with the input, and what to do about it.
pub fn balance(machines: &[Machine], instances: &[Instance], rules: &Rules, limits: &Limits) -> Result<Balance, Odd> {
    let ledger = Ledger::new(machines, instances, rules)?;
    if !(0.0..=Rules::WEIGHT_MAX).contains(&limits.gain) {
        return Err(Odd::Weight(limits.gain));
    }
    let before = ledger.score();
    // Where everything should be, then how to get there.
    let wanted = Search::of_places(ledger.clone(), limits).run();
    let (mut end, mut plan) = order::order(ledger, &wanted, limits);
    if end.items.iter().zip(&wanted).any(|(item, to)| item.at != *to) {
        // The way there was not open to all: from where they are, step by step.
        let moved: usize = plan.iter().map(order::Planned::len).sum();
        let mut rest = Search::of_steps(end, &Limits { moves: limits.moves.saturating_sub(moved), ..*limits });
        rest.polish();
        let (further, more) = rest.into_plan();
        end = further;
        plan.extend(more);
    }
    let steps = plan.iter().map(|p| p.named(&end)).collect();
    Ok(Balance { before, after: end.score(), steps })
}

#[cfg(test)]
mod tests;
