//! How a bucket is asked: HTTP/1.1 by hyper, TLS by the one provider that everything here has.
//!
//! object_store can bring reqwest with TLS of its own; a TLS feature of reqwest would reach every other client of
//! the program, and each would then want a provider chosen for the whole process.

use async_trait::async_trait;
use http_body_util::BodyExt;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector as Tcp;
use hyper_util::rt::TokioExecutor;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse, HttpResponseBody,
    HttpService,
};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A server that does not take a connection in this time is not there.
const CONNECT: Duration = Duration::from_secs(5);

/// Makes the client of a bucket.
#[derive(Debug)]
pub(super) struct Connector {
    /// Whether the machine's root certificates are needed: reading them takes a while.
    pub tls: bool,
}

#[derive(Debug)]
struct Service(Client<HttpsConnector<Tcp>, HttpRequestBody>);

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let generic =
            |e: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic { store: "S3", source: e };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| generic(e.into()))?;
        let tls = if self.tls {
            tls.with_native_roots().map_err(|e| generic(e.into()))?.with_no_client_auth()
        } else {
            tls.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
        };
        let mut tcp = Tcp::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT));
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        Ok(HttpClient::new(Service(Client::builder(TokioExecutor::new()).build(connector))))
    }
}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = self.0.request(request).await.map_err(|e| {
            let kind = if e.is_connect() { HttpErrorKind::Connect } else { HttpErrorKind::Request };
            HttpError::new(kind, e)
        })?;
        // The answer must be Sync, as hyper's body is.
        Ok(answer.map(|body| {
            HttpResponseBody::new(body.map_err(|e| HttpError::new(HttpErrorKind::Interrupted, io::Error::other(e))))
        }))
    }
}
