//! What a machine does without being asked: subscribes, checks health, keeps tunnels up, renews images.

use super::image::Level;
use super::record::Phase;
use super::{Machine, process};
use crate::http::USUAL;
use reqwest::Method;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use vmatrix_model::InstanceId;
use vmatrix_model::inventory::MachineSeen;
use vmatrix_model::wire::Subscription;
use vmatrix_vma_image::{health, netns};

/// Between subscriptions; the lease is five of these.
const SUBSCRIBE_EVERY: Duration = Duration::from_secs(1);
/// Between looks at tunnels.
const TUNNELS_EVERY: Duration = Duration::from_secs(1);
/// Between health checks: a guest without KVM has little time to spare in a crowd.
const HEALTH_EVERY: Duration = Duration::from_secs(5);
/// An answer that takes longer is a missed one.
const HEALTH_LIMIT: Duration = Duration::from_secs(5);
/// Between questions for newer images: one small request each, for the origin says when nothing changed.
const RENEW_EVERY: Duration = Duration::from_secs(30);
/// Between looks at which images are to be kept ready.
const WARM_EVERY: Duration = Duration::from_secs(1);
/// A QEMU that does not start to wait is not tried again at once: each try takes a moment of the processor.
const SPARE_AGAIN: Duration = Duration::from_secs(30);
/// Rounds between collections.
const COLLECT_ROUNDS: u64 = 20;
/// Missed in a row, it no longer counts as answering: a crowd may make it miss one or two.
pub const MISSED_MAX: u32 = 4;

/// Tells the VM agent each second that this machine is there.
pub async fn subscribe(machine: Arc<Machine>) {
    let c = &machine.config;
    let url = format!("{}/v1/machines", c.vma);
    let mut silent = false;
    loop {
        let taken = machine.records.all().iter().map(|r| r.spec.memory_mib).fold(0, u64::saturating_add);
        let seen = MachineSeen {
            id: c.name.clone(),
            cpus: c.cpus,
            memory_mib: c.memory_mib,
            free_mib: c.memory_mib.saturating_sub(taken),
            accelerator: machine.host.accelerator.clone(),
            qemu_version: machine.host.qemu_version.clone(),
            transfer: c.transfer_listen,
        };
        let subscription = Subscription { machine: seen, address: c.listen };
        match machine.client.send::<serde_json::Value>(Method::POST, &url, &subscription, USUAL).await {
            Ok(_) => silent = false,
            Err(e) => {
                if !std::mem::replace(&mut silent, true) {
                    tracing::warn!(error = format!("{e:#}"), "the VM agent does not hear; what runs goes on");
                }
            }
        }
        tokio::time::sleep(SUBSCRIBE_EVERY).await;
    }
}

/// Asks every VM that should answer.
pub async fn health(machine: Arc<Machine>) {
    loop {
        tokio::time::sleep(HEALTH_EVERY).await;
        let checks = machine.records.all().into_iter().filter(|r| r.phase == Phase::Healthy).map(|r| {
            let machine = machine.clone();
            async move {
                let Some(known) = machine.images.known(&r.spec.image) else { return };
                let namespace = machine.namespace(&r.spec.instance);
                let guest = &known.manifest.guest;
                match health::ask(&netns::path(&namespace), guest.address, &guest.health, HEALTH_LIMIT).await {
                    Ok(_) => machine.forgive(&r.spec.instance),
                    Err(_) if machine.find_vm(&r, &process::all()).is_none() => {}
                    Err(e) => machine.blame(&r.spec.instance, &e.to_string()),
                }
            }
        });
        futures_util::future::join_all(checks).await;
    }
}

/// Asks the sources for newer images, one after the other so that they share no link, and now and then takes what
/// no image needs any more out of the store.
pub async fn renew(machine: Arc<Machine>) {
    for round in 1u64.. {
        tokio::time::sleep(RENEW_EVERY).await;
        for image in machine.images.names(Level::Whole) {
            if let Err(e) = machine.renew(&image).await {
                tracing::warn!(image, error = format!("{e:#}"), "not renewed; the image that is here stays");
            }
        }
        if round.is_multiple_of(COLLECT_ROUNDS)
            && let Err(e) = machine.collect().await
        {
            tracing::warn!(error = format!("{e:#}"), "chunks that no image names stay");
        }
    }
}

/// Keeps images ready that are here and that nothing runs from.
pub async fn warm(machine: Arc<Machine>) {
    let mut tried = None::<Instant>;
    loop {
        for known in machine.to_keep_warm() {
            machine.pager_for(&known);
        }
        // Not while somebody waits for a guest: a QEMU that starts takes the processor from it.
        if !machine.records.all().iter().any(|r| matches!(r.phase, Phase::Building | Phase::Resuming))
            && tried.is_none_or(|at| at.elapsed() > SPARE_AGAIN)
        {
            let filled = machine.fill_pool(&machine.to_keep_warm()).await;
            tried = filled.is_err().then(Instant::now);
            if let Err(e) = filled {
                tracing::warn!(error = format!("{e:#}"), "cells start a QEMU of their own");
            }
        }
        if let Err(e) = machine.make_room().await {
            tracing::warn!(error = format!("{e:#}"), "memory of images that do not run stays");
        }
        tokio::time::sleep(WARM_EVERY).await;
    }
}

/// Starts again the tunnel of any cell whose tunnel ended.
pub async fn tunnels(machine: Arc<Machine>) {
    loop {
        tokio::time::sleep(TUNNELS_EVERY).await;
        let lame = |r: &super::Record| {
            !r.spec.backends.is_empty()
                && matches!(r.phase, Phase::Ready | Phase::Healthy)
                && machine.find_tunnel(&r.spec.instance).is_none()
        };
        for record in machine.records.all().into_iter().filter(lame) {
            let instance = record.spec.instance.clone();
            // Under a step it is looked at again in a second: others' tunnels need not wait for a resume.
            let Ok(_alone) = machine.alone(&instance).try_lock_owned() else { continue };
            // It may have been released since it was listed.
            if machine.records.get(&instance).as_ref() != Some(&record) {
                continue;
            }
            tracing::warn!(%instance, "the tunnel ended; starting it again");
            if let Err(e) = machine.start_tunnel(&record).await {
                tracing::warn!(%instance, error = format!("{e:#}"), "the tunnel is not up");
            }
        }
    }
}

/// Starts again relays that ended, with the ways through them.
pub async fn relays(machine: Arc<Machine>) {
    loop {
        for record in machine.records.all().into_iter().filter(|r| r.spec.singleton.is_some()) {
            let instance = record.spec.instance.clone();
            // Under a step, or while it is handed over, it is looked at again in a second.
            let Ok(_alone) = machine.alone(&instance).try_lock_owned() else { continue };
            let Ok(_turn) = machine.tenures.turn(&instance.service).try_lock_owned() else { continue };
            // A meeting starts its own.
            if machine.meetings.has(&instance.service) {
                continue;
            }
            let (Some(known), Some(record)) =
                (machine.images.known(&record.spec.image), machine.records.get(&instance))
            else {
                continue;
            };
            if record.phase == Phase::Building {
                continue;
            }
            if let Err(e) = machine.relays_up(&record, &known.manifest.guest).await {
                tracing::warn!(%instance, error = format!("{e:#}"), "a relay is not up");
            }
        }
        tokio::time::sleep(TUNNELS_EVERY).await;
    }
}

impl Machine {
    fn blame(&self, instance: &InstanceId, problem: &str) {
        let mut missed = self.missed.lock().unwrap_or_else(PoisonError::into_inner);
        let n = missed.entry(instance.clone()).or_default();
        *n = n.saturating_add(1);
        tracing::warn!(%instance, missed = *n, problem, "health check missed");
    }

    pub(super) fn forgive(&self, instance: &InstanceId) {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner).remove(instance);
    }
}
