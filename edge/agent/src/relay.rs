//! A relay between two cells of one singleton: what the network it left still gets for it goes where it runs now.
//!
//! ```text
//! client ─▶ old network's address ─▶ old cell: device ══ sealed UDP between the networks ══ device: new cell ─▶ guest
//! client ◀─ old network's address ◀─ old cell: device ══════════════════════════════════════ device: new cell ◀─┘
//! ```
//!
//! Connections that were open when the guest moved know one address of it, the old network's; so do clients whose
//! resolver keeps an answer too long. Both ends run this, each in its own cell; which packets go through is the
//! cells' affair. Nothing leaves unsealed, and packets of anybody but the peer are dropped.

use crate::sealed::Sealed;
use crate::wireguard::{KeyPair, Session, from_base64};
use crate::{config, device, http, state};
use anyhow::{Context, ensure};
use ipnet::Ipv4Net;
use nix::errno::Errno;
use nix::libc;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use tokio::net::UdpSocket;

/// As on the networks beside it: an open connection has agreed on full packets. What is then too large for the
/// WAN is cut into fragments there.
const MTU: u16 = 1500;

/// What `vmatrix relay` is told, by a TOML file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelayFile {
    /// The cell's namespace, as `/run/netns/<name>`.
    pub netns: PathBuf,
    /// Name of the device within the cell.
    pub device: String,
    /// The device's address; both ends are in its network.
    pub address: Ipv4Net,
    /// Where the peer's datagrams arrive, in the network's namespace.
    pub listen: SocketAddrV4,
    /// Where the peer listens.
    pub peer: SocketAddrV4,
    /// File with this end's secret: 32 bytes in base64.
    pub key_file: PathBuf,
    /// The peer's public key, 32 bytes in base64.
    pub peer_key: String,
    /// Where the state is written for the machine: [`Status`] as JSON.
    pub status: PathBuf,
}

/// What stands in the status file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether packets pass.
    pub ready: bool,
}

/// Makes a secret for one end: the text of a key file, and the public key for the other end.
///
/// # Errors
/// The system gives no random bytes.
pub fn key() -> anyhow::Result<(String, String)> {
    let pair = KeyPair::generate()?;
    Ok((crate::wireguard::to_base64(&pair.secret_bytes()), crate::wireguard::to_base64(&pair.public)))
}

/// Runs one end of a relay until SIGTERM.
///
/// # Errors
/// The file or the key cannot be understood, the address is taken, or the device cannot be made.
pub async fn run(path: &Path) -> anyhow::Result<()> {
    let file: RelayFile = config::read(path)?;
    let secret = std::fs::read_to_string(&file.key_file)
        .with_context(|| format!("cannot read the relay's key {}", file.key_file.display()))?;
    let secret =
        from_base64(secret.trim()).with_context(|| format!("{} is not 32 bytes in base64", file.key_file.display()))?;
    let peer = from_base64(&file.peer_key)
        .with_context(|| format!("{}: peer_key is not 32 bytes in base64", path.display()))?;
    ensure!(file.listen.ip() != file.peer.ip(), "{}: listen and peer are one address", path.display());
    // What a run before this one said is not so any more.
    let _ = std::fs::remove_file(&file.status);
    let mut relay = Relay::open(file, &KeyPair::from_secret(secret), peer).await?;
    let ended = tokio::select! {
        ended = relay.carry() => ended,
        ended = http::asked_to_end() => ended,
    };
    let _ = std::fs::remove_file(&relay.file.status);
    ended
}

/// Has the system send a datagram that is larger than the way to the peer takes as fragments.
fn cut_large_datagrams(socket: &UdpSocket) -> nix::Result<()> {
    let never: libc::c_int = libc::IP_PMTUDISC_DONT;
    // SAFETY: the descriptor is the socket's, and the option's value is an integer that outlives the call.
    #[allow(unsafe_code)]
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            std::ptr::from_ref(&never).cast(),
            size_of_val(&never) as libc::socklen_t,
        )
    };
    Errno::result(set).map(drop)
}

struct Relay {
    file: RelayFile,
    sealed: Sealed,
    written: Option<bool>,
}

impl Relay {
    async fn open(file: RelayFile, own: &KeyPair, peer: [u8; 32]) -> anyhow::Result<Relay> {
        let socket = UdpSocket::bind(file.listen)
            .await
            .with_context(|| format!("cannot listen on {} (UDP); is another relay there?", file.listen))?;
        cut_large_datagrams(&socket).context("cannot let large datagrams be cut")?;
        socket.connect(file.peer).await.with_context(|| format!("there is no route to {}", file.peer))?;
        let device = device::open(Some(&file.netns), &file.device, file.address, MTU).await?;
        tracing::info!(device = file.device, peer = %file.peer, "relay begins");
        let sealed = Sealed::new(Session::new(own, peer, 1, None), socket, device, IpAddr::V4(*file.peer.ip()));
        Ok(Relay { file, sealed, written: None })
    }

    async fn carry(&mut self) -> anyhow::Result<()> {
        self.sealed.shake().await;
        loop {
            let event = self.sealed.next().await?;
            self.sealed.take(event).await;
            self.tell()?;
        }
    }

    /// Writes the status when it changed.
    fn tell(&mut self) -> anyhow::Result<()> {
        let ready = self.sealed.is_ready();
        if self.written != Some(ready) {
            state::save(&self.file.status, &Status { ready })?;
            self.written = Some(ready);
            tracing::info!(device = self.file.device, ready, "relay");
        }
        Ok(())
    }
}
