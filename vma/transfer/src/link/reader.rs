//! What comes over a link.

use super::{Counters, Item, PUSHED_ROOM, Report, Reports, Room, Shared, lock};
use crate::error::Fault;
use crate::frame::{self, Answer, Refers, What};
use crate::tls;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::io::{BufReader, ReadHalf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use vmatrix_model::Digest;
use vmatrix_model::manifest::MANIFEST_MAX;
use vmatrix_vma_image::store::STORED_MAX;

/// Streams a source may have begun and not ended: read-ahead is no reason for more than a few per class.
const STREAMS_MAX: usize = 64;
/// How often the plan is told that bytes came.
const HEARD_EVERY: Duration = Duration::from_millis(100);
/// The signed manifest's JSON: quotes double the text at worst.
const JSON_MAX: usize = 2 * MANIFEST_MAX;
const KEY_LENGTH: usize = 32;

/// A stream that has begun.
struct Stream {
    what: What,
    length: usize,
    /// None: it is not wanted, and read past.
    bytes: Option<Vec<u8>>,
    came: usize,
}

pub(super) struct Reader<'a> {
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    report: &'a Reports,
    streams: HashMap<u32, Stream>,
}

impl<'a> Reader<'a> {
    pub fn new(shared: Arc<Shared>, counters: Arc<Counters>, report: &'a Reports) -> Reader<'a> {
        Reader { shared, counters, report, streams: HashMap::new() }
    }

    /// Reads until the connection ends, and says why it did.
    pub async fn read(mut self, read: ReadHalf<TlsStream<TcpStream>>) -> Fault {
        let mut read = BufReader::with_capacity(frame::FRAME_MAX + 4, read);
        let mut bytes = Vec::new();
        let mut told = Instant::now();
        let mut pad = 0u64;
        loop {
            match frame::read(&mut read, &mut bytes).await {
                Ok(true) => {}
                Ok(false) => return Fault::Lost("it closed the connection".to_owned()),
                Err(frame::ReadError::Io(error)) => return tls::fault(&error),
                Err(frame::ReadError::Malformed(malformed)) => return Fault::Protocol(malformed.to_string()),
            }
            self.counters.received.fetch_add(bytes.len() as u64 + 4, Ordering::Relaxed);
            self.shared.heard.store(self.shared.began.elapsed().as_millis() as u64, Ordering::Relaxed);
            let answer = match Answer::decode(&bytes) {
                Ok(answer) => answer,
                Err(malformed) => return Fault::Protocol(malformed.to_string()),
            };
            if let Answer::Pad { bytes } = &answer {
                pad += bytes.len() as u64;
                // The last frame of the padding is the one that is not full.
                if bytes.len() < frame::DATA_MAX {
                    tracing::debug!(bytes = pad, "a connection is warm");
                    pad = 0;
                    self.shared.warm.send_replace(true);
                }
            }
            match self.answer(answer) {
                Ok(Some(report)) => {
                    told = Instant::now();
                    if !self.report.send(report).await {
                        return Fault::Lost("nobody wants it any more".to_owned());
                    }
                }
                Ok(None) => {
                    if told.elapsed() >= HEARD_EVERY {
                        told = Instant::now();
                        self.report.hint(Report::Heard);
                    }
                }
                Err(fault) => return fault,
            }
        }
    }

    fn answer(&mut self, answer: Answer<'_>) -> Result<Option<Report>, Fault> {
        match answer {
            Answer::Begin { stream, what, length } => self.begin(stream, what, length),
            Answer::Data { stream, bytes } => self.data(stream, bytes),
            Answer::Reset { stream } => {
                self.streams.remove(&stream);
                Ok(None)
            }
            Answer::Missing { digest } => {
                Ok(lock(&self.shared.asked).remove(&digest).map(|_| Report::Missing { digest }))
            }
            Answer::Elsewhere { digest, addresses } => {
                Ok(lock(&self.shared.asked).remove(&digest).map(|_| Report::Elsewhere { digest, addresses }))
            }
            Answer::Refused { refers, text } => {
                match refers {
                    Refers::Open { request } => self.tell(request, Item::Refused(text)),
                    Refers::Key { id } => {
                        if let Some(waits) = lock(&self.shared.keys).remove(&id) {
                            let _ = waits.send(Err(text));
                        }
                    }
                    Refers::Ask { request } => self.reply(request, Err(text)),
                    Refers::Chunk { digest } => {
                        return Ok(lock(&self.shared.asked).remove(&digest).map(|_| Report::Missing { digest }));
                    }
                }
                Ok(None)
            }
            Answer::Pad { .. } | Answer::Pong { .. } => Ok(None),
        }
    }

    fn begin(&mut self, stream: u32, what: What, length: u32) -> Result<Option<Report>, Fault> {
        let wrong = |problem: String| Err(Fault::WrongBytes(problem));
        let length = length as usize;
        if self.streams.len() >= STREAMS_MAX {
            return Err(Fault::Protocol(format!("more than {STREAMS_MAX} streams at once")));
        }
        let wanted = match what {
            What::Manifest { request } if length > JSON_MAX => {
                return wrong(format!("a manifest of {length} bytes, more than {JSON_MAX} (open {request})"));
            }
            What::Key { .. } if length != KEY_LENGTH => return wrong(format!("a key of {length} bytes")),
            What::Reply { .. } if length > frame::REPLY_MAX => return wrong(format!("an answer of {length} bytes")),
            What::Pushed { .. } if length != 0 => return wrong(format!("an end of {length} bytes")),
            What::Manifest { .. } | What::Key { .. } | What::Pushed { .. } | What::Reply { .. } => true,
            What::Chunk { digest } => match lock(&self.shared.asked).get(&digest) {
                Some(stored) if *stored != length as u64 => {
                    let short = digest.short();
                    return wrong(format!("chunk {short} has {length} bytes, not the {stored} it must have"));
                }
                Some(_) => true,
                None if length > STORED_MAX => return wrong(format!("a chunk of {length} bytes")),
                None => self.takes_pushed(length),
            },
        };
        // Grows as bytes come, so that a claim alone costs nothing.
        let begun = Stream { what, length, bytes: wanted.then(Vec::new), came: 0 };
        if self.streams.insert(stream, begun).is_some() {
            return Err(Fault::Protocol(format!("stream {stream} begins twice")));
        }
        if length == 0 { self.end(stream) } else { Ok(None) }
    }

    /// Whether a chunk that nobody asked for is pushed to somebody who has room.
    fn takes_pushed(&self, length: usize) -> bool {
        !lock(&self.shared.opens).is_empty() && self.shared.pushed.load(Ordering::Relaxed) + length <= PUSHED_ROOM
    }

    fn data(&mut self, stream: u32, bytes: &[u8]) -> Result<Option<Report>, Fault> {
        let Some(begun) = self.streams.get_mut(&stream) else {
            return Err(Fault::Protocol(format!("bytes of stream {stream}, which never began")));
        };
        begun.came += bytes.len();
        if bytes.is_empty() || begun.came > begun.length {
            return Err(Fault::Protocol(format!("stream {stream} does not end where it must")));
        }
        if let Some(kept) = &mut begun.bytes {
            kept.extend_from_slice(bytes);
        }
        if begun.came == begun.length { self.end(stream) } else { Ok(None) }
    }

    fn end(&mut self, stream: u32) -> Result<Option<Report>, Fault> {
        let (what, bytes) = match self.streams.remove(&stream) {
            Some(Stream { what, bytes: Some(bytes), .. }) => (what, Bytes::from(bytes)),
            // What was read past and then asked for is not sent a second time unless it is asked for again.
            Some(Stream { what: What::Chunk { digest }, .. }) => {
                return Ok(lock(&self.shared.asked).remove(&digest).map(|_| Report::Missing { digest }));
            }
            _ => return Ok(None),
        };
        match what {
            What::Manifest { request } => self.tell(request, Item::Manifest(bytes)),
            What::Pushed { request } => self.tell(request, Item::End),
            What::Reply { request } => self.reply(request, Ok(bytes)),
            What::Key { id } => {
                if let Some(waits) = lock(&self.shared.keys).remove(&id) {
                    let _ = waits.send(Ok(bytes.clone()));
                }
                for open in lock(&self.shared.opens).values() {
                    let _ = open.try_send(Item::Key { id, bytes: bytes.clone() });
                }
            }
            What::Chunk { digest } => {
                self.counters.chunks.fetch_add(1, Ordering::Relaxed);
                self.push(digest, &bytes);
                // It may have been cancelled while it came, or be asked for since it began as a push.
                if lock(&self.shared.asked).remove(&digest).is_some() {
                    return Ok(Some(Report::Stored { digest, bytes }));
                }
            }
        }
        Ok(None)
    }

    /// Each open knows by its tables whether the chunk is one of its own.
    fn push(&self, digest: Digest, bytes: &Bytes) {
        for open in lock(&self.shared.opens).values() {
            self.shared.pushed.fetch_add(bytes.len(), Ordering::Relaxed);
            let room = Room { link: Arc::clone(&self.shared), bytes: bytes.len() };
            let _ = open.try_send(Item::Stored { digest, bytes: bytes.clone(), room });
        }
    }

    fn reply(&self, request: u32, reply: Result<Bytes, String>) {
        // One that nobody waits for any more is dropped.
        if let Some(waits) = lock(&self.shared.questions).remove(&request) {
            let _ = waits.send(reply);
        }
    }

    fn tell(&self, request: u32, item: Item) {
        if let Some(open) = lock(&self.shared.opens).get(&request) {
            let _ = open.try_send(item);
        }
    }
}
