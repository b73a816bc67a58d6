//! The edge daemon of a network.
//!
//! ```text
//! start: last good config and steering ─▶ look, plan, apply ─▶ serve DNS and HTTP
//! PUT config, steering: older refused, same does nothing, newer: apply, then keep
//! every 10 s: look again, for someone else may have changed the filter
//! ```

use crate::config::{EdgeFile, read_token};
use crate::http::{self, Body, Refusal};
use crate::{connections, demand, dns, nat, state};
use anyhow::Context;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, put};
use axum::{Json, Router};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, RwLock};
use vmatrix_edge_core::nat::{Rules, plan, wanted};
use vmatrix_edge_core::steering::Table;
use vmatrix_model::edge_config::{EdgeConfig, EdgeSeen};
use vmatrix_model::steering::Steering;
use vmatrix_model::{Generation, NetworkId};

/// How often the filter is looked at without a reason.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

struct Edge {
    network: NetworkId,
    zone: String,
    rules: Rules,
    /// Where this daemon itself answers.
    own: [Ipv4Addr; 2],
    state_dir: PathBuf,
    /// In force; None before the first.
    config: Arc<RwLock<Option<EdgeConfig>>>,
    steering: RwLock<Option<Steering>>,
    /// What questions are answered from.
    answers: dns::Answers,
    /// Held while the filter is changed; says whether this run wrote the chains.
    filter: Mutex<Option<Rules>>,
}

/// Runs the edge daemon that the file at `config` describes, until SIGTERM. Rules and addresses stay.
///
/// # Errors
/// The file or the kept state is bad, an address is in use, or the machine lacks nft, ip or root.
pub async fn run(config: &Path) -> anyhow::Result<()> {
    let file = EdgeFile::read(config)?;
    let token = read_token(&file.token_file)?;
    std::fs::create_dir_all(&file.state_dir).with_context(|| format!("cannot make {}", file.state_dir.display()))?;
    nat::let_through()?;
    let edge = Arc::new(Edge {
        network: file.network.clone(),
        zone: file.zone.clone(),
        rules: Rules {
            uplink: file.uplink.clone(),
            control: file.control()?,
            peers: file.peers.clone(),
            transfer_ports: file.transfer_ports.clone(),
        },
        own: [*file.listen.ip(), *file.dns_listen.ip()],
        config: Arc::new(RwLock::new(state::load(&file.state_dir.join("config.json"))?)),
        steering: RwLock::new(state::load(&file.state_dir.join("steering.json"))?),
        state_dir: file.state_dir.clone(),
        answers: dns::Answers::default(),
        filter: Mutex::new(None),
    });
    if let Some(steering) = &*edge.steering.read().await {
        edge.answers.set(Table::new(steering));
    }
    let kept = edge.config.read().await.clone();
    edge.hold(&kept.unwrap_or_else(|| empty(&file.network))).await.context("cannot put the packet filter in place")?;

    let reporter = demand::Reporter {
        client: http::client()?,
        cpa: file.cpa.clone(),
        token: token.clone(),
        network: file.network.clone(),
    };
    let counting = tokio::spawn(demand::run(reporter, edge.config.clone()));
    let looking = tokio::spawn(edge.clone().look_again());
    let routes = Router::new()
        .route("/v1/config", put(put_config))
        .route("/v1/steering", put(put_steering))
        .route("/v1/seen", get(seen))
        .with_state(edge.clone());
    let routes = http::guarded(routes, &token).merge(http::health());
    let mut names = dns::serve(file.dns_listen, &file.zone, edge.answers.clone()).await?;
    tracing::info!(network = %file.network, listen = %file.listen, dns = %file.dns_listen, "edge serves");
    let ended = tokio::select! {
        ended = http::serve(file.listen, routes) => ended,
        ended = names.block_until_done() => ended.context("DNS ended"),
    };
    counting.abort();
    looking.abort();
    ended
}

fn empty(network: &NetworkId) -> EdgeConfig {
    EdgeConfig { generation: Generation(0), network: network.clone(), services: Default::default() }
}

impl Edge {
    /// Makes filter and addresses what `config` asks for.
    async fn hold(&self, config: &EdgeConfig) -> Result<(), Refusal> {
        let table =
            wanted(config, self.rules.clone()).map_err(|p| Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, p))?;
        let mut written = self.filter.lock().await;
        let installed = nat::look(written.as_ref()).await?;
        let change = plan(&installed, &table);
        if !change.is_empty() {
            nat::apply(&change).await?;
            tracing::info!(generation = %config.generation, added = change.add.len(), removed = change.remove.len(), "filter changed");
        }
        // From here on the chains are known, unless the table vanishes.
        *written = table.rules.clone();
        nat::hold_addresses(&nat::addresses(&table)).await?;
        Ok(())
    }

    async fn look_again(self: Arc<Edge>) {
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            // The lock stays held: a config that arrives meanwhile must not be undone by this one.
            let config = self.config.read().await;
            let held = match &*config {
                Some(config) => self.hold(config).await,
                None => self.hold(&empty(&self.network)).await,
            };
            if let Err(e) = held {
                tracing::warn!("the filter is not what it should be: {e}");
            }
        }
    }

    async fn seen(&self, count: bool) -> Result<EdgeSeen, Refusal> {
        let config = self.config.read().await;
        let services = || config.iter().flat_map(|c| c.services.values());
        let draining = services().any(|s| !s.draining.is_empty());
        let cells: BTreeSet<Ipv4Addr> =
            services().flat_map(|s| s.slots.iter().map(|slot| slot.cell).chain(s.draining.iter().copied())).collect();
        let connections = if count || draining {
            tokio::task::spawn_blocking(move || connections::count(&cells))
                .await
                .context("counting connections was cut short")??
        } else {
            Default::default()
        };
        Ok(EdgeSeen {
            network: self.network.clone(),
            config: config.as_ref().map_or(Generation(0), |c| c.generation),
            steering: self.steering.read().await.as_ref().map_or(Generation(0), |s| s.generation),
            connections,
        })
    }
}

/// What to do with a numbered state that arrived.
fn newer<T: PartialEq>(what: &str, old: Option<(&T, Generation)>, new: (&T, Generation)) -> Result<bool, Refusal> {
    let Some((old, in_force)) = old else { return Ok(true) };
    let refuse = |why: &str, hint: &str| {
        Err(Refusal::because(
            StatusCode::CONFLICT,
            format!("{what} {} {why} {in_force}, which is in force", new.1),
            hint,
        ))
    };
    match new.1.cmp(&in_force) {
        std::cmp::Ordering::Greater => Ok(true),
        std::cmp::Ordering::Equal if old == new.0 => Ok(false),
        std::cmp::Ordering::Equal => refuse("differs from", "send it with the next number"),
        std::cmp::Ordering::Less => refuse("is older than", "go on from the generation in force"),
    }
}

async fn put_config(State(edge): State<Arc<Edge>>, Body(config): Body<EdgeConfig>) -> Result<Json<EdgeSeen>, Refusal> {
    if config.network != edge.network {
        return Err(Refusal::because(
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("this is the edge of {}, not of {}", edge.network, config.network),
            "check the address of the edge in vma.toml",
        ));
    }
    if let Some((name, own)) = config.services.iter().find(|(_, s)| edge.own.contains(&s.vip)) {
        return Err(Refusal::because(
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("public address {} of service {name} is the gateway's own", own.vip),
            "give the service another: of a public address only declared ports answer, and the gateway's must",
        ));
    }
    {
        // Held over the change, so that two configs at once cannot pass each other.
        let mut in_force = edge.config.write().await;
        if newer("edge config", in_force.as_ref().map(|c| (c, c.generation)), (&config, config.generation))? {
            // Saved first: a disk that is full refuses the config whole, instead of one that is in force
            // until the next look puts the saved one back.
            state::save(&edge.state_dir.join("config.json"), &config)?;
            edge.hold(&config).await?;
            *in_force = Some(config);
        }
    }
    edge.seen(false).await.map(Json)
}

async fn put_steering(
    State(edge): State<Arc<Edge>>,
    Body(steering): Body<Steering>,
) -> Result<Json<EdgeSeen>, Refusal> {
    if !steering.zone.trim_end_matches('.').eq_ignore_ascii_case(&edge.zone) {
        return Err(Refusal::because(
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("this edge answers for {}, not for {}", edge.zone, steering.zone),
            "give the fleet and edge.toml the same zone",
        ));
    }
    {
        let mut in_force = edge.steering.write().await;
        if newer("steering", in_force.as_ref().map(|s| (s, s.generation)), (&steering, steering.generation))? {
            let known = steering.services.values().filter(|a| !a.is_empty()).count();
            state::save(&edge.state_dir.join("steering.json"), &steering)?;
            edge.answers.set(Table::new(&steering));
            tracing::info!(generation = %steering.generation, serving = known, "answers changed");
            *in_force = Some(steering);
        }
    }
    edge.seen(false).await.map(Json)
}

async fn seen(State(edge): State<Arc<Edge>>) -> Result<Json<EdgeSeen>, Refusal> {
    edge.seen(true).await.map(Json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_newer_state_replaces_the_one_in_force() {
        let of = |old: Option<(u32, u64)>, new: (u32, u64)| {
            newer("config", old.as_ref().map(|(t, g)| (t, Generation(*g))), (&new.0, Generation(new.1)))
                .map_err(|e| e.to_string())
        };
        assert_eq!(of(None, (1, 1)), Ok(true));
        assert_eq!(of(Some((1, 1)), (2, 2)), Ok(true));
        assert_eq!(of(Some((1, 2)), (1, 2)), Ok(false));
        assert!(of(Some((1, 2)), (9, 2)).unwrap_err().contains("config g2 differs from g2"));
        assert!(of(Some((1, 2)), (1, 1)).unwrap_err().contains("config g1 is older than g2"));
    }
}
