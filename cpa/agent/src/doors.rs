//! The CPA's doors: who may ask what at which listener, and for how long a connection may sit there.
//!
//! ```text
//!  fleet door  (listen, reachable from the WAN)   everything needs the token, but the page's files, /livez, /readyz
//!  page door   (page_listen, of this machine)     the same, and the page's events and snapshot need no token
//! ```
//!
//! A connection that does not say what it wants within [`Limits::header`] is closed, and so is one that is idle for
//! as long; one peer has a bounded share of the seats, so that none can take them all.

use axum::Router;
use axum::http::{HeaderMap, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Which door a request came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    /// Where the fleet's daemons and the operators' tools knock.
    Fleet,
    /// Where a browser on this machine, or one led here by a proxy that knows its users, looks at the page.
    Page,
}

/// How many may be connected, and how long they may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Connections at a door; the next waits in the kernel's queue until one ends.
    pub connections: usize,
    /// Connections of one address; the next is closed at once.
    pub of_one_peer: usize,
    /// To send a whole request's header, from the connection's begin or the last answer's end.
    pub header: Duration,
}

impl Limits {
    /// Each network's daemons hold a handful of connections, and keep them alive with a report a second.
    pub(crate) const fn of(door: Door) -> Limits {
        let header = Duration::from_secs(10);
        match door {
            Door::Fleet => Limits { connections: 1024, of_one_peer: 64, header },
            // Everyone there comes from one address: this machine's, or the proxy's.
            Door::Page => Limits { connections: 128, of_one_peer: 128, header },
        }
    }
}

/// Serves `routes` at a door, for ever.
pub(crate) async fn serve(listener: TcpListener, routes: Router, limits: Limits) {
    let seats = Arc::new(Semaphore::new(limits.connections));
    let peers = Arc::new(Peers { most: limits.of_one_peer, open: Mutex::default() });
    loop {
        let Ok(seat) = Arc::clone(&seats).acquire_owned().await else { return };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!("cannot accept a connection: {e}");
                // Out of file descriptors, as a rule; asking again at once would only burn the processor.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(place) = Peers::enter(&peers, from.ip()) else {
            tracing::debug!(peer = %from.ip(), most = limits.of_one_peer, "connection closed: too many of this address");
            continue;
        };
        tokio::spawn(converse(stream, routes.clone(), limits.header, (seat, place)));
    }
}

/// One connection; what it holds is free again when it ends.
async fn converse(stream: TcpStream, routes: Router, header: Duration, _holds: (OwnedSemaphorePermit, Place)) {
    // Answers are small and whole; waiting to fill a packet would only delay them.
    let _ = stream.set_nodelay(true);
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(header);
    if let Err(e) = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes)).await {
        tracing::debug!("connection ended: {e}");
    }
}

/// Open connections by address; as many entries as connections.
struct Peers {
    most: usize,
    open: Mutex<BTreeMap<IpAddr, usize>>,
}

struct Place(Arc<Peers>, IpAddr);

impl Peers {
    fn enter(peers: &Arc<Peers>, peer: IpAddr) -> Option<Place> {
        let mut open = peers.open.lock().unwrap_or_else(PoisonError::into_inner);
        let n = open.entry(peer).or_default();
        if *n >= peers.most {
            return None;
        }
        *n += 1;
        Some(Place(Arc::clone(peers), peer))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = open.get_mut(&self.1) {
            *n -= 1;
            if *n == 0 {
                open.remove(&self.1);
            }
        }
    }
}

/// Whether a request shows the fleet's token.
pub(crate) fn shows_token(headers: &HeaderMap, token: &str) -> bool {
    let given =
        headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("Bearer "));
    given.is_some_and(|g| same(g.as_bytes(), token.as_bytes()))
}

/// Compares in a time that does not tell how much was right.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

/// Whether a browser was led here by an address, not by a name. A stranger's page can make its own name mean this
/// machine and then read what it asks (DNS rebinding); it cannot do that to an address.
pub(crate) fn by_address(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    name == "localhost" || name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use std::time::Instant;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn door(limits: Limits) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Router::new().route("/", get(|| async { "here" })), limits));
        address
    }

    fn limits(connections: usize, of_one_peer: usize, header: Duration) -> Limits {
        Limits { connections, of_one_peer, header }
    }

    /// Reads to the end, and says what came.
    async fn rest(mut stream: TcpStream) -> String {
        let mut said = vec![];
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut said)).await;
        // A reset is an end too.
        let _ = read.expect("the connection is closed within 5 s");
        String::from_utf8(said).unwrap()
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_and_one_that_is_idle_are_closed() {
        let at = door(limits(8, 8, Duration::from_millis(200))).await;
        let began = Instant::now();
        let silent = TcpStream::connect(at).await.unwrap();
        let mut slow = TcpStream::connect(at).await.unwrap();
        slow.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n").await.unwrap();
        let mut idle = TcpStream::connect(at).await.unwrap();
        idle.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert!(!rest(silent).await.contains("here"));
        assert!(!rest(slow).await.contains("here"));
        assert!(rest(idle).await.contains("here"));
        assert!(began.elapsed() >= Duration::from_millis(200));
    }

    #[tokio::test]
    async fn a_stream_of_events_is_not_idle() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let answer = || async {
            let events = futures_util::stream::unfold(0, |n| async move {
                tokio::time::sleep(Duration::from_millis(400)).await;
                (n < 3).then(|| (Ok::<_, std::convert::Infallible>(format!("event {n}\n")), n + 1))
            });
            axum::body::Body::from_stream(events)
        };
        let routes = Router::new().route("/", get(answer));
        tokio::spawn(serve(listener, routes, limits(8, 8, Duration::from_millis(200))));
        let mut watcher = TcpStream::connect(at).await.unwrap();
        watcher.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert!(rest(watcher).await.contains("event 2"));
    }

    #[tokio::test]
    async fn one_peer_cannot_take_every_seat_and_gets_its_own_back() {
        let at = door(limits(8, 2, Duration::from_secs(60))).await;
        let ask = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let held = [TcpStream::connect(at).await.unwrap(), TcpStream::connect(at).await.unwrap()];
        let mut third = TcpStream::connect(at).await.unwrap();
        let _ = third.write_all(ask).await;
        assert_eq!(rest(third).await, "");
        drop(held);
        for _ in 0..50 {
            let mut again = TcpStream::connect(at).await.unwrap();
            let _ = again.write_all(ask).await;
            if rest(again).await.contains("here") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("a peer whose connections ended is not let in again");
    }

    #[tokio::test]
    async fn more_connections_than_seats_wait_for_one() {
        let at = door(limits(1, 8, Duration::from_millis(300))).await;
        let first = TcpStream::connect(at).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let began = Instant::now();
        let mut second = TcpStream::connect(at).await.unwrap();
        second.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        assert!(rest(second).await.contains("here"));
        assert!(began.elapsed() >= Duration::from_millis(150), "it waited for the first to be closed");
        drop(first);
    }

    #[test]
    fn a_name_is_not_an_address() {
        let host = |h: &str| by_address(&[(header::HOST, h.parse().unwrap())].into_iter().collect());
        assert!(["127.0.0.1:8439", "127.0.0.1", "[::1]:8439", "[::1]", "localhost:8440"].map(host).iter().all(|b| *b));
        assert!(["rebound.example:8439", "127.0.0.1.example", "", "::1x"].map(host).iter().all(|b| !*b));
    }
}
