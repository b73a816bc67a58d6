//! The VM in a cell: spawned, loaded, awakened, checked, let be reached; and put back to sleep.
//!
//! ```text
//! spawn ──────────────────────────────┐
//! manifest ─▶ first table, device state ─▶ memory served ─▶ load state ─▶ cont ─▶ reseed, clock ─▶ healthy ─▶ ports open
//!                                 └─ working set, in the order in which the guest touches it ─ ─ ─ ─▶ the rest ─ ─ ─ ▶
//! ```
//! The guest does not wait for its working set but runs into it: what it touches next is what comes next.
//!
//! Ports open last: before the guest was awakened, two clones would give out the same random bytes.

use super::image::{Known, Level};
use super::process::{self, Process};
use super::record::{Phase, Record};
use super::spawn::{self, Sockets, Waiting};
use super::{Machine, cell, memory, pager};
use crate::now;
use anyhow::{Context, bail};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use vmatrix_model::InstanceId;
use vmatrix_model::manifest::{BackendSpec, Manifest};
use vmatrix_vma_core::cell::{close, open};
use vmatrix_vma_core::steps::CellSpec;
use vmatrix_vma_image::chunks::Need;
use vmatrix_vma_image::guest::Awake;
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::{guest, health, netns};
use vmatrix_vma_transfer::Class;

/// What a guest needs first has some MiB: half a minute at 1 Mbit/s.
pub const CRITICAL_LIMIT: Duration = Duration::from_secs(30);
/// Where a guest was ended because its memory did not come, the next one waits for all of it; not for long, for it
/// may be resumed elsewhere.
const STARVED_LIMIT: Duration = Duration::from_secs(8);
/// A resume that is not healthy after so long is given up: without KVM on a loaded machine it takes some seconds,
/// and what it needs first may take half a minute to come. The VM agent waits a little longer.
pub const RESUME_LIMIT: Duration = Duration::from_secs(70);
/// Between health checks of a guest that is waking.
const HEALTH_EVERY: Duration = Duration::from_millis(20);
/// One health check of a guest that is waking.
const HEALTH_LIMIT: Duration = Duration::from_secs(3);
/// Further answers of an emulated guest until the next one takes no longer than all that follow.
const RUN_IN: u32 = 3;
/// They take some 30 ms.
const RUN_IN_LIMIT: Duration = Duration::from_millis(60);
/// QEMU ends in milliseconds when asked; after so long it is made to.
const QUIT_GRACE: Duration = Duration::from_secs(3);
/// What a guest's clock may be from this machine's before it gets traffic.
const CLOCK_APART: Duration = Duration::from_millis(50);

impl Machine {
    /// Resumes the VM of a cell, unless it runs and answers.
    pub(super) async fn resume(self: &Arc<Self>, instance: &InstanceId) -> anyhow::Result<()> {
        let (began, deadline) = (now(), tokio::time::Instant::now() + RESUME_LIMIT);
        let missing = || format!("there is no cell {instance}; prepare it first");
        let record = self.records.get(instance).with_context(missing)?;
        if record.spec.singleton.is_some() {
            return self.resume_singleton(&record).await;
        }
        // What cannot be staged for good is not tried again by a resume, in whose answer it would look as if it came.
        if let Some(fault) = self.images.stopped(&record.spec.image) {
            return Err(anyhow::Error::new(fault));
        }
        let known = self.until(&record.spec.image, Level::Known, CRITICAL_LIMIT).await?;
        fits(&record.spec, &known.manifest)?;
        let guest = &known.manifest.guest;
        let inside = netns::path(&self.namespace(instance));
        let running = self.find_vm(&record, &process::all());
        if running.is_some()
            && record.phase == Phase::Healthy
            && health::ask(&inside, guest.address, &guest.health, HEALTH_LIMIT).await.is_ok()
        {
            self.forgive(instance);
            return Ok(());
        }
        // One that was half resumed when its daemon died may or may not have been awakened. One that waits since the
        // cell was made has never run.
        let waits = running.filter(|_| record.phase == Phase::Ready);
        if waits.is_none() {
            self.end_vm(instance).await?;
        }
        self.records.note(instance, Phase::Resuming, None)?;
        // Closed before the guest runs, not before its memory comes.
        let closed = tokio::task::spawn_blocking({
            let inside = inside.clone();
            move || cell::nft(&inside, &close())
        });
        let woken = tokio::time::timeout_at(deadline, self.wake(instance, &known, waits, closed)).await;
        let woken = woken.unwrap_or_else(|_| bail!("{instance} was not healthy after {} s", RESUME_LIMIT.as_secs()));
        let took = now().since(began);
        // One that cannot be written down is not left running either: nobody would know of it.
        if let Err(e) = woken.and_then(|()| self.records.note(instance, Phase::Healthy, Some(took))) {
            self.end_vm(instance).await?;
            self.images.look_again(&record.spec.image);
            self.records.note(instance, Phase::Ready, None)?;
            return Err(e);
        }
        self.forgive(instance);
        tracing::info!(%instance, took = %took, "resumed");
        Ok(())
    }

    async fn wake(
        self: &Arc<Self>,
        instance: &InstanceId,
        known: &Arc<Known>,
        waits: Option<Process>,
        closed: JoinHandle<anyhow::Result<()>>,
    ) -> anyhow::Result<()> {
        let began = Instant::now();
        let pager = self.pager_for(known);
        let vm = match waits {
            Some(vm) => vm,
            None => {
                pager.up().await?;
                self.spawn_waiting(instance, known).await?
            }
        };
        let record = self.records.get(instance).with_context(|| format!("the cell {instance} is gone"))?;
        let sockets = self.sockets(&record);
        let spawned = began.elapsed();
        let qmp = sockets.qmp();
        let dead = |e: vmatrix_vma_image::Error| {
            anyhow::Error::new(e).context(format!("QEMU of {instance} said: {:?}", spawn::words(&sockets)))
        };
        let monitor = async { Qmp::connect(&qmp).await.map_err(dead) };
        let (mut monitor, (), (device, critical)) =
            tokio::try_join!(monitor, pager.adopt(&vm), self.needed_first(known, began))?;
        closed.await??;
        let served = began.elapsed();
        monitor.load_state(&device).await.map_err(dead)?;
        monitor.cont().await.map_err(dead)?;
        let loaded = began.elapsed();
        if known.manifest.guest.reseeds {
            self.awaken(instance, &sockets).await?;
        }
        let awake = began.elapsed();
        self.until_healthy(instance, known, &vm, &sockets).await?;
        let run_in = async {
            // One whose memory is still coming would wait for that.
            if pager.is_ready() {
                self.run_in(instance, known).await;
            }
        };
        tokio::join!(self.open_ports(&record), run_in).0?;
        tracing::info!(
            %instance,
            spawned_ms = spawned.as_millis(),
            critical_ms = critical.as_millis(),
            served_ms = served.as_millis(),
            loaded_ms = loaded.as_millis(),
            awake_ms = awake.as_millis(),
            healthy_ms = began.elapsed().as_millis(),
            "woken"
        );
        Ok(())
    }

    /// Opens the ports of a guest that was awakened.
    ///
    /// # Errors
    /// The rules are not taken.
    pub(super) async fn open_ports(&self, record: &Record) -> anyhow::Result<()> {
        let (inside, rules) = (netns::path(&self.namespace(&record.spec.instance)), open(&record.spec.ports));
        tokio::task::spawn_blocking(move || cell::nft(&inside, &rules)).await?
    }

    /// Asks an emulated guest some more, while its ports are being opened: its code is translated as it first runs, and a
    /// second answer takes twice as long as the tenth. What is run in here no client waits for.
    async fn run_in(&self, instance: &InstanceId, known: &Known) {
        let (inside, guest) = (netns::path(&self.namespace(instance)), &known.manifest.guest);
        let asked = async {
            for _ in 0..RUN_IN {
                // Whether it is well was seen, and is looked at again soon.
                let _ = health::ask(&inside, guest.address, &guest.health, RUN_IN_LIMIT).await;
            }
        };
        if known.manifest.machine.accelerator == "tcg" {
            let _ = tokio::time::timeout(RUN_IN_LIMIT, asked).await;
        }
    }

    /// Waits for the first right answer of a guest that was resumed.
    ///
    /// # Errors
    /// Its QEMU ended.
    pub(super) async fn until_healthy(
        &self,
        instance: &InstanceId,
        known: &Known,
        vm: &Process,
        sockets: &Sockets,
    ) -> anyhow::Result<()> {
        let inside = netns::path(&self.namespace(instance));
        let guest = &known.manifest.guest;
        while let Err(e) = health::ask(&inside, guest.address, &guest.health, HEALTH_LIMIT).await {
            if !process::is_alive(vm) {
                bail!("QEMU of {instance} ended while the guest woke: {}", spawn::words(sockets));
            }
            tracing::debug!(%instance, problem = %e, "not healthy yet");
            tokio::time::sleep(HEALTH_EVERY).await;
        }
        Ok(())
    }

    /// Gives the guest fresh random bytes and the time.
    async fn awaken(&self, instance: &InstanceId, sockets: &Sockets) -> anyhow::Result<()> {
        let awake = guest::awaken(&sockets.agent()).await;
        let Awake { clock_unix_us, host_unix_us } =
            awake.with_context(|| format!("{instance} could not be reseeded, so it gets no traffic"))?;
        let apart = Duration::from_micros(host_unix_us.abs_diff(clock_unix_us));
        if apart > CLOCK_APART {
            bail!("the clock of {instance} is {} ms from this machine's, so it gets no traffic", apart.as_millis());
        }
        Ok(())
    }

    /// Starts the QEMU that the guest of a cell will run in.
    pub(super) async fn spawn_waiting(&self, instance: &InstanceId, known: &Known) -> anyhow::Result<Process> {
        let name = self.namespace(instance);
        let tap = cell::tap(&name)?;
        let sockets = Sockets::within(self.records.folder(instance));
        self.spawn_named(known, &name, &sockets, tap).await
    }

    /// Starts a QEMU for `known`, in no cell yet.
    pub(super) async fn spawn_named(
        &self,
        known: &Known,
        name: &str,
        sockets: &Sockets,
        tap: std::os::fd::OwnedFd,
    ) -> anyhow::Result<Process> {
        let memory = self.memory.folder(known);
        self.memory.prepare(&memory, known)?;
        let pager = self.pager_folder(known);
        pager::make_folder(&pager)?;
        Waiting { known, name, sockets, memory: &memory, pager: &pager, shared: false }.spawn(tap).await
    }

    /// Waits until the guest can be begun; answers with its device state, and how long that took.
    async fn needed_first(
        self: &Arc<Self>,
        known: &Known,
        began: Instant,
    ) -> anyhow::Result<(std::path::PathBuf, Duration)> {
        let name = &known.manifest.name;
        let starved = self.images.lock().get(name).is_some_and(|i| i.starved);
        let (enough, limit) = if starved { (Level::Whole, STARVED_LIMIT) } else { (Level::Known, CRITICAL_LIMIT) };
        self.until(name, enough, limit).await?;
        Ok((self.device_state(known).await?, began.elapsed()))
    }

    /// The guest's device state as a file, beside its memory.
    async fn device_state(&self, known: &Known) -> anyhow::Result<std::path::PathBuf> {
        let (blob, path) = (&known.manifest.device, self.memory.folder(known).device());
        if std::fs::metadata(&path).is_ok_and(|m| m.len() == blob.plain.0) {
            return Ok(path);
        }
        let need = Need::blob(blob, known.manifest.seal.is_some());
        let key = self.owner_key(known).await?;
        let plain = self.sources.get(&need, Class::Critical, key.as_ref()).await?;
        memory::write(&path, &plain)?;
        Ok(path)
    }

    /// Puts the VM back to sleep. A replica's writes were to its own copy of memory, which goes with it.
    pub(super) async fn suspend(self: &Arc<Self>, instance: &InstanceId) -> anyhow::Result<()> {
        let Some(record) = self.records.get(instance) else { return Ok(()) };
        if record.spec.singleton.is_some() {
            return self.suspend_singleton(&record).await;
        }
        if record.phase == Phase::Building {
            return Ok(());
        }
        self.records.note(instance, Phase::Suspending, None)?;
        let inside = netns::path(&self.namespace(instance));
        if inside.exists() {
            cell::nft(&inside, &close())?;
        }
        self.end_vm(instance).await?;
        self.forgive(instance);
        self.records.note(instance, Phase::Ready, None)
    }

    /// The QEMU of a cell.
    pub(super) fn find_vm(&self, record: &Record, running: &[Process]) -> Option<Process> {
        let spare = record.vm.as_ref().and_then(|name| spawn::find(running, name));
        spare.or_else(|| spawn::find(running, &self.namespace(&record.spec.instance)))
    }

    fn sockets(&self, record: &Record) -> Sockets {
        Sockets::within(self.records.folder(&record.spec.instance))
    }

    /// Ends the VM of a cell if one runs: by QMP, then by its id.
    pub(super) async fn end_vm(&self, instance: &InstanceId) -> anyhow::Result<()> {
        let sockets = Sockets::within(self.records.folder(instance));
        let running = process::all();
        let vm = match self.records.get(instance) {
            Some(record) => self.find_vm(&record, &running),
            // Nothing is known of it but its name.
            None => spawn::find(&running, &self.namespace(instance)),
        };
        if let Some(vm) = vm {
            let asked = async { Qmp::connect(&sockets.qmp()).await?.quit().await };
            let quit = tokio::time::timeout(QUIT_GRACE, asked).await.is_ok_and(|q| q.is_ok());
            if !(quit && process::gone(&vm, QUIT_GRACE).await) {
                process::end(&vm, Duration::ZERO).await.with_context(|| format!("cannot end the VM of {instance}"))?;
            }
        }
        sockets.clear();
        Ok(())
    }
}

/// Refuses to resume an image as something it is not: what was admitted by the assignment's word must be
/// what the signed manifest says.
pub fn fits(spec: &CellSpec, manifest: &Manifest) -> anyhow::Result<()> {
    let (image, guest) = (&spec.image, &manifest.guest);
    if manifest.machine.memory_mib > spec.memory_mib {
        bail!(
            "image {image} needs {} MiB and the service is given {}; set memory_mib of the service in the fleet",
            manifest.machine.memory_mib,
            spec.memory_mib
        );
    }
    if let Some(port) = spec.ports.iter().find(|p| !guest.ports.contains(p)) {
        bail!("image {image} does not answer on port {port}; correct ports of the service in the fleet");
    }
    let reached = |b: &BackendSpec| spec.backends.iter().any(|to| to.address == b.address && to.port == b.port);
    if let Some(b) = guest.backends.iter().find(|b| !reached(b)) {
        bail!(
            "image {image} needs back end {} at {}:{}; name it as the service's backend in the fleet",
            b.name,
            b.address,
            b.port
        );
    }
    Ok(())
}
