//! A disk that arrives as it is read: chunks ─▶ one sparse file, each verified before a byte of it is given out.
//!
//! ```text
//! read(offset, len) ─▶ chunks of it ─▶ written? in the file? (by digest, once) ─no─▶ fetch ─▶ file ─▶ bytes
//! write(offset, bytes) ─▶ the rest of its chunk, as above ─▶ mark ─▶ file
//! ```
//! What a file of an earlier process holds is not believed but compared, chunk by chunk, when it is first read: so
//! it does not matter how that process ended. Only a chunk that is marked as written is believed.

mod marks;
mod write;

pub(crate) use marks::Life;
pub(crate) use write::{Seat, Zeros};

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
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::time::{Instant, sleep, timeout_at};
use vmatrix_model::Digest;
use vmatrix_model::manifest::{Chunk, Part, PartKind};
use vmatrix_vma_image::chunks::{Need, plain_length};
use write::Written;

/// Chunks that can be fetched at once; two that fall on the same place wait for each other.
const TURNS: usize = 64;
/// Between attempts to fetch a chunk.
const AGAIN: Duration = Duration::from_millis(250);
/// A read or write that waits longer than this fails: the guest sees a disk that does not answer.
const LIMIT: Duration = Duration::from_secs(60);

/// A part of an image that is a disk of its guests.
pub(crate) struct Disk {
    path: PathBuf,
    file: Arc<Flock<File>>,
    part: Part,
    /// Its table, once that is here.
    chunks: watch::Receiver<Option<Arc<Vec<Option<Chunk>>>>>,
    fetch: Fetch,
    /// Chunks that the file is known to hold.
    held: Arc<Mutex<Bits>>,
    turns: Vec<Arc<tokio::sync::Mutex<()>>>,
    /// Since when somebody waits for a chunk that does not come, and why it does not.
    trouble: Mutex<Option<(Instant, String)>>,
    /// Of a disk that is written.
    written: Option<Written>,
}

/// Why a read has no bytes, or a write did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Past the end.
    Outside,
    /// The bytes cannot be had, or not be kept.
    Failed,
    /// There is no room to keep them.
    Full,
    /// Nobody writes this disk, or somebody else does.
    Refused,
}

/// The right of whoever has it to be alone in changing what of the image is in the file at a chunk. Each write that was
/// begun keeps it until it is over, also if nobody waits for that any more.
type Turn = Arc<OwnedMutexGuard<()>>;

/// The bytes of a chunk that the file did not take, and why.
type Unkept = (Vec<u8>, std::io::Error);

impl Disk {
    /// Opens the file that keeps what is read, or makes it, for its owner only. With a life of a memory file the disk
    /// is written, by the guest of that memory.
    ///
    /// # Errors
    /// Another pager has it, it cannot be made, or it is written and is another guest's.
    pub fn open(
        path: &Path,
        part: Part,
        life: Option<Life>,
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
        let count = u32::try_from(part.size.0.div_ceil(part.chunk.0.max(1))).unwrap_or(u32::MAX);
        let written = life.map(|life| Written::open(path, count, &part.table.digest, life)).transpose()?;
        let before = file.metadata().map_err(io("look at", path))?.len();
        if before != part.size.0 && written.as_ref().is_some_and(|written| !written.all().is_empty()) {
            // Marks speak of a file that is not this one.
            return Err(Error::Written { path: path.to_owned() });
        }
        file.set_len(part.size.0).map_err(io("size", path))?;
        Ok(Disk {
            path: path.to_owned(),
            file: Arc::new(file),
            part,
            chunks,
            fetch,
            held: Arc::new(Mutex::new(Bits::new(count))),
            turns: (0..TURNS).map(|_| Arc::default()).collect(),
            trouble: Mutex::default(),
            written,
        })
    }

    pub fn kind(&self) -> PartKind {
        self.part.kind
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
    /// [`Fault`]
    pub async fn read(&self, offset: u64, len: u32) -> std::result::Result<Vec<u8>, Fault> {
        let end = self.end(offset, len)?;
        let deadline = Instant::now() + LIMIT;
        let chunks = self.table(deadline).await?;
        let mut bytes = vec![0; len as usize];
        let mut at = offset;
        while at < end {
            let index = (at / self.part.chunk.0) as usize;
            let until = (at - at % self.part.chunk.0 + self.part.chunk.0).min(end);
            let here = bytes.get_mut((at - offset) as usize..(until - offset) as usize).unwrap_or_default();
            let unkept = match chunks.get(index).copied().flatten() {
                Some(chunk) if !self.is_written(index) => self.hold(index, chunk, deadline).await?,
                _ => None,
            };
            if let Some((plain, _)) = unkept {
                let from = (at % self.part.chunk.0) as usize;
                here.copy_from_slice(plain.get(from..from + here.len()).ok_or(Fault::Failed)?);
            } else if self.is_written(index) || chunks.get(index).is_some_and(Option::is_some) {
                here.copy_from_slice(&self.read_held(at, here.len()).await?);
            }
            // A chunk of zeros is not read from the file, whatever that holds there, until it is written.
            at = until;
        }
        Ok(bytes)
    }

    /// Where a request ends, if that is on the disk.
    fn end(&self, offset: u64, len: u32) -> std::result::Result<u64, Fault> {
        offset.checked_add(len.into()).filter(|end| *end <= self.size()).ok_or(Fault::Outside)
    }

    /// The image's chunks, once they are known.
    async fn table(&self, deadline: Instant) -> std::result::Result<Arc<Vec<Option<Chunk>>>, Fault> {
        let mut table = self.chunks.clone();
        match timeout_at(deadline, table.wait_for(Option::is_some)).await {
            Ok(Ok(chunks)) => chunks.clone().ok_or(Fault::Failed),
            _ => Err(Fault::Failed),
        }
    }

    async fn read_held(&self, at: u64, len: usize) -> std::result::Result<Vec<u8>, Fault> {
        let file = self.file.clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at).map(|()| bytes)
        });
        read.await.map_err(|_| Fault::Failed)?.map_err(|e| {
            tracing::error!(path = %self.path.display(), error = %e, "cannot read what was kept of a disk");
            Fault::Failed
        })
    }

    /// Has the file hold a chunk of the image, or what was written of it; gives its bytes back where the file does not
    /// take them.
    async fn hold(&self, index: usize, chunk: Chunk, deadline: Instant) -> std::result::Result<Option<Unkept>, Fault> {
        if self.is_held(index) {
            return Ok(None);
        }
        let turn = self.turn(index, deadline).await?;
        self.hold_in_turn(&turn, index, chunk, deadline).await
    }

    /// The turn of a chunk.
    async fn turn(&self, index: usize, deadline: Instant) -> std::result::Result<Turn, Fault> {
        let turn = self.turns.get(index % TURNS).ok_or(Fault::Failed)?.clone();
        timeout_at(deadline, turn.lock_owned()).await.map(Arc::new).map_err(|_| Fault::Failed)
    }

    /// As [`Disk::hold`], by whoever has the chunk's turn.
    async fn hold_in_turn(
        &self,
        turn: &Turn,
        index: usize,
        chunk: Chunk,
        deadline: Instant,
    ) -> std::result::Result<Option<Unkept>, Fault> {
        if self.is_held(index) || self.is_written(index) {
            return Ok(None);
        }
        let (file, at, len) = (self.file.clone(), index as u64 * self.part.chunk.0, plain_length(&self.part, index).0);
        let holds = move || holds(&file, at, len, &chunk.digest);
        if !tokio::task::spawn_blocking(holds).await.unwrap_or(false) {
            let fetched = self.fetched(index, chunk, deadline).await;
            // Whoever waits next will say so again.
            *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let (plain, file, turn) = (fetched?, self.file.clone(), turn.clone());
            let written = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                (file.write_all_at(&plain, at), plain)
            });
            let (written, plain) = written.await.map_err(|_| Fault::Failed)?;
            if let Err(e) = written {
                tracing::warn!(path = %self.path.display(), error = %e, "cannot keep what is read of a disk");
                return Ok(Some((plain, e)));
            }
        }
        self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(index as u32);
        Ok(None)
    }

    async fn fetched(&self, index: usize, chunk: Chunk, deadline: Instant) -> std::result::Result<Vec<u8>, Fault> {
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
                Err(_) => return Err(Fault::Failed),
            }
            if Instant::now() + AGAIN > deadline {
                return Err(Fault::Failed);
            }
            sleep(AGAIN).await;
        }
    }

    fn is_written(&self, index: usize) -> bool {
        self.written.as_ref().is_some_and(|written| written.has(index))
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

#[cfg(test)]
mod tests;
