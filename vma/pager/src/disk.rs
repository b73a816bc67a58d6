//! A disk that arrives as it is read: chunks ─▶ one sparse file, each verified before a byte of it is given out.
//!
//! ```text
//! read(offset, len) ─▶ chunks of it ─▶ in the file? (by digest, once) ─no─▶ fetch ─▶ write ─▶ read from the file
//! ```
//! What a file of an earlier process holds is not believed but compared, chunk by chunk, when it is first read: so
//! it does not matter how that process ended.

use crate::bits::Bits;
use crate::engine::Fetch;
use crate::error::{Error, Result, io, sys};
use crate::state::Class;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Whence, lseek64};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Mutex as Turn, watch};
use tokio::time::{Instant, sleep, timeout_at};
use vmatrix_model::Digest;
use vmatrix_model::manifest::{Chunk, Part};
use vmatrix_vma_image::chunks::{Need, plain_length};

/// Chunks that can be fetched at once; two that fall on the same place wait for each other.
const TURNS: usize = 64;
/// Between attempts to fetch a chunk.
const AGAIN: Duration = Duration::from_millis(250);
/// A read that waits longer than this fails: the guest sees a disk that does not answer.
const READ_LIMIT: Duration = Duration::from_secs(60);

/// The disk part of an image.
pub(crate) struct Disk {
    path: PathBuf,
    file: Arc<Flock<File>>,
    part: Part,
    /// Its table, once that is here.
    chunks: watch::Receiver<Option<Arc<Vec<Option<Chunk>>>>>,
    fetch: Fetch,
    /// Chunks that the file is known to hold.
    held: Mutex<Bits>,
    turns: Vec<Turn<()>>,
    /// Since when somebody waits for a chunk that does not come, and why it does not.
    trouble: Mutex<Option<(Instant, String)>>,
}

/// Why a read has no bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoRead {
    /// Past the end.
    Outside,
    /// They cannot be had.
    Failed,
}

impl Disk {
    /// Opens the file that keeps what is read, or makes it, for its owner only.
    ///
    /// # Errors
    /// Another pager has it, or it cannot be made.
    pub fn open(
        path: &Path,
        part: Part,
        chunks: watch::Receiver<Option<Arc<Vec<Option<Chunk>>>>>,
        fetch: Fetch,
    ) -> Result<Disk> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = Flock::lock(file.map_err(io("open", path))?, FlockArg::LockExclusiveNonblock);
        let file = file.map_err(|(_, e)| match e {
            Errno::EWOULDBLOCK => Error::Taken { path: path.to_owned() },
            e => sys("lock", path)(e),
        })?;
        file.set_len(part.size.0).map_err(io("size", path))?;
        let count = u32::try_from(part.size.0.div_ceil(part.chunk.0.max(1))).unwrap_or(u32::MAX);
        Ok(Disk {
            path: path.to_owned(),
            file: Arc::new(file),
            part,
            chunks,
            fetch,
            held: Mutex::new(Bits::new(count)),
            turns: (0..TURNS).map(|_| Turn::new(())).collect(),
            trouble: Mutex::default(),
        })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.part.size.0
    }

    /// Since when reads have been waiting without success, and why.
    pub fn trouble(&self) -> Option<(Duration, String)> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.as_ref().map(|(since, why)| (since.elapsed(), why.clone()))
    }

    /// Bytes of the disk from `offset` on.
    ///
    /// # Errors
    /// [`NoRead`]
    pub async fn read(&self, offset: u64, len: u32) -> std::result::Result<Vec<u8>, NoRead> {
        let end = offset.checked_add(len.into()).filter(|end| *end <= self.size()).ok_or(NoRead::Outside)?;
        let deadline = Instant::now() + READ_LIMIT;
        let mut table = self.chunks.clone();
        let chunks = match timeout_at(deadline, table.wait_for(Option::is_some)).await {
            Ok(Ok(chunks)) => chunks.clone().ok_or(NoRead::Failed)?,
            _ => return Err(NoRead::Failed),
        };
        let mut bytes = vec![0; len as usize];
        let mut at = offset;
        while at < end {
            let index = (at / self.part.chunk.0) as usize;
            let until = (at - at % self.part.chunk.0 + self.part.chunk.0).min(end);
            let here = bytes.get_mut((at - offset) as usize..(until - offset) as usize).unwrap_or_default();
            // A chunk of zeros is not read from the file, whatever that holds there.
            if let Some(chunk) = chunks.get(index).copied().flatten() {
                let read = match self.hold(index, chunk, deadline).await? {
                    // The file did not take it.
                    Some(plain) => {
                        let from = (at % self.part.chunk.0) as usize;
                        plain.get(from..from + here.len()).ok_or(NoRead::Failed)?.to_vec()
                    }
                    None => self.read_held(at, here.len()).await?,
                };
                here.copy_from_slice(&read);
            }
            at = until;
        }
        Ok(bytes)
    }

    async fn read_held(&self, at: u64, len: usize) -> std::result::Result<Vec<u8>, NoRead> {
        let file = self.file.clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at).map(|()| bytes)
        });
        read.await.map_err(|_| NoRead::Failed)?.map_err(|e| {
            tracing::error!(path = %self.path.display(), error = %e, "cannot read what was kept of a disk");
            NoRead::Failed
        })
    }

    /// Has the file hold a chunk; gives its bytes back where the file does not take them, for want of room.
    async fn hold(
        &self,
        index: usize,
        chunk: Chunk,
        deadline: Instant,
    ) -> std::result::Result<Option<Vec<u8>>, NoRead> {
        if self.is_held(index) {
            return Ok(None);
        }
        let turn = self.turns.get(index % TURNS).ok_or(NoRead::Failed)?;
        let _turn = timeout_at(deadline, turn.lock()).await.map_err(|_| NoRead::Failed)?;
        if self.is_held(index) {
            return Ok(None);
        }
        let (file, at, len) = (self.file.clone(), index as u64 * self.part.chunk.0, plain_length(&self.part, index).0);
        let holds = move || holds(&file, at, len, &chunk.digest);
        if !tokio::task::spawn_blocking(holds).await.unwrap_or(false) {
            let fetched = self.fetched(index, chunk, deadline).await;
            // Whoever waits next will say so again.
            *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let (plain, file) = (fetched?, self.file.clone());
            let written = tokio::task::spawn_blocking(move || (file.write_all_at(&plain, at), plain));
            let (written, plain) = written.await.map_err(|_| NoRead::Failed)?;
            if let Err(e) = written {
                tracing::warn!(path = %self.path.display(), error = %e, "cannot keep what is read of a disk");
                return Ok(Some(plain));
            }
        }
        self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(index as u32);
        Ok(None)
    }

    async fn fetched(&self, index: usize, chunk: Chunk, deadline: Instant) -> std::result::Result<Vec<u8>, NoRead> {
        let (need, began) = (Need::part(&self.part, index, &chunk), Instant::now());
        loop {
            match timeout_at(deadline, (self.fetch)(need, Class::Miss)).await {
                Ok(Ok(plain)) if plain.len() as u64 == need.plain => return Ok(plain),
                Ok(result) => {
                    let why = result.err().unwrap_or_else(|| "it has another length".to_owned());
                    let why = format!("disk chunk {}: {why}", chunk.digest);
                    tracing::debug!(why, "a chunk of the disk did not come");
                    let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
                    let since = trouble.as_ref().map_or(began, |(since, _)| *since);
                    *trouble = Some((since, why));
                }
                Err(_) => return Err(NoRead::Failed),
            }
            if Instant::now() + AGAIN > deadline {
                return Err(NoRead::Failed);
            }
            sleep(AGAIN).await;
        }
    }

    fn is_held(&self, index: usize) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).has(index as u32)
    }
}

/// Whether the file has the chunk of this digest there, whole.
fn holds(file: &File, at: u64, len: u64, digest: &Digest) -> bool {
    // A hole is not worth reading.
    let data = lseek64(file, i64::try_from(at).unwrap_or(i64::MAX), Whence::SeekData);
    if data.is_ok_and(|data| u64::try_from(data).is_ok_and(|data| data >= at + len)) || data == Err(Errno::ENXIO) {
        return false;
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, at).is_ok() && Digest::of(&bytes) == *digest
}
