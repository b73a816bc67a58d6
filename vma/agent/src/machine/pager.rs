//! Pagers: for each image that guests run from, one process that brings their memory and disk.
//!
//! ```text
//! image ─▶ pager.json ─▶ `vmatrix pager` ◀─ adopt(guest) ─ resume
//!                              └─ status ─▶ View ─▶ up │ critical │ hydrated │ failed
//! ```
//! A pager is found by its command line, as guests are: when this daemon dies both go on. [`super::guard`] keeps it
//! alive.

use super::image::{Known, Level};
use super::learn::Told;
use super::memory::Folder;
use super::process::{self, Process};
use super::{Machine, memory};
use anyhow::{Context, bail};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use vmatrix_model::manifest::PartKind;
use vmatrix_model::{Digest, ServiceId};
use vmatrix_vma_pager::{Config, Control, DisksConfig, PUSHED_VARIABLE, Status};
use vmatrix_vma_transfer::{Limits, SourcesConfig};

/// Looks at a pager while guests wait to be started.
pub const LOOK_SOON: Duration = Duration::from_millis(3);
/// Answers to what a pager is asked come from its memory.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// A pager starts in some 20 ms, a second on a busy machine. One that does not come back within so long leaves its
/// guests standing, so they are ended and resumed anew.
pub const RETURN_LIMIT: Duration = Duration::from_secs(15);
/// What is fetched here for a guest, the pager waits for in the store; when nothing came for so long it asks itself.
const PUSHED_MS: u32 = 1000;
/// A guest that waits for a page for so long stands still for its clients; elsewhere it may be resumed.
const STUCK_AFTER: Duration = Duration::from_secs(10);

/// The pager of an image, as it was last seen.
#[derive(Debug)]
pub struct Pager {
    pub known: Arc<Known>,
    /// `state_dir/pagers/<16 hex>`: its files but memory.
    pub folder: PathBuf,
    pub memory: Folder,
    /// The singleton that it is for; none: clones of the image.
    pub one: Option<One>,
    pub view: watch::Sender<View>,
    /// What the store was told of its misses.
    pub told: Told,
}

/// A singleton's run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct One {
    pub service: ServiceId,
    /// Who has chunks of its state, besides this machine's sources.
    pub sources: Vec<SocketAddr>,
}

/// What is known of a pager.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub status: Option<Status>,
    /// Whether it fetches nothing but what a guest needs first, for there is none.
    pub rests: bool,
    /// Why its guests were ended.
    pub failed: Option<String>,
}

impl Pager {
    fn config(&self) -> PathBuf {
        config(&self.folder)
    }

    /// Where guests find their disks.
    pub fn disk_socket(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    pub fn control(&self) -> PathBuf {
        self.folder.join("control")
    }

    pub fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// The file of the disk that a singleton writes.
    pub fn data(&self) -> PathBuf {
        self.disks().file("data")
    }

    fn disks(&self) -> DisksConfig {
        DisksConfig { dir: self.folder.clone(), socket: self.disk_socket() }
    }

    /// Its process, if it runs.
    pub fn find(&self) -> Option<Process> {
        find(&self.folder)
    }

    /// Has it serve the guest's memory, waiting for it as long as it may take to come back.
    ///
    /// # Errors
    /// The guest has ended or cannot be served, or there is no pager.
    pub async fn adopt(&self, guest: &Process) -> anyhow::Result<()> {
        let deadline = Instant::now() + RETURN_LIMIT;
        loop {
            let asked = async {
                let mut control = Control::connect(&self.control()).await?;
                control.adopt(guest.pid).await
            };
            let problem = match tokio::time::timeout(ANSWER_LIMIT, asked).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(e)) => format!("{:#}", anyhow::Error::new(e)),
                Err(_) => "it does not answer".to_owned(),
            };
            if !process::is_alive(guest) {
                bail!("QEMU ended before its memory was served");
            }
            if let Some(why) = &self.view.borrow().failed {
                bail!("{why}");
            }
            if Instant::now() > deadline {
                bail!("the pager does not serve the guest: {problem}");
            }
            tokio::time::sleep(LOOK_SOON).await;
        }
    }

    /// Waits until it answers: from then on a QEMU finds its disk's socket.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn up(&self) -> anyhow::Result<()> {
        self.until(|s| s.is_some()).await
    }

    async fn until(&self, come: impl Fn(Option<&Status>) -> bool) -> anyhow::Result<()> {
        let mut views = self.view.subscribe();
        let view = views.wait_for(|v| v.failed.is_some() || come(v.status.as_ref())).await;
        match &view.context("the machine is ending")?.failed {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }

    /// Whether what a guest needs first is in memory.
    pub fn is_ready(&self) -> bool {
        let view = self.view.borrow();
        view.failed.is_none() && view.status.as_ref().is_some_and(|s| s.critical)
    }

    /// Whether guests still depend on what it brings.
    pub fn is_hydrating(&self) -> bool {
        let view = self.view.borrow();
        view.failed.is_none() && !view.rests && !view.status.as_ref().is_some_and(|s| s.hydrated)
    }

    async fn until_hydrated(&self) {
        let mut views = self.view.subscribe();
        let done = |v: &View| v.rests || v.failed.is_some() || v.status.as_ref().is_some_and(|s| s.hydrated);
        // An error: nobody looks at it any more.
        let _ = views.wait_for(done).await;
    }
}

impl Machine {
    /// The pager of an image; one is started if there is none.
    pub(super) fn pager_for(self: &Arc<Self>, known: &Arc<Known>) -> Arc<Pager> {
        self.pager_at(known, self.memory.folder(known), None)
    }

    /// The pager of this memory; one is started if there is none.
    pub(super) fn pager_at(self: &Arc<Self>, known: &Arc<Known>, memory: Folder, one: Option<One>) -> Arc<Pager> {
        let mut pagers = self.pagers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pager) = pagers.get(&memory.dir) {
            return pager.clone();
        }
        let pager = Arc::new(self.new_pager(known, memory, one));
        pagers.insert(pager.memory.dir.clone(), pager.clone());
        let (machine, guarded) = (self.clone(), pager.clone());
        tokio::spawn(async move { machine.guard(&guarded).await });
        pager
    }

    /// A pager that nobody guards.
    pub(super) fn new_pager(&self, known: &Arc<Known>, memory: Folder, one: Option<One>) -> Pager {
        let folder = match &one {
            Some(one) => self.singles_folder(&one.service),
            None => self.pager_folder(known),
        };
        let (view, told) = (watch::Sender::new(View::default()), Told::default());
        Pager { known: known.clone(), folder, memory, one, view, told }
    }

    /// Takes up again the pagers whose guests were found at the start.
    pub(super) fn guard_what_runs(self: &Arc<Self>) {
        for name in self.images.names(Level::Known) {
            let Some(known) = self.images.known(&name) else { continue };
            if !self.guests_of(&self.memory.folder(&known)).is_empty() {
                self.pager_for(&known);
            }
        }
    }

    /// Where the pager of an image has its files but memory.
    pub(super) fn pager_folder(&self, known: &Known) -> PathBuf {
        self.config.state_dir.join("pagers").join(known.short())
    }

    /// Where the pager of a singleton has its files but memory.
    pub(super) fn singles_folder(&self, service: &ServiceId) -> PathBuf {
        self.config.state_dir.join("pagers").join(service.as_str())
    }

    /// Images whose guests still depend on what their pager brings.
    pub(super) fn hydrating(&self) -> BTreeSet<Digest> {
        let pagers = self.pagers.lock().unwrap_or_else(PoisonError::into_inner);
        pagers.values().filter(|p| p.is_hydrating()).map(|p| p.known.digest).collect()
    }

    /// The pager of an image's clones.
    pub(super) fn pager(&self, digest: &Digest) -> Option<Arc<Pager>> {
        let pagers = self.pagers.lock().unwrap_or_else(PoisonError::into_inner);
        pagers.values().find(|p| p.one.is_none() && p.known.digest == *digest).cloned()
    }

    /// Whether guests of the image still wait for memory, and so have the link.
    pub(super) fn is_hydrating(&self, digest: &Digest) -> bool {
        self.pager(digest).is_some_and(|p| p.is_hydrating())
    }

    pub(super) async fn until_guests_have_all(&self, known: &Known) {
        if let Some(pager) = self.pager(&known.digest) {
            pager.until_hydrated().await;
        }
    }

    /// QEMUs that map this memory.
    pub(super) fn guests_of(&self, memory: &Folder) -> Vec<Process> {
        let path = format!("mem-path={},", memory.memory().display());
        let maps = |p: &Process| p.arguments.iter().any(|a| a.starts_with("memory-backend-file,") && a.contains(&path));
        process::all().into_iter().filter(maps).collect()
    }

    /// Whom a pager asks: machines that held its singleton first.
    fn sources_of(&self, pager: &Pager) -> Vec<SocketAddr> {
        let mut all: Vec<SocketAddr> = pager.one.iter().flat_map(|one| one.sources.clone()).collect();
        all.extend(self.config.sources.iter().filter(|s| !all.contains(s)).copied().collect::<Vec<_>>());
        all
    }

    pub(super) async fn start_pager(&self, pager: &Pager) -> anyhow::Result<Process> {
        self.memory.prepare(&pager.memory, &pager.known)?;
        self.tell_pager(pager, true).await?;
        // What comes over this daemon's warm connections the pager looks for in the store.
        let pushed = pager.one.is_some() || self.images.at(&pager.known.manifest.name, Level::Critical).is_none();
        self.spawn_pager(pager, pushed).await
    }

    /// Writes down what a pager is told: its configuration and its image; or, without `image`, the one that its image
    /// will have begun from.
    ///
    /// # Errors
    /// There is no key for a sealed image, or no room.
    pub(super) async fn tell_pager(&self, pager: &Pager, image: bool) -> anyhow::Result<()> {
        let known = &pager.known;
        let key = match self.owner_key(known).await? {
            Some(key) => {
                memory::write_key(&pager.memory.key(), &key)?;
                Some(pager.memory.key())
            }
            None => None,
        };
        make_folder(&pager.folder)?;
        let manifest = self::image(&pager.folder);
        let before = (!image).then(|| before(&pager.folder));
        let config = Config {
            image: manifest.clone(),
            before: before.clone(),
            // A snapshot was believed by its digest, not by its signer.
            signers: vec![known.signed.signer.clone()],
            memory: pager.memory.memory(),
            disks: known.manifest.part(PartKind::Disk).map(|_| pager.disks()),
            control: pager.control(),
            key,
            store: self.images.store.dir().to_owned(),
            sources: SourcesConfig {
                identity: self.config.identity.clone(),
                addresses: self.sources_of(pager),
                serving: self.config.transfer_listen,
                limits: Limits { background_mbit: self.config.rate_mbit },
            },
            shared: pager.one.is_some(),
            background_mbit: self.config.rate_mbit,
            working_set: true,
            background: true,
            record: false,
            stuck_ms: u64::try_from(STUCK_AFTER.as_millis()).unwrap_or(u64::MAX),
        };
        crate::replace(&pager.config(), &serde_json::to_vec_pretty(&config)?)
            .with_context(|| format!("cannot write {}", pager.config().display()))?;
        // Last: one that awaits its image reads its configuration anew when it is there.
        let image = before.unwrap_or(manifest);
        crate::replace(&image, &serde_json::to_vec(&known.signed)?)
            .with_context(|| format!("cannot write {}", image.display()))
    }

    /// Starts a pager that was told what to do. `pushed`: what is needed first is being put into the store.
    pub(super) async fn spawn_pager(&self, pager: &Pager, pushed: bool) -> anyhow::Result<Process> {
        let log =
            std::fs::File::create(pager.log()).with_context(|| format!("cannot write {}", pager.log().display()))?;
        let mut command = tokio::process::Command::new(&self.program);
        if pushed {
            command.env(PUSHED_VARIABLE, PUSHED_MS.to_string());
        }
        let child = command
            .arg("pager")
            .arg("--config")
            .arg(pager.config())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {} pager", self.program.display()))?;
        // Dropped, not waited for: the runtime collects it when it ends.
        process::started(&child).await.with_context(|| format!("it said: {:?}", process::tail(&pager.log())))
    }
}

fn config(folder: &Path) -> PathBuf {
    folder.join("pager.json")
}

/// Where a pager finds the manifest of its image.
pub fn image(folder: &Path) -> PathBuf {
    folder.join("manifest.json")
}

/// Where a pager whose image comes later finds that of the image it begins from.
pub fn before(folder: &Path) -> PathBuf {
    folder.join("before.json")
}

/// The pager whose files are in a folder, if it runs.
pub fn find(folder: &Path) -> Option<Process> {
    let config = config(folder);
    let config = config.to_str();
    process::all().into_iter().find(|p| p.arguments.iter().any(|a| a == "pager") && p.value("--config") == config)
}

/// Makes a pager's folder. The one above it is its owner's; into this one a guest's QEMU, which is nobody, comes by a
/// descriptor, to find the disk's socket again when its pager was started anew.
///
/// # Errors
/// It cannot be made.
pub fn make_folder(folder: &Path) -> anyhow::Result<()> {
    let make = || {
        let above = folder.parent().unwrap_or(Path::new("/"));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(above)?;
        std::fs::DirBuilder::new().recursive(true).create(folder)?;
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o711))
    };
    make().with_context(|| format!("cannot make {}", folder.display()))
}

/// Name of the disk's socket in a pager's folder.
pub const DISK: &str = "disk";
