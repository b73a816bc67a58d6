//! The pager's process with an image of three disks: what a singleton writes of its data, over kills, into a snapshot
//! and out of it again.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::dir;
use common::place::Place;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vmatrix_model::manifest::{Manifest, PartKind};
use vmatrix_vma_build::snapshot::{Child, Data, snapshot};
use vmatrix_vma_image::chunks::{Cutter, DATA_CHUNK, DISK_CHUNK};
use vmatrix_vma_image::{Store, memory, sign};
use vmatrix_vma_testing as testing;

const MEMORY_MIB: u64 = 16;

/// Not a test of its own: the pager's process.
#[test]
fn process_that_pages() {
    common::place::process();
}

/// A store with an image on a base that has data.
struct World {
    dir: tempfile::TempDir,
    store: Store,
}

/// The bytes of a disk of so many KiB; every third 64 KiB are zeros.
fn bytes(seed: u64, kib: u64) -> Vec<u8> {
    (0..kib << 10).map(|i| if (i >> 16) % 3 == 1 { 0 } else { (i * seed / 97 + i / 1000) as u8 }).collect()
}

impl World {
    fn new() -> World {
        let dir = dir();
        let store = Store::open(dir.path().join("store")).unwrap();
        let world = World { dir, store };
        let cutter = Cutter::new(&world.store, None);
        let part = |kind, chunk, name: &str, bytes: Vec<u8>| {
            std::fs::write(world.path(name), bytes).unwrap();
            cutter.part(&world.path(name), kind, chunk).unwrap()
        };
        let parts = vec![
            part(PartKind::Disk, DISK_CHUNK, "plain.disk", bytes(3, 700)),
            part(PartKind::Base, DISK_CHUNK, "plain.base", bytes(5, 900)),
            part(PartKind::Data, DATA_CHUNK, "plain.data", bytes(7, 1000)),
        ];
        let whole = std::fs::File::create(world.path("plain.memory")).unwrap();
        whole.set_len(MEMORY_MIB << 20).unwrap();
        whole.write_all_at(&[7; 40_000], 1 << 20).unwrap();
        let memory = memory::cut(&cutter, &world.path("plain.memory"), &[256, 257], 1, None).unwrap();
        let device = cutter.blob(b"device state", false).unwrap();
        let kinds = [PartKind::Disk, PartKind::Base, PartKind::Data];
        world.put(&Manifest { memory, device, parts, ..testing::manifest("ledger", MEMORY_MIB, &kinds) });
        world
    }

    fn put(&self, manifest: &Manifest) {
        self.store.put_image("ledger", &sign::sign(&self.store, manifest).unwrap()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn place(&self, name: &str, shared: bool) -> Place {
        Place::new(self.dir.path(), name, &self.store, "ledger", shared)
    }
}

impl Place {
    async fn is(&self, export: &str, plain: &Path) {
        let plain = plain.display().to_string();
        let said = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &self.uri(export), &plain]).await;
        assert!(said.contains("identical"), "{export}: {said}");
    }

    /// Writes to the data, and to a plain file.
    async fn write(&self, plain: &Path, commands: &[&str]) {
        for to in [self.uri("data"), plain.display().to_string()] {
            let mut words = vec!["-f", "raw"];
            commands.iter().for_each(|c| words.extend(["-c", c]));
            words.push(&to);
            let said = run("qemu-io", &words).await;
            assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
        }
    }

    /// A child of the image, put in its place, of what was written here.
    fn child(&self, memory: &Path, written: &[u32]) -> Manifest {
        let store = &self.store;
        let signed = store.image("ledger").unwrap().unwrap();
        let (parent, digest) = sign::verify(&signed, &[sign::public(store).unwrap()]).unwrap();
        let map = memory::map(&parent, store).unwrap();
        let child = Child {
            name: "ledger",
            memory,
            device: &self.path("device"),
            parent: (&parent, digest),
            map: &map,
            unchanged: &|_| true,
            order: &[],
            key: None,
            data: Some(Data { file: &self.disks().file("data"), written }),
        };
        std::fs::write(child.device, b"device state").unwrap();
        snapshot(store, &child).unwrap().0
    }
}

async fn run(program: &'static str, words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
    let output = tokio::task::spawn_blocking(move || Command::new(program).args(words).stdin(Stdio::null()).output());
    let output = output.await.unwrap().unwrap_or_else(|e| panic!("{program} is missing ({e})"));
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_data_goes_from_guest_to_guest_through_snapshots_of_what_was_written() {
    let world = World::new();
    let (plain, memory) = (world.path("plain.data"), world.path("plain.memory"));
    let first = world.place("first", true);
    let (pager, mut control) = first.pager().await;
    for (export, of) in [("disk", "plain.disk"), ("base", "plain.base"), ("data", "plain.data")] {
        first.is(export, &world.path(of)).await;
    }
    assert_eq!(control.written().await.unwrap(), [] as [u32; 0]);
    first.write(&plain, &["write -P 1 100 200", "write -P 2 131072 65536", "write -P 3 983040 512", "flush"]).await;
    assert_eq!(control.written().await.unwrap(), [0, 2, 15]);
    assert_eq!(control.status().await.unwrap().written_bytes, 3 << 16);

    // Killed: the next one knows, and goes on.
    drop((pager, control));
    let (pager, mut control) = first.pager().await;
    assert_eq!(control.written().await.unwrap(), [0, 2, 15]);
    first.is("data", &plain).await;
    first.write(&plain, &["write -P 4 65000 1000"]).await;
    let written = control.written().await.unwrap();
    assert_eq!(written, [0, 1, 2, 15]);
    let child = first.child(&memory, &written);
    drop((pager, control));

    let second = world.place("second", true);
    let (pager, mut control) = second.pager().await;
    second.is("data", &plain).await;
    assert_eq!(control.written().await.unwrap(), [] as [u32; 0], "what the parent wrote counts as this one's");
    second.write(&plain, &["write -P 5 200000 10"]).await;
    let grandchild = second.child(&memory, &control.written().await.unwrap());
    assert_eq!((child.epoch, grandchild.epoch), (1, 2));
    drop((pager, control));

    // Clones read the data; none writes it.
    let clones = world.place("clones", false);
    let (_pager, mut control) = clones.pager().await;
    clones.is("data", &plain).await;
    let said = run("qemu-io", &["-f", "raw", "-c", "write 0 512", &clones.uri("data")]).await;
    assert!(said.contains("Permission denied"), "{said}");
    let said = control.written().await.unwrap_err().to_string();
    assert!(said.contains("no data that is written here"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_what_a_guest_wrote_whose_memory_is_gone_is_met_by_no_other() {
    let world = World::new();
    let place = world.place("one", true);
    let (pager, control) = place.pager().await;
    place.write(&world.path("plain.data"), &["write -P 1 100 200"]).await;
    drop((pager, control));
    std::fs::remove_file(place.path("memory")).unwrap();
    let mut pager = place.start();
    let status = tokio::task::spawn_blocking(move || pager.0.wait()).await.unwrap().unwrap();
    assert!(!status.success());
    assert!(place.said().contains("what another guest wrote"), "{}", place.said());
}
