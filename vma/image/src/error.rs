//! What can go wrong with an image, each with what, where and what to do next.

use crate::machine::Mismatch;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmatrix_model::Digest;

/// An image could not be built, read or resumed.
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
    #[error(
        "{} is no image store; name another with --store, or begin one with `vmatrix image build`", path.display()
    )]
    NoStore { path: PathBuf },
    #[error(
        "there is no builder's key {}, so nothing says whose images these are; build one here, or name the signers",
        path.display()
    )]
    NoKey { path: PathBuf },
    #[error("{address:?} is no store: {problem}")]
    BadAddress { address: String, problem: String },
    #[error("cannot {what} {}; see that the bucket is there, and that this machine reaches it and may", place.display())]
    Bucket {
        what: &'static str,
        place: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{} is a bucket, and this needs a folder; name one with --store", place.display())]
    NotAFolder { place: PathBuf },
    #[error("others are publishing to {} or collecting it all the time; run the same again later", place.display())]
    Busy { place: PathBuf },
    #[error(
        "image {name:?} cannot be read, so nobody knows what it needs; let its staging end, repair it or remove it, then collect again"
    )]
    Uncollectable {
        name: String,
        #[source]
        source: Box<Error>,
    },
    #[error("{} is no owner's key: {problem}", path.display())]
    BadKey { path: PathBuf, problem: String },
    #[error("{name:?} is not the name of an image, which is 1 to 30 of a-z, 0-9 and -, beginning with a letter")]
    BadName { name: String },
    #[error("{} is longer than the {max} bytes it may have; fetch or build the image again", path.display())]
    TooLong { path: PathBuf, max: usize },
    #[error("no image {name:?} in {}; build it with `vmatrix image build`", store.display())]
    NoImage { name: String, store: PathBuf },
    #[error("chunk {digest} is not in {}; build the image again, or fetch it anew", store.display())]
    NoChunk { digest: Digest, store: PathBuf },
    #[error("chunk {digest}: {problem}; fetch or build it again")]
    BadChunk { digest: Digest, problem: String },
    #[error("the table of {what}: {problem}; build the image again with this version")]
    BadTable { what: String, problem: String },
    #[error("image {name:?}: {problem}; build it again with this version")]
    BadManifest { name: String, problem: String },
    #[error(
        "image {name:?}: the signature is not of this manifest; do not run it, fetch it again from where it was built"
    )]
    BadSignature { name: String },
    #[error(
        "image {name:?} is signed by {signer:?}, which is not trusted here; add that key to `signers` if it should be"
    )]
    Untrusted { name: String, signer: String },
    #[error("{} lacks {missing} of its {total} chunks; stage the image again, it goes on from there", path.display())]
    Incomplete { path: PathBuf, missing: usize, total: usize },
    #[error(transparent)]
    BadFile(#[from] vmatrix_model::config::BadFile),
    #[error("{}: {problem}", file.display())]
    BadRecipe { file: PathBuf, problem: String },
    #[error("{program} is missing; install it with `apt-get install {package}`")]
    Missing { program: String, package: &'static str },
    #[error("{what} failed ({status}): {said}")]
    Tool { what: String, status: String, said: String },
    #[error("QEMU refused {command}: {problem}")]
    Qmp { command: String, problem: String },
    #[error("guest agent: {0}")]
    Guest(String),
    #[error("{what} took longer than {after:?}")]
    Timeout { what: String, after: Duration },
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    #[error("{0}")]
    Unhealthy(String),
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// How every program says it in English, which is how they are run.
pub const DISK_FULL: &str = "No space left on device";

impl Error {
    /// A full disk that a program met, as one that was met here.
    pub fn or_disk_full(self, what: &'static str, path: &Path) -> Error {
        match self {
            Error::Tool { said, .. } if said.contains(DISK_FULL) => Error::DiskFull { what, path: path.to_owned() },
            other => other,
        }
    }
}

/// Says what was done to which file; a full disk has its own words, for the cure differs.
pub fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull { what, path: path.to_owned() },
        _ => Error::Io { what, path: path.to_owned(), source },
    }
}
