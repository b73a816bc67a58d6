//! Traces of demand, and what they and matrices are like.

use crate::args::{Trace, TraceKind};
use anyhow::{Context, Result};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use vmatrix_replay::matrix;
use vmatrix_replay::trace::{self, Crowd, Kind, TraceError};

pub fn run(trace: &Trace) -> Result<ExitCode> {
    match trace {
        Trace::Import { file, output, name, clean, mask } => {
            let mut trace = read(file)?;
            if let Some(name) = name {
                trace.name.clone_from(name);
            }
            for (from, to) in mask {
                let (masked, change) = trace.mask(*from, *to)?;
                trace = masked;
                eprintln!("masked {change}");
            }
            if *clean {
                let (cleaned, changes) = trace.clean();
                trace = cleaned;
                changes.iter().for_each(|change| eprintln!("cleaned {change}"));
                if changes.is_empty() {
                    eprintln!("nothing to clean: no run of one count is longer than chance makes them");
                }
            }
            write(&trace, output.as_deref())?;
        }
        Trace::Generate { kind, seed, days, output } => {
            write(&trace::generate(kind_of(*kind), *seed, *days), output.as_deref())?;
        }
        Trace::Describe { file } => say(&describe(file)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn kind_of(kind: TraceKind) -> Kind {
    match kind {
        TraceKind::Diurnal => Kind::Diurnal,
        TraceKind::Flash => Kind::Flash(Crowd::SUDDEN),
        TraceKind::Stock => Kind::Stock,
        TraceKind::Sport => Kind::Sport,
        TraceKind::Swell => Kind::Swell,
    }
}

/// Reads a trace and tells of its gaps.
fn read(file: &Path) -> Result<trace::Trace> {
    let read = trace::import(file)?;
    if !read.gaps.0.is_empty() {
        eprintln!("{}: {}", file.display(), read.gaps);
    }
    Ok(read.trace)
}

fn write(trace: &trace::Trace, output: Option<&Path>) -> Result<()> {
    let Some(path) = output else {
        return match trace.write("stdout", std::io::stdout().lock()) {
            // Whoever reads has seen enough.
            Err(TraceError::Write { source, .. }) if source.kind() == ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        };
    };
    let file = std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    trace.write(&path.display().to_string(), file)?;
    eprintln!("{}: {} steps of {}, {} requests", path.display(), trace.counts.len(), trace.step, trace.total());
    Ok(())
}

fn describe(file: &Path) -> Result<String> {
    if !is_matrix(file)? {
        return Ok(read(file)?.describe().to_string());
    }
    let matrix = matrix::read(file)?;
    let (seen, done) = (matrix.describe(), matrix.complete());
    let completed =
        if seen.unknown > 0 { format!("completed   {done}\n{}", done.matrix.describe()) } else { String::new() };
    Ok(format!("{seen}{completed}"))
}

/// Whether this is a matrix and no trace: a folder, or numbers between tabs.
fn is_matrix(file: &Path) -> Result<bool> {
    if file.is_dir() {
        return Ok(true);
    }
    // A trace says what it is before that, and a matrix has a tab.
    const START: u64 = 256;
    let mut start = vec![];
    let read = std::fs::File::open(file).and_then(|f| f.take(START).read_to_end(&mut start));
    read.with_context(|| format!("cannot read {}", file.display()))?;
    Ok(start
        .split(|b| *b == b'\n')
        .next()
        .is_some_and(|line| line.contains(&b'\t') && !line.starts_with(&[0x1f, 0x8b])))
}

fn say(text: &str) -> Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e).context("cannot write to stdout"),
        _ => Ok(()),
    }
}
