//! Lets libvirt's QEMU open what it is told to.
//!
//! A direct QEMU opens its files as root and then becomes nobody. Libvirt's never is root: each VM is a user of its own,
//! in the group of libvirt's QEMU. What VMs read together is given to the group, what one VM writes to its user, and
//! only what the command line names. Folders on the way are only looked at.

use crate::error::{Error, Result, io};
use std::fs::{Metadata, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use vmatrix_model::Digest;

/// What is asked of a file, as mode bits of one class.
const READ: u32 = 0o4;
const WRITE: u32 = 0o6;
const SEARCH: u32 = 0o1;
/// Users of VMs: the 2^28 ids below 2^31, which no distribution gives out.
const USERS: u32 = 0x7000_0000;

/// What a VM does with a file it is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Reads,
    /// Alone.
    Writes,
    /// Connects to this socket, as other VMs do.
    Connects,
}

/// A user and its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
}

impl User {
    /// A VM's own user, the same for the same guest agent's socket; two VMs have the same one with a chance of 2^-28.
    pub(crate) fn of(guest_agent: &Path, gid: u32) -> User {
        let bytes = Digest::of(guest_agent.as_os_str().as_bytes()).0;
        let number = bytes.first_chunk().map_or(0, |first| u32::from_le_bytes(*first));
        User { uid: USERS | number & 0x0fff_ffff, gid }
    }

    fn may(self, meta: &Metadata, bits: u32) -> bool {
        let shift = match () {
            () if self.uid == 0 => return true,
            () if meta.uid() == self.uid => 6,
            () if meta.gid() == self.gid => 3,
            () => 0,
        };
        meta.mode() >> shift & bits == bits
    }

    /// Whether every folder down to `path` may be passed.
    pub(crate) fn reaches(self, path: &Path) -> Result<()> {
        for folder in path.ancestors().skip(1).filter(|f| !f.as_os_str().is_empty()) {
            let meta = std::fs::metadata(folder).map_err(io("look at", folder))?;
            if !self.may(&meta, SEARCH) {
                return Err(Error::Closed { path: folder.to_owned(), uid: self.uid });
            }
        }
        Ok(())
    }

    /// Gives what a file is used for, unless the user has it.
    fn admit(self, path: &Path, used: Use) -> Result<()> {
        self.reaches(path)?;
        let meta = std::fs::metadata(path).map_err(io("look at", path))?;
        let bits = if used == Use::Reads { READ } else { WRITE };
        if self.may(&meta, bits) {
            return Ok(());
        }
        let mode = match used {
            Use::Writes => {
                chown(path, Some(self.uid), None).map_err(io("give QEMU's user", path))?;
                meta.mode() & 0o7077 | bits << 6
            }
            Use::Reads | Use::Connects => {
                chown(path, None, Some(self.gid)).map_err(io("give QEMU's group", path))?;
                meta.mode() & 0o7707 | bits << 3
            }
        };
        std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(io("let QEMU open", path))
    }

    /// Makes a folder that is the user's own.
    pub(crate) fn own_folder(self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(io("make", folder))?;
        std::fs::set_permissions(folder, Permissions::from_mode(0o700)).map_err(io("close to others", folder))?;
        chown(folder, Some(self.uid), Some(self.gid)).map_err(io("give QEMU's user", folder))?;
        self.reaches(folder)
    }
}

/// Lets the user open all that these arguments and variables name.
///
/// # Errors
/// A file is not there, or lies in a folder that the user may not pass.
pub(crate) fn admit(user: User, arguments: &[String], environment: &[(String, String)]) -> Result<()> {
    for (path, used) in named(arguments) {
        user.admit(&path, used)?;
    }
    // A library that cannot be read is passed over with a word on stderr, and the guest would run without it.
    let preloaded = environment.iter().filter(|(name, _)| name == "LD_PRELOAD").flat_map(|(_, v)| v.split([':', ' ']));
    for path in preloaded.filter(|p| p.starts_with('/')).map(Path::new) {
        user.admit(path, Use::Reads)?;
    }
    Ok(())
}

/// The files that QEMU's arguments name, and what for.
fn named(arguments: &[String]) -> Vec<(PathBuf, Use)> {
    let mut files = Vec::new();
    for (flag, value) in arguments.iter().zip(arguments.iter().skip(1)) {
        match flag.as_str() {
            "-kernel" | "-initrd" => files.push((PathBuf::from(value), Use::Reads)),
            "-object" | "-drive" | "-blockdev" => {
                let options = options(value);
                let said = |key: &str| options.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
                let closed = ["readonly", "read-only"].iter().any(|key| said(key) == Some("on"));
                // A generator of random numbers only reads.
                let reads = closed || value.starts_with("rng-random,");
                let mode = if reads { Use::Reads } else { Use::Writes };
                let opened = ["mem-path", "file", "filename", "file.filename"].iter().filter_map(|k| said(k));
                files.extend(opened.map(|path| (PathBuf::from(path), mode)));
                let sockets = ["server.path", "file.server.path"].iter().filter_map(|k| said(k));
                files.extend(sockets.map(|path| (PathBuf::from(path), Use::Connects)));
            }
            _ => {}
        }
    }
    files.retain(|(path, _)| path.is_absolute());
    files
}

/// `a=1,b=x,,y` ─▶ `(a, 1)`, `(b, x,y)`: a comma in a value is written twice.
fn options(value: &str) -> Vec<(String, String)> {
    let whole = value.replace(",,", "\0");
    let parts = whole.split(',').map(|part| part.replace('\0', ","));
    parts.filter_map(|part| part.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn what_is_read_is_granted_for_reading_and_what_is_shared_for_writing() {
        let clone = words("-object memory-backend-file,id=r,mem-path=/m,share=off,readonly=on,rom=off -device x");
        assert_eq!(named(&clone), [("/m".into(), Use::Reads)]);
        let shared = words("-object memory-backend-file,id=r,mem-path=/m,,1,share=on -kernel /k");
        assert_eq!(named(&shared), [("/m,1".into(), Use::Writes), ("/k".into(), Use::Reads)]);
        let disk = words("-drive file=/d,if=none,readonly=on -object rng-random,id=r,filename=/dev/urandom");
        assert_eq!(named(&disk), [("/d".into(), Use::Reads), ("/dev/urandom".into(), Use::Reads)]);
        let lazy = words("-blockdev driver=nbd,server.type=unix,server.path=/s,read-only=on");
        assert_eq!(named(&lazy), [("/s".into(), Use::Connects)]);
    }

    #[test]
    fn each_vm_is_a_user_of_its_own_that_nobody_else_is() {
        let (one, two) = (User::of(Path::new("/a/agent"), 5), User::of(Path::new("/b/agent"), 5));
        assert_ne!(one.uid, two.uid);
        assert_eq!(one, User::of(Path::new("/a/agent"), 5));
        assert!((0x7000_0000..0x8000_0000).contains(&one.uid));
    }

    #[test]
    fn a_file_that_may_be_opened_is_left_as_it_is_and_a_closed_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "x").unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        let me = std::fs::metadata(&file).unwrap();
        // One that is neither the owner nor in the group.
        let user = User { uid: me.uid() + 1, gid: me.gid() + 1 };
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        let closed = user.admit(&file, Use::Reads).unwrap_err();
        assert!(matches!(&closed, Error::Closed { path, .. } if path == dir.path()), "{closed}");
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o711)).unwrap();
        user.admit(&file, Use::Reads).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o644);
    }
}
