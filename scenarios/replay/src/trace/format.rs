//! Traces in files: how collectors write them, and the project's own form.
//!
//! ```text
//! period,count                 # vmatrix trace 1
//! 1998-04-30 21:30:00,2        # name: worldcup98
//! 1998-04-30 21:31:00,11       # begins: 1998-04-30 21:30:00
//! …                            # step_s: 60
//!                              requests
//! plain or gzip, gaps          2
//! become zeros and are told    11
//!                              …
//! ```

use super::{Bounds, COUNT_MAX, Line, Lines, STEPS_MAX, Trace, TraceError, bad_step, civil, shown};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use vmatrix_model::Span;

/// First line of the project's own form.
const OURS: &str = "# vmatrix trace 1";
/// First line of the collectors' form.
const PERIODS: &str = "period,count";
/// A row has a time and a count, some 40 bytes; 4 KiB leave room for a name.
const BOUNDS: Bounds = Bounds { line: 4096, bytes: STEPS_MAX as u64 * 40 };

/// Periods that a file leaves out, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Unix seconds at which the first of them begins.
    pub from: i64,
    pub steps: u64,
}

/// What a file leaves out, and what was therefore taken for silence.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Gaps(pub Vec<Gap>);

impl std::fmt::Display for Gaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(first) = self.0.first() else { return write!(f, "no gaps") };
        let steps: u64 = self.0.iter().map(|g| g.steps).sum();
        let from = civil::written(first.from);
        write!(f, "{} gaps of {steps} steps in all filled with zeros, the first at {from}", self.0.len())
    }
}

/// A trace as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    pub trace: Trace,
    /// To be told to whoever uses it.
    pub gaps: Gaps,
}

/// Reads a trace of either form, plain or gzip. Gaps are filled with zeros; [`import`] tells where.
///
/// # Errors
/// Says which file and line is wrong, and how.
pub fn read(path: &Path) -> Result<Trace, TraceError> {
    import(path).map(|i| i.trace)
}

/// Reads a trace of either form, plain or gzip, and says what it lacks.
///
/// # Errors
/// As [`read`].
pub fn import(path: &Path) -> Result<Imported, TraceError> {
    let file = path.display().to_string();
    let open = std::fs::File::open(path).map_err(|source| TraceError::Read { file: file.clone(), source })?;
    parse(&file, BufReader::new(open))
}

/// Reads a trace from the content of `file`. One without a name of its own is called as the file is, up to the
/// first dot.
///
/// # Errors
/// As [`read`].
pub fn parse(file: &str, content: impl BufRead) -> Result<Imported, TraceError> {
    let mut lines = Lines::of(file, content, BOUNDS)?;
    let Some(first) = lines.next()? else { return Err(lines.whole("is empty")) };
    let imported = match first.text {
        PERIODS => {
            let stem = Path::new(file).file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let stem = stem.split('.').next().filter(|s| !s.is_empty()).unwrap_or("trace");
            periods(stem, &mut lines)?
        }
        OURS => Imported { trace: ours(&mut lines)?, gaps: Gaps::default() },
        other => {
            let hint = format!("\n\nhint: a trace begins with the line \"{PERIODS}\" or \"{OURS}\"");
            return Err(first.bad(format!("{} begins no trace that can be read{hint}", shown(other))));
        }
    };
    imported.trace.check().map_err(|e| lines.whole(e.to_string()))?;
    Ok(imported)
}

/// Reads the rows after `period,count`.
fn periods(name: &str, lines: &mut Lines<'_>) -> Result<Imported, TraceError> {
    /// Line of the first row.
    const FIRST: u64 = 2;
    let (mut begins, mut last, mut ahead, mut counts) = (0, None, vec![], vec![]);
    while let Some(line) = lines.next()? {
        let (at, requests) = row(&line)?;
        match last {
            None => begins = at,
            Some(last) if at == last => return Err(line.bad(format!("{} is there twice", civil::written(at)))),
            Some(last) if at < last => {
                return Err(line.bad(format!(
                    "the clock goes back from {} to {}\n\nhint: sort the rows by period",
                    civil::written(last),
                    civil::written(at)
                )));
            }
            Some(last) => {
                ahead.push(u32::try_from(at - last).map_err(|_| line.bad("comes more than a century after the row before"))?);
            }
        }
        if counts.len() == STEPS_MAX {
            return Err(line.bad(format!("is row {}, at most {STEPS_MAX} are taken", STEPS_MAX + 1)));
        }
        last = Some(at);
        counts.push(requests);
    }
    if counts.is_empty() {
        return Err(lines.whole("has no rows"));
    }
    let Some(step) = usual(&ahead) else {
        return Err(lines.whole("has one row, and so nothing says how long its period is"));
    };
    if let Some(problem) = bad_step(Span::secs(u64::from(step))) {
        return Err(lines.whole(problem));
    }

    let mut trace = Trace { name: name.to_owned(), begins, step: Span::secs(u64::from(step)), counts: vec![] };
    let mut gaps = Gaps::default();
    for (i, requests) in counts.into_iter().enumerate() {
        let ahead = if i == 0 { step } else { ahead.get(i - 1).copied().unwrap_or(step) };
        if ahead % step != 0 {
            let problem = format!("comes {ahead} s after the row before, and the others come every {step} s");
            return Err(lines.bad_at(FIRST + i as u64, problem));
        }
        let missing = (ahead / step - 1) as usize;
        if trace.counts.len() + missing >= STEPS_MAX {
            let problem = format!("comes after a gap that makes more than {STEPS_MAX} steps");
            return Err(lines.bad_at(FIRST + i as u64, problem));
        }
        if missing > 0 {
            gaps.0.push(Gap { from: trace.ends(), steps: missing as u64 });
            trace.counts.resize(trace.counts.len() + missing, 0);
        }
        trace.counts.push(requests);
    }
    Ok(Imported { trace, gaps })
}

/// The most common distance between rows, ties to the shorter: a file with gaps still has mostly neighbours.
fn usual(ahead: &[u32]) -> Option<u32> {
    let mut seen: BTreeMap<u32, u64> = BTreeMap::new();
    for distance in ahead {
        *seen.entry(*distance).or_default() += 1;
    }
    seen.into_iter().max_by_key(|(distance, times)| (*times, std::cmp::Reverse(*distance))).map(|(distance, _)| distance)
}

fn row(line: &Line<'_>) -> Result<(i64, u64), TraceError> {
    let Some((period, requests)) = line.text.split_once(',') else {
        return Err(line.bad(format!("{} is not a period and a count", shown(line.text))));
    };
    let Some(at) = civil::seconds(period) else {
        return Err(line.bad(format!("period {} is not a time\n\nhint: 1998-04-30 21:30:00, in UTC", shown(period))));
    };
    Ok((at, count(line, requests)?))
}

/// A number of requests.
fn count(line: &Line<'_>, text: &str) -> Result<u64, TraceError> {
    let problem = match text.parse() {
        Ok(count) if count <= COUNT_MAX && !text.starts_with('+') => return Ok(count),
        Ok(_) => format!("is more than {COUNT_MAX}"),
        Err(_) if text.parse::<f64>().is_ok_and(f64::is_nan) => "is not a number".to_owned(),
        Err(_) if text.parse::<f64>().is_ok_and(|n| n < 0.0) => "is negative".to_owned(),
        Err(_) if text.parse::<f64>().is_ok_and(|n| n > COUNT_MAX as f64) => format!("is more than {COUNT_MAX}"),
        Err(_) => "is not a whole number".to_owned(),
    };
    Err(line.bad(format!("count {} {problem}", shown(text))))
}

/// Reads what follows `# vmatrix trace 1`.
fn ours(lines: &mut Lines<'_>) -> Result<Trace, TraceError> {
    let name = header(lines, "name", |text| Some(text.to_owned()))?;
    let begins = header(lines, "begins", civil::seconds)?;
    let step = header(lines, "step_s", step_of)?;
    match lines.next()? {
        Some(line) if line.text == "requests" => {}
        Some(line) => return Err(line.bad(format!("{} stands where \"requests\" should", shown(line.text)))),
        None => return Err(lines.whole("ends before its \"requests\"")),
    }
    let mut counts = vec![];
    while let Some(line) = lines.next()? {
        if counts.len() == STEPS_MAX {
            return Err(line.bad(format!("is step {}, at most {STEPS_MAX} are taken", STEPS_MAX + 1)));
        }
        counts.push(count(&line, line.text)?);
    }
    Ok(Trace { name, begins, step, counts })
}

/// Reads the line `# key: value`.
fn header<T>(lines: &mut Lines<'_>, key: &str, value: impl Fn(&str) -> Option<T>) -> Result<T, TraceError> {
    let Some(line) = lines.next()? else { return Err(lines.whole(format!("ends before its \"# {key}: …\""))) };
    let text = line.text.strip_prefix("# ").and_then(|t| t.strip_prefix(key)).and_then(|t| t.strip_prefix(": "));
    let Some(text) = text else {
        return Err(line.bad(format!("{} stands where \"# {key}: …\" should", shown(line.text))));
    };
    value(text).ok_or_else(|| line.bad(format!("{key} cannot be {}", shown(text))))
}

/// A step in seconds, with at most six digits after the point.
fn step_of(text: &str) -> Option<Span> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    if part.is_empty() || part.len() > 6 || ![whole, part].iter().all(|t| t.bytes().all(|b| b.is_ascii_digit())) {
        return None;
    }
    let micros: u64 = format!("{part:0<6}").parse().ok()?;
    let whole: u64 = whole.parse().ok()?;
    whole.checked_mul(1_000_000)?.checked_add(micros).map(Span)
}

impl Trace {
    /// Writes the project's own form, which [`read`] gives back as it was.
    ///
    /// # Errors
    /// If this is not a trace (see [`Trace::check`]), or `file`, which `to` writes, cannot be written.
    pub fn write(&self, file: &str, to: impl Write) -> Result<(), TraceError> {
        self.check()?;
        self.lines_to(std::io::BufWriter::new(to)).map_err(|source| TraceError::Write { file: file.to_owned(), source })
    }

    fn lines_to(&self, mut to: impl Write) -> std::io::Result<()> {
        let (whole, part) = (self.step.0 / 1_000_000, self.step.0 % 1_000_000);
        let step = format!("{whole}.{part:06}");
        let step = step.trim_end_matches('0').trim_end_matches('.');
        writeln!(to, "{OURS}\n# name: {}\n# begins: {}", self.name, civil::written(self.begins))?;
        writeln!(to, "# step_s: {step}\nrequests")?;
        for count in &self.counts {
            writeln!(to, "{count}")?;
        }
        to.flush()
    }
}
