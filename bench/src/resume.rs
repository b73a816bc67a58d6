//! `bench resume`: a suspended guest on the machine that has it, by every way QEMU and libvirt know.
//!
//! ```text
//! guest × mechanism, interleaved ─▶ load step, first byte
//! ```
//! All images lie in memory: the best case of those who read all of it.

use crate::Bench;
use crate::baseline::{self, Scene};
use crate::guests::Kind;
#[cfg(feature = "libvirt")]
use crate::libvirt::Libvirt;
use crate::product::{self, Fleet, Machine, Setup};
use crate::report::{Goal, Report, Row, Sample};
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
    /// libvirt's own; in a build with the feature `libvirt`.
    #[cfg(feature = "libvirt")]
    VirshRestore,
    ColdBoot,
}

const MECHANISMS: &[Mechanism] = &[
    Mechanism::Vmatrix,
    Mechanism::Mapped,
    Mechanism::MappedRam,
    #[cfg(feature = "libvirt")]
    Mechanism::VirshRestore,
    Mechanism::ColdBoot,
];

impl Mechanism {
    fn name(self) -> &'static str {
        match self {
            Mechanism::Vmatrix => "vmatrix",
            Mechanism::Mapped => "x_ignore_shared",
            Mechanism::MappedRam => "mapped_ram",
            #[cfg(feature = "libvirt")]
            Mechanism::VirshRestore => "virsh_restore",
            Mechanism::ColdBoot => "cold_boot",
        }
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
            "x_ignore_shared, mapped_ram: a QEMU that already waits; virsh_restore: libvirt's own, by the command line; cold_boot: from starting QEMU, the guest makes its data at boot".to_owned(),
        ],
    );
    let kinds: &[Kind] = if bench.options.quick { &[Kind::Plain] } else { &GUESTS };
    for kind in kinds {
        let wants = |m: &Mechanism| bench.wants(&format!("{}/{}", kind.image(), m.name()));
        let mechanisms: Vec<Mechanism> = MECHANISMS.iter().copied().filter(wants).collect();
        if !mechanisms.is_empty() {
            rows(bench, *kind, &mechanisms, &mut report.rows)?;
        }
    }
    for row in report.rows.iter().filter(|r| matches!(r.mechanism.as_str(), "vmatrix" | "x_ignore_shared")) {
        if let Some(load) = row.load_ms_median {
            report.goals.push(Goal {
                what: format!("{} at {} MiB: load step, ms", row.mechanism, row.ram_mib),
                wanted: format!("<= {LOAD_MS_MAX}"),
                seen: format!("{load:.1}"),
                met: load <= LOAD_MS_MAX,
            });
        }
    }
    Ok(report)
}

fn rows(bench: &Bench, kind: Kind, mechanisms: &[Mechanism], rows: &mut Vec<Row>) -> anyhow::Result<()> {
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
        let store = product::start_store(bench, &fleet, site)?;
        let setup = Setup { memory_mib: 4 * image.manifest.machine.memory_mib, ..Setup::default() };
        let machine = Machine::start(bench, &fleet, site, site.address, &setup)?;
        machine.stage_whole(bench, &image.manifest.name, LIMIT)?;
        product = Some((machine, store));
    }
    let mapped = if wants(Mechanism::MappedRam) { Some(save_mapped(&scene)?) } else { None };
    #[cfg(feature = "libvirt")]
    let libvirt = if wants(Mechanism::VirshRestore) { Some(Libvirt::save(&scene)?) } else { None };
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
                Mechanism::VirshRestore => {
                    libvirt.as_ref().context("nothing was saved").and_then(|l| l.restore(&scene, run))
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
    for mechanism in mechanisms {
        let runs = samples.get(mechanism).map_or(&[][..], Vec::as_slice);
        rows.push(Row::of(kind.name(), image.manifest.machine.memory_mib, mechanism.name(), runs));
    }
    drop(product);
    std::fs::remove_dir_all(bench.place.memory().join("whole")).context("cannot remove the laid-out image")
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
