//! Matrices: round trips and prices between places, as they were measured.
//!
//! ```text
//! NetLatency, n × n ms, tabs ───┐
//! Skyplane, latency and cost ───┼─▶ Matrix ─▶ complete ─▶ every pair known, Completed says what was not
//! a file of pings per region ───┘
//! ```
//!
//! Round trips are made the same both ways, by the mean of both where both were measured. Nothing else is mended: a
//! detour over a third place may be shorter than the direct way, for on the Internet it often is.

mod cloud;
mod netlatency;
mod skyplane;

pub use crate::trace::TraceError as MatrixError;

use crate::trace::{Bounds, Line, Lines, shown};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use vmatrix_model::{Bytes, MicroUsd};

/// A round trip that was not measured.
pub const UNKNOWN: u32 = u32::MAX;
/// Most places. What is unknown is found in n^3 steps: some seconds at this size.
pub const PLACES_MAX: usize = 2_000;
/// Longest round trip: no TCP waits longer for an answer before it sends again (RFC 6298 lets it stop at 60 s).
const RTT_MAX_MS: f64 = 60_000.0;
/// Highest price of a gigabyte, USD: a thousand times what the dearest list asks.
const PRICE_MAX_USD: f64 = 1_000.0;
/// What a price of `egress` is for.
pub const PRICED: Bytes = Bytes(1_000_000_000);
/// Longest name, bytes.
const NAME_MAX: usize = 128;

/// Round trips, and perhaps prices, between places.
///
/// # Invariants
/// 1. `rtt_us` has n × n entries, one row a place; it is the same both ways, and 0 from a place to itself.
/// 2. `egress`, if there is any, has n × n entries and is 0 from a place to itself; it differs by direction.
/// 3. Names differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    pub names: Vec<String>,
    /// Microseconds, or [`UNKNOWN`].
    pub rtt_us: Vec<u32>,
    /// Price of 10^9 bytes from the row's place to the column's.
    pub egress: Option<Vec<MicroUsd>>,
}

/// A matrix with every pair known, and what that took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completed {
    pub matrix: Matrix,
    /// Pairs that have the shortest way over others, for no direct one was measured.
    pub filled: usize,
    /// Places that are left out, for they do not reach the others.
    pub dropped: Vec<String>,
}

impl Matrix {
    /// How many places there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The round trip between two places; `None` if it is not known or there is no such place.
    pub fn rtt(&self, a: usize, b: usize) -> Option<u32> {
        let row = (b < self.len()).then(|| a.checked_mul(self.len())).flatten()?;
        self.rtt_us.get(row + b).copied().filter(|rtt| *rtt != UNKNOWN)
    }

    /// The price of 10^9 bytes from one place to another; `None` if there are no prices or no such place.
    pub fn price(&self, from: usize, to: usize) -> Option<MicroUsd> {
        let row = (to < self.len()).then(|| from.checked_mul(self.len())).flatten()?;
        self.egress.as_ref()?.get(row + to).copied()
    }

    /// Gives every pair that was not measured the shortest way over measured ones, and leaves out the places outside
    /// of the largest set that reaches itself (of equal ones, that with the first place).
    pub fn complete(&self) -> Completed {
        let kept = self.largest_part();
        let n = kept.len();
        let pick = |a: usize, b: usize| self.rtt(kept[a], kept[b]).unwrap_or(UNKNOWN);
        let measured: Vec<u32> = (0..n * n).map(|i| pick(i / n, i % n)).collect();
        // Floyd and Warshall: ways over the first places only, then over one more.
        let mut shortest: Vec<u64> =
            measured.iter().map(|rtt| if *rtt == UNKNOWN { u64::MAX } else { u64::from(*rtt) }).collect();
        for over in 0..n {
            let leg: Vec<u64> = shortest[over * n..(over + 1) * n].to_vec();
            for row in shortest.chunks_exact_mut(n) {
                let first = row[over];
                if first == u64::MAX {
                    continue;
                }
                for (way, second) in row.iter_mut().zip(&leg) {
                    *way = (*way).min(first.saturating_add(*second));
                }
            }
        }
        let mut filled = 0;
        let rtt_us = measured.iter().zip(shortest).map(|(direct, way)| {
            if *direct != UNKNOWN {
                return *direct;
            }
            filled += 1;
            u32::try_from(way).unwrap_or(UNKNOWN).min(UNKNOWN - 1)
        });
        let rtt_us = rtt_us.collect();
        let egress = self
            .egress
            .as_ref()
            .map(|_| (0..n * n).map(|i| self.price(kept[i / n], kept[i % n]).unwrap_or_default()).collect());
        let names = kept.iter().map(|i| self.names[*i].clone()).collect();
        let dropped =
            (0..self.len()).filter(|i| kept.binary_search(i).is_err()).map(|i| self.names[i].clone()).collect();
        Completed { matrix: Matrix { names, rtt_us, egress }, filled: filled / 2, dropped }
    }

    /// The largest set of places that reach each other, in order.
    fn largest_part(&self) -> Vec<usize> {
        let mut part_of: Vec<Option<usize>> = vec![None; self.len()];
        let mut largest = vec![];
        for first in 0..self.len() {
            if part_of[first].is_some() {
                continue;
            }
            part_of[first] = Some(first);
            let mut part = vec![first];
            let mut next = 0;
            while let Some(here) = part.get(next).copied() {
                next += 1;
                for there in (0..self.len()).filter(|there| self.rtt(here, *there).is_some()) {
                    if part_of[there].is_none() {
                        part_of[there] = Some(first);
                        part.push(there);
                    }
                }
            }
            if part.len() > largest.len() {
                largest = part;
            }
        }
        largest.sort_unstable();
        largest
    }

    /// What this matrix is like.
    pub fn describe(&self) -> Description {
        let n = self.len();
        let pairs = (0..n).flat_map(|a| (a + 1..n).map(move |b| (a, b)));
        let mut rtt_us: Vec<u32> = pairs.filter_map(|(a, b)| self.rtt(a, b)).collect();
        rtt_us.sort_unstable();
        let other = (0..n * n).filter(|i| i / n != i % n);
        let mut prices: Vec<MicroUsd> = other.filter_map(|i| self.price(i / n, i % n)).collect();
        prices.sort_unstable();
        let unknown = n * n.saturating_sub(1) / 2 - rtt_us.len();
        Description { places: n, unknown, rtt_us: at_ranks(&rtt_us), price: at_ranks(&prices) }
    }
}

/// What a matrix is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    pub places: usize,
    /// Pairs that were not measured.
    pub unknown: usize,
    /// Least, median, 90th percentile and greatest of the known pairs.
    pub rtt_us: Option<[u32; 4]>,
    /// The same of the prices of 10^9 bytes between two places.
    pub price: Option<[MicroUsd; 4]>,
}

fn at_ranks<T: Copy>(sorted: &[T]) -> Option<[T; 4]> {
    let last = sorted.len().checked_sub(1)?;
    Some([0, last / 2, last * 9 / 10, last].map(|i| sorted[i]))
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} places, {} pairs not measured", self.places, self.unknown)?;
        if let Some(rtt) = self.rtt_us {
            let [least, median, most, greatest] = rtt.map(|us| f64::from(us) / 1000.0);
            writeln!(f, "round trip  {least:.1} to {greatest:.1} ms, median {median:.1}, 90th percentile {most:.1}")?;
        }
        if let Some([least, median, most, greatest]) = self.price {
            writeln!(f, "price a GB  {least} to {greatest}, median {median}, 90th percentile {most}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Completed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pairs given the shortest way over others", self.filled)?;
        if !self.dropped.is_empty() {
            write!(f, "; left out, for they do not reach the rest: {}", self.dropped.join(", "))?;
        }
        Ok(())
    }
}

/// Reads a matrix of any of the forms: a folder with a `latency.csv` (and perhaps a `cost.csv`), a folder of `.dat`
/// files of pings, or a file of n × n numbers between tabs.
///
/// # Errors
/// Says which file and line is wrong, and how.
pub fn read(path: &Path) -> Result<Matrix, MatrixError> {
    if !path.is_dir() {
        return netlatency::parse(&path.display().to_string(), open(path)?);
    }
    let (latency, cost) = (path.join("latency.csv"), path.join("cost.csv"));
    if latency.exists() {
        let prices = if cost.exists() { Some((cost.display().to_string(), open(&cost)?)) } else { None };
        return skyplane::parse((latency.display().to_string(), open(&latency)?), prices);
    }
    let found = dats(path)?;
    let files = found.iter().map(|(region, file)| Ok((region.clone(), file.display().to_string(), open(file)?)));
    cloud::parse(&path.display().to_string(), files)
}

fn open(path: &Path) -> Result<BufReader<std::fs::File>, MatrixError> {
    let file = path.display().to_string();
    std::fs::File::open(path).map(BufReader::new).map_err(|source| MatrixError::Read { file, source })
}

/// Every `.dat` of a folder with its name, in order.
fn dats(folder: &Path) -> Result<Vec<(String, PathBuf)>, MatrixError> {
    let file = folder.display().to_string();
    let read = |source| MatrixError::Read { file: file.clone(), source };
    let mut found = vec![];
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        let name = path.file_stem().and_then(|n| n.to_str()).map(str::to_owned);
        if let Some(name) = name.filter(|_| path.extension().is_some_and(|e| e == "dat")) {
            found.push((name, path));
        }
        if found.len() > PLACES_MAX {
            return Err(MatrixError::Whole { file, problem: format!("has more than {PLACES_MAX} files") });
        }
    }
    found.sort();
    if found.is_empty() {
        let hint =
            "\n\nhint: name a folder with a latency.csv, one with a .dat file a region, or a file of n × n numbers";
        return Err(MatrixError::Whole { file, problem: format!("holds no matrix that can be read{hint}") });
    }
    Ok(found)
}

/// Milliseconds of a round trip as microseconds; 0 and nothing at all mean that it is not known.
fn millis(line: &Line<'_>, text: &str) -> Result<u32, MatrixError> {
    if text.is_empty() {
        return Ok(UNKNOWN);
    }
    let ms = number(line, "round trip", text, RTT_MAX_MS, "ms")?;
    // What was measured is more than nothing, however little.
    Ok(if ms == 0.0 { UNKNOWN } else { ((ms * 1000.0).round() as u32).max(1) })
}

/// US dollars as millionths.
fn dollars(line: &Line<'_>, text: &str) -> Result<MicroUsd, MatrixError> {
    Ok(MicroUsd((number(line, "price", text, PRICE_MAX_USD, "USD")? * 1e6).round() as i64))
}

fn number(line: &Line<'_>, what: &str, text: &str, most: f64, unit: &str) -> Result<f64, MatrixError> {
    let problem = match text.parse::<f64>() {
        Ok(number) if (0.0..=most).contains(&number) => return Ok(number),
        Ok(number) if number < 0.0 => "is negative".to_owned(),
        Ok(number) if number > most => format!("is more than {most} {unit}"),
        _ => "is not a number".to_owned(),
    };
    Err(line.bad(format!("{what} {} {problem}", shown(text))))
}

/// A place's name, as it is.
fn name(line: &Line<'_>, text: &str) -> Result<String, MatrixError> {
    let good = (1..=NAME_MAX).contains(&text.len()) && !text.chars().any(|c| c.is_control() || c.is_whitespace());
    good.then(|| text.to_owned()).ok_or_else(|| line.bad(format!("{} is not the name of a place", shown(text))))
}

/// Directed round trips made the same both ways: the mean of both, or the one that there is.
fn both_ways(n: usize, directed: impl Fn(usize, usize) -> u32) -> Vec<u32> {
    let one = |a: usize, b: usize| match (directed(a, b), directed(b, a)) {
        _ if a == b => 0,
        (UNKNOWN, known) | (known, UNKNOWN) => known,
        (there, back) => ((u64::from(there) + u64::from(back)).div_ceil(2)) as u32,
    };
    (0..n * n).map(|i| one(i / n, i % n)).collect()
}

/// Numbers given to names as they are seen, at most [`PLACES_MAX`].
#[derive(Default)]
struct Places(BTreeMap<String, u32>);

impl Places {
    fn of(&mut self, line: &Line<'_>, text: &str) -> Result<u32, MatrixError> {
        if let Some(known) = self.0.get(text) {
            return Ok(*known);
        }
        let next = self.0.len();
        if next == PLACES_MAX {
            return Err(line.bad(format!("{} is one place more than the {PLACES_MAX} that are taken", shown(text))));
        }
        self.0.insert(name(line, text)?, next as u32);
        Ok(next as u32)
    }
}

/// Lines of `content`, each of at most `line` bytes.
fn lines<'a>(file: &str, content: impl BufRead + 'a, line: usize, most: usize) -> Result<Lines<'a>, MatrixError> {
    Lines::of(file, content, Bounds { line, bytes: line as u64 * most as u64 })
}

#[cfg(test)]
mod tests;
