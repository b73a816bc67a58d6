//! Traces of demand, and what they and matrices are like.

use crate::args::{Trace, TraceKind};
use anyhow::{Context, Result};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use vmatrix_model::fleet::Fleet;
use vmatrix_replay::journal::Journal;
use vmatrix_replay::matrix;
use vmatrix_replay::scenario::Scenario;
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
        Trace::Journal { state_dir, fleet, output } => journal(state_dir, fleet, output)?,
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

/// Makes a scenario of a journal and writes it with its traces.
fn journal(state_dir: &Path, fleet_file: &Path, folder: &Path) -> Result<()> {
    let file = fleet_file.display().to_string();
    let text = std::fs::read_to_string(fleet_file).with_context(|| format!("cannot read {file}"))?;
    let fleet: Fleet = vmatrix_model::config::parse_toml(&file, &text)?;
    fleet.check().with_context(|| file.clone())?;
    let mut journal = Journal::default();
    let parts = ["journal.1.jsonl", "journal.jsonl"].map(|name| state_dir.join(name));
    anyhow::ensure!(
        parts.iter().any(|part| part.exists()),
        "{} has no journal.jsonl\n\nhint: name the state_dir of the CPA's configuration",
        state_dir.display()
    );
    for part in parts.iter().filter(|part| part.exists()) {
        let name = part.display().to_string();
        let open = std::fs::File::open(part).with_context(|| format!("cannot open {name}"))?;
        journal.read(&fleet, &name, std::io::BufReader::new(open))?;
    }
    if journal.elsewhere > 0 {
        eprintln!("{} requests came from no region of the fleet, or for no service of it: left out", journal.elsewhere);
    }
    let recorded = journal.recorded(&fleet).map_err(anyhow::Error::msg)?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, trace) in &recorded.traces {
        write(trace, Some(&folder.join(name)))?;
    }
    let path = folder.join("recorded.toml");
    let mut file = std::fs::File::create_new(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.write_all(recorded.scenario.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
    // What was written must play: who made it learns of it, not who plays it.
    Scenario::read(&path)?;
    eprintln!("{}: play it with `vmatrix replay {}`", path.display(), path.display());
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
