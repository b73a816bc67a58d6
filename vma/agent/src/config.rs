//! The two daemons' TOML files.

use crate::error::Error;
use ipnet::Ipv4Net;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::net::{SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use vmatrix_model::{MachineId, NetworkId};

/// `vma.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmaConfig {
    pub network: NetworkId,
    pub listen: SocketAddrV4,
    /// Holds the last good assignment.
    pub state_dir: PathBuf,
    pub token_file: PathBuf,
    /// Base URL of the CPA.
    pub cpa: String,
    /// Base URL of the network's edge.
    pub edge: String,
}

/// `machine.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    pub name: MachineId,
    pub network: NetworkId,
    pub listen: SocketAddrV4,
    /// Holds the store of images, one folder per cell and one per image that runs.
    pub state_dir: PathBuf,
    pub token_file: PathBuf,
    /// Base URL of the network's VM agent.
    pub vma: String,
    /// Folder with this machine's certificate: `ca.pem`, `cert.pem`, `key.pem`.
    pub identity: PathBuf,
    /// Who is asked for images, the best first: `vmatrix store` daemons and other machines.
    pub sources: Vec<SocketAddr>,
    /// Where this machine gives others what it has; none: to nobody.
    #[serde(default)]
    pub transfer_listen: Option<SocketAddr>,
    /// A tmpfs that holds guests' memory, in a folder named by `cell_prefix`.
    #[serde(default = "shm")]
    pub memory_dir: PathBuf,
    /// Cap on bytes fetched in the background, and on those given to others, Mbit/s; none: as fast as it goes.
    #[serde(default)]
    pub rate_mbit: Option<u64>,
    /// Most images that are kept ready while nothing runs from them, with a pager that has what a guest needs first
    /// in memory and waits; at most [`WARM_MAX`].
    #[serde(default = "warm")]
    pub warm: u32,
    /// Base URL of the origin's gateway, where tunnels end.
    pub origin: String,
    pub cpus: u32,
    /// Memory lent to guests, MiB; what is left of it keeps the memory of images that were suspended.
    pub memory_mib: u64,
    /// Addresses of cells within the network, a /30 each.
    pub cells: Ipv4Net,
    /// Namespaces are `<cell_prefix>-<instance>`.
    pub cell_prefix: String,
    /// Public keys of whose images are resumed, 64 hex digits each.
    pub signers: Vec<String>,
}

/// Longest path of a Unix socket, from the kernel's `sockaddr_un`.
const SOCKET_PATH_MAX: usize = 107;
/// Most images kept ready: each is a process of some 20 MiB and its working set.
pub const WARM_MAX: u32 = 64;
/// Most sources: each is a connection that is kept warm.
const SOURCES_MAX: usize = 64;
/// Room below `state_dir` for `/cells/<30>-<number>/agent`.
const BELOW_STATE: usize = "/cells/".len() + 30 + 11 + "/agent".len();

impl VmaConfig {
    /// Reads the file; relative paths in it begin at its own folder.
    ///
    /// # Errors
    /// The file cannot be read or understood.
    pub fn read(path: &Path) -> Result<VmaConfig, Error> {
        let mut c: VmaConfig = read(path)?;
        c.state_dir = beside(path, &c.state_dir);
        c.token_file = beside(path, &c.token_file);
        Ok(c)
    }
}

impl MachineConfig {
    /// Reads the file; relative paths in it begin at its own folder.
    ///
    /// # Errors
    /// The file cannot be read or understood, or its `state_dir` leaves no room for socket paths.
    pub fn read(path: &Path) -> Result<MachineConfig, Error> {
        let mut c: MachineConfig = read(path)?;
        c.state_dir = beside(path, &c.state_dir);
        c.token_file = beside(path, &c.token_file);
        c.identity = beside(path, &c.identity);
        c.memory_dir = beside(path, &c.memory_dir);
        c.state_dir =
            std::path::absolute(&c.state_dir).map_err(|source| Error::Config { path: path.to_owned(), source })?;
        let long = c.state_dir.as_os_str().len() + BELOW_STATE;
        if long > SOCKET_PATH_MAX {
            return Err(Error::StateDirLong { path: c.state_dir, room: SOCKET_PATH_MAX - BELOW_STATE });
        }
        if c.cells.prefix_len() > 30 {
            return Err(Error::CellsSmall { cells: c.cells });
        }
        let limits =
            [("warm", c.warm as usize, WARM_MAX as usize), ("the number of sources", c.sources.len(), SOURCES_MAX)];
        if let Some((what, has, max)) = limits.into_iter().find(|(_, has, max)| has > max) {
            return Err(Error::TooMany { path: path.to_owned(), what, has, max });
        }
        Ok(c)
    }
}

fn warm() -> u32 {
    8
}

fn shm() -> PathBuf {
    PathBuf::from("/dev/shm")
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Config { path: path.to_owned(), source })?;
    Ok(vmatrix_model::config::parse_toml(&path.display().to_string(), &text)?)
}

fn beside(file: &Path, path: &Path) -> PathBuf {
    file.parent().map_or(path.to_owned(), |dir| dir.join(path))
}

/// Reads the fleet's token.
///
/// # Errors
/// The file cannot be read, or is empty.
pub fn token(path: &Path) -> Result<String, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Token { path: path.to_owned(), source })?;
    let token = text.trim().to_owned();
    if token.is_empty() {
        return Err(Error::Token { path: path.to_owned(), source: std::io::ErrorKind::UnexpectedEof.into() });
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: &str = r#"
name = "m1"
network = "ashburn"
listen = "198.19.1.1:8451"
state_dir = "state"
token_file = "token"
vma = "http://198.19.1.1:8441"
identity = "identity"
sources = ["198.19.0.1:8446"]
origin = "http://198.19.0.1:8445"
cpus = 2
memory_mib = 3072
cells = "100.64.0.0/24"
cell_prefix = "vmx-a1-ashburn-m1"
signers = []
"#;

    fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("machine.toml");
        std::fs::write(&file, text).unwrap();
        (dir, file)
    }

    #[test]
    fn paths_begin_at_the_files_own_folder() {
        let (dir, file) = written(MACHINE);
        assert_eq!(MachineConfig::read(&file).unwrap().state_dir, dir.path().join("state"));
    }

    #[test]
    fn a_misspelt_key_is_named_with_the_right_one() {
        let (_dir, file) = written(&MACHINE.replace("memory_mib", "memory_mb"));
        let e = MachineConfig::read(&file).unwrap_err().to_string();
        assert!(e.contains("`memory_mb`") && e.ends_with("did you mean `memory_mib`?"), "{e}");
    }

    #[test]
    fn more_images_kept_ready_than_a_machine_bears_are_refused() {
        let (_dir, file) = written(&format!("{MACHINE}warm = 65\n"));
        let e = MachineConfig::read(&file).unwrap_err().to_string();
        assert!(e.contains("warm is 65") && e.contains("64"), "{e}");
    }

    #[test]
    fn a_folder_too_deep_for_sockets_is_refused() {
        let (_dir, file) = written(&MACHINE.replace("\"state\"", &format!("\"{}\"", "d/".repeat(50))));
        assert!(MachineConfig::read(&file).unwrap_err().to_string().contains("too long"));
    }
}
