//! The daemons: each runs until it is told to stop.

use super::block_on;
use crate::args::Command;
use anyhow::{Context, Result};
use std::process::ExitCode;
use vmatrix_vma_build::learn::Learner;
use vmatrix_vma_image::Store;

pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Cpa(d) => block_on(vmatrix_cpa_agent::run(&d.config)).context("cpa ended")?,
        Command::Vma(d) => block_on(vmatrix_vma_agent::run(&d.config)).context("vma ended")?,
        Command::Machine(d) => block_on(vmatrix_vma_agent::machine::run(&d.config)).context("machine ended")?,
        Command::Edge(d) => block_on(vmatrix_edge_agent::run(&d.config)).context("edge ended")?,
        Command::Origin(d) => block_on(vmatrix_edge_agent::origin::run(&d.config)).context("origin ended")?,
        Command::Store(d) => {
            let learner = |store: &Store| Learner::answerer(store.clone());
            block_on(async { Ok(vmatrix_vma_transfer::run_answering(&d.config, learner).await?) })
                .context("store ended")?
        }
        Command::Pager(d) => block_on(vmatrix_vma_pager::run(&d.config)).context("pager ended")?,
        Command::Relay(d) => block_on(vmatrix_edge_agent::relay::run(&d.config)).context("relay ended")?,
        Command::Tunnel(t) => block_on(vmatrix_edge_agent::tunnel::run(vmatrix_edge_agent::tunnel::TunnelArgs {
            netns: t.netns,
            network: t.network.parse()?,
            cell: t.cell,
            origin: t.origin,
            token_file: t.token_file,
            device: t.device,
            status: t.status,
        }))
        .context("tunnel ended")?,
        Command::Wan(d) => vmatrix_lab::wan::run(&d.config).context("wan ended")?,
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}
