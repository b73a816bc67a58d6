//! Talking to the program inside the guest: one JSON line there, one back.

use crate::error::{Error, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// A resumed guest answers in some 50 ms under TCG, seconds on a busy machine.
const AWAKEN_LIMIT: Duration = Duration::from_secs(10);
/// What a guest's clock may be behind: what an ordinary NTP client over the Internet reaches.
const CLOCK_APART: Duration = Duration::from_millis(20);
/// A warm exchange takes some 5 ms; more tries than these would only wait on a machine that is too busy.
const EXCHANGES: u32 = 6;
/// Compacting memory takes a while.
const MEMORY_LIMIT: Duration = Duration::from_secs(60);
/// Longest answer: a run of pages takes some 20 bytes, and 8 GiB have some 50,000 of them.
const LINE_MAX: u64 = 8 << 20;
/// Random bytes given to a guest: as many as its kernel's pool is wide, twice.
const SEED_BYTES: usize = 64;
/// Of /etc/machine-id.
const MACHINE_ID_BYTES: usize = 16;

/// What a guest said when it woke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Awake {
    /// The guest's clock after the step, microseconds since the epoch.
    pub clock_unix_us: u64,
    /// This machine's clock when the answer came.
    pub host_unix_us: u64,
}

/// Gives a resumed clone fresh random bytes, the time, and an identity of its own: a machine id, and whatever its
/// image renews (keys, tickets). To be done before it gets traffic: clones of one image would otherwise draw the
/// same "random" numbers, at the time of the suspend.
///
/// The first exchange finds a cold guest (150 ms under TCG) and leaves its clock behind by as much, so it
/// is repeated until the clocks are [`CLOCK_APART`] apart at most, or [`EXCHANGES`] were made.
///
/// # Errors
/// The guest does not answer, or says what failed.
pub async fn awaken(socket: &Path) -> Result<Awake> {
    let first = exchange(socket, Some(random::<MACHINE_ID_BYTES>()?)).await?;
    settle(socket, first).await
}

/// As [`awaken`], for a guest that moved and stays who it was.
///
/// # Errors
/// As [`awaken`].
pub async fn awaken_same(socket: &Path) -> Result<Awake> {
    let first = exchange(socket, None).await?;
    settle(socket, first).await
}

async fn settle(socket: &Path, mut awake: Awake) -> Result<Awake> {
    for _ in 1..EXCHANGES {
        if Duration::from_micros(awake.host_unix_us.abs_diff(awake.clock_unix_us)) <= CLOCK_APART {
            break;
        }
        awake = exchange(socket, None).await?;
    }
    Ok(awake)
}

async fn exchange(socket: &Path, machine_id: Option<[u8; MACHINE_ID_BYTES]>) -> Result<Awake> {
    let seed = STANDARD.encode(random::<SEED_BYTES>()?);
    let mut line = json!({ "reseed": seed, "clock_unix_us": unix_us() });
    if let (Some(id), Some(fields)) = (machine_id, line.as_object_mut()) {
        fields.insert("machine_id".to_owned(), STANDARD.encode(id).into());
    }
    let answer = ask(socket, &line, AWAKEN_LIMIT).await?;
    let clock_unix_us = answer
        .get("clock_unix_us")
        .and_then(Value::as_u64)
        .ok_or_else(|| Error::Guest(format!("answered without its clock: {answer}")))?;
    Ok(Awake { clock_unix_us, host_unix_us: unix_us() })
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| Error::Guest(format!("this machine has no random bytes: {e}")))?;
    Ok(bytes)
}

/// Has the guest give its page cache back and move what is used together.
///
/// # Errors
/// The guest does not answer, or says what failed.
pub async fn trim(socket: &Path) -> Result<()> {
    memory(socket, "trim").await.map(drop)
}

/// Has the guest put its free memory where nobody uses it until [`take_back`], and tell where that is: runs of
/// pages, each by its first frame's number and their count. What is in them may be made zeros meanwhile.
///
/// # Errors
/// The guest does not answer, or says what failed.
pub async fn lend(socket: &Path) -> Result<Vec<(u64, u64)>> {
    runs(memory(socket, "lend").await?)
}

/// Gives the guest back what it lent.
///
/// # Errors
/// The guest does not answer, or says what failed.
pub async fn take_back(socket: &Path) -> Result<()> {
    memory(socket, "take_back").await.map(drop)
}

/// What each of the guest's pages is in use for, as runs from frame 0 on: `free`, `slab`, `program`, `file`, …
///
/// # Errors
/// The guest does not answer, or says what failed.
pub async fn kinds(socket: &Path) -> Result<Vec<(String, u64)>> {
    runs(memory(socket, "kinds").await?)
}

async fn memory(socket: &Path, what: &str) -> Result<Value> {
    ask(socket, &json!({ "memory": what }), MEMORY_LIMIT).await
}

fn runs<T: serde::de::DeserializeOwned>(mut answer: Value) -> Result<T> {
    let runs = answer.get_mut("runs").map(Value::take).unwrap_or_default();
    serde_json::from_value(runs).map_err(|e| Error::Guest(format!("answered no runs of pages: {e}")))
}

async fn ask(socket: &Path, line: &Value, limit: Duration) -> Result<Value> {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(format!("{line}\n").as_bytes()).await?;
        let mut text = Vec::new();
        BufReader::new(stream).take(LINE_MAX).read_until(b'\n', &mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = timeout(limit, exchange)
        .await
        .map_err(|_| Error::Timeout { what: "the guest agent's answer".into(), after: limit })?
        .map_err(|e| Error::Guest(format!("{}: {e}", socket.display())))?;
    let answer: Value = serde_json::from_slice(&text)
        .map_err(|e| Error::Guest(format!("answered no JSON ({e}): {}", String::from_utf8_lossy(&text))))?;
    match answer.get("ok").and_then(Value::as_bool) {
        Some(true) => Ok(answer),
        _ => Err(Error::Guest(answer.get("error").and_then(Value::as_str).unwrap_or("refused").to_owned())),
    }
}

fn unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}
