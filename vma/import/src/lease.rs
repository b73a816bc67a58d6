//! An address for a guest that asks for one by DHCP: the one it has wherever it is resumed, for ever.
//!
//! ```text
//! discover ─▶ offer    request ─▶ ack        (from the guest's own interface; everything else: silence)
//! ```
//! A guest without cloud-init most often asks. The lease never ends, so that after a resume, where nobody answers,
//! nobody is asked.

use crate::error::{Result, io};
use nix::sys::socket::{setsockopt, sockopt::BindToDevice};
use std::ffi::OsString;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use vmatrix_model::manifest::GuestSpec;
use vmatrix_vma_image::netns;

/// Longest packet that is read; clients send some 300 bytes.
const PACKET_MAX: usize = 1500;
/// How long the end waits for the thread to notice.
const LOOK: Duration = Duration::from_millis(200);
/// Where the options begin, after this mark.
const OPTIONS: usize = 240;
const MARK: [u8; 4] = [99, 130, 83, 99];
/// Most options that are looked through.
const OPTIONS_MAX: usize = 64;
/// Kinds of options and messages.
const KIND: u8 = 53;
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const END: u8 = 255;

/// A server that answers one guest, for as long as this is held.
#[derive(Debug)]
pub(crate) struct Lease {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Lease {
    /// Starts it on `device` in the namespace.
    pub(crate) fn serve(namespace: &Path, device: &str, guest: &GuestSpec) -> Result<Lease> {
        let device = OsString::from(device);
        let open = || -> std::io::Result<UdpSocket> {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 67))?;
            // There is no route to everybody; by this interface there is.
            setsockopt(&socket, BindToDevice, &device)?;
            socket.set_broadcast(true)?;
            socket.set_read_timeout(Some(LOOK))?;
            Ok(socket)
        };
        let socket = netns::enter(namespace, open)?.map_err(io("answer DHCP in", namespace))?;
        let (over, guest) = (Arc::new(AtomicBool::new(false)), guest.clone());
        let until = over.clone();
        let thread = std::thread::spawn(move || {
            let mut packet = [0; PACKET_MAX];
            while !until.load(Ordering::Relaxed) {
                // Nothing came, or something that cannot be answered: the guest asks again.
                let Ok((length, _)) = socket.recv_from(&mut packet) else { continue };
                if let Some(answer) = packet.get(..length).and_then(|p| answer(p, &guest)) {
                    let _ = socket.send_to(&answer, (Ipv4Addr::BROADCAST, 68));
                }
            }
        });
        Ok(Lease { over, thread: Some(thread) })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It never panics: there is nothing in it that could.
            let _ = thread.join();
        }
    }
}

/// What is answered, if anything.
fn answer(packet: &[u8], guest: &GuestSpec) -> Option<Vec<u8>> {
    let mac: Vec<u8> = guest.mac.split(':').filter_map(|pair| u8::from_str_radix(pair, 16).ok()).collect();
    let is_ours = packet.get(..3)? == [1, 1, 6] && packet.get(28..34)? == mac && packet.get(236..OPTIONS)? == MARK;
    let kind = match option(packet.get(OPTIONS..)?, KIND)? {
        [DISCOVER] if is_ours => OFFER,
        [REQUEST] if is_ours => ACK,
        _ => return None,
    };
    let (address, gateway) = (guest.address.octets(), guest.gateway.octets());
    let mut out = vec![2, 1, 6, 0];
    // The number of the exchange; seconds; flags; the client's old address.
    out.extend_from_slice(packet.get(4..8)?);
    out.extend_from_slice(&[0, 0, 0x80, 0, 0, 0, 0, 0]);
    out.extend_from_slice(&address);
    out.extend_from_slice(&gateway);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(packet.get(28..44)?);
    out.resize(236, 0);
    out.extend_from_slice(&MARK);
    out.extend_from_slice(&[KIND, 1, kind, 51, 4, 255, 255, 255, 255, 1, 4, 255, 255, 255, 0, 3, 4]);
    out.extend_from_slice(&gateway);
    out.extend_from_slice(&[54, 4]);
    out.extend_from_slice(&gateway);
    out.push(END);
    // Some clients want no less.
    out.resize(out.len().max(300), 0);
    Some(out)
}

/// The value of the first option of a kind.
fn option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    for _ in 0..OPTIONS_MAX {
        match *options {
            [0, ref rest @ ..] => options = rest,
            [kind, length, ref rest @ ..] if kind != END => {
                let (value, rest) = rest.split_at_checked(usize::from(length))?;
                if kind == wanted {
                    return Some(value);
                }
                options = rest;
            }
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmatrix_model::manifest::Health;

    fn guest() -> GuestSpec {
        GuestSpec {
            address: [192, 168, 1, 10].into(),
            gateway: [192, 168, 1, 1].into(),
            mac: "52:54:00:12:34:56".to_owned(),
            ports: vec![80],
            health: Health { port: 80, path: "/".to_owned(), status: 200 },
            backends: vec![],
            reseeds: true,
        }
    }
    fn packet(kind: u8) -> Vec<u8> {
        let mut packet = vec![0; 300];
        packet[..8].copy_from_slice(&[1, 1, 6, 0, 9, 8, 7, 6]);
        packet[28..34].copy_from_slice(&[0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        packet[236..240].copy_from_slice(&MARK);
        packet[240..247].copy_from_slice(&[0, 12, 1, b'x', KIND, 1, kind]);
        packet[247] = END;
        packet
    }

    #[test]
    fn the_guest_is_given_its_address_for_ever() {
        for (asked, answered) in [(DISCOVER, OFFER), (REQUEST, ACK)] {
            let out = answer(&packet(asked), &guest()).unwrap();
            assert_eq!(option(&out[OPTIONS..], KIND), Some(&[answered][..]));
            assert_eq!((&out[4..8], &out[16..20]), (&[9, 8, 7, 6][..], &[192, 168, 1, 10][..]));
            assert_eq!(option(&out[OPTIONS..], 51), Some(&[255; 4][..]), "the lease ends");
            assert_eq!(option(&out[OPTIONS..], 3), Some(&[192, 168, 1, 1][..]));
        }
    }

    #[test]
    fn whoever_else_asks_and_whatever_else_is_asked_is_not_answered() {
        let mut other = packet(DISCOVER);
        other[33] = 1;
        assert_eq!(answer(&other, &guest()), None);
        for kind in [0, OFFER, 4, 7, 8] {
            assert_eq!(answer(&packet(kind), &guest()), None);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_packets_are_answered_or_not(bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0usize..300, byte: u8) {
            let _ = answer(&bytes, &guest());
            let mut changed = packet(DISCOVER);
            changed[at] = byte;
            let _ = answer(&changed, &guest());
            let options = [packet(REQUEST)[..OPTIONS].to_vec(), bytes].concat();
            let _ = answer(&options, &guest());
        }
    }
}
