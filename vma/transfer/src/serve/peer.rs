//! One connection of the server.
//!
//! ```text
//! reader ─request─▶ outbox ◀─bytes─ store
//!                     │ wake
//! writer ◀────────────┘
//! ```

use super::prepare::{self, Prepared};
use super::{PREPARED_MAX, Shared, lock};
use crate::Class;
use crate::frame::{self, Answer, FRAME_MAX, How, ImageRef, REPLY_MAX, Refers, Request, What};
use crate::holders::Turn;
use crate::identity::{Name, Role};
use crate::outbox::{Load, Outbox};
use crate::socket::Unsent;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_rustls::server::TlsStream;
use vmatrix_model::{Digest, KeyId};
use vmatrix_vma_image::seal::OwnerKey;

/// A peer that says nothing for so long is gone; a client that is there pings more often.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// A frame that the peer does not take within this time ends the connection.
const STALL_MAX: Duration = Duration::from_secs(20);
/// Items of one connection: a push and what is asked besides.
const ITEMS_MAX: usize = prepare::PUSH_MAX + 2048;
/// Opens of one connection that are prepared at once, and keys that are looked for.
const OPENS_MAX: usize = 8;
/// Questions of one connection that are answered at once.
const QUESTIONS_MAX: usize = 4;
const TOO_MANY: &str = "too many images and keys are asked for on this connection at once; wait for one";
/// Bytes of nothing sent to warm a connection.
const WARM_MAX: u32 = 4 << 20;

pub(super) struct Peer {
    shared: Arc<Shared>,
    name: Name,
    outbox: Mutex<Outbox>,
    wake: Notify,
    /// Where it serves others.
    serving: Mutex<Option<SocketAddr>>,
    opens: Arc<Semaphore>,
    questions: Arc<Semaphore>,
}

/// Serves a peer until its connection ends, and says why it did.
pub(super) async fn serve(shared: Arc<Shared>, tls: TlsStream<TcpStream>, unsent: Unsent, name: Name) -> String {
    let (read, write) = tokio::io::split(tls);
    let peer = Arc::new(Peer {
        shared,
        name,
        outbox: Mutex::default(),
        wake: Notify::new(),
        serving: Mutex::default(),
        opens: Arc::new(Semaphore::new(OPENS_MAX)),
        questions: Arc::new(Semaphore::new(QUESTIONS_MAX)),
    });
    let _leaves = Leaves(Arc::clone(&peer));
    tokio::select! {
        why = Arc::clone(&peer).read(read) => why,
        why = Arc::clone(&peer).write(write, unsent) => why,
    }
}

/// Tells the holders, however the connection ends.
struct Leaves(Arc<Peer>);

impl Drop for Leaves {
    fn drop(&mut self) {
        if let Some(at) = *lock(&self.0.serving) {
            let mut holders = self.0.shared.holders();
            lock(&self.0.outbox).unsent().for_each(|digest| holders.unsent(digest, at));
            holders.left(at);
        }
    }
}

impl Peer {
    async fn read(self: Arc<Peer>, read: ReadHalf<TlsStream<TcpStream>>) -> String {
        let mut read = BufReader::with_capacity(4096, read);
        let mut bytes = Vec::new();
        loop {
            match tokio::time::timeout(IDLE_MAX, frame::read(&mut read, &mut bytes)).await {
                Err(_) => return format!("silent for {} s", IDLE_MAX.as_secs()),
                Ok(Ok(false)) => return "it closed the connection".to_owned(),
                Ok(Err(error)) => return error.to_string(),
                Ok(Ok(true)) => {}
            }
            let done = match Request::decode(&bytes) {
                Ok(request) => self.request(request),
                Err(malformed) => Err(malformed.to_string()),
            };
            if let Err(why) = done {
                return why;
            }
        }
    }

    /// Takes a request; an error ends the connection.
    fn request(self: &Arc<Peer>, request: Request) -> Result<(), String> {
        match request {
            Request::Serving(at) => self.serves_at(at),
            Request::Open { request, image, have, push } => return self.open(request, image, have, push),
            Request::Get { digest, class, how } => return self.get(digest, class, how),
            Request::Cancel { digest } => {
                self.shared.patience.leave(self, &digest);
                if lock(&self.outbox).cancel(&digest)
                    && let Some(at) = *lock(&self.serving)
                {
                    self.shared.holders().unsent(&digest, at);
                }
            }
            Request::Key { id } => return self.key(id),
            Request::Warm { bytes } => lock(&self.outbox).pad(bytes, WARM_MAX),
            Request::Ping { token } => return self.answer(&Answer::Pong { token }),
            Request::Ask { request, question } => return self.asked(request, question),
        }
        self.wake.notify_one();
        Ok(())
    }

    fn answer(&self, answer: &Answer<'_>) -> Result<(), String> {
        lock(&self.outbox).answer(answer).map_err(|_| "it asks without reading the answers".to_owned())?;
        self.wake.notify_one();
        Ok(())
    }

    fn serves_at(&self, at: SocketAddr) {
        let before = lock(&self.serving).replace(at);
        let mut holders = self.shared.holders();
        if let Some(before) = before {
            holders.left(before);
        }
        holders.came(at);
    }

    fn get(self: &Arc<Peer>, digest: Digest, class: Class, how: How) -> Result<(), String> {
        if how == How::Patient && class == Class::Background {
            let waits = self.shared.patience.wait(self, digest, class);
            return if waits { Ok(()) } else { self.answer(&Answer::Missing { digest }) };
        }
        let asker = *lock(&self.serving);
        let known = lock(&self.outbox).has(&digest);
        if !known && let Turn::Elsewhere(addresses) = self.shared.holders().ask(digest, class, how, asker) {
            self.shared.elsewhere.fetch_add(1, Ordering::Relaxed);
            return self.answer(&Answer::Elsewhere { digest, addresses });
        }
        self.send(digest, class)
    }

    fn send(&self, digest: Digest, class: Class) -> Result<(), String> {
        let mut outbox = lock(&self.outbox);
        if outbox.len() >= ITEMS_MAX {
            return Err(format!("it wants more than {ITEMS_MAX} chunks at once"));
        }
        outbox.add(What::Chunk { digest }, class, Load::Chunk(digest));
        drop(outbox);
        self.wake.notify_one();
        Ok(())
    }

    fn key(self: &Arc<Peer>, id: Digest) -> Result<(), String> {
        let refers = Refers::Key { id };
        let Some(turn) = self.turn() else {
            return self.answer(&Answer::Refused { refers, text: TOO_MANY.to_owned() });
        };
        let peer = Arc::clone(self);
        tokio::spawn(async move {
            let _turn = turn;
            if let Err(text) = peer.owner_key(KeyId(id)).await {
                tracing::warn!(name = %peer.name, key = %id.short(), reason = text, "a key was not given");
                // One that does not read is noticed by its next request.
                let _ = peer.answer(&Answer::Refused { refers, text });
            }
        });
        Ok(())
    }

    /// Has this machine answer. A connection that ends meanwhile changes nothing: the answer is whole, and the asker
    /// asks again.
    fn asked(self: &Arc<Peer>, request: u32, question: Vec<u8>) -> Result<(), String> {
        let refers = Refers::Ask { request };
        let refuse = |text: &str| self.answer(&Answer::Refused { refers, text: text.to_owned() });
        if self.name.role != Role::Machine {
            return refuse("only machines are answered");
        }
        let Some(answerer) = self.shared.answerer.get().cloned() else {
            return refuse("it answers no questions");
        };
        let Ok(turn) = Arc::clone(&self.questions).try_acquire_owned() else {
            return refuse("too many questions are asked on this connection at once; wait for one");
        };
        let peer = Arc::clone(self);
        tokio::spawn(async move {
            let _turn = turn;
            match answerer.answer(peer.name.clone(), question).await {
                Ok(reply) if reply.len() <= REPLY_MAX => {
                    let bytes = Load::Bytes(Arc::new(reply));
                    lock(&peer.outbox).add(What::Reply { request }, Class::Miss, bytes);
                    peer.wake.notify_one();
                }
                Ok(reply) => {
                    let text = format!("its answer has {} bytes, more than {REPLY_MAX}", reply.len());
                    // One that does not read is noticed by its next request.
                    let _ = peer.answer(&Answer::Refused { refers, text });
                }
                Err(text) => drop(peer.answer(&Answer::Refused { refers, text })),
            }
        });
        Ok(())
    }

    /// One of the few opens and keys that are looked for at once.
    fn turn(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.opens).try_acquire_owned().ok()
    }

    /// Sends an owner's key, or says why not.
    async fn owner_key(&self, id: KeyId) -> Result<(), String> {
        if self.name.role != Role::Machine {
            return Err(format!("a {} is given no keys, only a machine is", self.name.role));
        }
        let path = self.shared.keys.as_ref().map(|keys| keys.join(id.to_string()));
        let path = path.ok_or_else(|| "no keys are kept here".to_owned())?;
        let key = tokio::task::spawn_blocking(move || OwnerKey::read(path)).await;
        let key = key.map_err(|_| "the key could not be read".to_owned())?;
        let key = key.map_err(|error| {
            tracing::warn!(%error, "an owner's key cannot be read");
            "that key is not kept here".to_owned()
        })?;
        if key.id() != id {
            return Err("the file of that name holds another key".to_owned());
        }
        let bytes = Load::Bytes(Arc::new(key.bytes().to_vec()));
        lock(&self.outbox).add(What::Key { id: id.0 }, Class::Critical, bytes);
        self.wake.notify_one();
        Ok(())
    }

    fn open(self: &Arc<Peer>, request: u32, image: ImageRef, have: Option<Digest>, push: bool) -> Result<(), String> {
        let refers = Refers::Open { request };
        let Some(turn) = self.turn() else {
            return self.answer(&Answer::Refused { refers, text: TOO_MANY.to_owned() });
        };
        let peer = Arc::clone(self);
        tokio::spawn(async move {
            let _turn = turn;
            let prepared = peer.prepare(image, have).await;
            match prepared {
                Ok(prepared) => peer.push(request, &prepared, push).await,
                Err(text) => drop(peer.answer(&Answer::Refused { refers, text })),
            }
        });
        Ok(())
    }

    async fn prepare(self: &Arc<Peer>, image: ImageRef, have: Option<Digest>) -> Result<Arc<Prepared>, String> {
        let shared = Arc::clone(&self.shared);
        let found = tokio::task::spawn_blocking(move || {
            let Some((signed, digest)) = prepare::find(&shared.store, &image).map_err(|e| e.to_string())? else {
                return Err("there is no such image here".to_owned());
            };
            let key = (digest, have);
            if let Some((_, known)) = lock(&shared.prepared).iter().find(|(k, _)| *k == key) {
                return Ok(Arc::clone(known));
            }
            let new = prepare::prepare(&shared.store, &signed, have.as_ref()).map_err(|e| e.to_string())?;
            let new = Arc::new(new);
            let mut prepared = lock(&shared.prepared);
            prepared.push_back((key, Arc::clone(&new)));
            if prepared.len() > PREPARED_MAX {
                prepared.pop_front();
            }
            Ok(new)
        });
        found.await.unwrap_or_else(|_| Err("the image could not be read".to_owned()))
    }

    async fn push(&self, request: u32, prepared: &Prepared, push: bool) {
        {
            let mut outbox = lock(&self.outbox);
            let json = Load::Bytes(Arc::clone(&prepared.json));
            outbox.add(What::Manifest { request }, Class::Critical, json);
        }
        self.wake.notify_one();
        if push {
            // To whom the key is not given the chunks are of no use, but that is for it to find out.
            if let Some(id) = prepared.seal
                && let Err(why) = self.owner_key(id).await
            {
                tracing::debug!(name = %self.name, why, "no key was pushed");
            }
            let mut outbox = lock(&self.outbox);
            let room = ITEMS_MAX.saturating_sub(outbox.len());
            for digest in prepared.push.iter().take(room) {
                outbox.add(What::Chunk { digest: *digest }, Class::Critical, Load::Chunk(*digest));
            }
            outbox.add(What::Pushed { request }, Class::Critical, Load::Bytes(Arc::default()));
        }
        self.wake.notify_one();
    }

    async fn write(self: Arc<Peer>, mut write: WriteHalf<TlsStream<TcpStream>>, mut unsent: Unsent) -> String {
        loop {
            self.load();
            let class = lock(&self.outbox).next_class();
            let Some(class) = class else {
                self.wake.notified().await;
                continue;
            };
            if let Some(cap) = &self.shared.cap
                && let Err(wait) = cap.take(class, FRAME_MAX as u64)
            {
                let _waits = cap.waits(class);
                // What comes meanwhile may be more urgent.
                let _ = tokio::time::timeout(wait, self.wake.notified()).await;
                continue;
            }
            let frame = lock(&self.outbox).next_frame();
            let length = frame.as_ref().map_or(0, |f| f.bytes.len());
            if let Some(cap) = &self.shared.cap {
                cap.put_back((FRAME_MAX as u64).saturating_sub(length as u64));
            }
            let Some(frame) = frame else { continue };
            unsent.before(frame.class);
            let sent = async {
                write.write_all(&frame.bytes).await?;
                write.flush().await
            };
            match tokio::time::timeout(STALL_MAX, sent).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error.to_string(),
                Err(_) => return format!("it took no bytes for {} s", STALL_MAX.as_secs()),
            }
            self.shared.bytes.fetch_add(length as u64, Ordering::Relaxed);
            self.shared.chunks.fetch_add(u64::from(frame.ends.is_some()), Ordering::Relaxed);
        }
    }

    /// Has what comes next read from the store.
    fn load(self: &Arc<Peer>) {
        let loads = lock(&self.outbox).take_loads();
        for (item, load) in loads {
            match load {
                Load::Bytes(bytes) => drop(lock(&self.outbox).loaded(item, Some(bytes))),
                Load::Chunk(digest) => {
                    let peer = Arc::clone(self);
                    tokio::spawn(async move {
                        let bytes = peer.stored(digest).await;
                        let missing = bytes.is_none();
                        lock(&peer.outbox).loaded(item, bytes);
                        if missing && let Some(at) = *lock(&peer.serving) {
                            peer.shared.holders().unsent(&digest, at);
                        }
                        peer.wake.notify_one();
                    });
                }
            }
        }
    }

    async fn stored(&self, digest: Digest) -> Option<Arc<Vec<u8>>> {
        let _permit = self.shared.reads.acquire().await.ok()?;
        let store = self.shared.store.clone();
        let read = tokio::task::spawn_blocking(move || store.chunk(&digest)).await.ok()?;
        match read {
            Ok(bytes) => Some(Arc::new(bytes)),
            Err(vmatrix_vma_image::Error::NoChunk { .. }) => None,
            Err(error) => {
                tracing::warn!(chunk = %digest.short(), %error, "a chunk cannot be read");
                None
            }
        }
    }

    /// A chunk that was waited for is here.
    pub(super) fn is_here(&self, digest: Digest, class: Class) {
        // One that wants too much is noticed by its next request.
        let _ = self.send(digest, class);
    }

    /// A chunk that was waited for has not come.
    pub(super) fn is_missing(&self, digest: Digest) {
        let _ = self.answer(&Answer::Missing { digest });
    }
}
