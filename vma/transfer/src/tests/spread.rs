//! Rates, urgency and many receivers, over real connections.

use super::fleet::{Fleet, Running, chunk};
use crate::identity::Role;
use crate::{Class, Limits, ServerConfig, Sources};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use vmatrix_vma_image::chunks::Need;

#[tokio::test(flavor = "multi_thread")]
async fn a_servers_rate_cap_is_held_over_all_its_connections() {
    let fleet = Fleet::new();
    let store = fleet.empty("origin");
    let needs: Vec<_> = (0..40).map(|seed| chunk(&store, seed, 100_000)).collect();
    let whole: u64 = needs.iter().map(|n| n.stored).sum();
    let origin = fleet.serve(ServerConfig { rate_mbit: Some(20), ..fleet.config(&store) }).await;
    let began = Instant::now();
    let halves = needs.chunks(20).enumerate().map(|(i, half)| {
        let sources = fleet.machine(&fleet.empty(&format!("local-{i}")), &[origin.address]);
        let mut fill = sources.fill(half.to_vec(), None);
        tokio::spawn(async move { while fill.next().await.is_some_and(|arrived| arrived.is_ok()) {} })
    });
    for half in halves.collect::<Vec<_>>() {
        half.await.unwrap();
    }
    let wanted = Duration::from_millis(whole * 8 / 20_000);
    let (took, slack) = (began.elapsed(), wanted / 10);
    assert!(took + slack >= wanted, "{whole} bytes in {took:?}: faster than the cap, which takes {wanted:?}");
    // A loaded machine may be slower, but not by as much as a cap that pauses in vain would be.
    assert!(took < wanted + wanted / 2, "{whole} bytes in {took:?}: slower than the cap, which takes {wanted:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receivers_cap_holds_back_the_background_but_not_a_miss() {
    let fleet = Fleet::new();
    let store = fleet.empty("origin");
    let needs: Vec<_> = (0..30).map(|seed| chunk(&store, seed, 100_000)).collect();
    let missed = chunk(&store, 1000, 60_000);
    let origin = fleet.serve_store(&store).await;
    let identity = fleet.identity(Role::Machine, "a");
    let limits = Limits { background_mbit: Some(10) };
    let sources = Sources::new(&identity, fleet.empty("local"), vec![origin.address], None, &limits).unwrap();
    sources.warm().await;
    let whole: u64 = needs.iter().map(|n| n.stored).sum();
    let began = Instant::now();
    let mut fill = sources.fill(needs, None);
    let miss = {
        let sources = sources.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let began = Instant::now();
            sources.get(&missed, Class::Miss, None).await.unwrap();
            began.elapsed()
        })
    };
    while let Some(arrived) = fill.next().await {
        arrived.unwrap();
    }
    let (took, wanted) = (began.elapsed(), Duration::from_millis(whole * 8 / 10_000));
    assert!(took + wanted / 10 >= wanted, "{took:?} instead of {wanted:?}");
    assert!(took < wanted + wanted / 2, "{took:?} instead of {wanted:?}");
    let miss = miss.await.unwrap();
    assert!(miss < wanted / 4, "a miss waited {miss:?} behind the background");
}

/// In bytes, not in time: how much of the background came between a miss and its answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_miss_overtakes_a_connection_full_of_background() {
    let fleet = Fleet::new();
    let store = fleet.empty("origin");
    let needs: Vec<_> = (0..60).map(|seed| chunk(&store, seed, 200_000)).collect();
    let missed = chunk(&store, 1000, 60_000);
    // Slow enough that megabytes are queued when the miss is asked for.
    let origin = fleet.serve(ServerConfig { rate_mbit: Some(40), ..fleet.config(&store) }).await;
    let sources = fleet.machine(&fleet.empty("local"), &[origin.address]);
    let mut fill = sources.fill(needs, None);
    for _ in 0..5 {
        fill.next().await.unwrap().unwrap();
    }
    let before = sources.status().await[0].received_bytes;
    sources.get(&missed, Class::Miss, None).await.unwrap();
    let between = sources.status().await[0].received_bytes - before;
    // The sockets' buffers and what came while the answer was on its way; two megabytes are queued.
    assert!(between < 60_000 + 400_000, "{between} bytes came before a miss of 60000 was answered");
}

struct Receiver {
    sources: Sources,
    running: Running,
}

async fn receiver(fleet: &Fleet, n: usize, origin: SocketAddr, rate_mbit: Option<u64>) -> Receiver {
    let store = fleet.empty(&format!("receiver-{n}"));
    let identity = fleet.identity(Role::Machine, &format!("machine-{n}"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    let config = ServerConfig { identity: identity.clone(), store: store.clone(), keys: None, rate_mbit };
    let server = crate::Server::new(config).unwrap();
    let sources = Sources::new(&identity, store, vec![origin], Some(at), &Limits::default()).unwrap();
    // Every other one as an agent does it, the others as a server whose store another process fills.
    if n.is_multiple_of(2) {
        server.follow(&sources);
    }
    let running = fleet.serve_at(server, at).await;
    Receiver { sources, running }
}

/// How long it takes until all have all, each by itself.
async fn fill_all(receivers: &[Receiver], packs: &[Need]) -> Duration {
    let began = Instant::now();
    let fills: Vec<_> = (receivers.iter())
        .map(|receiver| {
            let mut fill = receiver.sources.fill(packs.to_vec(), None);
            tokio::spawn(async move {
                let mut count = 0;
                while let Some(arrived) = fill.next().await {
                    arrived.unwrap();
                    count += 1;
                }
                count
            })
        })
        .collect();
    for fill in fills {
        assert_eq!(fill.await.unwrap(), packs.len());
    }
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn twelve_receivers_cost_their_source_few_copies_and_little_more_time_than_one() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 1000, None);
    let packs = image.packs();
    let whole: u64 = packs.iter().map(|n| n.stored).sum();
    // Everybody's way out is as narrow.
    let rate = Some(10);
    let origin = fleet.serve(ServerConfig { rate_mbit: rate, ..fleet.config(&image.store) }).await;
    let alone = fill_all(&[receiver(&fleet, 100, origin.address, rate).await], &packs).await;
    let first = origin.server.sent();

    let mut receivers = Vec::new();
    for n in 0..12 {
        receivers.push(receiver(&fleet, n, origin.address, rate).await);
    }
    let together = fill_all(&receivers, &packs).await;
    let sent = origin.server.sent();
    let copies = (sent.bytes - first.bytes) * 100 / whole;
    println!("{whole} bytes: one in {alone:?}; twelve in {together:?}, {copies} % sent by their source");
    assert!(copies <= 300, "{copies} % of an image were sent by its source");
    assert!(together < alone * 5 / 2, "twelve took {together:?}, one {alone:?}");
    let others: u64 = receivers.iter().map(|r| r.running.server.sent().chunks).sum();
    assert_eq!(sent.chunks - first.chunks + others, 12 * packs.len() as u64, "chunks were sent twice");
}

/// What takes its time on the way to the one they were sent to, others wait for, instead of asking their source again.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_link_is_no_reason_to_send_anything_twice() {
    let fleet = Fleet::new();
    let store = fleet.empty("origin");
    // More than eight seconds of it.
    let needs: Vec<_> = (0..12).map(|seed| chunk(&store, seed, 110_000)).collect();
    let origin = fleet.serve(ServerConfig { rate_mbit: Some(1), ..fleet.config(&store) }).await;
    // Both as an agent does it.
    let receivers = [receiver(&fleet, 0, origin.address, None).await, receiver(&fleet, 2, origin.address, None).await];
    let took = fill_all(&receivers, &needs).await;
    assert!(took > Duration::from_secs(10), "{took:?} is no slow link");
    let others: u64 = receivers.iter().map(|r| r.running.server.sent().chunks).sum();
    let sent = origin.server.sent().chunks;
    assert_eq!((sent, others), (12, 12), "sent by their source, and by each other");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_dies_does_not_keep_others_from_its_chunks() {
    let fleet = Fleet::new();
    let image = fleet.image("origin", 1500, None);
    let origin = fleet.serve_store(&image.store).await;
    let first = receiver(&fleet, 0, origin.address, None).await;
    let packs = image.packs();
    let mut fill = first.sources.fill(packs.clone(), None);
    while let Some(arrived) = fill.next().await {
        arrived.unwrap();
    }
    // It no longer serves, but its connection to the origin is still there, so others are sent to it.
    drop(first.running);
    let second = receiver(&fleet, 1, origin.address, None).await;
    let mut fill = second.sources.fill(packs.clone(), None);
    let mut count = 0;
    while let Some(arrived) = fill.next().await {
        arrived.unwrap();
        count += 1;
    }
    assert_eq!(count, packs.len());
    assert!(origin.server.sent().elsewhere > 0, "nobody was sent elsewhere");
}
