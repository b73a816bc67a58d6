//! userfaultfd as the kernel speaks it: one type round the descriptor, one method a request.
//!
//! ```text
//! registered range ── fault on a page that is nowhere ──▶ read() ─▶ Fault { address }
//!        ▲                                                             │
//!        └── wake() │ zero() │ copy() ◀── whoever has the descriptor ──┘
//! ```
//! The descriptor belongs to the address space it was opened in, whoever holds a copy of it. While anybody holds
//! one, a thread that faults waits; when the last is closed, the kernel answers faults itself, with zeros.

use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// What `/proc/PID/fd/N` says of such a descriptor.
pub const LINK: &str = "anon_inode:[userfaultfd]";
/// The file whose mapping the preloaded library registers: a path.
pub const MEMORY_VARIABLE: &str = "VMATRIX_MEMORY";
/// `1`: the library also has the kernel note which pages are written.
pub const TRACK_VARIABLE: &str = "VMATRIX_TRACK";

/// What a descriptor is asked to be able to, by the kernel's numbers.
pub mod feature {
    /// Pages of tmpfs that are nowhere.
    pub const MISSING_SHMEM: u64 = 1 << 5;
    /// Pages of tmpfs that are written.
    pub const WP_SHMEM: u64 = 1 << 12;
    /// Also pages that are not there yet.
    pub const WP_UNPOPULATED: u64 = 1 << 13;
    /// The kernel lets a write go on by itself and only notes it.
    pub const WP_ASYNC: u64 = 1 << 15;
    /// All that noting written pages of tmpfs takes; since Linux 6.7.
    pub const TRACK: u64 = WP_SHMEM | WP_UNPOPULATED | WP_ASYNC;
}

const API: u64 = 0xAA;
/// Nobody is woken.
const COPY_DONTWAKE: u64 = 1 << 0;
const MODE_MISSING: u64 = 1 << 0;
const MODE_WP: u64 = 1 << 1;
const PROTECT_ON: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of one message.
const MESSAGE: usize = 32;
/// Messages taken by one read: more than a guest has processors.
const MESSAGES: usize = 64;

#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}
#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}
#[repr(C)]
struct Protect {
    range: Range,
    mode: u64,
}

mod request {
    use super::{Copy, Handshake, Protect, Range, Register, Zero};
    nix::ioctl_readwrite!(handshake, 0xAA, 0x3F, Handshake);
    nix::ioctl_write_int_bad!(new, nix::request_code_none!(0xAA, 0x00));
    nix::ioctl_readwrite!(register, 0xAA, 0x00, Register);
    nix::ioctl_read!(unregister, 0xAA, 0x01, Range);
    nix::ioctl_read!(wake, 0xAA, 0x02, Range);
    nix::ioctl_readwrite!(copy, 0xAA, 0x03, Copy);
    nix::ioctl_readwrite!(zero, 0xAA, 0x04, Zero);
    nix::ioctl_readwrite!(protect, 0xAA, 0x06, Protect);
}

/// A thread that waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Where it touched memory, in its own address space.
    pub address: u64,
}

/// How far a request got: bytes done, and what stopped it, if something did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Bytes from the start of the request.
    pub bytes: u64,
    /// [`Errno::EEXIST`]: a page is there already. [`Errno::ENOENT`], [`Errno::ESRCH`]: the range or its process is
    /// gone. [`Errno::EAGAIN`]: ask again for the rest.
    pub stopped: Option<Errno>,
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Opens one for this process's own memory; faults of the kernel on its behalf count too.
    ///
    /// # Errors
    /// `EPERM`: this needs root (or `vm.unprivileged_userfaultfd`). `EINVAL`: the kernel lacks a feature.
    pub fn open(features: u64) -> Result<Uffd, Errno> {
        let uffd = match Uffd::by_call() {
            Err(Errno::EPERM) => Uffd::by_device()?,
            other => other?,
        };
        let mut handshake = Handshake { api: API, features, ioctls: 0 };
        // SAFETY: the descriptor is a userfaultfd and the struct is the one this request takes.
        #[allow(unsafe_code)]
        unsafe { request::handshake(uffd.raw(), &mut handshake) }?;
        Ok(uffd)
    }

    fn by_call() -> Result<Uffd, Errno> {
        // SAFETY: the call takes flags only.
        #[allow(unsafe_code)]
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        Uffd::made(fd)
    }

    /// For a process that is not root, but may open the device.
    fn by_device() -> Result<Uffd, Errno> {
        let device =
            std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").map_err(|_| Errno::EPERM)?;
        // SAFETY: the request takes flags only.
        #[allow(unsafe_code)]
        let fd = unsafe { request::new(std::os::fd::AsRawFd::as_raw_fd(&device), libc::O_CLOEXEC | libc::O_NONBLOCK) }?;
        Uffd::made(fd.into())
    }

    fn made(fd: libc::c_long) -> Result<Uffd, Errno> {
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        #[allow(unsafe_code)]
        Ok(Uffd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Has faults on missing pages of this range wait; with `track`, written pages are noted as well.
    ///
    /// # Errors
    /// `EINVAL`: not whole pages, or memory of another kind; `EBUSY`: another descriptor has it.
    pub fn register(&self, start: u64, len: u64, track: bool) -> Result<(), Errno> {
        let mode = if track { MODE_MISSING | MODE_WP } else { MODE_MISSING };
        let mut register = Register { range: Range { start, len }, mode, ioctls: 0 };
        // SAFETY: the struct is the one this request takes; registering changes how faults are answered, not memory.
        #[allow(unsafe_code)]
        unsafe { request::register(self.raw(), &mut register) }.map(drop)
    }

    /// Lets the kernel answer faults on this range again, with what the mapping's file has; wakes who waits.
    ///
    /// # Errors
    /// `EINVAL`: not a range of registered memory; `ESRCH`: the process is gone.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut range = Range { start, len };
        // SAFETY: as for `register`.
        #[allow(unsafe_code)]
        unsafe { request::unregister(self.raw(), &mut range) }.map(drop)
    }

    /// Lets every thread that waits for a page of this range try again; one that finds nothing waits anew.
    ///
    /// # Errors
    /// `EINVAL`: not whole pages.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut range = Range { start, len };
        // SAFETY: the struct is the one this request takes; threads are woken, memory is not touched.
        #[allow(unsafe_code)]
        unsafe { request::wake(self.raw(), &mut range) }.map(drop)
    }

    /// Puts `pages` where nothing is yet, from address `to` on. A page appears whole or not at all, and one that is
    /// there stays as it is: then it stops with `EEXIST`. Wakes nobody.
    pub fn copy(&self, to: u64, pages: &[u8]) -> Done {
        let len = pages.len() as u64;
        let mut copy = Copy { dst: to, src: pages.as_ptr() as u64, len, mode: COPY_DONTWAKE, copied: 0 };
        // SAFETY: `src` and `len` are of a slice that outlives the call. The kernel writes registered pages only,
        // and of those only what no one has ever seen.
        #[allow(unsafe_code)]
        let result = unsafe { request::copy(self.raw(), &mut copy) };
        done(result, copy.copied)
    }

    /// Puts zeros where nothing is yet, and wakes who waits for them. In a private mapping that costs no memory; in
    /// a shared one each page takes its place in the file. Stops with `EEXIST` at a page that is there.
    pub fn zero(&self, start: u64, len: u64) -> Done {
        let mut zero = Zero { range: Range { start, len }, mode: 0, zeroed: 0 };
        // SAFETY: as for `copy`, from nothing.
        #[allow(unsafe_code)]
        let result = unsafe { request::zero(self.raw(), &mut zero) };
        done(result, zero.zeroed)
    }

    /// Begins anew to note which pages of this range are written; it must be registered with `track`.
    ///
    /// # Errors
    /// `ENOENT`: it is not; `ESRCH`: the process is gone.
    pub fn protect(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut protect = Protect { range: Range { start, len }, mode: PROTECT_ON };
        loop {
            // SAFETY: the struct is the one this request takes; with `WP_ASYNC` the kernel lets writes go on.
            #[allow(unsafe_code)]
            let result = unsafe { request::protect(self.raw(), &mut protect) };
            match result {
                // The address space is being changed; it says so until that is over.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                other => return other.map(drop),
            }
        }
    }

    /// Takes the faults that wait to be seen, at most 64; none: there are no more now.
    ///
    /// # Errors
    /// The descriptor is of no use any more.
    pub fn read(&self, into: &mut Vec<Fault>) -> Result<(), Errno> {
        let mut buffer = [0; MESSAGE * MESSAGES];
        let length = match nix::unistd::read(self, &mut buffer) {
            Ok(length) => length,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            Err(e) => return Err(e),
        };
        for message in buffer.get(..length).unwrap_or_default().chunks_exact(MESSAGE) {
            // struct uffd_msg: event, 7 bytes reserved, flags, address.
            let (event, address) = (message.first(), message.get(16..24).and_then(|b| b.try_into().ok()));
            if let (Some(&EVENT_PAGEFAULT), Some(address)) = (event, address) {
                into.push(Fault { address: u64::from_ne_bytes(address) });
            }
        }
        Ok(())
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Gives the descriptor away; closing it is then somebody else's, or nobody's.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl From<OwnedFd> for Uffd {
    /// Takes a descriptor for a userfaultfd; if it is not one, every request fails.
    fn from(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The kernel says how far it got even where it stopped; a negative number there is the reason again.
fn done(result: Result<i32, Errno>, bytes: i64) -> Done {
    Done { bytes: u64::try_from(bytes).unwrap_or(0), stopped: result.err() }
}
