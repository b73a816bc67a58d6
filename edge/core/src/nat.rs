//! The packet filter of an edge as a value, and the one transaction that makes it so.
//!
//! ```text
//! EdgeConfig ─▶ wanted ─▶ Table ─┐
//!              what is installed ┴▶ plan ─▶ Change ─▶ one nft transaction
//! ```
//!
//! A new connection to a declared port of a public address gets a random slot of 16; the slot says
//! which cell answers. Connections that exist are the kernel's: no change here touches them, so a cell
//! out of rotation finishes what it began, and a restarted edge finds everything as it left it.
//!
//! # Invariants
//! 1. `apply(installed, plan(installed, wanted)) = wanted`, and planned again it is empty.
//! 2. What did not change is not in the transaction: the table is never emptied on the way.
//! 3. Everything is dropped that no line allows.
//!
//! A straggler that another edge sends on comes with that edge's address and would be demand twice, the
//! second time of the wrong clients. So what is sent on carries [`STRAGGLER`], and what carries it is not
//! counted. Where a network on the way clears that field it is counted twice; a client that sets it
//! itself only hides its own demand.

use ipnet::Ipv4Net;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;
use vmatrix_model::ServiceId;
use vmatrix_model::edge_config::{EdgeConfig, Slot};
use vmatrix_model::wire::{Problem, RELAY_PORTS};

/// Name of the table; it is the edge's alone.
pub const TABLE: &str = "vmatrix_edge";

/// Slots of each port. 16 gives weights in steps of 6 % and keeps 150 services of two ports under 5000 elements.
pub const SLOTS: u32 = 16;

/// Most ports of one service: more would be a range, and ranges are not offered.
const PORTS_MAX: usize = 64;

/// Ports of the network's gateway address that answer on the uplink beside DNS: VM agent and edge. Only to
/// those that [`Rules::control`] names.
pub const CONTROL_PORTS: [u16; 2] = [8441, 8442];

/// Connections to DNS (TCP) at once, counted over all clients, and as many to the control ports: well
/// under the descriptors a daemon may have.
const ASKING_MAX: u32 = 512;

/// The DSCP of what one edge sends on to another: of the code points left to local use (RFC 2474, pool 2).
pub const STRAGGLER: u8 = 0b10_1011;

/// Clients times services whose demand is counted at once; later ones wait until an old entry ages out.
pub const COUNTED_MAX: u32 = 65_536;

/// One thing that a set or map of the table holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    /// New connections to a public address and port that drew this slot go to the same port elsewhere.
    Slot {
        /// The public address.
        vip: Ipv4Addr,
        /// The TCP port, the same on both sides.
        port: u16,
        /// 0 to [`SLOTS`] - 1.
        slot: u32,
        /// A cell, or another network's public address.
        to: Ipv4Addr,
    },
    /// A port that answers: its connections are counted.
    Declared {
        /// The public address.
        vip: Ipv4Addr,
        /// The TCP port.
        port: u16,
    },
    /// A public address, of which only declared ports answer.
    Vip(Ipv4Addr),
    /// A public address in another network; what is sent there takes our source address.
    Elsewhere(Ipv4Addr),
}

/// What stands in the chains; changes with the configuration file only.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// The interface clients come in by.
    pub uplink: String,
    /// Who may connect to the control ports by the uplink: the CPA's address, the network's own. The fleet
    /// token is asked for besides.
    pub control: BTreeSet<Ipv4Net>,
    /// Other networks' machines: they may connect to this network's machines by the uplink, for chunks and singletons
    /// (mutual TLS) and with relays (sealed).
    pub peers: BTreeSet<Ipv4Net>,
    /// Where this network's machines listen for them, TCP.
    pub transfer_ports: BTreeSet<u16>,
}

/// The whole table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// None where the chains are not known, as after a restart: they are then written anew.
    pub rules: Option<Rules>,
    /// What its sets and its map hold; no two slots have one key.
    pub elements: BTreeSet<Element>,
}

/// The way from one table to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The chains, if they are to be written.
    pub rules: Option<Rules>,
    /// What goes, first.
    pub remove: BTreeSet<Element>,
    /// What comes.
    pub add: BTreeSet<Element>,
}

impl Change {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.rules.is_none() && self.remove.is_empty() && self.add.is_empty()
    }
}

/// The table that `config` asks for.
///
/// # Errors
/// Two services with one public address, no or too many ports, port 0, a weight outside 1 to 16, more
/// cells than slots, a cell named twice, a public address forwarded to itself, or an address no host can have.
pub fn wanted(config: &EdgeConfig, rules: Rules) -> Result<Table, Problem> {
    let mut elements = BTreeSet::new();
    let mut owners: BTreeMap<Ipv4Addr, &ServiceId> = BTreeMap::new();
    for (name, service) in &config.services {
        let bad = |problem: String| {
            Err(Problem {
                problem: format!("edge config {}, service {name}: {problem}", config.generation),
                hint: "send a corrected config; the one in force stays".into(),
            })
        };
        let named = service.slots.iter().map(|s| s.cell).chain(service.forward_to).chain([service.vip]);
        if let Some(address) = named.into_iter().find(|a| !is_host(*a)) {
            return bad(format!("{address} is not an address that a host can have"));
        }
        if let Some(other) = owners.insert(service.vip, name) {
            return bad(format!("public address {} belongs to service {other} already", service.vip));
        }
        if service.ports.is_empty() || service.ports.len() > PORTS_MAX || service.ports.contains(&0) {
            return bad(format!("ports must be 1 to {PORTS_MAX} numbers, none of them 0"));
        }
        let cells: BTreeSet<Ipv4Addr> = service.slots.iter().map(|s| s.cell).collect();
        if cells.len() != service.slots.len() {
            return bad("a cell stands in rotation twice".into());
        }
        if service.slots.len() > SLOTS as usize || service.slots.iter().any(|s| !(1..=SLOTS).contains(&s.weight)) {
            return bad(format!("at most {SLOTS} cells share a public address, each with weight 1 to {SLOTS}"));
        }
        if service.forward_to == Some(service.vip) {
            return bad(format!("{} would be forwarded to itself", service.vip));
        }
        let targets = match service.forward_to {
            Some(there) if service.slots.is_empty() => {
                elements.insert(Element::Elsewhere(there));
                vec![there; SLOTS as usize]
            }
            _ => filled(&service.slots),
        };
        elements.insert(Element::Vip(service.vip));
        for port in &service.ports {
            elements.insert(Element::Declared { vip: service.vip, port: *port });
            elements.extend((0..SLOTS).zip(&targets).map(|(slot, to)| Element::Slot {
                vip: service.vip,
                port: *port,
                slot,
                to: *to,
            }));
        }
    }
    Ok(Table { rules: Some(rules), elements })
}

/// Held by the edge, a loopback address would take the daemons' own way to each other.
fn is_host(a: Ipv4Addr) -> bool {
    let [first, ..] = a.octets();
    !(first == 0 || a.is_loopback() || a.is_link_local() || first >= 224)
}

/// Shares the slots among the cells by weight: whole parts first, what is left to the largest
/// remainders, ties to the lower address. Every cell gets one at least.
fn filled(slots: &[Slot]) -> Vec<Ipv4Addr> {
    let total: u32 = slots.iter().map(|s| s.weight).sum();
    let mut cells: Vec<(Ipv4Addr, u32, u32)> = slots
        .iter()
        .map(|s| (s.cell, (s.weight * SLOTS / total.max(1)).max(1), s.weight * SLOTS % total.max(1)))
        .collect();
    cells.sort_by_key(|(cell, _, rest)| (std::cmp::Reverse(*rest), *cell));
    let given: u32 = cells.iter().map(|(_, n, _)| n).sum();
    for (_, n, _) in cells.iter_mut().take(SLOTS.saturating_sub(given) as usize) {
        *n += 1;
    }
    // A light cell's guaranteed slot is taken from whoever has most.
    for _ in SLOTS..given {
        if let Some((_, n, _)) = cells.iter_mut().max_by_key(|(cell, n, _)| (*n, *cell)) {
            *n -= 1;
        }
    }
    cells.sort();
    cells.iter().flat_map(|(cell, n, _)| std::iter::repeat_n(*cell, *n as usize)).collect()
}

/// What has to be done to `installed` for it to be `wanted`.
pub fn plan(installed: &Table, wanted: &Table) -> Change {
    Change {
        rules: wanted.rules.clone().filter(|r| installed.rules.as_ref() != Some(r)),
        remove: installed.elements.difference(&wanted.elements).copied().collect(),
        add: wanted.elements.difference(&installed.elements).copied().collect(),
    }
}

/// The table after `change`.
pub fn apply(installed: &Table, change: &Change) -> Table {
    Table {
        rules: change.rules.clone().or_else(|| installed.rules.clone()),
        elements: installed.elements.difference(&change.remove).chain(&change.add).copied().collect(),
    }
}

/// The change as one nft transaction.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(rules) = &self.rules {
            rules.fmt(f)?;
        }
        // What a key stood for goes before what it will stand for.
        self.remove.iter().try_for_each(|e| writeln!(f, "delete element ip {TABLE} {}", e.key()))?;
        self.add.iter().try_for_each(|e| match e {
            Element::Slot { port, to, .. } => {
                let (set, key) = e.place();
                writeln!(f, "add element ip {TABLE} {set} {{ {key} : {to} . {port} }}")
            }
            _ => writeln!(f, "add element ip {TABLE} {}", e.key()),
        })
    }
}

impl Element {
    fn place(&self) -> (&'static str, String) {
        match self {
            Element::Slot { vip, port, slot, .. } => ("slots", format!("{vip} . tcp . {port} . {slot}")),
            Element::Declared { vip, port } => ("declared", format!("{vip} . {port}")),
            Element::Vip(vip) => ("vips", vip.to_string()),
            Element::Elsewhere(there) => ("elsewhere", there.to_string()),
        }
    }
    fn key(&self) -> String {
        let (set, key) = self.place();
        format!("{set} {{ {key} }}")
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rules { uplink, control, peers, transfer_ports } = self;
        let ports = CONTROL_PORTS.map(|p| p.to_string()).join(", ");
        // Counting stands in the nat chain, which sees the first packet of a connection only: a
        // repeated SYN is no second request.
        write!(
            f,
            "add table ip {TABLE}
add map ip {TABLE} slots {{ type ipv4_addr . inet_proto . inet_service . mark : ipv4_addr . inet_service; }}
add set ip {TABLE} declared {{ type ipv4_addr . inet_service; }}
add set ip {TABLE} vips {{ type ipv4_addr; }}
add set ip {TABLE} elsewhere {{ type ipv4_addr; }}
add set ip {TABLE} requests {{ type ipv4_addr . ipv4_addr; size {COUNTED_MAX}; flags dynamic,timeout; timeout 10m; counter; }}
add set ip {TABLE} replies {{ type ipv4_addr . ipv4_addr; size {COUNTED_MAX}; flags dynamic,timeout; timeout 10m; counter; }}
add chain ip {TABLE} prerouting {{ type nat hook prerouting priority dstnat; policy accept; }}
add chain ip {TABLE} sent_on {{ type filter hook postrouting priority mangle; policy accept; }}
add chain ip {TABLE} postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}
add chain ip {TABLE} forward {{ type filter hook forward priority filter; policy drop; }}
add chain ip {TABLE} input {{ type filter hook input priority filter; policy drop; }}
flush chain ip {TABLE} prerouting
flush chain ip {TABLE} sent_on
flush chain ip {TABLE} postrouting
flush chain ip {TABLE} forward
flush chain ip {TABLE} input
add rule ip {TABLE} prerouting iifname \"{uplink}\" ip dscp {STRAGGLER} ip daddr . tcp dport @declared ct mark set {STRAGGLER}
add rule ip {TABLE} prerouting ct mark != {STRAGGLER} ip daddr . tcp dport @declared update @requests {{ ip saddr & 255.255.255.0 . ip daddr }}
add rule ip {TABLE} prerouting meta mark set numgen random mod {SLOTS} dnat ip to ip daddr . meta l4proto . th dport . meta mark map @slots
add rule ip {TABLE} sent_on oifname \"{uplink}\" ct status dnat ct direction original ip daddr @elsewhere ip dscp set {STRAGGLER}
add rule ip {TABLE} postrouting oifname \"{uplink}\" ct status dnat ip daddr @elsewhere masquerade
add rule ip {TABLE} forward ct mark != {STRAGGLER} ct status dnat ct direction reply update @replies {{ ct original ip saddr & 255.255.255.0 . ct original ip daddr }}
add rule ip {TABLE} forward ct state established,related accept
add rule ip {TABLE} forward ct status dnat accept
add rule ip {TABLE} input iifname \"lo\" accept
add rule ip {TABLE} input ct state established,related accept
add rule ip {TABLE} input ip daddr @vips drop
add rule ip {TABLE} input iifname \"{uplink}\" icmp type echo-request accept
add rule ip {TABLE} input iifname \"{uplink}\" tcp dport 53 ct state new ct count over {ASKING_MAX} drop
add rule ip {TABLE} input iifname \"{uplink}\" meta l4proto {{ tcp, udp }} th dport 53 accept
"
        )?;
        // The bound stands behind the address: strangers cannot use it up.
        let mut let_in = |from: &Ipv4Net, doors: &str| {
            let rule = format!("add rule ip {TABLE} input iifname \"{uplink}\" ip saddr {from} {doors}");
            writeln!(f, "{rule} ct state new ct count over {ASKING_MAX} drop\n{rule} accept")
        };
        for from in control {
            let_in(from, &format!("tcp dport {{ {ports} }}"))?;
        }
        let transfer: Vec<String> = transfer_ports.iter().map(u16::to_string).collect();
        for from in peers {
            let_in(from, &format!("udp dport {}-{}", RELAY_PORTS.start(), RELAY_PORTS.end()))?;
            if !transfer.is_empty() {
                let_in(from, &format!("tcp dport {{ {} }}", transfer.join(", ")))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmatrix_model::Generation;
    use vmatrix_model::edge_config::EdgeService;

    fn cell(n: u8) -> Ipv4Addr {
        Ipv4Addr::new(100, 64, 0, n)
    }

    fn service(vip: u8, slots: &[(u8, u32)], forward: Option<u8>) -> EdgeService {
        EdgeService {
            vip: Ipv4Addr::new(198, 19, 1, vip),
            ports: vec![80],
            slots: slots.iter().map(|(c, weight)| Slot { cell: cell(*c), weight: *weight }).collect(),
            draining: vec![],
            forward_to: forward.map(|n| Ipv4Addr::new(198, 19, 2, n)),
        }
    }

    fn config(services: &[EdgeService]) -> EdgeConfig {
        let services =
            services.iter().enumerate().map(|(n, s)| (format!("s{n}").parse().unwrap(), s.clone())).collect();
        EdgeConfig { generation: Generation(1), network: "lyon".parse().unwrap(), services }
    }

    fn rules() -> Rules {
        Rules {
            uplink: "wan0".into(),
            control: BTreeSet::from(["198.19.0.1/32".parse().unwrap()]),
            peers: BTreeSet::from(["198.19.2.0/24".parse().unwrap()]),
            transfer_ports: BTreeSet::from([8446]),
        }
    }

    fn shares(slots: &[(u8, u32)]) -> Vec<usize> {
        let table = wanted(&config(&[service(100, slots, None)]), rules()).unwrap();
        slots
            .iter()
            .map(|(c, _)| {
                table.elements.iter().filter(|e| matches!(e, Element::Slot { to, .. } if *to == cell(*c))).count()
            })
            .collect()
    }

    #[test]
    fn slots_follow_the_weights() {
        assert_eq!(shares(&[(2, 12), (6, 4)]), [12, 4]);
        assert_eq!(shares(&[(2, 1), (6, 1), (10, 1)]), [6, 5, 5]);
        assert_eq!(shares(&[(2, 16), (6, 16), (10, 16), (14, 1)]), [5, 5, 5, 1]);
        assert_eq!(shares(&[(2, 7)]), [16]);
    }

    #[test]
    fn without_a_cell_connections_go_where_it_is_served() {
        let table = wanted(&config(&[service(100, &[], Some(101))]), rules()).unwrap();
        assert!(table.elements.contains(&Element::Elsewhere(Ipv4Addr::new(198, 19, 2, 101))));
        assert_eq!(table.elements.iter().filter(|e| matches!(e, Element::Slot { .. })).count(), 16);
        let table = wanted(&config(&[service(100, &[(2, 1)], Some(101))]), rules()).unwrap();
        assert!(!table.elements.iter().any(|e| matches!(e, Element::Elsewhere(_))));
    }

    #[test]
    fn a_config_that_cannot_be_is_refused_by_name() {
        let twice = config(&[service(100, &[], None), service(100, &[], None)]);
        assert!(
            wanted(&twice, rules())
                .unwrap_err()
                .problem
                .contains("service s1: public address 198.19.1.100 belongs to service s0")
        );
        for vip in [[127, 0, 0, 1], [0, 0, 0, 0], [224, 0, 0, 1], [255, 255, 255, 255], [169, 254, 1, 1]] {
            let odd = EdgeService { vip: vip.into(), ..service(100, &[], None) };
            let said = wanted(&config(&[odd]), rules()).unwrap_err().problem;
            assert!(said.contains("is not an address that a host can have"), "{said}");
        }
        for slots in [&[(2, 0)][..], &[(2, 17)], &[(2, 1), (2, 1)]] {
            assert!(wanted(&config(&[service(100, slots, None)]), rules()).is_err(), "{slots:?} was taken");
        }
    }

    #[test]
    fn a_swap_is_a_few_lines_that_remove_before_they_add() {
        let before = wanted(&config(&[service(100, &[(2, 15), (6, 1)], None)]), rules()).unwrap();
        let after = wanted(&config(&[service(100, &[(2, 14), (6, 2)], None)]), rules()).unwrap();
        insta::assert_snapshot!(plan(&before, &after).to_string(), @r"
        delete element ip vmatrix_edge slots { 198.19.1.100 . tcp . 80 . 14 }
        add element ip vmatrix_edge slots { 198.19.1.100 . tcp . 80 . 14 : 100.64.0.6 . 80 }
        ");
    }

    #[test]
    fn the_control_ports_answer_only_those_who_are_named() {
        let text = rules().to_string();
        let lines: Vec<&str> = text.lines().filter(|l| l.contains("8442") && l.ends_with("accept")).collect();
        assert_eq!(
            lines,
            ["add rule ip vmatrix_edge input iifname \"wan0\" ip saddr 198.19.0.1/32 tcp dport { 8441, 8442 } accept"]
        );
    }

    #[test]
    fn machines_answer_other_networks_machines_for_chunks_and_relays_and_nobody_else() {
        let text = rules().to_string();
        let accepts = |what: &str| text.lines().filter(|l| l.contains(what) && l.ends_with("accept")).count();
        assert_eq!((accepts("198.19.2.0/24"), accepts("8446"), accepts("51830-52085")), (2, 1, 1), "{text}");
        assert!(text.contains("ip saddr 198.19.2.0/24 tcp dport { 8446 } accept"), "{text}");
        assert!(text.contains("ip saddr 198.19.2.0/24 udp dport 51830-52085 accept"), "{text}");
    }

    fn services() -> impl Strategy<Value = Vec<EdgeService>> {
        let slots = proptest::collection::btree_map(2u8..8, 1u32..=16, 0..5);
        let one = (slots, proptest::option::of(100u8..104));
        proptest::collection::vec(one, 0..4).prop_map(|list| {
            (100u8..)
                .zip(list)
                .map(|(vip, (slots, forward))| service(vip, &slots.into_iter().collect::<Vec<_>>(), forward))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn a_change_leads_to_what_is_wanted_and_then_there_is_none(a in services(), b in services(), restarted: bool) {
            let mut from = wanted(&config(&a), rules()).unwrap();
            if restarted {
                from.rules = None;
            }
            let to = wanted(&config(&b), rules()).unwrap();
            let change = plan(&from, &to);
            prop_assert!(change.remove.is_disjoint(&to.elements), "what stays was touched");
            prop_assert!(change.add.is_disjoint(&from.elements), "what stays was touched");
            prop_assert_eq!(apply(&from, &change), to.clone());
            prop_assert!(plan(&to, &to).is_empty());
        }

        #[test]
        fn every_cell_gets_a_slot_and_all_slots_are_given(slots in proptest::collection::btree_map(2u8..40, 1u32..=16, 1..=16)) {
            let slots: Vec<_> = slots.into_iter().collect();
            let shares = shares(&slots);
            prop_assert_eq!(shares.iter().sum::<usize>(), 16);
            prop_assert!(shares.iter().all(|n| *n > 0), "{:?} of {:?}", shares, slots);
        }
    }
}
