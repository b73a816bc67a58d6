//! `bench density`: how many clones of one guest a machine holds, each of which has served.
//!
//! ```text
//! machine ─▶ N × (cell, QEMU, pager shared) ─▶ 100 requests each ─▶ all alive: private memory by /proc
//! ```

use crate::Bench;
use crate::client;
use crate::guests::{Image, Kind};
use crate::product::{self, Fleet, Machine, Setup};
use crate::report::{Goal, Report, Row, Sample, hundredth, median};
use crate::world::{Link, World};
use anyhow::{Context, bail};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Not crossed: store and machine are at one site.
const LINK: Link = Link { mbit: 1000, rtt_us: 1000 };
/// What is asked for.
const CLONES: u32 = 100;
const REQUESTS: u64 = 100;
const MACHINE_GIB: f64 = 23.0;
const CLONES_MIN: f64 = 400.0;
const LIMIT: Duration = Duration::from_secs(600);
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// What one QEMU takes of the machine's memory, KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Taken {
    /// Of no other process.
    private: u64,
    /// Its share of everything, by the kernel.
    share: u64,
    /// Pages of guest memory that it has for itself.
    guest: u64,
}

/// Measures.
///
/// # Errors
/// See [`crate::run`].
pub fn measure(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut report = bench.report(
        "density",
        vec![
            "every clone runs at the same time, in a cell of its own, and has answered 100 requests, a tenth of them for text nobody read before".to_owned(),
            "private: Private_Clean + Private_Dirty of each QEMU's smaps_rollup; guest private: anonymous pages of its guest memory mapping".to_owned(),
            "in 23 GiB: what is left beside everything shared (guest memory file, pager, agent), divided by the private memory of one clone".to_owned(),
        ],
    );
    let (kind, clones) = if bench.options.quick { (Kind::Plain, 2) } else { (Kind::Tiny(2048), CLONES) };
    let image = bench.image(kind)?;
    let world = World::new(&bench.place, &bench.options.program, &["a"], LINK, &bench.stop)?;
    let site = world.site(0)?;
    let fleet = Fleet::found(bench.place.disk().join("fleet"))?;
    let _store = product::start_store(bench, &fleet, site)?;
    let setup = Setup { memory_mib: image.manifest.machine.memory_mib * u64::from(clones), ..Setup::default() };
    let machine = Machine::start(bench, &fleet, site, site.address, &setup)?;
    machine.stage_whole(bench, &image.manifest.name, LIMIT)?;
    let mut samples = Vec::new();
    for number in 0..clones {
        let (sample, request) = machine.order(bench, &image, number, number.into())?;
        for n in 0..REQUESTS {
            bench.stop.check()?;
            let asked = if n % 10 == 9 { kind.cold_request(*request.to.ip(), n) } else { None };
            client::ask(&site.namespace, asked.as_ref().unwrap_or(&request), REQUEST_LIMIT)?;
        }
        samples.push(sample);
        bench.say(&format!("density: {} of {clones} clones serve", number + 1));
    }
    let alive = taken(machine.state())?;
    if alive.len() != clones as usize {
        bail!("{} of {clones} clones are alive after their requests", alive.len());
    }
    let row = row(bench, &image, &samples, &alive)?;
    for (name, wanted, least) in [
        ("clones alive, each after 100 requests", ">= 100", f64::from(CLONES)),
        ("clones_in_23_gib", ">= 400", CLONES_MIN),
    ] {
        let seen = row.number(name).unwrap_or(alive.len() as f64);
        report.goals.push(Goal {
            what: name.replace('_', " "),
            wanted: wanted.to_owned(),
            seen: format!("{seen:.0}"),
            met: seen >= least,
        });
    }
    report.rows.push(row);
    Ok(report)
}

fn row(bench: &Bench, image: &Image, samples: &[Sample], alive: &[Taken]) -> anyhow::Result<Row> {
    let mut row = Row::of(image.kind.name(), image.manifest.machine.memory_mib, "vmatrix", samples);
    let mib = |of: &dyn Fn(&Taken) -> u64| alive.iter().map(|t| of(t) as f64 / 1024.0).collect::<Vec<f64>>();
    let private = mib(&|t| t.private);
    let one = median(&private).context("no clone is alive")?;
    row.add("clones", alive.len() as u64);
    row.add("private_mib_median", hundredth(one));
    row.add("private_mib_most", hundredth(private.iter().copied().fold(0.0, f64::max)));
    row.add("pss_mib_median", median(&mib(&|t| t.share)).map(hundredth));
    row.add("guest_private_mib_median", median(&mib(&|t| t.guest)).map(hundredth));
    let shared = folder_mib(bench.place.memory())?;
    row.add("shared_memory_mib", hundredth(shared));
    row.add("clones_in_23_gib", ((MACHINE_GIB * 1024.0 - shared) / one).floor());
    Ok(row)
}

/// Memory of every QEMU whose sockets are in the machine's folder.
fn taken(state: &Path) -> anyhow::Result<Vec<Taken>> {
    let within = format!("{}/cells/", state.display());
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let path = entry.context("cannot read /proc")?.path();
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if !(line.starts_with("qemu-system") && line.contains(&within)) {
            continue;
        }
        let rollup = fs::read_to_string(path.join("smaps_rollup"))
            .with_context(|| format!("cannot read the memory of {}", path.display()))?;
        let maps = fs::read_to_string(path.join("smaps"))
            .with_context(|| format!("cannot read the memory of {}", path.display()))?;
        all.push(Taken {
            private: kib(&rollup, "Private_Clean:") + kib(&rollup, "Private_Dirty:"),
            share: kib(&rollup, "Pss:"),
            guest: guest_kib(&maps),
        });
    }
    Ok(all)
}

/// Sum of a field, KiB.
fn kib(text: &str, field: &str) -> u64 {
    let lines = text.lines().filter_map(|l| l.strip_prefix(field));
    lines.filter_map(|l| l.split_whitespace().next()?.parse::<u64>().ok()).sum()
}

/// Anonymous pages of the mappings of a file called `memory`.
fn guest_kib(maps: &str) -> u64 {
    let mut inside = false;
    let mut sum = 0;
    for line in maps.lines() {
        if line.split(' ').next().is_some_and(|w| w.contains('-') && !w.ends_with(':')) {
            inside = line.ends_with("/memory");
        } else if inside {
            sum += kib(line, "Anonymous:");
        }
    }
    sum
}

/// What a folder in memory takes.
fn folder_mib(folder: &Path) -> anyhow::Result<f64> {
    let text = crate::process::output(std::process::Command::new("du").arg("-sk").arg(folder), "coreutils")?;
    let kib = String::from_utf8_lossy(&text).split_whitespace().next().and_then(|w| w.parse::<f64>().ok());
    Ok(kib.context("du says nothing")? / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clones_own_guest_pages_are_told_from_everything_else() {
        let maps = "7f00-7f10 rw-p 00000000 00:1 5 /dev/shm/x/memory\nRss: 100 kB\nAnonymous: 40 kB\n\
                    7f20-7f30 rw-p 00000000 00:0 0\nAnonymous: 900 kB\n\
                    7f40-7f50 rw-p 00100000 00:1 5 /dev/shm/x/memory\nAnonymous: 2 kB\n";
        assert_eq!(guest_kib(maps), 42);
        assert_eq!(kib(maps, "Anonymous:"), 942);
        assert_eq!(kib("Private_Clean:  3 kB\nPrivate_Dirty: 4 kB\n", "Private_Dirty:"), 4);
    }
}
