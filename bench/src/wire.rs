//! `bench wire`: bytes that cross for a service a network has not, has a relative of, or had before.
//!
//! ```text
//! empty machine ◀─ first service ◀─ second on the same base    │ against the files of each state,
//! machine with S0 ◀─ S0 after 1,000 requests ◀─ and after more  │ by zstd -19 --long and by casync
//! ```

use crate::Bench;
use crate::baseline::Scene;
use crate::guests::{Image, Kind};
use crate::process::output;
use crate::product::{self, Fleet, Machine, Setup};
use crate::report::{Goal, Report, Row};
use crate::snapshot;
use crate::vm::Bridge;
use crate::world::{Link, World};
use anyhow::Context;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use vmatrix_vma_image::machine::Files;

const LINK: Link = Link { mbit: 1000, rtt_us: 5_000 };
const LIMIT: Duration = Duration::from_secs(600);
/// What is asked for.
const REQUESTS: u64 = 1000;
const LATER_BYTES_MAX: u64 = 1 << 20;

/// What is brought to the network, in this order.
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
            "vmatrix: a `vmatrix machine` stages each state whole, one after the other, from a `vmatrix store`; bytes by the WAN emulator, both directions, with all headers and TLS".to_owned(),
            "zstd: memory, device state and disk of that state as one stream, `zstd -19 --long=27`; casync: new chunks and indices of the same three files, its own chunk store kept between states".to_owned(),
            "after_1000: the guest ran where its writes stay, answered 1,000 requests (one in ten for text nobody read before) and was suspended again; return_to_old: it ran on for as many more elsewhere, and the network still holds the state before".to_owned(),
        ],
    );
    let (kind, requests) = if bench.options.quick { (Kind::Plain, 50) } else { (Kind::Tiny(512), REQUESTS) };
    let (first, second) = (bench.image(kind)?, bench.image(Kind::Maps)?);
    let world = World::new(&bench.place, &bench.options.program, &["a", "b"], LINK, &bench.stop)?;
    let far = world.site(1)?.namespace.clone();
    let bridge = Bridge::make(&far, &first.manifest.guest)?;
    let whole = bench.place.disk().join("whole");
    let (files, other_files) = (first.lay_out(&bench.store, &whole)?, second.lay_out(&bench.store, &whole)?);
    let scene = Scene {
        bench,
        image: &first,
        files: &files,
        source: &bridge,
        target: &bridge,
        target_site: &far,
        limit: LIMIT,
    };
    bench.say(&format!("wire: {requests} requests to {}", kind.image()));
    let named = |suffix: &str| format!("{}-{suffix}", kind.image());
    let later = snapshot::take(&scene, &files, &named("later"), requests, bench.place.disk().join("later"))?;
    let scene = Scene { image: &later.image.image, files: &later.files, ..scene };
    let latest = snapshot::take(&scene, &later.files, &named("latest"), requests, bench.place.disk().join("latest"))?;
    let states = [
        State { case: "first_service", image: &first, files: &files },
        State { case: "second_service_same_base", image: &second, files: &other_files },
        State { case: "after_1000", image: &later.image.image, files: &later.files },
        State { case: "return_to_old", image: &latest.image.image, files: &latest.files },
    ];
    let fleet = Fleet::found(bench.place.disk().join("fleet"))?;
    let _store = product::start_store(bench, &fleet, world.site(0)?)?;
    let setup = Setup { memory_mib: 4096, ..Setup::default() };
    let machine = Machine::start(bench, &fleet, world.site(1)?, world.site(0)?.address, &setup)?;
    let casync = bench.place.disk().join("casync");
    let mut known = BTreeSet::new();
    for state in &states {
        bench.stop.check()?;
        let before = world.crossed(&bench.stop)?.bytes;
        machine.stage_whole(bench, &state.image.manifest.name, LIMIT)?;
        let crossed = world.crossed(&bench.stop)?.bytes - before;
        add(bench, &mut report.rows, state, "vmatrix", crossed);
        if bench.wants(&format!("{}/zstd_19_long/{}", kind.image(), state.case)) {
            add(bench, &mut report.rows, state, "zstd_19_long", packed_bytes(bench, state.files)?);
        }
        if bench.wants(&format!("{}/casync/{}", kind.image(), state.case)) {
            add(bench, &mut report.rows, state, "casync", casync_bytes(&casync, state, &mut known)?);
        }
    }
    let seen =
        report.rows.iter().find(|r| r.mechanism == "vmatrix" && r.more.get("case").is_some_and(|c| c == "after_1000"));
    if let Some(seen) = seen.and_then(|r| r.bytes_on_wire) {
        report.goals.push(Goal {
            what: "the same service after 1,000 requests, bytes".to_owned(),
            wanted: format!("<= {LATER_BYTES_MAX}"),
            seen: seen.to_string(),
            met: seen <= LATER_BYTES_MAX,
        });
    }
    Ok(report)
}

fn add(bench: &Bench, rows: &mut Vec<Row>, state: &State<'_>, mechanism: &str, bytes: u64) {
    bench.say(&format!("wire {}: {mechanism}: {bytes} bytes", state.case));
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
    rows.push(row);
}

fn three(files: &Files) -> [&PathBuf; 3] {
    [&files.memory, &files.device, &files.disk]
}

/// All of a state as one stream, as small as zstd makes it.
fn packed_bytes(bench: &Bench, files: &Files) -> anyhow::Result<u64> {
    let to = bench.place.disk().join("packed.zst");
    let mut command = Command::new("sh");
    // Its words for `cat a b c`; the names come as arguments, not as text.
    command.args(["-c", "out=$1; shift; cat \"$@\" | zstd -q -19 --long=27 -T0 -f -o \"$out\"", "sh"]).arg(&to);
    output(command.args(three(files)), "zstd")?;
    let bytes = std::fs::metadata(&to).with_context(|| format!("cannot look at {}", to.display()))?.len();
    std::fs::remove_file(&to).with_context(|| format!("cannot remove {}", to.display()))?;
    Ok(bytes)
}

/// What a casync client that keeps its chunk store would fetch for a state.
fn casync_bytes(folder: &Path, state: &State<'_>, known: &mut BTreeSet<PathBuf>) -> anyhow::Result<u64> {
    let store = folder.join("store");
    std::fs::create_dir_all(&store).with_context(|| format!("cannot make {}", store.display()))?;
    let mut bytes = 0;
    for (i, file) in three(state.files).into_iter().enumerate() {
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
