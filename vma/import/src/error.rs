//! What can go wrong when a disk comes in or goes out, each with what, where and what to do next.

use crate::{digests, ovf, qcow2, tar, vmdk};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A disk could not be imported or exported; nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no space left to {what} {}; free some, or choose another place, and run the same again", path.display())]
    DiskFull { what: &'static str, path: PathBuf },
    #[error("{} says nothing of its format by its name; say raw, qcow2, vmdk or ova", path.display())]
    UnknownFormat { path: PathBuf },
    #[error("{}: {problem}", path.display())]
    BadRaw { path: PathBuf, problem: String },
    #[error("{}: {problem}", path.display())]
    BadQcow2 { path: PathBuf, problem: qcow2::Problem },
    #[error("{}: {problem}", path.display())]
    BadVmdk { path: PathBuf, problem: vmdk::Problem },
    #[error("{}: {problem}", path.display())]
    BadTar { path: PathBuf, problem: tar::Problem },
    #[error("{}: {problem}", path.display())]
    BadOvf { path: PathBuf, problem: ovf::Problem },
    #[error("{}: {problem}", path.display())]
    BadDigests { path: PathBuf, problem: digests::Problem },
    #[error("{}: {problem}", path.display())]
    BadOva { path: PathBuf, problem: String },
    #[error(
        "{} unpacks to more than {limit_mib} MiB of data, far more than a disk of its size holds; \
         if it is meant so, convert it to raw by hand and import that", path.display()
    )]
    Bomb { path: PathBuf, limit_mib: u64 },
    #[error("image {name:?} has no disk; build or import it again")]
    NoDisk { name: String },
    #[error("{0}")]
    BadOptions(String),
    #[error("the guest's QEMU ended ({status}) before it was healthy: {said}")]
    Ended { status: String, said: String },
    #[error(
        "the guest is not healthy after {} s: {why}. A guest without cloud-init must have the address {address}/24, \
         gateway {gateway}, of its own, and must boot by BIOS from a virtio disk; its console said last:\n{said}",
        after.as_secs()
    )]
    Unhealthy { after: Duration, why: String, address: Ipv4Addr, gateway: Ipv4Addr, said: String },
    #[error(transparent)]
    Image(#[from] vmatrix_vma_image::Error),
    #[error("{program} is missing; install it with `apt-get install {package}`")]
    Missing { program: &'static str, package: &'static str },
    #[error("{what} failed ({status}): {said}")]
    Tool { what: &'static str, status: String, said: String },
    #[error("{what} {} took longer than {after:?}; look whether the disk is slow, and run the same again", path.display())]
    Timeout { what: &'static str, path: PathBuf, after: Duration },
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Says what was done to which file; a full disk has its own words, for the cure differs.
pub(crate) fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull { what, path: path.to_owned() },
        _ => Error::Io { what, path: path.to_owned(), source },
    }
}
