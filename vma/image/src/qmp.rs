//! QEMU's monitor: one JSON line out, one back, events in between.

use crate::error::{Error, Result, io};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, sleep, timeout_at};

/// A command answers at once; a busy machine may need seconds.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// Device state loads in 5 ms and saves in 8.
const STATE_LIMIT: Duration = Duration::from_secs(60);
/// Longest line; the longest answer known (`query-qmp-schema`) has 200 KiB.
const LINE_MAX: u64 = 1 << 20;
/// Events kept until somebody waits for them; older ones are forgotten first.
const EVENTS_MAX: usize = 64;

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<OwnedReadHalf>,
    out: OwnedWriteHalf,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects and shakes hands, waiting up to 20 s for the socket to appear.
    ///
    /// # Errors
    /// [`Error::Timeout`] if there is none, which is also how a QEMU that ended at once looks.
    pub async fn connect(path: &Path) -> Result<Qmp> {
        let deadline = Instant::now() + COMMAND_LIMIT;
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > deadline => return Err(io("connect to", path)(e)),
                Err(_) => sleep(Duration::from_millis(5)).await,
            }
        };
        let (read, out) = stream.into_split();
        let mut qmp = Qmp { lines: BufReader::new(read), out, events: Vec::new() };
        qmp.line(deadline, "greeting").await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command and returns what it answers.
    ///
    /// # Errors
    /// [`Error::Qmp`] with QEMU's own words, or [`Error::Timeout`].
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        let sent = self.out.write_all(line.as_bytes()).await;
        sent.map_err(|e| Error::Qmp { command: command.to_owned(), problem: e.to_string() })?;
        self.answer(command).await
    }

    /// Gives QEMU an open file, which goes with the monitor's last connection; returns its `/dev/fdset` number.
    async fn give(&mut self, file: &File) -> Result<u64> {
        let fail = |problem: String| Error::Qmp { command: "add-fd".to_owned(), problem };
        let line = json!({ "execute": "add-fd" }).to_string() + "\n";
        let stream: &UnixStream = self.out.as_ref();
        let send = || {
            let (text, file) = ([IoSlice::new(line.as_bytes())], [file.as_raw_fd()]);
            let with = [ControlMessage::ScmRights(&file)];
            sendmsg::<()>(stream.as_raw_fd(), &text, &with, MsgFlags::MSG_NOSIGNAL, None).map_err(Into::into)
        };
        // A line of this length goes into an empty socket whole.
        let sent = timeout_at(Instant::now() + COMMAND_LIMIT, stream.async_io(Interest::WRITABLE, send)).await;
        match sent {
            Ok(Ok(sent)) if sent == line.len() => {}
            Ok(Ok(sent)) => return Err(fail(format!("took {sent} of {} bytes", line.len()))),
            Ok(Err(e)) => return Err(fail(e.to_string())),
            Err(_) => return Err(Error::Timeout { what: "giving QEMU a file".into(), after: COMMAND_LIMIT }),
        }
        let answer = self.answer("add-fd").await?;
        answer.get("fdset-id").and_then(Value::as_u64).ok_or_else(|| fail(format!("answered {answer}")))
    }

    async fn answer(&mut self, command: &str) -> Result<Value> {
        let fail = |problem: String| Error::Qmp { command: command.to_owned(), problem };
        let deadline = Instant::now() + COMMAND_LIMIT;
        loop {
            let mut said = self.line(deadline, command).await?;
            if let Some(answer) = said.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = said.get("error") {
                return Err(fail(error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").to_owned()));
            }
            self.keep(said);
        }
    }

    /// Waits for an event by name; returns its data. Events that came earlier and were not waited for count.
    ///
    /// # Errors
    /// [`Error::Timeout`], or the connection ended.
    pub async fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.events.iter().position(|e| e.get("event").and_then(Value::as_str) == Some(name)) {
                let mut event = self.events.remove(at);
                return Ok(event.get_mut("data").map_or(Value::Null, Value::take));
            }
            let said = self.line(deadline, name).await?;
            self.keep(said);
        }
    }

    /// Loads device state saved by [`Qmp::save_state`] into a QEMU started with `-incoming defer`. Memory comes
    /// from its own file. The file is opened here: QEMU has become a user that may not.
    ///
    /// # Errors
    /// The file cannot be opened, or QEMU's own words: most often another machine type or device.
    pub async fn load_state(&mut self, device: &Path) -> Result<()> {
        self.capabilities().await?;
        let set = self.give(&File::open(device).map_err(io("open", device))?).await?;
        self.execute("migrate-incoming", json!({ "uri": format!("file:/dev/fdset/{set}") })).await?;
        let deadline = Instant::now() + STATE_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let data = self.wait_event("MIGRATION", left).await?;
            match data.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    return Err(Error::Qmp {
                        command: "migrate-incoming".into(),
                        problem: self.migration_problem().await,
                    });
                }
                _ => {}
            }
        }
    }

    /// Stops the guest and saves its device state, without memory, which is in its own shared file. The file is made
    /// here: QEMU may have become a user that may not.
    ///
    /// # Errors
    /// The file cannot be written, or QEMU's own words.
    pub async fn save_state(&mut self, device: &Path) -> Result<()> {
        self.execute("stop", json!({})).await?;
        self.capabilities().await?;
        let set = self.give(&File::create(device).map_err(io("write", device))?).await?;
        self.execute("migrate", json!({ "uri": format!("file:/dev/fdset/{set}") })).await?;
        let deadline = Instant::now() + STATE_LIMIT;
        loop {
            let status = self.execute("query-migrate", json!({})).await?;
            match status.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let problem = status.get("error-desc").and_then(Value::as_str).unwrap_or("no reason given");
                    return Err(Error::Qmp { command: "migrate".into(), problem: problem.to_owned() });
                }
                _ if Instant::now() > deadline => {
                    return Err(Error::Timeout { what: "saving device state".into(), after: STATE_LIMIT });
                }
                _ => sleep(Duration::from_millis(2)).await,
            }
        }
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn cont(&mut self) -> Result<()> {
        self.execute("cont", json!({})).await.map(drop)
    }

    /// Ends QEMU at once.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn quit(mut self) -> Result<()> {
        self.execute("quit", json!({})).await.map(drop)
    }

    async fn capabilities(&mut self) -> Result<()> {
        let on = |capability: &str| json!({ "capability": capability, "state": true });
        let list = json!({ "capabilities": [on("events"), on("x-ignore-shared")] });
        self.execute("migrate-set-capabilities", list).await.map(drop)
    }

    async fn migration_problem(&mut self) -> String {
        // QEMU ends by itself after a failed load; then its stderr holds the reason.
        let status = self.execute("query-migrate", json!({})).await.unwrap_or(Value::Null);
        let words = status.get("error-desc").and_then(Value::as_str);
        words.unwrap_or("the state does not fit this machine; see QEMU's own output").to_owned()
    }

    async fn line(&mut self, deadline: Instant, what: &str) -> Result<Value> {
        let fail = |problem: String| Error::Qmp { command: what.to_owned(), problem };
        let mut text = Vec::new();
        let mut bounded = (&mut self.lines).take(LINE_MAX);
        match timeout_at(deadline, bounded.read_until(b'\n', &mut text)).await {
            Err(_) => Err(Error::Timeout { what: format!("QEMU's answer to {what}"), after: COMMAND_LIMIT }),
            Ok(Err(e)) => Err(fail(e.to_string())),
            Ok(Ok(0)) => Err(fail("QEMU ended; see its own output".to_owned())),
            Ok(Ok(_)) => serde_json::from_slice(&text).map_err(|e| fail(format!("not JSON: {e}"))),
        }
    }

    fn keep(&mut self, said: Value) {
        if said.get("event").is_some() {
            if self.events.len() == EVENTS_MAX {
                self.events.remove(0);
            }
            self.events.push(said);
        }
    }
}
