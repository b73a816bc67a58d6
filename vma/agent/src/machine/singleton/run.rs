//! Running a singleton: its state ─▶ a memory file of its own ─▶ QEMU that writes to it, every write noted.
//!
//! ```text
//! resume: take it, if another machine has it ─▶ its state's manifest and first bytes ─▶ pager ─▶ QEMU waits
//!          ─▶ adopt ─▶ note writes ─▶ load ─▶ cont ─▶ clock ─▶ ports open, healthy
//! ```
//! A guest that has run is never begun anew: nobody else has what it did since. Where this daemon was killed on the
//! way, QEMU says how far it was: waiting for its state, it has not run; else it goes on.

use super::{Held, Snapshot, find, free_name, trust};
use crate::machine::fetch::AT_ONCE;
use crate::machine::hand::{Beginning, Taken};
use crate::machine::image::{Known, Level};
use crate::machine::memory::Folder;
use crate::machine::pager::{One, Pager};
use crate::machine::process::{self, Process};
use crate::machine::record::{Phase, Record};
use crate::machine::spawn::{self, Sockets};
use crate::machine::vm::{CRITICAL_LIMIT, RESUME_LIMIT, fits};
use crate::machine::{Machine, memory, survey};
use crate::now;
use anyhow::{Context, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::TryStreamExt;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use vmatrix_model::assignment::Singleton;
use vmatrix_model::{InstanceId, ServiceId};
use vmatrix_vma_core::cell::{BRIDGE, TAP};
use vmatrix_vma_core::tenure::{Part, Tenure};
use vmatrix_vma_image::chunks::{self, Need};
use vmatrix_vma_image::machine::is_imported;
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::sign::verify;
use vmatrix_vma_image::{guest, netns};
use vmatrix_vma_pager::Control;
use vmatrix_vma_transfer::{Ask, Class, ImageRef, Limits, Pushed, Sources};

/// Connections to single machines that are kept; the first by address goes when there is one more.
const PEERS_MAX: usize = 16;
/// A manifest comes in a round trip; a machine that is starting takes some seconds.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// A push that stops for so long is over: what is missing is asked for.
const PUSH_QUIET: Duration = Duration::from_millis(300);

/// How far a QEMU is with its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// It waits for its state: the guest has not run in it.
    Waits,
    Runs,
    /// It stands still, or was saved.
    Stands,
}

/// What comes behind a manifest.
enum Push {
    Begun(Option<Pushed>),
    Opening(JoinHandle<Option<Pushed>>),
}

impl Machine {
    /// Resumes the singleton of a cell, taking it from who has it; one that runs goes on.
    ///
    /// # Errors
    /// It is elsewhere and not handed over, its state does not come, or the guest does not answer: then it goes on
    /// running, for nobody else has its state.
    pub(in crate::machine) async fn resume_singleton(self: &Arc<Self>, record: &Record) -> anyhow::Result<()> {
        let (began, deadline) = (now(), tokio::time::Instant::now() + RESUME_LIMIT);
        let (instance, service) = (&record.spec.instance, &record.spec.instance.service);
        let _turn = self.tenures.turn(service).lock_owned().await;
        let built = self.until(&record.spec.image, Level::Known, CRITICAL_LIMIT).await?;
        fits(&record.spec, &built.manifest)?;
        if is_imported(&built.manifest.machine) {
            bail!(
                "image {} writes a root disk of its own and cannot be a singleton; run it as replicas",
                record.spec.image
            );
        }
        if !self.earlies.has(service) {
            // By an earlier daemon, which did not get to use it.
            self.end_unused(instance).await?;
        }
        self.records.note(instance, Phase::Resuming, None)?;
        let woken = async {
            let (held, tap) = self.hold(record, &built).await?;
            self.wake_singleton(record, &held, &built, tap).await
        };
        let woken = tokio::time::timeout_at(deadline, woken).await;
        let woken = woken.unwrap_or_else(|_| bail!("{instance} was not healthy after {} s", RESUME_LIMIT.as_secs()));
        if let Err(e) = woken {
            if let Err(more) = self.undo_resume(record).await {
                tracing::warn!(%instance, error = format!("{more:#}"), "a resume that failed is not undone");
            }
            return Err(e);
        }
        self.forgive(instance);
        let took = now().since(began);
        self.records.note(instance, Phase::Healthy, Some(took))?;
        tracing::info!(%instance, took = %took, "resumed");
        Ok(())
    }

    /// After a resume that failed: a QEMU whose guest has not run ends; one whose guest has, goes on.
    async fn undo_resume(self: &Arc<Self>, record: &Record) -> anyhow::Result<()> {
        let instance = &record.spec.instance;
        self.end_unused(instance).await?;
        let Some(record) = self.records.get(instance).filter(|r| r.phase == Phase::Resuming) else { return Ok(()) };
        if self.find_vm(&record, &process::all()).is_some() && self.run(&record).await? != Run::Waits {
            return Ok(());
        }
        self.end_vm(instance).await?;
        self.records.note(instance, Phase::Ready, None)
    }

    /// Has this machine hold the singleton: it does already, begins it, or takes it.
    async fn hold(self: &Arc<Self>, record: &Record, built: &Arc<Known>) -> anyhow::Result<(Held, Option<OwnedFd>)> {
        let taken = |taken: Taken| (taken.held, taken.tap);
        let service = &record.spec.instance.service;
        let from = record.spec.singleton.with_context(|| format!("{service} is no singleton"))?;
        match (self.tenures.get(service), from) {
            (Some(mut held), _) if !matches!(held.tenure.part, Part::Handed { .. }) => {
                if held.tenure.part != Part::Held {
                    held.tenure.keep();
                    held.taker = None;
                    self.tenures.write(service, &held)?;
                    tracing::info!(%service, "it is wanted here again; what was being handed on stays");
                }
                Ok((held, None))
            }
            (None, Singleton::Keep) => bail!("{service} is not held here, and nobody said from whom to take it"),
            (Some(Held { taker: Some(taker), .. }), Singleton::Keep) => {
                bail!(
                    "{service} was handed to the machine at {}; it is taken back when it is wanted here",
                    taker.serving
                )
            }
            (None, Singleton::Begin) => {
                let held = Held {
                    tenure: Tenure::first(),
                    image: record.spec.image.clone(),
                    built: built.build(),
                    state: None,
                    before: None,
                    sources: Vec::new(),
                    taker: None,
                };
                self.tenures.write(service, &held)?;
                Ok((held, None))
            }
            (Some(Held { taker: Some(taker), .. }), Singleton::Begin) => {
                Ok(taken(self.take(record, built, taker.serving).await?))
            }
            (Some(_), Singleton::Begin | Singleton::Keep) => {
                bail!("{service} was handed on, and to whom is not known; name the machine")
            }
            (_, Singleton::Take(at)) => Ok(taken(self.take(record, built, at).await?)),
        }
    }

    /// Has the guest run and answer.
    async fn wake_singleton(
        self: &Arc<Self>,
        record: &Record,
        held: &Held,
        built: &Arc<Known>,
        tap: Option<OwnedFd>,
    ) -> anyhow::Result<()> {
        let began = Instant::now();
        let instance = &record.spec.instance;
        let (known, push) = self.begin_state(&instance.service, held, built).await?;
        let opened = began.elapsed();
        let latest = self.relays(record)?.latest;
        let early = self.use_early(instance, &known, held).await?;
        let mut running = self.find_vm(record, &process::all()).filter(|_| early.is_none());
        if let Some(vm) = &running {
            // Made for a guest that did not come, or half begun when this daemon ended: it has not run.
            let never_ran = record.phase == Phase::Ready || self.is_untold(&instance.service);
            let gone = never_ran
                || match self.run(record).await {
                    Ok(run) => run == Run::Waits,
                    // It ended meanwhile.
                    Err(_) if !process::is_alive(vm) => true,
                    Err(e) => return Err(e),
                };
            if gone {
                self.end_vm(instance).await?;
                running = None;
            }
        }
        let sockets = Sockets::within(self.records.folder(instance));
        let (vm, mut monitor) = match running {
            Some(vm) => (vm, Qmp::connect(&sockets.qmp()).await?),
            None => {
                let dead = |e: vmatrix_vma_image::Error| {
                    anyhow::Error::new(e).context(format!("QEMU of {instance} said: {:?}", spawn::words(&sockets)))
                };
                let folder = self.memory.of_singleton(&instance.service);
                if early.is_none() {
                    // What an earlier run left is of that run.
                    self.end_run(&instance.service).await?;
                    self.memory.prepare(&folder, &known)?;
                }
                let spawn = async {
                    let (pager, vm) = match early {
                        Some(early) => early,
                        None => self.begin_run(record, held, &known, tap).await?,
                    };
                    let spawned = began.elapsed();
                    let monitor = async { Qmp::connect(&sockets.qmp()).await.map_err(dead) };
                    // Before it loads: every write from then on is one of this run.
                    let adopted = async {
                        pager.adopt(&vm).await?;
                        Ok(Control::connect(&pager.control()).await?.protect(vm.pid).await?)
                    };
                    let (monitor, ()) = tokio::try_join!(monitor, adopted)?;
                    Ok((vm, monitor, spawned, began.elapsed()))
                };
                let ship = async {
                    let device = self.device_file(&known, push, &folder, held).await?;
                    anyhow::Ok((device, began.elapsed()))
                };
                let ((vm, mut monitor, spawned, adopted), (device, shipped)) = tokio::try_join!(spawn, ship)?;
                let served = began.elapsed();
                monitor.load_state(&device).await.map_err(dead)?;
                tracing::info!(
                    %instance,
                    opened_ms = opened.as_millis(),
                    spawned_ms = spawned.as_millis(),
                    adopted_ms = adopted.as_millis(),
                    shipped_ms = shipped.as_millis(),
                    served_ms = served.as_millis(),
                    loaded_ms = began.elapsed().as_millis(),
                    relay = latest,
                    "loaded"
                );
                (vm, monitor)
            }
        };
        // Only the holder's guest runs, whatever happened since it was looked up.
        if !self.tenures.get(&instance.service).is_some_and(|h| h.tenure.may_run()) {
            bail!("{} is not held here any more", instance.service);
        }
        monitor.cont().await?;
        // QEMU talks to one at a time.
        drop(monitor);
        let runs = began.elapsed();
        self.guest_came(record).await?;
        if known.manifest.guest.reseeds {
            guest::awaken_same(&sockets.agent())
                .await
                .with_context(|| format!("the clock of {instance} was not set"))?;
        }
        let awake = began.elapsed();
        // Its users, who were in the middle of something, need not wait for the check.
        tokio::try_join!(self.open_ports(record), self.until_healthy(instance, &known, &vm, &sockets))?;
        tracing::info!(
            %instance,
            runs_ms = runs.as_millis(),
            awake_ms = awake.as_millis(),
            healthy_ms = began.elapsed().as_millis(),
            "woken"
        );
        Ok(())
    }

    /// A pager and a waiting QEMU on an empty memory file.
    async fn begin_run(
        self: &Arc<Self>,
        record: &Record,
        held: &Held,
        known: &Arc<Known>,
        tap: Option<OwnedFd>,
    ) -> anyhow::Result<(Arc<Pager>, Process)> {
        let instance = &record.spec.instance;
        let pager = self.singles_pager(&instance.service, known, held);
        pager.up().await?;
        let tap = tap.map_or_else(|| self.open_tap(instance), Ok)?;
        let vm = self.spawn_single(record, known, &pager, tap).await?;
        Ok((pager, vm))
    }

    /// The tap of a cell's guest: what is sent to it waits until somebody reads it.
    ///
    /// # Errors
    /// A QEMU has it, or there is no cell.
    pub(in crate::machine) fn open_tap(&self, instance: &InstanceId) -> anyhow::Result<OwnedFd> {
        let name = self.namespace(instance);
        let tap = netns::open_tap(&netns::path(&name), TAP)?;
        netns::ip_batch(Some(&name), &[format!("link set {TAP} master {BRIDGE}"), format!("link set {TAP} up")])?;
        Ok(tap)
    }

    /// Ends the pager of a singleton that does not run, and frees its memory.
    pub(in crate::machine) async fn end_run(&self, service: &ServiceId) -> anyhow::Result<()> {
        let folder = self.memory.of_singleton(service);
        if let Some(guest) = self.guests_of(&folder).first() {
            bail!("QEMU {} still has the memory of {service}", guest.pid);
        }
        self.clear_away(&self.singles_folder(service), &folder, "its guest has ended").await?;
        self.memory.free(&folder)
    }

    /// The pager of a singleton's run.
    pub(in crate::machine) fn singles_pager(
        self: &Arc<Self>,
        service: &ServiceId,
        known: &Arc<Known>,
        held: &Held,
    ) -> Arc<Pager> {
        let one = One { service: service.clone(), sources: held.sources.clone() };
        self.pager_at(known, self.memory.of_singleton(service), Some(one))
    }

    /// How far the QEMU of a cell is.
    ///
    /// # Errors
    /// It does not say.
    pub(in crate::machine) async fn run(&self, record: &Record) -> anyhow::Result<Run> {
        let sockets = Sockets::within(self.records.folder(&record.spec.instance));
        let mut monitor = Qmp::connect(&sockets.qmp()).await?;
        let said = monitor.execute("query-status", json!({})).await?;
        match said.get("status").and_then(Value::as_str) {
            Some("inmigrate") => Ok(Run::Waits),
            Some("running") => Ok(Run::Runs),
            Some(_) => Ok(Run::Stands),
            None => bail!("QEMU of {} does not say how it is: {said}", record.spec.instance),
        }
    }

    /// The state that a singleton is held with: its manifest, fetched if need be; and what is pushed behind it.
    ///
    /// # Errors
    /// No machine that should have it gives it, or it is not to be believed.
    pub(in crate::machine) async fn state(
        self: &Arc<Self>,
        service: &ServiceId,
        held: &Held,
        built: &Arc<Known>,
    ) -> anyhow::Result<(Arc<Known>, Option<Pushed>)> {
        if held.image != built.manifest.name || held.built != built.build() {
            bail!(
                "{service} began from another build of image {} ({}) than the one that is here ({}); put that build \
                 into the sources",
                held.image,
                held.built.short(),
                built.build().short()
            );
        }
        let Some(state) = &held.state else { return Ok((built.clone(), None)) };
        // Asked for once: what is sealed with it is opened by it.
        self.owner_key(built).await?;
        if let Some(signed) = find(&self.images.store, service, &state.digest)? {
            return Ok((Arc::new(trust(signed, state, built, &self.host)?), None));
        }
        let mut problem = anyhow::anyhow!("nobody is known to have it");
        for at in &held.sources {
            match self.fetch_state(service, held, state, built, *at).await {
                Ok((known, pushed)) => return Ok((known, Some(pushed))),
                Err(e) => problem = e,
            }
        }
        Err(problem.context(format!("cannot get the state of {service}, snapshot {}", state.digest.short())))
    }

    /// As [`Machine::state`], before what is pushed behind the manifest has begun to come.
    async fn begin_state(
        self: &Arc<Self>,
        service: &ServiceId,
        held: &Held,
        built: &Arc<Known>,
    ) -> anyhow::Result<(Arc<Known>, Push)> {
        let (known, pushed) = self.state(service, held, built).await?;
        if pushed.is_some() || self.images.store.has(&known.manifest.device.digest) {
            return Ok((known, Push::Begun(pushed)));
        }
        let (machine, service, held, built) = (self.clone(), service.clone(), held.clone(), built.clone());
        let opening = tokio::spawn(async move {
            let state = held.state.as_ref()?;
            for at in &held.sources {
                match machine.fetch_state(&service, &held, state, &built, *at).await {
                    Ok((_, pushed)) => return Some(pushed),
                    Err(e) => tracing::debug!(%service, error = format!("{e:#}"), "not pushed from there"),
                }
            }
            None
        });
        Ok((known, Push::Opening(opening)))
    }

    /// Keeps what came of a snapshot with the hand-over: believed when it is used, as all that is in the store.
    ///
    /// # Errors
    /// It is of another snapshot, is not signed as it should be, or the store is full.
    pub(in crate::machine) fn keep_beginning(
        &self,
        service: &ServiceId,
        held: &Held,
        begin: &Beginning,
    ) -> anyhow::Result<()> {
        let store = &self.images.store;
        let Some(state) = &held.state else { bail!("the beginning of a snapshot came with {service}, which has none") };
        let (manifest, digest) = verify(&begin.manifest, std::slice::from_ref(&state.signer))?;
        ensure!(digest == state.digest, "the beginning of another snapshot came with {service}: {}", digest.short());
        let first = STANDARD.decode(&begin.first).context("its first table is not base64")?;
        chunks::open(&first, &Need::blob(&manifest.memory.first, false), None)?;
        store.put_chunk(&manifest.memory.first.digest, &first)?;
        if find(store, service, &digest)?.is_none() {
            let others = Held { state: held.before.clone(), before: None, ..held.clone() };
            store.put_image(&free_name(store, service, &others)?, &begin.manifest)?;
        }
        Ok(())
    }

    /// Opens a snapshot at one machine, with what it needs first behind it, and keeps its manifest.
    pub(in crate::machine) async fn fetch_state(
        self: &Arc<Self>,
        service: &ServiceId,
        held: &Held,
        state: &Snapshot,
        built: &Arc<Known>,
        at: SocketAddr,
    ) -> anyhow::Result<(Arc<Known>, Pushed)> {
        let peer = self.peer(at)?;
        let here =
            held.before.as_ref().filter(|b| find(&self.images.store, service, &b.digest).is_ok_and(|f| f.is_some()));
        let have = here.map_or(built.digest, |b| b.digest);
        let image = ImageRef::Digest(state.digest);
        let ask = Ask { image, have: Some(have), push: true, key: self.owner_key(built).await? };
        let opened = tokio::time::timeout(OPEN_LIMIT, peer.open(&ask, std::slice::from_ref(&state.signer))).await;
        let opened = opened.with_context(|| format!("{at} does not answer"))??;
        let known = Arc::new(trust(opened.signed.clone(), state, built, &self.host)?);
        if find(&self.images.store, service, &state.digest)?.is_none() {
            let (store, name) = (self.images.store.clone(), free_name(&self.images.store, service, held)?);
            tokio::task::spawn_blocking(move || store.put_image(&name, &opened.signed)).await??;
        }
        Ok((known, opened.pushed))
    }

    /// Gets what a guest needs first, from the push and then from whoever has it; and the tables, by which what it
    /// changes is told later.
    pub(in crate::machine) async fn first_bytes(
        &self,
        known: &Known,
        pushed: Option<Pushed>,
        held: &Held,
    ) -> anyhow::Result<()> {
        let mut lacks = survey::of_critical(&known.manifest, &self.images.store);
        if let Some(mut pushed) = pushed {
            while !lacks.is_empty() {
                let Ok(Some(arrived)) = tokio::time::timeout(PUSH_QUIET, pushed.next()).await else { break };
                lacks.retain(|need| need.digest != arrived.need.digest);
                if arrived.need.digest == known.manifest.memory.first.digest {
                    lacks = self.settled(known, true).await;
                }
            }
        }
        let key = self.owner_key(known).await?;
        // Twice: the first table says what else there is.
        for _ in 0..2 {
            self.get_all(held, self.settled(known, true).await, key.as_ref()).await?;
        }
        self.get_all(held, survey::tables(&known.manifest, &self.images.store), None).await
    }

    async fn get_all(&self, held: &Held, needs: Vec<Need>, key: Option<&OwnerKey>) -> anyhow::Result<()> {
        futures_util::stream::iter(needs.into_iter().map(Ok::<Need, anyhow::Error>))
            .try_for_each_concurrent(AT_ONCE, |need| async move {
                let key = key.filter(|_| need.sealed);
                self.get_from(held, &need, key).await.map(drop)
            })
            .await
    }

    /// The guest's device state as a file, beside its memory. What else it needs first goes on coming behind it: the guest
    /// runs into that, as clones do.
    async fn device_file(
        self: &Arc<Self>,
        known: &Arc<Known>,
        push: Push,
        folder: &Folder,
        held: &Held,
    ) -> anyhow::Result<PathBuf> {
        let mut pushed = match push {
            Push::Begun(pushed) => pushed,
            Push::Opening(opening) => opening.await.context("the opening was cut off")?,
        };
        let need = Need::blob(&known.manifest.device, known.manifest.seal.is_some());
        let mut plain = None;
        while let Some(push) = pushed.as_mut().filter(|_| plain.is_none()) {
            match tokio::time::timeout(PUSH_QUIET, push.next()).await {
                Ok(Some(arrived)) => plain = Some(arrived.plain).filter(|_| arrived.need.digest == need.digest),
                Ok(None) | Err(_) => pushed = None,
            }
        }
        let plain = match plain {
            Some(plain) => plain,
            None => self.get_from(held, &need, self.owner_key(known).await?.as_ref()).await?,
        };
        let path = folder.device();
        memory::write(&path, &plain)?;
        let (machine, known, held) = (self.clone(), known.clone(), held.clone());
        tokio::spawn(async move {
            if let Err(e) = machine.first_bytes(&known, pushed, &held).await {
                // The pager goes on asking for what the guest touches.
                tracing::warn!(
                    image = known.manifest.name,
                    error = format!("{e:#}"),
                    "a singleton's working set does not come whole"
                );
            }
        });
        Ok(path)
    }

    /// A chunk, from the store or a machine that held the singleton, and at last from this machine's sources.
    async fn get_from(&self, held: &Held, need: &Need, key: Option<&OwnerKey>) -> anyhow::Result<Vec<u8>> {
        for at in &held.sources {
            match self.peer(*at)?.get(need, Class::Critical, key).await {
                Ok(plain) => return Ok(plain),
                Err(e) => tracing::debug!(source = %at, error = %e, "not from there"),
            }
        }
        Ok(self.sources.get(need, Class::Critical, key).await?)
    }

    /// Has a connection to one machine be up, and its window large, before it is needed.
    pub(in crate::machine) fn warm_peer(&self, at: SocketAddr) {
        if self.peers.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&at) {
            return;
        }
        match self.peer(at) {
            Ok(peer) => drop(tokio::spawn(async move { peer.warm().await })),
            // Whoever needs it says so.
            Err(e) => tracing::debug!(%at, error = format!("{e:#}"), "not warmed"),
        }
    }

    /// A connection to one machine, kept for the next time.
    ///
    /// # Errors
    /// This machine's identity is not whole.
    pub(in crate::machine) fn peer(&self, at: SocketAddr) -> anyhow::Result<Sources> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get(&at) {
            return Ok(peer.clone());
        }
        if peers.len() >= PEERS_MAX {
            peers.pop_first();
        }
        let identity = vmatrix_vma_transfer::identity::Identity::read(&self.config.identity)?;
        let (store, serving) = (self.images.store.clone(), self.config.transfer_listen);
        let peer =
            Sources::new(&identity, store, vec![at], serving, &Limits { background_mbit: self.config.rate_mbit })?;
        peers.insert(at, peer.clone());
        Ok(peer)
    }
}

/// Connections to single machines.
pub type Peers = BTreeMap<SocketAddr, Sources>;
