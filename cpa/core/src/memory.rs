//! All that the CPA knows beyond its configuration, as one value: write it down, and a new process goes on from it.

use crate::burst::Watch;
use crate::clusters::Counts;
use crate::forecast::Usual;
use crate::toward::Transition;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use vmatrix_model::inventory::{Holder, Inventory};
use vmatrix_model::placement::{Placement, Share};
use vmatrix_model::plan::{Decision, Plan};
use vmatrix_model::steering::Steering;
use vmatrix_model::{Bytes, NetworkId, RegionId, ServiceId, Time};

/// Plans kept for an operator to apply; older ones are asked for again.
pub const PLANS_MAX: usize = 32;
/// Decisions remembered, as many as a snapshot shows; the journal holds them all.
pub const DECISIONS_MAX: usize = vmatrix_model::wire::DECISIONS_MAX;

/// What one CPA remembers.
///
/// # Invariants
/// 1. `placement.generation`, `plans_made` and `steering.generation` never fall.
/// 2. Every collection is bounded: by the fleet (services, networks, regions) or by a constant here.
/// 3. A field that is new since an earlier version has a default, so that an upgrade goes on from what that version
///    wrote; only the numbers that must never fall, and what they number, are mandatory.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Memory {
    /// When the CPA first ran; zero until the first tick.
    pub began: Option<Time>,
    /// The placement in force: what the networks were last told.
    pub placement: Placement,
    /// Where a service is on its way to, if it is on its way.
    #[serde(default)]
    pub transitions: BTreeMap<ServiceId, Transition>,
    /// Services an operator placed, and until when the rounds leave them alone.
    #[serde(default)]
    pub ordered: BTreeMap<ServiceId, Time>,
    /// Plans that may be applied, oldest first.
    #[serde(default)]
    pub plans: VecDeque<Plan>,
    /// Number of the last plan made.
    pub plans_made: u64,
    /// Decisions made, oldest first.
    #[serde(default)]
    pub decisions: VecDeque<Decision>,
    /// The answers in force.
    pub steering: Steering,
    /// What every network was last seen to have, and when the CPA heard of it.
    #[serde(default)]
    pub seen: BTreeMap<NetworkId, Seen>,
    /// Who holds each singleton, by the highest epoch that was ever seen: never forgotten, for a singleton that was
    /// begun once is not begun again.
    #[serde(default)]
    pub holders: BTreeMap<ServiceId, Held>,
    /// Demand counted, per service.
    #[serde(default)]
    pub counts: BTreeMap<ServiceId, Counts>,
    /// What each region usually asks for.
    #[serde(default)]
    pub usual: BTreeMap<ServiceId, BTreeMap<RegionId, Usual>>,
    /// Whether each region is in a crowd.
    #[serde(default)]
    pub watches: BTreeMap<ServiceId, BTreeMap<RegionId, Watch>>,
    /// The last report of each edge's run.
    #[serde(default)]
    pub reports: BTreeMap<NetworkId, LastReport>,
    /// What is remembered of each service for planning a day ahead.
    #[serde(default)]
    pub ahead: BTreeMap<ServiceId, crate::ahead::Ahead>,
    /// What the holds remember of each service.
    #[serde(default)]
    pub holds: BTreeMap<ServiceId, crate::hold::Held>,
    /// Why each service stayed away from the networks it is not in, from the last round.
    #[serde(default)]
    pub not: BTreeMap<ServiceId, Vec<vmatrix_model::plan::WhyNot>>,
    /// Stored bytes of each service's image, where known.
    #[serde(default)]
    pub images: BTreeMap<ServiceId, Bytes>,
    /// End of the last slot that was counted.
    #[serde(default)]
    pub slot: u64,
    /// The last second that was judged for crowds.
    #[serde(default)]
    pub second: u64,
}

/// A network's last inventory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// When the CPA heard it, by its own clock: networks' clocks differ.
    pub heard: Time,
    pub inventory: Inventory,
}

/// Where a singleton is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub network: NetworkId,
    pub holder: Holder,
}

/// Which report an edge sent last, so that one sent twice is counted once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastReport {
    pub run: u64,
    pub sequence: u64,
    /// When the CPA heard it.
    pub heard: Time,
    /// End of its interval by the edge's clock.
    pub at: Time,
}

/// One service's shares by network.
pub type Shares = BTreeMap<NetworkId, Share>;

impl Memory {
    /// Keeps a decision, in place of an earlier word about the same plan.
    pub fn decide(&mut self, decision: Decision) {
        if let Some(old) = self.decisions.iter_mut().find(|d| d.plan.id == decision.plan.id) {
            *old = decision;
            return;
        }
        self.decisions.push_back(decision);
        while self.decisions.len() > DECISIONS_MAX {
            self.decisions.pop_front();
        }
    }

    /// Keeps a plan for an operator.
    pub fn keep(&mut self, plan: Plan) {
        self.plans.push_back(plan);
        while self.plans.len() > PLANS_MAX {
            self.plans.pop_front();
        }
    }

    /// Notes who holds singletons in a network; answers whether that is news.
    pub fn note_holders(&mut self, inventory: &Inventory) -> bool {
        let mut news = false;
        for (service, holder) in &inventory.holds {
            let held = Held { network: inventory.network.clone(), holder: holder.clone() };
            // An inventory that was overtaken tells of an earlier holder.
            let later = self.holders.get(service).is_none_or(|known| holder.epoch >= known.holder.epoch);
            if later && self.holders.get(service) != Some(&held) {
                self.holders.insert(service.clone(), held);
                news = true;
            }
        }
        news
    }

    /// The number of the next plan.
    pub fn next_plan(&mut self) -> u64 {
        self.plans_made += 1;
        self.plans_made
    }
}
