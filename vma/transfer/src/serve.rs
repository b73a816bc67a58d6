//! The chunk server: whoever has chunks answers members of the fleet, the urgent ones first.
//!
//! ```text
//! accept ─▶ tune ─▶ TLS: who? ─▶ Peer ┬ reader: requests ─▶ outbox, holders, prepare
//!   │                                 └ writer: outbox.next_frame ─▶ cap ─▶ wire
//!   └ at most CONNECTIONS_MAX, and PER_PEER_MAX of one name
//! ```

mod answer;
mod patience;
mod peer;
mod prepare;

use crate::bucket::Cap;
use crate::error::{Error, Result};
use crate::holders::Holders;
use crate::identity::{Identity, Name};
use crate::socket::{self, Unsent};
use crate::{Sources, tls};
use patience::Patience;

pub use answer::Answerer;
use prepare::Prepared;
use serde::Deserialize;
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use vmatrix_model::Digest;
use vmatrix_vma_image::Store;

/// Connections served at once; one more waits to be accepted.
const CONNECTIONS_MAX: usize = 1024;
/// Connections of one name: an agent and a pager for each image it runs.
const PER_PEER_MAX: usize = 64;
/// A peer that has not proved who it is by then is dropped.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// How long a peer that was refused has to hear it, and how much of what it was saying is read meanwhile.
const PARTING_MAX: Duration = Duration::from_secs(1);
const PARTING_BYTES_MAX: u64 = 1 << 20;
/// Reads from the store at once, of all connections.
const READS_MAX: usize = 64;
/// Opened images whose push is remembered.
const PREPARED_MAX: usize = 16;
/// Copies of a chunk that are sent in the background before askers are sent to who has it.
const COPIES: usize = 1;
/// After a failed accept (no descriptors left) there is a pause, or the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a server serves.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Who it is.
    pub identity: Identity,
    /// What it has.
    pub store: Store,
    /// Folder of owners' keys, each in a file named by its id; none: no keys are given.
    pub keys: Option<PathBuf>,
    /// Cap on all it sends, Mbit/s.
    pub rate_mbit: Option<u64>,
}

/// What a server has sent since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of frames, before TLS.
    pub bytes: u64,
    /// Chunks sent whole.
    pub chunks: u64,
    /// Asks answered with the addresses of others.
    pub elsewhere: u64,
}

/// A chunk server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

/// What an image and what is there already make to be pushed.
type Push = ((Digest, Option<Digest>), Arc<Prepared>);

/// This process's own sources, and the names of what they put into the store.
#[derive(Debug)]
struct Follows {
    kept: broadcast::Receiver<Digest>,
    sources: Sources,
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    store: Store,
    keys: Option<PathBuf>,
    acceptor: Acceptor,
    cap: Option<Cap>,
    holders: Mutex<Holders>,
    prepared: Mutex<VecDeque<Push>>,
    patience: Patience,
    /// Who answers machines' questions, if anybody.
    answerer: OnceLock<Answerer>,
    /// Our own sources and what they keep, if they are followed.
    follows: Mutex<Option<Follows>>,
    reads: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    of_peer: Mutex<HashMap<Name, usize>>,
    bytes: AtomicU64,
    chunks: AtomicU64,
    elsewhere: AtomicU64,
}

/// The TLS library's type prints nothing of itself.
struct Acceptor(TlsAcceptor);

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Acceptor")
    }
}

impl Server {
    /// A server, not listening yet.
    ///
    /// # Errors
    /// [`Error::Identity`]: certificate, key and authority do not fit together.
    pub fn new(config: ServerConfig) -> Result<Server> {
        let acceptor = tls::acceptor(&config.identity)
            .map_err(|problem| Error::Identity { path: PathBuf::from(config.identity.name().to_string()), problem })?;
        Ok(Server {
            shared: Arc::new(Shared {
                store: config.store,
                keys: config.keys,
                acceptor: Acceptor(acceptor),
                cap: config.rate_mbit.map(Cap::new),
                holders: Mutex::new(Holders::new(COPIES)),
                prepared: Mutex::default(),
                patience: Patience::default(),
                answerer: OnceLock::new(),
                follows: Mutex::default(),
                reads: Arc::new(Semaphore::new(READS_MAX)),
                connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
                of_peer: Mutex::default(),
                bytes: AtomicU64::new(0),
                chunks: AtomicU64::new(0),
                elsewhere: AtomicU64::new(0),
            }),
        })
    }

    /// Has the server hear at once what this process's own `sources` put into its store, instead of looking for
    /// it: others who were sent here for a chunk that is on its way get it sooner, and wait as long as it is. To be
    /// called before `run`.
    pub fn follow(&self, sources: &Sources) {
        *lock(&self.shared.follows) = Some(Follows { kept: sources.kept(), sources: sources.clone() });
    }

    /// Has other machines' questions answered; the first who is named answers. To be called before `run`.
    pub fn answer_with(&self, answerer: Answerer) {
        let _ = self.shared.answerer.set(answerer);
    }

    /// What it has sent.
    pub fn sent(&self) -> Sent {
        let s = &self.shared;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Sent { bytes: read(&s.bytes), chunks: read(&s.chunks), elsewhere: read(&s.elsewhere) }
    }

    /// Serves until `shutdown` ends; connections are cut then.
    pub async fn run(&self, listener: TcpListener, shutdown: impl Future<Output = ()>) {
        if socket::cools() {
            tracing::warn!(
                "the kernel has no BBR and net.ipv4.tcp_slow_start_after_idle is 1 here: a connection is cold again \
                 after a second without traffic; load tcp_bbr, or set it to 0"
            );
        }
        let (ends, ended) = watch::channel(());
        let mut peers = JoinSet::new();
        let follows = lock(&self.shared.follows).take();
        let patience = tokio::spawn(patience::run(Arc::clone(&self.shared), follows));
        tokio::pin!(shutdown);
        loop {
            // The connection's permit first: one that cannot be served is not accepted.
            let Ok(permit) = Arc::clone(&self.shared.connections).acquire_owned().await else { break };
            let (tcp, from) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "a connection cannot be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                () = &mut shutdown => break,
            };
            while peers.try_join_next().is_some() {}
            let (shared, mut ended) = (Arc::clone(&self.shared), ended.clone());
            peers.spawn(async move {
                let _permit = permit;
                tokio::select! {
                    () = shared.meet(tcp, from) => {}
                    _ = ended.changed() => {}
                }
            });
        }
        drop(ends);
        patience.abort();
        peers.shutdown().await;
    }
}

impl Shared {
    /// Finds out who connected, and serves it.
    async fn meet(self: Arc<Shared>, tcp: TcpStream, from: SocketAddr) {
        let unsent = match socket::tune(&tcp).and_then(|()| Unsent::of(&tcp)) {
            Ok(unsent) => unsent,
            Err(error) => {
                tracing::debug!(%from, %error, "a connection ended before it was set up");
                return;
            }
        };
        let tls = match tokio::time::timeout(HANDSHAKE_MAX, self.acceptor.0.accept(tcp).into_fallible()).await {
            Ok(Ok(tls)) => tls,
            Ok(Err((error, tcp))) => {
                tracing::warn!(%from, reason = tls::reason(&error), "a peer was refused");
                let _ = tokio::time::timeout(PARTING_MAX, part(tcp)).await;
                return;
            }
            Err(_) => {
                tracing::warn!(%from, "a peer was dropped: no handshake within {} s", HANDSHAKE_MAX.as_secs());
                return;
            }
        };
        let name = match tls::peer(tls.get_ref().1.peer_certificates()) {
            Ok(name) => name,
            Err(reason) => {
                tracing::warn!(%from, reason, "a peer was refused");
                return;
            }
        };
        let Some(_place) = Place::take(&self, &name) else {
            tracing::warn!(%from, %name, "a peer was refused: it has {PER_PEER_MAX} connections already");
            return;
        };
        tracing::debug!(%from, %name, "a peer connected");
        let why = peer::serve(Arc::clone(&self), tls, unsent, name.clone()).await;
        tracing::debug!(%from, %name, why, "a peer left");
    }

    fn holders(&self) -> MutexGuard<'_, Holders> {
        lock(&self.holders)
    }
}

/// Ends a connection so that its last words, why it was refused, arrive: closing it with bytes unread would reset it,
/// and a peer that is reset hears nothing.
async fn part(mut tcp: TcpStream) -> std::io::Result<()> {
    tcp.shutdown().await?;
    tokio::io::copy(&mut tcp.take(PARTING_BYTES_MAX), &mut tokio::io::sink()).await?;
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each is whole at every step, so a panic elsewhere leaves nothing to distrust.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of a name's connections.
struct Place {
    shared: Arc<Shared>,
    name: Name,
}

impl Place {
    fn take(shared: &Arc<Shared>, name: &Name) -> Option<Place> {
        let mut of_peer = lock(&shared.of_peer);
        let count = of_peer.entry(name.clone()).or_default();
        if *count >= PER_PEER_MAX {
            return None;
        }
        *count += 1;
        Some(Place { shared: Arc::clone(shared), name: name.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut of_peer = lock(&self.shared.of_peer);
        if let Some(count) = of_peer.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                of_peer.remove(&self.name);
            }
        }
    }
}

/// Serves until `shutdown` ends.
///
/// # Errors
/// The identity's files do not fit together.
pub async fn serve(listener: TcpListener, config: ServerConfig, shutdown: impl Future<Output = ()>) -> Result<()> {
    Server::new(config)?.run(listener, shutdown).await;
    Ok(())
}

/// `store.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// Address and port of the server.
    pub listen: SocketAddr,
    /// A folder, or `s3://…` (see [`Store::at`]).
    pub store: String,
    /// Folder with `ca.pem`, `cert.pem` and `key.pem`.
    pub identity: PathBuf,
    /// Folder of owners' keys, each in a file named by its id.
    #[serde(default)]
    pub keys: Option<PathBuf>,
    /// Cap on all that is sent, Mbit/s.
    #[serde(default)]
    pub rate_mbit: Option<u64>,
    /// Set the network namespace's `tcp_slow_start_after_idle` to 0, so that warm connections stay warm.
    #[serde(default)]
    pub keep_windows: bool,
    /// Whether lists of the store's own images learn what machines say guests waited for. Where not, images stay as they
    /// were built.
    #[serde(default = "yes")]
    pub learn: bool,
}

fn yes() -> bool {
    true
}

impl StoreConfig {
    /// Reads the file; relative paths in it begin at its own folder.
    ///
    /// # Errors
    /// The file cannot be read or understood.
    pub fn read(path: &Path) -> Result<StoreConfig> {
        let text = std::fs::read_to_string(path).map_err(crate::error::io("read", path))?;
        let mut config: StoreConfig =
            toml::from_str(&text).map_err(|e| Error::Config { path: path.to_owned(), problem: e.to_string() })?;
        let folder = path.parent().unwrap_or(Path::new("."));
        config.identity = folder.join(&config.identity);
        config.keys = config.keys.map(|keys| folder.join(keys));
        if !config.store.contains("://") {
            config.store = folder.join(&config.store).to_string_lossy().into_owned();
        }
        Ok(config)
    }
}

/// The daemon: serves a store until it is told to end (SIGTERM, Ctrl-C).
///
/// # Errors
/// The configuration, the identity or the store cannot be read, or the address is taken.
pub async fn run(config: &Path) -> Result<()> {
    serve_config(StoreConfig::read(config)?, None::<fn(&Store) -> Answerer>).await
}

/// As [`run`], with somebody who answers machines' questions about the store.
///
/// # Errors
/// As [`run`].
pub async fn run_answering(config: &Path, answerer: impl FnOnce(&Store) -> Answerer) -> Result<()> {
    let config = StoreConfig::read(config)?;
    let answerer = Some(answerer).filter(|_| config.learn);
    serve_config(config, answerer).await
}

async fn serve_config(config: StoreConfig, answerer: Option<impl FnOnce(&Store) -> Answerer>) -> Result<()> {
    let identity = Identity::read(&config.identity)?;
    let address = config.store.clone();
    // A bucket's client has a runtime of its own, which must not be made on this one.
    let store = tokio::task::spawn_blocking(move || Store::at(&address)).await.map_err(|_| Error::Closed)??;
    if config.keep_windows
        && let Err(error) = socket::keep_windows()
    {
        tracing::warn!(%error, "tcp_slow_start_after_idle cannot be set: warm connections will cool");
    }
    let listener =
        TcpListener::bind(config.listen).await.map_err(|source| Error::Listen { address: config.listen, source })?;
    tracing::info!(listen = %config.listen, store = config.store, name = %identity.name(), "serving chunks");
    let answerer = answerer.map(|answerer| answerer(&store));
    let server = Server::new(ServerConfig { identity, store, keys: config.keys, rate_mbit: config.rate_mbit })?;
    if let Some(answerer) = answerer {
        server.answer_with(answerer);
    }
    server.run(listener, told_to_end()).await;
    Ok(())
}

async fn told_to_end() {
    let mut terminate = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(terminate) => terminate,
        Err(error) => {
            tracing::warn!(%error, "SIGTERM will end this without a word");
            return std::future::pending().await;
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_read_from_its_own_folder_and_unknown_words_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("store.toml");
        std::fs::write(&file, "listen = \"127.0.0.1:7400\"\nstore = \"images\"\nidentity = \"id\"\nkeys = \"keys\"\n")
            .unwrap();
        let config = StoreConfig::read(&file).unwrap();
        assert_eq!(config.store, dir.path().join("images").to_string_lossy());
        assert_eq!((config.identity, config.keys), (dir.path().join("id"), Some(dir.path().join("keys"))));
        assert_eq!((config.rate_mbit, config.keep_windows), (None, false));
        std::fs::write(&file, "listen = \"127.0.0.1:7400\"\nstore = \"s3://b/p\"\nidentity = \"id\"\n").unwrap();
        assert_eq!(StoreConfig::read(&file).unwrap().store, "s3://b/p");
        std::fs::write(&file, "listen = \"127.0.0.1:7400\"\nstor = \"x\"\n").unwrap();
        assert!(StoreConfig::read(&file).unwrap_err().to_string().contains("stor"));
    }

    #[tokio::test]
    async fn a_daemon_without_an_identity_says_which_file_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("store.toml");
        std::fs::write(&file, "listen = \"127.0.0.1:0\"\nstore = \"images\"\nidentity = \"id\"\n").unwrap();
        let error = run(&file).await.unwrap_err().to_string();
        assert!(error.contains("id/cert.pem"), "{error}");
    }
}
