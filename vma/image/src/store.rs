//! Where images lie: chunks by digest, manifests by name.
//!
//! ```text
//! <store>/images/<name>.json          SignedManifest
//! <store>/chunks/<2 hex>/<64 hex>     stored (zstd) bytes, named by the BLAKE3 of the plain ones
//! <store>/keys/builder                the builder's signing key
//! ```
//!
//! # Invariants
//! 1. A file under its final name is whole: it is written beside, then renamed.
//! 2. A manifest is put after all its chunks.
//! 3. Only the owner may read: chunks hold what the guest held, keys and passwords too.

use crate::error::{Error, Result, io};
use nix::fcntl::{Flock, FlockArg};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use vmatrix_model::Digest;
use vmatrix_model::manifest::{MANIFEST_MAX, SignedManifest};

/// Largest stored chunk: zstd adds at most a few bytes a block to what does not compress.
pub const STORED_MAX: usize = crate::chunks::CHUNK_MAX + (64 << 10);

/// A directory of images.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// What a store is made of.
const FOLDERS: [&str; 3] = ["images", "chunks", "keys"];

static TEMPORARY: AtomicU64 = AtomicU64::new(0);

impl Store {
    /// Opens the store at `dir` for building, making it if it is not there; what an earlier version left
    /// for everybody to read is closed.
    ///
    /// # Errors
    /// The directory cannot be made, or belongs to somebody else.
    pub fn open(dir: impl AsRef<Path>) -> Result<Store> {
        let dir = dir.as_ref().to_owned();
        for sub in FOLDERS {
            let path = dir.join(sub);
            // Of `dir` itself only what is made here is closed: it may be a place that holds other things too.
            make_private(&path)?;
            close_to_others(&path)?;
        }
        Ok(Store { dir })
    }

    /// Opens the store at `dir` to look into it, changing nothing.
    ///
    /// # Errors
    /// [`Error::NoStore`]: there is none.
    pub fn read(dir: impl AsRef<Path>) -> Result<Store> {
        let dir = dir.as_ref().to_owned();
        if ["images", "chunks"].iter().all(|sub| dir.join(sub).is_dir()) {
            Ok(Store { dir })
        } else {
            Err(Error::NoStore { path: dir })
        }
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads the manifest of image `name`; `None` if there is none. It is not verified: see [`crate::sign::verify`].
    ///
    /// # Errors
    /// The name is not a DNS label, the file is too long, or it is not a signed manifest.
    pub fn image(&self, name: &str) -> Result<Option<SignedManifest>> {
        let path = self.image_path(name)?;
        // The text stands JSON-escaped inside the file: quotes double it at worst.
        let Some(bytes) = read_bounded(&path, 2 * MANIFEST_MAX)? else { return Ok(None) };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::BadManifest { name: name.to_owned(), problem: format!("{}: {e}", path.display()) })
    }

    /// Puts a manifest under `name`.
    ///
    /// # Errors
    /// The name is not a DNS label, or the disk is full.
    pub fn put_image(&self, name: &str, signed: &SignedManifest) -> Result<()> {
        let path = self.image_path(name)?;
        let text = serde_json::to_vec(signed)
            .map_err(|e| Error::BadManifest { name: name.to_owned(), problem: e.to_string() })?;
        write_whole(&path, &text)
    }

    /// Names of all images, sorted.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        let dir = self.dir.join("images");
        let mut names: Vec<String> = fs::read_dir(&dir)
            .map_err(io("list", &dir))?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".json").map(str::to_owned))
            .filter(|name| !name.starts_with('.'))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Reads a chunk's stored bytes. They are not verified: see [`crate::chunks::decode`].
    ///
    /// # Errors
    /// [`Error::NoChunk`] if it is not there.
    pub fn chunk(&self, digest: &Digest) -> Result<Vec<u8>> {
        read_bounded(&self.chunk_path(digest), STORED_MAX)?
            .ok_or_else(|| Error::NoChunk { digest: *digest, store: self.dir.clone() })
    }

    /// Length of a chunk's stored bytes, if it is here.
    pub fn stored(&self, digest: &Digest) -> Option<u64> {
        fs::metadata(self.chunk_path(digest)).ok().map(|m| m.len())
    }

    /// Whether a chunk is here.
    pub fn has(&self, digest: &Digest) -> bool {
        self.stored(digest).is_some()
    }

    /// Puts a chunk's stored bytes; one that is here already is left alone.
    ///
    /// # Errors
    /// The disk is full or not writable.
    pub fn put_chunk(&self, digest: &Digest, stored: &[u8]) -> Result<()> {
        let path = self.chunk_path(digest);
        if path.exists() {
            return Ok(());
        }
        write_whole(&path, stored)
    }

    /// Takes a chunk out again.
    pub(crate) fn remove_chunk(&self, digest: &Digest) {
        // One that stays is named by its content, so it is only room that is lost.
        let _ = fs::remove_file(self.chunk_path(digest));
    }

    /// Waits until no other build puts chunks into the store, and keeps others waiting while it is held.
    pub(crate) fn lock(&self) -> Result<Flock<fs::File>> {
        let path = self.dir.join(".lock");
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| io("lock", &path)(e.into()))
    }

    fn image_path(&self, name: &str) -> Result<PathBuf> {
        if !is_image_name(name) {
            return Err(Error::BadName { name: name.chars().take(80).collect() });
        }
        Ok(self.dir.join("images").join(format!("{name}.json")))
    }

    fn chunk_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_string();
        self.dir.join("chunks").join(hex.get(..2).unwrap_or("00")).join(&hex)
    }
}

/// An image is named as a service is, for it stands in paths and log lines.
pub(crate) fn is_image_name(name: &str) -> bool {
    name.parse::<vmatrix_model::ServiceId>().is_ok()
}

/// Makes a folder, and those above it that are missing, for its owner only.
pub(crate) fn make_private(path: &Path) -> Result<()> {
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

fn read_bounded(path: &Path, max: usize) -> Result<Option<Vec<u8>>> {
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

    #[test]
    fn a_chunk_that_is_too_long_is_not_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of(b"x");
        store.put_chunk(&digest, b"x").unwrap();
        fs::File::options().write(true).open(store.chunk_path(&digest)).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(store.chunk(&digest), Err(Error::TooLong { .. })));
    }
}
