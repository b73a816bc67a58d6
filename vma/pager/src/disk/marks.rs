//! Which chunks of a disk a guest has written: a file beside the disk's, true after a kill at any moment.
//!
//! ```text
//! word · table of the image's chunks · life of the memory file │ 4096 ─▶ one byte a chunk: 0, or 1 once written
//! ```
//! One byte a chunk, so that two marks never meet in one write. Marks are of one life: a guest whose memory is gone has
//! no use for what it wrote, and another must not meet it.

use crate::bits::Bits;
use crate::error::{Error, Result, io};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;
use vmatrix_model::Digest;

const WORD: &[u8; 16] = b"vmatrix-marks-1\n";
/// Bytes before the first mark.
const HEAD: u64 = 4096;

/// A memory file from its making on: what is mapped by one guest. A file system may give the place of one that is gone
/// to another, but not at the same moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Life {
    pub device: u64,
    pub inode: u64,
    pub born_ns: u64,
}

impl Life {
    /// Of the memory file at `path`, which is made, empty, if it is not there.
    ///
    /// # Errors
    /// It cannot be made, or its file system does not keep when a file was made.
    pub fn of(path: &Path) -> Result<Life> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let metadata = file.and_then(|file| file.metadata()).map_err(io("open", path))?;
        let born = metadata.created().map_err(io("look when it was made:", path))?;
        let born = born.duration_since(UNIX_EPOCH).unwrap_or_default();
        let born_ns = u64::try_from(born.as_nanos()).unwrap_or(u64::MAX);
        Ok(Life { device: metadata.dev(), inode: metadata.ino(), born_ns })
    }
}

/// The marks of one disk.
#[derive(Debug)]
pub(super) struct Marks {
    file: File,
    written: Mutex<Bits>,
}

impl Marks {
    /// Opens the marks at `path`, or makes them, for a disk of so many chunks.
    ///
    /// # Errors
    /// There are marks of another image or another guest, or they cannot be read.
    pub fn open(path: &Path, chunks: u32, table: &Digest, life: Life) -> Result<Marks> {
        let head = head(table, life);
        let whole = HEAD + u64::from(chunks);
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => {
                let has = file.metadata().map_err(io("look at", path))?.len();
                let mut found = vec![0; head.len()];
                let same = file.read_exact_at(&mut found, 0).is_ok() && found == head && has == whole;
                let written = if has < HEAD { Bits::new(chunks) } else { read(&file, path, chunks)? };
                if same {
                    return Ok(Marks { file, written: Mutex::new(written) });
                }
                // Nothing was written: nothing can be lost, or met.
                if written.len() > 0 || has > whole {
                    return Err(Error::Written { path: path.to_owned() });
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io("open", path)(e)),
        }
        make(path, &head, whole)?;
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io("open", path))?;
        Ok(Marks { file, written: Mutex::new(Bits::new(chunks)) })
    }

    /// Whether a chunk was written.
    pub fn has(&self, chunk: u32) -> bool {
        self.written().has(chunk)
    }

    /// Marks a chunk; when this returns, no kill of this process unmarks it.
    ///
    /// # Errors
    /// The file cannot be written: then it is not marked.
    pub fn set(&self, chunk: u32) -> std::io::Result<()> {
        if !self.has(chunk) {
            self.file.write_all_at(&[1], HEAD + u64::from(chunk))?;
            self.written().insert(chunk);
        }
        Ok(())
    }

    /// Chunks that are marked, in order.
    pub fn all(&self) -> Vec<u32> {
        self.written().all()
    }

    /// How many there are.
    pub fn len(&self) -> u32 {
        self.written().len()
    }

    /// Has the marks outlast the machine, too.
    ///
    /// # Errors
    /// The disk fails.
    pub fn sync(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }

    fn written(&self) -> MutexGuard<'_, Bits> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn head(table: &Digest, life: Life) -> Vec<u8> {
    let numbers = [life.device, life.inode, life.born_ns].map(u64::to_le_bytes).concat();
    [WORD.as_slice(), &table.0, &numbers].concat()
}

/// The marks that are in a file, as far as it goes.
fn read(file: &File, path: &Path, chunks: u32) -> Result<Bits> {
    let len = file.metadata().map_err(io("look at", path))?.len().saturating_sub(HEAD).min(chunks.into());
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, HEAD).map_err(io("read", path))?;
    let mut written = Bits::new(chunks);
    (0..chunks).zip(bytes).filter(|(_, byte)| *byte != 0).for_each(|(chunk, _)| _ = written.insert(chunk));
    Ok(written)
}

/// Puts an empty file there at once: there is never half a head.
fn make(path: &Path, head: &[u8], whole: u64) -> Result<()> {
    let mut next = path.to_owned().into_os_string();
    next.push(".next");
    let next = PathBuf::from(next);
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(&next).map_err(io("make", &next))?;
    // Room for all marks is taken now, so that no mark fails for want of it.
    let mut bytes = head.to_vec();
    bytes.resize(usize::try_from(whole).unwrap_or(0), 0);
    file.write_all_at(&bytes, 0).and_then(|()| file.sync_data()).map_err(io("write", &next))?;
    fs::rename(&next, path).map_err(io("replace", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Life = Life { device: 1, inode: 2, born_ns: 3 };

    #[test]
    fn what_is_marked_is_marked_for_who_comes_next() {
        let dir = tempfile::tempdir().unwrap();
        let (path, table) = (dir.path().join("marks"), Digest::of(b"table"));
        let marks = Marks::open(&path, 1000, &table, LIFE).unwrap();
        for chunk in [0, 999, 500, 500] {
            marks.set(chunk).unwrap();
        }
        drop(marks);
        let marks = Marks::open(&path, 1000, &table, LIFE).unwrap();
        assert_eq!((marks.all(), marks.len()), (vec![0, 500, 999], 3));
        assert!(!marks.has(1));
    }

    #[test]
    fn marks_of_another_image_or_another_guest_are_never_taken_for_ones_own() {
        let dir = tempfile::tempdir().unwrap();
        let (path, table) = (dir.path().join("marks"), Digest::of(b"table"));
        let other = Life { born_ns: 4, ..LIFE };
        Marks::open(&path, 10, &table, LIFE).unwrap();
        // Nothing is marked yet: nobody's.
        Marks::open(&path, 10, &table, other).unwrap().set(3).unwrap();
        for (chunks, table, life) in
            [(10, table, LIFE), (10, Digest::of(b"other"), other), (9, table, other), (11, table, other)]
        {
            let said = Marks::open(&path, chunks, &table, life).unwrap_err().to_string();
            assert!(said.contains("another guest"), "{said}");
        }
        assert_eq!(Marks::open(&path, 10, &table, other).unwrap().all(), [3]);
        for bytes in [b"".as_slice(), b"vmatrix-marks-1\n", &[0; 4096]] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(Marks::open(&path, 10, &table, other).unwrap().len(), 0);
        }
    }

    #[test]
    fn a_memory_file_that_is_made_again_is_another_life() {
        let dir = tempfile::Builder::new().tempdir_in("/dev/shm").expect("needs a tmpfs at /dev/shm");
        let path = dir.path().join("memory");
        let first = Life::of(&path).unwrap();
        fs::write(&path, b"a guest's").unwrap();
        assert_eq!(Life::of(&path).unwrap(), first);
        fs::remove_file(&path).unwrap();
        assert_ne!(Life::of(&path).unwrap(), first);
    }
}
