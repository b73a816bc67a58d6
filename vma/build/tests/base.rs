//! Two services on one base: the second brings nothing of the base again.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::image;
use std::collections::BTreeMap;
use vmatrix_model::Digest;
use vmatrix_model::manifest::{Manifest, PartKind};
use vmatrix_vma_image::{Store, chunks, memory};

/// Stored bytes of every chunk of a part, by digest.
fn part(manifest: &Manifest, store: &Store, kind: PartKind) -> BTreeMap<Digest, u64> {
    let part = manifest.part(kind).unwrap_or_else(|| panic!("{} has no {kind:?}", manifest.name));
    chunks::table(part, store).unwrap().into_iter().flatten().map(|c| (c.digest, c.stored.0)).collect()
}

fn all(manifest: &Manifest, store: &Store) -> BTreeMap<Digest, u64> {
    let packs = memory::map(manifest, store).unwrap();
    let packs = packs.packs().iter().map(|p| (p.digest, u64::from(p.stored)));
    let parts = manifest.parts.iter().flat_map(|p| part(manifest, store, p.kind));
    packs.chain(parts).chain([(manifest.device.digest, manifest.device.stored.0)]).collect()
}

#[tokio::test]
async fn machine_a_second_service_on_a_base_brings_no_byte_of_it_again() {
    let ((first_store, first), (second_store, second)) = (image("maps").await, image("agenda").await);
    for kind in [PartKind::Base, PartKind::Kernel, PartKind::Initrd] {
        let table = |m: &Manifest| m.part(kind).unwrap_or_else(|| panic!("{} has no {kind:?}", m.name)).table;
        assert_eq!(table(&first), table(&second), "{kind:?} differs");
    }
    let (here, wanted) = (all(&first, &first_store), all(&second, &second_store));
    let new: u64 = wanted.iter().filter(|(digest, _)| !here.contains_key(digest)).map(|(_, stored)| stored).sum();
    let sum = |kind| part(&second, &second_store, kind).values().sum::<u64>();
    let (base, disk) = (sum(PartKind::Base), sum(PartKind::Disk));
    eprintln!(
        "{}: {} bytes in all, new where {} is: {new}; its base has {base}, its own disk {disk}",
        second.name,
        wanted.values().sum::<u64>(),
        first.name
    );
    let others = second.memory.stored.0 + second.device.stored.0 + second.part(PartKind::BackendSeed).unwrap().stored.0;
    assert!(new <= disk + others, "{new} bytes are new: something shared is sent again");
    // The base is most of what both have, or nothing is gained by it.
    assert!(disk < base, "its own disk has {disk} bytes, the base {base}");
}
