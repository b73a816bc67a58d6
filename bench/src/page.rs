//! Reports as a page: what was measured on what, in tables.

use crate::report::{Report, Row};
use serde_json::Value;
use std::fmt::Write;

/// `docs/benchmarks.md` from what benches found.
pub fn markdown(reports: &[Report]) -> String {
    let mut page = String::from(
        "# Benchmarks\n\nWritten by `vmatrix bench --write` from what `vmatrix bench NAME --json` printed. Times in milliseconds, medians, with the smallest and the largest run in brackets.\n",
    );
    for report in reports {
        section(&mut page, report);
    }
    page
}

fn section(page: &mut String, report: &Report) {
    let m = &report.machine;
    // Writing to a String does not fail.
    let _ = write!(
        page,
        "\n## {}\n\n{} processors, {} MiB, Linux {}, QEMU {} ({}), load average {:.1} when it began and {:.1} when it ended{}.\n\n",
        report.bench,
        m.cpus,
        m.memory_mib,
        m.kernel,
        m.qemu,
        m.accelerator,
        m.load[0],
        m.load[1],
        if report.quick { "; the quick form: one run, no figure to quote" } else { "" }
    );
    for line in &report.conditions {
        let _ = writeln!(page, "* {line}");
    }
    page.push_str("\n| guest | RAM MiB | link Mbit/s, ms | mechanism | runs | first byte | second | load | bytes on wire | limit | further |\n|---|---|---|---|---|---|---|---|---|---|---|\n");
    for row in &report.rows {
        let _ = writeln!(page, "{}", line(row));
    }
    if !report.goals.is_empty() {
        page.push_str("\n| goal | wanted | seen | |\n|---|---|---|---|\n");
        for goal in &report.goals {
            let met = if goal.met { "met" } else { "**not met**" };
            let _ = writeln!(page, "| {} | {} | {} | {met} |", goal.what, goal.wanted, goal.seen);
        }
    }
}

fn line(row: &Row) -> String {
    let number = |value: Option<f64>| {
        value.map_or(String::new(), |v| if v < 100.0 { format!("{v:.1}") } else { format!("{v:.0}") })
    };
    let runs = row.runs_ms();
    let least = runs.iter().copied().fold(f64::INFINITY, f64::min);
    let most = runs.iter().copied().fold(0.0, f64::max);
    let noise = if runs.len() > 1 { format!(" [{least:.0}..{most:.0}]") } else { String::new() };
    let link = row.link_mbit.map_or(String::new(), |mbit| format!("{mbit}, {}", row.rtt_ms.unwrap_or(0.0)));
    let further: Vec<String> = row.more.iter().filter_map(|(name, value)| further(name, value)).collect();
    format!(
        "| {} | {} | {link} | {} | {} | {}{noise} | {} | {} | {} | {} | {} |",
        row.guest,
        row.ram_mib,
        row.mechanism,
        row.runs,
        number(row.first_byte_ms_median),
        number(row.second_ms_median),
        number(row.load_ms_median),
        row.bytes_on_wire.map_or(String::new(), |b| b.to_string()),
        number(row.limit_ms),
        further.join("; "),
    )
}

/// A further figure in words; lists and terms are in the JSON only.
fn further(name: &str, value: &Value) -> Option<String> {
    let name = name.replace('_', " ");
    match value {
        Value::Number(n) => Some(format!("{name} {n}")),
        Value::String(text) => Some(format!("{name} {text}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Goal, Machine, Sample};

    #[test]
    fn a_page_says_on_what_how_often_how_noisy_and_what_was_not_met() {
        let sample =
            |first| Sample { first_byte_ms: first, more: vec![("prepare_ms_median", 7.0)], ..Sample::default() };
        let machine = Machine {
            kernel: "6.18".into(),
            qemu: "10.0.2".into(),
            accelerator: "tcg".into(),
            cpus: 2,
            memory_mib: 24_000,
            load: [1.0, 2.0],
        };
        let goal = Goal { what: "x".into(), wanted: "<= 1".into(), seen: "2".into(), met: false };
        let report = Report {
            bench: "relocate".into(),
            quick: true,
            machine,
            conditions: vec!["real TCP".into()],
            rows: vec![Row::of("tiny", 512, "vmatrix", &[sample(300.0), sample(100.0), sample(200.0)])],
            goals: vec![goal],
        };
        let page = markdown(&[report]);
        for part in
            ["QEMU 10.0.2 (tcg)", "* real TCP", "| 3 | 200 [100..300] |", "prepare ms median 7", "**not met**", "quick"]
        {
            assert!(page.contains(part), "{part} is missing in:\n{page}");
        }
    }
}
