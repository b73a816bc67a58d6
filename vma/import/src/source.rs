//! A disk as somebody brings it ─▶ a raw sparse disk of ours.
//!
//! ```text
//! name or word ─▶ Format ─▶ header read here, strictly ─▶ raw: copied │ qcow2, vmdk: qemu-img, told the format
//!                           OVA: tar ─▶ ovf, mf ─▶ the one vmdk, read in its place
//! ```
//!
//! # Invariants
//! 1. A format is said, never guessed from what a file holds: a disk's bytes are its guest's, who may write
//!    there whatever looks like another format.
//! 2. No program sees a file before its header was read here, and then it is told not to open any other.
//! 3. When this fails, nothing of it is left.

use crate::convert::{self, From};
use crate::error::{Error, Result, io};
use crate::progress::{Count, Event, Observer};
use crate::{digests, ovf, qcow2, tar, vmdk};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use vmatrix_model::Bytes;

/// Bytes of a sector; a disk has whole ones.
pub const SECTOR: u64 = 512;
/// Smallest disk: a boot loader and something to load.
pub const DISK_MIN: u64 = 1 << 20;
/// Largest disk: the largest part an image may have.
pub const DISK_MAX: u64 = 64 << 30;
/// Bytes moved at once, and the grain of the holes left where all is zero.
const BLOCK: usize = 64 << 10;

/// How a disk is brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
    /// One file, streamOptimized or monolithicSparse.
    Vmdk,
    /// A machine's description with its one disk.
    Ova,
}

impl Format {
    /// The format that a file's name says; what it holds is not asked.
    ///
    /// # Errors
    /// [`Error::UnknownFormat`]: its name says nothing. `.img` is one of these: it is raw here and qcow2 there.
    pub fn of(path: &Path) -> Result<Format> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        extension.parse().map_err(|()| Error::UnknownFormat { path: path.to_owned() })
    }
}

impl std::str::FromStr for Format {
    type Err = ();
    fn from_str(word: &str) -> std::result::Result<Format, ()> {
        match word {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            "vmdk" => Ok(Format::Vmdk),
            "ova" => Ok(Format::Ova),
            _ => Err(()),
        }
    }
}

/// What came in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Disk {
    /// Of the raw disk.
    pub size: Bytes,
    /// What an OVA says of its machine, if it says anything.
    pub name: Option<String>,
    pub memory_mib: Option<u64>,
    pub cpus: Option<u32>,
    /// What an OVA asks for and an import leaves aside, by name.
    pub aside: Vec<String>,
}

/// Reads `path` and writes its disk, raw and sparse, to the new file `to`.
///
/// # Errors
/// The file is not what it is said to be, names other files, is damaged, encrypted or too large; the disk at
/// `to` is full. `to` is then gone.
pub fn raw(path: &Path, format: Format, to: &Path, observer: &Observer) -> Result<Disk> {
    let file = open(path)?;
    let before = file.metadata().map_err(io("read", path))?;
    let target = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(to);
    let target = target.map_err(io("create", to))?;
    let came = bring(path, &file, before.len(), format, to, &target, observer).and_then(|disk| {
        let after = file.metadata().map_err(io("read", path))?;
        // What was checked must be what was read.
        let same =
            (before.len(), before.mtime(), before.mtime_nsec()) == (after.len(), after.mtime(), after.mtime_nsec());
        if !same {
            return Err(bad(path, "was written to while it was read; import it again when nobody does"));
        }
        bootable(path, &target)?;
        target.sync_all().map_err(io("write", to))?;
        Ok(disk)
    });
    if came.is_err() {
        // It was made here; if it cannot be removed the error that is told says where it would be.
        let _ = fs::remove_file(to);
    }
    came
}

/// Opens a plain file; a pipe would be waited for, for ever.
fn open(path: &Path) -> Result<File> {
    let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(io("read", path))?;
    let plain = file.metadata().map_err(io("read", path))?.is_file();
    if plain { Ok(file) } else { Err(bad(path, "is no plain file; copy the disk into one and import that")) }
}

fn bring(
    path: &Path,
    file: &File,
    length: u64,
    format: Format,
    to: &Path,
    target: &File,
    observer: &Observer,
) -> Result<Disk> {
    let limit = convert::data_limit(length);
    match format {
        Format::Raw => {
            let head = part(file, path, 0, length.min(SECTOR))?;
            if [qcow2::MAGIC, vmdk::MAGIC].iter().any(|magic| head.starts_with(magic)) {
                return Err(bad(path, "begins as a qcow2 or VMDK file does, and is said to be raw; say which it is"));
            }
            if !(DISK_MIN..=DISK_MAX).contains(&length) || !length.is_multiple_of(SECTOR) {
                return Err(bad(
                    path,
                    &format!("is a disk of {length} bytes; it must be whole sectors, 1 MiB to 64 GiB"),
                ));
            }
            observer(Event::Step("copy the disk"));
            copy(path, file, to, target, length, observer)?;
            Ok(Disk { size: Bytes(length), ..Disk::default() })
        }
        Format::Qcow2 => {
            let head = part(file, path, 0, length.min(qcow2::HEAD as u64))?;
            let header =
                qcow2::read(&head, length).map_err(|problem| Error::BadQcow2 { path: path.to_owned(), problem })?;
            let read = |at: u64, to: &mut [u8]| file.read_exact_at(to, at);
            qcow2::whole(&header, length, &read)
                .map_err(|problem| Error::BadQcow2 { path: path.to_owned(), problem })?;
            observer(Event::Step("convert from qcow2"));
            convert::to_raw(path, file, From::Qcow2, to, target, header.size, limit, observer)?;
            Ok(Disk { size: Bytes(header.size), ..Disk::default() })
        }
        Format::Vmdk => {
            let size = vmdk_size(path, file, 0, length)?;
            observer(Event::Step("convert from VMDK"));
            convert::to_raw(path, file, From::Vmdk { at: 0, length }, to, target, size, limit, observer)?;
            Ok(Disk { size: Bytes(size), ..Disk::default() })
        }
        Format::Ova => ova(path, file, to, target, observer),
    }
}

fn ova(path: &Path, file: &File, to: &Path, target: &File, observer: &Observer) -> Result<Disk> {
    let refuse = |problem: &str| Error::BadOva { path: path.to_owned(), problem: problem.to_owned() };
    let mut archive = file;
    let entries = tar::list(&mut archive).map_err(|problem| Error::BadTar { path: path.to_owned(), problem })?;
    let ending =
        |ending: &str| entries.iter().filter(|e| e.name.to_ascii_lowercase().ends_with(ending)).collect::<Vec<_>>();
    let described = ending(".ovf");
    let [description] = described.as_slice() else {
        return Err(refuse("has not one description (.ovf); export one machine as an OVA"));
    };
    let text = text(path, file, description, ovf::TEXT_MAX)?;
    let machine = ovf::read(&text).map_err(|problem| Error::BadOvf { path: path.to_owned(), problem })?;
    let disk = entries.iter().find(|e| e.name == machine.disk);
    let disk = disk.ok_or_else(|| refuse("lacks the disk that its description names; fetch it again"))?;
    match ending(".mf").as_slice() {
        [] => observer(Event::Note("it has no digests (.mf), so nothing says whether it came undamaged")),
        [list] => {
            let list = self::text(path, file, list, digests::TEXT_MAX)?;
            observer(Event::Step("check the digests"));
            let mut count = Count::new(observer, description.size + disk.size);
            check(path, file, &list, description, &mut count)?;
            check(path, file, &list, disk, &mut count)?;
        }
        _ => return Err(refuse("has several lists of digests (.mf); fetch it again")),
    }
    let size = vmdk_size(path, file, disk.at, disk.size)?;
    if size != machine.capacity {
        observer(Event::Note("its description and its disk disagree on the disk's size; the disk's own is taken"));
    }
    observer(Event::Step("convert from VMDK"));
    let from = From::Vmdk { at: disk.at, length: disk.size };
    convert::to_raw(path, file, from, to, target, size, convert::data_limit(disk.size), observer)?;
    let left = entries.iter().filter(|e| ![".ovf", ".mf"].iter().any(|end| e.name.to_ascii_lowercase().ends_with(end)));
    let mut aside = machine.aside;
    aside.extend(left.filter(|e| e.name != disk.name).map(|e| format!("file {}", e.name)));
    Ok(Disk { size: Bytes(size), name: machine.name, memory_mib: machine.memory_mib, cpus: machine.cpus, aside })
}

fn vmdk_size(path: &Path, file: &File, at: u64, length: u64) -> Result<u64> {
    let head = part(file, path, at, length.min(vmdk::HEAD as u64))?;
    let tail = length.min(vmdk::TAIL as u64);
    let tail = part(file, path, at + length - tail, tail)?;
    let refuse = |problem| Error::BadVmdk { path: path.to_owned(), problem };
    let header = vmdk::read(&head, &tail).map_err(refuse)?;
    let read = |from: u64, to: &mut [u8]| file.read_exact_at(to, at.saturating_add(from));
    vmdk::whole(&header, length, &read).map_err(refuse)?;
    Ok(header.size)
}

fn text(path: &Path, file: &File, entry: &tar::Entry, max: usize) -> Result<String> {
    let refuse = |problem: String| Error::BadOva { path: path.to_owned(), problem };
    if entry.size > max as u64 {
        return Err(refuse(format!(
            "has {:?} of {} bytes, {max} may be; do not use this file",
            entry.name, entry.size
        )));
    }
    let bytes = part(file, path, entry.at, entry.size)?;
    String::from_utf8(bytes).map_err(|_| refuse(format!("has {:?}, which is no text; fetch it again", entry.name)))
}

/// Compares a file of the archive with its digest.
fn check(path: &Path, file: &File, list: &str, entry: &tar::Entry, count: &mut Count<'_>) -> Result<()> {
    let refuse = |problem| Error::BadDigests { path: path.to_owned(), problem };
    let mut check = digests::Check::new(digests::of(list, &entry.name).map_err(refuse)?);
    let mut at = entry.at;
    let end = entry.at + entry.size;
    while at < end {
        let bytes = part(file, path, at, (end - at).min(1 << 20))?;
        check.add(&bytes);
        count.add(bytes.len() as u64);
        at += bytes.len() as u64;
    }
    check.end().map_err(refuse)
}

/// Exactly these bytes; the caller bounds `length`.
fn part(file: &File, path: &Path, at: u64, length: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, at).map_err(io("read", path))?;
    Ok(bytes)
}

/// Copies a disk, leaving holes where it has holes or zeros.
fn copy(path: &Path, from: &File, to: &Path, target: &File, length: u64, observer: &Observer) -> Result<()> {
    target.set_len(length).map_err(io("size", to))?;
    let mut count = Count::new(observer, length);
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    while let Some((data, hole)) = data_after(from, at).map_err(io("read", path))? {
        at = data;
        while at < hole.min(length) {
            let take = usize::try_from(hole.min(length) - at).unwrap_or(BLOCK).min(BLOCK);
            let piece = block.get_mut(..take).unwrap_or_default();
            from.read_exact_at(piece, at).map_err(io("read", path))?;
            if piece.iter().any(|b| *b != 0) {
                target.write_all_at(piece, at).map_err(io("write", to))?;
            }
            at += take as u64;
            count.reach(at);
        }
    }
    count.reach(length);
    Ok(())
}

/// The next run of data from `at` on: its beginning and its end.
pub(crate) fn data_after(file: &File, at: u64) -> std::io::Result<Option<(u64, u64)>> {
    let seek = |at: i64, whence| lseek(file, at, whence);
    let start = i64::try_from(at).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    let data = match seek(start, Whence::SeekData) {
        Ok(data) => data,
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let hole = seek(data, Whence::SeekHole)?;
    Ok(Some((u64::try_from(data).unwrap_or(0), u64::try_from(hole).unwrap_or(0))))
}

/// A disk without a boot sector, or with nothing in it to run, would leave a guest that says nothing.
fn bootable(path: &Path, disk: &File) -> Result<()> {
    let sector = part(disk, path, 0, SECTOR)?;
    let signed = sector.get(510..512) == Some(&[0x55, 0xaa]);
    let empty = sector.get(..440).unwrap_or_default().iter().all(|b| *b == 0);
    match (signed, empty) {
        (false, _) => Err(bad(path, "has no boot sector: it is no whole disk, or another format than is said")),
        (true, true) => Err(bad(path, "has no boot code for BIOS: it boots by UEFI only; install `grub-pc` in it")),
        (true, false) => Ok(()),
    }
}

fn bad(path: &Path, problem: &str) -> Error {
    Error::BadRaw { path: path.to_owned(), problem: problem.to_owned() }
}
