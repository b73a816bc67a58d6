//! A folder for what is in between: only its owner may enter it, and it goes with whoever made it.

use super::is_alive;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use vmatrix_vma_image::error::Result;
use vmatrix_vma_image::store::make_private;

/// How such folders begin; they end with the number of the process that made them.
const BEGIN: &str = ".vmatrix-build-";

/// What is mounted where.
const MOUNTS: &str = "/proc/self/mountinfo";

/// The folder.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one within `folder`, and removes what such a process that was killed left there.
    ///
    /// # Errors
    /// It cannot be made, or this process has one of that name there.
    pub fn within(folder: &Path, name: &str) -> Result<Scratch> {
        sweep(folder);
        Scratch::new(folder.join(format!("{BEGIN}{name}-{}", std::process::id())))
    }

    /// Makes one that is within another's.
    pub(crate) fn new(path: PathBuf) -> Result<Scratch> {
        make_private(&path)?;
        Ok(Scratch(path))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = clear(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a folder for what is in between stays; remove it by hand");
        }
    }
}

fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(tag) = name.to_str().and_then(|n| n.strip_prefix(BEGIN)) else { continue };
        if tag.rsplit('-').next().is_some_and(is_alive) {
            continue;
        }
        end_guests(&entry.path());
        if let Err(error) = clear(&entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "what was left in between stays");
        }
    }
}

/// Removes a folder. What is mounted in it is this machine's own (a program that makes a root file system mounts
/// /dev/shm there) and must not be emptied: it is unmounted first, and where it cannot be, everything stays.
fn clear(folder: &Path) -> io::Result<()> {
    let folder = folder.canonicalize()?;
    // The last one mounted is listed last, and in the way of those before.
    for point in mounted(&fs::read_to_string(MOUNTS)?, &folder).iter().rev() {
        umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    if let Some(point) = mounted(&fs::read_to_string(MOUNTS)?, &folder).first() {
        return Err(io::Error::other(format!("{} is mounted in it; unmount it", point.display())));
    }
    fs::remove_dir_all(&folder)
}

/// Where something is mounted in a folder, or on it.
fn mounted(mountinfo: &str, folder: &Path) -> Vec<PathBuf> {
    // A space, tab, line feed or backslash in a path is written as its number.
    let plain = |word: &str| {
        let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
        PathBuf::from(escapes.iter().fold(word.to_owned(), |text, (from, to)| text.replace(from, to)))
    };
    let points = mountinfo.lines().filter_map(|line| Some(plain(line.split(' ').nth(4)?)));
    points.filter(|point| point.starts_with(folder)).collect()
}

/// Ends the guests whose files are in this folder. A QEMU of another user than whoever started it is not ended with
/// them by the kernel.
fn end_guests(folder: &Path) {
    let within = format!("{}/", folder.display());
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let told = if read("comm").starts_with(b"qemu-") { read("cmdline") } else { continue };
        if told.windows(within.len()).any(|w| w == within.as_bytes()) {
            // It may have ended meanwhile.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    #[test]
    fn what_a_killed_process_left_goes_and_a_living_ones_stays() {
        let dir = tempfile::tempdir().unwrap();
        // No process has this number: it is above the kernel's largest.
        let killed = dir.path().join(format!("{BEGIN}x-4194305"));
        let other = dir.path().join("chunks-4194305");
        fs::create_dir(&killed).unwrap();
        fs::create_dir(&other).unwrap();
        let file = killed.join("memory");
        // A program of that name, which waits.
        let program = dir.path().join("qemu-system");
        fs::copy("/bin/sh", &program).unwrap();
        let mut guest = Command::new(program);
        guest.args(["-c", "echo up; read x"]).arg(&file).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut guest = guest.spawn().unwrap();
        guest.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
        let living = Scratch::within(dir.path(), "a").unwrap();
        let next = Scratch::within(dir.path(), "b").unwrap();
        assert!(!killed.exists() && living.path().exists() && other.exists());
        let ended = guest.wait().unwrap();
        assert_eq!(ended.signal(), Some(Signal::SIGKILL as i32), "its guest was not ended");
        let (one, two) = (living.path().to_owned(), next.path().to_owned());
        drop((living, next));
        assert!(!one.exists() && !two.exists());
    }

    #[test]
    fn machine_what_is_mounted_in_a_killed_builds_folder_is_unmounted_and_not_emptied() {
        let dir = tempfile::tempdir().unwrap();
        let (killed, ours) = (dir.path().join(format!("{BEGIN}x-4194305")), dir.path().join("ours"));
        let inner = killed.join("root/dev/a b");
        fs::create_dir_all(&inner).unwrap();
        fs::create_dir(&ours).unwrap();
        fs::write(ours.join("file"), "kept").unwrap();
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(&ours), &inner, None::<&str>, bind, None::<&str>).expect("needs root, to mount");
        assert!(inner.join("file").exists());
        let living = Scratch::within(dir.path(), "a").unwrap();
        let kept = fs::read_to_string(ours.join("file"));
        // Whatever happened, nothing stays mounted.
        let _ = umount2(&inner, MntFlags::MNT_DETACH);
        assert_eq!(kept.unwrap(), "kept", "what was mounted there was emptied");
        assert!(!killed.exists());
        let own = living.path().join("mounted");
        fs::create_dir(&own).unwrap();
        nix::mount::mount(Some(&ours), &own, None::<&str>, bind, None::<&str>).unwrap();
        drop(living);
        let kept = ours.join("file").exists();
        let _ = umount2(&own, MntFlags::MNT_DETACH);
        assert!(kept && !own.exists());
    }
}
