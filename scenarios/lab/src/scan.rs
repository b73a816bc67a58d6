//! Looks for byte strings in a capture.
//!
//! ```text
//! pcap ─▶ packets ─▶ TCP payload, with the end of the one before ─▶ how often each string occurs
//! ```

use anyhow::{Context, bail};
use memchr::memmem::Finder;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

/// Flows whose end of the last segment is remembered; beyond that a string split over two segments may be missed.
const FLOWS_MAX: usize = 65_536;
/// Longest packet a capture may claim.
const PACKET_MAX: usize = 65_535;

/// How often each of `strings` occurs in the packets of the file, also where it is split over two
/// segments of a connection that were sent one after the other.
///
/// # Errors
/// The file cannot be read or is no capture of raw IP packets.
pub fn occurrences(file: &Path, strings: &[&[u8]]) -> anyhow::Result<Vec<u64>> {
    let name = file.display();
    let mut input = BufReader::with_capacity(1 << 20, File::open(file).with_context(|| format!("cannot open {name}"))?);
    let mut header = [0; 24];
    input.read_exact(&mut header).with_context(|| format!("{name} is no capture"))?;
    if !header.starts_with(&0xa1b2_c3d4_u32.to_le_bytes()) || !header.ends_with(&101_u32.to_le_bytes()) {
        bail!("{name} is no capture of raw IP packets");
    }
    let finders: Vec<Finder> = strings.iter().map(Finder::new).collect();
    let overlap = strings.iter().map(|s| s.len()).max().unwrap_or(0).saturating_sub(1);
    let mut counts = vec![0; strings.len()];
    let mut ends: BTreeMap<[u8; 13], Vec<u8>> = BTreeMap::new();
    let mut record = [0; 16];
    let mut packet = Vec::new();
    loop {
        match input.read_exact(&mut record) {
            // A capture that was cut short ends within a record.
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(counts),
            other => other.with_context(|| format!("cannot read {name}"))?,
        }
        let length = u32::from_le_bytes([record[8], record[9], record[10], record[11]]) as usize;
        if length > PACKET_MAX {
            bail!("{name} is damaged: a packet of {length} bytes");
        }
        packet.resize(length, 0);
        if input.read_exact(&mut packet).is_err() {
            return Ok(counts);
        }
        let Some((flow, payload)) = flow_of(&packet) else {
            for (count, finder) in counts.iter_mut().zip(&finders) {
                *count += finder.find_iter(&packet).count() as u64;
            }
            continue;
        };
        if payload.is_empty() {
            continue;
        }
        let before = ends.remove(&flow).unwrap_or_default();
        let text = [before.as_slice(), payload].concat();
        for (count, finder) in counts.iter_mut().zip(&finders) {
            // What lies wholly in the part seen before was counted then.
            *count += finder.find_iter(&text).filter(|at| at + finder.needle().len() > before.len()).count() as u64;
        }
        if ends.len() < FLOWS_MAX {
            ends.insert(flow, text.get(text.len().saturating_sub(overlap)..).unwrap_or_default().to_vec());
        }
    }
}

/// Addresses, protocol and ports of a TCP segment, and its payload.
fn flow_of(packet: &[u8]) -> Option<([u8; 13], &[u8])> {
    const TCP: u8 = 6;
    let header = usize::from(packet.first()? & 15) * 4;
    let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    if *packet.get(9)? != TCP {
        return None;
    }
    let mut flow = [0; 13];
    flow.get_mut(..8)?.copy_from_slice(packet.get(12..20)?);
    flow.get_mut(8..12)?.copy_from_slice(packet.get(header..header + 4)?);
    let data = header + usize::from(packet.get(header + 12)? >> 4) * 4;
    Some((flow, packet.get(data..total.min(packet.len())).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::capture::Capture;

    fn segment(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0];
        packet.extend(((40 + payload.len()) as u16).to_be_bytes());
        packet.extend([0, 0, 0, 0, 64, 6, 0, 0, 198, 18, 1, 1, 198, 19, 1, 100]);
        packet.extend(port.to_be_bytes());
        packet.extend([0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0]);
        packet.extend(payload);
        packet
    }

    fn count(packets: &[Vec<u8>]) -> Vec<u64> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("wan.pcap");
        let mut capture = Capture::create(&file, 1 << 20).unwrap();
        for packet in packets {
            capture.add(packet).unwrap();
        }
        capture.flush().unwrap();
        occurrences(&file, &[b"canary", b"control"]).unwrap()
    }

    #[test]
    fn a_string_is_found_whole_and_split_and_counted_once() {
        assert_eq!(count(&[segment(1, b"a canary"), segment(1, b" sings")]), [1, 0]);
        assert_eq!(count(&[segment(1, b"a can"), segment(2, b"control"), segment(1, b"ary")]), [1, 1]);
        assert_eq!(count(&[segment(1, b"a can"), segment(2, b"ary")]), [0, 0], "another connection");
    }

    #[test]
    fn a_string_in_a_udp_packet_is_found() {
        let mut packet = segment(1, b"xx canary");
        packet[9] = 17;
        assert_eq!(count(&[packet]), [1, 0]);
    }

    #[test]
    fn what_is_no_capture_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        std::fs::write(&file, [1; 100]).unwrap();
        assert!(occurrences(&file, &[b"x"]).unwrap_err().to_string().contains("no capture"));
    }
}
