//! A singleton's memory over pagers that are killed: what it wrote is there, what it did not write is the image's.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::{Guest, at_once, dir, map, source};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use vmatrix_vma_pager::{Engine, Hydrate, Options};
use vmatrix_vma_testing::Process;

const PAGES: u32 = 8192;

/// Not a test of its own: what the others start.
#[test]
fn process_that_maps_memory() {
    common::process();
}

/// Not a test of its own: a pager of a singleton, which brings the rest in the background, and is killed.
#[test]
fn process_that_serves_memory() {
    let Some(memory) = std::env::var_os("VMATRIX_TEST_MEMORY").map(PathBuf::from) else { return };
    let pid: i32 = std::env::var("VMATRIX_TEST_GUEST").unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let engine = start(&memory, Duration::from_millis(4));
        engine.adopt(pid).await.unwrap();
        println!("\nserves");
        let input = || std::io::stdin().read_to_end(&mut Vec::new());
        let _ = tokio::task::spawn_blocking(input).await;
        std::process::exit(0);
    });
}

fn start(memory: &Path, late: Duration) -> Engine {
    let (fetch, _) = source(&map(PAGES), Arc::new(move |_, _| (late, Ok(()))));
    Engine::start(memory, map(PAGES), Options { shared: true, ..Options::default() }, fetch).unwrap()
}

/// Starts a pager and waits until it serves.
fn pager(memory: &Path, guest: i32) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "process_that_serves_memory", "--nocapture", "--test-threads=1"]);
    command.env("VMATRIX_TEST_MEMORY", memory).env("VMATRIX_TEST_GUEST", guest.to_string());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "serves"), "the pager does not serve");
    Process(child)
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_pagers_that_are_killed_in_the_middle_leave_memory_as_it_must_be_and_every_write_known() {
    let dir = dir();
    let memory = dir.path().join("memory");
    std::fs::File::create(&memory).unwrap().set_len(u64::from(PAGES) * 4096).unwrap();
    let mut guest = Guest::start(&memory, "shared", true);
    // The first pager, which marks every page clean before the guest runs.
    let engine = start(&memory, Duration::from_millis(4));
    engine.adopt(guest.pid()).await.unwrap();
    engine.protect(guest.pid()).unwrap();
    drop(engine);
    let mut written = BTreeSet::new();
    let mut partly = 0;
    for round in 0..12u32 {
        let (from, to) = (round * 600 + 100, round * 600 + 400);
        guest.tell(&format!("write {from} {to}"));
        let mut answer = None;
        while answer.is_none() {
            let serving = pager(&memory, guest.pid());
            // It is killed with faults read and not answered, and pages on their way.
            answer = guest.answer_within(Duration::from_millis(u64::from(15 + round * 7)));
            let present = blocks(&memory);
            partly += u32::from(present > 0 && present < u64::from(PAGES));
            drop(serving);
        }
        assert_eq!(answer.as_deref(), Some("written"));
        written.extend(from..to);
    }
    assert!(partly >= 12, "{partly} pagers were killed in the middle");
    // Found without a guest that runs, and by a pager that saw none of it.
    let engine = start(&memory, Duration::ZERO);
    engine.adopt(guest.pid()).await.unwrap();
    let dirty: BTreeSet<u32> = engine.dirty(guest.pid()).unwrap().into_iter().flatten().collect();
    assert!(dirty == written, "{} pages are known to be written, {} were", dirty.len(), written.len());
    while !engine.status().hydrated {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for round in 0..12 {
        let (from, to) = (round * 600 + 100, round * 600 + 400);
        assert_eq!(guest.ask(&format!("written {from} {to}")), "right", "a pager wrote over what the guest wrote");
    }
    // Some pages held the byte that was written.
    let changed: BTreeSet<u32> = written.iter().copied().filter(|p| common::content(*p)[100] != 0xAB).collect();
    assert_eq!(guest.ask("all 3"), format!("{} wrong", changed.len()), "pages that nobody wrote are others");
    let again: BTreeSet<u32> = engine.dirty(guest.pid()).unwrap().into_iter().flatten().collect();
    assert!(again == written, "reading, or what the pager put in, counts as writing");
    let file = std::fs::read(&memory).unwrap();
    let wrong = (0..PAGES).filter(|p| file[*p as usize * 4096..][..4096] != common::content(*p));
    assert!(wrong.collect::<BTreeSet<u32>>() == changed, "the file, of which a snapshot is made, is another");
}

/// Pages that the file has.
fn blocks(memory: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(memory).unwrap()) / 8
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_pages_that_the_kernel_took_away_are_known_as_they_were() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let engine = start(&memory, Duration::ZERO);
    let mut guest = Guest::start(&memory, "shared", true);
    engine.adopt(guest.pid()).await.unwrap();
    engine.protect(guest.pid()).unwrap();
    assert_eq!(guest.ask("write 100 200"), "written");
    assert_eq!(guest.ask("touch 4000"), "touched", "pages that are read, all over");
    assert_eq!(guest.ask("forget 0 8192"), "forgotten");
    let is_written = |engine: &Engine, pages: std::ops::Range<u32>| {
        let dirty: BTreeSet<u32> = engine.dirty(guest.pid()).unwrap().into_iter().flatten().collect();
        assert!(pages.clone().all(|page| dirty.contains(&page)), "a page that was written and taken is lost");
        assert_eq!(dirty.len(), pages.len(), "pages that were taken count as written");
    };
    is_written(&engine, 100..200);
    drop(engine);
    // The next pager adopts; whoever marked all pages clean again would lose them.
    let engine = start(&memory, Duration::ZERO);
    engine.adopt(guest.pid()).await.unwrap();
    is_written(&engine, 100..200);
    assert_eq!(guest.ask("written 100 200"), "right");
    assert_eq!(guest.ask("write 190 210"), "written");
    let dirty: Vec<u32> = engine.dirty(guest.pid()).unwrap().into_iter().flatten().collect();
    assert_eq!(dirty, (100..210).collect::<Vec<u32>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_what_was_written_before_the_first_mark_is_not_forgotten() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let (fetch, _) = source(&map(PAGES), at_once());
    let hydrate = Hydrate { working_set: false, background: false, ..Hydrate::default() };
    let options = Options { shared: true, hydrate, ..Options::default() };
    let engine = Engine::start(&memory, map(PAGES), options, fetch).unwrap();
    let mut guest = Guest::start(&memory, "shared", true);
    guest.tell("write 40 50");
    engine.adopt(guest.pid()).await.unwrap();
    assert_eq!(guest.answer(), "written");
    // Before anything was marked every page that is there counts: more is shipped, nothing is lost.
    let dirty: BTreeSet<u32> = engine.dirty(guest.pid()).unwrap().into_iter().flatten().collect();
    assert!((40..50).all(|page| dirty.contains(&page)));
}
