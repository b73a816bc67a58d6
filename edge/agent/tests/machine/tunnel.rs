//! Two networks' worth of namespaces, an origin, real TUN devices and a capture of the link between.

use crate::site::{Line, Site, TOKEN, echo_server, http};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CANARY: &str = "canary-3f9a1c-only-inside-the-tunnel";
const BACKEND: &str = "172.21.162.20:5432";

/// An origin with a back end, a hosting network, and a cell in it that can only leave by its tunnel.
fn site() -> Site {
    let site = Site::new(&["origin", "network", "cell"]);
    site.join(("network", "wan0", "198.19.1.1/24"), ("origin", "wan0", "198.19.0.1/24"));
    site.ip("network", "route add 198.19.0.0/24 dev wan0");
    site.ip("origin", "route add 198.19.1.0/24 dev wan0");
    site.ip("origin", "addr add 172.21.162.20/32 dev lo");
    site.ip("network", "route add 172.21.162.0/24 via 198.19.0.1 dev wan0 onlink");
    site.leave("origin", echo_server(BACKEND, "database"));
    site.leave("origin", echo_server("172.21.162.20:22", "secret"));
    site.leave("origin", echo_server("198.19.0.1:8080", "plain"));
    site.write("origin.toml", "listen = \"198.19.0.1:8445\"\nstate_dir = \"state\"\ntoken_file = \"token\"\nstore = \"store\"\ntunnel_listen = \"198.19.0.1:51820\"\nintranet = \"172.21.162.0/24\"\nbackends = [\"172.21.162.20:5432\"]\n");
    site
}

fn start_origin(site: &mut Site) -> usize {
    let path = site.folder.path().join("origin.toml").display().to_string();
    let daemon = site.start("origin", &format!("origin {path}"));
    site.until("the origin listens", || site.ask("network", "198.19.0.1:8445", "GET", "/readyz", "").0 == 200);
    daemon
}

fn start_tunnel(site: &mut Site) -> usize {
    let what = format!("tunnel /run/netns/{} agenda-0 {}", site.name("cell"), site.folder.path().display());
    site.start("network", &what)
}

fn ready(site: &Site) -> bool {
    std::fs::read_to_string(site.folder.path().join("agenda-0.json")).is_ok_and(|s| s.contains("\"ready\":true"))
}

fn say(site: &Site, to: &str) -> std::io::Result<(String, std::net::Ipv4Addr)> {
    site.within("cell", || Line::open(to)?.say(CANARY))
}

struct Capture(Child, std::path::PathBuf);

impl Capture {
    fn begin(site: &Site, namespace: &str, device: &str) -> Capture {
        let path = site.folder.path().join(format!("{namespace}-{device}.pcap"));
        let child = Command::new("ip")
            .args(["netns", "exec", &site.name(namespace), "tcpdump", "-i", device, "-U", "-s", "0", "-w"])
            .arg(&path)
            .stderr(Stdio::null())
            .spawn()
            .expect("tcpdump is needed: install it");
        let capture = Capture(child, path);
        site.until("the capture runs", || capture.size() > 0);
        capture
    }
    fn size(&self) -> usize {
        std::fs::metadata(&self.1).map_or(0, |m| m.len() as usize)
    }
    fn holds(&self, bytes: &[u8]) -> bool {
        std::fs::read(&self.1).unwrap().windows(bytes.len()).any(|w| w == bytes)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn machine_a_cell_reaches_the_back_end_and_the_wan_sees_none_of_it() {
    let mut site = site();
    start_origin(&mut site);
    let capture = Capture::begin(&site, "network", "wan0");
    let begin = Instant::now();
    let tunnel = start_tunnel(&mut site);
    site.until("the tunnel is ready", || ready(&site));
    eprintln!("ready {} ms after the process began", begin.elapsed().as_millis());

    let (name, from) = say(&site, BACKEND).unwrap();
    assert_eq!(name, "database");
    assert!(from.octets()[..3] == [172, 21, 162] && from.octets()[3] >= 128, "the back end saw {from}");
    site.within("cell", || {
        let mut line = Line::open(BACKEND).unwrap();
        let long = "x".repeat(60_000);
        for _ in 0..20 {
            assert_eq!(line.say(&format!("{CANARY}{long}")).unwrap().0, "database");
        }
    });
    site.until("the tunnelled bytes are captured", || capture.size() > 1_200_000);
    assert!(!capture.holds(CANARY.as_bytes()), "the canary was seen in the clear");
    // The same words without a tunnel must be found, or the capture would prove nothing.
    site.within("network", || Line::open("198.19.0.1:8080").unwrap().say(CANARY)).unwrap();
    site.until("the capture finds the canary that went in the clear", || capture.holds(CANARY.as_bytes()));

    assert!(say(&site, "172.21.162.20:22").is_err(), "a port that is not listed answered");
    assert!(say(&site, "172.21.162.127:8445").is_err(), "the gateway itself answered a cell");
    assert!(site.within("network", || Line::open(BACKEND).is_err()), "the back end answered beside the tunnel");

    assert!(site.terminate(tunnel), "the tunnel ended badly");
    assert!(!site.folder.path().join("agenda-0.json").exists());
    assert!(site.within("cell", || Line::open(BACKEND).is_err()), "without a tunnel nothing passes");
}

#[test]
fn machine_a_cell_that_takes_another_address_is_not_heard() {
    let mut site = site();
    start_origin(&mut site);
    start_tunnel(&mut site);
    site.until("the tunnel is ready", || ready(&site));
    let own = say(&site, BACKEND).unwrap().1;
    let capture = Capture::begin(&site, "origin", "vpn0");
    site.ip("cell", "addr add 172.21.162.250/32 dev vpn0");
    let send = |from: std::net::Ipv4Addr| {
        site.within("cell", || {
            std::net::UdpSocket::bind((from, 0)).unwrap().send_to(b"hello", "172.21.162.20:9").unwrap()
        });
    };
    send("172.21.162.250".parse().unwrap());
    // Sent later and seen: then the one before was there to be seen, too.
    send(own);
    let pair = |from: [u8; 4]| [from, [172, 21, 162, 20]].concat();
    site.until("the own address is seen", || capture.holds(&pair(own.octets())));
    assert!(!capture.holds(&pair([172, 21, 162, 250])), "the taken address came out of the tunnel");
}

#[test]
fn machine_a_killed_origin_comes_back_and_the_tunnel_goes_on() {
    let mut site = site();
    let origin = start_origin(&mut site);
    start_tunnel(&mut site);
    site.until("the tunnel is ready", || ready(&site));
    let before = say(&site, BACKEND).unwrap().1;
    let mut line = site.within("cell", || Line::open(BACKEND).unwrap());
    line.say("x").unwrap();
    site.kill(origin);
    start_origin(&mut site);
    let begin = Instant::now();
    site.until("the tunnel heals", || say(&site, BACKEND).is_ok());
    eprintln!("healed {} ms after the origin was back", begin.elapsed().as_millis());
    assert!(begin.elapsed() < Duration::from_secs(8));
    assert_eq!(say(&site, BACKEND).unwrap().1, before, "the cell kept its address");
    assert_eq!(line.say("x").unwrap().0, "database", "the connection outlived the gateway");
}

#[test]
fn machine_the_origin_serves_manifests_and_no_byte_of_a_guest() {
    let mut site = site();
    let digest = vmatrix_model::Digest::of(b"chunk").to_string();
    let folder = site.folder.path().join("store/chunks").join(&digest[..2]);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::create_dir_all(site.folder.path().join("store/images")).unwrap();
    std::fs::write(folder.join(&digest), "chunk".repeat(40_000)).unwrap();
    std::fs::write(site.folder.path().join("store/images/maps.json"), "{}").unwrap();
    start_origin(&mut site);
    let get = |path: &str| site.ask("network", "198.19.0.1:8445", "GET", path, "");
    assert_eq!(get("/v1/images/maps"), (200, "{}".into()));
    assert_eq!(get(&format!("/v1/chunks/{digest}")).0, 404);
    assert_eq!(get("/v1/images/none").0, 404);
    for path in ["/v1/images/..%2f..%2ftoken", "/v1/images/..", "/v1/images/%2e%2e%2ftoken"] {
        let (status, body) = get(path);
        assert!((400..500).contains(&status) && !body.contains(TOKEN), "{path}: {status} {body}");
    }
    let open = site
        .within("network", || http("198.19.0.1:8445".parse().unwrap(), "GET", "/v1/images/maps", "", "no"))
        .unwrap();
    assert_eq!(open.0, 401);
    let bad = r#"{"network": "lyon", "cell": "agenda-0", "public_key": "short"}"#;
    assert_eq!(site.ask("network", "198.19.0.1:8445", "PUT", "/v1/peers", bad).0, 422);
}
