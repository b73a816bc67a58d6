//! What stops a daemon from starting: each says what, where, and what to do next.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use vmatrix_model::config::BadFile;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}\n\nhint: docs/api.md shows what the file holds", path.display())]
    Config {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    BadConfig(#[from] BadFile),
    #[error("cannot read the fleet's token from {}\n\nhint: it is one line of text, the same for every daemon", path.display())]
    Token {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("state_dir {} is too long for the sockets below it\n\nhint: choose one of at most {room} characters", path.display())]
    StateDirLong { path: PathBuf, room: usize },
    #[error("cells = {cells} has no room for a cell\n\nhint: a cell takes a /30; a /24 has room for 64")]
    CellsSmall { cells: ipnet::Ipv4Net },
    #[error("{}: {what} is {has}; at most {max} are taken", path.display())]
    TooMany { path: PathBuf, what: &'static str, has: usize, max: usize },
    #[error(
        "cannot listen on {address}\n\nhint: is another daemon there? `ss -ltnp` shows it; the address must be one of this namespace's own"
    )]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("cannot keep state in {}\n\nhint: is the disk full, or the folder someone else's?", path.display())]
    State {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot open /dev/net/tun\n\nhint: guests need taps: `modprobe tun`, and run as root")]
    NoTun(#[source] io::Error),
    #[error("{program} is missing\n\nhint: apt-get install {package}")]
    Missing { program: &'static str, package: &'static str },
    #[error(transparent)]
    Image(#[from] vmatrix_vma_image::Error),
    #[error(transparent)]
    Transfer(#[from] vmatrix_vma_transfer::Error),
}
