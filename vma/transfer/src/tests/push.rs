//! Opening an image, and what is pushed.

use super::fleet::{Fleet, Running, noise};
use super::wire::Wire;
use crate::identity::Role;
use crate::{Ask, Class, ImageRef, Opened};
use std::time::{Duration, Instant};
use vmatrix_model::Digest;
use vmatrix_vma_image::seal::OwnerKey;

async fn pushed(opened: &mut Opened) -> Vec<Digest> {
    let mut digests = Vec::new();
    while let Some(arrived) = opened.pushed.next().await {
        digests.push(arrived.need.digest);
    }
    digests
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_is_needed_before_the_guest_runs_follows_the_manifest_in_order() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 1000, None);
    let origin = fleet.serve_store(&image.store).await;
    let local = fleet.empty("local");
    let sources = fleet.machine(&local, &[origin.address]);
    assert_eq!(sources.warm().await, 1);

    let mut opened = sources.open(&image.ask(true), &image.signers).await.unwrap();
    assert_eq!(opened.digest, image.digest());
    let memory = &image.manifest.memory;
    let mut wanted = vec![memory.first.digest, image.manifest.device.digest];
    wanted.extend(image.map.packs()[..image.map.working_set()].iter().map(|p| p.digest));
    wanted.push(memory.rest.digest);
    assert!(wanted.len() == 11, "{} chunks", wanted.len());
    assert_eq!(pushed(&mut opened).await, wanted);
    // A chunk that was pushed is not fetched again.
    let before = origin.server.sent().chunks;
    let first = image.packs()[0];
    super::fleet::eventually("it is kept", || local.has(&first.digest)).await;
    sources.get(&first, Class::Miss, None).await.unwrap();
    assert_eq!(origin.server.sent().chunks, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_warm_connection_an_open_with_all_that_is_pushed_takes_one_round_trip() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 1000, None);
    let origin = fleet.serve_store(&image.store).await;
    let way = Duration::from_millis(300);
    let wire = Wire::slow(origin.address, way).await;
    let sources = fleet.machine(&fleet.empty("local"), &[wire.address]);
    assert_eq!(sources.warm().await, 1);
    let began = Instant::now();
    let mut opened = sources.open(&image.ask(true), &image.signers).await.unwrap();
    let manifest = began.elapsed();
    assert_eq!(pushed(&mut opened).await.len(), 11);
    let all = began.elapsed();
    assert!(manifest >= 2 * way, "the wire is not slow: {manifest:?}");
    // A second round trip would make 1200 ms of it.
    assert!(all < 2 * way + Duration::from_millis(450), "{all:?} for one round trip of {:?}", 2 * way);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pack_is_the_same_on_the_other_side() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 1000, None);
    let origin = fleet.serve_store(&image.store).await;
    let sources = fleet.machine(&fleet.empty("local"), &[origin.address]);
    let mut fill = sources.fill(image.packs(), None);
    let mut count = 0;
    while let Some(arrived) = fill.next().await {
        let arrived = arrived.unwrap();
        assert!(
            arrived.need.plain as usize == arrived.plain.len() && Digest::of(&arrived.plain) == arrived.need.digest
        );
        count += 1;
    }
    assert_eq!(count, image.packs().len());
    assert_eq!(origin.server.sent().chunks, count as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_older_snapshot_has_is_not_pushed() {
    let fleet = Fleet::new();
    let old = fleet.image("origin", 1000, None);
    old.store.put_image("old", &old.signed).unwrap();
    let mut memory = noise(7, 1000 * 4096);
    memory[4096 * 40] ^= 1;
    let new = fleet.image_of("origin", &memory, None);
    let origin = fleet.serve_store(&new.store).await;
    let sources = fleet.machine(&fleet.empty("local"), &[origin.address]);
    let ask = Ask { have: Some(old.digest()), ..new.ask(true) };
    let mut opened = sources.open(&ask, &new.signers).await.unwrap();
    let digests = pushed(&mut opened).await;
    let changed = new.map.packs()[1].digest;
    assert!(digests.contains(&changed));
    assert!(digests.len() <= 3, "{} chunks were pushed where one page changed", digests.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_images_opened_at_once_over_one_connection_all_open_and_no_source_is_blamed() {
    let fleet = Fleet::new();
    let key = OwnerKey::from_bytes([9; 32]);
    let image = fleet.image("origin", 1000, Some(&key));
    let keys = fleet.path("keys");
    std::fs::create_dir(&keys).unwrap();
    key.write(keys.join(key.id().to_string())).unwrap();
    let config = crate::ServerConfig { keys: Some(keys), ..fleet.config(&image.store) };
    let origin: Running = fleet.serve(config).await;
    let sources = fleet.machine(&fleet.empty("local"), &[origin.address]);
    assert_eq!(sources.warm().await, 1);
    let open = || async {
        let mut opened = sources.open(&image.ask(true), &image.signers).await.unwrap();
        assert!(opened.key.is_some(), "its key did not come");
        pushed(&mut opened).await;
    };
    for _ in 0..20 {
        tokio::join!(open(), open(), open());
    }
    assert!(sources.status().await.iter().all(|s| s.fault.is_none()), "{:?}", sources.status().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_owners_key_comes_with_a_sealed_image_but_to_machines_only() {
    let fleet = Fleet::new();
    let key = OwnerKey::from_bytes([9; 32]);
    let image = fleet.image("origin", 1000, Some(&key));
    let keys = fleet.path("keys");
    std::fs::create_dir(&keys).unwrap();
    key.write(keys.join(key.id().to_string())).unwrap();
    let config = crate::ServerConfig { keys: Some(keys), ..fleet.config(&image.store) };
    let origin: Running = fleet.serve(config).await;

    let machine = fleet.machine(&fleet.empty("local"), &[origin.address]);
    let mut opened = machine.open(&image.ask(true), &image.signers).await.unwrap();
    assert_eq!(opened.key.as_ref().map(OwnerKey::id), Some(key.id()));
    assert_eq!(pushed(&mut opened).await.len(), 11);
    assert_eq!(machine.key(key.id()).await.unwrap().id(), key.id());

    let operator = fleet.identity(Role::Operator, "someone");
    let local = fleet.empty("operator");
    let operator =
        crate::Sources::new(&operator, local.clone(), vec![origin.address], None, &crate::Limits::default()).unwrap();
    let mut opened = operator.open(&image.ask(true), &image.signers).await.unwrap();
    assert!(opened.key.is_none());
    let tables = pushed(&mut opened).await;
    assert_eq!(tables, [image.manifest.memory.first.digest, image.manifest.memory.rest.digest], "only tables are open");
    let refused = operator.key(key.id()).await.unwrap_err().to_string();
    assert!(refused.contains("a operator is given no keys") || refused.contains("only a machine is"), "{refused}");
    assert!(image.packs().iter().all(|need| !local.has(&need.digest)), "what could not be verified was kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_nobody_trusts_is_not_opened_and_nothing_behind_it_is_kept() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 1000, None);
    let origin = fleet.serve_store(&image.store).await;
    let local = fleet.empty("local");
    let sources = fleet.machine(&local, &[origin.address]);
    let error = sources.open(&image.ask(true), &["00".repeat(32)]).await.unwrap_err().to_string();
    assert!(error.contains("not believed"), "{error}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(image.packs().iter().all(|need| !local.has(&need.digest)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_there_is_said_to_be_missing_and_the_next_source_is_asked() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 1000, None);
    let empty = fleet.serve_store(&fleet.empty("empty")).await;
    let origin = fleet.serve_store(&image.store).await;
    let sources = fleet.machine(&fleet.empty("local"), &[empty.address, origin.address]);
    assert_eq!(sources.warm().await, 2);
    sources.open(&image.ask(false), &image.signers).await.unwrap();
    let by_digest = Ask { image: ImageRef::Digest(image.digest()), ..image.ask(false) };
    sources.open(&by_digest, &image.signers).await.unwrap();
    let alone = fleet.machine(&fleet.empty("alone"), &[empty.address]);
    let error = alone.open(&image.ask(true), &image.signers).await.unwrap_err().to_string();
    assert!(error.contains("there is no such image here"), "{error}");
}
