//! A disk without room for what a singleton writes.

use crate::book::{self, Stop};
use crate::world::World;
use crate::{IMAGE, PORTS};
use std::time::Duration;
use vmatrix_model::assignment::Singleton;
use vmatrix_vma_testing::Small;

/// Some lines after the disk is full; and, with room made, until the guest has been told to write again.
const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn machine_a_singleton_without_room_to_write_is_told_of_and_goes_on_by_itself_when_there_is() {
    let world = World::new("f", &["a"], IMAGE);
    let small = Small::new(world.path("a/pagers"), "1m");
    world.stage(0);
    world.prepare(0, Singleton::Begin, &PORTS).unwrap();
    world.resume(0).unwrap();
    let told = || world.cell_seen(0).and_then(|cell| cell.trouble).filter(|t| t.contains("no room"));
    let stop = Stop::default();
    let written = std::thread::scope(|threads| {
        let writing = threads.spawn(|| book::write(&world, &stop));
        let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            world.until("a word that there is no room", MINUTE, || told().is_some());
            small.resize("64m");
            world.until("a guest that goes on", MINUTE, || told().is_none());
        }));
        stop.now();
        let written = writing.join();
        match (played, written) {
            (Ok(()), Ok(written)) => written,
            (Err(panic), _) | (_, Err(panic)) => std::panic::resume_unwind(panic),
        }
    });
    book::check(&world, 0, written);
}
