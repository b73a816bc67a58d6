//! `bench placement`: where and when, measured against what can be proven. Needs no VM and no privileges.
//!
//! ```text
//! traces, matrices (VMATRIX_DATA) ─▶ quality: online cost / certified bound   ─┐
//! worlds of a seed                ─▶ scale, burst, pools, fair, packing, speed ─┴▶ one JSON value
//! ```
//! Every figure that is a time is CPU time of this thread, so that others on the machine do not count.

pub mod burst;
pub mod fair;
pub mod packing;
pub mod page;
pub mod pools;
pub mod quality;
pub mod scale;
pub mod speed;

use anyhow::Context;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::Duration;

/// CPU time that this thread has had.
pub fn cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// The parts, in the order of the result.
pub const PARTS: [&str; 7] = ["quality", "scale", "burst", "pools", "fair", "packing", "replay"];

/// What is to be measured.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Whether it works, not how well.
    pub quick: bool,
    /// Parts by name, all if empty; `quality/MATRIX` is that part over one matrix.
    pub parts: &'a [String],
    /// Seeds of each world of the quality part, instead of its own number.
    pub seeds: Option<u64>,
}

/// Measures all parts, or those that are named.
///
/// # Errors
/// There is no part of that name, or what a part says.
pub fn measure(data: Option<&Path>, options: Options) -> anyhow::Result<Value> {
    let Options { quick, parts, seeds } = options;
    let named: Vec<(&str, Option<&str>)> =
        parts.iter().map(|p| p.split_once('/').map_or((p.as_str(), None), |(part, of)| (part, Some(of)))).collect();
    for (part, of) in &named {
        if !PARTS.contains(part) || of.is_some() && *part != PARTS[0] {
            let (all, given) = (PARTS.join(", "), of.map_or((*part).to_owned(), |of| format!("{part}/{of}")));
            anyhow::bail!("there is no part {given:?} of this bench; there are {all}, and quality/MATRIX");
        }
    }
    let mut found = Map::new();
    found.insert("bench".to_owned(), "placement".into());
    found.insert("quick".to_owned(), quick.into());
    found.insert("policy".to_owned(), "mpc".into());
    for part in PARTS.iter().filter(|part| parts.is_empty() || named.iter().any(|(p, _)| p == *part)) {
        let measure = match *part {
            "quality" => {
                let only: Vec<&str> = named.iter().filter(|(p, _)| p == part).filter_map(|(_, of)| *of).collect();
                let value = quality::measure(data, quick, &only, seeds).context("part quality")?;
                // Its rows are the bench's.
                found.extend(value.as_object().cloned().unwrap_or_default());
                continue;
            }
            "scale" => scale::measure,
            "burst" => burst::measure,
            "pools" => pools::measure,
            "fair" => fair::measure,
            "packing" => packing::measure,
            _ => speed::measure,
        };
        let value = measure(data, quick).with_context(|| format!("part {part}"))?;
        found.insert((*part).to_owned(), value);
    }
    Ok(Value::Object(found))
}

/// Adds what was found to what was found before: parts take the place of parts, worlds of the quality part that of the
/// same worlds.
///
/// # Errors
/// `before` is no result of this bench, or one is quick and the other is not.
pub fn merged(before: Value, found: Value) -> anyhow::Result<Value> {
    let (Value::Object(mut all), Value::Object(new)) = (before, found) else {
        anyhow::bail!("what was found before is no result of this bench");
    };
    if all.get("bench") != new.get("bench") || all.get("quick") != new.get("quick") {
        anyhow::bail!("what was found before is of another bench, or one of both is quick: name another file");
    }
    let worlds = match (all.contains_key("rows"), new.contains_key("rows")) {
        (true, true) => Some(quality::merged(&Value::Object(all.clone()), &Value::Object(new.clone()))),
        _ => None,
    };
    all.extend(new);
    all.extend(worlds.as_ref().and_then(Value::as_object).cloned().unwrap_or_default());
    Ok(Value::Object(all))
}

/// The goals of all parts, as `(part, goal)`.
pub fn goals(found: &Value) -> Vec<(String, Value)> {
    let of = |part: &str, value: &Value| -> Vec<(String, Value)> {
        let goals = value.get("goals").and_then(Value::as_array);
        goals.into_iter().flatten().map(|goal| (part.to_owned(), goal.clone())).collect()
    };
    let parts = found.as_object().into_iter().flatten();
    let mut all = of("quality", found);
    all.extend(parts.flat_map(|(part, value)| of(part, value)));
    all
}

/// A goal from above, against what was seen.
pub fn at_most(what: &str, most: f64, seen: f64) -> Value {
    json!({ "what": what, "wanted": format!("<= {most}"), "seen": seen, "met": seen <= most })
}

/// A goal from below, against what was seen.
pub fn at_least(what: &str, least: f64, seen: f64) -> Value {
    json!({ "what": what, "wanted": format!(">= {least}"), "seen": seen, "met": seen >= least })
}

/// The middle one; NaN if there is none, which meets no goal.
pub fn median(of: &[f64]) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The largest one; NaN if there is none.
pub fn worst(of: &[f64]) -> f64 {
    of.iter().copied().max_by(f64::total_cmp).unwrap_or(f64::NAN)
}
