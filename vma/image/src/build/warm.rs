//! Powered on ─▶ healthy ─▶ warmed by real requests ─▶ suspended.

use super::cell::Cell;
use super::progress::Progress;
use super::tools;
use crate::error::{Error, Result, io};
use crate::machine::{Files, Run, Start, command, machine_arguments};
use crate::qmp::Qmp;
use crate::recipe::{Recipe, Request};
use crate::{guest, health};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmatrix_model::manifest::{GuestSpec, MachineSpec, Measured};

/// A guest under TCG on a busy machine needs a minute; one that needs three is broken.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// One warm request.
const REQUEST_LIMIT_S: u32 = 30;

/// A QEMU that ends when this does.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Already ended is as good; a killed child must still be waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots the guest, warms it and leaves memory and device state in `files`.
pub async fn suspend(
    recipe: &Recipe,
    spec: &MachineSpec,
    guest: &GuestSpec,
    files: &Files,
    cell: &Cell,
    scratch: &Path,
    progress: &Progress,
) -> Result<Measured> {
    let memory = fs::File::create(&files.memory).map_err(io("create", &files.memory))?;
    memory.set_len(spec.memory_mib << 20).map_err(io("size", &files.memory))?;
    let tap = cell.tap("tap0")?;
    let run = Run {
        name: format!("build-{}", recipe.name),
        qmp: scratch.join("qmp"),
        guest_agent: scratch.join("agent"),
        tap_fd: tap.as_raw_fd(),
        console: Some(scratch.join("console")),
        start: Start::Boot,
    };
    let mut start = command(&machine_arguments(spec, files, &run), &tap);
    end_with_us(&mut start);
    let errors = scratch.join("stderr");
    start.stderr(fs::File::create(&errors).map_err(io("create", &errors))?);
    let began = Instant::now();
    let mut process = Process(start.spawn().map_err(io("run", Path::new(crate::machine::QEMU)))?);
    drop(tap);

    progress.step(&format!("boot {} (tens of seconds under TCG)", recipe.name));
    let boot_ms = until_healthy(&mut process, guest, cell, scratch, began).await?;
    progress.done(&format!("healthy after {:.1} s", boot_ms as f64 / 1e3));

    let count: u32 = recipe.warm.iter().map(|r| r.times).sum();
    progress.step(&format!("warm with {count} requests"));
    warm(recipe, guest, cell, Pass::All)?;
    guest::trim(&run.guest_agent).await?;
    // The trim gave back what nobody mapped; the next pass reads again what an answer needs.
    let answer_ms = warm(recipe, guest, cell, Pass::Again)?;
    progress.done(&format!("answers in {answer_ms} ms"));

    progress.step("suspend");
    // Packets on their way come in before the guest stops, or a clone would wake to half a connection.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut qmp = Qmp::connect(&run.qmp).await?;
    qmp.save_state(&files.device).await?;
    qmp.quit().await?;
    Ok(Measured { boot_ms, answer_ms })
}

/// A build that is killed leaves no guest running.
fn end_with_us(command: &mut Command) {
    // SAFETY: one system call between fork and exec, which allocates nothing and takes no lock.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from));
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
        let ended = process.0.try_wait().ok().flatten();
        if ended.is_none() && began.elapsed() < BOOT_LIMIT {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        }
        let read = |name: &str| fs::read_to_string(scratch.join(name)).unwrap_or_default();
        let said = format!("{}{}", tools::reason(&read("stderr")), last_lines(&read("console")));
        return Err(match ended {
            Some(status) => Error::Tool { what: "QEMU".to_owned(), status: status.to_string(), said },
            None => Error::Unhealthy(format!(
                "the guest is not healthy after {} s: {why}; its console said last:\n{said}",
                BOOT_LIMIT.as_secs()
            )),
        });
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    All,
    Again,
}

/// Most times a request is sent in the second pass.
const AGAIN: u32 = 12;

/// Sends the recipe's requests and returns the median of the measured ones, milliseconds.
fn warm(recipe: &Recipe, guest: &GuestSpec, cell: &Cell, pass: Pass) -> Result<u64> {
    let mut times = Vec::new();
    for request in &recipe.warm {
        let count = if pass == Pass::All { request.times } else { request.times.min(AGAIN) };
        for n in 0..count {
            // The second pass counts on: its requests are new ones too.
            let number = if pass == Pass::All { n } else { request.times + n };
            let took = send(request, guest, cell, number)?;
            if request.measured {
                times.push(took);
            }
        }
    }
    times.sort_unstable();
    Ok(times.get(times.len() / 2).copied().unwrap_or(0))
}

fn send(request: &Request, guest: &GuestSpec, cell: &Cell, n: u32) -> Result<u64> {
    let number = n.to_string();
    let scheme = if request.tls { "https" } else { "http" };
    let url = format!("{scheme}://{}:{}{}", guest.address, request.port, request.path.replace("{n}", &number));
    let mut curl = Command::new("curl");
    curl.args([
        "-sS",
        "-k",
        "-g",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} %{time_total} %{content_type}",
        "-m",
        &REQUEST_LIMIT_S.to_string(),
    ])
    .args(["-X", &request.method])
    .stderr(Stdio::piped());
    if let Some(user) = &request.user {
        curl.args(["-u", user]);
    }
    if let Some(kind) = &request.content_type {
        curl.args(["-H", &format!("Content-Type: {kind}")]);
    }
    if let Some(body) = &request.body {
        curl.args(["--data-binary", &body.replace("{n}", &number)]);
    }
    let what = format!("{} {url}", request.method);
    let output = cell.run(&what, curl.arg(&url))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace();
    let status = words.next().and_then(|w| w.parse::<u16>().ok()).unwrap_or(0);
    if !request.status.contains(&status) {
        return Err(Error::Unhealthy(format!("warm request {what} was answered {status}, not {:?}", request.status)));
    }
    let seconds: f64 = words.next().and_then(|w| w.parse().ok()).unwrap_or(0.0);
    let kind = words.next().unwrap_or("nothing").trim_end_matches(';');
    if let Some(right) = request.answers.as_deref().filter(|right| *right != kind) {
        return Err(Error::Unhealthy(format!("warm request {what} was answered with {kind}, not {right}")));
    }
    Ok((seconds * 1e3) as u64)
}
