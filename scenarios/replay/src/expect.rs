//! What a scenario expects of its play: figures of the report within bounds, moves made or not made.
//!
//! ```text
//! [[expect]]                                   [[expect]]
//! figure = "/crowd/onset_to_objective_s"       move = "resume"
//! at_most = 30                                 service = "maps"
//!                                              network = "tokyo"
//!                                              between_s = [26, 33]
//! ```
//!
//! A figure is a path into the report as `vmatrix replay --json` prints it; in a list a step of the path names the
//! service or region of the row that is meant: `/latency/maps/seoul/p95_ms`. `gap = [["seoul"], ["berlin"]]` of a
//! `service` is what lies between teams: the largest less the smallest of their means of their regions' median
//! response times, milliseconds.

use crate::report::Report;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmatrix_model::{NetworkId, RegionId, ServiceId};

/// One expectation: of a figure, of a gap between teams, or of a move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Path of a number or a truth (1 or 0) in the report.
    #[serde(default)]
    pub figure: Option<String>,
    /// Teams of regions that are to be served alike.
    #[serde(default)]
    pub gap: Option<Vec<Vec<RegionId>>>,
    #[serde(default)]
    pub at_least: Option<f64>,
    #[serde(default)]
    pub at_most: Option<f64>,
    /// `stage`, `resume`, `suspend` or `drop`.
    #[serde(default, rename = "move")]
    pub verb: Option<Verb>,
    #[serde(default)]
    pub service: Option<ServiceId>,
    #[serde(default)]
    pub network: Option<NetworkId>,
    /// Decided between these seconds from the start; any time if not given.
    #[serde(default)]
    pub between_s: Option<[f64; 2]>,
    /// That no such move is decided.
    #[serde(default)]
    pub never: bool,
}

/// What a move does to a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    Stage,
    Resume,
    Suspend,
    Drop,
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Verb::Stage => "stage",
            Verb::Resume => "resume",
            Verb::Suspend => "suspend",
            Verb::Drop => "drop",
        }
    }
}

impl Expect {
    /// What keeps this from being an expectation.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        let bound = self.at_least.is_some() || self.at_most.is_some();
        let of_move = self.network.is_some() || self.between_s.is_some() || self.never;
        match (&self.figure, &self.gap, self.verb) {
            (None, None, None) => Some("says neither a figure nor a move"),
            (Some(f), None, None) if !f.starts_with('/') => Some("figure is a path that begins with /"),
            (Some(_), None, None) if !bound => Some("a figure needs at_least or at_most"),
            (Some(_), None, None) if of_move || self.service.is_some() => {
                Some("service, network, between_s and never are of a move")
            }
            (None, Some(_), None) if !bound || self.service.is_none() => {
                Some("a gap needs a service, and at_least or at_most")
            }
            (None, Some(_), None) if of_move => Some("network, between_s and never are of a move"),
            (None, Some(teams), None) if teams.len() < 2 || teams.iter().any(Vec::is_empty) => {
                Some("a gap lies between two teams or more, each with a region")
            }
            (None, None, Some(_)) if bound => Some("at_least and at_most are of a figure"),
            (Some(_), None, None) | (None, Some(_), None) | (None, None, Some(_)) => None,
            _ => Some("says more than one of figure, gap and move: make two of it"),
        }
    }

    /// The bound that a value breaks, in words.
    fn beyond(&self, seen: f64) -> Option<String> {
        let low = self.at_least.filter(|least| seen < *least).map(|least| format!("at least {least}"));
        low.or_else(|| self.at_most.filter(|most| seen > *most).map(|most| format!("at most {most}")))
    }

    /// How the report breaks it, in words.
    fn broken(&self, report: &Report, json: &Value) -> Option<String> {
        if let Some(path) = &self.figure {
            let Some(seen) = figure(json, path) else { return Some(format!("{path} is not a figure of this play")) };
            return self.beyond(seen).map(|wanted| format!("{path} is {seen}, expected {wanted}"));
        }
        if let Some((teams, service)) = self.gap.as_ref().zip(self.service.as_ref()) {
            return match gap(report, service, teams) {
                Ok(ms) => {
                    self.beyond(ms).map(|wanted| format!("the teams are {ms} ms apart in {service}, expected {wanted}"))
                }
                Err(region) => Some(format!("{region} had no answer of {service}")),
            };
        }
        let verb = self.verb?;
        let meant = |m: &&crate::report::MoveReport| {
            m.action.split(' ').next() == Some(verb.word())
                && self.service.as_ref().is_none_or(|s| *s == m.service)
                && self.network.as_ref().is_none_or(|n| *n == m.network)
                && self.between_s.is_none_or(|[from, to]| (from..=to).contains(&m.at_s))
        };
        let mut what = verb.word().to_owned();
        what += &self.service.as_ref().map_or(String::new(), |s| format!(" of {s}"));
        what += &self.network.as_ref().map_or(String::new(), |n| format!(" in {n}"));
        what += &self.between_s.map_or(String::new(), |[from, to]| format!(" between {from} and {to} s"));
        match (report.moves.iter().find(meant), self.never) {
            (None, false) => Some(format!("no {what} was decided")),
            (Some(m), true) => Some(format!("a {what} was decided, at {} s", m.at_s)),
            _ => None,
        }
    }
}

/// What lies between teams, in milliseconds of response time; or a region that had no answer.
fn gap<'a>(report: &Report, service: &ServiceId, teams: &'a [Vec<RegionId>]) -> Result<f64, &'a RegionId> {
    let median = |region: &'a RegionId| {
        let row = report.latency.iter().find(|l| l.service == *service && l.region == *region);
        row.and_then(|l| l.p50_ms).map(|ms| ms as f64).ok_or(region)
    };
    let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
    for team in teams {
        let medians = team.iter().map(median).collect::<Result<Vec<f64>, _>>()?;
        let mean = medians.iter().sum::<f64>() / medians.len().max(1) as f64;
        (least, most) = (least.min(mean), most.max(mean));
    }
    Ok(most - least)
}

/// Expectations that a play broke, one sentence each.
pub fn broken(expected: &[Expect], report: &Report) -> Vec<String> {
    let json = serde_json::to_value(report).unwrap_or_default();
    expected.iter().filter_map(|e| e.broken(report, &json)).collect()
}

/// A number of the report, or a truth as 1 or 0.
fn figure(json: &Value, path: &str) -> Option<f64> {
    let mut at: Vec<&Value> = vec![json];
    for step in path.split('/').skip(1) {
        at = match at.as_slice() {
            [one] if one.get(step).is_some() => vec![one.get(step)?],
            [Value::Array(rows)] => rows.iter().filter(|row| names(row, step)).collect(),
            rows => rows.iter().copied().filter(|row| names(row, step)).collect(),
        };
    }
    match at.as_slice() {
        [Value::Bool(truth)] => Some(f64::from(u8::from(*truth))),
        [value] => value.as_f64(),
        _ => None,
    }
}

/// Whether a row is of this service, region or network.
fn names(row: &Value, name: &str) -> bool {
    ["service", "region", "network"].iter().any(|key| row.get(key).and_then(Value::as_str) == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Scenario;

    fn played() -> (Scenario, Report) {
        let text = include_str!("../../library/flash-crowd.toml");
        let scenario = Scenario::parse("flash-crowd.toml", text).unwrap();
        let report = crate::report::summarise(&scenario, &crate::replay(&scenario, None));
        (scenario, report)
    }

    #[test]
    fn what_is_expected_is_seen_and_what_is_not_is_told() {
        let (_, report) = played();
        let read = |text: &str| -> Expect { toml::from_str(text).unwrap() };
        let broken = |text: &str| broken(&[read(text)], &report).pop().unwrap_or_default();
        assert_eq!(broken("figure = '/failed_requests'\nat_most = 0"), "");
        assert_eq!(broken("figure = '/returned_to_dormant'\nat_least = 1"), "");
        assert_eq!(broken("figure = '/latency/maps/seoul/p50_ms'\nat_most = 400\nat_least = 20"), "");
        assert!(broken("figure = '/latency/maps/seoul/p50_ms'\nat_most = 4").contains("expected at most 4"));
        assert!(broken("figure = '/latency/maps/p50_ms'\nat_most = 4").contains("not a figure"));
        assert_eq!(broken("move = 'resume'\nnetwork = 'tokyo'\nbetween_s = [26, 33]"), "");
        let late = broken("move = 'resume'\nservice = 'maps'\nnetwork = 'tokyo'\nbetween_s = [0, 20]");
        assert_eq!(late, "no resume of maps in tokyo between 0 and 20 s was decided");
        assert!(broken("move = 'suspend'\nnever = true").starts_with("a suspend was decided, at "));
        let teams = "gap = [['new-york', 'seoul'], ['berlin']]\nservice = 'maps'\n";
        assert_eq!(broken(&format!("{teams}at_most = 500")), "");
        assert!(broken(&format!("{teams}at_most = 1")).ends_with("expected at most 1"));
        let nobody = broken("gap = [['seoul'], ['berlin']]\nservice = 'agenda'\nat_most = 500");
        assert_eq!(nobody, "seoul had no answer of agenda");
    }

    #[test]
    fn an_expectation_that_says_nothing_is_refused() {
        let text = include_str!("../../library/flash-crowd.toml");
        for (expect, word) in [
            ("service = 'maps'", "neither"),
            ("figure = '/requests'", "at_least or at_most"),
            ("figure = 'requests'\nat_most = 1", "begins with /"),
            ("move = 'drop'\nat_most = 1", "of a figure"),
            ("figure = '/requests'\nat_most = 1\nmove = 'drop'", "make two"),
            ("move = 'drop'\nnetwork = 'mars'", "mars"),
            ("gap = [['seoul'], ['berlin']]\nat_most = 1", "needs a service"),
            ("gap = [['seoul'], []]\nservice = 'maps'\nat_most = 1", "two teams"),
            ("gap = [['seoul'], ['mars']]\nservice = 'maps'\nat_most = 1", "region mars"),
        ] {
            let text = format!("{text}\n[[expect]]\n{expect}\n");
            let refused = Scenario::parse("f.toml", &text).unwrap_err().to_string();
            assert!(refused.contains(word), "{refused}");
        }
    }
}
