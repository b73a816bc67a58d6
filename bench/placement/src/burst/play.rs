//! Seconds from minutes, requests from seconds, and the detector as the CPA runs it.

use crate::cpu;
use std::time::Duration;
use vmatrix_cpa_core::burst::{Change, Watch};
use vmatrix_cpa_core::forecast::{SLOT, Usual};
use vmatrix_model::Time;
use vmatrix_replay::chance::Chance;

/// Requests a second of the generated weeks.
pub const RATES: [f64; 6] = [0.2, 1.0, 10.0, 100.0, 1_000.0, 5_000.0];
/// How long a generated crowd stays, and from one to the next, alternately of twice and of four times.
pub const CROWD_S: u64 = 600;
const EVERY_S: u64 = 6 * 3600;

/// Expected requests of each second, from those of each minute.
pub struct Rates {
    minutes: Vec<f64>,
    /// What a second's share is of the slope at its minute's beginning, of the minute, of the slope at its end.
    shares: [[f64; 3]; 60],
}

impl Rates {
    pub fn new(minutes: Vec<f64>) -> Rates {
        // Hermite's basis, of which a second has the difference between its end and its beginning.
        let basis = |x: f64| [x * x * x - 2.0 * x * x + x, 3.0 * x * x - 2.0 * x * x * x, x * x * x - x * x];
        let share = |s: usize| {
            let (from, to) = (basis(s as f64 / 60.0), basis((s + 1) as f64 / 60.0));
            std::array::from_fn(|i| to[i] - from[i])
        };
        Rates { minutes, shares: std::array::from_fn(share) }
    }

    pub fn seconds(&self) -> u64 {
        self.minutes.len() as u64 * 60
    }

    /// Expected requests of a second; the last minute's after the end.
    pub fn at(&self, second: u64) -> f64 {
        let minute = (second / 60) as usize;
        let of = |m: usize| self.minutes.get(m).or(self.minutes.last()).copied().unwrap_or(0.0);
        let (before, own, after) = (of(minute.saturating_sub(1)), of(minute), of(minute + 1));
        // At most twice the lesser of both: with that the cubic has no slope below zero.
        let slope = |a: f64, b: f64| if a * b > 0.0 { 2.0 * a * b / (a + b) } else { 0.0 };
        let [first, whole, last] = self.shares[(second % 60) as usize];
        (slope(before, own) * first + own * whole + slope(own, after) * last).max(0.0)
    }
}

/// A crowd that was noticed, in whole seconds that had passed when it was, and when its end was.
pub struct Firing {
    pub from: u64,
    pub to: u64,
}

pub struct Played {
    pub firings: Vec<Firing>,
    /// CPU time of the detector alone.
    pub cpu: Duration,
}

/// Plays the requests of a seed through the detector; `times` is by what a second's rate is multiplied.
pub fn play(rates: &Rates, seed: u64, name: &str, times: impl Fn(u64) -> f64) -> Played {
    let mut chance = Chance::named(seed, &["bursts", name]);
    let (mut region, mut played) = (Region::default(), Played { firings: vec![], cpu: Duration::ZERO });
    let mut second = 0;
    while second < rates.seconds() {
        // An hour at a time, so that drawing the requests is not measured.
        let hour: Vec<u64> = (second..(second + 3600).min(rates.seconds()))
            .map(|s| poisson(rates.at(s) * times(s), &mut chance))
            .collect();
        let begun = cpu();
        for requests in hour {
            second += 1;
            match region.second(second, requests) {
                Change::Began(_) => played.firings.push(Firing { from: second, to: u64::MAX }),
                Change::Ended | Change::Settled(_) => {
                    played.firings.iter_mut().rev().take(1).for_each(|f| f.to = second)
                }
                Change::None => {}
            }
        }
        played.cpu += cpu().saturating_sub(begun);
    }
    played
}

/// One region's demand for one service, judged and learned as `Cpa::watch` and `Cpa::close_slot` do it.
#[derive(Default)]
struct Region {
    usual: Usual,
    watch: Watch,
    slot: u64,
}

impl Region {
    fn second(&mut self, second: u64, requests: u64) -> Change {
        let now = Time(second * 1_000_000);
        let change =
            if self.usual.known() { self.watch.second(now, requests, self.usual.rate()) } else { Change::None };
        if let Change::Settled(level) = change {
            self.usual.become_usual(level);
        }
        self.slot += requests;
        if second.is_multiple_of(SLOT.0 / 1_000_000) {
            let calm = self.watch.calm_since.is_none_or(|t| now.since(t) > SLOT);
            if calm && self.watch.crowd().is_none() {
                self.usual.learn(self.slot);
            }
            self.slot = 0;
        }
        change
    }
}

/// A week of minutes about `rate` requests a second: a day's curve from half to one and a half times, and a wander of a
/// tenth whose half is forgotten in a quarter of an hour.
pub fn week(rate: f64, seed: u64) -> Rates {
    let mut chance = Chance::named(seed, &["bursts", "week"]);
    let mut wander = 0.0;
    let minute = |m: u32| {
        let kept = 0.5_f64.powf(1.0 / 15.0);
        wander = kept * wander + (1.0 - kept * kept).sqrt() * normal(&mut chance);
        let day = 1.0 + 0.5 * (f64::from(m) / 1440.0 * std::f64::consts::TAU).sin();
        60.0 * rate * day * (1.0 + 0.1 * wander).max(0.1)
    };
    Rates::new((0..7 * 1440).map(minute).collect())
}

/// When crowds begin in a generated week, and how many times the usual they are. The first six hours have none.
pub fn crowds(seconds: u64) -> impl Iterator<Item = (f64, u64)> {
    (1..seconds / EVERY_S).map(|i| (if i % 2 == 0 { 2.0 } else { 4.0 }, i * EVERY_S))
}

/// By what a second of a generated week is multiplied.
pub fn crowd(second: u64) -> f64 {
    let (number, into) = (second / EVERY_S, second % EVERY_S);
    if number == 0 || into >= CROWD_S {
        1.0
    } else if number % 2 == 0 {
        2.0
    } else {
        4.0
    }
}

/// Nearly normal: the sum of twelve even numbers.
fn normal(chance: &mut Chance) -> f64 {
    (0..12).map(|_| chance.fraction()).sum::<f64>() - 6.0
}

/// A Poisson number: by Knuth's product where the mean is small, else by Hörmann's transformed rejection (PTRS, 1993).
fn poisson(mean: f64, chance: &mut Chance) -> u64 {
    if mean < 16.0 {
        let (limit, mut product, mut n) = ((-mean).exp(), chance.fraction(), 0);
        while product > limit {
            product *= chance.fraction();
            n += 1;
        }
        return n;
    }
    let b = 0.931 + 2.53 * mean.sqrt();
    let a = -0.059 + 0.024_83 * b;
    let (squeeze, height) = (0.9277 - 3.6224 / (b - 2.0), 1.1239 + 1.1328 / (b - 3.4));
    loop {
        let (u, v) = (chance.fraction() - 0.5, chance.fraction());
        let edge = 0.5 - u.abs();
        let k = ((2.0 * a / edge + b) * u + mean + 0.43).floor();
        if edge >= 0.07 && v <= squeeze {
            return k as u64;
        }
        if k < 0.0 || edge <= 0.0 || (edge < 0.013 && v > edge) {
            continue;
        }
        if (v * height / (a / (edge * edge) + b)).ln() <= k * mean.ln() - mean - ln_factorial(k) {
            return k as u64;
        }
    }
}

/// ln k!, by Stirling's series from ten on.
fn ln_factorial(k: f64) -> f64 {
    if k < 10.0 {
        return (2..=k as u32).map(|i| f64::from(i).ln()).sum();
    }
    k * k.ln() - k + 0.5 * (std::f64::consts::TAU * k).ln() + 1.0 / (12.0 * k) - 1.0 / (360.0 * k * k * k)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_keeps_its_requests_and_no_second_has_less_than_none() {
        let minutes = vec![100.0, 110.0, 900.0, 0.0, 0.0, 50.0, 49.0, 51.0];
        let rates = Rates::new(minutes.clone());
        for (m, requests) in minutes.iter().enumerate() {
            let seconds: Vec<f64> = (0..60).map(|s| rates.at(m as u64 * 60 + s)).collect();
            assert!((seconds.iter().sum::<f64>() - requests).abs() < 1e-6, "minute {m}");
            assert!(seconds.iter().all(|s| *s >= 0.0));
        }
    }

    #[test]
    fn drawn_numbers_have_the_mean_and_the_variance_of_poisson() {
        let mut chance = Chance::named(1, &["poisson"]);
        for mean in [0.2, 5.0, 15.9, 16.0, 40.0, 5_000.0] {
            let drawn: Vec<f64> = (0..200_000).map(|_| poisson(mean, &mut chance) as f64).collect();
            let seen = drawn.iter().sum::<f64>() / drawn.len() as f64;
            let variance = drawn.iter().map(|n| (n - seen) * (n - seen)).sum::<f64>() / drawn.len() as f64;
            assert!((seen - mean).abs() < 5.0 * (mean / 200_000.0).sqrt(), "{seen} of {mean}");
            assert!((variance / mean - 1.0).abs() < 0.03, "{variance} at {mean}");
        }
    }
}
