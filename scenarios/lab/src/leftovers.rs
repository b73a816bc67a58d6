//! What labs leave on a machine: looked for before and after, and swept away by id.
//!
//! ```text
//! look() before ─▶ play ─▶ look() after ─▶ diff = what was left behind, which must be nothing
//! ```

use crate::namespace::Namespace;
use crate::place;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Traces of labs, as sentences' objects: `namespace vmx-a1b2-tokyo`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Leftovers(pub BTreeSet<String>);

/// Looks for namespaces, processes, mounts, folders and state files of labs, and for interfaces and
/// nft tables of the machine's own namespace. `id` narrows what carries a lab's id to one lab.
pub fn look(id: Option<&str>) -> Leftovers {
    let mut found = BTreeSet::new();
    let spaces = id.map_or("vmx-".to_owned(), |id| format!("vmx-{id}-"));
    let folder = id.map_or("/vmatrix-".to_owned(), |id| format!("/vmatrix-{id}"));
    found.extend(Namespace::list(&spaces).iter().map(|n| format!("namespace {}", n.name())));
    for (pid, words) in processes() {
        if words.iter().any(|w| place::bases().iter().any(|b| w.contains(&format!("{}{folder}", b.display())))) {
            found.insert(format!("process {pid} ({})", words.first().map_or("", String::as_str)));
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounted =
        mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|m| m.contains(&spaces) || m.contains(&folder));
    found.extend(mounted.map(|m| format!("mount {m}")));
    for base in place::bases() {
        found.extend(place::folders(&base, id).iter().map(|f| format!("folder {}", f.display())));
    }
    found.extend(
        place::states()
            .iter()
            .filter(|s| id.is_none_or(|id| s.id == id))
            .map(|s| format!("state file of lab {}", s.id)),
    );
    found.extend(names_in("/sys/class/net").iter().map(|n| format!("interface {n}")));
    found.extend(tables().iter().map(|t| format!("nft {t}")));
    Leftovers(found)
}

/// What is there afterwards and was not before, in order.
pub fn diff(before: &Leftovers, after: &Leftovers) -> Vec<String> {
    after.0.difference(&before.0).cloned().collect()
}

/// Ends every process of a lab that outlives its daemons (VMs, tunnels, a database): those in its
/// namespaces and those whose command line names its folder. SIGTERM, patience, SIGKILL, by pid.
pub fn sweep_processes(id: &str, folder: &Path) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let (_never, tick) = std::sync::mpsc::channel::<()>();
    let mut signal = Signal::SIGTERM;
    loop {
        let left = processes_of(id, folder);
        if left.is_empty() || Instant::now() > deadline + Duration::from_secs(5) {
            return;
        }
        if Instant::now() > deadline {
            signal = Signal::SIGKILL;
        }
        for pid in left {
            let _ = kill(Pid::from_raw(pid), signal);
        }
        let _ = tick.recv_timeout(Duration::from_millis(100));
    }
}

fn processes_of(id: &str, folder: &Path) -> Vec<i32> {
    let folder = folder.display().to_string();
    let ours: BTreeSet<u64> = Namespace::list(&format!("vmx-{id}-"))
        .iter()
        .filter_map(|n| Some(std::fs::metadata(n.path()).ok()?.ino()))
        .collect();
    let own = std::process::id().cast_signed();
    let inside = |pid: i32| std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| ours.contains(&m.ino()));
    processes()
        .into_iter()
        .filter(|(pid, words)| *pid != own && (inside(*pid) || words.iter().any(|w| w.contains(&folder))))
        .map(|(pid, _)| pid)
        .collect()
}

/// Every process with its command line.
fn processes() -> Vec<(i32, Vec<String>)> {
    let pids = names_in("/proc").into_iter().filter_map(|n| n.parse::<i32>().ok());
    pids.filter_map(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words = line.split(|b| *b == 0).filter(|w| !w.is_empty()).map(|w| String::from_utf8_lossy(w).into_owned());
        Some((pid, words.collect()))
    })
    .collect()
}

fn names_in(folder: &str) -> Vec<String> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok()).collect()
}

fn tables() -> Vec<String> {
    let listed = Command::new("nft").args(["list", "tables"]).output();
    listed.map(|o| String::from_utf8_lossy(&o.stdout).lines().map(str::to_owned).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_before_is_not_left_behind() {
        let seen = |names: &[&str]| Leftovers(names.iter().map(|n| (*n).to_owned()).collect());
        assert_eq!(diff(&seen(&["a"]), &seen(&["a"])), Vec::<String>::new());
        assert_eq!(diff(&seen(&["a", "gone"]), &seen(&["a", "new"])), ["new"]);
    }

    #[test]
    fn machine_a_namespace_left_by_hand_is_seen() {
        let before = look(Some("0left"));
        let namespace = Namespace::named("vmx-0left-by-hand");
        namespace.create().unwrap();
        let after = look(Some("0left"));
        namespace.remove().unwrap();
        let left = diff(&before, &after);
        assert!(left.contains(&"namespace vmx-0left-by-hand".to_owned()), "{left:?}");
    }
}
