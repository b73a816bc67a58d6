//! The paper's section 5 as functions: one formula, one function, one section.
//!
//! Whole numbers throughout: times in microseconds, money in millionths of a dollar, rates in
//! thousandths of a request a second. A price is always an hour's price.

use crate::forecast::MilliRps;
use vmatrix_model::fleet::{Link, Network, Service};
use vmatrix_model::{Bytes, MicroUsd, Span, Time};

/// Bytes of a full packet's payload on an ordinary path: 1500 less IP, TCP and timestamps.
pub const PACKET: u64 = 1448;
/// Packets a fresh connection may send before the first acknowledgement (RFC 6928).
const INITIAL_WINDOW: u32 = 10;
/// Response time charged for a request beyond what the instances can answer: it waits until people give up.
pub const OVERLOADED: Span = Span::secs(10);

/// The square root of a loss probability, in thousandths: √(ppm / 10^6) · 1000.
///
/// A link said to lose nothing counts as losing one packet in a million. The formulas only ever compare links, so
/// what is the same for all cancels, and nothing is divided by zero.
pub fn sqrt_loss(loss_ppm: u32) -> u64 {
    u64::from(loss_ppm).isqrt().max(1)
}

/// N · RTT · √p, the part of the response time that grows with loss, microseconds (paper §5.1, R ≥ k·N·RTT·√p, k = 1).
pub fn loss_term(packets: u32, link: &Link) -> Span {
    let rtt = Span::ms(u64::from(link.rtt_ms));
    Span(rtt.0.saturating_mul(u64::from(packets)).saturating_mul(u64::from(link.loss_ppm).isqrt()) / 1000)
}

/// The condition under which moving a front end away from its back end shortens responses (paper §5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TwoTier {
    /// N_C / N_B in thousandths: packets to the back end for each packet to the client.
    pub ratio: i64,
    /// (RTT_A·√p_A − RTT_B·√p_B) / (RTT_C·√p_C) in thousandths: the ratio must lie below it.
    pub limit: i64,
}

impl TwoTier {
    /// Whether moving pays.
    pub fn holds(self) -> bool {
        self.ratio < self.limit
    }
}

/// N_C / N_B < (RTT_A·√p_A − RTT_B·√p_B) / (RTT_C·√p_C) (paper §5.1): A joins clients and the present place, B
/// clients and the new place, C the new place and the back end.
pub fn two_tier(packets_c: u32, packets_b: u32, a: &Link, b: &Link, c: &Link) -> TwoTier {
    let weight = |l: &Link| i64::from(l.rtt_ms).saturating_mul(sqrt_loss(l.loss_ppm) as i64);
    TwoTier {
        ratio: i64::from(packets_c) * 1000 / i64::from(packets_b.max(1)),
        limit: (weight(a) - weight(b)).saturating_mul(1000) / weight(c).max(1),
    }
}

/// Round trips in which slow start delivers so many packets, beginning with ten (RFC 6928): 1 up to 10, 2 up to 30, 3 up to 70.
pub fn slow_start_rounds(packets: u32) -> u64 {
    let (mut sent, mut window, mut rounds) = (u64::from(INITIAL_WINDOW), u64::from(INITIAL_WINDOW), 1);
    while sent < u64::from(packets) {
        window *= 2;
        sent += window;
        rounds += 1;
    }
    rounds
}

/// From the first packet of a new connection to the last byte of the answer, on an idle instance.
///
/// One round trip to connect, then as many as slow start needs for the answer (the first carries the
/// request), the loss term of §5.1, the instance's own time, and over connection C every round trip
/// the application makes to its back end, one after the other.
pub fn response_time(service: &Service, client: &Link, origin: &Link) -> Span {
    let rtt = Span::ms(u64::from(client.rtt_ms));
    let to_client =
        rtt.times(1 + slow_start_rounds(service.response_packets)) + loss_term(service.response_packets, client);
    let to_backend = service.backend.as_ref().map_or(Span::ZERO, |b| {
        Span::ms(u64::from(origin.rtt_ms)).times(u64::from(b.round_trips)) + loss_term(b.packets, origin)
    });
    to_client + Span::ms(u64::from(service.profile.answer_ms)) + to_backend
}

/// Thousandths of a request a second, as requests an hour.
pub fn per_hour(rate: MilliRps) -> u64 {
    rate.saturating_mul(36) / 10
}

/// What an hour of requests at `rate` that each take `response` costs, at the service's price of a second (paper §5.1).
pub fn latency_price(service: &Service, rate: MilliRps, response: Span) -> MicroUsd {
    let value =
        i128::from(per_hour(rate)) * i128::from(response.0) * i128::from(service.latency_second_microusd.0) / 1_000_000;
    MicroUsd(i64::try_from(value).unwrap_or(i64::MAX))
}

/// What an hour of requests that no instance has room for costs.
pub fn overload_price(service: &Service, rate: MilliRps) -> MicroUsd {
    latency_price(service, rate, OVERLOADED)
}

/// What `instances` cost for an hour that begins at `now`, at the tariff of that hour of the day (paper §6.1.3, input 5).
pub fn instance_price(network: &Network, now: Time, instances: u32) -> MicroUsd {
    let percent = network.tariff_percent.get(now.hour()).copied().unwrap_or(100);
    MicroUsd(
        network.instance_hour_microusd.0.saturating_mul(i64::from(percent)).saturating_mul(i64::from(instances)) / 100,
    )
}

/// Bytes sent for requests at `rate` over `span`, to clients and to the back end (paper §5.4).
pub fn bytes_served(service: &Service, rate: MilliRps, span: Span) -> Bytes {
    let packets = u64::from(service.response_packets) + service.backend.as_ref().map_or(0, |b| u64::from(b.packets));
    let bytes = u128::from(rate) * u128::from(span.0) * u128::from(packets * PACKET) / 1_000_000_000;
    Bytes(u64::try_from(bytes).unwrap_or(u64::MAX))
}

/// What sending `bytes` out of `network` costs (paper §5.4).
pub fn traffic_price(network: &Network, bytes: Bytes) -> MicroUsd {
    let value = i128::from(bytes.0) * i128::from(network.egress_gb_microusd.0) / 1_000_000_000;
    MicroUsd(i64::try_from(value).unwrap_or(i64::MAX))
}

/// What keeping `bytes` of a dormant image in `network` costs an hour (paper §6.1.3).
pub fn storage_price(network: &Network, bytes: Bytes) -> MicroUsd {
    let value = i128::from(bytes.0) * i128::from(network.storage_gb_hour_microusd.0) / 1_000_000_000;
    MicroUsd(i64::try_from(value).unwrap_or(i64::MAX))
}

/// How long serving at `rate` from the new place takes to outweigh the image bytes that had to travel there (paper
/// §5.4: a move saves bandwidth once the bytes served exceed the image's size); none if nothing is served.
pub fn outweighs_after(service: &Service, image: Bytes, rate: MilliRps) -> Option<Span> {
    let hour = bytes_served(service, rate, Span::secs(3600)).0;
    let us = (u128::from(image.0) * 3_600_000_000).checked_div(u128::from(hour))?;
    Some(Span(u64::try_from(us).unwrap_or(u64::MAX)))
}

/// How long `bytes` travel over a link: its rate, and one round trip to begin (paper §5.4).
pub fn transfer_time(bytes: Bytes, link: &Link) -> Span {
    if bytes.0 == 0 { Span::ZERO } else { link.rate().time_for(bytes) + Span::ms(u64::from(link.rtt_ms)) }
}

/// Instances that answer `rate` within the objective, one at least, and no more than the service may have in a network.
pub fn instances_for(service: &Service, rate: MilliRps) -> u32 {
    let needed = rate.div_ceil(u64::from(service.instance_rps.max(1)) * 1000).max(1);
    u32::try_from(needed).unwrap_or(u32::MAX).min(service.instances_max.max(1))
}

/// The part of `rate` that `instances` cannot answer within the objective.
pub fn beyond(service: &Service, rate: MilliRps, instances: u32) -> MilliRps {
    rate.saturating_sub(u64::from(service.instance_rps) * u64::from(instances) * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(rtt_ms: u32, loss_ppm: u32) -> Link {
        Link {
            between: ["a".to_owned().try_into().unwrap(), "b".to_owned().try_into().unwrap()],
            rtt_ms,
            mbit: 100,
            loss_ppm,
            queue_ms: 0,
        }
    }

    #[test]
    fn beside_the_user_the_condition_becomes_nc_below_nb() {
        // B negligible, C equal to A: the paper's simplified case.
        let (a, b, c) = (link(200, 100), link(0, 100), link(200, 100));
        assert!(two_tier(9, 10, &a, &b, &c).holds());
        assert!(!two_tier(10, 10, &a, &b, &c).holds());
        assert!(!two_tier(40, 8, &a, &b, &c).holds());
    }

    #[test]
    fn a_place_farther_from_the_users_never_pays() {
        assert!(!two_tier(0, 10, &link(20, 0), &link(100, 0), &link(10, 0)).holds());
    }

    #[test]
    fn loss_weighs_as_its_square_root() {
        assert_eq!(loss_term(10, &link(100, 40_000)).0, 2 * loss_term(10, &link(100, 10_000)).0);
        assert_eq!(loss_term(10, &link(100, 0)), Span::ZERO);
    }

    #[test]
    fn ten_packets_take_one_round_and_eleven_two() {
        assert_eq!([1, 10, 11, 30, 31, 70, 71].map(slow_start_rounds), [1, 1, 2, 2, 3, 3, 4]);
    }

    #[test]
    fn the_papers_image_saves_bytes_only_once_it_has_served_more() {
        let fleet = crate::cpa::testing::fleet();
        let maps = &fleet.services[0];
        let image = Bytes(4_000_000_000);
        let break_even = outweighs_after(maps, image, 4_000).unwrap();
        assert!(bytes_served(maps, 4_000, break_even).0.abs_diff(image.0) < 100_000);
        assert_eq!(outweighs_after(maps, image, 0), None);
    }
}
