//! Disk images and appliances in and out.

use super::super::bar::Bar;
use super::super::block_on;
use super::store;
use crate::args::{DiskFormat, Import};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vmatrix_model::manifest::Health;
use vmatrix_vma_image::Store;
use vmatrix_vma_import::{Event, Format, Observer, Options};

/// A guest of a general distribution under TCG boots in some minutes.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

/// From when the guest serves to when the agent in it answers: cloud-init has to end first.
const AGENT_LIMIT: Duration = Duration::from_secs(240);

pub fn import(import: &Import) -> Result<()> {
    let first = import.ports.first().copied().unwrap_or(80);
    let user_data = import.user_data.as_ref().map(std::fs::read_to_string).transpose();
    let options = Options {
        name: import.name.clone(),
        format: import.format.map(format),
        memory_mib: import.memory_mib,
        ports: import.ports.clone(),
        health: Health {
            port: import.health_port.unwrap_or(first),
            path: import.health_path.clone(),
            status: import.health_status,
        },
        warm: import.warm.clone(),
        times: import.times,
        user_data: user_data.context("cannot read the user-data")?,
        guest_agent: guest_agent()?,
        boot_limit: BOOT_LIMIT,
        agent_limit: AGENT_LIMIT,
    };
    let to = store(&import.store)?;
    let observer = observer(&import.name);
    let built = block_on(async { Ok(vmatrix_vma_import::import(&import.file, &options, &to, observer).await?) })?;
    println!(
        "{} {} imported in {:.0} s: {} stored, boots in {} ms, answers in {} ms",
        built.name,
        built.digest.short(),
        built.took.as_secs_f64(),
        built.stored,
        built.measured.boot_ms,
        built.measured.answer_ms
    );
    if !built.reseeds {
        eprintln!(
            "{}: nothing in this guest takes fresh random bytes or the time; its clones begin with the same \"random\" numbers\n\nhint: install cloud-init and systemd in it, and import it again",
            built.name
        );
    }
    Ok(())
}

pub fn export(name: &str, to: &Path, wanted: Option<DiskFormat>, from: &Path) -> Result<()> {
    let format = wanted.map(format).map_or_else(|| Format::of(to), Ok)?;
    let store = Store::read(from)?;
    let done = vmatrix_vma_import::export(name, &store, &[], format, to, &*observer(name))?;
    println!("{}: disk of {name}, {}; {} written, its memory stays here", to.display(), done.disk, done.file);
    Ok(())
}

fn format(format: DiskFormat) -> Format {
    match format {
        DiskFormat::Raw => Format::Raw,
        DiskFormat::Qcow2 => Format::Qcow2,
        DiskFormat::Vmdk => Format::Vmdk,
        DiskFormat::Ova => Format::Ova,
    }
}

fn observer(name: &str) -> Arc<Observer> {
    let bar = Bar::begin(name);
    Arc::new(move |event: Event<'_>| match event {
        Event::Step(step) | Event::Note(step) => bar.say(step),
        Event::Done { done, total } => bar.at(done.0, total.0),
    })
}

fn guest_agent() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find the program that runs")?;
    Ok(program.with_file_name("vmatrix-vma-guest"))
}
