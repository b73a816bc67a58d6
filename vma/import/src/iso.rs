//! A file system on a read-only disk, for the little a guest is told at its first boot: ISO 9660, one folder.
//!
//! names and bytes ─▶ volume descriptor, path tables, one folder, the files, in sectors of 2048 bytes
//!
//! Names are written as they are, lower case and hyphens too, without the extensions that would carry them:
//! Linux shows them as they are.

/// Bytes of a sector.
const SECTOR: usize = 2048;
/// Where things are, in sectors; the first sixteen are nobody's.
const DESCRIPTOR: u32 = 16;
const LITTLE_TABLE: u32 = 18;
const BIG_TABLE: u32 = 19;
const FOLDER: u32 = 20;
const FILES: u32 = 21;
/// Longest name, so that a folder of some files fits into its sector.
pub(crate) const NAME_MAX: usize = 30;
/// Most files, for the same reason.
pub(crate) const FILES_MAX: usize = 8;

/// Writes a volume named `label` with these files; the same ones give the same bytes. A name is 1 to [`NAME_MAX`]
/// plain characters, there are at most [`FILES_MAX`] of them, and all of it is far below 4 GiB.
pub(crate) fn volume(label: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    // A folder is sorted by name.
    let mut files = files.to_vec();
    files.sort_by_key(|(name, _)| *name);
    let mut folder = [record(&[0], FOLDER, SECTOR, true), record(&[1], FOLDER, SECTOR, true)].concat();
    let (mut next, mut bodies) = (FILES, Vec::new());
    for (name, bytes) in files.iter().take(FILES_MAX) {
        let name = name.as_bytes();
        folder.extend(record(name.get(..NAME_MAX).unwrap_or(name), next, bytes.len(), false));
        bodies.extend_from_slice(bytes);
        bodies.resize(bodies.len().next_multiple_of(SECTOR), 0);
        next = FILES + u32::try_from(bodies.len() / SECTOR).unwrap_or(u32::MAX - FILES);
    }
    let mut out = vec![0; DESCRIPTOR as usize * SECTOR];
    let mut sector = |bytes: &[u8]| {
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(SECTOR), 0);
    };
    sector(&descriptor(label, next));
    sector(b"\xffCD001\x01");
    sector(&table(FOLDER.to_le_bytes(), 1u16.to_le_bytes()));
    sector(&table(FOLDER.to_be_bytes(), 1u16.to_be_bytes()));
    sector(&folder);
    out.extend(bodies);
    out
}

/// A number in both orders of bytes.
fn both32(n: u32) -> Vec<u8> {
    [n.to_le_bytes(), n.to_be_bytes()].concat()
}
fn both16(n: u16) -> Vec<u8> {
    [n.to_le_bytes(), n.to_be_bytes()].concat()
}

fn descriptor(label: &str, sectors: u32) -> Vec<u8> {
    let mut d = vec![0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in d.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, b"\x01CD001\x01");
    // Names of the system, volume, set, publisher, preparer, application and three files: blanks.
    put(8, &[b' '; 64]);
    put(190, &[b' '; 623]);
    put(40, label.as_bytes().get(..32).unwrap_or(label.as_bytes()));
    put(80, &both32(sectors));
    put(120, &both16(1));
    put(124, &both16(1));
    put(128, &both16(SECTOR as u16));
    put(132, &both32(10));
    put(140, &LITTLE_TABLE.to_le_bytes());
    put(148, &BIG_TABLE.to_be_bytes());
    put(156, &record(&[0], FOLDER, SECTOR, true));
    // Made, changed, expires, effective: never.
    for at in [813, 830, 847, 864] {
        put(at, &[b'0'; 16]);
    }
    put(881, &[1]);
    d
}

/// The path table of one folder, the root.
fn table(place: [u8; 4], parent: [u8; 2]) -> Vec<u8> {
    [&[1, 0][..], &place, &parent, &[0, 0]].concat()
}

fn record(name: &[u8], at: u32, length: usize, is_folder: bool) -> Vec<u8> {
    let mut r = vec![0, 0];
    r.extend(both32(at));
    r.extend(both32(u32::try_from(length).unwrap_or(u32::MAX)));
    // 2000-01-01, the same every time.
    r.extend([100, 1, 1, 0, 0, 0, 0, if is_folder { 2 } else { 0 }, 0, 0]);
    r.extend(both16(1));
    r.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    r.extend_from_slice(name);
    r.resize(r.len().next_multiple_of(2), 0);
    let length = u8::try_from(r.len()).unwrap_or(u8::MAX);
    if let Some(first) = r.first_mut() {
        *first = length;
    }
    r
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_volume_is_the_same_every_time_and_begins_each_file_on_a_sector() {
        let files: [(&str, &[u8]); 2] = [("user-data", b"#cloud-config\n"), ("meta-data", &[7; 5000])];
        let bytes = volume("cidata", &files);
        assert_eq!(bytes, volume("cidata", &files));
        assert_eq!(bytes.len(), (21 + 3 + 1) * SECTOR);
        assert_eq!(&bytes[16 * SECTOR + 1..][..5], b"CD001");
        assert_eq!(&bytes[21 * SECTOR..][..4], &[7; 4]);
        assert!(bytes[24 * SECTOR..].starts_with(b"#cloud-config"));
    }

    #[test]
    fn machine_the_kernel_reads_it_by_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let (file, point) = (dir.path().join("iso"), dir.path().join("point"));
        let large = vec![9; 300_000];
        std::fs::write(&file, volume("cidata", &[("user-data", b"u"), ("network-config", b"n"), ("agent", &large)]))
            .unwrap();
        let label = Command::new("blkid")
            .args(["-p", "-o", "value", "-s", "LABEL"])
            .arg(&file)
            .output()
            .expect("blkid is missing");
        assert_eq!(String::from_utf8_lossy(&label.stdout).trim(), "cidata");
        std::fs::create_dir(&point).unwrap();
        let mounted =
            Command::new("mount").args(["-o", "ro,loop", "-t", "iso9660"]).arg(&file).arg(&point).output().unwrap();
        if !mounted.status.success() {
            // A kernel without this file system; the guests' have it, and the test that boots one reads it there.
            let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
            assert!(said.contains("unknown filesystem") || said.contains("loop"), "{said}");
            return;
        }
        let read = |name: &str| std::fs::read(point.join(name));
        let all = (read("user-data"), read("network-config"), read("agent"));
        Command::new("umount").arg(&point).status().unwrap();
        assert_eq!((all.0.unwrap(), all.1.unwrap()), (b"u".to_vec(), b"n".to_vec()));
        assert_eq!(all.2.unwrap(), large);
    }
}
