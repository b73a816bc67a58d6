//! Two clones of one real image: built, verified, staged, resumed side by side with the same address.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::{kept, resume, stage};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vmatrix_vma_build::build;
use vmatrix_vma_image::{Store, guest, health, machine, sign};
use vmatrix_vma_testing::{Cell, Process, get};

/// A guest that breaks out finds itself nobody, for ever, and may not read the image's files.
fn is_powerless(process: &Process) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.0.id())).unwrap();
    let has = |key: &str, value: &str| {
        let line = status.lines().find(|l| l.starts_with(key)).unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        assert!(!words.is_empty() && words.iter().all(|w| *w == value), "{line} is not {value}");
    };
    let nobody = nix::unistd::User::from_name(machine::CLONE_USER).unwrap().expect("needs the user nobody");
    has("Uid:", &nobody.uid.to_string());
    has("Gid:", &nobody.gid.to_string());
    has("Groups:", &nobody.gid.to_string());
    has("CapPrm:", "0000000000000000");
    has("CapEff:", "0000000000000000");
    has("NoNewPrivs:", "1");
}

#[tokio::test]
async fn machine_two_clones_of_one_image_draw_different_numbers_at_the_right_time() {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/guests/tiny.toml");
    let kept = kept();
    let first = build::build(&recipe, &kept, &build::Options::default()).await.unwrap();
    let again = build::build(&recipe, &kept, &build::Options::default()).await.unwrap();
    assert!(again.cached && again.digest == first.digest, "the same recipe was built twice");
    assert!(again.took < Duration::from_secs(1), "finding the image took {:?}", again.took);

    let store = Store::read(&kept).unwrap();
    let signed = store.image("tiny").unwrap().unwrap();
    let (manifest, digest) = sign::verify(&signed, &[sign::public(&store).unwrap()]).unwrap();
    assert_eq!(digest, first.digest);
    machine::check_host(&manifest, &machine::host().unwrap()).unwrap();

    let dir = tempfile::Builder::new().prefix("vmx").tempdir().unwrap();
    let files = stage(&manifest, &store, dir.path());
    let address = manifest.guest.address;
    let (one, two) = (Cell::new("one", manifest.guest.gateway), Cell::new("two", manifest.guest.gateway));
    let mut numbers = Vec::new();
    for (cell, name) in [(&one, "one"), (&two, "two")] {
        let (process, agent) = resume(&manifest, &files, cell, dir.path(), name).await;
        is_powerless(&process);
        let awake = guest::awaken(&agent).await.unwrap();
        let apart = awake.host_unix_us.abs_diff(awake.clock_unix_us);
        assert!(apart < 50_000, "the clock of {name} is {apart} µs off");
        let took = health::ask(&cell.path(), address, &manifest.guest.health, Duration::from_secs(20)).await.unwrap();
        eprintln!("{name}: first answer in {took:?}, clock {apart} µs off");
        let text = get(&cell.path(), address, "/cgi-bin/random");
        let (random, time) = text.trim().split_once('\n').expect("the CGI answers two lines");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(now.abs_diff(time.trim().parse().unwrap()) <= 2, "{name} says {time}, it is {now}");
        assert_eq!(random.len(), 32);
        numbers.push((random.to_owned(), process));
    }
    assert_ne!(numbers[0].0, numbers[1].0, "two clones drew the same random bytes");
}

#[tokio::test]
async fn machine_a_package_that_does_not_exist_is_named_and_nothing_is_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("r.toml");
    let text = "name = \"r\"\nabout = \"x\"\npackages = [\"no-such-package-vmx\"]\nmemory_mib = 128\nports = [80]\n\
                start = [\"true\"]\n[health]\nport = 80\npath = \"/\"\nstatus = 200\n";
    std::fs::write(&recipe, text).unwrap();
    let store = dir.path().join("store");
    let error = build::build(&recipe, &store, &build::Options::default()).await.unwrap_err().to_string();
    assert!(error.contains("no-such-package-vmx") && error.contains("apt-cache search"), "{error}");
    let names: Vec<_> = std::fs::read_dir(&store).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!names.iter().any(|n| n.to_string_lossy().contains("build")), "{names:?}");
    assert!(Store::open(&store).unwrap().names().unwrap().is_empty());
}
