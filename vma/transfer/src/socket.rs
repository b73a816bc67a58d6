//! How the kernel treats a connection: small queues, nothing held back, a dead peer noticed.

use crate::Class;
use socket2::{SockRef, Socket, TcpKeepalive};
use std::os::fd::AsFd;
use std::time::Duration;
use tokio::net::TcpStream;

/// Bytes of the background that may lie unsent in the kernel: a miss waits behind them. One TLS record and the next.
const BACKGROUND_UNSENT: u32 = 32 << 10;
/// Bytes that are urgent themselves: on a busy host we are not always there when the kernel could take more, and
/// then the wire would wait for us. 80 ms of 25 Mbit/s, 2 ms of 1 Gbit/s.
const URGENT_UNSENT: u32 = 256 << 10;
/// Quiet time after which the kernel asks whether the peer is there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(3);
const KEEPALIVE_TRIES: u32 = 3;
/// Bytes sent and not acknowledged for so long end the connection.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(15);
/// Named, so that figures do not depend on a host's default; the first that the kernel has. BBR keeps queues
/// shorter, and the window of an idle connection whatever `tcp_slow_start_after_idle` says: 2 MB over 100 Mbit/s
/// and 20 ms after 3 s of silence took 191 ms with it, 254 ms with CUBIC, 195 ms with CUBIC and that set to 0.
const CONGESTION: [&[u8]; 2] = [b"bbr", b"cubic"];
/// Which the kernel has.
const CONGESTION_HERE: &str = "/proc/sys/net/ipv4/tcp_available_congestion_control";
/// Where the kernel says whether it forgets a connection's window while nothing is sent; per network namespace.
const SLOW_START_AFTER_IDLE: &str = "/proc/sys/net/ipv4/tcp_slow_start_after_idle";

/// Sets a connection up.
///
/// # Errors
/// The connection is gone.
pub fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_notsent_lowat(BACKGROUND_UNSENT)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY);
    socket.set_tcp_keepalive(&keepalive.with_retries(KEEPALIVE_TRIES))?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    if !CONGESTION.iter().any(|name| socket.set_tcp_congestion(name).is_ok()) {
        tracing::debug!("the host's congestion control is kept");
    }
    Ok(())
}

/// How much of a connection may lie unsent in the kernel, by what is being sent.
#[derive(Debug)]
pub struct Unsent {
    socket: Socket,
    urgent: bool,
}

impl Unsent {
    /// Of a connection that [`tune`] has set up.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn of(stream: &TcpStream) -> std::io::Result<Unsent> {
        Ok(Unsent { socket: stream.as_fd().try_clone_to_owned()?.into(), urgent: false })
    }

    /// Something of `class` is sent next.
    pub fn before(&mut self, class: Class) {
        let urgent = class != Class::Background;
        if urgent == self.urgent {
            return;
        }
        self.urgent = urgent;
        let bytes = if urgent { URGENT_UNSENT } else { BACKGROUND_UNSENT };
        if let Err(error) = self.socket.set_tcp_notsent_lowat(bytes) {
            tracing::debug!(%error, "a connection is about to end");
        }
    }
}

/// Whether a connection of this network namespace loses its window while it is idle: then a warm one is cold after
/// a second.
pub fn cools() -> bool {
    let has_bbr =
        std::fs::read_to_string(CONGESTION_HERE).is_ok_and(|names| names.split(' ').any(|n| n.trim() == "bbr"));
    !has_bbr && std::fs::read_to_string(SLOW_START_AFTER_IDLE).is_ok_and(|text| text.trim() != "0")
}

/// Has connections of this network namespace keep their window while idle.
///
/// # Errors
/// We are not root there.
pub fn keep_windows() -> std::io::Result<()> {
    std::fs::write(SLOW_START_AFTER_IDLE, "0")
}
