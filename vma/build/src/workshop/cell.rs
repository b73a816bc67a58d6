//! The throw-away network that a guest is made in: a namespace with its bridge and gateway, its back end's address, and
//! nothing beyond.

use super::is_alive;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use vmatrix_vma_image::error::Result;
use vmatrix_vma_image::machine::BRIDGE_MAC;
use vmatrix_vma_image::netns;

/// How such namespaces begin; then comes the number of the process that made them, and which of its own it is.
const BEGIN: &str = "vmx-build-";

/// Where a recipe's requests come from: as those of users do, from beyond the guest's gateway (TEST-NET-2, RFC 5737).
/// What is recorded of a guest then has the way back to there.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// A namespace that goes when this does.
#[derive(Debug)]
pub struct Cell {
    name: String,
}

impl Cell {
    /// Its bridge.
    pub const BRIDGE: &str = "br0";

    /// Makes the namespace with bridge and gateway; `backend` becomes an address of its own. Removes first what was left
    /// by processes that were killed.
    ///
    /// # Errors
    /// The kernel refuses: this needs root.
    pub fn new(gateway: Ipv4Addr, backend: Option<Ipv4Addr>) -> Result<Cell> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        sweep();
        let name = format!("{BEGIN}{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        netns::ip_batch(None, &[format!("netns add {name}")])?;
        let cell = Cell { name };
        let bridge = Cell::BRIDGE;
        let mut lines = vec![
            "link set lo up".to_owned(),
            // The guest remembers its gateway by this: after a resume it sends there before it asks anybody.
            format!("link add {bridge} address {BRIDGE_MAC} type bridge"),
            format!("address add {gateway}/24 dev {bridge}"),
            format!("address add {CLIENT}/32 dev lo"),
            format!("link set {bridge} up"),
        ];
        lines.extend(backend.map(|address| format!("address add {address}/32 dev lo")));
        netns::ip_batch(Some(&cell.name), &lines)?;
        Ok(cell)
    }

    /// Where the namespace is.
    pub fn path(&self) -> PathBuf {
        netns::path(&self.name)
    }

    /// Where what runs in it may have its files: a path that goes when a killed owner's cell is removed.
    pub fn folder(&self) -> PathBuf {
        folder(&self.name)
    }

    /// A tap on the bridge.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn tap(&self) -> Result<OwnedFd> {
        let tap = netns::open_tap(&self.path(), "tap0")?;
        netns::ip_batch(Some(&self.name), &[format!("link set tap0 master {} up", Cell::BRIDGE)])?;
        Ok(tap)
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(name)
}

fn remove(name: &str) {
    let gone = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
    if !gone.is_ok_and(|s| s.success()) {
        tracing::warn!(namespace = name, "it stays; remove it with `ip netns del`");
    }
}

/// Removes the namespaces of processes that were killed, with what still runs in them (a database server ends with
/// nobody) and its files.
fn sweep() {
    for entry in fs::read_dir(netns::path("")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(BEGIN).and_then(|tag| tag.split('-').next());
        if owner.is_none_or(is_alive) {
            continue;
        }
        let inside = Command::new("ip").args(["netns", "pids", &name]).output().map(|o| o.stdout).unwrap_or_default();
        for pid in String::from_utf8_lossy(&inside).split_whitespace().filter_map(|word| word.parse().ok()) {
            // It may have ended meanwhile.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        remove(&name);
        let files = folder(&name);
        if files.exists()
            && let Err(error) = fs::remove_dir_all(&files)
        {
            tracing::warn!(path = %files.display(), %error, "what a killed build left stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);

    #[test]
    fn machine_a_killed_builds_namespace_goes_with_what_runs_in_it_and_a_living_ones_stays() {
        // No process has this number: it is above the kernel's largest.
        let killed = format!("{BEGIN}4194305-0");
        netns::ip_batch(None, &[format!("netns add {killed}")]).expect("needs root and iproute2");
        fs::create_dir_all(folder(&killed)).unwrap();
        let mut left =
            netns::enter(&netns::path(&killed), || Command::new("sleep").arg("600").spawn().unwrap()).unwrap();
        let one = Cell::new(GATEWAY, None).unwrap();
        let two = Cell::new(GATEWAY, Some(Ipv4Addr::new(172, 21, 0, 1))).unwrap();
        assert!(one.path().exists() && two.path().exists() && one.path() != two.path());
        assert!(!netns::path(&killed).exists() && !folder(&killed).exists());
        let began = Instant::now();
        while left.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < Duration::from_secs(10), "what ran in it runs on");
            std::thread::park_timeout(Duration::from_millis(10));
        }
        let path = one.path();
        drop(one);
        assert!(!path.exists());
    }
}
