//! A resolver as a client region has one: it asks the edges, keeps answers for their TTL, and says
//! which subnet its clients are in.
//!
//! ```text
//! name ─▶ cache (TTL) ─miss─▶ nearest edge ─timeout, SERVFAIL─▶ next edge ... ─▶ addresses
//! ```

use anyhow::{Context, bail};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::opt::{ClientSubnet, EdnsOption};
use hickory_proto::rr::{Name, RData, RecordType};
use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;
use std::time::{Duration, Instant};
use tokio::net::UdpSocket;
use vmatrix_model::{Span, Time};

/// What a resolver waits for one server; the longest round trip here is a third of that.
const SERVER_PATIENCE: Duration = Duration::from_secs(1);
/// Each server is asked so often before the name counts as unresolved.
const ROUNDS: usize = 2;
/// Largest answer over UDP.
const ANSWER_MAX: usize = 1232;
/// Most names kept: a fleet has at most 150 services.
const NAMES_MAX: usize = 256;

/// Answers and until when they may be used. Pure.
#[derive(Debug, Default)]
pub struct Cache {
    entries: BTreeMap<String, (Time, Vec<Ipv4Addr>)>,
}

impl Cache {
    /// The addresses of `name` that may still be used at `now`.
    pub fn get(&self, now: Time, name: &str) -> Option<&[Ipv4Addr]> {
        self.entries.get(name).filter(|(until, _)| now < *until).map(|(_, a)| a.as_slice())
    }

    /// Keeps an answer for its TTL.
    pub fn put(&mut self, now: Time, name: &str, ttl_s: u32, addresses: Vec<Ipv4Addr>) {
        self.entries.retain(|_, (until, _)| now < *until);
        if self.entries.len() < NAMES_MAX {
            self.entries.insert(name.to_owned(), (now + Span::secs(u64::from(ttl_s)), addresses));
        }
    }
}

/// One region's resolver. Runs inside the region's namespace.
pub struct Resolver {
    servers: Vec<SocketAddrV4>,
    subnet: Ipv4Net,
    own: Ipv4Addr,
    /// Answers are kept at least so long, seconds.
    least_ttl_s: u32,
    began: Instant,
    // Held while asking, so that clients who ask for the same name at once wait for one answer.
    asked: tokio::sync::Mutex<(Cache, u16)>,
}

impl Resolver {
    /// A resolver at `own` for clients in `subnet`, which asks `servers` in this order.
    pub fn new(servers: Vec<SocketAddrV4>, subnet: Ipv4Net, own: Ipv4Addr) -> Resolver {
        let asked = tokio::sync::Mutex::new((Cache::default(), 1));
        Resolver { servers, subnet, own, least_ttl_s: 0, began: Instant::now(), asked }
    }

    /// The same, keeping answers at least so many seconds, as some resolvers do.
    pub fn clamping(self, least_ttl_s: u32) -> Resolver {
        Resolver { least_ttl_s, ..self }
    }

    /// The addresses of `name`, from the cache or from the first server that answers.
    ///
    /// # Errors
    /// No server answered, or the name has no address.
    pub async fn resolve(&self, name: &str) -> anyhow::Result<Vec<Ipv4Addr>> {
        let mut asked = self.asked.lock().await;
        let now = Time(self.began.elapsed().as_micros() as u64);
        if let Some(addresses) = asked.0.get(now, name) {
            return Ok(addresses.to_vec());
        }
        let mut last = anyhow::anyhow!("there is no server to ask");
        for server in self.servers.iter().cycle().take(self.servers.len() * ROUNDS) {
            asked.1 = asked.1.wrapping_add(1);
            let answer = tokio::time::timeout(SERVER_PATIENCE, self.ask(*server, name, asked.1)).await;
            match answer {
                Ok(Ok((ttl_s, addresses))) => {
                    let now = Time(self.began.elapsed().as_micros() as u64);
                    asked.0.put(now, name, ttl_s.max(self.least_ttl_s), addresses.clone());
                    return Ok(addresses);
                }
                Ok(Err(e)) => last = e,
                Err(_) => last = anyhow::anyhow!("{server} did not answer within {} s", SERVER_PATIENCE.as_secs()),
            }
        }
        Err(last.context(format!("cannot resolve {name}")))
    }

    async fn ask(&self, server: SocketAddrV4, name: &str, id: u16) -> anyhow::Result<(u32, Vec<Ipv4Addr>)> {
        let socket = UdpSocket::bind((self.own, 0)).await.context("no socket")?;
        socket.connect(server).await?;
        let question = question(name, id, self.subnet)?;
        socket.send(&question).await?;
        let mut buffer = [0; ANSWER_MAX];
        loop {
            let length = socket.recv(&mut buffer).await?;
            let message = Message::from_vec(buffer.get(..length).unwrap_or_default())
                .context("an answer that is no DNS message")?;
            if message.metadata.id == id && message.metadata.message_type == MessageType::Response {
                return read(&message).with_context(|| format!("{server} answered"));
            }
        }
    }
}

/// The query as sent.
fn question(name: &str, id: u16, subnet: Ipv4Net) -> anyhow::Result<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_str(&format!("{name}.")).context("not a name")?, RecordType::A));
    let mut edns = Edns::new();
    edns.set_max_payload(ANSWER_MAX as u16);
    edns.options_mut().insert(EdnsOption::Subnet(ClientSubnet::new(subnet.network().into(), subnet.prefix_len(), 0)));
    message.set_edns(edns);
    Ok(message.to_vec()?)
}

/// Addresses and the least TTL of an answer.
fn read(message: &Message) -> anyhow::Result<(u32, Vec<Ipv4Addr>)> {
    if message.metadata.response_code != ResponseCode::NoError {
        bail!("{}", message.metadata.response_code);
    }
    let records =
        || message.answers.iter().filter_map(|r| if let RData::A(a) = &r.data { Some((r.ttl, a.0)) } else { None });
    let ttl_s = records().map(|(ttl, _)| ttl).min().context("no address")?;
    Ok((ttl_s, records().map(|(_, a)| a).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::Record;

    const VIP: Ipv4Addr = Ipv4Addr::new(198, 19, 1, 100);

    #[test]
    fn an_answer_is_kept_for_its_ttl_and_no_longer() {
        let mut cache = Cache::default();
        cache.put(Time(0), "maps.vmatrix.test", 4, vec![VIP]);
        assert_eq!(cache.get(Time(3_999_999), "maps.vmatrix.test"), Some([VIP].as_slice()));
        assert_eq!(cache.get(Time(4_000_000), "maps.vmatrix.test"), None);
        assert_eq!(cache.get(Time(0), "agenda.vmatrix.test"), None);
    }

    #[test]
    fn an_answer_with_ttl_zero_is_used_once() {
        let mut cache = Cache::default();
        cache.put(Time(5), "maps.vmatrix.test", 0, vec![VIP]);
        assert_eq!(cache.get(Time(5), "maps.vmatrix.test"), None);
    }

    #[test]
    fn the_question_carries_the_clients_subnet() {
        let bytes = question("maps.vmatrix.test", 7, "198.18.3.0/24".parse().unwrap()).unwrap();
        let message = Message::from_vec(&bytes).unwrap();
        let edns = message.edns.unwrap();
        let option = edns.option(hickory_proto::rr::rdata::opt::EdnsCode::Subnet);
        assert_eq!(option, Some(&EdnsOption::Subnet(ClientSubnet::new("198.18.3.0".parse().unwrap(), 24, 0))));
    }

    #[test]
    fn the_least_ttl_of_an_answer_counts_and_an_empty_one_is_no_answer() {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        assert!(read(&message).is_err());
        let name = Name::from_str("maps.vmatrix.test.").unwrap();
        for (ttl, last) in [(9, 100), (4, 101)] {
            message.add_answer(Record::from_rdata(name.clone(), ttl, RData::A(Ipv4Addr::new(198, 19, 1, last).into())));
        }
        let (ttl, addresses) = read(&message).unwrap();
        assert_eq!((ttl, addresses.len()), (4, 2));
    }
}
