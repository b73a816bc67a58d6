//! Ended processes: everybody's that nobody else waits for (the duty of process 1), and those somebody here awaits.
//!
//! ```text
//! start ─▶ awaited ── wait() in the reaper ──▶ ended ─▶ Child::end, or its limit
//! ```
//! One thread reaps everything, so a program that is started here is not waited for by its own starter: the reaper
//! would be faster half of the time.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Awaited processes, with what they ended with.
static AWAITED: Mutex<BTreeMap<i32, Option<Result<(), String>>>> = Mutex::new(BTreeMap::new());
static CHANGED: Condvar = Condvar::new();

/// A process whose end somebody waits for.
#[derive(Debug)]
pub struct Child(Pid);

/// Starts a program whose end [`Child::end`] tells.
pub fn start(command: &mut Command) -> Result<Child, String> {
    // Held across the start: the reaper may meet the end before this thread runs again.
    let mut awaited = lock();
    let child = command.spawn().map_err(|e| e.to_string())?;
    let id = i32::try_from(child.id()).map_err(|e| e.to_string())?;
    awaited.insert(id, None);
    CHANGED.notify_all();
    Ok(Child(Pid::from_raw(id)))
}

impl Child {
    /// Waits until `deadline` for it to end well; kills it then.
    pub fn end(self, deadline: Instant) -> Result<(), String> {
        let id = self.0.as_raw();
        let mut awaited = lock();
        loop {
            if let Some(Some(end)) = awaited.get(&id) {
                let end = end.clone();
                awaited.remove(&id);
                return end;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                awaited.remove(&id);
                // It is ours until it is reaped, so the number means it; one that has just ended needs no kill.
                let _ = kill(self.0, Signal::SIGKILL);
                return Err("took too long and was ended".to_owned());
            }
            awaited = CHANGED.wait_timeout(awaited, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Reaps for ever.
pub fn reap() {
    loop {
        let (id, end) = match wait() {
            Ok(WaitStatus::Exited(id, 0)) => (id, Ok(())),
            Ok(WaitStatus::Exited(id, code)) => (id, Err(format!("ended with status {code}"))),
            Ok(WaitStatus::Signaled(id, signal, _)) => (id, Err(format!("was ended by {signal}"))),
            Err(Errno::ECHILD) => {
                // No child yet, or none left: until one is started here, or a stranger's orphan may have come.
                drop(CHANGED.wait_timeout(lock(), Duration::from_secs(1)));
                continue;
            }
            _ => continue,
        };
        if let Some(slot) = lock().get_mut(&id.as_raw()) {
            *slot = Some(end);
            CHANGED.notify_all();
        }
    }
}

fn lock() -> MutexGuard<'static, BTreeMap<i32, Option<Result<(), String>>>> {
    AWAITED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(line: &str) -> Child {
        start(Command::new("/bin/sh").args(["-c", line])).unwrap()
    }

    #[test]
    fn an_end_is_told_to_whoever_started_it_and_one_that_hangs_is_ended() {
        std::thread::spawn(reap);
        let in_time = || Instant::now() + Duration::from_secs(10);
        assert_eq!(shell("exit 0").end(in_time()), Ok(()));
        assert!(shell("exit 3").end(in_time()).unwrap_err().contains("status 3"));
        assert!(shell("kill -TERM $$").end(in_time()).unwrap_err().contains("SIGTERM"));
        let began = Instant::now();
        let soon = began + Duration::from_millis(100);
        assert!(shell("exec sleep 60").end(soon).unwrap_err().contains("too long"));
        assert!(began.elapsed() < Duration::from_secs(5), "it waited for the sleep");
        assert!(lock().is_empty(), "ends are kept that nobody waits for");
    }
}
