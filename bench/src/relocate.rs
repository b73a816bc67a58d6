//! `bench relocate`: from the order to the first correct answer at a network that has nothing of the image.
//!
//! ```text
//! link × guest × mechanism, each run once, then again (interleaved) ─▶ rows with their limits ─▶ goals
//! ```

use crate::Bench;
use crate::baseline::{self, Packed, REQUEST_LIMIT, Scene};
use crate::client;
use crate::guests::{ALL, Image, Kind, Temporary};
use crate::limit::Limit;
use crate::product::{self, Fleet, Machine, Setup};
use crate::report::{Goal, Report, Row, Sample, hundredth};
use crate::snapshot::{self, Later};
use crate::vm::Bridge;
use crate::world::{Link, World};
use anyhow::Context;
use std::collections::BTreeMap;
use std::time::Duration;
use vmatrix_vma_image::machine::Files;

/// The links: rate, round trip.
const LINKS: [Link; 3] =
    [Link { mbit: 100, rtt_us: 20_000 }, Link { mbit: 1000, rtt_us: 5_000 }, Link { mbit: 25, rtt_us: 80_000 }];

/// Requests a guest answers between two snapshots.
const REQUESTS_BETWEEN: u64 = 200;

/// A way to bring a suspended VM to another network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mechanism {
    /// The product, at a network that has nothing.
    Vmatrix,
    /// The product, with every byte there: what the guest and the agent need without the link.
    VmatrixLocal,
    /// The product, at a network that holds the snapshot before the one that is ordered.
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
    /// minutes a run.
    fn applies(self, kind: Kind, link: Link) -> bool {
        if self == Mechanism::OldSnapshot {
            return matches!(kind, Kind::Plain | Kind::Tiny(512));
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
            "first byte: from the order to the first byte of the first correct answer, tried every 5 ms on a new connection by a client at the target".to_owned(),
            "links: the lab's WAN emulator (user space, no loss, queue of two round trips), MTU 1500, TCP cubic, no cut of the window after idling, no memory of earlier connections".to_owned(),
            "limit: r + 8(D+W)/B + T_load + T_guest; T_guest is the first byte of vmatrix_local (the product's whole path with every byte there: cell, pager, load, reseed, clock, health check) without its load step; bare limit: the same with local_files (QEMU waits, nothing but load and the guest itself)".to_owned(),
            "every mechanism finds a QEMU that already waits at the target".to_owned(),
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
                rows(bench, link, *kind, &wanted, &mut report.rows)?;
            }
        }
    }
    report.goals = goals(&report.rows);
    Ok(report)
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
    /// A later snapshot of the same guest.
    later: Option<Later>,
}

/// Runs one guest over one link by every mechanism, interleaved.
fn rows(bench: &Bench, link: Link, kind: Kind, mechanisms: &[Mechanism], rows: &mut Vec<Row>) -> anyhow::Result<()> {
    let image = bench.image(kind)?;
    let world = World::new(&bench.place, &bench.options.program, &["a", "b"], link, &bench.stop)?;
    let (near, far) = (world.site(0)?.namespace.clone(), world.site(1)?.namespace.clone());
    let guest = &image.manifest.guest;
    let (source, target) = (Bridge::make(&near, guest)?, Bridge::make(&far, guest)?);
    // On disk: a mapping that is read allocates the holes of a file in memory.
    let files = image.lay_out(&bench.store, &bench.place.disk().join("whole"))?;
    let fleet = Fleet::found(bench.place.disk().join(format!("fleet-{}-{}", kind.image(), link.mbit)))?;
    let _store = product::start_store(bench, &fleet, world.site(0)?)?;
    let r_ms = world.round_trip_ms(1, 0)?;
    let bytes = image.manifest.memory.size.0 + image.manifest.stored().0;
    let limit = Duration::from_secs(120) + Duration::from_micros(8 * bytes / u64::from(link.mbit));
    let wants = |m| mechanisms.contains(&m);
    let near = if wants(Mechanism::Local) {
        Some(image.lay_out(&bench.store, &bench.place.memory().join("whole"))?)
    } else {
        None
    };
    let packed = if wants(Mechanism::WholeImage) {
        bench.say(&format!("{}: compressing the whole image once", kind.image()));
        Some(Packed::make(&files, bench.place.disk().join("whole.zst"), &bench.stop)?)
    } else {
        None
    };
    let unrecorded = if wants(Mechanism::DemandOnly) { Some(image.unrecorded(&bench.store, &files)?) } else { None };
    let scene =
        Scene { bench, image: &image, files: &files, source: &source, target: &target, target_site: &far, limit };
    let later = if wants(Mechanism::OldSnapshot) {
        let name = format!("{}-later", kind.image());
        Some(snapshot::take(&scene, &files, &name, REQUESTS_BETWEEN, bench.place.disk().join("later"))?)
    } else {
        None
    };
    let course = Course { near, later, bench, fleet: &fleet, scene, unrecorded, packed };
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
    for mechanism in mechanisms {
        let runs = samples.get(mechanism).map_or(&[][..], Vec::as_slice);
        let mut row = Row::of(kind.name(), image.manifest.machine.memory_mib, mechanism.name(), runs);
        row.link_mbit = Some(link.mbit);
        row.rtt_ms = Some(link.rtt_us as f64 / 1e3);
        row.add("data_mib", kind.data_mib());
        row.add("working_set_pages", image.manifest.memory.working_set.pages);
        row.add("working_set_bytes", image.manifest.memory.working_set.stored.0);
        if let Some(limit) = &limit {
            row.limit_ms = Some(hundredth(limit.ms()));
            row.add("limit_terms", serde_json::to_value(limit)?);
            if let (Mechanism::Vmatrix, Some(first)) = (mechanism, row.first_byte_ms_median) {
                row.add("of_limit", hundredth(first / limit.ms()));
            }
        }
        if let Some(bare) = &bare {
            row.add("bare_limit_ms", hundredth(bare.ms()));
            row.add("bare_limit_terms", serde_json::to_value(bare)?);
            if let (Mechanism::Vmatrix, Some(first)) = (mechanism, row.first_byte_ms_median) {
                row.add("of_bare_limit", hundredth(first / bare.ms()));
            }
        }
        rows.push(row);
    }
    Ok(())
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
            Mechanism::VmatrixLocal => self.there(self.scene.image, world, run),
            Mechanism::OldSnapshot => {
                let later = self.later.as_ref().context("no later snapshot was taken")?;
                self.there(&later.image.image, world, run)
            }
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
            peers: vec![],
            rate_mbit,
            memory_mib: 2 * self.scene.image.manifest.machine.memory_mib,
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

    /// An order for `image` at a machine that has all of the scene's.
    fn there(&self, image: &Image, world: &World, run: u64) -> anyhow::Result<Sample> {
        let source = world.site(0)?.address;
        let machine = Machine::start(self.bench, self.fleet, world.site(1)?, source, &self.setup(None))?;
        machine.stage_whole(self.bench, &self.scene.image.manifest.name, self.scene.limit)?;
        let before = world.crossed(&self.bench.stop)?;
        let (mut sample, _) = machine.order(self.bench, image, 0, run)?;
        drop(machine);
        sample.bytes_on_wire = Some(world.crossed(&self.bench.stop)?.bytes - before.bytes);
        Ok(sample)
    }
}

/// The goals, as far as the rows are there.
fn goals(rows: &[Row]) -> Vec<Goal> {
    let find = |guest: &str, mib: u64, mbit: u32, mechanism: &str| {
        let same =
            |r: &&Row| r.guest == guest && r.ram_mib == mib && r.link_mbit == Some(mbit) && r.mechanism == mechanism;
        rows.iter().find(same)
    };
    let mut goals = Vec::new();
    let mut goal = |what: String, most: f64, seen: f64| {
        goals.push(Goal { what, wanted: format!("<= {most}"), seen: format!("{seen:.2}"), met: seen <= most });
    };
    for row in rows.iter().filter(|r| r.mechanism == "vmatrix") {
        let link = format!(
            "{} {} MiB at {}/{}",
            row.guest,
            row.ram_mib,
            row.link_mbit.unwrap_or(0),
            row.rtt_ms.unwrap_or(0.0)
        );
        if let Some(ratio) = row.number("of_limit") {
            let most = if row.guest == "tiny" { 1.3 } else { 1.5 };
            goal(format!("{link}: first byte over its limit"), most, ratio);
        }
        if let (Some(second), Some(warm)) = (row.second_ms_median, row.number("warm_ms_median")) {
            goal(format!("{link}: second request over a warm one"), 1.2, second / warm.max(0.1));
        }
        let small = find("tiny", 512, row.link_mbit.unwrap_or(0), "vmatrix").and_then(|r| r.first_byte_ms_median);
        if let (8192, Some(small), Some(large)) = (row.ram_mib, small, row.first_byte_ms_median) {
            goal(format!("{link}: first byte over that of 512 MiB"), 1.3, large / small);
        }
    }
    let first = |mechanism| find("tiny", 512, 100, mechanism).and_then(|r| r.first_byte_ms_median);
    if let (Some(old), Some(local)) = (first("vmatrix_old_snapshot"), first("vmatrix_local")) {
        goal(
            "tiny 512 MiB at 100/20 with the snapshot before there: ms above the resume itself".to_owned(),
            150.0,
            old - local,
        );
    }
    if let (Some(ours), Some(copy)) = (first("vmatrix"), first("stop_and_copy")) {
        let ratio = copy / ours;
        goals.push(Goal {
            what: "tiny 512 MiB at 100/20: stop-and-copy over vmatrix".to_owned(),
            wanted: ">= 50".to_owned(),
            seen: format!("{ratio:.1}"),
            met: ratio >= 50.0,
        });
    }
    goals
}
