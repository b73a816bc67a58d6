//! Pings between the regions of one cloud: a file for each, `eu-west-1.dat`, with a line for each that it reaches,
//! `min/avg/max/mdev:region` in milliseconds. The mean is taken.

use super::{Matrix, MatrixError, PLACES_MAX, Places, UNKNOWN, both_ways, lines, millis, number, shown};
use std::collections::BTreeMap;
use std::io::BufRead;

const LINE: usize = 1024;

/// Reads `files`: each with its region, its name and its content.
pub fn parse<R: BufRead>(
    folder: &str,
    files: impl Iterator<Item = Result<(String, String, R), MatrixError>>,
) -> Result<Matrix, MatrixError> {
    let (mut seen, mut directed) = (Places::default(), BTreeMap::new());
    for opened in files {
        let (region, file, content) = opened?;
        let mut lines = lines(&file, content, LINE, PLACES_MAX + 1)?;
        while let Some(line) = lines.next()? {
            let Some((times, to)) = line.text.split_once(':') else {
                return Err(line.bad(format!("{} is not min/avg/max/mdev:region", shown(line.text))));
            };
            let [least, mean, most, deviation] = times.split('/').collect::<Vec<_>>()[..] else {
                return Err(line.bad(format!("{} is not min/avg/max/mdev", shown(times))));
            };
            for other in [least, most, deviation] {
                number(&line, "time", other, super::RTT_MAX_MS, "ms")?;
            }
            let (pair, rtt) = ((seen.of(&line, &region)?, seen.of(&line, to)?), millis(&line, mean)?);
            if directed.insert(pair, rtt).is_some() {
                return Err(line.bad(format!("{to} is there twice")));
            }
        }
    }
    if seen.0.is_empty() {
        return Err(MatrixError::Whole { file: folder.to_owned(), problem: "its files are empty".to_owned() });
    }
    let (names, numbers): (Vec<String>, Vec<u32>) = seen.0.into_iter().unzip();
    let rtt_us = both_ways(names.len(), |a, b| directed.get(&(numbers[a], numbers[b])).copied().unwrap_or(UNKNOWN));
    Ok(Matrix { names, rtt_us, egress: None })
}
