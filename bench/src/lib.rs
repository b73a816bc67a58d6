//! Measures the product against what a user has without it, side by side in one run.
//!
//! ```text
//! name + options ─▶ world (namespaces, WAN emulator, real TCP) ─▶ runs, mechanisms interleaved ─▶ Report
//! ```
//! Nothing is modelled: what is compared is run, on the same machine, over the same link, one after the other.

pub mod baseline;
pub mod client;
pub mod density;
pub mod fanout;
pub mod fleet;
pub mod guests;
#[cfg(feature = "libvirt")]
pub mod libvirt;
pub mod limit;
pub mod origin;
pub mod page;
pub mod place;
pub mod process;
pub mod product;
pub mod relocate;
pub mod report;
pub mod results;
pub mod resume;
pub mod singleton;
pub mod snapshot;
pub mod stop;
pub mod tls;
pub mod vm;
pub mod wire;
pub mod world;

pub use page::markdown;
pub use report::Report;

use crate::guests::{Image, Kind, Known};
use crate::place::Place;
use crate::report::{Machine, Row};
use crate::stop::Stop;
use anyhow::{Context, bail};
use std::path::PathBuf;
use tokio::runtime::Runtime;
use vmatrix_vma_image::{Store, machine};

/// Every bench, in the order of `docs/benchmarks.md`.
pub const NAMES: [&str; 6] = ["relocate", "resume", "density", "wire", "fanout", "singleton"];
/// Runs of each row unless options say otherwise.
const RUNS: u64 = 5;

/// How to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// The program `vmatrix`: its daemons and its WAN emulator are measured, as processes.
    pub program: PathBuf,
    /// Where built guests are kept; those that are missing are built.
    pub store: PathBuf,
    /// Recipes of the guests.
    pub recipes: PathBuf,
    /// One run of the fewest rows: shows that a bench works, and no figure worth quoting.
    pub quick: bool,
    /// Only rows whose `guest/mechanism/link` contains one of these; all if empty.
    pub rows: Vec<String>,
    /// Runs of each row, instead of five; of `singleton` the relocations in a row, instead of 200.
    pub runs: Option<u64>,
}

/// What of a bench is run, where it has a number to choose, and where its rows are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// Clones that `density` keeps alive at the same time.
    pub clones: u32,
    /// Numbers of networks that `fanout` brings the image to.
    pub networks: Vec<usize>,
    /// A result file that gets the rows as soon as they are whole: a run of hours that is interrupted has not been
    /// for nothing. See [`results::into`].
    pub into: Option<PathBuf>,
}

impl Default for Scope {
    fn default() -> Scope {
        Scope { clones: density::CLONES, networks: fanout::NETWORKS.to_vec(), into: None }
    }
}

/// Runs a bench in its usual scope; see [`run_scope`].
///
/// # Errors
/// As [`run_scope`].
pub fn run(name: &str, options: &Options) -> anyhow::Result<Report> {
    run_scope(name, options, &Scope::default())
}

/// Runs a bench to its end and takes down everything it made, however it ends. The report has what was measured now,
/// and what the result file had before, if there is one.
///
/// # Errors
/// There is no bench of that name, the machine lacks something, a mechanism gives a wrong answer, or SIGINT
/// or SIGTERM came.
pub fn run_scope(name: &str, options: &Options, scope: &Scope) -> anyhow::Result<Report> {
    // On a thread of its own: programs it starts live as long as it, and the caller may be inside a runtime.
    std::thread::scope(|threads| {
        let worker = std::thread::Builder::new()
            .name("bench".to_owned())
            .spawn_scoped(threads, || run_here(name, options, scope));
        worker.context("cannot start a thread")?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn run_here(name: &str, options: &Options, scope: &Scope) -> anyhow::Result<Report> {
    let measure = match name {
        "relocate" => relocate::measure,
        "resume" => resume::measure,
        "density" => density::measure,
        "wire" => wire::measure,
        "fanout" => fanout::measure,
        "singleton" => singleton::measure,
        _ => bail!("there is no bench {name:?}; there are {}", NAMES.join(", ")),
    };
    if let Some(file) = scope.into.as_ref().filter(|f| f.exists()) {
        // Better now than after an hour.
        results::read(file)?;
    }
    let mut bench = Bench::new(options.clone(), scope.clone())?;
    let mut report = measure(&mut bench)?;
    bench.conclude(&mut report);
    match &scope.into {
        Some(file) => results::into(file, report),
        None => Ok(report),
    }
}

/// The command line that measures this, for a reader who wants to repeat it.
fn command(name: &str, options: &Options, scope: &Scope) -> String {
    let mut words = vec![format!("vmatrix bench {name} --json")];
    words.extend(options.quick.then(|| "--quick".to_owned()));
    words.extend(options.runs.map(|runs| format!("--runs {runs}")));
    words.extend(options.rows.iter().map(|row| format!("--rows {row}")));
    match name {
        "density" => words.push(format!("--clones {}", scope.clones)),
        "fanout" => words.extend(scope.networks.iter().map(|n| format!("--networks {n}"))),
        _ => {}
    }
    words.join(" ")
}

/// A bench that runs, and what all of them need.
pub struct Bench {
    pub options: Options,
    pub scope: Scope,
    pub runtime: Runtime,
    pub stop: Stop,
    pub store: Store,
    pub machine: Machine,
    pub known: Known,
    // Last: what it clears away, the others may still hold.
    pub place: Place,
}

impl Bench {
    fn new(options: Options, scope: Scope) -> anyhow::Result<Bench> {
        if !nix::unistd::geteuid().is_root() {
            bail!("a bench makes namespaces and runs QEMU: run it as root");
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let stop = Stop::listen(&runtime)?;
        let host = machine::host()?;
        let seen = Machine {
            kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
            qemu: host.qemu_version,
            accelerator: host.accelerator,
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
            memory_mib: nix::sys::sysinfo::sysinfo()?.ram_total() >> 20,
            load: [load(); 2],
        };
        let store = Store::open(&options.store)?;
        let known = Known { recipes: options.recipes.clone(), mark: format!("bench-{}", std::process::id()) };
        Ok(Bench { runtime, stop, store, machine: seen, known, place: Place::claim()?, scope, options })
    }

    /// A guest's image, built if it is not there.
    ///
    /// # Errors
    /// Its recipe cannot be read or built.
    pub fn image(&self, kind: Kind) -> anyhow::Result<Image> {
        let recipe = kind.recipe(&self.options.recipes, &self.place.disk().join("recipes"))?;
        let options = vmatrix_vma_build::Options::default();
        let built = self.runtime.block_on(vmatrix_vma_build::build(&recipe, &self.options.store, &options))?;
        if !built.cached {
            self.say(&format!("{} built in {:.0} s", built.name, built.took.as_secs_f64()));
        }
        Image::read(&self.store, kind)
    }

    /// Tells the person who waits.
    pub fn say(&self, line: &str) {
        eprintln!("bench: {line}");
    }

    /// Runs of a row.
    pub fn runs(&self) -> u64 {
        self.options.runs.unwrap_or(if self.options.quick { 1 } else { RUNS })
    }

    /// Whether a row was asked for.
    pub fn wants(&self, row: &str) -> bool {
        self.options.rows.is_empty() || self.options.rows.iter().any(|r| row.contains(r.as_str()))
    }

    /// Adds rows that are whole to a report, and to the result file at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn keep(&self, report: &mut Report, rows: Vec<Row>) -> anyhow::Result<()> {
        if let Some(file) = &self.scope.into {
            let mut now = Report { rows: rows.clone(), ..report.clone() };
            self.conclude(&mut now);
            results::into(file, now)?;
        }
        report.rows.extend(rows);
        Ok(())
    }

    /// What follows from a report's rows, and the load until now.
    fn conclude(&self, report: &mut Report) {
        let (name, now) = (report.bench.clone(), load());
        // Those are of the whole form.
        report.goals = if report.quick { Vec::new() } else { results::goals(&name, &report.rows) };
        report.commands = vec![command(&name, &self.options, &self.scope)];
        let began = self.machine.load[0];
        report.machine.load = [began.min(now), began.max(now)];
    }

    /// A report without rows yet.
    pub fn report(&self, name: &str, conditions: Vec<String>) -> Report {
        Report {
            bench: name.to_owned(),
            quick: self.options.quick,
            machine: self.machine.clone(),
            conditions,
            commands: Vec::new(),
            rows: Vec::new(),
            goals: Vec::new(),
        }
    }
}

/// Load average of the last minute.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|w| w.parse().ok()).unwrap_or(0.0)
}
