//! A singleton that ran on from its image ─▶ a child image of what changed, which resumes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::{image, resume, stage};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vmatrix_model::Digest;
use vmatrix_model::manifest::Manifest;
use vmatrix_vma_build::snapshot::{Child, order, snapshot};
use vmatrix_vma_image::chunks::{self, Need};
use vmatrix_vma_image::machine::{self, Files, Run, Start};
use vmatrix_vma_image::memory::{self, Map};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::store::copy_image;
use vmatrix_vma_image::{Store, guest, health, inspect, netns};
use vmatrix_vma_pager::{Engine, Fetch, Options, preload};
use vmatrix_vma_testing::{Cell, Process};

const REQUESTS: u32 = 200;

fn fetch(store: &Store, key: &OwnerKey) -> Fetch {
    let (store, key) = (store.clone(), key.clone());
    Arc::new(move |need: Need, _| {
        let (store, key) = (store.clone(), key.clone());
        Box::pin(async move {
            let stored = store.chunk(&need.digest).map_err(|e| e.to_string())?;
            chunks::open(&stored, &need, Some(&key)).map_err(|e| e.to_string())
        })
    })
}

/// Resumes the one and only: its memory file is written to, and written pages are noted.
async fn singleton(manifest: &Manifest, cell: &Cell, files: &Files, run: &mut Run, engine: &Engine) -> (Process, Qmp) {
    let tap = netns::open_tap(&cell.path(), "tap0").expect("needs /dev/net/tun");
    netns::ip_batch(Some(&cell.0), &["link set tap0 master br0 up".into()]).unwrap();
    run.tap_fd = tap.as_raw_fd();
    let mut command = machine::command(&machine::arguments(manifest, files, run), &tap);
    preload(&mut command, &files.memory, true).unwrap();
    let process = Process(command.spawn().unwrap());
    let pid = process.0.id() as i32;
    engine.adopt(pid).await.unwrap();
    let mut qmp = Qmp::connect(&run.qmp).await.unwrap();
    engine.protect(pid).unwrap();
    qmp.load_state(&files.device).await.unwrap();
    qmp.cont().await.unwrap();
    (process, qmp)
}

fn ask(cell: &Cell, to: Ipv4Addr, times: u32) {
    netns::enter(&cell.path(), || {
        for n in 0..times {
            let mut stream = TcpStream::connect((to, 80)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let path = if n % 10 == 0 { "/cgi-bin/random" } else { "/index.html" };
            stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert!(text.contains("200 OK"), "{text}");
        }
    })
    .unwrap();
}

fn digests(map: &Map) -> BTreeSet<Digest> {
    map.packs().iter().map(|p| p.digest).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machine_a_snapshot_of_a_singleton_is_small_and_resumes() {
    let (built, manifest) = image("tiny").await;
    let parent = inspect::inspect(built.dir(), "tiny", &[]).unwrap();
    let key = inspect::owner_key(&manifest, &built).unwrap().unwrap();
    let dir = tempfile::Builder::new().prefix("vmx").tempdir_in("/dev/shm").unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    copy_image("tiny", &built, &store, &|_| {}).unwrap();
    key.write(inspect::key_path(store.dir(), &key.id())).unwrap();
    let staged = stage(&manifest, &store, dir.path());
    let files = Files { memory: dir.path().join("one"), ..staged.clone() };
    let map = memory::map(&manifest, &store).unwrap();
    let options = Options { shared: true, sealed: true, ..Options::default() };
    let engine = Engine::start(&files.memory, map.clone(), options, fetch(&store, &key)).unwrap();
    let cell = Cell::new("snap", manifest.guest.gateway);
    let mut run = Run {
        name: "one".into(),
        qmp: dir.path().join("one.qmp"),
        guest_agent: dir.path().join("one.agent"),
        tap_fd: 0,
        console: None,
        start: Start::Shared,
    };
    let (process, mut qmp) = singleton(&manifest, &cell, &files, &mut run, &engine).await;
    guest::awaken_same(&run.guest_agent).await.unwrap();
    ask(&cell, manifest.guest.address, REQUESTS);

    let device = dir.path().join("device.next");
    qmp.save_state(&device).await.unwrap();
    let dirty = engine.dirty(process.0.id() as i32).unwrap();
    let changed: BTreeSet<u32> = dirty.iter().cloned().flatten().collect();
    let child = Child {
        name: "tiny-child",
        memory: &files.memory,
        device: &device,
        parent: (&manifest, parent.digest),
        map: &map,
        unchanged: &|page| !changed.contains(&page),
        order: &order(&map),
        key: Some(&key),
        data: None,
    };
    let (next, _) = snapshot(&store, &child).unwrap();
    drop(process);
    let (before, after) = (digests(&map), memory::map(&next, &store).unwrap());
    let new: u64 = after.packs().iter().filter(|p| !before.contains(&p.digest)).map(|p| u64::from(p.stored)).sum();
    let tables = next.memory.first.stored.0 + next.memory.rest.stored.0;
    eprintln!(
        "{} pages changed, {new} bytes of packs, {} of device state, {tables} of tables",
        changed.len(),
        next.device.stored
    );
    assert!(new + next.device.stored.0 + tables < 1 << 20, "{new} bytes for {REQUESTS} requests");

    let again = Files { memory: dir.path().join("two"), device: device.clone(), ..staged.clone() };
    memory::assemble(&next, &store, Some(&key), &again.memory).unwrap();
    same(&again.memory, &staged.memory, &changed);
    let (_process, agent) = resume(&next, &again, &cell, dir.path(), "two").await;
    guest::awaken(&agent).await.unwrap();
    health::ask(&cell.path(), next.guest.address, &next.guest.health, Duration::from_secs(20)).await.unwrap();
    ask(&cell, next.guest.address, 20);
}

/// Where nothing was written the child is as its parent.
fn same(child: &Path, parent: &Path, changed: &BTreeSet<u32>) {
    let [child, parent] = [child, parent].map(|path| std::fs::read(path).unwrap());
    assert_eq!(child.len(), parent.len());
    let differ = |(page, (a, b)): (u32, (&[u8], &[u8]))| (a != b).then_some(page);
    let found = (0u32..).zip(child.chunks(4096).zip(parent.chunks(4096))).filter_map(differ);
    let wrong: Vec<u32> = found.filter(|page| !changed.contains(page)).collect();
    assert!(wrong.is_empty(), "pages that nobody wrote differ: {wrong:?}");
}
