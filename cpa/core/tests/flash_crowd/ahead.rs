//! Days of the toy world: what was learned of a day is done before the day asks for it.

use crate::world::{World, service};
use vmatrix_cpa_core::{Event, Policy};
use vmatrix_model::Span;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// Seoul asks for maps by day, most at noon, and for nothing at midnight.
fn daily() -> World {
    let mut w = World::new(1);
    w.demand = vec![("maps", "new-york", 0.2), ("maps", "seoul", 1.0), ("agenda", "new-york", 0.05)];
    w.daily = Some("seoul");
    w
}

#[test]
fn from_the_second_day_on_a_service_is_there_for_the_day_and_sleeps_by_night() {
    let mut w = daily();
    w.until(DAY + HOUR);
    for day in 1..3 {
        assert!(!w.running("maps").contains(&"tokyo".to_owned()), "day {day}, at night: {:?}", w.running("maps"));
        w.until(day * DAY + 12 * HOUR);
        assert!(w.running("maps").contains(&"tokyo".to_owned()), "day {day}, at noon: {:?}", w.running("maps"));
        w.until((day + 1) * DAY);
    }
    assert_eq!(w.failed, 0);
    let ahead = |m: &&vmatrix_model::plan::Move| m.reason.starts_with("the day ahead: ");
    let moves: Vec<_> = w.adopted.iter().flat_map(|(t, p)| p.moves.iter().map(move |m| (t.0 / 1_000_000, m))).collect();
    let planned: Vec<_> = moves.iter().filter(|(_, m)| ahead(m)).collect();
    assert!((4..=12).contains(&planned.len()), "two days alike are a few moves: {planned:#?}");
    for (_, m) in planned {
        assert!(m.reason.contains("more an hour"), "{}", m.reason);
        assert!(m.after.total() < m.before.total(), "{}", m.reason);
    }
    // Where nothing is to be gained the plan says by how much.
    let lines = w.cpa.explain(w.now, &service("maps")).unwrap().lines.join("\n");
    assert!(lines.contains("not at dublin: serving there too would cost"), "{lines}");
}

#[test]
fn a_plan_that_was_journalled_goes_on_after_a_restart_and_a_pause_unlearns_nothing() {
    let mut w = daily();
    w.until(DAY + 2 * HOUR);
    let memory = w.cpa.memory().clone();
    let text = serde_json::to_string(&memory).unwrap();
    assert_eq!(serde_json::from_str::<vmatrix_cpa_core::Memory>(&text).unwrap(), memory);
    // Two hours away: nobody was heard, and the day is still known.
    w.now = w.now + Span::secs(2 * HOUR);
    w.hear(Event::Restored(Box::new(memory)));
    w.until(DAY + 13 * HOUR);
    assert!(w.running("maps").contains(&"tokyo".to_owned()));
    let ahead = w.adopted.iter().any(|(_, p)| p.moves.iter().any(|m| m.reason.starts_with("the day ahead")));
    assert!(ahead, "{:#?}", w.adopted);
}

#[test]
fn by_the_hours_prices_alone_nothing_is_planned_ahead() {
    let mut w = daily();
    w.cpa = w.cpa.clone().under(Policy::Hourly);
    w.until(DAY + 13 * HOUR);
    let ahead = w.adopted.iter().any(|(_, p)| p.moves.iter().any(|m| m.reason.starts_with("the day ahead")));
    assert!(!ahead && w.running("maps").contains(&"tokyo".to_owned()));
}

#[test]
fn looking_ahead_leaves_numbers_of_instances_to_the_load() {
    let mut fleet = crate::world::fleet();
    fleet
        .services
        .iter_mut()
        .filter(|s| s.name == service("maps"))
        .for_each(|s| (s.instances_max, s.instance_rps) = (4, 1));
    let mut w = World::of(fleet, 1);
    // At the edge between one instance and two.
    w.demand = vec![("maps", "new-york", 1.0), ("agenda", "new-york", 0.05)];
    w.until(DAY + 3 * HOUR);
    let since = |t: &vmatrix_model::Time| t.0 > (DAY + HOUR) * 1_000_000;
    let moves = w.adopted.iter().filter(|(t, _)| since(t)).flat_map(|(_, p)| &p.moves);
    let ahead: Vec<_> = moves.filter(|m| m.reason.starts_with("the day ahead")).collect();
    assert!(ahead.is_empty(), "{ahead:#?}");
}
