//! Disks for QEMU: NBD over a Unix socket, an export for each, of which data alone is written.
//!
//! ```text
//! connection ─▶ may its process have these? ─▶ handshake (fixed newstyle): which? ─▶ requests ─▶ Disk ─▶ replies
//! ```
//! QEMU connects as root, and again, after this process was started anew, as the user that owns nothing. Every
//! guest on the machine is that user, so the socket's mode cannot tell them apart: a process that is not root's is
//! served only if it is one whose memory this pager serves.

mod handshake;
mod requests;

use crate::disk::Disk;
use crate::socket;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

/// Connections at once; each guest has one for each disk, and there are fewer guests than a third of this on a machine.
const CONNECTIONS_MAX: usize = 3072;
/// A handshake takes a few messages.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// A guest that connects again may do so before this process was told whom it serves.
const KNOWN_WITHIN: Duration = Duration::from_secs(5);

/// Says whether a process, by pid, may have the disks.
pub(crate) type Allowed = Arc<dyn Fn(i32) -> bool + Send + Sync>;

/// Serves disks to whoever connects and may have them, for ever.
pub(crate) async fn serve(listener: UnixListener, disks: Vec<Arc<Disk>>, allowed: Allowed) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let room = requests::room();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = socket::accept(&listener).await;
        let (disks, allowed, room) = (disks.clone(), allowed.clone(), room.clone());
        tokio::spawn(async move {
            if let Err(why) = connection(stream, &disks, allowed, room).await {
                tracing::debug!(why = %why, "a connection to the disk ended");
            }
            drop(place);
        });
    }
}

async fn connection(
    mut stream: UnixStream,
    disks: &[Arc<Disk>],
    allowed: Allowed,
    room: Arc<Semaphore>,
) -> std::io::Result<()> {
    let peer = getsockopt(&stream, PeerCredentials)?;
    if peer.uid() != 0 && !is_known(peer.pid(), &allowed).await {
        tracing::warn!(
            pid = peer.pid(),
            uid = peer.uid(),
            "a process that is no guest of this image asks for its disk"
        );
        return Ok(());
    }
    let go_on = timeout(HANDSHAKE_LIMIT, handshake::shake(&mut stream, disks)).await;
    match go_on.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?? {
        Some(disk) => requests::serve(stream, disk, room).await,
        None => Ok(()),
    }
}

async fn is_known(pid: i32, allowed: &Allowed) -> bool {
    let deadline = Instant::now() + KNOWN_WITHIN;
    while !allowed(pid) {
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(20)).await;
    }
    true
}

#[cfg(test)]
mod tests;
