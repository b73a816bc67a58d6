//! Sums a recording up.
//!
//! ```text
//! (scenario, recording) ─▶ summarise ─▶ Report ─▶ JSON | table (Display) | html (one file)
//! ```
//!
//! The lab and the replay use the same functions, so that their figures mean the same:
//!
//! | figure | meaning |
//! |---|---|
//! | onset | when the scenario's first crowd begins |
//! | decision | the time of the first plan with the cause `burst` for the crowd's service, from the onset on |
//! | first byte | when the first request of the crowd's region was answered by a network that the decision added |
//! | serving | when the CPA saw the decision's newcomers serve |
//! | objective reached | the earliest time from the onset on after which, until the crowd's end, the last 10 s always have a 95th percentile within the objective; a failed request counts as slow |
//! | p95 before | of the crowd's region, for requests begun from the onset to the first byte |
//! | p95 after | of the crowd's region, for requests begun from the first byte and one TTL of the fleet's DNS later, when no old answer is believed any more, to the crowd's end |
//! | relocation | a network that began to serve a service by a decision other than the first placement |
//!
//! Percentiles are by nearest rank. Seconds are rounded to hundredths and milliseconds to whole
//! ones, so that the same recording gives the same bytes. What does not apply is `null`.

mod chart;
mod cost;
pub(crate) mod crowd;
mod html;
mod map;
mod over_time;
mod place;
mod table;

pub use cost::{Cost, cost};
pub use html::html;

use crate::recording::{Ports, Recording, Request};
use crate::scenario::Scenario;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::plan::{Action, Cause, Decision};
use vmatrix_model::{NetworkId, RegionId, ServiceId, Span, Time};

/// What a play showed, in figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub scenario: String,
    /// `tcg`, `kvm` or `replay`.
    pub accelerator: String,
    pub requests: u64,
    pub failed_requests: u64,
    /// Networks that began to serve a service by a decision other than the first placement.
    pub relocations: u64,
    /// Image bytes that crossed the WAN.
    pub bytes_moved: u64,
    pub returned_to_dormant: bool,
    /// What it cost, millionths of a dollar.
    pub cost: Cost,
    /// The first crowd, if the scenario has one.
    pub crowd: Option<CrowdReport>,
    pub two_tier: TwoTier,
    /// Undeclared ports that were knocked at; all 0 in a replay, which has none.
    pub ports: Ports,
    /// Moves in the order in which they were decided, without the first placement.
    pub moves: Vec<MoveReport>,
    /// Per service and client region.
    pub latency: Vec<LatencyReport>,
    /// Why, in sentences.
    pub explain: Vec<String>,
    /// What a reader must know besides.
    pub notes: Vec<String>,
}

/// How a crowd was met.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CrowdReport {
    pub service: ServiceId,
    pub region: RegionId,
    pub onset_to_decision_s: Option<f64>,
    /// Until the newcomer was seen serving.
    pub decision_to_serving_s: Option<f64>,
    /// Until a client had its answer; old DNS answers have to run out in between.
    pub decision_to_first_byte_s: Option<f64>,
    pub onset_to_objective_s: Option<f64>,
    /// From the onset to the first byte.
    pub p95_before_ms: Option<u64>,
    /// From one TTL after the first byte to the crowd's end.
    pub p95_after_ms: Option<u64>,
}

/// What became of data written through the tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TwoTier {
    pub writes: u64,
    pub lost_writes: u64,
    /// Reads that found a write through another network than it was written through; 0 in a replay.
    pub read_across: u64,
    /// Canary bytes that a capture of the whole WAN held.
    pub plaintext_bytes_on_wan: u64,
    /// Times that capture held the control, which was sent unencrypted on purpose.
    pub control_seen: u64,
}

/// One move of a decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveReport {
    /// When it was decided.
    pub at_s: f64,
    pub service: ServiceId,
    pub network: NetworkId,
    /// `stage`, `resume x1`, `suspend`, `suspend to x1` or `drop`.
    pub action: String,
    /// `burst`, `epoch`, `order` or `loss`.
    pub cause: String,
}

/// Response times that one region saw of one service over the whole play.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencyReport {
    pub service: ServiceId,
    pub region: RegionId,
    pub requests: u64,
    pub failed: u64,
    /// Of the requests that did not fail.
    pub p50_ms: Option<u64>,
    pub p95_ms: Option<u64>,
}

/// Sums up what happened.
pub fn summarise(scenario: &Scenario, recording: &Recording) -> Report {
    Report {
        scenario: scenario.name.clone(),
        accelerator: recording.accelerator.clone(),
        requests: recording.requests.len() as u64,
        failed_requests: recording.requests.iter().filter(|r| r.failed.is_some()).count() as u64,
        relocations: relocations(recording),
        bytes_moved: recording.bytes_moved.0,
        returned_to_dormant: recording.returned_to_dormant,
        cost: cost(scenario, recording, None),
        crowd: scenario.crowds.first().map(|c| crowd::meet(scenario, recording, c)),
        two_tier: TwoTier {
            writes: recording.writes,
            lost_writes: recording.lost_writes,
            read_across: recording.read_across,
            plaintext_bytes_on_wan: recording.plaintext_bytes_on_wan,
            control_seen: recording.control_seen,
        },
        ports: recording.ports,
        moves: moves(&recording.decisions),
        latency: latencies(&recording.requests),
        explain: recording.explain.clone(),
        notes: recording.notes.clone(),
    }
}

/// Counts each beginning once, even if two decisions in a row asked for it.
fn relocations(recording: &Recording) -> u64 {
    let mut begun: BTreeSet<(&ServiceId, &NetworkId, Time)> = BTreeSet::new();
    for decision in recording.decisions.iter().filter(|d| d.plan.cause != Cause::Start) {
        for m in decision.plan.moves.iter().filter(|m| matches!(m.action, Action::Resume(_))) {
            let serving = |serving: &BTreeMap<NetworkId, u32>| serving.get(&m.network).is_some_and(|n| *n > 0);
            let mut seen = recording.instances.iter().filter(|i| i.service == m.service);
            let before =
                seen.clone().take_while(|i| i.at <= decision.plan.at).last().is_some_and(|i| serving(&i.serving));
            if !before && let Some(first) = seen.find(|i| i.at > decision.plan.at && serving(&i.serving)) {
                begun.insert((&m.service, &m.network, first.at));
            }
        }
    }
    begun.len() as u64
}

fn moves(decisions: &[Decision]) -> Vec<MoveReport> {
    let moved = decisions.iter().filter(|d| d.plan.cause != Cause::Start);
    moved
        .flat_map(|d| {
            d.plan.moves.iter().map(|m| MoveReport {
                at_s: seconds(d.plan.at.since(Time(0))),
                service: m.service.clone(),
                network: m.network.clone(),
                action: action(m.action),
                cause: cause(&d.plan.cause).into(),
            })
        })
        .collect()
}

/// The word or two for an action.
pub(crate) fn action(action: Action) -> String {
    match action {
        Action::Stage => "stage".into(),
        Action::Resume(n) => format!("resume x{n}"),
        Action::Suspend(0) => "suspend".into(),
        Action::Suspend(n) => format!("suspend to x{n}"),
        Action::Drop => "drop".into(),
    }
}

/// The word for a cause.
pub fn cause(cause: &Cause) -> &'static str {
    match cause {
        Cause::Start => "start",
        Cause::Burst { .. } => "burst",
        Cause::Epoch => "epoch",
        Cause::Order => "order",
        Cause::Loss { .. } => "loss",
    }
}

/// A cause as a clause: what was seen.
pub(crate) fn cause_in_words(cause: &Cause) -> String {
    match cause {
        Cause::Start => "the first placement".into(),
        Cause::Burst { service, region, requests_per_100s, usual_per_100s } => {
            let rate = |per_100s: u64| format!("{}.{}", (per_100s + 5) / 100, (per_100s + 5) % 100 / 10);
            let (now, usual) = (rate(*requests_per_100s), rate(*usual_per_100s));
            format!("burst: {region} asks {now} times a second for {service}, usually {usual}")
        }
        Cause::Epoch => "epoch: the ordinary round".into(),
        Cause::Order => "order: an operator wants it so".into(),
        Cause::Loss { network } => format!("loss: something at {network} is gone"),
    }
}

fn latencies(requests: &[Request]) -> Vec<LatencyReport> {
    let mut by: BTreeMap<(&ServiceId, &RegionId), Vec<&Request>> = BTreeMap::new();
    for r in requests {
        by.entry((&r.service, &r.region)).or_default().push(r);
    }
    by.into_iter()
        .map(|((service, region), all)| {
            let mut good: Vec<Span> = all.iter().filter(|r| r.failed.is_none()).map(|r| r.took).collect();
            good.sort_unstable();
            LatencyReport {
                service: service.clone(),
                region: region.clone(),
                requests: all.len() as u64,
                failed: (all.len() - good.len()) as u64,
                p50_ms: percentile(&good, 50).map(ms),
                p95_ms: percentile(&good, 95).map(ms),
            }
        })
        .collect()
}

/// The value that `percent` of `sorted` do not exceed, by nearest rank.
pub(crate) fn percentile(sorted: &[Span], percent: usize) -> Option<Span> {
    sorted.get((sorted.len() * percent).div_ceil(100).max(1) - 1).copied()
}

/// Whole milliseconds, to the nearest.
pub(crate) fn ms(span: Span) -> u64 {
    (span.0 + 500) / 1000
}

/// Seconds, to the nearest hundredth.
pub(crate) fn seconds(span: Span) -> f64 {
    ((span.0 + 5_000) / 10_000) as f64 / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank_takes_a_value_that_occurred() {
        let spans: Vec<Span> = (1..=20).map(Span).collect();
        assert_eq!(percentile(&spans, 95), Some(Span(19)));
        assert_eq!(percentile(&spans, 50), Some(Span(10)));
        assert_eq!(percentile(&spans[..1], 95), Some(Span(1)));
        assert_eq!(percentile(&[], 95), None);
    }

    #[test]
    fn figures_are_rounded_to_the_nearest() {
        assert_eq!(ms(Span(1_499)), 1);
        assert_eq!(ms(Span(1_500)), 2);
        assert_eq!(seconds(Span(3_455_000)), 3.46);
    }
}
