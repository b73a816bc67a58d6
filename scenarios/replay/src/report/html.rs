//! The report as one HTML file that needs nothing else: no library, no font, no network.
//!
//! ```text
//! key figures ─▶ map that plays ─▶ charts on one time axis ─▶ bytes ─▶ decisions ─▶ tables
//! ```
//!
//! The only script is the map's; without it everything else still says what it says.

use super::chart::{COLORS, escape};
use super::{Report, action, cause_in_words, ms, percentile};
use crate::recording::{Ports, Recording};
use crate::scenario::Scenario;
use std::collections::BTreeMap;
use std::fmt::Write;
use vmatrix_model::plan::{Cause, Decision};
use vmatrix_model::{Bytes, NetworkId, RegionId, ServiceId, Span, Time};

/// From so long on, times are hours, minutes and seconds.
const LONG: Span = Span::secs(3600);

/// Draws the whole page.
pub fn html(scenario: &Scenario, recording: &Recording, report: &Report) -> String {
    let decided: Vec<&Decision> = recording.decisions.iter().filter(|d| d.plan.cause != Cause::Start).collect();
    let page = Page { scenario, recording, report, decided, length: Span::secs(u64::from(scenario.length_s)) };
    let (about, style) = (escape(&scenario.about), include_str!("style.css"));
    format!(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>\n<title>{name}: vMatrix report</title>\n<style>\n{style}</style></head>\n<body><header><h1>{about}</h1><p>Scenario <b>{name}</b>, played {how}.</p></header>\n<main>{figures}{legend}{map}{charts}{bytes}{decisions}{tables}</main>\n<script>\n{script}</script></body></html>\n",
        name = escape(&report.scenario),
        how = if report.accelerator == "replay" {
            "in virtual time".to_owned()
        } else {
            format!("on real virtual machines ({})", escape(&report.accelerator))
        },
        figures = page.figures(),
        legend = page.legend(),
        map = page.map(),
        charts = page.charts(),
        bytes = page.bytes(),
        decisions = page.decisions(),
        tables = page.tables(),
        script = include_str!("map.js"),
    )
}

/// What the parts of the page are drawn from.
pub(super) struct Page<'a> {
    pub scenario: &'a Scenario,
    pub recording: &'a Recording,
    pub report: &'a Report,
    /// Every decision but the first placement: the numbered ones.
    pub decided: Vec<&'a Decision>,
    pub length: Span,
}

impl Page<'_> {
    /// A time as people read it.
    fn when(&self, at: Time) -> String {
        let seconds = at.since(Time(0)).as_secs_f64();
        if self.length < LONG { format!("{seconds:.1} s") } else { clock(seconds as u64) }
    }

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
        for (i, d) in self.decided.iter().enumerate() {
            let _ = write!(
                out,
                "<li><p><a class='jump' href='#map' data-decision='{}'>{}</a> {} <span class='quiet'>{}</span></p><ul>",
                i + 1,
                self.when(d.plan.at),
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

/// h:mm:ss.
pub(super) fn clock(seconds: u64) -> String {
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}
