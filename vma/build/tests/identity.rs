//! What two clones of one image may not have in common: machine id, SSH host keys, keys of TLS tickets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::{built, resume, stage};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vmatrix_vma_image::{guest, health, netns};
use vmatrix_vma_testing::{Cell, Process};

/// What a program says inside a cell.
fn said(cell: &Cell, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let output = netns::enter(&cell.path(), || command.output()).unwrap();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}; install it"));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Whether a TLS session was taken up again; a new one is kept in `file`.
fn reused(cell: &Cell, to: Ipv4Addr, file: &Path, again: bool) -> bool {
    let (to, file) = (format!("{to}:443"), file.display().to_string());
    let session = if again { "-sess_in" } else { "-sess_out" };
    let text = said(cell, "openssl", &["s_client", "-connect", &to, "-tls1_2", session, &file]);
    assert!(text.contains("Cipher is"), "no TLS connection: {text}");
    text.contains("Reused,")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machine_two_clones_share_no_machine_id_no_host_key_and_no_tls_ticket() {
    let (store, manifest) = built("tests/guests/identity.toml").await;
    let dir = tempfile::Builder::new().prefix("vmx").tempdir().unwrap();
    let files = stage(&manifest, &store, dir.path());
    let to = manifest.guest.address;
    let cells = [Cell::new("ida", manifest.guest.gateway), Cell::new("idb", manifest.guest.gateway)];
    let mut running: Vec<Process> = Vec::new();
    for (cell, name) in cells.iter().zip(["one", "two"]) {
        let (process, agent) = resume(&manifest, &files, cell, dir.path(), name).await;
        running.push(process);
        let began = Instant::now();
        let awake = guest::awaken(&agent).await.unwrap();
        let apart = awake.host_unix_us.abs_diff(awake.clock_unix_us);
        eprintln!("{name}: awake and somebody of its own in {:?}, clock {apart} µs off", began.elapsed());
        assert!(apart < 50_000, "the clock of {name} is {apart} µs off");
        health::ask(&cell.path(), to, &manifest.guest.health, Duration::from_secs(20)).await.unwrap();
    }
    let differ = |what: &str, program: &str, arguments: &[&str]| {
        let [one, two] = [&cells[0], &cells[1]].map(|cell| said(cell, program, arguments));
        assert!(one.len() > 20, "{what}: {program} says {one:?}");
        assert_ne!(one, two, "two clones have the same {what}");
        one
    };
    let id = differ("machine id", "curl", &["-sS", &format!("http://{to}/machine-id")]);
    assert!(!id.contains("0123456789abcdef"), "it is the image's: {id}");
    differ("SSH host key", "ssh-keyscan", &["-t", "ed25519", &to.to_string()]);
    let ticket = dir.path().join("ticket");
    assert!(!reused(&cells[0], to, &ticket, false));
    assert!(reused(&cells[0], to, &ticket, true), "a clone does not take its own ticket: this test shows nothing");
    assert!(!reused(&cells[1], to, &ticket, true), "a clone takes the ticket of another");
}

#[tokio::test]
async fn machine_a_guest_that_only_moved_stays_who_it_was() {
    let (store, manifest) = built("tests/guests/identity.toml").await;
    let dir = tempfile::Builder::new().prefix("vmx").tempdir().unwrap();
    let files = stage(&manifest, &store, dir.path());
    let cell = Cell::new("idc", manifest.guest.gateway);
    let (_process, agent) = resume(&manifest, &files, &cell, dir.path(), "moved").await;
    guest::awaken_same(&agent).await.unwrap();
    health::ask(&cell.path(), manifest.guest.address, &manifest.guest.health, Duration::from_secs(20)).await.unwrap();
    let id = said(&cell, "curl", &["-sS", &format!("http://{}/machine-id", manifest.guest.address)]);
    assert_eq!(id.trim(), "0123456789abcdef".repeat(2));
}

/// The 32 bytes that a TLS server draws for a connection: behind the header and the version of its first message.
fn server_random(cell: &Cell, to: Ipv4Addr) -> Vec<String> {
    let text = said(cell, "openssl", &["s_client", "-connect", &format!("{to}:443"), "-tls1_2", "-msg"]);
    let hello = text.split("ServerHello").nth(1).unwrap_or_else(|| panic!("no ServerHello: {text}"));
    let bytes = hello.lines().skip(1).take_while(|l| l.starts_with("    ")).flat_map(str::split_whitespace);
    bytes.map(str::to_owned).skip(6).take(32).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machine_a_generator_in_a_programs_own_memory_is_seeded_anew_without_any_hook() {
    let (store, manifest) = built("tests/guests/identity.toml").await;
    let dir = tempfile::Builder::new().prefix("vmx").tempdir().unwrap();
    let files = stage(&manifest, &store, dir.path());
    let mut drawn = Vec::new();
    for name in ["one", "two"] {
        let cell = Cell::new(&format!("idr{name}"), manifest.guest.gateway);
        let (_process, agent) = resume(&manifest, &files, &cell, dir.path(), name).await;
        // No hook runs: the workers are those of the image.
        guest::awaken_same(&agent).await.unwrap();
        let random = server_random(&cell, manifest.guest.address);
        assert_eq!(random.len(), 32, "{random:?}");
        drawn.push(random);
    }
    assert_ne!(drawn[0], drawn[1], "two clones answered TLS with the same random bytes");
}
