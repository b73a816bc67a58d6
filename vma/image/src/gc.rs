//! Takes chunks out of a store that no image names.
//!
//! ```text
//! manifests ─▶ tables ─▶ named
//! for each of the 256 shards:  list ─▶ none is old and unnamed: next
//!                               └─▶ keep publishers out ─▶ manifests again, list again ─▶ old and unnamed both
//!                                   times: taken out ─▶ let publishers in
//! ```
//!
//! # Why nothing that is needed goes
//! 1. A chunk that a manifest names is never taken out: the manifests are read again after publishers were kept
//!    out, and [`Store::publish`] puts one only after it has looked, while collectors are kept out, that all its
//!    chunks are there.
//! 2. What is being built, fetched or pushed is young: each put or keep makes a chunk young, and what is younger
//!    than the grace stays. So `grace` is to be longer than the longest build or transfer; where it is shorter,
//!    `publish` refuses the manifest and the chunks are put again.
//! 3. In a folder nothing is put or kept between the look at a chunk and its removal.
//! 4. A manifest or table that cannot be read ends the collection before anything is removed by it: nobody knows
//!    what it names.
//!
//! It may be killed anywhere, and run twice at once. There is no list of what is to be removed: that would be wrong
//! some day.

use crate::error::{Error, Result};
use crate::store::{Entry, Store, Sweeping, needs, pause, unverified};
use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, SystemTime};
use vmatrix_model::{Bytes, Digest};

/// A grace that no build or transfer outlasts.
pub const GRACE: Duration = Duration::from_secs(24 * 3600);
/// Chunks that are taken out at once: what S3 takes in one request.
const BATCH: usize = 1000;
/// How often a shard is tried while somebody publishes, and how long is waited in between.
const TRIES: u32 = 5;
const AGAIN: Duration = Duration::from_millis(500);

/// What a collection found and did; dry, what it would have done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Images whose chunks are kept.
    pub images: u64,
    /// Chunks that they name and that are here.
    pub kept: u64,
    /// Chunks, and files of writers that died, that were taken out.
    pub removed: u64,
    /// Their stored bytes.
    pub bytes: Bytes,
    /// Chunks that no image names and that stay for now: too young, or somebody was publishing all the time.
    pub waiting: u64,
}

/// Collects `store`: what no image names and nobody has put or kept for `grace` is taken out, unless it is a dry run.
///
/// # Errors
/// The store cannot be read or written, or an image or its table is not readable, and nobody knows what it names:
/// repair or remove that image. What was removed until then stays removed.
pub fn gc(store: &Store, grace: Duration, dry_run: bool) -> Result<Report> {
    let mut named = Named::default();
    named.read(store)?;
    let mut report = Report::default();
    for first in 0..=u8::MAX {
        shard(store, first, grace, dry_run, &mut named, &mut report)?;
    }
    report.images = named.images.len() as u64;
    Ok(report)
}

fn shard(
    store: &Store,
    first: u8,
    grace: Duration,
    dry_run: bool,
    named: &mut Named,
    report: &mut Report,
) -> Result<()> {
    let seen = store.shard(first)?;
    let look = Look::at(&seen, named, grace, SystemTime::now());
    if dry_run || look.old.is_empty() {
        report.add(&look);
        look.old.iter().for_each(|entry| report.count(entry));
        return Ok(());
    }
    let Some(sweeping) = alone(store)? else {
        report.add(&look);
        report.waiting += look.old.len() as u64;
        return Ok(());
    };
    named.read(store)?;
    let seen = store.shard(first)?;
    let look = Look::at(&seen, named, grace, sweeping.now());
    report.add(&look);
    for batch in look.old.chunks(BATCH) {
        let names: Vec<String> = batch.iter().map(|entry| entry.name.clone()).collect();
        match store.sweep(&sweeping, first, &names) {
            Ok(()) => batch.iter().for_each(|entry| report.count(entry)),
            // The lock may be over: these are for the next collection.
            Err(Error::Busy { .. }) => report.waiting += batch.len() as u64,
            Err(other) => return Err(other),
        }
    }
    Ok(())
}

fn alone(store: &Store) -> Result<Option<Sweeping>> {
    for again in 1..=TRIES {
        if let Some(sweeping) = store.sweeping()? {
            return Ok(Some(sweeping));
        }
        if again < TRIES {
            pause(AGAIN);
        }
    }
    Ok(None)
}

/// One look at a shard.
struct Look<'a> {
    kept: u64,
    young: u64,
    /// Neither named nor young.
    old: Vec<&'a Entry>,
}

impl<'a> Look<'a> {
    fn at(seen: &'a [(Option<Digest>, Entry)], named: &Named, grace: Duration, now: SystemTime) -> Look<'a> {
        let mut look = Look { kept: 0, young: 0, old: Vec::new() };
        for (digest, entry) in seen {
            // One from the future has a wrong clock behind it, and counts as young.
            let old = now.duration_since(entry.modified).is_ok_and(|age| age >= grace);
            match digest {
                Some(digest) if named.chunks.contains(digest) => look.kept += 1,
                // What is neither a chunk nor left by a writer of chunks is somebody else's.
                None if !is_part(&entry.name) => {}
                _ if old => look.old.push(entry),
                _ => look.young += 1,
            }
        }
        look
    }
}

impl Report {
    fn add(&mut self, look: &Look) {
        self.kept += look.kept;
        self.waiting += look.young;
    }

    fn count(&mut self, removed: &Entry) {
        self.removed += 1;
        self.bytes += Bytes(removed.length);
    }
}

/// What a writer leaves that was killed before it renamed.
fn is_part(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".part")
}

/// Everything that any image names, or named since this collection began.
#[derive(Default)]
struct Named {
    /// By name, what changes when an image is replaced.
    images: BTreeMap<String, String>,
    chunks: HashSet<Digest>,
}

impl Named {
    /// Adds what images name that are new or were replaced.
    fn read(&mut self, store: &Store) -> Result<()> {
        let manifests = store.manifests()?;
        self.images.retain(|name, _| manifests.iter().any(|(n, _)| n == name));
        for (name, version) in manifests {
            if self.images.get(&name) == Some(&version) {
                continue;
            }
            let unreadable = |source: Error| Error::Uncollectable { name: name.clone(), source: Box::new(source) };
            // One that is gone again names nothing.
            let Some(signed) = store.image(&name).map_err(unreadable)? else { continue };
            let manifest = unverified(&name, &signed).map_err(unreadable)?;
            let needs = needs(&manifest, store).map_err(unreadable)?;
            self.chunks.extend(needs.iter().map(|need| need.digest));
            self.images.insert(name, version);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
