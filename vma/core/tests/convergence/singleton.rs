//! A singleton that is here, goes on, and comes back.

use crate::world::{World, singleton};
use vmatrix_model::Span;
use vmatrix_model::assignment::Singleton;
use vmatrix_vma_core::steps::{Event, Life};

fn serving() -> World {
    let mut w = World::new(1);
    w.tell(Event::Assignment(singleton(1, 1, Singleton::Begin)));
    w.settle();
    assert_eq!((w.serving("maps"), w.slots("maps")), (1, 1));
    w
}

fn hand_on(w: &mut World) {
    w.machines.values_mut().flat_map(|m| m.cells.values_mut()).for_each(|c| c.life = Life::Handed);
}

#[test]
fn one_that_was_handed_on_is_answered_through_its_old_cell_and_not_resumed_again() {
    let mut w = serving();
    let sent = w.steps_sent;
    hand_on(&mut w);
    w.pass(Span::secs(30));
    assert_eq!((w.serving("maps"), w.slots("maps"), w.steps_sent), (1, 1, sent), "its relay is not used");
}

#[test]
fn the_cell_it_left_is_drained_and_released() {
    let mut w = serving();
    hand_on(&mut w);
    w.pass(Span::secs(2));
    w.tell(Event::Assignment(singleton(2, 0, Singleton::Keep)));
    w.pass(Span::secs(1));
    assert_eq!((w.slots("maps"), w.cells()), (0, 1), "open connections are cut at once");
    w.settle();
    assert_eq!(w.cells(), 0);
}

#[test]
fn one_that_is_wanted_back_is_taken_back_into_its_old_cell() {
    let mut w = serving();
    hand_on(&mut w);
    w.pass(Span::secs(2));
    w.tell(Event::Assignment(singleton(2, 1, Singleton::Take(([198, 19, 2, 1], 8452).into()))));
    w.settle();
    assert_eq!((w.serving("maps"), w.cells()), (1, 1));
    assert!(w.machines.values().flat_map(|m| m.cells.values()).all(|c| c.life == Life::Healthy));
}

#[test]
fn nobody_makes_one_that_is_only_to_be_kept() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(singleton(1, 1, Singleton::Keep)));
    w.settle();
    assert_eq!(w.cells(), 0, "a second one was begun");
    let refused = w.inventory.as_ref().unwrap().refused.values().next().cloned();
    assert!(refused.is_some_and(|why| why.contains("no machine here holds")));
}
