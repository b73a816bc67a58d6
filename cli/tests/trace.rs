//! `vmatrix trace`: data on stdout, talk on stderr, and what was written is what is read.

// Helpers of tests fail as loudly as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

/// Runs `vmatrix trace` and returns what it wrote to stdout and stderr.
fn trace(args: &[&str], code: i32) -> (String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_vmatrix")).arg("trace").args(args).output().unwrap();
    let (said, told) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert_eq!(out.status.code(), Some(code), "{args:?}: {told}");
    (said, told)
}

fn file(dir: &Path, name: &str, content: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_recorded_trace_is_imported_masked_and_described() {
    let dir = tempfile::tempdir().unwrap();
    let rows = "period,count\n2026-01-01 00:00:00,10\n2026-01-01 00:01:00,9000\n2026-01-01 00:02:00,30\n2026-01-01 00:04:00,20\n";
    let recorded = file(dir.path(), "site.csv", rows);
    let to = dir.path().join("site.trace");
    let mask = "2026-01-01 00:01:00..2026-01-01 00:02:00";
    let (said, told) = trace(&["import", &recorded, "--clean", "--mask", mask, "-o", to.to_str().unwrap()], 0);
    assert_eq!(said, "");
    assert!(told.contains("1 gaps of 1 steps in all filled with zeros, the first at 2026-01-01 00:03:00"), "{told}");
    assert!(told.contains("masked 2026-01-01 00:01:00: 1 steps of 9000 requests in all replaced by 20"), "{told}");
    assert!(told.contains("nothing to clean"), "{told}");
    let written = std::fs::read_to_string(&to).unwrap();
    let form = "# vmatrix trace 1\n# name: site\n# begins: 2026-01-01 00:00:00\n# step_s: 60\nrequests\n";
    assert_eq!(written, format!("{form}10\n20\n30\n0\n20\n"));
    let (again, told) = trace(&["import", to.to_str().unwrap(), "--name", "other"], 0);
    assert_eq!((again, told), (written.replace("site", "other"), String::new()));
    let (said, _) = trace(&["describe", to.to_str().unwrap()], 0);
    assert!(said.contains("site: 5 steps of 60.0 s") && said.contains("peak      30 at 2026-01-01 00:02:00"), "{said}");
}

#[test]
fn a_generated_trace_goes_to_stdout() {
    let (first, told) = trace(&["generate", "flash", "--seed", "3", "--days", "2"], 0);
    assert_eq!((first.lines().count(), told), (5 + 2 * 1440, String::new()));
    assert_eq!(first, trace(&["generate", "flash", "--seed", "3", "--days", "2"], 0).0);
    assert_ne!(first, trace(&["generate", "flash", "--seed", "4", "--days", "2"], 0).0);
    let dir = tempfile::tempdir().unwrap();
    let (said, _) = trace(&["describe", &file(dir.path(), "f.trace", &first)], 0);
    assert!(said.starts_with("flash-3: 2880 steps of 60.0 s, 2001-01-01 00:00:00"), "{said}");
}

#[test]
fn a_matrix_is_described_as_it_is_and_as_it_is_completed() {
    let dir = tempfile::tempdir().unwrap();
    let (said, _) = trace(&["describe", &file(dir.path(), "m", "0\t10\t0\n10\t0\t5\n0\t5\t0\n")], 0);
    assert!(said.starts_with("3 places, 1 pairs not measured\n"), "{said}");
    assert!(said.contains("completed   1 pairs given the shortest way over others\n3 places, 0 pairs"), "{said}");
    file(dir.path(), "eu.dat", "80/82/99/1.5:us\n");
    let (said, _) = trace(&["describe", dir.path().to_str().unwrap()], 0);
    assert!(said.contains("round trip  82.0 to 82.0 ms"), "{said}");
}

#[test]
fn bad_input_is_an_error_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let bad = file(dir.path(), "bad.csv", "period,count\n2026-01-01 00:00:00,10\n2026-01-01 00:00:00,-1\n");
    for (args, code, words) in [
        (&["import", &bad][..], 1, &["bad.csv:3: ", "is negative"][..]),
        (&["describe", &bad], 1, &["bad.csv:3: "]),
        (&["import", "nowhere.csv"], 1, &["cannot read nowhere.csv"]),
        (&["describe", "nowhere.csv"], 1, &["cannot read nowhere.csv"]),
        (&["import", &bad, "--mask", "yesterday..today"], 2, &["1998-05-12 06:31:00..1998-05-12 06:45:00"]),
        (&["generate", "tsunami"], 2, &["possible values: diurnal, flash, stock, sport, swell"]),
        (&["generate", "swell", "--days", "0"], 2, &["1..=3660"]),
        (&["generate", "swell", "-o", "/nowhere/at.all"], 1, &["cannot write /nowhere/at.all"]),
    ] {
        let (said, told) = trace(args, code);
        assert_eq!(said, "", "{args:?}");
        for word in words {
            assert!(told.contains(word), "{args:?} did not say {word:?}: {told}");
        }
    }
}

#[test]
fn a_cpas_journal_becomes_a_scenario_that_plays() {
    let dir = tempfile::tempdir().unwrap();
    let library = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/library/flash-crowd.toml");
    let scenario = vmatrix_replay::scenario::Scenario::read(std::path::Path::new(library)).unwrap();
    let fleet = file(dir.path(), "fleet.toml", &toml::to_string(&scenario.fleet).unwrap());
    let clients = scenario.fleet.regions[0].prefix;
    let network = &scenario.fleet.networks[0].name;
    let report = |second: u64| {
        format!(
            "{{\"written_at\":{0},\"entry\":\"demand\",\"network\":\"{network}\",\"sequence\":{second},\"run\":1,\"at\":{0},\
             \"counts\":[{{\"service\":\"maps\",\"clients\":\"{clients}\",\"requests\":2,\"bytes\":100}}]}}\n",
            (1_000 + second) * 1_000_000
        )
    };
    std::fs::create_dir(dir.path().join("state")).unwrap();
    let said = (1..=65).map(report).collect::<String>();
    file(&dir.path().join("state"), "journal.jsonl", &said);
    let [state, out] = ["state", "out"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    let (said, told) = trace(&["journal", &state, "--fleet", &fleet, "-o", &out], 0);
    assert_eq!(said, "");
    assert!(told.contains("recorded.toml: play it with"), "{told}");
    let (_, told) = trace(&["journal", &state, "--fleet", &fleet, "-o", &out], 1);
    assert!(told.contains("recorded.toml"), "it was written over: {told}");
    let (_, told) = trace(&["journal", &out, "--fleet", &fleet, "-o", &out], 1);
    assert!(told.contains("has no journal.jsonl"), "{told}");
    let played = Command::new(env!("CARGO_BIN_EXE_vmatrix"))
        .args(["replay", &format!("{out}/recorded.toml"), "--json"])
        .output()
        .unwrap();
    let report = String::from_utf8(played.stdout).unwrap();
    // Sixty seconds of two requests each.
    let report: serde_json::Value = serde_json::from_str(report.lines().last().unwrap()).unwrap();
    assert!((80..160).contains(&report["requests"].as_u64().unwrap()), "{report}");
}
