//! Taking over a guest's faults: pid ─▶ its userfaultfd, and where in its address space which page lies.
//!
//! The same the first time and after the pager was started again: everything is read from the process itself.

use crate::error::{Error, Result};
use crate::window::FileId;
use nix::errno::Errno;
use nix::libc;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use vmatrix_vma_uffd::{Done, LINK, PAGE, Uffd};

/// Most mappings of the memory file in one process: QEMU makes one, and parts of it get flags of their own.
const SEGMENTS_MAX: usize = 64;
/// Most descriptors that are looked at.
const DESCRIPTORS_MAX: usize = 4096;

/// A run of pages where a process has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    start: u64,
    len: u64,
    /// Page of the file at its start.
    page: u32,
}

/// A process whose faults on the memory file come here.
#[derive(Debug)]
pub(crate) struct Adopted {
    pid: i32,
    process: OwnedFd,
    uffd: Uffd,
    segments: Vec<Segment>,
    private: bool,
}

impl Adopted {
    /// Takes over process `pid`, which maps `file`; `None` if it has not mapped it yet.
    ///
    /// # Errors
    /// There is no such process, it may not be looked into, or it maps the file without the preloaded library.
    pub fn take(pid: i32, file: FileId) -> Result<Option<Adopted>> {
        let process = syscall(libc::SYS_pidfd_open, pid, 0, 0);
        let process = process.map_err(|source| Error::Adopt { pid, what: "find it", source })?;
        let (segments, private) = mappings(pid, file)?;
        if segments.is_empty() {
            return Ok(None);
        }
        let (mut seen, mut ready) = (0, 0);
        for number in userfaultfds(pid)? {
            let Ok(fd) = syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) else { continue };
            let uffd = Uffd::from(fd);
            seen += 1;
            // Registering once more changes nothing, and only the descriptor that has the range is let.
            match segments.iter().try_for_each(|s| uffd.register(s.start, s.len, false)) {
                Ok(()) => {
                    let adopted = Adopted { pid, process, uffd, segments, private };
                    adopted.wake_all()?;
                    return Ok(Some(adopted));
                }
                // Opened, and the kernel has not been told for which version of itself.
                Err(Errno::EINVAL) => {}
                Err(_) => ready += 1,
            }
        }
        // The library registers right behind the mapping: a process caught between the two has no descriptor yet, or
        // one that is not ready.
        if ready == 0 {
            return Ok(None);
        }
        Err(Error::Process { pid, problem: format!("none of its {seen} userfaultfds has its memory; end it") })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether its writes stay its own.
    pub fn is_private(&self) -> bool {
        self.private
    }

    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Readable when the process has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// Which page lies at `address`.
    pub fn page(&self, address: u64) -> Option<u32> {
        let segment = self.segments.iter().find(|s| address >= s.start && address - s.start < s.len)?;
        Some(segment.page + ((address - segment.start) / PAGE) as u32)
    }

    fn address(&self, page: u32) -> Option<u64> {
        let within = |s: &&Segment| page >= s.page && u64::from(page - s.page) < s.len / PAGE;
        self.segments.iter().find(within).map(|s| s.start + u64::from(page - s.page) * PAGE)
    }

    /// Lets who waits for this page try again.
    pub fn wake(&self, page: u32) {
        if let Some(at) = self.address(page) {
            // It fails for a process that has ended, where nobody waits.
            let _ = self.uffd.wake(at, PAGE);
        }
    }

    /// Lets everybody try again: also who asked a pager that is no more.
    fn wake_all(&self) -> Result<()> {
        let wake = |s: &Segment| self.uffd.wake(s.start, s.len);
        self.segments.iter().try_for_each(wake).map_err(|source| Error::Adopt {
            pid: self.pid,
            what: "wake it",
            source,
        })
    }

    /// Puts zeros into a run of pages of this process alone, except where there is one already.
    ///
    /// # Errors
    /// The process has ended, or has no memory for page tables.
    pub fn zero(&self, pages: std::ops::Range<u32>) -> Result<()> {
        let mut page = pages.start;
        while page < pages.end {
            let Some(at) = self.address(page) else { return Ok(()) };
            let Done { bytes, stopped } = self.uffd.zero(at, u64::from(pages.end - page) * PAGE);
            page += (bytes / PAGE) as u32;
            match stopped {
                None | Some(Errno::EAGAIN | Errno::EINTR) => {}
                Some(Errno::EEXIST) => {
                    self.wake(page);
                    page += 1;
                }
                Some(source) => return Err(Error::Adopt { pid: self.pid, what: "give it zeros", source }),
            }
        }
        Ok(())
    }

    /// Lets the kernel answer its faults from the file, in which nothing is missing any more.
    pub fn release(&self) {
        for s in &self.segments {
            if let Err(e) = self.uffd.unregister(s.start, s.len)
                && e != Errno::ESRCH
            {
                tracing::warn!(pid = self.pid, error = %e, "cannot let a guest go; its faults go on coming here");
            }
        }
    }

    /// Address ranges with the number of their first page.
    pub fn ranges(&self) -> impl Iterator<Item = (std::ops::Range<u64>, u32)> + '_ {
        self.segments.iter().map(|s| (s.start..s.start + s.len, s.page))
    }
}

/// The descriptors of a process that are userfaultfds, by number.
fn userfaultfds(pid: i32) -> Result<Vec<RawFd>> {
    let dir = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&dir).map_err(|e| Error::Process { pid, problem: format!("cannot list {dir}: {e}") })?;
    let is = |number: &RawFd| fs::read_link(format!("{dir}/{number}")).is_ok_and(|link| link.as_os_str() == LINK);
    let numbers = entries.take(DESCRIPTORS_MAX).filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    Ok(numbers.filter(is).collect())
}

/// Where a process maps the file, in order of address, and whether for itself alone.
fn mappings(pid: i32, file: FileId) -> Result<(Vec<Segment>, bool)> {
    let path = format!("/proc/{pid}/maps");
    let text =
        fs::read_to_string(&path).map_err(|e| Error::Process { pid, problem: format!("cannot read {path}: {e}") })?;
    let found: Vec<(Segment, bool)> = text.lines().filter_map(|line| mapping(line, file)).take(SEGMENTS_MAX).collect();
    let private = found.iter().all(|(_, private)| *private);
    if !private && found.iter().any(|(_, private)| *private) {
        let problem = "it maps its memory both shared and private; end it".to_owned();
        return Err(Error::Process { pid, problem });
    }
    Ok((found.into_iter().map(|(segment, _)| segment).collect(), private))
}

/// `7f00-7f10 rw-p 00001000 00:1a 42   /dev/shm/memory` ─▶ a segment, if it is of this file.
fn mapping(line: &str, file: FileId) -> Option<(Segment, bool)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let (flags, offset, device, inode) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let hex = |word: &str| u64::from_str_radix(word, 16).ok();
    let (major, minor) = device.split_once(':')?;
    let device = libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    if device != file.device || inode.parse() != Ok(file.inode) {
        return None;
    }
    let (start, end) = (hex(start)?, hex(end)?);
    let segment = Segment { start, len: end.checked_sub(start)?, page: u32::try_from(hex(offset)? / PAGE).ok()? };
    Some((segment, flags.ends_with('p')))
}

/// A system call that makes a descriptor.
fn syscall(number: libc::c_long, a: i32, b: i32, c: i32) -> std::result::Result<OwnedFd, Errno> {
    // SAFETY: both calls that come here take numbers only.
    #[allow(unsafe_code)]
    let fd = unsafe { libc::syscall(number, a, b, c) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made it for us.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps_is_a_segment_only_of_its_own_file() {
        let file = FileId { device: libc::makedev(0, 0x1a), inode: 42 };
        let line = "7f0000000000-7f0000010000 rw-p 00002000 00:1a 42                         /dev/shm/a b";
        let segment = Segment { start: 0x7f00_0000_0000, len: 0x10000, page: 2 };
        assert_eq!(mapping(line, file), Some((segment, true)));
        assert_eq!(mapping(&line.replace("rw-p", "rw-s"), file), Some((segment, false)));
        assert_eq!(mapping(&line.replace(" 42 ", " 43 "), file), None);
        assert_eq!(mapping(&line.replace("00:1a", "00:1b"), file), None);
        assert_eq!(mapping("7f00-7f01 rw-p", file), None);
    }
}
