//! The tunnel of one cell: its place in the owner's intranet, wherever the cell runs.
//!
//! ```text
//! cell's namespace: device ◀─▶ session ◀─▶ UDP socket: the network's namespace ◀─▶ origin's gateway
//! every 5 s: PUT peer (lease); a gateway that forgot us: hands are shaken anew at once
//! ```
//!
//! States: *asking* (no place yet) ─granted▶ *shaking* ─handshake▶ *ready* ─gateway forgot▶ *shaking*.
//! What the cell sends before *ready* waits (256 packets) or is dropped; it never leaves unsealed.

use crate::config::read_token;
use crate::sealed::Sealed;
use crate::wireguard::{KeyPair, MTU, Session, from_base64, to_base64};
use crate::{device, http, state};
use anyhow::{Context, ensure};
use ipnet::Ipv4Net;
use serde::Serialize;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use vmatrix_model::NetworkId;
use vmatrix_model::wire::{PeerGrant, PeerRequest};

/// How often the lease is renewed: six times before it ends.
const RENEW: Duration = Duration::from_secs(5);
/// How often a place is asked for until there is one.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What `vmatrix tunnel` is told.
#[derive(Debug, Clone)]
pub struct TunnelArgs {
    /// The cell's namespace, as `/run/netns/<name>`.
    pub netns: PathBuf,
    /// The network that the cell runs in.
    pub network: NetworkId,
    /// The instance's name: `agenda-0`.
    pub cell: String,
    /// Base URL of the origin.
    pub origin: String,
    /// Where the fleet's token is.
    pub token_file: PathBuf,
    /// Name of the device within the cell.
    pub device: String,
    /// Where the state is written for the machine: [`Status`] as JSON.
    pub status: PathBuf,
}

/// What stands in the status file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The cell's address in the owner's intranet; what leaves by the device must have it as its source.
    pub address: Ipv4Addr,
    /// What is sent into the tunnel.
    pub intranet: Ipv4Net,
    /// Whether packets pass.
    pub ready: bool,
}

/// The origin as the tunnel asks it.
#[derive(Clone)]
struct Origin {
    client: reqwest::Client,
    url: String,
    token: String,
    request: PeerRequest,
}

impl Origin {
    async fn ask(&self) -> Result<PeerGrant, reqwest::Error> {
        self.client
            .put(format!("{}/v1/peers", self.url))
            .bearer_auth(&self.token)
            .json(&self.request)
            .send()
            .await?
            .error_for_status()?
            .json()
            .await
    }

    async fn leave(&self) -> Result<(), reqwest::Error> {
        let PeerRequest { network, cell, .. } = &self.request;
        self.client
            .delete(format!("{}/v1/peers/{network}/{cell}", self.url))
            .bearer_auth(&self.token)
            .send()
            .await?
            .error_for_status()
            .map(|_| ())
    }

    /// Asks for a place again and again; `told` hears of each grant.
    async fn keep_asking(self, told: watch::Sender<Option<PeerGrant>>) {
        let mut away = false;
        loop {
            let next = match self.ask().await {
                Ok(grant) => {
                    away = false;
                    told.send_replace(Some(grant));
                    RENEW
                }
                Err(e) => {
                    if !std::mem::replace(&mut away, true) {
                        tracing::warn!("the origin gives no place in the intranet: {:#}", anyhow::Error::new(e));
                    }
                    ASK_AGAIN
                }
            };
            tokio::time::sleep(next).await;
        }
    }
}

/// Runs the tunnel of one cell until SIGTERM, then gives its place back.
///
/// # Errors
/// The token or the namespace cannot be read, the device cannot be made, or the status cannot be written.
pub async fn run(args: TunnelArgs) -> anyhow::Result<()> {
    let keys = KeyPair::generate()?;
    let origin = Origin {
        client: http::client()?,
        url: args.origin.trim_end_matches('/').to_owned(),
        token: read_token(&args.token_file)?,
        request: PeerRequest {
            network: args.network.clone(),
            cell: args.cell.clone(),
            public_key: to_base64(&keys.public),
        },
    };
    // What a run before this one said is not so any more.
    let _ = std::fs::remove_file(&args.status);
    let (tell, grants) = watch::channel(None);
    let asking = tokio::spawn(origin.clone().keep_asking(tell));
    let ended = tokio::select! {
        ended = carry(&args, &keys, grants) => ended,
        ended = http::asked_to_end() => ended,
    };
    asking.abort();
    let _ = std::fs::remove_file(&args.status);
    if let Err(e) = origin.leave().await {
        tracing::info!("the place in the intranet ends with its lease: {:#}", anyhow::Error::new(e));
    }
    ended
}

/// Carries packets; a grant with another address or gateway begins a new tunnel.
async fn carry(
    args: &TunnelArgs,
    keys: &KeyPair,
    mut grants: watch::Receiver<Option<PeerGrant>>,
) -> anyhow::Result<()> {
    loop {
        grants.wait_for(Option::is_some).await.context("nobody asks the origin any more")?;
        let Some(grant) = grants.borrow_and_update().clone() else { continue };
        Tunnel::open(args, keys, grant).await?.run(&mut grants).await?;
    }
}

struct Tunnel<'a> {
    args: &'a TunnelArgs,
    grant: PeerGrant,
    sealed: Sealed,
    written: Option<bool>,
}

impl<'a> Tunnel<'a> {
    async fn open(args: &'a TunnelArgs, keys: &KeyPair, grant: PeerGrant) -> anyhow::Result<Tunnel<'a>> {
        ensure!(
            grant.intranet.contains(&grant.address),
            "the origin granted {}, which is outside its intranet {}",
            grant.address,
            grant.intranet
        );
        let key = from_base64(&grant.public_key).context("the origin's public key is not a WireGuard key")?;
        let socket = UdpSocket::bind("0.0.0.0:0").await.context("cannot open a UDP socket")?;
        socket
            .connect(grant.endpoint)
            .await
            .with_context(|| format!("there is no route to the gateway {}", grant.endpoint))?;
        let address =
            Ipv4Net::new(grant.address, grant.intranet.prefix_len()).context("the intranet's prefix is a prefix")?;
        let device = device::open(Some(&args.netns), &args.device, address, MTU).await?;
        let session = Session::new(keys, key, 1, None);
        tracing::info!(cell = args.cell, address = %grant.address, gateway = %grant.endpoint, "tunnel has a place");
        let sealed = Sealed::new(session, socket, device, IpAddr::V4(*grant.endpoint.ip()));
        Ok(Tunnel { args, sealed, written: None, grant })
    }

    /// Carries packets until the place changes.
    async fn run(mut self, grants: &mut watch::Receiver<Option<PeerGrant>>) -> anyhow::Result<()> {
        self.sealed.shake().await;
        loop {
            tokio::select! {
                event = self.sealed.next() => self.sealed.take(event?).await,
                changed = grants.changed() => {
                    changed.context("nobody asks the origin any more")?;
                    let Some(grant) = grants.borrow_and_update().clone() else { continue };
                    let place = |g: &PeerGrant| (g.address, g.endpoint, g.intranet, g.public_key.clone());
                    if place(&grant) != place(&self.grant) {
                        return Ok(());
                    }
                    if grant.fresh {
                        tracing::info!(cell = self.args.cell, "the gateway began anew, hands are shaken again");
                        self.sealed.begin_anew().await;
                    }
                }
            }
            self.tell()?;
        }
    }

    /// Writes the status when it changed.
    fn tell(&mut self) -> anyhow::Result<()> {
        let ready = self.sealed.is_ready();
        if self.written != Some(ready) {
            state::save(
                &self.args.status,
                &Status { address: self.grant.address, intranet: self.grant.intranet, ready },
            )?;
            self.written = Some(ready);
            tracing::info!(cell = self.args.cell, ready, "tunnel");
        }
        Ok(())
    }
}
