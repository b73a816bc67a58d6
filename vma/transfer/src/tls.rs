//! TLS 1.3 with both sides certified by the fleet's authority; ring is the only provider.
//!
//! A peer is known by the URI name in its certificate, not by the address it was dialled at: addresses move.

use crate::error::Fault;
use crate::frame::PROTOCOL;
use crate::identity::{Identity, Name, Role, name_of};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, ServerConfig,
    SignatureScheme,
};
use std::sync::Arc;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// The name in the handshake: the certificate is not checked against it, see [`Fleet`].
const SERVER_NAME: &str = "vmatrix";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(identity: &Identity) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca.clone()).map_err(|e| format!("ca.pem is no authority: {e}"))?;
    Ok(roots)
}

/// What accepts members of the identity's fleet.
///
/// # Errors
/// What is wrong with the identity.
pub fn acceptor(identity: &Identity) -> Result<TlsAcceptor, String> {
    let members = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(identity)?), provider())
        .build()
        .map_err(|e| e.to_string())?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .with_client_cert_verifier(members)
        .with_single_cert(vec![identity.cert.clone()], identity.key())
        .map_err(|e| format!("certificate and key do not fit: {e}"))?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // A connection lasts; tickets would only cost bytes behind the handshake.
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// What connects to members of the identity's fleet that serve.
///
/// # Errors
/// What is wrong with the identity.
pub fn connector(identity: &Identity) -> Result<TlsConnector, String> {
    let fleet = Fleet { roots: roots(identity)?, algorithms: provider().signature_verification_algorithms };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(fleet))
        .with_client_auth_cert(vec![identity.cert.clone()], identity.key())
        .map_err(|e| format!("certificate and key do not fit: {e}"))?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(TlsConnector::from(Arc::new(config)))
}

/// The name given to the TLS library.
pub fn server_name() -> ServerName<'static> {
    // A constant DNS name; the address is as good a name where it were none.
    ServerName::try_from(SERVER_NAME).unwrap_or(ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()))
}

/// Who the other side is.
///
/// # Errors
/// It showed no certificate, or one without a name of the fleet.
pub fn peer(certificates: Option<&[CertificateDer<'_>]>) -> Result<Name, String> {
    let first = certificates.and_then(<[_]>::first).ok_or_else(|| "the peer showed no certificate".to_owned())?;
    name_of(first)
}

/// Believes servers whose certificate the fleet's authority signed for a role that serves.
#[derive(Debug)]
struct Fleet {
    roots: RootCertStore,
    algorithms: WebPkiSupportedAlgorithms,
}

/// A server of the fleet that is not to be asked for chunks.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoServer(String);

impl ServerCertVerifier for Fleet {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let cert = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&cert, &self.roots, intermediates, now, self.algorithms.all)?;
        let refuse = |problem: String| CertificateError::Other(OtherError(Arc::new(NoServer(problem))));
        match name_of(end_entity) {
            Ok(Name { role: Role::Store | Role::Machine, .. }) => Ok(ServerCertVerified::assertion()),
            Ok(name) => Err(refuse(format!("{name} is an operator, who serves no chunks")).into()),
            Err(problem) => Err(refuse(problem).into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Says in words why a handshake failed, or a connection right behind it: in TLS 1.3 a client hears only then
/// that its own certificate was refused.
pub fn reason(error: &std::io::Error) -> String {
    let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) else { return error.to_string() };
    match tls {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "the peer's certificate is of another authority".to_owned()
        }
        rustls::Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => "the peer's certificate is not valid now; check both clocks, or have it issued again".to_owned(),
        rustls::Error::NoCertificatesPresented => "the peer showed no certificate".to_owned(),
        rustls::Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "the peer refused our certificate: it is of another authority".to_owned()
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the peer refused us: we showed no certificate".to_owned()
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateExpired) => {
            "the peer refused our certificate: it has expired; have it issued again".to_owned()
        }
        rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol) => {
            format!("the peer speaks another version than {}", String::from_utf8_lossy(PROTOCOL))
        }
        other => other.to_string(),
    }
}

/// Whether an error of a connection is TLS speaking, rather than the way there.
pub fn is_tls(error: &std::io::Error) -> bool {
    error.get_ref().is_some_and(|e| e.is::<rustls::Error>())
}

/// An error of a connection as the fault of the source at its other end.
pub fn fault(error: &std::io::Error) -> Fault {
    if is_tls(error) { Fault::Handshake(reason(error)) } else { Fault::Lost(error.to_string()) }
}
