//! Measurements, side by side with what others do.

use super::image::store;
use crate::args;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::ExitCode;
use vmatrix_bench::{Options, Scope, markdown, results};

pub fn run(bench: &args::Bench) -> Result<ExitCode> {
    if bench.name.as_deref() == Some("placement") {
        return placement(bench);
    }
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

/// Needs neither store nor guests, and has parts in place of rows.
fn placement(bench: &args::Bench) -> Result<ExitCode> {
    let data = std::env::var_os("VMATRIX_DATA").map(PathBuf::from);
    let options = vmatrix_bench_placement::Options { quick: bench.quick, parts: &bench.rows, seeds: bench.runs };
    let mut found = vmatrix_bench_placement::measure(data.as_deref(), options)?;
    if let Some(file) = bench.into.as_ref().filter(|file| file.exists()) {
        let what = || format!("cannot add to {}", file.display());
        let before = std::fs::read_to_string(file).with_context(what)?;
        let before = serde_json::from_str(&before).with_context(what)?;
        found = vmatrix_bench_placement::merged(before, found).with_context(what)?;
    }
    let page = vmatrix_bench_placement::page::markdown(&found);
    if bench.json {
        println!("{found}");
    } else {
        print!("{page}");
    }
    if let Some(file) = &bench.into {
        let text = serde_json::to_string_pretty(&found)? + "\n";
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if let Some(file) = &bench.write {
        std::fs::write(file, page).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
