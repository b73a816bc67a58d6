//! What a question is answered with, and which client subnet options are understood.
//!
//! ```text
//! message bytes ─▶ client_subnet ─▶ option, none, or malformed (FORMERR)
//! question + option + resolver ─▶ answer ─▶ code, records, SOA in negatives, scope
//! ```
//!
//! The zone is small: `<service>.<zone>` has addresses, the apex has SOA and NS, `a.ns.<zone>` is the
//! name server itself. Everything else in the zone does not exist; everything outside is refused.

use crate::steering::Table;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The record types that have an answer here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An IPv4 address.
    A,
    /// The zone's name server.
    Ns,
    /// The zone's start of authority.
    Soa,
    /// Answered with one set of records (RFC 8482).
    Any,
    /// Any other type: the name may exist, the type does not.
    Other,
}

/// How an answer went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The name exists; whether the type does, the records say.
    Ok,
    /// The name does not exist.
    NoName,
    /// Not a name of this zone.
    Refused,
    /// No steering has arrived yet.
    NotReady,
}

/// A record of the answer, whose owner is the name that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Where it is served.
    Address(Ipv4Addr),
    /// [`server_name`].
    NameServer,
    /// The SOA; its serial is the steering's generation.
    Authority,
}

/// The whole answer to one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// How it went.
    pub code: Code,
    /// The answer section, in this order.
    pub records: Vec<Record>,
    /// Whether the SOA stands in the authority section, as in every negative answer (RFC 2308).
    pub negative: bool,
    /// Time to live of every record, seconds.
    pub ttl_s: u32,
    /// For how long a prefix around the client it holds; 0 is everyone (RFC 7871).
    pub scope: u8,
}

/// The client subnet a resolver tells of (RFC 7871).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientSubnet {
    /// Where the client is; bits past `source` are zero.
    pub address: IpAddr,
    /// How many bits of the address are told; 0 asks not to use it.
    pub source: u8,
}

/// A message whose client subnet option breaks RFC 7871 §6; answered with FORMERR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// First label of the name server's own name, and the node it hangs under.
const SERVER_LABEL: &str = "a";
const SERVER_NODE: &str = "ns";

/// The name server's own name, without the last dot.
pub fn server_name(zone: &str) -> String {
    format!("{SERVER_LABEL}.{SERVER_NODE}.{zone}")
}

/// Answers `name` for `kind`, asked by `resolver`, perhaps on behalf of `subnet`; `me` is this server's address.
///
/// `zone` is the configured one, without the last dot: it is known before any steering is.
pub fn answer(
    table: Option<&Table>,
    zone: &str,
    me: Ipv4Addr,
    name: &str,
    kind: Kind,
    subnet: Option<ClientSubnet>,
    resolver: IpAddr,
) -> Answer {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let zone = zone.trim_end_matches('.').to_ascii_lowercase();
    let blank = |code| Answer { code, records: Vec::new(), negative: false, ttl_s: 0, scope: 0 };
    let Some(inside) = below(&name, &zone) else { return blank(Code::Refused) };
    let Some(table) = table else { return blank(Code::NotReady) };
    let found = |records: Vec<Record>| Answer {
        negative: records.is_empty(),
        records,
        code: Code::Ok,
        ttl_s: table.ttl_s,
        scope: 0,
    };
    match inside {
        "" => found(match kind {
            Kind::Soa | Kind::Any => vec![Record::Authority],
            Kind::Ns => vec![Record::NameServer],
            Kind::A | Kind::Other => Vec::new(),
        }),
        service if table.knows(service) => match kind {
            Kind::A | Kind::Any => address(table, service, subnet, resolver, &found),
            Kind::Ns | Kind::Soa | Kind::Other => found(Vec::new()),
        },
        SERVER_NODE => found(Vec::new()),
        server if server.split_once('.') == Some((SERVER_LABEL, SERVER_NODE)) => found(match kind {
            Kind::A | Kind::Any => vec![Record::Address(me)],
            Kind::Ns | Kind::Soa | Kind::Other => Vec::new(),
        }),
        _ => Answer { code: Code::NoName, ..found(Vec::new()) },
    }
}

fn address(
    table: &Table,
    service: &str,
    subnet: Option<ClientSubnet>,
    resolver: IpAddr,
    found: &dyn Fn(Vec<Record>) -> Answer,
) -> Answer {
    let told = subnet.filter(|s| s.source > 0).map(|s| s.address);
    match table.choose(service, told.unwrap_or(resolver)) {
        // A name that is served nowhere exists all the same: no data, for everyone.
        None => found(Vec::new()),
        Some(choice) => Answer {
            // Without a told subnet the answer is the resolver's own, and RFC 7871 §7.1.3 wants scope 0.
            scope: if told.is_some() { choice.scope } else { 0 },
            ..found(choice.addresses.into_iter().map(Record::Address).collect())
        },
    }
}

/// What stands before `zone` in `name`: empty for the apex, none outside.
fn below<'a>(name: &'a str, zone: &str) -> Option<&'a str> {
    let rest = name.strip_suffix(zone)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_suffix('.') }
}

const OPT: u16 = 41;
const SUBNET_OPTION: u16 = 8;

/// Finds the client subnet option of a whole query message.
///
/// # Errors
/// A SCOPE other than 0, unused bits that are set, a wrong length, an unknown family, a SOURCE longer
/// than its family, two options or two OPT records; and a message that ends too early.
pub fn client_subnet(message: &[u8]) -> Result<Option<ClientSubnet>, Malformed> {
    let counts = [4, 6, 8, 10].map(|at| u16_at(message, at));
    let [Some(questions), Some(answers), Some(authorities), Some(additional)] = counts else { return Err(Malformed) };
    let mut at = 12;
    for _ in 0..questions {
        at = past_name(message, at)? + 4;
    }
    let mut found = None;
    let mut opts = 0;
    for _ in 0..u32::from(answers) + u32::from(authorities) + u32::from(additional) {
        at = past_name(message, at)?;
        let kind = u16_at(message, at).ok_or(Malformed)?;
        let length = usize::from(u16_at(message, at + 8).ok_or(Malformed)?);
        let data = message.get(at + 10..at + 10 + length).ok_or(Malformed)?;
        at += 10 + length;
        if kind == OPT {
            opts += 1;
            if opts > 1 {
                return Err(Malformed);
            }
            found = subnet_of(data)?;
        }
    }
    Ok(found)
}

fn subnet_of(mut options: &[u8]) -> Result<Option<ClientSubnet>, Malformed> {
    let mut found = None;
    while !options.is_empty() {
        let (Some(code), Some(length)) = (u16_at(options, 0), u16_at(options, 2)) else { return Err(Malformed) };
        let end = 4 + usize::from(length);
        let data = options.get(4..end).ok_or(Malformed)?;
        options = options.get(end..).unwrap_or_default();
        if code == SUBNET_OPTION && found.replace(parse_subnet(data)?).is_some() {
            return Err(Malformed);
        }
    }
    Ok(found)
}

fn parse_subnet(data: &[u8]) -> Result<ClientSubnet, Malformed> {
    let [f1, f0, source, scope, told @ ..] = data else { return Err(Malformed) };
    let longest = match u16::from_be_bytes([*f1, *f0]) {
        1 => 32,
        2 => 128,
        _ => return Err(Malformed),
    };
    if *scope != 0 || *source > longest || told.len() != usize::from(*source).div_ceil(8) {
        return Err(Malformed);
    }
    let unused = (8 - source % 8) % 8;
    if told.last().is_some_and(|last| last & ((1u8 << unused) - 1) != 0) {
        return Err(Malformed);
    }
    let mut octets = [0u8; 16];
    octets.iter_mut().zip(told).for_each(|(to, from)| *to = *from);
    let address = match longest {
        32 => IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])),
        _ => IpAddr::V6(Ipv6Addr::from(octets)),
    };
    Ok(ClientSubnet { address, source: *source })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// The offset after the name at `at`; a pointer ends a name, so nothing is followed and nothing loops.
fn past_name(message: &[u8], mut at: usize) -> Result<usize, Malformed> {
    loop {
        match *message.get(at).ok_or(Malformed)? {
            0 => return Ok(at + 1),
            pointer if pointer & 0xc0 == 0xc0 => return Ok(at + 2),
            length if length & 0xc0 == 0 => at += 1 + usize::from(length),
            _ => return Err(Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use vmatrix_model::Generation;
    use vmatrix_model::steering::{Answers, Steering};

    const ME: Ipv4Addr = Ipv4Addr::new(198, 19, 1, 1);

    fn table() -> Table {
        let answers = Answers {
            by_clients: BTreeMap::from([("10.0.0.0/8".parse().unwrap(), vec![Ipv4Addr::new(203, 0, 113, 1)])]),
            otherwise: vec![Ipv4Addr::new(203, 0, 113, 2)],
        };
        let asleep = Answers::default();
        let services = BTreeMap::from([("maps".parse().unwrap(), answers), ("asleep".parse().unwrap(), asleep)]);
        Table::new(&Steering { generation: Generation(7), zone: "vmatrix.test".into(), ttl_s: 5, services })
    }

    fn ask(name: &str, kind: Kind, subnet: Option<ClientSubnet>) -> Answer {
        answer(Some(&table()), "vmatrix.test", ME, name, kind, subnet, "10.9.9.9".parse().unwrap())
    }

    fn subnet(net: &str) -> Option<ClientSubnet> {
        let net: ipnet::IpNet = net.parse().unwrap();
        Some(ClientSubnet { address: net.network(), source: net.prefix_len() })
    }

    #[test]
    fn the_told_subnet_decides_else_the_resolver() {
        let a = ask("maps.vmatrix.test.", Kind::A, subnet("99.1.2.0/24"));
        assert_eq!((a.records, a.scope, a.ttl_s), (vec![Record::Address(Ipv4Addr::new(203, 0, 113, 2))], 2, 5));
        let a = ask("MAPS.Vmatrix.test", Kind::A, None);
        assert_eq!(a.records, vec![Record::Address(Ipv4Addr::new(203, 0, 113, 1))]);
    }

    #[test]
    fn source_0_is_answered_by_the_resolver_with_scope_0() {
        let a = ask("maps.vmatrix.test", Kind::A, subnet("0.0.0.0/0"));
        assert_eq!((a.records, a.scope), (vec![Record::Address(Ipv4Addr::new(203, 0, 113, 1))], 0));
    }

    #[test]
    fn what_is_not_there_is_told_apart() {
        let of = |name, kind| {
            let a = ask(name, kind, subnet("99.1.2.0/24"));
            (a.code, a.records.len(), a.negative, a.scope)
        };
        assert_eq!(of("maps.vmatrix.test", Kind::Other), (Code::Ok, 0, true, 0));
        assert_eq!(of("asleep.vmatrix.test", Kind::A), (Code::Ok, 0, true, 0));
        assert_eq!(of("nothing.vmatrix.test", Kind::A), (Code::NoName, 0, true, 0));
        assert_eq!(of("x.maps.vmatrix.test", Kind::A), (Code::NoName, 0, true, 0));
        assert_eq!(of("maps.other.test", Kind::A), (Code::Refused, 0, false, 0));
        assert_eq!(of("mapsvmatrix.test", Kind::A), (Code::Refused, 0, false, 0));
        assert_eq!(of("ns.vmatrix.test", Kind::A), (Code::Ok, 0, true, 0));
    }

    #[test]
    fn the_apex_has_soa_and_ns_and_the_server_has_an_address() {
        assert_eq!(ask("vmatrix.test", Kind::Soa, None).records, vec![Record::Authority]);
        assert_eq!(ask("vmatrix.test", Kind::Ns, None).records, vec![Record::NameServer]);
        assert!(ask("vmatrix.test", Kind::A, None).negative);
        assert_eq!(ask(&server_name("vmatrix.test"), Kind::A, None).records, vec![Record::Address(ME)]);
    }

    #[test]
    fn before_any_steering_a_name_is_not_denied() {
        let a = answer(None, "vmatrix.test", ME, "maps.vmatrix.test", Kind::A, None, "10.9.9.9".parse().unwrap());
        assert_eq!((a.code, a.negative), (Code::NotReady, false));
    }

    /// A query for `maps.vmatrix.test` whose OPT record holds `options`.
    fn query(options: &[u8]) -> Vec<u8> {
        let mut m = vec![0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        m.extend(b"\x04maps\x07vmatrix\x04test\x00\x00\x01\x00\x01");
        m.extend([0, 0, 41, 4, 208, 0, 0, 0, 0]);
        m.extend(u16::try_from(options.len()).unwrap().to_be_bytes());
        m.extend(options);
        m
    }

    fn option(family: u16, source: u8, scope: u8, address: &[u8]) -> Vec<u8> {
        let mut o = vec![0, 8];
        o.extend(u16::try_from(4 + address.len()).unwrap().to_be_bytes());
        o.extend(family.to_be_bytes());
        o.extend([source, scope]);
        o.extend(address);
        o
    }

    #[test]
    fn a_good_subnet_option_is_read() {
        assert_eq!(client_subnet(&query(&option(1, 24, 0, &[10, 1, 2]))), Ok(subnet("10.1.2.0/24")));
        assert_eq!(client_subnet(&query(&option(1, 20, 0, &[10, 1, 0x10]))), Ok(subnet("10.1.16.0/20")));
        assert_eq!(client_subnet(&query(&option(2, 32, 0, &[0x20, 1, 0xd, 0xb8]))), Ok(subnet("2001:db8::/32")));
        assert_eq!(client_subnet(&query(&option(1, 0, 0, &[]))), Ok(subnet("0.0.0.0/0")));
        assert_eq!(client_subnet(&query(&[])), Ok(None));
    }

    #[test]
    fn every_malformed_subnet_option_is_refused() {
        let twice = [option(1, 24, 0, &[10, 1, 2]), option(1, 24, 0, &[10, 1, 2])].concat();
        for (what, bytes) in [
            ("scope", option(1, 24, 24, &[10, 1, 2])),
            ("set bits past the source", option(1, 20, 0, &[10, 1, 0x11])),
            ("short address", option(1, 24, 0, &[10, 1])),
            ("long address", option(1, 24, 0, &[10, 1, 2, 0])),
            ("unknown family", option(3, 24, 0, &[10, 1, 2])),
            ("a /33", option(1, 33, 0, &[10, 1, 2, 3, 0])),
            ("a /129", option(2, 129, 0, &[0; 17])),
            ("family 0", option(0, 0, 0, &[])),
            ("no header", vec![0, 8, 0, 2, 0, 1]),
            ("length past the end", vec![0, 8, 0, 99, 0, 1, 0, 0]),
            ("two options", twice),
        ] {
            assert_eq!(client_subnet(&query(&bytes)), Err(Malformed), "{what} was taken");
        }
    }

    proptest! {
        #[test]
        fn no_message_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = client_subnet(&bytes);
            let _ = client_subnet(&query(&bytes));
        }
    }
}
