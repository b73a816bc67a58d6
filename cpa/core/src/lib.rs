//! Decides where each service runs. Pure: it reads no clock, waits for nothing, rolls no dice.
//!
//! ```text
//!  Demand ──▶ clusters ─▶ forecast, burst ─┐
//!  Inventory ─────────────────────────────┤
//!  Order, Apply (people) ─────────────────┼─▶ solve (cost) ─▶ hold ─▶ explain ─▶ Plan ─▶ check
//!  Tick ──────────────────────────────────┘                                        │ applied
//!  Assign, Announce, Placed, Decided ◀── steering ◀── toward (union first, then target) ◀┘
//! ```
//!
//! The driver (the agent, or the replay in virtual time) calls [`Cpa::handle`] with the time and one
//! [`Event`] and carries out the [`Command`]s in their order. The same events at the same times give
//! the same commands, byte for byte.

pub mod ahead;
pub mod burst;
mod carry;
pub mod check;
pub mod clusters;
pub mod cost;
pub mod cpa;
mod demand;
pub mod explain;
pub mod fair;
pub mod forecast;
mod gap;
pub mod greedy;
pub mod hold;
pub mod horizon;
pub mod memory;
pub mod orders;
pub mod pools;
mod rounds;
pub mod season;
pub mod solve;
mod status;
pub mod steering;
pub mod toward;

pub use cpa::{Cpa, Policy};
pub use memory::Memory;

use vmatrix_model::assignment::Assignment;
use vmatrix_model::demand::DemandReport;
use vmatrix_model::inventory::Inventory;
use vmatrix_model::placement::Placement;
use vmatrix_model::plan::{Decision, Plan};
use vmatrix_model::steering::Steering;
use vmatrix_model::wire::Order;
use vmatrix_model::{Bytes, NetworkId, ServiceId};

/// What the CPA hears.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Time has passed. Sent every 0.5 s (at least once a second); the first one makes the first placement.
    Tick,
    /// An edge counted its clients.
    Demand(DemandReport),
    /// A VM agent looked at its network.
    Inventory(Inventory),
    /// The size of a service's image became known.
    Image(ServiceId, Bytes),
    /// An edge has answers of this number already: those of a CPA whose journal was lost, if it is newer than ours.
    Answering { network: NetworkId, generation: vmatrix_model::Generation },
    /// An operator asks what an order would do: answered by [`Command::Planned`] or [`Command::Refuse`].
    Order(Order),
    /// An operator applies a plan: answered by [`Command::Decided`] or [`Command::Refuse`].
    Apply { plan: u64 },
    /// The first event after a restart: what the last run remembered. The data plane went on meanwhile.
    Restored(Box<Memory>),
}

/// What the CPA asks of the world.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// A plan was made for an operator and is kept; nothing moves.
    Planned(Plan),
    /// A plan was applied, or an applied one made progress (`serving_at`, `done_at`); same plan id, newest wins.
    Decided(Decision),
    /// The placement in force has changed. Journal it before sending what follows.
    Placed(Placement),
    /// One network's share of the placement in force: whole, numbered, sent until seen.
    Assign(NetworkId, Assignment),
    /// Who is sent where, for every edge: whole, numbered, sent until seen.
    Announce(Steering),
    /// An order or a plan was turned down.
    Refuse(Refusal),
}

/// Why an order or a plan was turned down.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such plan (any more).
    #[error("there is no plan {plan}\n\nhint: the CPA keeps the last {kept} plans; make one with `vmatrix plan`", kept = memory::PLANS_MAX)]
    NoPlan { plan: u64 },
    /// Another placement came in between.
    #[error(
        "plan {plan} was made from {base}, and {now} is in force: {what}\n\nhint: ask for the plan again, read it, then apply that one"
    )]
    Stale { plan: u64, base: vmatrix_model::Generation, now: vmatrix_model::Generation, what: String },
    /// A network claims a state numbered so far ahead that no CPA of this fleet can have said it.
    #[error(
        "{network} claims {claimed}, and {now} is in force: more than {most} ahead\n\nhint: empty the state folder of that network's daemons and start them again", most = cpa::AHEAD_MAX
    )]
    Absurd { network: NetworkId, claimed: vmatrix_model::Generation, now: vmatrix_model::Generation },
    /// The order names something that does not exist or asks for what cannot be.
    #[error("{problem}\n\nhint: {hint}")]
    Order { problem: String, hint: String },
}
