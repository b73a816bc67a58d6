//! What of an image a store lacks: manifest + tables that are there ─▶ needs, those of a first resume apart.
//!
//! A table that is missing is a need itself; what it lists is not known until it is there.

use std::collections::BTreeSet;
use vmatrix_model::manifest::{Blob, Manifest, PartKind};
use vmatrix_model::{Bytes, Digest};
use vmatrix_vma_image::Store;
use vmatrix_vma_image::chunks::{Need, decode_table, open};
use vmatrix_vma_image::memory::{First, Rest, pages};

/// What is missing, each chunk once, in the order in which it is needed.
#[derive(Debug, Default)]
pub struct Survey {
    /// Needed before a guest runs: device state, first table, working set.
    pub critical: Vec<Need>,
    /// Everything else but what seeds a back end.
    pub rest: Vec<Need>,
    /// Stored bytes of what is here, as far as the tables that are here tell.
    pub present: Bytes,
}

struct Look<'a> {
    store: &'a Store,
    known: BTreeSet<Digest>,
    present: Bytes,
}

impl Look<'_> {
    /// Adds the need to `to` if it is missing; one length or another is what a file cut short has.
    fn at(&mut self, need: Need, to: &mut Vec<Need>) {
        if !self.known.insert(need.digest) {
            return;
        }
        if self.store.stored(&need.digest) == Some(need.stored) {
            self.present += Bytes(need.stored);
        } else {
            to.push(need);
        }
    }

    /// A table's plain bytes, if it is here; one that cannot be opened is missing.
    fn table(&mut self, blob: &Blob, to: &mut Vec<Need>) -> Option<Vec<u8>> {
        let need = Need::blob(blob, false);
        let plain = self.store.chunk(&need.digest).ok().and_then(|stored| open(&stored, &need, None).ok());
        match &plain {
            Some(_) => self.at(need, to),
            None if self.known.insert(need.digest) => to.push(need),
            None => {}
        }
        plain
    }
}

/// Looks for all of an image.
pub fn of(manifest: &Manifest, store: &Store) -> Survey {
    let mut look = Look { store, known: BTreeSet::new(), present: Bytes(0) };
    let mut critical = critical(manifest, &mut look);
    let mut rest = Vec::new();
    let sealed = manifest.seal.is_some();
    if let (Some(plain), Ok(pages)) = (look.table(&manifest.memory.rest, &mut rest), pages(manifest)) {
        match Rest::decode(&plain, pages) {
            Ok(table) => table.packs.iter().for_each(|p| look.at(p.need(sealed), &mut rest)),
            // As good as missing: it is named again where it is used.
            Err(_) => rest.push(Need::blob(&manifest.memory.rest, false)),
        }
    }
    for part in manifest.parts.iter().filter(|p| p.kind != PartKind::BackendSeed) {
        // The table in any case: who collects chunks must see all that an image names.
        let Some(plain) = look.table(&part.table, &mut rest) else { continue };
        match decode_table(part, &plain) {
            Ok(_) if !part.kind.is_disk() => {}
            Ok(chunks) => {
                for (index, chunk) in chunks.iter().enumerate() {
                    if let Some(chunk) = chunk {
                        look.at(Need::part(part, index, chunk), &mut rest);
                    }
                }
            }
            Err(_) => rest.push(Need::blob(&part.table, false)),
        }
    }
    critical.dedup();
    Survey { critical, rest, present: look.present }
}

/// What is missing of what a guest needs before it runs.
pub fn of_critical(manifest: &Manifest, store: &Store) -> Vec<Need> {
    critical(manifest, &mut Look { store, known: BTreeSet::new(), present: Bytes(0) })
}

/// Tables past the first that are missing.
pub fn tables(manifest: &Manifest, store: &Store) -> Vec<Need> {
    let parts = manifest.parts.iter().filter(|p| p.kind != PartKind::BackendSeed).map(|p| &p.table);
    let all = std::iter::once(&manifest.memory.rest).chain(parts).map(|blob| Need::blob(blob, false));
    all.filter(|need| store.stored(&need.digest) != Some(need.stored)).collect()
}

fn critical(manifest: &Manifest, look: &mut Look<'_>) -> Vec<Need> {
    let (mut missing, sealed) = (Vec::new(), manifest.seal.is_some());
    look.at(Need::blob(&manifest.device, sealed), &mut missing);
    if let (Some(plain), Ok(pages)) = (look.table(&manifest.memory.first, &mut missing), pages(manifest)) {
        match First::decode(&plain, pages) {
            Ok(first) => first.packs.iter().for_each(|p| look.at(p.need(sealed), &mut missing)),
            Err(_) => missing.push(Need::blob(&manifest.memory.first, false)),
        }
    }
    missing
}
