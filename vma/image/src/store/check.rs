//! Whether what an image names is in a store, and right; and what is done where it is not.
//!
//! ```text
//! manifest + tables ─needs─▶ every chunk of the image ─check_chunk─▶ right, or what is wrong with it
//! wrong ─repair_image─▶ put again from another store, or taken out, so that a build or a fetch puts it again
//! ```

use super::Store;
use super::copy::each;
use crate::chunks::{self, Need};
use crate::error::{Error, Result};
use crate::seal::OwnerKey;
use crate::{bounds, memory};
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use vmatrix_model::Digest;
use vmatrix_model::manifest::{Manifest, SignedManifest};

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Repaired {
    /// Chunks that were looked at.
    pub checked: u64,
    /// Chunks that were missing or damaged and are right again.
    pub repaired: u64,
    /// Chunks that are missing now; the image has to be built or fetched again, which goes on from the others.
    pub lost: Vec<Digest>,
}

/// Every chunk of an image: device state, tables, packs, chunks of parts. Its tables are read from `store`.
///
/// # Errors
/// A table is missing or wrong.
pub fn needs(manifest: &Manifest, store: &Store) -> Result<BTreeSet<Need>> {
    let sealed = manifest.seal.is_some();
    let mut all: BTreeSet<Need> = named(manifest).into_iter().collect();
    all.extend(memory::map(manifest, store)?.packs().iter().map(|pack| pack.need(sealed)));
    for part in &manifest.parts {
        let chunks = chunks::table(part, store)?;
        all.extend(chunks.iter().enumerate().filter_map(|(i, c)| Some(Need::part(part, i, c.as_ref()?))));
    }
    Ok(all)
}

/// What the manifest names itself.
fn named(manifest: &Manifest) -> Vec<Need> {
    let tables =
        [&manifest.memory.first, &manifest.memory.rest].into_iter().chain(manifest.parts.iter().map(|p| &p.table));
    let mut all: Vec<Need> = tables.map(|blob| Need::blob(blob, false)).collect();
    all.push(Need::blob(&manifest.device, manifest.seal.is_some()));
    all
}

/// Reads a manifest without asking who signed it, to know what it names.
pub(crate) fn unverified(name: &str, signed: &SignedManifest) -> Result<Manifest> {
    let fault = |problem: String| Error::BadManifest { name: name.to_owned(), problem };
    let manifest: Manifest = serde_json::from_str(&signed.manifest).map_err(|e| fault(e.to_string()))?;
    bounds::check(&manifest).map_err(fault)?;
    Ok(manifest)
}

/// Reads a chunk and checks all of it. Of a sealed one without its owner's key only the length can be seen.
///
/// # Errors
/// [`Error::NoChunk`], [`Error::TooLong`] or [`Error::BadChunk`]: it is not there or not right; others: the store
/// cannot be read.
pub fn check_chunk(store: &Store, need: &Need, key: Option<&OwnerKey>) -> Result<()> {
    right(store, need, key).map(drop)
}

/// The stored bytes of a chunk, if they are right.
pub(super) fn right(store: &Store, need: &Need, key: Option<&OwnerKey>) -> Result<Vec<u8>> {
    let stored = store.chunk(&need.digest)?;
    if !need.sealed || key.is_some() {
        chunks::open(&stored, need, key)?;
    } else if stored.len() as u64 != need.stored {
        let problem = format!("{} bytes are stored, the manifest says {}", stored.len(), need.stored);
        return Err(Error::BadChunk { digest: need.digest, problem });
    }
    Ok(stored)
}

/// Checks every chunk of image `name` and puts what is missing or damaged again, from store `from` if it is given;
/// what it does not have right is taken out, so that the next build or fetch puts it.
///
/// # Errors
/// There is no such image, the key is not its owner's, a store cannot be read or written, or a table is lost, so
/// that nobody knows what else the image needs.
pub fn repair_image(name: &str, store: &Store, from: Option<&Store>, key: Option<&OwnerKey>) -> Result<Repaired> {
    let signed =
        store.image(name)?.ok_or_else(|| Error::NoImage { name: name.to_owned(), store: store.dir().to_owned() })?;
    let manifest = unverified(name, &signed)?;
    if let (Some(id), Some(key)) = (manifest.seal, key)
        && key.id() != id
    {
        let problem = format!("image {name:?} is sealed with {}, this key is {}", id.0.short(), key.id().0.short());
        return Err(Error::BadManifest { name: name.to_owned(), problem });
    }
    let done = Mutex::new(Repaired::default());
    let repair = |need: &Need| {
        let outcome = repair(store, need, from, key)?;
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        done.checked += 1;
        match outcome {
            Outcome::Right => {}
            Outcome::Repaired => done.repaired += 1,
            Outcome::Lost => done.lost.push(need.digest),
        }
        Ok(())
    };
    // The tables first: the rest is known by them.
    let tables = named(&manifest);
    each(&tables, repair)?;
    let others: Vec<Need> = needs(&manifest, store)?.into_iter().filter(|need| !tables.contains(need)).collect();
    each(&others, repair)?;
    Ok(done.into_inner().unwrap_or_else(PoisonError::into_inner))
}

enum Outcome {
    Right,
    Repaired,
    Lost,
}

fn repair(store: &Store, need: &Need, from: Option<&Store>, key: Option<&OwnerKey>) -> Result<Outcome> {
    match right(store, need, key) {
        Ok(_) => return Ok(Outcome::Right),
        Err(Error::NoChunk { .. } | Error::TooLong { .. } | Error::BadChunk { .. }) => {}
        Err(other) => return Err(other),
    }
    match from.map(|from| right(from, need, key)) {
        Some(Ok(stored)) => {
            store.replace_chunk(&need.digest, &stored)?;
            Ok(Outcome::Repaired)
        }
        None | Some(Err(Error::NoChunk { .. } | Error::TooLong { .. } | Error::BadChunk { .. })) => {
            store.remove_chunk(&need.digest);
            Ok(Outcome::Lost)
        }
        Some(Err(other)) => Err(other),
    }
}
