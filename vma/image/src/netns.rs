//! Network namespaces: doing something inside one, and what `ip` does in batches.

use crate::error::{Error, Result, io};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where `ip netns add NAME` puts a namespace.
pub fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Runs `f` inside the namespace at `path`, on a thread of its own, for a namespace belongs to a thread.
///
/// # Errors
/// There is no such namespace, or it may not be entered.
pub fn enter<T: Send>(path: &Path, f: impl FnOnce() -> T + Send) -> Result<T> {
    let namespace = File::open(path).map_err(io("open network namespace", path))?;
    let inside = || -> Result<T> {
        setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|e| io("enter network namespace", path)(e.into()))?;
        Ok(f())
    };
    std::thread::scope(|scope| scope.spawn(inside).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Gives a namespace another name: what is in it stays and goes on.
///
/// # Errors
/// There is none of that name, or the new name is taken.
pub fn rename(old: &str, new: &str) -> Result<()> {
    let (old, new) = (path(old), path(new));
    File::create_new(&new).map_err(io("make", &new))?;
    let none = None::<&Path>;
    let moved = mount(Some(&old), &new, none, MsFlags::MS_BIND, none)
        .and_then(|()| umount2(&old, MntFlags::MNT_DETACH))
        .map_err(|e| io("rename network namespace", &old)(e.into()));
    // The name that is none any more.
    let _ = std::fs::remove_file(if moved.is_ok() { &old } else { &new });
    moved
}

mod request {
    nix::ioctl_write_int!(set_interface, b'T', 202);
}

/// `struct ifreq` with flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// One packet a read, with the header that carries offloads: what QEMU's tap expects.
const TAP_FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// Makes tap `name` inside the namespace; it goes when the descriptor is closed, or with its last holder.
///
/// # Errors
/// The name is too long or taken, or there is no `/dev/net/tun`.
pub fn open_tap(netns: &Path, name: &str) -> Result<OwnedFd> {
    let device = Path::new("/dev/net/tun");
    let mut ifreq = InterfaceRequest { name: [0; 16], flags: TAP_FLAGS, rest: [0; 22] };
    if name.is_empty() || name.len() >= ifreq.name.len() {
        return Err(io("make a tap with the name", Path::new(name))(std::io::ErrorKind::InvalidInput.into()));
    }
    for (to, from) in ifreq.name.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    enter(netns, || {
        let tun = OpenOptions::new().read(true).write(true).open(device).map_err(io("open", device))?;
        // SAFETY: the descriptor is open, and the pointer is to a whole `ifreq` that outlives the call.
        #[allow(unsafe_code)]
        unsafe { request::set_interface(tun.as_raw_fd(), std::ptr::from_ref(&ifreq) as u64) }
            .map_err(|e| io("make a tap in", netns)(e.into()))?;
        Ok(OwnedFd::from(tun))
    })?
}

/// Runs `ip -batch` with these lines, inside a namespace by name or here. Stops at the first line that fails.
///
/// # Errors
/// [`Error::Tool`] with what `ip` said, or [`Error::Missing`].
pub fn ip_batch(netns: Option<&str>, lines: &[String]) -> Result<()> {
    ip(netns, lines, &[])
}

/// As [`ip_batch`], for what may be refused: every line is tried.
///
/// # Errors
/// [`Error::Missing`], or `ip` cannot be run.
pub fn ip_tries(netns: Option<&str>, lines: &[String]) -> Result<()> {
    match ip(netns, lines, &["-force"]) {
        Err(Error::Tool { said, .. }) => {
            tracing::trace!(said, "refused");
            Ok(())
        }
        done => done,
    }
}

fn ip(netns: Option<&str>, lines: &[String], options: &[&str]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    let tool = Path::new("ip");
    let mut child = command
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::Missing { program: "ip".to_owned(), package: "iproute2" },
            _ => io("run", tool)(e),
        })?;
    if let Some(mut input) = child.stdin.take() {
        // If `ip` gave up early, its own words below say why.
        let _ = input.write_all((lines.join("\n") + "\n").as_bytes());
    }
    let output = child.wait_with_output().map_err(io("wait for", tool))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Tool {
        what: format!("ip -batch in {} ({})", netns.unwrap_or("this namespace"), lines.join("; ")),
        status: output.status.to_string(),
        said: String::from_utf8_lossy(&output.stderr).trim().chars().take(500).collect(),
    })
}
