//! How soon a crowd ten times as large as usual is served within the objective, in the replay of a scenario.
//!
//! ```text
//! flash-crowd.toml, its crowd ten times the usual ─▶ replay, seed by seed ─▶ seconds from onset until a monitor that
//! looks back ten seconds says that p95 is within the objective; image bytes that the answer had to wait for
//! ```

use crate::{at_most, median, worst};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use vmatrix_model::plan::{Cause, Decision};
use vmatrix_replay::report::summarise;
use vmatrix_replay::scenario::Scenario;

const TIMES: f64 = 10.0;
/// Usual requests a second of the crowd's region.
const USUAL: [f64; 3] = [0.2, 0.4, 0.8];
const SECONDS_MAX: f64 = 15.0;

/// Measures, and adds its goals.
pub fn measure(quick: bool, goals: &mut Vec<Value>) -> Result<Value> {
    let text = include_str!("../../../../scenarios/library/flash-crowd.toml");
    let scenario = Scenario::parse("flash-crowd.toml", text)?;
    let seeds = if quick { 1..=1 } else { 1..=10 };
    let (mut rows, mut seconds, mut bytes) = (vec![], vec![], 0);
    for usual in USUAL {
        let (mut took, mut decided) = (vec![], vec![]);
        for seed in seeds.clone() {
            let scenario = crowd(Scenario { seed, ..scenario.clone() }, usual)?;
            let recording = vmatrix_replay::replay(&scenario, Some(seed));
            let met = summarise(&scenario, &recording).crowd.context("the scenario has no crowd")?;
            // One that is never met meets no goal.
            took.push(met.onset_to_objective_s.unwrap_or(f64::INFINITY));
            decided.push(met.onset_to_decision_s.unwrap_or(f64::INFINITY));
            bytes += recording.decisions.iter().filter(|d| is_burst(d)).map(waited_for).sum::<u64>();
        }
        rows.push(json!({
            "usual_per_s": usual, "times": TIMES, "seeds": took.len(),
            "decided_s_median": median(&decided), "absorbed_s_median": median(&took), "absorbed_s_worst": worst(&took),
        }));
        seconds.extend(took);
    }
    goals.push(at_most(
        "a crowd of ten times the usual: seconds to p95 within the objective, median",
        SECONDS_MAX,
        median(&seconds),
    ));
    goals.push(at_most("a crowd of ten times the usual: image bytes waited for", 0.0, bytes as f64));
    Ok(json!({
        "scenario": scenario.name, "window_s": 10, "rows": rows, "image_bytes_waited_for": bytes,
    }))
}

/// The scenario with a crowd that makes its region ask ten times its usual.
fn crowd(mut scenario: Scenario, usual: f64) -> Result<Scenario> {
    let crowd = scenario.crowds.first_mut().context("the scenario has no crowd")?;
    crowd.requests_per_s = usual * (TIMES - 1.0);
    let own = |d: &&mut vmatrix_replay::scenario::Demand| d.service == crowd.service && d.region == crowd.region;
    scenario.demand.iter_mut().find(own).context("the crowd's region has no usual")?.requests_per_s = usual;
    Ok(scenario)
}

fn is_burst(decision: &Decision) -> bool {
    matches!(decision.plan.cause, Cause::Burst { .. })
}

fn waited_for(decision: &Decision) -> u64 {
    decision.plan.moves.iter().map(|m| m.bytes.0).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_ten_times_the_usual_and_is_met_without_waiting_for_an_image() {
        let mut goals = vec![];
        let found = measure(true, &mut goals).unwrap();
        assert_eq!(found["image_bytes_waited_for"], 0);
        for row in found["rows"].as_array().unwrap() {
            assert!(row["decided_s_median"].as_f64().is_some_and(|s| s > 0.0 && s < 60.0), "{row}");
        }
        let text = include_str!("../../../../scenarios/library/flash-crowd.toml");
        let scenario = crowd(Scenario::parse("flash-crowd.toml", text).unwrap(), 0.4).unwrap();
        let region = &scenario.crowds[0].region;
        let usual = scenario.demand.iter().find(|d| d.region == *region && d.service == scenario.crowds[0].service);
        assert!((scenario.crowds[0].requests_per_s - 9.0 * usual.unwrap().requests_per_s).abs() < 1e-9);
    }
}
