//! The map that plays: networks and regions at their places, and what happened there as time goes on.
//!
//! ```text
//! recording ─▶ times: an even grid, and when something changed ─▶ a Frame each ┐
//! fleet ─▶ places and words in SVG                                             ├▶ map.js shows one of them
//! decisions: the page's own list, of which the island holds the times only ────┘
//! ```
//!
//! # Invariants
//! 1. At most [`FRAMES_MAX`] frames, however long the play and whatever happens in it: the slider has fewer pixels than
//!    would show more, and a report of two weeks opens as fast as one of two minutes.
//! 2. Nothing in the island can end its element: it holds no `<`, `>` or `&`.
//! 3. No sentence is there twice: reasons stand in the list of decisions, from which the script takes them.

use super::chart::{COLORS, escape};
use super::html::{Page, clock};
use super::place::{Mark, View, WIDTH, labels};
use super::{crowd, seconds};
use crate::recording::Request;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use vmatrix_model::placement::Share;
use vmatrix_model::plan::{Action, Decision};
use vmatrix_model::{NetworkId, RegionId, ServiceId, Span, Time};

const FRAMES_MAX: usize = 400;
/// Steps of the slider; there is a frame at each. The other half of the frames is for what changes in between.
const STEPS: u64 = 200;
/// How far a frame looks back for who asked and who answered: a step of the slider, within these. It never looks
/// forward: nobody is seen served by a network that is still being resumed.
const LOOK_BACK: (Span, Span) = (Span::secs(6), Span::secs(60));
/// Line height of words and width of a letter, pixels: enough to keep words clear of each other.
const LINE: f64 = 15.0;
const LETTER: f64 = 7.6;
/// From the top of a line to what letters stand on.
const BASE: f64 = 12.0;
/// Half of the size of a network's mark, and of a region's.
const NETWORK: f64 = 8.0;
const REGION: f64 = 4.0;

/// What a network has of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Held {
    Absent,
    /// Wanted asleep, and its image is still on its way.
    Staging,
    Dormant,
    /// Wanted running, and not seen serving yet.
    Resuming,
    /// So many instances serve.
    Active(u32),
}

/// One moment.
#[derive(Debug, Serialize)]
struct Frame {
    at_s: f64,
    /// By network, then by service.
    held: Vec<Vec<Held>>,
    /// By region: requests a second, all services together.
    demand: Vec<f64>,
    /// By region, the same: those that failed.
    failed: Vec<f64>,
    /// Region, network that answered it, and which part of the region's requests.
    served: Vec<(usize, usize, f64)>,
}

impl Page<'_> {
    /// The map with its controls, and its data.
    pub(super) fn map(&self) -> String {
        let length_s = self.length.0 / 1_000_000;
        let speeds = format!(
            "<option value='20'>in 20 s</option><option value='60' selected>in a minute</option><option value='180'>in three minutes</option><option value='{length_s}'>as it was, in {}</option>",
            clock(length_s)
        );
        format!(
            "<section id='map'><h2>What happened where</h2>\n<noscript><p class='quiet'>The map plays by a script, which is off: it shows only where networks and regions are. The charts, decisions and tables below say the rest.</p></noscript>\n{svg}\n<div class='controls' hidden><button type='button' id='play'>Play</button><output id='clock' for='time'>{zero}</output><input type='range' id='time' min='0' max='{STEPS}' value='0' step='1' aria-label='Time of the play'><button type='button' id='back' aria-label='To the decision before'>◂ decision</button><button type='button' id='on' aria-label='To the next decision'>decision ▸</button><label>whole play <select id='speed' aria-label='Speed: how long the whole play takes'>{speeds}</select></label></div>\n<p id='told'></p><div id='moment' aria-live='polite'></div>\n<p class='quiet'>Squares are networks, with what they have of each service: ● serves, with how many instances, ◐ is being resumed, ○ sleeps, ◌ is on its way. Circles are client regions, as large as their demand in the {back} before, ringed while a crowd asks; lines go to the networks that answered, as wide as their share.</p>\n<script type='application/json' id='frames'>{island}</script></section>\n",
            svg = self.world(),
            zero = clock(0),
            back = format_args!("{:.0} s", self.look_back().as_secs_f64()),
            island = island(&self.plays()),
        )
    }

    /// Everything that does not move; the script fills in the rest.
    fn world(&self) -> String {
        let fleet = &self.scenario.fleet;
        let places: Vec<(f64, f64)> =
            fleet.networks.iter().map(|n| (n.lat, n.lon)).chain(fleet.regions.iter().map(|r| (r.lat, r.lon))).collect();
        let view = View::around(&places);
        let longest = fleet.services.iter().map(|s| s.name.as_str().len() + 5).max().unwrap_or(0);
        let mark = |(i, (lat, lon)): (usize, &(f64, f64))| {
            let (x, y) = view.at(*lat, *lon);
            let (r, letters, lines) = match fleet.networks.get(i) {
                Some(n) => (NETWORK, n.name.as_str().len().max(longest), 1 + fleet.services.len()),
                None => (REGION, fleet.regions[i - fleet.networks.len()].name.as_str().len() + 7, 1),
            };
            Mark { x, y, r, width: letters as f64 * LETTER, height: lines as f64 * LINE }
        };
        let marks: Vec<Mark> = places.iter().enumerate().map(mark).collect();
        let words = labels(&marks, &view);
        let mut out = format!(
            "<svg viewBox='0 0 {WIDTH} {}' role='img' aria-label='Map of the networks and client regions; below it stands what is where.'>{}<g class='flows'></g>",
            view.height,
            view.graticule()
        );
        let (networks, regions) = marks.split_at(fleet.networks.len());
        let mut names = String::new();
        // Writing to a String cannot fail.
        for (i, (r, m)) in fleet.regions.iter().zip(regions).enumerate() {
            let (x, y, name) = (m.x, m.y, escape(r.name.as_str()));
            let _ = write!(
                out,
                "<g class='region s{}' data-x='{x:.1}' data-y='{y:.1}'><circle class='crowd' cx='{x:.1}' cy='{y:.1}' r='0'/><circle class='demand' cx='{x:.1}' cy='{y:.1}' r='0'/><circle class='core' cx='{x:.1}' cy='{y:.1}' r='{REGION}'/></g>",
                i % COLORS
            );
            let area = words[networks.len() + i];
            let _ = write!(
                names,
                "<text class='place' {} y='{:.1}'>{name} <tspan class='rate'></tspan></text>",
                m.anchored(area),
                area.1 + BASE
            );
        }
        for (i, (n, m)) in fleet.networks.iter().zip(networks).enumerate() {
            let _ = write!(
                out,
                "<rect class='network' data-x='{0:.1}' data-y='{1:.1}' x='{2:.1}' y='{3:.1}' width='{4}' height='{4}' rx='3'/>",
                m.x,
                m.y,
                m.x - NETWORK,
                m.y - NETWORK,
                2.0 * NETWORK
            );
            let (x, top) = (m.anchored(words[i]), words[i].1 + BASE);
            let _ = write!(names, "<text class='label' {x} y='{top:.1}'>{}</text>", escape(n.name.as_str()));
            for (s, y) in fleet.services.iter().zip(1..).map(|(s, k)| (s, top + LINE * f64::from(k))) {
                let _ = write!(names, "<text class='held' {x} y='{y:.1}'>{}</text>", escape(s.name.as_str()));
            }
        }
        out + &names + "</svg>"
    }

    /// What the script needs to know.
    fn plays(&self) -> Value {
        let fleet = &self.scenario.fleet;
        let crowds = self.scenario.crowds.iter().filter_map(|c| {
            let region = fleet.regions.iter().position(|r| r.name == c.region)?;
            let of_play = |at: Time| seconds(at.since(Time(0)));
            Some(json!({ "region": region, "from_s": of_play(crowd::onset(c)), "to_s": of_play(crowd::end(c)) }))
        });
        json!({
            "length_s": self.scenario.length_s,
            "services": fleet.services.iter().map(|s| &s.name).collect::<Vec<_>>(),
            "networks": fleet.networks.iter().map(|n| &n.name).collect::<Vec<_>>(),
            "crowds": crowds.collect::<Vec<_>>(),
            "decisions": self.decided.iter().map(|d| seconds(d.plan.at.since(Time(0)))).collect::<Vec<_>>(),
            "frames": self.frames(),
        })
    }

    /// When there is a frame: evenly, and when something was decided or changed; of too many such moments, some.
    fn times(&self) -> BTreeSet<Time> {
        let end = Time(0) + self.length;
        let mut times: BTreeSet<Time> =
            (0..=STEPS).map(|k| Time((u128::from(end.0) * u128::from(k) / u128::from(STEPS)) as u64)).collect();
        let decided = self.recording.decisions.iter().map(|d| d.plan.at);
        let changed = self.recording.instances.iter().map(|i| i.at);
        let moments: BTreeSet<Time> = decided.chain(changed).filter(|at| *at <= end && !times.contains(at)).collect();
        let room = FRAMES_MAX - times.len();
        times.extend(moments.iter().step_by(moments.len().div_ceil(room).max(1)));
        times
    }

    fn look_back(&self) -> Span {
        Span(self.length.0 / STEPS).clamp(LOOK_BACK.0, LOOK_BACK.1)
    }

    fn frames(&self) -> Vec<Frame> {
        let fleet = &self.scenario.fleet;
        let networks: BTreeMap<&NetworkId, usize> = fleet.networks.iter().map(|n| &n.name).zip(0..).collect();
        let regions: BTreeMap<&RegionId, usize> = fleet.regions.iter().map(|r| &r.name).zip(0..).collect();
        let mut serving: BTreeMap<&ServiceId, &BTreeMap<NetworkId, u32>> = BTreeMap::new();
        let mut changes = self.recording.instances.iter().peekable();
        let decisions = &self.recording.decisions;
        let look_back = self.look_back();
        let frame = |at: Time| {
            while let Some(change) = changes.next_if(|c| c.at <= at) {
                serving.insert(&change.service, &change.serving);
            }
            let newest = decisions[..decisions.partition_point(|d| d.plan.at <= at)].last();
            let held = |n: &NetworkId, s: &ServiceId| match serving.get(s).and_then(|at| at.get(n)) {
                Some(instances) if *instances > 0 => Held::Active(*instances),
                _ => newest.map_or(Held::Absent, |d| wanted(d, s, n, at)),
            };
            // The first frames have little to look back on: they show how it begins.
            let to = at.max(Time(0) + look_back.min(self.length));
            let requests = &self.recording.requests;
            let begun = |t: Time| requests.partition_point(|r| r.at < t);
            let within = &requests[begun(to - look_back)..begun(to)];
            let of = |r: &Request| regions.get(&r.region).copied();
            let answered = within.iter().filter(|r| r.failed.is_none());
            let window = look_back.min(self.length).as_secs_f64();
            let rates = |counts: &dyn Fn(&Request) -> bool| -> Vec<f64> {
                let mut n = vec![0_u64; regions.len()];
                within.iter().filter(|r| counts(r)).filter_map(of).for_each(|region| n[region] += 1);
                n.into_iter().map(|n| hundredths(n as f64 / window)).collect()
            };
            Frame {
                at_s: seconds(at.since(Time(0))),
                held: fleet
                    .networks
                    .iter()
                    .map(|n| fleet.services.iter().map(|s| held(&n.name, &s.name)).collect())
                    .collect(),
                demand: rates(&|_| true),
                failed: rates(&|r| r.failed.is_some()),
                served: shares(answered.filter_map(|r| Some((of(r)?, *networks.get(r.network.as_ref()?)?)))),
            }
        };
        self.times().into_iter().map(frame).collect()
    }
}

/// What a network that serves nothing of a service has of it, by the newest decision.
fn wanted(newest: &Decision, service: &ServiceId, network: &NetworkId, at: Time) -> Held {
    let fetches =
        newest.plan.moves.iter().any(|m| m.action == Action::Stage && m.service == *service && m.network == *network);
    match newest.plan.target.share(service, network) {
        None => Held::Absent,
        Some(Share::Active(_)) => Held::Resuming,
        Some(Share::Dormant) if fetches && newest.done_at.is_none_or(|done| done > at) => Held::Staging,
        Some(Share::Dormant) => Held::Dormant,
    }
}

/// Of each region's answers, the part that each network gave.
fn shares(answered: impl Iterator<Item = (usize, usize)>) -> Vec<(usize, usize, f64)> {
    let (mut all, mut by): (BTreeMap<usize, u64>, BTreeMap<(usize, usize), u64>) = Default::default();
    for (region, network) in answered {
        *all.entry(region).or_default() += 1;
        *by.entry((region, network)).or_default() += 1;
    }
    by.into_iter().map(|((r, n), part)| (r, n, hundredths(part as f64 / all[&r] as f64))).collect()
}

fn hundredths(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// JSON as it may stand in a script element. What is replaced can only occur within its strings.
fn island(value: &Value) -> String {
    value.to_string().replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

#[cfg(test)]
mod tests;
