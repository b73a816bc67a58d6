//! What goes wrong: networks that refuse, fall silent or lie, a CPA that dies, stops, or has its clock set.

use crate::world::{World, fleet, network, service};
use std::collections::BTreeMap;
use vmatrix_cpa_core::{Command, Cpa, Event, Memory, Refusal};
use vmatrix_model::plan::Cause;
use vmatrix_model::{Generation, Span, Time};

#[test]
fn a_newcomer_that_refuses_is_taken_back() {
    let mut w = World::new(2).with_crowd("seoul", 25, 95);
    w.vmas.get_mut(&network("tokyo")).unwrap().refuses = true;
    w.until(90);
    assert_eq!(w.failed, 0);
    assert!(w.running("maps").contains(&"ashburn".to_owned()));
    let tokyo = w.moves("maps").iter().filter(|m| m.1 == "tokyo").count();
    assert_eq!(tokyo, 1, "not tried again at once: {:?}", w.moves("maps"));
    assert!(w.decisions.iter().any(|d| d.plan.not.iter().any(|n| n.reason.contains("no machine"))));
}

#[test]
fn a_lost_network_is_replaced() {
    let mut w = World::new(2);
    w.until(40);
    w.vmas.get_mut(&network("ashburn")).unwrap().silent = true;
    w.until(45);
    let maps = &w.steering.services[&service("maps")];
    assert!(!maps.is_empty(), "an address stays while nobody else serves");
    w.until(90);
    assert!(w.decisions.iter().any(|d| matches!(d.plan.cause, Cause::Loss { .. })));
    assert!(w.running("maps").len() > 1);
    let vip = w.cpa.fleet().vip(&service("maps"), &network("ashburn")).unwrap();
    assert!(w.steering.services[&service("maps")].by_clients.values().all(|v| !v.contains(&vip)));
}

#[test]
fn a_cpa_killed_at_any_moment_goes_on_where_it_was() {
    let whole = {
        let mut w = World::new(4).with_crowd("seoul", 25, 95);
        w.until(150);
        w.moves("maps").into_iter().map(|m| (m.1, m.2)).collect::<Vec<_>>()
    };
    for kill_at in [26, 28, 29, 30, 31, 33, 50, 96, 102, 105, 108] {
        let mut w = World::new(4).with_crowd("seoul", 25, 95);
        w.until(kill_at);
        let written = serde_json::to_string(w.cpa.memory()).unwrap();
        let memory: Memory = serde_json::from_str(&written).unwrap();
        assert_eq!(memory, *w.cpa.memory());
        w.now = w.now + Span::secs(2);
        w.cpa = Cpa::new(fleet(), BTreeMap::new());
        w.hear(Event::Restored(Box::new(memory)));
        w.until(150);
        let moves: Vec<_> = w.moves("maps").into_iter().map(|m| (m.1, m.2)).collect();
        assert_eq!(moves, whole, "killed at {kill_at}");
        assert_eq!(w.running("maps"), ["ashburn"], "killed at {kill_at}");
        assert_eq!(w.failed, 0, "killed at {kill_at}");
    }
}

/// Plays on after the CPA's clock jumped: `seconds` forward (a pause, in which it heard nobody) or back.
fn jump(w: &mut World, seconds: i64) {
    let by = Span::secs(seconds.unsigned_abs());
    w.now = if seconds < 0 { w.now - by } else { w.now + by };
}

#[test]
fn nobody_is_lost_in_a_pause_or_a_clock_step() {
    for (seconds, first_heard) in
        [(20, &["dublin", "tokyo"][..]), (20, &[]), (8 * 3600, &["dublin", "tokyo"]), (-3600, &["dublin", "tokyo"])]
    {
        let mut w = World::new(2);
        w.until(4000);
        let before = (w.moves("maps"), w.moves("agenda"), w.steering.clone());
        jump(&mut w, seconds);
        // The network that serves is the last to be heard again.
        for name in first_heard {
            w.hear(Event::Inventory(w.inventory(&network(name))));
        }
        w.hear(Event::Tick);
        w.until(w.now.0 / 1_000_000 + 30);
        let after = (w.moves("maps"), w.moves("agenda"), w.steering.clone());
        assert_eq!(after, before, "{seconds} s, first heard of {first_heard:?}");
        assert!(!w.cpa.moving());
    }
}

#[test]
fn silence_from_before_a_pause_still_counts_and_the_pause_does_not() {
    let mut w = World::new(2);
    w.until(40);
    w.vmas.get_mut(&network("ashburn")).unwrap().silent = true;
    w.until(48);
    jump(&mut w, 60);
    let resumed = w.now.0 / 1_000_000;
    w.until(resumed + 20);
    let lost: Vec<u64> = w
        .adopted
        .iter()
        .filter(|(_, p)| matches!(p.cause, Cause::Loss { .. }))
        .map(|(t, _)| t.0 / 1_000_000 - resumed)
        .collect();
    assert!(!lost.is_empty() && lost.iter().all(|after| (5..=15).contains(after)), "{lost:?} s after the pause");
}

#[test]
fn a_newcomer_is_not_given_up_for_a_pause_of_the_cpa() {
    let mut w = World::new(2);
    w.until(50);
    let plan = w.order("maps", &[("tokyo", 1)]).unwrap();
    w.hear(Event::Apply { plan: plan.id });
    jump(&mut w, 600);
    w.hear(Event::Tick);
    w.until(w.now.0 / 1_000_000 + 10);
    assert_eq!(w.running("maps"), ["ashburn", "tokyo"]);
    let d = w.decisions.iter().find(|d| d.plan.id == plan.id).unwrap();
    assert!(d.serving_at.is_some() && d.plan.not.iter().all(|n| !n.reason.contains("taken back")), "{:?}", d.plan.not);
}

#[test]
fn a_crowd_is_seen_soon_after_the_clock_was_set_back() {
    let mut w = World::new(4);
    w.until(4000);
    jump(&mut w, -3600);
    let back = w.now.0 / 1_000_000;
    w = w.with_crowd("seoul", back + 40, back + 110);
    w.until(back + 60);
    assert_eq!(w.running("maps"), ["ashburn", "tokyo"]);
}

#[test]
fn numbers_absurdly_far_ahead_are_refused() {
    let mut w = World::new(1);
    w.until(10);
    let (generation, answers) = (w.cpa.memory().placement.generation, w.cpa.memory().steering.generation);
    let just_too_far = Generation(generation.max(answers).0 + (1 << 32) + 1);
    for claimed in [Generation(u64::MAX), just_too_far] {
        let mut inventory = w.inventory(&network("tokyo"));
        inventory.generation = claimed;
        inventory.at = Time(1);
        let said = w.cpa.handle(w.now, Event::Inventory(inventory));
        assert!(matches!(&said[0], Command::Refuse(Refusal::Absurd { network: n, .. }) if *n == network("tokyo")));
        let said = w.cpa.handle(w.now, Event::Answering { network: network("tokyo"), generation: claimed });
        assert!(matches!(&said[..], [Command::Refuse(Refusal::Absurd { .. })]));
    }
    assert_ne!(w.cpa.memory().seen[&network("tokyo")].inventory.at, Time(1), "what it says is not believed");
    assert_eq!((w.cpa.memory().placement.generation, w.cpa.memory().steering.generation), (generation, answers));
    let mut lost_journal = w.inventory(&network("tokyo"));
    lost_journal.generation = Generation(1 << 32);
    w.hear(Event::Inventory(lost_journal));
    assert_eq!(w.cpa.memory().placement.generation, Generation((1 << 32) + 1), "within reason it is numbered after");
    assert!(w.refusals.is_empty());
}

#[test]
fn absurd_counts_do_not_overflow() {
    let mut w = World::new(1);
    w.until(30);
    let clients = w.cpa.fleet().regions[0].prefix;
    for sequence in 1000..1010 {
        let counts = [vmatrix_model::demand::DemandCount {
            service: service("maps"),
            clients,
            requests: u64::MAX,
            bytes: vmatrix_model::Bytes(u64::MAX),
        }];
        w.hear(Event::Demand(vmatrix_model::demand::DemandReport {
            network: network("tokyo"),
            sequence,
            run: 1,
            at: Time(u64::MAX),
            counts: counts.to_vec(),
        }));
    }
    w.until(40);
    assert!(w.running("maps").contains(&"ashburn".to_owned()));
}

#[test]
fn a_memory_of_an_earlier_version_is_taken_over() {
    let mut w = World::new(4).with_crowd("seoul", 25, 95);
    w.until(40);
    let mut written = serde_json::to_value(w.cpa.memory()).unwrap();
    let mandatory = ["began", "placement", "plans_made", "steering"];
    written.as_object_mut().unwrap().retain(|k, _| mandatory.contains(&k.as_str()));
    let memory: Memory = serde_json::from_value(written.clone()).unwrap();
    assert_eq!(memory.placement, w.cpa.memory().placement);
    for missing in mandatory.iter().filter(|m| **m != "began") {
        let mut without = written.clone();
        without.as_object_mut().unwrap().remove(*missing);
        assert!(serde_json::from_value::<Memory>(without).is_err(), "without {missing} it would begin afresh");
    }
}

#[test]
fn a_crowd_that_nobody_can_help_is_told_why() {
    let mut fleet = fleet();
    fleet.networks.iter_mut().filter(|n| n.name != network("ashburn")).for_each(|n| n.machine_memory_mib = 256);
    let mut w = World::of(fleet, 1).with_crowd("seoul", 25, 95);
    w.until(60);
    assert_eq!(w.running("maps"), ["ashburn"]);
    let lines = w.cpa.explain(w.now, &service("maps")).unwrap().lines.join("\n");
    assert!(
        lines.contains("not at tokyo: tokyo would need 512 MiB of memory and its machines lend 256 MiB"),
        "{lines}"
    );
    assert_eq!(w.failed, 0);
}
