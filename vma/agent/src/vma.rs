//! The VM agent: HTTP in, the core's decisions, HTTP out.
//!
//! ```text
//!  PUT assignment, POST machines ─┐                    ┌─▶ a task per step   POST /v1/step
//!  looks at machines, edge seen ──┼─▶ one task: Vma ───┼─▶ edge task         PUT  /v1/config
//!  step outcomes, ticks, knocks ──┘                    └─▶ CPA task          POST /v1/inventory
//! ```

use crate::config::{self, VmaConfig};
use crate::error::Error;
use crate::http::{self, Client, Refusal, USUAL};
use crate::{knock, now, replace};
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
use vmatrix_model::assignment::{Assignment, ServiceShare};
use vmatrix_model::edge_config::{EdgeConfig, EdgeSeen};
use vmatrix_model::inventory::Inventory;
use vmatrix_model::wire::Subscription;
use vmatrix_model::{MachineId, ServiceId};
use vmatrix_vma_core::steps::{Command, Event, Fault, Outcome, Seen, Step};
use vmatrix_vma_core::{Doubt, Vma};

/// Between looks while something is on its way.
const LOOK_BUSY: Duration = Duration::from_millis(200);
/// Between looks otherwise.
const LOOK_IDLE: Duration = Duration::from_secs(1);
/// A look is some reading of /proc. One machine that hangs holds up the looks at all others for so long.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// Events waiting for the core: a look, a step and a subscription of each of a hundred machines.
const EVENTS_MAX: usize = 300;
/// A step is given up after so long; the machine itself gives up a resume before that.
const STEP_LIMIT: Duration = Duration::from_secs(80);
/// Most instances of a service: an edge shares a public address among so many.
const INSTANCES_MAX: u32 = 16;
/// Most ports of a service, as at the edge.
const PORTS_MAX: usize = 64;
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
    doubts: watch::Sender<Vec<Doubt>>,
}

/// What survives a restart, as last written: the assignment in force, and the shares of services that
/// left it and still drain.
struct Kept {
    dir: PathBuf,
    assignment: Option<Assignment>,
    leaving: BTreeMap<ServiceId, ServiceShare>,
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
    let kept = Kept::read(&config.state_dir);
    let (to_core, events) = mpsc::channel(EVENTS_MAX);
    let shared = Arc::new(Shared {
        client: Client::new(&token)?,
        to_core,
        machines: Mutex::default(),
        edge: watch::Sender::new(None),
        inventory: watch::Sender::new(None),
        busy: watch::Sender::new(false),
        doubts: watch::Sender::new(Vec::new()),
        config,
    });
    tracing::info!(network = %shared.config.network, listen = %shared.config.listen, generation = ?kept.assignment.as_ref().map(|a| a.generation), "VM agent begins");
    let mut tasks = tokio::task::JoinSet::new();
    let (knocks, answers) = mpsc::channel(EVENTS_MAX);
    tasks.spawn(knock::run(shared.doubts.subscribe(), knocks));
    tasks.spawn(decide(shared.clone(), events, answers, kept));
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

async fn decide(
    shared: Arc<Shared>,
    mut messages: mpsc::Receiver<Message>,
    mut answers: mpsc::Receiver<Event>,
    mut kept: Kept,
) {
    let mut vma = Vma::with_leaving(shared.config.network.clone(), kept.leaving.clone());
    if let Some(a) = kept.assignment.clone() {
        act(&shared, vma.handle(now(), Event::Assignment(a)));
    }
    let mut unwritten = false;
    loop {
        let pause = if vma.is_busy() { LOOK_BUSY } else { LOOK_IDLE };
        let message = tokio::select! {
            message = messages.recv() => match message {
                Some(message) => message,
                None => return,
            },
            Some(event) = answers.recv() => Message::Event(Box::new(event)),
            () = tokio::time::sleep(pause) => Message::Event(Box::new(Event::Tick)),
        };
        let commands = match message {
            Message::Event(event) => vma.handle(now(), *event),
            Message::Assign(assignment, answer) => match accept(&vma, &mut kept, &assignment) {
                Ok(()) => {
                    let commands = vma.handle(now(), Event::Assignment(*assignment));
                    let _ = answer.send(Ok(()));
                    commands
                }
                Err(refusal) => {
                    let _ = answer.send(Err(refusal));
                    continue;
                }
            },
        };
        match kept.leave(vma.leaving().clone()) {
            Ok(()) => unwritten = false,
            Err(e) if !std::mem::replace(&mut unwritten, true) => {
                tracing::warn!(error = format!("{e:#}"), "what drains will be given an ordinary drain after a restart");
            }
            Err(_) => {}
        }
        shared.busy.send_if_modified(|busy| std::mem::replace(busy, vma.is_busy()) != vma.is_busy());
        let doubts = vma.doubts();
        shared.doubts.send_if_modified(|old| {
            *old != doubts && {
                *old = doubts;
                true
            }
        });
        act(&shared, commands);
    }
}

/// Refuses an assignment that is older than the one in force, and writes down any other before it is
/// acknowledged: what the CPA believes must survive a crash here.
fn accept(vma: &Vma, kept: &mut Kept, assignment: &Assignment) -> Result<(), Refusal> {
    let (old, generation) = (vma.assignment().map(|a| a.generation), assignment.generation);
    if let Some(in_force) = old.filter(|old| generation < *old) {
        return Err(Refusal::new(
            StatusCode::CONFLICT,
            format!("assignment {generation} is older than {in_force}, which is in force"),
            "send one made from the present placement",
        ));
    }
    // First what leaves: written after, a crash between the two would forget it.
    let written = kept.leave(vma.leaving_after(assignment)).and_then(|()| kept.assign(assignment));
    written.map_err(|e| {
        Refusal::new(
            StatusCode::INSUFFICIENT_STORAGE,
            format!("the assignment cannot be saved: {e:#}"),
            "free some space at the VM agent",
        )
    })?;
    if old != Some(generation) {
        tracing::info!(%generation, services = assignment.services.len(), "assignment");
    }
    Ok(())
}

impl Kept {
    /// What can be read; the data plane goes on without the CPA.
    fn read(dir: &Path) -> Kept {
        let leaving = read(&dir.join("leaving.json")).unwrap_or_default();
        Kept { dir: dir.to_owned(), assignment: read(&dir.join("assignment.json")), leaving }
    }

    fn assign(&mut self, assignment: &Assignment) -> anyhow::Result<()> {
        if self.assignment.as_ref() != Some(assignment) {
            write(&self.dir.join("assignment.json"), assignment)?;
            self.assignment = Some(assignment.clone());
        }
        Ok(())
    }

    fn leave(&mut self, leaving: BTreeMap<ServiceId, ServiceShare>) -> anyhow::Result<()> {
        if self.leaving != leaving {
            write(&self.dir.join("leaving.json"), &leaving)?;
            self.leaving = leaving;
        }
        Ok(())
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    let text = std::fs::read(path).ok()?;
    let read = serde_json::from_slice(&text);
    read.inspect_err(
        |e| tracing::warn!(path = %path.display(), error = %e, "what was saved cannot be read; waiting for the CPA"),
    )
    .ok()
}

fn write(path: &Path, value: &impl serde::Serialize) -> anyhow::Result<()> {
    replace(path, &serde_json::to_vec_pretty(value)?).with_context(|| format!("cannot write {}", path.display()))
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
    let url = format!("http://{address}/v1/seen");
    let seen = tokio::time::timeout(LOOK_LIMIT, shared.client.get::<Seen>(&url)).await;
    match seen.unwrap_or_else(|_| Err(anyhow::anyhow!("{url} did not answer within {} s", LOOK_LIMIT.as_secs()))) {
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
    check(&assignment).map_err(|problem| {
        Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, problem, "correct the fleet; the assignment in force stays")
    })?;
    let gone = || Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the VM agent is ending", "try again");
    let (answer, answered) = oneshot::channel();
    shared.to_core.send(Message::Assign(Box::new(assignment), answer)).await.map_err(|_| gone())?;
    answered.await.map_err(|_| gone())??;
    Ok(StatusCode::NO_CONTENT)
}

/// Whether an assignment can be meant: what an edge would refuse for ever, or no machine could build, is not
/// taken in the first place.
fn check(a: &Assignment) -> Result<(), String> {
    let mut owners: BTreeMap<std::net::Ipv4Addr, &ServiceId> = BTreeMap::new();
    for (service, share) in &a.services {
        let bad = |problem: String| Err(format!("assignment {}, service {service}: {problem}", a.generation));
        if share.instances > INSTANCES_MAX {
            return bad(format!(
                "{} instances are more than {INSTANCES_MAX}, the most in one network",
                share.instances
            ));
        }
        if share.memory_mib == 0 {
            return bad("an instance without memory".into());
        }
        if share.ports.is_empty() || share.ports.len() > PORTS_MAX || share.ports.contains(&0) {
            return bad(format!("ports must be 1 to {PORTS_MAX} numbers, none of them 0"));
        }
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if !(1..=64).contains(&share.image.len()) || !share.image.bytes().all(plain) {
            let name: String = share.image.chars().take(80).collect();
            return bad(format!("image {name:?} is not a name: 1 to 64 of a-z, 0-9 and -"));
        }
        if let Some(other) = owners.insert(share.vip, service) {
            return bad(format!("public address {} belongs to service {other} already", share.vip));
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use vmatrix_model::{Generation, Span};

    fn assignment(generation: u64, services: &[&str]) -> Assignment {
        let share = |n: u8| ServiceShare {
            image: "tiny".into(),
            instances: 1,
            memory_mib: 128,
            vip: [198, 19, 1, 100 + n].into(),
            ports: vec![80],
            backends: vec![],
            drain: Span::secs(7),
            forward_to: None,
            singleton: None,
        };
        let services = (0..).zip(services).map(|(n, s)| (s.parse().unwrap(), share(n))).collect();
        Assignment { generation: Generation(generation), network: "ashburn".parse().unwrap(), services }
    }

    #[test]
    fn an_assignment_that_cannot_be_meant_is_refused_by_service() {
        assert_eq!(check(&assignment(1, &["maps", "tiny"])), Ok(()));
        let said = |change: fn(&mut ServiceShare)| {
            let mut a = assignment(1, &["maps", "tiny"]);
            a.services.values_mut().skip(1).for_each(change);
            check(&a).unwrap_err()
        };
        assert_eq!(
            said(|s| s.instances = 17),
            "assignment g1, service tiny: 17 instances are more than 16, the most in one network"
        );
        assert!(said(|s| s.memory_mib = 0).contains("without memory"));
        assert!(said(|s| s.ports.clear()).contains("ports"));
        assert!(said(|s| s.image = "../tiny".into()).contains("is not a name"));
        assert!(said(|s| s.vip = [198, 19, 1, 100].into()).contains("belongs to service maps"));
    }

    #[test]
    fn what_leaves_is_written_down_with_its_drain_before_the_assignment_without_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = Kept::read(dir.path());
        let mut vma = Vma::with_leaving("ashburn".parse().unwrap(), kept.leaving.clone());
        for (generation, services) in [(1, &["maps", "tiny"][..]), (2, &["tiny"])] {
            let a = assignment(generation, services);
            accept(&vma, &mut kept, &a).unwrap();
            vma.handle(now(), Event::Assignment(a));
        }
        assert_eq!(accept(&vma, &mut kept, &assignment(1, &[])).unwrap_err().0, StatusCode::CONFLICT);
        let after = Kept::read(dir.path());
        assert_eq!(after.assignment.map(|a| a.generation), Some(Generation(2)));
        let left: Vec<_> = after.leaving.iter().map(|(s, l)| (s.as_str(), l.instances, l.drain)).collect();
        assert_eq!(left, [("maps", 0, Span::secs(7))]);
    }
}
