//! `docs/placement-benchmarks.md`: what was found, as Markdown, and nothing else.
//!
//! ```text
//! one JSON value ─▶ goals of all parts ─▶ per part: conditions, figures, tables (every list of flat objects is one)
//! ```

use crate::{PARTS, goals};
use serde_json::{Map, Value};
use std::fmt::Write;

/// Rows of a table that are shown; the JSON has all.
const ROWS_MAX: usize = 40;

/// The page. The same value gives the same page.
pub fn markdown(found: &Value) -> String {
    let mut page = String::from(
        "# Placement, measured\n\nWritten by `vmatrix bench placement --write` from what it found; do not edit. Times \
         are CPU time of one thread unless they are called wall time.\n\n## Goals\n\n| part | goal | wanted | measured | |\n|---|---|---|---|---|\n",
    );
    for (part, goal) in goals(found) {
        let met = if goal["met"] == true { "met" } else { "**not met**" };
        // Writing to a String does not fail.
        let _ = writeln!(
            page,
            "| {part} | {} | {} | {} | {met} |",
            word(&goal["what"]),
            word(&goal["wanted"]),
            word(&goal["seen"])
        );
    }
    if let Value::Object(all) = found {
        let quality: Map<String, Value> =
            all.iter().filter(|(key, _)| !PARTS.contains(&key.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect();
        section(&mut page, "quality", &quality);
        for part in PARTS {
            if let Some(Value::Object(value)) = all.get(part) {
                section(&mut page, part, value);
            }
        }
    }
    page
}

fn section(page: &mut String, name: &str, value: &Map<String, Value>) {
    let _ = writeln!(page, "\n## {name}\n");
    figures(page, value, "");
}

/// Figures first, then what has parts of its own.
fn figures(page: &mut String, value: &Map<String, Value>, above: &str) {
    let inner =
        |v: &Value| matches!(v, Value::Object(_)) || v.as_array().is_some_and(|a| a.iter().any(Value::is_object));
    for (key, value) in value.iter().filter(|(key, value)| !inner(value) && *key != "goals") {
        match value.as_array() {
            Some(words) if words.iter().all(Value::is_string) => {
                for w in words {
                    let _ = writeln!(page, "* {}", word(w));
                }
            }
            _ => {
                let _ = writeln!(page, "* {above}{key}: {}", word(value));
            }
        }
    }
    for (key, value) in value.iter().filter(|(key, value)| inner(value) && *key != "goals") {
        match value {
            Value::Object(value) => figures(page, value, &format!("{above}{key}, ")),
            Value::Array(rows) => table(page, &format!("{above}{key}"), rows),
            _ => {}
        }
    }
}

/// A table; lists within its rows are tables of their own behind it, each row with the words of the one it was in.
fn table(page: &mut String, name: &str, rows: &[Value]) {
    let Some(Value::Object(first)) = rows.first() else { return };
    let nested = |v: &Value| v.is_object() || v.as_array().is_some_and(|a| a.iter().any(Value::is_object));
    let keys: Vec<&String> = first.iter().filter(|(_, v)| !nested(v)).map(|(key, _)| key).collect();
    let head: String = keys.iter().map(|k| format!(" {k} |")).collect();
    let _ = writeln!(page, "\n{name}:\n\n|{head}\n|{}", "---|".repeat(keys.len()));
    for row in rows.iter().take(ROWS_MAX) {
        let cells: String = keys.iter().map(|key| format!(" {} |", word(&row[key.as_str()]))).collect();
        let _ = writeln!(page, "|{cells}");
    }
    if rows.len() > ROWS_MAX {
        let _ = writeln!(page, "\nand {} more, in the JSON.", rows.len() - ROWS_MAX);
    }
    for key in first.iter().filter(|(_, v)| v.is_array() && nested(v)).map(|(key, _)| key) {
        let inner = rows.iter().flat_map(|row| {
            let words = row.as_object().into_iter().flatten().filter(|(_, v)| v.is_string());
            let words: Map<String, Value> = words.map(|(k, v)| (k.clone(), v.clone())).collect();
            let of = row[key.as_str()].as_array().into_iter().flatten().filter_map(Value::as_object);
            of.map(move |own| Value::Object(words.clone().into_iter().chain(own.clone()).collect())).collect::<Vec<_>>()
        });
        table(page, &format!("{name}, {key}"), &inner.collect::<Vec<_>>());
    }
    page.push('\n');
}

fn word(value: &Value) -> String {
    match value {
        Value::String(s) => s.replace('|', "/"),
        Value::Number(n) if n.is_f64() => {
            let f = n.as_f64().unwrap_or(f64::NAN);
            // As many digits as are worth reading.
            if f != 0.0 && f.abs() < 0.001 {
                format!("{f:e}")
            } else if f.abs() < 10.0 {
                format!("{f:.4}")
            } else {
                format!("{f:.1}")
            }
        }
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_goal_of_every_part_is_on_the_page_and_lists_are_tables() {
        let goal = |what: &str, met: bool| json!({ "what": what, "wanted": "<= 1", "seen": 0.5, "met": met });
        let found = json!({
            "policy": "mpc", "goals": [goal("cheap", true)], "rows": [{ "seed": 1, "ratio": 1.0123456 }],
            "fair": {
                "goals": [goal("fair", false)], "draws": 2000,
                "rows": [{ "matrix": "planet", "peers": [{ "policy": "average", "gap": 50 }] }],
            },
        });
        let page = markdown(&found);
        assert!(page.contains("| quality | cheap | <= 1 | 0.5000 | met |"), "{page}");
        assert!(page.contains("| fair | fair | <= 1 | 0.5000 | **not met** |"), "{page}");
        assert!(page.contains("| ratio | seed |\n|---|---|\n| 1.0123 | 1 |"), "{page}");
        assert!(page.contains("* draws: 2000"), "{page}");
        assert!(page.contains("| gap | matrix | policy |\n|---|---|---|\n| 50 | planet | average |"), "{page}");
    }
}
