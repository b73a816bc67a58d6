//! An order for a meeting: the CPA says where, and why there.

use crate::world::{World, fleet, network, service};
use vmatrix_cpa_core::Event;
use vmatrix_model::fleet::Kind;
use vmatrix_model::plan::{Action, Cause, Plan};
use vmatrix_model::wire::{Fair, Order};

/// New York against Berlin: nearest to both is Dublin.
fn order(at: &[(&str, u32)]) -> Order {
    let team = |region: &str| vec![region.parse().unwrap()];
    let fair = Fair { teams: vec![team("new-york"), team("berlin")], slack_percent: None, cap_ms: None };
    Order { service: service("maps"), at: at.iter().map(|(n, i)| (network(n), *i)).collect(), fair: Some(fair) }
}

fn not<'a>(plan: &'a Plan, name: &str) -> Vec<&'a str> {
    plan.not.iter().filter(|n| n.network == network(name)).map(|n| n.reason.as_str()).collect()
}

#[test]
fn a_match_is_resumed_where_it_is_fairest_and_the_log_says_why() {
    let mut w = World::new(2);
    w.until(50);
    let plan = w.ask(order(&[("ashburn", 0)])).unwrap();
    let told: Vec<_> = plan.moves.iter().map(|m| (m.network.as_str(), m.action)).collect();
    assert_eq!(told, [("ashburn", Action::Suspend(0)), ("dublin", Action::Resume(1))]);
    let words = "fairest to new-york against berlin: dublin is 77 ms and 40 ms from the teams on average, 37 ms apart";
    assert!(plan.moves.iter().all(|m| m.reason.starts_with(words) && m.reason.contains("; ordered by an operator; ")));
    assert!(!plan.moves[0].reason.contains("will be sent"), "{}", plan.moves[0].reason);
    assert_eq!(not(&plan, "ashburn"), ["the order empties it"]);
    assert_eq!(plan.cause, Cause::Order);
    w.hear(Event::Apply { plan: plan.id });
    w.until(90);
    assert_eq!(w.running("maps"), ["dublin"]);
    let explained = w.cpa.explain(w.now, &service("maps")).unwrap().lines;
    assert!(explained.iter().any(|l| l.contains(words)), "{explained:?}");
    assert_eq!(w.failed, 0);

    let again = w.ask(order(&[])).unwrap();
    assert!(again.moves.is_empty(), "{:?}", again.moves);
    assert!(not(&again, "dublin")[0].starts_with("it runs there already; fairest to"), "{:?}", again.not);
}

#[test]
fn who_would_be_sent_elsewhere_is_said() {
    let mut w = World::new(2);
    w.until(50);
    let plan = w.ask(order(&[])).unwrap();
    let [m] = &plan.moves[..] else { panic!("{:?}", plan.moves) };
    assert_eq!((m.network.as_str(), m.action), ("dublin", Action::Resume(1)));
    let astray = "but new-york will be sent to ashburn, which is nearer: order --at ashburn=0 too for all to meet";
    assert!(m.reason.contains(astray), "{}", m.reason);
}

#[test]
fn a_singleton_goes_there_with_everything() {
    let mut fleet = fleet();
    (fleet.services[0].kind, fleet.services[0].instances_max) = (Kind::Singleton, 1);
    let mut w = World::of(fleet, 7);
    w.until(10);
    let plan = w.ask(order(&[])).unwrap();
    assert!(plan.moves.iter().all(|m| !m.reason.contains("will be sent")), "{:?}", plan.moves);
    w.hear(Event::Apply { plan: plan.id });
    w.until(60);
    assert_eq!(w.running("maps"), ["dublin"]);
}

#[test]
fn a_network_of_which_nothing_is_heard_or_that_is_full_is_left() {
    let mut w = World::new(2);
    w.until(50);
    w.vmas.get_mut(&network("dublin")).unwrap().silent = true;
    w.until(70);
    let plan = w.ask(order(&[])).unwrap();
    assert!(plan.moves.is_empty() && !not(&plan, "ashburn").is_empty(), "ashburn, where it runs: {plan:?}");
    assert!(not(&plan, "dublin").contains(&"nothing is heard of dublin"), "{:?}", plan.not);

    let mut small = fleet();
    small.networks[1].machine_memory_mib = 100;
    let mut w = World::of(small, 2);
    w.until(50);
    let plan = w.ask(order(&[])).unwrap();
    assert!(not(&plan, "dublin")[0].contains("its machines lend 100 MiB"), "{:?}", plan.not);
}
