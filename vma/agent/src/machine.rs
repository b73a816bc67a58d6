//! A machine: builds cells, stages images, resumes VMs, and says what it has.
//!
//! ```text
//!  POST /v1/step ─▶ one at a time per instance ─▶ cell │ stage │ vm ─▶ outcome, with a fresh look
//!  GET  /v1/seen ─▶ records + processes + images ─▶ what there is
//!  each second   ─▶ subscribes to the VM agent; minds tunnels, health, newer images
//! ```
//!
//! VMs and tunnels are processes of their own: when this daemon dies they go on, and when it begins
//! again it finds them by their command lines, and their cells by the records in `state_dir/cells`.

mod cell;
mod mind;
mod process;
mod record;
mod stage;
#[cfg(test)]
mod tests;
mod vm;

use crate::config::{self, MachineConfig};
use crate::error::Error;
use crate::http::{self, Client};
use anyhow::Context;
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use record::{Phase, Record, Records};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vmatrix_model::InstanceId;
use vmatrix_vma_core::steps::{CellSeen, Fault, Life, Outcome, Seen, Step};
use vmatrix_vma_image::machine::Host;

/// A machine and what it knows of itself.
pub(crate) struct Machine {
    config: MachineConfig,
    client: Client,
    host: Host,
    records: Records,
    stages: stage::Stages,
    /// Health checks an instance missed in a row.
    missed: Mutex<BTreeMap<InstanceId, u32>>,
    /// One step at a time per instance. Bounded by the cells a machine has addresses for.
    busy: Mutex<BTreeMap<InstanceId, Arc<tokio::sync::Mutex<()>>>>,
    /// What `vmatrix tunnel` is started from.
    program: PathBuf,
    run: u64,
    sequence: AtomicU64,
}

/// Runs the machine that the file describes, until SIGTERM. Its VMs outlive it.
///
/// # Errors
/// The file is wrong, QEMU, `ip` or `nft` is missing, there is no `/dev/net/tun`, the state folder
/// cannot be written, or the address is taken: see [`Error`].
pub async fn run(path: &Path) -> anyhow::Result<()> {
    let config = MachineConfig::read(path)?;
    let token = config::token(&config.token_file)?;
    let machine = Arc::new(Machine::new(config, &token)?);
    tracing::info!(machine = %machine.config.name, listen = %machine.config.listen, accelerator = machine.host.accelerator, qemu = machine.host.qemu_version, cells = machine.records.all().len(), "machine begins");
    for stray in machine.records.strays() {
        machine
            .take_down(stray)
            .await
            .with_context(|| format!("cannot take down cell {stray}, whose record cannot be read"))?;
    }
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(mind::subscribe(machine.clone()));
    tasks.spawn(mind::health(machine.clone()));
    tasks.spawn(mind::tunnels(machine.clone()));
    tasks.spawn(mind::renew(machine.clone()));
    let routes = Router::new().route("/v1/step", post(step)).route("/v1/seen", get(seen)).with_state(machine.clone());
    http::serve(machine.config.listen, &token, routes).await
}

async fn step(State(machine): State<Arc<Machine>>, Json(step): Json<Step>) -> Json<Outcome> {
    // On a task of its own: a caller that hangs up does not leave a step half done.
    let worker = machine.clone();
    let done = tokio::spawn(async move { worker.step(step).await }).await;
    let fault = match done {
        Ok(Ok(())) => None,
        Ok(Err(fault)) => Some(fault),
        Err(e) => Some(fault(&anyhow::anyhow!("the step was cut off: {e}"))),
    };
    Json(Outcome { fault, seen: machine.seen() })
}

async fn seen(State(machine): State<Arc<Machine>>) -> Json<Seen> {
    Json(machine.seen())
}

impl Machine {
    pub(crate) fn new(config: MachineConfig, token: &str) -> anyhow::Result<Machine> {
        for (program, package) in [("ip", "iproute2"), ("nft", "nftables")] {
            process::find(program).ok_or(Error::Missing { program, package })?;
        }
        std::fs::File::options().read(true).write(true).open("/dev/net/tun").map_err(Error::NoTun)?;
        let host = vmatrix_vma_image::machine::host()?;
        let state = |source| Error::State { path: config.state_dir.clone(), source };
        let records = Records::open(&config.state_dir.join("cells")).map_err(state)?;
        let stages = stage::Stages::open(&config.state_dir.join("images")).map_err(state)?;
        let mut run = [0; 8];
        getrandom::fill(&mut run).map_err(|e| anyhow::anyhow!("this machine has no random bytes: {e}"))?;
        Ok(Machine {
            client: Client::new(token)?,
            host,
            records,
            stages,
            missed: Mutex::default(),
            busy: Mutex::default(),
            program: std::env::current_exe().context("cannot find the program that runs")?,
            run: u64::from_le_bytes(run),
            sequence: AtomicU64::new(0),
            config,
        })
    }

    /// Does one step; asked again, finds it done.
    pub(crate) async fn step(self: &Arc<Self>, step: Step) -> Result<(), Fault> {
        let _alone = match step.instance() {
            Some(instance) => Some(self.alone(instance).lock_owned().await),
            None => None,
        };
        let done = match &step {
            Step::Stage { service: _, image } => self.stage(image),
            Step::DropImage { image } => self.drop_image(image),
            Step::Prepare(spec) => self.prepare(spec).await,
            Step::Resume { instance } => self.resume(instance).await,
            Step::Suspend { instance } => self.suspend(instance).await,
            Step::Release { instance } => self.release(instance).await,
        };
        done.map_err(|e| fault(&e))
    }

    fn alone(&self, instance: &InstanceId) -> Arc<tokio::sync::Mutex<()>> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|id, lock| id == instance || Arc::strong_count(lock) > 1);
        busy.entry(instance.clone()).or_default().clone()
    }

    /// Looks at everything.
    pub(crate) fn seen(&self) -> Seen {
        let sequence = self.sequence.fetch_add(1, Ordering::SeqCst);
        let running = process::all();
        let mut cells: Vec<CellSeen> = self.records.all().iter().map(|r| self.cell_seen(r, &running)).collect();
        cells.sort_by(|a, b| a.instance.cmp(&b.instance));
        Seen { machine: self.config.name.clone(), run: self.run, sequence, cells, images: self.stages.seen() }
    }

    fn cell_seen(&self, record: &Record, running: &[process::Process]) -> CellSeen {
        let alive = vm::find(running, &self.namespace(&record.spec.instance)).is_some();
        let there = vmatrix_vma_image::netns::path(&self.namespace(&record.spec.instance)).exists();
        let missed =
            self.missed.lock().unwrap_or_else(PoisonError::into_inner).get(&record.spec.instance).copied().unwrap_or(0);
        let life = match record.phase {
            _ if !there => Life::Building,
            Phase::Building => Life::Building,
            Phase::Ready => Life::Ready,
            Phase::Resuming if alive || self.is_stepping(&record.spec.instance) => Life::Resuming,
            Phase::Healthy if alive && missed >= mind::MISSED_MAX => Life::Sick,
            Phase::Healthy if alive => Life::Healthy,
            Phase::Resuming | Phase::Healthy | Phase::Suspending => Life::Lost,
        };
        let trouble = (missed > 0).then(|| format!("{missed} health checks in a row were not answered"));
        CellSeen {
            instance: record.spec.instance.clone(),
            address: record.link.cell,
            life,
            memory_mib: record.spec.memory_mib,
            resumed_in: record.resumed_in.filter(|_| record.phase == Phase::Healthy),
            trouble,
        }
    }

    fn is_stepping(&self, instance: &InstanceId) -> bool {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).get(instance).is_some_and(|l| l.try_lock().is_err())
    }

    /// Name of an instance's namespace, which also names its VM.
    fn namespace(&self, instance: &InstanceId) -> String {
        format!("{}-{instance}", self.config.cell_prefix)
    }
}

/// An error as the VM agent hears it: the whole chain in one line, and whether it will be the same next time.
fn fault(error: &anyhow::Error) -> Fault {
    use vmatrix_vma_image::Error as E;
    let lasting = error.chain().any(|e| {
        matches!(
            e.downcast_ref::<E>(),
            Some(
                E::Mismatch(_)
                    | E::Untrusted { .. }
                    | E::BadSignature { .. }
                    | E::BadManifest { .. }
                    | E::Missing { .. }
                    | E::DiskFull { .. }
            )
        )
    });
    let text = format!("{error:#}");
    let (problem, hint) = text.split_once("; ").map_or((text.as_str(), ""), |(p, h)| (p, h));
    Fault { problem: problem.to_owned(), hint: hint.to_owned(), lasting }
}
