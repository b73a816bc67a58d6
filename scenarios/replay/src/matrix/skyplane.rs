//! Skyplane's profiles: a line for each pair of cloud regions, with the columns that the first line names.
//!
//! ```text
//! src_region,src_tier,…,dst_region,dst_tier,…,avg_rtt,…      src,dest,src_tier,dest_tier,cost
//! aws:eu-north-1,PREMIUM,…,azure:eastus,PREMIUM,…,105.976,…  aws:eu-north-1,azure:eastus,PREMIUM,PREMIUM,0.09
//! ```
//!
//! Only lines with both ends in the premium tier count: it is the only one that every provider has, and the only one
//! with prices. Of the round trips the mean is taken, for a least one below what light needs is among them.

use super::{Line, Lines, Matrix, MatrixError, PLACES_MAX, Places, UNKNOWN, both_ways, dollars, lines, millis};
use std::collections::BTreeMap;
use std::io::BufRead;
use vmatrix_model::MicroUsd;

const TIER: &str = "PREMIUM";
const LINE: usize = 1024;
/// Each pair in both directions and in four pairs of tiers.
const LINES: usize = 4 * PLACES_MAX * PLACES_MAX;

/// A file's name and its content.
type File<R> = (String, R);

/// By the numbers of two places, from the one to the other.
type Pairs<V> = BTreeMap<(u32, u32), V>;

pub fn parse<R: BufRead, P: BufRead>(latency: File<R>, prices: Option<File<P>>) -> Result<Matrix, MatrixError> {
    let columns = ["src_region", "dst_region", "src_tier", "dst_tier", "avg_rtt"];
    let (seen, directed) = pairs(latency, columns, millis)?;
    // In the order of their names, whatever the order of the lines was.
    let (names, numbers): (Vec<String>, Vec<u32>) = seen.0.into_iter().unzip();
    let rtt_us = both_ways(names.len(), |a, b| directed.get(&(numbers[a], numbers[b])).copied().unwrap_or(UNKNOWN));
    let egress = prices.map(|prices| egress(prices, &names)).transpose()?;
    Ok(Matrix { names, rtt_us, egress })
}

/// The prices between the places with these names.
fn egress<P: BufRead>(prices: File<P>, names: &[String]) -> Result<Vec<MicroUsd>, MatrixError> {
    let file = prices.0.clone();
    let columns = ["src", "dest", "src_tier", "dest_tier", "cost"];
    let (seen, known) = pairs(prices, columns, dollars)?;
    let mut means = Means::default();
    let by_number: BTreeMap<u32, &str> = seen.0.iter().map(|(name, number)| (*number, name.as_str())).collect();
    for ((from, to), price) in &known {
        if let (Some(from), Some(to)) = (by_number.get(from), by_number.get(to)) {
            means.add(provider(from), provider(to), *price);
        }
    }
    let mut all = Vec::with_capacity(names.len() * names.len());
    for from in names {
        for to in names {
            if from == to {
                all.push(MicroUsd(0));
                continue;
            }
            let pair = seen.0.get(from.as_str()).zip(seen.0.get(to.as_str())).map(|(from, to)| (*from, *to));
            let price = pair.and_then(|p| known.get(&p)).copied();
            let price = price.or_else(|| means.of(provider(from), provider(to)));
            all.push(price.ok_or_else(|| MatrixError::Whole {
                file: file.clone(),
                problem: format!("has no price from {from:?}, and none of its provider to take the mean of"),
            })?);
        }
    }
    Ok(all)
}

/// `aws` of `aws:eu-north-1`.
fn provider(region: &str) -> &str {
    region.split(':').next().unwrap_or(region)
}

/// Means of what providers ask, for regions that no list has.
#[derive(Default)]
struct Means<'a> {
    /// Sum and number of prices to another provider or within one, and from a provider to anywhere.
    between: BTreeMap<(&'a str, &'a str), (i64, i64)>,
    from: BTreeMap<&'a str, (i64, i64)>,
}

impl<'a> Means<'a> {
    fn add(&mut self, from: &'a str, to: &'a str, price: MicroUsd) {
        for sum in [self.between.entry((from, to)).or_default(), self.from.entry(from).or_default()] {
            *sum = (sum.0.saturating_add(price.0), sum.1 + 1);
        }
    }

    /// Of the provider's prices to that other provider, else of all of its prices.
    fn of(&self, from: &str, to: &str) -> Option<MicroUsd> {
        let (sum, prices) = self.between.get(&(from, to)).or_else(|| self.from.get(from))?;
        Some(MicroUsd((sum + prices / 2) / prices))
    }
}

/// The places of the premium tier, and the `value` of each pair of two different ones.
fn pairs<R: BufRead, V>(
    (file, content): File<R>,
    columns: [&str; 5],
    value: impl Fn(&Line<'_>, &str) -> Result<V, MatrixError>,
) -> Result<(Places, Pairs<V>), MatrixError> {
    let mut lines = lines(&file, content, LINE, LINES)?;
    let at = header(&mut lines, columns)?;
    let (mut seen, mut found) = (Places::default(), BTreeMap::new());
    while let Some(line) = lines.next()? {
        let fields: Vec<&str> = line.text.split(',').collect();
        let mut values = [""; 5];
        for ((text, at), column) in values.iter_mut().zip(at).zip(columns) {
            *text = fields.get(at).ok_or_else(|| line.bad(format!("has no {column}")))?;
        }
        let [from, to, from_tier, to_tier, text] = values;
        if from_tier != TIER || to_tier != TIER || from == to {
            continue;
        }
        let pair = (seen.of(&line, from)?, seen.of(&line, to)?);
        if found.insert(pair, value(&line, text)?).is_some() {
            return Err(line.bad(format!("{from} to {to} is there twice")));
        }
    }
    if found.is_empty() {
        return Err(lines.whole(format!("has no pair of places in the tier {TIER}")));
    }
    Ok((seen, found))
}

/// Where in a line these columns are.
fn header(lines: &mut Lines<'_>, columns: [&str; 5]) -> Result<[usize; 5], MatrixError> {
    let Some(line) = lines.next()? else { return Err(lines.whole("is empty")) };
    let names: Vec<&str> = line.text.split(',').collect();
    let mut at = [0; 5];
    for (at, column) in at.iter_mut().zip(columns) {
        let place = names.iter().position(|name| *name == column);
        *at = place.ok_or_else(|| line.bad(format!("has no column {column:?}")))?;
    }
    Ok(at)
}
