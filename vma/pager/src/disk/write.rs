//! Writing a disk: a chunk is marked as written before anybody can rely on it, and is whole at every moment.
//!
//! ```text
//! part of a chunk:  the image's bytes ─▶ file │ mark │ bytes ─▶ file      killed in between: as the image, or marked
//! a whole chunk:    bytes ─▶ file │ mark                                  killed in between: compared, fetched again
//! a marked chunk:   bytes ─▶ file
//! ```
//! # Invariants
//! 1. What was answered as written is in the file and marked: it is read again by whoever serves the file next.
//! 2. What was not answered changed nothing outside of its own bytes.
//! 3. One connection at a time writes. A guest that connects anew sends again what was not answered; nothing of its
//!    earlier connection is written after that.

use super::marks::{Life, Marks};
use super::{Disk, Fault, LIMIT};
use crate::bits::Bits;
use crate::error::Result;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::io::{Error, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use vmatrix_model::Digest;
use vmatrix_vma_image::chunks::plain_length;

/// How long a connection that wants to write waits for the one before it to be over: longer than one write takes.
const SEAT_WITHIN: Duration = Duration::from_secs(5);
/// Zeros written at once, where a hole cannot be made.
const ZEROS: usize = 64 << 10;

/// What a disk that is written has besides.
pub(super) struct Written {
    marks: Arc<Marks>,
    writer: Arc<Semaphore>,
    /// Why the last write did not find room.
    full: Mutex<Option<String>>,
}

impl Written {
    pub fn open(disk: &Path, chunks: u32, table: &Digest, life: Life) -> Result<Written> {
        let marks = Arc::new(Marks::open(&disk.with_extension("marks"), chunks, table, life)?);
        Ok(Written { marks, writer: Arc::new(Semaphore::new(1)), full: Mutex::default() })
    }

    pub fn has(&self, index: usize) -> bool {
        self.marks.has(index as u32)
    }

    pub fn all(&self) -> Vec<u32> {
        self.marks.all()
    }
}

/// The right to write, of one connection; kept by each of its writes until that is over.
#[derive(Debug, Clone)]
pub(crate) struct Seat(#[allow(dead_code, reason = "it is held, not looked at")] Arc<OwnedSemaphorePermit>);

/// How zeros are to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeros {
    /// As a hole, where the file system makes one.
    Hole,
    /// Room for them stays taken.
    Kept,
    /// As a hole, and only whole chunks: the guest does not need them any more, and does not mind what it reads there.
    Trimmed,
}

/// What a chunk, or a piece of it, is to become.
enum To {
    Bytes(Vec<u8>),
    Zeros(Zeros),
}

impl Disk {
    pub fn is_writable(&self) -> bool {
        self.written.is_some()
    }

    /// Chunks that were written since the image, by index, in order; some may have been written with what they held.
    /// None where nobody writes this disk.
    pub fn written(&self) -> Option<Vec<u32>> {
        self.written.as_ref().map(Written::all)
    }

    /// Bytes of the chunks that were written.
    pub fn written_bytes(&self) -> u64 {
        let chunks = self.written.as_ref().map_or(0, |written| written.marks.len());
        (u64::from(chunks) * self.part.chunk.0).min(self.size())
    }

    /// Why writes find no room, since one did not.
    pub fn full(&self) -> Option<String> {
        self.written.as_ref()?.full.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets a connection write.
    ///
    /// # Errors
    /// [`Fault::Refused`]: nobody may, or another does.
    pub async fn seat(&self) -> std::result::Result<Seat, Fault> {
        let writer = self.written.as_ref().ok_or(Fault::Refused)?.writer.clone();
        match timeout(SEAT_WITHIN, writer.acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Seat(Arc::new(permit))),
            _ => {
                tracing::warn!(path = %self.path.display(), "two clients want to write one disk; the second is refused");
                Err(Fault::Refused)
            }
        }
    }

    /// Writes bytes from `offset` on. Dropped in the middle it is as if it were killed: some of the bytes are written.
    ///
    /// # Errors
    /// [`Fault`]; some of the bytes may be written.
    pub async fn write(&self, seat: &Seat, offset: u64, bytes: &[u8]) -> std::result::Result<(), Fault> {
        let len = u32::try_from(bytes.len()).map_err(|_| Fault::Outside)?;
        for piece in self.pieces(offset, len)? {
            let from = piece.start - offset;
            let here = bytes.get(from as usize..(from + piece.end - piece.start) as usize).unwrap_or_default();
            self.change(seat, piece, To::Bytes(here.to_vec())).await?;
        }
        Ok(())
    }

    /// Makes what lies from `offset` on zeros.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub async fn zero(&self, seat: &Seat, offset: u64, len: u32, how: Zeros) -> std::result::Result<(), Fault> {
        let table = self.table(Instant::now() + LIMIT).await?;
        for piece in self.pieces(offset, len)? {
            let index = (piece.start / self.part.chunk.0) as usize;
            let whole = piece.end - piece.start == plain_length(&self.part, index).0;
            // It is zeros already, and takes no room.
            let is_zero = !self.is_written(index) && table.get(index).is_some_and(Option::is_none);
            if (is_zero && how != Zeros::Kept) || (!whole && how == Zeros::Trimmed) {
                continue;
            }
            self.change(seat, piece, To::Zeros(how)).await?;
        }
        Ok(())
    }

    /// Has everything that was answered as written outlast the machine.
    ///
    /// # Errors
    /// [`Fault::Full`], [`Fault::Failed`]: it may not.
    pub async fn flush(&self) -> std::result::Result<(), Fault> {
        let Some(written) = &self.written else { return Ok(()) };
        let (file, marks) = (self.file.clone(), written.marks.clone());
        let synced = tokio::task::spawn_blocking(move || file.sync_data().and_then(|()| marks.sync()));
        synced.await.map_err(|_| Fault::Failed)?.map_err(|e| self.fault(&e))
    }

    /// A request as pieces, each of one chunk.
    fn pieces(&self, offset: u64, len: u32) -> std::result::Result<impl Iterator<Item = Range<u64>>, Fault> {
        let (end, chunk) = (self.end(offset, len)?, self.part.chunk.0);
        let first = offset / chunk;
        Ok((first..end.div_ceil(chunk)).map(move |at| (at * chunk).max(offset)..((at + 1) * chunk).min(end)))
    }

    /// Changes a piece of one chunk.
    async fn change(&self, seat: &Seat, piece: Range<u64>, to: To) -> std::result::Result<(), Fault> {
        let written = self.written.as_ref().ok_or(Fault::Refused)?;
        let index = (piece.start / self.part.chunk.0) as usize;
        let (file, marks, seat) = (self.file.clone(), written.marks.clone(), seat.clone());
        let done = if written.has(index) {
            tokio::task::spawn_blocking(move || {
                let _seat = seat;
                put(&file, piece, &to)
            })
            .await
        } else {
            let deadline = Instant::now() + LIMIT;
            let chunk = self.table(deadline).await?.get(index).copied().flatten();
            let turn = self.turn(index, deadline).await?;
            let len = plain_length(&self.part, index).0;
            let chunk_at = index as u64 * self.part.chunk.0..index as u64 * self.part.chunk.0 + len;
            let (whole, held) = (piece == chunk_at, self.held.clone());
            if let Some(chunk) = chunk.filter(|_| !whole)
                && let Some((_, e)) = self.hold_in_turn(&turn, index, chunk, deadline).await?
            {
                return Err(self.fault(&e));
            }
            let first = First { index: index as u32, chunk_at, is_zero: chunk.is_none(), held, marks };
            // Once begun it is gone through with, whoever still waits for it.
            tokio::task::spawn_blocking(move || {
                let (_seat, _turn) = (seat, turn);
                first.put(&file, piece, whole, &to)
            })
            .await
        };
        match done.map_err(|_| Fault::Failed)? {
            Ok(()) => {
                *written.full.lock().unwrap_or_else(PoisonError::into_inner) = None;
                Ok(())
            }
            Err(e) => Err(self.fault(&e)),
        }
    }

    fn fault(&self, e: &Error) -> Fault {
        let path = self.path.display();
        if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
            let said = format!("no room for what the guest writes: {path}: {e}; make room, then have it go on");
            tracing::warn!("{said}");
            if let Some(written) = &self.written {
                *written.full.lock().unwrap_or_else(PoisonError::into_inner) = Some(said);
            }
            return Fault::Full;
        }
        tracing::error!(%path, error = %e, "cannot keep what a guest writes");
        Fault::Failed
    }
}

/// The first write to a chunk, by whoever has its turn.
struct First {
    index: u32,
    chunk_at: Range<u64>,
    /// The image has zeros there; the file may have anything.
    is_zero: bool,
    held: Arc<Mutex<Bits>>,
    marks: Arc<Marks>,
}

impl First {
    fn put(&self, file: &File, piece: Range<u64>, whole: bool, to: &To) -> std::io::Result<()> {
        if self.marks.has(self.index) {
            // By the one whose turn was before.
            return put(file, piece, to);
        }
        if whole {
            // Until it is marked the file may hold half of it: then it is compared, and is the image's again.
            self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(self.index);
            put(file, piece, to)?;
            return self.marks.set(self.index);
        }
        if self.is_zero {
            zeros(file, self.chunk_at.clone(), Zeros::Hole)?;
        }
        self.marks.set(self.index)?;
        put(file, piece, to)
    }
}

fn put(file: &File, piece: Range<u64>, to: &To) -> std::io::Result<()> {
    match to {
        To::Bytes(bytes) => file.write_all_at(bytes, piece.start),
        To::Zeros(how) => zeros(file, piece, *how),
    }
}

fn zeros(file: &File, piece: Range<u64>, how: Zeros) -> std::io::Result<()> {
    if how != Zeros::Kept {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        match fallocate(file, mode, number(piece.start), number(piece.end - piece.start)) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {}
            other => return other.map_err(Error::from),
        }
    }
    let block = [0; ZEROS];
    let mut at = piece.start;
    while at < piece.end {
        let here = block.get(..(piece.end - at).min(ZEROS as u64) as usize).unwrap_or(&block);
        file.write_all_at(here, at)?;
        at += here.len() as u64;
    }
    Ok(())
}
