//! The clients: one thread a region, inside its namespace, asking when the scenario says.
//!
//! ```text
//! arrivals ─▶ resolve (the region's resolver) ─▶ one exchange ─▶ Request (took, network, failed)
//!                                            writes ─▶ ledger ─▶ read back elsewhere
//! ```
//! Open loop: a request begins at its time, whether the one before has been answered or not. None is
//! made twice: a failure is a failure.

use crate::dns::Resolver;
use crate::exchange::{Answer, Ask, exchange};
use crate::ledger::{Ledger, Write};
use crate::namespace::Namespace;
use anyhow::Context;
use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::sync::{mpsc, watch};
use vmatrix_model::fleet::{Fleet, host};
use vmatrix_model::{NetworkId, RegionId, ServiceId, SiteId, Span};
use vmatrix_replay::arrivals::Arrival;
use vmatrix_replay::recording::Request;
use vmatrix_replay::scenario::{Scenario, Traffic};

/// Client addresses of a region: from this host number, so many.
const CLIENTS_FIRST: u32 = 10;
const CLIENTS: u64 = 200;
/// A last read is tried so often if it fails otherwise than by not finding.
const LAST_READS: usize = 3;

/// What all clients of a play share.
pub struct Clients {
    zone: String,
    resolver_ttl_s: u32,
    traffic: BTreeMap<ServiceId, Traffic>,
    vips: BTreeMap<Ipv4Addr, NetworkId>,
    /// Stands in every write's body, and must never be seen on the WAN.
    pub canary: String,
    /// Stands in every unencrypted request, and must be seen on the WAN.
    pub control: String,
    ledger: Mutex<Ledger>,
}

/// The clients of one region.
#[derive(Clone)]
pub struct ClientRegion {
    pub name: RegionId,
    pub namespace: Namespace,
    prefix: Ipv4Net,
    /// The networks' name servers, the nearest first; ties by name.
    servers: Vec<SocketAddrV4>,
}

/// The client regions of a fleet whose namespaces are called by `namespace`.
pub fn regions(fleet: &Fleet, namespace: impl Fn(&str) -> String) -> Vec<ClientRegion> {
    let one = |region: &vmatrix_model::fleet::Region| {
        let here = SiteId::from(&region.name);
        let mut networks: Vec<_> =
            fleet.networks.iter().map(|n| (fleet.rtt(&here, &SiteId::from(&n.name)), &n.name, n.prefix)).collect();
        networks.sort();
        let servers = networks.into_iter().map(|(_, _, prefix)| SocketAddrV4::new(host(prefix, 1), 53)).collect();
        ClientRegion {
            name: region.name.clone(),
            namespace: Namespace::named(&namespace(region.name.as_str())),
            prefix: region.prefix,
            servers,
        }
    };
    fleet.regions.iter().map(one).collect()
}

impl Clients {
    /// The clients of a scenario, with a canary and a control of their own.
    ///
    /// # Errors
    /// No random numbers.
    pub fn of(scenario: &Scenario) -> anyhow::Result<Arc<Clients>> {
        let fleet = &scenario.fleet;
        let pairs = fleet.services.iter().flat_map(|s| fleet.networks.iter().map(move |n| (&s.name, &n.name)));
        let vips = pairs.filter_map(|(s, n)| Some((fleet.vip(s, n)?, n.clone()))).collect();
        let traffic = scenario.traffic.iter().map(|t| (t.service.clone(), t.clone())).collect();
        Ok(Arc::new(Clients {
            zone: fleet.zone.clone(),
            resolver_ttl_s: scenario.resolver_ttl_s,
            traffic,
            vips,
            canary: random_hex()?,
            control: format!("control-{}", random_hex()?),
            ledger: Mutex::default(),
        }))
    }

    /// The writes so far.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any request is sent unencrypted, so that the control must be seen.
    pub fn any_plain(&self) -> bool {
        self.traffic.values().any(|t| !t.tls)
    }

    /// Starts the clients of a region. `results` gets one entry an arrival, so it is as long as they are.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn begin(
        self: &Arc<Self>,
        region: ClientRegion,
        arrivals: Vec<Arrival>,
        start: Instant,
        mut stopped: watch::Receiver<bool>,
        results: mpsc::UnboundedSender<Request>,
    ) -> anyhow::Result<JoinHandle<anyhow::Result<()>>> {
        let clients = Arc::clone(self);
        let work = move || {
            region.namespace.enter()?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                tokio::select! {
                    () = clients.ask_all(&region, arrivals, start, results) => {}
                    _ = stopped.wait_for(|s| *s) => {}
                }
            });
            Ok(())
        };
        std::thread::Builder::new().name("clients".into()).spawn(work).context("cannot start a thread")
    }

    async fn ask_all(
        self: &Arc<Self>,
        region: &ClientRegion,
        arrivals: Vec<Arrival>,
        start: Instant,
        results: mpsc::UnboundedSender<Request>,
    ) {
        let resolver = Resolver::new(region.servers.clone(), region.prefix, host(region.prefix, 1));
        let resolver = Arc::new(resolver.clamping(self.resolver_ttl_s));
        let mut under_way = tokio::task::JoinSet::new();
        for arrival in arrivals {
            tokio::time::sleep_until((start + std::time::Duration::from_micros(arrival.at.0)).into()).await;
            let from = host(region.prefix, CLIENTS_FIRST + (arrival.number % CLIENTS) as u32);
            let (clients, resolver, results) = (Arc::clone(self), Arc::clone(&resolver), results.clone());
            under_way.spawn(async move {
                let request = clients.request(&resolver, from, arrival).await;
                // The receiver is gone only when the play was broken off.
                let _ = results.send(request);
            });
            while under_way.try_join_next().is_some() {}
        }
        while under_way.join_next().await.is_some() {}
    }

    async fn request(&self, resolver: &Resolver, from: Ipv4Addr, arrival: Arrival) -> Request {
        let mut request = Request {
            at: arrival.at,
            service: arrival.service.clone(),
            region: arrival.region.clone(),
            network: None,
            took: Span::ZERO,
            failed: None,
        };
        let Some(traffic) = self.traffic.get(&arrival.service) else {
            request.failed = Some("the scenario does not say what its requests are".into());
            return request;
        };
        let vip = match resolver.resolve(&self.host(&arrival.service)).await {
            Ok(addresses) => addresses.get(arrival.number as usize % addresses.len().max(1)).copied(),
            Err(e) => {
                request.failed = Some(format!("{e:#}"));
                return request;
            }
        };
        let (Some(vip), Some(network)) = (vip, vip.and_then(|v| self.vips.get(&v))) else {
            request.failed = Some("the name resolves to an address no network has".into());
            return request;
        };
        request.network = Some(network.clone());
        let task = self.task(traffic, &arrival, network);
        let ask = self.ask(traffic, &task, SocketAddrV4::new(vip, traffic.port), from);
        let began = Instant::now();
        let result = exchange(ask).await;
        request.took = Span(began.elapsed().as_micros() as u64);
        request.failed = self.judge(&task, network, result).err();
        request
    }

    /// What this request is for: paths, writes and reads back take turns.
    fn task(&self, traffic: &Traffic, arrival: &Arrival, network: &NetworkId) -> Task {
        let turns = if traffic.write.is_some() { 2 + u64::from(!traffic.get.is_empty()) } else { 0 };
        let get = |n: u64| traffic.get.get(n as usize % traffic.get.len().max(1)).cloned();
        match (arrival.number % turns.max(1), turns) {
            (_, 0) => Task::Get(get(arrival.number).unwrap_or_else(|| "/".into())),
            (2, _) => Task::Get(get(arrival.number / turns).unwrap_or_else(|| "/".into())),
            (1, _) if let Some(write) = self.ledger().take_unread(&arrival.service, network) => Task::Read(write),
            // Random part first: plays must not meet each other's writes.
            _ => Task::Write(Write {
                service: arrival.service.clone(),
                id: format!("{}-{}-{}", self.canary.get(..8).unwrap_or_default(), arrival.region, arrival.number),
                through: network.clone(),
            }),
        }
    }

    fn ask(&self, traffic: &Traffic, task: &Task, to: SocketAddrV4, from: Ipv4Addr) -> Ask {
        let fill = |text: &str, id: &str| text.replace("{id}", id).replace("{canary}", &self.canary);
        let back = traffic.write.as_ref();
        let (path, put) = match task {
            Task::Get(path) => (path.clone(), None),
            Task::Read(write) => (back.map_or(String::new(), |b| fill(&b.path, &write.id)), None),
            Task::Write(write) => (
                back.map_or(String::new(), |b| fill(&b.path, &write.id)),
                back.map(|b| (b.content_type.clone(), fill(&b.body, &write.id))),
            ),
        };
        let agent = if traffic.tls { "vmatrix-lab".to_owned() } else { format!("vmatrix-lab {}", self.control) };
        Ask {
            to,
            from,
            host: self.host(&traffic.service),
            tls: traffic.tls,
            path,
            user: traffic.user.clone(),
            agent,
            put,
        }
    }

    /// Notes writes and reads; says why the request failed, if it did.
    fn judge(&self, task: &Task, network: &NetworkId, result: Result<Answer, String>) -> Result<(), String> {
        let answer = result?;
        let good = (200..400).contains(&answer.status);
        match task {
            Task::Read(write) if good || answer.status == 404 => {
                let found = good && self.holds(&answer, write);
                self.ledger().read(write, network, found);
                if !found {
                    return Err(format!("the acknowledged write {} was not found", write.id));
                }
            }
            Task::Write(write) if good => self.ledger().acknowledge(write.clone()),
            _ => {}
        }
        if good { Ok(()) } else { Err(format!("HTTP {}", answer.status)) }
    }

    fn holds(&self, answer: &Answer, write: &Write) -> bool {
        let text = String::from_utf8_lossy(&answer.body);
        text.contains(&write.id) && text.contains(&self.canary)
    }

    fn host(&self, service: &ServiceId) -> String {
        format!("{service}.{}", self.zone)
    }

    /// Reads every acknowledged write once through each of `networks`, from `region`. Answers what could not be read.
    ///
    /// # Errors
    /// The region's namespace cannot be entered.
    pub fn read_all(
        &self,
        region: &ClientRegion,
        service: &ServiceId,
        networks: &[(NetworkId, Ipv4Addr)],
    ) -> anyhow::Result<Vec<String>> {
        let Some(traffic) = self.traffic.get(service) else { return Ok(Vec::new()) };
        let writes: Vec<Write> = self.ledger().acknowledged(service).cloned().collect();
        let from = host(region.prefix, CLIENTS_FIRST);
        let read = async |network: &NetworkId, vip: Ipv4Addr| {
            let mut unread = Vec::new();
            for write in &writes {
                let task = Task::Read(write.clone());
                let mut last = Ok(());
                for _ in 0..LAST_READS {
                    last = self.judge(
                        &task,
                        network,
                        exchange(self.ask(traffic, &task, SocketAddrV4::new(vip, traffic.port), from)).await,
                    );
                    if last.is_ok() {
                        break;
                    }
                }
                if let Err(reason) = last {
                    self.ledger().read(write, network, false);
                    unread.push(format!("{} through {network}: {reason}", write.id));
                }
            }
            unread
        };
        region.namespace.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let mut unread = Vec::new();
                for (network, vip) in networks {
                    unread.extend(read(network, *vip).await);
                }
                Ok(unread)
            })
        })?
    }
}

/// What one request does.
enum Task {
    Get(String),
    Write(Write),
    Read(Write),
}

/// 24 hex digits.
fn random_hex() -> anyhow::Result<String> {
    let mut random = [0_u8; 12];
    getrandom::fill(&mut random).map_err(|e| anyhow::anyhow!("no random numbers: {e}"))?;
    Ok(random.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmatrix_model::Time;

    fn scenario() -> Scenario {
        Scenario::read(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../library/flash-crowd.toml")))
            .unwrap()
    }

    #[test]
    fn a_resolver_asks_the_nearest_edge_first() {
        let fleet = scenario().fleet;
        let seoul = regions(&fleet, str::to_owned).into_iter().find(|r| r.name.as_str() == "seoul").unwrap();
        assert_eq!(*seoul.servers[0].ip(), Ipv4Addr::new(198, 19, 3, 1), "tokyo");
        assert_eq!(seoul.servers.len(), fleet.networks.len());
    }

    #[test]
    fn a_write_is_acknowledged_once_answered_and_then_read_back() {
        let scenario = scenario();
        let clients = Clients::of(&scenario).unwrap();
        let service: ServiceId = "agenda".parse().unwrap();
        let network: NetworkId = "ashburn".parse().unwrap();
        let arrival =
            |number| Arrival { at: Time(0), service: service.clone(), region: "berlin".parse().unwrap(), number };
        let traffic = &clients.traffic[&service];
        let write = clients.task(traffic, &arrival(0), &network);
        assert!(clients.judge(&write, &network, Ok(Answer { status: 500, body: "".into() })).is_err());
        assert_eq!(clients.ledger().writes(), 0);
        let ask = clients.ask(traffic, &write, "198.19.1.101:443".parse().unwrap(), Ipv4Addr::LOCALHOST);
        let body = ask.put.unwrap().1;
        assert!(body.contains(&clients.canary) && !body.contains("{id}"), "{body}");
        assert!(clients.judge(&write, &network, Ok(Answer { status: 201, body: "".into() })).is_ok());
        let read = clients.task(traffic, &arrival(1), &network);
        assert!(matches!(read, Task::Read(_)));
        assert!(clients.judge(&read, &network, Ok(Answer { status: 200, body: body.into() })).is_ok());
        assert_eq!(clients.ledger().writes(), 1);
        assert_eq!(clients.ledger().lost(), 0);
        assert!(clients.judge(&read, &network, Ok(Answer { status: 200, body: "something else".into() })).is_err());
        assert_eq!(clients.ledger().lost(), 1);
    }
}
