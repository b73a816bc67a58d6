//! The origin daemon: the gateway through which cells reach back ends, and the manifests the CPA prices by.
//!
//! ```text
//! CPA ───── GET image ─────────▶ store (read only)
//! tunnel ── PUT, DELETE peer ─▶ gateway ─▶ vpn0 ─▶ filter: listed back ends only ─▶ database
//! ```

use crate::config::{OriginFile, read_token};
use crate::gateway::{Ask, Gateway};
use crate::http::{self, Body, Refusal};
use crate::wireguard::{KeyPair, MTU, from_base64, to_base64};
use crate::{command, device, state, store};
use anyhow::Context;
use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::routing::{delete, get, put};
use axum::{Json, Router};
use ipnet::Ipv4Net;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::sync::Arc;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot};
use vmatrix_edge_core::tunnel::{LEASE, Leases};
use vmatrix_model::NetworkId;
use vmatrix_model::wire::{PeerGrant, PeerRequest};

/// The gateway's device.
const DEVICE: &str = "vpn0";
/// The gateway's packet filter.
const TABLE: &str = "vmatrix_origin";
/// Requests that wait for the gateway; more wait at their connection.
const ASKS: usize = 64;

struct Origin {
    asks: mpsc::Sender<Ask>,
    public_key: String,
    endpoint: SocketAddrV4,
    intranet: Ipv4Net,
}

/// Runs the origin daemon that the file at `config` describes, until SIGTERM.
///
/// # Errors
/// The file or the kept key is bad, an address is in use, or the machine lacks nft, ip, TUN or root.
pub async fn run(config: &Path) -> anyhow::Result<()> {
    let file = OriginFile::read(config)?;
    let token = read_token(&file.token_file)?;
    std::fs::create_dir_all(&file.state_dir).with_context(|| format!("cannot make {}", file.state_dir.display()))?;
    let keys = kept_key(&file.state_dir.join("tunnel.key"))?;
    let socket = UdpSocket::bind(file.tunnel_listen).await.with_context(|| {
        format!(
            "cannot listen on {} (UDP): another daemon may, or the address is not this machine's",
            file.tunnel_listen
        )
    })?;

    let cells = cells(file.intranet)?;
    command::run("nft", &["-f", "-"], &rules(&file, cells)?)
        .await
        .context("cannot put the gateway's filter in place")?;
    // The last address under the cells' half: the lower ones are the owner's.
    let own = Ipv4Addr::from_bits(cells.network().to_bits() - 1);
    let device = device::open(None, DEVICE, Ipv4Net::new(own, 32).context("a /32 is a prefix")?, MTU).await?;
    command::run("ip", &["route", "replace", &cells.to_string(), "dev", DEVICE], "").await?;

    let (asks, asked) = mpsc::channel(ASKS);
    let origin =
        Origin { asks, public_key: to_base64(&keys.public), endpoint: file.tunnel_listen, intranet: file.intranet };
    let gateway = tokio::spawn(Gateway::new(keys, socket, device, Leases::new(file.intranet)).run(asked));
    let peers = Router::new()
        .route("/v1/peers", put(put_peer))
        .route("/v1/peers/{network}/{cell}", delete(delete_peer))
        .with_state(Arc::new(origin));
    let images = Router::new().route("/v1/images/{name}", get(store::image)).with_state(Arc::new(file.store.clone()));
    let routes = http::guarded(peers.merge(images), &token).merge(http::health());
    tracing::info!(listen = %file.listen, tunnels = %file.tunnel_listen, intranet = %file.intranet, "origin serves");
    tokio::select! {
        ended = http::serve(file.listen, routes) => ended,
        ended = gateway => ended.context("the gateway was cut short")?.context("the gateway ended"),
    }
}

/// The half of the intranet that cells get addresses from.
fn cells(intranet: Ipv4Net) -> anyhow::Result<Ipv4Net> {
    intranet
        .subnets(intranet.prefix_len() + 1)
        .ok()
        .and_then(|mut halves| halves.nth(1))
        .with_context(|| format!("intranet {intranet} has no upper half for cells"))
}

/// Reads the gateway's key, or makes it: cells that know it must find it again after a restart.
fn kept_key(path: &Path) -> anyhow::Result<KeyPair> {
    match std::fs::read_to_string(path) {
        Ok(text) => from_base64(text.trim())
            .map(KeyPair::from_secret)
            .with_context(|| format!("{} is damaged: remove it, and cells will learn a new key", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let keys = KeyPair::generate()?;
            state::write(path, to_base64(&keys.secret_bytes()).as_bytes())?;
            Ok(keys)
        }
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// The gateway's filter as one transaction: cells reach the listed back ends, nobody reaches cells,
/// and neither cells' nor back ends' addresses are believed or answered on the side where tunnels arrive.
fn rules(file: &OriginFile, cells: Ipv4Net) -> anyhow::Result<String> {
    let backends: Vec<String> = file.backends.iter().map(|b| format!("{} . {}", b.ip(), b.port())).collect();
    let elements =
        if backends.is_empty() { String::new() } else { format!("elements = {{ {} }};", backends.join(", ")) };
    let outside = match uplink(*file.tunnel_listen.ip())? {
        Some(uplink) => format!("iifname \"{uplink}\" ip daddr {} drop;", file.intranet),
        None => String::new(),
    };
    let guard = format!("iifname != \"{DEVICE}\" ip saddr {cells} drop; {outside}");
    let from_cells = format!(
        "iifname \"{DEVICE}\" ct state established,related accept; iifname \"{DEVICE}\" ip daddr . tcp dport @backends accept; iifname \"{DEVICE}\" drop;"
    );
    let to_cells = format!(
        "oifname \"{DEVICE}\" tcp flags syn tcp option maxseg size set rt mtu; oifname \"{DEVICE}\" ct state established,related accept; oifname \"{DEVICE}\" drop;"
    );
    Ok(format!(
        "add table ip {TABLE}
delete table ip {TABLE}
table ip {TABLE} {{
  set backends {{ type ipv4_addr . inet_service; {elements} }}
  chain input {{ type filter hook input priority filter; policy accept; {guard} {from_cells} }}
  chain forward {{ type filter hook forward priority filter; policy accept; {guard} {from_cells} {to_cells} }}
}}
"
    ))
}

/// The interface that has `address`, unless that is the loopback.
fn uplink(address: Ipv4Addr) -> anyhow::Result<Option<String>> {
    let all = nix::ifaddrs::getifaddrs().context("cannot list this machine's addresses")?;
    let found = all
        .filter(|i| i.address.and_then(|a| a.as_sockaddr_in().map(|v4| v4.ip())) == Some(address))
        .map(|i| i.interface_name)
        .find(|name| name != "lo");
    Ok(found)
}

async fn put_peer(
    State(origin): State<Arc<Origin>>,
    Body(request): Body<PeerRequest>,
) -> Result<Json<PeerGrant>, Refusal> {
    let key = from_base64(&request.public_key).ok_or_else(|| {
        Refusal::because(
            StatusCode::UNPROCESSABLE_ENTITY,
            "public_key is not a WireGuard key",
            "send 32 bytes as base64",
        )
    })?;
    let (answer, answered) = oneshot::channel();
    origin.ask(Ask::Grant { network: request.network, cell: request.cell, key, answer }).await?;
    let granted = answered.await.context("the gateway ended")?;
    let (lease, fresh) = granted.map_err(|p| Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, p))?;
    Ok(Json(PeerGrant {
        address: lease.address,
        intranet: origin.intranet,
        fresh,
        public_key: origin.public_key.clone(),
        endpoint: origin.endpoint,
        lease_s: u32::try_from(LEASE.as_ms() / 1000).unwrap_or(u32::MAX),
    }))
}

async fn delete_peer(
    State(origin): State<Arc<Origin>>,
    UrlPath((network, cell)): UrlPath<(String, String)>,
) -> Result<StatusCode, Refusal> {
    let network: NetworkId = network.parse().map_err(|e| {
        Refusal::because(StatusCode::BAD_REQUEST, format!("{e}"), "name the network as in the request for the peer")
    })?;
    let (answer, answered) = oneshot::channel();
    origin.ask(Ask::Release { network, cell, answer }).await?;
    answered.await.context("the gateway ended")?;
    Ok(StatusCode::NO_CONTENT)
}

impl Origin {
    async fn ask(&self, ask: Ask) -> anyhow::Result<()> {
        self.asks.send(ask).await.ok().context("the gateway ended")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_have_the_upper_half() {
        assert_eq!(cells("172.21.162.0/24".parse().unwrap()).unwrap().to_string(), "172.21.162.128/25");
    }

    #[test]
    fn the_key_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tunnel.key");
        let first = kept_key(&path).unwrap().public;
        assert_eq!(kept_key(&path).unwrap().public, first);
        std::fs::write(&path, "not a key").unwrap();
        assert!(kept_key(&path).is_err());
    }
}
