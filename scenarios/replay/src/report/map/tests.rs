use super::*;
use crate::recording::{InstancesAt, Recording};
use crate::report::{html, summarise};
use crate::scenario::Scenario;
use vmatrix_model::Bytes;

fn played() -> (Scenario, Recording) {
    let scenario = Scenario::parse("flash-crowd.toml", include_str!("../../../../library/flash-crowd.toml")).unwrap();
    let recording = crate::replay(&scenario, None);
    (scenario, recording)
}

fn page(scenario: &Scenario, recording: &Recording) -> String {
    html(scenario, recording, &summarise(scenario, recording))
}

/// The island of a page, as a browser would read it.
fn read(page: &str) -> Value {
    let (_, rest) = page.split_once("<script type='application/json' id='frames'>").unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

/// The newest frame at a time.
fn at(island: &Value, at_s: f64) -> &Value {
    let frames = island["frames"].as_array().unwrap();
    frames.iter().rfind(|f| f["at_s"].as_f64().unwrap() <= at_s).unwrap()
}

fn index(island: &Value, of: &str, name: &str) -> usize {
    island[of].as_array().unwrap().iter().position(|n| n == name).unwrap()
}

fn held(island: &Value, at_s: f64, service: &str, network: &str) -> Value {
    at(island, at_s)["held"][index(island, "networks", network)][index(island, "services", service)].clone()
}

#[test]
fn the_map_has_the_states_that_were_recorded() {
    let (scenario, recording) = played();
    let island = read(&page(&scenario, &recording));
    let active = json!({ "active": 1 });
    // As the golden timeline says: decided at 28.50, serving at 28.89, decided again at 94.50, asleep at 97.61.
    for (at_s, maps_at_tokyo) in
        [(0.0, json!("dormant")), (28.4, json!("dormant")), (28.5, json!("resuming")), (28.9, active.clone())]
    {
        assert_eq!(held(&island, at_s, "maps", "tokyo"), maps_at_tokyo, "at {at_s}");
    }
    for (at_s, maps_at_tokyo) in [(60.0, active.clone()), (97.5, active.clone()), (97.7, json!("dormant"))] {
        assert_eq!(held(&island, at_s, "maps", "tokyo"), maps_at_tokyo, "at {at_s}");
    }
    assert_eq!(held(&island, 45.1, "agenda", "dublin"), "resuming");
    assert_eq!(held(&island, 60.0, "agenda", "tokyo"), "dormant");
    for at_s in [0.0, 60.0, 120.0] {
        assert_eq!(held(&island, at_s, "maps", "ashburn"), active, "at {at_s}");
    }
}

#[test]
fn the_map_shows_who_asks_and_who_answers() {
    let (scenario, recording) = played();
    let island = read(&page(&scenario, &recording));
    let (seoul, tokyo) = (scenario.fleet.regions.iter().position(|r| r.name.as_str() == "seoul").unwrap(), 2);
    assert_eq!(island["networks"][tokyo], "tokyo");
    assert_eq!(island["crowds"], json!([{ "region": seoul, "from_s": 25.0, "to_s": 85.0 }]));
    let demand = |at_s| at(&island, at_s)["demand"][seoul].as_f64().unwrap();
    assert!(demand(10.0) < 1.0 && demand(60.0) > 2.0, "{} and {}", demand(10.0), demand(60.0));
    let of_tokyo = |at_s| {
        let served = at(&island, at_s)["served"].as_array().unwrap();
        let line = served.iter().find(|line| line[0] == seoul && line[1] == tokyo);
        line.map_or(0.0, |line| line[2].as_f64().unwrap())
    };
    assert_eq!((of_tokyo(20.0), of_tokyo(60.0), of_tokyo(110.0)), (0.0, 1.0, 0.0));
    assert_eq!(of_tokyo(28.8), 0.0, "it is still being resumed");
}

#[test]
fn every_decision_is_in_the_list_and_in_each_chart_and_jumps_to_its_time() {
    let (scenario, recording) = played();
    let page = page(&scenario, &recording);
    let island = read(&page);
    assert_eq!(island["decisions"], json!([28.5, 45.0, 94.5, 95.0]));
    for number in 1..=4 {
        // In the list, and in each of the charts: two of latency, demand, instances, two of cost.
        assert_eq!(page.matches(&format!("data-decision='{number}'")).count(), 1 + 6, "{number}");
    }
    assert!(!page.contains("data-decision='5'"));
}

#[test]
fn nothing_said_in_a_play_can_end_a_script() {
    let hostile = "</script><script>alert(1)</script><!-- <b>' & \"";
    let (mut scenario, mut recording) = played();
    scenario.name = hostile.into();
    scenario.about = hostile.into();
    for d in &mut recording.decisions {
        d.plan.moves.iter_mut().for_each(|m| m.reason = hostile.into());
        d.plan.not.iter_mut().for_each(|n| n.reason = hostile.into());
    }
    recording.notes = vec![hostile.into()];
    recording.explain = vec![hostile.into()];
    recording.accelerator = hostile.into();
    recording.requests[0].failed = Some(hostile.into());
    let page = page(&scenario, &recording);
    assert_eq!((page.matches("<script").count(), page.matches("</script").count()), (2, 2));
    assert!(!page.contains("<!--") && !page.contains("<b>'"));
    assert!(page.contains("&lt;/script&gt;&lt;script&gt;alert(1)"), "the reason is not told at all");
    read(&page);
}

#[test]
fn an_island_reads_back_and_holds_no_markup() {
    let value = json!({ "</script>": "<!-- <script> ]]> & \u{2028} \\u003c" });
    let text = island(&value);
    assert!(!text.contains(['<', '>', '&']), "{text}");
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
}

#[test]
fn the_script_does_not_end_itself_and_asks_nobody() {
    let script = include_str!("../map.js");
    for bad in ["</script", "<!--", "innerHTML", "fetch(", "import ", "http"] {
        assert!(!script.contains(bad), "the script holds {bad}");
    }
}

#[test]
fn frames_are_bounded_however_long_the_play_and_however_much_happens() {
    let (mut scenario, mut recording) = played();
    scenario.length_s = 14 * 86_400;
    let service = scenario.fleet.services[0].name.clone();
    let network = scenario.fleet.networks[2].name.clone();
    recording.instances = (0..20_000_u64)
        .map(|k| InstancesAt {
            at: Time(k * 60_000_000 + 7),
            service: service.clone(),
            serving: [(network.clone(), (k % 2) as u32)].into(),
        })
        .collect();
    let island = read(&page(&scenario, &recording));
    let times: Vec<f64> = island["frames"].as_array().unwrap().iter().map(|f| f["at_s"].as_f64().unwrap()).collect();
    assert!((300..=FRAMES_MAX).contains(&times.len()), "{}", times.len());
    assert!(times.windows(2).all(|w| w[0] <= w[1]));
    assert_eq!((times.first(), times.last()), (Some(&0.0), Some(&1_209_600.0)));
}

#[test]
fn an_image_on_its_way_is_staging_until_it_is_there() {
    let (scenario, mut recording) = played();
    let d = &mut recording.decisions[1];
    let (at, m) = (d.plan.at, &mut d.plan.moves[0]);
    (m.action, m.bytes) = (Action::Stage, Bytes(1));
    let (service, network) = (m.service.clone(), m.network.clone());
    d.plan.target.services.get_mut(&service).unwrap().insert(network.clone(), Share::Dormant);
    d.done_at = Some(at + Span::secs(5));
    let seen = |after_s| wanted(d, &service, &network, at + Span::secs(after_s));
    assert_eq!((seen(4), seen(5)), (Held::Staging, Held::Dormant));
    d.plan.target.services.get_mut(&service).unwrap().remove(&network);
    assert_eq!(wanted(d, &service, &network, at), Held::Absent);
    assert_eq!(page(&scenario, &recording).matches("<script").count(), 2);
}
