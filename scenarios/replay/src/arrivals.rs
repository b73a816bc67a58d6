//! When clients ask: the same requests for the lab and for the replay.
//!
//! ```text
//! Scenario::rate ─▶ thinning of a Poisson stream per (service, region) ─▶ merged, in order of time
//! ```
//!
//! Open loop: a client asks when it wants to, not when the answer before it came. A slow service
//! therefore cannot hide behind clients that wait for it.

use crate::chance::Chance;
use crate::scenario::Scenario;
use std::collections::BTreeSet;
use vmatrix_model::{RegionId, ServiceId, Time};

/// One request that a client will make.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arrival {
    /// Since the start of the play.
    pub at: Time,
    pub service: ServiceId,
    pub region: RegionId,
    /// Its place, from 0, among the requests of this region for this service.
    pub number: u64,
}

/// All requests of a scenario, in order of time (ties: by service, region, number).
///
/// The length is bounded by [`Scenario::parse`], which refuses scenarios that would ask more often
/// than [`crate::scenario::REQUESTS_MAX`].
pub fn arrivals(scenario: &Scenario) -> Vec<Arrival> {
    let lines: BTreeSet<(&ServiceId, &RegionId)> = scenario
        .demand
        .iter()
        .map(|d| (&d.service, &d.region))
        .chain(scenario.crowds.iter().map(|c| (&c.service, &c.region)))
        .collect();
    let mut all: Vec<Arrival> =
        lines.into_iter().flat_map(|(service, region)| of_one(scenario, service, region)).collect();
    all.sort();
    all
}

/// The requests of one region for one service: candidates at the peak rate, each kept with the
/// probability that the rate of its moment has of the peak (Lewis and Shedler's thinning).
fn of_one(scenario: &Scenario, service: &ServiceId, region: &RegionId) -> Vec<Arrival> {
    let peak = scenario.peak_rate(service, region);
    let mut kept = Vec::new();
    if peak <= 0.0 {
        return kept;
    }
    let mut chance = Chance::named(scenario.seed, &["arrivals", service.as_str(), region.as_str()]);
    let mut second = 0.0;
    loop {
        second -= chance.fraction().ln() / peak;
        if second >= f64::from(scenario.length_s) {
            return kept;
        }
        if chance.fraction() * peak <= scenario.rate(service, region, second) {
            kept.push(Arrival {
                at: Time((second * 1e6) as u64),
                service: service.clone(),
                region: region.clone(),
                number: kept.len() as u64,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flash_crowd() -> Scenario {
        Scenario::parse("flash-crowd.toml", include_str!("../../library/flash-crowd.toml")).unwrap()
    }

    fn count(all: &[Arrival], region: &str, seconds: std::ops::Range<u64>) -> usize {
        all.iter()
            .filter(|a| {
                a.service.as_str() == "maps" && a.region.as_str() == region && seconds.contains(&(a.at.0 / 1_000_000))
            })
            .count()
    }

    #[test]
    fn a_crowd_asks_at_its_rate_and_only_then() {
        let all = arrivals(&flash_crowd());
        let crowd = count(&all, "seoul", 27..95);
        assert!((220..360).contains(&crowd), "68 s at 4.2 a second should be about 286, are {crowd}");
        assert!(count(&all, "seoul", 95..150) < 30);
        assert!(all.is_sorted());
    }

    #[test]
    fn a_changed_line_leaves_the_others_alone() {
        let before = arrivals(&flash_crowd());
        let mut changed = flash_crowd();
        changed.crowds[0].requests_per_s = 9.0;
        let after = arrivals(&changed);
        let others = |all: &[Arrival]| all.iter().filter(|a| a.region.as_str() != "seoul").cloned().collect::<Vec<_>>();
        assert_eq!(others(&before), others(&after));
        assert_ne!(before, after);
    }

    #[test]
    fn another_seed_asks_at_other_times() {
        let mut other = flash_crowd();
        other.seed += 1;
        assert_ne!(arrivals(&flash_crowd()), arrivals(&other));
    }
}
