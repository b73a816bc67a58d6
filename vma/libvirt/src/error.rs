//! What can go wrong with a VM, each with what, where and what to do next.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A VM could not be started, driven or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Image(#[from] vmatrix_vma_image::Error),
    #[error("{name:?} is no name of a VM, which is 1 to 64 of a-z, A-Z, 0-9, -, _ and ., not beginning with a dot")]
    BadName { name: String },
    #[error("a VM {name:?} runs already (process {pid}); end it first, or choose another name")]
    Runs { name: String, pid: i32 },
    #[error("the VM {name:?} does not run; start it again")]
    Gone { name: String },
    #[error("QEMU of {name:?} refused to {what}: {said}")]
    Refused { name: String, what: &'static str, said: String },
    #[error("libvirt refused to {what}: {said}; its own log says more")]
    Libvirt { what: String, said: String },
    #[error("no libvirt answers at {uri}: {said}; is libvirtd started, and may this user connect?")]
    NoDaemon { uri: String, said: String },
    #[error(
        "libvirt's QEMU runs as user {uid} and may not pass {}; make it searchable for others (chmod o+x), or keep \
         the VM's files elsewhere", path.display()
    )]
    Closed { path: PathBuf, uid: u32 },
    #[error("{0:?} holds a control character, which a domain's XML cannot; name it otherwise")]
    Unwritable(String),
    #[error("libvirt says no user under whom its QEMU runs; is this the system's libvirtd (qemu:///system)?")]
    NoUser,
    #[error("process {pid} does not end; it may wait for a disk that does not answer")]
    Stuck { pid: i32 },
    #[error("{what} took longer than {after:?}")]
    Timeout { what: String, after: Duration },
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Says what was done to which file.
pub(crate) fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { what, path: path.to_owned(), source }
}
