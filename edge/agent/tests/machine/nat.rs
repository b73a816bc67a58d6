//! Balancing, default deny, forwarding, demand, and what survives a killed edge.

use crate::site::{Line, Site, echo_server, wait};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use vmatrix_model::demand::DemandReport;
use vmatrix_model::edge_config::EdgeSeen;

const EDGE: &str = "198.19.1.1:8442";
const VIP: &str = "198.19.1.100:80";

/// A client network, an edge, two cells, and another network's public address behind the uplink.
fn site() -> Site {
    let site = Site::new(&["client", "edge", "cella", "cellb"]);
    site.join(("client", "up0", "10.1.2.9/24"), ("edge", "wan0", "10.1.2.1/24"));
    site.join(("edge", "ca", "100.64.0.1/30"), ("cella", "eth0", "100.64.0.2/30"));
    site.join(("edge", "cb", "100.64.0.5/30"), ("cellb", "eth0", "100.64.0.6/30"));
    site.ip("edge", "addr add 198.19.1.1/32 dev lo");
    site.ip("client", "route add default via 10.1.2.1");
    site.ip("cella", "route add default via 100.64.0.1");
    site.ip("cellb", "route add default via 100.64.0.5");
    for (cell, address, name) in [("cella", "100.64.0.2", "a"), ("cellb", "100.64.0.6", "b")] {
        site.leave(cell, echo_server(&format!("{address}:80"), name));
        site.leave(cell, echo_server(&format!("{address}:81"), name));
    }
    ask_cpa_at(&site, "127.0.0.1");
    site
}

fn ask_cpa_at(site: &Site, cpa: &str) {
    site.write("edge.toml", &format!("network = \"lyon\"\nlisten = \"198.19.1.1:8442\"\ndns_listen = \"10.1.2.1:53\"\nstate_dir = \"state\"\ntoken_file = \"token\"\ncpa = \"http://{cpa}:8440\"\nzone = \"vmatrix.test\"\nuplink = \"wan0\"\n"));
}

fn start(site: &mut Site) -> usize {
    let config = site.folder.path().join("edge.toml").display().to_string();
    let daemon = site.start("edge", &format!("edge {config}"));
    site.until("the edge listens", || site.ask("edge", EDGE, "GET", "/readyz", "").0 == 200);
    daemon
}

fn config(generation: u64, slots: &[(&str, u32)], draining: &[&str], forward: Option<&str>) -> String {
    let slots: Vec<_> =
        slots.iter().map(|(cell, weight)| serde_json::json!({"cell": cell, "weight": weight})).collect();
    serde_json::json!({"generation": generation, "network": "lyon", "services": {"maps": {
        "vip": "198.19.1.100", "ports": [80], "slots": slots, "draining": draining, "forward_to": forward}}})
    .to_string()
}

fn put(site: &Site, config: &str) -> (u16, String) {
    site.ask("edge", EDGE, "PUT", "/v1/config", config)
}

fn answers(site: &Site, connections: u32) -> BTreeMap<String, u32> {
    site.within("client", || {
        let mut counts = BTreeMap::new();
        for _ in 0..connections {
            let name = Line::open(VIP).and_then(|mut l| l.say("x")).map_or_else(|e| e.kind().to_string(), |(n, _)| n);
            *counts.entry(name).or_default() += 1;
        }
        counts
    })
}

const A: &str = "100.64.0.2";
const B: &str = "100.64.0.6";

#[test]
fn machine_new_connections_follow_the_weights_and_a_swap_loses_none() {
    let mut site = site();
    start(&mut site);
    assert_eq!(put(&site, &config(1, &[(A, 12), (B, 4)], &[], None)).0, 200);
    let counts = answers(&site, 200);
    let (a, b) = (counts.get("a").copied().unwrap_or(0), counts.get("b").copied().unwrap_or(0));
    assert_eq!(a + b, 200, "{counts:?}");
    assert!((120..=178).contains(&a), "12 of 16 slots gave {a} of 200 connections");

    let mut kept = site.within("client", || Line::open(VIP).unwrap());
    let first = kept.say("x").unwrap().0;
    let stop = AtomicBool::new(false);
    let failed = std::thread::scope(|s| {
        let hammer = s.spawn(|| {
            site.within("client", || {
                let mut counts = (0u32, 0u32);
                while !stop.load(Ordering::Relaxed) {
                    match Line::open(VIP).and_then(|mut l| l.say("x")) {
                        Ok(_) => counts.0 += 1,
                        Err(_) => counts.1 += 1,
                    }
                }
                counts
            })
        });
        for generation in 2..32 {
            let (cell, other) = if generation % 2 == 0 { (A, B) } else { (B, A) };
            let (status, body) = put(&site, &config(generation, &[(cell, 1)], &[other], None));
            assert_eq!(status, 200, "{body}");
            assert_eq!(kept.say("x").unwrap().0, first, "an established connection moved");
        }
        stop.store(true, Ordering::Relaxed);
        hammer.join().unwrap()
    });
    eprintln!("{} new connections over 30 swaps, {} failed", failed.0, failed.1);
    assert!(failed.0 > 50 && failed.1 == 0, "{} connections, {} failed", failed.0, failed.1);
    assert_eq!(answers(&site, 20), BTreeMap::from([("b".to_owned(), 20)]));

    let seen: EdgeSeen = serde_json::from_str(&site.ask("edge", EDGE, "GET", "/v1/seen", "").1).unwrap();
    let kept_at: Ipv4Addr = if first == "a" { A } else { B }.parse().unwrap();
    assert!(seen.connections[&kept_at] >= 1, "{seen:?}");
    drop(kept);
}

#[test]
fn machine_only_declared_ports_answer() {
    let mut site = site();
    start(&mut site);
    assert_eq!(put(&site, &config(1, &[(A, 1)], &[], None)).0, 200);
    site.leave("edge", echo_server("0.0.0.0:8499", "host"));
    site.until("the declared port answers", || answers(&site, 1).contains_key("a"));
    let ways = [
        ("client", VIP, true),
        ("cellb", VIP, true),
        ("client", EDGE, false),
        ("client", "198.19.1.1:8441", false),
        ("client", "10.1.2.1:8442", false),
        ("client", "198.19.1.100:81", false),
        ("client", "198.19.1.100:8442", false),
        ("client", "198.19.1.100:53", false),
        ("client", "100.64.0.2:80", false),
        ("client", "10.1.2.1:8499", false),
        ("cellb", "198.19.1.100:81", false),
        ("cellb", "100.64.0.2:80", false),
        ("cellb", "100.64.0.5:8442", false),
        ("cellb", "10.1.2.1:8442", false),
        ("cellb", EDGE, false),
    ];
    // At once, for what is dropped is noticed by waiting.
    std::thread::scope(|s| {
        let tries =
            ways.map(|(from, to, open)| (from, to, open, s.spawn(|| site.within(from, || Line::open(to).is_ok()))));
        for (from, to, open, answered) in tries {
            assert_eq!(answered.join().unwrap(), open, "from {from} to {to}");
        }
    });
}

#[test]
fn machine_the_control_ports_answer_the_cpa() {
    let mut site = site();
    ask_cpa_at(&site, "10.1.2.9");
    start(&mut site);
    assert!(site.within("client", || Line::open(EDGE).is_ok()), "the CPA cannot reach the edge");
    site.ip("client", "addr add 10.1.2.8/24 dev up0");
    site.ip("client", "route replace 198.19.1.1/32 via 10.1.2.1 src 10.1.2.8");
    assert!(!site.within("client", || Line::open(EDGE).is_ok()), "its neighbour can, too");
}

/// Gives a namespace a chain with one rule.
fn rule(site: &Site, namespace: &str, hook: &str, rule: &str) {
    let text = format!("table ip test {{\nchain c {{\ntype filter hook {hook} priority mangle\n{rule}\n}}\n}}\n");
    let file = site.write("test.nft", &text);
    site.within(namespace, || crate::site::run(&format!("nft -f {file}")));
}

#[test]
fn machine_stragglers_are_sent_on_to_where_it_is_served() {
    let mut site = site();
    start(&mut site);
    // The other network's public address, reached by the uplink; it knows no way back but to our edge.
    site.ip("client", "addr add 198.19.2.100/32 dev lo");
    site.ip("edge", "route add 198.19.2.0/24 via 10.1.2.9");
    site.leave("client", echo_server("198.19.2.100:80", "elsewhere"));
    assert_eq!(put(&site, &config(1, &[(A, 1)], &[], Some("198.19.2.100"))).0, 200);
    let mut kept = site.within("client", || Line::open(VIP).unwrap());
    assert_eq!(kept.say("x").unwrap().0, "a");
    assert_eq!(put(&site, &config(2, &[], &[A], Some("198.19.2.100"))).0, 200);
    rule(&site, "client", "input", "ip daddr 198.19.2.100 tcp dport 80 ip dscp 43 counter");
    let answer = site.within("cellb", || Line::open(VIP).unwrap().say("x").unwrap());
    let counted = site.within("client", || crate::site::run("nft list table ip test"));
    assert!(counted.contains("counter packets") && !counted.contains("packets 0"), "not marked as sent on: {counted}");
    assert_eq!(answer, ("elsewhere".to_owned(), "10.1.2.1".parse().unwrap()), "our address stands in for the client's");
    assert_eq!(kept.say("x").unwrap().0, "a", "the established connection stays");
}

/// A CPA that takes demand reports while `status` says 204.
fn cpa(reports: Arc<Mutex<Vec<DemandReport>>>, status: Arc<AtomicU16>) -> impl FnOnce() + Send + 'static {
    move || {
        let listener = TcpListener::bind("127.0.0.1:8440").unwrap();
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let (mut text, mut buffer) = (Vec::new(), [0u8; 4096]);
            let body = loop {
                let Ok(n @ 1..) = stream.read(&mut buffer) else { break None };
                text.extend_from_slice(&buffer[..n]);
                let whole = String::from_utf8_lossy(&text).into_owned();
                if let Some((_, body)) = whole.split_once("\r\n\r\n")
                    && let Ok(report) = serde_json::from_str::<DemandReport>(body)
                {
                    break Some(report);
                }
            };
            let code = status.load(Ordering::SeqCst);
            if code == 204 {
                reports.lock().unwrap().extend(body);
            }
            let _ = write!(stream, "HTTP/1.1 {code} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    }
}

#[test]
fn machine_demand_is_counted_once_and_kept_while_the_cpa_is_away() {
    let mut site = site();
    let (reports, status) = (Arc::new(Mutex::new(vec![])), Arc::new(AtomicU16::new(503)));
    site.leave("edge", cpa(reports.clone(), status.clone()));
    start(&mut site);
    assert_eq!(put(&site, &config(1, &[(A, 1)], &[], None)).0, 200);
    // The first reading is what counting begins from.
    wait(2500);
    assert_eq!(answers(&site, 7), BTreeMap::from([("a".to_owned(), 7)]));
    status.store(204, Ordering::SeqCst);
    let requests = || reports.lock().unwrap().iter().flat_map(|r| r.counts.iter()).map(|c| c.requests).sum::<u64>();
    site.until("seven requests are told", || requests() >= 7);
    wait(2500);
    assert_eq!(requests(), 7);
    // What another edge sends on was counted there.
    rule(&site, "client", "output", "ip daddr 198.19.1.100 ip dscp set 43");
    assert_eq!(answers(&site, 5), BTreeMap::from([("a".to_owned(), 5)]));
    wait(2500);
    assert_eq!(requests(), 7, "a straggler was counted again");
    let reports = reports.lock().unwrap();
    assert!(
        reports.windows(2).all(|w| w[1].sequence == w[0].sequence + 1 && w[0].run == w[1].run),
        "the sequence has a gap"
    );
    let count = reports.iter().flat_map(|r| &r.counts).find(|c| c.requests > 0).unwrap();
    assert_eq!((count.service.as_str(), count.clients.to_string().as_str()), ("maps", "10.1.2.0/24"));
    assert!(reports.iter().flat_map(|r| &r.counts).map(|c| c.bytes.0).sum::<u64>() > 7 * 60);
}

#[test]
fn machine_a_killed_edge_comes_back_as_it_was() {
    let mut site = site();
    let daemon = start(&mut site);
    assert_eq!(put(&site, &config(5, &[(A, 1)], &[], None)).0, 200);
    let mut kept = site.within("client", || Line::open(VIP).unwrap());
    assert_eq!(kept.say("x").unwrap().0, "a");
    site.kill(daemon);
    assert_eq!(kept.say("x").unwrap().0, "a");
    assert_eq!(answers(&site, 5), BTreeMap::from([("a".to_owned(), 5)]), "the data plane goes on without the daemon");
    start(&mut site);
    assert_eq!(kept.say("x").unwrap().0, "a");
    let seen: EdgeSeen = serde_json::from_str(&site.ask("edge", EDGE, "GET", "/v1/seen", "").1).unwrap();
    assert_eq!(seen.config.0, 5);
    let (status, body) = put(&site, &config(4, &[(B, 1)], &[], None));
    assert_eq!(status, 409);
    assert!(body.contains("g4 is older than g5"), "{body}");
    assert_eq!(put(&site, &config(5, &[(A, 1)], &[], None)).0, 200);
    assert_eq!(put(&site, &config(6, &[(A, 99)], &[], None)).0, 422);
    let own = config(6, &[(A, 1)], &[], None).replace("198.19.1.100", "198.19.1.1");
    assert_eq!(put(&site, &own).0, 422, "the gateway's own address was made a public one");
    assert_eq!(answers(&site, 5), BTreeMap::from([("a".to_owned(), 5)]));
    let none = serde_json::json!({"generation": 7, "network": "lyon", "services": {}}).to_string();
    assert_eq!(put(&site, &none).0, 200);
    let held = crate::site::run(&format!("ip -n {} -4 addr show dev lo", site.name("edge")));
    assert!(!held.contains("198.19.1.100"), "{held}");
    assert_eq!(kept.say("x").unwrap().0, "a", "what was established may finish");
    let refused =
        site.within("edge", || crate::site::http(EDGE.parse().unwrap(), "GET", "/v1/seen", "", "wrong")).unwrap();
    assert_eq!(refused.0, 401);
}

#[test]
fn machine_a_filter_that_someone_removed_comes_back() {
    let mut site = site();
    start(&mut site);
    assert_eq!(put(&site, &config(1, &[(A, 1)], &[], None)).0, 200);
    assert_eq!(answers(&site, 1), BTreeMap::from([("a".to_owned(), 1)]));
    site.within("edge", || crate::site::run("nft delete table ip vmatrix_edge"));
    site.until("connections are balanced again", || answers(&site, 1).contains_key("a"));
    assert!(!site.within("client", || Line::open("100.64.0.2:80").is_ok()), "the default deny is back, too");
}
