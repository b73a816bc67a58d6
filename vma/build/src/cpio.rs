//! The archive a kernel unpacks as its first root file system: cpio, format "newc".

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path without a leading slash.
    pub path: String,
    pub content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Directory,
    File(Vec<u8>),
    Executable(Vec<u8>),
}

const LAST: &str = "TRAILER!!!";

/// Writes an archive; the same entries give the same bytes. Folders must come before what is in them.
pub fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, entry) in entries.iter().enumerate() {
        let (mode, body): (u32, &[u8]) = match &entry.content {
            Content::Directory => (0o040_755, &[]),
            Content::File(bytes) => (0o100_644, bytes),
            Content::Executable(bytes) => (0o100_755, bytes),
        };
        write(&mut out, number + 1, mode, &entry.path, body);
    }
    write(&mut out, 0, 0, LAST, &[]);
    out
}

fn write(out: &mut Vec<u8>, inode: usize, mode: u32, path: &str, body: &[u8]) {
    let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    let fields = [inode, mode as usize, 0, 0, links, 0, body.len(), 0, 0, 0, 0, path.len() + 1, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(body);
    pad(out);
}

/// Every header and body begins on a multiple of four.
fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_cpio_reads_back_what_was_archived() {
        let entries = [
            Entry { path: "bin".into(), content: Content::Directory },
            Entry { path: "bin/a".into(), content: Content::Executable(b"odd length".to_vec()) },
            Entry { path: "bin/b".into(), content: Content::File(b"four".to_vec()) },
        ];
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("archive");
        std::fs::write(&file, archive(&entries)).unwrap();
        let read = std::process::Command::new("busybox")
            .args(["cpio", "-i", "-F"])
            .arg(&file)
            .current_dir(dir.path())
            .output()
            .expect("busybox is missing; apt-get install busybox-static");
        assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
        assert_eq!(std::fs::read(dir.path().join("bin/a")).unwrap(), b"odd length");
    }

    #[test]
    fn every_entry_begins_on_a_multiple_of_four() {
        let entry = |path: &str, body: &[u8]| Entry { path: path.into(), content: Content::File(body.to_vec()) };
        let bytes = archive(&[entry("a", b"1"), entry("ab", b"12"), entry("abc", b"123")]);
        let starts: Vec<usize> =
            bytes.windows(6).enumerate().filter(|(_, w)| *w == b"070701").map(|(i, _)| i).collect();
        assert_eq!(starts.len(), 4);
        assert!(starts.iter().all(|s| s % 4 == 0), "{starts:?}");
    }
}
