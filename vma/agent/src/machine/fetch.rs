//! Images come to this machine: manifest, what a guest needs first, then, when no guest waits for anything, the rest.
//!
//! ```text
//! Stage, Prepare, Resume ─▶ one task per image: open ─▶ critical ─▶ (guests' pager has the link) ─▶ the rest ─▶ whole
//!       a guest waits, or soon will: critical is pushed ──┘ └── nobody waits: in the background, like the rest
//! ```
//! In the background machines give each other what they have: an image that is staged everywhere leaves its origin
//! about once.
//! What broke off goes on where it was, for what is here is looked for in the store. Of an image that no cell runs
//! from, the sources are asked now and then whether they have another: that is fetched beside it, and takes its
//! place once it is whole and still no cell runs from the old one.

use super::image::{Image, Known, Level};
use super::{Machine, fault, survey};
use anyhow::{Context, anyhow, bail};
use futures_util::TryStreamExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmatrix_model::Digest;
use vmatrix_model::manifest::SignedManifest;
use vmatrix_vma_image::chunks::{Need, close};
use vmatrix_vma_image::gc::gc;
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_transfer::{Ask, Class, ImageRef, Pushed};

/// Chunks of the working set asked for at the same time: what a push did not bring.
pub const AT_ONCE: usize = 32;
/// Rounds through what is missing: the tables, what they list, and once more what was damaged here.
const ROUNDS_MAX: u32 = 5;
/// What has come is written to the store after it was handed on; this long it may take.
const SETTLE_LIMIT: Duration = Duration::from_millis(500);
/// Between looks for it.
const SETTLE: Duration = Duration::from_millis(2);
/// Chunks that no image names yet belong to one that is just being fetched.
const GRACE: Duration = Duration::from_secs(3600);
/// A manifest comes in a round trip or two; sources that are starting take some seconds.
const OPEN_LIMIT: Duration = Duration::from_secs(20);

impl Machine {
    /// Begins to fetch the image, unless it is whole or on its way. `urgent`: a guest waits for it, or soon will.
    pub(super) fn stage(self: &Arc<Self>, image: &str, urgent: bool) {
        let mut images = self.images.lock();
        let i = images.entry(image.to_owned()).or_default();
        if urgent && !i.urgent {
            i.urgent = true;
            self.images.tell();
        }
        if i.level == Level::Whole || i.is_fetching() {
            return;
        }
        let (machine, name) = (self.clone(), image.to_owned());
        let task = tokio::spawn(async move {
            let began = Instant::now();
            match machine.fetch(&name).await {
                Ok(known) => {
                    tracing::info!(
                        image = name,
                        digest = known.digest.short(),
                        took_ms = began.elapsed().as_millis(),
                        "staged"
                    );
                    machine.images.change(&name, |i| i.task = None);
                }
                Err(e) => {
                    tracing::warn!(image = name, error = format!("{e:#}"), "staging stopped");
                    machine.images.change(&name, |i| (i.trouble, i.task) = (Some(fault(&e)), None));
                }
            }
        });
        i.task = Some(task.abort_handle());
    }

    /// Waits until at least so much of the image is here, fetching it if nobody does.
    ///
    /// # Errors
    /// Why it does not come, or it took longer than `limit`.
    pub(super) async fn until(
        self: &Arc<Self>,
        image: &str,
        level: Level,
        limit: Duration,
    ) -> anyhow::Result<Arc<Known>> {
        let mut changes = self.images.changes();
        self.stage(image, true);
        let come = async {
            loop {
                changes.borrow_and_update();
                {
                    let images = self.images.lock();
                    let Some(i) = images.get(image) else { bail!("image {image} was dropped meanwhile; stage it") };
                    if let Some(known) = i.known.as_ref().filter(|_| i.level >= level) {
                        return Ok(known.clone());
                    }
                    if let (Some(fault), None) = (&i.trouble, &i.task) {
                        return Err(anyhow::Error::new(fault.clone()));
                    }
                }
                changes.changed().await.context("the machine is ending")?;
            }
        };
        match tokio::time::timeout(limit, come).await {
            Ok(come) => come,
            Err(_) => {
                let trouble = self.images.lock().get(image).and_then(|i| i.trouble.clone());
                let late = || {
                    anyhow!(
                        "what is needed of image {image} did not come in {} s; look at the sources",
                        limit.as_secs()
                    )
                };
                Err(trouble.map_or_else(late, anyhow::Error::new))
            }
        }
    }

    async fn fetch(self: &Arc<Self>, name: &str) -> anyhow::Result<Arc<Known>> {
        let (known, pushed) = match self.images.known(name) {
            Some(known) => (known, None),
            None => {
                let push = self.images.is_urgent(name);
                let (known, pushed) = self.open(name, self.images.kin(name), push).await?;
                self.keep_manifest(name, known.signed.clone()).await?;
                let known = Arc::new(known);
                self.images.change(name, |i| (i.known, i.level) = (Some(known.clone()), Level::Known));
                (known, Some(pushed))
            }
        };
        self.at_leisure(&known, name).await?;
        let critical = async {
            self.critical(&known, pushed, name).await?;
            self.images.change(name, |i| i.level = i.level.max(Level::Critical));
            Ok(())
        };
        tokio::try_join!(critical, self.tables(&known, name))?;
        self.rest(&known, name).await?;
        self.images.change(name, |i| {
            (i.level, i.trouble, i.starved, i.urgent) = (Level::Whole, None, false, false);
        });
        Ok(known)
    }

    /// Asks the sources for an image by name; with `push` what it needs first follows at once.
    async fn open(&self, name: &str, have: Option<Digest>, push: bool) -> anyhow::Result<(Known, Pushed)> {
        let ask = Ask { image: ImageRef::Name(name.to_owned()), have, push, key: None };
        let opened = tokio::time::timeout(OPEN_LIMIT, self.sources.open(&ask, &self.config.signers)).await;
        let opened = opened
            .unwrap_or_else(|_| Err(vmatrix_vma_transfer::Error::Closed))
            .with_context(|| format!("cannot open image {name} at any source"))?;
        let known = Known::trust(name, opened.signed, &self.config.signers, &self.host)?;
        if let Some(key) = opened.key {
            // It was not asked for before.
            let _ = known.key.set(key);
        }
        Ok((known, opened.pushed))
    }

    async fn keep_manifest(&self, name: &str, signed: SignedManifest) -> anyhow::Result<()> {
        let (store, name) = (self.images.store.clone(), name.to_owned());
        Ok(tokio::task::spawn_blocking(move || store.put_image(&name, &signed)).await??)
    }

    /// The owner's key of a sealed image.
    ///
    /// # Errors
    /// No source gives it.
    pub(super) async fn owner_key(&self, known: &Known) -> anyhow::Result<Option<OwnerKey>> {
        let Some(id) = known.manifest.seal else { return Ok(None) };
        let key = known.key.get_or_try_init(|| self.sources.key(id)).await;
        Ok(Some(key.with_context(|| format!("no source gives the key of image {}", known.manifest.name))?.clone()))
    }

    /// Gets what a guest needs before it runs, and the tables, in the background, until all is here or somebody waits.
    async fn at_leisure(&self, known: &Known, name: &str) -> anyhow::Result<()> {
        let mut changes = self.images.changes();
        for round in 0..ROUNDS_MAX {
            if self.images.is_urgent(name) {
                return Ok(());
            }
            let mut lacks = self.settled(known, round > 0).await;
            lacks.extend(survey::tables(&known.manifest, &self.images.store));
            if lacks.is_empty() {
                return Ok(());
            }
            let mut fill = self.sources.fill(lacks, self.owner_key(known).await?);
            while !self.images.is_urgent(name) {
                tokio::select! {
                    arrived = fill.next() => match arrived {
                        Some(arrived) => {
                            let arrived = arrived.with_context(|| format!("cannot stage image {name}"))?;
                            self.count(name, arrived.need.stored);
                        }
                        None => break,
                    },
                    changed = changes.changed() => changed.context("the machine is ending")?,
                }
            }
        }
        Ok(())
    }

    /// Gets what a guest needs before it runs: what is pushed, and then what is still missing.
    async fn critical(&self, known: &Known, pushed: Option<Pushed>, name: &str) -> anyhow::Result<()> {
        let first = known.manifest.memory.first.digest;
        let mut lacks = survey::of_critical(&known.manifest, &self.images.store);
        if let Some(mut pushed) = pushed {
            while !lacks.is_empty() {
                let Some(arrived) = pushed.next().await else { break };
                self.count(name, arrived.need.stored);
                lacks.retain(|need| need.digest != arrived.need.digest);
                if arrived.need.digest == first {
                    lacks = survey::of_critical(&known.manifest, &self.images.store);
                }
            }
        }
        let (key, mut came) = (self.owner_key(known).await?, lacks.is_empty());
        for _ in 0..ROUNDS_MAX {
            let lacks = self.settled(known, came).await;
            let Some(one) = lacks.first().copied() else { return Ok(()) };
            if came {
                self.keep_one(&one, key.as_ref()).await?;
            }
            came = true;
            futures_util::stream::iter(lacks.into_iter().map(Ok::<Need, anyhow::Error>))
                .try_for_each_concurrent(AT_ONCE, |need| {
                    let key = key.clone();
                    async move {
                        self.sources.get(&need, Class::Critical, key.as_ref()).await?;
                        self.count(name, need.stored);
                        Ok(())
                    }
                })
                .await
                .with_context(|| format!("cannot get what image {name} needs first"))?;
        }
        bail!(
            "what image {name} needs first does not stay in {}; is the disk failing?",
            self.images.store.dir().display()
        )
    }

    /// Gets the tables past the first. They are small, and wanted as soon as the guest touches anything unforeseen.
    async fn tables(&self, known: &Known, name: &str) -> anyhow::Result<()> {
        let lacks = survey::tables(&known.manifest, &self.images.store);
        futures_util::stream::iter(lacks.into_iter().map(Ok::<Need, anyhow::Error>))
            .try_for_each_concurrent(AT_ONCE, |need| async move {
                self.sources.get(&need, Class::Critical, None).await?;
                self.count(name, need.stored);
                Ok(())
            })
            .await
            .with_context(|| format!("cannot get the tables of image {name}"))
    }

    /// What is still missing of what a guest needs first. What has just `come` is in the store a moment later.
    pub(super) async fn settled(&self, known: &Known, come: bool) -> Vec<Need> {
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            let lacks = survey::of_critical(&known.manifest, &self.images.store);
            if lacks.is_empty() || !come || Instant::now() > deadline {
                return lacks;
            }
            tokio::time::sleep(SETTLE).await;
        }
    }

    /// Gets everything else, leaving the link to guests while any waits for its memory.
    async fn rest(self: &Arc<Self>, known: &Arc<Known>, name: &str) -> anyhow::Result<()> {
        let key = self.owner_key(known).await?;
        let (mut rounds, mut before) = (0, None);
        while rounds < ROUNDS_MAX {
            // A guest that waits until all is here is helped by nobody else.
            let starved = self.images.lock().get(name).is_some_and(|i| i.starved);
            if !starved {
                self.until_guests_have_all(known).await;
            }
            let (store, looked) = (self.images.store.clone(), known.clone());
            let found = tokio::task::spawn_blocking(move || survey::of(&looked.manifest, &store)).await?;
            self.images.change(name, |i| i.counts.present.store(found.present.0, Ordering::Relaxed));
            let lacks: Vec<Need> = found.critical.into_iter().chain(found.rest).collect();
            let Some(one) = lacks.first().copied() else { return Ok(()) };
            if before == Some(one) {
                self.keep_one(&one, key.as_ref()).await?;
            }
            before = Some(one);
            let mut fill = self.sources.fill(lacks, key.clone());
            loop {
                if !starved && self.is_hydrating(&known.digest) {
                    break;
                }
                match fill.next().await {
                    Some(arrived) => {
                        let arrived = arrived.with_context(|| format!("cannot stage the rest of image {name}"))?;
                        self.count(name, arrived.need.stored);
                    }
                    None => {
                        rounds += 1;
                        break;
                    }
                }
            }
        }
        bail!("chunks of image {name} do not stay in {}; is the disk failing?", self.images.store.dir().display())
    }

    /// Puts a chunk that came and is not in the store there once more, to learn why it is not.
    async fn keep_one(&self, need: &Need, key: Option<&OwnerKey>) -> anyhow::Result<()> {
        let plain = self.sources.get(need, Class::Critical, key).await?;
        let (store, digest, key) = (self.images.store.clone(), need.digest, key.filter(|_| need.sealed).cloned());
        let put = move || store.put_chunk(&digest, &close(&plain, key.as_ref())?.1);
        Ok(tokio::task::spawn_blocking(put).await??)
    }

    fn count(&self, name: &str, stored: u64) {
        if let Some(i) = self.images.lock().get_mut(name) {
            i.trouble = None;
            i.counts.present.fetch_add(stored, Ordering::Relaxed);
            i.counts.fetched.fetch_add(stored, Ordering::Relaxed);
        }
    }

    /// Asks the sources whether they have another image of this name than the one here, and if so fetches it and
    /// lets it take the old one's place. Does nothing while a cell runs from the old one.
    ///
    /// # Errors
    /// No source answers, what they have is not trusted or does not fit this host, or it cannot be fetched; the
    /// old one stays.
    pub(super) async fn renew(self: &Arc<Self>, name: &str) -> anyhow::Result<()> {
        // A singleton that began from it may come back, and is of that build.
        if self.runs_from(name) || self.tenures.all().iter().any(|(_, held)| held.image == name) {
            return Ok(());
        }
        let old = match self.images.lock().get(name) {
            Some(Image { known: Some(known), level: Level::Whole, .. }) => known.clone(),
            _ => return Ok(()),
        };
        let (new, _) = self.open(name, Some(old.digest), false).await?;
        if new.digest == old.digest {
            return Ok(());
        }
        let new = Arc::new(new);
        tracing::info!(
            image = name,
            old = old.digest.short(),
            new = new.digest.short(),
            "the sources have another image; fetching it beside the old one"
        );
        let task = {
            let mut images = self.images.lock();
            // Something may have happened to the old one while the sources were asked.
            let Some(i) = images.get_mut(name).filter(|i| i.level == Level::Whole && !i.is_fetching()) else {
                return Ok(());
            };
            let (machine, image, new) = (self.clone(), name.to_owned(), new.clone());
            let task = tokio::spawn(async move {
                machine.critical(&new, None, &image).await?;
                machine.rest(&new, &image).await
            });
            i.task = Some(task.abort_handle());
            task
        };
        match task.await {
            Ok(fetched) => fetched?,
            // Dropped meanwhile.
            Err(_) => return Ok(()),
        }
        if self.put_in_place(name, &new)? {
            self.forget_guests_of(&old).await;
        }
        Ok(())
    }

    /// From here on cells are made from `new`; answers false where a cell still runs from another, and then the
    /// newcomer's chunks wait for the next time the sources are asked.
    pub(super) fn put_in_place(&self, name: &str, new: &Arc<Known>) -> anyhow::Result<bool> {
        let put = {
            // Held throughout: a cell that is begun meanwhile is either seen here, or sees the new image.
            let mut images = self.images.lock();
            let Some(i) = images.get_mut(name) else { return Ok(false) };
            let put = !self.runs_from(name) || i.known.as_ref().is_some_and(|k| k.digest == new.digest);
            if put {
                self.images.store.put_image(name, &new.signed)?;
                i.known = Some(new.clone());
            }
            i.task = None;
            put
        };
        self.images.change(name, |_| {});
        Ok(put)
    }

    /// Takes chunks out of the store that no image here names and that did not come just now.
    ///
    /// # Errors
    /// The store cannot be read or written. An image that is half here is none: it is fetched on.
    pub(super) async fn collect(&self) -> anyhow::Result<()> {
        let store = self.images.store.clone();
        let swept = tokio::task::spawn_blocking(move || gc(&store, GRACE, false)).await?;
        match swept {
            Ok(report) => {
                tracing::debug!(removed = report.removed, bytes = %report.bytes, "chunks that no image names");
                Ok(())
            }
            // A table is on its way.
            Err(vmatrix_vma_image::Error::NoChunk { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    pub(super) fn runs_from(&self, image: &str) -> bool {
        self.records.all().iter().any(|r| r.spec.image == image)
    }

    /// Removes the image, unless a cell runs from it.
    pub(super) async fn drop_image(&self, image: &str) -> anyhow::Result<()> {
        if let Some(cell) = self.records.all().iter().find(|r| r.spec.image == image) {
            bail!("image {image} is in use by {}; release that first", cell.spec.instance);
        }
        let dropped = self.images.lock().remove(image);
        self.images.change(image, |_| {});
        if let Some(task) = dropped.as_ref().and_then(|i| i.task.as_ref()) {
            task.abort();
        }
        if let Some(known) = dropped.and_then(|i| i.known) {
            self.forget_guests_of(&known).await;
        }
        let (store, name) = (self.images.store.clone(), image.to_owned());
        tokio::task::spawn_blocking(move || store.remove_image(&name)).await??;
        self.collect().await
    }
}
