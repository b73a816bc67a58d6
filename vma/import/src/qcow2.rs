//! A qcow2 file's header, read before any program sees the file.
//!
//! first 64 KiB, length ─▶ version, features, tables, extensions ─▶ size of the disk, or the reason why not
//!
//! its tables ─▶ whether everything they lead to is in the file
//!
//! A qcow2 file can name other files: a backing file, an external data file. Whoever opens such a file with
//! rights of ours reads what we can read; so a file that names any is refused, whatever it names.
//! And of a file that was cut short QEMU reads zeros where the rest was, without a word.

use crate::field::{be32, be64};
use crate::source::{DISK_MAX, DISK_MIN, SECTOR};

/// The first bytes of every qcow2 file.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// How much of a file's beginning [`read`] wants: all extensions lie in the first cluster, and what lies
/// past this is no extension that anything of today writes.
pub const HEAD: usize = 64 << 10;

/// Smallest header of version 2; version 3 has [`HEADER_3`] at least.
const HEADER_2: u32 = 72;
const HEADER_3: u32 = 104;
/// Bits of `incompatible_features`.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Kinds of header extensions.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const ENCRYPTION: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;
/// Today's qemu-img writes two.
const EXTENSIONS_MAX: usize = 16;
/// Only the present state comes in; more than these snapshots beside it is no image to import.
const SNAPSHOTS_MAX: u32 = 64;

/// Why a qcow2 file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("is no qcow2 file, or is cut short; say its right format, or fetch it again")]
    NotQcow2,
    #[error("is qcow2 of version {0}; only 2 and 3 are known, convert it with `qemu-img convert -O qcow2`")]
    Version(u32),
    #[error(
        "has a backing file, so it is not whole and could name any file of this machine; make it whole with `qemu-img convert -O qcow2` where its backing file is"
    )]
    BackingFile,
    #[error("keeps its data in another file; make it whole with `qemu-img convert -O qcow2` where that file is")]
    ExternalData,
    #[error("is encrypted; decrypt it with `qemu-img convert` where its key is")]
    Encrypted,
    #[error("is marked corrupt; repair it with `qemu-img check -r all` where it was made")]
    Corrupt,
    #[error("needs features that are not known here (bits {0:#x}); convert it with `qemu-img convert -O qcow2`")]
    Feature(u64),
    #[error("{what} is {value}, which is not {allowed}; it is damaged, fetch it again")]
    Field { what: &'static str, value: u64, allowed: &'static str },
    #[error("{what} lies outside the file; it is cut short, fetch it again")]
    Outside { what: &'static str },
    #[error("cannot be read to its end; it is cut short, or its disk is broken")]
    Unreadable,
    #[error("is a disk of {0} bytes; it must be whole sectors, 1 MiB to 64 GiB")]
    Size(u64),
}

/// What is taken from a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk in it.
    pub size: u64,
    /// Bytes of a cluster, a power of two.
    pub cluster: u64,
    /// Where the first table is, and its entries.
    first: (u64, u64),
    /// Whether an entry of a second table has a second word.
    extended: bool,
}

/// Reads a header from the file's first bytes ([`HEAD`], or all if it is shorter) and its length.
///
/// # Errors
/// What is wrong, or that it names another file.
pub fn read(head: &[u8], length: u64) -> Result<Header, Problem> {
    if !head.starts_with(&MAGIC) {
        return Err(Problem::NotQcow2);
    }
    let word = |at| be32(head, at).ok_or(Problem::NotQcow2);
    let long = |at| be64(head, at).ok_or(Problem::NotQcow2);
    let version = word(4)?;
    if !matches!(version, 2 | 3) {
        return Err(Problem::Version(version));
    }
    if long(8)? != 0 || word(16)? != 0 {
        return Err(Problem::BackingFile);
    }
    if word(32)? != 0 {
        return Err(Problem::Encrypted);
    }
    let extensions = if version == 3 { features(head)? } else { HEADER_2 };
    let bits = field("its cluster size (bits)", u64::from(word(20)?), "9 to 21", |b| (9..=21).contains(&b))?;
    let cluster = 1u64 << bits;
    walk(head, extensions, cluster)?;
    let size = long(24)?;
    if !(DISK_MIN..=DISK_MAX).contains(&size) || !size.is_multiple_of(SECTOR) {
        return Err(Problem::Size(size));
    }
    field("its number of snapshots", u64::from(word(60)?), "0 to 64", |n| n <= u64::from(SNAPSHOTS_MAX))?;
    let extended = version == 3 && long(72)? & EXTENDED_L2 != 0;
    // An entry of the first table stands for a cluster of entries, each of which stands for a cluster.
    let entries = u64::from(word(36)?);
    let needed = size.div_ceil(cluster * (cluster / entry_size(extended)));
    field("the size of its first table", entries, "what its disk needs", |n| n >= needed && n <= needed * 2 + 512)?;
    table("its first table", long(40)?, entries * 8, cluster, length)?;
    let refcounts = u64::from(word(56)?);
    field("the size of its reference counts", refcounts, "1 to 1024", |n| (1..=1024).contains(&n))?;
    table("its reference counts", long(48)?, refcounts * cluster, cluster, length)?;
    Ok(Header { size, cluster, first: (long(40)?, needed), extended })
}

fn entry_size(extended: bool) -> u64 {
    if extended { 16 } else { 8 }
}

/// Bits of an entry that say where something is.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
/// An entry's flag of a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Its flag of a cluster that reads as zeros, wherever it is.
const ZEROS: u64 = 1;

/// Checks that every cluster its tables lead to is in the file of `length` bytes, which `read` reads from.
///
/// # Errors
/// [`Problem::Outside`] or [`Problem::Unreadable`]: the file is cut short or damaged.
pub fn whole(
    header: &Header,
    length: u64,
    read: &dyn Fn(u64, &mut [u8]) -> std::io::Result<()>,
) -> Result<(), Problem> {
    let table = |at: u64, bytes: u64| {
        let mut table = vec![0; usize::try_from(bytes).map_err(|_| Problem::Unreadable)?];
        read(at, &mut table).map(|()| table).map_err(|_| Problem::Unreadable)
    };
    let inside = |what, at: u64, bytes: u64| {
        if at.checked_add(bytes).is_some_and(|end| end <= length) { Ok(()) } else { Err(Problem::Outside { what }) }
    };
    let step = if header.extended { 2 } else { 1 };
    for entry in words(&table(header.first.0, header.first.1 * 8)?) {
        let at = entry & PLACE;
        if at == 0 {
            continue;
        }
        inside("a second table", at, header.cluster)?;
        for entry in words(&table(at, header.cluster)?).step_by(step) {
            if entry & COMPRESSED != 0 {
                // A place, and above it how many sectors follow the one it is in.
                let bits = 62 - (header.cluster.ilog2() - 8);
                let (at, sectors) = (entry & ((1 << bits) - 1), (entry & (COMPRESSED - 1)) >> bits);
                // The last one may end before its sector does.
                let last = (at - at % SECTOR).saturating_add(sectors * SECTOR);
                inside("a compressed cluster", last.max(at), 1)?;
            } else if entry & PLACE != 0 && (header.extended || entry & ZEROS == 0) {
                inside("a cluster", entry & PLACE, header.cluster)?;
            }
        }
    }
    Ok(())
}

fn words(table: &[u8]) -> impl Iterator<Item = u64> + '_ {
    table.as_chunks::<8>().0.iter().map(|bytes| u64::from_be_bytes(*bytes))
}

/// Checks version 3's features and returns where its extensions begin.
fn features(head: &[u8]) -> Result<u32, Problem> {
    let incompatible = be64(head, 72).ok_or(Problem::NotQcow2)?;
    if incompatible & EXTERNAL_DATA != 0 {
        return Err(Problem::ExternalData);
    }
    if incompatible & CORRUPT != 0 {
        return Err(Problem::Corrupt);
    }
    let unknown = incompatible & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2);
    if unknown != 0 {
        return Err(Problem::Feature(unknown));
    }
    let order = be32(head, 96).ok_or(Problem::NotQcow2)?;
    field("its reference count width (order)", u64::from(order), "0 to 6", |o| o <= 6)?;
    let length = be32(head, 100).ok_or(Problem::NotQcow2)?;
    let within = |n: u64| n >= u64::from(HEADER_3) && n <= 4096 && n.is_multiple_of(8);
    field("its header length", u64::from(length), "104 to 4096", within)?;
    if incompatible & COMPRESSION != 0 {
        let kind = head.get(104).copied().ok_or(Problem::NotQcow2)?;
        field("its compression", u64::from(kind), "0 (zlib) or 1 (zstd)", |k| k <= 1)?;
    }
    Ok(length)
}

/// Goes through the header extensions, all of which lie in the first cluster.
fn walk(head: &[u8], from: u32, cluster: u64) -> Result<(), Problem> {
    let end = usize::try_from(cluster).unwrap_or(usize::MAX).min(head.len());
    let head = head.get(..end).unwrap_or(head);
    let mut at = from as usize;
    for _ in 0..EXTENSIONS_MAX {
        // Version 2 may have none at all, not even the mark of the end.
        let Some(kind) = be32(head, at) else { return Ok(()) };
        let length = be32(head, at + 4).ok_or(Problem::NotQcow2)? as usize;
        match kind {
            END => return Ok(()),
            BACKING_FORMAT => return Err(Problem::BackingFile),
            DATA_FILE => return Err(Problem::ExternalData),
            ENCRYPTION => return Err(Problem::Encrypted),
            _ => {}
        }
        if length > head.len() {
            return Err(Problem::Outside { what: "a header extension" });
        }
        at += 8 + length.next_multiple_of(8);
    }
    Err(Problem::Field { what: "its number of header extensions", value: 17, allowed: "at most 16" })
}

fn field(what: &'static str, value: u64, allowed: &'static str, good: impl Fn(u64) -> bool) -> Result<u64, Problem> {
    if good(value) { Ok(value) } else { Err(Problem::Field { what, value, allowed }) }
}

fn table(what: &'static str, at: u64, bytes: u64, cluster: u64, length: u64) -> Result<(), Problem> {
    let inside = at >= cluster
        && at.is_multiple_of(cluster)
        && at.checked_add(bytes).is_some_and(|end| end <= length.next_multiple_of(cluster));
    if inside { Ok(()) } else { Err(Problem::Outside { what }) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A header of 1 GiB in clusters of 64 KiB, in a file of 1 MiB.
    pub(crate) fn good() -> Vec<u8> {
        let mut head = vec![0; HEAD];
        head[..4].copy_from_slice(&MAGIC);
        put(&mut head, 4, &3u32.to_be_bytes());
        put(&mut head, 20, &16u32.to_be_bytes());
        put(&mut head, 24, &(1u64 << 30).to_be_bytes());
        put(&mut head, 36, &2u32.to_be_bytes());
        put(&mut head, 40, &(3u64 << 16).to_be_bytes());
        put(&mut head, 48, &(1u64 << 16).to_be_bytes());
        put(&mut head, 56, &1u32.to_be_bytes());
        put(&mut head, 96, &4u32.to_be_bytes());
        put(&mut head, 100, &104u32.to_be_bytes());
        head
    }
    fn put(head: &mut [u8], at: usize, bytes: &[u8]) {
        head[at..at + bytes.len()].copy_from_slice(bytes);
    }
    fn with(at: usize, bytes: &[u8]) -> Result<Header, Problem> {
        let mut head = good();
        put(&mut head, at, bytes);
        read(&head, 1 << 20)
    }

    #[test]
    fn a_whole_file_is_read() {
        let header = read(&good(), 1 << 20).unwrap();
        assert_eq!((header.size, header.cluster), (1 << 30, 1 << 16));
        let version_2 = with(4, &2u32.to_be_bytes());
        assert!(version_2.is_ok(), "{version_2:?}");
    }

    #[test]
    fn whatever_names_another_file_is_refused() {
        assert_eq!(with(8, &200u64.to_be_bytes()), Err(Problem::BackingFile));
        assert_eq!(with(16, &9u32.to_be_bytes()), Err(Problem::BackingFile));
        assert_eq!(with(72, &EXTERNAL_DATA.to_be_bytes()), Err(Problem::ExternalData));
        assert_eq!(with(104, &[BACKING_FORMAT.to_be_bytes(), 3u32.to_be_bytes()].concat()), Err(Problem::BackingFile));
        assert_eq!(with(104, &[DATA_FILE.to_be_bytes(), 3u32.to_be_bytes()].concat()), Err(Problem::ExternalData));
        // Behind another extension too.
        let two = [7u32, 5, 0, 0, DATA_FILE, 3].map(u32::to_be_bytes).concat();
        assert_eq!(with(104, &two), Err(Problem::ExternalData));
    }

    #[test]
    fn what_is_encrypted_damaged_unknown_or_too_large_is_refused_by_name() {
        assert_eq!(with(32, &2u32.to_be_bytes()), Err(Problem::Encrypted));
        assert_eq!(with(72, &CORRUPT.to_be_bytes()), Err(Problem::Corrupt));
        assert_eq!(with(72, &(1u64 << 40).to_be_bytes()), Err(Problem::Feature(1 << 40)));
        assert_eq!(with(4, &4u32.to_be_bytes()), Err(Problem::Version(4)));
        assert_eq!(with(24, &u64::MAX.to_be_bytes()), Err(Problem::Size(u64::MAX)));
        assert_eq!(with(40, &(1u64 << 60).to_be_bytes()), Err(Problem::Outside { what: "its first table" }));
        assert!(matches!(with(20, &40u32.to_be_bytes()), Err(Problem::Field { value: 40, .. })));
        assert!(matches!(with(36, &u32::MAX.to_be_bytes()), Err(Problem::Field { .. })));
        assert_eq!(read(b"QFI", 3), Err(Problem::NotQcow2));
    }

    /// What `whole` says of a file whose first table leads to one second table, with this entry.
    fn leads_to(entry: u64, length: u64) -> Result<(), Problem> {
        let mut file = good();
        file.resize(1 << 20, 0);
        put(&mut file, 3 << 16, &(1u64 << 63 | 4 << 16).to_be_bytes());
        put(&mut file, 4 << 16, &entry.to_be_bytes());
        let header = read(&file, length)?;
        whole(&header, length, &|at, to| {
            let from = file.get(at as usize..at as usize + to.len()).ok_or(std::io::ErrorKind::UnexpectedEof)?;
            to.copy_from_slice(from);
            Ok(())
        })
    }

    #[test]
    fn a_cluster_past_the_end_is_found_for_qemu_would_read_zeros_there() {
        let outside = |what| Err(Problem::Outside { what });
        assert_eq!(leads_to(1 << 63 | 15 << 16, 1 << 20), Ok(()));
        assert_eq!(leads_to(1 << 63 | 16 << 16, 1 << 20), outside("a cluster"));
        assert_eq!(leads_to(1 << 63 | 15 << 16, (1 << 20) - 1), outside("a cluster"));
        // Two sectors from the last one of the file on; then one.
        assert_eq!(leads_to(COMPRESSED | 1 << 54 | ((1 << 20) - 100), 1 << 20), outside("a compressed cluster"));
        assert_eq!(leads_to(COMPRESSED | ((1 << 20) - 100), 1 << 20), Ok(()));
        assert_eq!(leads_to(PLACE, 1 << 20), outside("a cluster"));
        assert_eq!(leads_to(ZEROS | PLACE, 1 << 20), Ok(()), "zeros are nowhere");
    }

    proptest! {
        #[test]
        fn arbitrary_tables_are_walked_or_refused(entry: u64, length in (5u64 << 16)..1 << 21) {
            let _ = leads_to(entry, length);
        }

        #[test]
        fn arbitrary_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600), length: u64) {
            let _ = read(&bytes, length);
            let mut headed = MAGIC.to_vec();
            headed.extend(&bytes);
            let _ = read(&headed, length);
        }

        #[test]
        fn a_good_header_with_bytes_changed_never_gets_a_disk_out_of_bounds(
            changes in prop::collection::vec((0usize..200, any::<u8>()), 1..20), length in 0u64..1 << 40,
        ) {
            let mut head = good();
            for (at, byte) in changes {
                head[at] = byte;
            }
            if let Ok(header) = read(&head, length) {
                prop_assert!((DISK_MIN..=DISK_MAX).contains(&header.size));
                prop_assert_eq!(be64(&head, 8), Some(0));
            }
        }
    }
}
