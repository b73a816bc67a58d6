//! Lists that learn, on real parts: what the first guest had to wait for, the next one elsewhere does not.

use crate::network::{MINUTE, Network, ask, assignment};
use std::path::Path;
use std::time::Duration;
use vmatrix_model::Digest;
use vmatrix_model::manifest::Manifest;
use vmatrix_vma_image::store::copy_image;
use vmatrix_vma_image::{Store, chunks::Cutter, inspect, memory, sign};
use vmatrix_vma_pager::Control;

/// The image has some 20 MB as stored: ten seconds of this, in which a guest touches what is not there yet.
const RATE_MBIT: u64 = 16;

/// A store of its own in `folder`, with `tiny` as if its working set had never been recorded: as an import has it.
fn unrecorded(from: &Store, folder: &Path) -> Store {
    let store = Store::open(folder.join("store")).unwrap();
    copy_image("tiny", from, &store, &|_| {}).unwrap();
    let manifest: Manifest = serde_json::from_str(&from.image("tiny").unwrap().unwrap().manifest).unwrap();
    if let Some(id) = &manifest.seal {
        std::fs::create_dir_all(store.dir().join("keys")).unwrap();
        std::fs::copy(inspect::key_path(from.dir(), id), inspect::key_path(store.dir(), id)).unwrap();
    }
    let key = inspect::owner_key(&manifest, &store).unwrap();
    let file = folder.join("memory");
    memory::assemble(&manifest, &store, key.as_ref(), &file).unwrap();
    let memory = memory::cut(&Cutter::new(&store, key.as_ref()), &file, &[], 0, None).unwrap();
    std::fs::remove_file(file).unwrap();
    store.publish("tiny", &sign::sign(&store, &Manifest { memory, ..manifest }).unwrap()).unwrap();
    store
}

/// The image's digest, and the pages in its list.
fn list(store: &Store) -> (Digest, u64) {
    let seen = inspect::inspect(store.dir(), "tiny", &[]).unwrap();
    (seen.digest, seen.manifest.memory.working_set.pages)
}

/// Pages that guests of the network's one image missed, and faults that waited for a fetch, once all of it is there.
async fn missed(network: &Network) -> (usize, u64) {
    network.until("all of memory", MINUTE, |h| h.image().1).await;
    let pagers: Vec<_> = std::fs::read_dir(network.dir.path().join("m/pagers")).unwrap().collect();
    assert_eq!(pagers.len(), 1);
    let control = pagers[0].as_ref().unwrap().path().join("control");
    let mut control = Control::connect(&control).await.unwrap();
    let (missed, status) = (control.missed().await.unwrap(), control.status().await.unwrap());
    assert_eq!(status.missed, missed.len() as u64);
    eprintln!("{} pages were missed, {} faults waited for a fetch", missed.len(), status.misses);
    (missed.len(), status.misses)
}

#[test]
fn machine_an_image_without_a_list_learns_one_from_its_first_resume_and_the_next_machine_waits_less() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = Network::new("l");
    first.store = unrecorded(&first.store, folder.path());
    first.configure(&[8446], "");
    let (built, pages) = list(&first.store);
    assert_eq!(pages, 0);
    let without = first.play(async {
        first.stand_ins().await;
        first.store_daemon(8446, RATE_MBIT);
        first.start("vma");
        first.start("machine");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let took = first.first_byte(&assignment(1, Some(1))).await;
        eprintln!("without a list: order to first byte {took:?}");
        // It is said once it is there: whoever sees the list may be a moment before.
        first.until("a list", MINUTE, |_| first.log("store").contains("working set of tiny: 0 -> ")).await;
        let (learned, pages) = list(&first.store);
        let said = format!("working set of tiny: 0 -> {pages} pages, asked by m1");
        assert!(pages > 0 && learned != built && first.log("store").contains(&said), "{}", first.log("store"));
        inspect::verify(first.store.dir(), "tiny", &[]).unwrap();

        // The guest goes on from what it began with; once nothing runs from it the new one takes its place.
        let (qemu, missed) = (first.qemu(), missed(&first).await);
        assert!(ask(first.slots()[0], 80).await.is_some());
        assert_eq!(first.assign(&assignment(2, Some(0))).await, 204);
        let here = Store::read(first.dir.path().join("m/store")).unwrap();
        let renewed = |store: &Store| store.image("tiny").unwrap().unwrap().manifest;
        first.until("the new list", 2 * MINUTE, |_| renewed(&here) == renewed(&first.store)).await;
        assert!(first.qemu().iter().all(|pid| !qemu.contains(pid)));
        first.first_byte(&assignment(3, Some(1))).await;
        missed
    });
    let mut second = Network::new("m");
    second.store = first.store.clone();
    second.configure(&[8446], "");
    let with = second.play(async {
        second.stand_ins().await;
        second.store_daemon(8446, RATE_MBIT);
        second.start("vma");
        second.start("machine");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let took = second.first_byte(&assignment(1, Some(1))).await;
        eprintln!("with what was learned: order to first byte {took:?}");
        missed(&second).await
    });
    // What had come before it was touched is in no list, and may come later the next time: so not all is foreseen.
    let (pages, waits) = (with.0 * 3 < without.0 * 2, with.1 * 2 < without.1);
    assert!(without.0 > 100 && pages && waits, "pages, waits: {without:?} without a list, {with:?} with one");
}
