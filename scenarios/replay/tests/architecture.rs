//! The shape of the house, read from the manifests: a star round the model, two doors in each room,
//! and cores that could not touch the world if they wanted to.

// Helpers of tests fail as loudly as tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A member of the workspace.
struct Member {
    /// Its folder from the root: `cpa/core`.
    folder: String,
    manifest: toml::Table,
}

impl Member {
    /// Every crate it links, of the workspace and of others, without what only its tests use.
    fn dependencies(&self) -> BTreeSet<String> {
        let targets = self.manifest.get("target").and_then(toml::Value::as_table);
        let per_target = targets.into_iter().flat_map(|t| t.values()).filter_map(toml::Value::as_table);
        std::iter::once(&self.manifest)
            .chain(per_target)
            .flat_map(|t| [t.get("dependencies"), t.get("build-dependencies")])
            .flatten()
            .filter_map(toml::Value::as_table)
            .flat_map(|t| t.keys().cloned())
            .collect()
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn toml_at(path: &Path) -> toml::Table {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
    text.parse().unwrap_or_else(|e| panic!("{} is not TOML: {e}", path.display()))
}

fn members() -> Vec<Member> {
    let workspace = toml_at(&root().join("Cargo.toml"));
    let folders: Vec<String> =
        workspace["workspace"]["members"].as_array().unwrap().iter().map(|m| m.as_str().unwrap().to_owned()).collect();
    assert!(folders.len() >= 10, "the workspace has lost its members: {folders:?}");
    folders
        .into_iter()
        .map(|folder| Member { manifest: toml_at(&root().join(&folder).join("Cargo.toml")), folder })
        .collect()
}

/// The folder of each name under which the workspace offers one of its own crates.
fn own_crates() -> BTreeMap<String, String> {
    let workspace = toml_at(&root().join("Cargo.toml"));
    let dependencies = workspace["workspace"]["dependencies"].as_table().unwrap();
    let own = dependencies.iter().filter_map(|(name, d)| Some((name.clone(), d.get("path")?.as_str()?.to_owned())));
    own.collect()
}

/// The folders that `member` depends on.
fn neighbours(member: &Member, own: &BTreeMap<String, String>) -> BTreeSet<String> {
    member.dependencies().iter().filter_map(|d| own.get(d).cloned()).collect()
}

fn cores() -> Vec<Member> {
    let cores: Vec<Member> = members().into_iter().filter(|m| m.folder.ends_with("/core")).collect();
    assert_eq!(cores.len(), 3, "cpa, vma and edge each have a core");
    cores
}

#[test]
fn cpa_vma_and_edge_do_not_know_each_other() {
    let own = own_crates();
    for member in members() {
        let room = member.folder.split('/').next().unwrap();
        if !["cpa", "vma", "edge"].contains(&room) {
            continue;
        }
        for neighbour in neighbours(&member, &own) {
            assert!(
                neighbour == "model" || neighbour.starts_with(&format!("{room}/")),
                "{} depends on {neighbour}: data goes round the star, dependencies do not; put the shared noun in model/",
                member.folder
            );
        }
    }
}

#[test]
fn the_model_depends_on_no_other_room() {
    let model = members().into_iter().find(|m| m.folder == "model").unwrap();
    assert!(neighbours(&model, &own_crates()).is_empty(), "the model is what everything else stands on");
}

#[test]
fn a_core_links_nothing_that_touches_the_world() {
    // A new name here needs a reason: it must have no I/O, no clock, no threads and no randomness.
    const PURE: [&str; 4] = ["vmatrix-model", "serde", "ipnet", "thiserror"];
    for core in cores() {
        for dependency in core.dependencies() {
            assert!(
                PURE.contains(&dependency.as_str()),
                "{} depends on {dependency}, which is not one of {PURE:?}; what touches the world belongs in agent/",
                core.folder
            );
        }
    }
}

#[test]
fn the_lab_starts_daemons_and_links_none() {
    let own = own_crates();
    for member in members().iter().filter(|m| m.folder.starts_with("scenarios/")) {
        for neighbour in neighbours(member, &own) {
            assert!(
                !neighbour.ends_with("/agent"),
                "{} links {neighbour}: daemons run as processes of the one binary, so that they can be killed",
                member.folder
            );
        }
    }
    let lab = members().into_iter().find(|m| m.folder == "scenarios/lab").unwrap();
    assert!(neighbours(&lab, &own).iter().all(|n| !n.ends_with("/core")), "the lab decides nothing");
}

#[test]
fn every_crate_keeps_the_common_lints_and_is_named_after_its_folder() {
    for member in members() {
        let lints = member.manifest.get("lints").and_then(|l| l.get("workspace")).and_then(toml::Value::as_bool);
        assert_eq!(lints, Some(true), "{} needs [lints] workspace = true", member.folder);
        let name = member.manifest["package"]["name"].as_str().unwrap();
        let expected = if member.folder == "cli" {
            "vmatrix".to_owned()
        } else {
            format!("vmatrix-{}", member.folder.replace('/', "-"))
        };
        assert_eq!(name, expected, "the name of {}", member.folder);
    }
}

/// Every Rust file under `folder`.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("cannot read {}: {e}", folder.display()));
    for path in entries.map(|e| e.unwrap().path()) {
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn a_core_reads_no_clock_rolls_no_dice_and_never_waits() {
    const BANNED: [&str; 12] = [
        "SystemTime",
        "Instant::now",
        "std::net::Tcp",
        "std::net::Udp",
        "std::fs",
        "std::process",
        "std::env",
        "thread::",
        "rand::",
        "async fn",
        ".await",
        "HashMap",
    ];
    for core in cores() {
        for file in sources(&root().join(&core.folder).join("src")) {
            let text = std::fs::read_to_string(&file).unwrap();
            for (number, line) in text.lines().enumerate() {
                // Prose may name what the code must not use.
                if line.trim_start().starts_with("//") {
                    continue;
                }
                for banned in BANNED {
                    assert!(
                        !line.contains(banned),
                        "{}:{}: {banned} in a core; time, chance and the world come in as arguments and events",
                        file.display(),
                        number + 1
                    );
                }
            }
        }
    }
}

#[test]
fn no_file_is_called_utils() {
    for member in members() {
        for file in sources(&root().join(&member.folder)) {
            let stem = file.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            assert!(
                !["util", "utils", "helpers", "common", "misc"].contains(&stem),
                "{}: name it after what it holds",
                file.display()
            );
        }
    }
}
