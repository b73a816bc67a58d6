//! Where a lab lives on this machine, and what is written down so that another process can end it.
//!
//! ```text
//! /run/vmatrix/<id>.json   who made it, where its folder is
//! <base>/vmatrix-<id>/     everything it writes; <base> is memory if there is room, else the disk
//! ```

use crate::layout::Place;
use crate::leftovers::sweep_processes;
use crate::namespace::Namespace;
use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const STATES: &str = "/run/vmatrix";
/// Room a lab needs: three copies of two images and the memory that guests write.
const ROOM: u64 = 4 << 30;
/// How long a lab may take to end itself after SIGTERM.
const ENDING_MAX: Duration = Duration::from_secs(60);

/// A lab as written down while it is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabState {
    pub id: String,
    /// The process that made it and keeps its daemons running.
    pub pid: i32,
    /// When that process began, in clock ticks since boot: a pid may be another's by now.
    pub pid_began: u64,
    pub folder: PathBuf,
    pub scenario: String,
    /// Address of the dashboard and of the CPA.
    pub dashboard: String,
    /// The fleet token's file, for the other verbs of `vmatrix`.
    pub token_file: PathBuf,
}

impl LabState {
    /// Whether the process that made it still runs.
    pub fn alive(&self) -> bool {
        began(self.pid) == Some(self.pid_began)
    }

    fn file(id: &str) -> PathBuf {
        Path::new(STATES).join(format!("{id}.json"))
    }

    /// Writes it down.
    ///
    /// # Errors
    /// `/run` cannot be written.
    pub fn write(&self) -> anyhow::Result<()> {
        std::fs::create_dir_all(STATES).with_context(|| format!("cannot make {STATES}"))?;
        let file = LabState::file(&self.id);
        std::fs::write(&file, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// When a process began, in clock ticks since boot; None if it is not there.
pub fn began(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in brackets, which may hold spaces; the start time is the 22nd.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// The labs that are written down, by id.
pub fn states() -> Vec<LabState> {
    let entries = std::fs::read_dir(STATES).into_iter().flatten().flatten();
    let mut all: Vec<LabState> =
        entries.filter_map(|e| serde_json::from_slice(&std::fs::read(e.path()).ok()?).ok()).collect();
    all.sort_by(|a, b| a.id.cmp(&b.id));
    all
}

/// Folders in which labs may have their own: memory first.
pub fn bases() -> Vec<PathBuf> {
    let mut all = vec![PathBuf::from("/dev/shm"), std::env::temp_dir()];
    all.dedup();
    all
}

/// Labs' folders in `base`.
pub fn folders(base: &Path, id: Option<&str>) -> Vec<PathBuf> {
    let prefix = id.map_or("vmatrix-".to_owned(), |id| format!("vmatrix-{id}"));
    let entries = std::fs::read_dir(base).into_iter().flatten().flatten().map(|e| e.path());
    let ours = |p: &PathBuf| {
        p.file_name()
            .and_then(|n| n.to_str())
            .is_some_and(|n| n.starts_with(&prefix) && is_id(n.trim_start_matches("vmatrix-").trim_end_matches("-db")))
    };
    let mut all: Vec<PathBuf> = entries.filter(ours).collect();
    all.sort();
    all
}

fn is_id(text: &str) -> bool {
    text.len() == 4 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Makes a place for a new lab: a free id, its folder (0700).
///
/// # Errors
/// No base has room, or none can be written.
pub fn make(store: &Path) -> anyhow::Result<Place> {
    let free = |base: &PathBuf| {
        nix::sys::statvfs::statvfs(base).map_or(0, |s| s.blocks_available().saturating_mul(s.fragment_size()))
    };
    // A file in /dev/shm takes memory that guests need too.
    let memory = available_memory();
    let fits = |base: &PathBuf| free(base) >= ROOM && (!base.starts_with("/dev/shm") || memory >= 2 * ROOM);
    let Some(base) = bases().into_iter().find(fits) else {
        bail!(
            "neither {} has {} GiB free, which a lab needs for images\n\nhint: set TMPDIR to a folder with room",
            bases().iter().map(|b| b.display().to_string()).collect::<Vec<_>>().join(" nor "),
            ROOM >> 30
        );
    };
    for _ in 0..100 {
        let mut random = [0; 2];
        getrandom::fill(&mut random).map_err(|e| anyhow::anyhow!("no random numbers: {e}"))?;
        let id = format!("{:02x}{:02x}", random[0], random[1]);
        if !Namespace::list(&format!("vmx-{id}-")).is_empty() || LabState::file(&id).exists() {
            continue;
        }
        let folder = base.join(format!("vmatrix-{id}"));
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => {
                let place = Place { id, folder, store: store.to_owned() };
                if place.memory() != place.folder {
                    std::fs::DirBuilder::new()
                        .mode(0o700)
                        .create(place.memory())
                        .with_context(|| format!("cannot make {}", place.memory().display()))?;
                }
                return Ok(place);
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).with_context(|| format!("cannot make {}", folder.display())),
        }
    }
    bail!("100 lab ids were taken\n\nhint: `vmatrix lab down` removes what dead labs left")
}

/// Memory that can be had without swapping, bytes.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Makes a folder that belongs to the user `postgres`: the database refuses to run as root, and a
/// lab's own folder is closed to everyone else.
///
/// # Errors
/// There is no such user, or the folder cannot be made.
pub fn give_to_postgres(folder: &Path) -> anyhow::Result<()> {
    let user = nix::unistd::User::from_name("postgres")
        .ok()
        .flatten()
        .context("there is no user postgres\n\nhint: apt-get install postgresql")?;
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    nix::unistd::chown(folder, Some(user.uid), Some(user.gid))
        .with_context(|| format!("cannot give {} away", folder.display()))
}

/// Removes everything that carries a lab's id: processes, namespaces, mounts, folders, its state file.
///
/// # Errors
/// A namespace or folder cannot be removed; the rest is removed nevertheless.
pub fn remove(id: &str) -> anyhow::Result<()> {
    let mut problems = Vec::new();
    let folders: Vec<PathBuf> = bases().iter().flat_map(|b| folders(b, Some(id))).collect();
    for folder in &folders {
        sweep_processes(id, folder);
    }
    if folders.is_empty() {
        sweep_processes(id, &PathBuf::from(format!("/vmatrix-{id}")));
    }
    for namespace in Namespace::list(&format!("vmx-{id}-")) {
        problems.extend(namespace.remove().err().map(|e| format!("{e:#}")));
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // The last mounted first: they may be nested.
    for mount in mounts
        .lines()
        .rev()
        .filter_map(|l| l.split(' ').nth(1))
        .filter(|m| folders.iter().any(|f| Path::new(m).starts_with(f)))
    {
        problems.extend(
            nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH)
                .err()
                .map(|e| format!("cannot unmount {mount}: {e}")),
        );
    }
    for folder in &folders {
        problems
            .extend(std::fs::remove_dir_all(folder).err().map(|e| format!("cannot remove {}: {e}", folder.display())));
    }
    let file = LabState::file(id);
    if file.exists() {
        problems.extend(std::fs::remove_file(&file).err().map(|e| format!("cannot remove {}: {e}", file.display())));
    }
    // Fails while another lab is up, which is right.
    let _ = std::fs::remove_dir(STATES);
    if problems.is_empty() { Ok(()) } else { bail!("lab {id} is not gone: {}", problems.join("; ")) }
}

/// Ids of everything labs left here, written down or not.
fn ids() -> std::collections::BTreeSet<String> {
    let named = Namespace::list("vmx-").into_iter().filter_map(|n| n.name().split('-').nth(1).map(str::to_owned));
    let foldered = bases()
        .iter()
        .flat_map(|b| folders(b, None))
        .filter_map(|f| Some(f.file_name()?.to_str()?.split('-').nth(1)?.to_owned()))
        .collect::<Vec<_>>();
    named.chain(foldered).chain(states().into_iter().map(|s| s.id)).filter(|id| is_id(id)).collect()
}

/// Ids of labs whose process is gone.
pub fn dead() -> Vec<String> {
    let alive: Vec<String> = states().into_iter().filter(LabState::alive).map(|s| s.id).collect();
    ids().into_iter().filter(|id| !alive.contains(id)).collect()
}

/// The labs that are up, and those that were not ended properly, one line each.
pub fn status() -> Vec<String> {
    let written = states()
        .into_iter()
        .filter(LabState::alive)
        .map(|s| format!("{}  up  {}  {}  process {}", s.id, s.scenario, s.dashboard, s.pid));
    let dead = dead().into_iter().map(|id| format!("{id}  dead  `vmatrix lab down {id}` removes what it left"));
    written.chain(dead).collect()
}

/// Ends labs: a living one is asked to end itself, what a dead one left is removed. Without `id`, all
/// that are written down, and everything dead. Answers the ids that were ended.
///
/// # Errors
/// Something could not be removed.
pub fn down(id: Option<&str>) -> anyhow::Result<Vec<String>> {
    let mut ended = Vec::new();
    for id in ids().into_iter().filter(|i| id.is_none_or(|id| id == i)) {
        if let Some(state) = states().into_iter().find(|s| s.id == id && s.alive()) {
            let _ = kill(Pid::from_raw(state.pid), Signal::SIGTERM);
            let deadline = Instant::now() + ENDING_MAX;
            let (_never, tick) = std::sync::mpsc::channel::<()>();
            while state.alive() && Instant::now() < deadline {
                let _ = tick.recv_timeout(Duration::from_millis(100));
            }
        }
        remove(&id)?;
        ended.push(id);
    }
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;

    #[test]
    fn only_folders_with_an_id_are_labs() {
        let base = tempfile::tempdir().unwrap();
        for name in ["vmatrix-a1b2", "vmatrix-a1b2-db", "vmatrix-store", "other"] {
            std::fs::create_dir(base.path().join(name)).unwrap();
        }
        let names: Vec<String> =
            folders(base.path(), None).iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect();
        assert_eq!(names, ["vmatrix-a1b2", "vmatrix-a1b2-db"]);
        assert_eq!(folders(base.path(), Some("ffff")).len(), 0);
    }

    #[test]
    fn machine_removing_a_lab_ends_what_outlived_its_daemons() {
        let place = make(Path::new("store")).unwrap();
        let namespace = Namespace::named(&place.namespace("home"));
        namespace.create().unwrap();
        let mut inside = namespace.run(|| std::process::Command::new("sleep").arg("60").spawn()).unwrap().unwrap();
        let mut outside = std::process::Command::new("sleep").arg0(&place.folder).arg("60").spawn().unwrap();
        // Somebody must wait for them, else they stay as zombies, which no longer have a namespace.
        let waiting = std::thread::spawn(move || (inside.wait().unwrap().success(), outside.wait().unwrap().success()));
        // A process has no command line for a moment after it was started.
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut left = crate::leftovers::look(Some(&place.id));
        while !left.0.iter().any(|l| l.starts_with("process")) && Instant::now() < deadline {
            left = crate::leftovers::look(Some(&place.id));
        }
        remove(&place.id).unwrap();
        assert!(left.0.iter().any(|l| l.starts_with("process")), "{left:?}");
        assert_eq!(waiting.join().unwrap(), (false, false));
        assert!(!place.folder.exists() && !namespace.path().exists());
    }

    #[test]
    fn a_process_that_is_gone_is_not_alive() {
        let own = std::process::id().cast_signed();
        assert!(began(own).is_some());
        assert_eq!(began(-5), None);
    }
}
