//! A plan: placement minus inventory, as a list people can read before anything moves.

use crate::placement::Placement;
use crate::{Bytes, Generation, MicroUsd, NetworkId, RegionId, ServiceId, Span, Time};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What would be done, why, and why not something else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Rises by one with each plan of a CPA.
    pub id: u64,
    pub at: Time,
    pub cause: Cause,
    /// The placement it was made from; it is stale once another has been applied.
    pub base: Generation,
    pub moves: Vec<Move>,
    /// Moves that were considered and left.
    pub not: Vec<WhyNot>,
    /// The placement once every move is done.
    pub target: Placement,
}

/// What made the CPA think.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Cause {
    /// The first placement, every service at home and asleep elsewhere.
    Start,
    /// A region asks for much more than it did.
    Burst {
        service: ServiceId,
        region: RegionId,
        /// Requests in a hundred seconds, now and usually: rates with two decimals and no float.
        requests_per_100s: u64,
        usual_per_100s: u64,
    },
    /// The ordinary round.
    Epoch,
    /// An operator's order.
    Order,
    /// An instance or a network was lost.
    Loss { network: NetworkId },
}

/// One step of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    pub service: ServiceId,
    pub network: NetworkId,
    pub action: Action,
    /// Image bytes that have to travel first.
    pub bytes: Bytes,
    /// From the order to done.
    pub time: Span,
    /// The whole price an hour before and after, of which the move is a part.
    pub before: Price,
    pub after: Price,
    /// One sentence for the operator.
    pub reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "instances")]
pub enum Action {
    /// Fetch the image; nothing runs yet.
    Stage,
    /// Resume so many instances in all.
    Resume(u32),
    /// Drain and suspend down to so many instances; 0 leaves the image dormant.
    Suspend(u32),
    /// Drop the image.
    Drop,
}

/// A price an hour, split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Price {
    /// Response time, valued (paper §5.1).
    pub latency: MicroUsd,
    /// Instance-hours at the hour's tariff.
    pub instances: MicroUsd,
    /// Bytes sent to clients and to back ends (paper §5.4).
    pub traffic: MicroUsd,
}

impl Price {
    pub fn total(self) -> MicroUsd {
        self.latency + self.instances + self.traffic
    }
}

impl std::ops::Add for Price {
    type Output = Price;

    fn add(self, other: Price) -> Price {
        Price {
            latency: self.latency + other.latency,
            instances: self.instances + other.instances,
            traffic: self.traffic + other.traffic,
        }
    }
}

/// A move that was considered and left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyNot {
    pub service: ServiceId,
    pub network: NetworkId,
    pub reason: String,
}

/// A plan that was applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    pub plan: Plan,
    /// The generation that began it (the union); the target follows once newcomers serve.
    pub generation: Generation,
    /// When the newcomers were all seen serving.
    #[serde(default)]
    pub serving_at: Option<Time>,
    /// When the target itself was reached.
    #[serde(default)]
    pub done_at: Option<Time>,
}

impl fmt::Display for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, word) = match self.action {
            Action::Stage => ("~", "stage".to_owned()),
            Action::Resume(n) => ("+", format!("resume x{n}")),
            Action::Suspend(0) => ("-", "suspend".to_owned()),
            Action::Suspend(n) => ("-", format!("suspend to x{n}")),
            Action::Drop => ("-", "drop".to_owned()),
        };
        write!(f, "{sign} {} @ {} {word} ({}, {}): {}", self.service, self.network, self.bytes, self.time, self.reason)
    }
}
impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {} @ {} not: {}", self.service, self.network, self.reason)
    }
}
