//! Results in files: what several invocations measured becomes one report.
//!
//! ```text
//! file (rows so far) + report (rows of now) ─merge─▶ rows by key, goals anew ─▶ file
//! ```
//! So what takes hours of waiting for a slow link can be run apart from what takes minutes of processor time.

use crate::report::{Goal, Key, Report, Row};
use crate::{density, fanout, relocate, resume, singleton, wire};
use anyhow::{Context, bail};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// Largest result file: some hundred rows of some KiB.
const FILE_MAX: u64 = 16 << 20;
/// Most command lines that are kept.
const COMMANDS_MAX: usize = 64;

/// Adds a report to those that a file holds, one per bench, and returns what the file holds of this bench now. Rows
/// replace those of the same guest, memory, link, mechanism and case.
///
/// # Errors
/// The file cannot be read, understood or written, or was measured on another machine.
pub fn into(file: &Path, report: Report) -> anyhow::Result<Report> {
    let mut all = if file.exists() { read(file)? } else { Vec::new() };
    let merged = match all.iter().position(|r| r.bench == report.bench) {
        Some(at) => merge(all.remove(at), report).with_context(|| format!("cannot add to {}", file.display()))?,
        None => report,
    };
    all.push(merged.clone());
    all.sort_by_key(|r| crate::NAMES.iter().position(|n| *n == r.bench));
    // Beside, then in its place: whoever is killed here leaves the old one whole.
    let beside = file.with_extension("new");
    let text = serde_json::to_vec_pretty(&all)?;
    fs::write(&beside, text).with_context(|| format!("cannot write {}", beside.display()))?;
    fs::rename(&beside, file).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(merged)
}

/// Reads a result file: a list of reports, or one, as `--json` prints it.
///
/// # Errors
/// The file cannot be read, is larger than any result, or is no report.
pub fn read(file: &Path) -> anyhow::Result<Vec<Report>> {
    let about = || format!("cannot read the results in {}", file.display());
    if fs::metadata(file).with_context(about)?.len() > FILE_MAX {
        bail!("{} is larger than results are ({FILE_MAX} bytes)", file.display());
    }
    let value: Value = serde_json::from_slice(&fs::read(file).with_context(about)?).with_context(about)?;
    match value {
        Value::Array(_) => serde_json::from_value(value).with_context(about),
        one => Ok(vec![serde_json::from_value(one).with_context(about)?]),
    }
}

/// The reports of several files, merged by bench, in the order of [`crate::NAMES`].
///
/// # Errors
/// A file cannot be read, or two were measured on different machines.
pub fn read_all(files: &[PathBuf]) -> anyhow::Result<Vec<Report>> {
    let mut all: Vec<Report> = Vec::new();
    for file in files {
        for report in read(file)? {
            match all.iter_mut().find(|r| r.bench == report.bench) {
                Some(old) => {
                    *old = merge(old.clone(), report).with_context(|| format!("cannot add {}", file.display()))?;
                }
                None => all.push(report),
            }
        }
    }
    all.sort_by_key(|r| crate::NAMES.iter().position(|n| *n == r.bench));
    Ok(all)
}

/// One report of two: rows of `new` replace those of `old` with the same key, the others follow each other in the
/// order of their keys; goals are judged anew.
///
/// # Errors
/// They are not of one bench, form and machine.
pub fn merge(old: Report, new: Report) -> anyhow::Result<Report> {
    let on = |r: &Report| {
        let m = &r.machine;
        (r.bench.clone(), r.quick, m.kernel.clone(), m.qemu.clone(), m.accelerator.clone(), m.cpus, m.memory_mib)
    };
    if on(&old) != on(&new) {
        bail!(
            "what was measured is {:?}, what is to be added is {:?}: figures of two machines or forms do not compare; \
             use another file",
            on(&old),
            on(&new)
        );
    }
    let mut rows = new.rows;
    let keys: Vec<Key> = rows.iter().map(Row::key).collect();
    rows.extend(old.rows.into_iter().filter(|row| !keys.contains(&row.key())));
    order(&new.bench, &mut rows);
    share_limits(&mut rows);
    let mut machine = new.machine;
    for at in old.machine.load {
        machine.load = [machine.load[0].min(at), machine.load[1].max(at)];
    }
    let (mut conditions, mut commands) = (new.conditions, old.commands);
    conditions.extend(old.conditions.into_iter().filter(|c| !conditions.contains(c)).collect::<Vec<_>>());
    commands.retain(|c| !new.commands.contains(c));
    commands.extend(new.commands);
    let from = commands.len().saturating_sub(COMMANDS_MAX);
    let goals = if new.quick { Vec::new() } else { goals(&new.bench, &rows) };
    Ok(Report {
        goals,
        machine,
        conditions,
        commands: commands.split_off(from),
        rows,
        bench: new.bench,
        quick: new.quick,
    })
}

/// A limit is of a guest and a link, whichever mechanism is held against it: a row that was measured without one
/// gets that of another row.
fn share_limits(rows: &mut [Row]) {
    const TERMS: [&str; 3] = ["limit_terms", "bare_limit_ms", "bare_limit_terms"];
    let of = |row: &Row| Key { mechanism: String::new(), ..row.key() };
    let known: Vec<(Key, Row)> = rows.iter().filter(|r| r.limit_ms.is_some()).map(|r| (of(r), r.clone())).collect();
    for row in rows.iter_mut().filter(|r| r.limit_ms.is_none()) {
        let key = of(row);
        let Some((_, from)) = known.iter().find(|(k, _)| *k == key) else { continue };
        row.limit_ms = from.limit_ms;
        for term in TERMS {
            if let Some(value) = from.more.get(term) {
                row.add(term, value.clone());
            }
        }
        row.add("limit_shared", true);
    }
    relocate::ratios(rows);
}

/// As the plan has them; what is not in it comes last.
fn order(bench: &str, rows: &mut [Row]) {
    let plan = plan(bench);
    rows.sort_by_cached_key(|row| {
        let key = row.key();
        (plan.iter().position(|k| *k == key).unwrap_or(usize::MAX), key)
    });
}

/// Every row that a bench has when all of it is run.
pub fn plan(bench: &str) -> Vec<Key> {
    match bench {
        "relocate" => relocate::plan(),
        "resume" => resume::plan(),
        "density" => density::plan(),
        "wire" => wire::plan(),
        "fanout" => fanout::plan(),
        "singleton" => singleton::plan(),
        _ => Vec::new(),
    }
}

/// What a bench is held against, as far as its rows are there.
pub fn goals(bench: &str, rows: &[Row]) -> Vec<Goal> {
    match bench {
        "relocate" => relocate::goals(rows),
        "resume" => resume::goals(rows),
        "density" => density::goals(rows),
        "wire" => wire::goals(rows),
        "fanout" => fanout::goals(rows),
        "singleton" => singleton::goals(rows),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Machine, Sample};

    fn row(guest: &str, mbit: u32, mechanism: &str, first: f64) -> Row {
        let mut row = Row::of(guest, 512, mechanism, &[Sample { first_byte_ms: first, ..Sample::default() }]);
        row.link_mbit = Some(mbit);
        row.rtt_ms = Some(if mbit == 100 { 20.0 } else { 5.0 });
        row
    }

    fn report(rows: Vec<Row>) -> Report {
        let machine = Machine {
            kernel: "6.18".into(),
            qemu: "10.0.2".into(),
            accelerator: "tcg".into(),
            cpus: 2,
            memory_mib: 24_000,
            load: [1.0, 2.0],
        };
        Report {
            bench: "relocate".into(),
            quick: false,
            machine,
            conditions: vec!["c".into()],
            commands: vec![format!("{} rows", rows.len())],
            rows,
            goals: vec![],
        }
    }

    #[test]
    fn a_row_replaces_the_one_of_its_guest_link_and_mechanism_and_no_other() {
        let old = report(vec![row("tiny", 100, "vmatrix", 1.0), row("tiny", 1000, "vmatrix", 2.0)]);
        let mut new = report(vec![row("tiny", 100, "vmatrix", 3.0)]);
        new.machine.load = [0.1, 0.4];
        let merged = merge(old, new).unwrap();
        let firsts: Vec<_> = merged.rows.iter().filter_map(|r| r.first_byte_ms_median).collect();
        assert_eq!(firsts, [3.0, 2.0]);
        assert_eq!((merged.machine.load, merged.commands.len()), ([0.1, 2.0], 2));
    }

    #[test]
    fn a_baseline_measured_apart_gets_the_limit_of_its_guest_and_link() {
        let mut limited = row("tiny", 100, "vmatrix", 390.0);
        limited.limit_ms = Some(300.0);
        limited.add("limit_terms", serde_json::json!({ "r_ms": 20.0 }));
        let new = report(vec![row("tiny", 100, "stop_and_copy", 24_000.0), row("maps", 100, "stop_and_copy", 1.0)]);
        let merged = merge(report(vec![limited]), new).unwrap();
        let of = |guest: &str, mechanism: &str| {
            merged.rows.iter().find(|r| r.guest == guest && r.mechanism == mechanism).unwrap()
        };
        assert_eq!(of("tiny", "stop_and_copy").limit_ms, Some(300.0));
        assert!(of("tiny", "stop_and_copy").more.contains_key("limit_terms"));
        assert_eq!(of("maps", "stop_and_copy").limit_ms, None);
        assert_eq!(of("tiny", "vmatrix").number("of_limit"), Some(1.3));
        let sooner = merged.goals.iter().find(|g| g.what.contains("stop_and_copy over vmatrix")).unwrap();
        assert_eq!(sooner.met, Some(true));
    }

    #[test]
    fn figures_of_two_machines_are_not_put_into_one_report() {
        let mut other = report(vec![]);
        other.machine.cpus = 64;
        let error = merge(report(vec![]), other).unwrap_err().to_string();
        assert!(error.contains("64") && error.contains("another file"), "{error}");
    }

    #[test]
    fn a_file_takes_several_invocations_and_reads_what_json_printed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("results.json");
        into(&file, report(vec![row("tiny", 100, "vmatrix", 1.0)])).unwrap();
        let mut other = report(vec![]);
        other.bench = "density".into();
        into(&file, other).unwrap();
        let merged = into(&file, report(vec![row("tiny", 100, "stop_and_copy", 9.0)])).unwrap();
        assert_eq!(merged.rows.len(), 2);
        let benches: Vec<String> = read(&file).unwrap().into_iter().map(|r| r.bench).collect();
        assert_eq!(benches, ["relocate", "density"]);
        let lone = dir.path().join("lone.json");
        fs::write(&lone, serde_json::to_string(&report(vec![row("maps", 100, "vmatrix", 4.0)])).unwrap()).unwrap();
        let all = read_all(&[file, lone.clone()]).unwrap();
        assert_eq!(all.first().map(|r| r.rows.len()), Some(3));
        fs::write(&lone, "{}").unwrap();
        assert!(format!("{:#}", read(&lone).unwrap_err()).contains("lone.json"));
    }
}
