//! Counts what is asked, second by second, and keeps what is usual and what is a crowd.

use crate::burst::Change;
use crate::clusters::{second, spread};
use crate::cpa::Cpa;
use crate::forecast::SLOT;
use crate::memory::LastReport;
use vmatrix_model::demand::DemandReport;
use vmatrix_model::{ServiceId, Time};

/// Most requests believed of one /24 in one report; ten times what a machine can accept, and far from any overflow.
const REQUESTS_MAX: u64 = 1 << 24;

impl Cpa {
    /// Counts a report into the seconds it covers, by the CPA's own clock.
    pub(crate) fn count(&mut self, now: Time, report: &DemandReport) {
        if self.fleet.network(&report.network).is_none() {
            return;
        }
        let last = self.memory.reports.get(&report.network).copied();
        let same_run = last.filter(|l| l.run == report.run);
        if same_run.is_some_and(|l| report.sequence <= l.sequence) {
            return;
        }
        let covers = same_run.map_or(1, |l| report.at.since(l.at).0.saturating_add(500_000) / 1_000_000);
        self.memory.reports.insert(
            report.network.clone(),
            LastReport { run: report.run, sequence: report.sequence, heard: now, at: report.at },
        );
        for count in &report.counts {
            if self.fleet.service(&count.service).is_none() {
                continue;
            }
            let counts = self.memory.counts.entry(count.service.clone()).or_default();
            let region = self.fleet.region_of(count.clients.network());
            for (s, n) in spread(second(now), covers, count.requests.min(REQUESTS_MAX)) {
                match region {
                    Some(region) => {
                        let arrivals = counts.regions.entry(region.name.clone()).or_default();
                        arrivals.all.add(s, n);
                        arrivals.at.entry(report.network.clone()).or_default().add(s, n);
                    }
                    None => counts.elsewhere.add(s, n),
                }
            }
        }
    }

    /// Judges one second of every region.
    pub(crate) fn watch(&mut self, now: Time, service: &ServiceId, judged: u64) {
        for region in &self.fleet.regions {
            let usual = self.memory.usual.entry(service.clone()).or_default().entry(region.name.clone()).or_default();
            if !usual.known() {
                continue;
            }
            let requests = self
                .memory
                .counts
                .get(service)
                .and_then(|c| c.regions.get(&region.name))
                .map_or(0, |a| a.all.at(judged));
            let watch = self.memory.watches.entry(service.clone()).or_default().entry(region.name.clone()).or_default();
            match watch.second(now, requests, usual.rate()) {
                Change::Ended => self.memory.holds.entry(service.clone()).or_default().calm_since = Some(now),
                Change::Settled(level) => usual.become_usual(level),
                Change::Began(_) | Change::None => {}
            }
        }
    }

    /// Learns from the slot that ends with second `end`, but for regions in which it had a crowd.
    pub(crate) fn close_slot(&mut self, now: Time, service: &ServiceId, end: u64) {
        let length = SLOT.0 / 1_000_000;
        self.memory.slot = end / length;
        for region in &self.fleet.regions {
            let watch = self.memory.watches.get(service).and_then(|w| w.get(&region.name));
            // The end is noticed some seconds late: a slot that begins before it still holds some of the crowd.
            let touched =
                watch.is_some_and(|w| w.crowd().is_some() || w.calm_since.is_some_and(|t| now.since(t) <= SLOT));
            if touched {
                continue;
            }
            let requests = self
                .memory
                .counts
                .get(service)
                .and_then(|c| c.regions.get(&region.name))
                .map_or(0, |a| a.all.sum(end, length));
            self.memory
                .usual
                .entry(service.clone())
                .or_default()
                .entry(region.name.clone())
                .or_default()
                .learn(requests);
        }
    }
}
