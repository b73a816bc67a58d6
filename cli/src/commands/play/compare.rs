//! The same requests under several policies and seeds, between the bounds of what they must cost.

use crate::args::Replay;
use anyhow::Result;
use serde_json::json;
use std::process::ExitCode;
use vmatrix_model::MicroUsd;
use vmatrix_replay::policy::{self, Policy};
use vmatrix_replay::report;
use vmatrix_replay::scenario::Scenario;

/// One play.
struct Row {
    policy: Policy,
    seed: u64,
    report: report::Report,
    /// Of the services that the CPA places.
    placed: MicroUsd,
    /// Certified lower bound and clairvoyant upper one, summed over those services.
    bounds: Option<(MicroUsd, MicroUsd)>,
    broken: Vec<String>,
}

pub fn run(scenario: &Scenario, replay: &Replay) -> Result<ExitCode> {
    let policies = if replay.policy.is_empty() { vec![Policy::default()] } else { replay.policy.clone() };
    let first = replay.seed.unwrap_or(scenario.seed);
    let mut rows = vec![];
    for seed in (0..replay.seeds).map(|n| first.wrapping_add(n)) {
        let scenario = Scenario { seed, ..scenario.clone() };
        let found = replay.oracle.then(|| policy::bounds(&scenario));
        let sum = |part: fn(&vmatrix_cpa_core::ahead::Bounds) -> MicroUsd| {
            found.as_ref().map(|f| f.values().map(part).fold(MicroUsd(0), |sum, price| sum + price))
        };
        let bounds = sum(|b| b.lower).zip(sum(|b| b.upper));
        let automatic: Vec<_> = policy::placed(&scenario).map(|s| s.name.clone()).collect();
        for policy in &policies {
            let recording = vmatrix_replay::replay_under(*policy, &scenario);
            let report = report::summarise(&scenario, &recording);
            let placed = automatic.iter().map(|s| report::cost(&scenario, &recording, Some(s)).total());
            let placed = placed.fold(MicroUsd(0), |sum, price| sum + price);
            // What a scenario expects, it expects of our policy.
            let expected: &[_] = if *policy == Policy::Mpc { &scenario.expected } else { &[] };
            let broken = vmatrix_replay::expect::broken(expected, &report);
            let broken = broken.into_iter().map(|b| format!("seed {seed}: {b}")).collect();
            rows.push(Row { policy: *policy, seed, report, placed, bounds, broken });
        }
    }
    if replay.json {
        as_json(scenario, &rows)?
    } else {
        as_table(&rows)
    }
    Ok(super::told(&rows.into_iter().flat_map(|r| r.broken).collect::<Vec<_>>()))
}

fn ratio(row: &Row) -> Option<f64> {
    let (lower, _) = row.bounds?;
    (lower.0 > 0).then(|| row.placed.0 as f64 / lower.0 as f64)
}

fn as_json(scenario: &Scenario, rows: &[Row]) -> Result<()> {
    let row = |r: &Row| {
        json!({
            "policy": r.policy.name(), "seed": r.seed, "cost_microusd": r.report.cost, "placed_microusd": r.placed,
            "lower_microusd": r.bounds.map(|b| b.0), "upper_microusd": r.bounds.map(|b| b.1), "ratio": ratio(r),
            "relocations": r.report.relocations, "requests": r.report.requests,
            "failed_requests": r.report.failed_requests, "latency": r.report.latency, "broken": r.broken,
        })
    };
    let all = json!({"scenario": scenario.name, "rows": rows.iter().map(row).collect::<Vec<_>>()});
    println!("{}", serde_json::to_string(&all)?);
    Ok(())
}

fn as_table(rows: &[Row]) {
    println!(
        "{:<12} {:>6} {:>12} {:>12} {:>12} {:>6} {:>6} {:>7}",
        "policy", "seed", "cost", "lower bound", "clairvoyant", "ratio", "moves", "failed"
    );
    let shown = |price: Option<MicroUsd>| price.map_or("-".to_owned(), |p| p.to_string());
    for r in rows {
        println!(
            "{:<12} {:>6} {:>12} {:>12} {:>12} {:>6} {:>6} {:>7}",
            r.policy.name(),
            r.seed,
            r.placed.to_string(),
            shown(r.bounds.map(|b| b.0)),
            shown(r.bounds.map(|b| b.1)),
            ratio(r).map_or("-".to_owned(), |r| format!("{r:.3}")),
            r.report.relocations,
            r.report.failed_requests,
        );
    }
    println!("\ncost is of the services that the CPA places; the bounds leave out queues, DNS and resumes under way");
}
