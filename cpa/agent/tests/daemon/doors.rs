//! Who may see what without the token, and who is not let in.

use crate::world::{TOKEN, configure, eventually, free_port, inventory, networks, start};
use futures_util::StreamExt;
use std::time::Duration;
use vmatrix_cpa_agent::client::Client;
use vmatrix_model::Generation;
use vmatrix_model::wire::Event;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_token_only_the_page_door_shows_the_fleet() {
    let dir = tempfile::tempdir().unwrap();
    let (_networks, agents) = networks().await;
    let (port, page_port) = (free_port().await, free_port().await);
    let (fleet, page) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{page_port}"));
    let config = configure(dir.path(), port, &format!("page_listen = \"127.0.0.1:{page_port}\"\n"), &agents);
    let daemon = start(&config, &fleet).await;
    let http = reqwest::Client::new();
    let status =
        async |base: &str, path: &str| http.get(format!("{base}{path}")).send().await.unwrap().status().as_u16();
    for path in ["/v1/events", "/v1/snapshot"] {
        assert_eq!((status(&fleet, path).await, status(&page, path).await), (401, 200), "{path}");
        let rebound = http.get(format!("{page}{path}")).header("host", "rebound.example").send().await.unwrap();
        assert_eq!(rebound.status(), 403, "{path} by a stranger's name");
    }
    for base in [&fleet, &page] {
        assert_eq!(status(base, "/v1/explain?service=maps").await, 401);
        for path in ["/v1/demand", "/v1/inventory", "/v1/plan", "/v1/apply"] {
            let answer = http.post(format!("{base}{path}")).json(&serde_json::json!({})).send().await.unwrap();
            assert_eq!(answer.status(), 401, "{base}{path}");
        }
        for path in ["/", "/livez", "/readyz"] {
            assert_eq!(status(base, path).await, 200, "{base}{path}");
        }
    }

    let mut open = vec![];
    let full = loop {
        let answer = http.get(format!("{page}/v1/events")).send().await.unwrap();
        if answer.status() != 200 {
            break answer;
        }
        open.push(answer);
        assert!(open.len() <= 64, "pages are bounded");
    };
    assert_eq!(full.status(), 503);
    let mut events = Client::new(&fleet, TOKEN).unwrap().events().await.unwrap();
    assert!(matches!(events.next().await, Some(Ok(Event::Snapshot(_)))), "open pages lock no operator out");
    assert_eq!(status(&fleet, "/readyz").await, 200);
    daemon.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inventory_of_an_absurd_number_is_refused_and_the_network_is_told_on() {
    let dir = tempfile::tempdir().unwrap();
    let (networks, agents) = networks().await;
    let port = free_port().await;
    let base = format!("http://127.0.0.1:{port}");
    let daemon = start(&configure(dir.path(), port, "", &agents), &base).await;
    let assigned = || networks["tokyo"].lock().unwrap().assignment.clone();
    eventually("tokyo is told of the first placement", || assigned().is_some()).await;
    let mut lie = inventory("tokyo", &networks["tokyo"]);
    lie.generation = Generation(u64::MAX);
    let send = reqwest::Client::new().post(format!("{base}/v1/inventory")).bearer_auth(TOKEN).json(&lie).send();
    let answer = send.await.unwrap();
    assert_eq!(answer.status(), 422);
    let words = answer.text().await.unwrap();
    assert!(
        words.contains("tokyo claims g18446744073709551615") && words.contains("empty the state folder"),
        "{words}"
    );
    networks["tokyo"].lock().unwrap().assignment = None;
    tokio::time::sleep(Duration::from_millis(100)).await;
    eventually("tokyo is told again: its claim was not believed", || assigned().is_some()).await;
    daemon.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_door_that_is_the_fleets_door_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_networks, agents) = networks().await;
    let config = configure(dir.path(), 8440, "page_listen = \"127.0.0.1:8440\"\n", &agents);
    let refused = format!("{:#}", vmatrix_cpa_agent::run(&config).await.unwrap_err());
    assert!(refused.contains("page_listen is the same address as listen"), "{refused}");
}
