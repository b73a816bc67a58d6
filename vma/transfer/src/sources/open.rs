//! Opening an image: the manifest first, believed only if it is signed; then what is pushed behind it, each chunk
//! known by the manifest or by a table that was verified.
//!
//! ```text
//! Manifest ─verify─▶ Opened ─┐      Key ─▶ opens what is sealed
//! first table ─▶ needs of the working set      Stored ─ needed? ─open─▶ Pushed, local store
//! ```

use super::driver::{Local, Message};
use super::{Arrived, Ask, Opened, Pushed};
use crate::error::{Error, Fault, Result};
use crate::frame::ImageRef;
use crate::link::{Item, Open};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use vmatrix_model::manifest::{Manifest, SignedManifest};
use vmatrix_model::{Digest, KeyId};
use vmatrix_vma_image::chunks::{Need, open};
use vmatrix_vma_image::memory::{self, First};
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::sign;

/// A source that has not sent the manifest by then is left.
const MANIFEST_WITHIN: Duration = Duration::from_secs(5);
/// A push that stops for so long is left; what is missing is asked for.
const QUIET_MAX: Duration = Duration::from_secs(4);
/// How often it is looked at whether anything comes: a large table takes longer than a quiet source may.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Verified chunks that wait for whoever opened: 32 MiB of working set. One that finds no room is in the local
/// store, as all are.
const ARRIVED_MAX: usize = 256;
/// Writes of one push into the local store at once.
const KEEPS_AT_ONCE: usize = 4;
/// Pushed chunks that came before the table that names them.
const EARLY_MAX: usize = 1024;

/// Waits for the manifest, believes it or not, and has the rest followed.
pub async fn follow(
    mut from: Open,
    ask: &Ask,
    signers: &[String],
    local: &Local,
    messages: &mpsc::UnboundedSender<Message>,
) -> std::result::Result<Opened, Fault> {
    // What is pushed over a connection is told to all who open an image over it: theirs may come before ours.
    let mut early = Vec::new();
    let json = loop {
        match next(&mut from, MANIFEST_WITHIN).await? {
            Item::Manifest(json) => break json,
            Item::Refused(text) => return Err(Fault::Refused(text)),
            other if early.len() < EARLY_MAX => early.push(other),
            _ => return Err(Fault::Protocol(format!("no manifest is among {EARLY_MAX} things that came"))),
        }
    };
    let signed: SignedManifest =
        serde_json::from_slice(&json).map_err(|e| Fault::WrongBytes(format!("the manifest cannot be read: {e}")))?;
    let (manifest, digest) =
        sign::verify(&signed, signers).map_err(|e| Fault::WrongBytes(format!("the manifest is not believed: {e}")))?;
    let asked_for = match &ask.image {
        ImageRef::Digest(asked) => *asked == digest,
        ImageRef::Name(name) => *name == manifest.name,
    };
    if !asked_for {
        let got = format!("{} ({})", manifest.name, digest.short());
        return Err(Fault::WrongBytes(format!("another image came than was asked for: {got}")));
    }
    let mut key = ask.key.clone().filter(|key| Some(key.id()) == manifest.seal);
    if let (Some(id), None, true) = (manifest.seal, &key, ask.push) {
        let is_ours = |item: &Item| matches!(item, Item::Key { id: given, .. } if *given == id.0);
        // It comes right behind the manifest, from a source that has it; or came with another image of its owner.
        while !early.iter().any(is_ours) && early.len() < EARLY_MAX {
            let item = next(&mut from, MANIFEST_WITHIN).await?;
            let others = matches!(item, Item::Stored { .. } | Item::Key { .. });
            early.push(item);
            if !others {
                break;
            }
        }
        if let Some(Item::Key { bytes, .. }) = early.iter().find(|item| is_ours(item)) {
            key = Some(owner_key(id, bytes)?);
        }
    }
    let (arrived, pushed) = mpsc::channel(ARRIVED_MAX);
    if ask.push {
        let push = Push {
            local: local.clone(),
            sealed: manifest.seal.is_some(),
            key: key.clone(),
            needs: HashMap::new(),
            first: None,
            pages: memory::pages(&manifest).map_err(|e| Fault::WrongBytes(e.to_string()))?,
            early,
            arrived,
            keeps: Arc::new(Semaphore::new(KEEPS_AT_ONCE)),
        };
        let (manifest, messages) = (manifest.clone(), messages.clone());
        tokio::spawn(async move {
            let link = from.link.clone();
            if let Err(fault) = push.follow(from, &manifest).await {
                let _ = messages.send(Message::Blame { link, fault });
            }
        });
    }
    Ok(Opened { signed, manifest, digest, key, pushed: Pushed { arrived: pushed } })
}

/// An owner's key as it was sent.
pub fn owner_key(id: KeyId, bytes: &Bytes) -> std::result::Result<OwnerKey, Fault> {
    let wrong = || Fault::WrongBytes(format!("another key came than {id}"));
    let secret: [u8; 32] = bytes.as_ref().try_into().map_err(|_| wrong())?;
    let key = OwnerKey::from_bytes(secret);
    if key.id() == id { Ok(key) } else { Err(wrong()) }
}

async fn next(from: &mut Open, within: Duration) -> std::result::Result<Item, Fault> {
    match tokio::time::timeout(within, from.items.recv()).await {
        Ok(Some(item)) => Ok(item),
        Ok(None) => Err(Fault::Lost("while an image was opened".to_owned())),
        Err(_) => Err(Fault::Silent(within.as_millis() as u64)),
    }
}

/// What is known of a push while it comes.
struct Push {
    local: Local,
    sealed: bool,
    key: Option<OwnerKey>,
    needs: HashMap<Digest, Need>,
    /// The first table's digest, until it is read.
    first: Option<Digest>,
    pages: u32,
    early: Vec<Item>,
    arrived: mpsc::Sender<Arrived>,
    keeps: Arc<Semaphore>,
}

impl Push {
    async fn follow(mut self, mut from: Open, manifest: &Manifest) -> std::result::Result<(), Fault> {
        let memory = &manifest.memory;
        let tables = [Need::blob(&memory.first, false), Need::blob(&memory.rest, false)];
        for need in tables.into_iter().chain([Need::blob(&manifest.device, self.sealed)]) {
            self.needs.insert(need.digest, need);
        }
        self.first = Some(memory.first.digest);
        self.read_first_here(Need::blob(&memory.first, false)).await;
        for item in std::mem::take(&mut self.early) {
            if !self.take(item).await? {
                return Ok(());
            }
        }
        loop {
            let item = match tokio::time::timeout(LOOK_EVERY, from.items.recv()).await {
                Ok(Some(item)) => item,
                // The link is gone, and has said so itself.
                Ok(None) => return Ok(()),
                Err(_) if self.arrived.is_closed() => return Ok(()),
                Err(_) => match from.link.quiet_for() {
                    quiet if quiet >= QUIET_MAX => return Err(Fault::Silent(quiet.as_millis() as u64)),
                    _ => continue,
                },
            };
            if !self.take(item).await? {
                return Ok(());
            }
        }
    }

    /// A first table that is here already is not pushed.
    async fn read_first_here(&mut self, need: Need) {
        let (local, pages) = (self.local.clone(), self.pages);
        let read = tokio::task::spawn_blocking(move || {
            let plain = open(&local.store.chunk(&need.digest).ok()?, &need, None).ok()?;
            First::decode(&plain, pages).ok()
        });
        if let Ok(Some(first)) = read.await {
            self.know(&first);
        }
    }

    fn know(&mut self, first: &First) {
        self.first = None;
        for pack in &first.packs {
            let need = pack.need(self.sealed);
            self.needs.insert(need.digest, need);
        }
    }

    /// Takes an item; false when it was the last.
    async fn take(&mut self, item: Item) -> std::result::Result<bool, Fault> {
        match item {
            Item::End | Item::Refused(_) => Ok(false),
            Item::Manifest(_) => Err(Fault::Protocol("a second manifest came".to_owned())),
            Item::Key { .. } => Ok(true),
            Item::Stored { digest, bytes, room } => {
                match self.needs.remove(&digest) {
                    Some(need) => self.chunk(need, bytes).await?,
                    None if self.first.is_some() && self.early.len() < EARLY_MAX => {
                        self.early.push(Item::Stored { digest, bytes, room });
                    }
                    // Of another open on the same connection, or of nobody.
                    None => {}
                }
                Ok(true)
            }
        }
    }

    async fn chunk(&mut self, need: Need, bytes: Bytes) -> std::result::Result<(), Fault> {
        if need.sealed && self.key.is_none() {
            return Ok(());
        }
        let is_first = self.first == Some(need.digest);
        let (local, key, pages, arrived) = (self.local.clone(), self.key.clone(), self.pages, self.arrived.clone());
        let work = tokio::task::spawn_blocking(move || {
            let plain = open(&bytes, &need, key.as_ref()).map_err(|e| Fault::WrongBytes(e.to_string()))?;
            let first = if is_first {
                Some(First::decode(&plain, pages).map_err(|e| Fault::WrongBytes(e.to_string()))?)
            } else {
                None
            };
            // Where there is no room, or nobody waits, it is in the local store all the same.
            let _ = arrived.try_send(Arrived { need, plain });
            Ok((first, bytes))
        });
        let verified: (Option<First>, Bytes) =
            work.await.map_err(|_| Fault::Lost("a chunk could not be verified".to_owned()))??;
        let (first, bytes) = verified;
        // The disk is not waited for, but only so many writes are under way.
        if let Ok(turn) = Arc::clone(&self.keeps).acquire_owned().await {
            tokio::task::spawn_blocking(move || {
                local.keep(&need.digest, &bytes, false);
                drop(turn);
            });
        }
        if let Some(first) = first {
            self.know(&first);
            for early in std::mem::take(&mut self.early) {
                if let Item::Stored { digest, bytes, .. } = early
                    && let Some(need) = self.needs.remove(&digest)
                {
                    Box::pin(self.chunk(need, bytes)).await?;
                }
            }
        }
        Ok(())
    }
}

/// The faults of all sources that were tried, as one error.
pub fn nowhere(image: &ImageRef, tried: Vec<Error>) -> Result<Opened> {
    let what = match image {
        ImageRef::Name(name) => format!("image {name}"),
        ImageRef::Digest(digest) => format!("image {}", digest.short()),
    };
    let tried: Vec<String> = tried.iter().map(ToString::to_string).collect();
    let tried = if tried.is_empty() { "no source is connected".to_owned() } else { tried.join("; ") };
    Err(Error::Nowhere { what, tried })
}
