//! What is made ready for a singleton before it comes: used, or ended.

use crate::users::page_within;
use crate::world::World;
use crate::{IMAGE, PORTS, SOON};
use vmatrix_model::assignment::Singleton;

const PAGER: &str = " pager --config ";
const QEMU: &str = "qemu-system";
const PAGE: &str = "/index.html";

/// Prepares machine `m` and waits until a QEMU waits there.
fn prepared(world: &World, m: usize, from: Singleton) {
    world.prepare(m, from, &PORTS).unwrap();
    world.until("a QEMU that waits", SOON, || world.made(m, QEMU) == 1 && world.made(m, PAGER) == 1);
}

fn answers(world: &World, m: usize) {
    assert!(page_within(world, world.door(m, 80), PAGE, SOON).is_some(), "no page at machine {m}");
    assert_eq!(world.running(), [m]);
}

#[test]
fn machine_what_was_made_ready_is_used_or_ended_whatever_comes_between() {
    let world = World::new("y", &["a", "b"], IMAGE);
    for machine in 0..2 {
        world.stage(machine);
    }
    // Its daemon is killed in between: the next one does not know how far that QEMU is, and begins anew.
    prepared(&world, 0, Singleton::Begin);
    world.kill(0);
    world.restart(0);
    world.resume(0).unwrap();
    answers(&world, 0);

    // It is not taken after all.
    let take = Singleton::Take(world.transfer(0));
    prepared(&world, 1, take);
    world.until("a relay", SOON, || world.relays(1) == 1);
    world.release(1).unwrap();
    let left = [QEMU, PAGER, " relay --config "].map(|words| world.made(1, words));
    assert_eq!(left, [0, 0, 0], "something is left of what was made ready");
    answers(&world, 0);

    // The daemon of the taker is killed in between.
    prepared(&world, 1, take);
    world.kill(1);
    world.restart(1);
    world.resume(1).unwrap();
    answers(&world, 1);

    // What was made ready dies before it is used.
    let back = Singleton::Take(world.transfer(1));
    world.release(0).unwrap();
    prepared(&world, 0, back);
    world.end_made(0, PAGER);
    world.resume(0).unwrap();
    answers(&world, 0);
}
