//! The daemons' files, and the few things that every daemon reads at its start.

use anyhow::{Context, bail, ensure};
use ipnet::Ipv4Net;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use vmatrix_model::NetworkId;
use vmatrix_model::config::parse_toml;

/// `edge.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeFile {
    pub network: NetworkId,
    pub listen: SocketAddrV4,
    pub dns_listen: SocketAddrV4,
    pub state_dir: PathBuf,
    pub token_file: PathBuf,
    /// Base URL of the CPA. Its host is an address, for the packet filter lets it in by that.
    pub cpa: String,
    pub zone: String,
    /// The interface clients come in by.
    pub uplink: String,
    /// Other networks' machines, which give this network's chunks and singletons and get them from it.
    #[serde(default)]
    pub peers: BTreeSet<Ipv4Net>,
    /// Where this network's machines listen for them: the ports of their `transfer_listen`.
    #[serde(default = "usual_transfer_ports")]
    pub transfer_ports: BTreeSet<u16>,
}

fn usual_transfer_ports() -> BTreeSet<u16> {
    BTreeSet::from([8446])
}

/// `origin.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OriginFile {
    pub listen: SocketAddrV4,
    pub state_dir: PathBuf,
    pub token_file: PathBuf,
    /// The image store.
    pub store: PathBuf,
    /// Where tunnels arrive (UDP).
    pub tunnel_listen: SocketAddrV4,
    pub intranet: Ipv4Net,
    /// All that tunnelled cells may reach.
    pub backends: Vec<SocketAddrV4>,
}

/// Most back ends of one origin: each is an element of a set that is written by hand.
const BACKENDS_MAX: usize = 256;

impl EdgeFile {
    /// Reads `path`; relative paths in it begin at its own folder.
    ///
    /// # Errors
    /// The file is not there, has unknown or missing keys, or an interface or zone that cannot be one.
    pub fn read(path: &Path) -> anyhow::Result<EdgeFile> {
        let mut file: EdgeFile = read(path)?;
        ensure!(
            interface(&file.uplink),
            "{}: uplink {:?} is not an interface name: 1 to 15 of a-z, A-Z, 0-9, . _ -",
            path.display(),
            file.uplink
        );
        file.zone = file.zone.trim_end_matches('.').to_ascii_lowercase();
        let label =
            |l: &str| !l.is_empty() && l.len() <= 63 && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        ensure!(
            file.zone.len() <= 200 && file.zone.split('.').all(label),
            "{}: zone {:?} is not a domain name",
            path.display(),
            file.zone
        );
        for p in [&mut file.state_dir, &mut file.token_file] {
            *p = beside(path, p);
        }
        file.control().with_context(|| path.display().to_string())?;
        Ok(file)
    }

    /// Who may reach the network's control ports by the uplink: the CPA's address, which is the origin's,
    /// and the network's own addresses, of which a site has a /24 at least.
    ///
    /// # Errors
    /// The host of `cpa` is not an IPv4 address.
    pub fn control(&self) -> anyhow::Result<BTreeSet<Ipv4Net>> {
        let host = reqwest::Url::parse(&self.cpa).ok().and_then(|u| u.host_str()?.parse::<Ipv4Addr>().ok());
        let host = host.with_context(|| {
            format!("cpa {:?} must be http://<IPv4 address>:<port>: the packet filter lets that address in", self.cpa)
        })?;
        Ok(BTreeSet::from([Ipv4Net::from(host), Ipv4Net::new(*self.listen.ip(), 24)?.trunc()]))
    }
}

impl OriginFile {
    /// Reads `path`; relative paths in it begin at its own folder.
    ///
    /// # Errors
    /// The file is not there, has unknown or missing keys, an intranet that is too small, or back ends outside of it.
    pub fn read(path: &Path) -> anyhow::Result<OriginFile> {
        let mut file: OriginFile = read(path)?;
        ensure!(
            (8..=28).contains(&file.intranet.prefix_len()),
            "{}: intranet {} must be a /8 to /28",
            path.display(),
            file.intranet
        );
        ensure!(
            file.backends.len() <= BACKENDS_MAX,
            "{}: {} back ends are more than {BACKENDS_MAX}",
            path.display(),
            file.backends.len()
        );
        if let Some(outside) = file.backends.iter().find(|b| !file.intranet.contains(b.ip())) {
            bail!("{}: back end {outside} is outside the intranet {}", path.display(), file.intranet);
        }
        for p in [&mut file.state_dir, &mut file.token_file, &mut file.store] {
            *p = beside(path, p);
        }
        Ok(file)
    }
}

/// Reads a TOML file.
///
/// # Errors
/// It is not there, or has unknown or missing keys.
pub fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(parse_toml(&path.display().to_string(), &text)?)
}

fn beside(file: &Path, path: &Path) -> PathBuf {
    file.parent().map_or_else(|| path.to_owned(), |folder| folder.join(path))
}

/// Whether `name` can be an interface and cannot be anything else in a rule or a command.
pub fn interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && !name.starts_with('-')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Reads the fleet's token.
///
/// # Errors
/// The file is not there or empty, or holds more than a token can be.
pub fn read_token(path: &Path) -> anyhow::Result<String> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the fleet token {}", path.display()))?;
    let token = text.trim();
    ensure!(
        (1..=4096).contains(&token.len()) && token.bytes().all(|b| b.is_ascii_graphic()),
        "{} must hold one line, the fleet token",
        path.display()
    );
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_name_cannot_end_a_rule() {
        assert!(interface("wan0") && interface("eth0.100"));
        for bad in ["", "wan0\" accept", "a b", "-x", "sixteen-letters-"] {
            assert!(!interface(bad), "{bad:?} was taken");
        }
    }

    #[test]
    fn the_cpa_and_the_own_network_reach_the_control_ports_and_a_name_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("edge.toml");
        let text = "network = \"lyon\"\nlisten = \"198.19.1.1:8442\"\ndns_listen = \"198.19.1.1:53\"\nstate_dir = \"state\"\ntoken_file = \"token\"\ncpa = \"http://198.19.0.1:8440\"\nzone = \"vmatrix.test\"\nuplink = \"wan0\"\n";
        std::fs::write(&path, text).unwrap();
        let control: Vec<String> =
            EdgeFile::read(&path).unwrap().control().unwrap().iter().map(|n| n.to_string()).collect();
        assert_eq!(control, ["198.19.0.1/32", "198.19.1.0/24"]);
        std::fs::write(&path, text.replace("198.19.0.1:8440", "cpa.example:8440")).unwrap();
        let said = format!("{:#}", EdgeFile::read(&path).unwrap_err());
        assert!(said.contains("edge.toml") && said.contains("cpa.example") && said.contains("IPv4 address"), "{said}");
    }

    #[test]
    fn an_origin_file_is_read_and_a_back_end_outside_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("origin.toml");
        let text = "listen = \"198.19.0.1:8445\"\nstate_dir = \"state\"\ntoken_file = \"token\"\nstore = \"/store\"\ntunnel_listen = \"198.19.0.1:51820\"\nintranet = \"172.21.162.0/24\"\nbackends = [\"172.21.162.20:5432\"]\n";
        std::fs::write(&path, text).unwrap();
        let file = OriginFile::read(&path).unwrap();
        assert_eq!(file.state_dir, folder.path().join("state"));
        assert_eq!(file.store, Path::new("/store"));
        std::fs::write(&path, text.replace("172.21.162.20", "172.21.163.20")).unwrap();
        assert!(OriginFile::read(&path).unwrap_err().to_string().contains("outside the intranet"));
        std::fs::write(&path, text.replace("backends", "backend")).unwrap();
        assert!(OriginFile::read(&path).unwrap_err().to_string().contains("did you mean `backends`?"));
    }
}
