//! Where images lie: chunks by digest, manifests by name.
//!
//! ```text
//! <store>/images/<name>.json          SignedManifest
//! <store>/chunks/<2 hex>/<64 hex>     stored (zstd) bytes, named by the BLAKE3 of the plain ones
//! <store>/keys/builder                the builder's signing key, 0600
//! ```
//!
//! # Invariants
//! 1. A file under its final name is whole: it is written beside, then renamed.
//! 2. A manifest is put after all its chunks.

use crate::error::{Error, Result, io};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
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

static TEMPORARY: AtomicU64 = AtomicU64::new(0);

impl Store {
    /// Opens the store at `dir`, making it if it is not there.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(dir: impl AsRef<Path>) -> Result<Store> {
        let dir = dir.as_ref().to_owned();
        for sub in ["images", "chunks"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(io("create", &path))?;
        }
        Ok(Store { dir })
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
        write_whole(&path, &text, 0o644)
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
        write_whole(&path, stored, 0o644)
    }

    fn image_path(&self, name: &str) -> Result<PathBuf> {
        name.parse::<vmatrix_model::ServiceId>()
            .map_err(|e| Error::BadManifest { name: name.chars().take(80).collect(), problem: e.to_string() })?;
        Ok(self.dir.join("images").join(format!("{name}.json")))
    }

    fn chunk_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_string();
        self.dir.join("chunks").join(hex.get(..2).unwrap_or("00")).join(&hex)
    }
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
        return Err(Error::BadManifest {
            name: path.display().to_string(),
            problem: format!("longer than the {max} bytes it may have"),
        });
    }
    Ok(Some(bytes))
}

/// Writes beside `path`, then renames: a reader sees the old file or the new one, never half of it.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io("create", parent))?;
    let number = TEMPORARY.fetch_add(1, Ordering::Relaxed);
    let beside = parent.join(format!(".{}-{number}.part", std::process::id()));
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
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
