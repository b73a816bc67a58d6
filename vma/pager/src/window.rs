//! The memory file as the pager sees it: which pages are there, and how one gets there.
//!
//! ```text
//! bytes of a page ─fill─▶ the file's page cache, whole or not at all, never over a page that is there
//! ```
//! The file is mapped here once more, registered with a userfaultfd of the pager's own, and pages are put in through
//! that. A `pwrite` would do almost the same, but nothing in it says "only if absent", and one that is interrupted
//! at the wrong moment shows a guest a page that is half zeros; the kernel's own request cannot do either.
//!
//! # Invariants
//! 1. A page that is present is never written: a guest that shares the file may have changed it.
//! 2. A page becomes visible with all its bytes.

use crate::bits::Bits;
use crate::error::{Error, Result, io, sys};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{Whence, lseek64};
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use vmatrix_vma_uffd::{PAGE, Uffd, feature};

/// Which file a mapping is of, as the kernel tells it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId {
    pub device: u64,
    pub inode: u64,
}

/// The memory file, locked for this pager alone.
#[derive(Debug)]
pub(crate) struct Window {
    path: PathBuf,
    file: Flock<File>,
    id: FileId,
    uffd: Uffd,
    /// Where it is mapped.
    at: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping is only named to the kernel, never read or written through a pointer here.
#[allow(unsafe_code)]
unsafe impl Send for Window {}

impl Window {
    /// Opens the memory file of a guest of so many pages, or makes it, all holes.
    ///
    /// # Errors
    /// Another pager has it, its size is another guest's, or the kernel lacks what this takes.
    pub fn open(path: &Path, pages: u32) -> Result<Window> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(io("open", path))?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
            Errno::EWOULDBLOCK => Error::Taken { path: path.to_owned() },
            e => sys("lock", path)(e),
        })?;
        let metadata = file.metadata().map_err(io("look at", path))?;
        let needs = u64::from(pages) * PAGE;
        match metadata.len() {
            0 => file.set_len(needs).map_err(io("size", path))?,
            has if has != needs => return Err(Error::WrongSize { path: path.to_owned(), has, needs }),
            _ => {}
        }
        let len = usize::try_from(needs).ok().and_then(NonZeroUsize::new);
        let len = len.ok_or_else(|| Error::WrongSize { path: path.to_owned(), has: 0, needs })?;
        let kernel = |what| move |source| Error::Kernel { what, source };
        // SAFETY: a new mapping at a place of the kernel's choice, through which nothing is ever read.
        #[allow(unsafe_code)]
        let at = unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &*file, 0) };
        let at = at.map_err(kernel("map the memory file"))?;
        let uffd = Uffd::open(feature::MISSING_SHMEM).map_err(kernel("open a userfaultfd"))?;
        let id = FileId { device: metadata.dev(), inode: metadata.ino() };
        let window = Window { path: path.to_owned(), file, id, uffd, at, len: len.get() };
        window.uffd.register(at.as_ptr() as u64, needs, false).map_err(kernel("register the memory file"))?;
        Ok(window)
    }

    pub fn id(&self) -> FileId {
        self.id
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pages that are there, as the file itself says.
    ///
    /// # Errors
    /// The file system does not tell holes from data.
    pub fn present(&self) -> Result<Bits> {
        let pages = self.len as u64 / PAGE;
        let mut bits = Bits::new(pages as u32);
        let mut at = 0;
        while let Some(data) = self.seek(at, Whence::SeekData)? {
            let hole = self.seek(data, Whence::SeekHole)?.unwrap_or(self.len as u64);
            for page in data / PAGE..hole.div_ceil(PAGE).min(pages) {
                bits.insert(page as u32);
            }
            at = hole.max(data + 1);
        }
        Ok(bits)
    }

    /// Whether one page is there now.
    ///
    /// # Errors
    /// As [`Window::present`].
    pub fn has(&self, page: u32) -> Result<bool> {
        let offset = u64::from(page) * PAGE;
        Ok(self.seek(offset, Whence::SeekData)? == Some(offset))
    }

    fn seek(&self, from: u64, whence: Whence) -> Result<Option<u64>> {
        match lseek64(&*self.file, i64::try_from(from).unwrap_or(i64::MAX), whence) {
            Ok(at) => Ok(u64::try_from(at).ok()),
            // Nothing but a hole up to the end.
            Err(Errno::ENXIO) => Ok(None),
            Err(e) => Err(sys("look for holes in", &self.path)(e)),
        }
    }

    /// Puts pages in from `page` on, except where one is already.
    ///
    /// # Errors
    /// There is no room on the file system, most often.
    pub fn fill(&self, page: u32, bytes: &[u8]) -> Result<()> {
        self.each(page, bytes.len() as u64, |to, at, _| {
            self.uffd.copy(to, bytes.get(at as usize..).unwrap_or_default())
        })
    }

    /// Puts a page of zeros in, except where one is already. It takes the memory of any other page: for a guest that
    /// shares the file, which will write to it.
    ///
    /// # Errors
    /// As [`Window::fill`].
    pub fn fill_zero(&self, page: u32) -> Result<()> {
        self.each(page, PAGE, |to, _, len| self.uffd.zero(to, len))
    }

    fn each(&self, page: u32, len: u64, put: impl Fn(u64, u64, u64) -> vmatrix_vma_uffd::Done) -> Result<()> {
        let to = self.at.as_ptr() as u64 + u64::from(page) * PAGE;
        let mut at = 0;
        while at < len {
            let done = put(to + at, at, len - at);
            at += done.bytes;
            match done.stopped {
                None | Some(Errno::EAGAIN | Errno::EINTR) => {}
                Some(Errno::EEXIST) => at += PAGE,
                Some(e) => return Err(sys("put a page into", &self.path)(e)),
            }
        }
        Ok(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: mapped by `open`, at this place and length, and named by nobody any more.
        #[allow(unsafe_code)]
        if let Err(e) = unsafe { munmap(self.at, self.len) } {
            tracing::warn!(error = %e, "cannot unmap the memory file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn dir() -> tempfile::TempDir {
        tempfile::Builder::new().prefix("vmx-window").tempdir_in("/dev/shm").expect("needs a tmpfs at /dev/shm")
    }

    #[test]
    fn machine_a_page_that_is_there_is_never_written() {
        let dir = dir();
        let path = dir.path().join("memory");
        let window = Window::open(&path, 64).expect("needs root and userfaultfd");
        let guest = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        guest.write_all_at(&[7; 4096], 11 * PAGE).unwrap();
        window.fill(10, &[1; 3 * 4096]).unwrap();
        window.fill_zero(10).unwrap();
        window.fill_zero(20).unwrap();
        for (page, holds) in [(10, 1), (11, 7), (12, 1), (20, 0)] {
            let mut bytes = [9; 4096];
            guest.read_exact_at(&mut bytes, page * PAGE).unwrap();
            assert!(bytes.iter().all(|b| *b == holds), "page {page}");
            assert!(window.has(page as u32).unwrap());
        }
        let present = window.present().unwrap();
        assert_eq!((0..64).filter(|p| present.has(*p)).collect::<Vec<_>>(), [10, 11, 12, 20]);
    }

    #[test]
    fn machine_a_file_has_one_pager_and_one_size() {
        let dir = dir();
        let path = dir.path().join("memory");
        let window = Window::open(&path, 64).expect("needs root and userfaultfd");
        assert!(matches!(Window::open(&path, 64), Err(Error::Taken { .. })));
        drop(window);
        assert!(matches!(Window::open(&path, 65), Err(Error::WrongSize { .. })));
        assert_eq!(Window::open(&path, 64).unwrap().present().unwrap().len(), 0);
    }
}
