//! Real processes, real faults: every page read is the page that was meant.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::{Guest, at_once, dir, map, source, tables};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmatrix_vma_image::memory::Map;
use vmatrix_vma_pager::{Class, Engine, Hydrate, Options, Status};

const PAGES: u32 = 4096;

/// Not a test of its own: what the others start.
#[test]
fn process_that_maps_memory() {
    common::process();
}

fn demand_only() -> Options {
    Options { hydrate: Hydrate { working_set: false, background: false, ..Hydrate::default() }, ..Options::default() }
}

async fn until(engine: &Engine, what: impl Fn(&Status) -> bool) -> Status {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let status = engine.status();
        if what(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "never came: {status:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_three_clones_read_every_page_right_and_each_pack_is_fetched_once() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let map = map(PAGES);
    let packs = map.packs().len() as u64;
    let (fetch, asked) = source(&map, Arc::new(|_, _| (Duration::from_micros(300), Ok(()))));
    let options = Options { release: false, ..demand_only() };
    let engine = Engine::start(&memory, map, options, fetch).unwrap();
    let mut guests: Vec<Guest> = (0..3).map(|_| Guest::start(&memory, "private", false)).collect();
    for (seed, guest) in guests.iter_mut().enumerate() {
        // The order comes first: the guest waits until somebody takes it over.
        guest.tell(&format!("all {seed}"));
        engine.adopt(guest.pid()).await.unwrap();
    }
    for guest in &mut guests {
        assert_eq!(guest.answer(), "0 wrong");
        assert!(guest.anonymous_kib() <= 4, "reading took {} KiB of its own", guest.anonymous_kib());
    }
    let status = engine.status();
    assert!(status.hydrated, "{status:?}");
    assert_eq!(asked.load(Ordering::Relaxed), packs, "{status:?}");
    let nonzero = (0..PAGES).filter(|p| !common::is_zero(*p)).count() as u64;
    let blocks = std::fs::metadata(&memory).unwrap().blocks();
    assert_eq!(blocks * 512, nonzero * 4096, "zero pages take memory");
    assert_eq!(guests[0].ask("write 0 64"), "written");
    assert_eq!(guests[0].ask("written 0 64"), "right");
    assert_eq!(guests[1].ask("all 9"), "0 wrong", "a clone sees what another wrote");
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_faults_of_the_kernel_wait_like_those_of_the_guest() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let map = map(PAGES);
    let (fetch, _) = source(&map, at_once());
    let engine = Engine::start(&memory, map, demand_only(), fetch).unwrap();
    let mut guest = Guest::start(&memory, "private", false);
    engine.adopt(guest.pid()).await.unwrap();
    for page in [0, 3, 30, 4095] {
        assert_eq!(guest.ask(&format!("kernel {page}")), "right", "page {page}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_pager_that_is_replaced_is_not_noticed() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let slow = || source(&map(PAGES), Arc::new(|_, _| (Duration::from_millis(3), Ok(()))));
    let mut guest = Guest::start(&memory_made(&memory), "private", false);
    guest.tell("all 7");
    let mut before = 0;
    for _ in 0..4 {
        let engine = Engine::start(&memory, map(PAGES), demand_only(), slow().0).unwrap();
        engine.adopt(guest.pid()).await.unwrap();
        let goal = before + 300;
        before = until(&engine, |s| s.pages_present >= goal).await.pages_present;
        // In the middle of faults: some are read and not answered.
    }
    let engine = Engine::start(&memory, map(PAGES), demand_only(), slow().0).unwrap();
    assert!(engine.status().pages_present >= before, "the next one begins anew");
    engine.adopt(guest.pid()).await.unwrap();
    assert_eq!(guest.answer(), "0 wrong");
}

fn memory_made(path: &std::path::Path) -> std::path::PathBuf {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(u64::from(PAGES) * 4096).unwrap();
    path.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_source_that_fails_is_said_and_a_source_that_comes_back_is_used() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let map = map(PAGES);
    let works = Arc::new(AtomicBool::new(false));
    let now = works.clone();
    let fate = move |_: &_, _| {
        let lost = || Err("the source is gone".to_owned());
        (Duration::ZERO, if now.load(Ordering::Relaxed) { Ok(()) } else { lost() })
    };
    let (fetch, _) = source(&map, Arc::new(fate));
    let options = Options { stuck_after: Duration::from_millis(300), ..demand_only() };
    let engine = Engine::start(&memory, map, options, fetch).unwrap();
    let mut guest = Guest::start(&memory, "private", false);
    engine.adopt(guest.pid()).await.unwrap();
    guest.tell("page 5");
    let status = until(&engine, |s| s.stuck.is_some()).await;
    let said = status.stuck.unwrap();
    assert!(said.contains("page 5") && said.contains("the source is gone"), "{said}");
    assert_eq!(guest.answer_within(Duration::from_millis(100)), None, "it went on without its page");
    works.store(true, Ordering::Relaxed);
    assert_eq!(guest.answer(), "right");
    until(&engine, |s| s.stuck.is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_miss_overtakes_what_is_fetched_ahead() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let (first, rest) = tables(PAGES);
    let whole = map(PAGES);
    let slow_ahead = |_: &_, class| (Duration::from_millis(if class == Class::Miss { 1 } else { 3000 }), Ok(()));
    let (fetch, _) = source(&whole, Arc::new(slow_ahead));
    let engine = Engine::start(&memory, Map::new(PAGES, first).unwrap(), Options::default(), fetch).unwrap();
    let mut guest = Guest::start(&memory, "private", false);
    engine.adopt(guest.pid()).await.unwrap();
    // In the working set (asked for already), and in the rest (not even known).
    let began = Instant::now();
    assert_eq!(guest.ask("page 48"), "right");
    assert!(began.elapsed() < Duration::from_secs(1), "a miss waited {:?}", began.elapsed());
    guest.tell("page 5");
    tokio::time::sleep(Duration::from_millis(50)).await;
    engine.complete(rest).await.unwrap();
    assert_eq!(guest.answer(), "right");
    assert!(began.elapsed() < Duration::from_secs(2), "a miss waited {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_each_page_that_nothing_foresaw_is_noted_and_its_neighbours_wait_for_no_fetch() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let map = map(PAGES);
    let (fetch, asked) = source(&map, at_once());
    let hydrate = Hydrate { background: false, notes: true, ..Hydrate::default() };
    let engine = Engine::start(&memory, map, Options { hydrate, ..Options::default() }, fetch).unwrap();
    let mut guest = Guest::start(&memory, "private", false);
    engine.adopt(guest.pid()).await.unwrap();
    until(&engine, |s| s.critical).await;
    let (set, read) = (asked.load(Ordering::Relaxed), [4, 80, 5, 48, 81, 4]);
    assert!(read.iter().all(|page| !common::is_zero(*page)), "a page of this test is zero");
    for page in read {
        assert_eq!(guest.ask(&format!("page {page}")), "right", "page {page}");
    }
    // Page 48 is in the working set.
    assert_eq!(engine.missed().await.unwrap(), [4, 80, 5, 81]);
    let status = until(&engine, |s| s.missed == 4).await;
    assert_eq!((asked.load(Ordering::Relaxed) - set, status.misses), (2, 2), "{status:?}");
    assert_eq!(guest.ask("all 3"), "0 wrong");
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_everything_arrives_by_itself_and_guests_are_let_go() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let (first, rest) = tables(PAGES);
    let (fetch, _) = source(&map(PAGES), at_once());
    let engine = Engine::start(&memory, Map::new(PAGES, first).unwrap(), Options::default(), fetch).unwrap();
    let mut guest = Guest::start(&memory, "private", false);
    engine.adopt(guest.pid()).await.unwrap();
    let status = until(&engine, |s| s.critical).await;
    assert!(!status.hydrated);
    engine.complete(rest).await.unwrap();
    until(&engine, |s| s.hydrated).await;
    let mut late = Guest::start(&memory, "private", false);
    engine.adopt(late.pid()).await.unwrap();
    engine.stop();
    assert_eq!(guest.ask("all 1"), "0 wrong");
    assert_eq!(late.ask("all 2"), "0 wrong");
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_singleton_keeps_what_it_wrote_and_its_writes_are_known() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let map = map(PAGES);
    let (fetch, _) = source(&map, Arc::new(|_, _| (Duration::from_micros(200), Ok(()))));
    let options = Options { shared: true, ..Options::default() };
    let engine = Engine::start(&memory, map, options, fetch).unwrap();
    let mut guest = Guest::start(&memory, "shared", true);
    guest.tell("page 5");
    engine.adopt(guest.pid()).await.unwrap();
    assert_eq!(guest.answer(), "right");
    let began = Instant::now();
    engine.protect(guest.pid()).unwrap();
    eprintln!("protect of {PAGES} pages: {:?}", began.elapsed());
    assert_eq!(guest.ask("write 20 60"), "written", "zero pages and others, present and not");
    assert_eq!(guest.ask("all 3"), "40 wrong", "only what it wrote differs");
    until(&engine, |s| s.hydrated).await;
    assert_eq!(engine.dirty(guest.pid()).unwrap(), vec![20..60]);
    assert_eq!(guest.ask("written 20 60"), "right", "something was written over it");
    engine.protect(guest.pid()).unwrap();
    assert_eq!(engine.dirty(guest.pid()).unwrap(), vec![]);
    assert_eq!(guest.ask("write 4000 4001"), "written");
    assert_eq!(engine.dirty(guest.pid()).unwrap(), vec![4000..4001]);
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_process_that_maps_it_otherwise_is_refused() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let (fetch, _) = source(&map(PAGES), at_once());
    let engine = Engine::start(&memory, map(PAGES), demand_only(), fetch).unwrap();
    let shares = Guest::start(&memory, "shared", false);
    let said = engine.adopt(shares.pid()).await.unwrap_err().to_string();
    assert!(said.contains("share=off"), "{said}");
    let clone = Guest::start(&memory, "private", false);
    engine.adopt(clone.pid()).await.unwrap();
    let said = engine.dirty(clone.pid()).unwrap_err().to_string();
    assert!(said.contains("not tracked"), "{said}");
    assert!(engine.adopt(i32::MAX).await.is_err(), "there is no such process");
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_recording_sees_every_page_in_the_order_it_was_touched() {
    let dir = dir();
    let (memory, whole) = (dir.path().join("memory"), dir.path().join("whole"));
    std::fs::write(&whole, (0..512).flat_map(common::content).collect::<Vec<u8>>()).unwrap();
    let engine = Engine::record(&memory, &whole, None).unwrap();
    let mut guest = Guest::start(&memory, "private", false);
    engine.adopt(guest.pid()).await.unwrap();
    for page in [400, 3, 4, 25, 3, 5] {
        assert_eq!(guest.ask(&format!("page {page}")), "right");
    }
    assert_eq!(engine.recorded().await.unwrap(), [400, 3, 4, 25, 5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_the_next_pager_of_a_singleton_keeps_what_it_wrote() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let start = || {
        let (fetch, _) = source(&map(PAGES), at_once());
        let options = Options { shared: true, ..demand_only() };
        Engine::start(&memory, map(PAGES), options, fetch).unwrap()
    };
    let engine = start();
    let mut guest = Guest::start(&memory, "shared", true);
    engine.adopt(guest.pid()).await.unwrap();
    engine.protect(guest.pid()).unwrap();
    // Of pages 0 to 15 one pack is here; of 24 to 47 none, they are zeros.
    assert_eq!(guest.ask("write 10 30"), "written");
    drop(engine);
    guest.tell("all 5");
    let engine = start();
    engine.adopt(guest.pid()).await.unwrap();
    assert_eq!(guest.answer(), "20 wrong", "what it wrote, and nothing else");
    assert_eq!(guest.ask("written 10 30"), "right");
    assert_eq!(engine.dirty(guest.pid()).unwrap(), vec![10..30], "the kernel knows, whoever asks");
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_page_that_was_given_back_comes_again() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let (fetch, asked) = source(&map(PAGES), at_once());
    let engine = Engine::start(&memory, map(PAGES), Options { shared: true, ..demand_only() }, fetch).unwrap();
    let mut guest = Guest::start(&memory, "shared", false);
    engine.adopt(guest.pid()).await.unwrap();
    assert_eq!(guest.ask("write 5 7"), "written");
    assert_eq!(guest.ask("punch 5"), "punched");
    assert_eq!(guest.ask("page 5"), "right", "as it was in the image");
    assert_eq!(guest.ask("written 6 7"), "right", "its neighbour is as the guest left it");
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_memory_that_is_full_is_said_and_goes_on_when_there_is_room() {
    let dir = dir();
    let mounted = Mounted::new(dir.path(), "2M");
    let memory = dir.path().join("memory");
    let (fetch, _) = source(&map(PAGES), at_once());
    let options = Options { stuck_after: Duration::from_millis(300), ..demand_only() };
    let engine = Engine::start(&memory, map(PAGES), options, fetch).unwrap();
    let mut guest = Guest::start(&memory, "private", false);
    engine.adopt(guest.pid()).await.unwrap();
    guest.tell("all 1");
    let said = until(&engine, |s| s.stuck.is_some()).await.stuck.unwrap();
    assert!(said.contains("put a page into"), "{said}");
    mounted.grow("64M");
    assert_eq!(guest.answer(), "0 wrong");
}

/// A small tmpfs over a folder, gone with the test.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn new(at: &std::path::Path, size: &str) -> Mounted {
        let options = format!("size={size}");
        nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), nix::mount::MsFlags::empty(), Some(options.as_str()))
            .expect("needs root to mount");
        Mounted(at.to_owned())
    }

    fn grow(&self, size: &str) {
        let options = format!("size={size}");
        let none: Option<&str> = None;
        nix::mount::mount(none, &self.0, none, nix::mount::MsFlags::MS_REMOUNT, Some(options.as_str())).unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// CPU time of this process's threads of that name, µs.
fn cpu_us(thread: &str) -> u64 {
    let of = |path: std::path::PathBuf| {
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        let spent = std::fs::read_to_string(path.join("schedstat")).ok()?;
        (name.trim() == thread).then(|| spent.split(' ').next().unwrap().parse::<u64>().unwrap() / 1000)
    };
    std::fs::read_dir("/proc/self/task").unwrap().filter_map(|e| of(e.unwrap().path())).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_fault_costs_the_pager_microseconds() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let map = map(32768);
    let (fetch, _) = source(&map, at_once());
    let engine = Engine::start(&memory, map, demand_only(), fetch).unwrap();
    let mut guest = Guest::start(&memory, "private", false);
    engine.adopt(guest.pid()).await.unwrap();
    let (before, began) = (cpu_us("pager"), Instant::now());
    assert_eq!(guest.ask("touch 0"), "touched");
    let (took, status) = (began.elapsed(), engine.status());
    let (faults, spent) = (status.misses + status.zeros, cpu_us("pager") - before);
    eprintln!(
        "{faults} faults for {} pages in {took:?}: {} faults/s, {} µs of the pager's CPU each",
        status.pages_present,
        u128::from(faults) * 1_000_000 / took.as_micros(),
        spent / faults
    );
    assert!(spent / faults < 1000, "{} µs a fault", spent / faults);
}
