//! Images on this machine, and how much of each is here.
//!
//! ```text
//! nothing ─▶ known: manifest ─▶ critical: device state, first table, working set ─▶ whole
//!            a cell can be built   a guest can be resumed                            nobody else is needed
//! ```
//! Chunks lie in `state_dir/store` by digest, and the manifest of each image by its name; what is here is what is
//! found there. Nothing else is written down.

use super::singleton::is_snapshot;
use super::survey::{self, Survey};
use anyhow::Context;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OnceCell, watch};
use tokio::task::AbortHandle;
use vmatrix_model::inventory::ImageSeen;
use vmatrix_model::manifest::{Manifest, SignedManifest};
use vmatrix_model::{Bytes, Digest};
use vmatrix_vma_core::steps::{Fault, StagedSeen};
use vmatrix_vma_image::Store;
use vmatrix_vma_image::machine::{Host, check_host};
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::sign::verify;

/// Letters that two names begin with, for their images to be taken for kin.
const ALIKE_MIN: usize = 3;

/// How much of an image is here; each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Level {
    #[default]
    Nothing,
    /// Its manifest, trusted and fit for this host.
    Known,
    /// What a guest needs before it runs.
    Critical,
    Whole,
}

/// An image whose manifest is here, trusted, and fits this host.
#[derive(Debug)]
pub struct Known {
    pub signed: SignedManifest,
    pub manifest: Manifest,
    /// Of the manifest's text: names the image.
    pub digest: Digest,
    /// Of a sealed image, once it was asked for. It is in memory only.
    pub key: OnceCell<OwnerKey>,
}

/// Stored bytes of an image that are here, and those that came from elsewhere since this daemon began.
#[derive(Debug, Default)]
pub struct Counts {
    pub present: AtomicU64,
    pub fetched: AtomicU64,
}

/// An image as far as it is here.
#[derive(Debug, Default)]
pub struct Image {
    pub known: Option<Arc<Known>>,
    pub level: Level,
    pub counts: Arc<Counts>,
    /// What fetches it.
    pub task: Option<AbortHandle>,
    /// Why nothing of it comes, or why its guests were ended; until something comes.
    pub trouble: Option<Fault>,
    /// A guest was ended because its memory did not come: the next one waits until nothing is missing.
    pub starved: bool,
    /// A guest waits for it, or soon will: what it needs first comes from whoever has it at once.
    pub urgent: bool,
}

/// All images of a machine. Its bound is the disk: what is not wanted the VM agent drops.
#[derive(Debug)]
pub struct Images {
    pub store: Store,
    images: Mutex<BTreeMap<String, Image>>,
    /// Rises with each change of any.
    changes: watch::Sender<u64>,
}

impl Known {
    /// Checks that a manifest is signed by one of `signers`, of the image asked for, and fits `host`.
    ///
    /// # Errors
    /// What it fails.
    pub fn trust(name: &str, signed: SignedManifest, signers: &[String], host: &Host) -> anyhow::Result<Known> {
        let (manifest, digest) = verify(&signed, signers)?;
        if manifest.name != name {
            anyhow::bail!("the image asked for is {name} and the manifest is of {}; build it again", manifest.name);
        }
        check_host(&manifest, host)?;
        Ok(Known { signed, manifest, digest, key: OnceCell::new() })
    }

    /// Names the moment that it was suspended at: its device state. The same whatever its list has learned since.
    pub fn build(&self) -> Digest {
        self.manifest.device.digest
    }

    /// The first 16 hex digits of its digest: what its folders are named by.
    pub fn short(&self) -> String {
        short(&self.digest)
    }
}

/// The first 16 hex digits of a digest.
pub fn short(digest: &Digest) -> String {
    digest.to_string().chars().take(16).collect()
}

impl Images {
    /// Finds what an earlier run left in the store.
    ///
    /// # Errors
    /// The store cannot be made or read.
    pub fn open(store: Store, signers: &[String], host: &Host) -> anyhow::Result<Images> {
        let mut images = BTreeMap::new();
        let names = store.names().context("cannot list the images that are here")?;
        for name in names.into_iter().filter(|name| !is_snapshot(name)) {
            let image: &mut Image = images.entry(name.clone()).or_default();
            let known = store
                .image(&name)
                .map_err(anyhow::Error::from)
                .and_then(|signed| signed.context("its manifest is gone"))
                .and_then(|signed| Known::trust(&name, signed, signers, host));
            match known {
                Ok(known) => {
                    let found = survey::of(&known.manifest, &store);
                    image.counts.present.store(found.present.0, Ordering::Relaxed);
                    image.level = level(&found);
                    image.known = Some(Arc::new(known));
                }
                Err(e) => {
                    tracing::warn!(
                        image = name,
                        error = format!("{e:#}"),
                        "an image that is here cannot be used; staging it anew"
                    )
                }
            }
        }
        Ok(Images { store, images: Mutex::new(images), changes: watch::Sender::new(0) })
    }

    /// The image, if its manifest is here.
    pub fn known(&self, image: &str) -> Option<Arc<Known>> {
        self.lock().get(image)?.known.clone()
    }

    /// The image here, whole, that most likely has much in common with one that is not here: the one whose name begins
    /// most like its name. A later snapshot, or another build of the same service, is named after it; where that is
    /// wrong nothing is lost.
    pub fn kin(&self, image: &str) -> Option<Digest> {
        let alike = |name: &str| name.bytes().zip(image.bytes()).take_while(|(a, b)| a == b).count();
        let images = self.lock();
        let whole = images.iter().filter(|(_, i)| i.level == Level::Whole);
        let (name, kin) = whole.max_by_key(|(name, _)| alike(name))?;
        kin.known.as_ref().filter(|_| alike(name) >= ALIKE_MIN).map(|k| k.digest)
    }

    /// The image, if at least so much of it is here.
    pub fn at(&self, image: &str, level: Level) -> Option<Arc<Known>> {
        let images = self.lock();
        let image = images.get(image).filter(|i| i.level >= level)?;
        image.known.clone()
    }

    /// Images of which at least so much is here.
    pub fn names(&self, level: Level) -> Vec<String> {
        self.lock().iter().filter(|(_, i)| i.level >= level).map(|(name, _)| name.clone()).collect()
    }

    /// Notes how far an image is, unless another has taken its name meanwhile.
    pub fn reach(&self, name: &str, known: &Known, level: Level) {
        self.change(name, |i| {
            if i.known.as_ref().is_some_and(|k| k.digest == known.digest) {
                i.level = level;
            }
        });
    }

    /// Whether a guest waits for an image, or soon will.
    pub fn is_urgent(&self, image: &str) -> bool {
        self.lock().get(image).is_some_and(|i| i.urgent)
    }

    /// Looks again at how much is here, where a chunk turned out to be missing or damaged.
    pub fn look_again(&self, name: &str) {
        let Some(known) = self.known(name) else { return };
        let found = survey::of(&known.manifest, &self.store);
        self.reach(name, &known, level(&found));
    }

    /// Why an image does not come and will not by itself, if that is so.
    pub fn stopped(&self, name: &str) -> Option<Fault> {
        let images = self.lock();
        let image = images.get(name).filter(|i| !i.is_fetching() && i.level < Level::Critical)?;
        image.trouble.clone().filter(|fault| fault.lasting)
    }

    /// Changes an image, if there is one, and tells who waits.
    pub fn change(&self, image: &str, f: impl FnOnce(&mut Image)) {
        if let Some(i) = self.lock().get_mut(image) {
            f(i);
        }
        self.tell();
    }

    /// Tells who waits that something has changed.
    pub fn tell(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    /// Hears of each change from now on.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What there is, as the VM agent is told. `fetching`: images that a pager fetches.
    pub fn seen(&self, fetching: &BTreeSet<Digest>) -> Vec<StagedSeen> {
        let images = self.lock();
        let seen = |i: &Image| {
            let known = i.known.as_ref()?;
            let total = known.manifest.stored();
            // Complete is said of what was found to the end, not of a sum.
            let almost = Bytes(total.0.saturating_sub(1));
            let present = Bytes(i.counts.present.load(Ordering::Relaxed)).min(almost);
            Some(ImageSeen {
                digest: known.digest,
                present: if i.level == Level::Whole { total } else { present },
                total,
                fetched: Bytes(i.counts.fetched.load(Ordering::Relaxed)),
                resumable: i.level >= Level::Critical,
            })
        };
        let one = |(name, i): (&String, &Image)| StagedSeen {
            image: name.clone(),
            seen: seen(i),
            fetching: i.is_fetching() || i.known.as_ref().is_some_and(|k| fetching.contains(&k.digest)),
            trouble: i.trouble.clone(),
        };
        images.iter().map(one).collect()
    }

    pub fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Image>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image {
    pub fn is_fetching(&self) -> bool {
        self.task.as_ref().is_some_and(|t| !t.is_finished())
    }
}

/// What was found, as a level.
pub fn level(found: &Survey) -> Level {
    match (found.critical.is_empty(), found.rest.is_empty()) {
        (true, true) => Level::Whole,
        (true, false) => Level::Critical,
        _ => Level::Known,
    }
}
