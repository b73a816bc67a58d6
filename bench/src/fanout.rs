//! `bench fanout`: one image to many networks at once; each that has a part gives it to others.
//!
//! ```text
//! origin (store) ─▶ machine 1 … machine N, all at once, each with links to all ─▶ makespan, what the origin sent
//! ```

use crate::Bench;
use crate::fleet::{Fleet, start_store};
use crate::guests::Kind;
use crate::product::{Machine, Setup};
use crate::report::{Goal, Key, Report, Row, Sample, hundredth, ms};
use crate::world::{Link, World};
use anyhow::bail;
use std::time::{Duration, Instant};

/// Slow enough that the emulator carries every link at its rate at the same time on one processor; the more networks
/// share it, the slower.
const LINK: Link = Link { mbit: 8, rtt_us: 40_000 };
const LINK_OF_MANY: Link = Link { mbit: 2, rtt_us: 40_000 };
/// More networks than these are many.
const FEW_MAX: usize = 12;
/// Numbers of networks unless others are asked for; a single one over the same link is what they are compared to.
pub const NETWORKS: [usize; 2] = [12, 48];
/// As many as the lab's emulator has sites for, with the origin.
const NETWORKS_MAX: usize = 200;
const MAKESPAN_MAX: f64 = 2.5;
const COPIES_MAX: f64 = 3.0;
const LIMIT: Duration = Duration::from_secs(900);

/// Measures.
///
/// # Errors
/// See [`crate::run`].
pub fn measure(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut report = bench.report(
        "fanout",
        vec![
            "real `vmatrix machine` daemons, one a network, all told to stage at the same moment; the origin is a `vmatrix store`; every two sites have a link of their own".to_owned(),
            "makespan: from the order to the last machine that has all of it; copies: bytes that left the origin over the stored bytes of the image".to_owned(),
        ],
    );
    let link_of = |count| if bench.options.quick { Link { mbit: 100, rtt_us: 20_000 } } else { link(count) };
    let asked = if bench.options.quick { vec![3] } else { bench.scope.networks.clone() };
    if let Some(count) = asked.iter().find(|n| !(1..=NETWORKS_MAX).contains(*n)) {
        bail!("an image fans out to 1 to {NETWORKS_MAX} networks, not to {count}");
    }
    let mut pairs: Vec<(usize, Link)> = asked.iter().flat_map(|n| [(1, link_of(*n)), (*n, link_of(*n))]).collect();
    pairs.sort_by_key(|(count, link)| (std::cmp::Reverse(link.mbit), *count));
    pairs.dedup();
    for (count, link) in pairs.into_iter().filter(|(n, link)| bench.wants(&format!("tiny/vmatrix/{n}/{}", link.mbit))) {
        let mut runs = Vec::new();
        for run in 0..bench.runs() {
            let sample = once(bench, link, count)?;
            bench.say(&format!("fanout to {count}: run {}: {:.1} s", run + 1, sample.whole_ms / 1e3));
            runs.push(sample);
        }
        let image = bench.image(Kind::Plain)?;
        let mut row = Row::of("tiny", image.manifest.machine.memory_mib, "vmatrix", &runs);
        row.link_mbit = Some(link.mbit);
        row.rtt_ms = Some(link.rtt_us as f64 / 1e3);
        row.add("image", image.manifest.name.clone());
        row.add("load", hundredth(crate::load()));
        row.add("networks", count as u64);
        row.add("image_bytes", image.manifest.stored().0);
        // No guest runs here.
        row.first_byte_ms_median = None;
        bench.keep(&mut report, vec![row])?;
    }
    Ok(report)
}

/// The link over which so many networks are reached.
fn link(count: usize) -> Link {
    if count <= FEW_MAX { LINK } else { LINK_OF_MANY }
}

/// Every row of the whole form.
pub fn plan() -> Vec<Key> {
    let row = |(count, link): (usize, Link)| Key {
        guest: "tiny".to_owned(),
        ram_mib: Kind::Plain.ram_mib(),
        link_mbit: Some(link.mbit),
        rtt_us: Some(link.rtt_us),
        mechanism: "vmatrix".to_owned(),
        of: Some(count.to_string()),
    };
    NETWORKS.into_iter().flat_map(|count| [(1, link(count)), (count, link(count))]).map(row).collect()
}

/// The goals, against what the rows have.
pub fn goals(rows: &[Row]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for count in NETWORKS {
        let find = |n: usize| {
            let is_it = |r: &&Row| r.number("networks") == Some(n as f64) && r.link_mbit == Some(link(count).mbit);
            rows.iter().find(is_it)
        };
        let row = find(count);
        let [all, single] = [row, find(1)].map(|r| r.and_then(|r| r.number("whole_ms_median")));
        let ratio = all.zip(single).map(|(all, one)| hundredth(all / one));
        goals.push(Goal::at_most(format!("{count} networks: makespan over a single transfer's"), MAKESPAN_MAX, ratio));
        let copies = row.and_then(|r| r.number("origin_copies_median"));
        goals.push(Goal::at_most(format!("{count} networks: origin's bytes over the image's"), COPIES_MAX, copies));
    }
    goals
}

fn once(bench: &Bench, link: Link, count: usize) -> anyhow::Result<Sample> {
    let image = bench.image(Kind::Plain)?;
    let names: Vec<String> = std::iter::once("o".to_owned()).chain((1..=count).map(|i| format!("n{i}"))).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let world = World::new(&bench.place, &bench.options.program, &names, link, &bench.stop)?;
    let mut number = [0; 4];
    getrandom::fill(&mut number).map_err(|e| anyhow::anyhow!("this machine has no random bytes: {e}"))?;
    let fleet = Fleet::found(bench.place.disk().join(format!("fleet-{:08x}", u32::from_le_bytes(number))))?;
    let (took, sent) = {
        let _store = start_store(bench, &fleet, world.site(0)?)?;
        let source = world.site(0)?.address;
        let setup = Setup { memory_mib: 1024, ..Setup::default() };
        let machines = (1..=count)
            .map(|i| Machine::start(bench, &fleet, world.site(i)?, source, &setup))
            .collect::<anyhow::Result<Vec<_>>>()?;
        world.crossed(&bench.stop)?;
        let before = world.sent_by("o")?;
        let name = &image.manifest.name;
        let began = Instant::now();
        std::thread::scope(|scope| {
            let staging: Vec<_> = machines.iter().map(|m| scope.spawn(|| m.stage_whole(bench, name, LIMIT))).collect();
            staging.into_iter().try_for_each(|s| s.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
        })?;
        (began.elapsed(), before)
    };
    world.crossed(&bench.stop)?;
    let sent = world.sent_by("o")?.saturating_sub(sent);
    let stored = image.manifest.stored().0;
    let copies = sent as f64 / stored.max(1) as f64;
    Ok(Sample {
        first_byte_ms: ms(took),
        whole_ms: ms(took),
        bytes_on_wire: Some(sent),
        more: vec![("origin_copies_median", copies)],
        ..Sample::default()
    })
}
