//! What may be typed after `vmatrix trace`.

use clap::{Subcommand, ValueEnum};
use std::path::PathBuf;
use vmatrix_replay::trace;

#[derive(Debug, Subcommand)]
pub enum Trace {
    /// Read a recorded trace (period,count as CSV, plain or gzip) and write it in the form that scenarios name
    Import {
        /// The recorded trace; docs/placement-data.md says where to get them
        file: PathBuf,
        /// The file to write; without it, stdout
        #[arg(short, long)]
        output: Option<PathBuf>,
        /// Its name from now on; as the file's without it
        #[arg(long)]
        name: Option<String>,
        /// Take out runs of one count that chance cannot have made
        #[arg(long)]
        clean: bool,
        /// Take out what is known to be no demand, as 1998-05-12 06:31:00..1998-05-12 06:45:00 (UTC)
        #[arg(long, value_name = "FROM..TO", value_parser = between)]
        mask: Vec<(i64, i64)>,
    },
    /// Make a trace that nobody recorded: the same on every machine
    Generate {
        #[arg(value_enum)]
        kind: TraceKind,
        /// The only source of chance
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How long, from Monday 2001-01-01 on
        #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=i64::from(trace::DAYS_MAX)))]
        days: u32,
        /// The file to write; without it, stdout
        #[arg(short, long)]
        output: Option<PathBuf>,
    },
    /// Make a scenario of a CPA's journal: what its fleet was asked and ordered, to be played again
    Journal {
        /// The CPA's state directory, with journal.jsonl
        state_dir: PathBuf,
        /// The CPA's fleet_file
        #[arg(long)]
        fleet: PathBuf,
        /// A folder for recorded.toml and its traces; it is made, and must not have a recorded.toml
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Say what a trace is like, or a matrix of round trips and prices
    Describe {
        /// A trace of either form; a matrix as docs/placement-data.md has them, a file or a folder
        file: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum TraceKind {
    /// A day's curve, less at weekends
    Diurnal,
    /// The same, and once a day ten times as much within a minute
    Flash,
    /// Busy on weekdays; a twentieth of it at weekends
    Stock,
    /// Busy at weekends; a tenth of it on weekdays
    Sport,
    /// A day's curve that slowly grows to four times and shrinks again
    Swell,
}

/// Unix seconds of two times with `..` between them.
fn between(text: &str) -> Result<(i64, i64), String> {
    let times = text.split_once("..").and_then(|(from, to)| trace::time(from).zip(trace::time(to)));
    times.ok_or_else(|| "write it as 1998-05-12 06:31:00..1998-05-12 06:45:00".to_owned())
}
