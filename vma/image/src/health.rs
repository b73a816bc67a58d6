//! Whether a guest serves: one plain HTTP request from inside its cell.

use crate::error::{Error, Result};
use crate::netns;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};
use vmatrix_model::manifest::Health;

/// A status line is shorter than this.
const STATUS_LINE_MAX: usize = 512;

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
        stream.set_write_timeout(Some(timeout))?;
        let request = format!("GET {} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n", health.path);
        stream.write_all(request.as_bytes())?;
        let mut line = Vec::new();
        let mut next = [0; 1];
        while line.len() < STATUS_LINE_MAX && !line.ends_with(b"\n") {
            // Of the whole, not of each read: a guest that sends a byte now and then would hold this for minutes.
            let left = timeout.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
            if stream.read(&mut next)? == 0 {
                break;
            }
            line.extend_from_slice(&next);
        }
        Ok(String::from_utf8_lossy(&line).trim().to_owned())
    })?
    .map_err(|e| unhealthy(format!("does not answer: {e}")))?;
    match line.split(' ').nth(1).and_then(|s| s.parse::<u16>().ok()) {
        Some(status) if status == health.status => Ok(began.elapsed()),
        _ => Err(unhealthy(format!("answers {line:?}, not {}", health.status))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const HERE: Ipv4Addr = Ipv4Addr::LOCALHOST;

    /// Answers one request in pieces, a pause before each.
    fn server(pieces: &'static [u8], pause: Duration) -> u16 {
        let listener = TcpListener::bind((HERE, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for piece in pieces.chunks(1) {
                std::thread::park_timeout(pause);
                if stream.write_all(piece).is_err() {
                    return;
                }
            }
        });
        port
    }

    fn ask(port: u16) -> Result<Duration> {
        let health = Health { port, path: "/".to_owned(), status: 200 };
        // Entering a namespace needs root, also this one.
        ask_blocking(Path::new("/proc/self/ns/net"), HERE, &health, Duration::from_millis(300))
    }

    #[test]
    fn machine_a_guest_that_answers_a_byte_at_a_time_gets_no_more_time_for_it() {
        let began = Instant::now();
        let error = ask(server(b"HTTP/1.0 200 OK\r\n", Duration::from_millis(100))).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(1), "it took {:?}", began.elapsed());
    }

    #[test]
    fn machine_an_answer_counts_by_its_status() {
        assert!(ask(server(b"HTTP/1.0 200 OK\r\n", Duration::ZERO)).is_ok());
        let error = ask(server(b"HTTP/1.0 503 Busy\r\n", Duration::ZERO)).unwrap_err();
        assert!(error.to_string().contains("503 Busy"), "{error}");
    }
}
