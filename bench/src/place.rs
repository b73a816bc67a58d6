//! Everything a bench leaves on a machine while it runs: found by its id, and gone when it ends.
//!
//! ```text
//! id ─▶ folders (disk, memory) + namespaces vmb-<id>-… + processes in them or naming the folders
//! drop, or the next bench's sweep ─▶ nothing of it
//! ```
//! The id is the process's: what belongs to a process that is gone was left by one that was killed.

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmatrix_lab::namespace::Namespace;

/// What every name begins with.
const PREFIX: &str = "vmb-";
/// Processes that were killed are gone in milliseconds; one in the kernel's hands may take longer.
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// The place of one running bench.
#[derive(Debug)]
pub struct Place {
    id: String,
    disk: PathBuf,
    memory: PathBuf,
}

impl Place {
    /// Sweeps away what killed benches left, and makes this one's folders.
    ///
    /// # Errors
    /// A folder cannot be made.
    pub fn claim() -> anyhow::Result<Place> {
        sweep();
        let id = std::process::id().to_string();
        let name = format!("{PREFIX}{id}");
        let place = Place { disk: disk_base().join(&name), memory: memory_base().join(&name), id };
        for folder in [&place.disk, &place.memory] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        Ok(place)
    }

    /// A folder on disk, for what is large.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// A folder in memory where there is a tmpfs; its path is short enough for sockets.
    pub fn memory(&self) -> &Path {
        &self.memory
    }

    /// A folder on disk that other users may search and read: for a database, which belongs to one of them.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open_folder(&self, name: &str) -> anyhow::Result<PathBuf> {
        let folder = disk_base().join(format!("{PREFIX}{}-open", self.id));
        let within = folder.join(name);
        match fs::remove_dir_all(&within) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot empty {}", within.display()));
            }
            _ => {}
        }
        let mut make = fs::DirBuilder::new();
        make.recursive(true)
            .mode(0o711)
            .create(&within)
            .with_context(|| format!("cannot make {}", within.display()))?;
        Ok(within)
    }

    /// Ends every program that runs in a namespace whose name begins with `prefix`, or names `folder`, and takes
    /// those namespaces away: what a daemon leaves that was meant to outlive it.
    pub fn clear(&self, prefix: &str, folder: &Path) {
        end(prefix, &format!("{}/", folder.display()));
    }

    /// A namespace of this bench.
    pub fn namespace(&self, name: &str) -> Namespace {
        Namespace::named(&self.namespace_name(name))
    }

    /// The name that namespace has.
    pub fn namespace_name(&self, name: &str) -> String {
        format!("{PREFIX}{}-{name}", self.id)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        clear(&self.id);
    }
}

fn disk_base() -> PathBuf {
    std::env::temp_dir()
}

fn memory_base() -> PathBuf {
    let shm = PathBuf::from("/dev/shm");
    if shm.is_dir() { shm } else { disk_base() }
}

/// Takes away what benches left whose process is gone.
fn sweep() {
    let folders = [disk_base(), memory_base()].into_iter().flat_map(|base| names_in(&base));
    let spaces = Namespace::list(PREFIX).into_iter().map(|n| n.name().to_owned());
    let ids: BTreeSet<String> = folders
        .chain(spaces)
        .filter_map(|name| Some(name.strip_prefix(PREFIX)?.split('-').next()?.to_owned()))
        .filter(|id| id.parse::<u32>().is_ok() && !Path::new("/proc").join(id).exists())
        .collect();
    for id in ids {
        tracing::warn!(id, "a bench was killed; taking away what it left");
        clear(&id);
    }
}

/// Takes away everything of one bench: processes first, for they hold the rest.
fn clear(id: &str) {
    let name = format!("{PREFIX}{id}");
    end(&format!("{name}-"), &format!("/{name}/"));
    for base in [disk_base(), memory_base()] {
        // Where both bases are one folder it is gone already.
        let _ = fs::remove_dir_all(base.join(&name));
        let _ = fs::remove_dir_all(base.join(format!("{name}-open")));
    }
}

/// Ends the processes of namespaces and of a folder, then removes the namespaces.
fn end(prefix: &str, folder: &str) {
    let began = Instant::now();
    loop {
        let left = processes_of(prefix, folder);
        if left.is_empty() || began.elapsed() > GONE_LIMIT {
            break;
        }
        for pid in left {
            // One that is gone already is as good.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
    for namespace in Namespace::list(prefix) {
        if let Err(e) = namespace.remove() {
            tracing::warn!(namespace = namespace.name(), error = format!("{e:#}"), "a namespace stays");
        }
    }
}

/// Processes in namespaces whose names begin with `prefix`, or whose command line holds `folder`.
fn processes_of(prefix: &str, folder: &str) -> Vec<i32> {
    let spaces: BTreeSet<u64> =
        Namespace::list(prefix).iter().filter_map(|n| Some(fs::metadata(n.path()).ok()?.ino())).collect();
    let own = std::process::id().cast_signed();
    let pids = names_in(Path::new("/proc")).into_iter().filter_map(|n| n.parse::<i32>().ok());
    pids.filter(|pid| *pid != own)
        .filter(|pid| {
            let inside = fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| spaces.contains(&m.ino()));
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            // A zombie has no command line and waits for its parent only.
            !line.is_empty() && (inside || String::from_utf8_lossy(&line).contains(folder))
        })
        .collect()
}

fn names_in(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn machine_what_a_killed_bench_left_is_swept_away_and_a_living_one_is_let_alone() {
        // No process has this number: it is above the largest the kernel gives.
        let dead = "4194999";
        let name = format!("{PREFIX}{dead}");
        let folder = memory_base().join(&name);
        fs::create_dir_all(&folder).unwrap();
        let namespace = Namespace::named(&format!("{name}-a"));
        namespace.create().expect("needs root and iproute2");
        fs::write(folder.join("file"), b"x").unwrap();
        let mut child = Command::new("tail").arg("-f").arg(folder.join("file")).stdout(Stdio::null()).spawn().unwrap();
        // It is found by its command line, which it has when it is `tail`.
        let (asked, named) = (Instant::now(), format!("/{name}/"));
        while processes_of(&name, &named).is_empty() {
            assert!(asked.elapsed() < GONE_LIMIT, "tail does not begin");
            std::thread::yield_now();
        }
        let place = Place::claim().unwrap();
        let mine = place.namespace("a");
        mine.create().unwrap();
        sweep();
        assert!(!namespace.path().exists(), "{} was left", namespace.path().display());
        assert!(!folder.exists(), "{} was left: {:?}", folder.display(), names_in(&folder));
        let ended = child.wait().unwrap();
        assert!(!ended.success(), "{ended}");
        assert!(mine.path().exists() && place.memory().exists());
        drop(place);
        assert!(!mine.path().exists());
    }
}
