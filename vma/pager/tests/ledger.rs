//! A real guest that writes to its memory and its disk: both go on, over pagers that are killed and over snapshots.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::dir;
use common::place::Place;
use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmatrix_model::Digest;
use vmatrix_model::manifest::Manifest;
use vmatrix_vma_build::snapshot::{Child, Data, order, snapshot};
use vmatrix_vma_image::chunks::{self, Need};
use vmatrix_vma_image::machine::{self, Run, Start};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::{Store, guest, health, inspect, memory, netns, sign, store};
use vmatrix_vma_pager::{Control, preload};
use vmatrix_vma_testing::{Cell, Process, Small, get};

/// Not a test of its own: the pager's process.
#[test]
fn process_that_pages() {
    common::place::process();
}

/// A store of this test's own with the image, which was built beforehand or is built now.
async fn own(dir: &Path) -> Store {
    let built = std::env::var_os("VMATRIX_STORE").map(PathBuf::from);
    let from = match built.filter(|store| inspect::inspect(store, "ledger", &[]).is_ok()) {
        Some(store) => store,
        None => {
            let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("store");
            let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/guests/ledger.toml");
            vmatrix_vma_build::build(&recipe, &kept, &vmatrix_vma_build::Options::default()).await.unwrap();
            kept
        }
    };
    let manifest = inspect::inspect(&from, "ledger", &[]).unwrap().manifest;
    let (from, to) = (Store::read(from).unwrap(), Store::open(dir.join("store")).unwrap());
    store::copy_image("ledger", &from, &to, &|_| {}).unwrap();
    if let Some(key) = inspect::owner_key(&manifest, &from).unwrap() {
        key.write(inspect::key_path(to.dir(), &key.id())).unwrap();
    }
    // As a machine does that trusts whoever built it.
    to.put_image("ledger", &sign::sign(&to, &manifest).unwrap()).unwrap();
    to
}

/// KiB of the memory file that a process has in its page table.
fn mapped_kib(pid: i32, memory: &Path) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let path = memory.display().to_string();
    let line = text.lines().skip_while(|l| !l.ends_with(&path)).find(|l| l.starts_with("Rss:"));
    line.expect("QEMU does not map its memory").split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A resumed singleton.
struct Running {
    process: Process,
    qmp: Qmp,
    agent: PathBuf,
}

async fn resume(place: &Place, cell: &Cell, manifest: &Manifest, control: &mut Control) -> Running {
    let tap = netns::open_tap(&cell.path(), "tap0").expect("needs /dev/net/tun");
    netns::ip_batch(Some(&cell.0), &["link set tap0 master br0 up".into()]).unwrap();
    let run = Run {
        name: "ledger".into(),
        qmp: place.path("qmp"),
        guest_agent: place.path("agent"),
        tap_fd: tap.as_raw_fd(),
        console: None,
        start: Start::Shared,
    };
    let memory = place.path("memory");
    let arguments = machine::lazy_arguments(&manifest.machine, &memory, &place.path("s"), &run);
    let mut command = machine::command(&arguments, &tap);
    preload(&mut command, &memory, true).unwrap();
    let process = Process(command.spawn().unwrap());
    control.adopt(process.pid()).await.unwrap();
    let mut qmp = Qmp::connect(&run.qmp).await.unwrap();
    assert_eq!(mapped_kib(process.pid(), &memory), 0, "QEMU has touched memory that is not marked clean yet");
    control.protect(process.pid()).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !control.status().await.unwrap().critical {
        assert!(Instant::now() < deadline, "what is needed first does not come: {}", place.said());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let (need, key) =
        (Need::blob(&manifest.device, manifest.seal.is_some()), inspect::owner_key(manifest, &place.store).unwrap());
    let device = chunks::open(&place.store.chunk(&need.digest).unwrap(), &need, key.as_ref()).unwrap();
    std::fs::write(place.path("device"), device).unwrap();
    qmp.load_state(&place.path("device")).await.unwrap();
    qmp.cont().await.unwrap();
    Running { process, qmp, agent: run.guest_agent }
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_singleton_goes_on_with_its_memory_and_its_disk_from_each_snapshot() {
    let dir = dir();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let store = own(dir.path()).await;
    let mut seen = inspect::inspect(store.dir(), "ledger", &[]).unwrap();
    let (cell, to) = (Cell::new("ledger", seen.manifest.guest.gateway), seen.manifest.guest.address);
    let (mut lines, mut new_bytes) = (None, Vec::new());
    for round in 0..3 {
        let manifest = seen.manifest.clone();
        let place = Place::new(dir.path(), &format!("at{round}"), &store, "ledger", true);
        let (mut pager, mut control) = place.pager().await;
        let mut running = resume(&place, &cell, &manifest, &mut control).await;
        let pid = running.process.pid();
        match round {
            0 => drop(guest::awaken(&running.agent).await.unwrap()),
            1 => drop(guest::awaken_same(&running.agent).await.unwrap()),
            // Nobody tells it that it slept.
            _ => {}
        };
        health::ask(&cell.path(), to, &manifest.guest.health, Duration::from_secs(20)).await.unwrap();
        let before = get(&cell.path(), to, "/cgi-bin/book");
        if let Some(lines) = &lines {
            assert_eq!(&before, lines, "the book is another than it was when the guest was saved");
        }
        for n in 0..6 {
            // In the middle of a line the pager is killed: memory, and the disk, wait for the next one.
            let (netns, line) = (cell.path(), format!("/cgi-bin/append?round-{round}-{n}"));
            let asked = tokio::task::spawn_blocking(move || get(&netns, to, &line));
            if n % 3 == 1 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                drop(pager);
                (pager, control) = place.pager().await;
                control.adopt(pid).await.unwrap();
            }
            let number: u32 = asked.await.unwrap().parse().expect("a line was not written");
            assert!(number > 0);
        }
        lines = Some(get(&cell.path(), to, "/cgi-bin/book"));
        assert_ne!(lines.as_ref(), Some(&before));

        running.qmp.execute("stop", serde_json::json!({})).await.unwrap();
        running.qmp.save_state(&place.path("device.next")).await.unwrap();
        let changed: BTreeSet<u32> = control.dirty(pid).await.unwrap().into_iter().flatten().collect();
        let written = control.written().await.unwrap();
        assert!(!written.is_empty() && written.len() < 40, "{written:?}");
        let (key, map) = (inspect::owner_key(&manifest, &store).unwrap(), memory::map(&manifest, &store).unwrap());
        let child = Child {
            name: "ledger",
            memory: &place.path("memory"),
            device: &place.path("device.next"),
            parent: (&manifest, seen.digest),
            map: &map,
            unchanged: &|page| !changed.contains(&page),
            order: &order(&map),
            key: key.as_ref(),
            data: Some(Data { file: &place.disks().file("data"), written: &written }),
        };
        let (next, digest) = snapshot(&store, &child).unwrap();
        new_bytes.push((changed.len(), written.len(), new_chunks(&manifest, &next, &store)));
        running.qmp.quit().await.unwrap();
        drop((running.process, pager));
        seen = inspect::inspect(store.dir(), "ledger", &[]).unwrap();
        assert_eq!((seen.digest, seen.manifest.epoch), (digest, round + 1));
        inspect::verify(store.dir(), "ledger", &[]).unwrap();
    }
    eprintln!("pages and chunks written, bytes of new chunks of data: {new_bytes:?}");
}

/// Stored bytes of the chunks of data that the parent does not have.
fn new_chunks(parent: &Manifest, child: &Manifest, store: &Store) -> u64 {
    let table = |m: &Manifest| -> BTreeSet<(Digest, u64)> {
        let part = m.part(vmatrix_model::manifest::PartKind::Data).unwrap();
        chunks::table(part, store).unwrap().into_iter().flatten().map(|c| (c.digest, c.stored.0)).collect()
    };
    table(child).difference(&table(parent)).map(|(_, stored)| stored).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_guest_for_whose_writes_there_is_no_room_stands_still_and_has_lost_nothing_when_there_is() {
    let dir = dir();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let store = own(dir.path()).await;
    let manifest = inspect::inspect(store.dir(), "ledger", &[]).unwrap().manifest;
    let (cell, to) = (Cell::new("full", manifest.guest.gateway), manifest.guest.address);
    let place = Place::new(dir.path(), "at", &store, "ledger", true);
    let small = Small::new(place.disks().dir, "1m");
    let (_pager, mut control) = place.pager().await;
    let mut running = resume(&place, &cell, &manifest, &mut control).await;
    guest::awaken(&running.agent).await.unwrap();
    health::ask(&cell.path(), to, &manifest.guest.health, Duration::from_secs(20)).await.unwrap();
    let netns = cell.path();
    let writes = tokio::task::spawn_blocking(move || {
        let append = |n: u32| get(&netns, to, &format!("/cgi-bin/append?line-{n}")).parse::<u32>().unwrap();
        let first = append(0);
        (first, (1..80).map(append).collect::<Vec<u32>>())
    });
    let deadline = Instant::now() + Duration::from_secs(30);
    let said = loop {
        if let Some(said) = control.status().await.unwrap().full {
            break said;
        }
        assert!(!writes.is_finished() && Instant::now() < deadline, "it never got full");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(said.contains("no room for what the guest writes"), "{said}");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let status = running.qmp.execute("query-status", serde_json::json!({})).await.unwrap();
    assert_eq!(status["status"], "io-error", "the guest goes on with a disk that takes nothing");
    assert_eq!(control.status().await.unwrap().stuck, None, "it would be ended, and what it wrote be lost");
    small.resize("64m");
    running.qmp.cont().await.unwrap();
    let (first, later) = writes.await.unwrap();
    assert_eq!(later, (first + 1..first + 80).collect::<Vec<u32>>(), "a line was lost");
    assert_eq!(control.status().await.unwrap().full, None);
    running.qmp.quit().await.unwrap();
}
