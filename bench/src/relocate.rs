//! `bench relocate`: from the order to the first correct answer at a network that has nothing of the image.
//!
//! ```text
//! link × guest × mechanism, each run once, then again (interleaved) ─▶ rows with their limits ─▶ goals
//! ```

mod goals;

pub use goals::{goals, ratios};

use crate::Bench;
use crate::baseline::{self, Packed, REQUEST_LIMIT, Scene};
use crate::client;
use crate::fleet::{Fleet, start_store};
use crate::guests::{ALL, Image, Kind, Temporary};
use crate::limit::Limit;
use crate::origin::Origin;
use crate::product::{Machine, Setup};
use crate::report::{Key, Report, Row, Sample, hundredth};
use crate::vm::Bridge;
use crate::world::{Link, World};
use anyhow::Context;
use std::collections::BTreeMap;
use std::time::Duration;
use vmatrix_model::assignment::Singleton;
use vmatrix_vma_image::machine::Files;

/// The links: rate, round trip.
const LINKS: [Link; 3] =
    [Link { mbit: 100, rtt_us: 20_000 }, Link { mbit: 1000, rtt_us: 5_000 }, Link { mbit: 25, rtt_us: 80_000 }];

/// Requests a guest answers between two snapshots.
const REQUESTS_BETWEEN: u64 = 200;
/// One of them in so many is for text that nobody read before.
const COLD_EACH: u64 = 10;

/// A way to bring a suspended VM to another network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mechanism {
    /// The product, at a network that has nothing.
    Vmatrix,
    /// The product, with every byte there: what the guest and the agent need without the link.
    VmatrixLocal,
    /// The product, with a singleton that comes back to where it was before: there its last snapshot is.
    OldSnapshot,
    /// The product with an image whose working set was never recorded, and next to no background.
    DemandOnly,
    /// Everything is at the target already, in files: no product, no link.
    Local,
    /// The whole image, compressed beforehand.
    WholeImage,
    /// QEMU's own migration of a stopped guest.
    StopAndCopy,
}

const MECHANISMS: [Mechanism; 7] = [
    Mechanism::Vmatrix,
    Mechanism::VmatrixLocal,
    Mechanism::OldSnapshot,
    Mechanism::DemandOnly,
    Mechanism::Local,
    Mechanism::WholeImage,
    Mechanism::StopAndCopy,
];

impl Mechanism {
    fn name(self) -> &'static str {
        match self {
            Mechanism::Vmatrix => "vmatrix",
            Mechanism::VmatrixLocal => "vmatrix_local",
            Mechanism::OldSnapshot => "vmatrix_old_snapshot",
            Mechanism::DemandOnly => "demand_only",
            Mechanism::Local => "local_files",
            Mechanism::StopAndCopy => "stop_and_copy",
            Mechanism::WholeImage => "whole_image_zstd",
        }
    }

    /// Whether it is run for a guest over a link: 8 GiB are copied over the fast link only, for elsewhere that takes
    /// minutes a run; a snapshot of much memory tells no more than one of little, and one whose data stay at the
    /// origin is no singleton.
    fn applies(self, kind: Kind, link: Link) -> bool {
        if self == Mechanism::OldSnapshot {
            return matches!(kind, Kind::Plain | Kind::Tiny(512) | Kind::Maps);
        }
        let copies = matches!(self, Mechanism::StopAndCopy | Mechanism::WholeImage);
        !(copies && kind == Kind::Tiny(8192) && link.mbit < 1000)
    }
}

/// Measures.
///
/// # Errors
/// See [`crate::run`].
pub fn measure(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut report = bench.report(
        "relocate",
        vec![
            "first byte: from the order to the first byte of the first correct answer, tried on a new connection every 5 ms (every 20 ms where tries are dropped until the guest may be reached) by a client at the target".to_owned(),
            "links: the lab's WAN emulator (user space, no loss, queue of two round trips), MTU 1500, TCP cubic, no cut of the window after idling, no memory of earlier connections".to_owned(),
            "limit: r + 8(D+W)/B + T_load + T_guest; T_guest is the first byte of vmatrix_local (the product's whole path with every byte there: cell, pager, load, reseed, clock, health check) without its load step; bare limit: the same with local_files (QEMU waits, nothing but load and the guest itself)".to_owned(),
            "whole_image_zstd, stop_and_copy and local_files find a QEMU that already waits at the target; the product starts its own QEMU within the order unless it keeps one waiting".to_owned(),
            "vmatrix_old_snapshot: a singleton that began at the target, moved to the source, answered 200 requests there and is ordered back; from the order, so that its stop, save and hand-over at the source are in it".to_owned(),
            "agenda: each of its answers must hold a word that the bench wrote into its PostgreSQL at the source just before; baselines reach that through the product's tunnel, which is up beforehand".to_owned(),
            "tiny holds text in memory that its web server serves (200 MiB at 512 MiB, 1 GiB at 2 and 8 GiB); what counts is its front page, then a request for text nobody read before (cold_item)".to_owned(),
            "whole_image_zstd: memory, device state and disk at zstd -3, compressed beforehand (not counted), over plain TCP, unpacked while it comes; stop_and_copy: QEMU's migration of a stopped guest without a bandwidth limit".to_owned(),
        ],
    );
    let links = LINKS.into_iter().take(if bench.options.quick { 1 } else { LINKS.len() });
    let kinds: Vec<Kind> = if bench.options.quick { vec![Kind::Plain] } else { ALL.to_vec() };
    for link in links {
        for kind in &kinds {
            let wanted: Vec<Mechanism> = MECHANISMS
                .into_iter()
                .filter(|m| m.applies(*kind, link))
                .filter(|m| bench.wants(&format!("{}/{}/{}", kind.image(), m.name(), link.name())))
                .collect();
            if !wanted.is_empty() {
                let mut rows = rows(bench, link, *kind, &wanted)?;
                ratios(&mut rows);
                bench.keep(&mut report, rows)?;
            }
        }
    }
    Ok(report)
}

/// Every row of the whole form.
pub fn plan() -> Vec<Key> {
    let mut plan = Vec::new();
    for link in LINKS {
        for kind in ALL {
            for mechanism in MECHANISMS.into_iter().filter(|m| m.applies(kind, link)) {
                plan.push(Key {
                    guest: kind.name().to_owned(),
                    ram_mib: kind.ram_mib(),
                    link_mbit: Some(link.mbit),
                    rtt_us: Some(link.rtt_us),
                    mechanism: mechanism.name().to_owned(),
                    of: None,
                });
            }
        }
    }
    plan
}

/// One guest over one link.
struct Course<'a> {
    bench: &'a Bench,
    fleet: &'a Fleet,
    scene: Scene<'a>,
    /// The same image without a recorded working set.
    unrecorded: Option<Temporary>,
    packed: Option<Packed>,
    /// The image laid out in memory: from a disk a guest's first pages come one by one.
    near: Option<Files>,
}

/// Runs one guest over one link by every mechanism, interleaved.
fn rows(bench: &Bench, link: Link, kind: Kind, mechanisms: &[Mechanism]) -> anyhow::Result<Vec<Row>> {
    let image = bench.image(kind)?;
    let world = World::new(&bench.place, &bench.options.program, &["a", "b"], link, &bench.stop)?;
    let (near, far) = (world.site(0)?.namespace.clone(), world.site(1)?.namespace.clone());
    let guest = &image.manifest.guest;
    let wants = |m| mechanisms.contains(&m);
    let (source, target) = (Bridge::make(&near, guest)?, Bridge::make(&far, guest)?);
    // On disk: a mapping that is read allocates the holes of a file in memory.
    let files = image.lay_out(&bench.store, &bench.place.disk().join("whole"))?;
    let fleet = Fleet::found(bench.place.disk().join(format!("fleet-{}-{}", kind.image(), link.mbit)))?;
    let _store = start_store(bench, &fleet, world.site(0)?)?;
    // A second one at the target, for what is to be there already: the link has nothing to do with it.
    let _there = match wants(Mechanism::VmatrixLocal) || wants(Mechanism::OldSnapshot) {
        true => Some(start_store(bench, &fleet, world.site(1)?)?),
        false => None,
    };
    let _origin = Origin::start(bench, &fleet, &world, &image)?;
    let r_ms = world.round_trip_ms(1, 0)?;
    let bytes = image.manifest.memory.size.0 + image.manifest.stored().0;
    let limit = Duration::from_secs(120) + Duration::from_micros(8 * bytes / u64::from(link.mbit));
    let near = if wants(Mechanism::Local) {
        Some(image.lay_out(&bench.store, &bench.place.memory().join("whole"))?)
    } else {
        None
    };
    let packed = if wants(Mechanism::WholeImage) {
        bench.say(&format!("{}: compressing the whole image once", kind.image()));
        Some(Packed::make(&image.carried(&files), bench.place.disk().join("whole.zst"), &bench.stop)?)
    } else {
        None
    };
    let unrecorded = if wants(Mechanism::DemandOnly) { Some(image.unrecorded(&bench.store, &files)?) } else { None };
    let scene =
        Scene { bench, image: &image, files: &files, source: &source, target: &target, target_site: &far, limit };
    let course = Course { near, bench, fleet: &fleet, scene, unrecorded, packed };
    let mut samples: BTreeMap<Mechanism, Vec<Sample>> = BTreeMap::new();
    for run in 0..bench.runs() {
        for mechanism in mechanisms {
            let sample = course.run(*mechanism, &world, run);
            let sample =
                sample.with_context(|| format!("{} by {} over {}", kind.image(), mechanism.name(), link.name()))?;
            bench.say(&format!(
                "relocate {} {} {}: run {}: first byte {:.0} ms, second {:.0} ms, {} KiB on the wire",
                kind.image(),
                link.name(),
                mechanism.name(),
                run + 1,
                sample.first_byte_ms,
                sample.second_ms.unwrap_or(0.0),
                sample.bytes_on_wire.unwrap_or(0) >> 10,
            ));
            samples.entry(*mechanism).or_default().push(sample);
        }
    }
    let limit_by = |local| {
        let local = Row::of("", 0, "", samples.get(&local)?);
        Some(Limit::of(&image.manifest, link, r_ms, local.load_ms_median?, local.first_byte_ms_median?))
    };
    let (limit, bare) = (limit_by(Mechanism::VmatrixLocal), limit_by(Mechanism::Local));
    let mut rows = Vec::new();
    for mechanism in mechanisms {
        let runs = samples.get(mechanism).map_or(&[][..], Vec::as_slice);
        let mut row = Row::of(kind.name(), image.manifest.machine.memory_mib, mechanism.name(), runs);
        row.link_mbit = Some(link.mbit);
        row.rtt_ms = Some(link.rtt_us as f64 / 1e3);
        row.add("image", image.manifest.name.clone());
        row.add("load", hundredth(crate::load()));
        row.add("data_mib", kind.data_mib());
        row.add("working_set_pages", image.manifest.memory.working_set.pages);
        row.add("working_set_bytes", image.manifest.memory.working_set.stored.0);
        if let Some(limit) = &limit {
            row.limit_ms = Some(hundredth(limit.ms()));
            row.add("limit_terms", serde_json::to_value(limit)?);
        }
        if let Some(bare) = &bare {
            row.add("bare_limit_ms", hundredth(bare.ms()));
            row.add("bare_limit_terms", serde_json::to_value(bare)?);
        }
        rows.push(row);
    }
    Ok(rows)
}

impl Course<'_> {
    fn run(&self, mechanism: Mechanism, world: &World, run: u64) -> anyhow::Result<Sample> {
        match mechanism {
            Mechanism::Vmatrix => self.ordered(self.scene.image, None, world, run),
            Mechanism::DemandOnly => {
                let unrecorded = self.unrecorded.as_ref().context("the image without a working set was not made")?;
                // The product's lowest rate: what comes is what was asked for.
                self.ordered(&unrecorded.image, Some(1), world, run)
            }
            Mechanism::VmatrixLocal => self.there(world, run),
            Mechanism::OldSnapshot => self.returned(world, run),
            Mechanism::Local => {
                let files = self.near.as_ref().context("the image was not laid out in memory")?;
                baseline::local(&Scene { files, ..self.scene }, run)
            }
            Mechanism::StopAndCopy => baseline::stop_and_copy(&self.scene, world, run),
            Mechanism::WholeImage => {
                let packed = self.packed.as_ref().context("the image was not compressed")?;
                baseline::whole_image_zstd(&self.scene, packed, world, run)
            }
        }
    }

    fn setup(&self, rate_mbit: Option<u64>) -> Setup {
        // Without a working set the machine gives a resume up before the guest has touched all it needs.
        Setup {
            insist: rate_mbit.is_some(),
            rate_mbit,
            memory_mib: 2 * self.scene.image.manifest.machine.memory_mib,
            ..Setup::default()
        }
    }

    /// An order at an empty machine.
    fn ordered(&self, image: &Image, rate_mbit: Option<u64>, world: &World, run: u64) -> anyhow::Result<Sample> {
        let setup = self.setup(rate_mbit);
        let source = world.site(0)?.address;
        let machine = Machine::start(self.bench, self.fleet, world.site(1)?, source, &setup)?;
        let before = world.crossed(&self.bench.stop)?;
        let (mut sample, request) = machine.order(self.bench, image, 0, run)?;
        if let Some(cold) = image.kind.cold_request(request.to.ip().to_owned(), run) {
            let cold = client::ask(&world.site(1)?.namespace, &cold, REQUEST_LIMIT)?;
            sample.more.push(("cold_item_ms_median", cold.whole_ms));
        }
        drop(machine);
        sample.bytes_on_wire = Some(world.crossed(&self.bench.stop)?.bytes - before.bytes);
        Ok(sample)
    }

    /// An order at a machine that has every byte.
    fn there(&self, world: &World, run: u64) -> anyhow::Result<Sample> {
        let (near, far) = (world.site(0)?.address, world.site(1)?);
        let setup = Setup { origin: Some(near), ..self.setup(None) };
        let name = &self.scene.image.manifest.name;
        // From the store beside it.
        let machine = Machine::start(self.bench, self.fleet, far, far.address, &setup)?;
        machine.stage_whole(self.bench, name, self.scene.limit)?;
        drop(machine);
        // From here on there is only what it has, and what comes over the link.
        let setup = Setup { kept: true, ..setup };
        let machine = Machine::start(self.bench, self.fleet, far, near, &setup)?;
        machine.until_whole(self.bench, name, self.scene.limit)?;
        let before = world.crossed(&self.bench.stop)?;
        let (mut sample, _) = machine.order(self.bench, self.scene.image, 0, run)?;
        drop(machine);
        sample.bytes_on_wire = Some(world.crossed(&self.bench.stop)?.bytes - before.bytes);
        Ok(sample)
    }

    /// A singleton that began at the target, went to the source and answered there, comes back.
    fn returned(&self, world: &World, run: u64) -> anyhow::Result<Sample> {
        let (bench, image) = (self.bench, self.scene.image);
        let (near, far) = (world.site(0)?, world.site(1)?);
        let setup = self.setup(None);
        let source = Machine::start(bench, self.fleet, near, near.address, &setup)?;
        let target = Machine::start(bench, self.fleet, far, far.address, &setup)?;
        for machine in [&source, &target] {
            machine.stage_whole(bench, &image.manifest.name, self.scene.limit)?;
        }
        target.order_singleton(bench, image, Singleton::Begin, run)?;
        let (_, request) = source.order_singleton(bench, image, Singleton::Take(target.peer()), run)?;
        for n in 1..REQUESTS_BETWEEN {
            bench.stop.check()?;
            let to = *request.to.ip();
            let cold = if n % COLD_EACH == 0 { image.kind.cold_request(to, n) } else { None };
            let asked = cold.map_or_else(|| image.kind.request(to, &bench.known, n), Ok)?;
            client::ask(&near.namespace, &asked, REQUEST_LIMIT)?;
        }
        // Its old cell leads to where the guest is now: an answer by that way is none of the target's.
        target.release(image, 0)?;
        let before = world.crossed(&bench.stop)?;
        let (mut sample, _) = target.order_singleton(bench, image, Singleton::Take(source.peer()), run)?;
        drop((source, target));
        sample.bytes_on_wire = Some(world.crossed(&bench.stop)?.bytes - before.bytes);
        Ok(sample)
    }
}
