use super::*;
use crate::chunks::Cutter;
use crate::machine::tests::manifest;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::path::PathBuf;
use vmatrix_model::Bytes;

const PAGES: u32 = 200;

/// A sparse memory file: one byte value a page, 0 for a page that is never written.
fn memory(dir: &Path, values: &[u8]) -> PathBuf {
    let path = dir.join("memory");
    let file = File::options().write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(values.len() as u64 * PAGE).unwrap();
    for (page, value) in values.iter().enumerate().filter(|(_, v)| **v != 0) {
        file.write_all_at(&[*value; PAGE as usize], page as u64 * PAGE).unwrap();
    }
    path
}

fn manifest_of(cut: vmatrix_model::manifest::Memory) -> Manifest {
    let mut m = manifest();
    m.memory = cut;
    m
}

fn back(m: &Manifest, store: &Store, key: Option<&OwnerKey>, dir: &Path) -> Vec<u8> {
    let path = dir.join("back");
    assemble(m, store, key, &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    bytes.chunks(PAGE as usize).map(|p| if p.iter().all(|b| *b == p[0]) { p[0] } else { 255 }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever was touched and whatever changed since the parent, the same memory comes back, and of the
    /// parent's packs none is stored again.
    #[test]
    fn what_is_cut_comes_back_the_same(
        values in proptest::collection::vec(0u8..4, PAGES as usize),
        order in proptest::collection::vec(0..PAGES + 20, 0..60),
        changed in proptest::collection::btree_map(0..PAGES, 0u8..9, 0..40),
        order_again in proptest::collection::vec(0..PAGES, 0..60),
        sealed: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        let key = sealed.then(|| OwnerKey::from_bytes([7; 32]));
        let mut m = {
            let cutter = Cutter::new(&store, key.as_ref());
            manifest_of(cut(&cutter, &memory(dir.path(), &values), &order, 3, None).unwrap())
        };
        m.seal = key.as_ref().map(OwnerKey::id);
        prop_assert_eq!(&back(&m, &store, key.as_ref(), dir.path()), &values);
        let parent = map(&m, &store).unwrap();
        let touched: BTreeSet<u32> = order.iter().copied().filter(|p| values.get(*p as usize).is_some_and(|v| *v != 0)).collect();
        let first: BTreeSet<u32> = parent.packs()[..parent.working_set()].iter().flat_map(|p| p.pages().map(|(_, p)| p)).collect();
        prop_assert_eq!(first, touched);

        let mut later = values.clone();
        changed.iter().for_each(|(page, value)| later[*page as usize] = *value);
        let unchanged = |page: u32| !changed.contains_key(&page);
        let cutter = Cutter::new(&store, key.as_ref());
        let from = Parent { map: &parent, unchanged: &unchanged };
        let mut child = manifest_of(cut(&cutter, &memory(dir.path(), &later), &order_again, 3, Some(&from)).unwrap());
        child.seal = m.seal;
        prop_assert_eq!(&back(&child, &store, key.as_ref(), dir.path()), &later);
        // Where nothing is packed anew for the working set's sake, nothing unchanged is packed at all.
        if order_again.iter().all(|p| first_or_zero(&parent, *p)) {
            let known: BTreeSet<_> = parent.packs().iter().map(|p| p.digest).collect();
            let fresh = map(&child, &store).unwrap().packs().iter()
                .filter(|p| !known.contains(&p.digest)).flat_map(|p| p.pages().map(|(_, p)| p).collect::<Vec<_>>()).collect::<BTreeSet<_>>();
            prop_assert!(fresh.iter().all(|p| changed.contains_key(p)), "{:?}", fresh);
        }
    }

    #[test]
    fn no_table_makes_a_reader_panic_or_believe_it(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(first) = First::decode(&bytes, PAGES) {
            let _ = Map::new(PAGES, first);
        }
        let _ = Rest::decode(&bytes, PAGES);
    }

    #[test]
    fn a_table_cut_short_is_refused(at in 0usize..1000) {
        let pack = |n: u32| Pack { digest: Digest::of(&n.to_le_bytes()), stored: 100, slots: vec![Some(n), None, Some(n + 1), Some(n + 2)] };
        let first = First { zero: vec![0..3, 150..180], packs: (1..6).map(|n| pack(n * 10)).collect() };
        let bytes = first.encode();
        prop_assert_eq!(First::decode(&bytes, PAGES).unwrap(), first);
        prop_assert!(First::decode(&bytes[..at % bytes.len()], PAGES).is_err());
    }
}

fn first_or_zero(parent: &Map, page: u32) -> bool {
    match parent.of(page) {
        Of::Zero => true,
        Of::Pack { pack, .. } => (pack as usize) < parent.working_set(),
        Of::Unknown => false,
    }
}

#[test]
fn a_map_with_a_page_in_two_places_or_nowhere_is_refused() {
    let pack =
        |pages: &[u32]| Pack { digest: Digest::of(b"p"), stored: 9, slots: pages.iter().copied().map(Some).collect() };
    let first = First { zero: std::iter::once(0..2).collect(), packs: vec![pack(&[2])] };
    let mut map = Map::new(4, first.clone()).unwrap();
    assert_eq!((map.of(1), map.of(2), map.of(3)), (Of::Zero, Of::Pack { pack: 0, slot: 0 }, Of::Unknown));
    assert!(map.clone().complete(Rest { packs: vec![] }).unwrap_err().to_string().contains("page 3 is nowhere"));
    assert!(map.clone().complete(Rest { packs: vec![pack(&[3, 2])] }).unwrap_err().to_string().contains("two places"));
    assert!(
        map.clone().complete(Rest { packs: vec![pack(&[3, 4])] }).unwrap_err().to_string().contains("past the end")
    );
    map.complete(Rest { packs: vec![pack(&[3])] }).unwrap();
    assert!(map.is_complete());
}

#[test]
fn a_partly_present_memory_keeps_its_parents_pages_without_reading_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let values: Vec<u8> = (0..PAGES).map(|p| (p % 5) as u8).collect();
    let cutter = Cutter::new(&store, None);
    let m = manifest_of(cut(&cutter, &memory(dir.path(), &values), &[], 0, None).unwrap());
    let parent = map(&m, &store).unwrap();
    // Only page 7 is here, and the guest wrote it.
    let mut here = vec![0; PAGES as usize];
    here[7] = 9;
    let from = Parent { map: &parent, unchanged: &|page| page != 7 };
    let child = manifest_of(cut(&cutter, &memory(dir.path(), &here), &[7], 0, Some(&from)).unwrap());
    let mut expected = values;
    expected[7] = 9;
    assert_eq!(back(&child, &store, None, dir.path()), expected);
    assert_eq!(child.memory.working_set.pages, 1);
    assert!(child.memory.size == Bytes(u64::from(PAGES) * PAGE));
}
