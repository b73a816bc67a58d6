//! Speed of a replay, and that it is the same each time.

use crate::{at_least, at_most, quality};
use anyhow::Context;
use serde_json::{Value, json};
use std::path::Path;

/// Sites of the goal.
const SITES: usize = 244;

/// Measures: a trace of 88 days, minute by minute, over 244 places of a recorded matrix, played twice.
///
/// # Errors
/// The recorded data is not there or cannot be read.
pub fn measure(data: Option<&Path>, quick: bool) -> anyhow::Result<Value> {
    let data = data.context("the recorded traces and matrices are not there; name their folder in VMATRIX_DATA")?;
    let trace = quality::recorded(data, quick)?;
    let places = quality::planetlab(data)?.first(SITES);
    let world = quality::world(&trace, &places, 1, quality::WEIGHTS[1])?;
    let runs: Vec<(f64, f64, u64)> = (0..2)
        .map(|_| {
            let (began, cpu) = (std::time::Instant::now(), crate::cpu());
            let digest = quality::replay(&trace, &world);
            (began.elapsed().as_secs_f64(), (crate::cpu() - cpu).as_secs_f64(), digest)
        })
        .collect();
    let days = trace.counts.len() as f64 / 1440.0;
    let seconds = crate::median(&runs.iter().map(|r| r.1).collect::<Vec<_>>());
    let same = runs.iter().all(|r| r.2 == runs[0].2);
    Ok(json!({
        "trace": trace.name, "minutes": trace.counts.len(), "sites": SITES,
        "cpu_s": seconds, "wall_s": crate::median(&runs.iter().map(|r| r.0).collect::<Vec<_>>()),
        "digest": format!("{:016x}", runs[0].2), "same": same,
        "goals": [
            at_most("CPU seconds for 88 days, of as many as were played", 10.0, seconds * 88.0 / days),
            at_least("runs that are the same, bit by bit", 2.0, if same { 2.0 } else { 1.0 }),
        ],
    }))
}
