//! Who is let in.

use super::fleet::{Fleet, chunk};
use crate::identity::{Authority, Identity, Role};
use crate::{Class, Limits, Server, ServerConfig, Sources};
use rustls::pki_types::CertificateDer;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn sources(fleet: &Fleet, identity: &Identity, address: std::net::SocketAddr) -> Sources {
    Sources::new(identity, fleet.empty("local"), vec![address], None, &Limits::default()).unwrap()
}

async fn refused(fleet: &Fleet, identity: &Identity, server: ServerConfig) -> String {
    let need = chunk(&fleet.empty("origin"), 1, 1000);
    let origin = fleet.serve(server).await;
    let sources = sources(fleet, identity, origin.address);
    let get = tokio::time::timeout(Duration::from_secs(3), sources.get(&need, Class::Critical, None)).await;
    assert!(!get.is_ok_and(|got| got.is_ok()), "a stranger was given a chunk");
    assert_eq!(origin.server.sent().chunks, 0);
    sources.status().await[0].fault.clone().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_is_refused_on_either_side_and_told_why() {
    let fleet = Fleet::new();
    let store = fleet.empty("origin");
    let strangers = Authority::create(fleet.path("strangers")).unwrap();
    let machine = strangers.issue(Role::Machine, "spy").unwrap();
    // The client refuses first: the server is not of its fleet.
    let fault = refused(&fleet, &machine, fleet.config(&store)).await;
    assert!(fault.contains("of another authority"), "{fault}");
    // A client that believes the server, but is not of its fleet.
    let fault = refused(&fleet, &believing(&fleet, &machine), fleet.config(&store)).await;
    assert!(fault.contains("refused our certificate: it is of another authority"), "{fault}");
}

/// A stranger that would talk to the fleet.
fn believing(fleet: &Fleet, stranger: &Identity) -> Identity {
    let dir = fleet.path("believing");
    stranger.write(&dir).unwrap();
    std::fs::copy(fleet.path("ca/ca.pem"), dir.join("ca.pem")).unwrap();
    Identity::read(&dir).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_serves_no_chunks() {
    let fleet = Fleet::new();
    let config =
        ServerConfig { identity: fleet.identity(Role::Operator, "someone"), ..fleet.config(&fleet.empty("origin")) };
    let fault = refused(&fleet, &fleet.identity(Role::Machine, "a"), config).await;
    assert!(fault.contains("operator") && fault.contains("serves no chunks"), "{fault}");
}

/// Connects without a certificate of its own, or in another way than members do.
async fn connect(fleet: &Fleet, alpn: &[u8], versions: &[&'static rustls::SupportedProtocolVersion]) -> String {
    let origin = fleet.serve_store(&fleet.empty("origin")).await;
    let mut roots = rustls::RootCertStore::empty();
    let member = fleet.identity(Role::Machine, "a");
    roots.add(CertificateDer::from(member.ca.to_vec())).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible))
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let tcp = TcpStream::connect(origin.address).await.unwrap();
    let shaken = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(crate::tls::server_name(), tcp).await;
    let mut tls = match shaken {
        Ok(tls) => tls,
        Err(error) => return crate::tls::reason(&error),
    };
    let ping = crate::frame::Request::Ping { token: 1 }.encode();
    // Who is refused hears why, though it went on talking meanwhile: it is not cut off.
    for _ in 0..50 {
        tls.write_all(&ping).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut answer = Vec::new();
    match tls.read_to_end(&mut answer).await {
        Ok(_) => format!("answered {answer:?}"),
        Err(error) => crate::tls::reason(&error),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_certificate_or_with_an_old_tls_or_protocol_nobody_is_answered() {
    let fleet = Fleet::new();
    let new: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
    let reason = connect(&fleet, crate::frame::PROTOCOL, new).await;
    assert!(reason.contains("we showed no certificate"), "{reason}");
    let reason = connect(&fleet, b"vmatrix-chunks/0", new).await;
    assert!(reason.contains("speaks another version"), "{reason}");
    let reason = connect(&fleet, crate::frame::PROTOCOL, &[&rustls::version::TLS12]).await;
    assert!(reason.contains("ProtocolVersion"), "{reason}");
}

#[derive(Debug)]
struct Gullible;

impl rustls::client::danger::ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_does_not_fit_its_certificate_is_said_so_before_anybody_listens() {
    let fleet = Fleet::new();
    let (a, b) = (fleet.identity(Role::Store, "a"), fleet.identity(Role::Store, "b"));
    a.write(fleet.path("a")).unwrap();
    b.write(fleet.path("b")).unwrap();
    std::fs::copy(fleet.path("b/key.pem"), fleet.path("a/key.pem")).unwrap();
    let identity = Identity::read(fleet.path("a")).unwrap();
    let error = Server::new(ServerConfig { identity, ..fleet.config(&fleet.empty("s")) }).unwrap_err().to_string();
    assert!(error.contains("do not fit"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_only_connects_is_dropped_and_one_that_sends_rubbish_too() {
    let fleet = Fleet::new();
    let origin = fleet.serve_store(&fleet.empty("origin")).await;
    let mut rubbish = TcpStream::connect(origin.address).await.unwrap();
    rubbish.write_all(&[0x55; 4096]).await.unwrap();
    let mut quiet = TcpStream::connect(origin.address).await.unwrap();
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(8), quiet.read_to_end(&mut answer)).await;
    assert!(ended.is_ok() && answer.is_empty(), "a peer that never shook hands is still connected");
    let ended = tokio::time::timeout(Duration::from_secs(1), rubbish.read_to_end(&mut answer)).await;
    assert!(ended.is_ok());
}
