//! A QEMU of one's own: it ends when its owner does.

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use vmatrix_vma_image::error::{Error, Result, io};
use vmatrix_vma_image::machine::QEMU;

const QEMU_PACKAGE: &str = "-t bookworm-backports qemu-system-x86";

/// A process that is killed when this is dropped, and by the kernel when its owner is killed (unless it has become
/// another user).
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Starts it; what it complains of goes to `stderr` in `scratch`.
    ///
    /// # Errors
    /// It is not installed, or cannot be started.
    pub fn start(mut command: Command, scratch: &Path) -> Result<Process> {
        // SAFETY: one system call between fork and exec, which allocates nothing and takes no lock.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from));
        }
        let errors = scratch.join("stderr");
        command.stderr(fs::File::create(&errors).map_err(io("create", &errors))?);
        // What is typed on the terminal is not for it.
        let child = command.process_group(0).spawn().map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::Missing { program: QEMU.to_owned(), package: QEMU_PACKAGE },
            _ => io("run", Path::new(QEMU))(e),
        })?;
        Ok(Process(child))
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap_or(i32::MAX)
    }

    /// Waits for its end; until then it may still write to its files.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn end(mut self) -> Result<ExitStatus> {
        self.0.wait().map_err(io("wait for", Path::new(QEMU)))
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already ended is as good; a killed child must still be waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
