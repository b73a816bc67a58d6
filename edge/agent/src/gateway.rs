//! The gateway beside the database: one UDP port, one device, a session per cell.
//!
//! ```text
//! UDP ─▶ handshake: which key? data: which index? ─▶ session ─▶ packet from its own address? ─▶ vpn0
//! vpn0 ─▶ whose address? ─▶ session ─▶ UDP, where that cell was last heard from
//! ```
//!
//! # Invariants
//! 1. A packet leaves a session into vpn0 only with the address that session was granted.
//! 2. A cell without a lease has no session.

use crate::demand::now;
use crate::wireguard::{KeyPair, Out, Session};
use anyhow::Context;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::PublicKey;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tun_rs::AsyncDevice;
use vmatrix_edge_core::tunnel::{Key, Lease, Leases};
use vmatrix_model::NetworkId;
use vmatrix_model::wire::Problem;

/// Handshakes a second before cookies are asked for: every cell of a full gateway in two seconds, and
/// each is looked at twice.
const HANDSHAKES_PER_S: u64 = 4096;

/// What the gateway is asked.
pub enum Ask {
    /// Give a place, or renew it; answered with the lease and whether its session is new.
    Grant { network: NetworkId, cell: String, key: Key, answer: oneshot::Sender<Result<(Lease, bool), Problem>> },
    /// Take a place back.
    Release { network: NetworkId, cell: String, answer: oneshot::Sender<()> },
}

struct Peer {
    session: Session,
    index: u32,
    address: Ipv4Addr,
    /// Where it was last heard from, proven by its key.
    endpoint: Option<SocketAddr>,
}

/// The gateway's state and its two sides.
pub struct Gateway {
    keys: KeyPair,
    socket: UdpSocket,
    device: AsyncDevice,
    leases: Leases,
    limiter: Arc<RateLimiter>,
    peers: BTreeMap<Key, Peer>,
    by_index: BTreeMap<u32, Key>,
    by_address: BTreeMap<Ipv4Addr, Key>,
    next_index: u32,
}

impl Gateway {
    /// A gateway without cells, known by `keys`, reached at `socket`, whose intranet side is `device`.
    pub fn new(keys: KeyPair, socket: UdpSocket, device: AsyncDevice, leases: Leases) -> Gateway {
        let limiter = Arc::new(RateLimiter::new(&PublicKey::from(keys.public), HANDSHAKES_PER_S));
        // Where indices begin differs from run to run, so that data for an older run finds no session.
        let next_index = (now().0 >> 10) as u32 & INDEX_MASK;
        Gateway {
            keys,
            socket,
            device,
            leases,
            limiter,
            peers: BTreeMap::new(),
            by_index: BTreeMap::new(),
            by_address: BTreeMap::new(),
            next_index,
        }
    }

    /// Carries packets until nobody can ask any more.
    ///
    /// # Errors
    /// The socket or the device fails for good.
    pub async fn run(mut self, mut asks: mpsc::Receiver<Ask>) -> anyhow::Result<()> {
        let mut ticks = tokio::time::interval(Duration::from_millis(250));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut datagram, mut packet) = (vec![0u8; 65_536], vec![0u8; 65_536]);
        loop {
            tokio::select! {
                received = self.socket.recv_from(&mut datagram) => match received {
                    Ok((length, from)) => {
                        let got = datagram.get(..length).unwrap_or_default().to_vec();
                        self.arrived(from, &got).await;
                    }
                    // A cell that is gone answers with "port unreachable", which is no failure of ours.
                    Err(e) => tracing::debug!("tunnel socket: {e}"),
                },
                received = self.device.recv(&mut packet) => {
                    let length = received.context("the tunnel device failed")?;
                    let got = packet.get(..length).unwrap_or_default().to_vec();
                    self.leaves(&got).await;
                }
                _ = ticks.tick() => self.tick().await,
                ask = asks.recv() => match ask {
                    Some(ask) => self.answer(ask),
                    None => return Ok(()),
                },
            }
        }
    }

    /// A datagram from outside.
    async fn arrived(&mut self, from: SocketAddr, datagram: &[u8]) {
        let Some(key) = self.sender(from, datagram).await else { return };
        let Some(peer) = self.peers.get_mut(&key) else { return };
        let Some(outs) = peer.session.open(from.ip(), datagram) else { return };
        peer.endpoint = Some(from);
        let address = peer.address;
        for out in outs {
            match out {
                Out::Datagram(d) => self.send(from, &d).await,
                Out::Packet(p, source) if source == address => {
                    if let Err(e) = self.device.send(&p).await {
                        tracing::debug!("tunnel device: {e}");
                    }
                }
                Out::Packet(_, source) => {
                    tracing::warn!(%address, %source, "a cell sent with an address that is not its own: dropped")
                }
            }
        }
    }

    /// Whose datagram it is; a cookie is sent instead where too many handshakes come in.
    async fn sender(&self, from: SocketAddr, datagram: &[u8]) -> Option<Key> {
        let mut cookie = [0u8; 64];
        let packet = match self.limiter.verify_packet(Some(from.ip()), datagram, &mut cookie) {
            Ok(packet) => packet,
            Err(TunnResult::WriteToNetwork(reply)) => {
                let reply = reply.to_vec();
                self.send(from, &reply).await;
                return None;
            }
            Err(_) => return None,
        };
        let index = match packet {
            Packet::HandshakeInit(hello) => {
                return parse_handshake_anon(self.keys.secret(), &PublicKey::from(self.keys.public), &hello)
                    .ok()
                    .map(|h| h.peer_static_public);
            }
            Packet::HandshakeResponse(p) => p.receiver_idx,
            Packet::PacketCookieReply(p) => p.receiver_idx,
            Packet::PacketData(p) => p.receiver_idx,
        };
        // A session numbers its keys in the lower eight bits.
        self.by_index.get(&(index >> 8)).copied()
    }

    /// A packet from the intranet.
    async fn leaves(&mut self, packet: &[u8]) {
        let Some(std::net::IpAddr::V4(to)) = Tunn::dst_address(packet) else { return };
        let Some(peer) = self.by_address.get(&to).and_then(|key| self.peers.get_mut(key)) else { return };
        let Some(endpoint) = peer.endpoint else { return };
        if let Some(datagram) = peer.session.seal(packet) {
            self.send(endpoint, &datagram).await;
        }
    }

    async fn send(&self, to: SocketAddr, datagram: &[u8]) {
        if let Err(e) = self.socket.send_to(datagram, to).await {
            tracing::debug!(%to, "tunnel socket: {e}");
        }
    }

    async fn tick(&mut self) {
        self.limiter.reset_count();
        for lease in self.leases.expire(now()) {
            tracing::info!(address = %lease.address, "a cell's lease ran out");
            self.forget(&lease);
        }
        let due: Vec<(SocketAddr, Vec<u8>)> =
            self.peers.values_mut().filter_map(|p| Some((p.endpoint?, p.session.tick()?))).collect();
        for (endpoint, datagram) in due {
            self.send(endpoint, &datagram).await;
        }
    }

    fn answer(&mut self, ask: Ask) {
        // Whoever asked may have given up waiting; the lease then runs out by itself.
        match ask {
            Ask::Grant { network, cell, key, answer } => {
                let _ = answer.send(self.grant(&network, &cell, key));
            }
            Ask::Release { network, cell, answer } => {
                if let Some(lease) = self.leases.release(&network, &cell) {
                    tracing::info!(%network, cell, address = %lease.address, "a cell left");
                    self.forget(&lease);
                }
                let _ = answer.send(());
            }
        }
    }

    fn grant(&mut self, network: &NetworkId, cell: &str, key: Key) -> Result<(Lease, bool), Problem> {
        let before = self.leases.of(network, cell);
        let lease = self.leases.grant(now(), network, cell, key)?;
        if let Some(old) = before.filter(|old| old.key != key) {
            self.forget(&old);
        }
        let fresh = !self.peers.contains_key(&key);
        if fresh {
            let index = self.index();
            let session = Session::new(&self.keys, key, index, Some(self.limiter.clone()));
            self.peers.insert(key, Peer { session, index, address: lease.address, endpoint: None });
            self.by_index.insert(index, key);
            self.by_address.insert(lease.address, key);
            tracing::info!(%network, cell, address = %lease.address, "a cell joined");
        }
        Ok((lease, fresh))
    }

    fn forget(&mut self, lease: &Lease) {
        if let Some(peer) = self.peers.remove(&lease.key) {
            self.by_index.remove(&peer.index);
            self.by_address.remove(&peer.address);
        }
    }

    /// The next index that no session has; leases are far fewer than indices.
    fn index(&mut self) -> u32 {
        while self.by_index.contains_key(&self.next_index) {
            self.next_index = (self.next_index + 1) & INDEX_MASK;
        }
        let index = self.next_index;
        self.next_index = (index + 1) & INDEX_MASK;
        index
    }
}

/// WireGuard's 32-bit index less the eight bits that number a session's keys.
const INDEX_MASK: u32 = 0x00ff_ffff;
