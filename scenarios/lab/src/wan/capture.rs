//! A packet capture of everything that enters the WAN, as a pcap file of raw IP packets.
//!
//! ```text
//! packet ─▶ file (bounded) ─▶ tcpdump, or scan.rs
//! ```

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// pcap link type of packets that begin with their IP header.
const LINKTYPE_RAW: u32 = 101;
/// Longest packet kept whole: what a TUN port can hand over.
const SNAP_LEN: u32 = 65_535;

/// An open capture file.
#[derive(Debug)]
pub struct Capture {
    file: BufWriter<File>,
    written: u64,
    bytes_max: u64,
    full: bool,
    packets: u64,
}

impl Capture {
    /// Creates the file. It never grows beyond `bytes_max`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create(path: &Path, bytes_max: u64) -> io::Result<Capture> {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&0xa1b2_c3d4_u32.to_le_bytes())?;
        file.write_all(&2_u16.to_le_bytes())?;
        file.write_all(&4_u16.to_le_bytes())?;
        file.write_all(&[0; 8])?;
        file.write_all(&SNAP_LEN.to_le_bytes())?;
        file.write_all(&LINKTYPE_RAW.to_le_bytes())?;
        Ok(Capture { file, written: 24, bytes_max, full: false, packets: 0 })
    }

    /// Appends a packet, unless the file is full.
    ///
    /// # Errors
    /// The disk is full or the file is gone.
    pub fn add(&mut self, packet: &[u8]) -> io::Result<()> {
        let bytes = packet.len() as u64 + 16;
        if self.full || self.written + bytes > self.bytes_max {
            if !self.full {
                tracing::error!(bytes_max = self.bytes_max, "the capture is full: packets from here on are not in it");
            }
            self.full = true;
            return Ok(());
        }
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let len = (packet.len() as u32).to_le_bytes();
        self.file.write_all(&(at.as_secs() as u32).to_le_bytes())?;
        self.file.write_all(&at.subsec_micros().to_le_bytes())?;
        self.file.write_all(&len)?;
        self.file.write_all(&len)?;
        self.file.write_all(packet)?;
        self.written += bytes;
        self.packets += 1;
        Ok(())
    }

    /// Makes what was added readable by others.
    ///
    /// # Errors
    /// As [`Capture::add`].
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    /// Packets in the file, and whether it ran full.
    pub fn seen(&self) -> (u64, bool) {
        (self.packets, self.full)
    }
}
