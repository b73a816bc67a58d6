//! Tells the CPA each second what was asked for, and keeps what it could not tell.

use crate::nat;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::RwLock;
use tokio::time::MissedTickBehavior;
use vmatrix_edge_core::demand::{Counters, increments};
use vmatrix_model::demand::DemandReport;
use vmatrix_model::edge_config::EdgeConfig;
use vmatrix_model::{NetworkId, Time};

/// Reports kept while the CPA is away: ten minutes, after which old demand decides nothing any more.
const KEPT_REPORTS: usize = 600;
/// Counts kept in all: some 20 MiB.
const KEPT_COUNTS: usize = 262_144;

/// Where reports go.
pub struct Reporter {
    pub client: reqwest::Client,
    /// Base URL of the CPA.
    pub cpa: String,
    pub token: String,
    pub network: NetworkId,
}

/// What could not be told yet, oldest first, bounded.
#[derive(Default)]
struct Kept {
    reports: VecDeque<DemandReport>,
    counts: usize,
}

impl Kept {
    fn push(&mut self, report: DemandReport) {
        self.counts += report.counts.len();
        self.reports.push_back(report);
        let mut dropped = 0u32;
        while self.reports.len() > KEPT_REPORTS || self.counts > KEPT_COUNTS {
            self.pop();
            dropped += 1;
        }
        if dropped > 0 {
            tracing::warn!(dropped, "demand reports dropped: the CPA has been away too long");
        }
    }
    fn pop(&mut self) {
        if let Some(report) = self.reports.pop_front() {
            self.counts -= report.counts.len();
        }
    }
}

/// Counts and reports until the process ends. What was counted before this run began is not told:
/// the run before told it, or it is old.
pub async fn run(reporter: Reporter, config: Arc<RwLock<Option<EdgeConfig>>>) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let run = now().0;
    let (mut before, mut sequence, mut kept) = (None::<Counters>, 0, Kept::default());
    let mut away = false;
    loop {
        ticks.tick().await;
        match nat::counters().await {
            Ok(read) => {
                let owners = config.read().await.as_ref().map(nat::owners).unwrap_or_default();
                if let Some(before) = &before {
                    sequence += 1;
                    let counts = increments(before, &read, &owners);
                    kept.push(DemandReport { network: reporter.network.clone(), sequence, run, at: now(), counts });
                }
                before = Some(read);
            }
            Err(e) => tracing::warn!("demand cannot be read: {e:#}"),
        }
        while let Some(report) = kept.reports.front() {
            match reporter.tell(report).await {
                Ok(()) => {
                    kept.pop();
                    if std::mem::take(&mut away) {
                        tracing::info!("the CPA hears demand again");
                    }
                }
                Err(e) => {
                    if !std::mem::replace(&mut away, true) {
                        tracing::warn!("demand is kept until the CPA hears it: {e:#}");
                    }
                    break;
                }
            }
        }
    }
}

impl Reporter {
    /// Tells one report. A report that the CPA refuses is done with: sent again it would be refused again.
    async fn tell(&self, report: &DemandReport) -> Result<(), reqwest::Error> {
        let url = format!("{}/v1/demand", self.cpa.trim_end_matches('/'));
        let answer = self.client.post(url).bearer_auth(&self.token).json(report).send().await?;
        if matches!(answer.status().as_u16(), 400 | 409 | 413 | 422) {
            tracing::warn!(
                sequence = report.sequence,
                status = answer.status().as_u16(),
                "the CPA refused a demand report"
            );
            return Ok(());
        }
        answer.error_for_status().map(|_| ())
    }
}

/// Microseconds since the epoch.
pub fn now() -> Time {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_the_oldest_goes_first() {
        let mut kept = Kept::default();
        for sequence in 0..KEPT_REPORTS as u64 + 5 {
            kept.push(DemandReport { network: "lyon".parse().unwrap(), sequence, run: 1, at: Time(0), counts: vec![] });
        }
        assert_eq!(kept.reports.len(), KEPT_REPORTS);
        assert_eq!(kept.reports.front().map(|r| r.sequence), Some(5));
    }
}
