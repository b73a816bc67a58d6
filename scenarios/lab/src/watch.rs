//! What a play hears from the CPA, kept for the recording. Pure.
//!
//! ```text
//! snapshots ─▶ instances over time, decisions, image bytes fetched ─▶ recording (times from its start)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::inventory::{InstanceState, Inventory};
use vmatrix_model::plan::{Cause, Decision};
use vmatrix_model::wire::Snapshot;
use vmatrix_model::{Bytes, NetworkId, ServiceId, Time};
use vmatrix_replay::recording::InstancesAt;

/// Most changes of instances kept; a play has tens.
const CHANGES_MAX: usize = 10_000;

/// Everything heard so far. Times are microseconds since the epoch until [`Watched::since`].
#[derive(Debug, Default)]
pub struct Watched {
    /// The last snapshot.
    pub latest: Option<Snapshot>,
    changes: Vec<InstancesAt>,
    serving: BTreeMap<ServiceId, BTreeMap<NetworkId, u32>>,
    decisions: BTreeMap<u64, Decision>,
    /// Per (network, service): bytes of earlier runs of the agent, bytes of this one.
    fetched: BTreeMap<(NetworkId, ServiceId), (u64, u64)>,
}

impl Watched {
    /// Hears a snapshot; answers the decisions that are new, by plan.
    pub fn hear(&mut self, now: Time, snapshot: Snapshot) -> Vec<Decision> {
        for service in snapshot.fleet.services.iter().map(|s| &s.name) {
            let serving = serving(&snapshot.inventory, service);
            if self.serving.get(service) != Some(&serving) {
                self.serving.insert(service.clone(), serving.clone());
                if self.changes.len() < CHANGES_MAX {
                    self.changes.push(InstancesAt { at: now, service: service.clone(), serving });
                }
            }
        }
        for (network, inventory) in &snapshot.inventory {
            for (service, image) in &inventory.images {
                let (before, current) = self.fetched.entry((network.clone(), service.clone())).or_default();
                // The count begins again with the agent.
                if image.fetched.0 < *current {
                    *before += *current;
                }
                *current = image.fetched.0;
            }
        }
        let fresh = snapshot.decisions.iter().filter(|d| !self.decisions.contains_key(&d.plan.id)).cloned().collect();
        for decision in &snapshot.decisions {
            self.decisions.insert(decision.plan.id, decision.clone());
        }
        self.latest = Some(snapshot);
        fresh
    }

    /// Networks where `service` serves now.
    pub fn serving(&self, service: &ServiceId) -> Vec<NetworkId> {
        self.serving.get(service).into_iter().flatten().map(|(n, _)| n.clone()).collect()
    }

    /// When the first decision that a crowd caused was taken.
    pub fn burst_at(&self, start: Time) -> Option<Time> {
        self.decisions
            .values()
            .filter(|d| matches!(d.plan.cause, Cause::Burst { .. }) && d.plan.at >= start)
            .map(|d| d.plan.at)
            .min()
    }

    /// Image bytes that all networks fetched so far.
    pub fn bytes_moved(&self) -> Bytes {
        Bytes(self.fetched.values().map(|(before, current)| before + current).sum())
    }

    /// `tcg`, `kvm`, or both if machines differ.
    pub fn accelerator(&self) -> String {
        let machines = self.latest.iter().flat_map(|s| s.inventory.values()).flat_map(|i| &i.machines);
        machines.map(|m| m.accelerator.clone()).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join("+")
    }

    /// Stored bytes that are at the networks, and that shall be.
    pub fn staged(&self) -> (Bytes, Bytes) {
        let images = || self.latest.iter().flat_map(|s| s.inventory.values()).flat_map(|i| i.images.values());
        (images().map(|i| i.present).sum(), images().map(|i| i.total).sum())
    }

    /// What a service is still waiting for, before the play can begin: it shall serve at home and its
    /// image shall be at every network.
    pub fn not_ready(&self) -> Vec<String> {
        let Some(snapshot) = &self.latest else { return vec!["the CPA has not answered yet".into()] };
        let mut waits = Vec::new();
        for service in &snapshot.fleet.services {
            if !self.serving(&service.name).contains(&service.home) {
                let seen = snapshot.inventory.get(&service.home);
                let instance = seen.and_then(|i| i.instances.iter().find(|x| x.id.service == service.name));
                let state = instance.map_or("no instance".to_owned(), |x| {
                    format!("{:?}, {}", x.state, x.trouble.as_deref().unwrap_or("no trouble"))
                });
                waits.push(format!("{} does not serve at {} ({state})", service.name, service.home));
            }
            for network in &snapshot.fleet.networks {
                let seen = snapshot.inventory.get(&network.name);
                if let Some(reason) = seen.and_then(|i| i.refused.get(&service.name)) {
                    waits.push(format!("{} refuses {}: {reason}", network.name, service.name));
                }
                if !seen.and_then(|i| i.images.get(&service.name)).is_some_and(|i| i.complete()) {
                    waits.push(format!("the image of {} is not at {}", service.name, network.name));
                }
            }
        }
        waits
    }

    /// What still differs from every service serving at home alone, its image asleep elsewhere.
    pub fn not_dormant(&self) -> Vec<String> {
        let mut waits = self.not_ready();
        let Some(snapshot) = &self.latest else { return waits };
        for (network, inventory) in &snapshot.inventory {
            let home = |s: &ServiceId| snapshot.fleet.service(s).is_some_and(|s| s.home == *network);
            let away = inventory.instances.iter().filter(|i| !home(&i.id.service));
            waits.extend(away.map(|i| format!("{} is {:?} at {network}", i.id, i.state)));
        }
        waits
    }

    /// The instances over time and the decisions, with times from `start`; what was before is at zero.
    pub fn since(&self, start: Time) -> (Vec<InstancesAt>, Vec<Decision>) {
        let from = |t: Time| Time(t.since(start).0);
        let mut first: BTreeMap<&ServiceId, &InstancesAt> = BTreeMap::new();
        for change in self.changes.iter().filter(|c| c.at <= start) {
            first.insert(&change.service, change);
        }
        let later = self.changes.iter().filter(|c| c.at > start);
        let instances = first.into_values().chain(later).map(|c| InstancesAt { at: from(c.at), ..c.clone() }).collect();
        let rebase = |d: &Decision| {
            let mut d = d.clone();
            d.plan.at = from(d.plan.at);
            d.serving_at = d.serving_at.map(from);
            d.done_at = d.done_at.map(from);
            d
        };
        (instances, self.decisions.values().map(rebase).collect())
    }
}

fn serving(inventory: &BTreeMap<NetworkId, Inventory>, service: &ServiceId) -> BTreeMap<NetworkId, u32> {
    let count = |i: &Inventory| {
        i.instances.iter().filter(|x| x.id.service == *service && x.state == InstanceState::Serving).count() as u32
    };
    inventory.iter().map(|(n, i)| (n.clone(), count(i))).filter(|(_, k)| *k > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmatrix_model::inventory::{ImageSeen, InstanceSeen};
    use vmatrix_model::placement::Placement;
    use vmatrix_model::steering::Steering;
    use vmatrix_model::{Digest, Generation, InstanceId};
    use vmatrix_replay::scenario::Scenario;

    fn snapshot(maps_at: &[&str], fetched: u64) -> Snapshot {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../library/flash-crowd.toml");
        let mut fleet = Scenario::read(std::path::Path::new(file)).unwrap().fleet;
        fleet.services.retain(|s| s.name.as_str() == "maps");
        let maps: ServiceId = "maps".parse().unwrap();
        let inventory = fleet.networks.iter().map(|n| {
            let instances = maps_at.iter().filter(|a| **a == n.name.as_str()).map(|_| InstanceSeen {
                id: InstanceId { service: maps.clone(), number: 0 },
                machine: "m1".parse().unwrap(),
                state: InstanceState::Serving,
                since: Time(0),
                resumed_in: None,
                trouble: None,
            });
            let image = ImageSeen {
                digest: Digest::of(b"x"),
                present: Bytes(9),
                total: Bytes(9),
                fetched: Bytes(fetched),
                resumable: true,
            };
            let seen = Inventory {
                network: n.name.clone(),
                at: Time(0),
                generation: Generation(1),
                machines: vec![],
                images: BTreeMap::from([(maps.clone(), image)]),
                instances: instances.collect(),
                holds: BTreeMap::new(),
                refused: BTreeMap::new(),
            };
            (n.name.clone(), seen)
        });
        Snapshot {
            at: Time(0),
            inventory: inventory.collect(),
            fleet: fleet.clone(),
            placement: Placement::default(),
            demand: vec![],
            steering: Steering::default(),
            decisions: vec![],
        }
    }

    #[test]
    fn only_changes_of_instances_are_kept_and_times_are_from_the_start() {
        let mut watched = Watched::default();
        for (at, places) in [(10, vec!["ashburn"]), (20, vec!["ashburn"]), (30, vec!["ashburn", "tokyo"])] {
            watched.hear(Time(at), snapshot(&places, 0));
        }
        let (instances, _) = watched.since(Time(20));
        let seen: Vec<(u64, usize)> = instances.iter().map(|i| (i.at.0, i.serving.len())).collect();
        assert_eq!(seen, [(0, 1), (10, 2)]);
    }

    #[test]
    fn bytes_fetched_before_a_restart_of_the_agent_still_count() {
        let mut watched = Watched::default();
        for fetched in [5, 7, 0, 2] {
            watched.hear(Time(1), snapshot(&["ashburn"], fetched));
        }
        assert_eq!(watched.bytes_moved(), Bytes(27), "7 and 2, at three networks");
    }

    #[test]
    fn an_instance_away_from_home_is_not_dormant() {
        let mut watched = Watched::default();
        watched.hear(Time(1), snapshot(&["ashburn"], 0));
        assert_eq!(watched.not_dormant(), Vec::<String>::new());
        watched.hear(Time(2), snapshot(&["ashburn", "tokyo"], 0));
        assert_eq!(watched.not_dormant(), ["maps-0 is Serving at tokyo"]);
        watched.hear(Time(3), snapshot(&["tokyo"], 0));
        assert!(!watched.not_ready().is_empty());
    }
}
