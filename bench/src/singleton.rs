//! `bench singleton`: one guest that is moved again and again while it is used.
//!
//! ```text
//! user at a ─ one connection that counts ─▶ cell a ═ relay ═▶ cell of whoever runs it now
//!           ─ requests that write a book ─▶
//! a ─▶ b ─▶ a ─▶ b ─▶ c ─▶ …, each over the WAN emulator ─▶ no line lost or repeated, one writer, the right book
//! ```

use crate::Bench;
use crate::client::{self, Request, Right};
use crate::fleet::{Fleet, start_store};
use crate::guests::{Image, Kind};
use crate::product::{Machine, Setup};
use crate::report::{Goal, Key, Report, Row, Sample, hundredth, ms};
use crate::stop::Stop;
use crate::world::{Link, Site, World};
use anyhow::{Context, bail, ensure};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmatrix_model::InstanceId;
use vmatrix_model::assignment::Singleton;
use vmatrix_vma_core::steps::Life;

const LINK: Link = Link { mbit: 100, rtt_us: 20_000 };
/// Relocations unless another number is asked for: what the goal is about.
const RELOCATIONS: u64 = 200;
const RELOCATIONS_MAX: u64 = 10_000;
/// Of the short form.
const RELOCATIONS_QUICK: u64 = 3;
/// Where the guest counts lines.
const COUNTER_PORT: u16 = 7000;
/// Most lines that the book is built with: `warm-0`, `warm-1` and so on, as many as the builder's passes send.
const BUILT_MAX: u64 = 100;
/// Every so many relocations go to the third machine, the others to and fro between two.
const THIRD_EACH: u64 = 5;
/// Lines counted between two relocations, so that each finds the connection in use.
const LINES_BETWEEN: u64 = 10;
/// Between a line's answer and the next line, and between two lines of the book.
const PAUSE: Duration = Duration::from_millis(2);
const WRITE_PAUSE: Duration = Duration::from_millis(20);
/// A connection that nothing passes on for so long is broken.
const BROKEN: Duration = Duration::from_secs(40);
const STAGE_LIMIT: Duration = Duration::from_secs(120);
/// After a resume is done, lines may still be on their way.
const AFTER: Duration = Duration::from_secs(1);

/// Measures.
///
/// # Errors
/// See [`crate::run_scope`]; and a line is lost, repeated or answered wrongly, or two machines run the guest.
pub fn measure(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut report = bench.report(
        "singleton",
        vec![
            "three real `vmatrix machine` daemons at networks of their own, joined by the WAN emulator; a user at the first one holds one TCP connection on which the guest counts lines, and another writes a book through the same network, a line and a connection at a time".to_owned(),
            "first byte: the longest that a line waited for its answer while the guest moved; move: from the order to the taker's answer that it is healthy".to_owned(),
            "a run ends at once if a line is lost, repeated or answered by another number, if more than one machine holds or runs the guest after a move, or if the book is not, byte for byte, what an undisturbed guest would have written".to_owned(),
        ],
    );
    let usual = if bench.options.quick { RELOCATIONS_QUICK } else { RELOCATIONS };
    let count = bench.options.runs.unwrap_or(usual);
    if !(1..=RELOCATIONS_MAX).contains(&count) {
        bail!("a singleton is relocated 1 to {RELOCATIONS_MAX} times, not {count}");
    }
    let image = bench.image(Kind::Ledger)?;
    let world = World::new(&bench.place, &bench.options.program, &["o", "a", "b", "c"], LINK, &bench.stop)?;
    let fleet = Fleet::found(bench.place.disk().join("fleet"))?;
    let _store = start_store(bench, &fleet, world.site(0)?)?;
    let origin = world.site(0)?.address;
    let setup = Setup { memory_mib: 8 * image.manifest.machine.memory_mib, ..Setup::default() };
    let machines = (1..=3)
        .map(|i| Machine::start(bench, &fleet, world.site(i)?, origin, &setup))
        .collect::<anyhow::Result<_>>()?;
    let course = Course { bench, image: &image, machines };
    for machine in &course.machines {
        machine.stage_whole(bench, &image.manifest.name, STAGE_LIMIT)?;
    }
    let row = course.run(&world, count)?;
    bench.keep(&mut report, vec![row])?;
    Ok(report)
}

/// Every row of the whole form.
pub fn plan() -> Vec<Key> {
    vec![Key {
        guest: Kind::Ledger.name().to_owned(),
        ram_mib: Kind::Ledger.ram_mib(),
        link_mbit: Some(LINK.mbit),
        rtt_us: Some(LINK.rtt_us),
        mechanism: "vmatrix".to_owned(),
        of: None,
    }]
}

/// The goals, against what the row has.
pub fn goals(rows: &[Row]) -> Vec<Goal> {
    let row = rows.first();
    let number = |name: &str| row.and_then(|r| r.number(name));
    vec![
        Goal::at_least("relocations in a row", RELOCATIONS as f64, row.map(|r| r.runs as f64)),
        Goal::at_most("lines of the open connection lost or repeated", 0.0, number("lines_wrong")),
        Goal::at_most("machines that held or ran it at a time", 1.0, number("writers_most")),
        Goal::at_most("bytes of the book that differ from an undisturbed run's", 0.0, number("book_bytes_wrong")),
    ]
}

/// What is moved, and between whom.
struct Course<'a> {
    bench: &'a Bench,
    image: &'a Image,
    machines: Vec<Machine<'a>>,
}

/// When a line was answered, and how long it had waited.
type Answer = (Instant, Duration);
/// When a move began and ended.
type Move = (Instant, Instant);

impl Course<'_> {
    fn run(&self, world: &World, count: u64) -> anyhow::Result<Row> {
        let first = self.machine(0)?;
        let (_, request) = first.order_singleton(self.bench, self.image, Singleton::Begin, 0)?;
        let (user, door) = (first.site(), *request.to.ip());
        let built = (1..=BUILT_MAX).find(|built| check_book(user, door, (*built, 0)).is_ok());
        let built = built.map_or_else(|| check_book(user, door, (1, 0)).map(|()| 1), Ok);
        let built = built.context("the guest does not begin with what its recipe's warm-up writes")?;
        let before = world.crossed(&self.bench.stop)?.bytes;
        let (done, lines, answers) = (Stop::default(), AtomicU64::new(0), Mutex::new(Vec::new()));
        let (moves, written) = std::thread::scope(|threads| {
            let counting = threads.spawn(|| ended(&done, count_lines(user, door, &done, &lines, &answers)));
            let writing = threads.spawn(|| ended(&done, write_book(user, door, built, &done)));
            let moves = self.relocate(count, &done, &lines);
            done.ask();
            let counted = counting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // A wrong line is told before the move that was given up for it.
            counted?;
            let written = written?;
            anyhow::Ok((moves?, written))
        })?;
        let crossed = world.crossed(&self.bench.stop)?.bytes - before;
        check_book(user, door, (built, written))?;
        let answers = answers.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(self.row(&moves, &answers, (written, crossed)))
    }

    fn machine(&self, number: usize) -> anyhow::Result<&Machine<'_>> {
        self.machines.get(number).with_context(|| format!("there is no machine {number}"))
    }

    /// Moves it `count` times; when each move began and ended.
    fn relocate(&self, count: u64, done: &Stop, lines: &AtomicU64) -> anyhow::Result<Vec<Move>> {
        let (mut moves, mut at, mut epoch) = (Vec::new(), 0, 0);
        for n in 0..count {
            let before = lines.load(Ordering::Relaxed);
            let stop = self.bench.stop.or(done);
            stop.until("lines between two relocations", BROKEN, Duration::from_millis(5), || {
                Ok((lines.load(Ordering::Relaxed) > before + LINES_BETWEEN).then_some(()))
            })?;
            let to = if n % THIRD_EACH == THIRD_EACH - 1 { 2 } else { (at + 1) % 2 };
            let (from, taker) = (Singleton::Take(self.machine(at)?.peer()), self.machine(to)?);
            let began = Instant::now();
            let moved = taker.move_here(self.image, from);
            moved.with_context(|| format!("relocation {} of {count}, to {}", n + 1, taker.site().name))?;
            moves.push((began, Instant::now()));
            let held = self.check_writers(to)?;
            ensure!(held > epoch, "epoch {held} after relocation {} does not follow {epoch}", n + 1);
            (at, epoch) = (to, held);
            if (n + 1) % 10 == 0 || n + 1 == count {
                self.bench.say(&format!("singleton: {} of {count} relocations, epoch {epoch}", n + 1));
            }
        }
        Ok(moves)
    }

    /// Fails unless `at` alone holds and runs it; answers with its epoch.
    fn check_writers(&self, at: usize) -> anyhow::Result<u64> {
        let instance = InstanceId { service: self.image.manifest.name.parse()?, number: 0 };
        let mut epoch = None;
        for (number, machine) in self.machines.iter().enumerate() {
            let seen = machine.seen()?;
            let Some(cell) = seen.cells.iter().find(|c| c.instance == instance) else { continue };
            let runs = matches!(cell.life, Life::Resuming | Life::Healthy | Life::Sick);
            if number == at {
                epoch = cell.holds.filter(|_| runs);
            } else if runs || cell.holds.is_some() {
                bail!("{} runs or holds it ({:?}, {:?}) beside another", machine.site().name, cell.life, cell.holds);
            }
        }
        epoch.with_context(|| format!("machine {at} does not hold and run it after it took it"))
    }

    fn row(&self, moves: &[Move], answers: &[Answer], (written, crossed): (u64, u64)) -> Row {
        let blackout = |(began, ended): &Move| {
            let during = answers.iter().filter(|(came, _)| came >= began && *came <= *ended + AFTER);
            during.map(|(_, waited)| *waited).max().unwrap_or_default()
        };
        let sample = |moved: &Move| Sample {
            first_byte_ms: ms(blackout(moved)),
            whole_ms: ms(moved.1.saturating_duration_since(moved.0)),
            ..Sample::default()
        };
        let samples: Vec<Sample> = moves.iter().map(sample).collect();
        let spec = &self.image.manifest.machine;
        let mut row = Row::of(self.image.kind.name(), spec.memory_mib, "vmatrix", &samples);
        (row.link_mbit, row.rtt_ms) = (Some(LINK.mbit), Some(LINK.rtt_us as f64 / 1e3));
        row.bytes_on_wire = Some(crossed / moves.len().max(1) as u64);
        row.add("image", self.image.manifest.name.clone());
        row.add("load", hundredth(crate::load()));
        row.add("blackout_ms_most", hundredth(samples.iter().map(|s| s.first_byte_ms).fold(0.0, f64::max)));
        row.add("lines_counted", answers.len() as u64);
        row.add("lines_written", written);
        // Had any of these been otherwise, there would be no row.
        row.add("lines_wrong", 0);
        row.add("writers_most", 1);
        row.add("book_bytes_wrong", 0);
        row
    }
}

/// Tells the others to end when one has.
fn ended<T>(done: &Stop, result: anyhow::Result<T>) -> anyhow::Result<T> {
    done.ask();
    result
}

/// Sends line after line over one connection until told to stop; each must be answered by its number and itself.
fn count_lines(
    user: &Site,
    door: Ipv4Addr,
    done: &Stop,
    lines: &AtomicU64,
    answers: &Mutex<Vec<Answer>>,
) -> anyhow::Result<()> {
    let to = SocketAddrV4::new(door, COUNTER_PORT);
    let stream = user.namespace.run(|| TcpStream::connect_timeout(&to.into(), BROKEN))?;
    let mut stream = stream.with_context(|| format!("{to} takes no connection"))?;
    stream.set_read_timeout(Some(BROKEN)).context("cannot set the counting connection up")?;
    stream.set_nodelay(true).context("cannot set the counting connection up")?;
    let mut reader = BufReader::new(stream.try_clone().context("cannot read the counting connection")?);
    for n in 1_u64.. {
        if done.check().is_err() {
            break;
        }
        let asked = Instant::now();
        stream.write_all(format!("line-{n}\n").as_bytes()).with_context(|| format!("line {n} is not taken"))?;
        let mut answer = String::new();
        reader.read_line(&mut answer).with_context(|| format!("line {n} is not answered"))?;
        check_line(n, &answer)?;
        answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((Instant::now(), asked.elapsed()));
        lines.store(n, Ordering::Relaxed);
        std::thread::park_timeout(PAUSE);
    }
    Ok(())
}

fn check_line(n: u64, answer: &str) -> anyhow::Result<()> {
    ensure!(answer == format!("{n} line-{n}\n"), "line {n} was answered {answer:?}: a line was lost or came twice");
    Ok(())
}

/// Writes lines into the book, which has `begun` of them, until told to stop, and answers with how many; each must be
/// answered by its number.
fn write_book(user: &Site, door: Ipv4Addr, begun: u64, done: &Stop) -> anyhow::Result<u64> {
    for n in 1_u64.. {
        if done.check().is_err() {
            return Ok(n - 1);
        }
        let right = Right::Body(format!("{}\n", begun + n).into_bytes());
        let request = page(door, format!("/cgi-bin/append?line-{n}"), right);
        client::ask(&user.namespace, &request, BROKEN).with_context(|| format!("line {n} of the book"))?;
        std::thread::park_timeout(WRITE_PAUSE);
    }
    Ok(0)
}

/// The book's digest and length are those of what an undisturbed guest would have written: what it was built with, and
/// lines since.
fn check_book(user: &Site, door: Ipv4Addr, (built, lines): (u64, u64)) -> anyhow::Result<()> {
    let text = book(built, lines);
    let body = format!("{}\n{}\n", sha256(&text)?, text.len());
    let request = page(door, "/cgi-bin/book".to_owned(), Right::Body(body.into_bytes()));
    client::ask(&user.namespace, &request, BROKEN).map(drop).context("the book has other lines than were written")
}

fn book(built: u64, lines: u64) -> String {
    let warm = (0..built).map(|n| format!("warm-{n}\n"));
    warm.chain((1..=lines).map(|n| format!("line-{n}\n"))).collect()
}

fn page(door: Ipv4Addr, path: String, right: Right) -> Request {
    Request { to: SocketAddrV4::new(door, 80), tls: None, path, headers: String::new(), right }
}

/// By the program that the guest has too.
fn sha256(text: &str) -> anyhow::Result<String> {
    let mut command = Command::new("sha256sum");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run sha256sum of coreutils")?;
    // It prints once its input has ended, so nothing waits for anything.
    child
        .stdin
        .take()
        .context("sha256sum takes nothing")?
        .write_all(text.as_bytes())
        .context("cannot feed sha256sum")?;
    let said = child.wait_with_output().context("cannot wait for sha256sum")?.stdout;
    let said = String::from_utf8_lossy(&said).into_owned();
    said.split_whitespace().next().map(str::to_owned).context("sha256sum says nothing")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_lost_or_repeated_is_not_taken_for_the_right_one() {
        assert!(check_line(7, "7 line-7\n").is_ok());
        for wrong in ["8 line-7\n", "7 line-8\n", "6 line-6\n", "7 line-7", ""] {
            assert!(check_line(7, wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_book_has_what_it_was_built_with_and_then_each_line_once() {
        assert_eq!(book(2, 3), "warm-0\nwarm-1\nline-1\nline-2\nline-3\n");
        assert_eq!(sha256("").unwrap(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn a_row_of_too_few_relocations_meets_no_goal_about_their_number() {
        let mut row = Row { runs: 20, ..Row::default() };
        for name in ["lines_wrong", "book_bytes_wrong"] {
            row.add(name, 0);
        }
        row.add("writers_most", 1);
        let met: Vec<_> = goals(&[row]).into_iter().map(|g| g.met).collect();
        assert_eq!(met, [Some(false), Some(true), Some(true), Some(true)]);
        assert!(goals(&[]).iter().all(|g| g.met.is_none()));
    }
}
