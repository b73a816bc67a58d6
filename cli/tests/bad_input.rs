//! Bad input gets one clear error: what, where, what to do next, and a documented exit code.

// Helpers of tests fail as loudly as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use vmatrix_lab::layout;
use vmatrix_lab::namespace::{Namespace, ip_batch};
use vmatrix_model::Bytes;
use vmatrix_model::manifest::{Manifest, PartKind};
use vmatrix_replay::scenario::Scenario;
use vmatrix_vma_image::chunks::Cutter;
use vmatrix_vma_image::{Store, chunks, memory, sign};

const VMATRIX: &str = env!("CARGO_BIN_EXE_vmatrix");

fn check(args: &[&str], code: i32, said: &[&str]) {
    check_of(Command::new(VMATRIX), args, code, said);
}

/// As [`check`], of a command that may be wrapped; none may take longer than half a minute.
fn check_of(program: Command, args: &[&str], code: i32, said: &[&str]) {
    let mut bounded = Command::new("timeout");
    bounded.args(["-k", "5", "30"]).arg(program.get_program()).args(program.get_args()).args(args);
    for (key, value) in program.get_envs() {
        bounded.env(key, value.unwrap_or_default());
    }
    let out: Output = bounded.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).output().expect("timeout starts");
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
fn help_says_what_exit_codes_mean() {
    let out = Command::new(VMATRIX).arg("--help").output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    for line in ["3  the plan has changes, or a play broke a promise", "5  refused", "7  not done in time"] {
        assert!(said.contains(line), "{said}");
    }
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
    let token = token.to_str().unwrap();
    let fair = |more: &[&'static str]| [&["place", "maps", "--token-file", token], more].concat();
    check(&fair(&["--fair", "--team", "seoul,", "--team", "berlin"]), 1, &["--team \"seoul,\" is not a list", "hint:"]);
    check(&fair(&["--fair", "--player", "seoul,berlin"]), 1, &["--player \"seoul,berlin\" is not a region", "hint:"]);
    check(&fair(&["--team", "seoul"]), 2, &["--fair"]);
    check(&fair(&["--fair", "--team", "seoul", "--player", "berlin"]), 2, &["cannot be used with"]);
    check(&fair(&[]), 2, &["--at"]);
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

/// A store with a whole, signed image `small` that nobody could run.
fn store(dir: &Path) -> Store {
    let store = Store::open(dir.join("store")).unwrap();
    let file = |name: &str, length: usize| {
        let mut bytes = vec![0; length];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        std::fs::write(dir.join(name), bytes).unwrap();
        dir.join(name)
    };
    let cutter = Cutter::new(&store, None);
    let memory = memory::cut(&cutter, &file("memory", 16 << 20), &[0], 1, None).unwrap();
    let device = cutter.blob(b"device state", true).unwrap();
    let parts: Vec<_> = [(PartKind::Disk, "disk", 1 << 20), (PartKind::Kernel, "kernel", 70_000)]
        .into_iter()
        .map(|(kind, name, length)| cutter.part(&file(name, length), kind, Bytes(64 << 10)).unwrap())
        .collect();
    let manifest: Manifest = serde_json::from_value(json!({
        "format": 2,
        "name": "small",
        "recipe": "0".repeat(64),
        "machine": {
            "qemu_version": "10.0.2", "machine_type": "pc-q35-10.0", "cpu_model": "Nehalem", "accelerator": "tcg",
            "smp": 1, "memory_mib": 16, "devices": [], "netdev": "tap", "append": "quiet",
        },
        "guest": {
            "address": "192.168.1.10", "gateway": "192.168.1.1", "mac": "52:54:00:12:34:56", "ports": [80],
            "health": { "port": 80, "path": "/", "status": 200 }, "backends": [],
        },
        "memory": memory,
        "device": device,
        "parts": parts,
        "measured": { "boot_ms": 1, "answer_ms": 1 },
    }))
    .unwrap();
    store.put_image("small", &sign::sign(&store, &manifest).unwrap()).unwrap();
    let path = store.dir().to_owned();
    check(&["image", "verify", "small", "--store", path.to_str().unwrap()], 0, &[]);
    store
}

/// Changes the stored image in place.
fn edit(store: &Store, change: impl Fn(&mut Value)) {
    let file = store.dir().join("images/small.json");
    let mut signed: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    change(&mut signed);
    std::fs::write(&file, serde_json::to_vec(&signed).unwrap()).unwrap();
}

#[test]
fn an_image_that_was_changed_or_signed_by_another_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let verify = ["image", "verify", "small", "--store", store.dir().to_str().unwrap()];
    let whole = std::fs::read(store.dir().join("images/small.json")).unwrap();

    edit(&store, |s| s["manifest"] = json!(s["manifest"].as_str().unwrap().replace("Nehalem", "host")));
    check(&verify, 5, &["\"small\"", "signature", "do not run it"]);

    std::fs::write(store.dir().join("images/small.json"), &whole[..whole.len() / 2]).unwrap();
    check(&verify, 5, &["\"small\"", "build it again"]);

    let other = Store::open(dir.path().join("other")).unwrap();
    std::fs::write(store.dir().join("images/small.json"), &whole).unwrap();
    let signed = store.image("small").unwrap().unwrap();
    other.put_image("small", &signed).unwrap();
    let stranger = sign::builder_public(&other).unwrap();
    check(
        &["image", "inspect", "small", "--store", other.dir().to_str().unwrap()],
        5,
        &["not trusted", &signed.signer, "signers"],
    );
    assert_ne!(stranger, signed.signer);
}

#[test]
fn a_flipped_byte_of_a_chunk_is_found_and_the_chunk_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let signed = store.image("small").unwrap().unwrap();
    let manifest: Manifest = serde_json::from_str(&signed.manifest).unwrap();
    let kernel = chunks::table(manifest.part(PartKind::Kernel).unwrap(), &store).unwrap();
    let hex = kernel[0].unwrap().digest.to_string();
    let file = store.dir().join("chunks").join(&hex[..2]).join(&hex);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    check(
        &["image", "verify", "small", "--store", store.dir().to_str().unwrap()],
        5,
        &[&hex, "fetch or build it again"],
    );
}

/// A folder that holds what `PATH` does, but for one program.
fn path_without(missing: &str, dir: &Path) -> PathBuf {
    let all = dir.join("bin");
    std::fs::create_dir(&all).unwrap();
    for folder in ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name() != missing {
                // The same program is in several folders.
                let _ = std::os::unix::fs::symlink(entry.path(), all.join(entry.file_name()));
            }
        }
    }
    all
}

#[test]
fn machine_without_qemu_no_image_is_begun() {
    let dir = tempfile::tempdir().unwrap();
    let mut vmatrix = Command::new(VMATRIX);
    vmatrix.env("PATH", path_without("qemu-system-x86_64", dir.path()));
    let store = dir.path().join("store");
    let args = ["image", "build", "scenarios/guests/tiny.toml", "--store", store.to_str().unwrap(), "--again"];
    check_of(vmatrix, &args, 5, &["qemu-system-x86_64 is missing", "apt-get install"]);
    assert!(!store.join("images/tiny.json").exists());
    let chunks = std::fs::read_dir(store.join("chunks")).into_iter().flatten().count();
    assert_eq!(chunks, 0, "chunks of an image that is not there");
}

#[test]
fn machine_without_a_tun_device_nothing_is_begun() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    for verb in [&["lab", "up"][..], &["demo", "--headless"]] {
        let mut hidden = Command::new("unshare");
        hidden.args(["-m", "sh", "-c", "mount -t tmpfs none /dev/net && exec \"$0\" \"$@\"", VMATRIX]);
        let args: Vec<&str> = verb.iter().copied().chain(["--store", store.to_str().unwrap()]).collect();
        check_of(hidden, &args, 5, &["/dev/net/tun", "hint: modprobe tun"]);
        assert!(!store.exists(), "images were begun");
    }
}

#[test]
fn machine_who_is_not_root_is_told_so_before_anything_is_begun() {
    let dir = tempfile::tempdir().unwrap();
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", VMATRIX]);
    let store = dir.path().join("store");
    check_of(nobody, &["demo", "--headless", "--store", store.to_str().unwrap()], 5, &["only root may", "hint: sudo"]);
    assert!(!store.exists(), "images were begun");
}

#[test]
fn machine_a_daemon_whose_address_is_taken_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let library = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/library/flash-crowd.toml");
    let fleet = Scenario::read(Path::new(library)).unwrap().fleet;
    let place = layout::Place { id: "0ca1".into(), folder: dir.path().into(), store: store.dir().into() };
    let specs = layout::daemons(&fleet, &place, &[]).unwrap();
    layout::write(&fleet, &place, &specs, "token").unwrap();
    for name in ["cpa", "origin", "store", "edge-tokyo", "vma-tokyo", "machine-tokyo-1"] {
        let spec = specs.iter().find(|s| s.name == name).unwrap();
        let config: toml::Table = spec.config.parse().unwrap();
        let taken = config["listen"].as_str().unwrap().to_owned();
        let address = taken.split(':').next().unwrap().to_owned();
        // Of its own: what a daemon does to filters and devices goes with it.
        let namespace = Namespace::named(&format!("vmx-0ca1-{name}"));
        namespace.remove().unwrap();
        namespace.create().unwrap();
        let refused = std::panic::catch_unwind(|| {
            ip_batch(Some(&namespace), &format!("addr add {address}/32 dev lo\n")).unwrap();
            namespace
                .run(|| {
                    let _holder = TcpListener::bind(&taken).unwrap();
                    check(&[spec.verb, "--config", spec.config_file().to_str().unwrap()], 1, &[&taken, "another"]);
                })
                .unwrap();
        });
        namespace.remove().unwrap();
        // A machine makes a folder for guests' memory before it listens.
        let _ = std::fs::remove_dir_all(place.memory());
        refused.unwrap_or_else(|_| panic!("{name}"));
    }
}
