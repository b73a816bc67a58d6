//! A VMDK file's header and descriptor, read before any program sees the file.
//!
//! first 64 KiB, last KiB ─▶ sparse header, descriptor, footer ─▶ size of the disk, or the reason why not
//!
//! A descriptor is a text that can name other files: extents, a parent. Only a file that is its own one
//! extent is taken, and the words that would lead elsewhere may stand nowhere a reader looks.

use crate::field::{le16, le32, le64};
use crate::source::{DISK_MAX, DISK_MIN, SECTOR};

/// The first bytes of a sparse extent.
pub const MAGIC: [u8; 4] = *b"KDMV";
/// How much of a file's beginning [`read`] wants.
pub const HEAD: usize = 64 << 10;
/// How much of its end: the footer's marker, the footer and the end-of-stream marker.
pub const TAIL: usize = 3 * SECTOR as usize;

/// "The grain directory's place is in the footer".
const AT_END: u64 = u64::MAX;
/// Sectors of a descriptor; every tool writes 20, which is also what QEMU reads whatever the header says.
const DESCRIPTOR_SECTORS: u64 = 20;
/// Longest text of a descriptor: it begins in the second sector.
const DESCRIPTOR: std::ops::Range<usize> = 512..512 + 512 * DESCRIPTOR_SECTORS as usize;
const LINES_MAX: usize = 200;

/// Why a VMDK file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error(
        "is no VMDK file of one piece (streamOptimized or monolithicSparse), or is cut short; export it anew as an OVA"
    )]
    NotSparse,
    #[error("is VMDK of version {0}; only 1 to 3 are known, export it anew as an OVA")]
    Version(u32),
    #[error("names another file ({0}); only a disk that is whole in one file is taken, export it anew as an OVA")]
    NamesFile(String),
    #[error("is of type {0:?}; only streamOptimized and monolithicSparse are taken, export it anew as an OVA")]
    Type(String),
    #[error("{what} is {value}, which is not {allowed}; it is damaged, fetch it again")]
    Field { what: &'static str, value: u64, allowed: &'static str },
    #[error("is a disk of {0} sectors; it must be 1 MiB to 64 GiB")]
    Size(u64),
    #[error("its footer tells of another disk than its header; it is damaged, fetch it again")]
    Footer,
    #[error("leads to data outside the file; it is cut short, fetch it again")]
    Short,
}

/// What is taken from a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk in it.
    pub size: u64,
    /// Sectors of a grain.
    grain: u64,
    /// Sector of the grain directory.
    directory: u64,
    /// Whether a grain is deflated, behind its place and length.
    deflated: bool,
}

/// Reads a header from the file's first bytes ([`HEAD`], or all if it is shorter) and its last ([`TAIL`]).
///
/// # Errors
/// What is wrong, or that it names another file.
pub fn read(head: &[u8], tail: &[u8]) -> Result<Header, Problem> {
    let mut header = sparse(head)?;
    if header.directory == AT_END {
        let footer = sparse(tail.get(SECTOR as usize..).ok_or(Problem::NotSparse)?)?;
        if footer.directory == AT_END || (footer.sectors, footer.grain) != (header.sectors, header.grain) {
            return Err(Problem::Footer);
        }
        header.directory = footer.directory;
    }
    descriptor(head.get(DESCRIPTOR).ok_or(Problem::NotSparse)?)?;
    let Sparse { sectors, grain, directory, deflated } = header;
    Ok(Header { size: sectors * SECTOR, grain, directory, deflated })
}

/// Entries of a grain table.
const ENTRIES: u64 = 512;

/// Checks that every grain its tables lead to is in the file of `length` bytes, which `read` reads from.
///
/// # Errors
/// [`Problem::Short`]: the file is cut short or damaged.
pub fn whole(
    header: &Header,
    length: u64,
    read: &dyn Fn(u64, &mut [u8]) -> std::io::Result<()>,
) -> Result<(), Problem> {
    let place = |sector: u64| sector.checked_mul(SECTOR).ok_or(Problem::Short);
    let table = |sector: u64, entries: u64| {
        let mut table = vec![0; usize::try_from(entries * 4).map_err(|_| Problem::Short)?];
        read(place(sector)?, &mut table).map(|()| table).map_err(|_| Problem::Short)
    };
    let tables = (header.size / SECTOR).div_ceil(header.grain * ENTRIES);
    for sector in words(&table(header.directory, tables)?).filter(|sector| *sector != 0) {
        // 1 stands for zeros.
        for grain in words(&table(sector, ENTRIES)?).filter(|grain| *grain > 1) {
            let at = place(grain)?;
            let bytes = if header.deflated {
                let mut marker = [0; 12];
                read(at, &mut marker).map_err(|_| Problem::Short)?;
                12 + u64::from(le32(&marker, 8).unwrap_or(u32::MAX))
            } else {
                header.grain * SECTOR
            };
            if at.checked_add(bytes).is_none_or(|end| end > length) {
                return Err(Problem::Short);
            }
        }
    }
    Ok(())
}

fn words(table: &[u8]) -> impl Iterator<Item = u64> + '_ {
    table.as_chunks::<4>().0.iter().map(|bytes| u64::from(u32::from_le_bytes(*bytes)))
}

struct Sparse {
    sectors: u64,
    grain: u64,
    directory: u64,
    deflated: bool,
}

fn sparse(bytes: &[u8]) -> Result<Sparse, Problem> {
    if !bytes.starts_with(&MAGIC) {
        return Err(Problem::NotSparse);
    }
    let long = |at| le64(bytes, at).ok_or(Problem::NotSparse);
    let version = le32(bytes, 4).ok_or(Problem::NotSparse)?;
    if !(1..=3).contains(&version) {
        return Err(Problem::Version(version));
    }
    // Without sectors it is not a disk but a list of other files.
    let sectors = long(12)?;
    if !(DISK_MIN / SECTOR..=DISK_MAX / SECTOR).contains(&sectors) {
        return Err(Problem::Size(sectors));
    }
    let grain = long(20)?;
    field(
        "its grain (sectors)",
        grain,
        "a power of two, 8 to 2048",
        (8..=2048).contains(&grain) && grain.is_power_of_two(),
    )?;
    let at = long(28)?;
    // The footer of a stream need not repeat where the descriptor is.
    field("the place of its descriptor", at, "sector 1", at <= 1)?;
    let long_descriptor = long(36)?;
    field("the size of its descriptor (sectors)", long_descriptor, "1 to 20", long_descriptor <= DESCRIPTOR_SECTORS)?;
    let entries = u64::from(le32(bytes, 44).ok_or(Problem::NotSparse)?);
    field("entries of its grain tables", entries, "512", entries == ENTRIES)?;
    let compression = u64::from(le16(bytes, 77).ok_or(Problem::NotSparse)?);
    field("its compression", compression, "0 or 1 (deflate)", compression <= 1)?;
    Ok(Sparse { sectors, grain, directory: long(56)?, deflated: compression == 1 })
}

fn descriptor(bytes: &[u8]) -> Result<(), Problem> {
    // Not of a line: QEMU looks for this word anywhere, also behind the text's end.
    let hint = b"parentFileNameHint";
    if bytes.windows(hint.len()).any(|w| w.eq_ignore_ascii_case(hint)) {
        return Err(Problem::NamesFile("a parent".to_owned()));
    }
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(bytes.get(..end).unwrap_or(bytes)).into_owned();
    let (mut kind, mut extents) = (None, Vec::new());
    for line in text.lines().take(LINES_MAX).map(str::trim).filter(|l| !l.starts_with('#')) {
        let (key, value) = line.split_once('=').map_or(("", line), |(k, v)| (k.trim(), v.trim()));
        match key {
            "createType" => kind = Some(value.trim_matches('"').to_owned()),
            "parentCID" if !value.eq_ignore_ascii_case("ffffffff") => {
                return Err(Problem::NamesFile(format!("the parent {}", shown(value))));
            }
            "" if ["RW ", "RDONLY ", "NOACCESS "].iter().any(|access| value.starts_with(access)) => {
                extents.push(value.to_owned())
            }
            _ => {}
        }
    }
    match kind.as_deref() {
        Some("streamOptimized" | "monolithicSparse") => {}
        other => return Err(Problem::Type(shown(other.unwrap_or("none")))),
    }
    let [extent] = extents.as_slice() else {
        return Err(Problem::NamesFile(format!("{} extents", extents.len())));
    };
    // The one extent is this file, whatever it was called when it was made; its name is never used.
    let mut words = extent.splitn(4, ' ').skip(2);
    let (sparse, name) = (words.next() == Some("SPARSE"), words.next().unwrap_or("").trim_matches('"'));
    if !sparse || name.contains('/') || name.contains('\\') {
        return Err(Problem::NamesFile(shown(extent)));
    }
    Ok(())
}

fn field(what: &'static str, value: u64, allowed: &'static str, good: bool) -> Result<(), Problem> {
    if good { Ok(()) } else { Err(Problem::Field { what, value, allowed }) }
}

/// Words of a stranger, short and without control characters.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=7e5b80a7\nparentCID=ffffffff\n\
                        createType=\"streamOptimized\"\n\n# Extent description\nRDONLY 20480 SPARSE \"disk.vmdk\"\n";

    fn good(text: &str) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &3u32.to_le_bytes());
        put(12, &20480u64.to_le_bytes());
        put(20, &128u64.to_le_bytes());
        put(28, &1u64.to_le_bytes());
        put(36, &20u64.to_le_bytes());
        put(44, &512u32.to_le_bytes());
        put(56, &21u64.to_le_bytes());
        put(77, &1u16.to_le_bytes());
        put(512, text.as_bytes());
        head
    }
    fn with(from: &str, to: &str) -> Result<Header, Problem> {
        assert!(TEXT.contains(from));
        read(&good(&TEXT.replace(from, to)), &[])
    }

    #[test]
    fn a_disk_in_one_file_is_read() {
        assert_eq!(read(&good(TEXT), &[]).map(|h| h.size), Ok(10 << 20));
    }

    #[test]
    fn a_descriptor_that_leads_to_another_file_is_refused() {
        let names_file = |r: Result<Header, Problem>| assert!(matches!(r, Err(Problem::NamesFile(_))), "{r:?}");
        names_file(with("ffffffff", "7e5b80a6"));
        names_file(with("\"disk.vmdk\"", "\"/etc/shadow\""));
        names_file(with("SPARSE", "FLAT"));
        names_file(with("# Extent description\n", "RW 100 FLAT \"/dev/sda\" 0\n"));
        names_file(with("CID=7e5b80a7", "parentFileNameHint=\"/etc/shadow\""));
        // Behind the text's end, where a reader of text would not look but a search for the word does.
        let mut head = good(TEXT);
        head[9000..9018].copy_from_slice(b"parentFileNameHint");
        names_file(read(&head, &[]));
        assert!(matches!(with("streamOptimized", "monolithicFlat"), Err(Problem::Type(_))));
    }

    #[test]
    fn a_header_without_sectors_which_is_only_a_list_of_files_is_refused() {
        let mut head = good(TEXT);
        head[12..20].fill(0);
        assert_eq!(read(&head, &[]), Err(Problem::Size(0)));
    }

    #[test]
    fn the_footer_of_a_stream_must_tell_of_the_same_disk() {
        let mut head = good(TEXT);
        let mut tail = vec![0; TAIL];
        tail[512..1024].copy_from_slice(&head[..512]);
        head[56..64].fill(0xff);
        assert!(read(&head, &tail).is_ok());
        assert_eq!(read(&head, &[]), Err(Problem::NotSparse));
        tail[512 + 12] = 1;
        assert_eq!(read(&head, &tail), Err(Problem::Footer));
    }

    /// What `whole` says of a file with one grain, at this sector and of so many deflated bytes.
    fn leads_to(grain: u32, deflated: u32) -> Result<(), Problem> {
        let mut file = good(TEXT);
        let mut put = |at: usize, word: u32| {
            if let Some(to) = file.get_mut(at..at + 4) {
                to.copy_from_slice(&word.to_le_bytes());
            }
        };
        put(21 * 512, 30);
        put(30 * 512, grain);
        // Where nothing else is.
        if grain > 40 {
            put((grain as usize).saturating_mul(512).saturating_add(8), deflated);
        }
        whole(&read(&file, &[])?, file.len() as u64, &|at, to| {
            let from = (at as usize).checked_add(to.len()).and_then(|end| file.get(at as usize..end));
            to.copy_from_slice(from.ok_or(std::io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    #[test]
    fn a_grain_past_the_end_is_found() {
        assert_eq!(leads_to(127, 500), Ok(()));
        assert_eq!(leads_to(127, 501), Err(Problem::Short));
        assert_eq!(leads_to(128, 0), Err(Problem::Short));
        assert_eq!(leads_to(1, 0), Ok(()), "zeros are nowhere");
    }

    proptest! {
        #[test]
        fn arbitrary_grains_are_followed_or_refused(grain: u32, deflated: u32) {
            let _ = leads_to(grain, deflated);
        }

        #[test]
        fn arbitrary_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..20_000), text: String) {
            let _ = read(&bytes, &bytes);
            let mut headed = MAGIC.to_vec();
            headed.extend(&bytes);
            let _ = read(&headed, &headed);
            let text: String = text.chars().take(1000).collect();
            let _ = read(&good(&text), &bytes);
        }
    }
}
