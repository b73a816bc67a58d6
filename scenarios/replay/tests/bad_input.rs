//! What a scenario file may have wrong: each gets one error that says what, where, and what to do.

// Helpers of tests fail as loudly as tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use vmatrix_scenarios_replay::scenario::Scenario;

const GOOD: &str = include_str!("../../library/flash-crowd.toml");

/// The error that the library's first scenario gives once `old` has become `new`.
fn error(old: &str, new: &str) -> String {
    assert!(GOOD.contains(old), "the scenario no longer holds {old:?}");
    let text = GOOD.replacen(old, new, 1);
    Scenario::parse("bad.toml", &text).expect_err(&format!("{new:?} was taken")).to_string()
}

/// Asserts that every one of `words` stands in the error.
fn says(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "{error:?} does not say {word:?}");
    }
}

#[test]
fn an_unknown_key_comes_with_its_place_and_the_nearest_right_one() {
    says(&error("length_s = 120", "lenght_s = 150"), &["bad.toml:8:1", "lenght_s", "did you mean `length_s`?"]);
    says(&error("onset_s = 25", "onset = 25"), &["onset", "did you mean `onset_s`?"]);
}

#[test]
fn a_missing_key_is_named() {
    says(&error("seed = 1\n", ""), &["bad.toml", "missing field `seed`"]);
}

#[test]
fn a_name_that_does_not_exist_comes_with_the_nearest_one() {
    says(&error("region = \"seoul\"", "region = \"soul\""), &["soul", "did you mean \"seoul\"?"]);
    says(&error("home = \"ashburn\"", "home = \"ashbrun\""), &["ashbrun", "did you mean \"ashburn\"?"]);
    says(
        &error("between = [\"seoul\", \"tokyo\"]", "between = [\"seoul\", \"tokio\"]"),
        &["tokio", "did you mean \"tokyo\"?"],
    );
}

#[test]
fn an_impossible_topology_is_refused() {
    says(&error("lat = 39.0", "lat = 93.0"), &["ashburn", "not on the earth"]);
    says(&error("name = \"dublin\"", "name = \"ashburn\""), &["ashburn", "twice"]);
    says(&error("mbit = 200", "mbit = 0"), &["seoul - tokyo", "mbit must be above 0"]);
    says(&error("machines = 1", "machines = 0"), &["machines must be above 0"]);
    says(&error("machines = 1", "machines = 4000000000"), &["ashburn", "at most 256"]);
}

#[test]
fn a_fleet_that_could_not_serve_is_refused() {
    says(&error("zone = \"vmatrix.test\"", "zone = \"not a zone\""), &["zone", "not a zone"]);
    says(&error("ttl_s = 2", "ttl_s = 0"), &["ttl_s", "must be 1 to"]);
    says(&error("rtt_ms = 40", "rtt_ms = 4000000000"), &["seoul - tokyo", "rtt_ms"]);
    says(&error("image = \"maps\"", "image = \"../../etc\""), &["service maps", "not the name of a recipe"]);
    says(&error("vip_host = 101", "vip_host = 100"), &["service agenda", "maps already"]);
    says(&error("vip_host = 101", "vip_host = 1"), &["service agenda", "2 to 254"]);
}

#[test]
fn overlapping_prefixes_are_refused_by_name() {
    says(&error("prefix = \"198.19.2.0/24\"", "prefix = \"198.19.1.0/24\""), &["198.19.1.0/24", "overlap"]);
    says(&error("prefix = \"198.19.2.0/24\"", "prefix = \"198.19.2.0/25\""), &["198.19.2.0/25", "too small"]);
}

#[test]
fn times_and_rates_must_be_possible() {
    says(&error("end_s = 85", "end_s = 950"), &["crowd in seoul", "within length_s"]);
    says(&error("requests_per_s = 4.0", "requests_per_s = -4.0"), &["-4", "must be 0 to"]);
    says(&error("requests_per_s = 4.0", "requests_per_s = nan"), &["NaN", "must be 0 to"]);
    says(&error("ramp_s = 2", "ramp_s = 4294967295"), &["crowd in seoul", "before end_s"]);
    says(&error("length_s = 120", "length_s = 0"), &["length_s = 0", "must be 1 to"]);
}

#[test]
fn a_play_of_too_many_requests_is_refused_before_it_begins() {
    let text = GOOD.replace("length_s = 120", "length_s = 86400").replacen(
        "requests_per_s = 0.4",
        "requests_per_s = 9000.0",
        1,
    );
    says(&Scenario::parse("bad.toml", &text).unwrap_err().to_string(), &["more than 5000000 requests", "lower"]);
}

#[test]
fn a_file_cut_off_anywhere_is_an_error_or_a_shorter_scenario_and_never_a_panic() {
    let mut refused = 0;
    for end in (0..GOOD.len()).filter(|end| GOOD.is_char_boundary(*end)).step_by(7) {
        refused += usize::from(Scenario::parse("bad.toml", &GOOD[..end]).is_err());
    }
    assert!(refused > 300, "only {refused} cuts were noticed");
    says(
        &Scenario::parse("bad.toml", &GOOD[..GOOD.find("[[traffic]]").unwrap() - 40]).unwrap_err().to_string(),
        &["bad.toml"],
    );
}

#[test]
fn a_fault_says_whom_and_when() {
    let with = |fault: &str| {
        Scenario::parse("bad.toml", &format!("{GOOD}\n[[fault]]\n{fault}\nrestart_after_s = 1\n"))
            .unwrap_err()
            .to_string()
    };
    says(&with("kill = \"vma\"\nat_s = 3"), &["names its network"]);
    says(&with("kill = \"cpa\""), &["at_s or after_decision_s"]);
    says(&with("kill = \"edge\"\nat_s = 3\nnetwork = \"paris\""), &["does not exist"]);
    says(&with("kill = \"edgy\"\nat_s = 3"), &["unknown variant `edgy`", "did you mean `edge`?"]);
}

#[test]
fn an_order_says_where_or_for_whom() {
    let with = |order: &str| {
        let text = format!("{GOOD}\n[[order]]\nat_s = 3\n{order}\n");
        Scenario::parse("bad.toml", &text).map(|_| ()).map_err(|e| e.to_string())
    };
    let refused = |order: &str| with(order).unwrap_err();
    assert_eq!(with("service = \"maps\"\nfair = [[\"seoul\"], [\"berlin\"]]"), Ok(()));
    says(&refused("service = \"maps\""), &["order at 3 s", "give at, or fair"]);
    says(&refused("service = \"mops\"\nat = { tokyo = 1 }"), &["does not exist"]);
    says(&refused("service = \"maps\"\nfair = [[\"seoul\", \"berlin\"]]"), &["two teams or more"]);
    says(&refused("service = \"maps\"\nfair = [[\"soul\"], [\"berlin\"]]"), &["soul", "did you mean \"seoul\"?"]);
    says(&refused("service = \"maps\"\nfare = [[\"seoul\"]]"), &["unknown field `fare`", "did you mean `fair`?"]);
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Scenario::read(std::path::Path::new("no-such.toml")).unwrap_err().to_string();
    says(&error, &["no-such.toml", "hint"]);
}
