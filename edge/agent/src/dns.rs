//! Answers DNS over UDP and TCP; hickory reads and writes the messages, the answer is the core's.
//!
//! ```text
//! socket ─▶ hickory (decode) ─▶ Zone ─▶ core::dns::answer ─▶ records, own OPT ─▶ hickory (encode) ─▶ socket
//! ```
//!
//! The OPT record of the response is made here, for hickory's own zones cannot set a client subnet's
//! scope, and its reading of that option is laxer than RFC 7871.

use anyhow::Context;
use hickory_proto::op::{Edns, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::opt::{ClientSubnet as SubnetOption, EdnsOption};
use hickory_proto::rr::rdata::{A, NS, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record as Row, RecordType};
use hickory_server::Server;
use hickory_server::net::runtime::Time;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponseBuilder;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::net::{TcpListener, UdpSocket};
use vmatrix_edge_core::dns::{Answer, ClientSubnet, Code, Kind, Record, answer, client_subnet, server_name};
use vmatrix_edge_core::steering::Table;

/// Largest UDP answer, bytes: it passes every path unfragmented (DNS flag day 2020).
const UDP_MAX: u16 = 1232;
/// How long a TCP client may be silent (RFC 7766 asks for a few seconds).
const TCP_IDLE: Duration = Duration::from_secs(5);
/// Answers waiting for one TCP client.
const TCP_WAITING: usize = 32;

/// The table in force, shared with whoever changes it.
#[derive(Debug, Clone, Default)]
pub struct Answers(Arc<RwLock<Option<Arc<Table>>>>);

impl Answers {
    /// From now on questions are answered from `table`.
    pub fn set(&self, table: Table) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(table));
    }
    fn get(&self) -> Option<Arc<Table>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct Zone {
    /// Without the last dot.
    zone: String,
    apex: Name,
    server: Name,
    mailbox: Name,
    me: Ipv4Addr,
    answers: Answers,
}

/// Serves `zone` on `listen`, UDP and TCP, from `answers`.
///
/// # Errors
/// The address is in use, or the zone is no name.
pub async fn serve(listen: SocketAddrV4, zone: &str, answers: Answers) -> anyhow::Result<Server<impl RequestHandler>> {
    let name =
        |text: String| Name::from_ascii(format!("{text}.")).with_context(|| format!("{text} is not a domain name"));
    let handler = Zone {
        apex: name(zone.to_owned())?,
        server: name(server_name(zone))?,
        mailbox: name(format!("hostmaster.{zone}"))?,
        zone: zone.to_owned(),
        me: *listen.ip(),
        answers,
    };
    let busy = || format!("cannot answer DNS on {listen}: another server may, or the address is not this machine's");
    let udp = UdpSocket::bind(listen).await.with_context(busy)?;
    let tcp = TcpListener::bind(listen).await.with_context(busy)?;
    let mut server = Server::new(handler);
    server.register_socket(udp);
    server.register_listener(tcp, TCP_IDLE, TCP_WAITING);
    Ok(server)
}

impl Zone {
    /// Decides on a whole request: the code, and what was asked and answered if it came that far.
    fn decide(&self, request: &Request) -> (ResponseCode, Option<ClientSubnet>, Option<Answer>) {
        if request.metadata.op_code != OpCode::Query {
            return (ResponseCode::NotImp, None, None);
        }
        if request.edns.as_ref().is_some_and(|e| e.version() > 0) {
            return (ResponseCode::BADVERS, None, None);
        }
        let (Ok(subnet), Ok(info)) = (client_subnet(request.as_slice()), request.request_info()) else {
            return (ResponseCode::FormErr, None, None);
        };
        if info.query.query_class() != DNSClass::IN {
            return (ResponseCode::Refused, subnet, None);
        }
        let kind = match info.query.query_type() {
            RecordType::A => Kind::A,
            RecordType::NS => Kind::Ns,
            RecordType::SOA => Kind::Soa,
            RecordType::ANY => Kind::Any,
            RecordType::AXFR | RecordType::IXFR => return (ResponseCode::Refused, subnet, None),
            _ => Kind::Other,
        };
        let table = self.answers.get();
        let name = info.query.name().to_string();
        let answer = answer(table.as_deref(), &self.zone, self.me, &name, kind, subnet, request.src().ip());
        let code = match answer.code {
            Code::Ok => ResponseCode::NoError,
            Code::NoName => ResponseCode::NXDomain,
            Code::Refused => ResponseCode::Refused,
            Code::NotReady => ResponseCode::ServFail,
        };
        (code, subnet, Some(answer))
    }

    fn authority(&self, ttl_s: u32) -> Row {
        // The serial is the steering's; secondaries do not exist, so the intervals only have to be sane.
        let serial = self.answers.get().map_or(0, |t| t.generation.0 as u32);
        let soa = SOA::new(self.server.clone(), self.mailbox.clone(), serial, 3600, 600, 86_400, ttl_s);
        Row::from_rdata(self.apex.clone(), ttl_s, RData::SOA(soa))
    }

    fn row(&self, owner: &Name, record: Record, ttl_s: u32) -> Row {
        match record {
            Record::Address(address) => Row::from_rdata(owner.clone(), ttl_s, RData::A(A(address))),
            Record::NameServer => Row::from_rdata(owner.clone(), ttl_s, RData::NS(NS(self.server.clone()))),
            Record::Authority => self.authority(ttl_s),
        }
    }
}

#[async_trait::async_trait]
impl RequestHandler for Zone {
    async fn handle_request<R: ResponseHandler, T: Time>(&self, request: &Request, mut to: R) -> ResponseInfo {
        let (code, subnet, answer) = self.decide(request);
        let owner = request.queries.queries().first().map_or_else(Name::root, |q| q.original().name().clone());
        let mut meta = Metadata::response_from_request(&request.metadata);
        meta.response_code = code;
        meta.authoritative = matches!(code, ResponseCode::NoError | ResponseCode::NXDomain);
        let rows: Vec<Row> =
            answer.iter().flat_map(|a| a.records.iter().map(|r| self.row(&owner, *r, a.ttl_s))).collect();
        let soa: Vec<Row> = answer.iter().filter(|a| a.negative).map(|a| self.authority(a.ttl_s)).collect();
        let edns = request.edns.as_ref().map(|asked| {
            let mut edns = Edns::new();
            edns.set_max_payload(asked.max_payload().min(UDP_MAX));
            edns.set_dnssec_ok(asked.flags().dnssec_ok);
            if let Some(s) = subnet {
                // The option goes back as it came, with our scope.
                let scope = answer.as_ref().map_or(0, |a| a.scope);
                edns.options_mut().insert(EdnsOption::Subnet(SubnetOption::new(s.address, s.source, scope)));
            }
            edns
        });
        let mut builder = MessageResponseBuilder::from_message_request(request);
        if let Some(edns) = &edns {
            builder.edns(edns);
        }
        match to.send_response(builder.build(meta, &rows, [], &soa, [])).await {
            Ok(info) => info,
            Err(e) => {
                tracing::debug!(client = %request.src(), "answer was not sent: {e}");
                ResponseInfo::from(hickory_proto::op::Header { metadata: meta, counts: Default::default() })
            }
        }
    }
}
