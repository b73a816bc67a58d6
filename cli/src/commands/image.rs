//! Images of suspended VMs.

mod import;

use super::bar::Bar;
use super::block_on;
use crate::args::{self, Image, Output};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use vmatrix_model::manifest::Measured;
use vmatrix_vma_build::{build, record};
use vmatrix_vma_image::store::{copy_image, repair_image};
use vmatrix_vma_image::{Store, gc, inspect};

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
        Image::Verify { name, store: s, repair_from } => verify(name, &store(s)?, repair_from.as_deref())?,
        Image::Record { name, recipe, store: s } => {
            let store = store(s)?;
            let made = block_on(async { Ok(record::record(name, &store, recipe.as_deref()).await?) })?;
            println!(
                "{name} {}: {} pages ({}) instead of {} ({}), of {} requests",
                made.digest.short(),
                made.after.pages,
                made.after.stored,
                made.before.pages,
                made.before.stored,
                made.after.requests
            );
        }
        Image::Import(import) => import::import(import)?,
        Image::Export { name, to, format, store: s } => import::export(name, to, *format, &store(s)?)?,
        Image::Push { name, to, store: s } => copy(name, &Store::read(store(s)?)?, &Store::at(to)?)?,
        Image::Pull { name, from, store: s } => copy(name, &Store::existing(from)?, &Store::open(store(s)?)?)?,
        Image::Gc { store: s, grace_hours, dry_run } => {
            let grace = Duration::from_secs(u64::from(*grace_hours) * 3600);
            let seen = gc::gc(&Store::existing(&store(s)?.to_string_lossy())?, grace, *dry_run)?;
            let verb = if *dry_run { "would remove" } else { "removed" };
            println!(
                "{} images keep {} chunks; {verb} {} ({}), {} wait",
                seen.images, seen.kept, seen.removed, seen.bytes, seen.waiting
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(name: &str, store: &Path, repair_from: Option<&str>) -> Result<()> {
    if let Some(from) = repair_from {
        let here = Store::open(store)?;
        let key = inspect::owner_key(&inspect::inspect(store, name, &[])?.manifest, &here)?;
        let done = repair_image(name, &here, Some(&Store::existing(from)?), key.as_ref())?;
        println!("{name}: {} chunks checked, {} put again", done.checked, done.repaired);
        if let Some(lost) = done.lost.first() {
            bail!(
                "{name} lacks {} chunks that {from} does not have right either, {} first\n\nhint: build the image again; it goes on from what is here",
                done.lost.len(),
                lost.short()
            );
        }
    }
    let (seen, checked) = inspect::verify(store, name, &[])?;
    println!("{name} {}: signature and every chunk right, {checked}", seen.digest.short());
    Ok(())
}

fn copy(name: &str, from: &Store, to: &Store) -> Result<()> {
    let bar = Bar::begin(name);
    let done = copy_image(name, from, to, &|p| bar.at(p.bytes.0.0, p.bytes.1.0))?;
    drop(bar);
    println!("{name}: {} of {} chunks sent, {}", done.sent, done.chunks, done.bytes);
    Ok(())
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
