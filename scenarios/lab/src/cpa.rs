//! What the lab asks of the CPA: the same requests a person's tools make.

use anyhow::{Context, bail};
use reqwest::{Client, RequestBuilder};
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::time::Duration;
use vmatrix_model::ServiceId;
use vmatrix_model::plan::{Decision, Plan};
use vmatrix_model::wire::{Apply, Explanation, Order, Problem, Snapshot};

/// An order is planned again so often if another placement came in between.
const PLANS_MAX: usize = 3;

/// A client of the CPA.
#[derive(Debug, Clone)]
pub struct Cpa {
    client: Client,
    base: String,
    token: String,
}

impl Cpa {
    /// A client of the CPA at `address`.
    ///
    /// # Errors
    /// No client can be made.
    pub fn at(address: SocketAddr, token: &str) -> anyhow::Result<Cpa> {
        let client = Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(2))
            .timeout(Duration::from_secs(5))
            .build()?;
        Ok(Cpa { client, base: format!("http://{address}"), token: token.to_owned() })
    }

    /// The world as it sees it.
    ///
    /// # Errors
    /// It is down, or refuses.
    pub async fn snapshot(&self) -> anyhow::Result<Snapshot> {
        answer(self.client.get(format!("{}/v1/snapshot", self.base)).bearer_auth(&self.token)).await
    }

    /// Why a service is where it is.
    ///
    /// # Errors
    /// As [`Cpa::snapshot`].
    pub async fn explain(&self, service: &ServiceId) -> anyhow::Result<Explanation> {
        answer(
            self.client
                .get(format!("{}/v1/explain", self.base))
                .query(&[("service", service.as_str())])
                .bearer_auth(&self.token),
        )
        .await
    }

    /// Plans an operator's order and applies it.
    ///
    /// # Errors
    /// It is refused.
    pub async fn order(&self, order: &Order) -> anyhow::Result<Decision> {
        let mut last = None;
        for _ in 0..PLANS_MAX {
            let plan: Plan =
                answer(self.client.post(format!("{}/v1/plan", self.base)).json(order).bearer_auth(&self.token)).await?;
            match answer(
                self.client
                    .post(format!("{}/v1/apply", self.base))
                    .json(&Apply { plan: plan.id })
                    .bearer_auth(&self.token),
            )
            .await
            {
                Ok(decision) => return Ok(decision),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("no plan was made")))
            .with_context(|| format!("the order for {} was not applied", order.service))
    }
}

async fn answer<T: DeserializeOwned>(request: RequestBuilder) -> anyhow::Result<T> {
    let answer = request.send().await.context("the CPA does not answer")?;
    let status = answer.status();
    let body = answer.bytes().await.context("the CPA broke off")?;
    if !status.is_success() {
        let problem = serde_json::from_slice::<Problem>(&body)
            .map_or_else(|_| String::from_utf8_lossy(&body).into_owned(), |p| format!("{} {}", p.problem, p.hint));
        bail!("the CPA answered {status}: {problem}");
    }
    serde_json::from_slice(&body).context("the CPA answered something else than docs/api.md says")
}
