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

use super::{Bounds, COUNT_MAX, Line, Lines, NAME_MAX, STEPS_MAX, Trace, TraceError, bad_step, civil, shown};
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
        PERIODS => periods(&named_after(file), &mut lines)?,
        OURS => Imported { trace: ours(&mut lines)?, gaps: Gaps::default() },
        other => {
            let hint = format!("\n\nhint: a trace begins with the line \"{PERIODS}\" or \"{OURS}\"");
            return Err(first.bad(format!("{} begins no trace that can be read{hint}", shown(other))));
        }
    };
    imported.trace.check().map_err(|e| lines.whole(e.to_string()))?;
    Ok(imported)
}

/// A file's name up to its first dot, as far as that can be a trace's name.
fn named_after(file: &str) -> String {
    let stem = Path::new(file).file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let stem = stem.split('.').next().unwrap_or_default();
    // A character has at most four bytes.
    let name: String = stem.chars().filter(|c| !c.is_control()).take(NAME_MAX / 4).collect();
    Some(name.trim().to_owned()).filter(|n| !n.is_empty()).unwrap_or("trace".to_owned())
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
                ahead.push(
                    u32::try_from(at - last).map_err(|_| line.bad("comes more than a century after the row before"))?,
                );
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
        if !ahead.is_multiple_of(step) {
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
    seen.into_iter()
        .max_by_key(|(distance, times)| (*times, std::cmp::Reverse(*distance)))
        .map(|(distance, _)| distance)
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
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    if let Some(count) = text.parse().ok().filter(|count| digits && *count <= COUNT_MAX) {
        return Ok(count);
    }
    let problem = match text.parse::<f64>() {
        Ok(number) if number.is_nan() => "is not a number".to_owned(),
        Ok(number) if number < 0.0 => "is negative".to_owned(),
        Ok(number) if number > COUNT_MAX as f64 => format!("is more than {COUNT_MAX}"),
        Ok(_) => "is not a whole number in plain digits".to_owned(),
        Err(_) => "is not a number".to_owned(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(rows: &str) -> Result<Imported, TraceError> {
        parse("some.csv", format!("period,count\n{rows}").as_bytes())
    }

    /// Minutes from 1998-04-30 21:30.
    fn minutes(counts: &[u64]) -> Trace {
        Trace { name: "some".into(), begins: 893_971_800, step: Span::secs(60), counts: counts.to_vec() }
    }

    #[test]
    fn periods_become_steps() {
        let read = text("1998-04-30 21:30:00,2\r\n1998-04-30 21:31:00,0\n1998-04-30 21:32:00,16").unwrap();
        assert_eq!(read, Imported { trace: minutes(&[2, 0, 16]), gaps: Gaps::default() });
    }

    #[test]
    fn gaps_are_silence_and_are_told() {
        let read = text("1998-04-30 21:30:00,2\n1998-04-30 21:31:00,3\n1998-04-30 21:34:00,4\n").unwrap();
        assert_eq!(read.trace, minutes(&[2, 3, 0, 0, 4]));
        assert_eq!(read.gaps.0, [Gap { from: 893_971_800 + 120, steps: 2 }]);
        let told = "1 gaps of 2 steps in all filled with zeros, the first at 1998-04-30 21:32:00";
        assert_eq!(read.gaps.to_string(), told);
    }

    #[test]
    fn bad_rows_are_refused_with_their_line() {
        let after = |row: &str| text(&format!("1998-04-30 21:30:00,1\n1998-04-30 21:31:00,2\n{row}"));
        let far = format!("1998-04-30 21:32:00,{}", "9".repeat(30));
        let long = format!("1998-04-30 21:32:00,{}", "1".repeat(5000));
        for (row, said) in [
            ("1998-04-30 21:32:00,-3", "some.csv:4: count \"-3\" is negative"),
            ("1998-04-30 21:32:00,NaN", "some.csv:4: count \"NaN\" is not a number"),
            ("1998-04-30 21:32:00,many", "some.csv:4: count \"many\" is not a number"),
            ("1998-04-30 21:32:00,", "some.csv:4: count \"\" is not a number"),
            ("1998-04-30 21:32:00,2.5", "is not a whole number"),
            ("1998-04-30 21:32:00,+2", "is not a whole number"),
            ("1998-04-30 21:32:00,1000000000001", "is more than 1000000000000"),
            (&far, "is more than 1000000000000"),
            ("1998-04-30 21:31:00,2", "some.csv:4: 1998-04-30 21:31:00 is there twice"),
            ("1998-04-30 21:30:00,2", "some.csv:4: the clock goes back"),
            ("1998-04-30 21:32:30,2", "some.csv:4: comes 90 s after the row before, and the others come every 60 s"),
            ("9998-04-30 21:32:00,2", "some.csv:4: comes more than a century"),
            ("2098-04-30 21:32:00,2", "some.csv:4: comes after a gap that makes more than 10000000 steps"),
            ("1998-02-30 21:32:00,2", "some.csv:4: period \"1998-02-30 21:32:00\" is not a time"),
            ("1998-04-30 21:32:00", "some.csv:4: \"1998-04-30 21:32:00\" is not a period and a count"),
            ("\n", "some.csv:4: \"\" is not a period and a count"),
            (&long, "some.csv:4: is longer than 4096 bytes"),
        ] {
            let told = after(row).unwrap_err().to_string();
            assert!(told.contains(said), "{row}: {told}");
        }
        assert_eq!(after("1998-04-30 21:32:00,1000000000000").unwrap().trace.counts, [1, 2, COUNT_MAX]);
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        let whole = |content: &str| parse("f", content.as_bytes()).unwrap_err().to_string();
        assert_eq!(whole(""), "f: is empty");
        assert_eq!(whole("period,count\n"), "f: has no rows");
        assert!(whole("period,count\n1998-04-30 21:30:00,1").contains("has one row"));
        assert!(whole("time,count\n").contains("f:1: \"time,count\" begins no trace"));
        assert!(whole("# vmatrix trace 2\n").contains("hint: a trace begins with"));
        assert!(whole("period,count\n1998-04-30 00:00:00,1\n1998-05-30 00:00:00,1").contains("its step is"));
        assert!(whole("# vmatrix trace 1\n# name: a\n").contains("ends before its \"# begins"));
        assert!(whole("# vmatrix trace 1\n# begins: a\n").contains("f:2: \"# begins: a\" stands where"));
        let ours = |step: &str, rest: &str| {
            whole(&format!("# vmatrix trace 1\n# name: a\n# begins: 1998-04-30 21:30:00\n# step_s: {step}\n{rest}"))
        };
        for step in ["-1", "1e3", "0.0000001", "", ".5", "5.", "99999999999999999999"] {
            assert!(ours(step, "requests\n1\n").contains("f:4: step_s cannot be"), "{step}");
        }
        for step in ["0", "0.7", "1.5"] {
            assert!(ours(step, "requests\n1\n").contains("its step must be whole seconds"), "{step}");
        }
        assert!(ours("60", "1\n").contains("f:5: \"1\" stands where \"requests\" should"));
        assert!(ours("60", "requests\n1\n-1\n").contains("f:7: count \"-1\" is negative"));
        assert!(ours("60", "requests\n").contains("it has no steps"));
    }

    #[test]
    fn a_trace_without_a_name_is_called_as_its_file() {
        assert_eq!(named_after("of/worldcup98.csv.gz"), "worldcup98");
        assert_eq!(named_after(".csv"), "trace");
        assert_eq!(named_after("a\nb .csv"), "ab");
        assert!(named_after(&"é".repeat(200)).len() <= NAME_MAX);
    }

    #[test]
    fn the_form_is_the_one_that_the_documents_show() {
        let mut written = vec![];
        Trace { step: Span::ms(250), ..minutes(&[2, 11]) }.write("f", &mut written).unwrap();
        let shown = "# vmatrix trace 1\n# name: some\n# begins: 1998-04-30 21:30:00\n# step_s: 0.25\nrequests\n2\n11\n";
        assert_eq!(String::from_utf8(written).unwrap(), shown);
        let refused = Trace { name: "two\nlines".into(), ..minutes(&[1]) }.write("f", &mut vec![]).unwrap_err();
        assert!(refused.to_string().contains("its name must be one line"), "{refused}");
    }

    /// Any trace that there may be.
    fn any_trace() -> impl Strategy<Value = Trace> {
        let steps = prop_oneof![(1u64..=86_400).prop_map(Span::secs), Just(Span::ms(250)), Just(Span(1))];
        let name = "[^\\pC\\s]([^\\pC]{0,20}[^\\pC\\s])?";
        (name, 0..civil::END / 2, steps, proptest::collection::vec(0..=COUNT_MAX, 1..50))
            .prop_map(|(name, begins, step, counts)| Trace { name, begins, step, counts })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_again(trace in any_trace()) {
            let mut written = vec![];
            trace.write("f", &mut written).unwrap();
            let read = parse("f", &written[..]).unwrap();
            prop_assert_eq!(read, Imported { trace, gaps: Gaps::default() });
        }

        #[test]
        fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), packed: bool) {
            let magic: &[u8] = if packed { &[0x1f, 0x8b, 8] } else { b"" };
            let _ = parse("f", &[magic, &bytes].concat()[..]);
            for start in [PERIODS, OURS] {
                let _ = parse("f", &[start.as_bytes(), b"\n", &bytes].concat()[..]);
            }
        }

        #[test]
        fn nearly_right_rows_are_read_or_refused(rows in "((1998|2038|9999)-0[0-9]-[0-3]0 2[0-9]:[0-6]0:00,[0-9.+eNa-]{0,14}\n){0,6}") {
            if let Ok(read) = text(&rows) {
                prop_assert!(read.trace.check().is_ok());
                let filled: u64 = read.gaps.0.iter().map(|g| g.steps).sum();
                prop_assert_eq!(read.trace.counts.len() as u64 - filled, rows.lines().count() as u64);
            }
        }
    }
}
