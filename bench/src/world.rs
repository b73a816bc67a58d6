//! Sites joined by the lab's WAN emulator: real TCP over a rate, a delay and a queue.
//!
//! ```text
//! vmb-<id>-<site>: wan0 198.18.<n>.1 ◀─ vmatrix wan ─▶ wan0 198.18.<m>.1 :vmb-<id>-<site>
//! ```
//! Congestion control is cubic by route (a namespace may not choose another default than its host's), windows are not cut after idling (a warm connection is warm),
//! and what one connection learned of a path is not handed to the next: each mechanism begins alike.

use crate::place::Place;
use crate::process::Running;
use crate::report::{median, ms};
use crate::stop::Stop;
use anyhow::{Context, bail};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};
use vmatrix_lab::namespace::{Namespace, ip_batch};
use vmatrix_lab::wan::pipe::Wire;
use vmatrix_lab::wan::{Direction, Port, WanConfig, WanStats, default_capture_bytes_max};

/// The emulator writes its counters every second, and makes its ports in some milliseconds.
const WAN_LIMIT: Duration = Duration::from_secs(10);
/// Nobody listens here, so a connection is refused after one round trip.
const CLOSED_PORT: u16 = 9;
/// Round trips that are timed.
const ROUND_TRIPS: u32 = 9;
/// Most sites: the third byte of their addresses.
const SITES_MAX: usize = 250;

/// A link, the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// 10^6 bits a second.
    pub mbit: u32,
    /// Both ways together, microseconds.
    pub rtt_us: u64,
}

impl Link {
    /// As printed and as `--rows` names it: `100/20`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.mbit, self.rtt_us / 1000)
    }

    fn wire(&self) -> Wire {
        // A queue of two round trips, at least 20 ms: what an access router has.
        Wire { delay_us: self.rtt_us / 2, mbit: self.mbit, loss_ppm: 0, queue_us: (self.rtt_us * 2).max(20_000) }
    }
}

/// A place on the WAN.
#[derive(Debug)]
pub struct Site {
    pub name: String,
    pub namespace: Namespace,
    pub address: Ipv4Addr,
}

/// Sites and the emulator between them. Dropped, the emulator and the namespaces are gone.
#[derive(Debug)]
pub struct World {
    pub sites: Vec<Site>,
    pub link: Link,
    // Before the namespaces go.
    wan: Option<Running>,
    stats: PathBuf,
}

/// What has crossed a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Crossed {
    /// Bytes of packets that entered, all directions.
    pub bytes: u64,
    /// Packets that found a queue full.
    pub dropped: u64,
}

impl World {
    /// Joins `names` by equal links, each with each.
    ///
    /// # Errors
    /// `ip` refuses, or the emulator does not start.
    pub fn new(place: &Place, program: &Path, names: &[&str], link: Link, stop: &Stop) -> anyhow::Result<World> {
        if names.len() > SITES_MAX {
            bail!("{} sites are more than {SITES_MAX}", names.len());
        }
        let stats = place.disk().join("wan.json");
        let mut world = World { sites: Vec::new(), link, wan: None, stats };
        for (i, name) in (0_u8..).zip(names) {
            let namespace = place.namespace(name);
            namespace.create()?;
            let address = Ipv4Addr::new(198, 18, i, 1);
            world.sites.push(Site { name: (*name).to_owned(), namespace, address });
        }
        for site in &world.sites {
            ip_batch(
                Some(&site.namespace),
                &format!(
                    "tuntap add dev wan0 mode tun\naddr add {0}/32 dev wan0\nlink set wan0 mtu 1500 txqueuelen 4000 up\n\
                     route add 198.18.0.0/16 dev wan0 src {0} congctl cubic\n",
                    site.address
                ),
            )?;
            site.namespace.run(settings)??;
        }
        match fs::remove_file(&world.stats) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context("cannot remove old counters"),
            _ => {}
        }
        let config = place.disk().join("wan.toml");
        fs::write(&config, toml::to_string(&world.config())?)
            .with_context(|| format!("cannot write {}", config.display()))?;
        let here = Namespace::named(&place.namespace_name(names.first().copied().unwrap_or_default()));
        let mut command = Command::new(program);
        command.args(["wan", "--config"]).arg(&config).stdin(Stdio::null());
        let log = place.disk().join("wan.log");
        world.wan = Some(Running::start("the WAN emulator", &mut command, &here, &log)?);
        let stats = world.stats.clone();
        let wan = &mut world.wan;
        stop.until("the WAN emulator's start", WAN_LIMIT, Duration::from_millis(5), || {
            wan.as_mut().map_or(Ok(()), Running::check)?;
            Ok(stats.exists().then_some(()))
        })?;
        Ok(world)
    }

    fn config(&self) -> WanConfig {
        let ports = self.sites.iter().map(|s| Port {
            site: s.name.clone(),
            namespace: s.namespace.name().to_owned(),
            interface: "wan0".to_owned(),
            prefixes: ipnet::Ipv4Net::new(s.address, 24).map(|n| n.trunc()).into_iter().collect(),
        });
        let pairs = self.sites.iter().flat_map(|a| self.sites.iter().map(move |b| (a, b)));
        WanConfig {
            seed: 1,
            stats_file: self.stats.clone(),
            capture_file: None,
            capture_bytes_max: default_capture_bytes_max(),
            ports: ports.collect(),
            links: pairs
                .filter(|(a, b)| a.name != b.name)
                .map(|(a, b)| Direction { from: a.name.clone(), to: b.name.clone(), wire: self.link.wire() })
                .collect(),
        }
    }

    /// A site by its number, as given to [`World::new`].
    ///
    /// # Errors
    /// There are not so many.
    pub fn site(&self, number: usize) -> anyhow::Result<&Site> {
        self.sites.get(number).with_context(|| format!("there is no site {number}"))
    }

    /// What has crossed so far, by the emulator's own counters; waits until they are fresh, up to a second.
    ///
    /// # Errors
    /// The emulator has ended, or writes nothing.
    pub fn crossed(&self, stop: &Stop) -> anyhow::Result<Crossed> {
        let asked = SystemTime::now();
        stop.until("fresh counters of the WAN emulator", WAN_LIMIT, Duration::from_millis(10), || {
            let written = fs::metadata(&self.stats).and_then(|m| m.modified()).ok();
            Ok(written.filter(|w| *w > asked).map(drop))
        })?;
        let stats = self.stats()?;
        Ok(stats.links.values().fold(Crossed::default(), |sum, c| Crossed {
            bytes: sum.bytes + c.bytes,
            dropped: sum.dropped + c.dropped,
        }))
    }

    /// Bytes that left a site by the emulator's last counters; see [`World::crossed`].
    ///
    /// # Errors
    /// The counters cannot be read.
    pub fn sent_by(&self, site: &str) -> anyhow::Result<u64> {
        let from = format!("{site}>");
        Ok(self.stats()?.links.iter().filter(|(name, _)| name.starts_with(&from)).map(|(_, c)| c.bytes).sum())
    }

    fn stats(&self) -> anyhow::Result<WanStats> {
        let text = fs::read(&self.stats).with_context(|| format!("cannot read {}", self.stats.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", self.stats.display()))
    }

    /// The round trip between two sites in milliseconds: the median of connections that are refused.
    ///
    /// # Errors
    /// Nothing comes back.
    pub fn round_trip_ms(&self, from: usize, to: usize) -> anyhow::Result<f64> {
        let to = SocketAddr::V4(SocketAddrV4::new(self.site(to)?.address, CLOSED_PORT));
        let times = self.site(from)?.namespace.run(|| {
            let once = |_| {
                let began = Instant::now();
                match TcpStream::connect_timeout(&to, Duration::from_secs(2)) {
                    Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => Ok(ms(began.elapsed())),
                    Err(e) => Err(e).with_context(|| format!("no way to {to}")),
                    Ok(_) => bail!("somebody listens at {to}"),
                }
            };
            (0..ROUND_TRIPS).map(once).collect::<anyhow::Result<Vec<f64>>>()
        })??;
        median(&times).context("no round trip was timed")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(wan) = self.wan.take() {
            wan.end(Duration::from_secs(1));
        }
        for site in &self.sites {
            if let Err(e) = site.namespace.remove() {
                tracing::warn!(namespace = site.namespace.name(), error = format!("{e:#}"), "a namespace stays");
            }
        }
    }
}

/// Of the namespace the calling thread is in.
fn settings() -> anyhow::Result<()> {
    for (key, value) in [("tcp_slow_start_after_idle", "0"), ("tcp_no_metrics_save", "1")] {
        let path = format!("/proc/sys/net/ipv4/{key}");
        fs::write(&path, value).with_context(|| format!("cannot set {path} to {value}"))?;
    }
    Ok(())
}
