//! The WAN emulator: a process that joins namespaces by links with delay, rate, loss and a queue.
//!
//! ```text
//! site A  wan0 ─▶ route by prefix ─▶ pipe A→B (delay, rate, loss, tail drop) ─▶ wan0  site B
//!                        └─▶ capture, from SIGUSR1 on
//! ```
//!
//! One thread, one TUN port a site, one pipe an ordered pair of sites. Kernels without netem and
//! fq cannot delay packets by themselves, hence user space. The ports are persistent: when this
//! process dies and is started again, addresses and routes are still there.
//!
//! Segmentation offload is deliberately absent: loss and serialisation are per packet on the wire.

pub mod capture;
pub mod pipe;

use crate::namespace::Namespace;
use anyhow::{Context, bail};
use capture::Capture;
use ipnet::Ipv4Net;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::{TimeSpec, TimeValLike};
use pipe::{Counters, Pipe, Wire};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tun_rs::{DeviceBuilder, Layer, SyncDevice};
use vmatrix_model::config::parse_toml;

/// Packets taken from one port before the others have their turn.
const BURST: usize = 64;
/// Longest packet a port hands over without offload.
const PACKET_MAX: usize = 65_536;
/// Counters are written so often, nanoseconds.
const STATS_EVERY: u64 = 1_000_000_000;

/// The emulator's configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WanConfig {
    /// Decides which packets are lost.
    pub seed: u64,
    /// Counters, as JSON, every second and at the end. It appears when the emulator is ready.
    pub stats_file: PathBuf,
    /// Where packets are captured once SIGUSR1 has come; a pcap file.
    #[serde(default)]
    pub capture_file: Option<PathBuf>,
    /// Largest capture file, bytes.
    #[serde(default = "default_capture_bytes_max")]
    pub capture_bytes_max: u64,
    /// One a site.
    #[serde(rename = "port")]
    pub ports: Vec<Port>,
    /// One an ordered pair of sites that reach each other.
    #[serde(rename = "link", default)]
    pub links: Vec<Direction>,
}

/// 1 GiB: a play of three minutes at 40 Mbit/s.
pub fn default_capture_bytes_max() -> u64 {
    1 << 30
}

/// Where a site meets the WAN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    pub site: String,
    /// The site's network namespace, as `ip netns` names it.
    pub namespace: String,
    /// Name of the TUN interface, which is made if it is not there.
    pub interface: String,
    /// Destinations that are sent to this site.
    pub prefixes: Vec<Ipv4Net>,
}

/// One direction of a link. Sites without one cannot reach each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Direction {
    pub from: String,
    pub to: String,
    pub wire: Wire,
}

/// What the emulator counted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WanStats {
    /// By `from>to`.
    pub links: BTreeMap<String, Counters>,
    /// Packets to an address that no site has, or between sites without a link.
    pub unroutable: u64,
    /// Packets in the capture.
    pub captured: u64,
    /// Whether the capture ran full, so that later packets are not in it.
    pub capture_full: bool,
}

/// Runs the emulator until SIGTERM or SIGINT.
///
/// # Errors
/// The file is wrong, a namespace is not there, or a port cannot be opened.
pub fn run(config: &Path) -> anyhow::Result<()> {
    let file = config.display().to_string();
    let text = std::fs::read_to_string(config).with_context(|| format!("cannot read {file}"))?;
    let config: WanConfig = parse_toml(&file, &text)?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .context("cannot open a signal descriptor")?;
    // Timers of ordinary threads may fire 50 µs late; a link of 1 Gbit/s sends four packets meanwhile.
    let _ = nix::sys::prctl::set_timerslack(1);
    let hear = || {
        let signal = signals.read_signal().context("cannot read signals")?;
        Ok(signal.map(|s| if s.ssi_signo == Signal::SIGUSR1 as u32 { Heard::Capture } else { Heard::End }))
    };
    Wan::open(config)?.carry(signals.as_fd(), hear)
}

/// What the emulator is told while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// Begin the capture.
    Capture,
    /// End.
    End,
}

struct Wan {
    config: WanConfig,
    ports: Vec<SyncDevice>,
    routes: Vec<(Ipv4Net, usize)>,
    /// By `from * ports + to`.
    pipes: Vec<Option<Pipe>>,
    capture: Option<Capture>,
    unroutable: u64,
    began: Instant,
}

impl Wan {
    fn open(config: WanConfig) -> anyhow::Result<Wan> {
        let ports = config.ports.iter().map(open_port).collect::<anyhow::Result<Vec<_>>>()?;
        let routes =
            config.ports.iter().enumerate().flat_map(|(i, p)| p.prefixes.iter().map(move |n| (*n, i))).collect();
        let number = |site: &str| {
            config
                .ports
                .iter()
                .position(|p| p.site == site)
                .with_context(|| format!("a link names site {site:?}, which has no port"))
        };
        let mut pipes: Vec<Option<Pipe>> = (0..ports.len() * ports.len()).map(|_| None).collect();
        for (i, link) in config.links.iter().enumerate() {
            let at = number(&link.from)? * ports.len() + number(&link.to)?;
            let Some(slot) = pipes.get_mut(at) else { bail!("link {} > {} has no place", link.from, link.to) };
            *slot = Some(Pipe::new(link.wire, config.seed.wrapping_add((i as u64) << 32)));
        }
        Ok(Wan { config, ports, routes, pipes, capture: None, unroutable: 0, began: Instant::now() })
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    /// Carries packets until `hear`, asked when `ear` is readable, says it is over.
    fn carry(mut self, ear: BorrowedFd<'_>, hear: impl Fn() -> anyhow::Result<Option<Heard>>) -> anyhow::Result<()> {
        self.write_stats()?;
        tracing::info!(ports = self.ports.len(), links = self.config.links.len(), "the WAN is up");
        let mut buffer = vec![0_u8; PACKET_MAX];
        let mut stats_at = STATS_EVERY;
        loop {
            self.deliver();
            let now = self.now();
            if now >= stats_at {
                self.write_stats()?;
                stats_at = now + STATS_EVERY;
            }
            let wake =
                self.pipes.iter().flatten().filter_map(Pipe::next_due).min().map_or(stats_at, |due| due.min(stats_at));
            let timeout = TimeSpec::nanoseconds(wake.saturating_sub(now) as i64);
            let readable = self.wait(ear, timeout)?;
            for port in readable {
                self.take_in(port, &mut buffer)?;
            }
            while let Some(heard) = hear()? {
                match heard {
                    Heard::Capture => self.begin_capture()?,
                    Heard::End => return self.write_stats(),
                }
            }
        }
    }

    /// Waits for a packet, a word or the timeout; answers which ports have packets.
    fn wait(&self, ear: BorrowedFd<'_>, timeout: TimeSpec) -> anyhow::Result<Vec<usize>> {
        // SAFETY: the descriptors belong to `self.ports`, which outlives these borrows.
        #[allow(unsafe_code)]
        let ports = self.ports.iter().map(|p| unsafe { BorrowedFd::borrow_raw(p.as_raw_fd()) });
        let mut fds: Vec<PollFd> = ports.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(ear, PollFlags::POLLIN));
        match ppoll(&mut fds, Some(timeout), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("cannot wait for packets"),
        }
        Ok(fds
            .iter()
            .take(self.ports.len())
            .enumerate()
            .filter(|(_, fd)| fd.any().unwrap_or(false))
            .map(|(i, _)| i)
            .collect())
    }

    fn take_in(&mut self, port: usize, buffer: &mut [u8]) -> anyhow::Result<()> {
        for _ in 0..BURST {
            let Some(Ok(length)) = self.ports.get(port).map(|p| p.recv(buffer)) else { return Ok(()) };
            let Some(packet) = buffer.get(..length) else { return Ok(()) };
            let Some(to) = destination(packet) else { continue };
            let now = self.now();
            let width = self.ports.len();
            let pipe = self
                .routes
                .iter()
                .find(|(prefix, _)| prefix.contains(&to))
                .and_then(|(_, site)| self.pipes.get_mut(port * width + site)?.as_mut());
            let Some(pipe) = pipe else {
                self.unroutable += 1;
                continue;
            };
            if let Some(capture) = &mut self.capture {
                capture.add(packet).context("cannot write the capture; is the disk full?")?;
            }
            pipe.enter(now, packet);
        }
        Ok(())
    }

    fn deliver(&mut self) {
        let now = self.now();
        let width = self.ports.len();
        for (i, pipe) in self.pipes.iter_mut().enumerate() {
            let Some(pipe) = pipe else { continue };
            while let Some(packet) = pipe.leave(now) {
                if let Some(port) = self.ports.get(i % width)
                    && let Err(e) = port.send(&packet)
                {
                    // As on any wire: a packet the other end does not take is gone.
                    tracing::debug!(%e, "a packet was not taken");
                }
            }
        }
    }

    fn begin_capture(&mut self) -> anyhow::Result<()> {
        if self.capture.is_none()
            && let Some(path) = &self.config.capture_file
        {
            self.capture = Some(
                Capture::create(path, self.config.capture_bytes_max)
                    .with_context(|| format!("cannot create {}", path.display()))?,
            );
            tracing::info!("the capture has begun");
        }
        Ok(())
    }

    fn write_stats(&mut self) -> anyhow::Result<()> {
        if let Some(capture) = &mut self.capture {
            capture.flush().context("cannot write the capture; is the disk full?")?;
        }
        let (captured, capture_full) = self.capture.as_ref().map_or((0, false), Capture::seen);
        let name = |i: usize| self.config.ports.get(i).map_or("", |p| p.site.as_str());
        let width = self.ports.len();
        let links = self
            .pipes
            .iter()
            .enumerate()
            .filter_map(|(i, p)| Some((format!("{}>{}", name(i / width), name(i % width)), p.as_ref()?.counters())))
            .collect();
        let stats = WanStats { links, unroutable: self.unroutable, captured, capture_full };
        let path = &self.config.stats_file;
        let next = path.with_extension("next");
        std::fs::write(&next, serde_json::to_vec(&stats)?)
            .and_then(|()| std::fs::rename(&next, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Opens a site's port from a thread inside its namespace; the descriptor then serves from outside.
fn open_port(port: &Port) -> anyhow::Result<SyncDevice> {
    let interface = port.interface.clone();
    let device = Namespace::named(&port.namespace)
        .run(move || {
            let device = DeviceBuilder::new().name(&interface).layer(Layer::L3).inherit_enable_state().build_sync()?;
            device.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(device)
        })?
        .with_context(|| {
            format!("cannot open {} in namespace {}; is /dev/net/tun there?", port.interface, port.namespace)
        })?;
    Ok(device)
}

/// Destination of an IPv4 packet; anything else is not carried.
fn destination(packet: &[u8]) -> Option<Ipv4Addr> {
    if packet.first()? >> 4 != 4 {
        return None;
    }
    let address: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    Some(Ipv4Addr::from(address))
}

#[cfg(test)]
mod tests;
