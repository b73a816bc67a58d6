//! The wire: frames, each with its length before it, in one direction asked and in the other answered.
//!
//! ```text
//! u32 length · u8 kind · body          big endian; length counts kind and body, at most FRAME_MAX
//! ```
//!
//! Everything here is total: any bytes decode to a frame or to the name of what is wrong with them, and nothing
//! is allocated beyond a frame's length.
//!
//! # Invariants
//! 1. A frame with its length fits one TLS record, so an urgent frame waits for at most one record of another.
//! 2. `decode(encode(f)) == f`, and no frame has bytes behind its end.

mod codec;
#[cfg(test)]
mod tests;

use crate::Class;
use codec::{Reader, Writer};
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt};
use vmatrix_model::Digest;

/// Most bytes of kind and body: a TLS record holds 16384, and the length takes 4.
pub const FRAME_MAX: usize = 16_384 - 4;
/// Most bytes of a chunk in one frame: kind and stream number take 5.
pub const DATA_MAX: usize = FRAME_MAX - 5;
/// Most addresses in one [`Answer::Elsewhere`].
pub const ADDRESSES_MAX: usize = 4;
/// Longest name of an image, bytes.
const NAME_MAX: usize = 64;
/// Longest question to another machine or a store, bytes: it fits a frame with its kind, number and length.
pub const QUESTION_MAX: usize = FRAME_MAX - 9;
/// Longest answer to one, bytes.
pub const REPLY_MAX: usize = 64 << 10;
/// Longest text of a refusal, bytes.
const TEXT_MAX: usize = 240;
/// The version of all this, agreed in the TLS handshake (ALPN).
pub const PROTOCOL: &[u8] = b"vmatrix-chunks/1";

/// An image, by name or by the digest of its manifest's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageRef {
    Name(String),
    Digest(Digest),
}

/// How a chunk is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Send it, or say who else has it.
    Plain,
    /// Another sent us here: if it is not here yet, it may be under way.
    Patient,
    /// Those we were sent to did not give it.
    Insist,
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The asker serves others at this address what it has.
    Serving(SocketAddr),
    /// The manifest of an image; with `push`, and all that is needed before the guest runs.
    Open {
        request: u32,
        image: ImageRef,
        have: Option<Digest>,
        push: bool,
    },
    /// A chunk. Asked again with a more urgent class it moves ahead; it is sent once.
    Get {
        digest: Digest,
        class: Class,
        how: How,
    },
    /// The chunk has come from elsewhere.
    Cancel {
        digest: Digest,
    },
    /// An owner's key, by its id.
    Key {
        id: Digest,
    },
    /// This many bytes of nothing, so that the connection's window grows before it is needed.
    Warm {
        bytes: u32,
    },
    Ping {
        token: u64,
    },
    /// A machine's question to whoever serves: JSON, at most [`QUESTION_MAX`] bytes.
    Ask {
        request: u32,
        question: Vec<u8>,
    },
}

/// What a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The signed manifest's JSON, for [`Request::Open`].
    Manifest { request: u32 },
    /// A chunk's stored bytes.
    Chunk { digest: Digest },
    /// An owner's key: 32 bytes.
    Key { id: Digest },
    /// Nothing: all that [`Request::Open`] pushes was sent.
    Pushed { request: u32 },
    /// The answer to [`Request::Ask`]: JSON, at most [`REPLY_MAX`] bytes.
    Reply { request: u32 },
}

/// What a refusal refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refers {
    Open { request: u32 },
    Key { id: Digest },
    Chunk { digest: Digest },
    Ask { request: u32 },
}

/// What a server answers; `Data` and `Pad` borrow, for they are most of what is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<'a> {
    /// A stream of exactly `length` bytes begins.
    Begin {
        stream: u32,
        what: What,
        length: u32,
    },
    /// Its next bytes.
    Data {
        stream: u32,
        bytes: &'a [u8],
    },
    /// It will not be finished.
    Reset {
        stream: u32,
    },
    /// The chunk is not here.
    Missing {
        digest: Digest,
    },
    /// The chunk was sent often enough: these have it.
    Elsewhere {
        digest: Digest,
        addresses: Vec<SocketAddr>,
    },
    /// Not answered, and why.
    Refused {
        refers: Refers,
        text: String,
    },
    /// Bytes of nothing.
    Pad {
        bytes: &'a [u8],
    },
    Pong {
        token: u64,
    },
}

/// What is wrong with received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("a frame of {0} bytes, more than {FRAME_MAX}")]
    TooLong(u32),
    #[error("an empty frame")]
    Empty,
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    #[error("a frame that ends early")]
    Short,
    #[error("a frame with bytes behind its end")]
    Behind,
    #[error("a frame with an unknown {0}")]
    Field(&'static str),
}

mod kind {
    pub const SERVING: u8 = 1;
    pub const OPEN: u8 = 2;
    pub const GET: u8 = 3;
    pub const CANCEL: u8 = 4;
    pub const KEY: u8 = 5;
    pub const WARM: u8 = 6;
    pub const PING: u8 = 7;
    pub const ASK: u8 = 8;
    pub const BEGIN: u8 = 65;
    pub const DATA: u8 = 66;
    pub const RESET: u8 = 67;
    pub const MISSING: u8 = 68;
    pub const ELSEWHERE: u8 = 69;
    pub const REFUSED: u8 = 70;
    pub const PAD: u8 = 71;
    pub const PONG: u8 = 72;
}

/// Reads one frame's kind and body into `frame`; false at the end of the stream.
///
/// # Errors
/// The connection fails, or the length is out of bounds.
pub async fn read<R: AsyncRead + Unpin>(from: &mut R, frame: &mut Vec<u8>) -> Result<bool, ReadError> {
    let length = match from.read_u32().await {
        Ok(length) => length,
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
        Err(e) => return Err(e.into()),
    };
    if length == 0 {
        return Err(Malformed::Empty.into());
    }
    let whole = usize::try_from(length).ok().filter(|l| *l <= FRAME_MAX).ok_or(Malformed::TooLong(length))?;
    frame.resize(whole, 0);
    from.read_exact(frame).await?;
    Ok(true)
}

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Malformed(#[from] Malformed),
}

impl Request {
    /// The frame, its length before it.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        match self {
            Request::Serving(address) => w.u8(kind::SERVING).address(address),
            Request::Open { request, image, have, push } => {
                w.u8(kind::OPEN).u32(*request).u8(u8::from(*push)).u8(u8::from(have.is_some()));
                if let Some(have) = have {
                    w.digest(have);
                }
                match image {
                    ImageRef::Digest(digest) => w.u8(0).digest(digest),
                    ImageRef::Name(name) => w.u8(1).text(name, NAME_MAX),
                }
            }
            Request::Get { digest, class, how } => {
                w.u8(kind::GET).u8(class.index() as u8).u8(*how as u8).digest(digest)
            }
            Request::Cancel { digest } => w.u8(kind::CANCEL).digest(digest),
            Request::Key { id } => w.u8(kind::KEY).digest(id),
            Request::Warm { bytes } => w.u8(kind::WARM).u32(*bytes),
            Request::Ping { token } => w.u8(kind::PING).u64(*token),
            Request::Ask { request, question } => {
                let cut = question.get(..question.len().min(QUESTION_MAX)).unwrap_or_default();
                w.u8(kind::ASK).u32(*request).u32(cut.len() as u32).bytes(cut)
            }
        };
        w.finish()
    }

    /// Reads a frame's kind and body.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(frame: &[u8]) -> Result<Request, Malformed> {
        let mut r = Reader(frame);
        let request = match r.kind()? {
            kind::SERVING => Request::Serving(r.address()?),
            kind::OPEN => {
                let request = r.u32()?;
                let push = r.flag("push")?;
                let have = if r.flag("have")? { Some(r.digest()?) } else { None };
                let image = match r.u8()? {
                    0 => ImageRef::Digest(r.digest()?),
                    1 => ImageRef::Name(r.text(NAME_MAX)?),
                    _ => return Err(Malformed::Field("way to name an image")),
                };
                Request::Open { request, image, have, push }
            }
            kind::GET => {
                let class = Class::from_wire(r.u8()?).ok_or(Malformed::Field("class"))?;
                let how = match r.u8()? {
                    0 => How::Plain,
                    1 => How::Patient,
                    2 => How::Insist,
                    _ => return Err(Malformed::Field("way to ask")),
                };
                Request::Get { digest: r.digest()?, class, how }
            }
            kind::CANCEL => Request::Cancel { digest: r.digest()? },
            kind::KEY => Request::Key { id: r.digest()? },
            kind::WARM => Request::Warm { bytes: r.u32()? },
            kind::PING => Request::Ping { token: r.u64()? },
            kind::ASK => {
                let (request, length) = (r.u32()?, r.u32()? as usize);
                if length > QUESTION_MAX {
                    return Err(Malformed::Field("length of a question"));
                }
                Request::Ask { request, question: r.take(length)?.to_vec() }
            }
            other => return Err(Malformed::Kind(other)),
        };
        r.end(request)
    }
}

impl<'a> Answer<'a> {
    /// The frame, its length before it.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        match self {
            Answer::Begin { stream, what, length } => {
                w.u8(kind::BEGIN).u32(*stream).u32(*length);
                match what {
                    What::Manifest { request } => w.u8(0).u32(*request),
                    What::Chunk { digest } => w.u8(1).digest(digest),
                    What::Key { id } => w.u8(2).digest(id),
                    What::Pushed { request } => w.u8(3).u32(*request),
                    What::Reply { request } => w.u8(4).u32(*request),
                }
            }
            Answer::Data { stream, bytes } => w.u8(kind::DATA).u32(*stream).bytes(bytes),
            Answer::Reset { stream } => w.u8(kind::RESET).u32(*stream),
            Answer::Missing { digest } => w.u8(kind::MISSING).digest(digest),
            Answer::Elsewhere { digest, addresses } => {
                let some = addresses.get(..addresses.len().min(ADDRESSES_MAX)).unwrap_or_default();
                w.u8(kind::ELSEWHERE).digest(digest).u8(some.len() as u8);
                for address in some {
                    w.address(address);
                }
                &mut w
            }
            Answer::Refused { refers, text } => {
                w.u8(kind::REFUSED);
                match refers {
                    Refers::Open { request } => w.u8(0).u32(*request),
                    Refers::Key { id } => w.u8(1).digest(id),
                    Refers::Chunk { digest } => w.u8(2).digest(digest),
                    Refers::Ask { request } => w.u8(3).u32(*request),
                };
                w.text(text, TEXT_MAX)
            }
            Answer::Pad { bytes } => w.u8(kind::PAD).bytes(bytes),
            Answer::Pong { token } => w.u8(kind::PONG).u64(*token),
        };
        w.finish()
    }

    /// Reads a frame's kind and body.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(frame: &'a [u8]) -> Result<Answer<'a>, Malformed> {
        let mut r = Reader(frame);
        let answer = match r.kind()? {
            kind::BEGIN => {
                let (stream, length) = (r.u32()?, r.u32()?);
                let what = match r.u8()? {
                    0 => What::Manifest { request: r.u32()? },
                    1 => What::Chunk { digest: r.digest()? },
                    2 => What::Key { id: r.digest()? },
                    3 => What::Pushed { request: r.u32()? },
                    4 => What::Reply { request: r.u32()? },
                    _ => return Err(Malformed::Field("kind of stream")),
                };
                Answer::Begin { stream, what, length }
            }
            kind::DATA => Answer::Data { stream: r.u32()?, bytes: r.rest() },
            kind::RESET => Answer::Reset { stream: r.u32()? },
            kind::MISSING => Answer::Missing { digest: r.digest()? },
            kind::ELSEWHERE => {
                let digest = r.digest()?;
                let count = usize::from(r.u8()?);
                if count > ADDRESSES_MAX {
                    return Err(Malformed::Field("number of addresses"));
                }
                let addresses = (0..count).map(|_| r.address()).collect::<Result<_, _>>()?;
                Answer::Elsewhere { digest, addresses }
            }
            kind::REFUSED => {
                let refers = match r.u8()? {
                    0 => Refers::Open { request: r.u32()? },
                    1 => Refers::Key { id: r.digest()? },
                    2 => Refers::Chunk { digest: r.digest()? },
                    3 => Refers::Ask { request: r.u32()? },
                    _ => return Err(Malformed::Field("kind of refusal")),
                };
                Answer::Refused { refers, text: r.text(TEXT_MAX)? }
            }
            kind::PAD => Answer::Pad { bytes: r.rest() },
            kind::PONG => Answer::Pong { token: r.u64()? },
            other => return Err(Malformed::Kind(other)),
        };
        r.end(answer)
    }
}
