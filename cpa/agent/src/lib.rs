//! The CPA's hands: hears demand and inventories, feeds `vmatrix-cpa-core`, writes the journal, carries out commands.
//!
//! ```text
//!            doors (token, seats)
//!  edges, VM agents ──POST──▶ api ─▶ ┌───────────────┐ ─▶ journal (before anything is sent)
//!  people, the page ◀─SSE── watchers ◀─ │ owner: the core │ ─▶ dispatch, one task per network and daemon
//!  origin ─image sizes─▶ sizes ─▶    └───────────────┘      PUT assignment, PUT steering
//! ```
//!
//! One task owns the core, so that events have one order. Every queue into it and out of it is bounded;
//! a slow network, watcher or origin delays nobody else.

mod api;
pub mod client;
mod config;
mod dispatch;
mod doors;
mod journal;
mod owner;
mod page;
mod pulse;
mod recall;
mod sizes;
mod watchers;

use anyhow::{Context, bail};
use doors::{Door, Limits};
use std::collections::BTreeMap;
use std::path::Path;
use tokio::sync::mpsc;
use vmatrix_cpa_core::Cpa;
use vmatrix_model::Time;

/// Runs the CPA that `config` (a cpa.toml, see docs/api.md) describes, until SIGTERM or SIGINT.
///
/// # Errors
/// A file that cannot be read or means nothing, an address in use, a journal that cannot be written: a
/// CPA that forgets what it said could run backwards after its next start, so it stops, and the data plane goes on without it.
pub async fn run(config: &Path) -> anyhow::Result<()> {
    let config = config::read(config)?;
    let fleet_door = bind(config.listen).await?;
    let page_door = match config.page_listen {
        Some(at) => {
            if !at.ip().is_loopback() {
                tracing::warn!(page_listen = %at, "whoever reaches this address sees the fleet: no token is asked there");
            }
            Some(bind(at).await?)
        }
        None => None,
    };
    let (journal, memory) = journal::Journal::open(&config.state_dir)?;
    let restored = memory.is_some();
    let http = http(&config.token)?;
    let watchers = watchers::Watchers::new();
    let (inbox, asks) = mpsc::channel(owner::ASKS_MAX);
    let dispatch = dispatch::Dispatch::start(&config.agents, &http, &inbox);
    let cpa = Cpa::new(config.fleet.clone(), BTreeMap::new());
    let pulse = pulse::Pulse::new();
    let owner = owner::Owner { cpa, journal, dispatch, watchers: watchers.clone(), pulse: pulse.clone(), asks };
    let owner = tokio::spawn(owner.run(memory, config.tick));
    tokio::spawn(sizes::fetch(http, config.images.clone(), config.fleet.clone(), inbox.clone()));
    let state = api::Shared { inbox, watchers, pulse, token: config.token.into() };
    let fleet = doors::serve(fleet_door, api::routes(state.clone(), Door::Fleet), Limits::of(Door::Fleet));
    let page = async {
        match page_door {
            Some(listener) => doors::serve(listener, api::routes(state, Door::Page), Limits::of(Door::Page)).await,
            None => std::future::pending().await,
        }
    };
    tracing::info!(listen = %config.listen, page = config.page_listen.map(tracing::field::display), networks = config.agents.len(), restored, "cpa ready");
    tokio::select! {
        () = fleet => bail!("the fleet's door closed\n\nhint: start the CPA again; it goes on from its journal"),
        () = page => bail!("the page's door closed\n\nhint: start the CPA again; it goes on from its journal"),
        // Streams to watchers never end by themselves: stop when told, without waiting for them.
        () = stopped() => Ok(()),
        ended = owner => ended.context("the task that owns the core ended")?,
    }
}

async fn bind(at: std::net::SocketAddr) -> anyhow::Result<tokio::net::TcpListener> {
    tokio::net::TcpListener::bind(at).await.with_context(|| {
        format!("cannot listen on {at}\n\nhint: another program may hold the address, or this machine does not have it")
    })
}

/// Microseconds since the epoch.
fn now() -> Time {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// A client for the daemons of the fleet: 2 s to connect, 5 s for the whole, the fleet token on every request.
fn http(token: &str) -> anyhow::Result<reqwest::Client> {
    client::builder(token)?.timeout(client::WHOLE).build().context("cannot make an HTTP client")
}

async fn stopped() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        tracing::warn!("cannot wait for signals; stop the CPA with SIGKILL, it loses nothing");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
