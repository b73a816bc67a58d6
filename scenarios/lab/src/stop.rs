//! Ctrl-C and SIGTERM as something to look at between the steps and to wait for.

use anyhow::bail;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Becomes true at the first SIGINT or SIGTERM.
///
/// # Errors
/// Signals cannot be listened to.
pub fn interrupted() -> anyhow::Result<watch::Receiver<bool>> {
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = int.recv() => {}
            _ = term.recv() => {}
        }
        let _ = stop.send(true);
        // The channel stays open, so that waiting for it never ends by itself.
        stop.closed().await;
    });
    Ok(stopped)
}

/// Goes on, or ends what is under way once it was interrupted.
///
/// # Errors
/// It was.
pub fn going(stop: &watch::Receiver<bool>) -> anyhow::Result<()> {
    if *stop.borrow() { bail!("interrupted; everything was taken down") } else { Ok(()) }
}
