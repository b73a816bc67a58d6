//! Network namespaces: made, entered and removed by name.
//!
//! ```text
//! name ─▶ /run/netns/<name> ─▶ a thread inside ─▶ sockets, files and processes that stay inside
//! ```
//!
//! Daemons are started from a thread that has entered, not by `ip netns exec`: that command gives
//! its child a mount namespace of its own, in which the cells a machine makes would be invisible
//! to everyone else.

use anyhow::Context;
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::path::PathBuf;
use vmatrix_vma_image::netns;

/// Where `ip netns` keeps namespaces.
const FOLDER: &str = "/run/netns";

/// A network namespace that has a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Namespace(String);

impl Namespace {
    /// The namespace of that name, whether it is there or not.
    pub fn named(name: &str) -> Namespace {
        Namespace(name.to_owned())
    }

    /// Its name, as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// The file that holds it open.
    pub fn path(&self) -> PathBuf {
        netns::path(&self.0)
    }

    /// Makes it, with `lo` up, IPv4 forwarding on, IPv6 off.
    ///
    /// # Errors
    /// It is there already, or `ip` refuses.
    pub fn create(&self) -> anyhow::Result<()> {
        ip_batch(None, &format!("netns add {}\n", self.0))?;
        ip_batch(Some(self), "link set lo up\n")?;
        self.run(|| {
            for (key, value) in SYSCTLS {
                let path = format!("/proc/sys/net/{key}");
                if std::fs::exists(&path).unwrap_or(false) {
                    std::fs::write(&path, value).with_context(|| format!("cannot set {path}"))?;
                }
            }
            // Refused where cubic is not among the allowed ones; our own clients choose it by socket.
            let _ = std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "cubic");
            Ok(())
        })?
    }

    /// Moves the calling thread inside, for good.
    ///
    /// # Errors
    /// It is not there, or the caller is not root.
    pub fn enter(&self) -> anyhow::Result<()> {
        let file = File::open(self.path()).with_context(|| format!("cannot open namespace {}", self.0))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter namespace {}", self.0))
    }

    /// Runs `work` on a thread inside and waits for it.
    ///
    /// # Errors
    /// It cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        netns::enter(&self.path(), work).with_context(|| format!("namespace {}", self.0))
    }

    /// Removes it; what is inside goes once the last process has left.
    ///
    /// # Errors
    /// `ip` refuses.
    pub fn remove(&self) -> anyhow::Result<()> {
        if self.path().exists() { ip_batch(None, &format!("netns del {}\n", self.0)) } else { Ok(()) }
    }

    /// Names of all namespaces that begin with `prefix`, in order.
    pub fn list(prefix: &str) -> Vec<Namespace> {
        let Ok(entries) = std::fs::read_dir(FOLDER) else { return Vec::new() };
        let mut all: Vec<Namespace> = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| n.starts_with(prefix))
            .map(Namespace)
            .collect();
        all.sort();
        all
    }
}

/// Below `/proc/sys/net`. Bridged frames must not pass the forwarding rules, else a cell's
/// default-deny would cut its own bridge; packets may come back another way than they went (VIPs).
const SYSCTLS: [(&str, &str); 6] = [
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv6/conf/all/disable_ipv6", "1"),
    ("ipv6/conf/default/disable_ipv6", "1"),
    ("bridge/bridge-nf-call-iptables", "0"),
];

/// Runs lines of `ip` commands, in `inside` if given.
///
/// # Errors
/// With what `ip` said about the first line it refused.
pub fn ip_batch(inside: Option<&Namespace>, lines: &str) -> anyhow::Result<()> {
    let lines: Vec<String> = lines.lines().map(str::to_owned).collect();
    Ok(netns::ip_batch(inside.map(Namespace::name), &lines)?)
}
