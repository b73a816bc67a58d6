//! `docs/benchmarks.md`: results in, Markdown out, nothing else.
//!
//! ```text
//! reports ─▶ how many goals are met ─▶ per bench: machine, commands, conditions, goals, tables, what is missing
//! ```

mod tables;

use crate::report::{Goal, Report};
use crate::{NAMES, results};
use std::fmt::Write;

/// What each bench asks, in the order of [`NAMES`].
const QUESTIONS: [(&str, &str); 6] = [
    ("relocate", "How soon does a suspended VM answer at a network that has nothing of it?"),
    ("resume", "How soon does one answer on the machine that has it?"),
    ("density", "How many clones of one guest does a machine hold?"),
    ("wire", "How many bytes cross for a service a network has not, has a relative of, or had before?"),
    ("fanout", "How long does one image take to many networks, and what does its origin send?"),
    (
        "singleton",
        "Is anything lost when a guest that is written to moves again and again under its users' connections?",
    ),
];

/// The page, from what benches found. The same reports give the same page.
pub fn markdown(reports: &[Report]) -> String {
    let mut page = String::from(
        "# Benchmarks\n\nWritten by `vmatrix bench --write` from measured rows; do not edit. Times are milliseconds, \
         medians, with the fastest and the slowest run in brackets. Everything that is compared was run on the same \
         machine over the same links, one after the other, each mechanism once before any runs again.\n\n",
    );
    let summary = reports.iter().map(|r| {
        let count = |met| r.goals.iter().filter(|g| g.met == met).count().to_string();
        vec![format!("[{0}](#{0})", r.bench), count(Some(true)), count(Some(false)), count(None)]
    });
    table(&mut page, &["bench", "goals met", "not met", "not measured"], summary);
    let absent: Vec<&str> = NAMES.into_iter().filter(|name| reports.iter().all(|r| r.bench != *name)).collect();
    if !absent.is_empty() {
        // Writing to a String does not fail.
        let _ = writeln!(page, "\nNot run at all: {}.", absent.join(", "));
    }
    for report in reports {
        section(&mut page, report);
    }
    page
}

fn section(page: &mut String, report: &Report) {
    let m = &report.machine;
    let _ = writeln!(page, "\n## {}\n", report.bench);
    if let Some((_, question)) = QUESTIONS.iter().find(|(name, _)| *name == report.bench) {
        let _ = writeln!(page, "{question}\n");
    }
    let _ = writeln!(
        page,
        "Measured on {} processors, {} MiB, Linux {}, QEMU {} ({}); load average {:.1} to {:.1}.{}",
        m.cpus,
        m.memory_mib,
        m.kernel,
        m.qemu,
        m.accelerator,
        m.load[0],
        m.load[1],
        if report.quick {
            " **The short form: it shows that the bench runs, and no figure worth quoting.**"
        } else {
            ""
        }
    );
    if !report.commands.is_empty() {
        let _ = writeln!(page, "\n```\n{}\n```", report.commands.join("\n"));
    }
    page.push('\n');
    for line in &report.conditions {
        let _ = writeln!(page, "* {line}");
    }
    if !report.goals.is_empty() {
        page.push_str("\n### Goals\n\n");
        table(page, &["goal", "wanted", "measured", ""], report.goals.iter().map(goal));
    }
    page.push_str("\n### Measured\n");
    tables::of(page, report);
    let missing = missing(report);
    if !missing.is_empty() && !report.quick {
        let _ = write!(page, "\n### Not measured\n\n{}", missing.concat());
    }
}

/// Planned rows that are not there, those that differ in their mechanism only in one line.
fn missing(report: &Report) -> Vec<String> {
    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    let plan = results::plan(&report.bench);
    for key in plan.into_iter().filter(|key| report.rows.iter().all(|row| row.key() != *key)) {
        let about = key.about();
        match groups.iter_mut().find(|(group, _)| *group == about) {
            Some((_, mechanisms)) => mechanisms.push(key.mechanism),
            None => groups.push((about, vec![key.mechanism])),
        }
    }
    groups.into_iter().map(|(about, mechanisms)| format!("* {about}: {}\n", mechanisms.join(", "))).collect()
}

fn goal(goal: &Goal) -> Vec<String> {
    let verdict = match goal.met {
        Some(true) => "met",
        Some(false) => "**not met**",
        None => "not measured",
    };
    vec![goal.what.clone(), goal.wanted.clone(), goal.seen.clone().unwrap_or_default(), verdict.to_owned()]
}

/// A table; cells may hold anything but a `|`.
fn table(page: &mut String, heads: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let _ = writeln!(page, "| {} |\n|{}", heads.join(" | "), "---|".repeat(heads.len()));
    for row in rows {
        let _ = writeln!(page, "| {} |", row.join(" | ").replace('\n', " "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limit::Limit;
    use crate::report::{Machine, Row, Sample};
    use std::path::Path;

    fn report(bench: &str, rows: Vec<Row>) -> Report {
        Report {
            bench: bench.to_owned(),
            quick: false,
            machine: Machine {
                kernel: "6.18".into(),
                qemu: "10.0.2".into(),
                accelerator: "tcg".into(),
                cpus: 2,
                memory_mib: 24_000,
                load: [0.5, 2.0],
            },
            conditions: vec!["real TCP".into()],
            commands: vec![format!("vmatrix bench {bench} --json --runs 3")],
            goals: results::goals(bench, &rows),
            rows,
        }
    }

    fn relocated(mechanism: &str, runs: [f64; 3]) -> Row {
        let limit =
            Limit { r_ms: 20.1, d_bytes: 135_000, w_bytes: 1_600_000, b_mbit: 100, t_load_ms: 5.0, t_guest_ms: 180.0 };
        let sample = |first| Sample {
            first_byte_ms: first,
            second_ms: Some(12.0),
            warm_ms: Some(10.0),
            load_ms: Some(5.2),
            bytes_on_wire: Some(1_900_000),
            ..Sample::default()
        };
        let mut row = Row::of("tiny", 512, mechanism, &runs.map(sample));
        row.link_mbit = Some(100);
        row.rtt_ms = Some(20.0);
        row.limit_ms = Some(limit.ms().round());
        row.add("limit_terms", serde_json::to_value(limit).unwrap());
        row.add("bare_limit_ms", 300.0);
        row.add("working_set_pages", 1031);
        row.add("working_set_bytes", 1_600_000);
        row
    }

    fn reports() -> Vec<Report> {
        let mut relocate =
            vec![relocated("vmatrix", [430.0, 400.0, 900.0]), relocated("stop_and_copy", [24e3, 24.1e3, 23.9e3])];
        crate::relocate::ratios(&mut relocate);
        let resume = ["vmatrix", "mapped_ram", "cold_boot"].map(|mechanism| {
            let first = if mechanism == "vmatrix" { 180.0 } else { 300.0 };
            let load = (mechanism != "cold_boot").then_some(6.5);
            Row::of("tiny", 512, mechanism, &[Sample { first_byte_ms: first, load_ms: load, ..Sample::default() }])
        });
        let mut dense = Row::of("tiny", 2048, "vmatrix", &[]);
        for (name, value) in [("clones", 100.0), ("private_mib_median", 41.5), ("clones_in_23_gib", 536.0)] {
            dense.add(name, value);
        }
        let wire = [("vmatrix", "first_service", 37e6), ("vmatrix", "after_1000", 9e5), ("casync", "after_1000", 5e6)];
        let wire = wire.map(|(mechanism, case, bytes)| {
            let mut row = Row { guest: "tiny".into(), ram_mib: 512, mechanism: mechanism.into(), ..Row::default() };
            (row.link_mbit, row.rtt_ms, row.runs) = (Some(1000), Some(5.0), 1);
            row.bytes_on_wire = Some(bytes as u64);
            row.add("case", case);
            if mechanism == "vmatrix" {
                row.add("new_memory_bytes", bytes / 2.0);
            }
            row
        });
        let fanout = [(1, 40e3, 1.03), (12, 60e3, 1.3)].map(|(networks, makespan, copies)| {
            let sample =
                Sample { whole_ms: makespan, more: vec![("origin_copies_median", copies)], ..Sample::default() };
            let mut row = Row::of("tiny", 128, "vmatrix", &[sample]);
            (row.link_mbit, row.rtt_ms) = (Some(8), Some(40.0));
            row.add("networks", networks);
            row
        });
        let moved = Sample { first_byte_ms: 480.0, whole_ms: 700.0, ..Sample::default() };
        let mut singleton = Row::of("ledger", 128, "vmatrix", &vec![moved; 200]);
        (singleton.link_mbit, singleton.rtt_ms) = (Some(100), Some(20.0));
        for (name, value) in [("lines_wrong", 0), ("writers_most", 1), ("book_bytes_wrong", 0), ("lines_counted", 9000)]
        {
            singleton.add(name, value);
        }
        vec![
            report("relocate", relocate),
            report("resume", resume.to_vec()),
            report("density", vec![dense]),
            report("wire", wire.to_vec()),
            report("fanout", fanout.to_vec()),
            report("singleton", vec![singleton]),
        ]
    }

    #[test]
    fn the_page_is_the_golden_one() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/benchmarks.md");
        let page = markdown(&reports());
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&file, &page).unwrap();
        }
        let golden = std::fs::read_to_string(&file).unwrap();
        assert!(page == golden, "the page is another one; look at it after UPDATE=1:\n{page}");
    }

    #[test]
    fn a_page_says_what_was_not_met_not_measured_and_not_run() {
        let all = reports();
        let page = markdown(all.get(..1).unwrap());
        for part in [
            "Not run at all: resume, density, wire, fanout, singleton.",
            "| tiny 512 MiB at 100/20: second request over a warm one | <= 1.2 | 1.20 | met |",
            "| tiny 8192 MiB at 25/80: first byte over its limit | <= 1.3 |  | not measured |",
            "* agenda 384 MiB, 25/80: vmatrix, vmatrix_local, demand_only, local_files, ",
            "* tiny 512 MiB, 100/20: vmatrix_local, ",
            "load average 0.5 to 2.0",
            "430 [400..900]",
        ] {
            assert!(page.contains(part), "{part} is missing in:\n{page}");
        }
    }

    #[test]
    fn the_short_form_is_named_as_such() {
        let mut all = reports();
        all.truncate(1);
        if let Some(report) = all.first_mut() {
            report.quick = true;
        }
        assert!(markdown(&all).contains("no figure worth quoting"));
    }
}
