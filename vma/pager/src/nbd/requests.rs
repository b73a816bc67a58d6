//! NBD's requests: answered as they are done, in any order; what would write a disk that nobody writes is refused.
//!
//! A connection that ends takes with it what it was not answered yet, but for writes that have begun: whoever writes
//! next waits for those.

use crate::disk::{Disk, Fault, Seat, Zeros};
use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

/// Longest read, and longest write.
pub(super) const BYTES_AT_ONCE: u32 = 2 << 20;
/// Bytes being read and written at once, over all connections.
const BYTES_MAX: usize = 64 << 20;
/// Requests of one connection at once; QEMU has sixteen.
const AT_ONCE: usize = 16;
/// Longest write that is read past to refuse it; a client that sends more is left.
const REFUSED_MAX: u32 = 32 << 20;

const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

/// Zeros, and not as a hole.
const NO_HOLE: u16 = 2;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

struct Request {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

/// What a request asks for, once it is known to be one that can be done.
enum Work {
    Read,
    Write(Seat, Vec<u8>),
    Zero(Seat, Zeros),
    Flush,
}

/// Room for the bytes that are being read and written.
pub(super) fn room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(BYTES_MAX))
}

/// Answers requests until the client goes.
///
/// # Errors
/// It is gone without a word, or does not speak NBD.
pub(super) async fn serve(stream: UnixStream, disk: Arc<Disk>, room: Arc<Semaphore>) -> Result<()> {
    let (mut input, mut output) = stream.into_split();
    let (replies, mut ready) = mpsc::channel::<(Vec<u8>, Option<OwnedSemaphorePermit>)>(AT_ONCE);
    let writer = tokio::spawn(async move {
        while let Some((reply, _room)) = ready.recv().await {
            output.write_all(&reply).await?;
        }
        Ok::<(), Error>(())
    });
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    let mut seat: Option<Seat> = None;
    let end = loop {
        while tasks.try_join_next().is_some() {}
        let request = match next(&mut input).await {
            Ok(request) if request.kind != DISCONNECT => request,
            // It may be told what it asked for before.
            Ok(_) => break Ok(()),
            Err(e) => break Err(e),
        };
        let mut refused = refusal(&request, &disk);
        if refused.is_none() && matches!(request.kind, WRITE | TRIM | WRITE_ZEROES) && seat.is_none() {
            match disk.seat().await {
                Ok(taken) => seat = Some(taken),
                Err(fault) => refused = Some(code(fault)),
            }
        }
        if let Some(code) = refused {
            if request.kind == WRITE {
                if request.len > REFUSED_MAX {
                    break Err(odd("a write's length"));
                }
                if let Err(e) = skip(&mut input, request.len).await {
                    break Err(e);
                }
            }
            if replies.send((reply(code, request.cookie, &[]), None)).await.is_err() {
                break Ok(());
            }
            continue;
        }
        let bytes = if matches!(request.kind, READ | WRITE) { request.len } else { 0 };
        let (Ok(place), Ok(bytes)) =
            (places.clone().acquire_owned().await, room.clone().acquire_many_owned(bytes).await)
        else {
            break Ok(());
        };
        let work = match (request.kind, &seat) {
            (WRITE, Some(seat)) => {
                let mut payload = vec![0; request.len as usize];
                if let Err(e) = input.read_exact(&mut payload).await {
                    break Err(e);
                }
                Work::Write(seat.clone(), payload)
            }
            (TRIM, Some(seat)) => Work::Zero(seat.clone(), Zeros::Trimmed),
            (WRITE_ZEROES, Some(seat)) if request.flags & NO_HOLE != 0 => Work::Zero(seat.clone(), Zeros::Kept),
            (WRITE_ZEROES, Some(seat)) => Work::Zero(seat.clone(), Zeros::Hole),
            (FLUSH, _) => Work::Flush,
            _ => Work::Read,
        };
        let (disk, replies) = (disk.clone(), replies.clone());
        tasks.spawn(async move {
            let (offset, len) = (request.offset, request.len);
            let done = match work {
                Work::Read => disk.read(offset, len).await,
                Work::Write(seat, payload) => disk.write(&seat, offset, &payload).await.map(|()| Vec::new()),
                Work::Zero(seat, how) => disk.zero(&seat, offset, len, how).await.map(|()| Vec::new()),
                Work::Flush => disk.flush().await.map(|()| Vec::new()),
            };
            let answer = match done {
                Ok(plain) => reply(0, request.cookie, &plain),
                Err(fault) => reply(code(fault), request.cookie, &[]),
            };
            // The client may be gone.
            let _ = replies.send((answer, Some(bytes))).await;
            drop(place);
        });
    };
    drop(replies);
    match end {
        // Not worth waiting for what it would have been answered.
        Err(e) => {
            writer.abort();
            Err(e)
        }
        Ok(()) => writer.await.unwrap_or(Ok(())),
    }
}

/// Why a request is not even begun.
fn refusal(request: &Request, disk: &Disk) -> Option<u32> {
    let within = request.len > 0 && request.len <= BYTES_AT_ONCE;
    let known = if request.kind == WRITE_ZEROES { NO_HOLE } else { 0 };
    match request.kind {
        WRITE | TRIM | WRITE_ZEROES if !disk.is_writable() => Some(EPERM),
        _ if request.flags & !known != 0 => Some(EINVAL),
        READ | WRITE if !within => Some(EINVAL),
        TRIM | WRITE_ZEROES if request.len == 0 => Some(EINVAL),
        READ | WRITE | FLUSH | TRIM | WRITE_ZEROES => None,
        _ => Some(EINVAL),
    }
}

fn code(fault: Fault) -> u32 {
    match fault {
        Fault::Outside => EINVAL,
        Fault::Failed => EIO,
        Fault::Full => ENOSPC,
        Fault::Refused => EPERM,
    }
}

async fn next(input: &mut OwnedReadHalf) -> Result<Request> {
    // Magic, flags, kind, cookie, offset, length.
    let mut bytes = [0; 28];
    input.read_exact(&mut bytes).await?;
    let number = |at: std::ops::Range<usize>| {
        bytes.get(at).unwrap_or_default().iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    if number(0..4) != u64::from(REQUEST) {
        return Err(odd("a request"));
    }
    let (kind, len) = (number(6..8) as u16, number(24..28) as u32);
    Ok(Request { flags: number(4..6) as u16, kind, cookie: number(8..16), offset: number(16..24), len })
}

async fn skip(input: &mut OwnedReadHalf, len: u32) -> Result<()> {
    let read = tokio::io::copy(&mut input.take(len.into()), &mut tokio::io::sink()).await?;
    if read == u64::from(len) { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

fn reply(code: u32, cookie: u64, plain: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + plain.len());
    bytes.extend(REPLY.to_be_bytes());
    bytes.extend(code.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(plain);
    bytes
}

fn odd(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("a client of the disk sent {what} that NBD does not have"))
}
