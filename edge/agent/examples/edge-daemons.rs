//! The daemons of this crate as one program, so that tests can start them in a namespace and kill them:
//! `edge-daemons edge FILE`.

use anyhow::bail;
use std::path::{Path, PathBuf};
use vmatrix_edge_agent::tunnel::TunnelArgs;
use vmatrix_edge_agent::{origin, relay, run, tunnel};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["edge", config] => run(Path::new(config)).await,
        ["origin", config] => origin::run(Path::new(config)).await,
        ["relay", config] => relay::run(Path::new(config)).await,
        ["tunnel", netns, cell, folder] => {
            let folder = Path::new(folder);
            tunnel::run(TunnelArgs {
                netns: PathBuf::from(netns),
                network: "lyon".parse()?,
                cell: (*cell).to_owned(),
                origin: "http://198.19.0.1:8445".to_owned(),
                token_file: folder.join("token"),
                device: "vpn0".to_owned(),
                status: folder.join(format!("{cell}.json")),
            })
            .await
        }
        _ => bail!("say edge, origin or relay and a file, or tunnel, a namespace, a cell and a folder"),
    }
}
