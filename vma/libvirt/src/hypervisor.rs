//! What every hypervisor does for a machine.

use crate::Result;
use async_trait::async_trait;
use std::path::{Path, PathBuf};
use vmatrix_model::manifest::MachineSpec;
use vmatrix_vma_image::machine::{Files, Run, Start, lazy_arguments, machine_arguments};

/// A VM to be started.
#[derive(Debug, Clone, Copy)]
pub struct Spawn<'a> {
    /// Its name, unique on this machine: 1 to 64 of a-z, A-Z, 0-9, `-`, `_` and `.`, not beginning with a `.`.
    pub name: &'a str,
    /// The machine as the signed manifest pins it.
    pub machine: &'a MachineSpec,
    /// The image's parts.
    pub parts: Parts<'a>,
    /// From what the guest starts.
    pub start: Start,
    /// Its network card's other end.
    pub tap: Tap<'a>,
    /// Added to QEMU's environment: what preloads the pager's library and tells it its file.
    pub environment: &'a [(String, String)],
}

/// Where an image's parts are.
#[derive(Debug, Clone, Copy)]
pub enum Parts<'a> {
    /// All of them are files here.
    Whole(&'a Files),
    /// Memory comes into its file and the disk from an NBD server's socket, as they are needed. Such a VM cannot be
    /// booted.
    Lazy { memory: &'a Path, disk: &'a Path },
}

impl Spawn<'_> {
    /// QEMU's arguments for a direct start, whose sockets are at these places.
    pub(crate) fn arguments(&self, qmp: PathBuf, guest_agent: PathBuf) -> Vec<String> {
        let name = self.name.to_owned();
        let run = Run { name, qmp, guest_agent, tap_fd: 0, console: None, start: self.start };
        match self.parts {
            Parts::Whole(files) => machine_arguments(self.machine, files, &run),
            Parts::Lazy { memory, disk } => lazy_arguments(self.machine, memory, disk, &run),
        }
    }
}

/// A tap in a cell. Made by the hypervisor, gone with the VM; the bridge is the caller's.
#[derive(Debug, Clone, Copy)]
pub struct Tap<'a> {
    /// Name of the network namespace, as `ip netns` has it.
    pub namespace: &'a str,
    /// Name of the interface inside, at most 15 bytes.
    pub name: &'a str,
}

/// A VM's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    pub name: String,
    /// The QEMU process, as this machine numbers it: whom a pager adopts.
    pub pid: i32,
    /// The guest agent's socket.
    pub guest_agent: PathBuf,
}

/// Starts VMs and drives their state. It keeps no list: what runs is looked up, so whoever drives a VM may die and
/// begin again, by ending ([`Hypervisor::quit`]) what was half begun. That is also what to do after a call that was
/// not waited for.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// Starts a VM. [`Start::Boot`] runs at once; any other waits for [`Hypervisor::load_state`]. The tap is there,
    /// and is not up, when this returns.
    ///
    /// # Errors
    /// A VM of this name runs, a file may not be opened, or QEMU's words. No process, domain or tap is left.
    async fn spawn(&self, spawn: &Spawn<'_>) -> Result<Vm>;

    /// The VM of this name, if it runs; also one that another process of the caller started.
    ///
    /// # Errors
    /// The machine's processes cannot be listed.
    async fn find(&self, name: &str) -> Result<Option<Vm>>;

    /// Loads device state, which this process opens, into a VM that waits. Memory is in its own file.
    ///
    /// # Errors
    /// QEMU's words, most often another machine or device. The VM has then been ended, for half of a state is in it.
    async fn load_state(&self, vm: &Vm, device: &Path) -> Result<()>;

    /// Lets the guest run; well if it does.
    ///
    /// # Errors
    /// The VM is gone, or QEMU's words.
    async fn cont(&self, vm: &Vm) -> Result<()>;

    /// Stops the guest and saves its device state into a file, which this process makes; memory, written to its own
    /// shared file, is whole when this returns. The VM is then to be ended.
    ///
    /// # Errors
    /// The file cannot be written, or QEMU's words.
    async fn save_state(&self, vm: &Vm, device: &Path) -> Result<()>;

    /// Ends a VM and removes what is left of it; well if there is none.
    ///
    /// # Errors
    /// The process does not end.
    async fn quit(&self, name: &str) -> Result<()>;
}
