//! What a machine must have before a lab is begun: one message names everything that is missing.

use std::path::Path;
use vmatrix_model::fleet::Fleet;

/// Program and the Debian package that brings it.
const PROGRAMS: [(&str, &str); 4] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("setpriv", "util-linux"),
    ("qemu-system-x86_64", "qemu-system-x86 (from bookworm-backports)"),
];

/// What this machine lacks for a lab.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    #[error("a lab makes network namespaces and runs VMs, which only root may\n\nhint: sudo {command}")]
    Root {
        /// What was typed.
        command: String,
    },
    #[error(
        "/dev/net/tun is not there: the WAN and the VMs have no ports without it\n\nhint: modprobe tun; in a container, pass --device /dev/net/tun"
    )]
    Tun,
    #[error(
        "missing Debian packages: {}\n\nhint: apt-get install {}",
        packages.join(", "),
        packages.iter().map(|p| p.split(' ').next().unwrap_or(p)).collect::<Vec<_>>().join(" ")
    )]
    Packages {
        /// Each may be followed by where it is found.
        packages: Vec<&'static str>,
    },
}

/// Checks that a lab of `fleet` can be made here.
///
/// # Errors
/// As [`check`].
pub fn check_for(fleet: &Fleet) -> Result<(), Missing> {
    check(fleet.services.iter().any(|s| s.backend.is_some()))
}

/// Checks that a lab can be made here; `database` if a service has a back end.
///
/// # Errors
/// Everything that is missing, with what to do about it.
pub fn check(database: bool) -> Result<(), Missing> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Missing::Root { command: std::env::args().collect::<Vec<_>>().join(" ") });
    }
    if !Path::new("/dev/net/tun").exists() {
        return Err(Missing::Tun);
    }
    let mut packages: Vec<&'static str> =
        PROGRAMS.iter().filter(|(program, _)| !has(program)).map(|(_, package)| *package).collect();
    let postgres = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .any(|e| e.path().join("bin/initdb").exists());
    if database && !postgres {
        packages.push("postgresql");
    }
    if packages.is_empty() { Ok(()) } else { Err(Missing::Packages { packages }) }
}

fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|folder| folder.join(program).exists())
}
