//! A QEMU of the builder's own: it ends when its owner does.

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use vmatrix_vma_image::error::{Result, io};
use vmatrix_vma_image::machine::QEMU;

/// A process that is killed when this is dropped, and by the kernel when the builder is killed.
pub struct Process(Child);

impl Process {
    /// Starts it; what it complains of goes to `stderr` in `scratch`.
    pub fn start(mut command: Command, scratch: &Path) -> Result<Process> {
        // SAFETY: one system call between fork and exec, which allocates nothing and takes no lock.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from));
        }
        let errors = scratch.join("stderr");
        command.stderr(fs::File::create(&errors).map_err(io("create", &errors))?);
        Ok(Process(command.spawn().map_err(io("run", Path::new(QEMU)))?))
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap_or(i32::MAX)
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
