//! A server's connections go on when it is reached through another network than it was.

use crate::site::{Line, Site, echo_server};

/// A client, the network a singleton left and the one it is in, a cell in either. The guest's address is the new
/// cell's; the old cell sends what comes for it through the relay, and the new one answers that through it again.
fn site() -> Site {
    let site = Site::new(&["client", "old", "new", "left", "right"]);
    site.join(("client", "c0", "198.19.5.2/24"), ("old", "c0", "198.19.5.1/24"));
    site.join(("old", "wan0", "198.19.1.1/24"), ("new", "wan0", "198.19.1.2/24"));
    site.join(("old", "cell0", "100.64.0.1/30"), ("left", "up0", "100.64.0.2/30"));
    site.ip("client", "route add default via 198.19.5.1");
    for (namespace, route) in [("old", "192.168.1.10/32 via 100.64.0.2"), ("left", "default via 100.64.0.1")] {
        site.ip(namespace, &format!("route add {route}"));
    }
    for namespace in ["old", "left", "right"] {
        site.within(namespace, || {
            for key in ["ip_forward", "conf/all/rp_filter", "conf/default/rp_filter"] {
                std::fs::write(format!("/proc/sys/net/ipv4/{key}"), if key == "ip_forward" { "1" } else { "0" })
                    .unwrap();
            }
        });
    }
    site.ip("right", "addr add 192.168.1.10/32 dev lo");
    site
}

struct End {
    file: String,
    public: String,
}

fn keys(site: &Site, end: &str) -> End {
    let (secret, public) = vmatrix_edge_agent::relay::key().unwrap();
    site.write(&format!("{end}.key"), &secret);
    End { file: format!("{end}.toml"), public }
}

fn start(site: &mut Site, network: &str, cell: &str, own: (&End, &str, &str), peer: (&End, &str)) -> usize {
    let folder = site.folder.path().display().to_string();
    let text = format!(
        "netns = \"/run/netns/{}\"\ndevice = \"rly0\"\naddress = \"{}\"\nlisten = \"{}:51830\"\npeer = \"{}:51830\"\n\
         key_file = \"{folder}/{cell}.key\"\npeer_key = \"{}\"\nstatus = \"{folder}/{cell}.json\"\n",
        site.name(cell),
        own.1,
        own.2,
        peer.1,
        peer.0.public
    );
    let path = site.write(&own.0.file, &text);
    site.start(network, &format!("relay {path}"))
}

fn ready(site: &Site, cell: &str) -> bool {
    let path = site.folder.path().join(format!("{cell}.json"));
    std::fs::read_to_string(path).is_ok_and(|s| s.contains("\"ready\":true"))
}

#[test]
fn machine_a_server_is_reached_through_the_network_it_left_and_a_killed_end_comes_back() {
    let mut site = site();
    site.leave("right", echo_server("192.168.1.10:80", "guest"));
    let (left, right) = (keys(&site, "left"), keys(&site, "right"));
    start(&mut site, "old", "left", (&left, "169.254.77.1/30", "198.19.1.1"), (&right, "198.19.1.2"));
    let end = start(&mut site, "new", "right", (&right, "169.254.77.2/30", "198.19.1.2"), (&left, "198.19.1.1"));
    site.until("both ends are ready", || ready(&site, "left") && ready(&site, "right"));
    site.ip("left", "route add 192.168.1.10/32 dev rly0");
    site.ip("right", "route add default dev rly0");

    let mut line = site.within("client", || Line::open("192.168.1.10:80").unwrap());
    let long = "x".repeat(200_000);
    assert_eq!(line.say(&long).unwrap().0, "guest", "full packets do not pass");
    assert_eq!(line.say("x").unwrap().1.to_string(), "198.19.5.2", "the guest sees another client");

    site.kill(end);
    // What the killed end had said is not so any more.
    std::fs::remove_file(site.folder.path().join("right.json")).unwrap();
    start(&mut site, "new", "right", (&right, "169.254.77.2/30", "198.19.1.2"), (&left, "198.19.1.1"));
    site.until("the new end is ready", || ready(&site, "right"));
    site.ip("right", "route replace default dev rly0");
    assert_eq!(line.say("again").unwrap().0, "guest", "the connection did not outlive the relay");
}

#[test]
fn machine_a_stranger_with_another_key_passes_nothing() {
    let mut site = site();
    site.leave("right", echo_server("192.168.1.10:80", "guest"));
    let (left, right, other) = (keys(&site, "left"), keys(&site, "right"), keys(&site, "other"));
    start(&mut site, "old", "left", (&left, "169.254.77.1/30", "198.19.1.1"), (&right, "198.19.1.2"));
    // The right end believes that the left one has another key.
    start(&mut site, "new", "right", (&right, "169.254.77.2/30", "198.19.1.2"), (&other, "198.19.1.1"));
    site.until("the left end runs", || site.folder.path().join("left.json").exists());
    // Three handshakes' worth.
    crate::site::wait(3000);
    assert!(!ready(&site, "left") && !ready(&site, "right"));
}
