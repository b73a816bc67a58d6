//! Two namespaces joined by a real emulator.

use super::*;
use crate::namespace::ip_batch;
use crate::scan;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

const A: Ipv4Addr = Ipv4Addr::new(198, 18, 1, 1);
const B: Ipv4Addr = Ipv4Addr::new(198, 18, 2, 1);

/// Two sites and the link between them; dropped, all is gone.
struct Pair {
    a: Namespace,
    b: Namespace,
    folder: tempfile::TempDir,
    words: UnixStream,
    emulator: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Pair {
    fn joined(id: &str, delay_ms: u64, mbit: u32) -> Pair {
        // As the lab starts it: a link's delay is as exact as the emulator's turn on a core. Threads
        // started from here inherit it.
        let thread = nix::unistd::gettid().to_string();
        let _ = std::process::Command::new("chrt").args(["--fifo", "--pid", "10", &thread]).status();
        let namespace = |site: &str| Namespace::named(&format!("vmx-{id}-{site}"));
        let (a, b) = (namespace("a"), namespace("b"));
        let folder = tempfile::tempdir().unwrap();
        let wire = Wire { delay_us: delay_ms * 1000, mbit, loss_ppm: 0, queue_us: 100_000 };
        let direction = |from: &str, to: &str| Direction { from: from.into(), to: to.into(), wire };
        let port = |site: &str, n: &Namespace, prefix: &str| Port {
            site: site.into(),
            namespace: n.name().into(),
            interface: "wan0".into(),
            prefixes: vec![prefix.parse().unwrap()],
        };
        let config = WanConfig {
            seed: 1,
            stats_file: folder.path().join("wan.json"),
            capture_file: Some(folder.path().join("wan.pcap")),
            capture_bytes_max: 1 << 20,
            ports: vec![port("a", &a, "198.18.1.0/24"), port("b", &b, "198.18.2.0/24")],
            links: vec![direction("a", "b"), direction("b", "a")],
        };
        let (words, ear) = UnixStream::pair().unwrap();
        let mut pair = Pair { a, b, folder, words, emulator: None };
        for (namespace, address) in [(&pair.a, A), (&pair.b, B)] {
            namespace.remove().unwrap();
            namespace.create().unwrap();
            let lines = format!(
                "tuntap add dev wan0 mode tun\naddr add {address}/32 dev wan0\nlink set wan0 up\nroute add default dev wan0 src {address}\n"
            );
            ip_batch(Some(namespace), &lines).unwrap();
        }
        ear.set_nonblocking(true).unwrap();
        let wan = Wan::open(config).unwrap();
        pair.emulator = Some(std::thread::spawn(move || {
            let hear = || {
                let mut word = [0];
                Ok(match (&ear).read(&mut word) {
                    Ok(1) if word == *b"c" => Some(Heard::Capture),
                    Ok(_) => Some(Heard::End),
                    Err(_) => None,
                })
            };
            wan.carry(ear.as_fd(), hear)
        }));
        pair
    }

    fn end(&mut self) -> WanStats {
        self.words.write_all(b"e").unwrap();
        self.emulator.take().unwrap().join().unwrap().unwrap();
        serde_json::from_slice(&std::fs::read(self.folder.path().join("wan.json")).unwrap()).unwrap()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = self.words.write_all(b"e");
        if let Some(emulator) = self.emulator.take() {
            let _ = emulator.join();
        }
        let _ = (self.a.remove(), self.b.remove());
    }
}

#[test]
fn machine_a_round_trip_takes_the_links_delay_and_the_capture_holds_it() {
    let mut pair = Pair::joined("0aa1", 20, 100);
    pair.words.write_all(b"c").unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !pair.folder.path().join("wan.pcap").exists() && Instant::now() < deadline {
        std::thread::yield_now();
    }
    let echo = pair.b.run(|| UdpSocket::bind((B, 7)).unwrap()).unwrap();
    echo.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let client = pair.a.run(|| UdpSocket::bind((A, 0)).unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    client.connect((B, 7)).unwrap();
    let echoing = std::thread::spawn(move || {
        let mut buffer = [0; 100];
        while let Ok((length, from)) = echo.recv_from(&mut buffer) {
            echo.send_to(&buffer[..length], from).unwrap();
        }
    });
    let mut trips: Vec<Duration> = (0..41)
        .map(|_| {
            let began = Instant::now();
            client.send(b"the canary sings").unwrap();
            client.recv(&mut [0; 100]).unwrap();
            began.elapsed()
        })
        .collect();
    trips.sort();
    let median = trips[20].as_secs_f64() * 1000.0;
    assert!((40.0..43.0).contains(&median), "median {median} ms");
    echoing.join().unwrap();

    let stats = pair.end();
    assert_eq!(stats.links["a>b"].packets, 41);
    assert_eq!(stats.captured, 82);
    assert_eq!(scan::occurrences(&pair.folder.path().join("wan.pcap"), &[b"canary"]).unwrap(), [82]);
}

#[test]
fn machine_a_link_that_is_offered_more_carries_its_rate() {
    let mut pair = Pair::joined("0aa2", 20, 100);
    let taking = pair.b.run(|| UdpSocket::bind((B, 9)).unwrap()).unwrap();
    taking.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let sending = pair.a.run(|| UdpSocket::bind((A, 0)).unwrap()).unwrap();
    let sender = std::thread::spawn(move || {
        let (_never, tick) = std::sync::mpsc::channel::<()>();
        let (began, mut sent) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs(3) {
            // 150 Mbit/s: 15 packets of 1250 bytes a millisecond.
            while sent < began.elapsed().as_micros() as u64 * 15 / 1000 {
                sending.send_to(&[0; 1222], (B, 9)).unwrap();
                sent += 1;
            }
            let _ = tick.recv_timeout(Duration::from_millis(1));
        }
    });
    let mut buffer = vec![0; 1 << 16];
    taking.recv(&mut buffer).unwrap();
    let (began, mut bytes) = (Instant::now(), 0_u64);
    while began.elapsed() < Duration::from_secs(2) {
        // With its headers, as the wire counts.
        bytes += taking.recv(&mut buffer).unwrap() as u64 + 28;
    }
    let mbit = bytes as f64 * 8.0 / 2e6;
    sender.join().unwrap();
    let stats = pair.end();
    assert!((85.0..115.0).contains(&mbit), "{mbit} Mbit/s over a link of 100: {stats:?}");
    assert!(stats.links["a>b"].dropped > 0, "{stats:?}");
}
