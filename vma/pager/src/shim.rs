//! The preloaded library: where it is, and how a process is started with it.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use vmatrix_vma_uffd::{MEMORY_VARIABLE, TRACK_VARIABLE};

const LIBRARY: &str = "libvmatrix_vma_shim.so";

/// Where the library is: beside the running program, or where cargo puts it for a program or test it has just built.
///
/// # Errors
/// [`Error::NoShim`]
pub fn shim() -> Result<PathBuf> {
    let program = std::env::current_exe().map_err(crate::error::io("find", Path::new("the running program")))?;
    let beside = program.parent().unwrap_or(Path::new("/"));
    let places = [beside.join(LIBRARY), beside.join("deps").join(LIBRARY), beside.join("..").join(LIBRARY)];
    let found = places.iter().find(|path| path.is_file()).cloned();
    found.ok_or_else(|| Error::NoShim { tried: beside.join(LIBRARY) })
}

/// Has `command` run with its memory file registered: call before it is spawned, and [`crate::Engine::adopt`] after.
/// `track`: the kernel also notes which pages it writes, for [`crate::Engine::dirty`].
///
/// # Errors
/// [`Error::NoShim`]
pub fn preload(command: &mut Command, memory: &Path, track: bool) -> Result<()> {
    command.env("LD_PRELOAD", shim()?).env(MEMORY_VARIABLE, memory);
    if track {
        command.env(TRACK_VARIABLE, "1");
    }
    Ok(())
}
