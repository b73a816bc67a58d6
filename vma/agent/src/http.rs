//! What both daemons' HTTP has in common: the token, the bound, the answer of a refusal, asking others.

use crate::error::Error;
use anyhow::{Context, bail};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use vmatrix_model::wire::Problem;

/// Largest body taken, as docs/api.md says.
const BODY_MAX: usize = 4 << 20;
/// Longest answer read into memory: an inventory or a look of the largest machine is far below.
const ANSWER_MAX: usize = 4 << 20;

/// A refusal: status and what to do next.
#[derive(Debug)]
pub struct Refusal(pub StatusCode, pub Problem);

impl Refusal {
    pub fn new(status: StatusCode, problem: impl Into<String>, hint: impl Into<String>) -> Refusal {
        Refusal(status, Problem { problem: problem.into(), hint: hint.into() })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

/// Serves `routes` behind the token, with `/livez` and `/readyz` before it, until SIGTERM or SIGINT.
///
/// # Errors
/// The address cannot be listened on.
pub async fn serve(listen: SocketAddrV4, token: &str, routes: Router) -> anyhow::Result<()> {
    let listener =
        TcpListener::bind(listen).await.map_err(|source| Error::Listen { address: listen.into(), source })?;
    let expected: Arc<str> = format!("Bearer {token}").into();
    let app = routes
        .layer(axum::middleware::from_fn_with_state(expected, check_token))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(|| async { "ready\n" }));
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
    tokio::select! {
        served = axum::serve(listener, app) => served.context("serving HTTP ended"),
        _ = terminate.recv() => Ok(()),
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

async fn check_token(State(expected): State<Arc<str>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).map(|v| v.as_bytes()).unwrap_or_default();
    if same(given, expected.as_bytes()) {
        return next.run(request).await;
    }
    Refusal::new(
        StatusCode::UNAUTHORIZED,
        "the fleet's token is missing or wrong",
        "send `Authorization: Bearer <content of token_file>`",
    )
    .into_response()
}

/// Compares without telling by its time where the first difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

/// Asks other daemons.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    token: Arc<str>,
}

impl Client {
    pub fn new(token: &str) -> anyhow::Result<Client> {
        let http = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(2))
            .timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .no_proxy()
            .build()
            .context("cannot make an HTTP client")?;
        Ok(Client { http, token: token.into() })
    }

    pub fn request(&self, method: reqwest::Method, url: &str) -> reqwest::RequestBuilder {
        self.http.request(method, url).bearer_auth(&self.token)
    }

    pub async fn get<A: DeserializeOwned>(&self, url: &str) -> anyhow::Result<A> {
        json(self.request(reqwest::Method::GET, url)).await
    }

    /// Sends `body` and reads the answer; `limit` replaces the usual 5 s.
    pub async fn send<A: DeserializeOwned>(
        &self,
        method: reqwest::Method,
        url: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> anyhow::Result<A> {
        json(self.request(method, url).timeout(limit).json(body)).await
    }
}

/// The usual time a question may take.
pub const USUAL: Duration = Duration::from_secs(5);

async fn json<A: DeserializeOwned>(request: reqwest::RequestBuilder) -> anyhow::Result<A> {
    let (client, request) = request.build_split();
    let request = request.context("cannot make the request")?;
    let url = request.url().clone();
    let answer = client
        .execute(request)
        .await
        .map_err(reqwest::Error::without_url)
        .with_context(|| format!("cannot ask {url}"))?;
    let status = answer.status();
    let body = body(answer, ANSWER_MAX).await.with_context(|| format!("cannot read the answer of {url}"))?;
    if !status.is_success() {
        let said = serde_json::from_slice::<Problem>(&body)
            .map(|p| p.problem)
            .unwrap_or_else(|_| String::from_utf8_lossy(&body).chars().take(200).collect());
        bail!("{url} answered {status}: {said}");
    }
    let body: &[u8] = if body.is_empty() { b"null" } else { &body };
    serde_json::from_slice(body).with_context(|| format!("cannot understand the answer of {url}"))
}

/// Reads a body of at most `max` bytes.
///
/// # Errors
/// The connection broke, or more came.
pub async fn body(mut answer: reqwest::Response, max: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(piece) = answer.chunk().await? {
        if bytes.len() + piece.len() > max {
            bail!("more than {max} bytes came");
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_compared_whole() {
        assert!(same(b"Bearer a", b"Bearer a"));
        assert!(!same(b"Bearer a", b"Bearer ab"));
        assert!(!same(b"", b"Bearer a"));
    }
}
