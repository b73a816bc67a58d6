//! A store in a folder of this machine.
//!
//! ```text
//! put ─▶ .PID-N.part beside, then renamed     keep ─▶ its time of change is now
//! .lock   flock: the one build that puts chunks
//! .sweep  flock: shared by puts and keeps, alone by the collector while it looks at a shard and takes out
//! ```

use super::Entry;
use crate::error::{Error, Result, io};
use nix::fcntl::{Flock, FlockArg};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// What a store is made of.
const FOLDERS: [&str; 3] = ["images", "chunks", "keys"];

static TEMPORARY: AtomicU64 = AtomicU64::new(0);

/// A lock that ends when this is dropped, or the program.
#[derive(Debug)]
pub struct Held {
    _file: Flock<fs::File>,
}

#[derive(Debug, Clone)]
pub(super) struct Folder {
    dir: PathBuf,
}

impl Folder {
    pub(super) fn open(dir: &Path) -> Result<Folder> {
        for sub in FOLDERS {
            let path = dir.join(sub);
            // Of `dir` itself only what is made here is closed: it may be a place that holds other things too.
            make_private(&path)?;
            close_to_others(&path)?;
        }
        Ok(Folder { dir: dir.to_owned() })
    }

    pub(super) fn read(dir: &Path) -> Result<Folder> {
        if ["images", "chunks"].iter().all(|sub| dir.join(sub).is_dir()) {
            Ok(Folder { dir: dir.to_owned() })
        } else {
            Err(Error::NoStore { path: dir.to_owned() })
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn get(&self, key: &str, max: usize) -> Result<Option<Vec<u8>>> {
        let path = &self.dir.join(key);
        let file = match fs::File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io("open", path)(e)),
        };
        let mut bytes = Vec::new();
        file.take(max as u64 + 1).read_to_end(&mut bytes).map_err(io("read", path))?;
        if bytes.len() > max {
            return Err(Error::TooLong { path: path.to_owned(), max });
        }
        Ok(Some(bytes))
    }

    pub(super) fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let _using = self.using()?;
        write_whole(&self.dir.join(key), bytes)
    }

    pub(super) fn keep(&self, key: &str) -> Result<Option<Entry>> {
        let path = &self.dir.join(key);
        let _using = self.using()?;
        let file = match fs::File::options().write(true).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io("open", path)(e)),
        };
        file.set_modified(SystemTime::now()).map_err(io("touch", path))?;
        entry(path, &file.metadata().map_err(io("look at", path))?).map(Some)
    }

    pub(super) fn look(&self, key: &str) -> Result<Option<Entry>> {
        let path = &self.dir.join(key);
        match fs::metadata(path) {
            Ok(metadata) => entry(path, &metadata).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io("look at", path)(e)),
        }
    }

    pub(super) fn list(&self, under: &str) -> Result<Vec<Entry>> {
        let dir = &self.dir.join(under);
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io("list", dir)(e)),
        };
        let mut all = Vec::new();
        for found in entries {
            let path = found.map_err(io("list", dir))?.path();
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_file() => all.push(entry(&path, &metadata)?),
                // A folder or a link is nobody's chunk.
                Ok(_) => {}
                // It went meanwhile: a part that was renamed, a chunk that was taken out.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(io("look at", &path)(e)),
            }
        }
        Ok(all)
    }

    pub(super) fn remove(&self, keys: &[String]) -> Result<()> {
        for key in keys {
            let path = &self.dir.join(key);
            match fs::remove_file(path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("remove", path)(e)),
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<()> {
        let dir = fs::File::open(&self.dir).map_err(io("open", &self.dir))?;
        nix::unistd::syncfs(dir).map_err(|e| io("make durable", &self.dir)(e.into()))
    }

    pub(super) fn building(&self) -> Result<Held> {
        self.hold(".lock", FlockArg::LockExclusive)
    }

    pub(super) fn using(&self) -> Result<Held> {
        self.hold(".sweep", FlockArg::LockShared)
    }

    pub(super) fn sweeping(&self) -> Result<Held> {
        self.hold(".sweep", FlockArg::LockExclusive)
    }

    fn hold(&self, name: &str, how: FlockArg) -> Result<Held> {
        let path = &self.dir.join(name);
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io("open", path))?;
        let held = Flock::lock(file, how).map_err(|(_, e)| io("lock", path)(e.into()))?;
        Ok(Held { _file: held })
    }
}

fn entry(path: &Path, metadata: &fs::Metadata) -> Result<Entry> {
    Ok(Entry {
        name: path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        length: metadata.len(),
        modified: metadata.modified().map_err(io("look at", path))?,
        version: format!("{}.{}.{}", metadata.ino(), metadata.mtime(), metadata.mtime_nsec()),
    })
}

/// Makes a folder, and those above it that are missing, for its owner only.
///
/// # Errors
/// It cannot be made.
pub fn make_private(path: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("create", path))
}

/// Takes everybody else's rights off a folder and what is in it; the folder last, so that a walk that was
/// cut short is made again.
fn close_to_others(folder: &Path) -> Result<()> {
    if fs::metadata(folder).map_err(io("look at", folder))?.permissions().mode() & 0o077 == 0 {
        return Ok(());
    }
    let set = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io("close to others", path))
    };
    for entry in fs::read_dir(folder).map_err(io("list", folder))? {
        let entry = entry.map_err(io("list", folder))?;
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => close_to_others(&entry.path())?,
            Ok(kind) if kind.is_file() => set(&entry.path(), 0o600)?,
            // A link leads elsewhere; a file that went meanwhile needs nothing.
            _ => {}
        }
    }
    set(folder, 0o700)
}

/// Writes beside `path`, then renames: a reader sees the old file or the new one, never half of it.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    make_private(parent)?;
    let number = TEMPORARY.fetch_add(1, Ordering::Relaxed);
    let beside = parent.join(format!(".{}-{number}.part", std::process::id()));
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .and_then(|mut f| f.write_all(bytes))
        .map_err(io("write", path))
        .and_then(|()| fs::rename(&beside, path).map_err(io("rename into", path)));
    if written.is_err() {
        // Nothing half-done is left; that it cannot be removed either is not the news.
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use vmatrix_model::Digest;

    fn modes(folder: &Path, all: &mut Vec<(PathBuf, u32)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            all.push((path.clone(), fs::metadata(&path).unwrap().permissions().mode() & 0o777));
            if path.is_dir() {
                modes(&path, all);
            }
        }
    }

    #[test]
    fn only_the_owner_reads_a_store_even_one_that_was_open_to_all() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("store");
        let digest = Digest::of(b"chunk");
        let old = at.join("chunks").join(&digest.to_string()[..2]);
        fs::create_dir_all(&old).unwrap();
        fs::write(old.join(digest.to_string()), b"from before").unwrap();
        let store = Store::open(&at).unwrap();
        store.put_chunk(&Digest::of(b"another"), b"new").unwrap();
        assert_eq!(store.chunk(&digest).unwrap(), b"from before");
        let mut all = Vec::new();
        modes(&at, &mut all);
        assert!(all.len() >= 7, "{all:?}");
        assert_eq!(all.iter().find(|(path, mode)| *mode != if path.is_dir() { 0o700 } else { 0o600 }), None);
    }

    #[test]
    fn a_place_that_holds_other_things_keeps_its_rights() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Store::open(dir.path()).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o755);
    }
}
