//! What the daemons say to each other that is not a noun of its own. JSON over HTTP; see docs/api.md.

use crate::demand::DemandReport;
use crate::fleet::Fleet;
use crate::inventory::Inventory;
use crate::placement::Placement;
use crate::plan::{Decision, Plan};
use crate::steering::Steering;
use crate::{Generation, NetworkId, RegionId, ServiceId, Time};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::RangeInclusive;

/// UDP ports at which machines' relays arrive: the machines take them, the edge lets them in.
pub const RELAY_PORTS: RangeInclusive<u16> = 51_830..=52_085;

/// An error as every daemon answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What went wrong, and where.
    pub problem: String,
    /// What to do next.
    #[serde(default)]
    pub hint: String,
}

/// What an operator wants: `service` at each listed network with so many instances; networks not listed keep theirs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    pub service: ServiceId,
    #[serde(default)]
    pub at: BTreeMap<NetworkId, u32>,
    /// One instance more where it is fairest to these players, wherever that is: but for networks that `at` empties.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fair: Option<Fair>,
}

/// Who is to meet in one place: a game's teams, or the people of a call, each a team of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fair {
    /// The region of each player, team by team; a region as often as it has players.
    pub teams: Vec<Vec<RegionId>>,
    /// How much longer than the best possible the longest round trip may be for the sake of fairness, per cent; 10 if
    /// not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slack_percent: Option<u32>,
    /// What no player's round trip may be above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cap_ms: Option<u32>,
}

/// Applies a plan made before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    pub plan: u64,
}

/// Why a service is, or is not, where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub service: ServiceId,
    pub lines: Vec<String>,
}

/// The world as the CPA sees it, whole: what the page and `vmatrix watch` begin with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub at: Time,
    pub fleet: Fleet,
    pub placement: Placement,
    pub inventory: BTreeMap<NetworkId, Inventory>,
    pub demand: Vec<DemandRate>,
    pub steering: Steering,
    /// Newest last, at most [`DECISIONS_MAX`].
    pub decisions: Vec<Decision>,
}

/// Decisions a snapshot carries; the journal holds them all.
pub const DECISIONS_MAX: usize = 50;

/// What clients of a region ask of a service now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DemandRate {
    pub service: ServiceId,
    pub region: RegionId,
    /// Requests in a hundred seconds at the present rate: a rate with two decimals and no float.
    pub requests_per_100s: u64,
    /// Where those requests arrive.
    pub networks: BTreeMap<NetworkId, u64>,
}

/// What the CPA tells watchers (server-sent events; the event's name is the tag).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Snapshot(Box<Snapshot>),
    Decision(Decision),
}

/// A machine subscribes to its network's VM agent, again every few seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subscription {
    pub machine: crate::inventory::MachineSeen,
    /// Where its steps are sent.
    pub address: SocketAddrV4,
}

/// A cell asks the origin's gateway for a place in the owner's intranet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerRequest {
    pub network: NetworkId,
    /// The instance's name: `agenda-0`.
    pub cell: String,
    /// WireGuard public key, base64. The private one never leaves the cell's tunnel.
    pub public_key: String,
}

/// The gateway's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerGrant {
    /// The cell's address in the owner's intranet.
    pub address: Ipv4Addr,
    /// The owner's intranet: what the cell sends into the tunnel.
    pub intranet: Ipv4Net,
    /// Whether the gateway did not know this key a moment ago: what both had agreed on is void, so the
    /// cell shakes hands anew instead of waiting until it notices silence.
    pub fresh: bool,
    /// The gateway's WireGuard public key, base64.
    pub public_key: String,
    /// Where its UDP port is.
    pub endpoint: SocketAddrV4,
    /// A peer that is not asked for again within so long is forgotten.
    pub lease_s: u32,
}

/// A line of the CPA's journal: everything it heard and did, in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JournalLine {
    /// Not `at`: entries have times of their own, and a key is there once.
    #[serde(rename = "written_at")]
    pub at: Time,
    #[serde(flatten)]
    pub entry: JournalEntry,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "snake_case")]
pub enum JournalEntry {
    Demand(DemandReport),
    Inventory(Inventory),
    Order(Order),
    Decided(Box<Decision>),
    Placed { placement: Placement },
    Announced { generation: Generation },
    Planned(Box<Plan>),
}
