//! What a play cost, by the prices that placement is decided by: in all, and as it grew.
//!
//! ```text
//! requests ──▶ latency, traffic ┐
//! instances ─▶ instances        ├─▶ a sum per step of time ─▶ so_far: after each step ─▶ cost: after the last
//! moves ─────▶ images           ┘
//! ```
//!
//! Each part is summed in its finest unit and divided once, so that the last step is the total to the last digit.

use crate::recording::{InstancesAt, Recording};
use crate::scenario::Scenario;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmatrix_cpa_core::cost;
use vmatrix_model::plan::Cause;
use vmatrix_model::{MicroUsd, ServiceId, Span, Time};

/// An hour in microseconds.
const HOUR: u64 = 3_600_000_000;

/// Millionths of a dollar, over the whole play.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Time that clients waited, at what a second is worth to the service; a failed request counts as overload does.
    pub latency: MicroUsd,
    /// Instances that served, by the hour's tariff.
    pub instances: MicroUsd,
    /// Bytes to clients and back ends, at the answering network's egress.
    pub traffic: MicroUsd,
    /// Image bytes of moves, at the home's egress.
    pub images: MicroUsd,
}

impl Cost {
    pub fn total(self) -> MicroUsd {
        self.latency + self.instances + self.traffic + self.images
    }
}

/// What a play cost: of every service, or of one.
pub fn cost(scenario: &Scenario, recording: &Recording, of: Option<&ServiceId>) -> Cost {
    so_far(scenario, recording, of, 1).pop().unwrap_or_default()
}

/// What it had cost at the end of each of so many equal steps of time. A request costs when it begins, an image when
/// its move is decided; what is later than the play belongs to the last step.
pub(super) fn so_far(scenario: &Scenario, recording: &Recording, of: Option<&ServiceId>, steps: u64) -> Vec<Cost> {
    let steps = Steps { length: u64::from(scenario.length_s.max(1)) * 1_000_000, number: steps.max(1) };
    let counts = |service: &ServiceId| of.is_none_or(|of| of == service);
    let mut sums = vec![Sum::default(); steps.number as usize];
    requests(scenario, recording, &counts, &steps, &mut sums);
    instances(scenario, recording, &counts, &steps, &mut sums);
    images(scenario, recording, &counts, &steps, &mut sums);
    let mut all = Sum::default();
    let grown = sums.iter().map(|s| {
        all.latency += s.latency;
        all.instances += s.instances;
        all.traffic += s.traffic;
        all.images += s.images;
        all.rounded()
    });
    grown.collect()
}

/// A play cut into equal steps of time.
struct Steps {
    length: u64,
    number: u64,
}

impl Steps {
    fn of(&self, at: Time) -> usize {
        let step = u128::from(at.0) * u128::from(self.number) / u128::from(self.length);
        step.min(u128::from(self.number - 1)) as usize
    }

    /// The first moment that is no longer in the step.
    fn end(&self, step: usize) -> Time {
        let end = ((step as u128 + 1) * u128::from(self.length)).div_ceil(u128::from(self.number));
        Time(u64::try_from(end).unwrap_or(u64::MAX))
    }
}

/// The parts of a cost before they are divided.
#[derive(Clone, Copy, Default)]
struct Sum {
    /// Millionths of a dollar a second, times microseconds.
    latency: i128,
    /// Millionths of a dollar an hour, times microseconds.
    instances: i128,
    /// Millionths of a dollar a gigabyte, times bytes.
    traffic: i128,
    /// Millionths of a dollar.
    images: i128,
}

impl Sum {
    fn rounded(self) -> Cost {
        let micro = |sum: i128, unit: i128| MicroUsd(i64::try_from(sum / unit).unwrap_or(i64::MAX));
        Cost {
            latency: micro(self.latency, 1_000_000),
            instances: micro(self.instances, i128::from(HOUR)),
            traffic: micro(self.traffic, 1_000_000_000),
            images: micro(self.images, 1),
        }
    }
}

type Counts<'a> = &'a dyn Fn(&ServiceId) -> bool;

fn requests(scenario: &Scenario, recording: &Recording, counts: Counts<'_>, steps: &Steps, sums: &mut [Sum]) {
    let fleet = &scenario.fleet;
    for r in recording.requests.iter().filter(|r| counts(&r.service)) {
        let Some(service) = fleet.service(&r.service) else { continue };
        let sum = &mut sums[steps.of(r.at)];
        let took = if r.failed.is_some() { cost::OVERLOADED } else { r.took };
        sum.latency += i128::from(service.latency_second_microusd.0) * i128::from(took.0);
        if let Some(network) = r.network.as_ref().and_then(|n| fleet.network(n)) {
            let bytes = cost::bytes_served(service, 1000, Span::secs(1));
            sum.traffic += i128::from(network.egress_gb_microusd.0) * i128::from(bytes.0);
        }
    }
}

fn images(scenario: &Scenario, recording: &Recording, counts: Counts<'_>, steps: &Steps, sums: &mut [Sum]) {
    for d in recording.decisions.iter().filter(|d| d.plan.cause != Cause::Start) {
        for m in d.plan.moves.iter().filter(|m| counts(&m.service)) {
            let home = scenario.fleet.service(&m.service).and_then(|s| scenario.fleet.network(&s.home));
            let price = home.map_or(MicroUsd(0), |home| cost::traffic_price(home, m.bytes));
            sums[steps.of(d.plan.at)].images += i128::from(price.0);
        }
    }
}

fn instances(scenario: &Scenario, recording: &Recording, counts: Counts<'_>, steps: &Steps, sums: &mut [Sum]) {
    let mut seen: BTreeMap<&ServiceId, Vec<&InstancesAt>> = BTreeMap::new();
    recording.instances.iter().filter(|i| counts(&i.service)).for_each(|i| seen.entry(&i.service).or_default().push(i));
    let end = Time(steps.length);
    for changes in seen.values() {
        let ends = changes.iter().skip(1).map(|i| i.at).chain([end]);
        for (change, until) in changes.iter().zip(ends) {
            let until = until.min(end);
            for (network, n) in &change.serving {
                let Some(network) = scenario.fleet.network(network) else { continue };
                // Hour by hour, for each has its tariff, and step by step.
                let mut at = change.at;
                while at < until {
                    let (hour, step) = (Time((at.0 / HOUR + 1) * HOUR), steps.of(at));
                    let next = hour.min(steps.end(step)).min(until);
                    let price = cost::instance_price(network, at, *n);
                    sums[step].instances += i128::from(price.0) * i128::from(next.since(at).0);
                    at = next;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::Request;
    use vmatrix_model::fleet::Network;

    fn scenario() -> Scenario {
        Scenario::parse("flash-crowd.toml", include_str!("../../../library/flash-crowd.toml")).unwrap()
    }

    #[test]
    fn cost_over_time_adds_up_to_the_total_that_the_report_states() {
        let s = scenario();
        let recording = crate::replay(&s, None);
        let stated = crate::report::summarise(&s, &recording).cost;
        assert!(stated.latency > MicroUsd(0) && stated.instances > MicroUsd(0) && stated.traffic > MicroUsd(0));
        for steps in [1, 7, 60, 999] {
            let grown = so_far(&s, &recording, None, steps);
            assert_eq!(grown.len(), steps as usize);
            assert_eq!(grown.last(), Some(&stated), "in {steps} steps");
            assert!(grown.windows(2).all(|w| w[0].total() <= w[1].total()), "it became less");
        }
    }

    #[test]
    fn instances_cost_by_the_tariff_of_their_hour_in_every_step() {
        let mut s = scenario();
        s.length_s = 4 * 3600;
        let price = |n: &Network| n.instance_hour_microusd.0;
        s.fleet.networks[0].tariff_percent = [vec![100, 300], vec![100; 22]].concat();
        let (service, network) = (s.fleet.services[0].name.clone(), s.fleet.networks[0].clone());
        let serving = BTreeMap::from([(network.name.clone(), 2)]);
        let from_half_past = InstancesAt { at: Time(HOUR / 2), service, serving };
        let recording = Recording { instances: vec![from_half_past], ..Recording::default() };
        let by_hour: Vec<i64> = so_far(&s, &recording, None, 4).iter().map(|c| c.instances.0).collect();
        assert_eq!(by_hour, [1, 7, 9, 11].map(|hours| hours * price(&network)));
        // A step of 80 minutes ends within the dear hour.
        let by_third: Vec<i64> = so_far(&s, &recording, None, 3).iter().map(|c| c.instances.0).collect();
        assert_eq!((by_third[0], by_third[2]), (3 * price(&network), 11 * price(&network)));
    }

    #[test]
    fn a_request_costs_when_it_begins_and_a_late_one_at_the_end() {
        let s = scenario();
        let request = |at_s: u64| Request {
            at: Time(at_s * 1_000_000),
            service: s.fleet.services[0].name.clone(),
            region: s.fleet.regions[0].name.clone(),
            network: None,
            took: Span::secs(1),
            failed: None,
        };
        let recording = Recording { requests: [0, 59, 60, 500].map(request).to_vec(), ..Recording::default() };
        let second = s.fleet.services[0].latency_second_microusd.0;
        let by_half: Vec<i64> = so_far(&s, &recording, None, 2).iter().map(|c| c.latency.0).collect();
        assert_eq!(by_half, [2 * second, 4 * second]);
    }
}
