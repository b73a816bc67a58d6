//! Numbers, digests, texts and addresses as bytes, and back.

use super::{FRAME_MAX, Malformed};
use std::net::{IpAddr, SocketAddr};
use vmatrix_model::Digest;

/// A frame that is being written, with room for its length at its front.
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub fn new() -> Writer {
        Writer(vec![0; 4])
    }
    pub fn u8(&mut self, value: u8) -> &mut Writer {
        self.bytes(&[value])
    }
    pub fn u32(&mut self, value: u32) -> &mut Writer {
        self.bytes(&value.to_be_bytes())
    }
    pub fn u64(&mut self, value: u64) -> &mut Writer {
        self.bytes(&value.to_be_bytes())
    }
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Writer {
        self.0.extend_from_slice(bytes);
        self
    }
    pub fn digest(&mut self, digest: &Digest) -> &mut Writer {
        self.bytes(&digest.0)
    }
    /// Cut at a letter's border where it is too long.
    pub fn text(&mut self, text: &str, max: usize) -> &mut Writer {
        let end = (0..=max.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        let cut = text.get(..end).unwrap_or_default();
        self.u8(cut.len() as u8).bytes(cut.as_bytes())
    }
    pub fn address(&mut self, address: &SocketAddr) -> &mut Writer {
        match address.ip() {
            IpAddr::V4(ip) => self.u8(4).bytes(&ip.octets()),
            IpAddr::V6(ip) => self.u8(6).bytes(&ip.octets()),
        };
        self.bytes(&address.port().to_be_bytes())
    }
    pub fn finish(&mut self) -> Vec<u8> {
        let length = (self.0.len() - 4) as u32;
        debug_assert!(length as usize <= FRAME_MAX, "a frame of {length} bytes");
        if let Some(head) = self.0.get_mut(..4) {
            head.copy_from_slice(&length.to_be_bytes());
        }
        std::mem::take(&mut self.0)
    }
}

/// What is left of a frame that is being read.
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(Malformed::Short)?;
        self.0 = tail;
        Ok(head)
    }
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed::Short)
    }
    pub fn kind(&mut self) -> Result<u8, Malformed> {
        self.u8().map_err(|_| Malformed::Empty)
    }
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(|[byte]| byte)
    }
    pub fn flag(&mut self, name: &'static str) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed::Field(name)),
        }
    }
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }
    pub fn digest(&mut self) -> Result<Digest, Malformed> {
        self.array().map(Digest)
    }
    pub fn text(&mut self, max: usize) -> Result<String, Malformed> {
        let length = usize::from(self.u8()?);
        if length > max {
            return Err(Malformed::Field("length of a text"));
        }
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Malformed::Field("letter in a text"))
    }
    pub fn address(&mut self) -> Result<SocketAddr, Malformed> {
        let ip = match self.u8()? {
            4 => IpAddr::from(self.array::<4>()?),
            6 => IpAddr::from(self.array::<16>()?),
            _ => return Err(Malformed::Field("kind of address")),
        };
        Ok(SocketAddr::new(ip, self.array().map(u16::from_be_bytes)?))
    }
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
    pub fn end<T>(self, decoded: T) -> Result<T, Malformed> {
        if self.0.is_empty() { Ok(decoded) } else { Err(Malformed::Behind) }
    }
}
