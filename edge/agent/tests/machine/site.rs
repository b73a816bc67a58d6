//! Throw-away namespaces, processes in them, and small servers and clients.

use nix::sched::{CloneFlags, setns};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const TOKEN: &str = "fleet-token-of-the-test";

/// Namespaces of one test and what runs in them; all gone when it is dropped.
pub struct Site {
    prefix: String,
    namespaces: Vec<String>,
    daemons: Vec<Child>,
    pub folder: tempfile::TempDir,
}

impl Site {
    pub fn new(namespaces: &[&str]) -> Site {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes network namespaces");
        let mut site = Site {
            prefix: format!("vmxt-{}", std::process::id()),
            namespaces: vec![],
            daemons: vec![],
            folder: tempfile::tempdir().unwrap(),
        };
        std::fs::write(site.folder.path().join("token"), TOKEN).unwrap();
        for name in namespaces {
            let full = site.name(name);
            run(&format!("ip netns add {full}"));
            site.namespaces.push(full);
            site.ip(name, "link set lo up");
        }
        site
    }

    pub fn name(&self, namespace: &str) -> String {
        format!("{}-{namespace}", self.prefix)
    }

    pub fn ip(&self, namespace: &str, args: &str) {
        run(&format!("ip -n {} {args}", self.name(namespace)));
    }

    /// Joins two namespaces: each end is `(namespace, interface, address/length)`.
    pub fn join(&self, a: (&str, &str, &str), b: (&str, &str, &str)) {
        run(&format!(
            "ip link add {} netns {} type veth peer name {} netns {}",
            a.1,
            self.name(a.0),
            b.1,
            self.name(b.0)
        ));
        for (namespace, device, address) in [a, b] {
            self.ip(namespace, &format!("addr add {address} dev {device}"));
            self.ip(namespace, &format!("link set {device} up"));
        }
    }

    /// Does `work` inside a namespace, on a thread of its own.
    pub fn within<T: Send>(&self, namespace: &str, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.name(namespace));
        std::thread::scope(|s| {
            s.spawn(move || {
                enter(&path);
                work()
            })
            .join()
            .unwrap()
        })
    }

    /// Leaves `work` running inside a namespace until the test's process ends.
    pub fn leave(&self, namespace: &str, work: impl FnOnce() + Send + 'static) {
        let path = format!("/run/netns/{}", self.name(namespace));
        std::thread::spawn(move || {
            enter(&path);
            work()
        });
    }

    /// Starts a daemon of this crate in a namespace; `what` as `examples/edge-daemons.rs` takes it.
    pub fn start(&mut self, namespace: &str, what: &str) -> usize {
        // Built with this test.
        let program = std::env::current_exe().unwrap().with_file_name("../examples/edge-daemons");
        let child = Command::new("ip")
            .args(["netns", "exec", &self.name(namespace)])
            .arg(program)
            .args(what.split(' '))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.daemons.push(child);
        self.daemons.len() - 1
    }

    /// Ends a daemon as `kill -9` does.
    pub fn kill(&mut self, daemon: usize) {
        self.daemons[daemon].kill().unwrap();
        self.daemons[daemon].wait().unwrap();
    }

    /// Ends a daemon as a supervisor does.
    pub fn terminate(&mut self, daemon: usize) -> bool {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.daemons[daemon].id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.daemons[daemon].wait().unwrap().success()
    }

    /// Asks a daemon over HTTP from within `namespace`.
    pub fn ask(&self, namespace: &str, to: &str, method: &str, path: &str, body: &str) -> (u16, String) {
        let to: SocketAddrV4 = to.parse().unwrap();
        self.within(namespace, || http(to, method, path, body, TOKEN)).unwrap_or((0, String::new()))
    }

    /// Waits until `done`, up to 20 s.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < Duration::from_secs(20), "waited 20 s for: {what}");
            wait(20);
        }
    }

    pub fn write(&self, file: &str, text: &str) -> String {
        let path = self.folder.path().join(file);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for namespace in &self.namespaces {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

/// Lets time pass.
#[allow(clippy::disallowed_methods, reason = "no runtime here that it could block")]
pub fn wait(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

pub fn enter(path: &str) {
    let file = std::fs::File::open(Path::new(path)).unwrap();
    setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
}

pub fn run(line: &str) -> String {
    let mut words = line.split(' ');
    let out = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap_or_else(|e| panic!("`{line}`: {e}: install it"));
    assert!(out.status.success(), "`{line}`: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

pub fn http(to: SocketAddrV4, method: &str, path: &str, body: &str, token: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&to.into(), Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    Ok((status, answer.split_once("\r\n\r\n").map_or(String::new(), |(_, b)| b.to_owned())))
}

/// Answers every line on every connection with `name` and the client's address.
pub fn echo_server(address: &str, name: &'static str) -> impl FnOnce() + Send + 'static + use<> {
    let address = address.to_owned();
    move || {
        let listener = TcpListener::bind(&address).unwrap();
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            std::thread::spawn(move || {
                let from = stream.peer_addr().map(|p| p.ip().to_string()).unwrap_or_default();
                let mut byte = [0u8; 1];
                while matches!(stream.read(&mut byte), Ok(1)) {
                    if byte[0] == b'\n' && writeln!(stream, "{name} {from}").is_err() {
                        return;
                    }
                }
            });
        }
    }
}

/// A connection kept open to an [`echo_server`].
pub struct Line(TcpStream);

impl Line {
    pub fn open(to: &str) -> std::io::Result<Line> {
        let to: SocketAddr = to.parse().unwrap();
        let stream = TcpStream::connect_timeout(&to, Duration::from_millis(1500))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.set_nodelay(true)?;
        Ok(Line(stream))
    }
    /// Who answers: name and the address it sees.
    pub fn say(&mut self, text: &str) -> std::io::Result<(String, Ipv4Addr)> {
        writeln!(self.0, "{text}")?;
        let mut answer = Vec::new();
        let mut byte = [0u8; 1];
        while self.0.read(&mut byte)? == 1 && byte[0] != b'\n' {
            answer.push(byte[0]);
        }
        let answer = String::from_utf8(answer).unwrap_or_default();
        let (name, from) = answer.split_once(' ').ok_or(std::io::ErrorKind::UnexpectedEof)?;
        Ok((name.to_owned(), from.parse().map_err(|_| std::io::ErrorKind::InvalidData)?))
    }
}
