//! A door into the lab: a port of this machine that leads to an address inside a namespace.
//!
//! ```text
//! browser ─▶ 127.0.0.1:8440 (here) ─▶ a thread inside the origin ─▶ 127.0.0.1:8439 there (the CPA)
//! ```

use crate::namespace::Namespace;
use anyhow::Context;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, oneshot};

/// Connections at a time: a few browsers with their event streams.
const CONNECTIONS_MAX: usize = 64;

/// An open door; dropped, it is closed.
pub struct Forwarder {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    /// Opens the door at `port` of 127.0.0.1, or at a free port if that is taken.
    ///
    /// # Errors
    /// No port can be had, or the namespace cannot be entered.
    pub fn open(port: u16, inside: &Namespace, to: SocketAddrV4) -> anyhow::Result<Forwarder> {
        let bind = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        let listener = match bind(port) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => bind(0),
            other => other,
        };
        let listener = listener.with_context(|| format!("cannot listen on 127.0.0.1:{port}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let namespace = inside.clone();
        // The listener was opened here and stays here; what the thread dials is inside.
        let work = move || {
            if let Err(error) = namespace.enter().and_then(|()| serve(listener, to, stopped)) {
                tracing::error!("the door to {to} is shut: {error:#}");
            }
        };
        let thread =
            std::thread::Builder::new().name("forwarder".into()).spawn(work).context("cannot start a thread")?;
        Ok(Forwarder { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where the door is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: TcpListener, to: SocketAddrV4, stopped: oneshot::Receiver<()>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let accept = async {
            loop {
                let place = Arc::clone(&places).acquire_owned().await;
                let Ok((mut outside, _)) = listener.accept().await else { continue };
                tokio::spawn(async move {
                    let _place = place;
                    // While the CPA is down the browser is told so by a closed connection, and tries again.
                    if let Ok(mut inner) = TcpStream::connect(SocketAddr::from(to)).await {
                        let _ = tokio::io::copy_bidirectional(&mut outside, &mut inner).await;
                    }
                });
            }
        };
        tokio::select! {
            () = accept => {}
            _ = stopped => {}
        }
        Ok(())
    })
}
