//! Processes that wait for a guest: for each image that is kept ready, one QEMU in a namespace of its own.
//!
//! ```text
//! memory is ready ─▶ spare: namespace, bridge, tap, QEMU, adopted by the pager
//! Prepare ─▶ the spare's namespace and sockets get the cell's names ─▶ only links and rules are left to make
//! ```
//! To start QEMU takes longer than to resume a guest in it. A spare is made while nobody waits, and given to the first
//! cell of its image; the next one is made once that guest has woken. Spares are found by their names: what an earlier
//! daemon left is ended, for it costs nothing to make another.

use super::image::Known;
use super::record::Record;
use super::spawn::{self, Sockets};
use super::{Machine, cell, process};
use anyhow::Context;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmatrix_model::Digest;
use vmatrix_vma_image::netns;

/// A pager takes a QEMU over as soon as that has mapped its memory.
const ADOPTED_WITHIN: Duration = Duration::from_secs(10);

/// The spares there are, by image.
#[derive(Debug, Default)]
pub struct Pool(Mutex<BTreeMap<Digest, Spare>>);

/// A QEMU that waits.
#[derive(Debug, Clone)]
pub struct Spare {
    /// Of its namespace and of its process.
    pub name: String,
    vm: process::Process,
    sockets: Sockets,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Digest, Spare>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine {
    /// What the names of spares begin with; no cell's does, for no service is called by an underscore.
    fn spares_begin(&self) -> String {
        format!("{}-_", self.config.cell_prefix)
    }

    /// Where spares have their sockets until cells get them.
    fn spares_folder(&self) -> PathBuf {
        self.config.state_dir.join("spares")
    }

    /// Whether a process is a QEMU that runs no guest yet and belongs to no cell.
    pub(super) fn is_spare(&self, vm: &process::Process) -> bool {
        let spares = self.pool.lock();
        spares.values().any(|s| s.vm.pid == vm.pid)
    }

    /// Ends what an earlier daemon left.
    ///
    /// # Errors
    /// A process or a namespace does not go.
    pub(super) async fn sweep_spares(&self) -> anyhow::Result<()> {
        let begin = self.spares_begin();
        let given: Vec<String> = self.records.all().into_iter().filter_map(|r| r.vm).collect();
        let names = std::fs::read_dir("/run/netns")
            .into_iter()
            .flatten()
            .filter_map(|e| e.ok()?.file_name().into_string().ok());
        let left: Vec<String> = names.filter(|name| name.starts_with(&begin)).collect();
        for vm in process::all() {
            if let Some(name) = spawn::name(&vm).filter(|n| n.starts_with(&begin) && !given.iter().any(|g| g == n)) {
                process::end(&vm, Duration::ZERO).await.with_context(|| format!("cannot end {name}"))?;
            }
        }
        for name in left {
            netns::ip_batch(None, &[format!("netns del {name}")])?;
        }
        remove(&self.spares_folder())
    }

    /// Makes the spare of an image whose memory is ready, unless there is one that lives; clears away those of images
    /// that are no longer kept ready.
    ///
    /// # Errors
    /// QEMU does not start. Cells then start their own.
    pub(super) async fn fill_pool(self: &Arc<Self>, ready: &[Arc<Known>]) -> anyhow::Result<()> {
        let lives = |digest: &Digest, s: &Spare| ready.iter().any(|k| k.digest == *digest) && process::is_alive(&s.vm);
        let dead: Vec<(Digest, Spare)> =
            self.pool.lock().iter().filter(|(d, s)| !lives(d, s)).map(|(d, s)| (*d, s.clone())).collect();
        for (digest, spare) in dead {
            self.pool.lock().remove(&digest);
            end_named(&spare.name, &spare.sockets).await?;
        }
        for known in ready {
            let there = self.pool.lock().contains_key(&known.digest);
            let full = self.pager(&known.digest).is_some_and(|p| p.is_ready());
            if !there && full {
                let spare = self
                    .make_spare(known)
                    .await
                    .with_context(|| format!("no QEMU waits for {}", known.manifest.name))?;
                self.pool.lock().insert(known.digest, spare);
                tracing::info!(image = known.manifest.name, "a QEMU waits");
            }
        }
        Ok(())
    }

    async fn make_spare(self: &Arc<Self>, known: &Arc<Known>) -> anyhow::Result<Spare> {
        let mut bytes = [0; 4];
        getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("this machine has no random bytes: {e}"))?;
        let number = format!("{:08x}", u32::from_le_bytes(bytes));
        let (name, folder) = (self.spares_begin() + &number, self.spares_folder().join(number));
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let sockets = Sockets::within(folder);
        let (inner, gateway) = (name.clone(), known.manifest.guest.gateway);
        tokio::task::spawn_blocking(move || cell::found(&inner, gateway)).await??;
        let made = async {
            let tap = cell::tap(&name)?;
            let vm = self.spawn_named(known, &name, &sockets, tap).await?;
            if let Some(pager) = self.pager(&known.digest) {
                tokio::time::timeout(ADOPTED_WITHIN, pager.adopt(&vm)).await.context("its memory is not served")??;
            }
            anyhow::Ok(vm)
        };
        match made.await {
            Ok(vm) => Ok(Spare { name, vm, sockets }),
            Err(e) => {
                end_named(&name, &sockets).await?;
                Err(e)
            }
        }
    }

    /// Takes the spare of an image out of the pool, if there is one that lives.
    pub(super) fn take_spare(&self, known: &Known) -> Option<Spare> {
        self.pool.lock().remove(&known.digest).filter(|spare| process::is_alive(&spare.vm))
    }

    /// Gives a cell a spare: namespace, with the bridge and QEMU in it, and sockets. The cell's record tells the name
    /// that QEMU goes by, so that whatever happens meanwhile is cleared away with the cell.
    ///
    /// # Errors
    /// It cannot be given, and is gone.
    pub(super) async fn give_spare(&self, spare: &Spare, record: &Record) -> anyhow::Result<()> {
        let (name, to) = (self.namespace(&record.spec.instance), self.records.folder(&record.spec.instance));
        let given = netns::rename(&spare.name, &name).map_err(anyhow::Error::from);
        let given = given.and_then(|()| Ok(spare.sockets.give(&Sockets::within(to))?));
        if given.is_err() {
            end_named(&spare.name, &spare.sockets).await?;
        }
        given
    }

    /// Ends the spare of an image.
    pub(super) async fn end_spare_of(&self, known: &Known) {
        let spare = self.pool.lock().remove(&known.digest);
        if let Some(spare) = spare
            && let Err(e) = end_named(&spare.name, &spare.sockets).await
        {
            tracing::warn!(image = known.manifest.name, error = format!("{e:#}"), "a QEMU that waits does not end");
        }
    }
}

/// Ends a spare, as far as there is one.
async fn end_named(name: &str, sockets: &Sockets) -> anyhow::Result<()> {
    if let Some(vm) = spawn::find(&process::all(), name) {
        process::end(&vm, Duration::ZERO).await?;
    }
    if netns::path(name).exists() {
        netns::ip_batch(None, &[format!("netns del {name}")])?;
    }
    remove(sockets.folder())
}

fn remove(folder: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
