//! The tap of libvirt's QEMU, which lives in the daemon's namespace and serves a cell.
//!
//! A descriptor cannot be handed to QEMU through libvirt. So the tap is made here, down and on no bridge, for the one
//! user QEMU runs as; QEMU opens it by name while its guest waits; then the interface is moved into the cell, where
//! QEMU's descriptor goes on serving it. QEMU is never inside the cell and needs no capability.
//!
//! A tap that was made before it was opened outlives its user. Once QEMU has it, that is taken back through QEMU's own
//! descriptor: the tap goes with the process, however it ends.

use crate::error::{Error, Result, io};
use crate::hypervisor::Tap;
use nix::libc;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use vmatrix_model::Digest;
use vmatrix_vma_image::netns;

/// The name of a VM's tap before it is moved: 14 bytes, the same for the same VM, which its guest agent's socket names.
pub(crate) fn outside(guest_agent: &Path) -> String {
    let digest = Digest::of(guest_agent.as_os_str().as_bytes()).to_string();
    format!("vt{}", digest.get(..12).unwrap_or_default())
}

fn exists(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}

/// Makes the tap for a user, anew if one was left.
pub(crate) fn make(name: &str, uid: u32) -> Result<()> {
    remove(name)?;
    Ok(netns::ip_batch(None, &[format!("tuntap add mode tap user {uid} vnet_hdr name {name}")])?)
}

/// Removes a tap that was not moved; well if there is none.
pub(crate) fn remove(name: &str) -> Result<()> {
    if exists(name) { Ok(netns::ip_batch(None, &[format!("link del {name}")])?) } else { Ok(()) }
}

/// Moves the tap that process `pid` has open into its cell, and binds its life to the process.
pub(crate) fn give(name: &str, pid: i32, to: Tap<'_>) -> Result<()> {
    passing(pid, name)?;
    if netns::enter(&netns::path(to.namespace), || exists(to.name))? {
        netns::ip_batch(Some(to.namespace), &[format!("link del {}", to.name)])?;
    }
    Ok(netns::ip_batch(None, &[format!("link set {name} netns {} name {}", to.namespace, to.name)])?)
}

mod request {
    nix::ioctl_write_int!(set_persist, b'T', 203);
}

fn passing(pid: i32, name: &str) -> Result<()> {
    let folder = PathBuf::from(format!("/proc/{pid}/fd"));
    let entries = std::fs::read_dir(&folder).map_err(io("list", &folder))?;
    let numbers = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<RawFd>().ok());
    let line = format!("iff:\t{name}");
    let is_tap = |fd: &RawFd| {
        std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).is_ok_and(|text| text.lines().any(|l| l == line))
    };
    let missing = || io("find the tap among", &folder)(std::io::ErrorKind::NotFound.into());
    let tap = copy(pid, numbers.into_iter().find(is_tap).ok_or_else(missing)?)?;
    // SAFETY: the descriptor is open, and the argument is a number.
    #[allow(unsafe_code)]
    unsafe { request::set_persist(tap.as_raw_fd(), 0) }
        .map_err(|e| io("let go of the tap of", Path::new(&format!("/proc/{pid}")))(e.into()))?;
    Ok(())
}

/// Another process's descriptor, as one of this process.
fn copy(pid: i32, fd: RawFd) -> Result<OwnedFd> {
    let process = call(pid, libc::SYS_pidfd_open, pid.into(), 0)?;
    call(pid, libc::SYS_pidfd_getfd, process.as_raw_fd().into(), fd.into())
}

/// A system call that answers a new descriptor; its third argument is flags, of which there are none.
fn call(pid: i32, number: libc::c_long, one: libc::c_long, two: libc::c_long) -> Result<OwnedFd> {
    // SAFETY: both calls take numbers only and touch no memory of this process.
    #[allow(unsafe_code)]
    let answer = unsafe { libc::syscall(number, one, two, 0) };
    let fail = |e: std::io::Error| -> Error { io("take a descriptor from", Path::new(&format!("/proc/{pid}")))(e) };
    match RawFd::try_from(answer) {
        // SAFETY: the kernel has just given this descriptor to this process, and nobody else knows of it.
        #[allow(unsafe_code)]
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(fail(std::io::Error::last_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_vms_have_two_taps_of_a_length_that_the_kernel_takes() {
        let of = |path: &str| outside(Path::new(path));
        let (one, two) = (of("/run/news-0/agent"), of("/run/news-1/agent"));
        assert_ne!(one, two);
        assert_eq!(one, of("/run/news-0/agent"));
        assert_eq!(one.len(), 14);
    }
}
