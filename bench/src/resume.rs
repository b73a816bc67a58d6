//! `bench resume`: a suspended guest on the machine that has it, by every way QEMU and libvirt know.
//!
//! ```text
//! guest × mechanism, interleaved ─▶ load step, first byte
//! ```
//! All images lie in memory: the best case of those who read all of it.

use crate::Bench;
use crate::baseline::{self, Scene};
use crate::fleet::{Fleet, start_store};
use crate::guests::Kind;
#[cfg(feature = "libvirt")]
use crate::libvirt::Libvirt;
use crate::product::{Machine, Setup};
use crate::report::{Goal, Key, Report, Row, Sample, hundredth};
use crate::vm::{Begin, Bridge, Ram, Vm};
use crate::world::{Link, World};
use anyhow::Context;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Not crossed: store and machine are at one site.
const LINK: Link = Link { mbit: 1000, rtt_us: 1000 };
/// A cold boot makes its data first: minutes under TCG.
const LIMIT: Duration = Duration::from_secs(600);
const GUESTS: [Kind; 3] = [Kind::Tiny(512), Kind::Tiny(2048), Kind::Tiny(8192)];
/// The goal for the load step.
const LOAD_MS_MAX: f64 = 8.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mechanism {
    /// The product: order to answer, all of the image in its store.
    Vmatrix,
    /// The product's mechanism by hand: a waiting QEMU that maps the memory file.
    Mapped,
    /// QEMU's file with each page at its own place.
    MappedRam,
    /// The product's mechanism under libvirt, which starts the QEMU first.
    LibvirtInstant,
    /// libvirt's own.
    VirshRestore,
    ColdBoot,
}

const MECHANISMS: [Mechanism; 6] = [
    Mechanism::Vmatrix,
    Mechanism::Mapped,
    Mechanism::MappedRam,
    Mechanism::LibvirtInstant,
    Mechanism::VirshRestore,
    Mechanism::ColdBoot,
];
/// Those that beat nobody unless the product beats them.
const OTHERS: [Mechanism; 3] = [Mechanism::MappedRam, Mechanism::VirshRestore, Mechanism::ColdBoot];

impl Mechanism {
    fn name(self) -> &'static str {
        match self {
            Mechanism::Vmatrix => "vmatrix",
            Mechanism::Mapped => "x_ignore_shared",
            Mechanism::MappedRam => "mapped_ram",
            Mechanism::LibvirtInstant => "libvirt_instant",
            Mechanism::VirshRestore => "virsh_restore",
            Mechanism::ColdBoot => "cold_boot",
        }
    }

    /// Whether this build can run it.
    fn is_built(self) -> bool {
        cfg!(feature = "libvirt") || !matches!(self, Mechanism::LibvirtInstant | Mechanism::VirshRestore)
    }
}

/// Measures.
///
/// # Errors
/// See [`crate::run`].
pub fn measure(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut report = bench.report(
        "resume",
        vec![
            "everything is on the machine, in memory; first byte: from the order to the first byte of the first correct answer".to_owned(),
            "vmatrix: cell, QEMU, pager, load, reseed, clock, health check, rules, by the machine's two steps; its load step is from its own log, whole milliseconds, with the command that lets the guest run".to_owned(),
            "x_ignore_shared, mapped_ram: a QEMU that already waits; libvirt_instant, virsh_restore: by a libvirt daemon of the bench's own, from the order, QEMU's start included; cold_boot: from starting QEMU, the guest makes its data at boot".to_owned(),
        ],
    );
    let kinds: &[Kind] = if bench.options.quick { &[Kind::Plain] } else { &GUESTS };
    for kind in kinds {
        let wants = |m: &Mechanism| bench.wants(&format!("{}/{}", kind.image(), m.name()));
        let mechanisms: Vec<Mechanism> = MECHANISMS.into_iter().filter(|m| m.is_built()).filter(wants).collect();
        if !mechanisms.is_empty() {
            let rows = rows(bench, *kind, &mechanisms)?;
            bench.keep(&mut report, rows)?;
        }
    }
    Ok(report)
}

/// Every row of the whole form.
pub fn plan() -> Vec<Key> {
    let row = |kind: Kind, mechanism: Mechanism| Key {
        guest: kind.name().to_owned(),
        ram_mib: kind.ram_mib(),
        link_mbit: None,
        rtt_us: None,
        mechanism: mechanism.name().to_owned(),
        of: None,
    };
    GUESTS.into_iter().flat_map(|kind| MECHANISMS.map(|mechanism| row(kind, mechanism))).collect()
}

/// The goals, against what the rows have.
pub fn goals(rows: &[Row]) -> Vec<Goal> {
    let find = |kind: Kind, mechanism: Mechanism| {
        rows.iter().find(|r| {
            (r.guest.as_str(), r.ram_mib, r.mechanism.as_str()) == (kind.name(), kind.ram_mib(), mechanism.name())
        })
    };
    let mut goals = Vec::new();
    for kind in GUESTS {
        for mechanism in [Mechanism::Vmatrix, Mechanism::Mapped] {
            let load = find(kind, mechanism).and_then(|r| r.load_ms_median);
            let what = format!("{} at {} MiB: load step, ms", mechanism.name(), kind.ram_mib());
            goals.push(Goal::at_most(what, LOAD_MS_MAX, load));
        }
        let first = |mechanism| find(kind, mechanism).and_then(|r| r.first_byte_ms_median);
        for (ours, other) in OTHERS
            .map(|other| (Mechanism::Vmatrix, other))
            .into_iter()
            .chain([(Mechanism::LibvirtInstant, Mechanism::VirshRestore)])
        {
            let share = first(ours).zip(first(other)).map(|(ours, other)| hundredth(ours / other));
            let what = format!("{} MiB: first byte of {} over {}", kind.ram_mib(), ours.name(), other.name());
            goals.push(Goal::at_most(what, 1.0, share));
        }
    }
    goals
}

fn rows(bench: &Bench, kind: Kind, mechanisms: &[Mechanism]) -> anyhow::Result<Vec<Row>> {
    let image = bench.image(kind)?;
    let world = World::new(&bench.place, &bench.options.program, &["a"], LINK, &bench.stop)?;
    let site = world.site(0)?;
    let bridge = Bridge::make(&site.namespace, &image.manifest.guest)?;
    let files = image.lay_out(&bench.store, &bench.place.memory().join("whole"))?;
    let scene = Scene {
        bench,
        image: &image,
        files: &files,
        source: &bridge,
        target: &bridge,
        target_site: &site.namespace,
        limit: LIMIT,
    };
    let wants = |m| mechanisms.contains(&m);
    let fleet = Fleet::found(bench.place.disk().join(format!("fleet-{}", kind.image())))?;
    let mut product = None;
    if wants(Mechanism::Vmatrix) {
        let store = start_store(bench, &fleet, site)?;
        let setup = Setup { memory_mib: 4 * image.manifest.machine.memory_mib, ..Setup::default() };
        let machine = Machine::start(bench, &fleet, site, site.address, &setup)?;
        machine.stage_whole(bench, &image.manifest.name, LIMIT)?;
        product = Some((machine, store));
    }
    let mapped = if wants(Mechanism::MappedRam) { Some(save_mapped(&scene)?) } else { None };
    #[cfg(feature = "libvirt")]
    let libvirt = match wants(Mechanism::VirshRestore) || wants(Mechanism::LibvirtInstant) {
        true => Some(Libvirt::save(&scene)?),
        false => None,
    };
    let mut samples: BTreeMap<Mechanism, Vec<Sample>> = BTreeMap::new();
    for run in 0..bench.runs() {
        for mechanism in mechanisms {
            let sample = match mechanism {
                Mechanism::Vmatrix => product.as_ref().context("no machine").and_then(|(machine, _)| {
                    let (sample, _) = machine.order(bench, &image, 0, run)?;
                    machine.release(&image, 0)?;
                    Ok(sample)
                }),
                Mechanism::Mapped => baseline::local(&scene, run),
                Mechanism::MappedRam => {
                    mapped.as_ref().context("nothing was saved").and_then(|file| restore_mapped(&scene, file, run))
                }
                #[cfg(feature = "libvirt")]
                Mechanism::LibvirtInstant => {
                    libvirt.as_ref().context("there is no daemon").and_then(|l| l.instant(&scene, run))
                }
                #[cfg(feature = "libvirt")]
                Mechanism::VirshRestore => {
                    libvirt.as_ref().context("nothing was saved").and_then(|l| l.restore(&scene, run))
                }
                #[cfg(not(feature = "libvirt"))]
                Mechanism::LibvirtInstant | Mechanism::VirshRestore => {
                    anyhow::bail!("this program was built without the feature `libvirt`")
                }
                Mechanism::ColdBoot => cold_boot(&scene, run),
            };
            let sample = sample.with_context(|| format!("{} by {}", kind.image(), mechanism.name()))?;
            bench.say(&format!(
                "resume {} {}: run {}: first byte {:.0} ms, load {:.1} ms",
                kind.image(),
                mechanism.name(),
                run + 1,
                sample.first_byte_ms,
                sample.load_ms.unwrap_or(0.0)
            ));
            samples.entry(*mechanism).or_default().push(sample);
        }
    }
    let mut rows = Vec::new();
    for mechanism in mechanisms {
        let runs = samples.get(mechanism).map_or(&[][..], Vec::as_slice);
        let mut row = Row::of(kind.name(), image.manifest.machine.memory_mib, mechanism.name(), runs);
        row.add("image", image.manifest.name.clone());
        row.add("load", hundredth(crate::load()));
        rows.push(row);
    }
    drop(product);
    std::fs::remove_dir_all(bench.place.memory().join("whole")).context("cannot remove the laid-out image")?;
    Ok(rows)
}

/// Saves the guest into a file with each page at its own place.
fn save_mapped(scene: &Scene<'_>) -> anyhow::Result<PathBuf> {
    let (bench, runtime) = (scene.bench, &scene.bench.runtime);
    let file = bench.place.memory().join("mapped");
    let spec = &scene.image.manifest.machine;
    // From the disk: a private mapping of a file in memory that is read allocates the file's holes.
    let files = scene.image.lay_out(&bench.store, &bench.place.disk().join("whole"))?;
    let waiting = (Ram::Clone, Begin::Waiting);
    let mut vm = Vm::start(runtime, spec, &files, scene.source, bench.place.memory(), waiting)?;
    vm.load_state(runtime, &files.device)?;
    vm.prepare_migration(runtime, true)?;
    vm.execute(runtime, "migrate", json!({ "uri": uri(&file) }))?;
    vm.until_migrated(runtime, LIMIT)?;
    Ok(file)
}

fn restore_mapped(scene: &Scene<'_>, file: &Path, run: u64) -> anyhow::Result<Sample> {
    let runtime = &scene.bench.runtime;
    let spec = &scene.image.manifest.machine;
    let waiting = (Ram::Own, Begin::Waiting);
    let mut vm = Vm::start(runtime, spec, scene.files, scene.target, scene.bench.place.memory(), waiting)?;
    vm.prepare_migration(runtime, true)?;
    let began = Instant::now();
    let mut load = None;
    let answered = scene.watch(&scene.request(run)?, began, || {
        vm.execute(runtime, "migrate-incoming", json!({ "uri": uri(file) }))?;
        vm.until_migrated(runtime, LIMIT)?;
        load = Some(began.elapsed());
        vm.cont(runtime)
    })?;
    scene.after(answered, run, load, 0)
}

fn cold_boot(scene: &Scene<'_>, run: u64) -> anyhow::Result<Sample> {
    let bench = scene.bench;
    // A memory file of its own, which the boot writes.
    let folder = bench.place.memory().join("boot");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let files = vmatrix_vma_image::machine::Files { memory: folder.join("memory"), ..scene.files.clone() };
    std::fs::File::create(&files.memory)
        .and_then(|f| f.set_len(scene.image.manifest.memory.size.0))
        .with_context(|| format!("cannot make {}", files.memory.display()))?;
    let began = Instant::now();
    let spec = &scene.image.manifest.machine;
    let boot = (Ram::Shared, Begin::Boot);
    let vm = Vm::start(&bench.runtime, spec, &files, scene.target, bench.place.memory(), boot)?;
    let answered = scene.watch(&scene.request(run)?, began, || Ok(()))?;
    let sample = scene.after(answered, run, None, 0);
    drop(vm);
    std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    sample
}

fn uri(file: &Path) -> String {
    format!("file:{}", file.display())
}
