//! TLS as a client of a guest speaks it, over a connection that was made.

use anyhow::Context;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use std::net::TcpStream;
use std::sync::Arc;
use vmatrix_lab::exchange::tls_config;

/// Puts TLS over a connection; the handshake is made by the first write. No session is resumed: each connection
/// pays its whole price.
///
/// # Errors
/// `host` is no name that TLS knows.
pub fn over(stream: TcpStream, host: &str) -> anyhow::Result<StreamOwned<ClientConnection, TcpStream>> {
    let mut config = tls_config()?;
    config.resumption = rustls::client::Resumption::disabled();
    let name = ServerName::try_from(host.to_owned()).with_context(|| format!("{host:?} is no name for TLS"))?;
    Ok(StreamOwned::new(ClientConnection::new(Arc::new(config), name)?, stream))
}
