//! NBD's requests: reads are answered as their bytes arrive, in any order; everything that writes is refused.

use crate::disk::{Disk, NoRead};
use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Longest read.
pub(super) const READ_MAX: u32 = 2 << 20;
/// Bytes being read at once, over all connections.
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

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

struct Request {
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

/// Room for the bytes that are being read.
pub(super) fn room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(BYTES_MAX))
}

/// Answers requests until the client goes.
///
/// # Errors
/// It is gone in the middle, or does not speak NBD.
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
    let end = loop {
        let request = match next(&mut input).await {
            Ok(Some(request)) => request,
            Ok(None) => break Ok(()),
            Err(e) => break Err(e),
        };
        let refused = match request.kind {
            READ if request.len > 0 && request.len <= READ_MAX => None,
            READ => Some(EINVAL),
            DISCONNECT => break Ok(()),
            // Nothing is ever written, so everything is.
            FLUSH => Some(0),
            WRITE if request.len > REFUSED_MAX => break Err(odd("a write's length")),
            WRITE => match skip(&mut input, request.len).await {
                Ok(()) => Some(EPERM),
                Err(e) => break Err(e),
            },
            TRIM | WRITE_ZEROES => Some(EPERM),
            _ => Some(EINVAL),
        };
        if let Some(code) = refused {
            if replies.send((reply(code, request.cookie, &[]), None)).await.is_err() {
                break Ok(());
            }
            continue;
        }
        let (Ok(place), Ok(bytes)) =
            (places.clone().acquire_owned().await, room.clone().acquire_many_owned(request.len).await)
        else {
            break Ok(());
        };
        let (disk, replies) = (disk.clone(), replies.clone());
        tokio::spawn(async move {
            let answer = match disk.read(request.offset, request.len).await {
                Ok(plain) => reply(0, request.cookie, &plain),
                Err(NoRead::Outside) => reply(EINVAL, request.cookie, &[]),
                Err(NoRead::Failed) => reply(EIO, request.cookie, &[]),
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

async fn next(input: &mut OwnedReadHalf) -> Result<Option<Request>> {
    // Magic, flags, kind, cookie, offset, length.
    let mut bytes = [0; 28];
    match input.read_exact(&mut bytes).await {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        other => other.map(drop)?,
    }
    let number = |at: std::ops::Range<usize>| {
        bytes.get(at).unwrap_or_default().iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    if number(0..4) != u64::from(REQUEST) {
        return Err(odd("a request"));
    }
    let (kind, len) = (number(6..8) as u16, number(24..28) as u32);
    Ok(Some(Request { kind, cookie: number(8..16), offset: number(16..24), len }))
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
