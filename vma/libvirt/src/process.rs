//! QEMU processes, found by what they were started with: that is also how they are found by a caller that began again.

use crate::error::{Error, Result, io};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::time::{Duration, Instant};
use vmatrix_vma_image::machine::QEMU;

/// A killed process is gone in milliseconds; one that waits for a disk may not be.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// Bytes of a log that are repeated in an error.
const TAIL: usize = 600;
/// Longest name.
const NAME_MAX: usize = 64;

/// Refuses a name that is no file name, no word of an option or no name of a domain.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if plain && !name.is_empty() && !name.starts_with('.') && name.len() <= NAME_MAX {
        return Ok(());
    }
    Err(Error::BadName { name: name.to_owned() })
}

/// How a VM's QEMU is known among all processes: by its name, and by the socket of its guest agent, for somebody else
/// may have a VM of this name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    named: String,
    socket: String,
}

impl Mark {
    /// `named`: the first word of `-name`, which is `guest=NAME` under libvirt.
    pub(crate) fn new(named: String, guest_agent: &Path) -> Mark {
        Mark { named, socket: format!("path={}", guest_agent.display().to_string().replace(',', ",,")) }
    }

    /// The option that names the socket, as it stands on the command line.
    pub(crate) fn socket(&self) -> &str {
        &self.socket
    }

    /// The process; one that ended and was not waited for has no command line, so is not found.
    pub(crate) fn find(&self) -> Result<Option<i32>> {
        let folder = Path::new("/proc");
        let entries = std::fs::read_dir(folder).map_err(io("list", folder))?;
        let mut pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
        Ok(pids.find(|pid| self.is(*pid)))
    }

    /// Whether this process is it: ids are given out again.
    pub(crate) fn is(&self, pid: i32) -> bool {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|text| self.matches(&text))
    }

    fn matches(&self, cmdline: &[u8]) -> bool {
        let words: Vec<&[u8]> = cmdline.split(|b| *b == 0).collect();
        let first = |word: &[u8]| word.split(|b| *b == b',').next() == Some(self.named.as_bytes());
        let names = words.windows(2).any(|w| matches!(w, [flag, value] if *flag == b"-name" && first(value)));
        let socket = format!(",{},", self.socket).into_bytes();
        let has_socket = |word: &&[u8]| word.windows(socket.len()).any(|part| part == socket);
        words.first().is_some_and(|w| w.ends_with(QEMU.as_bytes())) && names && words.iter().any(has_socket)
    }

    /// Waits until the process is gone; answers whether it is.
    pub(crate) async fn gone(&self, pid: i32, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.is(pid) {
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }

    /// Kills the process and waits until it is gone.
    pub(crate) async fn end(&self, pid: i32) -> Result<()> {
        if !self.is(pid) {
            return Ok(());
        }
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(io("end the process", Path::new(&format!("/proc/{pid}")))(e.into())),
        }
        if self.gone(pid, KILL_LIMIT).await { Ok(()) } else { Err(Error::Stuck { pid }) }
    }
}

/// The end of a log, as one line; empty if there is none.
pub(crate) fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(text.len().saturating_sub(TAIL)..).unwrap_or_default()).into_owned();
    // The first line of what is left may be half of one.
    let whole = if text.len() < TAIL { text.as_str() } else { text.split_once('\n').map_or("", |(_, rest)| rest) };
    whole.trim().replace('\n', " | ")
}

/// Removes a VM's folder; well if there is none.
pub(crate) fn forget(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io("remove", folder)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_is_known_by_the_whole_of_its_name_and_its_socket() {
        let of = |named: &str, socket: &str| Mark::new(named.to_owned(), Path::new(socket));
        let line =
            b"/usr/bin/qemu-system-x86_64\0-name\0guest=one,debug-threads=on\0-chardev\0socket,path=/a,,b/agent,\
                     server=on\0";
        assert!(of("guest=one", "/a,b/agent").matches(line));
        assert!(!of("guest=on", "/a,b/agent").matches(line) && !of("one", "/a,b/agent").matches(line));
        assert!(!of("guest=one", "/b/agent").matches(line) && !of("guest=one", "/a,b/agen").matches(line));
        assert!(!of("one", "/a").matches(b"/usr/bin/vi\0-name\0one\0,path=/a,\0"));
        assert!(!of("one", "/a").matches(b""));
    }

    #[test]
    fn a_name_is_a_word_of_any_option_and_any_file() {
        for good in ["vx-news.lyon-0", "A_1"] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "../x", "a,b", "a b", "a/b", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_end_of_a_log_is_one_line_and_short() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(tail(&log), "");
        std::fs::write(&log, format!("{}\none\ntwo\n", "x".repeat(2000))).unwrap();
        assert_eq!(tail(&log), "one | two");
    }
}
