//! How large a world one service's placement takes in, how fast, and how near the best possible it is shown to be.
//!
//! ```text
//!  worlds (1k, 3k, 10k networks; 10 prefixes each) × kinds × latency weights × seeds ─▶ full replan: CPU, gap
//!  the largest ─▶ 1,000 services on two threads: wall, CPU, memory    └▶ crowds: CPU of a tick, placements a second
//! ```
//! A placement is one prefix for which it was decided who serves it, the same network as before or another one.

mod worlds;

use crate::cpu;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmatrix_cpa_core::greedy::{Demand, Flash, Placed, Prices, certify, place, tighten};
use vmatrix_model::MicroUsd;
use vmatrix_replay::chance::Chance;
use worlds::{Atlas, Kind, World};

/// Candidates of each prefix, and prefixes for each network: the goal's sizes.
const CANDIDATES: usize = 32;
const PREFIXES_PER_NETWORK: usize = 10;
/// Requests an hour of all prefixes together, about: 28,000 a second.
const REQUESTS: f64 = 1e8;
/// What a second that a request waits is worth, micro-dollars: that of the other benchmarks (20: 2·10^-8 $ a
/// millisecond), a tenth of it, and so much that hundreds of networks open.
const WEIGHTS: [i64; 4] = [2, 20, 200, 2000];
const SEEDS: [u64; 3] = [1, 2, 3];
/// Resuming costs 0.002 $ and is borne by one hour.
const RESUME: MicroUsd = MicroUsd(2_000);
/// Networks a tick may open: what a fleet can wake at once, far above what a crowd of 1 % asks for.
const OPENINGS_MAX: usize = 1000;
/// How much a crowd's demand grows.
const CROWD: u64 = 20;

/// Measures everything in this file.
///
/// # Errors
/// The recorded data cannot be read, or a placement is refused.
pub fn measure(data: Option<&Path>, quick: bool) -> Result<Value> {
    let atlas = Atlas::new(data, SEEDS[0])?;
    let sizes: &[usize] = if quick { &[100, 300] } else { &[1000, 3000, 10_000] };
    let seeds = if quick { &SEEDS[..1] } else { &SEEDS };
    let largest = sizes[sizes.len() - 1];
    let (mut rows, mut ticks, mut services) = (Vec::new(), Vec::new(), Value::Null);
    for &networks in sizes {
        for kind in [Kind::Nearest, Kind::Origin, Kind::Pair] {
            // No city stands out where every pair is drawn: one seed tells what there is to tell.
            let seeds = if kind == Kind::Pair { &seeds[..1] } else { seeds };
            for &seed in seeds {
                let world = atlas.world(kind, networks, networks * PREFIXES_PER_NETWORK, CANDIDATES, seed)?;
                for weight in WEIGHTS {
                    rows.push(replan(&world, kind, weight, seed)?);
                    if networks == largest {
                        ticks.push(crowds(&world, kind, weight, seed, if quick { 10 } else { 200 })?);
                    }
                }
                if networks == largest && kind == Kind::Nearest && seed == seeds[0] {
                    services = many(&world, if quick { 20 } else { 1000 })?;
                }
            }
        }
    }
    let at_largest = |kind: Kind, key: &str| {
        let of_kind = rows.iter().filter(|r| r["networks"] == largest && r["kind"] == format!("{kind:?}"));
        worst(of_kind, key)
    };
    let per_edge = |networks: usize| {
        let of_size = rows.iter().filter(|r| r["networks"] == networks);
        let (count, sum) = of_size.fold((0.0, 0.0), |(n, s), r| (n + 1.0, s + number(r, "cpu_ms")));
        sum / count / networks as f64
    };
    let growth = per_edge(largest) / per_edge(sizes[0]);
    let goal = |what: &str, wanted: f64, seen: f64, most: bool| json!({ "what": what, "wanted": wanted, "seen": seen, "met": if most { seen <= wanted } else { seen >= wanted } });
    let goals = [
        goal(
            "full replan with its first bound, CPU ms, worst row, an origin",
            50.0,
            at_largest(Kind::Origin, "cpu_ms"),
            true,
        ),
        goal("the same, no origin", 50.0, at_largest(Kind::Nearest, "cpu_ms"), true),
        goal("the same, no two prefixes alike", 50.0, at_largest(Kind::Pair, "cpu_ms"), true),
        goal(
            "gap after a second look, percent, worst row, an origin",
            2.0,
            at_largest(Kind::Origin, "gap_percent"),
            true,
        ),
        goal("the same, no origin", 2.0, at_largest(Kind::Nearest, "gap_percent"), true),
        goal("the same, no two prefixes alike", 2.0, at_largest(Kind::Pair, "gap_percent"), true),
        goal("all services, wall s", 30.0, number(&services, "wall_s"), true),
        goal("all services, memory MiB", 4096.0, number(&services, "peak_mib"), true),
        goal("tick, p99 CPU ms, worst row", 1.0, worst(ticks.iter(), "p99_ms"), true),
        goal("placements a second, worst row", 50_000.0, least(ticks.iter(), "placements_per_s"), false),
        goal("CPU a network, largest world / smallest", 2.0, growth, true),
    ];
    Ok(json!({
        "data": atlas.source, "seeds": seeds, "weights_microusd_per_second": WEIGHTS, "quick": quick,
        "rows": rows, "services": services, "ticks": ticks, "goals": goals,
    }))
}

/// Full replans of one service in a world: the median CPU time of five, cold and warm, and what is proven.
fn replan(world: &World, kind: Kind, weight: i64, seed: u64) -> Result<Value> {
    let (demand, prices) = service(world, weight, seed, 0);
    let timed = |demand: &Demand, warm: Option<&Placed>| -> Result<(f64, Placed)> {
        let mut times = Vec::new();
        let mut placed = Placed::default();
        for _ in 0..5 {
            let began = cpu();
            placed = place(&world.graph, demand, &prices, warm)?;
            times.push(ms(cpu() - began));
        }
        Ok((quantile(&mut times, 0.5), placed))
    };
    let (cold_ms, placed) = timed(&demand, None)?;
    let began = cpu();
    let tight = tighten(&world.graph, &demand, &prices, &placed)?;
    let tighten_ms = ms(cpu() - began);
    for said in [&placed, &tight] {
        let proven = certify(&world.graph, &demand, &prices, &said.levels)?;
        anyhow::ensure!(proven == said.bound, "the bids prove {proven:?}, and {:?} was said", said.bound);
    }
    // An hour later: every prefix asks up to a fifth more or less.
    let mut chance = Chance::named(seed, &["later"]);
    let later = Demand { weights: demand.weights.iter().map(|w| w * (80 + chance.under(41)) / 100).collect() };
    let (warm_ms, warm) = timed(&later, Some(&tight))?;
    let cold = place(&world.graph, &later, &prices, None)?;
    Ok(json!({
        "networks": world.graph.networks(), "prefixes": world.graph.prefixes(), "kind": format!("{kind:?}"),
        "rows": world.graph.rows(), "edges": world.graph.edges(), "weight": weight, "seed": seed,
        "open": placed.open.len(), "cpu_ms": cold_ms, "first_gap_percent": placed.gap_ppm() as f64 / 1e4,
        "tighten_cpu_ms": tighten_ms, "gap_percent": tight.gap_ppm() as f64 / 1e4,
        "saved_by_tighten_percent": 100.0 - tight.cost.0 as f64 / placed.cost.0 as f64 * 100.0,
        "cost_usd_hour": tight.cost.0 as f64 / 1e12, "bound_usd_hour": tight.bound.0 as f64 / 1e12,
        "warm": {
            "cpu_ms": warm_ms, "gap_percent": warm.gap_ppm() as f64 / 1e4,
            "cost_to_cold": warm.cost.0 as f64 / cold.cost.0 as f64,
        },
    }))
}

/// Crowds: 1 % of the prefixes ask for twenty times as much, scattered over the world and all in one region, in turns.
/// Half of the networks hold the image.
fn crowds(world: &World, kind: Kind, weight: i64, seed: u64, count: usize) -> Result<Value> {
    let (demand, prices) = service(world, weight, seed, 0);
    let placed = place(&world.graph, &demand, &prices, None)?;
    let mut chance = Chance::named(seed, &["crowds"]);
    let holders: Vec<u32> = (0..world.graph.networks()).filter(|_| chance.under(2) == 0).collect();
    let calm = Flash::new(&world.graph, &demand, &prices, &placed, &holders, RESUME)?;
    let (prefixes, size) = (world.by_place.len(), (world.by_place.len() / 100).max(1));
    let (mut times, mut decided, mut opened) = (Vec::new(), 0, 0);
    for tick in 0..count {
        let region = chance.under((prefixes - size + 1) as u64) as usize;
        let member = |i: usize, chance: &mut Chance| match tick % 2 {
            0 => world.by_place[region + i],
            _ => chance.under(prefixes as u64) as u32,
        };
        let crowd: Vec<(u32, u64)> = (0..size)
            .map(|i| member(i, &mut chance))
            .map(|p| (p, demand.weights[p as usize].saturating_mul(CROWD)))
            .collect();
        let mut flash = calm.clone();
        let began = cpu();
        let ticked = flash.changed(&crowd, OPENINGS_MAX)?;
        times.push(ms(cpu() - began));
        (decided, opened) = (decided + ticked.decided, opened + ticked.opened.len());
    }
    let seconds = times.iter().sum::<f64>() / 1000.0;
    Ok(json!({
        "kind": format!("{kind:?}"), "weight": weight, "seed": seed, "ticks": count, "changed_prefixes": size,
        "p50_ms": quantile(&mut times, 0.5), "p99_ms": quantile(&mut times, 0.99),
        "placements_per_s": decided as f64 / seconds, "opened_per_tick": opened as f64 / count as f64,
        "opened_per_s": opened as f64 / seconds,
    }))
}

/// Many services over one graph, by two threads that each take the next one; every answer is kept.
fn many(world: &World, services: u64) -> Result<Value> {
    let (next, began) = (AtomicU64::new(0), Instant::now());
    let work = || -> Result<(Duration, Duration, Vec<Placed>)> {
        let (thread, mut placing, mut placed) = (cpu(), Duration::ZERO, Vec::new());
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= services {
                return Ok((cpu() - thread, placing, placed));
            }
            let (demand, prices) = service(world, WEIGHTS[(number % WEIGHTS.len() as u64) as usize], SEEDS[0], number);
            let began = cpu();
            placed.push(place(&world.graph, &demand, &prices, None)?);
            placing += cpu() - began;
        }
    };
    let done: Vec<_> = std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.into_iter().map(|t| t.join().map_err(|_| anyhow::anyhow!("a thread died"))).collect()
    });
    let wall = began.elapsed();
    let done: Vec<_> = done.into_iter().map(|d| d?).collect::<Result<_>>()?;
    let mut gaps: Vec<f64> = done.iter().flat_map(|d| &d.2).map(|p| p.gap_ppm() as f64 / 1e4).collect();
    let seconds =
        |of: fn(&(Duration, Duration, Vec<Placed>)) -> Duration| done.iter().map(of).sum::<Duration>().as_secs_f64();
    Ok(json!({
        "services": services, "threads": 2, "weights": "each in turn", "wall_s": wall.as_secs_f64(),
        "cpu_s": seconds(|d| d.0), "cpu_placing_s": seconds(|d| d.1), "peak_mib": peak_mib()?,
        "gap_percent_median": quantile(&mut gaps, 0.5), "gap_percent_worst": quantile(&mut gaps, 1.0),
    }))
}

/// Demand and prices of one service: Zipf over the prefixes, times what the service is worth in each country (from a
/// sixteenth to sixteen times), and 0.08 to 0.13 $ for an hour in a network. Network 0 is free where it is the origin.
fn service(world: &World, weight: i64, seed: u64, number: u64) -> (Demand, Prices) {
    let mut chance = Chance::named(seed, &["service", &number.to_string()]);
    let mut liking = BTreeMap::new();
    for &country in &world.countries {
        liking.entry(country).or_insert(0.0);
    }
    liking.values_mut().for_each(|l| *l = 2_f64.powf(8.0 * chance.fraction() - 4.0));
    let prefixes = world.countries.len();
    let mut ranks: Vec<u32> = (1..=prefixes as u32).collect();
    for i in (1..prefixes).rev() {
        ranks.swap(i, chance.under(i as u64 + 1) as usize);
    }
    // The mean of the likings is 2.9, the sum of 1/rank about the logarithm.
    let first = REQUESTS / 2.9 / (prefixes as f64).ln();
    let weigh = |(rank, country): (u32, _)| (first / f64::from(rank) * liking[country]) as u64;
    let weights = ranks.into_iter().zip(&world.countries).map(weigh).collect();
    let mut open: Vec<_> =
        (0..world.graph.networks()).map(|_| MicroUsd(80_000 + chance.under(50_001) as i64)).collect();
    if world.origin {
        open[0] = MicroUsd(0);
    }
    (Demand { weights }, Prices { open, latency_second: MicroUsd(weight) })
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The value below which such a part lies.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (part * values.len() as f64).ceil() as usize;
    values.get(at.clamp(1, values.len().max(1)) - 1).copied().unwrap_or(0.0)
}

fn number(of: &Value, key: &str) -> f64 {
    of[key].as_f64().unwrap_or(f64::NAN)
}

fn worst<'a>(rows: impl Iterator<Item = &'a Value>, key: &str) -> f64 {
    rows.map(|r| number(r, key)).fold(0.0, f64::max)
}

fn least<'a>(rows: impl Iterator<Item = &'a Value>, key: &str) -> f64 {
    rows.map(|r| number(r, key)).fold(f64::INFINITY, f64::min)
}

/// The most memory this process has had.
fn peak_mib() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("reading this process's status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).context("no VmHWM in this process's status")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("VmHWM is no number")?;
    Ok(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quick_run_has_every_figure() {
        let seen = measure(None, true).unwrap();
        assert_eq!(seen["rows"].as_array().unwrap().len(), 2 * 3 * WEIGHTS.len());
        assert!(seen["goals"].as_array().unwrap().iter().all(|g| g["seen"].is_number()), "{}", seen["goals"]);
        assert!(
            seen["rows"].as_array().unwrap().iter().all(|r| number(r, "bound_usd_hour") <= number(r, "cost_usd_hour"))
        );
    }
}
