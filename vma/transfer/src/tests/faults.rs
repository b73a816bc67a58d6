//! Sources that fail and lie: they are dropped and marked, the fetch goes on elsewhere, nothing wrong is kept.

use super::fleet::{Fleet, Image, chunk, eventually};
use super::liar::{ALL, Liar, Lie};
use super::wire::Wire;
use crate::identity::Role;
use crate::{Class, Sources};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmatrix_model::Digest;

async fn fetched_in_spite_of(lie: Lie, class: Class) {
    let fleet = Fleet::new();
    let image: Image = fleet.image("origin", 300, None);
    let origin = fleet.serve_store(&image.store).await;
    let liar = Liar::start(&fleet.identity(Role::Store, "liar"), &image.store, lie).await;
    // Each chunk is lied about: to a client of its own, which does not know the liar yet.
    let each = image.packs().into_iter().enumerate().map(|(i, need)| {
        let local = fleet.empty(&format!("local-{i}"));
        let sources = fleet.machine(&local, &[liar.address, origin.address]);
        let (image, liar) = (&image, liar.address);
        async move {
            let got = tokio::time::timeout(Duration::from_secs(40), sources.get(&need, class, None)).await;
            let plain = got.unwrap_or_else(|_| panic!("{lie:?}: a fetch hung")).unwrap();
            assert_eq!(Digest::of(&plain), need.digest, "{lie:?}: wrong bytes were handed on");
            eventually("the chunk is kept", || local.has(&need.digest)).await;
            assert!(image.right_in(&local, &need, None), "{lie:?}: wrong bytes were kept");
            (sources, liar)
        }
    });
    let mut marked = 0;
    for (sources, liar) in all(each).await {
        let status = sources.status().await;
        let liar = status.iter().find(|s| s.address == liar).unwrap();
        assert!(liar.chunks == 0 || liar.foul > 0, "{lie:?}: {liar:?}");
        marked += usize::from(liar.fault.is_some());
    }
    assert!(liar.asked.load(Ordering::Relaxed) > 0, "{lie:?}: the liar was never asked");
    assert!(marked > 0, "{lie:?}: the liar was not marked by anybody");
}

/// All at once.
async fn all<T>(each: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut waiting: Vec<_> = each.map(Box::pin).collect();
    let mut done = Vec::new();
    std::future::poll_fn(|context| {
        waiting.retain_mut(|future| match future.as_mut().poll(context) {
            std::task::Poll::Ready(value) => {
                done.push(value);
                false
            }
            std::task::Poll::Pending => true,
        });
        if waiting.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_source_does_wrong_with_a_miss_another_gives_it() {
    for lie in ALL {
        let began = Instant::now();
        fetched_in_spite_of(lie, Class::Miss).await;
        assert!(began.elapsed() < Duration::from_secs(20), "{lie:?} took {:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_source_does_wrong_in_the_background_another_gives_it() {
    for lie in ALL.into_iter().filter(|lie| *lie != Lie::Stall) {
        fetched_in_spite_of(lie, Class::Background).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_lied_is_not_asked_again_at_once() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 300, None);
    let origin = fleet.serve_store(&image.store).await;
    let liar = Liar::start(&fleet.identity(Role::Store, "liar"), &image.store, Lie::Corrupt).await;
    let sources = fleet.machine(&fleet.empty("local"), &[liar.address, origin.address]);
    for need in image.packs() {
        sources.get(&need, Class::Miss, None).await.unwrap();
    }
    assert_eq!(liar.asked.load(Ordering::Relaxed), 1);
    let status = sources.status().await;
    assert_eq!((status[0].foul, status[1].foul), (1, 0));
    assert!(status[0].fault.as_ref().unwrap().contains("wrong bytes"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_nobody_has_fails_and_says_who_was_asked() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 300, None);
    let origin = fleet.serve_store(&image.store).await;
    let need = chunk(&fleet.empty("other"), 5, 1000);
    let sources = fleet.machine(&fleet.empty("local"), &[origin.address, "127.0.0.1:1".parse().unwrap()]);
    let began = Instant::now();
    let error = sources.get(&need, Class::Critical, None).await.unwrap_err().to_string();
    assert!(error.contains("it is not there") && error.contains("127.0.0.1:1"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(35));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_rotted_in_the_local_store_is_fetched_anew_and_mended() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 300, None);
    let origin = fleet.serve_store(&image.store).await;
    let local = fleet.empty("local");
    let need = image.packs()[0];
    local.put_chunk(&need.digest, b"rotten").unwrap();
    let sources = fleet.machine(&local, &[origin.address]);
    let plain = sources.get(&need, Class::Miss, None).await.unwrap();
    assert_eq!(Digest::of(&plain), need.digest);
    eventually("it is mended", || image.right_in(&local, &need, None)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_store_that_takes_nothing_does_not_stop_a_fetch() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 300, None);
    let origin = fleet.serve_store(&image.store).await;
    let local = fleet.empty("local");
    let sources = fleet.machine(&local, &[origin.address]);
    std::fs::remove_dir_all(fleet.path("local")).unwrap();
    std::fs::write(fleet.path("local"), b"no folder").unwrap();
    for need in image.packs() {
        sources.get(&need, Class::Miss, None).await.unwrap();
    }
}

async fn drain(sources: &Sources, image: &Image) -> usize {
    let mut fill = sources.fill(image.packs(), None);
    let mut count = 0;
    while let Some(arrived) = fill.next().await {
        arrived.unwrap();
        count += 1;
    }
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_cut_and_comes_back_goes_on_where_it_was() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 2000, None);
    let origin = fleet.serve_store(&image.store).await;
    let whole: u64 = image.packs().iter().map(|n| n.stored).sum();
    let wire = Wire::cut_after(origin.address, whole / 2).await;
    let sources = fleet.machine(&fleet.empty("local"), &[wire.address]);
    let mends = Arc::clone(&wire.cut);
    tokio::spawn(async move {
        while !mends.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        mends.store(false, Ordering::SeqCst);
    });
    assert_eq!(drain(&sources, &image).await, image.packs().len());
    let sent = wire.bytes.load(Ordering::SeqCst);
    // What was on the wire when it was cut is sent again: less than the window and the sockets hold.
    assert!(sent < whole + (3 << 20), "{sent} bytes for an image of {whole}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_begins_anew_fetches_only_what_it_has_not() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 2000, None);
    let origin = fleet.serve_store(&image.store).await;
    let local = fleet.empty("local");
    let first = fleet.machine(&local, &[origin.address]);
    let mut fill = first.fill(image.packs(), None);
    for _ in 0..image.packs().len() / 2 {
        fill.next().await.unwrap().unwrap();
    }
    drop((fill, first));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let there = image.packs().iter().filter(|n| local.has(&n.digest)).count() as u64;
    let before = origin.server.sent().chunks;
    let second = fleet.machine(&local, &[origin.address]);
    assert_eq!(drain(&second, &image).await, image.packs().len());
    let fetched = origin.server.sent().chunks - before;
    assert_eq!(fetched, image.packs().len() as u64 - there);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_dies_half_way_is_replaced_by_another() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 2000, None);
    let (one, other) = (fleet.serve_store(&image.store).await, fleet.serve_store(&image.store).await);
    let sources = fleet.machine(&fleet.empty("local"), &[one.address, other.address]);
    sources.warm().await;
    let mut fill = sources.fill(image.packs(), None);
    let mut count = 0;
    let mut one = Some(one);
    while let Some(arrived) = fill.next().await {
        arrived.unwrap();
        count += 1;
        if count == image.packs().len() / 3 {
            one = None;
        }
    }
    assert!(one.is_none());
    assert_eq!(count, image.packs().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_that_nobody_waits_for_is_given_up() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 300, None);
    let liar = Liar::start(&fleet.identity(Role::Store, "liar"), &image.store, Lie::Silent).await;
    let sources = fleet.machine(&fleet.empty("local"), &[liar.address]);
    let need = image.packs()[0];
    let waits = tokio::time::timeout(Duration::from_millis(500), sources.get(&need, Class::Miss, None)).await;
    assert!(waits.is_err());
    let asked = liar.asked.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(liar.asked.load(Ordering::Relaxed), asked, "it is still asked for");
}
