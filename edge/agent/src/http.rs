//! What every daemon's HTTP side shares: the token, refusals, serving and asking.

use anyhow::Context;
use axum::extract::{FromRequest, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use vmatrix_model::wire::Problem;

/// Largest body taken, bytes.
pub const BODY_MAX: usize = 4 << 20;

/// An answer that is a problem.
#[derive(Debug)]
pub struct Refusal(StatusCode, Problem);

impl Refusal {
    /// A refusal in the words of a core.
    pub fn new(status: StatusCode, problem: Problem) -> Refusal {
        Refusal(status, problem)
    }
    /// A refusal: what went wrong, and what to do next.
    pub fn because(status: StatusCode, problem: impl Into<String>, hint: &str) -> Refusal {
        Refusal(status, Problem { problem: problem.into(), hint: hint.into() })
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.1.problem, self.1.hint)
    }
}

impl std::error::Error for Refusal {}

impl From<anyhow::Error> for Refusal {
    fn from(e: anyhow::Error) -> Refusal {
        Refusal::because(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{e:#}"),
            "see the daemon's log; the state in force stays",
        )
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

/// A JSON body of type `T`, refused with a [`Problem`] if it is none.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;
    async fn from_request(request: Request, state: &S) -> Result<Body<T>, Refusal> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(body)) => Ok(Body(body)),
            Err(e) => Err(Refusal::because(
                e.status(),
                e.body_text(),
                "send JSON as docs/api.md says, with Content-Type: application/json",
            )),
        }
    }
}

/// Where supervisors ask whether the daemon lives; it serves once it listens.
pub fn health() -> Router {
    Router::new().route("/livez", get(|| async {})).route("/readyz", get(|| async {}))
}

/// Adds the token check and the body bound to `routes`.
pub fn guarded(routes: Router, token: &str) -> Router {
    let wanted: Arc<str> = format!("Bearer {token}").into();
    routes.layer(axum::extract::DefaultBodyLimit::max(BODY_MAX)).layer(middleware::from_fn_with_state(wanted, check))
}

async fn check(State(wanted): State<Arc<str>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).map_or(&[][..], |v| v.as_bytes());
    // Looks at every byte, so that the time taken says nothing about how many were right.
    let wrong = given
        .iter()
        .zip(wanted.as_bytes())
        .fold(given.len() ^ wanted.len(), |wrong, (a, b)| wrong | usize::from(a ^ b));
    if wrong == 0 {
        return next.run(request).await;
    }
    Refusal::because(
        StatusCode::UNAUTHORIZED,
        "the fleet token is missing or wrong",
        "send Authorization: Bearer with the content of token_file",
    )
    .into_response()
}

/// Serves `routes` on `listen` until the process is asked to end.
///
/// # Errors
/// The address is in use or not this machine's.
pub async fn serve(listen: SocketAddrV4, routes: Router) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(listen).await.with_context(|| {
        format!("cannot listen on {listen}: another daemon may, or the address is not this machine's")
    })?;
    tokio::select! {
        served = axum::serve(listener, routes) => served.context("cannot go on serving"),
        ended = asked_to_end() => ended,
    }
}

/// Returns when the process gets SIGTERM or SIGINT.
///
/// # Errors
/// Signals cannot be listened to.
pub async fn asked_to_end() -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate()).context("cannot listen to SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen to SIGINT")?;
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// An asking client: 2 s to connect, 5 s for the whole.
///
/// # Errors
/// The system gives no sockets.
pub fn client() -> anyhow::Result<reqwest::Client> {
    reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(2))
        .timeout(Duration::from_secs(5))
        .no_proxy()
        .build()
        .context("cannot make an HTTP client")
}
