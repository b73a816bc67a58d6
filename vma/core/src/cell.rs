//! A cell's addresses and rules: what it is built for ─▶ the text `nft -f -` takes.
//!
//! ```text
//!  network's namespace │ cell                                             │ guest
//!   .1 ──── veth ──────┼─ up0 .2 ─DNAT▶ br0 192.168.1.1 ── tap0 ──────────┼─ 192.168.1.10
//!                      │                 └──SNAT▶ vpn0 ══▶ origin's intranet
//!                      │ a singleton's: ri1, ri2, … ◀══ cells it left; ro0 ══▶ the cell it went to
//! ```
//! A singleton's former cells lead to the one it is in as the branches of a tree do, so each connection has one way
//! there, and goes back the same: a cell marks a connection with the relay that its last packet came in by. Where only
//! the guest has spoken since it came, a cell does not know: what it was marked with before may end elsewhere now. Then
//! the packet leaves through all relays, as through a bridge that has not learnt yet; but one of these copies comes to
//! where the client is known, the others are dropped on their way, and what the client says next is the mark.
//!
//! # Invariants
//! 1. Only declared ports come in, and only while they are open: after the guest was reseeded.
//! 2. The guest reaches declared back ends through the tunnel device and nothing else: with the
//!    tunnel down its packets are dropped, never sent plainly.
//! 3. The guest sends with its own MAC and address only.
//! 4. The cell itself answers nobody.
//! 5. Through a relay goes what is of the guest's declared ports, and nothing else.

use crate::steps::BackendAddress;
use ipnet::Ipv4Net;
use std::fmt::Write;
use std::net::Ipv4Addr;

/// The cell's end of the pair of interfaces.
pub const UPLINK: &str = "up0";
/// The bridge the guest's tap is on.
pub const BRIDGE: &str = "br0";
/// The guest's tap.
pub const TAP: &str = "tap0";
/// The tunnel's device.
pub const TUNNEL: &str = "vpn0";

/// What relays that bring packets are called, with their number behind: `ri1`.
pub const RELAY_IN: &str = "ri";
/// The relay that takes packets to the cell where the guest is now.
pub const RELAY_OUT: &str = "ro0";
/// Most relays that bring packets to a cell, one per machine that the guest was on: its number is half a byte.
pub const RELAYS_MAX: u8 = 15;
/// The route of packets that go back through relay `n` is table `100 + n`.
const RELAY_TABLE: u32 = 100;

/// Addresses of the ends of relay `n` that brings packets, this cell's and beyond: nobody is asked for them.
pub fn relay_in_ends(n: u8) -> (Ipv4Addr, Ipv4Addr) {
    let first = n.wrapping_mul(4);
    (Ipv4Addr::new(169, 254, 77, first | 1), Ipv4Addr::new(169, 254, 77, first | 2))
}

/// Both ends of the link between a network and a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// In the network's namespace.
    pub outer: Ipv4Addr,
    /// In the cell.
    pub cell: Ipv4Addr,
}

/// The `index`th /30 of `cells`, if there is one.
pub fn link(cells: Ipv4Net, index: u32) -> Option<Link> {
    let first = index.checked_mul(4)?;
    let size = 1u64 << (32 - u32::from(cells.prefix_len()));
    if u64::from(first) + 4 > size {
        return None;
    }
    let base = cells.network().to_bits().checked_add(first)?;
    Some(Link { outer: Ipv4Addr::from_bits(base + 1), cell: Ipv4Addr::from_bits(base + 2) })
}

/// What the rules of a cell depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules<'a> {
    /// The cell's address within the network.
    pub cell: Ipv4Addr,
    pub guest: Ipv4Addr,
    pub mac: &'a str,
    /// TCP ports that may be opened.
    pub ports: &'a [u16],
    pub backends: &'a [BackendAddress],
}

/// Kernel settings of a cell, as files under `/proc/sys` and what to write.
///
/// `bridge-nf-call-iptables` is on in a fresh namespace, and the forward policy would then drop frames
/// within the bridge. With `tcp_loose` the cell would pass on flows that only the resumed guest
/// remembers; without it they are invalid, and reset at once, so the guest reconnects.
pub const SETTINGS: &[(&str, &str)] = &[
    ("net/bridge/bridge-nf-call-iptables", "0"),
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/netfilter/nf_conntrack_tcp_loose", "0"),
];

/// As [`SETTINGS`], after those, for the cell of a singleton: a connection is taken up in its middle, and whichever
/// way its packets come.
pub const SINGLETON_SETTINGS: &[(&str, &str)] = &[
    ("net/netfilter/nf_conntrack_tcp_loose", "1"),
    ("net/netfilter/nf_conntrack_tcp_be_liberal", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

/// What the relays of a singleton's cell are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relays<'a> {
    pub guest: Ipv4Addr,
    /// TCP ports of the guest.
    pub ports: &'a [u16],
    /// Numbers of those that bring packets, 1 to [`RELAYS_MAX`] each.
    pub ins: &'a [u8],
    /// The one of `ins` that comes from the cell that [`RELAY_OUT`] leads to: nothing is sent back there.
    pub opposite: Option<u8>,
    /// How often the guest came to this cell: what was marked before is not known to come the same way again.
    pub comings: u32,
    /// Whether there is [`RELAY_OUT`]; whether packets for the guest go there is the routes' affair.
    pub out: bool,
}

/// The rules for a cell's relays, replacing those it had; [`rules`] has been given to it before.
pub fn relay_rules(r: &Relays) -> String {
    let guest = r.guest;
    let ports: Vec<String> = r.ports.iter().map(u16::to_string).collect();
    let ports = ports.join(", ");
    let coming = (r.comings & 0xff_ffff) << 8;
    let (mut pass, mut came, mut all) = (String::new(), String::new(), String::new());
    if r.out {
        let _ = writeln!(
            pass,
            r#"add rule ip vmatrix relayed iifname "{UPLINK}" oifname "{RELAY_OUT}" ip daddr {guest} ct status dnat accept
add rule ip vmatrix relayed iifname "{RELAY_IN}*" oifname "{RELAY_OUT}" ip daddr {guest} tcp dport {{ {ports} }} accept
add rule ip vmatrix relayed iifname "{RELAY_OUT}" oifname "{RELAY_IN}*" ip saddr {guest} tcp sport {{ {ports} }} accept"#
        );
    }
    if !r.ins.is_empty() {
        let _ = writeln!(
            pass,
            r#"add rule ip vmatrix relayed iifname "{RELAY_IN}*" oifname "{BRIDGE}" ip daddr {guest} tcp dport {{ {ports} }} accept
add rule ip vmatrix relayed iifname "{BRIDGE}" oifname "{RELAY_IN}*" ip saddr {guest} tcp sport {{ {ports} }} accept"#
        );
    }
    for n in r.ins {
        let _ = writeln!(came, r#"    iifname "{RELAY_IN}{n}" ct mark set {}"#, coming | u32::from(*n));
        let only = if r.opposite == Some(*n) { format!(r#"iifname "{BRIDGE}" "#) } else { String::new() };
        let _ = writeln!(all, "    {only}dup to {}", relay_in_ends(*n).1);
    }
    let back = if r.ins.is_empty() {
        String::new()
    } else {
        format!(
            r#"    ct state {{ new, invalid }} goto every_way
    ct mark 0 accept
    ct mark & 0xffffff00 != {coming} goto every_way
    meta mark set ct mark & 0xff
"#
        )
    };
    format!(
        r#"flush chain ip vmatrix relayed
{pass}table ip vmatrix_relays {{}}
delete table ip vmatrix_relays
table ip vmatrix_relays {{
  chain every_way {{
{all}    drop
  }}
  chain back {{
{back}  }}
  chain way {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "{UPLINK}" ct mark set 0
{came}    iifname {{ "{BRIDGE}", "{RELAY_OUT}" }} ip saddr {guest} tcp sport {{ {ports} }} goto back
  }}
}}
"#
    )
}

/// What `ip` is told so that packets with the mark of relay `n` go back through it or, while its device is not there,
/// nowhere.
pub fn relay_routes(n: u8) -> [String; 2] {
    let table = RELAY_TABLE + u32::from(n);
    [
        format!("route replace blackhole default table {table} metric 2"),
        format!("route replace default dev {RELAY_IN}{n} table {table} metric 1"),
    ]
}

/// The rule that has packets with the mark of relay `n` take the routes of [`relay_routes`]: `ip` is told to add it
/// once, for it would have it twice.
pub fn relay_route_rule(n: u8) -> String {
    format!("fwmark {n} lookup {}", RELAY_TABLE + u32::from(n))
}

/// The whole rule set, replacing whatever the cell had; every port begins closed.
pub fn rules(r: &Rules) -> String {
    let Rules { cell, guest, mac, .. } = r;
    let mut backends = String::new();
    for b in r.backends {
        let _ = writeln!(
            backends,
            r#"    iifname "{BRIDGE}" oifname "{TUNNEL}" ip saddr {guest} ip daddr {} tcp dport {} ct state new accept"#,
            b.address, b.port
        );
    }
    format!(
        r#"table ip vmatrix {{}}
delete table ip vmatrix
table ip vmatrix {{
  set open {{ type inet_service; }}
  chain pre {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "{UPLINK}" ip daddr {cell} tcp dport @open dnat to {guest}
  }}
  chain post {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{TUNNEL}" masquerade
  }}
  chain relayed {{
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    jump relayed
    iifname "{UPLINK}" oifname "{BRIDGE}" ct status dnat ct state new accept
{backends}    iifname "{BRIDGE}" ip saddr {guest} meta l4proto tcp reject with tcp reset
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
  }}
}}
table bridge vmatrix {{}}
delete table bridge vmatrix
table bridge vmatrix {{
  chain guest {{
    type filter hook prerouting priority -300; policy accept;
    iifname != "{TAP}" accept
    ether saddr != {mac} drop
    ether type arp arp saddr ip {guest} accept
    ether type ip ip saddr {guest} accept
    drop
  }}
}}
"#
    )
}

/// Lets new connections in on the declared ports.
pub fn open(ports: &[u16]) -> String {
    if ports.is_empty() {
        return close();
    }
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    format!("flush set ip vmatrix open\nadd element ip vmatrix open {{ {} }}\n", ports.join(", "))
}

/// Lets no new connection in.
pub fn close() -> String {
    "flush set ip vmatrix open\n".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_has_a_slash_30_and_a_slash_24_has_64() {
        let cells = "100.64.0.0/24".parse().unwrap();
        assert_eq!(link(cells, 0).unwrap().cell.to_string(), "100.64.0.2");
        assert_eq!(link(cells, 63).unwrap().outer.to_string(), "100.64.0.253");
        assert_eq!(link(cells, 64), None);
        assert_eq!(link(cells, u32::MAX), None);
    }

    #[test]
    fn a_guest_without_back_ends_may_begin_nothing() {
        let text = rules(&Rules {
            cell: [100, 64, 0, 2].into(),
            guest: [192, 168, 1, 10].into(),
            mac: "52:54:00:76:6d:01",
            ports: &[80],
            backends: &[],
        });
        assert!(!text.lines().any(|l| l.contains("iifname \"br0\"") && l.contains("accept")), "{text}");
        assert!(text.contains("policy drop"));
    }

    #[test]
    fn through_a_relay_goes_what_is_of_the_guests_ports_and_back_the_way_it_came() {
        let relays = Relays {
            guest: [192, 168, 1, 10].into(),
            ports: &[80, 7000],
            ins: &[1, 3],
            opposite: None,
            comings: 2,
            out: false,
        };
        let here = relay_rules(&relays);
        let accepts: Vec<&str> = here.lines().filter(|l| l.starts_with("add rule")).collect();
        assert_eq!(accepts.len(), 2);
        assert!(accepts.iter().all(|l| l.contains("192.168.1.10") && l.contains("port { 80, 7000 }")), "{here}");
        assert!(here.contains("iifname \"ri1\" ct mark set 513") && here.contains("iifname \"ri3\" ct mark set 515"));
        assert!(here.contains("\n    dup to 169.254.77.6\n    dup to 169.254.77.14\n    drop\n"), "{here}");
        assert!(here.contains("ct mark & 0xffffff00 != 512 goto every_way"), "{here}");
        let between = relay_rules(&Relays { out: true, opposite: Some(3), ..relays.clone() });
        assert!(between.contains("\n    dup to 169.254.77.6\n    iifname \"br0\" dup to 169.254.77.14\n"), "{between}");
        let away = relay_rules(&Relays { out: true, ins: &[], ..relays });
        assert!(!away.contains("br0\" ip") && away.contains("ro0") && !away.contains("meta mark set"), "{away}");
    }

    #[test]
    fn a_back_end_is_reached_through_the_tunnel_only() {
        let backends = [BackendAddress { address: [172, 21, 162, 20].into(), port: 5432 }];
        let text = rules(&Rules {
            cell: [100, 64, 0, 2].into(),
            guest: [192, 168, 1, 10].into(),
            mac: "52:54:00:76:6d:01",
            ports: &[443],
            backends: &backends,
        });
        let lines: Vec<&str> = text.lines().filter(|l| l.contains("5432")).collect();
        assert_eq!(lines.len(), 1);
        assert!(lines[0].contains("oifname \"vpn0\"") && lines[0].contains("172.21.162.20"));
    }
}
