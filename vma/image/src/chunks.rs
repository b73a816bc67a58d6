//! A file as chunks: cut, compressed and named by digest; fetched, verified and put back in place.
//!
//! ```text
//! file ─cut─▶ Part (a list of digests; a chunk of zeros has none) + chunks in the store
//! stored bytes ─decode─▶ plain bytes, or a refusal ─PartFile─▶ the file, sparse where it is zero
//! ```

use crate::error::{Error, Result, io};
use crate::store::Store;
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmatrix_model::manifest::{Chunk, Part, PartKind};
use vmatrix_model::{Bytes, Digest};

/// Chunk of a disk, kernel or seed: few requests, good compression.
pub const DISK_CHUNK: Bytes = Bytes(256 << 10);
/// Chunk of guest memory: smaller, for zero pages lie between used ones and a page fault waits for a whole chunk.
pub const MEMORY_CHUNK: Bytes = Bytes(64 << 10);
/// Largest chunk that is read.
pub const CHUNK_MAX: usize = 1 << 20;
/// 3 gives most of what 19 does (97.6 against some 90 MiB) at a fiftieth of the time.
const ZSTD_LEVEL: i32 = 3;

/// Cuts `file` into chunks of `chunk` bytes and puts them into the store.
///
/// # Errors
/// The file cannot be read or the store is full.
pub fn cut(file: &Path, kind: PartKind, chunk: Bytes, store: &Store) -> Result<Part> {
    cut_noting(file, kind, chunk, store, &mut Vec::new())
}

/// As [`cut`]; `new` gets the chunks that the store did not have, also if it ends in an error.
pub(crate) fn cut_noting(
    file: &Path,
    kind: PartKind,
    chunk: Bytes,
    store: &Store,
    new: &mut Vec<Digest>,
) -> Result<Part> {
    let source = File::open(file).map_err(io("open", file))?;
    let size = source.metadata().map_err(io("look at", file))?.len();
    let mut plain = vec![0; usize::try_from(chunk.0).unwrap_or(CHUNK_MAX).min(CHUNK_MAX)];
    let mut chunks = Vec::new();
    let mut offset = 0;
    while offset < size {
        let length = (size - offset).min(plain.len() as u64);
        let here = plain.get_mut(..length as usize).unwrap_or_default();
        source.read_exact_at(here, offset).map_err(io("read", file))?;
        chunks.push(put(here, store, new)?);
        offset += length;
    }
    Ok(Part { kind, size: Bytes(size), chunk, chunks })
}

fn put(plain: &[u8], store: &Store, new: &mut Vec<Digest>) -> Result<Option<Chunk>> {
    if is_zero(plain) {
        return Ok(None);
    }
    let digest = Digest::of(plain);
    if let Some(stored) = store.stored(&digest) {
        return Ok(Some(Chunk { digest, stored: Bytes(stored) }));
    }
    let stored = zstd::bulk::compress(plain, ZSTD_LEVEL)
        .map_err(|e| Error::BadChunk { digest, problem: format!("cannot be compressed: {e}") })?;
    store.put_chunk(&digest, &stored)?;
    new.push(digest);
    Ok(Some(Chunk { digest, stored: Bytes(stored.len() as u64) }))
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}

/// Unpacks a stored chunk, of which exactly `plain` bytes with the right digest must come.
///
/// # Errors
/// [`Error::BadChunk`]: wrong length before or after, not zstd, or another digest. Never allocates
/// more than `plain` bytes, whatever the chunk claims to hold.
pub fn decode(stored: &[u8], chunk: &Chunk, plain: Bytes) -> Result<Vec<u8>> {
    let bad = |problem: String| Error::BadChunk { digest: chunk.digest, problem };
    if stored.len() as u64 != chunk.stored.0 {
        return Err(bad(format!("{} bytes are stored, the manifest says {}", stored.len(), chunk.stored.0)));
    }
    let length = usize::try_from(plain.0).ok().filter(|l| *l <= CHUNK_MAX);
    let length = length.ok_or_else(|| bad(format!("{plain} are more than a chunk may hold")))?;
    let bytes = zstd::bulk::decompress(stored, length).map_err(|e| bad(format!("cannot be unpacked: {e}")))?;
    if bytes.len() != length {
        return Err(bad(format!("holds {} bytes, not {length}", bytes.len())));
    }
    if Digest::of(&bytes) != chunk.digest {
        return Err(bad("its bytes have another digest".to_owned()));
    }
    Ok(bytes)
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
    missing: Mutex<BTreeSet<usize>>,
}

impl PartFile {
    /// Opens or makes the file, for its owner only, and finds out which chunks it already holds.
    ///
    /// # Errors
    /// The file cannot be made or read.
    pub fn create(path: &Path, part: &Part) -> Result<PartFile> {
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
        for (index, chunk) in part.chunks.iter().enumerate() {
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
        Ok(PartFile { path: path.to_owned(), file, part: part.clone(), missing: Mutex::new(missing) })
    }

    /// The chunks still to come, by index, in order.
    pub fn missing(&self) -> Vec<(usize, Chunk)> {
        self.lock().iter().filter_map(|i| Some((*i, (*self.part.chunks.get(*i)?)?))).collect()
    }

    /// Verifies a stored chunk and writes it where it belongs. May be called from several threads.
    ///
    /// # Errors
    /// [`Error::BadChunk`] if it is not what the manifest says, [`Error::DiskFull`].
    pub fn put(&self, index: usize, stored: &[u8]) -> Result<()> {
        let Some(Some(chunk)) = self.part.chunks.get(index) else { return Ok(()) };
        let plain = decode(stored, chunk, plain_length(&self.part, index))?;
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
            return Err(Error::Incomplete { path: self.path.clone(), missing, total: self.part.chunks.len() });
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
    let file = PartFile::create(path, part)?;
    for (index, chunk) in file.missing() {
        file.put(index, &store.chunk(&chunk.digest)?)?;
    }
    file.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        (dir, store)
    }

    /// Three chunks: bytes, zeros, and a short last one.
    fn sample(dir: &Path) -> (PathBuf, Vec<u8>) {
        let mut bytes: Vec<u8> = (0..4096u32).map(|i| (i % 251) as u8).collect();
        bytes.extend([0; 4096]);
        bytes.extend([7; 100]);
        let file = dir.join("plain");
        std::fs::write(&file, &bytes).unwrap();
        (file, bytes)
    }

    #[test]
    fn what_is_cut_comes_back_the_same_and_zeros_are_not_stored() {
        let (dir, store) = store();
        let (file, bytes) = sample(dir.path());
        let part = cut(&file, PartKind::Disk, Bytes(4096), &store).unwrap();
        assert_eq!(part.chunks.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true]);
        let back = dir.path().join("back");
        assemble(&part, &store, &back).unwrap();
        assert_eq!(std::fs::read(&back).unwrap(), bytes);
    }

    #[test]
    fn a_staged_part_is_for_its_owner_only_even_one_begun_open_to_all() {
        let (dir, store) = store();
        let (file, _) = sample(dir.path());
        let part = cut(&file, PartKind::Memory, Bytes(4096), &store).unwrap();
        let (new, old) = (dir.path().join("new"), dir.path().join("old"));
        std::fs::write(&old, b"begun").unwrap();
        std::fs::set_permissions(&old, Permissions::from_mode(0o644)).unwrap();
        for path in [new, old] {
            assemble(&part, &store, &path).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
        }
    }

    #[test]
    fn an_interrupted_staging_goes_on_from_what_is_whole() {
        let (dir, store) = store();
        let (file, bytes) = sample(dir.path());
        let part = cut(&file, PartKind::Disk, Bytes(4096), &store).unwrap();
        let back = dir.path().join("back");
        let half = PartFile::create(&back, &part).unwrap();
        let (index, chunk) = half.missing()[0];
        half.put(index, &store.chunk(&chunk.digest).unwrap()).unwrap();
        assert!(matches!(half.finish(), Err(Error::Incomplete { missing: 1, total: 3, .. })));
        let rest = PartFile::create(&back, &part).unwrap();
        assert_eq!(rest.missing().iter().map(|(i, _)| *i).collect::<Vec<_>>(), [2]);
        drop(rest);
        // What a torn write left behind is fetched anew; what should be zeros is made zeros.
        let mut torn = bytes.clone();
        torn[17] ^= 1;
        torn[5000] = 9;
        std::fs::write(&back, &torn).unwrap();
        assert_eq!(PartFile::create(&back, &part).unwrap().missing().len(), 1);
        assemble(&part, &store, &back).unwrap();
        assert_eq!(std::fs::read(&back).unwrap(), bytes);
    }

    #[test]
    fn a_chunk_that_is_not_what_the_manifest_says_is_refused() {
        let plain = vec![5; 4096];
        let stored = zstd::bulk::compress(&plain, 3).unwrap();
        let chunk = Chunk { digest: Digest::of(&plain), stored: Bytes(stored.len() as u64) };
        assert_eq!(decode(&stored, &chunk, Bytes(4096)).unwrap(), plain);
        let refused =
            |stored: &[u8], chunk: Chunk, plain: u64| decode(stored, &chunk, Bytes(plain)).unwrap_err().to_string();
        let other = Chunk { digest: Digest::of(b"other"), ..chunk };
        assert!(refused(&stored, other, 4096).contains("another digest"));
        assert!(refused(&stored[1..], chunk, 4096).contains("bytes are stored"), "truncated");
        let shorter = Chunk { stored: Bytes(chunk.stored.0 - 1), ..chunk };
        assert!(refused(&stored[..stored.len() - 1], shorter, 4096).contains("cannot be unpacked"));
        assert!(refused(&stored, chunk, 8192).contains("holds 4096 bytes"));
        assert!(refused(&stored, chunk, 1 << 40).contains("more than a chunk may hold"));
    }

    #[test]
    fn a_zstd_bomb_never_gets_more_room_than_its_chunk() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        assert!(bomb.len() < 16 << 10, "not much of a bomb");
        let chunk = Chunk { digest: Digest::of(b""), stored: Bytes(bomb.len() as u64) };
        assert!(decode(&bomb, &chunk, Bytes(4096)).unwrap_err().to_string().contains("cannot be unpacked"));
    }

    #[test]
    fn machine_a_full_disk_is_named() {
        let full = Path::new("/dev/full");
        let file = OpenOptions::new().write(true).open(full).unwrap();
        let error = file.write_all_at(b"x", 0).map_err(io("write", full)).unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error}");
        assert!(error.to_string().contains("no space left to write /dev/full"));
    }
}
