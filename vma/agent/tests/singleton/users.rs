//! A user who counts over one connection, and one who writes.

use crate::world::{World, wait};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A connection that nothing passes on for so long is broken.
const BROKEN: Duration = Duration::from_secs(40);
/// Between a line's answer and the next line.
const PAUSE: Duration = Duration::from_millis(2);

/// Counts: each line is answered by its number and itself, in order, whatever happens to the server.
pub struct Counting {
    stop: Arc<AtomicBool>,
    lines: Arc<AtomicU64>,
    thread: JoinHandle<Vec<(Instant, Duration)>>,
}

impl Counting {
    /// Begins at `door`; answers wrong or missing end it with a panic.
    pub fn begin(world: &World, door: SocketAddr) -> Counting {
        let stream = world.inside("user", || TcpStream::connect_timeout(&door, Duration::from_secs(10)).unwrap());
        stream.set_read_timeout(Some(BROKEN)).unwrap();
        stream.set_nodelay(true).unwrap();
        let (stop, lines) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), lines.clone());
        let thread = std::thread::spawn(move || count(stream, &stopped, &counted));
        Counting { stop, lines, thread }
    }

    /// Lines that were answered.
    pub fn lines(&self) -> u64 {
        self.lines.load(Ordering::Relaxed)
    }

    /// Ends; when each answer came, and how long its line had waited for it.
    pub fn end(self) -> Vec<(Instant, Duration)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn count(mut stream: TcpStream, stop: &AtomicBool, lines: &AtomicU64) -> Vec<(Instant, Duration)> {
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    let mut waited = Vec::new();
    for n in 1u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let asked = Instant::now();
        stream.write_all(format!("line-{n}\n").as_bytes()).unwrap_or_else(|e| panic!("line {n} is not taken: {e}"));
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap_or_else(|e| panic!("line {n} is not answered: {e}"));
        assert_eq!(answer, format!("{n} line-{n}\n"), "a line was lost or came twice");
        waited.push((Instant::now(), asked.elapsed()));
        lines.store(n, Ordering::Relaxed);
        wait(PAUSE);
    }
    waited
}

/// Asks for a page over a connection of its own.
pub fn page(world: &World, door: SocketAddr, path: &str) -> Option<String> {
    page_within(world, door, path, BROKEN)
}

/// Asks for a page that may take its time.
pub fn page_within(world: &World, door: SocketAddr, path: &str, limit: Duration) -> Option<String> {
    world.inside("user", || {
        let mut stream = TcpStream::connect_timeout(&door, Duration::from_secs(20)).ok()?;
        stream.set_read_timeout(Some(limit)).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
    })
}
