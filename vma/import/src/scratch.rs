//! A folder for what is in between: only its owner may enter it, and it goes with whoever made it.

use crate::error::{Result, io};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// How such folders begin; they end with the number of the process that made them.
const BEGIN: &str = ".vmatrix-disk-";

/// The folder.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// Makes one within `folder`, and removes what such a process that was killed left there.
    pub(crate) fn within(folder: &Path, name: &str) -> Result<Scratch> {
        sweep(folder);
        let path = folder.join(format!("{BEGIN}{name}-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(io("create", &path))?;
        Ok(Scratch(path))
    }

    /// A file in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The folder itself.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a folder for what is in between stays; remove it by hand");
        }
    }
}

fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(tag) = name.to_str().and_then(|n| n.strip_prefix(BEGIN)) else { continue };
        let alive = tag.rsplit('-').next().is_some_and(|pid| Path::new("/proc").join(pid).exists());
        if alive {
            continue;
        }
        end_guests(&entry.path());
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "what was left in between stays");
        }
    }
}

/// Ends the guests whose files are in this folder. Their QEMU has another user than whoever started it, so the
/// kernel does not end it with them.
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
        fs::create_dir(&killed).unwrap();
        let file = killed.join("memory");
        // A program of that name, which waits.
        let program = dir.path().join("qemu-system");
        fs::copy("/bin/sh", &program).unwrap();
        let mut guest = Command::new(program);
        guest.args(["-c", "echo up; read x"]).arg(&file).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut guest = guest.spawn().unwrap();
        guest.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
        let living = Scratch::within(dir.path(), "a").unwrap();
        let other = Scratch::within(dir.path(), "b").unwrap();
        assert!(!killed.exists() && living.path().exists());
        let ended = guest.wait().unwrap();
        assert_eq!(ended.signal(), Some(Signal::SIGKILL as i32), "its guest was not ended");
        drop(living);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        drop(other);
    }
}
