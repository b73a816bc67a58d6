//! Processes that outlive this daemon: found by their command lines, ended by their ids.

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A process and how it was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub arguments: Vec<String>,
}

impl Process {
    /// The word after `flag`.
    pub fn value(&self, flag: &str) -> Option<&str> {
        self.arguments.windows(2).find(|w| w[0] == flag).map(|w| w[1].as_str())
    }
}

/// Every process there is; one that ended and was not waited for has no command line, so is not among them.
pub fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).filter_map(one).collect()
}

fn one(pid: i32) -> Option<Process> {
    let text = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let arguments: Vec<String> =
        text.split(|b| *b == 0).filter(|w| !w.is_empty()).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
    (!arguments.is_empty()).then_some(Process { pid, arguments })
}

/// A process that was just started, with its command line: the kernel shows that a moment after the start.
///
/// # Errors
/// It ended at once.
pub async fn started(child: &tokio::process::Child) -> anyhow::Result<Process> {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).context("it ended at once")?;
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        if let Some(process) = one(pid) {
            return Ok(process);
        }
        if Instant::now() > deadline {
            anyhow::bail!("process {pid} ended at once");
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Whether it is still the same one: ids are given out again.
pub fn is_alive(process: &Process) -> bool {
    one(process.pid).as_ref() == Some(process)
}

/// Waits until the process is gone, or the time is over; answers whether it is gone.
pub async fn gone(process: &Process, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while is_alive(process) {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    true
}

/// Ends a process: asks, and after `grace` insists.
///
/// # Errors
/// It may not be signalled, or does not end.
pub async fn end(process: &Process, grace: Duration) -> anyhow::Result<()> {
    for (signal, wait) in [(Signal::SIGTERM, grace), (Signal::SIGKILL, Duration::from_secs(5))] {
        if !is_alive(process) {
            return Ok(());
        }
        match kill(Pid::from_raw(process.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(e).with_context(|| format!("cannot end process {}", process.pid)),
        }
        if gone(process, wait).await {
            return Ok(());
        }
    }
    anyhow::bail!("process {} does not end; it may wait for a disk that does not answer", process.pid)
}

/// Where a program is, by `PATH` and the places of system programs.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|dir| dir.join(program)).find(|p| p.is_file())
}

/// The end of a log file, for an error: at most 500 bytes, one line.
pub fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let from = text.len().saturating_sub(500);
    String::from_utf8_lossy(&text[from..]).trim().replace('\n', " | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_and_another_with_its_id_is_not_it() {
        let me = all().into_iter().find(|p| p.pid == std::process::id() as i32).unwrap();
        assert!(is_alive(&me));
        let stranger = Process { arguments: vec!["qemu".into()], ..me };
        assert!(!is_alive(&stranger));
    }
}
