//! What holds of every store, wherever it lies.

use super::*;

contract!(
    what_was_put_is_there_and_what_was_not_is_not,
    a_name_that_leads_elsewhere_is_refused,
    what_is_longer_than_it_may_be_is_refused,
    a_chunk_of_another_length_or_of_none_gives_way,
    what_was_removed_is_gone_and_removing_it_again_is_no_fault,
    more_than_a_page_of_things_is_listed,
    nothing_is_published_before_all_its_chunks_are_there,
    a_copy_sends_only_what_is_missing,
    a_copy_of_very_many_chunks_sends_only_what_is_missing,
    a_copy_that_broke_off_goes_on_from_there,
    a_damaged_chunk_is_never_copied,
    a_repair_puts_right_what_it_can_and_names_the_rest,
    a_sealed_image_is_copied_without_its_key_and_checked_with_it,
);

fn what_was_put_is_there_and_what_was_not_is_not(world: &World) {
    let store = &world.store;
    let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
    assert_eq!(store.names().unwrap(), Vec::<String>::new());
    assert!(store.image("b").unwrap().is_none() && !store.has(&one) && store.keep(&one).is_none());
    assert!(matches!(store.chunk(&one), Err(Error::NoChunk { digest, .. }) if digest == one));
    store.put_chunk(&one, b"stored").unwrap();
    assert_eq!(store.chunk(&one).unwrap(), b"stored");
    assert_eq!((store.stored(&one), store.keep(&one), store.has(&other)), (Some(6), Some(6), false));
    let signed = SignedManifest { manifest: "a \"text\"".into(), signature: "s".into(), signer: "k".into() };
    store.put_image("b", &signed).unwrap();
    store.put_image("a", &signed).unwrap();
    assert_eq!((store.names().unwrap(), store.image("b").unwrap()), (vec!["a".into(), "b".into()], Some(signed)));
}

fn a_name_that_leads_elsewhere_is_refused(world: &World) {
    let signed = SignedManifest { manifest: String::new(), signature: String::new(), signer: String::new() };
    for name in ["", "../keys/builder", "a/b", "A", ".hidden"] {
        assert!(matches!(world.store.image(name), Err(Error::BadName { .. })), "{name:?}");
        assert!(matches!(world.store.put_image(name, &signed), Err(Error::BadName { .. })), "{name:?}");
        assert!(matches!(world.store.remove_image(name), Err(Error::BadName { .. })), "{name:?}");
    }
}

fn what_is_longer_than_it_may_be_is_refused(world: &World) {
    let key = chunk_key(&Digest::of(b"x"));
    world.store.put(&key, &[7; 5000]).unwrap();
    assert_eq!(world.store.get(&key, 5000).unwrap().unwrap().len(), 5000);
    let error = world.store.get(&key, 4999).unwrap_err();
    assert!(matches!(error, Error::TooLong { max: 4999, .. }), "{error}");
}

fn a_chunk_of_another_length_or_of_none_gives_way(world: &World) {
    let (store, digest) = (&world.store, Digest::of(b"x"));
    store.put_chunk(&digest, b"").unwrap();
    assert!(!store.has(&digest) && store.keep(&digest).is_none(), "no bytes are no chunk");
    store.put_chunk(&digest, b"whole").unwrap();
    store.put_chunk(&digest, b"other").unwrap();
    assert_eq!(store.chunk(&digest).unwrap(), b"whole", "one that is there was written again");
    store.replace_chunk(&digest, b"other").unwrap();
    assert_eq!(store.chunk(&digest).unwrap(), b"other");
    store.put_chunk(&digest, b"whole again").unwrap();
    assert_eq!(store.chunk(&digest).unwrap(), b"whole again");
}

fn what_was_removed_is_gone_and_removing_it_again_is_no_fault(world: &World) {
    let (store, digest) = (&world.store, Digest::of(b"x"));
    store.put_chunk(&digest, b"x").unwrap();
    store.put_image("a", &image(store, 1, None)).unwrap();
    assert_eq!((store.remove_image("a").unwrap(), store.remove_image("a").unwrap()), (true, false));
    for _ in 0..2 {
        store.remove_chunk(&digest);
        assert!(!store.has(&digest) && store.image("a").unwrap().is_none());
    }
}

fn more_than_a_page_of_things_is_listed(world: &World) {
    let names: Vec<String> = (0..1010).map(|n| format!("chunks/ab/{n:04}")).collect();
    copy::each(&names, |name| world.store.put(name, b"x")).unwrap();
    world.store.put("chunks/abc", b"beside").unwrap();
    let mut listed: Vec<String> = world.store.shard(0xab).unwrap().into_iter().map(|(_, e)| e.name).collect();
    listed.sort();
    assert!(listed.len() == 1010 && listed[1009] == "1009", "{} are listed", listed.len());
    world.store.remove(&names[..1000]).unwrap();
    assert_eq!(world.store.shard(0xab).unwrap().len(), 10);
}

fn nothing_is_published_before_all_its_chunks_are_there(world: &World) {
    let store = &world.store;
    let signed = image(store, 1, None);
    store.put_image("other", &signed).unwrap();
    let all = named(store, "other");
    let lost = all[all.len() / 2];
    let stored = store.chunk(&lost.digest).unwrap();
    store.remove_chunk(&lost.digest);
    let error = store.publish("a", &signed).unwrap_err();
    assert!(matches!(error, Error::NoChunk { digest, .. } if digest == lost.digest), "{error}");
    store.put_chunk(&lost.digest, &stored[1..]).unwrap();
    assert!(store.publish("a", &signed).is_err(), "one that was cut short");
    assert!(store.image("a").unwrap().is_none());
    store.put_chunk(&lost.digest, &stored).unwrap();
    store.publish("a", &signed).unwrap();
    assert_eq!(store.image("a").unwrap(), Some(signed));
}

fn copied(from: &Store, to: &Store) -> Result<Copied> {
    copy_image("a", from, to, &|_| {})
}

fn a_copy_sends_only_what_is_missing(world: &World) {
    let from = super::folder();
    let (from, to) = (&from.store, &world.store);
    from.put_image("a", &image(from, 1, None)).unwrap();
    let last = std::sync::Mutex::new(None);
    let first = copy_image("a", from, to, &|p| *last.lock().unwrap() = Some(p)).unwrap();
    let all = named(from, "a");
    let bytes: Bytes = all.iter().map(|n| Bytes(n.stored)).sum();
    assert_eq!((first.chunks, first.sent, first.bytes), (all.len() as u64, all.len() as u64, bytes));
    assert!(last.into_inner().unwrap().is_some_and(|p| p.chunks.0 <= p.chunks.1 && p.bytes.1 == bytes));
    assert_eq!((to.image("a").unwrap(), named(to, "a")), (from.image("a").unwrap(), all.clone()));
    assert!(all.iter().all(|need| to.chunk(&need.digest).unwrap() == from.chunk(&need.digest).unwrap()));
    assert_eq!(copied(from, to).unwrap().sent, 0);
    // A second image brings only its own.
    from.put_image("a", &image(from, 2, None)).unwrap();
    let second = copied(from, to).unwrap();
    assert!(second.sent > 0 && second.sent < second.chunks, "{second:?}");
    // Back again: pull is push.
    let back = super::folder();
    assert_eq!(copied(to, &back.store).unwrap().sent, second.chunks);
}

fn a_copy_of_very_many_chunks_sends_only_what_is_missing(world: &World) {
    let from = super::folder();
    let (from, to) = (&from.store, &world.store);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let blocks = (1..=LISTED_FROM as u32 + 50).flat_map(|n| n.to_le_bytes().repeat(1024)).collect::<Vec<u8>>();
    std::fs::write(&path, blocks).unwrap();
    let mut signed = image(from, 1, None);
    let mut m = unverified("a", &signed).unwrap();
    m.parts = vec![Cutter::new(from, None).part(&path, PartKind::Disk, Bytes(4096)).unwrap()];
    signed.manifest = serde_json::to_string(&m).unwrap();
    from.put_image("a", &signed).unwrap();
    assert!(copied(from, to).unwrap().sent > LISTED_FROM as u64);
    let lost = named(to, "a")[500];
    to.remove_chunk(&lost.digest);
    assert!(matches!(to.publish("a", &signed), Err(Error::NoChunk { digest, .. }) if digest == lost.digest));
    assert_eq!(copied(from, to).unwrap().sent, 1);
}

fn a_copy_that_broke_off_goes_on_from_there(world: &World) {
    let from = super::folder();
    let (from, to) = (&from.store, &world.store);
    from.put_image("a", &image(from, 1, None)).unwrap();
    let all = named(from, "a");
    // The last pack in order is missing at the source: the copy breaks off.
    let lost = all.iter().rev().find(|n| n.plain >= 4096).unwrap();
    let stored = from.chunk(&lost.digest).unwrap();
    from.remove_chunk(&lost.digest);
    assert!(matches!(copied(from, to), Err(Error::NoChunk { .. })));
    assert!(to.image("a").unwrap().is_none(), "half an image has a name");
    let there = all.iter().filter(|n| to.has(&n.digest)).count() as u64;
    from.put_chunk(&lost.digest, &stored).unwrap();
    let rest = copied(from, to).unwrap();
    assert!(there > 0 && rest.sent == rest.chunks - there, "{there} were there, {rest:?}");
}

fn a_damaged_chunk_is_never_copied(world: &World) {
    let from = super::folder();
    let (from, to) = (&from.store, &world.store);
    from.put_image("a", &image(from, 1, None)).unwrap();
    let victim = *named(from, "a").iter().find(|n| n.plain >= 4096).unwrap();
    let good = from.chunk(&victim.digest).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    from.replace_chunk(&victim.digest, &bad).unwrap();
    let error = copied(from, to).unwrap_err();
    assert!(matches!(error, Error::BadChunk { digest, .. } if digest == victim.digest), "{error}");
    assert!(to.image("a").unwrap().is_none() && !to.has(&victim.digest));
    // One that is cut short at the other end is sent again.
    from.replace_chunk(&victim.digest, &good).unwrap();
    copied(from, to).unwrap();
    to.replace_chunk(&victim.digest, &good[1..]).unwrap();
    assert_eq!(copied(from, to).unwrap().sent, 1);
    assert_eq!(to.chunk(&victim.digest).unwrap(), good);
}

fn a_repair_puts_right_what_it_can_and_names_the_rest(world: &World) {
    let whole = super::folder();
    let store = &world.store;
    let signed = image(store, 1, None);
    store.put_image("a", &signed).unwrap();
    copy_image("a", store, &whole.store, &|_| {}).unwrap();
    let all = named(store, "a");
    assert_eq!(
        repair_image("a", store, None, None).unwrap(),
        Repaired { checked: all.len() as u64, ..Default::default() }
    );
    // A table and two packs.
    let m = unverified("a", &signed).unwrap();
    let packs: Vec<_> = all.iter().filter(|n| n.plain >= 4096 && n.digest != m.device.digest).collect();
    let flip = |digest: &Digest| {
        let mut bytes = store.chunk(digest).unwrap();
        bytes[9] ^= 1;
        store.replace_chunk(digest, &bytes).unwrap();
    };
    flip(&m.memory.rest.digest);
    flip(&packs[0].digest);
    store.remove_chunk(&packs[1].digest);
    assert!(matches!(check_chunk(store, packs[0], None), Err(Error::BadChunk { .. })));
    let done = repair_image("a", store, Some(&whole.store), None).unwrap();
    assert_eq!((done.checked, done.repaired, done.lost.len()), (all.len() as u64, 3, 0));
    assert!(all.iter().all(|need| check_chunk(store, need, None).is_ok()));
    // Nobody else has it: it is taken out, so that a build finds it missing.
    flip(&packs[0].digest);
    assert_eq!(repair_image("a", store, None, None).unwrap().lost, [packs[0].digest]);
    assert!(!store.has(&packs[0].digest));
    image(store, 1, None);
    assert_eq!(repair_image("a", store, None, None).unwrap().lost, []);
}

fn a_sealed_image_is_copied_without_its_key_and_checked_with_it(world: &World) {
    let from = super::folder();
    let (from, to) = (&from.store, &world.store);
    let (key, other) = (OwnerKey::from_bytes([1; 32]), OwnerKey::from_bytes([2; 32]));
    from.put_image("a", &image(from, 1, Some(&key))).unwrap();
    copied(from, to).unwrap();
    let sealed: Vec<_> = named(to, "a").into_iter().filter(|n| n.sealed).collect();
    assert!(sealed.len() > 1 && sealed.iter().all(|n| check_chunk(to, n, Some(&key)).is_ok()));
    assert!(repair_image("a", to, None, Some(&other)).is_err(), "with another's key all would look damaged");
    let mut bytes = to.chunk(&sealed[0].digest).unwrap();
    bytes[20] ^= 1;
    to.replace_chunk(&sealed[0].digest, &bytes).unwrap();
    assert_eq!(repair_image("a", to, None, None).unwrap().lost, [], "damage that cannot be seen");
    assert_eq!(repair_image("a", to, Some(from), Some(&key)).unwrap().repaired, 1);
}
