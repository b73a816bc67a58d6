//! An image from one store to another: push and pull are the same.
//!
//! ```text
//! manifest, tables ─▶ needs ─▶ what the other lacks or has no longer young ─▶ put, 16 at once ─▶ publish
//!                                └── it was collected meanwhile: again ◀────────────────────────────┘
//! ```
//! What was put stays put: one that is interrupted goes on from there.

use super::bucket::is_young;
use super::check::{needs, right, unverified};
use super::{Entry, Publishing, Store, chunk_key};
use crate::chunks::Need;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use vmatrix_model::manifest::SignedManifest;
use vmatrix_model::{Bytes, Digest};

/// Chunks that are asked for at once: a bucket answers each in some 20 ms, whatever the others do.
pub const COPY_AT_ONCE: usize = 16;
/// A copy whose chunks are collected while it goes on begins again so often: each needs a grace shorter than the
/// copy takes.
const TRIES: usize = 5;
/// Chunks that are looked for before a publisher's lock is renewed: some ten seconds at worst.
const LOOKED_FOR: usize = 1000;

/// How far a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Chunks that are there, of how many.
    pub chunks: (u64, u64),
    /// Their stored bytes, of how many.
    pub bytes: (Bytes, Bytes),
}

/// What a copy did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Copied {
    /// Chunks of the image.
    pub chunks: u64,
    /// Chunks that were sent: the other store lacked them, or had them damaged.
    pub sent: u64,
    /// Their stored bytes.
    pub bytes: Bytes,
}

/// Copies image `name`: what the store `to` lacks, then the manifest. Each chunk is checked before it is sent;
/// of a sealed one only the length, for the owner's key is not needed here.
///
/// # Errors
/// There is no such image, a chunk of it is missing or damaged, or a store cannot be read or written. What was sent
/// stays, and the same again goes on from there.
pub fn copy_image(name: &str, from: &Store, to: &Store, progress: &(dyn Fn(Progress) + Sync)) -> Result<Copied> {
    let signed =
        from.image(name)?.ok_or_else(|| Error::NoImage { name: name.to_owned(), store: from.dir().to_owned() })?;
    let all: Vec<Need> = needs(&unverified(name, &signed)?, from)?.into_iter().collect();
    let total = (all.len() as u64, all.iter().map(|need| Bytes(need.stored)).sum::<Bytes>());
    let (sent, sent_bytes) = (AtomicU64::new(0), AtomicU64::new(0));
    for again in 1..=TRIES {
        let done = Mutex::new((0, Bytes(0)));
        let listed = to.listed(all.len())?;
        each(&all, |need| {
            let kept = match &listed {
                Some(listed) => listed.get(&need.digest).filter(|entry| is_young(entry)).map(|entry| entry.length),
                None => to.keep(&need.digest),
            };
            if kept != Some(need.stored) {
                to.replace_chunk(&need.digest, &right(from, need, None)?)?;
                sent.fetch_add(1, Ordering::Relaxed);
                sent_bytes.fetch_add(need.stored, Ordering::Relaxed);
            }
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            *done = (done.0 + 1, done.1 + Bytes(need.stored));
            progress(Progress { chunks: (done.0, total.0), bytes: (done.1, total.1) });
            Ok(())
        })?;
        match to.publish(name, &signed) {
            Err(Error::NoChunk { digest, .. } | Error::BadChunk { digest, .. }) if again < TRIES => {
                tracing::warn!(image = name, chunk = %digest.short(), "was collected while it was copied; copied again");
            }
            outcome => {
                outcome?;
                break;
            }
        }
    }
    Ok(Copied { chunks: total.0, sent: sent.into_inner(), bytes: Bytes(sent_bytes.into_inner()) })
}

impl Store {
    /// Puts a manifest under `name` after looking that every chunk it names is here, with no collector between the
    /// look and the put: from then on none is collected. What was put before survives a power failure.
    ///
    /// # Errors
    /// [`Error::NoChunk`], [`Error::BadChunk`]: one is missing or damaged, and has to be put again;
    /// [`Error::Busy`]: collectors did not make way; or as [`Store::put_image`].
    pub fn publish(&self, name: &str, signed: &SignedManifest) -> Result<()> {
        let manifest = unverified(name, signed)?;
        for _ in 0..TRIES {
            let mut held = self.publishing()?;
            let all: Vec<Need> = needs(&manifest, self)?.into_iter().collect();
            let mut over = false;
            let listed = self.listed(all.len())?;
            for some in all.chunks(LOOKED_FOR) {
                each(some, |need| self.has_whole(need, listed.as_ref()))?;
                if let Publishing::Bucket(lock) = &mut held {
                    over |= lock.renew().is_err();
                }
            }
            if over {
                continue;
            }
            self.sync()?;
            self.put_image(name, signed)?;
            // A put that took longer than the lock counts may have met a collector: look again.
            if !matches!(&held, Publishing::Bucket(lock) if !lock.is_held()) {
                return Ok(());
            }
        }
        Err(Error::Busy { place: self.dir().to_owned() })
    }

    /// Whether a chunk is here as far as its length tells, or else its bytes; of a sealed one only the length does.
    pub fn holds(&self, need: &Need) -> bool {
        self.has_whole(need, None).is_ok()
    }

    fn has_whole(&self, need: &Need, listed: Option<&HashMap<Digest, Entry>>) -> Result<()> {
        let entry = match listed {
            Some(listed) => listed.get(&need.digest).cloned(),
            None => self.look(&chunk_key(&need.digest))?,
        };
        match entry.map(|entry| entry.length) {
            Some(stored) if stored == need.stored => Ok(()),
            None | Some(0) => Err(Error::NoChunk { digest: need.digest, store: self.dir().to_owned() }),
            // Damaged, or packed by another zstd: its bytes tell.
            Some(_) => right(self, need, None).map(drop),
        }
    }
}

/// Does something with each of many, several at once; ends with the first error.
pub(super) fn each<T: Sync>(all: &[T], act: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        while let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failed.load(Ordering::Relaxed) {
                break;
            }
            act(one).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..COPY_AT_ONCE.min(all.len())).map(|_| scope.spawn(work)).collect();
        let mut outcome = work();
        for thread in threads {
            let one = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome = outcome.and(one);
        }
        outcome
    })
}
