//! What can go wrong between a guest and its pages, each with what to do next.

use nix::errno::Errno;
use std::io;
use std::path::{Path, PathBuf};

/// Memory could not be served, or a guest not taken over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is served by another pager; end that one, or use files of its own", path.display())]
    Taken { path: PathBuf },
    #[error("{} has {has} bytes, the guest's memory {needs}; remove it, it belongs to another image", path.display())]
    WrongSize { path: PathBuf, has: u64, needs: u64 },
    #[error(
        "{} says what another guest wrote, of which memory is gone or the image is another; remove it with the disk's          file beside it to begin from the image", path.display()
    )]
    Written { path: PathBuf },
    #[error("cannot {what}; this needs root, Linux 6.7 or newer and a memory file on tmpfs")]
    Kernel {
        what: &'static str,
        #[source]
        source: Errno,
    },
    #[error("process {pid}: {problem}")]
    Process { pid: i32, problem: String },
    #[error("process {pid}: cannot {what}")]
    Adopt {
        pid: i32,
        what: &'static str,
        #[source]
        source: Errno,
    },
    #[error(
        "process {pid} is not tracked ({why}); start it with VMATRIX_TRACK=1 on Linux 6.7 or newer, or compare content"
    )]
    Untracked { pid: i32, why: &'static str },
    #[error("the pager has ended; start it again with the same configuration, guests go on from there")]
    Ended,
    #[error("the preloaded library is not at {}; build the whole workspace, or install it there", tried.display())]
    NoShim { tried: PathBuf },
    #[error("configuration {}: {problem}", path.display())]
    Config { path: PathBuf, problem: String },
    #[error("control socket {}: {problem}", path.display())]
    Control { path: PathBuf, problem: String },
    #[error(transparent)]
    Transfer(#[from] vmatrix_vma_transfer::Error),
    #[error(transparent)]
    Image(#[from] vmatrix_vma_image::Error),
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Says what was done to which file.
pub(crate) fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { what, path: path.to_owned(), source }
}

/// The same for a system call that `nix` makes.
pub(crate) fn sys<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(Errno) -> Error + 'a {
    move |source| Error::Io { what, path: path.to_owned(), source: source.into() }
}
