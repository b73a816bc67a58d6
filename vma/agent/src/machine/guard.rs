//! Keeping pagers alive, and ending guests that no pager can help.
//!
//! ```text
//! guard: find or start the pager ─▶ have it adopt every guest ─▶ look at it, again and again
//!          ▲                              │ it died, or does not answer: again at once
//!          └──────────────────────────────┤ stuck, or does not come back: guests are ended, and it is said why
//!                                         └ nothing runs from its image, nor is to be kept ready: it ends
//! ```
//! A guest whose pager died waits, with its faults kept by the kernel, until the next one has adopted it.

use super::Machine;
use super::image::{Known, Level};
use super::memory::Folder;
use super::pager::{self, ANSWER_LIMIT, LOOK_SOON, Pager, RETURN_LIMIT};
use super::process;
use super::record::Phase;
use super::spawn::Sockets;
use anyhow::{Context, bail};
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use vmatrix_model::{Bytes, ServiceId};
use vmatrix_vma_core::steps::Fault;
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_pager::Control;

/// Looks at a pager while a guest of its wakes.
const LOOK_WAKING: Duration = Duration::from_millis(20);
/// A guest that was let go so shortly ago has the processor for itself: what it has to compile and fault in anew is
/// what its first clients wait for.
const FIRST_REQUESTS: Duration = Duration::from_secs(1);
/// Looks at a pager while memory comes.
const LOOK: Duration = Duration::from_millis(100);
/// Looks at a pager whose guests have all their memory.
const LOOK_IDLE: Duration = Duration::from_millis(500);
/// Between attempts to start one that ends at once.
const AGAIN: Duration = Duration::from_millis(200);
/// Without a guest for so long a pager ends.
const IDLE_FOR: Duration = Duration::from_secs(3);
/// A guest that stands still because its disk's file has no room writes again so often.
const WRITE_AGAIN: Duration = Duration::from_secs(5);
/// A pager ends in milliseconds when asked.
const QUIT_GRACE: Duration = Duration::from_secs(2);

/// Why a pager was no longer looked at.
enum End {
    /// It is gone, or does not answer: another one is started.
    Died(String),
    /// Its guests are not to be held any longer.
    Stuck(String),
    /// Nothing needs it.
    Idle,
}

impl Machine {
    /// Keeps a pager alive until nothing needs it.
    pub(super) async fn guard(self: &Arc<Self>, pager: &Pager) {
        let name = &pager.known.manifest.name;
        let mut down_since = None;
        loop {
            let end = self.attend(pager, &mut down_since).await;
            let end = end.unwrap_or_else(|e| End::Died(format!("{e:#}")));
            match end {
                End::Died(_) if pager.view.borrow().failed.is_some() => return,
                End::Died(why) => {
                    let down = *down_since.get_or_insert_with(Instant::now);
                    tracing::warn!(image = name, problem = why, "the pager is gone; starting it again");
                    // A singleton's guest waits as long as it takes: nobody else has what it did.
                    if down.elapsed() < RETURN_LIMIT || pager.one.is_some() {
                        tokio::time::sleep(if pager.find().is_none() { LOOK_SOON } else { AGAIN }).await;
                        continue;
                    }
                    self.end_guests(pager, false, &format!("the pager of image {name} does not come back: {why}"))
                        .await;
                }
                End::Stuck(why) => {
                    self.end_guests(pager, true, &format!("memory of image {name} does not come: {why}")).await
                }
                // A cell may have been begun this very moment.
                End::Idle if self.needs(pager) => continue,
                End::Idle => {}
            }
            self.retire(pager, "nothing runs from its image").await;
            return;
        }
    }

    /// Starts the pager if there is none and looks at it until that has an end.
    async fn attend(self: &Arc<Self>, pager: &Pager, down_since: &mut Option<Instant>) -> anyhow::Result<End> {
        let running = match pager.find() {
            Some(running) => running,
            None => self.start_pager(pager).await?,
        };
        let deadline = Instant::now() + RETURN_LIMIT;
        let mut control = loop {
            match Control::connect(&pager.control()).await {
                Ok(control) => break control,
                Err(_) if !process::is_alive(&running) => {
                    bail!("it ended while it began: {}", process::tail(&pager.log()))
                }
                Err(e) if Instant::now() > deadline => return Err(e).context("its control socket does not answer"),
                Err(_) => tokio::time::sleep(LOOK_SOON).await,
            }
        };
        for guest in self.guests_of(&pager.memory) {
            let adopted = tokio::time::timeout(ANSWER_LIMIT, control.adopt(guest.pid)).await;
            match adopted.map_err(anyhow::Error::from).and_then(|a| Ok(a?)) {
                Ok(()) => {}
                Err(_) if !process::is_alive(&guest) => {}
                Err(e) => return Err(e).with_context(|| format!("it does not take over guest {}", guest.pid)),
            }
        }
        let (mut idle_since, mut paused, mut woke, mut stuck, mut full) = (None, None, None, false, None);
        loop {
            let name = &pager.known.manifest.name;
            let (rests, waking) = match &pager.one {
                Some(one) => (false, self.cell_of(&one.service).is_some_and(|r| r.phase == Phase::Resuming)),
                None => (!self.runs_from(name), self.is_waking(name)),
            };
            pager.view.send_if_modified(|v| std::mem::replace(&mut v.rests, rests) != rests);
            if waking {
                woke = Some(Instant::now());
            }
            // Verifying and unpacking what nobody waits for would take the processor from a guest that wakes.
            let pause = rests || woke.is_some_and(|woke: Instant| woke.elapsed() < FIRST_REQUESTS);
            if paused != Some(pause) {
                let told = if pause { control.pause_background().await } else { control.resume_background().await };
                told.context("it does not do as it is told")?;
                paused = Some(pause);
            }
            let status = match tokio::time::timeout(ANSWER_LIMIT, control.status()).await {
                Ok(Ok(status)) => status,
                Ok(Err(e)) if process::is_alive(&running) => return Err(e).context("it does not say how far it is"),
                Ok(Err(_)) => return Ok(End::Died(format!("it ended: {}", process::tail(&pager.log())))),
                Err(_) => {
                    process::end(&running, Duration::ZERO).await?;
                    return Ok(End::Died(format!("it did not answer within {} s", ANSWER_LIMIT.as_secs())));
                }
            };
            *down_since = None;
            if let Some(why) = status.stuck.as_ref().filter(|_| !std::mem::replace(&mut stuck, true)) {
                if pager.one.is_none() {
                    return Ok(End::Stuck(why.clone()));
                }
                tracing::warn!(image = name, problem = why, "a singleton stands still until its memory comes");
            }
            stuck = status.stuck.is_some();
            match (&status.full, full) {
                (Some(why), None) => {
                    tracing::warn!(image = name, problem = why, "a singleton stands still until there is room");
                    full = Some(Instant::now());
                }
                (Some(_), Some(tried)) if tried.elapsed() > WRITE_AGAIN => {
                    self.write_again(pager).await;
                    full = Some(Instant::now());
                }
                (None, Some(_)) => {
                    tracing::info!(image = name, "there is room again");
                    full = None;
                }
                _ => {}
            }
            let pause = match (status.critical, status.hydrated) {
                (false, _) => LOOK_SOON,
                _ if waking => LOOK_WAKING,
                (true, false) => LOOK,
                (true, true) => LOOK_IDLE,
            };
            self.tell_missed(pager, &mut control, &status, woke).await?;
            pager.view.send_modify(|v| v.status = Some(status));
            if self.needs(pager) {
                idle_since = None;
            } else if idle_since.get_or_insert_with(Instant::now).elapsed() > IDLE_FOR {
                return Ok(End::Idle);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Has a guest go on that QEMU stopped because its disk took no more: what it could not write it writes again, and
    /// is stopped again if there is still no room.
    async fn write_again(&self, pager: &Pager) {
        let Some(one) = &pager.one else { return };
        let Some(record) = self.cell_of(&one.service) else { return };
        // While it is handed over it is stopped for another reason.
        let Ok(_turn) = self.tenures.turn(&one.service).try_lock_owned() else { return };
        let goes_on = async {
            let mut monitor = Qmp::connect(&Sockets::within(self.records.folder(&record.spec.instance)).qmp()).await?;
            let said = monitor.execute("query-status", serde_json::json!({})).await?;
            if said.get("status").and_then(|s| s.as_str()) == Some("io-error") {
                monitor.cont().await?;
            }
            anyhow::Ok(())
        };
        let said = tokio::time::timeout(ANSWER_LIMIT, goes_on).await;
        if let Err(e) = said.map_err(anyhow::Error::from).and_then(|done| done) {
            tracing::debug!(service = %one.service, error = format!("{e:#}"), "its QEMU is not told to go on");
        }
    }

    /// Why the guest of a singleton cannot write its disk, if it cannot.
    pub(super) fn lacks_room(&self, service: &ServiceId) -> Option<String> {
        let folder = self.memory.of_singleton(service).dir;
        let pager = self.pagers.lock().unwrap_or_else(PoisonError::into_inner).get(&folder).cloned()?;
        let view = pager.view.borrow();
        view.status.as_ref()?.full.clone()
    }

    /// Whether a cell is made from its image, or soon may be.
    fn needs(&self, pager: &Pager) -> bool {
        if let Some(one) = &pager.one {
            let begins = self.cell_of(&one.service).is_some_and(|r| r.phase == Phase::Resuming);
            return begins || !self.guests_of(&pager.memory).is_empty();
        }
        let name = &pager.known.manifest.name;
        let current = self.images.known(name).is_some_and(|k| k.digest == pager.known.digest);
        let warm = || self.to_keep_warm().iter().any(|k| k.digest == pager.known.digest);
        (current && (self.runs_from(name) || warm())) || !self.guests_of(&pager.memory).is_empty()
    }

    fn is_waking(&self, name: &str) -> bool {
        self.records.all().iter().any(|r| r.spec.image == name && r.phase == Phase::Resuming)
    }

    /// Images whose pager is kept although nothing runs from them: the first by name, as many as there may be.
    pub(super) fn to_keep_warm(&self) -> Vec<Arc<Known>> {
        let names = self.images.names(Level::Critical).into_iter();
        let idle = names.filter(|name| !self.runs_from(name)).take(self.config.warm as usize);
        idle.filter_map(|name| self.images.known(&name)).collect()
    }

    /// Ends every guest of a pager: they stand still, or soon will, and are resumed anew, here or elsewhere.
    async fn end_guests(&self, pager: &Pager, starved: bool, why: &str) {
        tracing::warn!(image = pager.known.manifest.name, problem = why, "its guests are ended");
        pager.view.send_modify(|v| v.failed = Some(why.to_owned()));
        let hint = "look at the sources of this machine".to_owned();
        let fault = Fault { problem: why.to_owned(), hint, lasting: false };
        self.images.change(&pager.known.manifest.name, |i| (i.trouble, i.starved) = (Some(fault), starved));
        for guest in self.guests_of(&pager.memory) {
            if let Err(e) = process::end(&guest, Duration::ZERO).await {
                tracing::warn!(pid = guest.pid, error = format!("{e:#}"), "a guest does not end");
            }
        }
        // What turned out to be missing here is fetched anew before the next guest.
        self.images.look_again(&pager.known.manifest.name);
    }

    /// Ends a pager for good: who guards it does not start it again.
    async fn retire(&self, pager: &Pager, why: &str) {
        pager.view.send_modify(|v| v.failed = v.failed.take().or_else(|| Some(format!("the pager was ended: {why}"))));
        self.pagers.lock().unwrap_or_else(PoisonError::into_inner).remove(&pager.memory.dir);
        if let Some(running) = pager.find()
            && let Err(e) = process::end(&running, QUIT_GRACE).await
        {
            tracing::warn!(image = pager.known.manifest.name, error = format!("{e:#}"), "the pager does not end");
        }
    }

    /// Ends the pager of this memory, guarded or left by an earlier daemon, and removes its folder: what a singleton
    /// wrote to its disk is of this run.
    ///
    /// # Errors
    /// It does not end, or the folder cannot be removed.
    pub(super) async fn clear_away(&self, folder: &Path, memory: &Folder, why: &str) -> anyhow::Result<()> {
        let guarded = self.pagers.lock().unwrap_or_else(PoisonError::into_inner).get(&memory.dir).cloned();
        if let Some(guarded) = guarded {
            self.retire(&guarded, why).await;
        }
        if let Some(running) = pager::find(folder) {
            process::end(&running, QUIT_GRACE).await.context("a pager does not end")?;
        }
        remove(folder)
    }

    /// Ends what runs for an image that no cell uses, and frees its memory.
    pub(super) async fn forget_guests_of(&self, known: &Known) {
        let folder = self.memory.folder(known);
        self.end_spare_of(known).await;
        for guest in self.guests_of(&folder) {
            let _ = process::end(&guest, Duration::ZERO).await;
        }
        if let Some(pager) = self.pager(&known.digest) {
            self.retire(&pager, "its image was dropped").await;
        }
        let freed = self.memory.free(&folder).and_then(|()| remove(&self.pager_folder(known)));
        if let Err(e) = freed {
            tracing::warn!(image = known.manifest.name, error = format!("{e:#}"), "what is left of an image stays");
        }
    }

    /// Frees memory of images that nothing runs from, where cells have the room.
    ///
    /// # Errors
    /// Its folder cannot be read, or what is in it not removed.
    pub(super) async fn make_room(&self) -> anyhow::Result<()> {
        let records = self.records.all();
        let lent: u64 = records.iter().map(|r| r.spec.memory_mib).fold(0, u64::saturating_add);
        let room = Bytes(self.config.memory_mib.saturating_sub(lent) << 20);
        let run: Vec<Folder> = records
            .iter()
            .filter_map(|r| self.images.known(&r.spec.image))
            .map(|known| self.memory.folder(&known))
            .collect();
        let used = |f: &Folder| run.contains(f) || self.guests_of(f).iter().any(|guest| !self.is_spare(guest));
        for folder in self.memory.surplus(room, used)? {
            let pager = self
                .pagers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .values()
                .find(|p| p.memory == folder)
                .cloned();
            if let Some(pager) = pager {
                self.end_spare_of(&pager.known).await;
                self.retire(&pager, "others need its memory").await;
            }
            tracing::info!(folder = %folder.dir.display(), "memory of an image that does not run is freed");
            self.memory.free(&folder)?;
        }
        Ok(())
    }
}

fn remove(folder: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
