//! Saving a singleton: stop ─▶ device state ─▶ which pages and chunks it wrote ─▶ a snapshot of those, in the store.

use super::run::Run;
use super::{Held, Snapshot, free_name};
use crate::machine::image::{Known, Level};
use crate::machine::pager::{Pager, RETURN_LIMIT};
use crate::machine::process::{self, Process};
use crate::machine::record::{Phase, Record};
use crate::machine::spawn::Sockets;
use crate::machine::vm::CRITICAL_LIMIT;
use crate::machine::{Machine, cell};
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmatrix_model::Digest;
use vmatrix_model::manifest::PartKind;
use vmatrix_vma_build::snapshot::{Child, Data, order, snapshot};
use vmatrix_vma_core::cell::close;
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::{memory, netns, sign};
use vmatrix_vma_pager::Control;

/// Pages of the working set of a snapshot: 12 MiB, twice what a guest was seen to touch in its first sixty requests. They
/// are what it runs into: first what it wrote, then what it touched first.
const WORKING_SET_MAX: usize = 3072;
/// Between tries to reach a pager that is being started anew.
const AGAIN: Duration = Duration::from_millis(20);

/// What saving took, and what came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Took {
    /// Until the guest stood still, microseconds.
    pub stop_us: u64,
    /// Device state.
    pub save_us: u64,
    /// Finding what changed, packing and signing it.
    pub cut_us: u64,
    /// Pages of memory that changed.
    pub pages: u64,
}

impl Machine {
    /// Saves a singleton that runs; it stands still then, from when `about_to_stop` is done. None: nothing runs that
    /// could be saved.
    ///
    /// # Errors
    /// QEMU, the pager or the store refuses; the guest stands still, or runs.
    pub(in crate::machine) async fn save(
        self: &Arc<Self>,
        record: &Record,
        held: &Held,
        known: &Arc<Known>,
        about_to_stop: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Option<(Snapshot, Took)>> {
        let (instance, service) = (&record.spec.instance, &record.spec.instance.service);
        let Some(vm) = self.find_vm(record, &process::all()) else { return Ok(None) };
        let run = self.run(record).await?;
        if run == Run::Waits {
            return Ok(None);
        }
        let pager = self.singles_pager(service, known, held);
        let mut monitor = Qmp::connect(&Sockets::within(self.records.folder(instance)).qmp()).await?;
        let key = self.owner_key(known).await?;
        let name = free_name(&self.images.store, service, held)?;
        let (manifest, store) = (known.clone(), self.images.store.clone());
        let map = tokio::task::spawn_blocking(move || memory::map(&manifest.manifest, &store)).await??;
        about_to_stop()?;
        let began = Instant::now();
        if run == Run::Stands {
            // One that was saved already is not saved again: it has to run for a moment. Nobody else has it.
            monitor.cont().await?;
        }
        monitor.execute("stop", json!({})).await?;
        let stopped = began.elapsed();
        let device = pager.memory.dir.join("device.next");
        monitor.save_state(&device).await?;
        let saved = began.elapsed();
        let (dirty, written) = changed(&pager, &vm).await?;
        let pages = dirty.len() as u64;
        let (store, known, memory) = (self.images.store.clone(), known.clone(), pager.memory.memory());
        let disk = pager.data();
        let cut = move || -> anyhow::Result<Snapshot> {
            let mut changed = vec![false; map.pages() as usize];
            for page in &dirty {
                if let Some(mark) = changed.get_mut(*page as usize) {
                    *mark = true;
                }
            }
            let unchanged = |page: u32| changed.get(page as usize) == Some(&false);
            // It wakes as it woke before: of what it wrote, too, first what it touched first.
            let before = order(&map);
            let (kept, mut early): (Vec<u32>, Vec<u32>) = before.into_iter().partition(|page| unchanged(*page));
            let listed: BTreeSet<u32> = early.iter().copied().collect();
            early.extend(dirty.into_iter().filter(|page| !listed.contains(page)));
            early.extend(kept);
            early.truncate(WORKING_SET_MAX);
            let child = Child {
                name: &name,
                memory: &memory,
                device: &device,
                parent: (&known.manifest, known.digest),
                map: &map,
                unchanged: &unchanged,
                order: &early,
                key: key.as_ref(),
                data: written.as_deref().map(|written| Data { file: &disk, written }),
            };
            let (_, digest): (_, Digest) = snapshot(&store, &child)?;
            Ok(Snapshot { digest, signer: sign::public(&store)? })
        };
        let snapshot = tokio::task::spawn_blocking(cut).await?.with_context(|| format!("cannot save {service}"))?;
        let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        let took =
            Took { stop_us: us(stopped), save_us: us(saved - stopped), cut_us: us(began.elapsed() - saved), pages };
        Ok(Some((snapshot, took)))
    }

    /// Puts a singleton to sleep where it is: saved, and still held.
    ///
    /// # Errors
    /// It cannot be saved: it is still there, and stands still until it is told to sleep or to resume again.
    pub(in crate::machine) async fn suspend_singleton(self: &Arc<Self>, record: &Record) -> anyhow::Result<()> {
        let (instance, service) = (&record.spec.instance, &record.spec.instance.service);
        let _turn = self.tenures.turn(service).lock_owned().await;
        self.meetings.end(service).await;
        self.end_unused(instance).await?;
        if record.phase == Phase::Building {
            return self.end_run(service).await;
        }
        self.records.note(instance, Phase::Suspending, None)?;
        let inside = netns::path(&self.namespace(instance));
        let relayed = self.relays(record)?.away;
        if inside.exists() && !relayed {
            cell::nft(&inside, &close())?;
        }
        if let Some(mut held) = self.tenures.get(service).filter(|h| h.tenure.may_run())
            && self.find_vm(record, &process::all()).is_some()
        {
            let built = self.until(&held.image, Level::Known, CRITICAL_LIMIT).await?;
            let (known, _) = self.state(service, &held, &built).await?;
            self.first_bytes(&known, None, &held).await?;
            if let Some((state, took)) = self.save(record, &held, &known, || Ok(())).await? {
                held.saved(state);
                self.tenures.write(service, &held)?;
                self.drop_old_snapshots(service, &held);
                tracing::info!(%service, pages = took.pages, cut_ms = took.cut_us / 1000, "saved");
            }
        }
        self.end_vm(instance).await?;
        self.end_run(service).await?;
        self.forgive(instance);
        self.records.note(instance, Phase::Ready, None)
    }
}

/// Pages of memory that the guest has written, and chunks of its data, if it has any; once its pager says so, which may
/// be on its way back.
async fn changed(pager: &Pager, vm: &Process) -> anyhow::Result<(Vec<u32>, Option<Vec<u32>>)> {
    let data = pager.known.manifest.part(PartKind::Data).is_some();
    let deadline = Instant::now() + RETURN_LIMIT;
    loop {
        let asked = async {
            let mut control = Control::connect(&pager.control()).await?;
            let dirty = control.dirty(vm.pid).await?.into_iter().flatten().collect();
            Ok::<_, vmatrix_vma_pager::Error>((dirty, if data { Some(control.written().await?) } else { None }))
        };
        match asked.await {
            Ok(changed) => return Ok(changed),
            Err(e) if !process::is_alive(vm) => bail!("QEMU ended while it was saved: {e}"),
            Err(e) if Instant::now() > deadline => return Err(e).context("the pager does not say what changed"),
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
}
