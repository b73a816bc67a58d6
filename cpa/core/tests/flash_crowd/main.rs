//! The shipped fleet in a toy world: crowds, orders, and what goes wrong.

#![allow(clippy::unwrap_used)] // A test may panic; the lint's own exception does not reach its helpers.

mod ahead;
mod fair;
mod singleton;
mod trouble;
mod world;

use vmatrix_cpa_core::{Event, Refusal};
use vmatrix_model::plan::{Action, Cause};
use world::{World, network, service};

#[test]
fn every_service_begins_at_home_and_sleeps_everywhere_else() {
    let mut w = World::new(1);
    w.until(10);
    assert_eq!(w.running("maps"), ["ashburn"]);
    assert_eq!(w.running("agenda"), ["ashburn"]);
    let start = &w.adopted[0].1;
    assert_eq!(start.moves.iter().filter(|m| m.action == Action::Stage).count(), 4);
    assert!(w.decisions[0].done_at.is_some());
}

#[test]
fn a_crowd_in_seoul_wakes_tokyo_and_tokyo_sleeps_again() {
    for seed in 1..=20 {
        let mut w = World::new(seed).with_crowd("seoul", 25, 95);
        w.until(150);
        let moves = w.moves("maps");
        let [(up, tokyo, Action::Resume(1)), (down, tokyo_again, Action::Suspend(0))] = &moves[..] else {
            panic!("seed {seed}: {moves:?}")
        };
        assert_eq!((tokyo.as_str(), tokyo_again.as_str()), ("tokyo", "tokyo"), "seed {seed}");
        assert!((26..=31).contains(up), "seed {seed}: decided at {up} s");
        assert!((100..=112).contains(down), "seed {seed}: back to sleep at {down} s");
        assert_eq!(w.running("maps"), ["ashburn"], "seed {seed}");
        assert_eq!(w.failed, 0, "seed {seed}");
        assert!(w.moves("agenda").is_empty(), "seed {seed}: {:?}", w.moves("agenda"));
        assert!(matches!(w.adopted[1].1.cause, Cause::Burst { .. }));
    }
}

#[test]
fn a_crowd_in_berlin_wakes_dublin() {
    for seed in 1..=20 {
        let mut w = World::new(seed).with_crowd("berlin", 25, 95);
        w.until(150);
        let moves = w.moves("maps");
        let [(_, up, Action::Resume(1)), (_, down, Action::Suspend(0))] = &moves[..] else {
            panic!("seed {seed}: {moves:?}")
        };
        assert_eq!((up.as_str(), down.as_str()), ("dublin", "dublin"), "seed {seed}");
        assert_eq!(w.running("maps"), ["ashburn"]);
        assert_eq!(w.failed, 0);
    }
}

#[test]
fn without_a_crowd_nothing_moves_for_three_hours() {
    let mut w = World::new(5);
    w.until(3 * 3600);
    assert_eq!(w.moves("maps"), []);
    assert_eq!(w.moves("agenda"), []);
    assert_eq!(w.failed, 0);
}

#[test]
fn the_agenda_stays_for_nc_exceeds_nb_and_the_cpa_says_so() {
    let mut w = World::new(1);
    w.until(60);
    let lines = w.cpa.explain(w.now, &service("agenda")).unwrap().lines.join("\n");
    let agenda = w.cpa.fleet().service(&service("agenda")).unwrap().clone();
    let (n_c, n_b) = (agenda.backend.unwrap().packets, agenda.response_packets);
    let counts = format!("N_C = {n_c} packets");
    assert!(lines.contains(&counts) && lines.contains(&format!("N_B = {n_b}")) && lines.contains("fails"), "{lines}");
}

#[test]
fn the_same_events_give_the_same_commands() {
    let play = || {
        let mut w = World::new(3).with_crowd("seoul", 25, 95);
        w.until(150);
        w.said
    };
    assert_eq!(play(), play());
}

#[test]
fn an_order_adds_and_the_rounds_leave_it_alone() {
    let mut w = World::new(2);
    w.until(50);
    let plan = w.order("agenda", &[("dublin", 1)]).unwrap();
    assert!(plan.not.iter().any(|n| n.reason.contains("N_C")), "{:?}", plan.not);
    assert_eq!(w.running("agenda"), ["ashburn"], "a plan moves nothing");
    w.hear(Event::Apply { plan: plan.id });
    w.until(120);
    assert_eq!(w.running("agenda"), ["ashburn", "dublin"]);
    let berlin = w.cpa.fleet().regions[1].prefix;
    let dublin = w.cpa.fleet().vip(&service("agenda"), &network("dublin")).unwrap();
    assert_eq!(
        w.steering.services[&service("agenda")].by_clients[&berlin],
        [dublin],
        "an ordered place is used by those near it"
    );
    assert_eq!(w.failed, 0);
    let after = w.order("agenda", &[("dublin", 0)]).unwrap();
    w.hear(Event::Apply { plan: after.id });
    w.until(140);
    assert_eq!(w.running("agenda"), ["ashburn"]);
    assert_eq!(w.failed, 0);
}

#[test]
fn an_ordered_move_is_made_before_the_old_place_is_broken() {
    let mut w = World::new(2);
    w.until(50);
    let plan = w.order("maps", &[("tokyo", 1), ("ashburn", 0)]).unwrap();
    w.hear(Event::Apply { plan: plan.id });
    assert_eq!(w.running("maps"), ["ashburn", "tokyo"], "first the union");
    w.until(53);
    assert_eq!(w.running("maps"), ["ashburn", "tokyo"], "resolvers still know the old address");
    w.until(80);
    assert_eq!(w.running("maps"), ["tokyo"]);
    let ashburn = w.vmas[&network("ashburn")].assignment.as_ref().unwrap();
    assert_eq!(ashburn.services[&service("maps")].forward_to, w.cpa.fleet().vip(&service("maps"), &network("tokyo")));
    assert_eq!(w.failed, 0);
    let d = w.decisions.iter().find(|d| d.plan.id == plan.id).unwrap();
    assert!(d.serving_at.unwrap() < d.done_at.unwrap());
}

#[test]
fn after_its_time_an_order_no_longer_binds() {
    let mut w = World::new(2);
    w.until(50);
    let plan = w.order("agenda", &[("dublin", 1)]).unwrap();
    w.hear(Event::Apply { plan: plan.id });
    w.until(50 + 590);
    assert_eq!(w.running("agenda"), ["ashburn", "dublin"]);
    w.until(50 + 700);
    assert_eq!(w.running("agenda"), ["ashburn"], "its back end is too far from dublin");
}

#[test]
fn a_stale_plan_is_refused_and_says_what_changed() {
    let mut w = World::new(2);
    w.until(50);
    let first = w.order("agenda", &[("dublin", 1)]).unwrap();
    let second = w.order("maps", &[("tokyo", 1)]).unwrap();
    w.hear(Event::Apply { plan: second.id });
    w.hear(Event::Apply { plan: first.id });
    let Some(Refusal::Stale { what, .. }) = w.refusals.first() else { panic!("{:?}", w.refusals) };
    assert!(what.contains("maps at tokyo"), "{what}");
    w.hear(Event::Apply { plan: 99 });
    assert!(matches!(w.refusals[1], Refusal::NoPlan { plan: 99 }));
}

#[test]
fn an_order_that_leaves_nothing_is_refused() {
    let mut w = World::new(2);
    w.until(20);
    assert!(w.order("maps", &[("ashburn", 0)]).is_none());
    assert_eq!(w.refusals.len(), 1);
}
