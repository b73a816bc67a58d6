//! Which pages a guest has written since a moment: what a snapshot of a singleton has to ship.
//!
//! ```text
//! protect ─▶ every page of the mapping is marked clean, those that are not there yet too
//! a write takes the mark off (the kernel does it alone); dirty ─▶ the pages without a mark
//! ```
//! A page that the pager puts into the file keeps its mark until the guest writes it. A page without a mark whose
//! place in the page table is empty was written and then taken away by the kernel: it counts as written.

use crate::adopt::Adopted;
use crate::error::{Error, Result};
use nix::errno::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use vmatrix_vma_uffd::PAGE;

/// Runs of pages taken from the kernel by one call.
const RUNS: usize = 512;

const WRITTEN: u64 = 1 << 1;
/// Refuse a range whose writes are not noted.
const CHECK_TRACKED: u64 = 1 << 1;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Run {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    runs: u64,
    runs_len: u64,
    max_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    returned: u64,
}

mod request {
    nix::ioctl_readwrite!(scan, b'f', 16, super::Scan);
}

/// Marks every page of the guest clean.
///
/// # Errors
/// [`Error::Untracked`], or the guest has ended.
pub(crate) fn protect(guest: &Adopted) -> Result<()> {
    let pid = guest.pid();
    refuse_private(guest)?;
    for (range, _) in guest.ranges() {
        guest.uffd().protect(range.start, range.end - range.start).map_err(|source| match source {
            Errno::ENOENT | Errno::EINVAL => Error::Untracked { pid, why: "its writes are not noted" },
            source => Error::Adopt { pid, what: "mark its pages clean", source },
        })?;
    }
    Ok(())
}

/// The pages the guest has written since [`protect`], in order, neighbours joined.
///
/// # Errors
/// [`Error::Untracked`], or the guest has ended.
pub(crate) fn dirty(guest: &Adopted) -> Result<Vec<Range<u32>>> {
    let pid = guest.pid();
    refuse_private(guest)?;
    let path = format!("/proc/{pid}/pagemap");
    let pagemap = File::open(&path).map_err(|e| Error::Process { pid, problem: format!("cannot open {path}: {e}") })?;
    let mut pages: Vec<Range<u32>> = Vec::new();
    for (range, first) in guest.ranges() {
        scan(pid, &pagemap, &range, |run| {
            let page = |at: u64| first + ((at - range.start) / PAGE) as u32;
            pages.push(page(run.start)..page(run.end));
        })?;
    }
    Ok(join(pages))
}

fn refuse_private(guest: &Adopted) -> Result<()> {
    if guest.is_private() {
        return Err(Error::Untracked { pid: guest.pid(), why: "it is a clone, whose writes are its own" });
    }
    Ok(())
}

fn scan(pid: i32, pagemap: &File, range: &Range<u64>, mut each: impl FnMut(Run)) -> Result<()> {
    let mut runs = [Run::default(); RUNS];
    let mut start = range.start;
    while start < range.end {
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            flags: CHECK_TRACKED,
            start,
            end: range.end,
            runs: runs.as_mut_ptr() as u64,
            runs_len: RUNS as u64,
            // Asked for exactly this and nothing else, every kernel counts an empty place as written.
            all_of: WRITTEN,
            returned: WRITTEN,
            ..Scan::default()
        };
        // SAFETY: the struct is the one this request takes, and `runs` has room for as many as it says.
        #[allow(unsafe_code)]
        let found = unsafe { request::scan(pagemap.as_raw_fd(), &mut scan) };
        let found = found.map_err(|source| match source {
            Errno::EPERM => Error::Untracked { pid, why: "its writes are not noted" },
            Errno::ENOTTY | Errno::EINVAL => Error::Untracked { pid, why: "the kernel cannot tell" },
            source => Error::Adopt { pid, what: "look for written pages", source },
        })?;
        runs.iter().take(usize::try_from(found).unwrap_or(0)).for_each(|run| each(*run));
        if scan.walk_end <= start {
            break;
        }
        start = scan.walk_end;
    }
    Ok(())
}

/// Runs in order, overlapping and touching ones made one.
fn join(mut runs: Vec<Range<u32>>) -> Vec<Range<u32>> {
    runs.sort_by_key(|run| run.start);
    let mut joined: Vec<Range<u32>> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => joined.push(run),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_touch_or_overlap_are_one() {
        let runs = vec![10..12, 0..2, 2..3, 11..15, 20..21];
        assert_eq!(join(runs), vec![0..3, 10..15, 20..21]);
    }
}
