//! A TUN device, made in whatever network namespace it belongs to.

use anyhow::Context;
use ipnet::Ipv4Net;
use nix::sched::{CloneFlags, setns};
use std::path::{Path, PathBuf};
use tun_rs::{AsyncDevice, DeviceBuilder};

/// Makes the device `name` with `address` (its prefix is what is sent into it), in the namespace at
/// `netns` or in this process's own. It is gone when the returned handle is dropped.
///
/// # Errors
/// There is no `/dev/net/tun`, no such namespace, no right to enter it, or the name is taken.
pub async fn open(netns: Option<&Path>, name: &str, address: Ipv4Net, mtu: u16) -> anyhow::Result<AsyncDevice> {
    anyhow::ensure!(
        crate::config::interface(name),
        "{name:?} is not an interface name: 1 to 15 of a-z, A-Z, 0-9, . _ -"
    );
    let (netns, device) = (netns.map(Path::to_owned), name.to_owned());
    // A thread of its own, for it ends in another namespace than it began in.
    let made = std::thread::spawn(move || make(netns, &device, address, mtu));
    let device = tokio::task::spawn_blocking(move || made.join())
        .await
        .context("making a device was cut short")?
        .map_err(|_| anyhow::anyhow!("making the device {name} failed unexpectedly"))??;
    AsyncDevice::new(device).with_context(|| format!("cannot wait for packets of {name}"))
}

fn make(netns: Option<PathBuf>, name: &str, address: Ipv4Net, mtu: u16) -> anyhow::Result<tun_rs::SyncDevice> {
    if let Some(path) = netns {
        let namespace = std::fs::File::open(&path)
            .with_context(|| format!("cannot open the namespace {}: make the cell first", path.display()))?;
        setns(&namespace, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter the namespace {}: this needs root", path.display()))?;
    }
    DeviceBuilder::new()
        .name(name)
        .ipv4(address.addr(), address.prefix_len(), None)
        .mtu(mtu)
        .build_sync()
        .with_context(|| format!("cannot make the device {name} with {address}: /dev/net/tun and root are needed, and no device of that name"))
}
