//! The charts of the page, all on the play's time axis.
//!
//! ```text
//! requests ──▶ response time (one per service), demand    crowds shaded,
//! instances ─▶ instances serving                          decisions numbered
//! so_far ────▶ cost an hour, cost so far                  in every one of them
//! ```

use super::chart::Chart;
use super::cost::{Cost, so_far};
use super::html::Page;
use super::{cause_in_words, crowd, ms, percentile};
use crate::recording::Request;
use vmatrix_model::{MicroUsd, NetworkId, ServiceId, Span, Time};

/// Most single requests drawn; beyond that the lines say enough and the file stays small.
const DOTS_MAX: usize = 4_000;
/// Points of a line.
const POINTS: u64 = 120;
/// The shortest stretch of time that a point of a line looks back and forward over, together. In a long play it is what
/// lies between two points, so that nothing falls between them.
const WINDOW: Span = Span::secs(6);
/// Steps of a chart of cost: few enough that each holds some requests, many enough that a move is seen.
const COST_STEPS: u64 = 40;
/// A part of a cost, with its name.
type Part = (&'static str, fn(&Cost) -> MicroUsd);
/// All of them. The last is paid once, at a move.
const PARTS: [Part; 4] =
    [("latency", |c| c.latency), ("instances", |c| c.instances), ("traffic", |c| c.traffic), ("images", |c| c.images)];

impl Page<'_> {
    pub(super) fn charts(&self) -> String {
        let mut out = String::new();
        for service in &self.scenario.fleet.services {
            out += &self.latency(&service.name, service.objective_ms);
        }
        out + &self.demand() + &self.instances() + &self.cost()
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
        let dots = requests.len() <= DOTS_MAX;
        let about = format!(
            "{}ines are the 95th percentile per client region. The objective is {objective_ms} ms.",
            if dots { "Each dot is a request; the l" } else { "The l" }
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
            if dots {
                chart.dots(series, &of.iter().map(|(at, took)| (*at, took.0 as f64 / 1000.0)).collect::<Vec<_>>());
            }
            let p95 = |within: &[(Time, Span)], _: Span| {
                let mut took: Vec<Span> = within.iter().map(|(_, t)| *t).collect();
                took.sort_unstable();
                percentile(&took, 95).map(|p| p.0 as f64 / 1000.0)
            };
            chart.line(series, &format!("p95 in {}", region.name), &self.over_time(&of, p95));
        }
        chart.finish()
    }

    fn demand(&self) -> String {
        let rate = |within: &[(Time, Span)], window: Span| Some(within.len() as f64 / window.as_secs_f64());
        let lines: Vec<Vec<(Time, Option<f64>)>> = self
            .scenario
            .fleet
            .regions
            .iter()
            .map(|region| {
                let of = self.recording.requests.iter().filter(|r| r.region == region.name);
                self.over_time(&of.map(|r| (r.at, r.took)).collect::<Vec<_>>(), rate)
            })
            .collect();
        let max = lines.iter().flatten().filter_map(|(_, v)| *v).fold(1.0, f64::max);
        let about = "Requests a second per client region, all services together.";
        let mut chart = Chart::new("Demand", about, self.length, 190.0, max, "/s");
        self.setting(&mut chart);
        for (series, (region, points)) in self.scenario.fleet.regions.iter().zip(&lines).enumerate() {
            chart.line(series, region.name.as_str(), points);
        }
        chart.finish()
    }

    /// A value per point of time, from what began in the window around it and how long that window is.
    fn over_time(
        &self,
        begun: &[(Time, Span)],
        value: impl Fn(&[(Time, Span)], Span) -> Option<f64>,
    ) -> Vec<(Time, Option<f64>)> {
        let half = Span(WINDOW.0.max(self.length.0 / POINTS) / 2);
        let point = |k| {
            let at = Time(self.length.0 / POINTS * k);
            let (from, to) = (at - half, (at + half).min(Time(0) + self.length));
            let first = begun.partition_point(|(t, _)| *t < from);
            let next = begun.partition_point(|(t, _)| *t < to);
            (at, value(&begun[first..next], to.since(from)))
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

    /// What an hour cost as the play went on, and what it had come to.
    fn cost(&self) -> String {
        let grown = so_far(self.scenario, self.recording, None, COST_STEPS);
        let end = |steps: usize| Time((u128::from(self.length.0) * steps as u128 / u128::from(COST_STEPS)) as u64);
        let hours = self.length.as_secs_f64() / COST_STEPS as f64 / 3600.0;
        // Each step is level, from its beginning to its end.
        let an_hour = PARTS.iter().take(3).map(|(name, part)| {
            let before = std::iter::once(0.0).chain(grown.iter().map(|c| part(c).0 as f64));
            let steps = grown.iter().zip(before).enumerate();
            let level = steps.flat_map(|(k, (c, before))| {
                let price = (part(c).0 as f64 - before) / hours;
                [(end(k), price), (end(k + 1), price)]
            });
            (*name, level.collect())
        });
        let sum = PARTS.iter().map(|(name, part)| {
            let points = grown.iter().enumerate().map(|(k, c)| (end(k + 1), part(c).0 as f64));
            (*name, std::iter::once((Time(0), 0.0)).chain(points).collect())
        });
        let total = grown.last().copied().unwrap_or_default();
        let parts: Vec<String> = PARTS.iter().map(|(name, part)| format!("{name} {}", part(&total))).collect();
        self.stacked(
            "Cost an hour",
            "What clients' waiting, instances and traffic cost an hour at each time. Images, which are paid once, are in the chart below only.",
            an_hour.collect(),
        ) + &self.stacked(
            "Cost so far",
            &format!("What it has come to: in the end {}, of which {}.", total.total(), parts.join(", ")),
            sum.collect(),
        )
    }

    /// Layers of millionths of a dollar, each on top of those before; their points are at the same times.
    fn stacked(&self, title: &str, about: &str, layers: Vec<(&str, Vec<(Time, f64)>)>) -> String {
        let mut floor: Vec<(Time, f64)> =
            layers.first().map_or(Vec::new(), |(_, points)| points.iter().map(|(at, _)| (*at, 0.0)).collect());
        let on_top = |floor: &[(Time, f64)], layer: &[(Time, f64)]| -> Vec<(Time, f64)> {
            floor.iter().zip(layer).map(|((at, low), (_, high))| (*at, low + high)).collect()
        };
        let top = layers.iter().fold(floor.clone(), |floor, (_, layer)| on_top(&floor, layer));
        let max = top.iter().map(|(_, v)| *v).fold(0.0, f64::max);
        if max <= 0.0 {
            return String::new();
        }
        let (unit, micro) = if max >= 1e6 { ("$", 1e6) } else { ("m$", 1e3) };
        let mut chart = Chart::new(title, about, self.length, 190.0, max / micro, unit);
        self.setting(&mut chart);
        let scaled = |points: &[(Time, f64)]| -> Vec<(Time, f64)> {
            points.iter().map(|(at, value)| (*at, value / micro)).collect()
        };
        for (part, (name, layer)) in layers.iter().enumerate() {
            let ceiling = on_top(&floor, layer);
            chart.area(part, name, &scaled(&floor), &scaled(&ceiling));
            floor = ceiling;
        }
        chart.finish()
    }
}

#[cfg(test)]
mod tests {
    use crate::report::{html, summarise};
    use crate::scenario::Scenario;

    #[test]
    fn the_chart_of_cost_ends_at_the_total_and_has_each_part() {
        let s = Scenario::parse("flash-crowd.toml", include_str!("../../../library/flash-crowd.toml")).unwrap();
        let recording = crate::replay(&s, None);
        let report = summarise(&s, &recording);
        let page = html(&s, &recording, &report);
        assert!(page.contains(&format!(
            "in the end {}, of which latency {}",
            report.cost.total(),
            report.cost.latency
        )));
        // An hour's cost has three layers, the sum has four.
        for (part, areas) in [("p0", 2), ("p1", 2), ("p2", 2), ("p3", 1)] {
            assert_eq!(page.matches(&format!("class='area {part}'")).count(), areas, "{part}");
        }
        // Nothing asked, nothing served: no chart of nothing.
        let nothing = html(&s, &Default::default(), &summarise(&s, &Default::default()));
        assert!(!nothing.contains("Cost so far"));
    }
}
