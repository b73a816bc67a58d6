//! What a lab consists of, before anything is made: sites, addresses, daemons and their files. Pure.
//!
//! ```text
//! scenario + id + folder ─▶ sites (namespaces, `ip` lines), WAN config, daemons (arguments, files)
//! ```

use crate::wan::pipe::Wire;
use crate::wan::{Direction, Port, WanConfig, default_capture_bytes_max};
use anyhow::Context;
use ipnet::Ipv4Net;
use serde_json::json;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use vmatrix_model::fleet::Fleet;
use vmatrix_model::{NetworkId, SiteId};
use vmatrix_replay::scenario::{Daemon, Scenario};
use vmatrix_vma_transfer::identity::{Authority, Name, Role};

/// The interface by which a site meets the WAN.
pub const UPLINK: &str = "wan0";
/// Where the CPA listens, at the origin's gateway.
pub const CPA_PORT: u16 = 8440;
/// Where the CPA listens for people of its own machine: the page needs no token there.
pub const PAGE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8439);
/// Where a VM agent listens, at its network's gateway.
pub const VMA_PORT: u16 = 8441;
/// Where an edge listens for its configuration.
pub const EDGE_PORT: u16 = 8442;
/// Where the origin takes peers, and says what images there are.
pub const ORIGIN_PORT: u16 = 8445;
/// Where the origin's image store serves machines.
pub const STORE_PORT: u16 = 8446;
/// Where the first machine of a network gives others what it has; the next ones follow.
pub const TRANSFER_PORT: u16 = 8551;
/// The first machine of a network; the next ones follow.
pub const MACHINE_PORT: u16 = 8451;
/// UDP port of the origin's end of the tunnels.
pub const TUNNEL_PORT: u16 = 51820;
/// Folder of a daemon's certificate, in the daemon's own.
const IDENTITY: &str = "identity";
/// Most machines of one network: their ports must not run into others.
const MACHINES_MAX: u32 = 100;

/// Where a lab lives and what its things are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Four hex digits, in the name of everything the lab makes.
    pub id: String,
    /// Everything it writes, mode 0700.
    pub folder: PathBuf,
    /// The image store.
    pub store: PathBuf,
}

impl Place {
    /// What the names of all its namespaces begin with.
    pub fn prefix(&self) -> String {
        format!("vmx-{}-", self.id)
    }

    /// Name of a site's namespace.
    pub fn namespace(&self, site: &str) -> String {
        format!("{}{site}", self.prefix())
    }

    /// Where the back ends' data lie: beside the folder, for they belong to another user.
    pub fn databases(&self) -> PathBuf {
        let mut name = self.folder.clone().into_os_string();
        name.push("-db");
        PathBuf::from(name)
    }

    /// The folder of guests' memory, on a tmpfs; it may be [`Place::folder`].
    pub fn memory(&self) -> PathBuf {
        Path::new("/dev/shm").join(format!("vmatrix-{}", self.id))
    }

    /// The fleet's authority, for the time of the lab.
    pub fn authority(&self) -> PathBuf {
        self.folder.join("authority")
    }

    /// The fleet token, mode 0600.
    pub fn token_file(&self) -> PathBuf {
        self.folder.join("token")
    }

    /// The capture of the WAN.
    pub fn capture_file(&self) -> PathBuf {
        self.folder.join("wan.pcap")
    }

    /// The WAN's counters.
    pub fn stats_file(&self) -> PathBuf {
        self.folder.join("wan.json")
    }

    /// The WAN's configuration.
    pub fn wan_file(&self) -> PathBuf {
        self.folder.join("wan.toml")
    }
}

/// A place on the WAN, with the lines for `ip -n NAMESPACE -batch -` that furnish it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    pub name: SiteId,
    pub namespace: String,
    pub lines: String,
}

/// A daemon to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSpec {
    /// `vma-tokyo`, `machine-tokyo-1`; also the name of its folder.
    pub name: String,
    pub kind: Daemon,
    pub network: Option<NetworkId>,
    pub namespace: String,
    /// The subcommand of `vmatrix`.
    pub verb: &'static str,
    /// The name its certificate is made out to, where it has one.
    pub identity: Option<Name>,
    pub folder: PathBuf,
    /// Its TOML file.
    pub config: String,
}

impl DaemonSpec {
    /// Where its certificate is written.
    pub fn identity_folder(&self) -> PathBuf {
        self.folder.join(IDENTITY)
    }

    /// Where [`DaemonSpec::config`] is written.
    pub fn config_file(&self) -> PathBuf {
        self.folder.join("config.toml")
    }
}

/// The origin, networks and regions, in the fleet's order.
pub fn sites(fleet: &Fleet, place: &Place) -> Vec<Site> {
    let origin = std::iter::once((fleet.origin.name.clone(), fleet.origin.prefix, backend_lines(fleet)));
    // Addresses nobody has are dropped, else the default route would send their packets back and forth.
    let hole = |prefix: Ipv4Net| format!("route add blackhole {prefix}\n");
    let networks = fleet.networks.iter().map(|n| (SiteId::from(&n.name), n.prefix, hole(n.prefix)));
    // Every address of a region is a client's.
    let regions = fleet
        .regions
        .iter()
        .map(|r| (SiteId::from(&r.name), r.prefix, format!("route add local {} dev lo\n", r.prefix)));
    origin
        .chain(networks)
        .chain(regions)
        .map(|(name, prefix, more)| {
            let gateway = vmatrix_model::fleet::host(prefix, 1);
            let namespace = place.namespace(name.as_str());
            let lines = format!(
                "tuntap add dev {UPLINK} mode tun\naddr add {gateway}/32 dev {UPLINK}\nlink set {UPLINK} mtu 1500 up\nroute add default dev {UPLINK} src {gateway}\n{more}"
            );
            Site { name, namespace, lines }
        })
        .collect()
}

/// Back ends' addresses are the origin's own.
fn backend_lines(fleet: &Fleet) -> String {
    let addresses: std::collections::BTreeSet<Ipv4Addr> =
        fleet.services.iter().filter_map(|s| s.backend.as_ref()).map(|b| b.address).collect();
    addresses.iter().map(|a| format!("addr add {a}/32 dev lo\n")).collect()
}

/// The emulator's configuration: a link between every two sites, each way.
pub fn wan(scenario: &Scenario, place: &Place, capture: bool) -> WanConfig {
    let fleet = &scenario.fleet;
    let prefixes = std::iter::once(fleet.origin.prefix)
        .chain(fleet.networks.iter().map(|n| n.prefix))
        .chain(fleet.regions.iter().map(|r| r.prefix));
    let sites: Vec<SiteId> = fleet.sites().collect();
    let ports = sites
        .iter()
        .zip(prefixes)
        .map(|(s, p)| Port {
            site: s.to_string(),
            namespace: place.namespace(s.as_str()),
            interface: UPLINK.into(),
            prefixes: vec![p],
        })
        .collect();
    let pairs = sites.iter().flat_map(|a| sites.iter().filter(move |b| a != *b).map(move |b| (a, b)));
    let links = pairs
        .map(|(from, to)| {
            let link = fleet.link(from, to);
            let wire = Wire {
                delay_us: u64::from(link.rtt_ms) * 500,
                mbit: link.mbit,
                loss_ppm: link.loss_ppm,
                queue_us: u64::from(link.queue_ms) * 1000,
            };
            Direction { from: from.to_string(), to: to.to_string(), wire }
        })
        .collect();
    WanConfig {
        seed: scenario.seed,
        stats_file: place.stats_file(),
        capture_file: capture.then(|| place.capture_file()),
        capture_bytes_max: default_capture_bytes_max(),
        ports,
        links,
    }
}

/// Every daemon of the fleet, in the order in which they are started.
///
/// # Errors
/// A network has more machines than ports are kept for.
pub fn daemons(fleet: &Fleet, place: &Place, signers: &[String]) -> anyhow::Result<Vec<DaemonSpec>> {
    let gateway = |site: &SiteId| fleet.gateway(site).with_context(|| format!("site {site} has no gateway"));
    let origin = gateway(&fleet.origin.name)?;
    let url = |ip: Ipv4Addr, port: u16| format!("http://{ip}:{port}");
    let listen = |ip: Ipv4Addr, port: u16| SocketAddrV4::new(ip, port).to_string();
    let token = place.token_file();
    let spec = |name: String,
                kind,
                network: Option<&NetworkId>,
                verb,
                mut config: serde_json::Value|
     -> anyhow::Result<DaemonSpec> {
        let site = network.map_or(fleet.origin.name.as_str(), NetworkId::as_str);
        config["state_dir"] = json!("state");
        config["token_file"] = json!(token);
        let config = toml::to_string(&config).with_context(|| format!("cannot write the configuration of {name}"))?;
        Ok(DaemonSpec {
            folder: place.folder.join(&name),
            namespace: place.namespace(site),
            name,
            kind,
            network: network.cloned(),
            verb,
            identity: None,
            config,
        })
    };

    let backends: std::collections::BTreeSet<String> = fleet
        .services
        .iter()
        .filter_map(|s| s.backend.as_ref())
        .map(|b| SocketAddrV4::new(b.address, b.port).to_string())
        .collect();
    let store = std::path::absolute(&place.store).context("cannot tell where the store is")?;
    let mut all = vec![spec(
        "origin".into(),
        Daemon::Origin,
        None,
        "origin",
        json!({
            "listen": listen(origin, ORIGIN_PORT),
            "store": store,
            "tunnel_listen": listen(origin, TUNNEL_PORT),
            "intranet": fleet.origin.intranet,
            "backends": backends,
        }),
    )?];
    let folder = place.folder.join("store");
    let config = json!({
        "listen": listen(origin, STORE_PORT),
        "store": store,
        "identity": IDENTITY,
        "keys": store.join("keys"),
        "keep_windows": true,
        // A play leaves its images as they were, so that the next one is the same.
        "learn": false,
    });
    all.push(DaemonSpec {
        name: "store".into(),
        // Whoever kills the origin's gateway leaves its store.
        kind: Daemon::Origin,
        network: None,
        namespace: place.namespace(fleet.origin.name.as_str()),
        verb: "store",
        identity: Some(Name::new(Role::Store, "origin").context("the store's own name")?),
        folder,
        config: toml::to_string(&config).context("cannot write the configuration of the store")?,
    });
    let mut agents = serde_json::Map::new();
    for network in &fleet.networks {
        let own = gateway(&SiteId::from(&network.name))?;
        let others = fleet.networks.iter().filter(|n| n.name != network.name).map(|n| n.prefix.to_string());
        let ports = (0..network.machines).map(|machine| TRANSFER_PORT + machine as u16);
        agents.insert(network.name.to_string(), json!({ "vma": url(own, VMA_PORT), "edge": url(own, EDGE_PORT) }));
        all.push(spec(
            format!("edge-{}", network.name),
            Daemon::Edge,
            Some(&network.name),
            "edge",
            json!({
                "network": network.name,
                "listen": listen(own, EDGE_PORT),
                "dns_listen": listen(own, 53),
                "cpa": url(origin, CPA_PORT),
                "zone": fleet.zone,
                "uplink": UPLINK,
                "peers": others.collect::<Vec<_>>(),
                "transfer_ports": ports.collect::<Vec<_>>(),
            }),
        )?);
        all.push(spec(
            format!("vma-{}", network.name),
            Daemon::Vma,
            Some(&network.name),
            "vma",
            json!({
                "network": network.name,
                "listen": listen(own, VMA_PORT),
                "cpa": url(origin, CPA_PORT),
                "edge": url(own, EDGE_PORT),
            }),
        )?);
        anyhow::ensure!(
            network.machines <= MACHINES_MAX,
            "network {} has {} machines; a lab has ports for {MACHINES_MAX}",
            network.name,
            network.machines
        );
        for machine in 0..network.machines {
            let name = format!("m{}", machine + 1);
            let identity = Name::new(Role::Machine, &format!("{}-{name}", network.name))
                .with_context(|| format!("machine {name} of {}", network.name))?;
            let spec = spec(
                format!("machine-{}-{}", network.name, machine + 1),
                Daemon::Machine,
                Some(&network.name),
                "machine",
                json!({
                    "name": name,
                    "network": network.name,
                    "listen": listen(own, MACHINE_PORT + machine as u16),
                    "vma": url(own, VMA_PORT),
                    "identity": IDENTITY,
                    "sources": [listen(origin, STORE_PORT)],
                    "transfer_listen": listen(own, TRANSFER_PORT + machine as u16),
                    "memory_dir": place.memory(),
                    "origin": url(origin, ORIGIN_PORT),
                    "cpus": 2,
                    "memory_mib": network.machine_memory_mib,
                    "cells": format!("100.64.{machine}.0/24"),
                    "cell_prefix": place.namespace(&format!("{}-{name}", network.name)),
                    "signers": signers,
                }),
            )?;
            all.push(DaemonSpec { identity: Some(identity), ..spec });
        }
    }
    all.push(spec(
        "cpa".into(),
        Daemon::Cpa,
        None,
        "cpa",
        json!({
            "listen": listen(origin, CPA_PORT),
            "page_listen": PAGE.to_string(),
            "fleet_file": place.folder.join("fleet.toml"),
            "images": url(origin, ORIGIN_PORT),
            "tick_ms": 500,
            "agents": agents,
        }),
    )?);
    Ok(all)
}

/// Writes the files of `daemons`, the fleet and the token, and makes out the daemons' certificates.
///
/// # Errors
/// The folder cannot be written.
pub fn write(fleet: &Fleet, place: &Place, daemons: &[DaemonSpec], token: &str) -> anyhow::Result<()> {
    let put = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    put(&place.token_file(), token)?;
    put(&place.folder.join("fleet.toml"), &toml::to_string(fleet).context("cannot write the fleet as TOML")?)?;
    let authority = Authority::create(place.authority())?;
    for daemon in daemons {
        let state = daemon.folder.join("state");
        std::fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
        put(&daemon.config_file(), &daemon.config)?;
        if let Some(name) = &daemon.identity {
            authority.issue(name.role, &name.id)?.write(daemon.identity_folder())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario() -> Scenario {
        Scenario::read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../library/flash-crowd.toml"))).unwrap()
    }

    fn place() -> Place {
        Place { id: "a1b2".into(), folder: "/run/lab".into(), store: "/store".into() }
    }

    #[test]
    fn every_pair_of_sites_has_a_link_each_way_and_both_make_the_round_trip() {
        let scenario = scenario();
        let wan = wan(&scenario, &place(), true);
        let n = wan.ports.len();
        assert_eq!(wan.links.len(), n * (n - 1));
        let delay =
            |from: &str, to: &str| wan.links.iter().find(|l| l.from == from && l.to == to).unwrap().wire.delay_us;
        assert_eq!(delay("seoul", "tokyo") + delay("tokyo", "seoul"), 40_000);
    }

    #[test]
    fn every_network_has_an_edge_an_agent_and_its_machines() {
        let scenario = scenario();
        let all = daemons(&scenario.fleet, &place(), &["ab".into()]).unwrap();
        for network in &scenario.fleet.networks {
            let of = |kind| all.iter().filter(|d| d.kind == kind && d.network.as_ref() == Some(&network.name)).count();
            assert_eq!((of(Daemon::Edge), of(Daemon::Vma)), (1, 1));
            assert_eq!(of(Daemon::Machine), network.machines as usize);
        }
        let vma = all.iter().find(|d| d.name == "vma-tokyo").unwrap();
        let config: toml::Table = vma.config.parse().unwrap();
        let keys: Vec<&str> = config.keys().map(String::as_str).collect();
        assert_eq!(keys, ["cpa", "edge", "listen", "network", "state_dir", "token_file"], "as docs/api.md lists them");
        assert_eq!(vma.namespace, "vmx-a1b2-tokyo");
    }

    #[test]
    fn the_fleet_survives_its_file() {
        let fleet = scenario().fleet;
        assert_eq!(toml::from_str::<Fleet>(&toml::to_string(&fleet).unwrap()).unwrap(), fleet);
    }
}
