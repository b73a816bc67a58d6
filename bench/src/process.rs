//! Programs that a bench runs: inside a namespace, gone when the bench is.

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmatrix_lab::namespace::Namespace;

/// Last bytes of a log that go into an error.
const WORDS_MAX: usize = 1500;

/// A running program. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    what: String,
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts `command` in `namespace`, with its output in `log`.
    ///
    /// The caller's thread must outlive the program: the kernel ends it with that thread.
    ///
    /// # Errors
    /// The namespace or the program is not there.
    pub fn start(what: &str, command: &mut Command, namespace: &Namespace, log: &Path) -> anyhow::Result<Running> {
        let output = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let inside =
            File::open(namespace.path()).with_context(|| format!("cannot open namespace {}", namespace.name()))?;
        command.stdout(output.try_clone().context("cannot share a log")?).stderr(output).process_group(0);
        let enter = move || {
            setns(&inside, CloneFlags::CLONE_NEWNET)?;
            set_pdeathsig(Signal::SIGKILL)?;
            Ok(())
        };
        // SAFETY: two system calls between fork and exec, which allocate nothing and take no lock.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(enter);
        }
        let child = command.spawn().with_context(|| format!("cannot start {what} ({:?})", command.get_program()))?;
        Ok(Running { what: what.to_owned(), child, log: log.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// With how it ended and its last words.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait().with_context(|| format!("cannot look at {}", self.what))? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}): {}", self.what, last_words(&self.log)),
        }
    }

    /// Ends it: SIGTERM, patience, SIGKILL.
    pub fn end(mut self, patience: Duration) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let began = Instant::now();
        while began.elapsed() < patience && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already ended is as good; a killed child must still be waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The end of a log, for error messages.
pub fn last_words(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let text = bytes.get(bytes.len().saturating_sub(WORDS_MAX)..).unwrap_or_default();
    String::from_utf8_lossy(text).trim().to_owned()
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// It is not installed (then `package` says how to get it), or it failed, with its words.
pub fn output(command: &mut Command, package: &str) -> anyhow::Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}; install it with `apt-get install {package}`"))?;
    if !output.status.success() {
        let words: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(WORDS_MAX).collect();
        bail!("{program} ended with {}: {words}", output.status);
    }
    Ok(output.stdout)
}

/// A descriptor that `command`'s child inherits under its own number; no other child gets it.
pub fn inherit(command: &mut Command, descriptor: &impl AsRawFd) {
    let number = descriptor.as_raw_fd();
    let keep = move || {
        // SAFETY: the descriptor belongs to the caller, who holds it until after the spawn.
        #[allow(unsafe_code)]
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))
            .map(drop)
            .map_err(std::io::Error::from)
    };
    // SAFETY: one system call between fork and exec, which allocates nothing and takes no lock.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(keep);
    }
}
