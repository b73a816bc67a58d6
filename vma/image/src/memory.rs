//! Guest memory as pages: each zero, or in one pack.
//!
//! ```text
//! memory file + order of first touch ─cut─▶ packs in the store + tables First, Rest
//! First (+ Rest, later) ─▶ Map: page ─▶ zero │ (pack, slot) │ not known yet
//! ```
//! The working set comes first and in the order it was touched, 4 KiB exact: an answer touches 1 % of a guest's
//! memory, and a chunk of neighbours would be sixteen times as much to wait for. The rest goes by address.

mod cut;
mod table;
#[cfg(test)]
mod tests;

pub use cut::{Parent, REST_PAGES, WORKING_SET_PAGES, cut};

use crate::chunks::{Need, open};
use crate::error::{Error, Result, io};
use crate::seal::OwnerKey;
use crate::store::Store;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use vmatrix_model::Digest;
use vmatrix_model::manifest::Manifest;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Most pages of a pack.
pub const PACK_PAGES_MAX: usize = 256;

/// Pages that are compressed, fetched and verified as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pack {
    pub digest: Digest,
    /// Bytes as stored.
    pub stored: u32,
    /// Which page lies in which slot; none where a later snapshot has its own.
    pub slots: Vec<Option<u32>>,
}

impl Pack {
    /// What its stored bytes must turn out to be.
    pub fn need(&self, sealed: bool) -> Need {
        Need { digest: self.digest, stored: self.stored.into(), plain: self.slots.len() as u64 * PAGE, sealed }
    }

    /// The pages it brings, with their slots.
    pub fn pages(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.slots.iter().enumerate().filter_map(|(slot, page)| Some((slot, (*page)?)))
    }
}

/// What is needed before the guest runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct First {
    /// Runs of zero pages, in order.
    pub zero: Vec<Range<u32>>,
    /// The working set, in order of first touch.
    pub packs: Vec<Pack>,
}

/// All other packs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rest {
    pub packs: Vec<Pack>,
}

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Nowhere: it is zeros.
    Zero,
    /// In a pack, by its number in [`Map::packs`], and slot.
    Pack { pack: u32, slot: u16 },
    /// In the rest, whose table is not here yet.
    Unknown,
}

/// Every page of a guest.
#[derive(Debug, Clone)]
pub struct Map {
    packs: Vec<Pack>,
    working_set: usize,
    complete: bool,
    /// By page: number of its pack, or one of the two below.
    of: Vec<u32>,
}

const ZERO: u32 = u32::MAX;
const UNKNOWN: u32 = u32::MAX - 1;

impl Map {
    /// What the first table tells of a guest of so many pages.
    ///
    /// # Errors
    /// [`Error::BadTable`]: a page that the guest does not have, or one in two places.
    pub fn new(pages: u32, first: First) -> Result<Map> {
        let mut map = Map {
            packs: Vec::new(),
            working_set: first.packs.len(),
            complete: false,
            of: vec![UNKNOWN; pages as usize],
        };
        for run in first.zero {
            for page in run {
                map.set(page, ZERO)?;
            }
        }
        map.add(first.packs)?;
        Ok(map)
    }

    /// Adds what the other table tells.
    ///
    /// # Errors
    /// [`Error::BadTable`]: as [`Map::new`], or a page is nowhere; the map then is of no use.
    pub fn complete(&mut self, rest: Rest) -> Result<()> {
        if self.complete {
            return Ok(());
        }
        self.add(rest.packs)?;
        if let Some(page) = self.of.iter().position(|of| *of == UNKNOWN) {
            return Err(bad(format!("page {page} is nowhere")));
        }
        self.complete = true;
        Ok(())
    }

    fn add(&mut self, packs: Vec<Pack>) -> Result<()> {
        for pack in packs {
            let number = u32::try_from(self.packs.len()).ok().filter(|n| *n < UNKNOWN);
            let number = number.ok_or_else(|| bad("there are too many packs".to_owned()))?;
            for (_, page) in pack.pages() {
                self.set(page, number)?;
            }
            self.packs.push(pack);
        }
        Ok(())
    }

    fn set(&mut self, page: u32, to: u32) -> Result<()> {
        match self.of.get_mut(page as usize) {
            Some(of) if *of == UNKNOWN => *of = to,
            Some(_) => return Err(bad(format!("page {page} is in two places"))),
            None => return Err(bad(format!("page {page} is past the end"))),
        }
        Ok(())
    }

    /// Where a page is; [`Of::Unknown`] for one past the end.
    pub fn of(&self, page: u32) -> Of {
        match self.of.get(page as usize).copied().unwrap_or(UNKNOWN) {
            ZERO => Of::Zero,
            UNKNOWN => Of::Unknown,
            pack => {
                let slots = self.packs.get(pack as usize).map_or(&[][..], |p| p.slots.as_slice());
                let slot = slots.iter().position(|s| *s == Some(page)).and_then(|s| u16::try_from(s).ok());
                slot.map_or(Of::Unknown, |slot| Of::Pack { pack, slot })
            }
        }
    }

    /// All packs known so far; those of the working set first.
    pub fn packs(&self) -> &[Pack] {
        &self.packs
    }

    /// How many of the packs are the working set.
    pub fn working_set(&self) -> usize {
        self.working_set
    }

    /// Whether the rest is known too.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Pages of the guest.
    pub fn pages(&self) -> u32 {
        self.of.len() as u32
    }
}

fn bad(problem: String) -> Error {
    Error::BadTable { what: "memory".to_owned(), problem }
}

/// Pages of the guest's memory, as a page number.
///
/// # Errors
/// [`Error::BadTable`]: more than a page number counts; a manifest that was verified has fewer.
pub fn pages(manifest: &Manifest) -> Result<u32> {
    u32::try_from(manifest.pages()).map_err(|_| bad(format!("{} pages are too many", manifest.pages())))
}

/// Reads both tables from a store.
///
/// # Errors
/// A chunk is missing or wrong, or [`Error::BadTable`].
pub fn map(manifest: &Manifest, store: &Store) -> Result<Map> {
    let read = |blob| {
        let need = Need::blob(blob, false);
        open(&store.chunk(&need.digest)?, &need, None)
    };
    let pages = pages(manifest)?;
    let mut map = Map::new(pages, First::decode(&read(&manifest.memory.first)?, pages)?)?;
    map.complete(Rest::decode(&read(&manifest.memory.rest)?, pages)?)?;
    Ok(map)
}

/// Writes the whole memory from a local store into a new file, sparse where it is zero.
///
/// # Errors
/// A chunk is missing or wrong, or there is no room.
pub fn assemble(manifest: &Manifest, store: &Store, key: Option<&OwnerKey>, to: &Path) -> Result<()> {
    let map = map(manifest, store)?;
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(to)
        .and_then(|f| f.set_len(manifest.memory.size.0).map(|()| f))
        .map_err(io("create", to))?;
    for pack in map.packs() {
        let need = pack.need(manifest.seal.is_some());
        let plain = open(&store.chunk(&need.digest)?, &need, key)?;
        for ((_, page), bytes) in pack.pages().zip(used(pack, &plain)) {
            file.write_all_at(bytes, u64::from(page) * PAGE).map_err(io("write", to))?;
        }
    }
    Ok(())
}

/// The bytes of the slots of a pack that are in use.
pub fn used<'a>(pack: &'a Pack, plain: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    pack.slots.iter().zip(plain.chunks(PAGE as usize)).filter(|(slot, _)| slot.is_some()).map(|(_, bytes)| bytes)
}
