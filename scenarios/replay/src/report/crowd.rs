//! How fast a crowd was noticed, served nearby, and served within the objective.

use super::{CrowdReport, ms, percentile, seconds};
use crate::recording::{Recording, Request};
use crate::scenario::{Crowd, Scenario};
use std::collections::BTreeSet;
use vmatrix_model::plan::{Action, Cause, Decision};
use vmatrix_model::{NetworkId, Span, Time};

/// The length over which a 95th percentile must be within the objective.
const WINDOW: Span = Span::secs(10);
/// How finely the time is found at which the objective was reached.
const STEP: Span = Span::ms(100);

/// The first decision that the crowd caused.
pub(crate) fn decision<'a>(recording: &'a Recording, crowd: &Crowd) -> Option<&'a Decision> {
    let onset = onset(crowd);
    recording.decisions.iter().find(|d| {
        d.plan.at >= onset && matches!(&d.plan.cause, Cause::Burst { service, .. } if *service == crowd.service)
    })
}

/// When the first answer from a network that the crowd's decision added had arrived, and where from.
pub(crate) fn first_byte<'a>(recording: &'a Recording, crowd: &Crowd) -> Option<(Time, &'a NetworkId)> {
    let decision = decision(recording, crowd)?;
    let resumed =
        decision.plan.moves.iter().filter(|m| m.service == crowd.service && matches!(m.action, Action::Resume(_)));
    let added: BTreeSet<&NetworkId> = resumed.map(|m| &m.network).collect();
    of_crowd(recording, crowd)
        .filter(|r| r.failed.is_none() && r.at + r.took >= decision.plan.at)
        .filter_map(|r| Some((r.at + r.took, r.network.as_ref().filter(|n| added.contains(n))?)))
        .min()
}

/// The earliest time from which on, until the crowd's end, the last [`WINDOW`] is always within the objective:
/// what a monitor that looks back so long would say.
pub(crate) fn objective(scenario: &Scenario, recording: &Recording, crowd: &Crowd) -> Option<Time> {
    let limit = Span::ms(u64::from(scenario.fleet.service(&crowd.service)?.objective_ms));
    let requests: Vec<(Time, bool)> =
        of_crowd(recording, crowd).map(|r| (r.at, r.failed.is_some() || r.took > limit)).collect();
    let (onset, end) = (onset(crowd), end(crowd));
    // A window that ends at each step. Both edges only move forward.
    let (mut reached, mut first, mut next, mut slow) = (Some(onset), 0, 0, 0_usize);
    let mut until = onset;
    loop {
        let from = until - WINDOW;
        while next < requests.len() && requests[next].0 < until {
            slow += usize::from(requests[next].1);
            next += 1;
        }
        while first < next && requests[first].0 < from {
            slow -= usize::from(requests[first].1);
            first += 1;
        }
        let all = next - first;
        if all - slow < (all * 95).div_ceil(100) {
            reached = None;
        } else if reached.is_none() {
            reached = Some(until);
        }
        until = until + STEP;
        if until > end {
            return reached;
        }
    }
}

pub(super) fn meet(scenario: &Scenario, recording: &Recording, crowd: &Crowd) -> CrowdReport {
    let (onset, end) = (onset(crowd), end(crowd));
    let decided = decision(recording, crowd).map(|d| d.plan.at);
    let first_byte = first_byte(recording, crowd).map(|(at, _)| at);
    let objective = objective(scenario, recording, crowd);
    // Until then some clients still believe an old DNS answer.
    let all_steered = first_byte.map(|t| t + Span::secs(u64::from(scenario.fleet.ttl_s)));
    let p95 = |from: Time, to: Time| {
        let begun = of_crowd(recording, crowd).filter(|r| r.failed.is_none() && (from..to).contains(&r.at));
        let mut took: Vec<Span> = begun.map(|r| r.took).collect();
        took.sort_unstable();
        percentile(&took, 95).map(ms)
    };
    CrowdReport {
        service: crowd.service.clone(),
        region: crowd.region.clone(),
        onset_to_decision_s: decided.map(|t| seconds(t.since(onset))),
        decision_to_serving_s: decision(recording, crowd).and_then(|d| Some(seconds(d.serving_at?.since(d.plan.at)))),
        decision_to_first_byte_s: decided.zip(first_byte).map(|(d, b)| seconds(b.since(d))),
        onset_to_objective_s: objective.map(|t| seconds(t.since(onset))),
        p95_before_ms: p95(onset, first_byte.unwrap_or(end)),
        p95_after_ms: all_steered.and_then(|t| p95(t, end)),
    }
}

fn of_crowd<'a>(recording: &'a Recording, crowd: &Crowd) -> impl Iterator<Item = &'a Request> {
    recording.requests.iter().filter(move |r| r.service == crowd.service && r.region == crowd.region)
}

pub(crate) fn onset(crowd: &Crowd) -> Time {
    Time(0) + Span::secs(u64::from(crowd.onset_s))
}

pub(crate) fn end(crowd: &Crowd) -> Time {
    Time(0) + Span::secs(u64::from(crowd.end_s))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario() -> Scenario {
        Scenario::parse("flash-crowd.toml", include_str!("../../../library/flash-crowd.toml")).unwrap()
    }

    /// Four requests a second from Seoul during the whole crowd, slow until `slow_until_s`.
    fn recording(slow_until_s: u64) -> Recording {
        let request = |n: u64| {
            let at = Time(25_000_000 + n * 250_000);
            let slow = at < Time(slow_until_s * 1_000_000);
            Request {
                at,
                service: "maps".parse().unwrap(),
                region: "seoul".parse().unwrap(),
                network: "ashburn".parse().ok(),
                took: Span::ms(if slow { 900 } else { 150 }),
                failed: None,
            }
        };
        Recording { requests: (0..280).map(request).collect(), ..Recording::default() }
    }

    #[test]
    fn the_objective_is_reached_when_no_later_window_breaks_it() {
        let s = scenario();
        // With two of the last forty still slow, the 38th of forty is within the objective.
        let reached = objective(&s, &recording(35), &s.crowds[0]).unwrap();
        assert_eq!(reached, Time(44_300_000));
        assert_eq!(objective(&s, &recording(0), &s.crowds[0]), Some(onset(&s.crowds[0])));
        assert_eq!(objective(&s, &recording(95), &s.crowds[0]), None);
    }

    #[test]
    fn a_failed_request_counts_as_slow() {
        let s = scenario();
        let mut r = recording(0);
        for request in r.requests.iter_mut().take(3) {
            request.failed = Some("connection refused".into());
        }
        assert!(objective(&s, &r, &s.crowds[0]) > Some(onset(&s.crowds[0])));
    }

    #[test]
    fn a_crowd_that_nobody_met_has_no_figures() {
        let s = scenario();
        let met = meet(&s, &recording(95), &s.crowds[0]);
        assert_eq!(
            (met.onset_to_decision_s, met.decision_to_first_byte_s, met.onset_to_objective_s),
            (None, None, None)
        );
        assert_eq!((met.p95_before_ms, met.p95_after_ms), (Some(900), None));
    }

    #[test]
    fn after_begins_once_every_old_dns_answer_has_run_out() {
        let s = scenario();
        let mut r = recording(37);
        let service = s.crowds[0].service.clone();
        let tokyo: NetworkId = "tokyo".parse().unwrap();
        let resume = vmatrix_model::plan::Move {
            service: service.clone(),
            network: tokyo.clone(),
            action: Action::Resume(1),
            bytes: vmatrix_model::Bytes(0),
            time: Span::ZERO,
            before: Default::default(),
            after: Default::default(),
            reason: String::new(),
        };
        let plan = vmatrix_model::plan::Plan {
            id: 1,
            at: Time(30_000_000),
            cause: Cause::Burst {
                service,
                region: s.crowds[0].region.clone(),
                requests_per_100s: 400,
                usual_per_100s: 0,
            },
            base: vmatrix_model::Generation(1),
            moves: vec![resume],
            not: Vec::new(),
            target: Default::default(),
        };
        r.decisions =
            vec![Decision { plan, generation: vmatrix_model::Generation(2), serving_at: None, done_at: None }];
        // The first to be sent to Tokyo begins at 35 s and has its answer at 35.9 s; with a TTL of 2 s, others
        // go on being slow until 37 s.
        r.requests.iter_mut().filter(|q| q.at == Time(35_000_000)).for_each(|q| q.network = Some(tokyo.clone()));
        assert_eq!(s.fleet.ttl_s, 2);
        let met = meet(&s, &r, &s.crowds[0]);
        assert_eq!(
            (met.decision_to_first_byte_s, met.p95_before_ms, met.p95_after_ms),
            (Some(5.9), Some(900), Some(150))
        );
        // Slow ones after that count, though the objective is reached: 20 of 228 are more than 5 %.
        r.requests.iter_mut().filter(|q| q.at >= Time(60_000_000)).take(20).for_each(|q| q.took = Span::ms(900));
        assert_eq!(meet(&s, &r, &s.crowds[0]).p95_after_ms, Some(900));
    }
}
