//! The report as one HTML file that needs nothing else: no script, no font, no network.
//!
//! ```text
//! key figures ─▶ charts on one time axis (response time, demand, instances, bytes) ─▶ decisions ─▶ tables
//! ```

use super::chart::{COLORS, Chart, escape};
use super::{Report, action, cause_in_words, crowd, ms, percentile};
use crate::recording::{Ports, Recording, Request};
use crate::scenario::Scenario;
use std::collections::BTreeMap;
use std::fmt::Write;
use vmatrix_model::plan::{Cause, Decision};
use vmatrix_model::{Bytes, NetworkId, RegionId, ServiceId, Span, Time};

/// Most single requests drawn; beyond that the lines say enough and the file stays small.
const DOTS_MAX: usize = 4_000;
/// Points of a line.
const POINTS: u64 = 120;
/// The stretch of time that a point of a latency or demand line looks back and forward over, together.
const WINDOW: Span = Span::secs(6);

/// Draws the whole page.
pub fn html(scenario: &Scenario, recording: &Recording, report: &Report) -> String {
    let decided: Vec<&Decision> = recording.decisions.iter().filter(|d| d.plan.cause != Cause::Start).collect();
    let page = Page { scenario, recording, report, decided, length: Span::secs(u64::from(scenario.length_s)) };
    let (about, style) = (escape(&scenario.about), include_str!("style.css"));
    format!(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>\n<title>{name}: vMatrix report</title>\n<style>\n{style}</style></head>\n<body><header><h1>{about}</h1><p>Scenario <b>{name}</b>, played {how}.</p></header>\n<main>{figures}{legend}{charts}{decisions}{tables}</main></body></html>\n",
        name = escape(&report.scenario),
        how = if report.accelerator == "replay" {
            "in virtual time".to_owned()
        } else {
            format!("on real virtual machines ({})", escape(&report.accelerator))
        },
        figures = page.figures(),
        legend = page.legend(),
        charts = page.charts(),
        decisions = page.decisions(),
        tables = page.tables(),
    )
}

struct Page<'a> {
    scenario: &'a Scenario,
    recording: &'a Recording,
    report: &'a Report,
    decided: Vec<&'a Decision>,
    length: Span,
}

impl Page<'_> {
    fn figures(&self) -> String {
        let r = self.report;
        let mut out = String::from("<dl class='figures'>");
        let mut figure = |name: &str, value: String, bad: bool| {
            let class = if bad { " class='bad'" } else { "" };
            let _ = write!(out, "<div{class}><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
        };
        let within = |s: Option<f64>| s.map_or("never".to_owned(), |s| format!("{s:.1} s"));
        if let Some(c) = &r.crowd {
            let p95 = |p: Option<u64>| p.map_or("-".to_owned(), |p| p.to_string());
            figure("crowd noticed and decided after", within(c.onset_to_decision_s), c.onset_to_decision_s.is_none());
            figure(
                "then first byte nearby after",
                within(c.decision_to_first_byte_s),
                c.decision_to_first_byte_s.is_none(),
            );
            figure("objective met, from onset", within(c.onset_to_objective_s), c.onset_to_objective_s.is_none());
            figure(
                &format!("p95 in {}, ms", c.region),
                format!("{} → {}", p95(c.p95_before_ms), p95(c.p95_after_ms)),
                c.p95_after_ms.is_none(),
            );
        }
        figure("requests", r.requests.to_string(), false);
        figure("failed", r.failed_requests.to_string(), r.failed_requests > 0);
        figure("relocations", r.relocations.to_string(), false);
        figure("image bytes moved", Bytes(r.bytes_moved).to_string(), false);
        if r.two_tier.writes > 0 {
            figure(
                "writes lost",
                format!("{} of {}", r.two_tier.lost_writes, r.two_tier.writes),
                r.two_tier.lost_writes > 0,
            );
            figure(
                "plaintext bytes on the WAN",
                r.two_tier.plaintext_bytes_on_wan.to_string(),
                r.two_tier.plaintext_bytes_on_wan > 0,
            );
        }
        if r.ports != Ports::default() {
            let tried = r.ports.tried_from_wan + r.ports.tried_from_cells;
            figure("undeclared ports that answered", format!("{} of {tried}", r.ports.answered), r.ports.answered > 0);
        }
        figure("dormant again", if r.returned_to_dormant { "yes" } else { "no" }.into(), !r.returned_to_dormant);
        out + "</dl>\n"
    }

    fn legend(&self) -> String {
        let regions = self.scenario.fleet.regions.iter().enumerate();
        let items: String = regions
            .map(|(i, r)| format!("<li><span class='swatch s{}'></span>{}</li>", i % COLORS, escape(r.name.as_str())))
            .collect();
        format!(
            "<ul class='legend' aria-label='client regions'>{items}<li><span class='swatch crowd'></span>crowd</li><li><span class='swatch number'></span>decision, listed below</li></ul>\n"
        )
    }

    fn charts(&self) -> String {
        let mut out = String::new();
        for service in &self.scenario.fleet.services {
            out += &self.latency(&service.name, service.objective_ms);
        }
        out + &self.demand() + &self.instances() + &self.bytes()
    }

    /// Shades the crowds and marks the decisions; everything else is drawn over it.
    fn setting(&self, chart: &mut Chart) {
        for c in &self.scenario.crowds {
            chart.shade(crowd::onset(c), crowd::end(c), &format!("crowd in {} for {}", c.region, c.service));
        }
        for (i, d) in self.decided.iter().enumerate() {
            chart.mark(d.plan.at, i + 1, &cause_in_words(&d.plan.cause));
        }
    }

    fn latency(&self, service: &ServiceId, objective_ms: u32) -> String {
        let requests: Vec<&Request> = self.recording.requests.iter().filter(|r| r.service == *service).collect();
        let mut sorted: Vec<Span> = requests.iter().map(|r| r.took).collect();
        sorted.sort_unstable();
        let Some(longest) = sorted.last() else { return String::new() };
        // A single outlier must not flatten everything else: it is drawn at the top edge.
        let usual = percentile(&sorted, 99).unwrap_or(*longest).0 * 13 / 10;
        let rule = if u64::from(objective_ms) <= ms(Span(usual)) * 2 { f64::from(objective_ms) } else { 0.0 };
        let max = (ms((*longest).min(Span(usual))) as f64).max(rule * 1.1);
        let about = format!(
            "Each dot is a request; the lines are the 95th percentile per client region. The objective is {objective_ms} ms."
        );
        let mut chart = Chart::new(&format!("Response time of {service}"), &about, self.length, 300.0, max, "ms");
        self.setting(&mut chart);
        if rule > 0.0 {
            chart.rule(rule, "objective");
        }
        for (series, region) in self.scenario.fleet.regions.iter().enumerate() {
            let of: Vec<(Time, Span)> = requests
                .iter()
                .filter(|r| r.region == region.name && r.failed.is_none())
                .map(|r| (r.at, r.took))
                .collect();
            if requests.len() <= DOTS_MAX {
                chart.dots(series, &of.iter().map(|(at, took)| (*at, took.0 as f64 / 1000.0)).collect::<Vec<_>>());
            }
            let p95 = |within: &[(Time, Span)]| {
                let mut took: Vec<Span> = within.iter().map(|(_, t)| *t).collect();
                took.sort_unstable();
                percentile(&took, 95).map(|p| p.0 as f64 / 1000.0)
            };
            chart.line(series, &format!("p95 in {}", region.name), &self.over_time(&of, p95));
        }
        chart.finish()
    }

    fn demand(&self) -> String {
        let window = WINDOW.as_secs_f64();
        let lines: Vec<Vec<(Time, Option<f64>)>> = self
            .scenario
            .fleet
            .regions
            .iter()
            .map(|region| {
                let of: Vec<(Time, Span)> = self
                    .recording
                    .requests
                    .iter()
                    .filter(|r| r.region == region.name)
                    .map(|r| (r.at, r.took))
                    .collect();
                self.over_time(&of, |within| Some(within.len() as f64 / window))
            })
            .collect();
        let max = lines.iter().flatten().filter_map(|(_, v)| *v).fold(1.0, f64::max);
        let mut chart = Chart::new(
            "Demand",
            "Requests a second per client region, all services together.",
            self.length,
            190.0,
            max,
            "/s",
        );
        self.setting(&mut chart);
        for (series, (region, points)) in self.scenario.fleet.regions.iter().zip(&lines).enumerate() {
            chart.line(series, region.name.as_str(), points);
        }
        chart.finish()
    }

    /// A value per point of time, from what began within [`WINDOW`] around it.
    fn over_time(
        &self,
        begun: &[(Time, Span)],
        value: impl Fn(&[(Time, Span)]) -> Option<f64>,
    ) -> Vec<(Time, Option<f64>)> {
        let half = Span(WINDOW.0 / 2);
        let point = |k| {
            let at = Time(self.length.0 / POINTS * k);
            let first = begun.partition_point(|(t, _)| *t < at - half);
            let next = begun.partition_point(|(t, _)| *t < at + half);
            (at, value(&begun[first..next]))
        };
        (0..=POINTS).map(point).collect()
    }

    /// One block of rows a service: its name, then its networks.
    fn instances(&self) -> String {
        let fleet = &self.scenario.fleet;
        let rows: Vec<(&ServiceId, Option<&NetworkId>)> = fleet
            .services
            .iter()
            .flat_map(|s| {
                std::iter::once((&s.name, None)).chain(fleet.networks.iter().map(|n| (&s.name, Some(&n.name))))
            })
            .collect();
        let mut chart = Chart::bare(
            "Instances serving",
            "A bar where and while instances of a service answer; everywhere else the image sleeps.",
            self.length,
            52.0 + 25.0 * rows.len() as f64,
        );
        self.setting(&mut chart);
        for (i, (service, network)) in rows.iter().enumerate() {
            let Some(network) = network else {
                chart.heading(i, rows.len(), service.as_str());
                continue;
            };
            chart.row(i, rows.len(), network.as_str());
            for (from, to, n) in self.serving(service, network) {
                let name = format!("{n} of {service} at {network}, {} to {}", from.since(Time(0)), to.since(Time(0)));
                chart.bar(i, rows.len(), from, to, &name);
            }
        }
        chart.finish()
    }

    /// The stretches of time in which `network` served `service`, with how many instances.
    fn serving(&self, service: &ServiceId, network: &NetworkId) -> Vec<(Time, Time, u32)> {
        let mut stretches: Vec<(Time, Time, u32)> = Vec::new();
        let end = Time(0) + self.length;
        for i in self.recording.instances.iter().filter(|i| i.service == *service) {
            if let Some(last) = stretches.last_mut().filter(|l| l.1 == end) {
                last.1 = i.at;
            }
            let n = i.serving.get(network).copied().unwrap_or(0);
            if n > 0 {
                match stretches.last_mut().filter(|l| l.1 == i.at && l.2 == n) {
                    Some(last) => last.1 = end,
                    None => stretches.push((i.at, end, n)),
                }
            }
        }
        stretches
    }

    fn bytes(&self) -> String {
        let mut per: BTreeMap<(&ServiceId, &NetworkId), Bytes> = BTreeMap::new();
        for m in self.recording.decisions.iter().flat_map(|d| &d.plan.moves) {
            *per.entry((&m.service, &m.network)).or_default() += m.bytes;
        }
        let most = per.values().map(|b| b.0).max().unwrap_or(0).max(1);
        let row = |((s, n), b): (&(&ServiceId, &NetworkId), &Bytes)| {
            let percent = b.0 * 100 / most;
            format!(
                "<tr><th scope='row'>{} @ {}</th><td class='n'>{b}</td><td class='wide'><span class='amount' style='width:{percent}%'></span></td></tr>",
                escape(s.as_str()),
                escape(n.as_str())
            )
        };
        let rows: String = per.iter().filter(|(_, b)| b.0 > 0).map(row).collect();
        let total = Bytes(self.report.bytes_moved);
        format!(
            "<section><h2>Image bytes</h2><p>{total} crossed the WAN in all. What the plans wanted carried, first placement included:</p><table><tbody>{rows}</tbody></table></section>\n"
        )
    }

    fn decisions(&self) -> String {
        let mut out = String::from("<section><h2>Decisions</h2><ol class='decisions'>");
        for d in &self.decided {
            let time = d.plan.at.since(Time(0)).as_secs_f64();
            let _ = write!(
                out,
                "<li><p><b>{time:.1} s</b> {} <span class='quiet'>{}</span></p><ul>",
                escape(&cause_in_words(&d.plan.cause)),
                d.generation
            );
            for m in &d.plan.moves {
                let _ = write!(
                    out,
                    "<li><b>{} @ {}: {}</b> <span class='quiet'>({}, {})</span><br>{}</li>",
                    escape(m.service.as_str()),
                    escape(m.network.as_str()),
                    action(m.action),
                    m.bytes,
                    m.time,
                    escape(&m.reason)
                );
            }
            for n in &d.plan.not {
                let _ = write!(
                    out,
                    "<li class='quiet'>not {} @ {}: {}</li>",
                    escape(n.service.as_str()),
                    escape(n.network.as_str()),
                    escape(&n.reason)
                );
            }
            out += "</ul></li>";
        }
        out += "</ol>";
        let told = |line: &String| {
            self.decided
                .iter()
                .flat_map(|d| d.plan.moves.iter().map(|m| &m.reason).chain(d.plan.not.iter().map(|n| &n.reason)))
                .any(|r| line.contains(r.as_str()))
        };
        let more: Vec<&String> = self.report.explain.iter().filter(|l| !told(l)).collect();
        for (title, lines) in [("Why it is where it is", more), ("Notes", self.report.notes.iter().collect())] {
            if !lines.is_empty() {
                let items: String = lines.iter().map(|l| format!("<li>{}</li>", escape(l))).collect();
                let _ = write!(out, "<h3>{title}</h3><ul>{items}</ul>");
            }
        }
        out + "</section>\n"
    }

    fn tables(&self) -> String {
        let known = |n: Option<u64>| n.map_or("-".to_owned(), |n| n.to_string());
        let mut out = String::from(
            "<section><h2>The same in numbers</h2><table><caption>Response time over the whole play</caption><thead><tr><th scope='col'>service</th><th scope='col'>region</th><th scope='col' class='n'>requests</th><th scope='col' class='n'>failed</th><th scope='col' class='n'>p50, ms</th><th scope='col' class='n'>p95, ms</th></tr></thead><tbody>",
        );
        for l in &self.report.latency {
            let _ = write!(
                out,
                "<tr><td>{}</td><td>{}</td><td class='n'>{}</td><td class='n'>{}</td><td class='n'>{}</td><td class='n'>{}</td></tr>",
                escape(l.service.as_str()),
                escape(l.region.as_str()),
                l.requests,
                l.failed,
                known(l.p50_ms),
                known(l.p95_ms)
            );
        }
        out + "</tbody></table>" + &self.by_ten_seconds() + "</section>\n"
    }

    /// What the charts show of the crowd's service, for those who cannot see them.
    fn by_ten_seconds(&self) -> String {
        let Some(service) = self.scenario.crowds.first().map(|c| &c.service) else { return String::new() };
        let ten = Span::secs(10);
        let regions: Vec<&RegionId> = self.scenario.fleet.regions.iter().map(|r| &r.name).collect();
        let head: String =
            regions.iter().map(|r| format!("<th scope='col' class='n'>{}</th>", escape(r.as_str()))).collect();
        let mut by: BTreeMap<(u64, &RegionId), Vec<Span>> = BTreeMap::new();
        for r in self.recording.requests.iter().filter(|r| r.service == *service && r.failed.is_none()) {
            by.entry((r.at.0 / ten.0, &r.region)).or_default().push(r.took);
        }
        by.values_mut().for_each(|v| v.sort_unstable());
        let row = |k: u64| {
            let cells: String = regions
                .iter()
                .map(|r| {
                    by.get(&(k, *r)).map_or("<td class='n'>-</td>".into(), |v| {
                        format!(
                            "<td class='n'>{} <span class='quiet'>({})</span></td>",
                            percentile(v, 95).map_or(0, ms),
                            v.len()
                        )
                    })
                })
                .collect();
            format!("<tr><th scope='row'>{} s</th>{cells}</tr>", k * 10)
        };
        let rows: String = (0..self.length.0.div_ceil(ten.0)).map(row).collect();
        format!(
            "<details><summary>p95 of {} every ten seconds, ms (requests)</summary><table><thead><tr><th scope='col'>from</th>{head}</tr></thead><tbody>{rows}</tbody></table></details>",
            escape(service.as_str())
        )
    }
}
