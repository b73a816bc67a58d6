//! What a bench found: rows, goals and the machine it ran on, as JSON and as a page.
//!
//! runs ─▶ [`Sample`]s ─median─▶ [`Row`] ─▶ [`Report`] ─▶ JSON │ Markdown

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Everything one bench found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// One of [`crate::NAMES`].
    pub bench: String,
    /// Whether it was the short form, whose figures prove only that it runs.
    pub quick: bool,
    pub machine: Machine,
    /// What a reader must know to judge the figures, one sentence each.
    pub conditions: Vec<String>,
    /// The command lines that measured the rows, in order.
    #[serde(default)]
    pub commands: Vec<String>,
    pub rows: Vec<Row>,
    pub goals: Vec<Goal>,
}

/// The machine that measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub kernel: String,
    pub qemu: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    pub cpus: u64,
    pub memory_mib: u64,
    /// Lowest and highest load average over a minute, of those at each beginning and end.
    pub load: [f64; 2],
}

/// One measured combination. Times in milliseconds; none where a figure does not apply.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Row {
    pub guest: String,
    pub ram_mib: u64,
    /// Rate of the link, 10^6 bits a second.
    pub link_mbit: Option<u32>,
    /// Round trip of the link as it was asked for; what was measured is among the limit's terms.
    pub rtt_ms: Option<f64>,
    pub mechanism: String,
    /// How often it was run.
    pub runs: u64,
    /// From the order to the first byte of the first correct answer.
    pub first_byte_ms_median: Option<f64>,
    /// The next request, on a connection of its own, to its last byte.
    pub second_ms_median: Option<f64>,
    /// QEMU's load step: from the command to its completion.
    pub load_ms_median: Option<f64>,
    /// Median of a run, both directions, IP headers included, as the WAN emulator counted.
    pub bytes_on_wire: Option<u64>,
    /// `r + 8(D+W)/B + T_load + T_guest`.
    pub limit_ms: Option<f64>,
    /// Further figures of this bench, by name.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// A goal, against what was seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    pub what: String,
    /// The bound in words: `<= 1.3 x`.
    pub wanted: String,
    /// What was seen, in the same unit; none: it was not measured.
    pub seen: Option<String>,
    pub met: Option<bool>,
}

impl Goal {
    /// A goal from above.
    pub fn at_most(what: impl Into<String>, most: f64, seen: Option<f64>) -> Goal {
        Goal::new(what, format!("<= {most}"), seen, |s| s <= most)
    }

    /// A goal from below.
    pub fn at_least(what: impl Into<String>, least: f64, seen: Option<f64>) -> Goal {
        Goal::new(what, format!(">= {least}"), seen, |s| s >= least)
    }

    fn new(what: impl Into<String>, wanted: String, seen: Option<f64>, met: impl Fn(f64) -> bool) -> Goal {
        // As many digits as tell the one from the other.
        let words = |s: f64| if s.fract() == 0.0 { format!("{s:.0}") } else { format!("{s:.2}") };
        Goal { what: what.into(), wanted, seen: seen.map(words), met: seen.map(met) }
    }
}

/// What tells a row from every other of its bench.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub guest: String,
    pub ram_mib: u64,
    pub link_mbit: Option<u32>,
    pub rtt_us: Option<u64>,
    pub mechanism: String,
    /// Of `wire` its case, of `fanout` the number of networks, of `density` that of clones.
    pub of: Option<String>,
}

impl Key {
    /// All of it but the mechanism, in words: `tiny 512 MiB, 100/20`.
    pub fn about(&self) -> String {
        let link = self.link_mbit.zip(self.rtt_us).map(|(mbit, rtt)| format!("{mbit}/{}", rtt as f64 / 1e3));
        let guest = format!("{} {} MiB", self.guest, self.ram_mib);
        [Some(guest), link, self.of.clone()].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// One run of one mechanism.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sample {
    pub first_byte_ms: f64,
    /// To the last byte of the first correct answer.
    pub whole_ms: f64,
    pub second_ms: Option<f64>,
    /// A request like the second, later, when everything is warm.
    pub warm_ms: Option<f64>,
    pub load_ms: Option<f64>,
    pub bytes_on_wire: Option<u64>,
    /// Further figures, by name; the row gets their medians.
    pub more: Vec<(&'static str, f64)>,
}

impl Row {
    /// A row from its runs.
    pub fn of(guest: &str, ram_mib: u64, mechanism: &str, samples: &[Sample]) -> Row {
        let collect = |f: &dyn Fn(&Sample) -> Option<f64>| samples.iter().filter_map(f).collect::<Vec<f64>>();
        let first = collect(&|s| Some(s.first_byte_ms));
        let mut row = Row {
            guest: guest.to_owned(),
            ram_mib,
            mechanism: mechanism.to_owned(),
            runs: samples.len() as u64,
            first_byte_ms_median: median(&first).map(tenth),
            second_ms_median: median(&collect(&|s| s.second_ms)).map(tenth),
            load_ms_median: median(&collect(&|s| s.load_ms)).map(hundredth),
            bytes_on_wire: median(&collect(&|s| s.bytes_on_wire.map(|b| b as f64))).map(|b| b as u64),
            ..Row::default()
        };
        row.add("runs_ms", first.iter().copied().map(tenth).collect::<Vec<_>>());
        row.add("whole_ms_median", median(&collect(&|s| Some(s.whole_ms))).map(tenth));
        if let Some(warm) = median(&collect(&|s| s.warm_ms)) {
            row.add("warm_ms_median", tenth(warm));
        }
        let loads = collect(&|s| s.load_ms);
        if !loads.is_empty() {
            row.add("load_runs_ms", loads.iter().copied().map(hundredth).collect::<Vec<_>>());
        }
        let names: Vec<&str> = samples.iter().flat_map(|s| s.more.iter().map(|(n, _)| *n)).collect();
        for name in names {
            if !row.more.contains_key(name) {
                let values = collect(&|s| s.more.iter().find(|(n, _)| *n == name).map(|(_, v)| *v));
                row.add(name, median(&values).map(hundredth));
            }
        }
        row
    }

    /// Adds a further figure.
    pub fn add(&mut self, name: &str, value: impl Into<Value>) {
        self.more.insert(name.to_owned(), value.into());
    }

    /// A further figure as a number.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.more.get(name)?.as_f64()
    }

    /// What tells it from the bench's other rows.
    pub fn key(&self) -> Key {
        let of = ["case", "networks", "clones"].iter().find_map(|name| self.more.get(*name));
        let of = of.map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        Key {
            guest: self.guest.clone(),
            ram_mib: self.ram_mib,
            link_mbit: self.link_mbit,
            rtt_us: self.rtt_ms.map(|rtt| (rtt * 1e3).round() as u64),
            mechanism: self.mechanism.clone(),
            of,
        }
    }

    /// The runs' first bytes, in order of running.
    pub fn runs_ms(&self) -> Vec<f64> {
        let runs = self.more.get("runs_ms").and_then(Value::as_array);
        runs.map(|r| r.iter().filter_map(Value::as_f64).collect()).unwrap_or_default()
    }
}

/// The middle value, the mean of the two middle ones of an even number; none of none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle)?;
    if sorted.len() % 2 == 1 { Some(*upper) } else { sorted.get(middle - 1).map(|lower| (lower + upper) / 2.0) }
}

/// Milliseconds of a span, with fractions.
pub fn ms(span: std::time::Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Rounded to two digits after the point.
pub fn hundredth(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_and_of_nothing_there_is_none() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[9.0, 1.0, 3.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 100.0]), Some(3.5));
    }

    #[test]
    fn a_row_has_the_keys_that_are_promised_null_where_they_do_not_apply() {
        let sample =
            |first| Sample { first_byte_ms: first, load_ms: Some(5.0), more: vec![("x", first)], ..Sample::default() };
        let row = Row::of("tiny", 512, "vmatrix", &[sample(1.0), sample(3.0), sample(2.0)]);
        let json = serde_json::to_value(&row).unwrap();
        for key in [
            "guest",
            "ram_mib",
            "link_mbit",
            "rtt_ms",
            "mechanism",
            "runs",
            "first_byte_ms_median",
            "second_ms_median",
            "load_ms_median",
            "bytes_on_wire",
            "limit_ms",
        ] {
            assert!(json.get(key).is_some(), "{key} is missing in {json}");
        }
        assert!(json["second_ms_median"].is_null() && json["link_mbit"].is_null());
        assert_eq!((json["first_byte_ms_median"].as_f64(), json["x"].as_f64()), (Some(2.0), Some(2.0)));
        assert_eq!(serde_json::from_value::<Row>(json).unwrap(), row);
    }
}
