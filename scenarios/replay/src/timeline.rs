//! What happened, as a transcript that people read and tests compare.
//!
//! ```text
//! (scenario, recording) ─▶ lines: time, verb, what
//! ```

use crate::recording::Recording;
use crate::report::{cause_in_words, crowd};
use crate::scenario::Scenario;
use std::collections::BTreeMap;
use vmatrix_model::plan::{Cause, Decision};
use vmatrix_model::{NetworkId, ServiceId, Span, Time};

struct Line {
    at: Time,
    verb: String,
    what: String,
}

impl Line {
    fn new(at: Time, verb: &str, what: String) -> Line {
        Line { at, verb: verb.to_owned(), what }
    }
}

/// The transcript of a play: one line an event, in order of time.
pub fn timeline(scenario: &Scenario, recording: &Recording) -> String {
    let mut lines = crowds(scenario, recording);
    lines.extend(recording.decisions.iter().filter(|d| d.plan.cause != Cause::Start).flat_map(decision));
    lines.extend(recording.steps.iter().map(|s| Line::new(s.at, &s.verb, s.what.clone())));
    lines.extend(instances(recording));
    // Stable: what happens at the same moment stays in the order of cause and effect above.
    lines.sort_by_key(|l| l.at);
    let end = Time(0) + Span::secs(u64::from(scenario.length_s));
    let well = if recording.returned_to_dormant {
        "every service is at home alone, every other copy dormant"
    } else {
        "NOT every service is at home alone with its other copies dormant"
    };
    lines.push(Line::new(end, "end", well.to_owned()));
    let mut out = format!("{}\n\n", scenario.about);
    for l in &lines {
        let hundredths = (l.at.0 + 5_000) / 10_000;
        let time =
            if l.verb.is_empty() { String::new() } else { format!("{}.{:02} s", hundredths / 100, hundredths % 100) };
        out += format!("{time:>10}  {:<9} {}", l.verb, l.what).trim_end();
        out.push('\n');
    }
    out
}

fn crowds(scenario: &Scenario, recording: &Recording) -> Vec<Line> {
    let mut lines = Vec::new();
    for c in &scenario.crowds {
        let what = format!(
            "{} begins to ask for {}: {} requests a second more within {} s",
            c.region, c.service, c.requests_per_s, c.ramp_s
        );
        lines.push(Line::new(crowd::onset(c), "crowd", what));
        lines.push(Line::new(crowd::end(c), "crowd", format!("{} asks as usual again", c.region)));
        if let Some((at, network)) = crowd::first_byte(recording, c) {
            lines.push(Line::new(at, "first", format!("answer to {} from {network}", c.region)));
        }
        if let Some(at) = crowd::objective(scenario, recording, c) {
            lines.push(Line::new(at, "objective", format!("of {} is met in {} from here on", c.service, c.region)));
        }
    }
    lines
}

/// The decision, its moves, and what was left; continued lines have no verb.
fn decision(d: &Decision) -> Vec<Line> {
    let at = d.plan.at;
    let mut lines = vec![Line::new(at, "decide", format!("{} ({})", cause_in_words(&d.plan.cause), d.generation))];
    lines.extend(d.plan.moves.iter().map(|m| Line::new(at, "", m.to_string())));
    lines.extend(d.plan.not.iter().map(|n| Line::new(at, "", n.to_string())));
    lines.extend(d.serving_at.map(|t| Line::new(t, "seen", format!("every newcomer of {} serving", d.generation))));
    lines.extend(d.done_at.map(|t| Line::new(t, "done", format!("what {} began", d.generation))));
    lines
}

/// Where each service serves, whenever that changed.
fn instances(recording: &Recording) -> Vec<Line> {
    let mut last: BTreeMap<&ServiceId, &BTreeMap<NetworkId, u32>> = BTreeMap::new();
    let mut lines = Vec::new();
    for i in &recording.instances {
        if last.insert(&i.service, &i.serving) == Some(&i.serving) {
            continue;
        }
        let at: Vec<String> =
            i.serving.iter().filter(|(_, n)| **n > 0).map(|(network, n)| format!("{network} x{n}")).collect();
        let at = if at.is_empty() { "nowhere".to_owned() } else { at.join(", ") };
        lines.push(Line::new(i.at, "serve", format!("{} at {at}", i.service)));
    }
    lines
}
