//! `bench wire`: bytes that cross for a service a network has not, has a relative of, or had before.
//!
//! ```text
//! empty machine ◀─ maps: first service ◀─ agenda: second service on the same base  │ against the files of each state,
//! empty machine ◀─ tiny ◀─ after 1,000 requests ◀─ later, beside the one before    │ by zstd -19 --long and by casync
//! ```

use crate::Bench;
use crate::baseline::Scene;
use crate::fleet::{Fleet, start_store, start_store_of};
use crate::guests::{Image, Kind};
use crate::process::output;
use crate::product::{Machine, Setup};
use crate::report::{Goal, Key, Report, Row, hundredth};
use crate::snapshot;
use crate::vm::Bridge;
use crate::world::{Link, World};
use anyhow::Context;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use vmatrix_model::Digest;
use vmatrix_model::manifest::{Manifest, PartKind};
use vmatrix_vma_image::machine::Files;
use vmatrix_vma_image::store::copy_image;
use vmatrix_vma_image::{Store, chunks, memory};

const LINK: Link = Link { mbit: 1000, rtt_us: 5_000 };
const LIMIT: Duration = Duration::from_secs(600);
/// What is asked for.
const REQUESTS: u64 = 1000;
const LATER_BYTES_MAX: f64 = (1 << 20) as f64;

const FIRST: &str = "first_service";
const SECOND: &str = "second_service_same_base";
const AFTER: &str = "after_1000";
const RETURN: &str = "return_to_old";
const MECHANISMS: [&str; 3] = ["vmatrix", "zstd_19_long", "casync"];
/// Each in order at a machine that has nothing when the first one comes.
const COURSES: [&[(Kind, &str)]; 2] = [
    &[(Kind::Maps, FIRST), (Kind::Agenda, SECOND)],
    &[(Kind::Tiny(512), FIRST), (Kind::Tiny(512), AFTER), (Kind::Tiny(512), RETURN)],
];

/// What is brought to the network.
struct State<'a> {
    case: &'static str,
    image: &'a Image,
    files: &'a Files,
}

/// Measures.
///
/// # Errors
/// See [`crate::run`].
pub fn measure(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut report = bench.report(
        "wire",
        vec![
            "vmatrix: a `vmatrix machine` stages each state whole, one after the other, from a `vmatrix store`; bytes by the WAN emulator, both directions, with all headers and TLS; new: stored bytes that the machine had not, by part".to_owned(),
            "zstd_19_long: memory, device state and disks of that state as one stream, `zstd -19 --long=27`; casync: new chunks and indices of the same files, its own chunk store kept between the states of one network; neither carries kernel and initrd, which vmatrix does".to_owned(),
            "first_service: at a network that has nothing; second_service_same_base: the network has maps, agenda comes".to_owned(),
            "after_1000: the guest ran where its writes stay, answered 1,000 requests (one in ten for text nobody read before) and was suspended again; the network has the state before, is offered this one under the same name and takes it; return_to_old: it ran on for as many more elsewhere, and the network still holds the state before".to_owned(),
        ],
    );
    for course in COURSES {
        let wanted = |(kind, case): &(Kind, &str)| {
            MECHANISMS.iter().any(|m| bench.wants(&format!("{}/{m}/{case}", kind.image())))
        };
        let services_only = course.iter().all(|(_, case)| [FIRST, SECOND].contains(case));
        // The short form has no time to build two services.
        if !course.iter().any(wanted) || (services_only && bench.options.quick) {
            continue;
        }
        if services_only {
            let images = course.iter().map(|(kind, _)| bench.image(*kind)).collect::<anyhow::Result<Vec<_>>>()?;
            let rows = services(bench, course, &images)?;
            bench.keep(&mut report, rows)?;
        } else {
            let rows = snapshots(bench)?;
            bench.keep(&mut report, rows)?;
        }
    }
    Ok(report)
}

/// Every row of the whole form.
pub fn plan() -> Vec<Key> {
    let row = |(kind, case): &(Kind, &str), mechanism: &str| Key {
        guest: kind.name().to_owned(),
        ram_mib: kind.ram_mib(),
        link_mbit: Some(LINK.mbit),
        rtt_us: Some(LINK.rtt_us),
        mechanism: mechanism.to_owned(),
        of: Some((*case).to_owned()),
    };
    COURSES.into_iter().flatten().flat_map(|state| MECHANISMS.map(|mechanism| row(state, mechanism))).collect()
}

/// The goals, against what the rows have.
pub fn goals(rows: &[Row]) -> Vec<Goal> {
    let find = |mechanism: &str, case: &str| {
        rows.iter().find(|r| r.mechanism == mechanism && r.more.get("case").is_some_and(|c| c == case))
    };
    let after = find("vmatrix", AFTER).and_then(|r| r.bytes_on_wire).map(|b| b as f64);
    vec![Goal::at_most("the same service after 1,000 requests, bytes on the wire", LATER_BYTES_MAX, after)]
}

/// A machine that has nothing at first, its source, and what it and casync's client hold by now.
struct Course<'a> {
    bench: &'a Bench,
    world: &'a World,
    store: &'a Store,
    machine: Machine<'a>,
    casync: PathBuf,
    held: BTreeSet<Digest>,
    known: BTreeSet<PathBuf>,
    rows: Vec<Row>,
}

/// Different services, one after the other.
fn services(bench: &Bench, course: &[(Kind, &'static str)], images: &[Image]) -> anyhow::Result<Vec<Row>> {
    let world = World::new(&bench.place, &bench.options.program, &["a", "b"], LINK, &bench.stop)?;
    let whole = bench.place.disk().join("whole");
    let fleet = Fleet::found(bench.place.disk().join("fleet-services"))?;
    let _daemon = start_store(bench, &fleet, world.site(0)?)?;
    let mut to = Course::begin(bench, &world, &fleet, &bench.store)?;
    for ((_, case), image) in course.iter().zip(images) {
        let files = image.lay_out(&bench.store, &whole)?;
        let before = world.crossed(&bench.stop)?.bytes;
        to.machine.stage_whole(bench, &image.manifest.name, LIMIT)?;
        to.note(&State { case, image, files: &files }, before)?;
    }
    Ok(to.rows)
}

/// One service, and later snapshots of it, each of which takes the place of the one before.
fn snapshots(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let (kind, requests) = if bench.options.quick { (Kind::Plain, 50) } else { (Kind::Tiny(512), REQUESTS) };
    let mut image = bench.image(kind)?;
    // A store of its own: in the one benches read, no image changes under its name.
    let store = shelf(bench, &image)?;
    let world = World::new(&bench.place, &bench.options.program, &["a", "b"], LINK, &bench.stop)?;
    let far = world.site(1)?.namespace.clone();
    let bridge = Bridge::make(&far, &image.manifest.guest)?;
    let mut files = image.lay_out(&store, &bench.place.disk().join("whole"))?;
    let fleet = Fleet::found(bench.place.disk().join("fleet-snapshots"))?;
    let _daemon = start_store_of(bench, &fleet, world.site(0)?, store.folder()?)?;
    let mut to = Course::begin(bench, &world, &fleet, &store)?;
    let before = world.crossed(&bench.stop)?.bytes;
    to.machine.stage_whole(bench, &image.manifest.name, LIMIT)?;
    to.note(&State { case: FIRST, image: &image, files: &files }, before)?;
    let cases: &[&str] = if bench.options.quick { &[AFTER] } else { &[AFTER, RETURN] };
    for case in cases {
        bench.say(&format!("wire: {requests} requests to {}", kind.image()));
        let later = {
            let (source, target, target_site) = (&bridge, &bridge, &far);
            let scene = Scene { bench, image: &image, files: &files, source, target, target_site, limit: LIMIT };
            snapshot::run_on(&scene, &files, requests, bench.place.disk().join(case))?
        };
        let before = world.crossed(&bench.stop)?.bytes;
        image = snapshot::put(&store, &image, (&files, &later))?;
        files = later;
        to.machine.until_renewed(bench, &image, LIMIT)?;
        to.note(&State { case, image: &image, files: &files }, before)?;
    }
    Ok(to.rows)
}

/// A store with this one image, by the same builder.
fn shelf(bench: &Bench, image: &Image) -> anyhow::Result<Store> {
    let folder = bench.place.disk().join("shelf");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut copy = Command::new("cp");
    output(copy.arg("-a").arg(bench.store.folder()?.join("keys")).arg(folder.join("keys")), "coreutils")?;
    let store = Store::open(&folder)?;
    copy_image(&image.manifest.name, &bench.store, &store, &|_| {})?;
    Ok(store)
}

impl<'a> Course<'a> {
    fn begin(bench: &'a Bench, world: &'a World, fleet: &'a Fleet, store: &'a Store) -> anyhow::Result<Course<'a>> {
        let setup = Setup { memory_mib: 4096, ..Setup::default() };
        let machine = Machine::start(bench, fleet, world.site(1)?, world.site(0)?.address, &setup)?;
        let casync = bench.place.disk().join(format!("casync-{}", bench.place.namespace_name("store")));
        let (held, known) = (BTreeSet::new(), BTreeSet::new());
        let _ = std::fs::remove_dir_all(&casync);
        Ok(Course { bench, world, store, machine, casync, held, known, rows: Vec::new() })
    }

    /// Rows of a state that has just come, by every way that is wanted; `before`: bytes that had crossed until then.
    fn note(&mut self, state: &State<'_>, before: u64) -> anyhow::Result<()> {
        let bench = self.bench;
        let crossed = self.world.crossed(&bench.stop)?.bytes - before;
        let mut ours = row(bench, state, "vmatrix", crossed);
        for (part, bytes) in new_by_part(&state.image.manifest, self.store, &mut self.held)? {
            ours.add(&format!("new_{part}_bytes"), bytes);
        }
        self.rows.push(ours);
        let wants = |m: &str| bench.wants(&format!("{}/{m}/{}", state.image.kind.image(), state.case));
        if wants("zstd_19_long") {
            self.rows.push(row(bench, state, "zstd_19_long", packed_bytes(bench, state)?));
        }
        if wants("casync") {
            self.rows.push(row(bench, state, "casync", casync_bytes(&self.casync, state, &mut self.known)?));
        }
        Ok(())
    }
}

/// Stored bytes of an image whose digests are not held yet, by part; they are held then.
fn new_by_part(
    manifest: &Manifest,
    store: &Store,
    held: &mut BTreeSet<Digest>,
) -> anyhow::Result<BTreeMap<&'static str, u64>> {
    let mut all: Vec<(&'static str, Digest, u64)> = vec![("device", manifest.device.digest, manifest.device.stored.0)];
    for table in [&manifest.memory.first, &manifest.memory.rest] {
        all.push(("memory", table.digest, table.stored.0));
    }
    let map = memory::map(manifest, store)?;
    all.extend(map.packs().iter().map(|pack| ("memory", pack.digest, u64::from(pack.stored))));
    for part in manifest.parts.iter().filter(|p| p.kind != PartKind::BackendSeed) {
        let name = match part.kind {
            PartKind::Base => "base",
            PartKind::Data => "data",
            PartKind::Kernel => "kernel",
            PartKind::Initrd => "initrd",
            PartKind::Disk | PartKind::BackendSeed => "disk",
        };
        all.push((name, part.table.digest, part.table.stored.0));
        let chunks = chunks::table(part, store)?;
        all.extend(chunks.iter().flatten().map(|chunk| (name, chunk.digest, chunk.stored.0)));
    }
    let mut new = BTreeMap::new();
    for (part, digest, stored) in all {
        let bytes = new.entry(part).or_insert(0);
        if held.insert(digest) {
            *bytes += stored;
        }
    }
    Ok(new)
}

fn row(bench: &Bench, state: &State<'_>, mechanism: &str, bytes: u64) -> Row {
    bench.say(&format!("wire {} {}: {mechanism}: {bytes} bytes", state.image.kind.image(), state.case));
    let mut row = Row {
        guest: state.image.kind.name().to_owned(),
        ram_mib: state.image.manifest.machine.memory_mib,
        link_mbit: Some(LINK.mbit),
        rtt_ms: Some(LINK.rtt_us as f64 / 1e3),
        mechanism: mechanism.to_owned(),
        // Bytes do not vary from run to run as times do: what crosses is what is named.
        runs: 1,
        bytes_on_wire: Some(bytes),
        ..Row::default()
    };
    row.add("case", state.case);
    row.add("image", state.image.manifest.name.clone());
    row.add("load", hundredth(crate::load()));
    row
}

/// All of a state as one stream, as small as zstd makes it.
fn packed_bytes(bench: &Bench, state: &State<'_>) -> anyhow::Result<u64> {
    let to = bench.place.disk().join("packed.zst");
    let mut command = Command::new("sh");
    // Its words for `cat a b c`; the names come as arguments, not as text.
    command.args(["-c", "out=$1; shift; cat \"$@\" | zstd -q -19 --long=27 -T0 -f -o \"$out\"", "sh"]).arg(&to);
    output(command.args(state.image.carried(state.files)), "zstd")?;
    let bytes = std::fs::metadata(&to).with_context(|| format!("cannot look at {}", to.display()))?.len();
    std::fs::remove_file(&to).with_context(|| format!("cannot remove {}", to.display()))?;
    Ok(bytes)
}

/// What a casync client that keeps its chunk store would fetch for a state.
fn casync_bytes(folder: &Path, state: &State<'_>, known: &mut BTreeSet<PathBuf>) -> anyhow::Result<u64> {
    let store = folder.join("store");
    std::fs::create_dir_all(&store).with_context(|| format!("cannot make {}", store.display()))?;
    let mut bytes = 0;
    for (i, file) in state.image.carried(state.files).iter().enumerate() {
        let index = folder.join(format!("{}-{i}.caibx", state.case));
        let mut command = Command::new("casync");
        command.arg("make").arg(format!("--store={}", store.display())).arg(&index).arg(file);
        output(&mut command, "casync")?;
        bytes += std::fs::metadata(&index).with_context(|| format!("cannot look at {}", index.display()))?.len();
    }
    for shard in std::fs::read_dir(&store).with_context(|| format!("cannot read {}", store.display()))? {
        let shard = shard.context("cannot read casync's store")?.path();
        for chunk in std::fs::read_dir(&shard).with_context(|| format!("cannot read {}", shard.display()))? {
            let chunk = chunk.context("cannot read casync's store")?;
            if known.insert(chunk.path()) {
                bytes += chunk.metadata().context("cannot look at a chunk")?.len();
            }
        }
    }
    Ok(bytes)
}
