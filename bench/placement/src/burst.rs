//! Bursts: how soon recorded ones are seen, and how often one is seen that is none. And the next hours' forecast.
//!
//! ```text
//! WorldCup98 by the minute ─▶ rate by the second ─▶ Poisson requests ─▶ Usual, Watch (as the CPA has them) ─▶ firings
//!          └▶ its eleven bursts ─▶ the second at which each reaches twice the usual: its mark ─┴▶ delays
//! ```
//!
//! What is assumed, for the recorded trace has no seconds and no places: within minutes, the rate is the slope of the
//! monotone cubic through the sums so far (Fritsch and Carlson's), so it is continuous, never negative, and each
//! minute keeps its requests; requests of a second are Poisson of that rate, with ten seeds; and all of it comes from
//! one region. The minutes from 06:31 to 06:45 on 12 May 1998, an artefact, are replaced as [`Trace::mask`] does it.
//!
//! A burst is what [`Trace::describe`] calls one: five minutes of 2.5 times the mean of the hour that ended ten minutes
//! before. Its mark is the first second, in the quarter of an hour that the definition looks at, with twice that mean.
//! It is seen in time if a crowd is on at the mark or begins within ten seconds of it. A firing is outside if it is in
//! no burst's time, which ends three hours after the burst does; it is false if no minute from the one before to ten
//! minutes after has twice the mean of the hour that ended ten minutes before it.

mod absorb;
mod ahead;
mod play;

use anyhow::{Context, Result};
use play::{Firing, Rates, play};
use serde_json::{Value, json};
use std::path::Path;
use vmatrix_replay::trace::{self, Trace};

/// Where the recorded trace is, in the folder of recorded data.
pub const TRACE: &str = "worldcup98/invocation_count_per_min.csv.gz";
const SEEDS: u64 = 10;
const WEEK_S: f64 = 7.0 * 86_400.0;
/// The goals.
const IN_TIME_S: i64 = 10;
const SEEN: usize = 10;
const FALSE_A_WEEK: f64 = 3.0;
/// Minutes of the usual, and between it and now: as [`Trace::describe`] has them.
const USUAL: usize = 60;
const GROWTH: usize = 10;
const NOW: usize = 5;
const APART: u64 = 3 * 3600;

/// Measures both; without recorded data only what is generated.
pub fn measure(data: Option<&Path>, quick: bool) -> Result<Value> {
    let recorded = data.map(|d| d.join(TRACE)).filter(|p| p.exists()).map(|p| worldcup(&p)).transpose()?;
    let seeds = if quick { 1 } else { SEEDS };
    let bursts = recorded.as_ref().map(|t| bursts(t, seeds));
    let ends: Vec<Value> = play::RATES.iter().map(|rate| ends(*rate, if quick { 1 } else { 5 })).collect();
    let mut value = json!({
        "trace": recorded.as_ref().map(|t| t.name.clone()),
        "seeds": (1..=seeds).collect::<Vec<u64>>(),
        "assumed": "seconds are Poisson of a monotone cubic's slope through the minutes' sums; one region",
        "rates": ends,
        "forecast": ahead::measure(recorded.as_ref(), quick)?,
    });
    let mut goals = vec![];
    if let Some(bursts) = bursts {
        let goal = |what: &str, wanted: Value, seen: Value, met: bool| json!({"what": what, "wanted": wanted, "seen": seen, "met": met});
        goals.push(goal(
            "bursts of WorldCup98 seen within 10 s of the 2x mark, worst seed",
            json!(SEEN),
            json!(bursts.seen_least),
            bursts.seen_least >= SEEN,
        ));
        goals.push(goal(
            "false firings a week, worst seed",
            json!(FALSE_A_WEEK),
            json!(bursts.false_most),
            bursts.false_most <= FALSE_A_WEEK,
        ));
        value["bursts"] = bursts.value;
    }
    value["absorbed"] = absorb::measure(quick, &mut goals)?;
    value["goals"] = goals.into();
    Ok(value)
}

/// The recorded trace, without its artefact.
pub fn worldcup(path: &Path) -> Result<Trace> {
    let trace = trace::read(path)?;
    let time = |text| trace::time(text).context("a time of the mask");
    Ok(trace.mask(time("1998-05-12 06:31:00")?, time("1998-05-12 06:45:00")?)?.0)
}

/// A burst of the trace, in seconds since its beginning.
struct Event {
    from: i64,
    usual: u64,
    mark: u64,
    /// From when to when firings are its.
    own: (u64, u64),
}

fn events(trace: &Trace, rates: &Rates) -> Vec<Event> {
    let second = |at: i64| at.saturating_sub(trace.begins).max(0).unsigned_abs();
    let all = trace.describe().bursts.unwrap_or_default();
    let event = |b: trace::Burst| {
        let step = trace.step.0 / 1_000_000;
        let (from, end) = (second(b.from).saturating_sub((GROWTH + NOW - 1) as u64 * step), second(b.from) + step);
        let twice = |s: &u64| rates.at(*s) * step as f64 >= 2.0 * b.usual as f64;
        let mark = (from..end).find(twice).unwrap_or(end);
        Event { from: b.from, usual: b.usual, mark, own: (from, second(b.to) + APART) }
    };
    all.into_iter().map(event).collect()
}

/// What a firing came to: the highest minute around it, in times the usual.
fn height(counts: &[u64], firing: &Firing) -> f64 {
    let minute = (firing.from / 60) as usize;
    let before = minute.saturating_sub(GROWTH);
    let usual = counts.get(before.saturating_sub(USUAL)..before).unwrap_or(&[]);
    let mean = usual.iter().sum::<u64>() as f64 / usual.len().max(1) as f64;
    let around = counts.iter().skip(minute.saturating_sub(1)).take(GROWTH + 2);
    around.max().copied().unwrap_or(0) as f64 / mean.max(1.0)
}

struct Bursts {
    value: Value,
    seen_least: usize,
    false_most: f64,
}

fn bursts(trace: &Trace, seeds: u64) -> Bursts {
    let rates = Rates::new(trace.counts.iter().map(|c| *c as f64).collect());
    let events = events(trace, &rates);
    let weeks = rates.seconds() as f64 / WEEK_S;
    let mut delays: Vec<Vec<Option<i64>>> = vec![vec![]; events.len()];
    let (mut seen, mut outside, mut untrue, mut small, mut judging) = (vec![], vec![], vec![], vec![], vec![]);
    let mut noted = vec![];
    for seed in 1..=seeds {
        let played = play(&rates, seed, "worldcup98", |_| 1.0);
        let delays_now: Vec<Option<i64>> = events.iter().map(|e| delay(e, &played.firings)).collect();
        seen.push(delays_now.iter().filter(|d| d.is_some_and(|d| d <= IN_TIME_S)).count());
        delays.iter_mut().zip(delays_now).for_each(|(all, one)| all.push(one));
        let others = played.firings.iter().filter(|f| events.iter().all(|e| !(e.own.0..e.own.1).contains(&f.from)));
        let others: Vec<(&Firing, f64)> = others.map(|f| (f, height(&trace.counts, f))).collect();
        let a_week = |below: f64| others.iter().filter(|(_, h)| *h < below).count() as f64 / weeks;
        outside.push(a_week(f64::INFINITY));
        untrue.push(a_week(2.0));
        small.push(a_week(1.5));
        judging.push(played.cpu.as_nanos() as f64 / rates.seconds() as f64);
        if seed == 1 {
            let note = |(f, h): &(&Firing, f64)| json!({"at": trace::time_of(trace.begins + f.from as i64), "height": rounded(*h)});
            noted = others.iter().map(note).collect();
        }
    }
    let rows: Vec<Value> = events.iter().zip(&delays).map(|(e, d)| row(trace, e, d)).collect();
    let (most, least) = (untrue.iter().copied().fold(0.0, f64::max), seen.iter().min().copied().unwrap_or(0));
    let spread =
        |v: &[f64]| json!({"median": rounded(median(v)), "worst": rounded(v.iter().copied().fold(0.0, f64::max))});
    let value = json!({
        "events": rows,
        "seen_in_time": {"of": events.len(), "median": median(&seen.iter().map(|s| *s as f64).collect::<Vec<_>>()), "worst": least},
        "firings_a_week": {"outside": spread(&outside), "false": spread(&untrue), "below_1.5": spread(&small)},
        "outside_of_first_seed": noted,
        "cpu_ns_per_second_judged": rounded(median(&judging)),
    });
    Bursts { value, seen_least: least, false_most: rounded(most) }
}

/// Seconds from the mark to the beginning of the crowd that was on then, or began first afterwards.
fn delay(event: &Event, firings: &[Firing]) -> Option<i64> {
    let firing = firings.iter().find(|f| f.to > event.mark && f.from < event.own.1)?;
    Some(firing.from as i64 - event.mark as i64)
}

fn row(trace: &Trace, event: &Event, delays: &[Option<i64>]) -> Value {
    let known: Vec<f64> = delays.iter().flatten().map(|d| *d as f64).collect();
    json!({
        "from": trace::time_of(event.from),
        "usual_per_minute": event.usual,
        "mark": trace::time_of(trace.begins + event.mark as i64),
        "seen": format!("{} of {}", known.len(), delays.len()),
        "delay_s": {"median": median(&known), "worst": known.iter().copied().fold(f64::MIN, f64::max)},
    })
}

/// One usual rate, generated: a day's curve of three to one and minutes that wander by a tenth, and every six hours a
/// crowd of twice or of four times for ten minutes.
fn ends(rate: f64, weeks: u64) -> Value {
    let (mut untrue, mut seconds) = (0, 0);
    let mut delays: [Vec<f64>; 2] = Default::default();
    let mut crowds = [0_usize; 2];
    for seed in 1..=weeks {
        let rates = play::week(rate, seed);
        let played = play(&rates, seed, "rates", play::crowd);
        seconds += rates.seconds();
        for (times, from) in play::crowds(rates.seconds()) {
            let kind = usize::from(times > 3.0);
            crowds[kind] += 1;
            let seen = played.firings.iter().find(|f| f.to > from && f.from < from + play::CROWD_S);
            delays[kind].extend(seen.map(|f| f.from as f64 - from as f64 + 1.0));
        }
        let own = |f: &&Firing| {
            play::crowds(rates.seconds()).any(|(_, from)| (from..from + 2 * play::CROWD_S).contains(&f.from))
        };
        untrue += played.firings.len() - played.firings.iter().filter(own).count();
    }
    let told = |kind: usize| {
        json!({
            "seen": format!("{} of {}", delays[kind].len(), crowds[kind]),
            "delay_s": {"median": median(&delays[kind]), "p90": at(&delays[kind], 0.9)},
        })
    };
    json!({
        "requests_per_second": rate,
        "weeks": weeks,
        "false_a_week": rounded(untrue as f64 * WEEK_S / seconds as f64),
        "twice": told(0),
        "four_times": told(1),
    })
}

fn median(values: &[f64]) -> f64 {
    at(values, 0.5)
}

/// The value below which such a part of all are; 0 of none.
fn at(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * part).round() as usize).copied().unwrap_or(0.0)
}

/// With two digits behind the point.
fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Option<std::path::PathBuf> {
        std::env::var_os("VMATRIX_DATA").map(std::path::PathBuf::from)
    }

    #[test]
    fn the_quick_form_has_all_figures() {
        let data = data();
        let value = measure(data.as_deref(), true).unwrap();
        assert_eq!(value["rates"].as_array().unwrap().len(), play::RATES.len());
        assert!(value["forecast"].as_array().unwrap().len() >= 5);
        if data.is_some() {
            assert_eq!(value["bursts"]["events"].as_array().unwrap().len(), 11);
            assert_eq!(value["goals"].as_array().unwrap().len(), 4);
            // How soon a crowd is absorbed takes more seeds than one.
            for goal in value["goals"].as_array().unwrap().iter().take(2) {
                assert_eq!(goal["met"], true, "{goal}");
            }
        } else {
            eprintln!("NOT TESTED on WorldCup98: VMATRIX_DATA does not name the folder of recorded data");
        }
    }
}
