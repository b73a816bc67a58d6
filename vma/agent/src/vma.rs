//! The VM agent: HTTP in, the core's decisions, HTTP out.
//!
//! ```text
//!  PUT assignment, POST machines ─┐                    ┌─▶ a task per step   POST /v1/step
//!  looks at machines, edge seen ──┼─▶ one task: Vma ───┼─▶ edge task         PUT  /v1/config
//!  step outcomes, ticks ──────────┘                    └─▶ CPA task          POST /v1/inventory
//! ```

use crate::config::{self, VmaConfig};
use crate::error::Error;
use crate::http::{self, Client, Refusal, USUAL};
use crate::{now, replace};
use anyhow::Context;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use reqwest::Method;
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use vmatrix_model::MachineId;
use vmatrix_model::assignment::Assignment;
use vmatrix_model::edge_config::{EdgeConfig, EdgeSeen};
use vmatrix_model::inventory::Inventory;
use vmatrix_model::wire::Subscription;
use vmatrix_vma_core::Vma;
use vmatrix_vma_core::steps::{Command, Event, Fault, Outcome, Seen, Step};

/// Between looks while something is on its way.
const LOOK_BUSY: Duration = Duration::from_millis(200);
/// Between looks otherwise.
const LOOK_IDLE: Duration = Duration::from_secs(1);
/// Events waiting for the core: a look, a step and a subscription of each of a hundred machines.
const EVENTS_MAX: usize = 300;
/// A step is given up after so long; the machine itself gives up a resume before that.
const STEP_LIMIT: Duration = Duration::from_secs(80);
/// Most machines of a network; the assignment of one more is refused.
const MACHINES_MAX: usize = 256;

/// A machine that has not subscribed for so long is not looked at; for the core it was gone before.
const FORGOTTEN: Duration = Duration::from_secs(10);

/// What reaches the core's task.
enum Message {
    Event(Box<Event>),
    Assign(Box<Assignment>, oneshot::Sender<Result<(), Refusal>>),
}

struct Shared {
    config: VmaConfig,
    client: Client,
    to_core: mpsc::Sender<Message>,
    /// Where each machine is, and when it last said so.
    machines: Mutex<BTreeMap<MachineId, (SocketAddrV4, Instant)>>,
    edge: watch::Sender<Option<EdgeConfig>>,
    inventory: watch::Sender<Option<Inventory>>,
    busy: watch::Sender<bool>,
}

impl Shared {
    async fn hear(&self, event: Event) {
        // The core's task ends only with the process.
        let _ = self.to_core.send(Message::Event(Box::new(event))).await;
    }

    fn addresses(&self) -> BTreeMap<MachineId, SocketAddrV4> {
        let mut machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        machines.retain(|_, (_, said)| said.elapsed() < FORGOTTEN);
        machines.iter().map(|(id, (address, _))| (id.clone(), *address)).collect()
    }

    fn pause(&self) -> Duration {
        if *self.busy.borrow() { LOOK_BUSY } else { LOOK_IDLE }
    }
}

/// Runs the VM agent that the file describes, until SIGTERM.
///
/// # Errors
/// The file is wrong, the state folder cannot be written, or the address is taken: see [`Error`].
pub async fn run(path: &Path) -> anyhow::Result<()> {
    let config = VmaConfig::read(path)?;
    let token = config::token(&config.token_file)?;
    std::fs::create_dir_all(&config.state_dir)
        .map_err(|source| Error::State { path: config.state_dir.clone(), source })?;
    let saved = config.state_dir.join("assignment.json");
    let (to_core, events) = mpsc::channel(EVENTS_MAX);
    let shared = Arc::new(Shared {
        client: Client::new(&token)?,
        to_core,
        machines: Mutex::default(),
        edge: watch::Sender::new(None),
        inventory: watch::Sender::new(None),
        busy: watch::Sender::new(false),
        config,
    });
    let assignment = read_assignment(&saved);
    tracing::info!(network = %shared.config.network, listen = %shared.config.listen, generation = ?assignment.as_ref().map(|a| a.generation), "VM agent begins");
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(decide(shared.clone(), events, saved, assignment));
    tasks.spawn(look_at_machines(shared.clone()));
    tasks.spawn(tell_edge(shared.clone()));
    tasks.spawn(tell_cpa(shared.clone()));
    let routes = Router::new()
        .route("/v1/assignment", put(assign))
        .route("/v1/inventory", get(inventory))
        .route("/v1/machines", post(subscribe))
        .with_state(shared.clone());
    http::serve(shared.config.listen, &token, routes).await
}

/// The last good assignment, if it can be read: the data plane goes on without the CPA.
fn read_assignment(path: &Path) -> Option<Assignment> {
    let text = std::fs::read(path).ok()?;
    serde_json::from_slice(&text).inspect_err(|e| tracing::warn!(path = %path.display(), error = %e, "the saved assignment cannot be read; waiting for the CPA's")).ok()
}

async fn decide(
    shared: Arc<Shared>,
    mut messages: mpsc::Receiver<Message>,
    saved: PathBuf,
    assignment: Option<Assignment>,
) {
    let mut vma = Vma::new(shared.config.network.clone());
    if let Some(a) = assignment {
        act(&shared, vma.handle(now(), Event::Assignment(a)));
    }
    loop {
        let pause = if vma.is_busy() { LOOK_BUSY } else { LOOK_IDLE };
        let commands = match tokio::time::timeout(pause, messages.recv()).await {
            Err(_) => vma.handle(now(), Event::Tick),
            Ok(None) => return,
            Ok(Some(Message::Event(event))) => vma.handle(now(), *event),
            Ok(Some(Message::Assign(assignment, answer))) => {
                let generation = assignment.generation;
                let old = vma.assignment().map(|a| a.generation);
                // Saved before it is acknowledged: what the CPA believes must survive a crash here.
                let stale = old.is_some_and(|old| generation < old);
                let kept = if stale { Ok(()) } else { save(&saved, &assignment) };
                match kept {
                    Err(e) => {
                        let _ = answer.send(Err(Refusal::new(
                            StatusCode::INSUFFICIENT_STORAGE,
                            format!("the assignment cannot be saved: {e:#}"),
                            "free some space at the VM agent",
                        )));
                        continue;
                    }
                    Ok(()) if stale => {
                        let problem = format!(
                            "assignment {generation} is older than {}, which is in force",
                            old.unwrap_or_default()
                        );
                        let _ = answer.send(Err(Refusal::new(
                            StatusCode::CONFLICT,
                            problem,
                            "send one made from the present placement",
                        )));
                        continue;
                    }
                    Ok(()) => {
                        if old != Some(generation) {
                            tracing::info!(%generation, services = assignment.services.len(), "assignment");
                        }
                        let commands = vma.handle(now(), Event::Assignment(*assignment));
                        let _ = answer.send(Ok(()));
                        commands
                    }
                }
            }
        };
        shared.busy.send_if_modified(|busy| std::mem::replace(busy, vma.is_busy()) != vma.is_busy());
        act(&shared, commands);
    }
}

fn save(path: &Path, assignment: &Assignment) -> anyhow::Result<()> {
    let text = serde_json::to_vec_pretty(assignment)?;
    if std::fs::read(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    replace(path, &text).with_context(|| format!("cannot write {}", path.display()))
}

fn act(shared: &Arc<Shared>, commands: Vec<Command>) {
    for command in commands {
        match command {
            Command::Step { machine, step } => {
                tokio::spawn(send_step(shared.clone(), machine, step));
            }
            Command::Edge(config) => {
                shared.edge.send_replace(Some(config));
            }
            Command::Report(inventory) => {
                shared.inventory.send_replace(Some(inventory));
            }
            Command::Refused { asked, in_force } => tracing::warn!(%asked, %in_force, "an old assignment was refused"),
        }
    }
}

async fn send_step(shared: Arc<Shared>, machine: MachineId, step: Step) {
    let what = step.instance().map(ToString::to_string);
    tracing::info!(%machine, step = step.verb(), instance = what.as_deref().unwrap_or("-"), "step");
    let result = match shared.addresses().get(&machine) {
        None => Err(anyhow::anyhow!("machine {machine} has not subscribed")),
        Some(address) => {
            shared.client.send::<Outcome>(Method::POST, &format!("http://{address}/v1/step"), &step, STEP_LIMIT).await
        }
    };
    let result = match result {
        Ok(Outcome { fault, seen }) => {
            shared.hear(Event::Seen(seen)).await;
            fault.map_or(Ok(()), Err)
        }
        Err(e) => Err(Fault { problem: format!("{e:#}"), hint: format!("look at machine {machine}"), lasting: false }),
    };
    if let Err(fault) = &result {
        tracing::warn!(%machine, step = step.verb(), instance = what.as_deref().unwrap_or("-"), problem = %fault, "step failed");
    }
    shared.hear(Event::StepDone { machine, step, result }).await;
}

async fn look_at_machines(shared: Arc<Shared>) {
    let mut busy = shared.busy.subscribe();
    loop {
        let looks = shared.addresses().into_values().map(|address| look(shared.clone(), address));
        futures_util::future::join_all(looks).await;
        let _ = tokio::time::timeout(shared.pause(), busy.changed()).await;
    }
}

async fn look(shared: Arc<Shared>, address: SocketAddrV4) {
    match shared.client.get::<Seen>(&format!("http://{address}/v1/seen")).await {
        Ok(seen) => shared.hear(Event::Seen(seen)).await,
        Err(e) => tracing::debug!(%address, error = format!("{e:#}"), "a machine was not seen"),
    }
}

/// Tells the edge each new config at once and looks at it in between. A config that does not arrive
/// is asked for again by the core, which sees that the edge has an older one.
async fn tell_edge(shared: Arc<Shared>) {
    let mut configs = shared.edge.subscribe();
    let mut busy = shared.busy.subscribe();
    loop {
        let config = configs.borrow_and_update().clone();
        let answer = match config {
            Some(config) => {
                shared
                    .client
                    .send::<EdgeSeen>(Method::PUT, &format!("{}/v1/config", shared.config.edge), &config, USUAL)
                    .await
            }
            None => shared.client.get::<EdgeSeen>(&format!("{}/v1/seen", shared.config.edge)).await,
        };
        match answer {
            Ok(seen) => shared.hear(Event::EdgeSeen(seen)).await,
            Err(e) => tracing::warn!(error = format!("{e:#}"), "the edge does not answer; what it has goes on"),
        }
        loop {
            tokio::select! {
                _ = configs.changed() => break,
                () = tokio::time::sleep(shared.pause()) => {}
                _ = busy.changed() => {}
            }
            match shared.client.get::<EdgeSeen>(&format!("{}/v1/seen", shared.config.edge)).await {
                Ok(seen) => shared.hear(Event::EdgeSeen(seen)).await,
                Err(e) => tracing::debug!(error = format!("{e:#}"), "the edge was not seen"),
            }
        }
    }
}

async fn tell_cpa(shared: Arc<Shared>) {
    let mut inventories = shared.inventory.subscribe();
    let url = format!("{}/v1/inventory", shared.config.cpa);
    let mut silent = false;
    while inventories.changed().await.is_ok() {
        let Some(inventory) = inventories.borrow_and_update().clone() else { continue };
        match shared.client.send::<serde_json::Value>(Method::POST, &url, &inventory, USUAL).await {
            Ok(_) => silent = false,
            Err(e) => {
                if !std::mem::replace(&mut silent, true) {
                    tracing::warn!(
                        error = format!("{e:#}"),
                        "the CPA does not hear; going on with the last assignment"
                    );
                }
            }
        }
    }
}

async fn assign(State(shared): State<Arc<Shared>>, Json(assignment): Json<Assignment>) -> Result<StatusCode, Refusal> {
    if assignment.network != shared.config.network {
        let problem = format!(
            "this is the assignment of {}, and this is the VM agent of {}",
            assignment.network, shared.config.network
        );
        return Err(Refusal::new(StatusCode::BAD_REQUEST, problem, "look at [agents] in cpa.toml"));
    }
    let gone = || Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the VM agent is ending", "try again");
    let (answer, answered) = oneshot::channel();
    shared.to_core.send(Message::Assign(Box::new(assignment), answer)).await.map_err(|_| gone())?;
    answered.await.map_err(|_| gone())??;
    Ok(StatusCode::NO_CONTENT)
}

async fn inventory(State(shared): State<Arc<Shared>>) -> Result<Json<Inventory>, Refusal> {
    let latest = shared.inventory.borrow().clone();
    latest.map(Json).ok_or_else(|| {
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "nothing was seen yet", "ask again in a few seconds")
    })
}

async fn subscribe(
    State(shared): State<Arc<Shared>>,
    Json(subscription): Json<Subscription>,
) -> Result<StatusCode, Refusal> {
    let Subscription { machine, address } = subscription;
    let new = {
        let mut machines = shared.machines.lock().unwrap_or_else(PoisonError::into_inner);
        if machines.len() >= MACHINES_MAX && !machines.contains_key(&machine.id) {
            return Err(Refusal::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!("{MACHINES_MAX} machines are subscribed, and no more are taken"),
                "give this machine to another network",
            ));
        }
        machines.insert(machine.id.clone(), (address, Instant::now())).is_none_or(|(old, _)| old != address)
    };
    if new {
        tracing::info!(machine = %machine.id, %address, memory_mib = machine.memory_mib, accelerator = machine.accelerator, "machine subscribed");
    }
    shared.hear(Event::Subscribed(machine)).await;
    if new {
        // The first look need not wait for the next round.
        tokio::spawn(look(shared.clone(), address));
    }
    Ok(StatusCode::NO_CONTENT)
}
