use super::*;
use crate::store::tests::{World, contract, folder, image, in_memory, named, s3, shaken};
use crate::store::{check_chunk, copy_image, pause, repair_image};
use proptest::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};

contract!(
    what_no_image_names_goes_once_it_is_old,
    an_image_that_cannot_be_read_ends_the_collection,
    what_is_no_chunk_is_left_alone,
    a_publisher_keeps_collectors_out,
    a_publisher_waits_for_the_batch_of_a_collector,
);

fn what_no_image_names_goes_once_it_is_old(world: &World) {
    let store = &world.store;
    let (old, young) = (Digest::of(b"old"), Digest::of(b"young"));
    store.put_chunk(&old, b"old").unwrap();
    store.publish("a", &image(store, 1, None)).unwrap();
    store.publish("b", &image(store, 2, None)).unwrap();
    let both: HashSet<Digest> = ["a", "b"].iter().flat_map(|n| named(store, n)).map(|n| n.digest).collect();
    world.make_old();
    store.put_chunk(&young, b"young!").unwrap();
    let found = Report { images: 2, kept: both.len() as u64, removed: 1, bytes: Bytes(3), waiting: 1 };
    assert_eq!(gc(store, world.grace(), true).unwrap(), found, "dry");
    assert!(store.has(&old), "a dry run removed it");
    assert_eq!(gc(store, world.grace(), false).unwrap(), found);
    assert!(!store.has(&old) && store.has(&young));

    let own = named(store, "b").into_iter().filter(|n| !named(store, "a").contains(n)).count() as u64;
    store.remove_image("b").unwrap();
    world.make_old();
    let report = gc(store, world.grace(), false).unwrap();
    assert_eq!((report.images, report.removed, report.waiting), (1, own + 1, 0), "{report:?}");
    assert_eq!(repair_image("a", store, None, None).unwrap().lost, []);
    assert_eq!(gc(store, world.grace(), false).unwrap(), Report { removed: 0, bytes: Bytes(0), ..report });
}

fn an_image_that_cannot_be_read_ends_the_collection(world: &World) {
    let store = &world.store;
    let old = Digest::of(b"old");
    store.put_chunk(&old, b"old").unwrap();
    let signed = image(store, 1, None);
    let table = crate::store::unverified("a", &signed).unwrap().memory.rest.digest;
    store.publish("a", &signed).unwrap();
    let stored = store.chunk(&table).unwrap();
    store.remove_chunk(&table);
    world.make_old();
    for word in ["not in", "EOF"] {
        let error = gc(store, world.grace(), false).unwrap_err();
        let Error::Uncollectable { name, source } = &error else { panic!("{error}") };
        assert!(name == "a" && source.to_string().contains(word), "{source} does not say {word}");
        assert!(store.has(&old), "something was removed");
        // The table is back, but the manifest is of another version.
        store.put_chunk(&table, &stored).unwrap();
        store
            .put_image("a", &vmatrix_model::manifest::SignedManifest { manifest: "{".into(), ..signed.clone() })
            .unwrap();
    }
    store.remove_image("a").unwrap();
    assert!(gc(store, world.grace(), false).unwrap().removed > 1);
}

fn what_is_no_chunk_is_left_alone(world: &World) {
    let store = &world.store;
    for name in ["README", "00notes", ".part"] {
        store.put(&format!("chunks/00/{name}"), b"mine").unwrap();
    }
    // A chunk in another's shard was put there by hand.
    store.put(&format!("chunks/00/{}", "ff".repeat(32)), b"mine").unwrap();
    store.put("chunks/00/.17-4.part", b"left by a writer that died").unwrap();
    world.make_old();
    let report = gc(store, world.grace(), false).unwrap();
    let mut left: Vec<String> = store.shard(0).unwrap().into_iter().map(|(_, e)| e.name).collect();
    left.sort();
    assert!(left.len() == 3 + usize::from(report.removed == 1), "{left:?}, {report:?}");
    assert!(left.contains(&"README".to_owned()) && left.contains(&"ff".repeat(32)));
    assert!(!left.contains(&".17-4.part".to_owned()));
}

fn a_publisher_keeps_collectors_out(world: &World) {
    let store = &world.store;
    store.put_chunk(&Digest::of(b"old"), b"old").unwrap();
    world.make_old();
    let publishing = store.publishing().unwrap();
    // In a folder the kernel makes the collector wait.
    let begun = std::time::Instant::now();
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| gc(store, world.grace(), false).unwrap());
        pause(Duration::from_millis(700));
        assert!(store.has(&Digest::of(b"old")), "it was taken out while somebody published");
        drop(publishing);
        assert_eq!(collector.join().unwrap().removed, 1);
    });
    assert!(begun.elapsed() < Duration::from_secs(20));
}

fn a_publisher_waits_for_the_batch_of_a_collector(world: &World) {
    let store = &world.store;
    let signed = image(store, 1, None);
    let sweeping = store.sweeping().unwrap().unwrap();
    let published = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            store.publish("a", &signed).unwrap();
            published.store(true, Ordering::SeqCst);
        });
        pause(Duration::from_millis(700));
        assert!(!published.load(Ordering::SeqCst) && store.image("a").unwrap().is_none());
        drop(sweeping);
    });
    assert!(store.image("a").unwrap().is_some());
}

fn what_is_put_or_kept_again_is_young(world: &World) {
    let (store, digest) = (&world.store, Digest::of(b"x"));
    store.put_chunk(&digest, b"x").unwrap();
    world.make_old();
    store.put_chunk(&digest, b"x").unwrap();
    assert_eq!(gc(store, world.grace(), false).unwrap().removed, 0, "what was put again was taken out");
    world.make_old();
    if store.keep(&digest).is_some() {
        assert_eq!(gc(store, world.grace(), false).unwrap().removed, 0, "what was kept was taken out");
    }
    world.make_old();
    assert_eq!(gc(store, world.grace(), false).unwrap().removed, 1);
}

#[test]
fn what_is_put_or_kept_again_is_young_in_a_folder() {
    what_is_put_or_kept_again_is_young(&folder());
}

#[test]
fn what_is_put_or_kept_again_is_young_in_a_bucket() {
    what_is_put_or_kept_again_is_young(&s3());
}

/// Pushers, one that removes images, and collectors without any grace, all at once, each a number of times.
/// Nothing that a manifest names may ever be missing: neither for a collector that reads it, nor in the end.
fn storm(to: &Store, seed: u64, calm: impl FnOnce()) -> (u64, u64) {
    let source = folder();
    for own in 0..4 {
        source.store.publish(&format!("image-{own}"), &image(&source.store, own, None)).unwrap();
    }
    let (pushed, removed) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for worker in 0..3u64 {
            let (from, pushed) = (&source.store, &pushed);
            scope.spawn(move || {
                for step in 0..4u64 {
                    let choice = seed.rotate_left((worker * 16 + step * 4) as u32);
                    let name = format!("image-{}", choice % 4);
                    let outcome = if choice & 0xc == 0 {
                        to.remove_image(&name).map(drop)
                    } else {
                        copy_image(&name, from, to, &|_| {}).map(|_| {
                            pushed.fetch_add(1, Ordering::Relaxed);
                        })
                    };
                    // It may be told that others were in its way, and say so; it may not believe that all is well.
                    if let Err(error) = outcome {
                        let told = matches!(error, Error::Busy { .. } | Error::NoChunk { .. } | Error::Bucket { .. });
                        assert!(told, "{error:?}");
                    }
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..3 {
                    match gc(to, Duration::ZERO, false) {
                        Ok(report) => {
                            removed.fetch_add(report.removed, Ordering::Relaxed);
                        }
                        Err(Error::Uncollectable { source, .. }) if matches!(*source, Error::NoChunk { .. }) => {
                            panic!("a table is gone: {source}")
                        }
                        Err(_) => {}
                    }
                }
            });
        }
    });
    calm();
    for name in to.names().unwrap() {
        for need in named(to, &name) {
            check_chunk(to, &need, None).unwrap_or_else(|e| panic!("{name} lost a chunk: {e}"));
        }
    }
    (pushed.into_inner(), removed.into_inner())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_pushes_and_collections_loses_a_chunk_of_a_bucket(seed: u64) {
        let (world, calm) = shaken(seed);
        let world = world.with_lease(Duration::from_secs(5));
        let (pushed, removed) = storm(&world.store, seed, calm);
        prop_assert!(pushed + removed > 0, "nothing went on");
    }

    #[test]
    fn no_order_of_pushes_and_collections_loses_a_chunk_of_a_folder(seed: u64) {
        let world = folder();
        let (pushed, removed) = storm(&world.store, seed, || {});
        prop_assert!(pushed + removed > 0, "nothing went on");
    }
}

#[test]
fn a_dead_publishers_lock_counts_for_a_lease_and_no_longer() {
    let world = in_memory().with_lease(Duration::from_millis(200));
    let store = &world.store;
    store.put_chunk(&Digest::of(b"old"), b"old").unwrap();
    store.put("locks/publish-of-one-that-died", b"").unwrap();
    let first = gc(store, Duration::ZERO, false).unwrap();
    pause(Duration::from_millis(2300));
    let second = gc(store, Duration::ZERO, false).unwrap();
    assert_eq!((first.removed + second.removed, second.waiting), (1, 0), "{first:?} {second:?}");
}

#[test]
fn a_collector_that_was_stopped_too_long_removes_nothing_more() {
    let world = in_memory().with_lease(Duration::from_millis(300));
    let digest = Digest::of(b"x");
    world.store.put_chunk(&digest, b"x").unwrap();
    let sweeping = world.store.sweeping().unwrap().unwrap();
    pause(Duration::from_millis(250));
    let outcome = world.store.sweep(&sweeping, digest.0[0], &[digest.to_string()]);
    assert!(matches!(outcome, Err(Error::Busy { .. })) && world.store.has(&digest));
}

#[test]
fn of_two_collectors_one_gives_way() {
    let world = in_memory();
    let first = world.store.sweeping().unwrap();
    assert!(first.is_some() && world.store.sweeping().unwrap().is_none());
    drop(first);
    assert!(world.store.sweeping().unwrap().is_some());
}
