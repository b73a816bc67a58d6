//! One request over one new connection, as a client makes it.
//!
//! ```text
//! connect (from a client's address) ─▶ TLS? ─▶ request ─▶ whole answer
//! ```

use base64::Engine;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;

/// A client gives up after so long.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// Largest answer read.
const BODY_MAX: usize = 4 << 20;

/// What is asked, of whom.
#[derive(Debug, Clone)]
pub struct Ask {
    pub to: SocketAddrV4,
    /// The client's own address.
    pub from: Ipv4Addr,
    /// Name of the host, for the request and for TLS.
    pub host: String,
    pub tls: bool,
    pub path: String,
    /// `user:password`.
    pub user: Option<String>,
    pub agent: String,
    /// Content type and body of a PUT; a GET if none.
    pub put: Option<(String, String)>,
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub body: Bytes,
}

/// Makes the request, once. Whoever wants a second try must count the first as failed.
///
/// # Errors
/// What failed, for people.
pub async fn exchange(ask: Ask) -> Result<Answer, String> {
    match tokio::time::timeout(PATIENCE, attempt(ask)).await {
        Ok(result) => result,
        Err(_) => Err(format!("no whole answer within {} s", PATIENCE.as_secs())),
    }
}

async fn attempt(ask: Ask) -> Result<Answer, String> {
    let stream = connect(&ask).await.map_err(|e| format!("connect: {e}"))?;
    if !ask.tls {
        return converse(stream, &ask).await;
    }
    let name = ServerName::try_from(ask.host.clone()).map_err(|e| format!("TLS: {e}"))?;
    let config = tls_config().map_err(|e| format!("TLS: {e}"))?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|e| format!("TLS: {e}"))?;
    converse(stream, &ask).await
}

async fn connect(ask: &Ask) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    // The machine's own default may be bbr, which hides loss; clients out there mostly use cubic.
    let _ = setsockopt(&socket, sockopt::TcpCongestion, &std::ffi::OsString::from("cubic"));
    socket.bind((ask.from, 0).into())?;
    let stream = socket.connect(ask.to.into()).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, ask: &Ask) -> Result<Answer, String> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| format!("HTTP: {e}"))?;
    let connection = tokio::spawn(connection);
    let mut request = Request::builder()
        .method(if ask.put.is_some() { "PUT" } else { "GET" })
        .uri(&ask.path)
        .header("host", &ask.host)
        .header("user-agent", &ask.agent)
        .header("connection", "close");
    if let Some(user) = &ask.user {
        request = request
            .header("authorization", format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(user)));
    }
    let body = ask.put.as_ref().map_or(String::new(), |(_, body)| body.clone());
    if let Some((content_type, _)) = &ask.put {
        request = request.header("content-type", content_type);
    }
    let request = request.body(Full::new(Bytes::from(body))).map_err(|e| format!("HTTP: {e}"))?;
    let answer = sender.send_request(request).await.map_err(|e| format!("HTTP: {e}"))?;
    let status = answer.status().as_u16();
    let body = Limited::new(answer.into_body(), BODY_MAX).collect().await.map_err(|e| format!("HTTP: {e}"))?.to_bytes();
    connection.abort();
    Ok(Answer { status, body })
}

/// TLS as a client of a guest speaks it.
///
/// # Errors
/// The cryptography that is built in has no version of TLS.
pub fn tls_config() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(AnyCertificate(Arc::clone(&provider)));
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

/// Takes whatever certificate the guest made for itself at its first boot: nobody out here knows it,
/// so it cannot be pinned. The handshake's signature is checked nevertheless.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
