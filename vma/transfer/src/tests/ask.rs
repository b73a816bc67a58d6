//! Questions between machines.

use super::fleet::{Fleet, Running};
use crate::frame::QUESTION_MAX;
use crate::identity::Role;
use crate::{Answerer, Error, Fault, Limits, Server, Sources};
use std::time::Duration;
use tokio::sync::watch;

const SOON: Duration = Duration::from_secs(5);

/// A machine that says who asked what; it refuses "no", answers "much" with too much, and "later" when it is let.
async fn answering(fleet: &Fleet, lets: watch::Receiver<bool>) -> Running {
    let server = Server::new(fleet.config(&fleet.empty("origin"))).unwrap();
    server.answer_with(Answerer::new(move |name, question| {
        let mut lets = lets.clone();
        async move {
            let asked: String = serde_json::from_slice(&question).map_err(|e| format!("not a question: {e}"))?;
            match asked.as_str() {
                "no" => return Err("no means no".to_owned()),
                "much" => return Ok(vec![b'1'; 100 << 10]),
                "later" => drop(lets.wait_for(|let_go| *let_go).await),
                _ => {}
            }
            Ok(format!("\"{name} asks {asked}\"").into_bytes())
        }
    }));
    fleet.serve_at(server, "127.0.0.1:0".parse().unwrap()).await
}

fn asker(fleet: &Fleet, role: Role, running: &Running) -> Sources {
    let identity = fleet.identity(role, "tokyo-1");
    Sources::new(&identity, fleet.empty("local"), vec![running.address], None, &Limits::default()).unwrap()
}

async fn refusal(sources: &Sources, question: &str) -> String {
    match sources.ask::<_, String>(&question, SOON).await {
        Err(Error::Source { fault: Fault::Refused(text), .. }) => text,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_answered_by_its_certified_name_and_others_are_not() {
    let fleet = Fleet::new();
    let (_lets, heard) = watch::channel(false);
    let running = answering(&fleet, heard).await;
    let sources = asker(&fleet, Role::Machine, &running);
    let long = "x".repeat(QUESTION_MAX - 2);
    let answer: String = sources.ask(&long, SOON).await.unwrap();
    assert_eq!(answer, format!("spiffe://vmatrix/machine/tokyo-1 asks {long}"));
    assert_eq!(refusal(&sources, "no").await, "no means no");
    assert!(refusal(&sources, "much").await.contains("65536"));
    assert!(refusal(&sources, &"x".repeat(QUESTION_MAX - 1)).await.contains(&QUESTION_MAX.to_string()));
    let operator = asker(&fleet, Role::Operator, &running);
    assert!(refusal(&operator, "who").await.contains("only machines"));
    let silent = fleet.serve_store(&fleet.empty("silent")).await;
    assert!(refusal(&asker(&fleet, Role::Machine, &silent), "who").await.contains("answers no questions"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_knows_no_such_question_is_passed_over() {
    let fleet = Fleet::new();
    let (_lets, heard) = watch::channel(false);
    let (silent, knows) = (fleet.serve_store(&fleet.empty("silent")).await, answering(&fleet, heard).await);
    let addresses = vec![silent.address, knows.address];
    let identity = fleet.identity(Role::Machine, "tokyo-1");
    let sources = Sources::new(&identity, fleet.empty("local"), addresses, None, &Limits::default()).unwrap();
    let answer: String = sources.ask_each(&"who", SOON).await.unwrap();
    assert!(answer.ends_with("tokyo-1 asks who"), "{answer}");
    let refused = sources.ask_each::<_, String>(&"no", SOON).await.unwrap_err().to_string();
    assert!(refused.contains("answers no questions") && refused.contains("no means no"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_late_is_given_up_and_those_asked_meanwhile_are_not_held_up() {
    let fleet = Fleet::new();
    let (lets, heard) = watch::channel(false);
    let running = answering(&fleet, heard).await;
    let sources = asker(&fleet, Role::Machine, &running);
    let late = sources.ask::<_, String>(&"later", Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(late, Error::Source { fault: Fault::Silent(200), .. }), "{late}");
    let waits = sources.clone();
    let waiting = tokio::spawn(async move { waits.ask::<_, String>(&"later", SOON).await });
    assert!(sources.ask::<_, String>(&"now", SOON).await.unwrap().ends_with("asks now"));
    lets.send_replace(true);
    assert!(waiting.await.unwrap().unwrap().ends_with("asks later"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_means_ask_again() {
    let fleet = Fleet::new();
    let (_lets, heard) = watch::channel(false);
    let running = answering(&fleet, heard.clone()).await;
    let address = running.address;
    let sources = asker(&fleet, Role::Machine, &running);
    let waits = sources.clone();
    let waiting = tokio::spawn(async move { waits.ask::<_, String>(&"later", SOON).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(running);
    let lost = waiting.await.unwrap().unwrap_err();
    assert!(matches!(lost, Error::Source { fault: Fault::Lost(_), .. }), "{lost}");
    let server = Server::new(fleet.config(&fleet.empty("origin"))).unwrap();
    server.answer_with(Answerer::new(|_, _| async { Ok(b"\"again\"".to_vec()) }));
    let _running = fleet.serve_at(server, address).await;
    for _ in 0..100 {
        if let Ok(answer) = sources.ask::<_, String>(&"now", SOON).await {
            assert_eq!(answer, "again");
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never answered again");
}
