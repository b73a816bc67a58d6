//! Powered on ─▶ healthy ─▶ warmed by real requests ─▶ suspended.

use super::give_back::{self, Kinds};
use super::progress::Progress;
use super::requests::{self, Pass};
use super::tools;
use crate::recipe::Recipe;
use crate::workshop::{Cell, Process};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};
use vmatrix_model::manifest::{GuestSpec, MachineSpec, Measured};
use vmatrix_vma_image::error::{Error, Result, io};
use vmatrix_vma_image::machine::{Files, Run, Start, command, machine_arguments};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::{guest, health};

/// A guest under TCG on a busy machine needs a minute; one that needs three is broken.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// What is to be powered on, and where.
pub struct Boot<'a> {
    pub recipe: &'a Recipe,
    pub spec: &'a MachineSpec,
    pub guest: &'a GuestSpec,
    pub files: &'a Files,
    pub cell: &'a Cell,
    pub scratch: &'a Path,
    pub progress: &'a Progress,
}

impl Boot<'_> {
    /// Boots the guest, warms it and leaves memory and device state in the files; says also what its pages are in use for.
    pub async fn suspend(&self) -> Result<(Measured, Kinds)> {
        let Boot { recipe, spec, guest, files, cell, scratch, progress } = *self;
        let memory = fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&files.memory)
            .map_err(io("create", &files.memory))?;
        memory.set_len(spec.memory_mib << 20).map_err(io("size", &files.memory))?;
        let tap = cell.tap()?;
        let run = Run {
            name: format!("build-{}", recipe.name),
            qmp: scratch.join("qmp"),
            guest_agent: scratch.join("agent"),
            tap_fd: tap.as_raw_fd(),
            console: Some(scratch.join("console")),
            start: Start::Boot,
        };
        let mut process = Process::start(command(&machine_arguments(spec, files, &run), &tap), scratch)?;
        let began = Instant::now();
        drop(tap);

        progress.step(&format!("boot {} (tens of seconds under TCG)", recipe.name));
        let boot_ms = until_healthy(&mut process, guest, cell, scratch, began).await?;
        progress.done(&format!("healthy after {:.1} s", boot_ms as f64 / 1e3));
        match self.rest(&run, &memory).await {
            Ok((answer_ms, kinds)) => Ok((Measured { boot_ms, answer_ms }, kinds)),
            Err(error) => {
                // What fails because the guest is no more has its reason elsewhere; its end takes a moment.
                tokio::time::sleep(Duration::from_millis(500)).await;
                Err(process.ended().map_or(error, |status| ended(status, scratch)))
            }
        }
    }

    /// Healthy ─▶ warm ─▶ free memory given back ─▶ suspended; returns the median answer, milliseconds.
    async fn rest(&self, run: &Run, memory: &File) -> Result<(u64, Kinds)> {
        let Boot { recipe, spec, guest, files, cell, progress, .. } = *self;
        let count: u32 = recipe.warm.iter().map(|r| r.times).sum();
        progress.step(&format!("warm with {count} requests"));
        requests::warm(&recipe.warm, guest.address, &cell.path(), Pass::All)?;
        guest::trim(&run.guest_agent).await?;
        // The trim gave back what nobody mapped; the next pass reads again what an answer needs.
        let answer_ms = requests::warm(&recipe.warm, guest.address, &cell.path(), Pass::Again)?;
        progress.done(&format!("answers in {answer_ms} ms"));

        progress.step("suspend");
        give_back::free_memory(&run.guest_agent, memory).await?;
        let kinds = Kinds::ask(&run.guest_agent, spec.memory_mib << 20).await?;
        // Packets on their way come in before the guest stops, or a clone would wake to half a connection.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut qmp = Qmp::connect(&run.qmp).await?;
        qmp.save_state(&files.device).await?;
        qmp.quit().await?;
        let full = give_back::not_zero(memory).map_err(io("read", &files.memory))?;
        let share = 100 - full.len() as u64 * 100 / (spec.memory_mib << 8).max(1);
        let table = kinds.table(full.into_iter());
        progress.done(&format!("memory is {share} % zero; the rest, in MiB: {table}"));
        Ok((answer_ms, kinds))
    }
}

async fn until_healthy(
    process: &mut Process,
    guest: &GuestSpec,
    cell: &Cell,
    scratch: &Path,
    began: Instant,
) -> Result<u64> {
    loop {
        let asked = health::ask(&cell.path(), guest.address, &guest.health, Duration::from_secs(5)).await;
        let Err(why) = asked else {
            return Ok(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
        };
        let ended_as = process.ended();
        if ended_as.is_none() && began.elapsed() < BOOT_LIMIT {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        }
        if let Some(status) = ended_as {
            return Err(ended(status, scratch));
        }
        let said = last_lines(&fs::read_to_string(scratch.join("console")).unwrap_or_default());
        return Err(Error::Unhealthy(format!(
            "the guest is not healthy after {} s: {why}; its console said last:\n{said}",
            BOOT_LIMIT.as_secs()
        )));
    }
}

/// A QEMU that ended by itself: in its own words, and the guest's.
fn ended(status: ExitStatus, scratch: &Path) -> Error {
    let read = |name: &str| fs::read_to_string(scratch.join(name)).unwrap_or_default();
    let said = format!("{}{}", tools::reason(&read("stderr")), last_lines(&read("console")));
    Error::Tool { what: "QEMU".to_owned(), status: status.to_string(), said }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n")
}
