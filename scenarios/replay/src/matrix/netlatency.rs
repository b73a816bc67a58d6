//! NetLatency: n lines of n round trips in milliseconds between tabs, row i to column j. The places have no names.

use super::{Matrix, MatrixError, PLACES_MAX, UNKNOWN, both_ways, lines, millis};
use std::io::BufRead;

/// Bytes of one number and its tab, with room to spare.
const NUMBER: usize = 32;

pub fn parse(file: &str, content: impl BufRead) -> Result<Matrix, MatrixError> {
    let mut lines = lines(file, content, PLACES_MAX * NUMBER, PLACES_MAX + 1)?;
    let (mut n, mut rows, mut directed) = (0, 0, vec![]);
    while let Some(line) = lines.next()? {
        let before = directed.len();
        for (column, number) in line.text.split('\t').enumerate() {
            if column == PLACES_MAX {
                return Err(line.bad(format!("has more than {PLACES_MAX} numbers")));
            }
            // From a place to itself there is nothing to measure; what is there is noise of the clock.
            let rtt = millis(&line, number)?;
            directed.push(if column == rows { UNKNOWN } else { rtt });
        }
        let here = directed.len() - before;
        if rows == 0 {
            n = here;
        }
        if here != n {
            return Err(line.bad(format!("has {here} numbers, the first line has {n}")));
        }
        rows += 1;
        if rows > n {
            return Err(line.bad(format!("is row {rows} of a matrix with {n} columns")));
        }
    }
    if rows == 0 {
        return Err(lines.whole("is empty"));
    }
    if rows != n {
        return Err(lines.whole(format!("has {rows} rows and {n} columns")));
    }
    let width = (n - 1).to_string().len();
    let names = (0..n).map(|i| format!("node-{i:0width$}")).collect();
    let rtt_us = both_ways(n, |a, b| directed[a * n + b]);
    Ok(Matrix { names, rtt_us, egress: None })
}
