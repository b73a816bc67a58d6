//! The daemons of a machine and its network, the store and the WAN between networks as one program, so that tests can
//! kill them: `daemons machine --config FILE`.

use anyhow::bail;
use std::path::PathBuf;
use vmatrix_vma_build::learn::Learner;
use vmatrix_vma_image::Store;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter("info,vmatrix_vma_agent=debug")
        .init();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [which, _, config] = words.as_slice() else {
        bail!("say machine, vma, pager, relay, store or wan, --config and a file")
    };
    let config = PathBuf::from(config);
    match which.as_str() {
        "machine" => vmatrix_vma_agent::machine::run(&config).await,
        "vma" => vmatrix_vma_agent::run(&config).await,
        "store" => {
            let learner = |store: &Store| Learner::answerer(store.clone());
            Ok(vmatrix_vma_transfer::run_answering(&config, learner).await?)
        }
        "wan" => tokio::task::block_in_place(|| vmatrix_lab::wan::run(&config)),
        "relay" => vmatrix_edge_agent::relay::run(&config).await,
        "pager" => vmatrix_vma_pager::run(&config).await,
        other => bail!("there is no daemon {other} here"),
    }
}
