//! Images of suspended VMs.

use super::block_on;
use crate::args::{self, Image, Output};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vmatrix_model::manifest::Measured;
use vmatrix_vma_image::{build, inspect};

/// The store a verb works on: as told, else in the user's cache.
pub fn store(store: &args::Store) -> Result<PathBuf> {
    if let Some(dir) = &store.store {
        return Ok(dir.clone());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| Path::new(&h).join(".cache")))
        .context(
            "neither XDG_CACHE_HOME nor HOME is set, so there is no place for images\n\nhint: name one with --store",
        )?;
    Ok(cache.join("vmatrix").join("store"))
}

pub fn run(image: &Image) -> Result<ExitCode> {
    match image {
        Image::Build { recipe, store: s, again } => build_one(recipe, &store(s)?, *again)?,
        Image::Inspect { name, store: s, output } => {
            let store = store(s)?;
            let seen = inspect::inspect(&store, name, &[])?;
            match output {
                Output::Json => println!("{}", serde_json::to_string_pretty(&seen.manifest)?),
                Output::Table => print!("{}", seen.table()),
            }
        }
        Image::Verify { name, store: s } => {
            let store = store(s)?;
            let (seen, checked) = inspect::verify(&store, name, &[])?;
            println!("{name} {}: signature and every chunk right, {checked}", seen.digest.short());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds one image unless the store has it from this very recipe.
pub fn build_one(recipe: &Path, store: &Path, again: bool) -> Result<()> {
    let built =
        block_on(async { Ok(build::build(recipe, store, &build::Options { again, ..Default::default() }).await?) })?;
    let how = if built.cached { "is there".to_owned() } else { format!("built in {:.0} s", built.took.as_secs_f64()) };
    let Measured { boot_ms, answer_ms } = built.measured;
    println!(
        "{} {} {how}: {} stored, boots in {boot_ms} ms, answers in {answer_ms} ms",
        built.name,
        built.digest.short(),
        built.stored
    );
    Ok(())
}
