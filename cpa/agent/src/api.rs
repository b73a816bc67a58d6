//! The CPA's HTTP: what docs/api.md lists. Thin: read, ask the owner, answer.

use crate::owner::Ask;
use crate::watchers::{News, WATCHERS_MAX, Watchers, news};
use axum::extract::{DefaultBodyLimit, Query, Request, State, rejection::JsonRejection};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::sse::{self, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::{Stream, StreamExt, stream};
use serde::Deserialize;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::BroadcastStream;
use vmatrix_cpa_core::{Event, Refusal};
use vmatrix_model::ServiceId;
use vmatrix_model::demand::{COUNTS_MAX, DemandReport};
use vmatrix_model::inventory::Inventory;
use vmatrix_model::plan::{Decision, Plan};
use vmatrix_model::wire::{Apply, Explanation, Order, Problem, Snapshot};

/// Largest body: see docs/api.md.
const BODY_MAX: usize = 4 << 20;

#[derive(Clone)]
pub(crate) struct Shared {
    pub inbox: mpsc::Sender<Ask>,
    pub watchers: Watchers,
    pub token: Arc<str>,
}

pub(crate) fn routes(shared: Shared) -> Router {
    let behind_token = Router::new()
        .route("/v1/demand", post(demand))
        .route("/v1/inventory", post(inventory))
        .route("/v1/snapshot", get(snapshot))
        .route("/v1/plan", post(plan))
        .route("/v1/apply", post(apply))
        .route("/v1/explain", get(explain))
        .route_layer(axum::middleware::from_fn_with_state(shared.clone(), check_token));
    Router::new()
        .merge(behind_token)
        // A browser's EventSource can send no token. Like the page that opens it, the stream only shows.
        .route("/v1/events", get(events))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .fallback(get(page))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(shared)
}

/// An answer that is a problem.
struct No(StatusCode, Problem);

impl No {
    fn new(status: StatusCode, problem: impl Into<String>, hint: impl Into<String>) -> No {
        No(status, Problem { problem: problem.into(), hint: hint.into() })
    }
    fn gone() -> No {
        No::new(StatusCode::SERVICE_UNAVAILABLE, "the CPA is stopping", "try again when it is up")
    }
}
impl IntoResponse for No {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}
impl From<Refusal> for No {
    fn from(r: Refusal) -> No {
        let status = match &r {
            Refusal::NoPlan { .. } => StatusCode::NOT_FOUND,
            Refusal::Stale { .. } => StatusCode::CONFLICT,
            Refusal::Order { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        };
        let words = r.to_string();
        let (problem, hint) = words.split_once("\n\nhint: ").unwrap_or((&words, ""));
        No::new(status, problem, hint)
    }
}
impl From<JsonRejection> for No {
    fn from(r: JsonRejection) -> No {
        No::new(r.status(), r.body_text(), "see docs/api.md for what this route takes")
    }
}

type Body<T> = Result<Json<T>, JsonRejection>;

async fn check_token(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("Bearer "));
    if given.is_some_and(|g| same(g.as_bytes(), shared.token.as_bytes())) {
        return next.run(request).await;
    }
    No::new(
        StatusCode::UNAUTHORIZED,
        "the fleet's token is missing or wrong",
        "send `Authorization: Bearer <content of token_file>`",
    )
    .into_response()
}

/// Compares in a time that does not tell how much was right.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

async fn hear(shared: &Shared, event: Event) -> Result<StatusCode, No> {
    shared.inbox.send(Ask::Hear(event)).await.map_err(|_| No::gone())?;
    Ok(StatusCode::NO_CONTENT)
}

async fn ask<T>(shared: &Shared, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, No> {
    let (to, answer) = oneshot::channel();
    shared.inbox.send(ask(to)).await.map_err(|_| No::gone())?;
    answer.await.map_err(|_| No::gone())
}

async fn demand(State(shared): State<Shared>, report: Body<DemandReport>) -> Result<StatusCode, No> {
    let Json(report) = report?;
    if report.counts.len() > COUNTS_MAX {
        return Err(No::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("{} counts are more than {COUNTS_MAX}", report.counts.len()),
            "report more often",
        ));
    }
    hear(&shared, Event::Demand(report)).await
}

async fn inventory(State(shared): State<Shared>, inventory: Body<Inventory>) -> Result<StatusCode, No> {
    hear(&shared, Event::Inventory(inventory?.0)).await
}

async fn snapshot(State(shared): State<Shared>) -> Result<Json<Snapshot>, No> {
    Ok(Json(ask(&shared, Ask::Snapshot).await?))
}

async fn plan(State(shared): State<Shared>, order: Body<Order>) -> Result<Json<Plan>, No> {
    let Json(order) = order?;
    Ok(Json(ask(&shared, |to| Ask::Plan(order, to)).await??))
}

async fn apply(State(shared): State<Shared>, body: Body<Apply>) -> Result<Json<Decision>, No> {
    let Json(Apply { plan }) = body?;
    Ok(Json(ask(&shared, |to| Ask::Apply(plan, to)).await??))
}

#[derive(Deserialize)]
struct Which {
    service: String,
}

async fn explain(State(shared): State<Shared>, Query(which): Query<Which>) -> Result<Json<Explanation>, No> {
    let service: ServiceId =
        which.service.parse().map_err(|e| No::new(StatusCode::BAD_REQUEST, format!("{e}"), "give ?service=NAME"))?;
    let known = ask(&shared, |to| Ask::Explain(service.clone(), to)).await?;
    known.map(Json).ok_or_else(|| {
        No::new(StatusCode::NOT_FOUND, format!("there is no service {service}"), "`vmatrix watch` lists them")
    })
}

async fn events(State(shared): State<Shared>) -> Result<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>, No> {
    let full = || {
        No::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{WATCHERS_MAX} watchers are the most there may be"),
            "close another page",
        )
    };
    let (receiver, seat) = shared.watchers.watch().ok_or_else(full)?;
    let first = news("snapshot", &ask(&shared, Ask::Snapshot).await?);
    // A watcher that fell behind misses events; the next snapshot is whole.
    let rest = BroadcastStream::new(receiver).filter_map(|n| async { n.ok() });
    let seated = move |n: News| {
        let _ = &seat;
        Ok(sse::Event::default().event(n.name).data(&*n.json))
    };
    let keep = sse::KeepAlive::new().interval(Duration::from_secs(15));
    Ok(Sse::new(stream::iter(first).chain(rest).map(seated)).keep_alive(keep))
}

async fn ready(State(shared): State<Shared>) -> Result<&'static str, No> {
    ask(&shared, Ask::Snapshot).await?;
    Ok("ready\n")
}

async fn page(uri: Uri, headers: HeaderMap) -> Response {
    crate::page::answer(uri.path(), &headers)
}
