//! A cell's device and a sealed UDP path to one peer, joined: what a tunnel and a relay have in common.
//!
//! ```text
//! device ─▶ seal ─▶ socket ─▶ peer        every 250 ms: keepalives, and a handshake where one is due
//! device ◀─ open ◀─ socket ◀─ peer
//! ```

use crate::wireguard::{Out, Session};
use anyhow::Context;
use std::net::IpAddr;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tun_rs::AsyncDevice;

/// How long a handshake may take before another begins: longer than the longest path on earth.
const SHAKE_AGAIN: Duration = Duration::from_secs(1);
/// As that, while older keys still work.
const RENEW_AGAIN: Duration = Duration::from_secs(5);
/// How often timers are looked at.
const TICK: Duration = Duration::from_millis(250);
/// Largest packet, and largest datagram.
const PACKET_MAX: usize = 65_536;

/// Both ends of it here, and what was agreed on with the peer.
pub struct Sealed {
    session: Session,
    socket: UdpSocket,
    device: AsyncDevice,
    peer: IpAddr,
    shaken: Instant,
    ticks: Interval,
    datagram: Vec<u8>,
    packet: Vec<u8>,
}

/// What comes next: bytes in one of the buffers, or time has passed.
pub enum Event {
    Datagram(usize),
    Packet(usize),
    Tick,
}

impl Sealed {
    /// Of a socket that is connected to `peer`.
    pub fn new(session: Session, socket: UdpSocket, device: AsyncDevice, peer: IpAddr) -> Sealed {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (datagram, packet) = (vec![0; PACKET_MAX], vec![0; PACKET_MAX]);
        Sealed { session, socket, device, peer, shaken: Instant::now(), ticks, datagram, packet }
    }

    /// Waits for what comes; given up half way, nothing is lost.
    ///
    /// # Errors
    /// The device is gone.
    pub async fn next(&mut self) -> anyhow::Result<Event> {
        loop {
            tokio::select! {
                // A peer that is away answers with "port unreachable": timers deal with it.
                received = self.socket.recv(&mut self.datagram) => if let Ok(length) = received {
                    return Ok(Event::Datagram(length));
                },
                received = self.device.recv(&mut self.packet) => {
                    return received.map(Event::Packet).context("the cell's device failed");
                }
                _ = self.ticks.tick() => return Ok(Event::Tick),
            }
        }
    }

    /// Passes on what came.
    pub async fn take(&mut self, event: Event) {
        match event {
            Event::Datagram(length) => {
                let datagram = self.datagram.get(..length).unwrap_or_default();
                for out in self.session.open(self.peer, datagram).unwrap_or_default() {
                    match out {
                        Out::Datagram(d) => self.send(Some(d)).await,
                        Out::Packet(p, _) => {
                            if let Err(e) = self.device.send(&p).await {
                                tracing::debug!(peer = %self.peer, "cell's device: {e}");
                            }
                        }
                    }
                }
            }
            Event::Packet(length) => {
                let sealed = self.packet.get(..length).and_then(|p| self.session.seal(p));
                self.send(sealed).await;
            }
            Event::Tick => {
                let due = self.session.tick();
                self.send(due).await;
                let since = self.shaken.elapsed();
                if (!self.is_ready() && since >= SHAKE_AGAIN) || (self.session.is_aging() && since >= RENEW_AGAIN) {
                    self.shake().await;
                }
            }
        }
    }

    /// Begins a handshake.
    pub async fn shake(&mut self) {
        self.shaken = Instant::now();
        let hello = self.session.shake_hands();
        self.send(hello).await;
    }

    /// Forgets what was agreed on, and begins a handshake.
    pub async fn begin_anew(&mut self) {
        self.session.begin_anew();
        self.shake().await;
    }

    /// Whether packets pass.
    pub fn is_ready(&self) -> bool {
        self.session.is_ready()
    }

    async fn send(&self, datagram: Option<Vec<u8>>) {
        if let Some(datagram) = datagram
            && let Err(e) = self.socket.send(&datagram).await
        {
            tracing::debug!(peer = %self.peer, "sealed socket: {e}");
        }
    }
}
