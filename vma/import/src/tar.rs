//! The tar archive an OVA is: read strictly, never unpacked; and written, for export.
//!
//! file ─list─▶ names, places and sizes of the plain files in its top folder, or the reason why not
//!
//! Nothing is ever written under a name from an archive: what is needed is read from its place.

use std::io::{self, Read, Seek, SeekFrom};

/// Bytes of a header, and what every body is padded to.
pub const BLOCK: u64 = 512;
/// An OVA has a description, digests, a certificate and some disks.
pub const ENTRIES_MAX: usize = 32;
/// Longest name.
pub const NAME_MAX: usize = 100;

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("is no tar archive, or a header in it (at byte {at}) is damaged; fetch it again")]
    Header { at: u64 },
    #[error(
        "has an entry {name:?}, which would lead out of the archive or into a folder; only plain names in its top folder are taken, do not use this file"
    )]
    Name { name: String },
    #[error("has a {kind} ({name:?}); only plain files are taken, pack it anew with `tar --format=ustar`")]
    Kind { name: String, kind: &'static str },
    #[error("has {name:?} twice; pack it anew")]
    Twice { name: String },
    #[error("has more than {ENTRIES_MAX} entries; an OVA has fewer")]
    Many,
    #[error("ends before {name:?} does; it is cut short, fetch it again")]
    Short { name: String },
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// A plain file in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Letters, digits, `.`, `_`, `-` and spaces; no folder.
    pub name: String,
    /// Where its bytes begin in the archive.
    pub at: u64,
    /// Bytes.
    pub size: u64,
}

/// Lists an archive.
///
/// # Errors
/// Anything but plain files with plain names, each once and whole, or an archive that cannot be read.
pub fn list(archive: &mut (impl Read + Seek)) -> Result<Vec<Entry>, Problem> {
    let length = archive.seek(SeekFrom::End(0))?;
    let mut entries: Vec<Entry> = Vec::new();
    let mut at = 0;
    while at + BLOCK <= length {
        archive.seek(SeekFrom::Start(at))?;
        let mut header = [0; BLOCK as usize];
        archive.read_exact(&mut header)?;
        if header.iter().all(|b| *b == 0) {
            return whole(entries);
        }
        let entry = entry(&header, at)?;
        let end = entry.at.checked_add(entry.size).filter(|end| *end <= length);
        let end = end.ok_or_else(|| Problem::Short { name: entry.name.clone() })?;
        if entries.iter().any(|e| e.name == entry.name) {
            return Err(Problem::Twice { name: entry.name });
        }
        if entries.len() == ENTRIES_MAX {
            return Err(Problem::Many);
        }
        entries.push(entry);
        at = end.next_multiple_of(BLOCK);
    }
    // Some writers leave the two empty blocks at the end out.
    whole(entries)
}

fn whole(entries: Vec<Entry>) -> Result<Vec<Entry>, Problem> {
    if entries.is_empty() { Err(Problem::Header { at: 0 }) } else { Ok(entries) }
}

fn entry(header: &[u8; BLOCK as usize], at: u64) -> Result<Entry, Problem> {
    let damaged = || Problem::Header { at };
    let field = |from: usize, length: usize| header.get(from..from + length).unwrap_or_default();
    let said = octal(field(148, 8)).ok_or_else(damaged)?;
    let sum: u64 =
        header.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u64::from(*b) }).sum();
    if said != sum || !field(257, 8).starts_with(b"ustar") {
        return Err(damaged());
    }
    let name = text(field(0, NAME_MAX));
    match header.get(156) {
        Some(b'0' | 0) => {}
        Some(kind) => return Err(Problem::Kind { name: shown(&name), kind: kind_of(*kind) }),
        None => return Err(damaged()),
    }
    // A longer name than fits has its folders here in ustar; GNU's old format keeps times there.
    if header.get(257..263) == Some(b"ustar\0") && field(345, 155).first().is_some_and(|b| *b != 0) {
        return Err(Problem::Name { name: shown(&format!("{}/{name}", text(field(345, 155)))) });
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "._- ".contains(c);
    if name.is_empty() || name.starts_with('.') || name.contains("..") || !name.chars().all(plain) {
        return Err(Problem::Name { name: shown(&name) });
    }
    let size = number(field(124, 12)).ok_or_else(damaged)?;
    Ok(Entry { name, at: at + BLOCK, size })
}

fn kind_of(kind: u8) -> &'static str {
    match kind {
        b'1' => "hard link",
        b'2' => "symbolic link",
        b'3' | b'4' => "device",
        b'5' => "folder",
        b'6' => "pipe",
        b'x' | b'g' => "pax header",
        b'L' | b'K' => "GNU long name",
        b'S' => "GNU sparse file",
        _ => "entry of an unknown kind",
    }
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(field.get(..end).unwrap_or(field)).into_owned()
}

fn shown(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(60).collect()
}

/// A number in octal digits, or (for what does not fit them) in base 256.
fn number(field: &[u8]) -> Option<u64> {
    match field.split_first()? {
        (0x80, rest) => rest.iter().try_fold(0u64, |n, b| n.checked_mul(256)?.checked_add(u64::from(*b))),
        _ => octal(field),
    }
}

fn octal(field: &[u8]) -> Option<u64> {
    let digits: Vec<u8> =
        field.iter().copied().skip_while(|b| *b == b' ').take_while(|b| !matches!(b, 0 | b' ')).collect();
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |n, d| match d {
        b'0'..=b'7' => n.checked_mul(8)?.checked_add(u64::from(d - b'0')),
        _ => None,
    })
}

/// The header of a plain file, for an archive of our own.
///
/// # Invariants
/// 1. `name` fits [`NAME_MAX`] and is plain; [`list`] reads back what this writes.
pub fn header(name: &str, size: u64) -> [u8; BLOCK as usize] {
    let mut header = [0; BLOCK as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in header.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, name.as_bytes().get(..NAME_MAX).unwrap_or(name.as_bytes()));
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if size < 1 << 33 {
        put(124, format!("{size:011o}\0").as_bytes());
    } else {
        put(124, &[0x80, 0, 0, 0]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
    for (to, from) in header.iter_mut().skip(148).zip(format!("{sum:06o}\0 ").as_bytes()) {
        *to = *from;
    }
    header
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    pub(crate) fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, body) in files {
            out.extend(header(name, body.len() as u64));
            out.extend(*body);
            out.resize(out.len().next_multiple_of(512), 0);
        }
        out.resize(out.len() + 1024, 0);
        out
    }
    /// Changes a header's field and corrects its sum.
    fn changed(mut header: [u8; 512], at: usize, bytes: &[u8]) -> Vec<u8> {
        header[at..at + bytes.len()].copy_from_slice(bytes);
        header[148..156].fill(b' ');
        let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        [header.to_vec(), vec![0; 1024]].concat()
    }
    fn refusal(archive: Vec<u8>) -> String {
        list(&mut Cursor::new(archive)).expect_err("it is taken").to_string()
    }

    #[test]
    fn what_was_written_is_listed_in_its_place() {
        let bytes = archive(&[("vm.ovf", b"<x/>"), ("a disk-1.vmdk", &[7; 700])]);
        let entries = list(&mut Cursor::new(&bytes)).unwrap();
        assert_eq!(
            entries.iter().map(|e| (e.name.as_str(), e.size)).collect::<Vec<_>>(),
            [("vm.ovf", 4), ("a disk-1.vmdk", 700)]
        );
        assert!(bytes[entries[1].at as usize..][..700].iter().all(|b| *b == 7));
        let large = 20 << 30;
        assert_eq!(entry(&header("d", large), 0).unwrap().size, large);
    }

    #[test]
    fn tar_reads_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.tar");
        std::fs::write(&file, archive(&[("vm.ovf", b"<x/>"), ("d.vmdk", &[7; 700])])).unwrap();
        let output = std::process::Command::new("tar").arg("-tvf").arg(&file).output().expect("tar is missing");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("700") && text.contains("d.vmdk"), "{text}");
    }

    #[test]
    fn names_that_lead_out_of_the_archive_are_refused() {
        for name in
            ["../../etc/cron.d/x", "/etc/passwd", "a/../../b", "..", "folder/disk.vmdk", ".hidden", "a\\b", "a\nb"]
        {
            let said = refusal(archive(&[("vm.ovf", b"x"), (name, b"x")]));
            assert!(said.contains("plain names"), "{name:?}: {said}");
        }
        // By ustar's second field for names.
        assert!(refusal(changed(header("passwd", 0), 345, b"../etc")).contains("../etc/passwd"));
    }

    #[test]
    fn links_folders_devices_and_extensions_are_refused_by_what_they_are() {
        for (kind, word) in [
            (b'1', "hard link"),
            (b'2', "symbolic link"),
            (b'5', "folder"),
            (b'x', "pax"),
            (b'L', "long name"),
            (b'S', "sparse"),
            (b'4', "device"),
        ] {
            let said = refusal(changed(header("x", 0), 156, &[kind]));
            assert!(said.contains(word), "{said}");
        }
    }

    #[test]
    fn an_archive_cut_short_full_of_files_or_with_one_twice_is_refused() {
        let mut bytes = archive(&[("disk.vmdk", &[7; 5000])]);
        bytes.truncate(3000);
        assert!(refusal(bytes).contains("cut short"));
        let names: Vec<String> = (0..=ENTRIES_MAX).map(|n| format!("f{n}")).collect();
        let files: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b""[..])).collect();
        assert!(refusal(archive(&files)).contains("more than 32"));
        assert!(refusal(archive(&[("a", b"1"), ("a", b"2")])).contains("twice"));
        assert!(
            refusal(changed(header("x", 0), 124, &[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]))
                .contains("cut short")
        );
        assert!(refusal(b"no archive at all".repeat(100)).contains("no tar archive"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_listed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let _ = list(&mut Cursor::new(bytes));
        }

        #[test]
        fn what_is_listed_lies_inside_and_has_a_plain_name(
            changes in prop::collection::vec((0usize..512, any::<u8>()), 0..6), sum: bool,
        ) {
            let mut bytes = archive(&[("vm.ovf", b"<x/>"), ("disk.vmdk", &[7; 700])]);
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            if sum {
                bytes[148..156].fill(b' ');
                let sum: u64 = bytes[..512].iter().map(|b| u64::from(*b)).sum();
                bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
            for entry in list(&mut Cursor::new(&bytes)).unwrap_or_default() {
                prop_assert!(entry.at + entry.size <= bytes.len() as u64);
                prop_assert!(!entry.name.contains('/') && !entry.name.starts_with('.'));
            }
        }
    }
}
