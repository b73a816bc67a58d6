//! What a play cost, by the prices that placement is decided by.

use crate::recording::{InstancesAt, Recording};
use crate::scenario::Scenario;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmatrix_cpa_core::cost;
use vmatrix_model::plan::Cause;
use vmatrix_model::{MicroUsd, ServiceId, Span, Time};

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
    let fleet = &scenario.fleet;
    let counts = |service: &ServiceId| of.is_none_or(|of| of == service);
    let (mut latency, mut traffic) = (0_i128, 0_i128);
    for r in recording.requests.iter().filter(|r| counts(&r.service)) {
        let Some(service) = fleet.service(&r.service) else { continue };
        let took = if r.failed.is_some() { cost::OVERLOADED } else { r.took };
        latency += i128::from(service.latency_second_microusd.0) * i128::from(took.0);
        if let Some(network) = r.network.as_ref().and_then(|n| fleet.network(n)) {
            let bytes = cost::bytes_served(service, 1000, Span::secs(1));
            traffic += i128::from(network.egress_gb_microusd.0) * i128::from(bytes.0);
        }
    }
    let micro = |sum: i128, unit: i128| MicroUsd(i64::try_from(sum / unit).unwrap_or(i64::MAX));
    let images = recording.decisions.iter().filter(|d| d.plan.cause != Cause::Start).flat_map(|d| &d.plan.moves);
    let images = images.filter(|m| counts(&m.service)).map(|m| {
        let home = fleet.service(&m.service).and_then(|s| fleet.network(&s.home));
        home.map_or(MicroUsd(0), |home| cost::traffic_price(home, m.bytes))
    });
    Cost {
        latency: micro(latency, 1_000_000),
        traffic: micro(traffic, 1_000_000_000),
        instances: instances(scenario, recording, &counts),
        images: images.fold(MicroUsd(0), |sum, price| sum + price),
    }
}

fn instances(scenario: &Scenario, recording: &Recording, counts: &dyn Fn(&ServiceId) -> bool) -> MicroUsd {
    let mut seen: BTreeMap<&ServiceId, Vec<&InstancesAt>> = BTreeMap::new();
    recording.instances.iter().filter(|i| counts(&i.service)).for_each(|i| seen.entry(&i.service).or_default().push(i));
    let end = Time(u64::from(scenario.length_s) * 1_000_000);
    let mut sum = 0_i128;
    for changes in seen.values() {
        let ends = changes.iter().skip(1).map(|i| i.at).chain([end]);
        for (change, until) in changes.iter().zip(ends) {
            for (network, n) in &change.serving {
                let Some(network) = scenario.fleet.network(network) else { continue };
                // Hour by hour, for each has its tariff.
                let mut at = change.at;
                while at < until.min(end) {
                    let hour = Time((at.0 / 3_600_000_000 + 1) * 3_600_000_000).min(until).min(end);
                    sum += i128::from(cost::instance_price(network, at, *n).0) * i128::from(hour.since(at).0);
                    at = hour;
                }
            }
        }
    }
    MicroUsd(i64::try_from(sum / 3_600_000_000).unwrap_or(i64::MAX))
}
