//! Running the programs a build needs, with their own words in the error.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use vmatrix_vma_image::error::{DISK_FULL, Error, Result, io};

/// Programs a build calls, with the packages that have them.
pub const NEEDED: [(&str, &str); 13] = [
    ("setpriv", "util-linux"),
    ("unshare", "util-linux"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("dpkg-deb", "dpkg"),
    ("apt-get", "apt"),
    ("depmod", "kmod"),
    ("busybox", "busybox-static"),
    ("ip", "iproute2"),
    ("curl", "curl"),
    ("tar", "tar"),
];

/// Checks that every needed program is here, before anything begins.
pub fn check() -> Result<()> {
    let folders: Vec<PathBuf> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    for (program, package) in NEEDED {
        let found = folders.iter().any(|f| f.join(program).exists());
        if !found && !["/usr/sbin", "/sbin"].iter().any(|f| Path::new(f).join(program).exists()) {
            return Err(Error::Missing { program: program.to_owned(), package });
        }
    }
    Ok(())
}

/// Runs a program to its end.
pub fn run(what: &str, command: &mut Command) -> Result<Output> {
    let program = PathBuf::from(command.get_program());
    // In English, for some of their words are looked for.
    let output = command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null()).output().map_err(io("run", &program))?;
    if output.status.success() {
        return Ok(output);
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Err(Error::Tool { what: what.to_owned(), status: output.status.to_string(), said: reason(&text) })
}

/// The lines that say why: a full disk, else those marked as errors, else the last ones.
pub fn reason(text: &str) -> String {
    // What fails after a disk was full fails for that reason, and some say so in more and later lines.
    if let Some(full) = text.lines().find(|l| l.contains(DISK_FULL)) {
        return full.chars().take(1200).collect();
    }
    let marked: Vec<&str> = text.lines().filter(|l| l.starts_with("E:") || l.contains("rror")).collect();
    let lines: Vec<&str> = if marked.is_empty() { text.lines().collect() } else { marked };
    let last = lines.get(lines.len().saturating_sub(6)..).unwrap_or_default();
    last.join("\n").chars().take(1200).collect()
}

/// Runs a shell line inside a root file system.
pub fn inside(root: &Path, line: &str) -> Command {
    let mut command = Command::new("chroot");
    command
        .arg(root)
        .args(["/bin/sh", "-e", "-c", line])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("LC_ALL", "C.UTF-8");
    command
}

/// Copies a file; what is wrong with the source and what is full are two places.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).map_err(|e| match io("copy", from)(e) {
        Error::DiskFull { .. } => Error::DiskFull { what: "copy to", path: to.to_owned() },
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_lines_marked_as_errors_else_the_last_ones() {
        assert_eq!(reason("I: fine\nE: no such package\nI: bye"), "E: no such package");
        assert_eq!(reason("one\ntwo"), "one\ntwo");
        let full = "tar: ./lib: Cannot write: No space left on device";
        assert_eq!(reason(&format!("{full}\ntar: Exiting\nerror: tar failed")), full);
    }
}
