//! Every way in which a singleton might come to run twice: asked for by two, cut off half way, killed half way.

use crate::book::{self, Stop};
use crate::users::Counting;
use crate::world::{World, wait};
use crate::{IMAGE, PORTS, SOON};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmatrix_model::assignment::Singleton;

/// Longer than a hand-over takes, shorter than anybody's patience.
const CUT: Duration = Duration::from_secs(2);

/// Looks who holds it until it is told to stop; two are one too many.
fn watch(world: &World, stop: &AtomicBool) -> u64 {
    let mut looks = 0;
    while !stop.load(Ordering::Relaxed) {
        let held = world.holders();
        // Read one after the other: what was handed on in between is seen at both.
        if held.len() > 1 && world.holders() == held {
            panic!("machines {held:?} hold it at the same time");
        }
        looks += 1;
        wait(Duration::from_millis(3));
    }
    looks
}

/// Waits until machine `at` has begun to hand it on, or has.
fn begun(world: &World, at: usize) {
    world.until("a hand-over", SOON, || world.part(at).is_some_and(|part| part != "held"));
}

/// Where it runs: at one machine.
fn only(world: &World) -> usize {
    let running = world.running();
    assert_eq!(running.len(), 1, "it runs at {running:?}\n{}", world.logs());
    assert_eq!(world.holders(), running);
    running[0]
}

fn go_on(world: &World, counting: &Counting, what: &str) {
    let before = counting.lines();
    world.until(what, SOON, || counting.lines() > before + 5);
}

#[test]
fn machine_it_never_runs_twice_whoever_asks_is_cut_off_or_is_killed() {
    let world = World::new("w", &["a", "b", "c"], IMAGE);
    for machine in 0..3 {
        world.stage(machine);
    }
    world.prepare(0, Singleton::Begin, &PORTS).unwrap();
    world.resume(0).unwrap();
    let counting = Counting::begin(&world, world.door(0, 7000));
    let stop = AtomicBool::new(false);
    let take = |machine: usize, from: usize| {
        world.prepare(machine, Singleton::Take(world.transfer(from)), &PORTS).unwrap();
        world.resume(machine)
    };
    let stop_writing = Stop::default();
    let (looks, written) = std::thread::scope(|threads| {
        let watching = threads.spawn(|| watch(&world, &stop));
        let writing = threads.spawn(|| book::write(&world, &stop_writing));
        let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // Asked by two at once: one gets it, the other from that one.
            let (one, other) = (threads.spawn(|| take(1, 0)), threads.spawn(|| take(2, 0)));
            let taken = [one.join().unwrap(), other.join().unwrap()];
            assert!(taken.iter().any(Result::is_ok), "nobody got it: {taken:?}");
            let holder = only(&world);
            assert_ne!(holder, 0);
            go_on(&world, &counting, "lines after two asked");

            // What serves its guest is killed: the guest waits, and goes on.
            world.kill_helpers(holder);
            go_on(&world, &counting, "lines after pager and relay were killed");

            // The holder is cut off when it has begun: nobody else gets it, and it is got when the holder is back.
            let taker = (holder + 1) % 3;
            let taking = threads.spawn(move || take(taker, holder));
            begun(&world, holder);
            world.cut_off(holder, true);
            wait(CUT);
            assert!(world.running().len() <= 1);
            world.cut_off(holder, false);
            taking.join().unwrap().unwrap();
            assert_eq!(only(&world), taker);
            go_on(&world, &counting, "lines after a holder was cut off");

            // The holder is killed when it has begun.
            let (holder, taker) = (taker, (taker + 1) % 3);
            let taking = threads.spawn(move || take(taker, holder));
            begun(&world, holder);
            world.kill(holder);
            wait(Duration::from_millis(500));
            world.restart(holder);
            taking.join().unwrap().unwrap();
            assert_eq!(only(&world), taker);
            go_on(&world, &counting, "lines after a holder was killed");

            // The taker is killed when it has been answered, and is told to resume again.
            let (holder, taker) = (taker, (taker + 1) % 3);
            let taking = threads.spawn(move || take(taker, holder));
            world.until("an answer", SOON, || world.part(taker).as_deref() == Some("held"));
            world.kill(taker);
            assert!(taking.join().unwrap().is_err());
            world.restart(taker);
            world.resume(taker).unwrap();
            assert_eq!(only(&world), taker);
            go_on(&world, &counting, "lines after a taker was killed");

            // What it was handed, the old holder does not run again, whatever it is told.
            let lost = world.step_begin(holder);
            assert_eq!(only(&world), holder, "{lost:?}");
            go_on(&world, &counting, "lines after it was wanted back");
        }));
        stop.store(true, Ordering::Relaxed);
        stop_writing.now();
        let (looks, written) = (watching.join(), writing.join());
        match (played, looks, written) {
            (Ok(()), Ok(looks), Ok(written)) => (looks, written),
            (Err(panic), ..) | (_, Err(panic), _) | (.., Err(panic)) => std::panic::resume_unwind(panic),
        }
    });
    book::check(&world, 0, written);
    let lines = counting.end().len();
    eprintln!("{lines} lines over one connection, {} written, {looks} looks at who holds it", written.written);
}
