//! Bad input gets one clear error: what, where, what to do next, and a documented exit code.

// Helpers of tests fail as loudly as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output};

fn vmatrix(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmatrix"))
        .args(args)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("vmatrix starts")
}

fn check(args: &[&str], code: i32, said: &[&str]) {
    let out = vmatrix(args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {stderr}");
    for words in said {
        assert!(stderr.contains(words), "{args:?} did not say {words:?}: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

fn scenario(dir: &Path, change: impl Fn(String) -> String) -> String {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/library/flash-crowd.toml")).unwrap();
    let file = dir.join("s.toml");
    std::fs::write(&file, change(text)).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn an_unknown_command_is_a_usage_error() {
    check(&["replya"], 2, &["replay"]);
}

#[test]
fn a_missing_scenario_says_where_scenarios_are() {
    check(&["replay", "nowhere.toml"], 1, &["nowhere.toml", "hint:", "scenarios/library"]);
}

#[test]
fn an_unknown_key_comes_with_the_nearest_right_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = scenario(dir.path(), |t| t.replace("length_s", "lenght_s"));
    check(&["replay", &file], 1, &["s.toml:", "unknown field `lenght_s`", "did you mean `length_s`?"]);
}

#[test]
fn an_impossible_topology_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file =
        scenario(dir.path(), |t| t.replace("between = [\"seoul\", \"tokyo\"]", "between = [\"seoul\", \"tokio\"]"));
    check(&["replay", &file], 1, &["\"tokio\"", "did you mean \"tokyo\"?"]);
    let file = scenario(dir.path(), |t| t.replace("198.19.2.0/24", "198.19.1.0/24"));
    check(&["replay", &file], 1, &["198.19.1.0/24", "overlap"]);
}

#[test]
fn a_recipe_with_an_unknown_key_is_refused_before_anything_is_built() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("r.toml");
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/guests/tiny.toml")).unwrap();
    std::fs::write(&recipe, text.replace("memory_mib", "memory_mb")).unwrap();
    let store = dir.path().join("store");
    check(
        &["image", "build", recipe.to_str().unwrap(), "--store", store.to_str().unwrap()],
        1,
        &["unknown field `memory_mb`", "did you mean `memory_mib`?"],
    );
    assert!(!store.join("images").join("tiny.json").exists());
}

#[test]
fn an_order_that_is_no_order_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "t").unwrap();
    check(
        &["plan", "maps", "--at", "tokyo", "--token-file", token.to_str().unwrap()],
        1,
        &["--at \"tokyo\" is not NETWORK=N", "hint:"],
    );
}

#[test]
fn a_cpa_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "t").unwrap();
    check(
        &["explain", "maps", "--cpa", "http://127.0.0.1:9", "--token-file", token.to_str().unwrap()],
        1,
        &["127.0.0.1:9"],
    );
}
