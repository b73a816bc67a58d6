//! The guest that writes: what it has answered is on its disk, and a clone of it writes elsewhere.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::{image, resume, resume_as, stage};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use vmatrix_model::Digest;
use vmatrix_model::manifest::PartKind;
use vmatrix_vma_image::machine::Start;
use vmatrix_vma_image::{guest, health, netns};
use vmatrix_vma_testing::{Cell, get};

/// The lines of the book on a disk that nobody has mounted.
fn book(disk: &Path) -> Vec<String> {
    let output = Command::new("debugfs").args(["-R", "cat /book"]).arg(disk).output().expect("needs e2fsprogs");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machine_a_line_that_was_answered_is_on_the_disk_when_the_guest_is_killed() {
    let (store, manifest) = image("ledger").await;
    let dir = tempfile::Builder::new().prefix("vmx").tempdir_in("/dev/shm").unwrap();
    let files = stage(&manifest, &store, dir.path());
    let built = book(&files.data);
    assert!(built.len() >= 20, "the lines that it was warmed with are not on the disk: {built:?}");
    let cell = Cell::new("ledger", manifest.guest.gateway);
    let (mut process, agent) = resume_as(Start::Shared, &manifest, &files, &cell, dir.path(), "one").await;
    guest::awaken_same(&agent).await.unwrap();
    let to = manifest.guest.address;
    health::ask(&cell.path(), to, &manifest.guest.health, Duration::from_secs(20)).await.unwrap();
    for n in 1..=5 {
        let answered = get(&cell.path(), to, &format!("/cgi-bin/append?line-{n}"));
        assert_eq!(answered.trim(), (built.len() + n).to_string());
    }
    process.0.kill().unwrap();
    process.0.wait().unwrap();
    // What a guest that starts from it would do first.
    let checked = Command::new("e2fsck").args(["-f", "-y"]).arg(&files.data).output().expect("needs e2fsprogs");
    assert!(checked.status.code().is_some_and(|c| c <= 1), "{}", String::from_utf8_lossy(&checked.stdout));
    let lines = book(&files.data);
    let expected: Vec<String> = built.into_iter().chain((1..=5).map(|n| format!("line-{n}"))).collect();
    assert_eq!(lines, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machine_a_clone_of_a_guest_that_writes_leaves_the_images_disk_as_it_is() {
    let (store, manifest) = image("ledger").await;
    assert_eq!(manifest.part(PartKind::Data).unwrap().chunk.0, 64 << 10);
    let dir = tempfile::Builder::new().prefix("vmx").tempdir_in("/dev/shm").unwrap();
    let files = stage(&manifest, &store, dir.path());
    let digest = || Digest::of(&std::fs::read(&files.data).unwrap());
    let (before, built) = (digest(), book(&files.data));
    let to = manifest.guest.address;
    for name in ["one", "two"] {
        let cell = Cell::new(&format!("ledger{name}"), manifest.guest.gateway);
        let (_process, agent) = resume(&manifest, &files, &cell, dir.path(), name).await;
        guest::awaken(&agent).await.unwrap();
        health::ask(&cell.path(), to, &manifest.guest.health, Duration::from_secs(20)).await.unwrap();
        let answered = get(&cell.path(), to, &format!("/cgi-bin/append?{name}"));
        assert_eq!(answered.trim(), (built.len() + 1).to_string(), "{name} sees another's lines");
        let seen = get(&cell.path(), to, "/cgi-bin/book");
        let length: usize = built.iter().map(|l| l.len() + 1).sum::<usize>() + name.len() + 1;
        assert_eq!(seen.lines().nth(1), Some(length.to_string().as_str()), "{seen}");
        assert_eq!(seen.lines().next().map(str::len), Some(64));
        count(&cell, to);
    }
    assert_eq!(digest(), before, "a clone wrote to the image's disk");
}

/// Every connection is counted from one.
fn count(cell: &Cell, to: std::net::Ipv4Addr) {
    let connect = || netns::enter(&cell.path(), || TcpStream::connect((to, 7000)).unwrap()).unwrap();
    let mut both = [connect(), connect()].map(|stream| {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        BufReader::new(stream)
    });
    for n in 1..=3 {
        for (stream, word) in both.iter_mut().zip(["a b", "c"]) {
            stream.get_mut().write_all(format!("{word}\n").as_bytes()).unwrap();
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            assert_eq!(line, format!("{n} {word}\n"));
        }
    }
}
