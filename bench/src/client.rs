//! The measuring client: from the order to the first correct answer, as a user would see it.
//!
//! ```text
//! every few ms a new connection, none older than LIFE ─▶ request ─▶ answer
//!                                                       correct: first byte, last byte │ wrong: an error
//! ```

use crate::report::ms;
use crate::stop::Stop;
use crate::tls;
use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, getsockopt, socket, sockopt};
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use vmatrix_lab::namespace::Namespace;

/// A try that was not taken up is given up after so long.
const LIFE: Duration = Duration::from_millis(120);

/// Largest answer.
const ANSWER_MAX: usize = 16 << 20;
/// Bytes of a wrong answer that are shown.
const SHOWN: usize = 80;
/// Read at a time.
const PIECE: usize = 64 << 10;

/// What is asked, and what is right.
#[derive(Debug, Clone)]
pub struct Request {
    pub to: SocketAddrV4,
    /// The name TLS is spoken with; none: plain HTTP.
    pub tls: Option<&'static str>,
    /// Path with query.
    pub path: String,
    /// Further header lines, each with its line end.
    pub headers: String,
    pub right: Right,
}

/// When an answer is correct; its status is 200 or 206 in any case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Right {
    /// The body is exactly this.
    Body(Vec<u8>),
    /// The body has so many bytes.
    Length(usize),
    /// The body is a whole PNG picture.
    Picture,
    /// The body holds these words, which only the database at the origin has.
    Holds(String),
}

/// How many tries may be under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Tries reach the guest from the beginning: a server's queue of connections may have nine places, and a
    /// full one makes the next client wait a second.
    Bare,
    /// Tries are dropped on the way until the guest may be reached.
    Guarded,
}

impl Pace {
    fn tries(self) -> usize {
        match self {
            Pace::Bare => 3,
            Pace::Guarded => 6,
        }
    }

    /// Least time between the beginnings of two tries. Where they are dropped on the way they are spread over the
    /// life of one: a dropped try is sent again by the kernel a second later only, so a young one is always needed.
    fn every(self) -> Duration {
        match self {
            Pace::Bare => Duration::from_millis(5),
            Pace::Guarded => LIFE / 6,
        }
    }
}

/// When a correct answer came, milliseconds since the beginning that was given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answered {
    pub first_byte_ms: f64,
    pub whole_ms: f64,
}

/// Tries until a correct answer is there; times count from `began`.
///
/// # Errors
/// An answer is wrong, none comes within `limit`, or the bench was asked to end.
pub fn until_answered(
    inside: &Namespace,
    (request, pace): (&Request, Pace),
    began: Instant,
    limit: Duration,
    stop: &Stop,
) -> anyhow::Result<Answered> {
    inside.run(|| tries(request, pace, began, limit, stop))?
}

/// Asks once, on a new connection.
///
/// # Errors
/// The answer is wrong or none comes within `limit`.
pub fn ask(inside: &Namespace, request: &Request, limit: Duration) -> anyhow::Result<Answered> {
    inside.run(|| ask_here(request, limit))?
}

/// As [`ask`], from the namespace the calling thread is in.
///
/// # Errors
/// As [`ask`].
pub fn ask_here(request: &Request, limit: Duration) -> anyhow::Result<Answered> {
    let began = Instant::now();
    let stream = TcpStream::connect_timeout(&request.to.into(), limit)
        .with_context(|| format!("{} does not take a connection", request.to))?;
    Talk::begin(stream, request, limit)?.finish(request, began, limit)
}

fn tries(request: &Request, pace: Pace, began: Instant, limit: Duration, stop: &Stop) -> anyhow::Result<Answered> {
    let mut pending: Vec<(Instant, OwnedFd)> = Vec::with_capacity(pace.tries());
    let mut next = Instant::now();
    let mut trouble = String::from("no connection was taken");
    while began.elapsed() < limit {
        stop.check()?;
        let now = Instant::now();
        pending.retain(|(began, _)| now.saturating_duration_since(*began) < LIFE);
        if now >= next {
            if pending.len() < pace.tries() {
                pending.push((now, begin(request.to)?));
            }
            next = now + pace.every();
        }
        for ready in ready(&mut pending, next.saturating_duration_since(now))? {
            // Refused or reset: whoever is there is not ready yet.
            match getsockopt(&ready, sockopt::SocketError) {
                Ok(0) => {}
                Ok(e) => {
                    trouble = Errno::from_raw(e).to_string();
                    continue;
                }
                Err(e) => return Err(e).context("cannot look at a connection"),
            }
            // Only one user asks: a second later the kernel would send the others' tries again.
            pending.clear();
            let stream = TcpStream::from(ready);
            stream.set_nonblocking(false).context("cannot wait on a connection")?;
            let left = limit.saturating_sub(began.elapsed()).max(Duration::from_millis(1));
            match Talk::begin(stream, request, left) {
                Ok(talk) => return talk.finish(request, began, left),
                Err(e) => trouble = format!("{e:#}"),
            }
        }
    }
    bail!("{}{} gave no correct answer within {:.0} s: {trouble}", request.to, request.path, limit.as_secs_f64())
}

/// Begins a connection and does not wait for it.
fn begin(to: SocketAddrV4) -> anyhow::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None).context("cannot make a socket")?;
    match connect(fd.as_raw_fd(), &SockaddrIn::from(to)) {
        Ok(()) | Err(Errno::EINPROGRESS | Errno::EHOSTUNREACH | Errno::ENETUNREACH) => Ok(fd),
        Err(e) => Err(e).with_context(|| format!("cannot begin a connection to {to}")),
    }
}

/// Takes those out that were answered, waiting up to `wait` for one.
fn ready(pending: &mut Vec<(Instant, OwnedFd)>, wait: Duration) -> anyhow::Result<Vec<OwnedFd>> {
    let mut fds: Vec<PollFd> = pending.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLOUT)).collect();
    let wait = PollTimeout::from(wait.as_millis().clamp(1, 1000) as u16);
    match poll(&mut fds, wait) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => return Err(e).context("cannot wait for connections"),
    }
    let came: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
    let (mut out, mut left) = (Vec::new(), Vec::new());
    for ((began, fd), came) in pending.drain(..).zip(came) {
        if came { out.push(fd) } else { left.push((began, fd)) }
    }
    *pending = left;
    Ok(out)
}

/// Where bytes of HTTP go and come from.
trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A request whose answer has begun.
struct Talk {
    stream: Box<dyn Stream>,
    /// The same connection, for its time limits.
    socket: TcpStream,
    first: Instant,
    bytes: Vec<u8>,
}

impl Talk {
    /// Sends the request and returns when the first byte of its answer was there.
    fn begin(socket: TcpStream, request: &Request, limit: Duration) -> anyhow::Result<Talk> {
        socket.set_nodelay(true).context("cannot set a connection up")?;
        socket.set_read_timeout(Some(limit)).context("cannot set a connection up")?;
        let copy = socket.try_clone().context("cannot set a connection up")?;
        let mut stream: Box<dyn Stream> = match request.tls {
            None => Box::new(copy),
            Some(host) => Box::new(tls::over(copy, host)?),
        };
        let host = request.tls.map_or_else(|| request.to.ip().to_string(), str::to_owned);
        let text =
            format!("GET {} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n{}\r\n", request.path, request.headers);
        stream.write_all(text.as_bytes()).with_context(|| format!("cannot ask {}", request.to))?;
        let mut bytes = vec![0; PIECE];
        match stream.read(&mut bytes) {
            Ok(0) => bail!("{} closed the connection without an answer", request.to),
            Ok(n) => bytes.truncate(n),
            Err(e) => return Err(e).with_context(|| format!("{} does not answer", request.to)),
        }
        Ok(Talk { stream, socket, first: Instant::now(), bytes })
    }

    /// Reads the rest and checks all of it; times count from `began`.
    fn finish(mut self, request: &Request, began: Instant, limit: Duration) -> anyhow::Result<Answered> {
        let until = Instant::now() + limit;
        let mut piece = vec![0; PIECE];
        loop {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(left)).context("cannot set a connection up")?;
            match self.stream.read(&mut piece) {
                Ok(0) => break,
                Ok(n) => self.bytes.extend_from_slice(piece.get(..n).unwrap_or_default()),
                // Of TLS: closed without a farewell. Whether anything is missing is seen below.
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => break,
                Err(e) => return Err(e).with_context(|| format!("{} broke off", request.path)),
            }
            if self.bytes.len() > ANSWER_MAX || Instant::now() > until {
                bail!("{} answers without end", request.path);
            }
        }
        let whole = began.elapsed();
        check(&self.bytes, request)?;
        Ok(Answered { first_byte_ms: ms(self.first.saturating_duration_since(began)), whole_ms: ms(whole) })
    }
}

/// Whether an answer is the right one.
fn check(answer: &[u8], request: &Request) -> anyhow::Result<()> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n");
    let end = end.with_context(|| format!("{}: the answer has no header", request.path))?;
    let header = String::from_utf8_lossy(answer.get(..end).unwrap_or_default()).into_owned();
    let body = answer.get(end + 4..).unwrap_or_default();
    let status = header.split(' ').nth(1).unwrap_or_default();
    if status != "200" && status != "206" {
        bail!("{}: answered {:?}", request.path, header.lines().next().unwrap_or_default());
    }
    let right = match &request.right {
        Right::Body(wanted) => body == wanted,
        Right::Length(wanted) => body.len() == *wanted,
        Right::Holds(words) => body.windows(words.len().max(1)).any(|w| w == words.as_bytes()),
        Right::Picture => body.starts_with(b"\x89PNG\r\n") && body.ends_with(b"IEND\xaeB`\x82"),
    };
    if !right {
        let begin = String::from_utf8_lossy(body.get(..body.len().min(SHOWN)).unwrap_or_default()).into_owned();
        bail!("{}: the answer's body of {} bytes is not the right one; it begins {begin:?}", request.path, body.len());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    fn request(to: SocketAddrV4, right: Right) -> Request {
        Request { to, tls: None, path: "/x".into(), headers: String::new(), right }
    }

    fn serve(listener: TcpListener, answers: Vec<&'static [u8]>) {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut seen = Vec::new();
            let mut piece = [0; 512];
            while !seen.ends_with(b"\r\n\r\n") {
                match stream.read(&mut piece).unwrap_or(0) {
                    0 => break,
                    n => seen.extend_from_slice(&piece[..n]),
                }
            }
            // A try that was given up: the next one is another.
            let _ = stream.write_all(answer);
        }
    }

    fn local() -> (TcpListener, SocketAddrV4) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
    }

    #[test]
    fn the_first_correct_answer_counts_though_nobody_listened_at_first() {
        let (listener, to) = local();
        drop(listener);
        let late = std::thread::spawn(move || {
            std::thread::park_timeout(Duration::from_millis(150));
            serve(TcpListener::bind(to).unwrap(), vec![b"HTTP/1.0 200 OK\r\n\r\nhello"]);
        });
        let right = Right::Body(b"hello".to_vec());
        let answered =
            tries(&request(to, right), Pace::Bare, Instant::now(), Duration::from_secs(10), &Stop::default()).unwrap();
        assert!((150.0..3000.0).contains(&answered.first_byte_ms), "{answered:?}");
        assert!(answered.whole_ms >= answered.first_byte_ms);
        late.join().unwrap();
    }

    #[test]
    fn a_wrong_answer_is_an_error_and_not_a_time() {
        for (answer, right) in [
            (&b"HTTP/1.0 404 no\r\n\r\nhello"[..], Right::Body(b"hello".to_vec())),
            (b"HTTP/1.0 200 OK\r\n\r\nhell", Right::Body(b"hello".to_vec())),
            (b"HTTP/1.0 200 OK\r\n\r\nhello", Right::Length(4)),
            (b"HTTP/1.0 200 OK\r\n\r\nhello", Right::Picture),
            (b"HTTP/1.0 200 OK\r\n\r\nhello", Right::Holds("help".to_owned())),
            (b"HTTP/1.0 200 OK", Right::Length(0)),
        ] {
            let (listener, to) = local();
            let server = std::thread::spawn(move || serve(listener, vec![answer]));
            assert!(ask_here(&request(to, right.clone()), Duration::from_secs(5)).is_err(), "{right:?}");
            server.join().unwrap();
        }
    }
}
