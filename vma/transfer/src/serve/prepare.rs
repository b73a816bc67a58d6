//! What an open answers with: the manifest, and what is pushed behind it, in the order it is needed.
//!
//! image, have ─▶ manifest ─▶ first table ─▶ first, device, working set; rest table ─▶ minus what `have` names
//!
//! The server does not vouch for the image: the receiver verifies the manifest. What is decoded here is bounded
//! by the format.

use std::collections::HashSet;
use std::sync::Arc;
use vmatrix_model::manifest::{Manifest, SignedManifest};
use vmatrix_model::{Digest, KeyId};
use vmatrix_vma_image::chunks::{Need, open};
use vmatrix_vma_image::memory::{self, First};
use vmatrix_vma_image::{Error, Result, Store};

use crate::frame::ImageRef;

/// Chunks pushed at once: a working set of 2 GiB. The receiver asks for what is left.
pub const PUSH_MAX: usize = 16_384;

/// An opened image.
#[derive(Debug)]
pub struct Prepared {
    /// The signed manifest's JSON.
    pub json: Arc<Vec<u8>>,
    /// Chunks in the order they are needed.
    pub push: Vec<Digest>,
    /// The owner's key that opens it.
    pub seal: Option<KeyId>,
}

/// Finds an image; `None` if it is not here.
///
/// # Errors
/// The store cannot be read.
pub fn find(store: &Store, image: &ImageRef) -> Result<Option<(SignedManifest, Digest)>> {
    match image {
        ImageRef::Name(name) => Ok(store.image(name)?.map(named)),
        ImageRef::Digest(digest) => {
            for name in store.names()? {
                if let Some(found) = store.image(&name)?.map(named).filter(|(_, d)| d == digest) {
                    return Ok(Some(found));
                }
            }
            Ok(None)
        }
    }
}

fn named(signed: SignedManifest) -> (SignedManifest, Digest) {
    let digest = Digest::of(signed.manifest.as_bytes());
    (signed, digest)
}

/// Lists what is pushed behind a manifest.
///
/// # Errors
/// The manifest or its first table cannot be read.
pub fn prepare(store: &Store, signed: &SignedManifest, have: Option<&Digest>) -> Result<Prepared> {
    let manifest = read(signed)?;
    let first = first(store, &manifest)?;
    let there = match have {
        // A snapshot that is not here any more only costs bytes.
        Some(have) => named_by(store, have).unwrap_or_default(),
        None => HashSet::new(),
    };
    let mut push = vec![manifest.memory.first.digest, manifest.device.digest];
    push.extend(first.packs.iter().map(|pack| pack.digest));
    push.push(manifest.memory.rest.digest);
    push.retain(|digest| !there.contains(digest));
    push.truncate(PUSH_MAX);
    let json = serde_json::to_vec(signed).map_err(|e| fault(&manifest.name, e.to_string()))?;
    Ok(Prepared { json: Arc::new(json), push, seal: manifest.seal })
}

fn named_by(store: &Store, image: &Digest) -> Result<HashSet<Digest>> {
    let Some((signed, _)) = find(store, &ImageRef::Digest(*image))? else { return Ok(HashSet::new()) };
    let manifest = read(&signed)?;
    let map = memory::map(&manifest, store)?;
    let mut there: HashSet<Digest> = map.packs().iter().map(|pack| pack.digest).collect();
    there.extend([manifest.memory.first.digest, manifest.memory.rest.digest, manifest.device.digest]);
    Ok(there)
}

fn first(store: &Store, manifest: &Manifest) -> Result<First> {
    let need = Need::blob(&manifest.memory.first, false);
    let plain = open(&store.chunk(&need.digest)?, &need, None)?;
    First::decode(&plain, memory::pages(manifest)?)
}

fn read(signed: &SignedManifest) -> Result<Manifest> {
    serde_json::from_str(&signed.manifest).map_err(|e| fault("?", e.to_string()))
}

fn fault(name: &str, problem: String) -> Error {
    Error::BadManifest { name: name.to_owned(), problem }
}
