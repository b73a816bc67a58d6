//! What can go wrong between agents, and what to do about it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use vmatrix_model::Digest;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed operation: what it was, on what, and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder of ours.
    #[error("cannot {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A configuration file.
    #[error("{}: {problem}", path.display())]
    Config { path: PathBuf, problem: String },
    /// A certificate, its key, or the authority that signs them.
    #[error("identity {}: {problem}", path.display())]
    Identity { path: PathBuf, problem: String },
    /// The address the server was to listen on.
    #[error("cannot listen on {address}: is another process there, or the address not this host's?")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// A source that could not be used.
    #[error("source {address}: {fault}")]
    Source { address: SocketAddr, fault: Fault },
    /// Every source was tried as often as the limits allow.
    #[error("no source gave {what} ({tried}); check that one of them is up and holds it, then ask again")]
    Nowhere { what: String, tried: String },
    /// More is wanted at once than the limits allow.
    #[error("{waiting} chunks are wanted already, the limit; ask for {digest:?} when some have come")]
    TooMany { waiting: usize, digest: Digest },
    /// A manifest that is not what was asked for.
    #[error("image {image}: {problem}")]
    WrongImage { image: String, problem: String },
    /// The image or the local store.
    #[error(transparent)]
    Image(#[from] vmatrix_vma_image::Error),
    /// The sources were dropped while somebody waited.
    #[error("the sources were closed while a fetch was under way")]
    Closed,
}

/// Why a source was left.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// TCP did not connect.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// The TLS handshake failed: either side may have refused the other.
    #[error("handshake failed: {0}")]
    Handshake(String),
    /// It refused by name of the reason.
    #[error("refused: {0}")]
    Refused(String),
    /// The connection ended.
    #[error("connection lost: {0}")]
    Lost(String),
    /// It owes an answer and has sent nothing for too long.
    #[error("silent for {0} ms")]
    Silent(u64),
    /// It sent what no well-behaved source sends.
    #[error("breaks the protocol: {0}")]
    Protocol(String),
    /// It sent bytes that are not what was asked for.
    #[error("wrong bytes: {0}")]
    WrongBytes(String),
}

impl Fault {
    /// Whether it says that the peer lies or is broken, rather than that the way to it is.
    pub fn is_foul(&self) -> bool {
        matches!(self, Fault::Protocol(_) | Fault::WrongBytes(_))
    }
}

/// For `map_err`: names what was done to which path.
pub(crate) fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Error + 'a {
    move |source| Error::Io { what, path: path.to_owned(), source }
}
