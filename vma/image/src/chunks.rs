//! Bytes as chunks: cut, compressed, sealed and named by digest; fetched, verified and put back in place.
//!
//! ```text
//! plain ─close─▶ stored bytes (zstd, sealed where the image is) + Need (what they must turn out to be)
//! stored bytes ─open─▶ plain, or a refusal
//! file ─Cutter─▶ chunks in the store + Part, whose table lists them (a chunk of zeros has no entry)
//! parent's Part + what was written ─Cutter─▶ those chunks in the store + Part
//! table + chunks ─PartFile─▶ the file, sparse where it is zero
//! ```

use crate::error::{Error, Result, io};
use crate::seal::OwnerKey;
use crate::store::Store;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmatrix_model::manifest::{Blob, Chunk, Part, PartKind};
use vmatrix_model::{Bytes, Digest};

/// Chunk of a disk, kernel or seed: few requests, good compression.
pub const DISK_CHUNK: Bytes = Bytes(256 << 10);
/// Chunk of a disk that is written: a page that changes makes one new, so it is smaller.
pub const DATA_CHUNK: Bytes = Bytes(64 << 10);
/// Largest chunk of a part.
pub const CHUNK_MAX: usize = 1 << 20;
/// Largest blob: the table of the largest guest memory has 50 MiB.
pub const BLOB_MAX: usize = 64 << 20;
/// What zstd and a seal may add to bytes that do not compress.
pub const STORED_MORE: usize = 64 << 10;
/// 3 gives most of what 19 does (97.6 against some 90 MiB) at a fiftieth of the time.
const ZSTD_LEVEL: i32 = 3;

/// What a stored chunk must turn out to be; from a signed manifest, or a table it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Need {
    /// Of the plain bytes; keyed by the owner's key where sealed, so that it tells nothing about them.
    pub digest: Digest,
    /// Bytes as stored.
    pub stored: u64,
    /// Bytes when opened.
    pub plain: u64,
    pub sealed: bool,
}

impl Need {
    /// A blob that the manifest names.
    pub fn blob(blob: &Blob, sealed: bool) -> Need {
        Need { digest: blob.digest, stored: blob.stored.0, plain: blob.plain.0, sealed }
    }

    /// Chunk `index` of a part.
    pub fn part(part: &Part, index: usize, chunk: &Chunk) -> Need {
        Need { digest: chunk.digest, stored: chunk.stored.0, plain: plain_length(part, index).0, sealed: false }
    }
}

/// Stored bytes ─▶ plain bytes, of which exactly as many as needed with the right digest must come.
///
/// How many bytes are stored may differ from what `need` says: a digest names plain bytes, and two images of two
/// versions of zstd share it with one stored chunk, which only one of them can have described. What is read stays
/// bounded all the same, by the plain bytes and [`STORED_MORE`]; what comes out, by `need` alone.
///
/// # Errors
/// [`Error::BadChunk`]: more bytes than any packing of it has, another seal, not zstd, or another length or digest
/// when opened. Never allocates more than `need` declares, whatever the chunk claims to hold.
pub fn open(stored: &[u8], need: &Need, key: Option<&OwnerKey>) -> Result<Vec<u8>> {
    let bad = |problem: String| Error::BadChunk { digest: need.digest, problem };
    if stored.len() as u64 > need.plain.saturating_add(STORED_MORE as u64) {
        return Err(bad(format!("{} bytes are stored, too many for {} of a chunk", stored.len(), need.plain)));
    }
    let length = usize::try_from(need.plain).ok().filter(|l| *l <= BLOB_MAX);
    let length = length.ok_or_else(|| bad(format!("{} bytes are more than a chunk may hold", need.plain)))?;
    let key = match (need.sealed, key) {
        (false, _) => None,
        (true, Some(key)) => Some(key),
        (true, None) => return Err(bad("it is sealed, and its owner's key is not here".to_owned())),
    };
    let opened;
    let packed = match key {
        Some(key) => {
            opened = key.open(&need.digest, stored)?;
            opened.as_slice()
        }
        None => stored,
    };
    let bytes = zstd::bulk::decompress(packed, length).map_err(|e| bad(format!("cannot be unpacked: {e}")))?;
    if bytes.len() != length {
        return Err(bad(format!("holds {} bytes, not {length}", bytes.len())));
    }
    if name(&bytes, key) != need.digest {
        return Err(bad("its bytes have another digest".to_owned()));
    }
    Ok(bytes)
}

/// Plain bytes ─▶ what is stored of them, and what that must open to.
///
/// # Errors
/// zstd or the seal refuses, which neither does for bytes of a chunk's length.
pub fn close(plain: &[u8], key: Option<&OwnerKey>) -> Result<(Need, Vec<u8>)> {
    let digest = name(plain, key);
    let packed = zstd::bulk::compress(plain, ZSTD_LEVEL)
        .map_err(|e| Error::BadChunk { digest, problem: format!("cannot be compressed: {e}") })?;
    let stored = match key {
        Some(key) => key.seal(&digest, &packed)?,
        None => packed,
    };
    let need = Need { digest, stored: stored.len() as u64, plain: plain.len() as u64, sealed: key.is_some() };
    Ok((need, stored))
}

fn name(plain: &[u8], key: Option<&OwnerKey>) -> Digest {
    key.map_or_else(|| Digest::of(plain), |key| key.digest(plain))
}

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}

/// Cuts what an image is made of and puts it into a store. Remembers what the store did not have before, so
/// that a build that fails can take it out again.
pub struct Cutter<'a> {
    store: &'a Store,
    key: Option<&'a OwnerKey>,
    new: Mutex<Vec<Digest>>,
}

impl<'a> Cutter<'a> {
    /// One that seals memory and device state with `key`, if there is one.
    pub fn new(store: &'a Store, key: Option<&'a OwnerKey>) -> Cutter<'a> {
        Cutter { store, key, new: Mutex::default() }
    }

    /// Takes out of the store what was put into it.
    pub fn undo(self) {
        let new = self.new.into_inner().unwrap_or_else(PoisonError::into_inner);
        new.iter().for_each(|digest| self.store.remove_chunk(digest));
    }

    /// Puts bytes as one chunk; `sealed` where they are the guest's secrets and there is a key.
    ///
    /// # Errors
    /// The store is full or cannot be written.
    pub fn put(&self, plain: &[u8], sealed: bool) -> Result<Need> {
        let key = self.key.filter(|_| sealed);
        let digest = name(plain, key);
        // Kept young: what was about to be collected is needed again.
        if let Some(stored) = self.store.keep(&digest) {
            return Ok(Need { digest, stored, plain: plain.len() as u64, sealed: key.is_some() });
        }
        let (need, stored) = close(plain, key)?;
        self.store.put_chunk(&digest, &stored)?;
        self.new.lock().unwrap_or_else(PoisonError::into_inner).push(digest);
        Ok(need)
    }

    /// Puts bytes as a blob that the manifest names.
    ///
    /// # Errors
    /// They are more than [`BLOB_MAX`], or the store is full.
    pub fn blob(&self, plain: &[u8], sealed: bool) -> Result<Blob> {
        if plain.len() > BLOB_MAX {
            let problem = format!("{} bytes are more than the {BLOB_MAX} a blob may hold", plain.len());
            return Err(Error::BadChunk { digest: Digest::of(b""), problem });
        }
        let need = self.put(plain, sealed)?;
        Ok(Blob { digest: need.digest, stored: Bytes(need.stored), plain: Bytes(need.plain) })
    }

    /// Cuts `file` into chunks of `chunk` bytes.
    ///
    /// # Errors
    /// The file cannot be read, or the store is full.
    pub fn part(&self, file: &Path, kind: PartKind, chunk: Bytes) -> Result<Part> {
        let source = File::open(file).map_err(io("open", file))?;
        let size = source.metadata().map_err(io("look at", file))?.len();
        let mut plain = vec![0; usize::try_from(chunk.0).unwrap_or(CHUNK_MAX).min(CHUNK_MAX)];
        let mut chunks = Vec::new();
        let mut offset = 0;
        while offset < size {
            let length = (size - offset).min(plain.len() as u64);
            let here = plain.get_mut(..length as usize).unwrap_or_default();
            source.read_exact_at(here, offset).map_err(io("read", file))?;
            chunks.push(self.chunk(here)?);
            offset += length;
        }
        let table = self.blob(&encode_table(&chunks), false)?;
        Ok(Part { kind, size: Bytes(size), chunk, table, stored: stored(&chunks) })
    }
}

impl Cutter<'_> {
    /// The part that `parent` is once the chunks of these indexes are as `file` has them: only they are cut, the others
    /// stay the parent's and need not be in the file. The parent's table must be in the store.
    ///
    /// # Errors
    /// The file is of another length or cannot be read, the table is not there, an index is past the part's end, or
    /// the store is full.
    pub fn changed(&self, parent: &Part, file: &Path, indexes: &[u32]) -> Result<Part> {
        let bad = |problem: String| Error::BadTable { what: format!("{:?}", parent.kind), problem };
        let mut chunks = table(parent, self.store)?;
        let source = File::open(file).map_err(io("open", file))?;
        let size = source.metadata().map_err(io("look at", file))?.len();
        if size != parent.size.0 {
            return Err(bad(format!("{} has {size} bytes, the part {}", file.display(), parent.size.0)));
        }
        let mut plain = vec![0; usize::try_from(parent.chunk.0).unwrap_or(CHUNK_MAX).min(CHUNK_MAX)];
        let count = chunks.len();
        for index in indexes {
            let index = *index as usize;
            let chunk = chunks.get_mut(index).ok_or_else(|| bad(format!("it has {count} chunks, none is {index}")))?;
            let here = plain.get_mut(..plain_length(parent, index).0 as usize).unwrap_or_default();
            source.read_exact_at(here, offset(parent, index)).map_err(io("read", file))?;
            *chunk = self.chunk(here)?;
        }
        let table = self.blob(&encode_table(&chunks), false)?;
        Ok(Part { table, stored: stored(&chunks), ..parent.clone() })
    }

    /// Puts a chunk of a part, which is none where it is zeros.
    fn chunk(&self, plain: &[u8]) -> Result<Option<Chunk>> {
        if is_zero(plain) {
            return Ok(None);
        }
        let need = self.put(plain, false)?;
        Ok(Some(Chunk { digest: need.digest, stored: Bytes(need.stored) }))
    }
}

/// Stored bytes of a list, each chunk counted once.
fn stored(chunks: &[Option<Chunk>]) -> Bytes {
    let unique: BTreeMap<Digest, Bytes> = chunks.iter().flatten().map(|c| (c.digest, c.stored)).collect();
    unique.into_values().sum()
}

/// The table of a part: for each chunk its stored bytes, 4 bytes little endian, 0 for zeros; then its digest.
fn encode_table(chunks: &[Option<Chunk>]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(chunks.len() * 36);
    for chunk in chunks {
        let stored = chunk.map_or(0, |c| u32::try_from(c.stored.0).unwrap_or(u32::MAX));
        bytes.extend(stored.to_le_bytes());
        bytes.extend(chunk.iter().flat_map(|c| c.digest.0));
    }
    bytes
}

/// Reads a part's table.
///
/// # Errors
/// [`Error::BadTable`]: it ends too early or too late, or a chunk has more bytes than any may have.
pub fn decode_table(part: &Part, plain: &[u8]) -> Result<Vec<Option<Chunk>>> {
    let bad = |problem: String| Error::BadTable { what: format!("{:?}", part.kind), problem };
    let count = part.size.0.div_ceil(part.chunk.0.max(1));
    let mut rest = plain;
    let mut chunks = Vec::new();
    for index in 0..count {
        let (stored, after) =
            rest.split_first_chunk::<4>().ok_or_else(|| bad(format!("it ends at chunk {index} of {count}")))?;
        let stored = u32::from_le_bytes(*stored);
        rest = after;
        if stored == 0 {
            chunks.push(None);
            continue;
        }
        let (digest, after) =
            rest.split_first_chunk::<32>().ok_or_else(|| bad(format!("it ends at chunk {index} of {count}")))?;
        rest = after;
        if stored as usize > CHUNK_MAX + STORED_MORE {
            return Err(bad(format!("chunk {index} has {stored} stored bytes")));
        }
        chunks.push(Some(Chunk { digest: Digest(*digest), stored: Bytes(stored.into()) }));
    }
    if rest.is_empty() { Ok(chunks) } else { Err(bad(format!("{} bytes follow its last chunk", rest.len()))) }
}

/// Reads a part's table from a store.
///
/// # Errors
/// As [`open`] and [`decode_table`].
pub fn table(part: &Part, store: &Store) -> Result<Vec<Option<Chunk>>> {
    let need = Need::blob(&part.table, false);
    decode_table(part, &open(&store.chunk(&need.digest)?, &need, None)?)
}

/// Where chunk `index` of a part begins in its file.
fn offset(part: &Part, index: usize) -> u64 {
    (index as u64).saturating_mul(part.chunk.0)
}

/// Plain bytes of chunk `index` of a part.
pub fn plain_length(part: &Part, index: usize) -> Bytes {
    Bytes(part.size.0.saturating_sub(offset(part, index)).min(part.chunk.0))
}

/// A part's file while its chunks come in, in any order.
///
/// What is present is read from the file itself, by digest: after a crash there is no list to be wrong.
#[derive(Debug)]
pub struct PartFile {
    path: PathBuf,
    file: File,
    part: Part,
    chunks: Vec<Option<Chunk>>,
    missing: Mutex<BTreeSet<usize>>,
}

impl PartFile {
    /// Opens or makes the file, for its owner only, and finds out which of its `chunks` it already holds.
    ///
    /// # Errors
    /// The file cannot be made or read.
    pub fn create(path: &Path, part: &Part, chunks: Vec<Option<Chunk>>) -> Result<PartFile> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io("create", path))?;
        // One that an earlier version made was open to all.
        file.set_permissions(Permissions::from_mode(0o600)).map_err(io("close to others", path))?;
        let before = file.metadata().map_err(io("look at", path))?.len();
        let fresh = before != part.size.0;
        if fresh {
            // Another length is another image's file, or one that was never begun.
            file.set_len(0).and_then(|()| file.set_len(part.size.0)).map_err(io("size", path))?;
        }
        let mut missing = BTreeSet::new();
        let mut held = vec![0; usize::try_from(part.chunk.0).unwrap_or(CHUNK_MAX).min(CHUNK_MAX)];
        for (index, chunk) in chunks.iter().enumerate() {
            let length = plain_length(part, index).0 as usize;
            let offset = offset(part, index);
            let here = held.get_mut(..length).unwrap_or_default();
            if !fresh {
                file.read_exact_at(here, offset).map_err(io("read", path))?;
            }
            match chunk {
                Some(c) if fresh || is_zero(here) || Digest::of(here) != c.digest => {
                    missing.insert(index);
                }
                None if !fresh && !is_zero(here) => {
                    here.fill(0);
                    file.write_all_at(here, offset).map_err(io("write", path))?;
                }
                _ => {}
            }
        }
        Ok(PartFile { path: path.to_owned(), file, part: part.clone(), chunks, missing: Mutex::new(missing) })
    }

    /// The chunks still to come, by index, in order.
    pub fn missing(&self) -> Vec<(usize, Chunk)> {
        self.lock().iter().filter_map(|i| Some((*i, (*self.chunks.get(*i)?)?))).collect()
    }

    /// Verifies a stored chunk and writes it where it belongs. May be called from several threads.
    ///
    /// # Errors
    /// [`Error::BadChunk`] if it is not what the manifest says, [`Error::DiskFull`].
    pub fn put(&self, index: usize, stored: &[u8]) -> Result<()> {
        let Some(Some(chunk)) = self.chunks.get(index) else { return Ok(()) };
        let plain = open(stored, &Need::part(&self.part, index, chunk), None)?;
        self.file.write_all_at(&plain, offset(&self.part, index)).map_err(io("write", &self.path))?;
        self.lock().remove(&index);
        Ok(())
    }

    /// Ends the writing.
    ///
    /// # Errors
    /// [`Error::Incomplete`] if chunks are missing.
    pub fn finish(self) -> Result<()> {
        let missing = self.lock().len();
        if missing > 0 {
            return Err(Error::Incomplete { path: self.path.clone(), missing, total: self.chunks.len() });
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        // The set is whole at every step, so a panic elsewhere leaves nothing to distrust.
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes a whole part from a local store.
///
/// # Errors
/// A chunk is missing or wrong, or the disk is full.
pub fn assemble(part: &Part, store: &Store, path: &Path) -> Result<()> {
    let file = PartFile::create(path, part, table(part, store)?)?;
    for (index, chunk) in file.missing() {
        file.put(index, &store.chunk(&chunk.digest)?)?;
    }
    file.finish()
}

#[cfg(test)]
mod tests;
