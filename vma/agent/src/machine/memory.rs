//! Guests' memory on tmpfs: one folder per image, for every guest of it on this machine.
//!
//! ```text
//! memory_dir/<cell_prefix>/<16 hex of the digest>/{memory, device, key}
//! ```
//! `memory` is sparse and filled by the pager; what is in it stays after the last guest went, for the next resume,
//! as long as there is room.

use super::image::Known;
use anyhow::Context;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;
use vmatrix_model::{Bytes, ServiceId};
use vmatrix_vma_image::seal::OwnerKey;

/// What the folder of a singleton's memory begins with: no digest does.
const ONE: &str = "one-";

/// The folders of all images that have memory here.
#[derive(Debug)]
pub struct Memory {
    dir: PathBuf,
}

/// Files of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    pub dir: PathBuf,
}

impl Folder {
    /// What guests map.
    pub fn memory(&self) -> PathBuf {
        self.dir.join("memory")
    }

    /// Device state, as QEMU loads it.
    pub fn device(&self) -> PathBuf {
        self.dir.join("device")
    }

    /// The owner's key of a sealed image, for the pager.
    pub fn key(&self) -> PathBuf {
        self.dir.join("key")
    }

    /// Memory that it takes, and since when nobody has changed it.
    fn taken(&self) -> Option<(Bytes, SystemTime)> {
        let file = std::fs::metadata(self.memory()).ok()?;
        Some((Bytes(file.blocks() * 512), file.modified().ok()?))
    }
}

impl Memory {
    /// Makes the folder, for its owner only.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(dir: PathBuf) -> std::io::Result<Memory> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Memory { dir })
    }

    pub fn folder(&self, known: &Known) -> Folder {
        Folder { dir: self.dir.join(known.short()) }
    }

    /// That of a singleton's run, which writes to its memory.
    pub fn of_singleton(&self, service: &ServiceId) -> Folder {
        Folder { dir: self.dir.join(format!("{ONE}{service}")) }
    }

    /// Makes a folder with a memory file of the right size for the image: what is in one already stays.
    ///
    /// # Errors
    /// There is no room for it, or it cannot be made.
    pub fn prepare(&self, folder: &Folder, known: &Known) -> anyhow::Result<()> {
        let (path, size) = (folder.memory(), known.manifest.memory.size.0);
        let make = || {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder.dir)?;
            let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            if file.metadata()?.len() != size {
                // Another length is no memory of this image, whoever left it.
                file.set_len(0)?;
                file.set_len(size)?;
            }
            Ok::<_, std::io::Error>(())
        };
        make().with_context(|| format!("cannot make {}; is {} a tmpfs with room?", path.display(), self.dir.display()))
    }

    /// Frees the memory of an image that nothing runs from.
    ///
    /// # Errors
    /// The files cannot be removed.
    pub fn free(&self, folder: &Folder) -> anyhow::Result<()> {
        match std::fs::remove_dir_all(&folder.dir) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove {}", folder.dir.display()))
            }
            _ => Ok(()),
        }
    }

    /// Which memory that nobody uses is to be freed, the longest unused first, so that at most `room` is kept.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn surplus(&self, room: Bytes, is_used: impl Fn(&Folder) -> bool) -> anyhow::Result<Vec<Folder>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            // Whoever cleans a tmpfs takes empty folders away; it is made again with the next one in it.
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("cannot list {}", self.dir.display())),
        };
        let ones = |f: &Folder| f.dir.file_name().is_some_and(|n| n.to_string_lossy().starts_with(ONE));
        let folders = entries.filter_map(|e| Some(Folder { dir: e.ok()?.path() })).filter(|f| !ones(f) && !is_used(f));
        let nothing = (Bytes(0), SystemTime::UNIX_EPOCH);
        let mut unused: Vec<(SystemTime, Bytes, Folder)> = folders
            .map(|folder| {
                let (bytes, since) = folder.taken().unwrap_or(nothing);
                (since, bytes, folder)
            })
            .collect();
        unused.sort_by_key(|(since, ..)| std::cmp::Reverse(*since));
        let mut kept = Bytes(0);
        let mut over = |bytes: Bytes| {
            kept += bytes;
            kept > room
        };
        Ok(unused.into_iter().filter(|(_, bytes, _)| over(*bytes)).map(|(.., folder)| folder).collect())
    }
}

/// Writes a file that only its owner may read, whole or not at all.
///
/// # Errors
/// There is no room for it.
pub fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    use std::io::Write;
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let beside = path.with_extension(format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        std::fs::rename(&beside, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Writes the key, unless it is there.
///
/// # Errors
/// There is no room for it.
pub fn write_key(path: &Path, key: &OwnerKey) -> anyhow::Result<()> {
    if OwnerKey::read(path).is_ok_and(|there| there.id() == key.id()) {
        return Ok(());
    }
    let _ = std::fs::remove_file(path);
    Ok(key.write(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn filled(memory: &Memory, name: &str, used: u64) -> Folder {
        let folder = Folder { dir: memory.dir.join(name) };
        std::fs::create_dir(&folder.dir).unwrap();
        let file = std::fs::File::create(folder.memory()).unwrap();
        file.set_len(16 << 20).unwrap();
        file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
        let since = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(used);
        file.set_modified(since).unwrap();
        folder
    }

    #[test]
    fn what_was_used_last_is_kept_as_long_as_there_is_room_and_what_is_used_always() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let memory = Memory::open(dir.path().join("m")).unwrap();
        let [used, oldest, newest] = [("a", 1), ("b", 2), ("c", 3)].map(|(n, used)| filled(&memory, n, used));
        let surplus = |room| memory.surplus(Bytes(room), |f| *f == used).unwrap();
        assert_eq!(surplus(2 << 20), []);
        assert_eq!(surplus(1 << 20), std::slice::from_ref(&oldest));
        assert_eq!(surplus(0), [newest, oldest.clone()]);
        memory.free(&oldest).unwrap();
        assert!(!oldest.dir.exists() && used.memory().exists());
    }
}
