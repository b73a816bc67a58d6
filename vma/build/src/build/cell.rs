//! The throw-away network of a build: the guest's bridge and gateway, and its back end's address.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use vmatrix_vma_image::error::{Error, Result};
use vmatrix_vma_image::machine::BRIDGE_MAC;
use vmatrix_vma_image::netns;

/// A namespace that goes when this does.
#[derive(Debug)]
pub struct Cell {
    name: String,
}

impl Cell {
    /// Makes the namespace with bridge and gateway; `backend` becomes an address of its own.
    pub fn new(gateway: Ipv4Addr, backend: Option<Ipv4Addr>) -> Result<Cell> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("vmx-build-{}-{number}", std::process::id());
        netns::ip_batch(None, &[format!("netns add {name}")])?;
        let cell = Cell { name };
        let mut lines = vec![
            "link set lo up".to_owned(),
            // The guest remembers its gateway by this: after a resume it sends there before it asks anybody.
            format!("link add br0 address {BRIDGE_MAC} type bridge"),
            format!("address add {gateway}/24 dev br0"),
            "link set br0 up".to_owned(),
        ];
        lines.extend(backend.map(|address| format!("address add {address}/32 dev lo")));
        netns::ip_batch(Some(&cell.name), &lines)?;
        Ok(cell)
    }

    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the namespace is.
    pub fn path(&self) -> PathBuf {
        netns::path(&self.name)
    }

    /// A tap on the bridge.
    pub fn tap(&self, name: &str) -> Result<OwnedFd> {
        let tap = netns::open_tap(&self.path(), name)?;
        netns::ip_batch(Some(&self.name), &[format!("link set {name} master br0 up")])?;
        Ok(tap)
    }

    /// Runs a program inside the namespace and returns what it printed.
    pub fn run(&self, what: &str, command: &mut Command) -> Result<std::process::Output> {
        netns::enter(&self.path(), || super::tools::run(what, command))?
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        let gone = Command::new("ip").args(["netns", "del", &self.name]).stderr(Stdio::null()).status();
        if !gone.is_ok_and(|s| s.success()) {
            let error = Error::Unhealthy(format!("remove it with `ip netns del {}`", self.name));
            tracing::warn!(%error, "a build's namespace stays");
        }
    }
}
