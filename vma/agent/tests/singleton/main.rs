//! A singleton on machines that are networks apart: moved under its users' connections, and never in two places.
//!
//! The image `ledger` comes from the store that `VMATRIX_STORE` names. `VMATRIX_RELOCATIONS` says how often it moves.

// A test may stop where its own input is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod book;
mod full;
mod ready;
mod times;
mod users;
mod world;
mod writers;

use book::{Lines, Stop};
use std::time::{Duration, Instant};
use users::{Counting, page_within};
use vmatrix_model::assignment::Singleton;
use vmatrix_vma_core::steps::Life;
use world::{World, wait};

const IMAGE: &str = "ledger";
const PORTS: [u16; 2] = [80, 7000];
const RELOCATIONS: usize = 20;
const SOON: Duration = Duration::from_secs(20);
/// A page that takes longer than a tour of the machines.
const LATER: &str = "/cgi-bin/later?20";
const LATER_LIMIT: Duration = Duration::from_secs(60);
/// After a resume is done its users' lines may still be on their way.
const AFTER: Duration = Duration::from_secs(1);
/// Median of what a user waits for, on a machine that does nothing else; a busy one takes several times as long.
const BLACKOUT_MAX: Duration = Duration::from_secs(3);

#[test]
fn machine_connections_and_what_is_written_outlive_relocations() {
    let relocations = std::env::var("VMATRIX_RELOCATIONS").map_or(RELOCATIONS, |n| n.parse().unwrap());
    let world = World::new("r", &["a", "b", "c"], IMAGE);
    for machine in 0..3 {
        world.stage(machine);
    }
    world.prepare(0, Singleton::Begin, &PORTS).unwrap();
    world.resume(0).unwrap();
    let counting = Counting::begin(&world, world.door(0, 7000));
    let stop = Stop::default();
    let (moved, written) = std::thread::scope(|threads| {
        let writing = threads.spawn(|| book::write(&world, &stop));
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| relocate(&world, &counting, relocations)));
        stop.now();
        let written = writing.join();
        match (moved, written) {
            (Ok(moved), Ok(written)) => (moved, written),
            (Err(panic), _) | (_, Err(panic)) => std::panic::resume_unwind(panic),
        }
    });
    book::check(&world, 0, written);
    let answers = counting.end();
    asleep_and_moved(&world, (relocated_to(relocations), written));
    let waited = |(began, ended): &(Instant, Instant)| {
        let during = answers.iter().filter(|(came, _)| came >= began && *came <= *ended + AFTER);
        during.map(|(_, waited)| *waited).max().unwrap_or_default()
    };
    let mut blackouts: Vec<Duration> = moved.iter().map(waited).collect();
    eprintln!("{} lines counted, {} written, {relocations} relocations", answers.len(), written.written);
    eprintln!("blackouts: {blackouts:?}");
    blackouts.sort_unstable();
    times::print(&world);
    let median = blackouts[blackouts.len() / 2];
    eprintln!(
        "{:>20}: {:>6} ms in the middle, {} at most",
        "blackout",
        median.as_millis(),
        blackouts[blackouts.len() - 1].as_millis()
    );
    assert!(median < BLACKOUT_MAX, "users wait {median:?}");
}

/// A user who has asked and says nothing more is answered by a guest that nobody has spoken to where it is: the way
/// back is not known there.
#[test]
fn machine_who_only_waits_is_answered_wherever_it_went() {
    const TOUR: [usize; 5] = [2, 0, 1, 2, 1];
    let world = World::new("o", &["a", "b", "c"], IMAGE);
    for machine in 0..3 {
        world.stage(machine);
    }
    world.prepare(0, Singleton::Begin, &PORTS).unwrap();
    world.resume(0).unwrap();
    std::thread::scope(|threads| {
        let (mut waiting, mut at) = (Vec::new(), 0);
        let mut ask = |stop: usize, door: usize| {
            let world = &world;
            let asked = move || (Instant::now(), page_within(world, world.door(door, 80), LATER, LATER_LIMIT));
            waiting.push((stop, door, threads.spawn(move || (asked(), Instant::now()))));
        };
        for (stop, to) in TOUR.into_iter().enumerate() {
            // Through each network that it has a cell in.
            (0..3)
                .filter(|door| [0].iter().chain(&TOUR[..stop]).any(|been| been == door))
                .for_each(|door| ask(stop, door));
            wait(Duration::from_millis(500));
            world.prepare(to, Singleton::Take(world.transfer(at)), &PORTS).unwrap();
            world.resume(to).unwrap_or_else(|e| panic!("stop {stop}: {e}"));
            at = to;
        }
        let toured = Instant::now();
        let mut through = 0;
        for (stop, door, user) in waiting {
            let ((asked, said), answered) = user.join().unwrap();
            let what = format!("asked {stop} moves in, through machine {door}, {:?} ago", asked.elapsed());
            assert_eq!(said.as_deref(), Some("later\n"), "{what}\n{}", world.logs());
            through += usize::from(answered > toured);
        }
        eprintln!("{through} were answered after the tour");
        assert!(through > 0, "the tour took so long that nobody waited to its end");
    });
}

/// Put to sleep it is held where it is; it moves while it sleeps, and its cell may go.
fn asleep_and_moved(world: &World, (at, written): (usize, Lines)) {
    world.suspend(at).unwrap();
    assert!(world.running().is_empty());
    assert!(world.cell_seen(at).is_some_and(|c| c.life == Life::Ready && c.holds.is_some()));
    let to = (at + 1) % 3;
    world.prepare(to, Singleton::Take(world.transfer(at)), &PORTS).unwrap();
    world.resume(to).unwrap();
    book::check(world, to, written);
    assert!(world.cell_seen(at).is_some_and(|c| c.life == Life::Handed && c.holds.is_none()));
    assert!(world.relays(at) > 0);
    world.release(at).unwrap();
    assert_eq!((world.cell_seen(at), world.relays(at)), (None, 0));
    book::check(world, to, written);
}

/// Where it is after so many relocations.
fn relocated_to(relocations: usize) -> usize {
    (0..relocations).fold(0, next)
}

/// Where relocation `n` takes it: to and fro, and now and then to the third machine.
fn next(at: usize, n: usize) -> usize {
    if n % 5 == 4 { 2 } else { (at + 1) % 2 }
}

/// Moves it; when each move began and ended.
fn relocate(world: &World, counting: &Counting, relocations: usize) -> Vec<(Instant, Instant)> {
    let (mut moved, mut at) = (Vec::new(), 0);
    for n in 0..relocations {
        let before = counting.lines();
        world.until("lines between relocations", SOON, || counting.lines() > before + 10);
        let to = next(at, n);
        let began = Instant::now();
        world.prepare(to, Singleton::Take(world.transfer(at)), &PORTS).unwrap();
        world.resume(to).unwrap_or_else(|e| panic!("relocation {n}: {e}"));
        moved.push((began, Instant::now()));
        assert_eq!(world.running(), [to], "relocation {n}");
        at = to;
    }
    moved
}
