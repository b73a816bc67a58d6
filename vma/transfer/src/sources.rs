//! Where chunks come from: the local store first, then whoever has them.
//!
//! ```text
//! get ─▶ local store? ─yes─▶ verified plain bytes
//!            └no─▶ driver ─▶ plan: whom to ask ─▶ links ─▶ verified, handed on, kept in the local store
//! open ─▶ a link that is up ─▶ signed manifest, verified ─▶ Opened + what is pushed behind it
//! fill ─▶ many gets in the background, in an order of its own
//! ```
//!
//! All that is fetched is in the local store, so whatever is cut off goes on from there: there is no list of what
//! has been fetched that could be wrong.

mod driver;
mod fill;
mod open;

use crate::frame::QUESTION_MAX;
use crate::identity::Identity;
use crate::link::Dialer;
use crate::{Class, Error, Fault, ImageRef, Result, tls};
use driver::{Local, Message};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use vmatrix_model::manifest::{Manifest, SignedManifest};
use vmatrix_model::{Digest, KeyId};
use vmatrix_vma_image::Store;
use vmatrix_vma_image::chunks::{Need, open as open_chunk};
use vmatrix_vma_image::seal::OwnerKey;

pub use fill::Fill;

/// Chunks wanted at once, of all callers.
const WANTED_MAX: usize = 8192;
/// Chunks said to be kept that a server has not heard yet; if it misses some it looks into the store.
const KEPT_MAX: usize = 4096;
/// How a process reaches its sources; part of its configuration file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourcesConfig {
    /// Folder with `ca.pem`, `cert.pem` and `key.pem`.
    pub identity: PathBuf,
    /// Whom to ask, the best first.
    pub addresses: Vec<SocketAddr>,
    /// Where this machine serves others what it has, if it does.
    #[serde(default)]
    pub serving: Option<SocketAddr>,
    #[serde(default)]
    pub limits: Limits,
}

/// Bounds of what is asked.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Cap on background bytes, Mbit/s; none: as fast as sources send.
    pub background_mbit: Option<u64>,
}

/// What [`Sources::open`] asks for.
#[derive(Debug, Clone)]
pub struct Ask {
    pub image: ImageRef,
    /// A snapshot that is here whole: what it names is not pushed.
    pub have: Option<Digest>,
    /// Send what is needed before the guest runs right behind the manifest, and the owner's key if we may have it.
    pub push: bool,
    /// The owner's key, if it is known already.
    pub key: Option<OwnerKey>,
}

/// An opened image.
#[derive(Debug)]
pub struct Opened {
    pub signed: SignedManifest,
    /// Verified.
    pub manifest: Manifest,
    /// Of the manifest's text.
    pub digest: Digest,
    /// Of a sealed image: ours, or what the source gave. `None` where it gave none; see [`Sources::key`].
    pub key: Option<OwnerKey>,
    /// What comes behind the manifest.
    pub pushed: Pushed,
}

/// A verified chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrived {
    pub need: Need,
    pub plain: Vec<u8>,
}

/// Chunks that are pushed, as they arrive: first table, device state, working set in order of first touch, rest
/// table.
#[derive(Debug)]
pub struct Pushed {
    arrived: mpsc::Receiver<Arrived>,
}

impl Pushed {
    /// The next chunk, verified; `None` when the push is over: all came, or the source was lost. Whoever needs
    /// more then asks for it with [`Sources::get`], which finds in the local store what came and was not taken.
    pub async fn next(&mut self) -> Option<Arrived> {
        self.arrived.recv().await
    }
}

/// One source, as it is seen now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceStatus {
    pub address: SocketAddr,
    pub up: bool,
    /// Bytes of frames received from it, before TLS.
    pub received_bytes: u64,
    /// Chunks received from it whole.
    pub chunks: u64,
    /// Times it broke the protocol or sent wrong bytes.
    pub foul: u64,
    /// Why it failed last, if it has given nothing since.
    pub fault: Option<String>,
}

/// Everybody who may have chunks. Cheap to clone; connections end when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Sources {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    local: Local,
    messages: mpsc::UnboundedSender<Message>,
    wanted: AtomicUsize,
    tickets: AtomicU64,
    driver: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Sources {
    /// Sources at these addresses, the best first, with the local store that all that is fetched is put into.
    /// Must be called on a runtime. Nothing is connected yet.
    ///
    /// # Errors
    /// [`Error::Identity`]: certificate, key and authority do not fit together.
    pub fn new(
        identity: &Identity,
        local: Store,
        addresses: Vec<SocketAddr>,
        serving: Option<SocketAddr>,
        limits: &Limits,
    ) -> Result<Sources> {
        let connector = tls::connector(identity)
            .map_err(|problem| Error::Identity { path: PathBuf::from(identity.name().to_string()), problem })?;
        // Two messages a want, of which there are WANTED_MAX, and one for each other call under way.
        let (messages, queue) = mpsc::unbounded_channel();
        let local = Local { store: local, kept: broadcast::Sender::new(KEPT_MAX) };
        let dialer = Dialer { connector, serving };
        let driver = tokio::spawn(driver::run(addresses, limits.background_mbit, dialer, local.clone(), queue));
        Ok(Sources {
            inner: Arc::new(Inner {
                local,
                messages,
                wanted: AtomicUsize::new(0),
                tickets: AtomicU64::new(0),
                driver: driver.abort_handle(),
            }),
        })
    }

    /// Those of a configuration file.
    ///
    /// # Errors
    /// The identity cannot be read, or its files do not fit together.
    pub fn from_config(config: &SourcesConfig, local: Store) -> Result<Sources> {
        let identity = Identity::read(&config.identity)?;
        Sources::new(&identity, local, config.addresses.clone(), config.serving, &config.limits)
    }

    /// Connects to all, so that what is asked first waits for no handshake. Says how many are up.
    pub async fn connect(&self) -> usize {
        self.links(true).await.len()
    }

    /// Connects to all and has each connection's window grow, so that what is asked later does not wait for
    /// handshakes and slow start. Says how many are up. From then on connections that end are made again, and
    /// warmed, without being asked for.
    pub async fn warm(&self) -> usize {
        // A driver that is gone has no links either.
        let _ = self.inner.messages.send(Message::KeepUp);
        let links = self.links(true).await;
        for link in &links {
            link.warm().await;
        }
        links.len()
    }

    /// Opens an image that one of `signers` (public keys, 64 hex digits each) signed: one round trip on a warm
    /// connection. Sources that do not have it, or send one that is not to be believed, are passed over.
    ///
    /// # Errors
    /// [`Error::Nowhere`]: what each source said.
    pub async fn open(&self, ask: &Ask, signers: &[String]) -> Result<Opened> {
        let mut tried = Vec::new();
        for link in self.links(false).await {
            let Some(from) = link.open(&ask.image, ask.have, ask.push) else {
                let fault = Fault::Refused("too many images are being opened on its connection".to_owned());
                tried.push(Error::Source { address: link.address, fault });
                continue;
            };
            match open::follow(from, ask, signers, &self.inner.local, &self.inner.messages).await {
                Ok(opened) => return Ok(opened),
                Err(fault) => self.tried(&mut tried, link, fault),
            }
        }
        self.add_faults(&mut tried).await;
        open::nowhere(&ask.image, tried)
    }

    /// Gets one chunk's plain bytes, verified; `key` opens a sealed one. It is in the local store soon after.
    /// Whoever does not wait any more drops the future, and the chunk is not asked for any more.
    ///
    /// # Errors
    /// [`Error::Nowhere`]: what each source said, after 30 s for what is urgent, 10 min in the background, or at
    /// once if none has it. [`Error::TooMany`]: 8192 are wanted already.
    pub async fn get(&self, need: &Need, class: Class, key: Option<&OwnerKey>) -> Result<Vec<u8>> {
        if need.sealed && key.is_none() {
            let problem = "it is sealed, and its owner's key is not here".to_owned();
            return Err(vmatrix_vma_image::Error::BadChunk { digest: need.digest, problem }.into());
        }
        let key = key.filter(|_| need.sealed).cloned();
        let replace = match self.local(*need, key.clone()).await? {
            Found::Here(plain) => return Ok(plain),
            Found::Missing => false,
            Found::Wrong => true,
        };
        let _counted = Counted::take(&self.inner, need)?;
        let ticket = self.inner.tickets.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let message = Message::Get { need: *need, class, key, replace, ticket, reply };
        self.inner.messages.send(message).map_err(|_| Error::Closed)?;
        let mut waits = Waits { messages: &self.inner.messages, digest: need.digest, ticket, answered: false };
        let answer = answer.await;
        waits.answered = true;
        answer.map_err(|_| Error::Closed)?
    }

    /// Gets many chunks in the background, a bounded number at a time, in an order of its own: receivers that
    /// ask in different orders have something for each other.
    pub fn fill(&self, needs: Vec<Need>, key: Option<OwnerKey>) -> Fill {
        fill::start(self.clone(), needs, key)
    }

    /// Has the background rest, or go on; what is under way still comes.
    pub fn pause_background(&self, paused: bool) {
        // A driver that is gone rests anyway.
        let _ = self.inner.messages.send(Message::Pause { paused });
    }

    /// Asks the machine behind the best source that is up, and reads its answer: JSON there, at most 16 KB, and JSON
    /// back, at most 64 KiB. An answer is due `within` that time. Sources of one address ask that machine alone.
    ///
    /// # Errors
    /// [`Error::Source`] with [`Fault::Refused`]: the machine said no, and why. With another fault it may have been
    /// heard or not: ask again. [`Error::Nowhere`]: no source is up.
    pub async fn ask<Q: Serialize, A: DeserializeOwned>(&self, question: &Q, within: Duration) -> Result<A> {
        match self.links(false).await.into_iter().next() {
            Some(link) => ask(&link, question, within).await,
            None => Err(self.no_answer(Vec::new()).await),
        }
    }

    /// As [`Sources::ask`], but asks whoever is up, the best first, until one answers: not every source knows of such
    /// questions.
    ///
    /// # Errors
    /// [`Error::Nowhere`]: what each source said.
    pub async fn ask_each<Q: Serialize, A: DeserializeOwned>(&self, question: &Q, within: Duration) -> Result<A> {
        let mut tried = Vec::new();
        for link in self.links(true).await {
            match ask(&link, question, within).await {
                Ok(answer) => return Ok(answer),
                Err(error) => tried.push(error),
            }
        }
        Err(self.no_answer(tried).await)
    }

    async fn no_answer(&self, mut tried: Vec<Error>) -> Error {
        self.add_faults(&mut tried).await;
        let tried: Vec<String> = tried.iter().map(ToString::to_string).collect();
        Error::Nowhere { what: "answer".to_owned(), tried: tried.join("; ") }
    }

    /// Gets an owner's key; only a machine is given one.
    ///
    /// # Errors
    /// [`Error::Nowhere`]: what each source said.
    pub async fn key(&self, id: KeyId) -> Result<OwnerKey> {
        let mut tried = Vec::new();
        for link in self.links(false).await {
            match link.key(id.0).await.and_then(|bytes| open::owner_key(id, &bytes)) {
                Ok(key) => return Ok(key),
                Err(fault) => self.tried(&mut tried, link, fault),
            }
        }
        self.add_faults(&mut tried).await;
        let tried: Vec<String> = tried.iter().map(ToString::to_string).collect();
        Err(Error::Nowhere { what: format!("owner's key {}", id.0.short()), tried: tried.join("; ") })
    }

    /// The sources as they are seen now: those of the list first, then those that others sent us to.
    pub async fn status(&self) -> Vec<SourceStatus> {
        let (reply, answer) = oneshot::channel();
        match self.inner.messages.send(Message::Status { reply }) {
            Ok(()) => answer.await.unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }

    /// Where all that is fetched is put.
    pub fn local_store(&self) -> &Store {
        &self.inner.local.store
    }

    /// Hears the name of each chunk that is put into the local store from now on.
    pub(crate) fn kept(&self) -> broadcast::Receiver<Digest> {
        self.inner.local.kept.subscribe()
    }

    /// Which of these chunks are on their way to here.
    pub(crate) async fn wanted(&self, of: Vec<Digest>) -> Vec<Digest> {
        let (reply, answer) = oneshot::channel();
        match self.inner.messages.send(Message::Wanted { of, reply }) {
            Ok(()) => answer.await.unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }

    /// The links that are up, the best first.
    async fn links(&self, all: bool) -> Vec<crate::link::Link> {
        let (reply, answer) = oneshot::channel();
        match self.inner.messages.send(Message::Links { all, reply }) {
            Ok(()) => answer.await.unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }

    fn tried(&self, tried: &mut Vec<Error>, link: crate::link::Link, fault: Fault) {
        tried.push(Error::Source { address: link.address, fault: fault.clone() });
        // Not having an image is no fault.
        if !matches!(fault, Fault::Refused(_)) {
            let _ = self.inner.messages.send(Message::Blame { link, fault });
        }
    }

    /// Adds why those that are not connected are not.
    async fn add_faults(&self, tried: &mut Vec<Error>) {
        for source in self.status().await {
            let known = tried.iter().any(|e| matches!(e, Error::Source { address, .. } if *address == source.address));
            if let (Some(fault), false) = (source.fault, known) {
                tried.push(Error::Source { address: source.address, fault: Fault::Unreachable(fault) });
            }
        }
    }

    async fn local(&self, need: Need, key: Option<OwnerKey>) -> Result<Found> {
        let local = self.inner.local.store.clone();
        let look = tokio::task::spawn_blocking(move || match local.chunk(&need.digest) {
            Ok(stored) => match open_chunk(&stored, &need, key.as_ref()) {
                Ok(plain) => Found::Here(plain),
                Err(error) => {
                    tracing::warn!(chunk = %need.digest.short(), %error, "a chunk of the local store is fetched anew");
                    Found::Wrong
                }
            },
            Err(vmatrix_vma_image::Error::NoChunk { .. }) => Found::Missing,
            Err(error) => {
                tracing::warn!(chunk = %need.digest.short(), %error, "the local store cannot be read");
                Found::Missing
            }
        });
        look.await.map_err(|_| Error::Closed)
    }
}

async fn ask<Q: Serialize, A: DeserializeOwned>(link: &crate::link::Link, question: &Q, within: Duration) -> Result<A> {
    let at = |fault| Error::Source { address: link.address, fault };
    let bytes = serde_json::to_vec(question).map_err(|e| at(Fault::Protocol(e.to_string())))?;
    if bytes.len() > QUESTION_MAX {
        let problem = format!("a question has {QUESTION_MAX} bytes at most, not {}", bytes.len());
        return Err(at(Fault::Refused(problem)));
    }
    let reply = link.question(bytes, within).await.map_err(at)?;
    serde_json::from_slice(&reply).map_err(|e| at(Fault::WrongBytes(format!("its answer cannot be read: {e}"))))
}

/// What the local store has under a chunk's name.
enum Found {
    Here(Vec<u8>),
    Missing,
    Wrong,
}

/// One of the wants that are counted.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn take(inner: &'a Inner, need: &Need) -> Result<Counted<'a>> {
        let counted = Counted(&inner.wanted);
        let waiting = inner.wanted.fetch_add(1, Ordering::Relaxed);
        if waiting >= WANTED_MAX { Err(Error::TooMany { waiting, digest: need.digest }) } else { Ok(counted) }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells the driver when nobody waits any more.
struct Waits<'a> {
    messages: &'a mpsc::UnboundedSender<Message>,
    digest: Digest,
    ticket: u64,
    answered: bool,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if !self.answered {
            let _ = self.messages.send(Message::Leave { digest: self.digest, ticket: self.ticket });
        }
    }
}
