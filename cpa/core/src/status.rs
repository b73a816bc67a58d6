//! What people ask the CPA: the world as it sees it, and why a service is where it is.

use crate::cpa::Cpa;
use crate::explain::rps;
use crate::rounds::running;
use vmatrix_model::wire::{DemandRate, Explanation, Snapshot};
use vmatrix_model::{ServiceId, Time};

/// Seconds that the shown rates are a mean of.
const RATE_OVER: u64 = 5;

impl Cpa {
    /// The world as it sees it, whole.
    pub fn snapshot(&self, now: Time) -> Snapshot {
        let m = &self.memory;
        Snapshot {
            at: now,
            fleet: self.fleet.clone(),
            placement: m.placement.clone(),
            inventory: m.seen.iter().map(|(n, s)| (n.clone(), s.inventory.clone())).collect(),
            demand: self.demand(now),
            steering: m.steering.clone(),
            decisions: m.decisions.iter().cloned().collect(),
        }
    }

    /// What every region asks of every service now, and where it arrives.
    pub fn demand(&self, now: Time) -> Vec<DemandRate> {
        let end = crate::clusters::second(now);
        let per_100s = |s: &crate::clusters::Series| s.sum(end, RATE_OVER) * 100 / RATE_OVER;
        let of_service = |(service, counts): (&ServiceId, &crate::clusters::Counts)| {
            let rate = |(region, a): (&vmatrix_model::RegionId, &crate::clusters::Arrivals)| DemandRate {
                service: service.clone(),
                region: region.clone(),
                requests_per_100s: per_100s(&a.all),
                networks: a.at.iter().map(|(n, s)| (n.clone(), per_100s(s))).filter(|(_, r)| *r > 0).collect(),
            };
            counts.regions.iter().map(rate).collect::<Vec<_>>()
        };
        self.memory.counts.iter().flat_map(of_service).collect()
    }

    /// Why a service is where it is, and why it is not elsewhere; nothing if there is no such service.
    pub fn explain(&self, now: Time, name: &ServiceId) -> Option<Explanation> {
        let service = self.fleet.service(name)?;
        let m = &self.memory;
        let at: Vec<String> = running(&self.aim(name)).iter().map(|(n, i)| format!("{n} x{i}")).collect();
        let mut lines =
            vec![format!("{name} runs at {} ({}); home is {}", at.join(", "), m.placement.generation, service.home)];
        if self.memory.transitions.contains_key(name) {
            lines.push("it is on its way: old and new places run together until the new ones serve and old answers have run out".into());
        }
        if let Some(until) = self.ordered_until(name, now) {
            lines.push(format!(
                "an operator ordered it there; the rounds leave it alone for another {}",
                until.since(now)
            ));
        }
        for (region, rate) in &self.rates(name).regions {
            let crowd = m.watches.get(name).and_then(|w| w.get(region)).and_then(|w| w.crowd());
            let words = crowd
                .map_or(String::new(), |c| format!(", a crowd since {}; usually {}", now.since(c.since), rps(c.usual)));
            lines.push(format!("{region} asks {} requests/s{words}", rps(*rate)));
        }
        let mine = m.decisions.iter().rev().filter(|d| d.plan.moves.iter().any(|v| v.service == *name));
        for d in mine.take(3) {
            for v in d.plan.moves.iter().filter(|v| v.service == *name) {
                lines.push(format!("{} ago, plan {}: {v}", now.since(d.plan.at), d.plan.id));
            }
        }
        lines.extend(m.not.get(name).into_iter().flatten().map(|n| format!("not at {}: {}", n.network, n.reason)));
        Some(Explanation { service: name.clone(), lines })
    }
}
