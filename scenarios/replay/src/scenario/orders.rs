//! What an operator orders during a play.
//!
//! ```text
//!  [[order]] at_s, service, at = { tokyo = 1 }              ─┐
//!            fair = [["seoul", "tokyo"], ["berlin"]]        ─┴▶ OrderLine::order ─▶ the CPA, live or in the replay
//! ```

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmatrix_model::config::nearest;
use vmatrix_model::fleet::Fleet;
use vmatrix_model::wire::{Fair, Order};
use vmatrix_model::{NetworkId, RegionId, ServiceId};

/// An operator's order at a time: so many at networks, or one where it is fairest, or both.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrderLine {
    pub at_s: u32,
    pub service: ServiceId,
    #[serde(default)]
    pub at: BTreeMap<NetworkId, u32>,
    /// Teams of players' regions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fair: Option<Vec<Vec<RegionId>>>,
}

impl OrderLine {
    /// As the CPA is asked.
    pub fn order(&self) -> Order {
        let fair = self.fair.clone().map(|teams| Fair { teams, slack_percent: None, cap_ms: None });
        Order { service: self.service.clone(), at: self.at.clone(), fair }
    }

    /// What keeps it from being carried out in this fleet.
    pub(super) fn fault(&self, fleet: &Fleet) -> Option<String> {
        if fleet.service(&self.service).is_none() || self.at.keys().any(|n| fleet.network(n).is_none()) {
            return Some("names a service or network that does not exist".into());
        }
        let teams = match &self.fair {
            None if self.at.is_empty() => return Some("says nothing: give at, or fair".into()),
            None => return None,
            Some(teams) => teams,
        };
        if teams.len() < 2 || teams.iter().any(Vec::is_empty) {
            return Some("must be fair to two teams or more, each with a region".into());
        }
        let unknown = teams.iter().flatten().find(|r| fleet.region(r).is_none())?;
        let hint = nearest(unknown.as_str(), fleet.regions.iter().map(|r| r.name.as_str()));
        let hint = hint.map_or(String::new(), |n| format!("\n\nhint: did you mean {n:?}?"));
        Some(format!("is fair to region {unknown}, which does not exist{hint}"))
    }
}
