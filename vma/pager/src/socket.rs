//! Unix sockets: made where one of a process that is no more may still lie.

use crate::error::{Result, io};
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};

/// After a failed accept: descriptors or memory are short, and are not longer so by asking at once.
const AGAIN: Duration = Duration::from_millis(100);

/// Listens at `path`, whose file gets these mode bits; a socket that lies there is replaced. Only for a path that
/// one process at a time may have: whoever calls holds a lock that says so.
///
/// # Errors
/// The folder is missing, or the path longer than 107 bytes.
pub(crate) fn listen(path: &Path, mode: u32) -> Result<UnixListener> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(io("replace", path)(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(io("listen at", path))?;
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(io("set the mode of", path))?;
    Ok(listener)
}

/// The next connection.
pub(crate) async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(e) => {
                tracing::warn!(error = %e, "cannot take a connection");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}
