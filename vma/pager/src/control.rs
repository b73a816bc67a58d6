//! Telling a pager what to do: one JSON line there, one back.
//!
//! ```text
//! {"adopt":{"pid":42}} ─▶ {"done":null}      "status" ─▶ {"status":{…}}      anything that fails ─▶ {"failed":"why"}
//! ```
//! The socket is root's alone. A line has at most 4 KiB there and 32 MiB back: the written pages of a large guest.

use crate::engine::Status;
use crate::error::{Error, Result};
use crate::socket;
use crate::state::MISSED_MAX;
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// Longest line of a request.
const REQUEST_MAX: u64 = 4 << 10;
/// Longest line of an answer: a million runs of pages.
const ANSWER_MAX: u64 = 32 << 20;
/// Connections served at once: one machine agent, its warm pool, and people who look.
const CONNECTIONS_MAX: usize = 64;

/// What a pager is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    Adopt { pid: i32 },
    Status,
    Recorded,
    Missed,
    Pause { paused: bool },
    Protect { pid: i32 },
    Dirty { pid: i32 },
    Written,
    Quit,
}

/// What it answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Done,
    Status(Status),
    Pages(Vec<u32>),
    /// Each a first page and the one after the last.
    Runs(Vec<(u32, u32)>),
    Chunks(Vec<u32>),
    Failed(String),
}

/// A connection to a pager.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    lines: BufReader<OwnedReadHalf>,
    out: OwnedWriteHalf,
}

impl Control {
    /// Connects to the pager whose control socket is at `path`.
    ///
    /// # Errors
    /// There is none, or this process is not root's.
    pub async fn connect(path: &Path) -> Result<Control> {
        let stream = UnixStream::connect(path).await.map_err(|e| Error::Control {
            path: path.to_owned(),
            problem: format!("cannot connect ({e}); is a pager running with this configuration?"),
        })?;
        let (read, out) = stream.into_split();
        Ok(Control { path: path.to_owned(), lines: BufReader::new(read), out })
    }

    /// Has it take over the faults of process `pid`, which may still be starting: waits up to 20 s until it has
    /// mapped its memory. Also lets that process have the disks.
    ///
    /// # Errors
    /// There is no such process, or it cannot be served: end it.
    pub async fn adopt(&mut self, pid: i32) -> Result<()> {
        self.done(&Request::Adopt { pid }).await
    }

    /// How far memory and disk have arrived.
    ///
    /// # Errors
    /// The pager has ended.
    pub async fn status(&mut self) -> Result<Status> {
        match self.ask(&Request::Status).await? {
            Answer::Status(status) => Ok(status),
            other => Err(self.odd(&other)),
        }
    }

    /// Pages in order of first touch, as [`crate::Engine::recorded`].
    ///
    /// # Errors
    /// The pager has ended.
    pub async fn recorded(&mut self) -> Result<Vec<u32>> {
        match self.ask(&Request::Recorded).await? {
            Answer::Pages(pages) => Ok(pages),
            other => Err(self.odd(&other)),
        }
    }

    /// Pages that guests had to wait for and that nothing foresaw, as [`crate::Engine::missed`].
    ///
    /// # Errors
    /// The pager has ended, or names more than it may.
    pub async fn missed(&mut self) -> Result<Vec<u32>> {
        match self.ask(&Request::Missed).await? {
            Answer::Pages(pages) if pages.len() <= MISSED_MAX => Ok(pages),
            other => Err(self.odd(&other)),
        }
    }

    /// Has it fetch nothing ahead of need but the working set.
    ///
    /// # Errors
    /// The pager has ended.
    pub async fn pause_background(&mut self) -> Result<()> {
        self.done(&Request::Pause { paused: true }).await
    }

    /// Has it go on.
    ///
    /// # Errors
    /// The pager has ended.
    pub async fn resume_background(&mut self) -> Result<()> {
        self.done(&Request::Pause { paused: false }).await
    }

    /// Begins anew to note which pages process `pid` writes, as [`crate::Engine::protect`]; never because the pager
    /// was started anew.
    ///
    /// # Errors
    /// It is not adopted or not tracked.
    pub async fn protect(&mut self, pid: i32) -> Result<()> {
        self.done(&Request::Protect { pid }).await
    }

    /// The pages that process `pid` has written since, as [`crate::Engine::dirty`].
    ///
    /// # Errors
    /// It is not adopted or not tracked.
    pub async fn dirty(&mut self, pid: i32) -> Result<Vec<Range<u32>>> {
        match self.ask(&Request::Dirty { pid }).await? {
            Answer::Runs(runs) => Ok(runs.into_iter().map(|(start, end)| start..end).collect()),
            other => Err(self.odd(&other)),
        }
    }

    /// The chunks of the image's data that differ from the image, by index, in order; some may have been written with
    /// what they held before. Ask while the guest stands still, after its disks were flushed (QEMU does that when it
    /// saves the device state).
    ///
    /// # Errors
    /// The image has no data, or nobody writes it here.
    pub async fn written(&mut self) -> Result<Vec<u32>> {
        match self.ask(&Request::Written).await? {
            Answer::Chunks(chunks) => Ok(chunks),
            other => Err(self.odd(&other)),
        }
    }

    /// Has it end. Guests that still miss pages wait for the next one.
    ///
    /// # Errors
    /// It has ended already.
    pub async fn quit(&mut self) -> Result<()> {
        self.done(&Request::Quit).await
    }

    async fn done(&mut self, request: &Request) -> Result<()> {
        match self.ask(request).await? {
            Answer::Done => Ok(()),
            other => Err(self.odd(&other)),
        }
    }

    async fn ask(&mut self, request: &Request) -> Result<Answer> {
        let mut line = serde_json::to_vec(request).map_err(|e| self.fault(e.to_string()))?;
        line.push(b'\n');
        self.out.write_all(&line).await.map_err(|e| self.fault(e.to_string()))?;
        let mut text = Vec::new();
        let read = (&mut self.lines).take(ANSWER_MAX).read_until(b'\n', &mut text).await;
        match read {
            Ok(0) => Err(Error::Ended),
            Ok(_) => match serde_json::from_slice(&text).map_err(|e| self.fault(format!("answers oddly: {e}")))? {
                Answer::Failed(problem) => Err(self.fault(problem)),
                answer => Ok(answer),
            },
            Err(e) => Err(self.fault(e.to_string())),
        }
    }

    fn odd(&self, answer: &Answer) -> Error {
        self.fault(format!("answers something else: {answer:.80?}"))
    }

    fn fault(&self, problem: String) -> Error {
        Error::Control { path: self.path.clone(), problem }
    }
}

/// Answers whoever connects, for ever.
pub(crate) async fn serve<F, A>(listener: UnixListener, answer: F)
where
    F: Fn(Request) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Answer> + Send,
{
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = socket::accept(&listener).await;
        let answer = answer.clone();
        tokio::spawn(async move {
            // Whoever goes away in the middle is not owed an answer.
            let _ = converse(stream, answer).await;
            drop(place);
        });
    }
}

async fn converse<F, A>(stream: UnixStream, answer: F) -> std::io::Result<()>
where
    F: Fn(Request) -> A,
    A: Future<Output = Answer>,
{
    let (read, mut out) = stream.into_split();
    let mut lines = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        if (&mut lines).take(REQUEST_MAX).read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let said = match serde_json::from_slice(&line) {
            Ok(request) => answer(request).await,
            Err(e) => Answer::Failed(format!("not a request: {e}")),
        };
        let mut text = serde_json::to_vec(&said)?;
        text.push(b'\n');
        out.write_all(&text).await?;
        if line.last() != Some(&b'\n') {
            // Longer than any request, or cut off: what follows would be read as another.
            return Ok(());
        }
    }
}
