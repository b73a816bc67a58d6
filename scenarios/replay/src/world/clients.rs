//! Simulated clients: they resolve as resolvers do, connect, ask, and wait for the last byte.
//!
//! ```text
//! Arrival ─▶ Resolve ─▶ Syn ─▶ Reach ──────▶ Send ─▶ Answered     took = Answered - first Syn sent
//!            cache, TTL  edge   guest, database  link
//! ```
//!
//! Response time = 2 round trips (3 with TLS) + the rounds that slow start adds + the packets on the
//! link + waiting for the guest + its answer + round trips to the database (paper §5.1).

use super::edge::Target;
use super::machine::first_client;
use super::{Happening, World, half};
use crate::arrivals::Arrival;
use crate::chance::Chance;
use crate::recording::Request;
use crate::scenario::Traffic;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use vmatrix_model::fleet::{Link, Service};
use vmatrix_model::{Bytes, Mbit, NetworkId, RegionId, ServiceId, SiteId, Span, Time};

/// A full packet on the wire, and what it carries.
const PACKET: u64 = 1500;
/// Packets that a connection may send before the first acknowledgement (RFC 6928).
const WINDOW_FIRST: u32 = 10;
/// A client gives up after so many unanswered first packets, the pauses doubling from a second.
const SYNS_MAX: u32 = 4;
/// A resolver gives up after so many rounds of all name servers, a second apart.
const RESOLVES_MAX: u32 = 5;
/// A request that needs the origin while it is away is tried again each second, so often.
const ORIGIN_TRIES_MAX: u32 = 30;
const SECOND: Span = Span::secs(1);

/// A request under way.
pub struct Asked {
    service: ServiceId,
    region: RegionId,
    number: u64,
    /// The public address its resolver gave.
    vip: Ipv4Addr,
    /// When its first packet left.
    sent: Time,
    /// To where it is answered, once connected: the whole way there and back.
    rtt: Span,
    /// The network whose public address was asked.
    entry: Option<NetworkId>,
    guest: Option<Guest>,
    origin_tries: u32,
}

/// Who answers a request.
#[derive(Clone)]
struct Guest {
    network: NetworkId,
    cell: Ipv4Addr,
    /// Which life of the guest there.
    resumed: Time,
}

/// What lies between clients and edges: the regions' resolvers and the links.
#[derive(Default)]
pub struct Between {
    /// Bounded by regions times services.
    cache: BTreeMap<(RegionId, ServiceId), (Ipv4Addr, Time)>,
    /// When each link's direction to a region is free again.
    wires: BTreeMap<(NetworkId, RegionId), Time>,
    /// What chance does to the packets on it.
    losses: BTreeMap<(NetworkId, RegionId), Chance>,
}

impl World {
    pub(super) fn arrive(&mut self, index: usize) {
        let Some(Arrival { service, region, number, .. }) = self.arrivals.get(index).cloned() else { return };
        let asked = Asked {
            service,
            region,
            number,
            vip: Ipv4Addr::UNSPECIFIED,
            sent: self.now,
            rtt: Span::ZERO,
            entry: None,
            guest: None,
            origin_tries: 0,
        };
        self.asked.insert(index as u64, asked);
        self.resolve(index as u64, 1);
    }

    /// Takes the answer from the cache, or asks the name servers from the nearest on.
    pub(super) fn resolve(&mut self, id: u64, attempt: u32) {
        let Some(asked) = self.asked.get(&id) else { return };
        let key = (asked.region.clone(), asked.service.clone());
        if let Some((vip, _)) = self.between.cache.get(&key).filter(|(_, until)| *until > self.now) {
            let vip = *vip;
            return self.send(id, vip, Span::ZERO);
        }
        let Some(region) = self.scenario.fleet.region(&key.0) else { return };
        let resolver = first_client(region.prefix);
        let here = SiteId::from(&key.0);
        let mut servers: Vec<(Span, &NetworkId)> =
            self.sites.keys().map(|n| (self.scenario.fleet.rtt(&here, &SiteId::from(n)), n)).collect();
        servers.sort();
        let mut waited = Span::ZERO;
        for (rtt, network) in servers {
            // A server that is away is not silent: its host says that the port is closed.
            waited += rtt;
            let Some(edge) = self.sites.get(network).map(|s| &s.edge).filter(|e| e.up) else { continue };
            let Some((vip, ttl_s)) = edge.resolve(&key.1, resolver) else {
                self.record.empty_answer(network, &key.1);
                continue;
            };
            let kept = Span::secs(u64::from(ttl_s.max(self.scenario.resolver_ttl_s)));
            self.between.cache.insert(key, (vip, self.now + waited + kept));
            return self.send(id, vip, waited);
        }
        if attempt >= RESOLVES_MAX {
            return self.end(id, Some("no name server answered".into()));
        }
        self.after(SECOND, Happening::Resolve { asked: id, attempt: attempt + 1 });
    }

    /// Sends the first packet of the connection after `wait`.
    fn send(&mut self, id: u64, vip: Ipv4Addr, wait: Span) {
        let entry = self.scenario.fleet.networks.iter().find(|n| n.prefix.contains(&vip)).map(|n| n.name.clone());
        let Some(asked) = self.asked.get_mut(&id) else { return };
        asked.vip = vip;
        asked.sent = self.now + wait;
        asked.entry = entry.clone();
        let Some(entry) = entry else { return self.end(id, Some(format!("{vip} belongs to no network"))) };
        let there = self.scenario.fleet.rtt(&SiteId::from(&asked.region), &SiteId::from(&entry));
        self.after(wait + half(there), Happening::Syn { asked: id, attempt: 1 });
    }

    /// The edge chooses a cell, or sends the connection on to a network that has one.
    pub(super) fn connect(&mut self, id: u64, attempt: u32) {
        let Some(asked) = self.asked.get(&id) else { return };
        let Some(region) = self.scenario.fleet.region(&asked.region) else { return };
        let Some(traffic) = self.traffic(&asked.service) else { return };
        let (port, tls) = (traffic.port, traffic.tls);
        let mut client = first_client(region.prefix);
        let (mut vip, mut here) = (asked.vip, SiteId::from(&asked.region));
        let mut rtt = Span::ZERO;
        let mut guest = None;
        // One network may send it on to another, never further: a second hop would be a loop.
        for _ in 0..2 {
            let Some(network) = self.scenario.fleet.networks.iter().find(|n| n.prefix.contains(&vip)) else { break };
            let Some(site) = self.sites.get_mut(&network.name) else { break };
            rtt += self.scenario.fleet.rtt(&here, &SiteId::from(&network.name));
            match site.edge.connect(client, vip, port) {
                Some(Target::Cell(cell)) => {
                    let resumed = site.machines.iter_mut().find_map(|m| m.cell_at(cell)).map(|c| c.resume_began);
                    guest = resumed.map(|resumed| Guest { network: network.name.clone(), cell, resumed });
                    break;
                }
                Some(Target::Elsewhere(other)) => {
                    here = SiteId::from(&network.name);
                    client = self.scenario.fleet.gateway(&here).unwrap_or(client);
                    vip = other;
                }
                None => break,
            }
        }
        let Some(guest) = guest else {
            if attempt >= SYNS_MAX {
                return self.end(id, Some("connection timed out: nothing serves there".into()));
            }
            return self.after(SECOND.times(1 << (attempt - 1)), Happening::Syn { asked: id, attempt: attempt + 1 });
        };
        let Some(asked) = self.asked.get_mut(&id) else { return };
        let entry_rtt = asked
            .entry
            .as_ref()
            .map_or(Span::ZERO, |e| self.scenario.fleet.rtt(&SiteId::from(&asked.region), &SiteId::from(e)));
        asked.rtt = rtt;
        asked.guest = Some(guest);
        // The first packet has its way to the first edge behind it: what is left of the handshake, the
        // one of TLS, and the way of the request.
        let handshake = rtt - half(entry_rtt) + if tls { rtt } else { Span::ZERO };
        self.after(handshake + half(rtt), Happening::Reach { asked: id });
    }

    /// The guest works on it, perhaps with its database.
    pub(super) fn reach(&mut self, id: u64) {
        let Some(asked) = self.asked.get_mut(&id) else { return };
        let Some(guest) = asked.guest.clone() else { return };
        let Some(service) = self.scenario.fleet.service(&asked.service) else { return };
        let mut ready = self.now;
        if let Some(backend) = &service.backend {
            if !self.origin_up {
                asked.origin_tries += 1;
                if asked.origin_tries > ORIGIN_TRIES_MAX {
                    return self.end(id, Some("the database was not reached".into()));
                }
                return self.after(SECOND, Happening::Reach { asked: id });
            }
            let to_database = self.scenario.fleet.rtt(&SiteId::from(&guest.network), &self.scenario.fleet.origin.name);
            ready = ready + to_database.times(u64::from(backend.round_trips));
        }
        let cells = self.sites.get_mut(&guest.network).into_iter().flat_map(|s| &mut s.machines);
        let cell = cells.filter_map(|m| m.cell_at(guest.cell)).find(|c| c.answers() && c.resume_began == guest.resumed);
        let Some(cell) = cell else { return self.end(id, Some("connection reset: the instance went away".into())) };
        ready = ready + cell.work(self.now, service.profile.answer_ms).since(self.now);
        if self.is_write(id) {
            self.written.insert(id);
        }
        self.queue.put(ready, Happening::Send { asked: id });
    }

    /// The answer goes onto the link behind those before it.
    pub(super) fn send_answer(&mut self, id: u64) {
        let Some(asked) = self.asked.get(&id) else { return };
        let Some(service) = self.scenario.fleet.service(&asked.service).cloned() else { return };
        let Some(entry) = asked.entry.clone() else { return };
        let (rtt, region) = (asked.rtt, asked.region.clone());
        let link = self.scenario.fleet.link(&SiteId::from(&entry), &SiteId::from(&region));
        let rounds = slow_start_rounds(service.response_packets) + self.lost((&entry, &region), &link, &service);
        let sent = self.put_on_wire((entry, region), &link, &service);
        self.queue.put(sent + rtt.times(u64::from(rounds)) + half(rtt), Happening::Answered { asked: id });
    }

    /// When the last packet of the answer leaves a link on which answers follow one another.
    fn put_on_wire(&mut self, direction: (NetworkId, RegionId), link: &Link, service: &Service) -> Time {
        let free = self.between.wires.entry(direction).or_default();
        *free = (*free).max(self.now) + link.rate().max(Mbit(1)).time_for(bytes(service));
        *free
    }

    /// Packets of an answer that are lost and sent again, each a round trip later.
    fn lost(&mut self, (from, to): (&NetworkId, &RegionId), link: &Link, service: &Service) -> u32 {
        if link.loss_ppm == 0 {
            return 0;
        }
        let fresh = || Chance::named(self.scenario.seed, &["loss", from.as_str(), to.as_str()]);
        let chance = self.between.losses.entry((from.clone(), to.clone())).or_insert_with(fresh);
        (0..service.response_packets).filter(|_| chance.under(1_000_000) < u64::from(link.loss_ppm)).count() as u32
    }

    pub(super) fn answered(&mut self, id: u64) {
        let Some(asked) = self.asked.get(&id) else { return };
        let Some(guest) = asked.guest.clone() else { return };
        let size = self.scenario.fleet.service(&asked.service).map_or(Bytes(0), bytes);
        let client = self.scenario.fleet.region(&asked.region).map(|r| first_client(r.prefix));
        let vip = asked.vip;
        let cells = self.sites.get_mut(&guest.network).into_iter().flat_map(|s| &mut s.machines);
        let alive = cells.filter_map(|m| m.cell_at(guest.cell)).any(|c| c.answers() && c.resume_began == guest.resumed);
        if !alive {
            return self.end(id, Some("connection reset: the instance went away".into()));
        }
        if let Some((client, entry)) = client.zip(asked.entry.as_ref().and_then(|n| self.sites.get_mut(n))) {
            entry.edge.count_bytes(client, vip, size);
        }
        if self.is_write(id) {
            self.acknowledged.insert(id);
        }
        self.end(id, None);
    }

    /// Closes the connection and writes down how it went.
    pub(super) fn end(&mut self, id: u64, failed: Option<String>) {
        let Some(asked) = self.asked.remove(&id) else { return };
        if let Some(guest) = &asked.guest
            && let Some(site) = self.sites.get_mut(&guest.network)
        {
            site.edge.disconnect(guest.cell);
        }
        let began = self.began.unwrap_or_default();
        self.record.request(Request {
            at: Time(asked.sent.since(began).0),
            service: asked.service,
            region: asked.region,
            network: asked.entry.filter(|_| failed.is_none()),
            took: self.now.since(asked.sent),
            failed,
        });
    }

    fn traffic(&self, service: &ServiceId) -> Option<&Traffic> {
        self.scenario.traffic.iter().find(|t| t.service == *service)
    }

    /// Whether a request stores something: writes, reads back and paths to get take turns, as in the lab.
    fn is_write(&self, id: u64) -> bool {
        let Some(asked) = self.asked.get(&id) else { return false };
        let traffic = self.traffic(&asked.service).filter(|t| t.write.is_some());
        traffic.is_some_and(|t| asked.number % (2 + u64::from(!t.get.is_empty())) == 0)
    }
}

fn bytes(service: &Service) -> Bytes {
    Bytes(u64::from(service.response_packets) * PACKET)
}

/// Round trips that slow start adds to an answer of so many packets: the window doubles with each.
fn slow_start_rounds(packets: u32) -> u32 {
    let (mut window, mut sent, mut rounds) = (WINDOW_FIRST, WINDOW_FIRST, 0);
    while sent < packets {
        window = window.saturating_mul(2);
        sent = sent.saturating_add(window);
        rounds += 1;
    }
    rounds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_start_sends_ten_then_twenty_then_forty() {
        assert_eq!([1, 10, 11, 30, 31, 70, 71].map(slow_start_rounds), [0, 0, 1, 1, 2, 2, 3]);
    }
}
