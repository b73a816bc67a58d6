//! What of an image is here, and newer ones.

use super::{Network, instance, offered, spec, stage_whole};
use crate::machine::image::{Known, Level};
use std::sync::Arc;
use std::time::Duration;
use vmatrix_model::Digest;
use vmatrix_vma_core::steps::Step;
use vmatrix_vma_transfer::identity::Role;
use vmatrix_vma_transfer::{ServerConfig, serve};

#[test]
fn machine_a_chunk_cut_short_is_missing_and_one_that_is_gone_too() {
    let network = Network::new("d");
    let manifest = stage_whole(&network);
    let dir = network.dir.path().join("state/store/chunks");
    let chunk = |digest: &Digest| dir.join(&digest.to_string()[..2]).join(digest.to_string());
    let level =
        || network.machine().images.names(Level::Whole).len() + network.machine().images.names(Level::Critical).len();
    assert_eq!(level(), 2);
    std::fs::write(chunk(&manifest.parts[0].table.digest), b"cut").unwrap();
    assert_eq!(level(), 1, "the disk's table is damaged, and that is not seen");
    std::fs::remove_file(chunk(&manifest.device.digest)).unwrap();
    assert_eq!(level(), 0, "device state is gone, and that is not seen");
}

/// A daemon that gives what it has to members of the fleet.
async fn source(network: &Network) -> tokio::task::JoinHandle<()> {
    let identity = network.authority().issue(Role::Store, "origin").unwrap();
    let config = ServerConfig { identity, store: network.store("origin"), keys: None, rate_mbit: None };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8446").await.unwrap();
    tokio::spawn(async move { serve(listener, config, std::future::pending()).await.unwrap() })
}

#[test]
fn machine_a_newer_image_takes_the_place_of_one_that_nothing_runs_from() {
    let network = Network::new("g");
    let machine = network.machine();
    let origin = network.store("origin");
    let offer = |answer_ms| {
        let image = offered(&origin, &machine.host, answer_ms);
        origin.put_image("tiny", &image).unwrap();
        Digest::of(image.manifest.as_bytes())
    };
    let has = || machine.images.at("tiny", Level::Whole).map(|k| k.digest);
    network.block_on(async {
        let first = offer(1);
        let serving = source(&network).await;
        machine
            .step(Step::Stage { service: "tiny".parse().unwrap(), image: "tiny".into(), urgent: false })
            .await
            .unwrap();
        machine.until("tiny", Level::Whole, Duration::from_secs(20)).await.unwrap();
        machine.renew("tiny").await.unwrap();
        assert_eq!(has(), Some(first));

        // A cell keeps the image it was made from.
        machine.records.begin(&spec(0), machine.config.cells, None).unwrap();
        let second = offer(2);
        machine.renew("tiny").await.unwrap();
        assert_eq!(has(), Some(first));
        let waits = origin.image("tiny").unwrap().unwrap();
        let waits = Known::trust("tiny", waits, &machine.config.signers, &machine.host).unwrap();
        assert!(!machine.put_in_place("tiny", &Arc::new(waits)).unwrap(), "taken from under a cell");

        machine.records.forget(&instance(0)).unwrap();
        machine.renew("tiny").await.unwrap();
        assert_eq!(has(), Some(second));
        let seen = machine.seen().images;
        assert!(seen[0].seen.as_ref().is_some_and(|s| s.digest == second && s.complete() && s.resumable), "{seen:?}");

        // What nobody here trusts is not taken.
        let mut forged = offered(&origin, &machine.host, 3);
        forged.signature = "0".repeat(128);
        origin.put_image("tiny", &forged).unwrap();
        assert!(machine.renew("tiny").await.is_err());
        assert_eq!(has(), Some(second));
        serving.abort();
    });
    drop(machine);
    let after = network.machine().images.at("tiny", Level::Whole).map(|k| k.manifest.measured.answer_ms);
    assert_eq!(after, Some(2), "after a restart");
    assert_eq!(network.left(), Vec::<String>::new());
}
