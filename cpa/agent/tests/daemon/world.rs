//! VM agents and edges that only remember what they were told, and the daemon between them.

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, put};
use axum::{Json, Router};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use vmatrix_model::assignment::Assignment;
use vmatrix_model::edge_config::EdgeSeen;
use vmatrix_model::inventory::{InstanceSeen, InstanceState, Inventory};
use vmatrix_model::steering::Steering;
use vmatrix_model::{Generation, InstanceId, NetworkId, Time};

pub const TOKEN: &str = "secret";

#[derive(Default)]
pub struct Told {
    pub assignment: Option<Assignment>,
    pub steering: Option<Steering>,
    /// The edge refuses answers numbered before these: it has them of another CPA.
    pub answering: Generation,
}
pub type Network = Arc<Mutex<Told>>;

pub async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

async fn assigned(State(told): State<Network>, Json(a): Json<Assignment>) {
    told.lock().unwrap().assignment = Some(a);
}
async fn steered(State(told): State<Network>, Json(s): Json<Steering>) -> (StatusCode, Json<serde_json::Value>) {
    let mut told = told.lock().unwrap();
    if s.generation < told.answering {
        return (
            StatusCode::CONFLICT,
            Json(serde_json::json!({ "problem": "older than what is in force", "hint": "" })),
        );
    }
    told.steering = Some(s);
    (StatusCode::OK, Json(serde_json::json!({})))
}
async fn edge_seen(State(told): State<Network>) -> Json<EdgeSeen> {
    let steering = told.lock().unwrap().answering;
    let network = "tokyo".parse().unwrap();
    Json(EdgeSeen { network, config: Generation(0), steering, connections: BTreeMap::new() })
}

/// A network's VM agent and edge behind one address.
async fn network() -> (Network, String) {
    let told = Network::default();
    let routes = Router::new()
        .route("/v1/assignment", put(assigned))
        .route("/v1/steering", put(steered))
        .route("/v1/seen", get(edge_seen))
        .route("/livez", get(|| async {}))
        .with_state(told.clone());
    let (listener, url) = listen().await;
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (told, url)
}

pub fn inventory(name: &str, told: &Network) -> Inventory {
    let assignment = told.lock().unwrap().assignment.clone();
    let running = assignment.iter().flat_map(|a| a.services.iter()).filter(|(_, s)| s.instances > 0);
    let instances = running.map(|(s, _)| InstanceSeen {
        id: InstanceId { service: s.clone(), number: 0 },
        machine: "m1".parse().unwrap(),
        state: InstanceState::Serving,
        since: Time(0),
        resumed_in: None,
        trouble: None,
    });
    Inventory {
        network: name.parse().unwrap(),
        at: Time(0),
        generation: assignment.as_ref().map_or(Generation(0), |a| a.generation),
        machines: vec![],
        images: BTreeMap::new(),
        instances: instances.collect(),
        holds: BTreeMap::new(),
        refused: BTreeMap::new(),
    }
}

/// Writes a cpa.toml and what it names; further lines of it in `more`.
pub fn configure(dir: &Path, port: u16, more: &str, agents: &BTreeMap<NetworkId, String>) -> std::path::PathBuf {
    let scenario: toml::Table = toml::from_str(include_str!("../../../../scenarios/library/flash-crowd.toml")).unwrap();
    std::fs::write(dir.join("fleet.toml"), toml::to_string(&scenario["fleet"]).unwrap()).unwrap();
    std::fs::write(dir.join("token"), format!("{TOKEN}\n")).unwrap();
    let mut text = format!(
        "listen = \"127.0.0.1:{port}\"\nstate_dir = \"state\"\ntoken_file = \"token\"\nfleet_file = \"fleet.toml\"\nimages = \"http://127.0.0.1:9\"\ntick_ms = 100\n{more}"
    );
    for (name, url) in agents {
        text += &format!("[agents.{name}]\nvma = \"{url}\"\nedge = \"{url}\"\n");
    }
    let path = dir.join("cpa.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// Starts the daemon and waits until it is ready; aborting the task is its kill -9.
pub async fn start(path: &Path, base: &str) -> tokio::task::JoinHandle<()> {
    let path = path.to_owned();
    let daemon = tokio::spawn(async move { vmatrix_cpa_agent::run(&path).await.unwrap() });
    for _ in 0..100 {
        if reqwest::get(format!("{base}/readyz")).await.is_ok_and(|r| r.status().is_success()) {
            return daemon;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the CPA did not become ready within 5 s");
}

pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..200 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("within 10 s: {what}");
}

/// The networks of the shipped fleet.
pub async fn networks() -> (BTreeMap<&'static str, Network>, BTreeMap<NetworkId, String>) {
    let (mut networks, mut agents) = (BTreeMap::new(), BTreeMap::new());
    for name in ["ashburn", "dublin", "tokyo"] {
        let (told, url) = network().await;
        networks.insert(name, told);
        agents.insert(name.parse().unwrap(), url);
    }
    (networks, agents)
}

/// A port that was free a moment ago.
pub async fn free_port() -> u16 {
    listen().await.0.local_addr().unwrap().port()
}

/// Tells the CPA every 100 ms what each network has.
pub fn report(networks: BTreeMap<&'static str, Network>, base: String) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let http = reqwest::Client::new();
        loop {
            for (name, told) in &networks {
                let inventory = inventory(name, told);
                let url = format!("{base}/v1/inventory");
                let _ = http.post(url).bearer_auth(TOKEN).json(&inventory).send().await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}
