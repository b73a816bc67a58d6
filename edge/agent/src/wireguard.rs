//! One WireGuard session: packets in, datagrams out, and the other way round. No socket, no device.
//!
//! ```text
//! seal(packet) ─▶ datagram for the peer           (or nothing yet: it waits for the handshake)
//! open(datagram) ─▶ datagrams for the peer, packets for the device
//! tick() ─▶ handshakes, keepalives                (every 250 ms)
//! ```
//!
//! Whatever cannot be sealed is dropped. Nothing here can send plaintext.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

/// Largest packet the tunnel carries: 1500 less IPv6, UDP and WireGuard headers, and a multiple of 16.
pub const MTU: u16 = 1420;

/// Room for a packet and what sealing adds to it (32 bytes), or a handshake (148).
const BUFFER: usize = 65_536;

/// Keeps the way back open: connection tracking forgets a UDP flow after 30 s.
const KEEPALIVE_S: u16 = 15;

/// When keys should be renewed and when they end (WireGuard's REKEY- and REJECT-AFTER-TIME). The
/// protocol renews them only where data flows; an idle tunnel would be down when it is needed.
const KEYS_AGE: Duration = Duration::from_secs(120);
const KEYS_END: Duration = Duration::from_secs(180);

/// A secret key and its public half.
#[derive(Clone)]
pub struct KeyPair {
    secret: StaticSecret,
    /// What others know it by.
    pub public: [u8; 32],
}

impl KeyPair {
    /// Makes a key from the system's randomness.
    ///
    /// # Errors
    /// The system gives none.
    pub fn generate() -> anyhow::Result<KeyPair> {
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("cannot get randomness for a key: {e}"))?;
        Ok(KeyPair::from_secret(bytes))
    }

    /// The pair that belongs to a secret key.
    pub fn from_secret(bytes: [u8; 32]) -> KeyPair {
        let secret = StaticSecret::from(bytes);
        let public = PublicKey::from(&secret).to_bytes();
        KeyPair { secret, public }
    }

    /// The secret key, to be kept where only its owner reads.
    pub fn secret_bytes(&self) -> [u8; 32] {
        self.secret.to_bytes()
    }

    /// The secret key, to open handshakes with.
    pub fn secret(&self) -> &StaticSecret {
        &self.secret
    }
}

/// A key as text.
pub fn to_base64(key: &[u8; 32]) -> String {
    STANDARD.encode(key)
}

/// A key from its text; none if it is not 32 bytes of base64.
pub fn from_base64(text: &str) -> Option<[u8; 32]> {
    if text.len() > 64 {
        return None;
    }
    STANDARD.decode(text).ok()?.try_into().ok()
}

/// What opening a datagram gives, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Out {
    /// To be sent to the peer.
    Datagram(Vec<u8>),
    /// An IPv4 packet from the peer, and the source it claims.
    Packet(Vec<u8>, Ipv4Addr),
}

/// A session with one peer.
pub struct Session {
    own: KeyPair,
    peer: [u8; 32],
    index: u32,
    limiter: Option<Arc<RateLimiter>>,
    tunn: Tunn,
    buffer: Box<[u8]>,
}

impl Session {
    /// A session of `own` key with `peer`; `index` (24 bits) tells it from the others of this process.
    pub fn new(own: &KeyPair, peer: [u8; 32], index: u32, limiter: Option<Arc<RateLimiter>>) -> Session {
        let tunn = fresh(own, peer, index, limiter.clone());
        Session { own: own.clone(), peer, index, limiter, tunn, buffer: vec![0; BUFFER].into() }
    }

    /// Seals `packet`; without a session it waits (256 packets at most) and a handshake begins.
    pub fn seal(&mut self, packet: &[u8]) -> Option<Vec<u8>> {
        if packet.len() + 32 > BUFFER {
            return None;
        }
        datagram(self.tunn.encapsulate(packet, &mut self.buffer))
    }

    /// Opens a datagram that came from `from`; nothing if it is not this peer's.
    pub fn open(&mut self, from: IpAddr, datagram: &[u8]) -> Option<Vec<Out>> {
        let mut out = Vec::new();
        let mut input = datagram;
        loop {
            match self.tunn.decapsulate(Some(from), input, &mut self.buffer) {
                TunnResult::WriteToNetwork(d) => {
                    out.push(Out::Datagram(d.to_vec()));
                    // Asked again with nothing, it gives what waited for the handshake.
                    input = &[];
                }
                TunnResult::WriteToTunnelV4(p, source) => {
                    out.push(Out::Packet(p.to_vec(), source));
                    return Some(out);
                }
                TunnResult::Err(_) if out.is_empty() => return None,
                // IPv6 has no address in the intranet.
                TunnResult::WriteToTunnelV6(..) | TunnResult::Done | TunnResult::Err(_) => return Some(out),
            }
        }
    }

    /// Lets time pass.
    pub fn tick(&mut self) -> Option<Vec<u8>> {
        if self.tunn.is_expired() {
            self.begin_anew();
        }
        datagram(self.tunn.update_timers(&mut self.buffer))
    }

    /// Begins a handshake now.
    pub fn shake_hands(&mut self) -> Option<Vec<u8>> {
        datagram(self.tunn.format_handshake_initiation(&mut self.buffer, true))
    }

    /// Forgets what was agreed on.
    pub fn begin_anew(&mut self) {
        self.tunn = fresh(&self.own, self.peer, self.index, self.limiter.clone());
    }

    /// Whether both sides have agreed on keys that are still good.
    pub fn is_ready(&self) -> bool {
        self.tunn.time_since_last_handshake().is_some_and(|age| age < KEYS_END)
    }

    /// Whether the keys are so old that new ones should be agreed on while they still work.
    pub fn is_aging(&self) -> bool {
        self.tunn.time_since_last_handshake().is_some_and(|age| age >= KEYS_AGE)
    }
}

fn fresh(own: &KeyPair, peer: [u8; 32], index: u32, limiter: Option<Arc<RateLimiter>>) -> Tunn {
    Tunn::new(own.secret.clone(), PublicKey::from(peer), None, Some(KEEPALIVE_S), index, limiter)
}

fn datagram(result: TunnResult<'_>) -> Option<Vec<u8>> {
    if let TunnResult::WriteToNetwork(d) = result { Some(d.to_vec()) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    /// A minimal IPv4 packet from `source`, holding `text`.
    fn packet(source: [u8; 4], text: &[u8]) -> Vec<u8> {
        let mut p = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
        p.extend(source);
        p.extend([172, 21, 162, 20]);
        p.extend(text);
        let length = u16::try_from(p.len()).unwrap().to_be_bytes();
        p[2..4].copy_from_slice(&length);
        p
    }

    fn pair() -> (Session, Session) {
        let (a, b) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        (Session::new(&a, b.public, 1, None), Session::new(&b, a.public, 2, None))
    }

    /// Carries datagrams to and fro until both are quiet; what came out as packets.
    fn carry(first: Vec<u8>, cell: &mut Session, gateway: &mut Session) -> Vec<Vec<u8>> {
        let (mut packets, mut waiting) = (Vec::new(), vec![(true, first)]);
        while let Some((to_gateway, datagram)) = waiting.pop() {
            let receiver = if to_gateway { &mut *gateway } else { &mut *cell };
            for out in receiver.open(HERE, &datagram).unwrap_or_default() {
                match out {
                    Out::Datagram(d) => waiting.insert(0, (!to_gateway, d)),
                    Out::Packet(p, _) => packets.push(p),
                }
            }
        }
        packets
    }

    #[test]
    fn what_was_sent_before_the_handshake_arrives_after_it_and_never_in_the_clear() {
        let (mut cell, mut gateway) = pair();
        let sent = packet([172, 21, 162, 130], b"canary");
        let first = cell.seal(&sent).unwrap();
        assert!(!first.windows(6).any(|w| w == b"canary"));
        assert!(!cell.is_ready());
        assert_eq!(carry(first, &mut cell, &mut gateway), [sent]);
        assert!(cell.is_ready());
    }

    #[test]
    fn a_gateway_that_forgot_everything_is_reached_after_a_new_handshake() {
        let (mut cell, mut gateway) = pair();
        let hello = cell.shake_hands().unwrap();
        carry(hello, &mut cell, &mut gateway);
        gateway.begin_anew();
        let sent = packet([172, 21, 162, 130], b"again");
        let lost = cell.seal(&sent).unwrap();
        assert_eq!(carry(lost, &mut cell, &mut gateway), Vec::<Vec<u8>>::new());
        let hello = cell.shake_hands().unwrap();
        carry(hello, &mut cell, &mut gateway);
        let now = cell.seal(&sent).unwrap();
        assert_eq!(carry(now, &mut cell, &mut gateway), [sent]);
    }

    #[test]
    fn a_stranger_is_not_understood() {
        let (mut cell, _) = pair();
        let (_, mut other) = pair();
        let hello = cell.shake_hands().unwrap();
        assert_eq!(other.open(HERE, &hello), None);
        assert_eq!(other.open(HERE, b"noise"), None);
    }

    #[test]
    fn a_key_survives_its_text_form() {
        let key = KeyPair::generate().unwrap();
        assert_eq!(from_base64(&to_base64(&key.public)), Some(key.public));
        assert_eq!(from_base64("c2hvcnQ="), None);
        assert_eq!(from_base64(&"A".repeat(100)), None);
    }
}
