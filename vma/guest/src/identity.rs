//! What makes a clone somebody of its own: its machine id, and whatever the image's hooks renew.
//!
//! ```text
//! a name from the host ─▶ /etc/machine-id (and D-Bus's) ─▶ /etc/vmatrix/awake.d/*, in order, each within its limit
//! ```
//! All of it is done before the host lets traffic in, so a hook that must be slow makes every resume slow. Most guests
//! have nothing to renew, which is looked for before the suspend: three questions to a cold file system would take a
//! quarter of an awakening.

use crate::children;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Programs that renew what clones may not share: keys, tickets, generators in a program's own memory.
const HOOKS: &str = "/etc/vmatrix/awake.d";
/// The first process has none to hand on.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// A hook takes some 10 ms; on a cold guest under TCG, some 100, and while its pages are recorded a second.
const HOOK_LIMIT: Duration = Duration::from_secs(6);
/// The host waits 10 s for everything.
const ALL_LIMIT: Duration = Duration::from_secs(8);
/// Hooks of one image; more of them would not fit into the limit.
pub const HOOKS_MAX: usize = 16;

/// Where the machine's id is written.
const MACHINE_IDS: [&str; 2] = ["etc/machine-id", "var/lib/dbus/machine-id"];
/// Whether there was nothing to renew when it was looked for last.
static NOTHING: AtomicBool = AtomicBool::new(false);

/// Looks whether `/` of this guest has anything to renew: done before it is suspended.
pub fn look() {
    NOTHING.store(is_nothing(Path::new("/"), Path::new(HOOKS)), Ordering::Relaxed);
}

/// Renews what `/` of this guest has.
pub fn renew(machine_id: &[u8; 16]) -> Result<(), String> {
    if NOTHING.load(Ordering::Relaxed) {
        return Ok(());
    }
    renew_in(Path::new("/"), machine_id, Path::new(HOOKS))
}

fn is_nothing(root: &Path, hooks: &Path) -> bool {
    MACHINE_IDS.iter().all(|name| !is_kept(&root.join(name))) && programs(hooks).is_ok_and(|hooks| hooks.is_empty())
}

/// Where there is none nobody reads it; one that is a link leads to the other.
fn is_kept(machine_id: &Path) -> bool {
    machine_id.symlink_metadata().is_ok_and(|m| m.is_file())
}

fn renew_in(root: &Path, machine_id: &[u8; 16], hooks: &Path) -> Result<(), String> {
    let text = machine_id.iter().map(|b| format!("{b:02x}")).collect::<String>() + "\n";
    for name in MACHINE_IDS {
        let path = root.join(name);
        if is_kept(&path) {
            fs::write(&path, &text).map_err(|e| format!("{}: {e}", path.display()))?;
        }
    }
    let deadline = Instant::now() + ALL_LIMIT;
    for hook in programs(hooks)? {
        let said = |problem: String| format!("hook {}: {problem}", hook.display());
        let child = children::start(Command::new(&hook).env("PATH", PATH).stdin(Stdio::null())).map_err(said)?;
        child.end(deadline.min(Instant::now() + HOOK_LIMIT)).map_err(said)?;
    }
    Ok(())
}

/// The hooks, by name.
fn programs(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let said = |e: std::io::Error| format!("{}: {e}", folder.display());
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(said(e)),
    };
    let mut paths = entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(said)?;
    if paths.len() > HOOKS_MAX {
        return Err(format!("{} has {} hooks, {HOOKS_MAX} may be", folder.display(), paths.len()));
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn hook(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn a_machine_id_is_replaced_where_there_is_one_and_hooks_run_in_order() {
        std::thread::spawn(children::reap);
        let dir = tempfile::tempdir().unwrap();
        let (root, hooks) = (dir.path(), dir.path().join("hooks"));
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir(&hooks).unwrap();
        fs::write(root.join("etc/machine-id"), "the image's\n").unwrap();
        let log = root.join("log");
        hook(&hooks, "20-second", &format!("echo second >> {}", log.display()));
        hook(&hooks, "10-first", &format!("echo first >> {}", log.display()));
        renew_in(root, &[0xab; 16], &hooks).unwrap();
        assert_eq!(fs::read_to_string(root.join("etc/machine-id")).unwrap(), "ab".repeat(16) + "\n");
        assert!(!root.join("var").exists(), "a machine id was made where nobody reads one");
        assert_eq!(fs::read_to_string(&log).unwrap(), "first\nsecond\n");
    }

    #[test]
    fn a_hook_that_fails_or_hangs_is_named_and_what_follows_it_is_not_run() {
        std::thread::spawn(children::reap);
        let dir = tempfile::tempdir().unwrap();
        hook(dir.path(), "10-bad", "exit 7");
        hook(dir.path(), "20-after", &format!("touch {}/ran", dir.path().display()));
        let error = renew_in(dir.path(), &[0; 16], dir.path()).unwrap_err();
        assert!(error.contains("10-bad") && error.contains("status 7"), "{error}");
        assert!(!dir.path().join("ran").exists());
        hook(dir.path(), "10-bad", "exec sleep 60");
        let error = renew_in(dir.path(), &[0; 16], dir.path()).unwrap_err();
        assert!(error.contains("10-bad") && error.contains("too long"), "{error}");
    }

    #[test]
    fn a_guest_without_hooks_needs_none_and_one_with_a_hook_or_an_id_has_something_to_renew() {
        let dir = tempfile::tempdir().unwrap();
        let (root, none) = (dir.path(), dir.path().join("none"));
        assert_eq!(renew_in(root, &[0; 16], &none), Ok(()));
        assert!(is_nothing(root, &none));
        fs::create_dir(root.join("etc")).unwrap();
        fs::write(root.join("etc/machine-id"), "").unwrap();
        assert!(!is_nothing(root, &none));
        fs::remove_file(root.join("etc/machine-id")).unwrap();
        hook(&root.join("etc"), "10-keys", "true");
        assert!(!is_nothing(root, &root.join("etc")));
    }
}
