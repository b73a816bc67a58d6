//! What makes a clone somebody of its own: its machine id, and whatever the image's hooks renew.
//!
//! ```text
//! a name from the host ─▶ /etc/machine-id (and D-Bus's) ─▶ /etc/vmatrix/awake.d/*, in order, each within its limit
//! ```
//! All of it is done before the host lets traffic in, so a hook that must be slow makes every resume slow.

use crate::children;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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

/// Renews what `/` of this guest has.
pub fn renew(machine_id: &[u8; 16]) -> Result<(), String> {
    renew_in(Path::new("/"), machine_id, Path::new(HOOKS))
}

fn renew_in(root: &Path, machine_id: &[u8; 16], hooks: &Path) -> Result<(), String> {
    let text = machine_id.iter().map(|b| format!("{b:02x}")).collect::<String>() + "\n";
    for name in ["etc/machine-id", "var/lib/dbus/machine-id"] {
        let path = root.join(name);
        // Where there is none nobody reads it; one that is a link leads to the other.
        if path.symlink_metadata().is_ok_and(|m| m.is_file()) {
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
    fn a_guest_without_hooks_needs_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(renew_in(dir.path(), &[0; 16], &dir.path().join("none")), Ok(()));
    }
}
