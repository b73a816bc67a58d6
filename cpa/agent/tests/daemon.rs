//! The daemon on loopback, between VM agents and edges that only remember what they were told.

#![allow(clippy::unwrap_used)] // A test may panic; the lint's own exception does not reach its helpers.

use axum::extract::State;
use axum::routing::{get, put};
use axum::{Json, Router};
use futures_util::StreamExt;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use vmatrix_cpa_agent::client::Client;
use vmatrix_model::assignment::Assignment;
use vmatrix_model::inventory::{InstanceSeen, InstanceState, Inventory};
use vmatrix_model::steering::Steering;
use vmatrix_model::wire::{Event, Order};
use vmatrix_model::{Generation, InstanceId, NetworkId, Time};

const TOKEN: &str = "secret";

#[derive(Default)]
struct Told {
    assignment: Option<Assignment>,
    steering: Option<Steering>,
}
type Network = Arc<Mutex<Told>>;

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

async fn assigned(State(told): State<Network>, Json(a): Json<Assignment>) {
    told.lock().unwrap().assignment = Some(a);
}
async fn steered(State(told): State<Network>, Json(s): Json<Steering>) -> Json<serde_json::Value> {
    told.lock().unwrap().steering = Some(s);
    Json(serde_json::json!({}))
}

/// A network's VM agent and edge behind one address.
async fn network() -> (Network, String) {
    let told = Network::default();
    let routes = Router::new()
        .route("/v1/assignment", put(assigned))
        .route("/v1/steering", put(steered))
        .route("/livez", get(|| async {}))
        .with_state(told.clone());
    let (listener, url) = listen().await;
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (told, url)
}

fn inventory(name: &str, told: &Network) -> Inventory {
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
        refused: BTreeMap::new(),
    }
}

fn configure(dir: &Path, port: u16, agents: &BTreeMap<NetworkId, String>) -> std::path::PathBuf {
    let scenario: toml::Table = toml::from_str(include_str!("../../../scenarios/library/flash-crowd.toml")).unwrap();
    std::fs::write(dir.join("fleet.toml"), toml::to_string(&scenario["fleet"]).unwrap()).unwrap();
    std::fs::write(dir.join("token"), format!("{TOKEN}\n")).unwrap();
    let mut text = format!(
        "listen = \"127.0.0.1:{port}\"\nstate_dir = \"state\"\ntoken_file = \"token\"\nfleet_file = \"fleet.toml\"\nimages = \"http://127.0.0.1:9\"\ntick_ms = 100\n"
    );
    for (name, url) in agents {
        text += &format!("[agents.{name}]\nvma = \"{url}\"\nedge = \"{url}\"\n");
    }
    let path = dir.join("cpa.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// Starts the daemon and waits until it is ready; aborting the task is its kill -9.
async fn start(path: &Path, base: &str) -> tokio::task::JoinHandle<()> {
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

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..200 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("within 10 s: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_daemon_places_steers_obeys_and_goes_on_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let mut networks = BTreeMap::new();
    let mut agents = BTreeMap::new();
    for name in ["ashburn", "dublin", "tokyo"] {
        let (told, url) = network().await;
        networks.insert(name, told);
        agents.insert(name.parse().unwrap(), url);
    }
    let (probe, base) = listen().await;
    let port = probe.local_addr().unwrap().port();
    drop(probe);
    let config = configure(dir.path(), port, &agents);
    let daemon = start(&config, &base).await;

    let http = reqwest::Client::new();
    assert_eq!(http.get(format!("{base}/v1/snapshot")).send().await.unwrap().status(), 401);
    let page = http.get(&base).send().await.unwrap();
    assert!(page.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'self'"));
    let tag = page.headers()["etag"].clone();
    assert_eq!(http.get(&base).header("if-none-match", tag).send().await.unwrap().status(), 304);

    let assigned =
        |name: &str, g: u64| networks[name].lock().unwrap().assignment.as_ref().is_some_and(|a| a.generation.0 >= g);
    eventually("the first placement reaches every network", || {
        ["ashburn", "dublin", "tokyo"].iter().all(|n| assigned(n, 1))
    })
    .await;
    let (feed, url) = (networks.clone(), base.clone());
    let reports = tokio::spawn(async move {
        loop {
            for (name, told) in &feed {
                let _ = http
                    .post(format!("{url}/v1/inventory"))
                    .bearer_auth(TOKEN)
                    .json(&inventory(name, told))
                    .send()
                    .await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let answered = || {
        networks["tokyo"].lock().unwrap().steering.as_ref().is_some_and(|s| s.services.values().all(|a| !a.is_empty()))
    };
    eventually("the answers reach the edges once home serves", answered).await;

    let cpa = Client::new(&base, TOKEN).unwrap();
    let mut events = cpa.events().await.unwrap();
    assert!(matches!(events.next().await, Some(Ok(Event::Snapshot(_)))), "a snapshot comes first");
    let order = Order { service: "agenda".parse().unwrap(), at: [("dublin".parse().unwrap(), 1)].into() };
    let plan = cpa.plan(&order).await.unwrap();
    let decision = cpa.apply(plan.id).await.unwrap();
    assert_eq!(cpa.apply(plan.id).await.unwrap_err().status(), Some(404), "a plan is applied once");
    let told = async {
        while let Some(Ok(e)) = events.next().await {
            if matches!(&e, Event::Decision(d) if d.plan.id == plan.id) {
                return true;
            }
        }
        false
    };
    assert!(tokio::time::timeout(Duration::from_secs(5), told).await.unwrap(), "watchers hear of the decision");
    eventually("dublin is told", || assigned("dublin", decision.generation.0)).await;
    let wrong = Order { service: "agendo".parse().unwrap(), at: [("dublin".parse().unwrap(), 1)].into() };
    let refused = cpa.plan(&wrong).await.unwrap_err();
    assert!(refused.to_string().contains("did you mean agenda?") && refused.status() == Some(422), "{refused}");

    daemon.abort();
    let _ = daemon.await;
    drop(events);
    let steering_before = networks["tokyo"].lock().unwrap().steering.clone().unwrap().generation;
    networks["dublin"].lock().unwrap().assignment = None;
    let daemon = start(&config, &base).await;
    eventually("dublin, which forgot, is told again", || assigned("dublin", decision.generation.0)).await;
    let after = cpa.snapshot().await.unwrap();
    assert!(after.placement.generation >= decision.generation);
    assert!(after.steering.generation >= steering_before);
    assert!(after.decisions.iter().any(|d| d.plan.id == plan.id));
    assert!(cpa.explain(&order.service).await.unwrap().lines.iter().any(|l| l.contains("an operator ordered it")));
    reports.abort();
    daemon.abort();
}
