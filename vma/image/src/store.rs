//! Where images lie: chunks by digest, manifests by name; in a folder, or in a bucket of an S3-compatible store.
//!
//! ```text
//! images/<name>.json          SignedManifest
//! chunks/<2 hex>/<64 hex>     stored bytes (zstd, sealed where the image is), named by the digest of the plain ones
//! keys/                       the builder's signing key, owners' keys: in a folder only, they never leave it
//! locks/                      who publishes or collects: in a bucket only, a folder has flock
//! ```
//!
//! # Invariants
//! 1. What has a name is whole: a file is written beside, then renamed; a bucket's object appears at once.
//! 2. A manifest is put after all its chunks; [`Store::publish`] looks that they are there.
//! 3. Only the owner may read: chunks hold what the guest held, keys and passwords too.
//! 4. What is put or kept is young, and what is young is not collected (see [`crate::gc`]).
//!
//! All calls block; a program that is async makes them where blocking is allowed.

mod address;
mod bucket;
mod check;
mod copy;
mod folder;
mod http;
mod lock;
#[cfg(test)]
pub(crate) mod tests;

pub(crate) use check::unverified;
pub use check::{Repaired, check_chunk, needs, repair_image};
pub use copy::{COPY_AT_ONCE, Copied, Progress, copy_image};
pub use folder::make_private;
pub(crate) use folder::write_whole;
pub(crate) use lock::pause;

use crate::error::{Error, Result};
use bucket::Bucket;
use folder::Folder;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;
use vmatrix_model::Digest;
use vmatrix_model::manifest::{MANIFEST_MAX, SignedManifest};

/// Largest stored chunk.
pub const STORED_MAX: usize = crate::chunks::BLOB_MAX + crate::chunks::STORED_MORE;

/// From so many chunks on a bucket is listed, 256 requests, instead of asked for each.
const LISTED_FROM: usize = 1024;

/// A place of images.
#[derive(Debug, Clone)]
pub struct Store {
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Folder(Folder),
    Bucket(Bucket),
}

/// What a store knows of a thing in it without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The last part of its key.
    pub name: String,
    /// Bytes as stored.
    pub length: u64,
    /// When it was put or kept, by the store's clock.
    pub modified: SystemTime,
    /// Changes when the thing is replaced.
    pub version: String,
}

/// Held while a manifest is put: nothing is collected meanwhile.
pub(crate) enum Publishing {
    Folder { _shared: folder::Held },
    Bucket(lock::Lock),
}

/// Held while one batch of chunks is looked at and taken out: nothing is put, kept or published meanwhile.
pub(crate) enum Sweeping {
    Folder { _alone: folder::Held },
    Bucket(lock::Lock),
}

impl Store {
    /// Opens the store in folder `dir` for building, making it if it is not there; what an earlier version left
    /// for everybody to read is closed.
    ///
    /// # Errors
    /// The directory cannot be made, or belongs to somebody else.
    pub fn open(dir: impl AsRef<Path>) -> Result<Store> {
        Ok(Store { place: Place::Folder(Folder::open(dir.as_ref())?) })
    }

    /// Opens the store in folder `dir` to look into it, changing nothing.
    ///
    /// # Errors
    /// [`Error::NoStore`]: there is none.
    pub fn read(dir: impl AsRef<Path>) -> Result<Store> {
        Ok(Store { place: Place::Folder(Folder::read(dir.as_ref())?) })
    }

    /// Opens the store at an address: a folder's path, which is made if it is not there, or
    /// `s3://BUCKET/PREFIX?endpoint=http://HOST:PORT&region=REGION`, all but the bucket optional. The credentials
    /// of a bucket are those of the environment: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, and
    /// `AWS_SESSION_TOKEN` if there is one. Nothing is asked of a bucket yet.
    ///
    /// # Errors
    /// [`Error::BadAddress`]: the address or the environment does not say enough; or as [`Store::open`].
    pub fn at(address: &str) -> Result<Store> {
        Store::addressed(address, Folder::open)
    }

    /// As [`Store::at`], but makes no folder: for a store to read from.
    ///
    /// # Errors
    /// As [`Store::at`], and [`Error::NoStore`] for a folder that is none.
    pub fn existing(address: &str) -> Result<Store> {
        Store::addressed(address, Folder::read)
    }

    fn addressed(address: &str, folder: impl FnOnce(&Path) -> Result<Folder>) -> Result<Store> {
        let place = match address::Address::parse(address, |name| std::env::var(name).ok())? {
            address::Address::Folder(dir) => Place::Folder(folder(&dir)?),
            address::Address::Bucket(address) => Place::Bucket(Bucket::connect(&address)?),
        };
        Ok(Store { place })
    }

    #[cfg(test)]
    fn over(bucket: Bucket) -> Store {
        Store { place: Place::Bucket(bucket) }
    }

    /// Where it lies, for messages: the folder, or a bucket's address without its query. Only
    /// [`Store::folder`] is a path to join to.
    pub fn dir(&self) -> &Path {
        match &self.place {
            Place::Folder(folder) => folder.dir(),
            Place::Bucket(bucket) => bucket.place(),
        }
    }

    /// The folder it lies in.
    ///
    /// # Errors
    /// [`Error::NotAFolder`]: it is a bucket, where keys and caches do not belong.
    pub fn folder(&self) -> Result<&Path> {
        match &self.place {
            Place::Folder(folder) => Ok(folder.dir()),
            Place::Bucket(bucket) => Err(Error::NotAFolder { place: bucket.place().to_owned() }),
        }
    }

    /// Reads the manifest of image `name`; `None` if there is none. It is not verified: see [`crate::sign::verify`].
    ///
    /// # Errors
    /// The name is not a DNS label, the manifest is too long, or it is not a signed manifest.
    pub fn image(&self, name: &str) -> Result<Option<SignedManifest>> {
        // The text stands JSON-escaped inside: quotes double it at worst.
        let Some(bytes) = self.get(&image_key(name)?, 2 * MANIFEST_MAX)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::BadManifest {
            name: name.to_owned(),
            problem: format!("{} in {}: {e}", image_key(name).unwrap_or_default(), self.dir().display()),
        })
    }

    /// Puts a manifest under `name`, whether its chunks are there or not: for one that is staged chunk by chunk.
    /// Whoever has all chunks uses [`Store::publish`].
    ///
    /// # Errors
    /// The name is not a DNS label, or the store is full or cannot be written.
    pub fn put_image(&self, name: &str, signed: &SignedManifest) -> Result<()> {
        let key = image_key(name)?;
        let text = serde_json::to_vec(signed)
            .map_err(|e| Error::BadManifest { name: name.to_owned(), problem: e.to_string() })?;
        self.put(&key, &text)
    }

    /// Takes the manifest of image `name` out; whether there was one. Its chunks go with the next collection, if
    /// no other image has them.
    ///
    /// # Errors
    /// The name is not a DNS label, or the store cannot be written.
    pub fn remove_image(&self, name: &str) -> Result<bool> {
        let key = image_key(name)?;
        let there = self.look(&key)?.is_some();
        self.remove(&[key])?;
        Ok(there)
    }

    /// Names of all images, sorted.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        Ok(self.manifests()?.into_iter().map(|(name, _)| name).collect())
    }

    /// Names of all images, sorted, each with what changes when it is replaced.
    pub(crate) fn manifests(&self) -> Result<Vec<(String, String)>> {
        let named = |entry: Entry| {
            let name = entry.name.strip_suffix(".json").filter(|n| is_image_name(n))?.to_owned();
            Some((name, entry.version))
        };
        let mut names: Vec<(String, String)> = self.list("images")?.into_iter().filter_map(named).collect();
        names.sort();
        Ok(names)
    }

    /// Reads a chunk's stored bytes. They are not verified: see [`crate::chunks::open`].
    ///
    /// # Errors
    /// [`Error::NoChunk`] if it is not there.
    pub fn chunk(&self, digest: &Digest) -> Result<Vec<u8>> {
        self.get(&chunk_key(digest), STORED_MAX)?
            .ok_or_else(|| Error::NoChunk { digest: *digest, store: self.dir().to_owned() })
    }

    /// Length of a chunk's stored bytes, if it is here. One of no bytes, as a power failure leaves, is not, and
    /// what cannot be looked at is not either: whoever needs it then meets the reason.
    pub fn stored(&self, digest: &Digest) -> Option<u64> {
        let entry = self.look(&chunk_key(digest)).ok().flatten()?;
        Some(entry.length).filter(|length| *length > 0)
    }

    /// Whether a chunk is here.
    pub fn has(&self, digest: &Digest) -> bool {
        self.stored(digest).is_some()
    }

    /// As [`Store::stored`], and makes the chunk young, so that whoever is about to name it may rely on it. `None`
    /// also where that cannot be done: then it is to be put again.
    pub fn keep(&self, digest: &Digest) -> Option<u64> {
        let key = chunk_key(digest);
        let kept = match &self.place {
            Place::Folder(folder) => folder.keep(&key).ok().flatten(),
            // The age of an object changes only with its bytes: an older one is put again by who needs it.
            Place::Bucket(bucket) => bucket.look(&key).ok().flatten().filter(bucket::is_young),
        };
        kept.map(|entry| entry.length).filter(|length| *length > 0)
    }

    /// Puts a chunk's stored bytes. One that is here already with this length is left alone and made young; one
    /// of another length is damaged, or was packed by another zstd, and gives way.
    ///
    /// # Errors
    /// The store is full or not writable.
    pub fn put_chunk(&self, digest: &Digest, stored: &[u8]) -> Result<()> {
        if self.keep(digest) == Some(stored.len() as u64) {
            return Ok(());
        }
        self.replace_chunk(digest, stored)
    }

    /// Puts a chunk's stored bytes in place of whatever is here.
    ///
    /// # Errors
    /// The store is full or not writable.
    pub fn replace_chunk(&self, digest: &Digest, stored: &[u8]) -> Result<()> {
        self.put(&chunk_key(digest), stored)
    }

    /// Takes a chunk out again that nothing names; one that cannot be stays for the next collection.
    pub fn remove_chunk(&self, digest: &Digest) {
        if let Err(error) = self.remove(&[chunk_key(digest)]) {
            tracing::debug!(%digest, "stays in the store: {error}");
        }
    }

    /// Waits until no other build puts chunks into the store, and keeps others waiting while it is held.
    ///
    /// # Errors
    /// It is a bucket, where nothing is built; or its lock file cannot be made.
    pub fn lock(&self) -> Result<folder::Held> {
        match &self.place {
            Place::Folder(folder) => folder.building(),
            Place::Bucket(bucket) => Err(Error::NotAFolder { place: bucket.place().to_owned() }),
        }
    }

    /// Makes what was put so far survive a power failure, where that is this program's to do.
    ///
    /// # Errors
    /// The disk fails.
    pub(crate) fn sync(&self) -> Result<()> {
        match &self.place {
            Place::Folder(folder) => folder.sync(),
            Place::Bucket(_) => Ok(()),
        }
    }

    /// The chunks whose digest begins with byte `first`; `None` stands for what is there and is no chunk.
    pub(crate) fn shard(&self, first: u8) -> Result<Vec<(Option<Digest>, Entry)>> {
        let entries = self.list(&format!("chunks/{first:02x}"))?;
        let digest = |e: &Entry| e.name.parse().ok().filter(|d: &Digest| d.0.first() == Some(&first));
        Ok(entries.into_iter().map(|e| (digest(&e), e)).collect())
    }

    /// What is here of so many chunks, in a bucket: a listing is fewer requests than a look at each of very many.
    /// `None` where each is to be looked at.
    fn listed(&self, chunks: usize) -> Result<Option<HashMap<Digest, Entry>>> {
        if matches!(self.place, Place::Folder(_)) || chunks < LISTED_FROM {
            return Ok(None);
        }
        let all = Mutex::new(HashMap::new());
        let shards: Vec<u8> = (0..=u8::MAX).collect();
        copy::each(&shards, |first| {
            let shard = self.shard(*first)?;
            let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.into_iter().filter_map(|(digest, entry)| Some((digest?, entry))));
            Ok(())
        })?;
        Ok(Some(all.into_inner().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Takes chunks, or what lies among them, out of the shard of `first`.
    pub(crate) fn sweep(&self, sweeping: &Sweeping, first: u8, names: &[String]) -> Result<()> {
        if let Sweeping::Bucket(lock) = sweeping {
            lock.still_for_sweeping()?;
        }
        let keys: Vec<String> = names.iter().map(|name| format!("chunks/{first:02x}/{name}")).collect();
        self.remove(&keys)
    }

    /// Keeps collectors out; waits for one that is at a batch.
    pub(crate) fn publishing(&self) -> Result<Publishing> {
        Ok(match &self.place {
            Place::Folder(folder) => Publishing::Folder { _shared: folder.using()? },
            Place::Bucket(bucket) => Publishing::Bucket(lock::publishing(bucket)?),
        })
    }

    /// Keeps publishers out; `None` if there are some, or another collector.
    pub(crate) fn sweeping(&self) -> Result<Option<Sweeping>> {
        Ok(match &self.place {
            Place::Folder(folder) => Some(Sweeping::Folder { _alone: folder.sweeping()? }),
            Place::Bucket(bucket) => lock::sweeping(bucket)?.map(Sweeping::Bucket),
        })
    }

    fn get(&self, key: &str, max: usize) -> Result<Option<Vec<u8>>> {
        match &self.place {
            Place::Folder(folder) => folder.get(key, max),
            Place::Bucket(bucket) => bucket.get(key, max),
        }
    }

    pub(crate) fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        match &self.place {
            Place::Folder(folder) => folder.put(key, bytes),
            Place::Bucket(bucket) => bucket.put(key, bytes),
        }
    }

    fn look(&self, key: &str) -> Result<Option<Entry>> {
        match &self.place {
            Place::Folder(folder) => folder.look(key),
            Place::Bucket(bucket) => bucket.look(key),
        }
    }

    fn list(&self, under: &str) -> Result<Vec<Entry>> {
        match &self.place {
            Place::Folder(folder) => folder.list(under),
            Place::Bucket(bucket) => bucket.list(under),
        }
    }

    fn remove(&self, keys: &[String]) -> Result<()> {
        match &self.place {
            Place::Folder(folder) => folder.remove(keys),
            Place::Bucket(bucket) => bucket.remove(keys),
        }
    }
}

impl Sweeping {
    /// What time it is by the store's clock.
    pub(crate) fn now(&self) -> SystemTime {
        match self {
            Sweeping::Folder { .. } => SystemTime::now(),
            Sweeping::Bucket(lock) => lock.now(),
        }
    }
}

/// An image is named as a service is, for it stands in paths and log lines.
pub fn is_image_name(name: &str) -> bool {
    name.parse::<vmatrix_model::ServiceId>().is_ok()
}

fn image_key(name: &str) -> Result<String> {
    if !is_image_name(name) {
        return Err(Error::BadName { name: name.chars().take(80).collect() });
    }
    Ok(format!("images/{name}.json"))
}

fn chunk_key(digest: &Digest) -> String {
    let hex = digest.to_string();
    format!("chunks/{}/{hex}", hex.get(..2).unwrap_or("00"))
}
