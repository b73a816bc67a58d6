//! The CPA's HTTP: what docs/api.md lists. Thin: read, ask the owner, answer.

use crate::doors::{Door, by_address, shows_token};
use crate::owner::Ask;
use crate::pulse::Pulse;
use crate::watchers::{News, RESERVED, WATCHERS_MAX, Watchers, news};
use axum::extract::{DefaultBodyLimit, Query, Request, State, rejection::JsonRejection};
use axum::http::{HeaderMap, StatusCode, Uri};
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
/// From a request's header to its answer's; a body that trickles in is not waited for. A stream, once begun, may go on.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub(crate) struct Shared {
    pub inbox: mpsc::Sender<Ask>,
    pub watchers: Watchers,
    pub pulse: Pulse,
    pub token: Arc<str>,
}

/// What is asked at one door.
pub(crate) fn routes(shared: Shared, door: Door) -> Router {
    let with_token = axum::middleware::from_fn_with_state(shared.clone(), check_token);
    let shown = Router::new().route("/v1/events", get(events)).route("/v1/snapshot", get(snapshot));
    let shown = match door {
        Door::Fleet => shown.route_layer(with_token.clone()),
        Door::Page => shown.route_layer(axum::middleware::from_fn_with_state(shared.clone(), check_host)),
    };
    let behind_token = Router::new()
        .route("/v1/demand", post(demand))
        .route("/v1/inventory", post(inventory))
        .route("/v1/plan", post(plan))
        .route("/v1/apply", post(apply))
        .route("/v1/explain", get(explain))
        .route_layer(with_token);
    Router::new()
        .merge(behind_token)
        .merge(shown)
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        // The page's files hold nothing of the fleet.
        .fallback(get(page))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(axum::middleware::from_fn(in_time))
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
            Refusal::Order { .. } | Refusal::Absurd { .. } => StatusCode::UNPROCESSABLE_ENTITY,
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
    if shows_token(request.headers(), &shared.token) {
        return next.run(request).await;
    }
    No::new(
        StatusCode::UNAUTHORIZED,
        "the fleet's token is missing or wrong",
        "send `Authorization: Bearer <content of token_file>`; a browser, which cannot, looks at page_listen",
    )
    .into_response()
}

/// At the page's door a browser needs no token, if it came by address.
async fn check_host(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    if by_address(request.headers()) || shows_token(request.headers(), &shared.token) {
        return next.run(request).await;
    }
    No::new(
        StatusCode::FORBIDDEN,
        "this door was asked for by name, so the question may come from another site's page",
        "open the page by its address, like http://127.0.0.1:8439/",
    )
    .into_response()
}

async fn in_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(ANSWERED_WITHIN, next.run(request)).await {
        Ok(answer) => answer,
        Err(_) => No::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("not asked and answered within {} s", ANSWERED_WITHIN.as_secs()),
            "send the body faster, or try again when the CPA is less busy",
        )
        .into_response(),
    }
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
    let Json(inventory) = inventory?;
    ask(&shared, |to| Ask::Inventory(inventory, to)).await??;
    Ok(StatusCode::NO_CONTENT)
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

async fn events(
    State(shared): State<Shared>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>, No> {
    let full = || {
        No::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{WATCHERS_MAX} watchers are the most there may be, {RESERVED} of them with the token"),
            "close another page, or use `vmatrix watch`, which shows the token",
        )
    };
    let holder = shows_token(&headers, &shared.token);
    let (receiver, seat) = shared.watchers.watch(holder).ok_or_else(full)?;
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
    let stuck = || {
        No::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the CPA is starting, or stuck",
            "see its log, and whether its disk is slow",
        )
    };
    shared.pulse.beats().then_some("ready\n").ok_or_else(stuck)
}

async fn page(uri: Uri, headers: HeaderMap) -> Response {
    crate::page::answer(uri.path(), &headers)
}
