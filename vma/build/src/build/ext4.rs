//! Folders ─▶ disks (ext4), without mounting anything; the same folders give the same bytes.
//!
//! ```text
//! root ─walk, by name─▶ Tree ─mke2fs (empty), debugfs (one command per thing)─▶ disk, read-only in the guest
//! MiB ─mke2fs─▶ an empty disk with a journal, for a guest that writes
//! ```
//! `mke2fs -d` would be shorter, but takes a folder's entries as they come and the moment of the build with them.

use super::tools::run;
use super::tree::{Content, Tree};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use vmatrix_vma_image::error::{Error, Result, io};

/// When everything on a disk was made: the first second of 2026. What is older in a package stays so.
pub const MADE: u64 = 1_767_225_600;
/// Names the file system, and is the seed of its folders' hashes. Nothing looks for a disk by it.
const ID: &str = "76a1d15c-0e2f-4b3a-9d57-6f1c20b8e4aa";
/// Said in full, for a machine may have defaults of its own.
const FEATURES: &str = "none,ext_attr,filetype,extent,flex_bg,sparse_super,large_file,dir_nlink,extra_isize";
const BLOCK: u64 = 4096;
/// Blocks for what describes the disk, beside a twentieth of the whole; what is not used is zeros and not stored.
const MORE_BLOCKS: u64 = 1024;
/// MiB of a written disk's journal: as small as it may be, for it is written again and again, and shipped.
const JOURNAL_MIB: u32 = 4;

/// Makes a disk of what is in `root`.
///
/// # Errors
/// A name that no command can say, a program that fails, a full disk.
pub fn of(root: &Path, disk: &Path) -> Result<()> {
    let tree = Tree::read(root)?;
    let (mut blocks, mut inodes) = (0, 0);
    for entry in tree.entries.values() {
        inodes += 1;
        blocks += match &entry.content {
            Content::File { size, .. } => size.div_ceil(BLOCK),
            Content::Folder => 1,
            Content::Link(_) | Content::Device(_) => 0,
        };
    }
    let inodes = inodes + 32;
    let blocks = (blocks + inodes / 16) * 21 / 20 + MORE_BLOCKS;
    make(disk, FEATURES, &["-N", &inodes.to_string()], blocks)?;
    let script = disk.with_extension("debugfs");
    let written = fs::write(&script, commands(root, &tree)?).map_err(io("write", &script));
    let filled = written.and_then(|()| fill(disk, &script));
    // Its folder goes anyway, and with it what could not be removed here.
    let _ = fs::remove_file(&script);
    filled?;
    run("e2fsck", dated("e2fsck").args(["-f", "-n"]).arg(disk)).map(drop)
}

/// Makes an empty disk of `mib` MiB, for a guest that writes.
///
/// # Errors
/// mke2fs fails, or a full disk.
pub fn empty(mib: u32, disk: &Path) -> Result<()> {
    let features = format!("{FEATURES},has_journal,dir_index,metadata_csum");
    let journal = format!("size={JOURNAL_MIB}");
    make(disk, &features, &["-J", &journal], u64::from(mib) << 20 >> 12)
}

fn make(disk: &Path, features: &str, more: &[&str], blocks: u64) -> Result<()> {
    // Its inodes are zeros already, so that the guest need not write them.
    let extended = format!("root_owner=0:0,hash_seed={ID},lazy_itable_init=0,lazy_journal_init=0,nodiscard");
    let mut command = dated("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-b", &BLOCK.to_string(), "-I", "256", "-m", "0", "-U", ID]);
    command.args(["-E", &extended, "-O", features]).args(more).arg(disk).arg(blocks.to_string());
    run("mke2fs", &mut command).map(drop)
}

/// A program of e2fsprogs, at the moment when everything was made.
fn dated(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("E2FSPROGS_FAKE_TIME", MADE.to_string());
    command
}

/// Has debugfs do what the script says. It ends well whatever happened, so what it says is looked at.
fn fill(disk: &Path, script: &Path) -> Result<()> {
    let mut command = dated("debugfs");
    command.arg("-w").arg("-f").arg(script).arg(disk).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    let output = command.output().map_err(io("run", Path::new("debugfs")))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // The first line is its version.
    let wrong: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty() && !l.starts_with("debugfs ")).collect();
    if output.status.success() && wrong.is_empty() {
        return Ok(());
    }
    let said = wrong.iter().take(5).copied().collect::<Vec<_>>().join("\n");
    Err(Error::Tool { what: "debugfs".to_owned(), status: output.status.to_string(), said })
}

fn commands(root: &Path, tree: &Tree) -> Result<String> {
    let mut text = String::new();
    let mut folder = Path::new("");
    // Of one file with several names: the first, and how many.
    let mut names: BTreeMap<(u64, u64), (String, u32)> = BTreeMap::new();
    // Writing to a string does not fail.
    for (path, entry) in &tree.entries {
        let parent = path.parent().unwrap_or(Path::new(""));
        if parent != folder {
            let _ = writeln!(text, "cd {}", quoted(&Path::new("/").join(parent))?);
            folder = parent;
        }
        let at = quoted(&Path::new("/").join(path))?;
        let name = quoted(Path::new(path.file_name().unwrap_or_default()))?;
        if entry.names > 1 {
            let (first, count) = names.entry(entry.file).or_insert_with(|| (at.clone(), 0));
            *count += 1;
            if *count > 1 {
                let _ = writeln!(text, "ln {first} {name}");
                continue;
            }
        }
        let _ = match &entry.content {
            Content::Folder => writeln!(text, "mkdir {name}"),
            Content::File { .. } => writeln!(text, "write {} {name}", quoted(&root.join(path))?),
            Content::Link(to) => writeln!(text, "symlink {name} {}", quoted(to)?),
            Content::Device(number) => {
                let kind = if entry.mode & 0o170_000 == 0o020_000 { "c" } else { "b" };
                let (major, minor) = (nix::sys::stat::major(*number), nix::sys::stat::minor(*number));
                writeln!(text, "mknod {name} {kind} {major} {minor}")
            }
        };
        for (field, value) in [("uid", entry.uid), ("gid", entry.gid)] {
            if value != 0 {
                let _ = writeln!(text, "sif {at} {field} {value}");
            }
        }
        if !entry.capability.is_empty() {
            let value: String = entry.capability.iter().map(|byte| format!("\\{byte:03o}")).collect();
            let _ = writeln!(text, "ea_set {at} security.capability \"{value}\"");
        }
        let _ = writeln!(text, "sif {at} mode 0{:o}\nsif {at} mtime @{}", entry.mode, entry.mtime.min(MADE));
    }
    for (first, count) in names.values().filter(|(_, count)| *count > 1) {
        // A name more does not make it known that there is one.
        let _ = writeln!(text, "sif {first} links_count {count}");
    }
    Ok(text)
}

/// As one word of a command.
fn quoted(path: &Path) -> Result<String> {
    let word = path.to_str().filter(|text| !text.contains('\n'));
    let word = word.ok_or_else(|| Error::Tool {
        what: format!("putting {} onto a disk", path.display()),
        status: "not done".to_owned(),
        said: "its name is no line of text; remove it in the recipe's setup".to_owned(),
    })?;
    Ok(format!("\"{}\"", word.replace('"', "\"\"")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    /// Mounted where it can be looked into, until the end.
    struct Mounted(tempfile::TempDir);
    impl Mounted {
        fn new(disk: &Path) -> Mounted {
            let dir = tempfile::tempdir().unwrap();
            let mut mount = Command::new("mount");
            mount.args(["-o", "loop,ro", "-t", "ext4"]).arg(disk).arg(dir.path());
            run("mount (needs root and a loop device)", &mut mount).unwrap();
            Mounted(dir)
        }
    }
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
        }
    }

    fn root(at: &Path) {
        fs::create_dir_all(at.join("usr/lib/deep \"name\"")).unwrap();
        fs::write(at.join("usr/lib/deep \"name\"/file"), vec![7; 10_000]).unwrap();
        fs::write(at.join("usr/own"), "own").unwrap();
        fs::set_permissions(at.join("usr/own"), fs::Permissions::from_mode(0o4751)).unwrap();
        chown(at.join("usr/own"), Some(33), Some(1000)).unwrap();
        fs::hard_link(at.join("usr/own"), at.join("usr/other")).unwrap();
        symlink(format!("lib/{}", "long/".repeat(30)), at.join("usr/link")).unwrap();
        let (kind, rights) = (nix::sys::stat::SFlag::S_IFCHR, nix::sys::stat::Mode::from_bits_truncate(0o600));
        nix::sys::stat::mknod(&at.join("usr/gone"), kind, rights, 0).expect("needs root");
    }

    #[test]
    fn machine_a_disk_has_what_the_folder_has_and_the_same_folder_gives_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| {
            let at = dir.path().join(name);
            root(&at);
            let disk = dir.path().join(format!("{name}.disk"));
            of(&at, &disk).unwrap();
            disk
        });
        assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap(), "the same folder gives other bytes");
        let mounted = Mounted::new(&one);
        let at = mounted.0.path();
        let (was, is) = (Tree::read(&dir.path().join("one")).unwrap(), Tree::read(at).unwrap());
        let known = |t: &Tree| {
            let all = t.entries.iter().filter(|(p, _)| !p.starts_with("lost+found"));
            all.map(|(p, e)| (p.clone(), e.mode, e.uid, e.gid, e.content.clone(), e.names)).collect::<Vec<_>>()
        };
        let files = |t: &Tree| known(t).into_iter().filter(|k| k.4 != Content::Folder).collect::<Vec<_>>();
        assert_eq!(files(&is), files(&was));
        assert_eq!(known(&is).len(), known(&was).len());
        assert_eq!(fs::read(at.join("usr/lib/deep \"name\"/file")).unwrap(), vec![7; 10_000]);
        assert_eq!(
            fs::metadata(at.join("usr/own")).unwrap().mtime() as u64,
            MADE.min(was.entries[Path::new("usr/own")].mtime)
        );
    }

    #[test]
    fn a_name_that_is_no_line_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::write(dir.path().join("root/a\nrm b"), "").unwrap();
        let error = of(&dir.path().join("root"), &dir.path().join("disk")).unwrap_err().to_string();
        assert!(error.contains("no line of text"), "{error}");
    }

    #[test]
    fn an_empty_disk_is_mostly_zeros_and_the_same_every_time() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| {
            let disk = dir.path().join(name);
            empty(64, &disk).unwrap();
            fs::read(disk).unwrap()
        });
        assert_eq!(one.len(), 64 << 20);
        assert!(one == two, "two empty disks differ");
        let written = one.chunks(64 << 10).filter(|chunk| chunk.iter().any(|b| *b != 0)).count();
        assert!(written <= 16, "{written} chunks of 64 KiB are not zeros");
    }
}
