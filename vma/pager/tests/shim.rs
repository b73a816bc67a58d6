//! The preloaded library in a program that knows nothing of it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Output};
use vmatrix_vma_pager::{preload, shim};

/// Maps a file and says how many userfaultfds it then has.
const MAPS: &str = "import mmap, os, sys
file = open(sys.argv[1], 'rb')
kept = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
links = ['/proc/self/fd/' + n for n in os.listdir('/proc/self/fd')]
print(sum('userfaultfd' in os.readlink(link) for link in links if os.path.lexists(link)))";

fn run(memory: &Path, maps: &Path, user: Option<u32>) -> Output {
    let mut command = Command::new("python3");
    command.args(["-c", MAPS]).arg(maps).env("PYTHONDONTWRITEBYTECODE", "1");
    preload(&mut command, memory, false).unwrap();
    if let Some(user) = user {
        // Where that user can read it.
        let copy = memory.with_file_name("shim.so");
        std::fs::copy(shim().unwrap(), &copy).unwrap();
        std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755)).unwrap();
        command.env("LD_PRELOAD", copy).uid(user).gid(user);
    }
    command.output().expect("needs python3")
}

fn dir() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("vmx-shim").tempdir_in("/dev/shm").expect("needs a tmpfs at /dev/shm");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    for name in ["memory", "other"] {
        std::fs::File::create(dir.path().join(name)).unwrap().set_len(1 << 20).unwrap();
    }
    dir
}

#[test]
fn machine_the_memory_file_is_registered_and_no_other() {
    let dir = dir();
    let (memory, other) = (dir.path().join("memory"), dir.path().join("other"));
    let said = |maps: &Path| String::from_utf8(run(&memory, maps, None).stdout).unwrap();
    assert_eq!(said(&memory).trim(), "1");
    assert_eq!(said(&other).trim(), "0");
    // By what it is, not by what it is called.
    std::os::unix::fs::symlink(&memory, dir.path().join("alias")).unwrap();
    assert_eq!(said(&dir.path().join("alias")).trim(), "1");
}

#[test]
fn machine_a_process_that_cannot_be_registered_does_not_live() {
    let dir = dir();
    let memory = dir.path().join("memory");
    let output = run(&memory, &memory, Some(65534));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(6), "{output:?}");
    assert!(said.contains("userfaultfd") && said.contains("ending before"), "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn machine_a_memory_file_that_is_not_there_ends_the_process_at_once() {
    let dir = dir();
    let output = run(&dir.path().join("nothing"), &dir.path().join("other"), None);
    assert_eq!(output.status.signal(), Some(6), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("VMATRIX_MEMORY"));
}
