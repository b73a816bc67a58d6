//! Measurements, side by side with what others do.

use super::image::store;
use crate::args;
use anyhow::{Context, Result};
use std::process::ExitCode;
use vmatrix_bench::{Options, markdown};

pub fn run(bench: &args::Bench) -> Result<ExitCode> {
    let options = Options {
        program: std::env::current_exe().context("cannot find the program that runs")?,
        store: store(&bench.store)?,
        recipes: bench.recipes.clone(),
        quick: bench.quick,
        rows: bench.rows.clone(),
        runs: bench.runs,
    };
    let report = vmatrix_bench::run(&bench.name, &options)?;
    if bench.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", markdown(&[report]));
    }
    Ok(ExitCode::SUCCESS)
}
