//! A singleton is begun once and moves as one.

use crate::world::{World, fleet, network, service};
use vmatrix_cpa_core::Event;
use vmatrix_model::assignment::Singleton;
use vmatrix_model::fleet::Kind;

/// The shipped fleet with one of its services as a singleton.
fn world_of(name: &str) -> World {
    let mut fleet = fleet();
    let moves = fleet.services.iter_mut().find(|s| s.name == service(name)).unwrap();
    (moves.kind, moves.instances_max) = (Kind::Singleton, 1);
    fleet.check().unwrap();
    World::of(fleet, 7)
}

fn world() -> World {
    world_of("agenda")
}

fn told(w: &World, at: &str) -> Option<Singleton> {
    w.vmas[&network(at)].assignment.as_ref().unwrap().services[&service("agenda")].singleton
}

fn holder(w: &World) -> Vec<String> {
    w.vmas.iter().filter(|(_, v)| v.holds.contains_key(&service("agenda"))).map(|(n, _)| n.to_string()).collect()
}

fn place(w: &mut World, at: &[(&str, u32)]) {
    let plan = w.order("agenda", at).unwrap_or_else(|| panic!("{:?}", w.refusals));
    w.hear(Event::Apply { plan: plan.id });
}

#[test]
fn it_is_begun_once_and_only_where_it_is_to_be() {
    let mut w = world();
    w.until(10);
    assert_eq!(holder(&w), ["ashburn"]);
    // Whoever asks again after a restart is not told to begin it again.
    for at in ["ashburn", "tokyo", "dublin"] {
        assert_eq!(told(&w, at), Some(Singleton::Keep), "{at}");
    }
    assert_eq!(w.vmas[&network("ashburn")].assignment.as_ref().unwrap().services[&service("maps")].singleton, None);
}

#[test]
fn an_order_for_one_network_moves_it_from_the_other() {
    let mut w = world();
    w.until(10);
    place(&mut w, &[("tokyo", 1)]);
    w.until(11);
    assert_eq!(holder(&w), ["tokyo"], "the taker asks the holder itself");
    w.until(60);
    assert_eq!(w.running("agenda"), ["tokyo"]);
    assert_eq!(w.failed, 0);
    place(&mut w, &[("ashburn", 1)]);
    w.until(120);
    assert_eq!((holder(&w), w.running("agenda")), (vec!["ashburn".to_owned()], vec!["ashburn".to_owned()]));
    assert_eq!(w.vmas[&network("ashburn")].holds[&service("agenda")].epoch, 2);
}

#[test]
fn a_holder_that_is_silent_is_not_replaced() {
    let mut w = world();
    w.until(10);
    w.vmas.get_mut(&network("ashburn")).unwrap().silent = true;
    w.until(15);
    place(&mut w, &[("tokyo", 1)]);
    w.until(200);
    assert_eq!(holder(&w), ["ashburn"], "a second one was begun");
    assert!(!w.said.iter().skip_while(|s| !s.contains("Assign")).any(|s| {
        s.contains("Begin") && s.split(' ').next().is_some_and(|t| t.parse::<u64>().unwrap() > 5_000_000)
    }));
}

#[test]
fn it_is_never_in_two_networks_by_the_prices_either() {
    let mut w = world_of("maps");
    w.demand.retain(|d| d.0 != "maps");
    w.demand.push(("maps", "seoul", 2.0));
    w.until(3600);
    let twice = |p: &vmatrix_model::plan::Plan| {
        p.target.services.get(&service("maps")).is_some_and(|s| s.values().filter(|s| s.instances() > 0).count() > 1)
    };
    assert!(!w.adopted.iter().any(|(_, p)| twice(p)), "{:?}", w.moves("maps"));
    assert_eq!(w.running("maps"), ["tokyo"]);
    assert!(!w.moves("maps").is_empty(), "users far away do not move it");
}

#[test]
fn a_group_moves_as_one() {
    let mut fleet = fleet();
    for service in &mut fleet.services {
        service.group = Some("office".to_owned());
    }
    fleet.check().unwrap();
    let mut w = World::of(fleet, 7).with_crowd("seoul", 25, 95);
    w.until(60);
    // The crowd is of the first service; the other one goes with it.
    assert_eq!(w.running("maps"), w.running("agenda"));
    assert!(w.running("maps").contains(&"tokyo".to_owned()), "{:?}", w.running("maps"));
    w.until(160);
    assert_eq!((w.running("maps"), w.running("agenda")), (vec!["ashburn".to_owned()], vec!["ashburn".to_owned()]));
    // An order for either is one for both.
    place(&mut w, &[("dublin", 1), ("ashburn", 0)]);
    w.until(220);
    assert_eq!((w.running("maps"), w.running("agenda")), (vec!["dublin".to_owned()], vec!["dublin".to_owned()]));
    assert_eq!(w.failed, 0);
}
