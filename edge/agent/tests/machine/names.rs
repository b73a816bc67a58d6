//! DNS over real sockets, asked with dig.

use crate::site::Site;
use std::process::Command;

const STEERING: &str = r#"{"generation": 3, "zone": "vmatrix.test", "ttl_s": 5, "services": {
    "maps": {"by_clients": {"10.0.0.0/8": ["203.0.113.1"], "10.128.0.0/16": ["203.0.113.2"]}, "otherwise": ["203.0.113.3"]},
    "asleep": {"by_clients": {}, "otherwise": []}}}"#;

fn site() -> Site {
    let mut site = Site::new(&["edge"]);
    site.ip("edge", "addr add 198.19.1.1/24 dev lo");
    let path = site.write("edge.toml", "network = \"lyon\"\nlisten = \"198.19.1.1:8442\"\ndns_listen = \"198.19.1.1:53\"\nstate_dir = \"state\"\ntoken_file = \"token\"\ncpa = \"http://198.19.1.1:8440\"\nzone = \"vmatrix.test\"\nuplink = \"wan0\"\n");
    site.start("edge", &format!("edge {path}"));
    site.until("the edge listens", || site.ask("edge", "198.19.1.1:8442", "GET", "/readyz", "").0 == 200);
    site
}

fn steer(site: &Site) {
    let (status, body) = site.ask("edge", "198.19.1.1:8442", "PUT", "/v1/steering", STEERING);
    assert_eq!(status, 200, "{body}");
}

fn dig(site: &Site, args: &str) -> String {
    let out = Command::new("ip")
        .args(["netns", "exec", &site.name("edge"), "dig", "@198.19.1.1", "+tries=1", "+time=5", "+nocookie", "+norec"])
        .args(args.split(' '))
        .output()
        .expect("dig is needed: install bind9-dnsutils");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Status, first answer if any, client subnet as it came back.
fn answer(site: &Site, args: &str) -> (String, String, String) {
    let text = dig(site, args);
    let after = |mark: &str| {
        text.split_once(mark)
            .map(|(_, rest)| rest.chars().take_while(|c| !",\n".contains(*c)).collect::<String>())
            .unwrap_or_default()
    };
    let row = text.split_once("ANSWER SECTION:\n").and_then(|(_, r)| r.lines().next()).unwrap_or_default();
    (after("status: "), row.split_ascii_whitespace().last().unwrap_or_default().to_owned(), after("CLIENT-SUBNET: "))
}

fn of(status: &str, address: &str, subnet: &str) -> (String, String, String) {
    (status.into(), address.into(), subnet.into())
}

#[test]
fn machine_the_subnet_decides_and_comes_back_with_a_safe_scope() {
    let site = site();
    assert_eq!(answer(&site, "maps.vmatrix.test"), of("SERVFAIL", "", ""), "before any steering nothing is denied");
    steer(&site);
    for transport in ["+notcp", "+tcp"] {
        let ask = |subnet: &str| answer(&site, &format!("maps.vmatrix.test +subnet={subnet} {transport}"));
        assert_eq!(ask("10.1.2.0/24"), of("NOERROR", "203.0.113.1", "10.1.2.0/24/9"));
        assert_eq!(ask("10.128.2.0/24"), of("NOERROR", "203.0.113.2", "10.128.2.0/24/16"));
        assert_eq!(ask("192.0.2.0/24"), of("NOERROR", "203.0.113.3", "192.0.2.0/24/1"));
        assert_eq!(ask("0.0.0.0/0"), of("NOERROR", "203.0.113.3", "0.0.0.0/0/0"));
        assert_eq!(ask("2001:db8::/32"), of("NOERROR", "203.0.113.3", "2001:db8::/32/1"));
    }
    assert_eq!(answer(&site, "maps.vmatrix.test"), of("NOERROR", "203.0.113.3", ""));
    assert_eq!(answer(&site, "MaPs.vMaTrIx.TeSt"), of("NOERROR", "203.0.113.3", ""));
}

#[test]
fn machine_negative_answers_carry_the_soa_and_the_zone_is_whole() {
    let site = site();
    steer(&site);
    for (asked, status) in [
        ("nothing.vmatrix.test", "NXDOMAIN"),
        ("asleep.vmatrix.test", "NOERROR"),
        ("maps.vmatrix.test AAAA", "NOERROR"),
    ] {
        let text = dig(&site, asked);
        assert!(
            text.contains(&format!("status: {status}"))
                && text.contains("AUTHORITY: 1,")
                && text.contains("IN\tSOA\ta.ns.vmatrix.test."),
            "{text}"
        );
        assert!(text.contains("flags: qr aa"), "{text}");
    }
    assert_eq!(answer(&site, "other.test").0, "REFUSED");
    assert_eq!(answer(&site, "vmatrix.test NS"), of("NOERROR", "a.ns.vmatrix.test.", ""));
    assert_eq!(answer(&site, "a.ns.vmatrix.test"), of("NOERROR", "198.19.1.1", ""));
    assert!(dig(&site, "vmatrix.test SOA").contains("hostmaster.vmatrix.test. 3 3600"));
    assert!(dig(&site, "maps.vmatrix.test +bufsize=4096").contains("udp: 1232"));
    assert_eq!(answer(&site, "maps.vmatrix.test +edns=1 +noednsnegotiation").0, "BADVERS");
    assert_eq!(answer(&site, "maps.vmatrix.test +opcode=notify").0, "NOTIMP");
}

#[test]
fn machine_a_malformed_subnet_is_a_format_error() {
    let site = site();
    steer(&site);
    // Family, source, scope, address: scope set, bits past the source, short, long, unknown family, /33.
    for bytes in
        ["000118180a0102", "000114000a0111", "000118000a01", "000118000a010200", "000318000a0102", "000121000a01020300"]
    {
        assert_eq!(answer(&site, &format!("maps.vmatrix.test +ednsopt=8:{bytes}")).0, "FORMERR", "{bytes}");
    }
    assert_eq!(answer(&site, "maps.vmatrix.test +ednsopt=8:000118000a0102").0, "NOERROR", "the same, well formed");
}

#[test]
fn machine_answers_survive_a_killed_edge_and_an_older_steering_is_refused() {
    let mut site = site();
    steer(&site);
    site.kill(0);
    let path = site.folder.path().join("edge.toml").display().to_string();
    site.start("edge", &format!("edge {path}"));
    site.until("answers are back", || answer(&site, "maps.vmatrix.test").1 == "203.0.113.3");
    let put = |body: &str| site.ask("edge", "198.19.1.1:8442", "PUT", "/v1/steering", body);
    let (status, body) = put(&STEERING.replace("\"generation\": 3", "\"generation\": 2"));
    assert!(status == 409 && body.contains("steering g2 is older than g3"), "{status} {body}");
    assert_eq!(put(STEERING).0, 200, "the same again does nothing");
    assert_eq!(put(&STEERING.replace("203.0.113.3", "203.0.113.4")).0, 409, "another under the same number");
    assert_eq!(
        put(&STEERING.replace("vmatrix.test", "other.test").replace("\"generation\": 3", "\"generation\": 9")).0,
        422
    );
    let (status, body) = put("{\"generation\": 9}");
    assert!(status == 422 && body.contains("\"problem\""), "{status} {body}");
    let begin = std::time::Instant::now();
    assert_eq!(
        put(&STEERING.replace("\"generation\": 3", "\"generation\": 4").replace("203.0.113.3", "203.0.113.4")).0,
        200
    );
    assert_eq!(answer(&site, "maps.vmatrix.test").1, "203.0.113.4", "visible once it is acknowledged");
    eprintln!("a change was visible {} ms after it was sent", begin.elapsed().as_millis());
}
