//! Puts a decision into sentences: what changes for whom, what it costs, what came second, and why not.

use crate::cost::TwoTier;
use crate::forecast::MilliRps;
use crate::solve::Step;
use vmatrix_model::plan::Price;
use vmatrix_model::{MicroUsd, NetworkId, RegionId, Span};

/// A rate as people read it: `4.2`.
pub fn rps(rate: MilliRps) -> String {
    format!("{}.{}", (rate + 50) / 1000, (rate + 50) % 1000 / 100)
}

/// Thousandths as people read them: `-0.72`.
fn thousandths(n: i64) -> String {
    let sign = if n < 0 { "-" } else { "" };
    format!("{sign}{}.{:02}", n.unsigned_abs() / 1000, n.unsigned_abs() % 1000 / 10)
}

/// What a step does to the region it does most for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effect {
    pub region: RegionId,
    pub rate: MilliRps,
    pub from: NetworkId,
    pub before: Span,
    pub to: NetworkId,
    pub after: Span,
}

/// `seoul asks 4.2 requests/s: 180 ms from tokyo instead of 750 ms from ashburn`
pub fn effect(e: &Effect) -> String {
    format!(
        "{} asks {} requests/s: {} from {} instead of {} from {}",
        e.region,
        rps(e.rate),
        e.after,
        e.to,
        e.before,
        e.from
    )
}

/// What changes in the hour's price, part by part.
pub fn split(before: Price, after: Price) -> String {
    let part = |name: &str, b: MicroUsd, a: MicroUsd| format!("{name} {b} -> {a}");
    format!(
        "{}, {}, {} an hour",
        part("latency", before.latency, after.latency),
        part("instances", before.instances, after.instances),
        part("traffic", before.traffic, after.traffic)
    )
}

/// A step in a few words.
pub fn step(s: &Step) -> String {
    match s {
        Step::Add(n) => format!("adding {n}"),
        Step::Drop(n) => format!("dropping {n}"),
        Step::Swap { from, to } => format!("moving from {from} to {to}"),
        Step::Resize => "changing the number of instances".into(),
    }
}

/// Why a move was made.
pub fn why(
    effect_of_it: Option<&Effect>,
    before: Price,
    after: Price,
    payback: Option<Span>,
    second: Option<(&Step, MicroUsd)>,
) -> String {
    let mut words = effect_of_it.map(|e| effect(e) + "; ").unwrap_or_default();
    words += &split(before, after);
    words += &format!(", {} cheaper", before.total() - after.total());
    if let Some(t) = payback {
        words += &format!(", paid back after {t}");
    }
    if let Some((other, total)) = second {
        words += &format!("; second best: {} at {} an hour against {}", step(other), total, after.total());
    }
    words
}

/// The paper's condition in words.
pub fn two_tier(
    region: &RegionId,
    network: &NetworkId,
    backend: &str,
    packets_c: u32,
    packets_b: u32,
    t: TwoTier,
) -> String {
    let verdict = if t.holds() { "holds" } else { "fails" };
    format!(
        "each request exchanges N_C = {packets_c} packets with {backend} at the origin for N_B = {packets_b} to the client; from {network}, N_C/N_B = {} must lie below (RTT_A√p_A − RTT_B√p_B)/(RTT_C√p_C) = {} for {region}: {verdict} (paper §5.1)",
        thousandths(t.ratio),
        thousandths(t.limit),
    )
}

/// Why a step that costs more was left.
pub fn dearer(s: &Step, before: Price, after: Price) -> String {
    format!("{} would cost {} more an hour: {}", step(s), after.total() - before.total(), split(before, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_rounded_to_a_tenth() {
        assert_eq!([rps(0), rps(200), rps(4_160), rps(9_960)], ["0.0", "0.2", "4.2", "10.0"]);
        assert_eq!(thousandths(-1_720), "-1.72");
    }
}
