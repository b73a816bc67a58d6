//! A scenario from a CPA's journal: what was asked of a fleet and ordered by its operators, to be played again.
//!
//! ```text
//!  journal.1.jsonl, journal.jsonl ─┬─ demand ──▶ requests per (service, region) in steps of 10 s ─▶ traces
//!                                  └─ decided, by order ─▶ [[order]]
//!  the CPA's fleet_file ───────────────────────────────────▶ [fleet]              ─▶ recorded.toml
//! ```
//! What the journal does not know is made up and said in the scenario: what a request looks like (its first port and
//! `/`), and what no region claims is left out.

use crate::scenario::OrderLine;
use crate::trace::{Bounds, Lines, Trace, TraceError};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::path::PathBuf;
use vmatrix_model::demand::DemandReport;
use vmatrix_model::fleet::Fleet;
use vmatrix_model::plan::{Cause, Decision};
use vmatrix_model::wire::JournalEntry;
use vmatrix_model::{NetworkId, RegionId, ServiceId, Span, Time};

/// Steps of the traces: the CPA's own slots.
const STEP_S: u64 = 10;
/// A memory line of a large fleet has megabytes; two files of half a gigabyte are kept.
const BOUNDS: Bounds = Bounds { line: 64 << 20, bytes: 2 << 30 };
/// Longest play, as a scenario has it; of a longer journal the last part is taken.
const LENGTH_MAX_S: u64 = 14 * 86_400;

/// What was read of a journal.
#[derive(Debug, Default)]
pub struct Journal {
    /// Requests by service, region and step.
    asked: BTreeMap<(ServiceId, RegionId), BTreeMap<u64, u64>>,
    orders: Vec<(Time, ServiceId, BTreeMap<NetworkId, u32>)>,
    /// Reports that were counted, by network and run: the last number.
    counted: BTreeMap<(NetworkId, u64), u64>,
    /// First and last second that was counted.
    seconds: Option<(u64, u64)>,
    /// Requests of clients in no region of the fleet.
    pub elsewhere: u64,
    /// Lines of a kind that a scenario has no use for.
    pub skipped: u64,
}

/// A scenario's text and the traces that it names, each with its file's name.
#[derive(Debug)]
pub struct Recorded {
    pub scenario: String,
    pub traces: Vec<(PathBuf, Trace)>,
}

impl Journal {
    /// Reads one file of a journal, after those that came before it.
    ///
    /// # Errors
    /// Names the file and line that is no journal's. A torn last line is left out: the CPA leaves it out too.
    pub fn read(&mut self, fleet: &Fleet, file: &str, content: impl BufRead) -> Result<(), TraceError> {
        let mut lines = Lines::of(file, content, BOUNDS)?;
        let mut torn = None;
        while let Some(line) = lines.next()? {
            if let Some(torn) = torn.take() {
                return Err(torn);
            }
            // Journals that were written before a key was there once have the line's own time first.
            let Ok(Value::Object(mut entry)) = serde_json::from_str(line.text) else {
                torn = Some(line.bad("is no line of a journal\n\nhint: name the CPA's journal.jsonl"));
                continue;
            };
            let kind = entry.get("entry").and_then(Value::as_str).unwrap_or_default().to_owned();
            if !matches!(kind.as_str(), "demand" | "decided") {
                self.skipped += 1;
                continue;
            }
            entry.remove("written_at");
            match serde_json::from_value(Value::Object(entry)) {
                Ok(JournalEntry::Demand(report)) => self.demand(fleet, &report),
                Ok(JournalEntry::Decided(decision)) => self.decided(&decision),
                Ok(_) => self.skipped += 1,
                Err(e) => return Err(line.bad(format!("is no {kind} of this version: {e}"))),
            }
        }
        Ok(())
    }

    fn demand(&mut self, fleet: &Fleet, report: &DemandReport) {
        // An edge sends a report again until it is heard.
        let last = self.counted.entry((report.network.clone(), report.run)).or_default();
        if report.sequence <= *last && *last > 0 {
            return;
        }
        *last = report.sequence;
        let second = (report.at.0 / 1_000_000).saturating_sub(1);
        let (from, to) = self.seconds.unwrap_or((second, second));
        self.seconds = Some((from.min(second), to.max(second)));
        for count in &report.counts {
            let region = fleet.regions.iter().find(|r| r.prefix.contains(&count.clients));
            let known = fleet.service(&count.service).is_some();
            match region.filter(|_| known) {
                Some(region) => {
                    let of_region = self.asked.entry((count.service.clone(), region.name.clone())).or_default();
                    *of_region.entry(second / STEP_S).or_default() += count.requests;
                }
                None => self.elsewhere += count.requests,
            }
        }
    }

    /// An order that was applied; what it became is told again as it goes on.
    fn decided(&mut self, decision: &Decision) {
        let plan = &decision.plan;
        if plan.cause != Cause::Order || self.orders.iter().any(|(at, ..)| *at == plan.at) {
            return;
        }
        let services: BTreeSet<&ServiceId> = plan.moves.iter().map(|m| &m.service).collect();
        for service in services {
            let shares = plan.target.services.get(service).into_iter().flatten();
            let at = shares.map(|(network, share)| (network.clone(), share.instances())).collect();
            self.orders.push((plan.at, service.clone(), at));
        }
    }

    /// The scenario, with the traces that it names.
    ///
    /// # Errors
    /// Nothing was asked, or it cannot be written as TOML.
    pub fn recorded(self, fleet: &Fleet) -> Result<Recorded, String> {
        let Some((first, last)) = self.seconds.filter(|_| !self.asked.is_empty()) else {
            return Err("nothing was asked of this fleet's services in this journal: is it this fleet's?".to_owned());
        };
        // Whole steps; the last one may not be over.
        let until = last / STEP_S;
        let from = (first / STEP_S).max(until.saturating_sub(LENGTH_MAX_S / STEP_S));
        if until <= from {
            return Err(format!("the journal tells of less than {STEP_S} s"));
        }
        let length_s = (until - from) * STEP_S;
        let (mut demand, mut traces) = (vec![], vec![]);
        for ((service, region), steps) in &self.asked {
            let counts: Vec<u64> = (from..until).map(|step| steps.get(&step).copied().unwrap_or(0)).collect();
            let total: u64 = counts.iter().sum();
            if total == 0 {
                continue;
            }
            let name = format!("{service}-{region}");
            let file = PathBuf::from(format!("{name}.trace"));
            let begins = i64::try_from(from * STEP_S).unwrap_or(i64::MAX);
            demand.push(toml::toml! { service = "" region = "" requests_per_s = 0.0 trace = "" });
            if let Some(line) = demand.last_mut() {
                line.insert("service".to_owned(), service.to_string().into());
                line.insert("region".to_owned(), region.to_string().into());
                line.insert("requests_per_s".to_owned(), (total as f64 / length_s as f64).into());
                line.insert("trace".to_owned(), file.display().to_string().into());
            }
            traces.push((file, Trace { name, begins, step: Span::secs(STEP_S), counts }));
        }
        let since = |at: Time| (at.0 / 1_000_000).checked_sub(from * STEP_S).filter(|s| *s < length_s);
        let orders: Vec<OrderLine> = (self.orders.into_iter())
            .filter_map(|(at, service, at_networks)| {
                let at_s = u32::try_from(since(at)?).ok()?;
                Some(OrderLine { at_s, service, at: at_networks, fair: None })
            })
            .collect();
        let scenario =
            text(fleet, length_s, demand, orders).map_err(|e| format!("it cannot be written as TOML: {e}"))?;
        Ok(Recorded { scenario, traces })
    }
}

/// The scenario's file.
fn text(
    fleet: &Fleet,
    length_s: u64,
    demand: Vec<toml::Table>,
    orders: Vec<OrderLine>,
) -> Result<String, toml::ser::Error> {
    let asked: BTreeSet<String> =
        demand.iter().filter_map(|d| d.get("service")?.as_str().map(ToOwned::to_owned)).collect();
    let traffic: Vec<toml::Value> = (fleet.services.iter())
        .filter(|s| asked.contains(s.name.as_str()))
        .filter_map(|s| {
            let port = *s.ports.first()?;
            let mut line = toml::Table::new();
            line.insert("service".to_owned(), s.name.to_string().into());
            line.insert("port".to_owned(), i64::from(port).into());
            line.insert("tls".to_owned(), (port == 443).into());
            line.insert("get".to_owned(), vec!["/".to_owned()].into());
            Some(line.into())
        })
        .collect();
    let orders = orders.iter().map(|o| {
        let mut line = toml::Table::new();
        line.insert("at_s".to_owned(), i64::from(o.at_s).into());
        line.insert("service".to_owned(), o.service.to_string().into());
        let at: toml::Table = o.at.iter().map(|(n, i)| (n.to_string(), i64::from(*i).into())).collect();
        line.insert("at".to_owned(), at.into());
        toml::Value::from(line)
    });
    let mut all = toml::Table::new();
    all.insert("name".to_owned(), "recorded".into());
    all.insert("about".to_owned(), "What a fleet was asked, from its CPA's journal.".into());
    all.insert("seed".to_owned(), 1.into());
    all.insert("length_s".to_owned(), i64::try_from(length_s).unwrap_or(i64::MAX).into());
    all.insert("fleet".to_owned(), toml::Value::try_from(fleet)?);
    all.insert("traffic".to_owned(), traffic.into());
    all.insert("demand".to_owned(), demand.into_iter().map(toml::Value::from).collect::<Vec<_>>().into());
    let orders: Vec<toml::Value> = orders.collect();
    if !orders.is_empty() {
        all.insert("order".to_owned(), orders.into());
    }
    Ok(format!(
        "# From a CPA's journal. What it does not know is made up: a request asks the service's first port for \"/\".\n\n{}",
        toml::to_string(&all)?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Scenario;
    use vmatrix_model::Bytes;
    use vmatrix_model::demand::DemandCount;
    use vmatrix_model::wire::JournalLine;

    fn flash_crowd() -> Scenario {
        Scenario::parse("flash-crowd.toml", include_str!("../../library/flash-crowd.toml")).unwrap()
    }

    fn line(entry: JournalEntry, at: u64) -> String {
        serde_json::to_string(&JournalLine { at: Time(at * 1_000_000), entry }).unwrap() + "\n"
    }

    /// One report a second for `seconds`, of `requests(second)` of one region for maps.
    fn journal(fleet: &Fleet, seconds: u64, requests: impl Fn(u64) -> u64) -> String {
        let clients = fleet.regions[2].prefix;
        let report = |second: u64| DemandReport {
            network: fleet.networks[0].name.clone(),
            sequence: second + 1,
            run: 7,
            at: Time((1000 + second + 1) * 1_000_000),
            counts: vec![DemandCount {
                service: "maps".parse().unwrap(),
                clients,
                requests: requests(second),
                bytes: Bytes(0),
            }],
        };
        // Each is said twice, and counts once.
        (0..seconds).flat_map(|s| [report(s), report(s)]).map(|r| line(JournalEntry::Demand(r), 1000)).collect()
    }

    #[test]
    fn what_a_journal_tells_was_asked_is_what_the_scenario_asks() {
        let fleet = flash_crowd().fleet;
        let text = journal(&fleet, 125, |second| if second < 60 { 2 } else { 6 });
        let text =
            format!("{{\"written_at\":1,\"entry\":\"memory\",\"format\":1,\"memory\":{{}}}}\n{text}{{\"at\":1,\"ent");
        let mut read = Journal::default();
        read.read(&fleet, "journal.jsonl", text.as_bytes()).unwrap();
        assert_eq!((read.skipped, read.elsewhere), (1, 0));
        let recorded = read.recorded(&fleet).unwrap();
        let [(file, trace)] = &recorded.traces[..] else { panic!("{:?}", recorded.traces) };
        let region = &fleet.regions[2].name;
        assert_eq!(file.display().to_string(), format!("maps-{region}.trace"));
        // Seconds 1000 to 1124: twelve whole steps.
        assert_eq!(trace.counts, [[20; 6], [60; 6]].concat());

        let folder = tempfile::tempdir().unwrap();
        trace.write("t", std::fs::File::create(folder.path().join(file)).unwrap()).unwrap();
        let path = folder.path().join("recorded.toml");
        std::fs::write(&path, &recorded.scenario).unwrap();
        let scenario = Scenario::read(&path).unwrap();
        assert_eq!((scenario.length_s, &scenario.fleet), (120, &fleet));
        let rate = |second| scenario.rate(&"maps".parse().unwrap(), region, second);
        assert!((rate(30.0) - 2.0).abs() < 1e-9 && (rate(90.0) - 6.0).abs() < 1e-9, "{} {}", rate(30.0), rate(90.0));
    }

    #[test]
    fn what_is_no_journal_or_tells_nothing_is_refused_by_file_and_line() {
        let fleet = flash_crowd().fleet;
        let text = format!("{}not a line\n{}", journal(&fleet, 2, |_| 1), journal(&fleet, 1, |_| 1));
        let said = Journal::default().read(&fleet, "journal.jsonl", text.as_bytes()).unwrap_err().to_string();
        assert!(said.starts_with("journal.jsonl:5: ") && said.contains("journal"), "{said}");
        let said = Journal::default().read(&fleet, "j", &b"{\"at\":1,\"entry\":\"demand\"}\n"[..]).unwrap_err();
        assert!(said.to_string().contains("j:1: is no demand of this version"), "{said}");
        assert!(Journal::default().recorded(&fleet).unwrap_err().contains("nothing was asked"));
        let mut short = Journal::default();
        short.read(&fleet, "j", journal(&fleet, 5, |_| 1).as_bytes()).unwrap();
        assert!(short.recorded(&fleet).unwrap_err().contains("less than 10 s"));
    }
}
