//! `bench density`: how many clones of one guest a machine holds, each of which has served.
//!
//! ```text
//! machine ─▶ N × (cell, QEMU, pager shared) ─▶ 100 requests each ─▶ all alive: private memory by /proc
//! ```

use crate::Bench;
use crate::client;
use crate::fleet::{Fleet, start_store};
use crate::guests::Kind;
use crate::product::{Machine, Setup};
use crate::report::{Goal, Key, Report, Row, hundredth, median};
use crate::world::{Link, World};
use anyhow::{Context, bail};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Not crossed: store and machine are at one site.
const LINK: Link = Link { mbit: 1000, rtt_us: 1000 };
/// Clones unless another number is asked for: what the goal is about.
pub const CLONES: u32 = 100;
/// Most clones: what a machine's cells have addresses for is more, what a bench's patience bears is not.
const CLONES_MAX: u32 = 128;
const REQUESTS: u64 = 100;
const MACHINE_GIB: f64 = 23.0;
const CLONES_MIN: f64 = 400.0;
const LIMIT: Duration = Duration::from_secs(600);
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// So much of the machine is left to others; with less, no further clone is started.
const LEFT_KIB_MIN: u64 = 3 << 20;

/// What one QEMU takes of the machine's memory, KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Taken {
    /// Of no other process: what the next ones are parts of.
    private: u64,
    /// Its share of everything, by the kernel.
    share: u64,
    /// Pages of guest memory that it has for itself.
    guest: u64,
    /// Translated code of the guest.
    code: u64,
    /// The C library's heap.
    heap: u64,
    /// Its program and libraries, where it wrote into them.
    files: u64,
    /// Page tables, which the kernel keeps for it.
    tables: u64,
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
            "private: Private_Clean + Private_Dirty of each QEMU's smaps_rollup; of that, guest: anonymous pages of its guest memory, code: what TCG translated (not there under KVM), heap: the C library's, files: program and libraries it wrote into, other: stacks, TCG's tables, further heaps; page tables come on top (VmPTE)".to_owned(),
            "clones_in_23_gib = floor((23 x 1024 MiB - shared) / (private + page tables of the median clone)); shared: the guest memory file, agent and pager by their Pss, and what all QEMUs share (sum of Pss - private)".to_owned(),
            "available_mib_each: what the machine's MemAvailable lost between the first and the last clone, by clone: whatever else ran is in it".to_owned(),
        ],
    );
    let (kind, clones) = if bench.options.quick { (Kind::Plain, 2) } else { (Kind::Tiny(2048), bench.scope.clones) };
    if !(1..=CLONES_MAX).contains(&clones) {
        bail!("density keeps 1 to {CLONES_MAX} clones alive, not {clones}");
    }
    let image = bench.image(kind)?;
    let world = World::new(&bench.place, &bench.options.program, &["a"], LINK, &bench.stop)?;
    let site = world.site(0)?;
    let fleet = Fleet::found(bench.place.disk().join("fleet"))?;
    let _store = start_store(bench, &fleet, site)?;
    let setup = Setup { memory_mib: image.manifest.machine.memory_mib * u64::from(clones), ..Setup::default() };
    let machine = Machine::start(bench, &fleet, site, site.address, &setup)?;
    machine.stage_whole(bench, &image.manifest.name, LIMIT)?;
    let mut samples = Vec::new();
    let mut available = Vec::new();
    for number in 0..clones {
        available.push(available_kib()?);
        if available.last().is_some_and(|left| *left < LEFT_KIB_MIN) {
            bail!("{number} of {clones} clones leave less than {} MiB of the machine", LEFT_KIB_MIN >> 10);
        }
        let (sample, request) = machine.order(bench, &image, number, number.into())?;
        for n in 0..REQUESTS {
            bench.stop.check()?;
            let asked = if n % 10 == 9 { kind.cold_request(*request.to.ip(), n) } else { None };
            client::ask(&site.namespace, asked.as_ref().unwrap_or(&request), REQUEST_LIMIT)?;
        }
        samples.push(sample);
        bench.say(&format!("density: {} of {clones} clones serve", number + 1));
    }
    available.push(available_kib()?);
    let alive = taken(machine.state())?;
    if alive.len() != clones as usize {
        bail!("{} of {clones} clones are alive after their requests", alive.len());
    }
    let agents = machine.pid().map_or(0, pss_kib) + pagers_kib(machine.state())?;
    let shared = folder_mib(bench.place.memory())? + agents as f64 / 1024.0;
    let mut row = Row::of(kind.name(), image.manifest.machine.memory_mib, "vmatrix", &samples);
    row.add("image", image.manifest.name.clone());
    row.add("load", hundredth(crate::load()));
    add_memory(&mut row, &alive, shared)?;
    if let (Some(first), Some(last)) = (available.get(1), available.last()) {
        let lost = first.saturating_sub(*last) as f64 / 1024.0;
        row.add("available_mib_each", hundredth(lost / f64::from(clones.saturating_sub(1).max(1))));
    }
    bench.keep(&mut report, vec![row])?;
    Ok(report)
}

/// Every row of the whole form.
pub fn plan() -> Vec<Key> {
    let kind = Kind::Tiny(2048);
    vec![Key {
        guest: kind.name().to_owned(),
        ram_mib: kind.ram_mib(),
        link_mbit: None,
        rtt_us: None,
        mechanism: "vmatrix".to_owned(),
        of: Some(CLONES.to_string()),
    }]
}

/// The goals, against the row with most clones.
pub fn goals(rows: &[Row]) -> Vec<Goal> {
    let most = rows.iter().max_by(|a, b| f64::total_cmp(&clones(a), &clones(b)));
    vec![
        Goal::at_least("clones alive, each after 100 requests", f64::from(CLONES), most.map(clones)),
        Goal::at_least("clones in 23 GiB, extrapolated", CLONES_MIN, most.and_then(|r| r.number("clones_in_23_gib"))),
    ]
}

fn clones(row: &Row) -> f64 {
    row.number("clones").unwrap_or(0.0)
}

/// What the clones take, by clone and in all. `shared_mib`: of the agent, the pager and the guest memory file.
fn add_memory(row: &mut Row, alive: &[Taken], shared_mib: f64) -> anyhow::Result<()> {
    let mib = |of: &dyn Fn(&Taken) -> u64| alive.iter().map(|t| of(t) as f64 / 1024.0).collect::<Vec<f64>>();
    let one = median(&mib(&|t| t.private)).context("no clone is alive")?;
    let tables = median(&mib(&|t| t.tables)).unwrap_or(0.0);
    row.add("clones", alive.len() as u64);
    row.add("private_mib_median", hundredth(one));
    row.add("private_mib_most", hundredth(mib(&|t| t.private).into_iter().fold(0.0, f64::max)));
    row.add("pss_mib_median", median(&mib(&|t| t.share)).map(hundredth));
    row.add("guest_private_mib_median", median(&mib(&|t| t.guest)).map(hundredth));
    row.add("qemu_private_mib_median", median(&mib(&|t| t.private.saturating_sub(t.guest))).map(hundredth));
    row.add("qemu_code_mib_median", median(&mib(&|t| t.code)).map(hundredth));
    row.add("qemu_heap_mib_median", median(&mib(&|t| t.heap)).map(hundredth));
    row.add("qemu_files_mib_median", median(&mib(&|t| t.files)).map(hundredth));
    let named = |t: &Taken| t.guest + t.code + t.heap + t.files;
    row.add("qemu_other_mib_median", median(&mib(&|t| t.private.saturating_sub(named(t)))).map(hundredth));
    row.add("page_tables_mib_median", hundredth(tables));
    let shared = shared_mib + mib(&|t| t.share.saturating_sub(t.private)).iter().sum::<f64>();
    row.add("shared_mib", hundredth(shared));
    row.add("clones_in_23_gib", ((MACHINE_GIB * 1024.0 - shared) / (one + tables)).floor());
    Ok(())
}

/// Memory of every QEMU whose sockets are in the machine's folder: in a cell's, or where it waited for its cell.
fn taken(state: &Path) -> anyhow::Result<Vec<Taken>> {
    let within = format!("{}/", state.display());
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let path = entry.context("cannot read /proc")?.path();
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if !(line.starts_with("qemu-system") && line.contains(&within)) {
            continue;
        }
        let read = |name: &str| {
            fs::read_to_string(path.join(name)).with_context(|| format!("cannot read the memory of {}", path.display()))
        };
        let rollup = read("smaps_rollup")?;
        let mut one = parts(&read("smaps")?);
        one.private = private(&rollup);
        one.share = kib(&rollup, "Pss:");
        one.tables = kib(&read("status")?, "VmPTE:");
        all.push(one);
    }
    Ok(all)
}

/// Sum of a field, KiB.
fn kib(text: &str, field: &str) -> u64 {
    let lines = text.lines().filter_map(|l| l.strip_prefix(field));
    lines.filter_map(|l| l.split_whitespace().next()?.parse::<u64>().ok()).sum()
}

fn private(text: &str) -> u64 {
    kib(text, "Private_Clean:") + kib(text, "Private_Dirty:")
}

/// What private memory is used for, by the mappings it is in.
fn parts(maps: &str) -> Taken {
    let mut taken = Taken::default();
    let mut begin = 0;
    let starts: Vec<usize> = maps
        .match_indices('\n')
        .map(|(at, _)| at + 1)
        .chain([maps.len()])
        .filter(|at| maps.get(*at..).is_none_or(|rest| rest.is_empty() || is_mapping(rest)))
        .collect();
    for end in starts {
        let one = maps.get(begin..end).unwrap_or_default();
        begin = end;
        let head = one.lines().next().unwrap_or_default();
        let mut words = head.split_whitespace();
        let (flags, name) = (words.nth(1).unwrap_or_default(), words.nth(3).unwrap_or_default());
        match name {
            _ if name.ends_with("/memory") => taken.guest += kib(one, "Anonymous:"),
            "[heap]" => taken.heap += private(one),
            "" if flags.contains('x') => taken.code += private(one),
            _ if name.starts_with('/') => taken.files += private(one),
            _ => {}
        }
    }
    taken
}

/// Whether text begins with the head of a mapping: `7f00-7f10 rw-p …`.
fn is_mapping(text: &str) -> bool {
    let word = text.split(' ').next().unwrap_or_default();
    word.contains('-') && word.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

/// What is left of the machine's memory.
fn available_kib() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    Ok(kib(&text, "MemAvailable:"))
}

/// A process's share of memory; nothing once it is gone.
fn pss_kib(pid: u32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).map_or(0, |text| kib(&text, "Pss:"))
}

/// What a machine's pagers take.
fn pagers_kib(state: &Path) -> anyhow::Result<u64> {
    let within = format!("{}/", state.display());
    let mut sum = 0;
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let path = entry.context("cannot read /proc")?.path();
        let Some(pid) = path.file_name().and_then(|n| n.to_str()?.parse::<u32>().ok()) else { continue };
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains(&within) && !line.starts_with("qemu-system") {
            sum += pss_kib(pid);
        }
    }
    Ok(sum)
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
        let maps = "7f00-7f10 rw-p 00000000 00:1 5    /dev/shm/x/memory\nRss: 100 kB\nPrivate_Dirty: 41 kB\nAnonymous: 40 kB\n\
                    7f20-7f30 rw-p 00000000 00:0 0\nPrivate_Dirty: 900 kB\nAnonymous: 900 kB\n\
                    7f30-7f38 rwxp 00000000 00:0 0 \nPrivate_Dirty: 7 kB\nAnonymous: 7 kB\n\
                    7f39-7f3a rw-p 00000000 00:0 0    [heap]\nPrivate_Dirty: 11 kB\n\
                    7f3b-7f3c r-xp 00000000 00:2 9    /usr/bin/qemu\nPrivate_Clean: 2 kB\nPrivate_Dirty: 1 kB\n\
                    7f40-7f50 rw-p 00100000 00:1 5    /dev/shm/x/memory\nAnonymous: 2 kB\n";
        let taken = parts(maps);
        assert_eq!((taken.guest, taken.code, taken.heap, taken.files), (42, 7, 11, 3));
        assert_eq!(private("Private_Clean:  3 kB\nPrivate_Dirty: 4 kB\n"), 7);
    }

    #[test]
    fn clones_of_one_size_fill_what_is_left_beside_what_they_share() {
        let rows = vec![of_clones(100), of_clones(12)];
        let goals = goals(&rows);
        assert!(goals.iter().all(|g| g.met == Some(true)), "{goals:?}");
        // (23 x 1024 - 1024) / (40 + 4) MiB
        assert_eq!(rows.first().and_then(|r| r.number("clones_in_23_gib")), Some(512.0));
    }

    fn of_clones(count: usize) -> Row {
        let one = Taken { private: 40 << 10, share: 40 << 10, tables: 4 << 10, ..Taken::default() };
        let mut row = Row::default();
        add_memory(&mut row, &vec![one; count], 1024.0).unwrap();
        row
    }
}
