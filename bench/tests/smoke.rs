//! Every bench in its short form: that it runs from end to end and leaves nothing behind.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

use std::path::{Path, PathBuf};
use vmatrix_bench::{Options, Report, markdown, run};

/// The product's program, built with the workspace: beside the folder the tests are in.
fn program() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let beside = here.ancestors().nth(2).unwrap().join("vmatrix");
    assert!(beside.exists(), "{} is not there; build the whole workspace first", beside.display());
    beside
}

fn short(name: &str, rows: &[&str]) -> Report {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("store");
    let options = Options {
        program: program(),
        store: std::env::var_os("VMATRIX_STORE").map_or(kept, PathBuf::from),
        recipes: Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenarios/guests"),
        quick: true,
        rows: rows.iter().map(|r| (*r).to_owned()).collect(),
        runs: None,
    };
    let report = run(name, &options).unwrap();
    assert!(!report.rows.is_empty() && report.rows.iter().all(|r| r.runs >= 1), "{report:?}");
    assert!(markdown(std::slice::from_ref(&report)).contains(&format!("## {name}")));
    let left: Vec<String> = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with(&format!("vmb-{}-", std::process::id())))
        .collect();
    assert_eq!(left, Vec::<String>::new());
    report
}

fn first_byte(report: &Report, mechanism: &str) -> f64 {
    let row = report.rows.iter().find(|r| r.mechanism == mechanism).unwrap();
    row.first_byte_ms_median.unwrap()
}

#[test]
fn machine_the_product_relocates_sooner_than_a_copy() {
    let report = short("relocate", &["/vmatrix", "/stop_and_copy"]);
    let (ours, copy) = (first_byte(&report, "vmatrix"), first_byte(&report, "stop_and_copy"));
    assert!(ours < copy, "{ours} ms against {copy} ms");
    let row = report.rows.iter().find(|r| r.mechanism == "vmatrix").unwrap();
    assert!(row.limit_ms.is_some_and(|l| l > 0.0) && row.bytes_on_wire.is_some_and(|b| b > 100_000), "{row:?}");
}

#[test]
fn machine_a_resume_is_measured() {
    let report = short("resume", &["/vmatrix", "/x_ignore_shared", "/mapped_ram"]);
    assert!(report.rows.iter().all(|r| r.load_ms_median.is_some()), "{report:?}");
}

#[test]
fn machine_clones_are_counted_alive() {
    let report = short("density", &[]);
    let row = report.rows.first().unwrap();
    assert!(row.number("private_mib_median").is_some_and(|mib| mib > 1.0), "{row:?}");
}

#[test]
fn machine_a_later_snapshot_costs_less_than_the_first() {
    let report = short("wire", &["/casync"]);
    let bytes = |case: &str, mechanism: &str| {
        let row = report.rows.iter().find(|r| r.mechanism == mechanism && r.more["case"] == case).unwrap();
        row.bytes_on_wire.unwrap()
    };
    assert!(bytes("after_1000", "vmatrix") * 5 < bytes("first_service", "vmatrix"), "{report:?}");
}

#[test]
fn machine_a_singleton_moves_under_its_users_and_loses_nothing() {
    let report = short("singleton", &[]);
    let row = report.rows.first().unwrap();
    assert!(row.number("lines_counted").is_some_and(|lines| lines > 10.0), "{row:?}");
    assert_eq!(row.number("lines_wrong"), Some(0.0), "{row:?}");
}

#[test]
fn machine_an_image_fans_out() {
    let report = short("fanout", &[]);
    assert!(report.rows.iter().all(|r| r.number("origin_copies_median").is_some()), "{report:?}");
}
