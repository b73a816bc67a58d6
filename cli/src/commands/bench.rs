//! Measurements, side by side with what others do.

use super::image::store;
use crate::args;
use anyhow::{Context, Result};
use std::process::ExitCode;
use vmatrix_bench::{Options, Scope, markdown, results};

pub fn run(bench: &args::Bench) -> Result<ExitCode> {
    if let Some(name) = &bench.name {
        let options = Options {
            program: std::env::current_exe().context("cannot find the program that runs")?,
            store: store(&bench.store)?,
            recipes: bench.recipes.clone(),
            quick: bench.quick,
            rows: bench.rows.clone(),
            runs: bench.runs,
        };
        let scope = Scope { clones: bench.clones, networks: bench.networks.clone(), into: bench.into.clone() };
        let report = vmatrix_bench::run_scope(name, &options, &scope)?;
        if bench.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            print!("{}", markdown(&[report]));
        }
    }
    if let Some(page) = &bench.write {
        let files: Vec<_> = bench.from.iter().chain(&bench.into).cloned().collect();
        anyhow::ensure!(!files.is_empty(), "--write needs results: name their files with --from, or --into");
        std::fs::write(page, markdown(&results::read_all(&files)?))
            .with_context(|| format!("cannot write {}", page.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
