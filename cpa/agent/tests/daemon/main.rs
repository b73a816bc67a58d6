//! The daemon on loopback, between VM agents and edges that only remember what they were told.

#![allow(clippy::unwrap_used)] // A test may panic; the lint's own exception does not reach its helpers.

mod browser;
mod doors;
mod world;

use futures_util::StreamExt;
use std::time::Duration;
use vmatrix_cpa_agent::client::Client;
use vmatrix_model::Generation;
use vmatrix_model::wire::{Event, Fair, Order, Problem};
use world::{TOKEN, configure, eventually, free_port, networks, report, start};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_daemon_places_steers_obeys_and_goes_on_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let (networks, agents) = networks().await;
    let port = free_port().await;
    let base = format!("http://127.0.0.1:{port}");
    let config = configure(dir.path(), port, "", &agents);
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
    let reports = report(networks.clone(), base.clone());
    let answered = || {
        networks["tokyo"].lock().unwrap().steering.as_ref().is_some_and(|s| s.services.values().all(|a| !a.is_empty()))
    };
    eventually("the answers reach the edges once home serves", answered).await;

    let cpa = Client::new(&base, TOKEN).unwrap();
    let mut events = cpa.events().await.unwrap();
    assert!(matches!(events.next().await, Some(Ok(Event::Snapshot(_)))), "a snapshot comes first");
    let order = Order { service: "agenda".parse().unwrap(), at: [("dublin".parse().unwrap(), 1)].into(), fair: None };
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
    let wrong = Order { service: "agendo".parse().unwrap(), at: [("dublin".parse().unwrap(), 1)].into(), fair: None };
    let refused = cpa.plan(&wrong).await.unwrap_err();
    assert!(refused.to_string().contains("did you mean agenda?") && refused.status() == Some(422), "{refused}");

    let team = |region: &str| vec![region.parse().unwrap()];
    let fair = Some(Fair { teams: vec![team("new-york"), team("berlin")], slack_percent: None, cap_ms: None });
    let game = Order { service: "maps".parse().unwrap(), at: [].into(), fair };
    let fairest = cpa.plan(&game).await.unwrap();
    let [m] = &fairest.moves[..] else { panic!("{:?}", fairest.moves) };
    assert!(m.network.as_str() == "dublin" && m.reason.starts_with("fairest to new-york against berlin: "), "{m}");
    let body = r#"{"service":"maps","fair":{"teams":[["new-york"],["berln"]]}}"#;
    let post = http.post(format!("{base}/v1/plan")).bearer_auth(TOKEN).header("content-type", "application/json");
    let refused = post.body(body).send().await.unwrap();
    assert_eq!(refused.status(), 422);
    let problem: Problem = refused.json().await.unwrap();
    assert!(
        problem.problem.contains("no region berln") && problem.hint.contains("did you mean berlin?"),
        "{problem:?}"
    );

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_has_newer_answers_gets_ours_numbered_after_them() {
    let dir = tempfile::tempdir().unwrap();
    let (networks, agents) = networks().await;
    let port = free_port().await;
    let base = format!("http://127.0.0.1:{port}");
    networks["tokyo"].lock().unwrap().answering = Generation(1000);
    let daemon = start(&configure(dir.path(), port, "", &agents), &base).await;
    let reports = report(networks.clone(), base.clone());
    let steering = |name: &str| networks[name].lock().unwrap().steering.clone();
    eventually("tokyo's edge takes answers", || steering("tokyo").is_some_and(|s| s.generation > Generation(1000)))
        .await;
    eventually("the other edges take the same", || steering("dublin") == steering("tokyo")).await;
    reports.abort();
    daemon.abort();
}
