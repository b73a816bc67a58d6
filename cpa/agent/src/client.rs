//! The CPA as people's tools talk to it.
//!
//! ```no_run
//! # async fn show() -> Result<(), vmatrix_cpa_agent::client::ClientError> {
//! let cpa = vmatrix_cpa_agent::client::Client::new("http://198.19.0.1:8440", "token")?;
//! println!("{}", cpa.snapshot().await?.placement.generation);
//! # Ok(())
//! # }
//! ```

use futures_util::{Stream, StreamExt, stream};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Response, StatusCode};
use serde::de::DeserializeOwned;
use std::error::Error as _;
use std::time::Duration;
use vmatrix_model::ServiceId;
use vmatrix_model::plan::{Decision, Plan};
use vmatrix_model::wire::{Apply, Event, Explanation, Order, Problem, Snapshot};

/// To connect.
const CONNECT: Duration = Duration::from_secs(2);
/// For a whole exchange.
pub(crate) const WHOLE: Duration = Duration::from_secs(5);
/// Longest silence in a stream of events: the CPA sends a snapshot every second.
const SILENCE: Duration = Duration::from_secs(20);
/// Largest answer taken: a snapshot of a large fleet.
const ANSWER_MAX: usize = 64 << 20;

/// What went wrong between a tool and the CPA.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The CPA could not be asked.
    #[error("cannot reach {url}: {words}\n\nhint: is the daemon running, and is this its address?")]
    Unreachable { url: String, words: String, timed_out: bool },
    /// The CPA said no.
    #[error("{}{}", problem.problem, if problem.hint.is_empty() { String::new() } else { format!("\n\nhint: {}", problem.hint) })]
    Refused { status: u16, problem: Problem },
    /// The answer was not what docs/api.md says.
    #[error(
        "the answer of {url} cannot be understood: {words}\n\nhint: the CPA and this tool may be of different versions"
    )]
    Answer { url: String, words: String },
    /// A token that cannot be sent in a header.
    #[error("the fleet's token is not plain text on one line\n\nhint: look at the token file")]
    Token,
}

impl ClientError {
    /// The status of a refusal.
    pub fn status(&self) -> Option<u16> {
        match self {
            ClientError::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether no answer came in time.
    pub fn timed_out(&self) -> bool {
        matches!(self, ClientError::Unreachable { timed_out: true, .. })
    }

    fn unreachable(url: &str, e: &reqwest::Error) -> ClientError {
        ClientError::Unreachable { url: url.to_owned(), words: chain(e), timed_out: e.is_timeout() }
    }

    /// Whether a plan was refused because another placement came in between.
    pub fn is_stale(&self) -> bool {
        matches!(self, ClientError::Refused { status, .. } if *status == StatusCode::CONFLICT.as_u16())
    }
}

/// Talks to one CPA.
#[derive(Debug, Clone)]
pub struct Client {
    base: String,
    http: reqwest::Client,
    /// Without a limit on the whole exchange.
    streams: reqwest::Client,
}

impl Client {
    /// A client of the CPA at `base_url` (`http://198.19.0.1:8440`).
    ///
    /// # Errors
    /// The token cannot be sent.
    pub fn new(base_url: &str, token: &str) -> Result<Client, ClientError> {
        let base = base_url.trim_end_matches('/').to_owned();
        let unusable = |e: reqwest::Error| ClientError::unreachable(&base, &e);
        let http = builder(token)?.timeout(WHOLE).build().map_err(unusable)?;
        let streams = builder(token)?.read_timeout(SILENCE).build().map_err(unusable)?;
        Ok(Client { base, http, streams })
    }

    /// The world as the CPA sees it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn snapshot(&self) -> Result<Snapshot, ClientError> {
        self.ask(self.http.get(self.url("/v1/snapshot"))).await
    }

    /// What an order would do; nothing moves.
    ///
    /// # Errors
    /// See [`ClientError`]; an order that cannot be is refused.
    pub async fn plan(&self, order: &Order) -> Result<Plan, ClientError> {
        self.ask(self.http.post(self.url("/v1/plan")).json(order)).await
    }

    /// Applies a plan made before.
    ///
    /// # Errors
    /// See [`ClientError`]; a plan that is stale ([`ClientError::is_stale`]) or not known is refused.
    pub async fn apply(&self, plan: u64) -> Result<Decision, ClientError> {
        self.ask(self.http.post(self.url("/v1/apply")).json(&Apply { plan })).await
    }

    /// Why a service is where it is.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn explain(&self, service: &ServiceId) -> Result<Explanation, ClientError> {
        self.ask(self.http.get(self.url("/v1/explain")).query(&[("service", service.as_str())])).await
    }

    /// What happens, as it happens; a snapshot first. The stream ends when the CPA does, or with an error.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn events(
        &self,
    ) -> Result<impl Stream<Item = Result<Event, ClientError>> + Unpin + Send + use<>, ClientError> {
        let url = self.url("/v1/events");
        let answer = self.streams.get(&url).send().await.map_err(|e| ClientError::unreachable(&url, &e))?;
        if !answer.status().is_success() {
            return Err(problem(answer).await);
        }
        let reader = Reader { bytes: answer.bytes_stream().boxed(), held: Vec::new(), url };
        Ok(stream::unfold(Some(reader), |reader| async {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(event)) => Some((Ok(event), Some(reader))),
                Ok(None) => None,
                Err(e) => Some((Err(e), None)),
            }
        })
        .boxed())
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    async fn ask<T: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<T, ClientError> {
        let answer = request.send().await.map_err(|e| ClientError::unreachable(&self.base, &e))?;
        if !answer.status().is_success() {
            return Err(problem(answer).await);
        }
        let url = answer.url().to_string();
        let bytes = bounded(answer).await?;
        serde_json::from_slice(&bytes).map_err(|e| ClientError::Answer { url, words: e.to_string() })
    }
}

/// Cuts a stream of server-sent events into events.
struct Reader {
    bytes: stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    held: Vec<u8>,
    url: String,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        let wrong = |url: &str, words: String| ClientError::Answer { url: url.to_owned(), words };
        loop {
            while let Some(end) = self.held.windows(2).position(|w| w == b"\n\n") {
                let block: Vec<u8> = self.held.drain(..end + 2).collect();
                if let Some(event) = event(&String::from_utf8_lossy(&block)).map_err(|words| wrong(&self.url, words))? {
                    return Ok(Some(event));
                }
            }
            if self.held.len() > ANSWER_MAX {
                return Err(wrong(&self.url, format!("an event of more than {ANSWER_MAX} bytes")));
            }
            match self.bytes.next().await {
                Some(Ok(more)) => self.held.extend_from_slice(&more),
                Some(Err(e)) => return Err(ClientError::unreachable(&self.url, &e)),
                None => return Ok(None),
            }
        }
    }
}

/// Reads one block of the stream; comments and names it does not know are passed over.
fn event(block: &str) -> Result<Option<Event>, String> {
    let field = |name: &str| {
        block
            .lines()
            .filter_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
            .map(|v| v.strip_prefix(' ').unwrap_or(v))
            .collect::<Vec<_>>()
    };
    let data = field("data").join("\n");
    match field("event").first() {
        Some(&"snapshot") => serde_json::from_str(&data).map(|s| Some(Event::Snapshot(s))).map_err(|e| e.to_string()),
        Some(&"decision") => serde_json::from_str(&data).map(|d| Some(Event::Decision(d))).map_err(|e| e.to_string()),
        _ => Ok(None),
    }
}

/// Between signs of life on a connection that is not used.
const ALIVE: Duration = Duration::from_secs(15);

/// The token on every request, 2 s to connect, no proxies: daemons are addressed directly. Connections stay: an
/// assignment that follows an hour of calm would otherwise wait for a handshake, a whole round trip more.
pub(crate) fn builder(token: &str) -> Result<reqwest::ClientBuilder, ClientError> {
    let mut bearer = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| ClientError::Token)?;
    bearer.set_sensitive(true);
    let headers: HeaderMap = [(AUTHORIZATION, bearer)].into_iter().collect();
    Ok(reqwest::Client::builder()
        .default_headers(headers)
        .connect_timeout(CONNECT)
        .pool_idle_timeout(None)
        .tcp_keepalive(ALIVE)
        .no_proxy())
}

/// The error with its causes, which alone say what happened.
pub(crate) fn chain(e: &reqwest::Error) -> String {
    let mut words = e.to_string();
    let mut cause = e.source();
    while let Some(c) = cause {
        words += &format!(": {c}");
        cause = c.source();
    }
    words
}

/// Reads a refusal; one that is not a [`Problem`] is told by its status.
pub(crate) async fn problem(answer: Response) -> ClientError {
    let (status, url) = (answer.status(), answer.url().to_string());
    let said = bounded_to(answer, 64 << 10).await.ok().and_then(|b| serde_json::from_slice(&b).ok());
    let problem = said.unwrap_or_else(|| Problem { problem: format!("{url} answered {status}"), hint: String::new() });
    ClientError::Refused { status: status.as_u16(), problem }
}

pub(crate) async fn bounded(answer: Response) -> Result<Vec<u8>, ClientError> {
    bounded_to(answer, ANSWER_MAX).await
}

/// Reads an answer of at most `most` bytes.
pub(crate) async fn bounded_to(mut answer: Response, most: usize) -> Result<Vec<u8>, ClientError> {
    let url = answer.url().to_string();
    let mut bytes = Vec::new();
    while let Some(more) = answer.chunk().await.map_err(|e| ClientError::unreachable(&url, &e))? {
        bytes.extend_from_slice(&more);
        if bytes.len() > most {
            return Err(ClientError::Answer { url, words: format!("more than {most} bytes") });
        }
    }
    Ok(bytes)
}
