//! Preloaded into QEMU: has the guest's memory wait for the pager.
//!
//! ```text
//! QEMU ── mmap(the file named by VMATRIX_MEMORY) ──▶ here ── the real mmap
//!                                                    └─▶ userfaultfd, registered over the mapping, left open
//! ```
//! The descriptor is never closed here and nobody is told of it: the pager finds it under `/proc/PID/fd` and takes
//! a copy, the first time and whenever it was started again. As long as this process lives the kernel thus never
//! answers a missing page by itself, with zeros that the guest would take for its own. If the mapping cannot be
//! registered, the process ends, for the same reason.

use nix::errno::Errno;
use nix::libc::{self, c_int, c_void, off_t, size_t};
use nix::sys::stat::{FileStat, fstat, stat};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use vmatrix_vma_uffd::{MEMORY_VARIABLE, PAGE, TRACK_VARIABLE, Uffd, feature};

/// The file has not been looked for yet.
const UNKNOWN: u8 = 0;
/// There is none to look for.
const NONE: u8 = 1;
/// It is the one with `DEVICE` and `INODE`.
const FOUND: u8 = 2;
static STATE: AtomicU8 = AtomicU8::new(UNKNOWN);
static DEVICE: AtomicU64 = AtomicU64::new(0);
static INODE: AtomicU64 = AtomicU64::new(0);

/// Finds the file before the program begins, while its name still means what it meant to whoever started it.
#[used]
#[allow(unsafe_code, reason = "the linker's list of what runs at load has no safe form")]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = at_load;

extern "C" fn at_load() {
    find();
}

/// Takes the place of the C library's function of this name.
///
/// # Safety
/// As that one.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    at: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: what the caller answers for, handed on.
    unsafe { map(at, len, prot, flags, fd, offset) }
}

/// Takes the place of the C library's function of this name.
///
/// # Safety
/// As that one.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    at: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: what the caller answers for, handed on.
    unsafe { map(at, len, prot, flags, fd, offset) }
}

#[allow(unsafe_code)]
unsafe fn map(at: *mut c_void, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void {
    // SAFETY: the same call with the same arguments; `syscall` sets `errno` as `mmap` does, and -1 is MAP_FAILED.
    let mapped = unsafe { libc::syscall(libc::SYS_mmap, at, len, prot, flags, fd, offset) } as *mut c_void;
    if fd >= 0 && mapped != libc::MAP_FAILED && is_memory(fd) {
        register(mapped as u64, (len as u64).next_multiple_of(PAGE));
    }
    mapped
}

fn is_memory(fd: c_int) -> bool {
    if STATE.load(Ordering::Acquire) == UNKNOWN {
        find();
    }
    if STATE.load(Ordering::Acquire) != FOUND {
        return false;
    }
    // SAFETY: the descriptor is the caller's, who has just mapped it, and is not kept.
    #[allow(unsafe_code)]
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let is =
        |stat: FileStat| stat.st_dev == DEVICE.load(Ordering::Relaxed) && stat.st_ino == INODE.load(Ordering::Relaxed);
    fstat(fd).is_ok_and(is)
}

/// Looks up the file that the environment names; the process ends if there is none of that name.
fn find() {
    let Some(name) = std::env::var_os(MEMORY_VARIABLE) else {
        STATE.store(NONE, Ordering::Release);
        return;
    };
    let stat = match stat(name.as_os_str()) {
        Ok(stat) => stat,
        Err(e) => give_up("look at the file that VMATRIX_MEMORY names", e),
    };
    DEVICE.store(stat.st_dev, Ordering::Relaxed);
    INODE.store(stat.st_ino, Ordering::Relaxed);
    STATE.store(FOUND, Ordering::Release);
}

/// Registers a mapping for good, or ends the process.
fn register(start: u64, len: u64) {
    let before = Errno::last_raw();
    let track = wants_track();
    let uffd = match Uffd::open(if track { feature::MISSING_SHMEM | feature::TRACK } else { feature::MISSING_SHMEM }) {
        Ok(uffd) => uffd,
        // The pager finds out by itself that nothing is noted.
        Err(Errno::EINVAL) if track => {
            say("this kernel does not note which pages are written (it is older than 6.7); going on without");
            return or_give_up(Uffd::open(feature::MISSING_SHMEM), start, len, false);
        }
        Err(e) => give_up("open a userfaultfd (root, or vm.unprivileged_userfaultfd=1, may)", e),
    };
    or_give_up(Ok(uffd), start, len, track);
    Errno::set_raw(before);
}

fn or_give_up(uffd: Result<Uffd, Errno>, start: u64, len: u64, track: bool) {
    match uffd.and_then(|uffd| uffd.register(start, len, track).map(|()| uffd)) {
        Ok(uffd) => std::mem::forget(uffd),
        Err(e) => give_up("register the guest's memory", e),
    }
}

fn wants_track() -> bool {
    std::env::var_os(TRACK_VARIABLE).is_some_and(|value| value == "1")
}

/// Ends the process: a guest whose memory is not registered would run on zeros.
fn give_up(what: &str, why: Errno) -> ! {
    say(&format!("cannot {what}: {why}; ending before the guest runs on memory that is not there"));
    std::process::abort()
}

fn say(what: &str) {
    // The program's own output may not be set up yet, or not any more.
    let line = format!("vmatrix-vma-shim: {what}\n");
    let _ = nix::unistd::write(std::io::stderr(), line.as_bytes());
}
