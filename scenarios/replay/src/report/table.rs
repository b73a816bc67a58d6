//! The report for a terminal: plain text, no color.

use super::{Cost, Report};
use crate::recording::Ports;
use std::fmt;

/// Lines that fit 80 columns, but for reasons, which are as long as they are.
impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = self;
        let known = |n: Option<u64>, unit: &str| n.map_or("-".to_owned(), |n| format!("{n} {unit}"));
        let within = |s: Option<f64>| s.map_or("-".to_owned(), |s| format!("{s:.2} s"));
        writeln!(out, "{} ({})\n", r.scenario, r.accelerator)?;
        writeln!(out, "  {:<28}{}", "requests", r.requests)?;
        writeln!(out, "  {:<28}{}", "failed", r.failed_requests)?;
        writeln!(out, "  {:<28}{}", "relocations", r.relocations)?;
        writeln!(out, "  {:<28}{}", "image bytes moved", vmatrix_model::Bytes(r.bytes_moved))?;
        writeln!(out, "  {:<28}{}", "dormant again at the end", if r.returned_to_dormant { "yes" } else { "NO" })?;
        let Cost { latency, instances, traffic, images } = r.cost;
        writeln!(out, "  {:<28}{}", "cost", r.cost.total())?;
        writeln!(out, "    latency {latency}, instances {instances}, traffic {traffic}, images {images}")?;
        if let Some(c) = &r.crowd {
            writeln!(out, "\ncrowd in {} for {}\n", c.region, c.service)?;
            writeln!(out, "  {:<28}{}", "onset to decision", within(c.onset_to_decision_s))?;
            writeln!(out, "  {:<28}{}", "decision to first byte", within(c.decision_to_first_byte_s))?;
            writeln!(out, "  {:<28}{}", "onset to objective", within(c.onset_to_objective_s))?;
            writeln!(out, "  {:<28}{}", "p95 before", known(c.p95_before_ms, "ms"))?;
            writeln!(out, "  {:<28}{}", "p95 after", known(c.p95_after_ms, "ms"))?;
        }
        if r.two_tier.writes > 0 {
            writeln!(out, "\ntwo tier\n")?;
            writeln!(out, "  {:<28}{}", "writes", r.two_tier.writes)?;
            writeln!(out, "  {:<28}{}", "lost", r.two_tier.lost_writes)?;
            writeln!(out, "  {:<28}{}", "found elsewhere", r.two_tier.read_across)?;
            writeln!(out, "  {:<28}{}", "plaintext bytes on the WAN", r.two_tier.plaintext_bytes_on_wan)?;
        }
        if r.ports != Ports::default() {
            writeln!(out, "\nundeclared ports\n")?;
            writeln!(out, "  {:<28}{}", "tried from the WAN", r.ports.tried_from_wan)?;
            writeln!(out, "  {:<28}{}", "tried from other cells", r.ports.tried_from_cells)?;
            writeln!(out, "  {:<28}{}", "answered", r.ports.answered)?;
        }
        writeln!(
            out,
            "\n  {:<12} {:<14} {:>9} {:>7} {:>9} {:>9}",
            "service", "region", "requests", "failed", "p50", "p95"
        )?;
        for l in &r.latency {
            writeln!(
                out,
                "  {:<12} {:<14} {:>9} {:>7} {:>9} {:>9}",
                l.service,
                l.region,
                l.requests,
                l.failed,
                known(l.p50_ms, "ms"),
                known(l.p95_ms, "ms")
            )?;
        }
        writeln!(out, "\n  {:>9}  {:<12} {:<14} {:<16} cause", "decided", "service", "network", "move")?;
        for m in &r.moves {
            writeln!(out, "  {:>7.2} s  {:<12} {:<14} {:<16} {}", m.at_s, m.service, m.network, m.action, m.cause)?;
        }
        for (title, lines) in [("why", &r.explain), ("notes", &r.notes)] {
            if !lines.is_empty() {
                writeln!(out, "\n{title}\n")?;
                lines.iter().try_for_each(|l| writeln!(out, "  {l}"))?;
            }
        }
        Ok(())
    }
}
