//! The throw-away network of an import: a namespace with the guest's bridge and gateway, and nothing beyond.
//!
//! cell, guest ─▶ a bridge with the gateway's address, a tap on it, and DHCP for a guest that asks

use crate::error::Result;
use crate::lease::Lease;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use vmatrix_model::manifest::GuestSpec;
use vmatrix_vma_image::machine::BRIDGE_MAC;
use vmatrix_vma_image::netns;

/// How such namespaces begin; then comes the number of the process that made them.
const BEGIN: &str = "vmx-import-";
const BRIDGE: &str = "br0";

/// A namespace that goes when this does.
#[derive(Debug)]
pub(crate) struct Cell {
    name: String,
    lease: Option<Lease>,
}

impl Cell {
    /// Makes it, and removes what an import that was killed left.
    pub(crate) fn new(guest: &GuestSpec) -> Result<Cell> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        sweep();
        let name = format!("{BEGIN}{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        netns::ip_batch(None, &[format!("netns add {name}")])?;
        let mut cell = Cell { name, lease: None };
        let gateway = guest.gateway;
        let lines = [
            "link set lo up".to_owned(),
            // The guest remembers its gateway by this: after a resume it sends there before it asks anybody.
            format!("link add {BRIDGE} address {BRIDGE_MAC} type bridge"),
            format!("address add {gateway}/24 dev {BRIDGE}"),
            format!("link set {BRIDGE} up"),
        ];
        netns::ip_batch(Some(&cell.name), &lines)?;
        cell.lease = Some(Lease::serve(&cell.path(), BRIDGE, guest)?);
        Ok(cell)
    }

    /// Where the namespace is.
    pub(crate) fn path(&self) -> PathBuf {
        netns::path(&self.name)
    }

    /// A tap on the bridge.
    pub(crate) fn tap(&self) -> Result<OwnedFd> {
        let tap = netns::open_tap(&self.path(), "tap0")?;
        netns::ip_batch(Some(&self.name), &[format!("link set tap0 master {BRIDGE} up")])?;
        Ok(tap)
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        // Its socket would keep the namespace alive.
        drop(self.lease.take());
        remove(&self.name);
    }
}

fn remove(name: &str) {
    let gone = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
    if !gone.is_ok_and(|s| s.success()) {
        tracing::warn!(namespace = name, "an import's namespace stays; remove it with `ip netns del`");
    }
}

fn sweep() {
    let folder = netns::path("");
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|n| n.strip_prefix(BEGIN)).and_then(|tag| tag.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove(&name.to_string_lossy());
        }
    }
}
