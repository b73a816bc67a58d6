//! The forecast of the next hours, beside simpler ones.

use super::rounded;
use anyhow::Result;
use serde_json::{Value, json};
use vmatrix_cpa_core::season::Season;
use vmatrix_model::Span;
use vmatrix_replay::trace::{Crowd, Kind, Trace, generate};

/// Distances told, hours.
const AHEAD: [usize; 5] = [1, 3, 6, 12, 24];
/// Hours that all have to learn from: a week and a day.
const LEARNING: usize = 8 * 24;
const DAYS: u32 = 42;

/// Errors on the recorded trace, if there is one, and on generated ones.
pub fn measure(recorded: Option<&Trace>, quick: bool) -> Result<Vec<Value>> {
    let seeds = if quick { 1..=1 } else { 1..=3 };
    let kinds = [Kind::Diurnal, Kind::Flash(Crowd::SUDDEN), Kind::Stock, Kind::Sport, Kind::Swell];
    let generated = kinds.into_iter().flat_map(|k| seeds.clone().map(move |s| generate(k, s, DAYS)));
    recorded.cloned().into_iter().chain(generated).map(|t| errors(&t)).collect()
}

/// One way to forecast: what it says of the next hours after those given.
type Forecast<'a> = (&'static str, Box<dyn FnMut(&[u64]) -> Vec<u64> + 'a>);

fn errors(trace: &Trace) -> Result<Value> {
    let hours = trace.resample(Span::secs(3600))?.counts;
    // The last hour may be a part of one.
    let hours = hours.get(..(trace.length().0 / 3_600_000_000) as usize).unwrap_or(&hours);
    let mut season = Season::default();
    let mut known = 0;
    let ours = move |past: &[u64]| {
        past.iter().skip(known).for_each(|h| season.push(*h));
        known = past.len();
        season.forecast(24)
    };
    let ways: [Forecast; 4] = [
        ("last value", Box::new(|past| vec![past.last().copied().unwrap_or(0); 24])),
        ("yesterday", Box::new(|past| past.get(past.len() - 24..).unwrap_or(&[]).to_vec())),
        ("three days x ratio", Box::new(profile)),
        ("season", Box::new(ours)),
    ];
    let rows = ways.into_iter().map(|(name, mut way)| row(hours, name, &mut way));
    Ok(json!({"trace": trace.name, "hours": hours.len(), "rows": rows.collect::<Vec<Value>>()}))
}

/// The mean of the same hour of three days, times the last hour's ratio to its own, of which a tenth is gone each hour.
fn profile(past: &[u64]) -> Vec<u64> {
    let mean = |hour: usize, known: usize| {
        let days = (1..=3).filter_map(|d| past.get(..known)?.get(hour.checked_sub(24 * d)?));
        let (sum, n) = days.fold((0, 0), |(sum, n), h| (sum + h, n + 1));
        sum as f64 / f64::from(n.max(1))
    };
    let last = past.len() - 1;
    let ratio = (past[last] as f64 + 1.0) / (mean(last, last) + 1.0);
    let of = |ahead: i32| mean(last + ahead as usize, past.len()) * ratio.powf(0.9_f64.powi(ahead));
    (1..=24).map(|ahead| of(ahead) as u64).collect()
}

/// Mean errors in hundredths: of each hour's requests, and of all requests together.
fn row(hours: &[u64], name: &str, way: &mut dyn FnMut(&[u64]) -> Vec<u64>) -> Value {
    let mut sums = [(0.0, 0_u32, 0.0, 0.0); AHEAD.len()];
    for known in LEARNING..hours.len().saturating_sub(24) {
        let forecast = way(&hours[..known]);
        for (ahead, sum) in AHEAD.iter().zip(&mut sums) {
            let (came, said) = (hours[known + ahead - 1] as f64, forecast.get(ahead - 1).copied().unwrap_or(0) as f64);
            let off = (came - said).abs();
            *sum = (sum.0, sum.1, sum.2 + off, sum.3 + came);
            // Of no requests no error is a part.
            if came > 0.0 {
                *sum = (sum.0 + off / came, sum.1 + 1, sum.2, sum.3);
            }
        }
    }
    let (of_each, of_all): (Vec<f64>, Vec<f64>) = sums
        .iter()
        .map(|s| (rounded(100.0 * s.0 / f64::from(s.1.max(1))), rounded(100.0 * s.2 / s.3.max(1.0))))
        .unzip();
    json!({
        "forecast": name,
        "hours_ahead": AHEAD,
        "mean_error_percent": of_each,
        "error_of_all_percent": of_all,
    })
}
