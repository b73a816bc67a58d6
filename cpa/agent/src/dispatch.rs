//! Carries assignments and steering to the networks: one task for each VM agent and one for each edge.
//!
//! ```text
//!  owner ─▶ newest assignment (watch) ─▶ task ─PUT─▶ vma      sent until taken, again when an inventory shows an older one
//!  owner ─▶ newest steering   (watch) ─▶ task ─PUT─▶ edge     sent at a change and every 2 s
//! ```
//!
//! Each task holds only the newest value, so nothing queues up behind a network that is slow or away,
//! and none delays another.

use crate::config::Agents;
use crate::owner::Ask;
use reqwest::StatusCode;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use vmatrix_cpa_core::Event;
use vmatrix_model::assignment::Assignment;
use vmatrix_model::edge_config::EdgeSeen;
use vmatrix_model::steering::Steering;
use vmatrix_model::{Generation, NetworkId};

/// First wait after a failure; doubled with each further one.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest wait: a restarted daemon gets its state within so long.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How often an edge is told the answers that it has: it may have been restarted without its disk.
const STEERING_EVERY: Duration = Duration::from_secs(2);
/// How long a VM agent that took an assignment may take to show it before it is sent again.
const SHOWN_WITHIN: Duration = Duration::from_secs(3);

struct ToNetwork {
    assignment: watch::Sender<Option<Assignment>>,
    seen: watch::Sender<Generation>,
}

pub(crate) struct Dispatch {
    networks: BTreeMap<NetworkId, ToNetwork>,
    steering: watch::Sender<Option<Steering>>,
}

impl Dispatch {
    /// Starts the tasks.
    pub(crate) fn start(
        agents: &BTreeMap<NetworkId, Agents>,
        http: &reqwest::Client,
        inbox: &mpsc::Sender<Ask>,
    ) -> Dispatch {
        let steering = watch::Sender::new(None);
        let start_one = |(name, at): (&NetworkId, &Agents)| {
            let to = ToNetwork { assignment: watch::Sender::new(None), seen: watch::Sender::new(Generation(0)) };
            tokio::spawn(assignments(http.clone(), at.vma.clone(), to.assignment.subscribe(), to.seen.subscribe()));
            tokio::spawn(answers(http.clone(), at.edge.clone(), steering.subscribe(), name.clone(), inbox.clone()));
            (name.clone(), to)
        };
        let networks = agents.iter().map(start_one).collect();
        Dispatch { networks, steering }
    }

    pub(crate) fn assign(&self, network: &NetworkId, assignment: &Assignment) {
        if let Some(to) = self.networks.get(network) {
            to.assignment.send_replace(Some(assignment.clone()));
        }
    }

    pub(crate) fn announce(&self, steering: &Steering) {
        self.steering.send_replace(Some(steering.clone()));
    }

    /// Notes the generation a network works towards.
    pub(crate) fn seen(&self, network: &NetworkId, generation: Generation) {
        if let Some(to) = self.networks.get(network) {
            to.seen.send_if_modified(|g| std::mem::replace(g, generation) != generation);
        }
    }
}

async fn assignments(
    http: reqwest::Client,
    vma: String,
    mut wanted: watch::Receiver<Option<Assignment>>,
    mut seen: watch::Receiver<Generation>,
) {
    let url = format!("{vma}/v1/assignment");
    let mut backoff = BACKOFF_MIN;
    let mut taken: Option<(Generation, Instant)> = None;
    loop {
        let assignment = wanted.borrow_and_update().clone();
        let shown = *seen.borrow_and_update();
        if let Some(a) = assignment {
            // A newer one than this was asked for by somebody else is the core's to answer, not ours to overrun.
            let under_way = taken.is_some_and(|(g, at)| g == a.generation && at.elapsed() < SHOWN_WITHIN);
            if shown < a.generation && !under_way {
                match put(&http, &url, &a).await {
                    Ok(_) => {
                        taken = Some((a.generation, Instant::now()));
                        backoff = BACKOFF_MIN;
                    }
                    Err(trouble) => {
                        tracing::warn!(network = %a.network, generation = %a.generation, "assignment not taken: {}", trouble.words);
                        pause(&mut backoff, &mut wanted).await;
                        continue;
                    }
                }
            }
        }
        let changed = async {
            tokio::select! {
                r = wanted.changed() => r.is_ok(),
                r = seen.changed() => r.is_ok(),
            }
        };
        if timeout(SHOWN_WITHIN, changed).await == Ok(false) {
            return;
        }
    }
}

async fn answers(
    http: reqwest::Client,
    edge: String,
    mut wanted: watch::Receiver<Option<Steering>>,
    network: NetworkId,
    inbox: mpsc::Sender<Ask>,
) {
    let url = format!("{edge}/v1/steering");
    let mut backoff = BACKOFF_MIN;
    loop {
        let steering = wanted.borrow_and_update().clone();
        if let Some(s) = steering {
            match put(&http, &url, &s).await {
                Ok(()) => backoff = BACKOFF_MIN,
                Err(trouble) => {
                    tracing::warn!(%network, generation = %s.generation, "steering not taken: {}", trouble.words);
                    if trouble.conflict
                        && let Some(seen) = look(&http, &edge).await
                    {
                        // It has answers of a CPA whose journal is lost: number ours after them.
                        let _ = inbox
                            .send(Ask::Hear(Event::Answering { network: network.clone(), generation: seen.steering }))
                            .await;
                    }
                    pause(&mut backoff, &mut wanted).await;
                    continue;
                }
            }
        }
        if let Ok(Err(_)) = timeout(STEERING_EVERY, wanted.changed()).await {
            return;
        }
    }
}

/// Waits, longer with each failure, or until there is something newer to send.
async fn pause<T>(backoff: &mut Duration, wanted: &mut watch::Receiver<T>) {
    tokio::select! {
        () = sleep(*backoff) => {}
        _ = wanted.changed() => {}
    }
    *backoff = (*backoff * 2).min(BACKOFF_MAX);
}

struct Trouble {
    words: String,
    /// It has something newer.
    conflict: bool,
}

async fn put(http: &reqwest::Client, url: &str, body: &impl Serialize) -> Result<(), Trouble> {
    let answer = http
        .put(url)
        .json(body)
        .send()
        .await
        .map_err(|e| Trouble { words: format!("{url}: {}", crate::client::chain(&e)), conflict: false })?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let words = crate::client::problem(answer).await.to_string();
    Err(Trouble { words: format!("{url}: {words}"), conflict: status == StatusCode::CONFLICT })
}

async fn look(http: &reqwest::Client, edge: &str) -> Option<EdgeSeen> {
    let bytes = crate::client::bounded(http.get(format!("{edge}/v1/seen")).send().await.ok()?).await.ok()?;
    serde_json::from_slice(&bytes).ok()
}
