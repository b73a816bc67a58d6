//! What the decisions promise, whatever happens in between.

// A test may stop where its own input is wrong.
#![allow(clippy::unwrap_used)]

mod singleton;
mod world;

use proptest::prelude::*;
use vmatrix_model::edge_config::EdgeSeen;
use vmatrix_model::inventory::InstanceState;
use vmatrix_model::{Generation, MachineId, Span};
use vmatrix_vma_core::DRAIN_UNKNOWN;
use vmatrix_vma_core::steps::{Event, Fault, Life};
use world::{World, assignment};

#[test]
fn a_wanted_instance_serves_and_a_second_look_changes_nothing() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    assert_eq!((w.serving("maps"), w.slots("maps")), (1, 1));
    let (steps, config) = (w.steps_sent, w.edge.clone());
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    assert_eq!(w.steps_sent, steps);
    assert_eq!(w.edge, config);
}

#[test]
fn a_dormant_share_holds_the_image_and_runs_nothing() {
    let mut w = World::new(2);
    w.tell(Event::Assignment(assignment(1, &[("maps", 0)])));
    w.settle();
    assert_eq!(w.cells(), 0);
    let image = &w.inventory.as_ref().unwrap().images[&"maps".parse().unwrap()];
    assert!(image.complete());
    assert_eq!(w.machines.values().filter(|m| m.images.contains_key("maps")).count(), 1);
}

#[test]
fn a_resume_after_staging_is_three_steps_and_no_waiting() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 0)])));
    w.settle();
    let (before, began) = (w.steps_sent, w.now);
    w.tell(Event::Assignment(assignment(2, &[("maps", 1)])));
    while w.serving("maps") == 0 {
        w.tick();
    }
    assert_eq!(w.steps_sent - before, 2, "prepare and resume");
    assert!(w.now.since(began).as_ms() <= 900, "two steps of 300 ms took {}", w.now.since(began));
}

#[test]
fn a_resume_where_nothing_is_waits_for_no_staging() {
    let mut w = World::new(1);
    w.settle();
    let began = w.now;
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    while w.serving("maps") == 0 {
        w.tick();
    }
    assert!(w.now.since(began).as_ms() <= 900, "two steps of 300 ms took {}", w.now.since(began));
    let image = |w: &World| w.inventory.as_ref().unwrap().images[&"maps".parse().unwrap()].clone();
    assert!(image(&w).resumable && !image(&w).complete());
    w.settle();
    assert!(image(&w).complete(), "the rest of the image did not come");
}

#[test]
fn a_guest_that_was_ended_for_want_of_memory_is_resumed_where_its_image_comes() {
    let mut w = World::new(2);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    while w.serving("maps") == 0 {
        w.tick();
    }
    let home = w.machines.iter().find(|(_, m)| !m.cells.is_empty()).map(|(id, _)| id.clone()).unwrap();
    let fault = Fault { problem: "no source gave a chunk".into(), hint: String::new(), lasting: false };
    w.barren.insert(home.clone(), fault);
    let machine = w.machines.get_mut(&home).unwrap();
    machine.images.insert("maps".into(), world::CRITICAL);
    machine.cells.values_mut().for_each(|c| c.life = Life::Lost);
    w.settle();
    assert_eq!((w.serving("maps"), w.cells()), (1, 1));
    assert!(w.machines[&home].cells.is_empty(), "it was resumed where nothing comes");
}

#[test]
fn nothing_is_built_where_the_image_is_refused_for_good() {
    let mut w = World::new(1);
    let m1: MachineId = "m1".parse().unwrap();
    w.barren.insert(m1.clone(), Fault { problem: "the disk is full".into(), hint: String::new(), lasting: true });
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.pass(Span::secs(60));
    assert_eq!(w.cells(), 0);
    assert_eq!(w.inventory.as_ref().unwrap().refused[&"maps".parse().unwrap()], "m1: the disk is full");
    w.barren.clear();
    w.settle();
    assert_eq!(w.serving("maps"), 1);
}

#[test]
fn an_older_assignment_is_refused() {
    let mut w = World::new(1);
    assert!(w.tell(Event::Assignment(assignment(3, &[("maps", 1)]))));
    assert!(!w.tell(Event::Assignment(assignment(2, &[]))));
    assert_eq!(w.vma.assignment().unwrap().services.len(), 1);
}

#[test]
fn connections_are_drained_before_the_suspend() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    w.tell(Event::Assignment(assignment(2, &[("maps", 0)])));
    for _ in 0..8 {
        w.tick();
    }
    assert_eq!(w.slots("maps"), 0);
    let i = &w.inventory.as_ref().unwrap().instances;
    assert_eq!((i.len(), i[0].state), (1, InstanceState::Draining));
    w.settle();
    assert_eq!(w.cells(), 0);
    assert!(w.inventory.as_ref().unwrap().instances.is_empty());
}

#[test]
fn connections_that_never_end_are_cut_when_the_drain_is_over() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    for n in w.connections.values_mut() {
        *n = 1_000_000;
    }
    let began = w.now;
    w.tell(Event::Assignment(assignment(2, &[("maps", 0)])));
    while w.cells() > 0 {
        w.tick();
    }
    assert!((10_000..12_000).contains(&w.now.since(began).as_ms()), "{}", w.now.since(began));
}

#[test]
fn a_lost_vm_leaves_rotation_at_once_and_comes_back() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    for c in w.machines.values_mut().flat_map(|m| m.cells.values_mut()) {
        c.life = Life::Lost;
    }
    w.tick();
    assert_eq!(w.slots("maps"), 0);
    w.settle();
    assert_eq!(w.serving("maps"), 1);
}

#[test]
fn a_machine_that_is_lost_has_its_instances_made_elsewhere() {
    let mut w = World::new(2);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    let home = w.machines.iter().find(|(_, m)| !m.cells.is_empty()).map(|(id, _)| id.clone()).unwrap();
    let lost = w.machines.remove(&home).unwrap();
    w.settle();
    assert_eq!(w.serving("maps"), 1);
    // Its old cell comes back with it: surplus, so it goes.
    w.machines.insert(home, lost);
    w.settle();
    assert_eq!((w.serving("maps"), w.cells()), (1, 1));
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason_and_the_rest_runs() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 9)])));
    w.settle();
    assert_eq!(w.serving("maps"), 4, "2048 MiB hold four of 512");
    let why = &w.inventory.as_ref().unwrap().refused[&"maps".parse().unwrap()];
    assert!(why.contains("512 MiB"), "{why}");
}

#[test]
fn a_wish_without_measure_is_refused_like_any_other_that_does_not_fit() {
    let mut w = World::new(1);
    w.machines.values_mut().for_each(|m| m.seen.memory_mib = 1024);
    w.tell(Event::Assignment(assignment(1, &[("maps", u32::MAX)])));
    w.settle();
    assert_eq!(w.serving("maps"), 2);
    assert_eq!(w.inventory.as_ref().unwrap().refused.len(), 1);
}

#[test]
fn a_machine_that_claims_all_memory_there_is_does_not_end_the_agent() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 2)])));
    w.settle();
    w.machines.values_mut().flat_map(|m| m.cells.values_mut()).for_each(|c| c.memory_mib = u64::MAX);
    w.pass(Span::secs(3));
    assert_eq!(w.inventory.as_ref().unwrap().machines[0].free_mib, 0);
}

#[test]
fn new_connections_are_forwarded_only_while_nothing_runs() {
    let mut w = World::new(1);
    let mut a = assignment(1, &[("maps", 0)]);
    for s in a.services.values_mut() {
        s.forward_to = Some([198, 19, 3, 100].into());
    }
    w.tell(Event::Assignment(a.clone()));
    w.settle();
    let maps = "maps".parse().unwrap();
    assert!(w.edge.services[&maps].forward_to.is_some());
    a.generation = a.generation.next();
    for s in a.services.values_mut() {
        s.instances = 1;
    }
    w.tell(Event::Assignment(a));
    w.settle();
    assert!(w.edge.services[&maps].forward_to.is_none());
}

#[test]
fn a_restarted_agent_leaves_what_serves_in_rotation() {
    let mut w = World::new(2);
    w.tell(Event::Assignment(assignment(1, &[("maps", 2)])));
    w.settle();
    let steps = w.steps_sent;
    w.restart();
    for _ in 0..60 {
        w.tick();
        assert_eq!(w.slots("maps"), 2, "rotation was emptied at {}", w.now.0);
        if let Some(i) = &w.inventory {
            assert!(i.instances.iter().all(|i| i.state == InstanceState::Serving), "{:?}", i.instances);
        }
    }
    assert_eq!(w.steps_sent, steps);
}

#[test]
fn what_serves_is_told_as_serving_while_the_edge_is_told_something_else() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    w.deaf_until = w.now + Span::secs(3);
    w.tell(Event::Assignment(assignment(2, &[("maps", 1), ("tiny", 1)])));
    while w.now + Span::ms(100) < w.deaf_until {
        w.tick();
        assert_eq!(w.serving("maps"), 1, "withdrawn at {}", w.now.0);
    }
    assert_eq!((w.slots("tiny"), w.serving("tiny")), (1, 0), "told as serving before the edge said so");
    w.settle();
    assert_eq!(w.serving("tiny"), 1);
}

#[test]
fn an_edge_that_lost_its_config_serves_nobody() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    let network = w.edge.network.clone();
    w.tell(Event::EdgeSeen(EdgeSeen {
        network,
        config: Generation(0),
        steering: Generation(0),
        connections: Default::default(),
    }));
    assert_eq!(w.serving("maps"), 0);
}

/// Where the first cell is.
fn home(w: &World) -> MachineId {
    w.machines.iter().find(|(_, m)| !m.cells.is_empty()).map(|(id, _)| id.clone()).unwrap()
}

#[test]
fn what_serves_on_a_silent_machine_goes_on_serving_and_nothing_new_goes_there() {
    let mut w = World::new(2);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    let home = home(&w);
    let steps = w.steps_sent;
    w.mute.insert(home.clone());
    for _ in 0..600 {
        w.tick();
        assert_eq!((w.serving("maps"), w.slots("maps")), (1, 1), "out of rotation at {}", w.now.0);
    }
    assert_eq!(w.steps_sent, steps);
    let seen = w.inventory.clone().unwrap();
    assert_eq!(seen.machines.iter().find(|m| m.id == home).map(|m| m.free_mib), Some(0));
    assert!(seen.instances[0].trouble.as_ref().is_some_and(|t| t.contains("silent")), "{:?}", seen.instances);
    w.tell(Event::Assignment(assignment(2, &[("maps", 2)])));
    w.settle();
    assert_eq!((w.serving("maps"), w.machines[&home].cells.len()), (2, 1));
    w.mute.clear();
    w.settle();
    assert_eq!((w.serving("maps"), w.cells()), (2, 2));
}

#[test]
fn a_cell_of_a_silent_machine_that_does_not_answer_is_replaced() {
    let mut w = World::new(2);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    let home = home(&w);
    w.mute.insert(home.clone());
    w.pass(Span::secs(20));
    w.machines.get_mut(&home).unwrap().cells.values_mut().for_each(|c| c.life = Life::Lost);
    w.pass(Span::secs(10));
    assert!(w.edge.services.values().flat_map(|s| &s.slots).count() == 1 && w.serving("maps") == 1);
    assert!(w.machines.iter().any(|(id, m)| *id != home && m.cells.len() == 1), "nothing was made elsewhere");
}

#[test]
fn a_silent_machine_is_not_believed_for_ever() {
    let mut w = World::new(2);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    let home = home(&w);
    w.mute.insert(home.clone());
    w.pass(Span::secs(320));
    assert_eq!(w.serving("maps"), 1);
    assert!(w.machines.iter().any(|(id, m)| *id != home && m.cells.len() == 1), "nothing was made elsewhere");
    w.mute.clear();
    w.settle();
    assert_eq!((w.serving("maps"), w.cells()), (1, 1));
}

#[test]
fn a_cell_that_was_being_suspended_when_its_machine_fell_silent_is_not_put_back() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    w.connections.values_mut().for_each(|n| *n = 0);
    w.tell(Event::Assignment(assignment(2, &[("maps", 0)])));
    let sent = w.steps_sent;
    while w.steps_sent == sent {
        w.tick();
    }
    w.mute.insert(home(&w));
    w.tell(Event::Assignment(assignment(3, &[("maps", 1)])));
    for _ in 0..100 {
        w.tick();
        assert_eq!(w.slots("maps"), 0, "put back at {}", w.now.0);
    }
    assert_eq!(w.serving("maps"), 0);
}

#[test]
fn a_service_dropped_before_a_restart_is_drained_all_the_same() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    w.connections.values_mut().for_each(|n| *n = 1_000_000);
    w.tell(Event::Assignment(assignment(2, &[])));
    w.tick();
    w.restart();
    let began = w.now;
    while w.cells() > 0 {
        w.tick();
        assert_eq!(w.slots("maps"), 0);
        let runs = w.machines.values().flat_map(|m| m.cells.values()).any(|c| c.life == Life::Healthy);
        let draining = w.edge.services.values().any(|s| !s.draining.is_empty());
        assert!(!runs || draining, "the edge was not told that it drains, at {}", w.now.0);
    }
    let took = w.now.since(began).as_ms();
    assert!((10_000..16_000).contains(&took), "{took} ms, and the drain is 10 s");
    w.settle();
    assert!(w.vma.leaving().is_empty());
}

#[test]
fn a_cell_of_a_service_nobody_knows_is_drained_for_a_while() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("maps", 1)])));
    w.settle();
    w.connections.values_mut().for_each(|n| *n = 0);
    w.tell(Event::Assignment(assignment(2, &[])));
    w.saved_leaving.clear();
    w.restart();
    let began = w.now;
    while w.cells() > 0 {
        w.tick();
    }
    let took = w.now.since(began);
    assert!(took >= DRAIN_UNKNOWN && took.as_ms() < 40_000, "suspended after {took}");
}

#[test]
fn a_cell_whose_service_left_while_its_machine_was_silent_is_drained_for_a_while_and_goes() {
    let mut w = World::new(1);
    w.tell(Event::Assignment(assignment(1, &[("agenda", 1)])));
    w.settle();
    w.mute.extend(w.machines.keys().next().cloned());
    w.tell(Event::Assignment(assignment(2, &[])));
    (0..100).for_each(|_| w.tick());
    w.mute.clear();
    let began = w.now;
    while w.cells() > 0 {
        w.tick();
        assert!(w.now.since(began).as_ms() < 40_000, "it is still there");
    }
}

#[derive(Debug, Clone)]
enum Happening {
    Mute,
    Speak,
    Assign(Vec<(usize, u32)>),
    Pass(u8),
    Restart,
    Fail(u32),
    Lose,
    Sicken,
}

const NAMES: [&str; 3] = ["agenda", "maps", "tiny"];

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        3 => prop::collection::vec((0usize..3, 0u32..4), 0..4).prop_map(Happening::Assign),
        5 => (1u8..40).prop_map(Happening::Pass),
        1 => Just(Happening::Restart),
        1 => (1u32..4).prop_map(Happening::Fail),
        1 => Just(Happening::Lose),
        1 => Just(Happening::Sicken),
        1 => Just(Happening::Mute),
        2 => Just(Happening::Speak),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happened before: in the end exactly what is wanted runs (as far as it fits), nothing
    /// else; and with nothing wanted, nothing is left. The world itself asserts that nothing was
    /// exposed before it was healthy, suspended in rotation, released while it ran, or given more
    /// memory than there is.
    #[test]
    fn it_converges(machines in 1u32..4, happenings in prop::collection::vec(happening(), 1..25)) {
        let mut w = World::new(machines);
        let mut generation = 0;
        let mut wanted: Vec<(&str, u32)> = Vec::new();
        for h in happenings {
            match h {
                Happening::Assign(services) => {
                    generation += 1;
                    let unique: std::collections::BTreeMap<&str, u32> = services.iter().map(|(i, n)| (NAMES[*i], *n)).collect();
                    wanted = unique.into_iter().collect();
                    w.tell(Event::Assignment(assignment(generation, &wanted)));
                }
                Happening::Pass(n) => (0..n).for_each(|_| w.tick()),
                Happening::Restart => w.restart(),
                Happening::Mute => w.mute.extend(w.machines.keys().next().cloned()),
                Happening::Speak => w.mute.clear(),
                Happening::Fail(n) => w.fail_next = n,
                Happening::Lose => w.machines.values_mut().flat_map(|m| m.cells.values_mut()).take(1).filter(|c| c.life == Life::Healthy).for_each(|c| c.life = Life::Lost),
                Happening::Sicken => w.machines.values_mut().flat_map(|m| m.cells.values_mut()).take(1).filter(|c| c.life == Life::Healthy).for_each(|c| c.life = Life::Sick),
            }
        }
        if generation == 0 {
            return Ok(());
        }
        w.mute.clear();
        w.settle();
        let total: u32 = wanted.iter().map(|(_, n)| n).sum();
        let room = machines * 4;
        let serving: usize = NAMES.iter().map(|n| w.serving(n)).sum();
        prop_assert_eq!(serving as u32, total.min(room));
        prop_assert_eq!(w.cells() as u32, total.min(room));
        let steps = w.steps_sent;
        let config = w.edge.clone();
        if total <= room {
            w.settle();
            prop_assert_eq!(w.steps_sent, steps);
            prop_assert_eq!(&w.edge, &config);
        }
        w.tell(Event::Assignment(assignment(generation + 1, &[])));
        w.settle();
        prop_assert_eq!(w.cells(), 0);
        prop_assert!(w.machines.values().all(|m| m.images.is_empty()));
        prop_assert!(w.edge.services.values().all(|s| s.slots.is_empty()));
    }
}
