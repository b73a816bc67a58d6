//! The VM in a cell: spawned, loaded, awakened, checked, let be reached; and put back to sleep.
//!
//! ```text
//! spawn ─▶ load state ─▶ cont ─▶ reseed, step the clock ─▶ healthy ─▶ ports open
//! ```
//! Ports open last: before the guest was awakened, two clones would give out the same random bytes.

use super::process::{self, Process};
use super::record::Phase;
use super::{Machine, cell};
use crate::now;
use anyhow::{Context, bail};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use vmatrix_model::InstanceId;
use vmatrix_model::manifest::{BackendSpec, Manifest};
use vmatrix_vma_core::cell::{BRIDGE, TAP, close, open};
use vmatrix_vma_core::steps::CellSpec;
use vmatrix_vma_image::machine::{Files, QEMU, Run, Start, arguments};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::{guest, health, netns};

/// A resume that is not healthy after so long is given up: without KVM on a loaded machine it takes some seconds.
const RESUME_LIMIT: Duration = Duration::from_secs(45);
/// Between health checks of a guest that is waking.
const HEALTH_EVERY: Duration = Duration::from_millis(20);
/// One health check of a guest that is waking.
const HEALTH_LIMIT: Duration = Duration::from_secs(3);
/// QEMU ends in milliseconds when asked; after so long it is made to.
const QUIT_GRACE: Duration = Duration::from_secs(3);

/// The VM of a namespace: QEMU is given the namespace's name as its own.
pub fn find(running: &[Process], namespace: &str) -> Option<Process> {
    let named = |p: &&Process| {
        p.arguments.first().is_some_and(|a| a.ends_with(QEMU))
            && p.value("-name").and_then(|v| v.split(',').next()) == Some(namespace)
    };
    running.iter().find(named).cloned()
}

impl Machine {
    /// Resumes the VM of a cell, unless it runs and answers.
    pub(super) async fn resume(&self, instance: &InstanceId) -> anyhow::Result<()> {
        let began = now();
        let record =
            self.records.get(instance).with_context(|| format!("there is no cell {instance}; prepare it first"))?;
        let namespace = self.namespace(instance);
        let staged = self
            .stages
            .whole(&record.spec.image)
            .with_context(|| format!("image {} is not staged here", record.spec.image))?;
        fits(&record.spec, &staged.manifest)?;
        let guest = &staged.manifest.guest;
        let inside = netns::path(&namespace);
        let running = find(&process::all(), &namespace).is_some();
        if running
            && record.phase == Phase::Healthy
            && health::ask(&inside, guest.address, &guest.health, HEALTH_LIMIT).await.is_ok()
        {
            self.forgive(instance);
            return Ok(());
        }
        vmatrix_vma_image::machine::check_host(&staged.manifest, &self.host)?;
        self.stages.check_sizes(&record.spec.image)?;
        // One that was half resumed when its daemon died may or may not have been awakened.
        self.end_vm(instance).await?;
        self.records.note(instance, Phase::Resuming, None)?;
        cell::nft(&inside, &close())?;
        let woken = tokio::time::timeout(RESUME_LIMIT, self.wake(instance, &staged.manifest, &staged.files)).await;
        let woken = woken.unwrap_or_else(|_| bail!("{instance} was not healthy after {} s", RESUME_LIMIT.as_secs()));
        if let Err(e) = woken {
            self.end_vm(instance).await?;
            self.records.note(instance, Phase::Ready, None)?;
            return Err(e);
        }
        cell::nft(&inside, &open(&record.spec.ports))?;
        self.forgive(instance);
        let took = now().since(began);
        self.records.note(instance, Phase::Healthy, Some(took))?;
        tracing::info!(%instance, took = %took, "resumed");
        Ok(())
    }

    async fn wake(&self, instance: &InstanceId, manifest: &Manifest, files: &Files) -> anyhow::Result<()> {
        let began = Instant::now();
        let namespace = self.namespace(instance);
        let folder = self.records.folder(instance);
        let (qmp, agent, log) = (folder.join("qmp"), folder.join("agent"), folder.join("qemu.log"));
        let tap = netns::open_tap(&netns::path(&namespace), TAP)?;
        netns::ip_batch(Some(&namespace), &[format!("link set {TAP} master {BRIDGE}"), format!("link set {TAP} up")])?;
        let run = Run {
            name: namespace.clone(),
            qmp: qmp.clone(),
            guest_agent: agent.clone(),
            tap_fd: 0,
            console: None,
            start: Start::Clone,
        };
        spawn(&arguments(manifest, files, &run), tap, &log)?;
        let dead = |e: vmatrix_vma_image::Error| {
            anyhow::Error::new(e).context(format!("QEMU of {instance} said: {:?}", process::tail(&log)))
        };
        let mut monitor = Qmp::connect(&qmp).await.map_err(dead)?;
        let spawned = began.elapsed();
        monitor.load_state(&files.device).await.map_err(dead)?;
        monitor.cont().await.map_err(dead)?;
        let loaded = began.elapsed();
        guest::awaken(&agent)
            .await
            .with_context(|| format!("{instance} could not be reseeded, so it gets no traffic"))?;
        let awake = began.elapsed();
        let inside = netns::path(&namespace);
        let guest = &manifest.guest;
        while let Err(e) = health::ask(&inside, guest.address, &guest.health, HEALTH_LIMIT).await {
            if find(&process::all(), &namespace).is_none() {
                bail!("QEMU of {instance} ended while the guest woke: {}", process::tail(&log));
            }
            tracing::debug!(%instance, problem = %e, "not healthy yet");
            tokio::time::sleep(HEALTH_EVERY).await;
        }
        tracing::debug!(%instance, spawned_ms = spawned.as_millis(), loaded_ms = loaded.as_millis(), awake_ms = awake.as_millis(), healthy_ms = began.elapsed().as_millis(), "woken");
        Ok(())
    }

    /// Puts the VM back to sleep. A replica's writes were to its own copy of memory, which goes with it.
    pub(super) async fn suspend(&self, instance: &InstanceId) -> anyhow::Result<()> {
        let Some(record) = self.records.get(instance) else { return Ok(()) };
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

    /// Ends the VM of a cell if one runs: by QMP, then by its id.
    pub(super) async fn end_vm(&self, instance: &InstanceId) -> anyhow::Result<()> {
        let folder = self.records.folder(instance);
        if let Some(vm) = find(&process::all(), &self.namespace(instance)) {
            let asked = async { Qmp::connect(&folder.join("qmp")).await?.quit().await };
            let quit = tokio::time::timeout(QUIT_GRACE, asked).await.is_ok_and(|q| q.is_ok());
            if !(quit && process::gone(&vm, QUIT_GRACE).await) {
                process::end(&vm, Duration::ZERO).await.with_context(|| format!("cannot end the VM of {instance}"))?;
            }
        }
        for socket in ["qmp", "agent"] {
            let _ = std::fs::remove_file(folder.join(socket));
        }
        Ok(())
    }
}

/// Refuses to resume an image as something it is not: what was admitted by the assignment's word must be
/// what the signed manifest says.
fn fits(spec: &CellSpec, manifest: &Manifest) -> anyhow::Result<()> {
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

/// Starts QEMU in a process group of its own, so that it outlives this daemon. The tap is its
/// standard input: the one descriptor a child gets without a moment in which others get it too.
fn spawn(arguments: &[String], tap: OwnedFd, log: &Path) -> anyhow::Result<()> {
    let output = std::fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let child = tokio::process::Command::new(QEMU)
        .args(arguments)
        .stdin(Stdio::from(tap))
        .stdout(output.try_clone().context("cannot share the log")?)
        .stderr(output)
        .process_group(0)
        .spawn()
        .with_context(|| {
            format!("cannot start {QEMU}; install it with `apt-get install -t bookworm-backports qemu-system-x86`")
        })?;
    // Dropped, not waited for: the runtime collects it when it ends.
    drop(child);
    Ok(())
}
