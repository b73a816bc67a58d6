//! What a singleton's guest will run in, made while it still runs elsewhere.
//!
//! ```text
//! Prepare ─▶ tap ─▶ pager that awaits its image ─▶ QEMU that waits for its disks
//! Resume  ─▶ the holder stops and saves ─▶ the pager is told its image ─▶ QEMU's memory and disks are served ─▶ load
//! ```
//! Nothing of it depends on the state that is to come. Who is not used is ended: with the cell, or by the next run.

use super::Held;
use crate::machine::image::Known;
use crate::machine::pager::{LOOK_SOON, One, Pager, RETURN_LIMIT};
use crate::machine::process::{self, Process};
use crate::machine::record::Record;
use crate::machine::spawn::{Sockets, Waiting};
use crate::machine::{Machine, pager};
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinHandle;
use vmatrix_model::assignment::Singleton;
use vmatrix_model::manifest::PartKind;
use vmatrix_model::{InstanceId, ServiceId};
use vmatrix_vma_image::machine::is_imported;

/// What is being made, by service. Its bound is that of cells.
#[derive(Debug, Default)]
pub struct Earlies(Mutex<BTreeMap<ServiceId, JoinHandle<anyhow::Result<Process>>>>);

impl Earlies {
    fn take(&self, service: &ServiceId) -> Option<JoinHandle<anyhow::Result<Process>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(service)
    }

    /// Whether something is made, or there: what comes for the guest waits at its tap.
    pub fn has(&self, service: &ServiceId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(service)
    }
}

impl Machine {
    /// Begins to make what the guest of a singleton's cell will run in. What cannot be begun the resume does itself.
    pub(in crate::machine) fn make_ready(self: &Arc<Self>, record: &Record, built: &Arc<Known>) {
        let service = &record.spec.instance.service;
        let held = self.tenures.get(service).filter(|held| held.holds().is_some());
        let sources = match (held, record.spec.singleton) {
            (Some(held), _) => held.sources,
            (None, Some(Singleton::Take(at))) => vec![at],
            (None, _) => Vec::new(),
        };
        let runs = || self.find_vm(record, &process::all()).is_some();
        if self.earlies.has(service) || is_imported(&built.manifest.machine) || runs() {
            return;
        }
        // Where its last run here is being cleared away, that goes first.
        let Ok(turn) = self.tenures.turn(service).try_lock_owned() else { return };
        match self.open_tap(&record.spec.instance) {
            Ok(tap) => {
                let (machine, part, built) = (self.clone(), record.clone(), built.clone());
                let made = tokio::spawn(async move { machine.make_early(&part, &built, sources, tap, turn).await });
                self.earlies.0.lock().unwrap_or_else(PoisonError::into_inner).insert(service.clone(), made);
            }
            Err(e) => tracing::warn!(%service, error = format!("{e:#}"), "nothing is made ready"),
        }
    }

    async fn make_early(
        self: &Arc<Self>,
        record: &Record,
        built: &Arc<Known>,
        sources: Vec<SocketAddr>,
        tap: OwnedFd,
        turn: OwnedMutexGuard<()>,
    ) -> anyhow::Result<Process> {
        let (instance, service) = (&record.spec.instance, &record.spec.instance.service);
        self.end_run(service).await?;
        let one = One { service: service.clone(), sources };
        let pager = self.new_pager(built, self.memory.of_singleton(service), Some(one));
        self.memory.prepare(&pager.memory, built)?;
        self.tell_pager(&pager, false).await?;
        drop(turn);
        let process = self.spawn_pager(&pager, true).await?;
        let deadline = Instant::now() + RETURN_LIMIT;
        while built.manifest.part(PartKind::Disk).is_some() && !pager.disk_socket().exists() {
            if !process::is_alive(&process) || Instant::now() > deadline {
                bail!("the pager does not come up: {}", process::tail(&pager.log()));
            }
            tokio::time::sleep(LOOK_SOON).await;
        }
        self.spawn_single(record, built, &pager, tap).await.with_context(|| format!("no QEMU waits for {instance}"))
    }

    /// Starts the QEMU of a singleton.
    pub(super) async fn spawn_single(
        &self,
        record: &Record,
        known: &Known,
        pager: &Pager,
        tap: OwnedFd,
    ) -> anyhow::Result<Process> {
        let instance = &record.spec.instance;
        let waiting = Waiting {
            known,
            name: &self.namespace(instance),
            sockets: &Sockets::within(self.records.folder(instance)),
            memory: &pager.memory,
            pager: &pager.folder,
            shared: true,
        };
        waiting.spawn(tap).await
    }

    /// Takes what was made for a singleton, and gives it the state that is held: its pager and its QEMU.
    pub(super) async fn use_early(
        self: &Arc<Self>,
        instance: &InstanceId,
        known: &Arc<Known>,
        held: &Held,
    ) -> anyhow::Result<Option<(Arc<Pager>, Process)>> {
        let service = &instance.service;
        let Some(made) = self.earlies.take(service) else { return Ok(None) };
        let used = async {
            let vm = made.await.context("it was cut off")??;
            let one = One { service: service.clone(), sources: held.sources.clone() };
            let told = self.new_pager(known, self.memory.of_singleton(service), Some(one));
            if told.find().is_none() || !process::is_alive(&vm) {
                bail!("it has ended");
            }
            self.tell_pager(&told, true).await?;
            anyhow::Ok((self.singles_pager(service, known, held), vm))
        };
        match used.await {
            Ok(used) => Ok(Some(used)),
            Err(e) => {
                tracing::warn!(%service, error = format!("{e:#}"), "what was made ready is not used");
                self.end_vm(instance).await?;
                Ok(None)
            }
        }
    }

    /// Whether the pager of a singleton waits for its image: a QEMU beside it has not run, and may not even answer.
    pub(in crate::machine) fn is_untold(&self, service: &ServiceId) -> bool {
        let folder = self.singles_folder(service);
        pager::before(&folder).exists() && !pager::image(&folder).exists()
    }

    /// Ends what was made for a singleton and not used, by an earlier daemon too.
    ///
    /// # Errors
    /// A process does not end.
    pub(in crate::machine) async fn end_unused(&self, instance: &InstanceId) -> anyhow::Result<()> {
        let service = &instance.service;
        let made = self.earlies.take(service);
        let was_made = made.is_some();
        if let Some(made) = made {
            // What it began has an end of its own.
            let _ = made.await;
        }
        if !was_made && !self.is_untold(service) {
            return Ok(());
        }
        // Not asked first: one that waits for its disks does not hear.
        let record = self.records.get(instance);
        if let Some(vm) = record.and_then(|record| self.find_vm(&record, &process::all())) {
            process::end(&vm, Duration::ZERO).await?;
        }
        match pager::find(&self.singles_folder(service)) {
            Some(pager) => process::end(&pager, Duration::ZERO).await,
            None => Ok(()),
        }
    }
}
