//! The main job on real parts: what the demo must show, that the replay agrees, that kills do not matter.
//!
//! These need root, QEMU, PostgreSQL and a few minutes; they fail, and say why, where something is missing.

// Helpers of tests fail as loudly as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Runs the demo on a scenario and gives its last line.
fn demo(scenario: &str) -> Value {
    let out = Command::new(env!("CARGO_BIN_EXE_vmatrix"))
        .args(["demo", "--headless", "--json", "--scenario", scenario])
        .current_dir(ROOT)
        .output()
        .expect("vmatrix starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    let last = stdout.lines().last().unwrap_or_else(|| panic!("the demo printed nothing; it said:\n{stderr}"));
    let report = serde_json::from_str(last).unwrap_or_else(|e| panic!("last line is not JSON ({e}): {last}\n{stderr}"));
    assert!(out.status.success(), "the demo ended with {}: {last}\n{stderr}", out.status);
    report
}

fn replay(scenario: &str) -> (Value, Vec<u8>) {
    let run = || {
        Command::new(env!("CARGO_BIN_EXE_vmatrix"))
            .args(["replay", "--json", scenario])
            .current_dir(ROOT)
            .output()
            .expect("vmatrix starts")
            .stdout
    };
    let (first, second) = (run(), run());
    assert_eq!(first, second, "two replays of {scenario} differ");
    let last = String::from_utf8_lossy(&first).lines().last().expect("the replay prints a report").to_owned();
    (serde_json::from_str(&last).expect("JSON"), first)
}

/// Everything a lab may leave behind, read by other means than the lab's own.
fn left_behind() -> BTreeSet<String> {
    let words = |program: &str, args: &[&str]| -> Vec<String> {
        let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
        String::from_utf8_lossy(&out.stdout).lines().map(|l| format!("{program}: {}", l.trim())).collect()
    };
    let mut seen = BTreeSet::new();
    seen.extend(words("ip", &["netns", "list"]));
    seen.extend(
        words("ip", &["-o", "link", "show"]).into_iter().map(|l| l.split(':').take(3).collect::<Vec<_>>().join(":")),
    );
    seen.extend(words("nft", &["list", "tables"]));
    seen.extend(
        words("ps", &["-eo", "args"])
            .into_iter()
            .filter(|l| ["qemu-system", " wan ", " tunnel ", "postgres", " --config "].iter().any(|w| l.contains(w))),
    );
    seen.extend(std::fs::read_to_string("/proc/mounts").unwrap_or_default().lines().map(str::to_owned));
    for dir in [std::env::temp_dir(), "/dev/shm".into()] {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            seen.insert(entry.path().display().to_string());
        }
    }
    seen
}

fn number(v: &Value, path: &str) -> f64 {
    v.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} is not a number in {v}"))
}

/// Networks that moves woke, in order.
fn woken(report: &Value) -> Vec<(String, String)> {
    let moves = report["moves"].as_array().expect("moves");
    moves
        .iter()
        .filter(|m| m["cause"] != "start" && m["action"].as_str().is_some_and(|a| a.starts_with("resume")))
        .map(|m| {
            (m["service"].as_str().unwrap_or_default().to_owned(), m["network"].as_str().unwrap_or_default().to_owned())
        })
        .collect()
}

const FLASH_CROWD: &str = "scenarios/library/flash-crowd.toml";

/// Plays the flash crowd once and holds it to everything it must show by itself.
fn flash_crowd() -> Value {
    let before = left_behind();
    let began = std::time::Instant::now();
    let r = demo(FLASH_CROWD);
    assert!(began.elapsed().as_secs() < 8 * 60, "took {} s", began.elapsed().as_secs());
    let new: Vec<String> = left_behind().difference(&before).cloned().collect();
    assert!(new.is_empty(), "left behind: {new:?}");

    assert!(number(&r, "/requests") > 100.0);
    assert_eq!(number(&r, "/failed_requests"), 0.0);
    assert!(number(&r, "/relocations") >= 1.0);
    assert_eq!(r["returned_to_dormant"], true);
    assert_eq!(r["crowd"]["region"], "seoul");
    assert!(woken(&r).contains(&("maps".into(), "tokyo".into())), "{r}");
    assert!(number(&r, "/crowd/decision_to_first_byte_s") <= 5.0, "{r}");
    assert!(number(&r, "/two_tier/writes") > 0.0);
    assert_eq!(number(&r, "/two_tier/lost_writes"), 0.0);
    assert!(number(&r, "/two_tier/read_across") > 0.0, "nothing was read elsewhere than it was written: {r}");
    assert_eq!(number(&r, "/two_tier/plaintext_bytes_on_wan"), 0.0);
    assert!(number(&r, "/two_tier/control_seen") > 0.0, "the capture is blind");
    assert!(number(&r, "/ports/tried_from_wan") > 0.0);
    assert!(number(&r, "/ports/tried_from_cells") > 0.0);
    assert_eq!(number(&r, "/ports/answered"), 0.0);
    assert!(!r["explain"].as_array().expect("explain").is_empty());
    println!("{}", r["crowd"]);
    r
}

/// What the scenario says a map takes a guest, and its resume, milliseconds.
const ANSWER_MS: f64 = 33.0;
const RESUME_MS: f64 = 300.0;

/// What a map takes a guest on this machine, milliseconds. New York asks the guest in Ashburn, next door, before, during
/// and after the crowd, which is served elsewhere: half of its answers wait for nothing but the guest.
fn answer_ms(lab: &Value, replayed: &Value) -> f64 {
    let half = |r: &Value| {
        let rows = r["latency"].as_array().expect("latency");
        let row = rows.iter().find(|row| row["region"] == "new-york" && row["service"] == "maps");
        number(row.unwrap_or_else(|| panic!("nobody in New York asked for maps: {r}")), "/p50_ms")
    };
    (ANSWER_MS + half(lab) - half(replayed)).max(1.0)
}

/// The scenario with a map's guest as fast as it is here, in answering and in being resumed.
fn as_fast_as(answer_ms: f64) -> tempfile::NamedTempFile {
    let text = std::fs::read_to_string(format!("{ROOT}/{FLASH_CROWD}")).expect("the scenario");
    let profile = |answer: f64, resume: f64| format!("answer_ms = {answer:.0}\nresume_ms = {resume:.0}\n");
    let said = profile(ANSWER_MS, RESUME_MS);
    assert_eq!(text.matches(&said).count(), 1, "the scenario does not say {said}");
    let here = profile(answer_ms, RESUME_MS * answer_ms / ANSWER_MS);
    let file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a file");
    std::fs::write(file.path(), text.replace(&said, &here)).expect("written");
    file
}

/// Figures in which the median of the plays and the replay are more than a quarter apart.
fn apart(plays: &[Value], replayed: &Value) -> Vec<String> {
    let figures = ["/crowd/decision_to_serving_s", "/crowd/p95_before_ms", "/crowd/p95_after_ms"];
    let compared = figures.into_iter().map(|path| {
        let mut seen: Vec<f64> = plays.iter().map(|r| number(r, path)).collect();
        seen.sort_by(f64::total_cmp);
        (path, seen[seen.len() / 2], number(replayed, path))
    });
    compared
        .filter(|(_, lab, replayed)| (lab - replayed).abs() > 0.25 * lab)
        .map(|(path, lab, replayed)| format!("{path}: lab {lab}, replay {replayed}"))
        .collect()
}

#[test]
fn machine_a_flash_crowd_pulls_an_unmodified_vm_to_its_users() {
    let mut plays = vec![flash_crowd()];
    let began = std::time::Instant::now();
    let (replayed, _) = replay(FLASH_CROWD);
    assert!(began.elapsed().as_secs_f64() < 4.0, "two replays took {:.1} s", began.elapsed().as_secs_f64());
    assert_eq!(woken(&plays[0]), woken(&replayed), "lab and replay chose otherwise");
    // What the crowd gains, where guests are as fast as the scenario says.
    let gain = |r: &Value, of: &str| {
        let ratio = number(r, "/crowd/p95_before_ms") / number(r, "/crowd/p95_after_ms");
        assert!(ratio >= 2.0, "{of}: p95 only {ratio:.2} times better: {r}");
        assert!(number(r, "/crowd/onset_to_objective_s") <= 30.0, "{of}: {r}");
    };
    gain(&replayed, "replay");
    let here = answer_ms(&plays[0], &replayed);
    if here <= 2.0 * ANSWER_MS {
        gain(&plays[0], "lab");
    } else {
        // Four answers a second nearly fill such a guest, wherever it is: the lab is held to the replay at its speed.
        eprintln!("SLOW MACHINE: a map takes {here:.0} ms, not {ANSWER_MS}: the objective cannot be met on it");
    }
    // One play on a busy machine may be off; the median of three is not.
    let replayed_here = |plays: &[Value]| {
        let mut all: Vec<f64> = plays.iter().map(|play| answer_ms(play, &replayed)).collect();
        all.sort_by(f64::total_cmp);
        let file = as_fast_as(all[all.len() / 2]);
        replay(file.path().to_str().expect("a path")).0
    };
    if !apart(&plays, &replayed_here(&plays)).is_empty() {
        plays.extend([flash_crowd(), flash_crowd()]);
    }
    assert_eq!(apart(&plays, &replayed_here(&plays)), Vec::<String>::new());
}

#[test]
fn machine_the_story_ends_well_though_daemons_are_killed() {
    let before = left_behind();
    let r = demo("scenarios/library/daemons-die.toml");
    let new: Vec<String> = left_behind().difference(&before).cloned().collect();
    assert!(new.is_empty(), "left behind: {new:?}");
    // Another region's crowd pulls the service elsewhere.
    assert_eq!(r["crowd"]["region"], "berlin");
    assert!(woken(&r).contains(&("maps".into(), "dublin".into())), "{r}");
    assert_eq!(number(&r, "/failed_requests"), 0.0);
    assert_eq!(r["returned_to_dormant"], true);
    assert_eq!(number(&r, "/two_tier/lost_writes"), 0.0);
}

#[test]
fn machine_a_singleton_is_moved_through_three_networks_under_its_users() {
    const LEDGER: &str = "scenarios/library/moving-ledger.toml";
    let before = left_behind();
    let r = demo(LEDGER);
    let new: Vec<String> = left_behind().difference(&before).cloned().collect();
    assert!(new.is_empty(), "left behind: {new:?}");
    let (replayed, _) = replay(LEDGER);
    assert_eq!(woken(&r), woken(&replayed), "lab and replay moved it otherwise");
    assert_eq!(number(&r, "/relocations"), 3.0, "{r}");
    assert_eq!(number(&r, "/failed_requests"), 0.0, "{r}");
    assert_eq!(r["returned_to_dormant"], true);
}
