//! The edge's daemons against a real kernel: namespaces, nft, sockets, TUN devices.
//!
//! Each test builds its own namespaces and removes them, also when it fails. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends at the first thing that is not as it should be"
)]

mod names;
mod nat;
mod relay;
mod site;
mod tunnel;

use std::path::PathBuf;

/// Started as a process of its own by the other tests, inside a namespace, so that it can be killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the other tests start it"]
async fn daemon() {
    let Ok(what) = std::env::var("VMATRIX_TEST_DAEMON") else { return };
    let words: Vec<&str> = what.split(' ').collect();
    let ended = match words.as_slice() {
        ["edge", config] => vmatrix_edge_agent::run(&PathBuf::from(config)).await,
        ["origin", config] => vmatrix_edge_agent::origin::run(&PathBuf::from(config)).await,
        ["relay", config] => vmatrix_edge_agent::relay::run(&PathBuf::from(config)).await,
        ["tunnel", netns, cell, folder] => {
            vmatrix_edge_agent::tunnel::run(vmatrix_edge_agent::tunnel::TunnelArgs {
                netns: PathBuf::from(netns),
                network: "lyon".parse().unwrap(),
                cell: (*cell).to_owned(),
                origin: "http://198.19.0.1:8445".into(),
                token_file: PathBuf::from(folder).join("token"),
                device: "vpn0".into(),
                status: PathBuf::from(folder).join(format!("{cell}.json")),
            })
            .await
        }
        _ => panic!("unknown daemon {what:?}"),
    };
    if let Err(e) = ended {
        panic!("{e:#}");
    }
}
