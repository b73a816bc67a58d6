//! Whether a guest serves: one plain HTTP request from inside its cell.

use crate::error::{Error, Result};
use crate::netns;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};
use vmatrix_model::manifest::Health;

/// A status line is shorter than this.
const STATUS_LINE_MAX: u64 = 512;

/// Asks once and returns how long the answer took.
///
/// # Errors
/// [`Error::Unhealthy`]: no connection, no answer within `timeout`, or another status.
pub async fn ask(netns: &Path, address: Ipv4Addr, health: &Health, timeout: Duration) -> Result<Duration> {
    let (netns, health) = (netns.to_owned(), health.clone());
    tokio::task::spawn_blocking(move || ask_blocking(&netns, address, &health, timeout))
        .await
        .map_err(|e| Error::Unhealthy(format!("asking {address} was cut off: {e}")))?
}

/// As [`ask`], for callers without a runtime.
///
/// # Errors
/// As [`ask`].
pub fn ask_blocking(netns: &Path, address: Ipv4Addr, health: &Health, timeout: Duration) -> Result<Duration> {
    let url = format!("http://{address}:{}{}", health.port, health.path);
    let began = Instant::now();
    let unhealthy = |problem: String| Error::Unhealthy(format!("{url} {problem}"));
    let line = netns::enter(netns, || -> std::io::Result<String> {
        let to = SocketAddr::V4(SocketAddrV4::new(address, health.port));
        let mut stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let request = format!("GET {} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n", health.path);
        stream.write_all(request.as_bytes())?;
        let mut first = [0; 1];
        let mut line = Vec::new();
        let mut bounded = stream.take(STATUS_LINE_MAX);
        while bounded.read(&mut first)? == 1 && !line.ends_with(b"\n") {
            line.extend_from_slice(&first);
        }
        Ok(String::from_utf8_lossy(&line).trim().to_owned())
    })?
    .map_err(|e| unhealthy(format!("does not answer: {e}")))?;
    match line.split(' ').nth(1).and_then(|s| s.parse::<u16>().ok()) {
        Some(status) if status == health.status => Ok(began.elapsed()),
        _ => Err(unhealthy(format!("answers {line:?}, not {}", health.status))),
    }
}
