//! A machine: builds cells, fetches images, resumes VMs before they have arrived, and says what it has.
//!
//! ```text
//!  POST /v1/step ─▶ one at a time per instance ─▶ cell │ fetch │ vm ─▶ outcome, with a fresh look
//!  GET  /v1/seen ─▶ records + processes + images ─▶ what there is
//!  each second   ─▶ subscribes to the VM agent; minds tunnels, health, newer images
//!  all the time  ─▶ guards pagers, tells stores what guests waited for; gives other machines what is here
//! ```
//!
//! Which singletons it may run is written down in `state_dir/tenures`.
//!
//! VMs, pagers and tunnels are processes of their own: when this daemon dies they go on, and when it begins
//! again it finds them by their command lines, and their cells by the records in `state_dir/cells`.

mod cell;
mod fetch;
mod guard;
mod hand;
mod image;
mod learn;
mod memory;
mod mind;
mod pager;
mod pool;
mod process;
mod record;
mod relay;
mod singleton;
mod spawn;
mod survey;
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
use image::Images;
use memory::Memory;
use record::{Phase, Record, Records};
use singleton::Tenures;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;
use vmatrix_model::InstanceId;
use vmatrix_vma_core::steps::{CellSeen, Fault, Life, Outcome, Seen, Step};
use vmatrix_vma_image::Store;
use vmatrix_vma_image::machine::Host;
use vmatrix_vma_transfer::{Answerer, Limits, Server, ServerConfig, Sources, SourcesConfig, identity::Identity};

/// A machine and what it knows of itself.
pub(crate) struct Machine {
    config: MachineConfig,
    client: Client,
    host: Host,
    records: Records,
    images: Images,
    sources: Sources,
    memory: Memory,
    /// By their memory's folder: of each image that runs, and of each singleton.
    pagers: Mutex<BTreeMap<PathBuf, Arc<pager::Pager>>>,
    pool: pool::Pool,
    tenures: Tenures,
    /// What singletons that are to come will run in, and what their holders said.
    earlies: singleton::Earlies,
    meetings: hand::Meetings,
    /// Connections to machines that have, or had, a singleton.
    peers: Mutex<singleton::Peers>,
    /// Health checks an instance missed in a row.
    missed: Mutex<BTreeMap<InstanceId, u32>>,
    /// One step at a time per instance. Bounded by the cells a machine has addresses for.
    busy: Mutex<BTreeMap<InstanceId, Arc<tokio::sync::Mutex<()>>>>,
    /// What `vmatrix tunnel` and `vmatrix pager` are started from.
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
    run_with(path, &std::env::current_exe().context("cannot find the program that runs")?).await
}

/// As [`run`], with `program` in the place of `vmatrix` for tunnels and pagers.
///
/// # Errors
/// As [`run`].
pub async fn run_with(path: &Path, program: &Path) -> anyhow::Result<()> {
    let config = MachineConfig::read(path)?;
    let token = config::token(&config.token_file)?;
    let machine = Arc::new(Machine { program: program.to_owned(), ..Machine::new(config, &token)? });
    tracing::info!(machine = %machine.config.name, listen = %machine.config.listen, accelerator = machine.host.accelerator, qemu = machine.host.qemu_version, cells = machine.records.all().len(), "machine begins");
    for stray in machine.records.strays() {
        machine
            .take_down(stray)
            .await
            .with_context(|| format!("cannot take down cell {stray}, whose record cannot be read"))?;
    }
    machine.sweep_spares().await.context("cannot clear away what waited for an earlier daemon")?;
    machine.guard_what_runs();
    let mut tasks = tokio::task::JoinSet::new();
    if let Some(address) = machine.config.transfer_listen {
        let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
        let config = ServerConfig {
            identity: Identity::read(&machine.config.identity)?,
            store: machine.images.store.clone(),
            keys: None,
            rate_mbit: machine.config.rate_mbit,
        };
        let server = Server::new(config)?;
        let asked = machine.clone();
        server.answer_with(Answerer::new(move |name, question| asked.clone().answer_unless_learn(name, question)));
        tasks.spawn(async move { server.run(listener, std::future::pending()).await });
    }
    let warmed = machine.clone();
    tasks.spawn(async move {
        let answered = warmed.sources.warm().await;
        tracing::info!(answered, of = warmed.config.sources.len(), "sources of images");
    });
    tasks.spawn(mind::subscribe(machine.clone()));
    tasks.spawn(mind::health(machine.clone()));
    tasks.spawn(mind::tunnels(machine.clone()));
    tasks.spawn(mind::relays(machine.clone()));
    let settled = machine.clone();
    tasks.spawn(async move { settled.settle().await });
    tasks.spawn(mind::warm(machine.clone()));
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
        let tenures = Tenures::open(&config.state_dir.join("tenures"))?;
        let store = Store::open(config.state_dir.join("store"))?;
        let images = Images::open(store.clone(), &config.signers, &host)?;
        let folder = config.memory_dir.join(&config.cell_prefix);
        let memory = Memory::open(folder.clone()).map_err(|source| Error::State { path: folder, source })?;
        let limits = Limits { background_mbit: config.rate_mbit };
        let from = SourcesConfig {
            identity: config.identity.clone(),
            addresses: config.sources.clone(),
            serving: config.transfer_listen,
            limits,
        };
        let sources = Sources::from_config(&from, store).map_err(Error::Transfer)?;
        let mut run = [0; 8];
        getrandom::fill(&mut run).map_err(|e| anyhow::anyhow!("this machine has no random bytes: {e}"))?;
        Ok(Machine {
            client: Client::new(token)?,
            host,
            records,
            images,
            sources,
            memory,
            pagers: Mutex::default(),
            pool: pool::Pool::default(),
            tenures,
            earlies: singleton::Earlies::default(),
            meetings: hand::Meetings::default(),
            peers: Mutex::default(),
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
            Step::Stage { service: _, image, urgent } => {
                self.stage(image, *urgent);
                Ok(())
            }
            Step::DropImage { image } => self.drop_image(image).await,
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
        let images = self.images.seen(&self.hydrating());
        Seen { machine: self.config.name.clone(), run: self.run, sequence, cells, images }
    }

    fn cell_seen(&self, record: &Record, running: &[process::Process]) -> CellSeen {
        let alive = self.find_vm(record, running).is_some();
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
            Phase::Handed => Life::Handed,
        };
        let full = record.spec.singleton.and_then(|_| self.lacks_room(&record.spec.instance.service));
        let missed = (missed > 0).then(|| format!("{missed} health checks in a row were not answered"));
        let trouble = full.or(missed).or_else(|| self.shares_its_secrets(record).filter(|_| alive));
        CellSeen {
            instance: record.spec.instance.clone(),
            address: record.link.cell,
            life,
            memory_mib: record.spec.memory_mib,
            resumed_in: record.resumed_in.filter(|_| record.phase == Phase::Healthy),
            trouble,
            holds: self
                .tenures
                .get(&record.spec.instance.service)
                .filter(|_| record.spec.singleton.is_some())
                .and_then(|h| h.holds()),
        }
    }

    /// What is to be known of a guest that nothing reseeds.
    fn shares_its_secrets(&self, record: &Record) -> Option<String> {
        let known = self.images.known(&record.spec.image).filter(|k| !k.manifest.guest.reseeds)?;
        Some(format!(
            "nothing in image {} takes fresh random bytes or the time: its clones draw the same numbers, at the time of the suspend",
            known.manifest.name
        ))
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
    if let Some(told) = error.downcast_ref::<Fault>() {
        return told.clone();
    }
    // What this machine writes down finds no room, whatever it was.
    let full = |e: &std::io::Error| e.kind() == std::io::ErrorKind::StorageFull;
    let full = error.chain().any(|e| e.downcast_ref::<std::io::Error>().is_some_and(full));
    let lasting = error.chain().any(|e| {
        let image = match e.downcast_ref::<vmatrix_vma_transfer::Error>() {
            // One that stands for what it carries says nothing of it in the chain.
            Some(vmatrix_vma_transfer::Error::Image(image)) => Some(image),
            _ => e.downcast_ref::<E>(),
        };
        matches!(
            image,
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
    let hint = if full { "free some on the disk of state_dir" } else { "" };
    let (problem, hint) = text.split_once("; ").unwrap_or((&text, hint));
    Fault { problem: problem.to_owned(), hint: hint.to_owned(), lasting: lasting || full }
}
