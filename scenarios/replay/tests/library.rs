//! The scenarios of the library: each has a golden timeline beside it, and keeps what the project promises.
//!
//! `UPDATE=1` rewrites the golden files; read the difference before believing it.

// Helpers of tests fail as loudly as tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use vmatrix_scenarios_replay::recording::Recording;
use vmatrix_scenarios_replay::report::{self, Report};
use vmatrix_scenarios_replay::scenario::Scenario;
use vmatrix_scenarios_replay::{expect, replay, timeline};

fn library() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../library")
}

fn read(name: &str) -> Scenario {
    Scenario::read(&library().join(format!("{name}.toml"))).unwrap()
}

fn played(name: &str) -> (Scenario, Recording, Report) {
    let scenario = read(name);
    let recording = replay(&scenario, None);
    let report = report::summarise(&scenario, &recording);
    (scenario, recording, report)
}

/// Plays a scenario, compares its timeline with the golden one, and checks what holds for each.
fn check(name: &str) -> Report {
    let (recording, report) = as_expected(name);
    holds(name, &recording, &report);
    report
}

/// Plays a scenario, compares its timeline with the golden one, and checks what it expects.
fn as_expected(name: &str) -> (Recording, Report) {
    let (scenario, recording, report) = played(name);
    let told = timeline(&scenario, &recording);
    let golden = library().join(format!("{name}.golden.txt"));
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&golden, &told).unwrap();
    }
    let expected = std::fs::read_to_string(&golden).unwrap_or_default();
    let differs = told.lines().zip(expected.lines()).position(|(a, b)| a != b);
    assert!(
        told == expected,
        "{name} went otherwise than {}, first at line {differs:?}:\n\n{told}\n\nhint: if that is right, run again with UPDATE=1",
        golden.display()
    );
    assert_eq!(expect::broken(&scenario.expected, &report), Vec::<String>::new(), "{name}");
    (recording, report)
}

/// What must hold however chance falls.
fn holds(name: &str, recording: &Recording, report: &Report) {
    let failed: Vec<_> = recording.requests.iter().filter(|r| r.failed.is_some()).collect();
    assert!(failed.is_empty(), "{name}: {failed:?}");
    assert!(report.returned_to_dormant, "{name}: something still runs away from home");
    assert_eq!(report.two_tier.lost_writes, 0, "{name}");
    assert!(recording.notes.is_empty(), "{name}: {:?}", recording.notes);
}

fn first_resumed(report: &Report) -> Option<&str> {
    report.moves.iter().find(|m| m.action.starts_with("resume")).map(|m| m.network.as_str())
}

#[test]
fn a_crowd_in_seoul_brings_the_maps_to_tokyo_and_lets_them_go() {
    let report = check("flash-crowd");
    assert_eq!(first_resumed(&report), Some("tokyo"));
    assert!(report.relocations >= 1);
    let crowd = report.crowd.unwrap();
    assert!(crowd.decision_to_first_byte_s.unwrap() <= 5.0, "{crowd:?}");
    assert!(crowd.onset_to_objective_s.unwrap() <= 30.0, "{crowd:?}");
    assert!(crowd.p95_before_ms.unwrap() >= 2 * crowd.p95_after_ms.unwrap(), "{crowd:?}");
    assert!(report.two_tier.writes > 0);
}

#[test]
fn the_same_crowd_in_berlin_brings_them_to_dublin() {
    assert_eq!(first_resumed(&check("crowd-in-berlin")), Some("dublin"));
}

#[test]
fn a_relocation_outlives_the_deaths_of_the_cpa_a_vm_agent_and_an_edge() {
    assert_eq!(first_resumed(&check("daemons-die")), Some("dublin"));
}

#[test]
fn a_singleton_is_moved_by_orders_under_its_users_and_is_in_one_network_at_a_time() {
    let report = check("moving-ledger");
    assert_eq!(report.relocations, 3);
    let woken = |m: &&report::MoveReport| m.action.starts_with("resume");
    let networks: Vec<&str> = report.moves.iter().filter(woken).map(|m| m.network.as_str()).collect();
    assert_eq!(networks, ["dublin", "tokyo", "ashburn"]);
}

#[test]
fn a_working_day_is_followed_from_the_second_day_on_before_anybody_asks() {
    let (recording, report) = as_expected("following-the-sun");
    // Once the day is known, who comes to stay comes by plan.
    let second_day = report.moves.iter().filter(|m| m.at_s > 87_600.0 && m.cause == "epoch");
    let resumed: Vec<&str> =
        second_day.filter(|m| m.action.starts_with("resume")).map(|m| m.network.as_str()).collect();
    assert!(resumed.contains(&"dublin") && resumed.len() <= 4, "{resumed:?}");
    let ahead =
        recording.decisions.iter().filter(|d| d.plan.moves.iter().any(|m| m.reason.starts_with("the day ahead")));
    assert!(ahead.count() >= 1, "the day ahead was never looked at");
}

#[test]
fn a_service_goes_where_the_hour_is_cheap() {
    let (_, report) = as_expected("price-flips");
    assert!(report.moves.iter().all(|m| m.cause == "epoch"), "{:?}", report.moves);
}

#[test]
fn a_computation_follows_the_cheap_hours() {
    let (_, report) = as_expected("cheap-hours");
    assert!(report.moves.iter().all(|m| m.cause == "epoch"), "{:?}", report.moves);
}

#[test]
fn ten_times_as_much_within_a_minute_is_a_crowd() {
    let report = check("ten-times-in-a-minute");
    assert_eq!(report.moves[0].cause, "burst");
}

#[test]
fn what_swells_slowly_is_served_nearby_without_a_crowd_being_called() {
    let (_, report) = as_expected("slow-swell");
    assert!(!report.moves.is_empty());
}

#[test]
fn a_network_that_is_lost_under_a_crowd_is_left() {
    as_expected("network-lost");
}

#[test]
fn a_front_end_whose_back_end_is_far_stays_with_it() {
    check("back-end-far");
}

#[test]
fn resolvers_that_keep_old_answers_are_served() {
    check("ttl-clamped");
}

#[test]
fn where_there_is_room_for_one_the_other_stays_at_home() {
    as_expected("pool-exhausted");
}

#[test]
fn two_services_whose_hours_do_not_meet_share_a_pool() {
    as_expected("stock-and-sport");
}

#[test]
fn a_crowd_is_helped_before_the_image_is_whole_where_the_link_is_slow() {
    let (recording, _) = as_expected("link-slow");
    let burst = recording.decisions.iter().filter(|d| report::cause(&d.plan.cause) == "burst");
    let on_its_way: Vec<_> = burst.flat_map(|d| &d.plan.moves).filter(|m| m.bytes.0 > 0).collect();
    let [m] = &on_its_way[..] else { panic!("{on_its_way:?}") };
    assert_eq!(m.network.as_str(), "tokyo");
    // It serves long before those bytes could have come.
    let decided = recording.decisions.iter().find(|d| d.plan.moves.contains(m)).unwrap();
    let serving = decided.serving_at.unwrap().since(decided.plan.at);
    assert!(serving.times(10) < m.time, "{serving} against {}", m.time);
}

#[test]
fn a_match_is_played_where_it_is_fair() {
    let report = check("game-match");
    assert!(report.moves.iter().all(|m| m.cause == "order"), "{:?}", report.moves);
}

#[test]
fn an_attack_is_served_like_a_crowd_and_harms_nobody_else() {
    let report = check("attack");
    assert_eq!(report.moves[0].cause, "burst");
    assert!(
        report.moves.iter().all(|m| m.service.as_str() == "maps" && !m.action.contains("x3")),
        "{:?}",
        report.moves
    );
}

#[test]
fn every_scenario_of_the_library_has_a_golden_timeline() {
    for entry in std::fs::read_dir(library()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            assert!(
                path.with_extension("golden.txt").is_file(),
                "{} has no golden timeline; add a test of it here",
                path.display()
            );
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let scenario = read("flash-crowd");
    let bytes = |seed| {
        let recording = replay(&scenario, seed);
        let report = report::summarise(&scenario, &recording);
        (
            serde_json::to_string(&recording).unwrap(),
            serde_json::to_string(&report).unwrap(),
            report::html(&scenario, &recording, &report),
        )
    };
    let once = bytes(None);
    assert!(once == bytes(Some(scenario.seed)));
    assert!(once != bytes(Some(scenario.seed + 1)));
}

#[test]
fn however_chance_falls_nobody_is_refused_and_everything_goes_back_to_sleep() {
    let scenario = read("flash-crowd");
    for seed in 1..=25 {
        let recording = replay(&scenario, Some(seed));
        let report = report::summarise(&scenario, &recording);
        holds(&format!("seed {seed}"), &recording, &report);
        assert_eq!(first_resumed(&report), Some("tokyo"), "seed {seed}");
    }
}

#[test]
fn whichever_daemon_dies_at_whichever_moment_of_the_relocation_the_story_ends_well() {
    let base = std::fs::read_to_string(library().join("flash-crowd.toml")).unwrap();
    for daemon in [
        "kill = \"cpa\"",
        "kill = \"vma\"\nnetwork = \"tokyo\"",
        "kill = \"vma\"\nnetwork = \"ashburn\"",
        "kill = \"edge\"\nnetwork = \"tokyo\"",
        "kill = \"machine\"\nnetwork = \"tokyo\"",
    ] {
        for tenths in (0..40).step_by(10) {
            let fault = format!(
                "\n[[fault]]\n{daemon}\nafter_decision_s = {}.{}\nrestart_after_s = 2\n",
                tenths / 10,
                tenths % 10
            );
            let scenario = Scenario::parse("flash-crowd.toml", &format!("{base}{fault}")).unwrap();
            let recording = replay(&scenario, None);
            holds(&fault, &recording, &report::summarise(&scenario, &recording));
        }
    }
}

/// The first scenario of the library with faults added: `(daemon, network, at_s, restart_after_s)`.
fn with_faults(faults: &[(&str, Option<&str>, u32, u32)]) -> Scenario {
    let mut text = std::fs::read_to_string(library().join("flash-crowd.toml")).unwrap();
    for (daemon, network, at, restart) in faults {
        let network = network.map_or(String::new(), |n| format!("network = \"{n}\"\n"));
        text += &format!("\n[[fault]]\nkill = \"{daemon}\"\n{network}at_s = {at}\nrestart_after_s = {restart}\n");
    }
    Scenario::parse("flash-crowd.toml", &text).unwrap()
}

#[test]
fn the_data_plane_outlives_the_control_plane() {
    let scenario = with_faults(&[
        ("cpa", None, 10, 1000),
        ("vma", Some("ashburn"), 10, 1000),
        ("vma", Some("tokyo"), 10, 1000),
        ("edge", Some("tokyo"), 10, 1000),
    ]);
    let recording = replay(&scenario, None);
    holds("without a control plane", &recording, &report::summarise(&scenario, &recording));
    assert_eq!(recording.decisions.len(), 1, "nobody was there to decide");
}

#[test]
fn requests_wait_for_an_origin_that_is_away_for_a_moment() {
    let scenario = with_faults(&[("origin", None, 60, 5)]);
    let recording = replay(&scenario, None);
    holds("the origin away", &recording, &report::summarise(&scenario, &recording));
    assert!(
        recording.requests.iter().any(|r| r.service.as_str() == "agenda" && r.took >= vmatrix_model::Span::secs(1))
    );
}

#[test]
fn two_daemons_may_die_at_once_or_one_after_the_other() {
    let daemons = [
        ("cpa", None),
        ("vma", Some("tokyo")),
        ("edge", Some("dublin")),
        ("origin", None),
        ("vma", Some("dublin")),
        ("edge", Some("tokyo")),
        ("machine", Some("tokyo")),
    ];
    for case in 0..21_u32 {
        let pick = |n: u32| daemons[n as usize % daemons.len()];
        let ((a, of_a), (b, of_b)) = (pick(case), pick(case * 3 + case / 7 + 1));
        // A machine's lease is 5 s; what happens after it is for the VM agent's own tests.
        let faults = [(a, of_a, 4 + case * 5, 3), (b, of_b, 7 + case * 5, 3)];
        let scenario = with_faults(&faults);
        let recording = replay(&scenario, None);
        holds(&format!("{faults:?}"), &recording, &report::summarise(&scenario, &recording));
    }
}

#[test]
fn the_death_of_a_machines_daemon_is_not_the_death_of_its_guests() {
    let scenario = with_faults(&[("machine", Some("ashburn"), 60, 3)]);
    let recording = replay(&scenario, None);
    holds("the machine's daemon away", &recording, &report::summarise(&scenario, &recording));
}

#[test]
fn a_relocation_carries_no_image_bytes_for_the_crowd() {
    let (_, recording, report) = played("flash-crowd");
    let burst = recording.decisions.iter().find(|d| report::cause(&d.plan.cause) == "burst").unwrap();
    assert!(burst.plan.moves.iter().all(|m| m.bytes.0 == 0), "{:?}", burst.plan.moves);
    // Every network holds both images once: what the first placement staged, and nothing since.
    assert_eq!(report.bytes_moved, 3 * ((148 + 108) << 20));
}

#[test]
fn the_page_is_whole_and_needs_nothing_from_elsewhere() {
    let (scenario, recording, report) = played("flash-crowd");
    let page = report::html(&scenario, &recording, &report);
    for wanted in [
        "Response time of maps",
        "Response time of agenda",
        "Demand",
        "Instances serving",
        "Image bytes",
        "Cost so far",
        "What happened where",
        "Decisions",
        "prefers-color-scheme: dark",
    ] {
        assert!(page.contains(wanted), "the page lacks {wanted}");
    }
    for unwanted in ["http://", "https://", " src=", "<link", "url(", "NaN"] {
        assert!(!page.contains(unwanted), "the page holds {unwanted}");
    }
    for tag in [
        "figure", "svg", "section", "script", "table", "details", "g", "ul", "li", "ol", "text", "title", "div", "dl",
        "tr", "td", "th",
    ] {
        let (opened, closed) = (
            page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count(),
            page.matches(&format!("</{tag}>")).count(),
        );
        assert_eq!(opened, closed, "<{tag}> is not closed as often as it is opened");
    }
}

#[test]
fn the_table_fits_a_terminal() {
    let (_, _, mut report) = played("flash-crowd");
    report.explain.clear();
    let table = report.to_string();
    assert!(table.lines().all(|l| l.chars().count() <= 80), "{table}");
    assert!(table.contains("onset to objective"));
}
