//! Starts the daemons inside their namespaces and keeps them running.
//!
//! ```text
//! stopped ─start─▶ running ─exit─▶ waiting (backoff, or until a fault's end) ─▶ running
//! ```
//! A supervisor thread looks ten times a second; each restart is a note in the recording.

use crate::namespace::Namespace;
use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A daemon that keeps dying is started again after 0.2 s, then 0.4 s, and so on up to this.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
/// A daemon that ran so long is well again.
const WELL_AFTER: Duration = Duration::from_secs(10);
/// Between SIGTERM and SIGKILL.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most notes kept; a daemon that crashes for ever writes the same one.
const NOTES_MAX: usize = 200;

/// A program to keep running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    pub name: String,
    /// None: the namespace of the lab itself.
    pub namespace: Option<Namespace>,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// Where what it prints goes, appended.
    pub log: PathBuf,
}

impl Program {
    fn start(&self) -> anyhow::Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("cannot write {}", self.log.display()))?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Ctrl-C ends the lab, which then ends its daemons in order.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let started = match &self.namespace {
            // A child begins in the namespace of the thread that starts it.
            Some(namespace) => namespace.run(|| command.spawn())?,
            None => command.spawn(),
        };
        started.with_context(|| format!("cannot start {} ({})", self.name, self.program.display()))
    }

    /// The last lines of its log, for error messages.
    pub fn last_words(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text =
            String::from_utf8_lossy(text.get(text.len().saturating_sub(2000)..).unwrap_or_default()).into_owned();
        let mut lines: Vec<&str> = text.lines().rev().take(5).collect();
        lines.reverse();
        lines.join("\n")
    }
}

struct Kept {
    program: Program,
    child: Option<Child>,
    started: Instant,
    backoff: Duration,
    start_at: Instant,
}

struct State {
    kept: Vec<Kept>,
    notes: Vec<String>,
}

/// The supervisor of all daemons of a lab.
pub struct Daemons {
    state: Arc<Mutex<State>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Daemons {
    /// A supervisor that keeps nothing yet.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn begin() -> anyhow::Result<Daemons> {
        let state = Arc::new(Mutex::new(State { kept: Vec::new(), notes: Vec::new() }));
        let (stop, stopped) = channel();
        let shared = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name("supervisor".into())
            .spawn(move || supervise(&shared, &stopped))
            .context("cannot start a thread")?;
        Ok(Daemons { state, stop: Some(stop), thread: Some(thread) })
    }

    /// Starts a program and keeps it running.
    ///
    /// # Errors
    /// It cannot be started the first time.
    pub fn keep(&self, program: Program) -> anyhow::Result<()> {
        let child = program.start()?;
        let now = Instant::now();
        lock(&self.state).kept.push(Kept {
            program,
            child: Some(child),
            started: now,
            backoff: BACKOFF_MIN,
            start_at: now,
        });
        Ok(())
    }

    /// Sends a signal to a program, if it runs.
    pub fn signal(&self, name: &str, signal: Signal) -> bool {
        let state = lock(&self.state);
        let child = state.kept.iter().find(|k| k.program.name == name).and_then(|k| k.child.as_ref());
        child.is_some_and(|c| kill(pid(c), signal).is_ok())
    }

    /// Kills a program (SIGKILL) and starts it again after `pause`. False if it does not run.
    pub fn fail(&self, name: &str, pause: Duration) -> bool {
        let mut state = lock(&self.state);
        let Some(kept) = state.kept.iter_mut().find(|k| k.program.name == name) else { return false };
        let Some(mut child) = kept.child.take() else { return false };
        let killed = child.kill().is_ok();
        let _ = child.wait();
        kept.start_at = Instant::now() + pause;
        killed
    }

    /// What happened to the programs that nobody asked for, in order.
    pub fn notes(&self) -> Vec<String> {
        lock(&self.state).notes.clone()
    }

    /// The last words of each program that is not running now.
    pub fn troubles(&self) -> Vec<String> {
        let state = lock(&self.state);
        state
            .kept
            .iter()
            .filter(|k| k.child.is_none())
            .map(|k| format!("{}: {}", k.program.name, k.program.last_words()))
            .collect()
    }

    /// Each program with the file it logs to.
    pub fn logs(&self) -> Vec<(String, PathBuf)> {
        lock(&self.state).kept.iter().map(|k| (k.program.name.clone(), k.program.log.clone())).collect()
    }

    /// Ends all programs, the last started first: SIGTERM, patience, SIGKILL.
    pub fn end(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let mut children: Vec<Child> = lock(&self.state).kept.iter_mut().rev().filter_map(|k| k.child.take()).collect();
        for child in &children {
            let _ = kill(pid(child), Signal::SIGTERM);
        }
        let deadline = Instant::now() + PATIENCE;
        let (_never, tick) = channel::<()>();
        while Instant::now() < deadline && !children.is_empty() {
            children.retain_mut(|c| matches!(c.try_wait(), Ok(None)));
            let _ = tick.recv_timeout(Duration::from_millis(20));
        }
        for mut child in children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        self.end();
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// A supervisor that panicked while holding the lock left nothing half-done that matters here.
fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn supervise(state: &Mutex<State>, stopped: &Receiver<()>) {
    while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        let mut state = lock(state);
        let now = Instant::now();
        let mut notes = Vec::new();
        for kept in &mut state.kept {
            if let Some(child) = &mut kept.child
                && let Ok(Some(status)) = child.try_wait()
            {
                kept.child = None;
                kept.backoff =
                    if now - kept.started > WELL_AFTER { BACKOFF_MIN } else { (kept.backoff * 2).min(BACKOFF_MAX) };
                kept.start_at = now + kept.backoff;
                let line = format!(
                    "{} ended by itself ({status}) and is started again in {:.1} s",
                    kept.program.name,
                    kept.backoff.as_secs_f64()
                );
                tracing::warn!("{line}");
                notes.push(line);
            }
            if kept.child.is_none() && now >= kept.start_at {
                kept.started = now;
                match kept.program.start() {
                    Ok(child) => kept.child = Some(child),
                    Err(e) => {
                        tracing::error!("{e:#}");
                        kept.start_at = now + BACKOFF_MAX;
                    }
                }
            }
        }
        let room = NOTES_MAX.saturating_sub(state.notes.len());
        state.notes.extend(notes.into_iter().take(room));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_a_killed_daemon_is_started_again_inside_its_namespace() {
        let folder = tempfile::tempdir().unwrap();
        let namespace = Namespace::named("vmx-0bb1-home");
        namespace.remove().unwrap();
        namespace.create().unwrap();
        let mut daemons = Daemons::begin().unwrap();
        let log = folder.path().join("log");
        // Says which namespace it is in, then waits.
        let arguments = vec!["-c".into(), "readlink /proc/self/ns/net; exec sleep 60".into()];
        let kept = daemons.keep(Program {
            name: "d".into(),
            namespace: Some(namespace.clone()),
            program: "/bin/sh".into(),
            arguments,
            log: log.clone(),
        });
        let (_never, tick) = channel::<()>();
        let lines = |n: usize| {
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                if text.lines().count() >= n || Instant::now() > deadline {
                    return text;
                }
                let _ = tick.recv_timeout(Duration::from_millis(20));
            }
        };
        lines(1);
        let killed = daemons.fail("d", Duration::from_millis(100));
        let text = lines(2);
        daemons.end();
        let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(namespace.path()).unwrap());
        namespace.remove().unwrap();
        kept.unwrap();
        assert!(killed);
        assert_eq!(text, format!("net:[{inode}]\n").repeat(2));
    }
}
