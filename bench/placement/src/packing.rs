//! Packing instances on machines, beside Ganeti's `hbal` on its own score.
//!
//! ```text
//! seed ─▶ world ─┬─▶ text file ─▶ hbal ─▶ moves, each with the score it prints ─┐
//!                │                                 │ made in our ledger too: must agree ─▶ figures
//!                └─▶ balance, weighed as hbal weighs ──────────────────────────────────┘
//! ```
//! `hbal` (Debian package `ganeti-htools-3.0`) weighs, over its nodes, the standard deviations of free memory, of free
//! disk, of virtual by real processors and of four measured loads, which are 1 for each instance where nothing is
//! measured. Instances here are of its template `ext`, whose disk is elsewhere, so that any node may take any of them
//! and reserved memory and spindles do not come in; with that its score is ours:
//!
//! | hbal 3.0.2 | weight | here |
//! |---|---|---|
//! | free memory ÷ memory, now and with what is to come | 0.5 + 0.5 | memory, 1 |
//! | virtual ÷ real processors, now and with what is to come | 0.5 + 0.5 | CPU, 1 |
//! | load of CPU, memory, disk, network: the number of instances | 1 + 1 + 1 + 1 | load, 4 |
//! | free disk, reserved memory, N+1, offline, spindles, tags, places | | 0: the same whoever is where |
//!
//! hbal stops below a score of 0.1 when a move gains less than 0.01, and after a minute of CPU here.

use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use vmatrix_model::{InstanceId, MachineId};
use vmatrix_replay::chance::Chance;
use vmatrix_vma_core::balance::{Amounts, Balance, Instance, Limits, Machine, Rules, balance, score};

/// The package that has the peer.
const PACKAGE: &str = "ganeti-htools-3.0";
/// Where that package puts it, if it is on no path.
const PACKAGED: &str = "/usr/lib/ganeti/3.0/usr/bin/htools";
/// How much CPU hbal may have, and how long it may take on a machine with others.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(150));
/// hbal prints eight decimals; ours are rounded to 2⁻³⁰ of a level, and there are a few.
const ROUNDING: f64 = 2e-8;
const SEED: u64 = 1;
/// What part of its memory a node has for itself: the same part of each, for hbal counts it as taken and we do not.
const OWN: u64 = 64;
/// hbal's policy unless told otherwise: four virtual processors for a real one.
const VCPU_RATIO: u64 = 4;

/// The rules that make our score hbal's.
fn as_hbal() -> Rules {
    Rules { weights: [1.0, 1.0, 0.0, 4.0], conflict: 2.0, slow_down: 100 }
}

/// Machines and instances, in numbers that hbal reads too.
struct World {
    machines: Vec<Machine>,
    instances: Vec<Instance>,
}

impl World {
    /// Machines of two sizes and instances of four; the first third of the machines is twice as likely to have one,
    /// as after a growth by new machines.
    fn of(seed: u64, machines: usize, instances: usize) -> anyhow::Result<World> {
        let mut chance = Chance::named(seed, &["packing", &machines.to_string(), &instances.to_string()]);
        let mut all = Vec::new();
        for n in 0..machines {
            let large = chance.under(2);
            let (cpus, mib) = (16 << large, (65_536 << large));
            let limit = Amounts {
                cpu_millis: VCPU_RATIO * cpus * 1000,
                // hbal leaves no machine without any memory at all.
                memory_mib: mib - mib / OWN - 1,
                disk_mib: Amounts::ENDLESS,
                load: Amounts::ENDLESS,
            };
            let pool = Amounts { cpu_millis: cpus * 1000, memory_mib: mib, disk_mib: 1, load: 1000 };
            all.push(Machine { id: format!("n{n:05}").parse()?, room: limit, pool });
        }
        let mut taken: BTreeMap<MachineId, (u64, u64)> = BTreeMap::new();
        let mut some = Vec::new();
        let crowded = (machines / 3).max(1) as u64;
        while some.len() < instances {
            let (size, cpus) = (chance.under(4), 1 + chance.under(4));
            let at = match chance.under(2) {
                0 => chance.under(crowded),
                _ => chance.under(machines as u64),
            };
            let machine = &all[at as usize];
            let needs = Amounts { cpu_millis: cpus * 1000, memory_mib: 512 << size, disk_mib: 0, load: 1000 };
            let (cpu, memory) = taken.entry(machine.id.clone()).or_default();
            if *cpu + needs.cpu_millis > machine.room.cpu_millis || *memory + needs.memory_mib > machine.room.memory_mib
            {
                continue;
            }
            *cpu += needs.cpu_millis;
            *memory += needs.memory_mib;
            let id = InstanceId { service: format!("i{:06}", some.len()).parse()?, number: 0 };
            some.push(Instance { id, machine: machine.id.clone(), needs, apart: false });
        }
        Ok(World { machines: all, instances: some })
    }

    /// hbal's text format: groups, nodes, instances, tags and policies, an empty line between.
    fn text(&self) -> anyhow::Result<String> {
        let mut text = String::from("group-0|uuid-0|preferred||\n\n");
        let mut taken: BTreeMap<&MachineId, u64> = BTreeMap::new();
        for i in &self.instances {
            *taken.entry(&i.machine).or_default() += i.needs.memory_mib;
        }
        for m in &self.machines {
            let (mib, cpus) = (m.pool.memory_mib, m.pool.cpu_millis / 1000);
            let own = mib / OWN;
            let free = mib - own - taken.get(&m.id).unwrap_or(&0);
            // name, memory: all, own, free; disk: all, free; processors, role, group, spindles, tags, exclusive
            // storage, free spindles, own processors, speed
            writeln!(text, "{}|{mib}|{own}|{free}|1000000|1000000|{cpus}|N|uuid-0|1||N|1|0|1.0", m.id)?;
        }
        text.push('\n');
        for i in &self.instances {
            let (mib, cpus) = (i.needs.memory_mib, i.needs.cpu_millis / 1000);
            // name, memory, disk, processors, state, balanced, primary, secondary, template, tags, spindles
            writeln!(text, "{}|{mib}|1024|{cpus}|running|Y|{}||ext||1", i.id.service, i.machine)?;
        }
        text.push_str("\n\n");
        Ok(text)
    }

    /// The score after each of `moves`, from 0 to all of them.
    fn scores<'a>(&self, moves: impl Iterator<Item = (usize, &'a MachineId)>) -> anyhow::Result<Vec<f64>> {
        let (rules, mut now) = (as_hbal(), self.instances.clone());
        let mut scores = vec![score(&self.machines, &now, &rules)?];
        for (i, to) in moves {
            now.get_mut(i).with_context(|| format!("a move of instance {i}, which there is not"))?.machine = to.clone();
            scores.push(score(&self.machines, &now, &rules)?);
        }
        Ok(scores)
    }

    fn balance(&self, limits: &Limits) -> anyhow::Result<(Balance, Duration)> {
        let began = crate::cpu();
        let balanced = balance(&self.machines, &self.instances, &as_hbal(), limits)?;
        Ok((balanced, crate::cpu().saturating_sub(began)))
    }
}

/// An instance, by number, and where it went.
type Went = (usize, MachineId);

/// What hbal did.
struct Peer {
    /// The score that it prints before its first move and after each.
    scores: Vec<f64>,
    moves: Vec<Went>,
    finished: bool,
    cpu: Duration,
}

/// Finds hbal: what `VMATRIX_HBAL` names, else on `PATH`, else where its package puts it.
fn find() -> Option<PathBuf> {
    let named = std::env::var_os("VMATRIX_HBAL").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("hbal")).find(|file| file.is_file());
    named.or(on_path).or_else(|| Some(PathBuf::from(PACKAGED))).filter(|file| file.is_file())
}

/// Lets hbal balance `world`.
fn peer(hbal: &Path, world: &World) -> anyhow::Result<Peer> {
    let file = std::env::temp_dir().join(format!("vmatrix-packing-{}-{}", std::process::id(), world.machines.len()));
    std::fs::write(&file, world.text()?).with_context(|| format!("writing {}", file.display()))?;
    let heard = listen(hbal, &file);
    let removed = std::fs::remove_file(&file).with_context(|| format!("removing {}", file.display()));
    let peer = heard?;
    removed?;
    Ok(peer)
}

fn listen(hbal: &Path, file: &Path) -> anyhow::Result<Peer> {
    let (out, says) = (Stdio::piped(), || format!("running {}", hbal.display()));
    // The package has one program for all its tools, which looks here for which of them it is.
    let mut child =
        Command::new(hbal).arg("-t").arg(file).env("HTOOLS", "hbal").stdout(out).spawn().with_context(says)?;
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    let clock = nix::time::clock_getcpuclockid(pid).context("hbal's clock")?;
    let (lines, heard) = mpsc::channel();
    let out = BufReader::new(child.stdout.take().context("hbal's output")?);
    let reader = std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
    let (began, mut text, mut cpu) = (Instant::now(), Vec::new(), Duration::ZERO);
    let finished = loop {
        // Its clock is gone with it, so it is looked at as long as it runs.
        cpu = nix::time::clock_gettime(clock).map_or(cpu, Duration::from);
        match heard.recv_timeout(Duration::from_millis(20)) {
            Ok(line) => text.push(line),
            Err(mpsc::RecvTimeoutError::Disconnected) => break true,
            Err(mpsc::RecvTimeoutError::Timeout) if cpu > PATIENCE.0 || began.elapsed() > PATIENCE.1 => break false,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
    };
    if !finished {
        child.kill().context("ending hbal")?;
    }
    let status = child.wait().context("waiting for hbal")?;
    drop(reader);
    if finished && !status.success() {
        bail!("hbal ended with {status}; its words are above. If a library is missing, install {PACKAGE} with apt");
    }
    text.extend(heard.try_iter());
    // Before its first move it says nothing that can be heard.
    let silent = !finished && !text.iter().any(|line| line.starts_with("Initial score"));
    let (scores, moves) = if silent { (Vec::new(), Vec::new()) } else { read(&text)? };
    Ok(Peer { scores, moves, finished, cpu })
}

/// Reads hbal's words: `Initial score: S`, then `  1. i000001 n00000 => n00001 S a=…` for each move.
fn read(lines: &[String]) -> anyhow::Result<(Vec<f64>, Vec<Went>)> {
    let (mut scores, mut moves) = (Vec::new(), Vec::new());
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["Initial", "score:", score] => scores.push(score.parse().context("hbal's first score")?),
            [_, instance, _, "=>", to, score, ..] => {
                let number = instance.strip_prefix('i').and_then(|n| n.parse().ok());
                moves.push((number.with_context(|| format!("hbal moves {instance:?}"))?, to.parse()?));
                scores.push(score.parse().with_context(|| format!("a score in {line:?}"))?);
            }
            _ => {}
        }
    }
    if scores.len() != moves.len() + 1 {
        bail!("hbal gave {} scores and {} moves; is it version 3.0?", scores.len(), moves.len());
    }
    Ok((scores, moves))
}

fn figure(balance: &Balance, gain: f64, ms: f64) -> Value {
    json!({ "moves": balance.moves().count(), "score": balance.after, "gain_min": gain, "cpu_ms": ms })
}

/// One size: ours by itself, and beside hbal.
fn row(hbal: Option<&Path>, machines: usize, instances: usize, goals: &mut Vec<Value>) -> anyhow::Result<Value> {
    let world = World::of(SEED, machines, instances)?;
    let name = format!("{machines}x{instances}");
    let at = |gain: f64| Limits { gain, ..Limits::default() };
    let ours = world.balance(&Limits::default())?.0;
    let mut times = Vec::new();
    for _ in 0..5 {
        times.push(world.balance(&Limits::default())?.1);
    }
    times.sort();
    let ms = times[times.len() / 2].as_secs_f64() * 1e3;
    let mut by_gain = Vec::new();
    // 0.01 is what hbal asks of a move once the network is even.
    for gain in [0.01, 0.003, 0.0001] {
        let (other, time) = world.balance(&at(gain))?;
        by_gain.push(figure(&other, gain, time.as_secs_f64() * 1e3));
    }
    let mut figures = json!({
        "seed": SEED, "machines": machines, "instances": instances, "before": ours.before,
        "ours": figure(&ours, Limits::default().gain, ms),
        "ours_by_gain": by_gain,
        "peer": Value::Null,
    });
    let Some(hbal) = hbal else { return Ok(figures) };
    let peer = peer(hbal, &world)?;
    let theirs = world.scores(peer.moves.iter().map(|(i, to)| (*i, to)))?;
    let apart = theirs.iter().zip(&peer.scores).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    if apart > ROUNDING {
        bail!("{name}: hbal's score and ours of the same moves are {apart} apart; the table above is wrong for it");
    }
    let same = Limits { moves: peer.moves.len(), gain: 0.0 };
    let (equal, _) = world.balance(&same)?;
    let last = theirs.last().copied().unwrap_or(ours.before);
    let curve: Vec<Value> = [4, 2, 1]
        .into_iter()
        .map(|part| {
            let moves = peer.moves.len() / part;
            let ours = world.balance(&Limits { moves, gain: 0.0 })?.0;
            Ok(json!({ "moves": moves, "ours": ours.after, "peer": theirs[moves] }))
        })
        .collect::<anyhow::Result<_>>()?;
    figures["peer"] = json!({
        "moves": peer.moves.len(), "score": last, "cpu_ms": peer.cpu.as_secs_f64() * 1e3,
        "finished": peer.finished, "scores_apart_most": apart,
    });
    figures["at_equal_moves"] = json!({ "moves": equal.moves().count(), "score": equal.after });
    figures["curve"] = Value::from(curve);
    let met = equal.after <= last + ROUNDING && equal.moves().count() <= peer.moves.len();
    goals.push(json!({
        "what": format!("{name}: hbal's score after no more moves than hbal makes"),
        "wanted": last, "seen": equal.after, "met": met,
    }));
    goals.push(json!({
        "what": format!("{name}: hbal's score at our end"), "wanted": last, "seen": ours.after, "met": ours.after <= last,
    }));
    Ok(figures)
}

/// Measures packing: score, moves and time, ours and hbal's.
///
/// # Errors
/// hbal is there and does not run, or its score is not what we take it to be.
pub fn measure(_data: Option<&Path>, quick: bool) -> anyhow::Result<Value> {
    let hbal = find();
    if hbal.is_none() {
        eprintln!(
            "packing: no hbal; install the Debian package {PACKAGE} or name one by VMATRIX_HBAL. Ours only, no peer."
        );
    }
    let mut goals = Vec::new();
    let sizes: &[(usize, usize)] = if quick { &[(10, 60)] } else { &[(20, 200), (100, 1000)] };
    let mut rows = Vec::new();
    for &(machines, instances) in sizes {
        let row = row(hbal.as_deref(), machines, instances, &mut goals)?;
        if (machines, instances) == (100, 1000) {
            let ms = row["ours"]["cpu_ms"].as_f64().unwrap_or(f64::INFINITY);
            goals.push(json!({
                "what": "100x1000: CPU, ms", "wanted": 50.0, "seen": ms, "met": ms < 50.0,
            }));
        }
        rows.push(row);
    }
    if !quick {
        rows.push(large(&mut goals)?);
    }
    let missing = if hbal.is_none() { Value::from(PACKAGE) } else { Value::Null };
    Ok(json!({ "rows": rows, "goals": goals, "weights": as_hbal().weights, "peer": "hbal 3.0", "missing": missing }))
}

/// What hbal cannot do at all: ten thousand machines.
fn large(goals: &mut Vec<Value>) -> anyhow::Result<Value> {
    let world = World::of(SEED, 10_000, 100_000)?;
    // A machine counts for a hundredth of what it does among a hundred, and so does hbal's 0.01 of a move.
    let limits = Limits { gain: 1e-4, ..Limits::default() };
    let mut times = Vec::new();
    for _ in 0..3 {
        times.push(world.balance(&limits)?);
    }
    times.sort_by_key(|(_, time)| *time);
    let (ours, time) = &times[1];
    let s = time.as_secs_f64();
    goals.push(json!({ "what": "10000x100000: CPU, s", "wanted": 2.0, "seen": s, "met": s < 2.0 }));
    Ok(json!({
        "seed": SEED, "machines": 10_000, "instances": 100_000, "before": ours.before,
        "ours": figure(ours, limits.gain, s * 1e3), "peer": Value::Null,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quick_run_has_figures() {
        let figures = measure(None, true).unwrap();
        let row = &figures["rows"][0];
        assert!(row["ours"]["score"].as_f64().unwrap() < row["before"].as_f64().unwrap() / 4.0, "{row}");
        assert_eq!(figures["missing"].is_null(), !row["peer"].is_null());
    }

    #[test]
    fn hbals_words_are_read() {
        let lines = [
            "Loaded 2 nodes, 2 instances",
            "Initial score: 4.31250000",
            "    1. i000007 n00000     => n00001       0.06250000 a=fa:n01",
            "Cluster score improved from 4.31250000 to 0.06250000",
        ];
        let (scores, moves) = read(&lines.map(String::from)).unwrap();
        assert_eq!((scores, moves), (vec![4.3125, 0.0625], vec![(7, "n00001".parse().unwrap())]));
        assert!(read(&["Initial score: x".to_owned()]).is_err());
        assert!(read(&[]).is_err());
    }
}
