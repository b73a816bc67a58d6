//! One connection to a source.
//!
//! ```text
//! Link::ask, open, key ─frames─▶ writer ═▶ source ═▶ reader ─┬─ asked chunk ─▶ Report::Stored
//!                                                            └─ manifest, key, pushed chunk ─▶ the open's Item
//! ```
//!
//! # Invariants
//! 1. A chunk is taken only if it was asked for, and then of exactly the length it must have; or if it is pushed,
//!    and then within [`PUSHED_ROOM`].
//! 2. Whatever breaks the protocol ends the connection.

mod reader;

use crate::error::Fault;
use crate::frame::{self, How, ImageRef, Request};
use crate::plan::Slot;
use crate::{Class, socket, tls};
use bytes::Bytes;
use reader::Reader;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use vmatrix_model::Digest;
use vmatrix_vma_image::store::STORED_MAX;

/// TCP and TLS each connect within this time, or not at all.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How often an idle connection says that it is there.
const PING_EVERY: Duration = Duration::from_secs(15);
/// A frame that the source does not take within this time ends the connection.
const STALL_MAX: Duration = Duration::from_secs(20);
/// Bytes of nothing that warm a connection: with these its window holds what a wide link does (1 Gbit/s and 5 ms
/// are 625 KB). Not a multiple of a frame, so that its end is seen.
const WARM: u32 = 1 << 20;
/// Requests that wait to be written: what is asked of one source, and some more.
const REQUESTS_MAX: usize = 4096;
/// Pushed bytes that wait to be verified; what comes beyond is dropped, and asked for later.
pub const PUSHED_ROOM: usize = STORED_MAX + (64 << 20);
/// Things that wait for one open: what a server pushes, and some more. What comes beyond is dropped too.
const ITEMS_MAX: usize = 20_000;
/// Images opened on one connection at a time.
const OPENS_MAX: usize = 8;

/// What a link tells the driver.
#[derive(Debug)]
pub enum Report {
    Up(Link),
    Down(Fault),
    Heard,
    /// A chunk that was asked for, as it is stored.
    Stored {
        digest: Digest,
        bytes: Bytes,
    },
    Missing {
        digest: Digest,
    },
    Elsewhere {
        digest: Digest,
        addresses: Vec<SocketAddr>,
    },
}

/// Reports of one connection, told apart from those of an earlier one to the same source.
#[derive(Debug, Clone)]
pub struct Reports {
    pub slot: Slot,
    pub connection: u64,
    pub to: mpsc::Sender<(Slot, u64, Report)>,
}

impl Reports {
    /// False if nobody listens any more.
    async fn send(&self, report: Report) -> bool {
        self.to.send((self.slot, self.connection, report)).await.is_ok()
    }

    /// Where the listener is busy it is told the next time.
    fn hint(&self, report: Report) {
        let _ = self.to.try_send((self.slot, self.connection, report));
    }
}

/// What comes for an open, in the order it was sent.
#[derive(Debug)]
pub enum Item {
    /// The signed manifest's JSON.
    Manifest(Bytes),
    Key {
        id: Digest,
        bytes: Bytes,
    },
    /// A pushed chunk, as it is stored.
    Stored {
        digest: Digest,
        bytes: Bytes,
        room: Room,
    },
    /// All was sent.
    End,
    Refused(String),
}

/// Pushed bytes that are counted until they are dropped.
#[derive(Debug)]
pub struct Room {
    link: Arc<Shared>,
    bytes: usize,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.link.pushed.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Counters of one source, which outlive its connections.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes of frames received, before TLS.
    pub received: AtomicU64,
    /// Chunks received whole.
    pub chunks: AtomicU64,
    /// Answers that were not what they had to be.
    pub foul: AtomicU64,
}

/// A connection that is up. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Link {
    pub slot: Slot,
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub struct Shared {
    requests: mpsc::Sender<Vec<u8>>,
    /// Stored lengths of chunks that were asked for.
    asked: Mutex<HashMap<Digest, u64>>,
    opens: Mutex<HashMap<u32, mpsc::Sender<Item>>>,
    keys: Mutex<HashMap<Digest, oneshot::Sender<Result<Bytes, String>>>>,
    /// Questions under way: of each caller one.
    questions: Mutex<HashMap<u32, oneshot::Sender<Result<Bytes, String>>>>,
    warming: AtomicBool,
    warm: watch::Sender<bool>,
    began: Instant,
    /// Since it began, milliseconds: when bytes came last.
    heard: AtomicU64,
    pushed: AtomicUsize,
    last_open: AtomicU32,
    last_question: AtomicU32,
}

/// What every link of a process has.
#[derive(Clone)]
pub struct Dialer {
    pub connector: TlsConnector,
    /// Where this process serves others.
    pub serving: Option<SocketAddr>,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Dialer(serving {:?})", self.serving)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each is whole at every step, so a panic elsewhere leaves nothing to distrust.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connects, and reports until the connection ends; the last report is `Down`.
pub async fn run(slot: Slot, address: SocketAddr, dialer: Dialer, counters: Arc<Counters>, report: Reports) {
    let fault = match connect(address, &dialer).await {
        Ok(tls) => talk(slot, address, tls, &dialer, counters, &report).await,
        Err(fault) => fault,
    };
    // Without a driver there is nobody to tell.
    let _ = report.send(Report::Down(fault)).await;
}

async fn connect(address: SocketAddr, dialer: &Dialer) -> Result<TlsStream<TcpStream>, Fault> {
    let late = |_| Fault::Unreachable(format!("no answer within {} s", CONNECT_MAX.as_secs()));
    let tcp = tokio::time::timeout(CONNECT_MAX, TcpStream::connect(address)).await.map_err(late)?;
    let tcp = tcp.map_err(|e| Fault::Unreachable(e.to_string()))?;
    socket::tune(&tcp).map_err(|e| Fault::Unreachable(e.to_string()))?;
    let shake = dialer.connector.connect(tls::server_name(), tcp);
    match tokio::time::timeout(CONNECT_MAX, shake).await {
        Ok(Ok(tls)) => Ok(tls),
        Ok(Err(error)) => Err(Fault::Handshake(tls::reason(&error))),
        Err(_) => Err(Fault::Handshake(format!("not done within {} s", CONNECT_MAX.as_secs()))),
    }
}

async fn talk(
    slot: Slot,
    address: SocketAddr,
    tls: TlsStream<TcpStream>,
    dialer: &Dialer,
    counters: Arc<Counters>,
    report: &Reports,
) -> Fault {
    let (read, write) = tokio::io::split(tls);
    let (requests, queue) = mpsc::channel(REQUESTS_MAX);
    let shared = Arc::new(Shared {
        requests,
        asked: Mutex::default(),
        opens: Mutex::default(),
        keys: Mutex::default(),
        questions: Mutex::default(),
        warming: AtomicBool::new(false),
        warm: watch::Sender::new(false),
        began: Instant::now(),
        heard: AtomicU64::new(0),
        pushed: AtomicUsize::new(0),
        last_open: AtomicU32::new(0),
        last_question: AtomicU32::new(0),
    });
    let link = Link { slot, address, shared: Arc::clone(&shared) };
    if let Some(at) = dialer.serving {
        link.send(&Request::Serving(at));
    }
    if !report.send(Report::Up(link)).await {
        return Fault::Lost("nobody wants it any more".to_owned());
    }
    let reader = Reader::new(Arc::clone(&shared), counters, report);
    let fault = tokio::select! {
        fault = reader.read(read) => fault,
        fault = write_all(write, queue) => fault,
    };
    // Whoever waits on this connection learns that it is gone.
    lock(&shared.opens).clear();
    lock(&shared.keys).clear();
    lock(&shared.questions).clear();
    // Warm or not, nobody need wait.
    shared.warm.send_replace(true);
    fault
}

async fn write_all(mut write: WriteHalf<TlsStream<TcpStream>>, mut queue: mpsc::Receiver<Vec<u8>>) -> Fault {
    let mut token = 0;
    loop {
        let mut bytes = match tokio::time::timeout(PING_EVERY, queue.recv()).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Fault::Lost("it is not wanted any more".to_owned()),
            Err(_) => {
                token += 1;
                Request::Ping { token }.encode()
            }
        };
        // What was asked together goes in one record.
        while bytes.len() < frame::FRAME_MAX
            && let Ok(more) = queue.try_recv()
        {
            bytes.extend_from_slice(&more);
        }
        let sent = async {
            write.write_all(&bytes).await?;
            write.flush().await
        };
        match tokio::time::timeout(STALL_MAX, sent).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return tls::fault(&error),
            Err(_) => return Fault::Silent(STALL_MAX.as_millis() as u64),
        }
    }
}

impl Link {
    /// Whether both are the same connection.
    pub fn is(&self, other: &Link) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Queues a request; false if the connection does not take more.
    fn send(&self, request: &Request) -> bool {
        self.shared.requests.try_send(request.encode()).is_ok()
    }

    /// Asks for a chunk of `stored` bytes; false if the connection does not take more.
    pub fn ask(&self, digest: Digest, stored: u64, class: Class, how: How) -> bool {
        lock(&self.shared.asked).insert(digest, stored);
        self.send(&Request::Get { digest, class, how })
    }

    /// Says that a chunk is not wanted any more.
    pub fn cancel(&self, digest: Digest) {
        if lock(&self.shared.asked).remove(&digest).is_some() {
            // If it is not taken, the chunk comes and is dropped.
            let _ = self.send(&Request::Cancel { digest });
        }
    }

    /// Opens an image; what comes for it comes in order, until the open is dropped or the link is gone.
    pub fn open(&self, image: &ImageRef, have: Option<Digest>, push: bool) -> Option<Open> {
        let request = self.shared.last_open.fetch_add(1, Ordering::Relaxed);
        let (send, items) = mpsc::channel(ITEMS_MAX);
        {
            let mut opens = lock(&self.shared.opens);
            if opens.len() >= OPENS_MAX {
                return None;
            }
            opens.insert(request, send);
        }
        let open = Open { link: self.clone(), request, items };
        self.send(&Request::Open { request, image: image.clone(), have, push }).then_some(open)
    }

    /// Asks for an owner's key: 32 bytes, or why it is not given.
    pub async fn key(&self, id: Digest) -> Result<Bytes, Fault> {
        let (send, key) = oneshot::channel();
        lock(&self.shared.keys).insert(id, send);
        if !self.send(&Request::Key { id }) {
            return Err(Fault::Lost("it takes no more requests".to_owned()));
        }
        match tokio::time::timeout(CONNECT_MAX, key).await {
            Ok(Ok(Ok(bytes))) => Ok(bytes),
            Ok(Ok(Err(text))) => Err(Fault::Refused(text)),
            Ok(Err(_)) => Err(Fault::Lost("while a key was asked for".to_owned())),
            Err(_) => Err(Fault::Silent(CONNECT_MAX.as_millis() as u64)),
        }
    }

    /// Asks the machine that serves; its answer, or why it gives none.
    pub async fn question(&self, question: Vec<u8>, within: Duration) -> Result<Bytes, Fault> {
        let request = self.shared.last_question.fetch_add(1, Ordering::Relaxed);
        let (send, reply) = oneshot::channel();
        lock(&self.shared.questions).insert(request, send);
        let _asks = Asks { link: self, request };
        if !self.send(&Request::Ask { request, question }) {
            return Err(Fault::Lost("it takes no more requests".to_owned()));
        }
        match tokio::time::timeout(within, reply).await {
            Ok(Ok(Ok(bytes))) => Ok(bytes),
            Ok(Ok(Err(text))) => Err(Fault::Refused(text)),
            Ok(Err(_)) => Err(Fault::Lost("while it was asked".to_owned())),
            Err(_) => Err(Fault::Silent(within.as_millis() as u64)),
        }
    }

    /// Has the source send bytes of nothing, once.
    pub fn begin_to_warm(&self) {
        if !self.shared.warming.swap(true, Ordering::Relaxed) {
            // If it is not taken the connection is about to end.
            let _ = self.send(&Request::Warm { bytes: WARM });
        }
    }

    /// Begins if need be, and waits until they have come or the link is gone.
    pub async fn warm(&self) {
        self.begin_to_warm();
        let mut warm = self.shared.warm.subscribe();
        let _ = tokio::time::timeout(CONNECT_MAX, warm.wait_for(|warm| *warm)).await;
    }

    /// How long nothing at all has come.
    pub fn quiet_for(&self) -> Duration {
        let heard = Duration::from_millis(self.shared.heard.load(Ordering::Relaxed));
        self.shared.began.elapsed().saturating_sub(heard)
    }
}

/// A question under way, however its asker ends.
struct Asks<'a> {
    link: &'a Link,
    request: u32,
}

impl Drop for Asks<'_> {
    fn drop(&mut self) {
        lock(&self.link.shared.questions).remove(&self.request);
    }
}

/// An image that is being opened on a link.
#[derive(Debug)]
pub struct Open {
    pub link: Link,
    request: u32,
    pub items: mpsc::Receiver<Item>,
}

impl Drop for Open {
    fn drop(&mut self) {
        lock(&self.link.shared.opens).remove(&self.request);
    }
}
