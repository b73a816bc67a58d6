//! A VM as libvirt alone keeps one, saved with its memory in one file: what an instant resume is measured against.
//!
//! ```text
//! boot ─▶ (serve) ─▶ save (virsh save) ─▶ file ─▶ restore (virsh restore) ─▶ (serve)
//! ```

use crate::domain::{self, Domain as Described};
use crate::error::{Error, Result};
use crate::hypervisor::{Hypervisor, Spawn, Tap};
use crate::{Libvirt, grant, monitor, process, tap};
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use virt::domain::Domain;
use virt_sys::VIR_DOMAIN_SAVE_PAUSED;
use vmatrix_vma_image::machine::Start;

/// All of a guest's memory goes through one file; 8 GiB at 20 MB/s take so long.
const MOVE_LIMIT: Duration = Duration::from_secs(420);

impl Libvirt {
    /// Boots a VM whose memory is its own, from the image's kernel and disk ([`Spawn::start`] does not matter).
    /// Its tap is in the cell, not up, when this returns; the guest runs. End it with [`Hypervisor::quit`].
    ///
    /// # Errors
    /// As [`Hypervisor::spawn`].
    pub async fn boot_plain(&self, spawn: &Spawn<'_>) -> Result<()> {
        let name = spawn.name;
        process::check_name(name)?;
        let booted = self.begin_plain(spawn).await;
        if booted.is_err() {
            self.quit(name).await?;
        }
        booted
    }

    async fn begin_plain(&self, spawn: &Spawn<'_>) -> Result<()> {
        let name = spawn.name;
        let booted = Spawn { start: Start::Boot, ..*spawn };
        let arguments = booted.arguments(PathBuf::new(), self.own_folder(name)?.join("agent"));
        // Its memory is nobody's file.
        let files: Vec<String> = arguments.iter().filter(|a| !a.contains("mem-path=")).cloned().collect();
        let user = self.user(name);
        grant::admit(user, &files, spawn.environment)?;
        let outside = self.outside(name);
        let xml = domain::plain_xml(&Described {
            name,
            machine: spawn.machine,
            arguments: &arguments,
            environment: spawn.environment,
            tap: &outside,
            emulator: self.emulator(),
            user: (user.uid, user.gid),
            unconfined: self.confines(),
        })?;
        tap::make(&outside, user.uid)?;
        self.start(name, xml, spawn.tap).await?;
        self.run(name).await
    }

    /// Saves a VM into one file and ends it: what `virsh save` does.
    ///
    /// # Errors
    /// Libvirt's words.
    pub async fn save_plain(&self, name: &str, file: &Path) -> Result<()> {
        let to = CString::new(file.as_os_str().as_bytes());
        let to = to.map_err(|_| Error::Unwritable(file.display().to_string()))?;
        let domain = name.to_owned();
        self.within(MOVE_LIMIT, move |connection| {
            let domain = connection.domain(&domain)?.ok_or(Error::Gone { name: domain })?;
            // SAFETY: the domain and the path outlive the call, which takes nothing else.
            #[allow(unsafe_code)]
            let status = unsafe { virt_sys::virDomainSave(domain.as_ptr(), to.as_ptr()) };
            let said = || monitor::refused("save the domain", &virt::error::Error::last_error());
            if status < 0 { Err(said()) } else { Ok(()) }
        })
        .await
    }

    /// Restores a VM from such a file and lets it run: what `virsh restore` does, and a tap into the cell. `ready` is
    /// called when the tap is there and the guest does not run yet.
    ///
    /// # Errors
    /// Libvirt's words. No domain and no tap is left.
    pub async fn restore_plain(
        &self,
        name: &str,
        file: &Path,
        tap: Tap<'_>,
        ready: impl FnOnce() -> Result<()> + Send,
    ) -> Result<()> {
        process::check_name(name)?;
        let restored = async {
            self.own_folder(name)?;
            tap::make(&self.outside(name), self.user(name).uid)?;
            let from = file.display().to_string();
            self.within(MOVE_LIMIT, move |connection| {
                Domain::domain_restore_flags(connection.get(), &from, None, VIR_DOMAIN_SAVE_PAUSED)
                    .map_err(|e| monitor::refused("restore the domain", &e))
            })
            .await?;
            self.adopt(name, tap)?;
            ready()?;
            self.run(name).await
        };
        let restored = restored.await;
        if restored.is_err() {
            self.quit(name).await?;
        }
        restored
    }

    async fn run(&self, name: &str) -> Result<()> {
        let vm = self.find(name).await?.ok_or_else(|| Error::Gone { name: name.to_owned() })?;
        self.cont(&vm).await
    }
}
