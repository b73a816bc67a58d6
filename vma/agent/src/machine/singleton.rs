//! What this machine knows of each singleton, written down before anything follows from it.
//!
//! ```text
//! state_dir/tenures/<service>.json: who holds it, and by which snapshot ─▶ its manifest, in the store ─▶ Known
//! ```
//! A snapshot is signed by the store that made it, whom nobody trusts by name. It is believed because the machine that
//! held the singleton, which proved who it is, named its digest, and because it says nothing new but memory, device
//! state and data: everything else is the built image's, whose signer is trusted.
//!
//! Of a singleton the store keeps the snapshot it is held with and the one before: of those another machine needs only
//! what changed.

mod early;
mod run;
mod save;

pub use early::Earlies;
pub use run::Peers;
pub use save::Took;

use super::Machine;
use super::image::Known;
use super::relay::Offer;
use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use vmatrix_model::manifest::{self, Manifest, PartKind, SignedManifest};
use vmatrix_model::{Digest, ServiceId};
use vmatrix_vma_core::tenure::{Part, Tenure};
use vmatrix_vma_image::Store;
use vmatrix_vma_image::machine::{Host, check_host};
use vmatrix_vma_image::sign::verify;

/// Machines that may have a singleton's chunks: those that held it last.
pub const SOURCES_MAX: usize = 8;
/// Snapshots that are kept, and the one that is being made.
const SLOTS: u8 = 3;
/// What the names of snapshots begin with in the store.
const PREFIX: &str = "held-";

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Of its manifest.
    pub digest: Digest,
    /// Public key of the store that made it.
    pub signer: String,
}

/// The machine that a singleton went to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taker {
    /// Where it gives chunks and answers.
    pub serving: SocketAddr,
    /// Its end of the relay.
    pub relay: Option<Offer>,
}

/// What is written down of a singleton.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
    pub tenure: Tenure,
    /// Name of the built image that it began from, and [`Known::build`].
    pub image: String,
    pub built: Digest,
    /// What it is held with; none: the built image, for it has never been saved.
    pub state: Option<Snapshot>,
    /// The one before.
    pub before: Option<Snapshot>,
    /// Machines that have what of the state is not here, the last that held it first.
    pub sources: Vec<SocketAddr>,
    /// To whom it is handed, or being handed.
    pub taker: Option<Taker>,
}

impl Held {
    /// Its epoch, where it is held here.
    pub fn holds(&self) -> Option<u64> {
        (!matches!(self.tenure.part, Part::Handed { .. })).then_some(self.tenure.epoch)
    }

    /// Notes a newer snapshot.
    pub fn saved(&mut self, state: Snapshot) {
        self.before = self.state.replace(state);
    }
}

/// All singletons that this machine has, or had, a part in. Their number is bounded by the services of a fleet.
#[derive(Debug)]
pub struct Tenures {
    dir: PathBuf,
    all: Mutex<BTreeMap<ServiceId, Held>>,
    turns: Mutex<BTreeMap<ServiceId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Tenures {
    /// Reads what is written down.
    ///
    /// # Errors
    /// The folder cannot be made or read, or a file in it not understood: then nobody knows who may run that singleton,
    /// and an operator has to say.
    pub fn open(dir: &Path) -> anyhow::Result<Tenures> {
        let cannot = || format!("cannot read {}", dir.display());
        std::fs::create_dir_all(dir).with_context(cannot)?;
        let mut all = BTreeMap::new();
        for entry in std::fs::read_dir(dir).with_context(cannot)? {
            let path = entry.with_context(cannot)?.path();
            let named = path.file_stem().and_then(|n| n.to_str()).and_then(|n| n.parse().ok());
            let (Some(service), true) = (named, path.extension().is_some_and(|e| e == "json")) else { continue };
            let text = std::fs::read(&path).with_context(cannot)?;
            let held = serde_json::from_slice(&text).with_context(|| {
                format!(
                    "cannot understand {}, which says who may run a singleton; correct it, or remove it if another \
                     machine has that singleton",
                    path.display()
                )
            })?;
            all.insert(service, held);
        }
        Ok(Tenures { dir: dir.to_owned(), all: Mutex::new(all), turns: Mutex::default() })
    }

    pub fn get(&self, service: &ServiceId) -> Option<Held> {
        self.lock().get(service).cloned()
    }

    pub fn all(&self) -> Vec<(ServiceId, Held)> {
        self.lock().iter().map(|(service, held)| (service.clone(), held.clone())).collect()
    }

    /// Writes it down, so that it is there after whatever happens next.
    ///
    /// # Errors
    /// It cannot be written; what was written before counts.
    pub fn write(&self, service: &ServiceId, held: &Held) -> anyhow::Result<()> {
        let mut all = self.lock();
        let path = self.dir.join(format!("{service}.json"));
        let write = || {
            crate::replace(&path, &serde_json::to_vec_pretty(held)?)?;
            // The name too.
            std::fs::File::open(&self.dir)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        all.insert(service.clone(), held.clone());
        Ok(())
    }

    /// One thing at a time is done with a singleton.
    pub fn turn(&self, service: &ServiceId) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|id, turn| id == service || Arc::strong_count(turn) > 1);
        turns.entry(service.clone()).or_default().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<ServiceId, Held>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a name in the store is a snapshot's.
pub fn is_snapshot(name: &str) -> bool {
    name.strip_prefix(PREFIX).and_then(|n| n.rsplit_once('-')).is_some_and(|(hex, slot)| {
        hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_hexdigit()) && slot.parse::<u8>().is_ok_and(|n| n < SLOTS)
    })
}

fn names(service: &ServiceId) -> impl Iterator<Item = String> {
    let hex = super::image::short(&Digest::of(service.as_str().as_bytes()));
    (0..SLOTS).map(move |slot| format!("{PREFIX}{hex}-{slot}"))
}

/// A snapshot's manifest, if it is in the store.
///
/// # Errors
/// The store cannot be read.
pub fn find(store: &Store, service: &ServiceId, digest: &Digest) -> anyhow::Result<Option<SignedManifest>> {
    for name in names(service) {
        let found = store.image(&name)?.filter(|signed| Digest::of(signed.manifest.as_bytes()) == *digest);
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// A name for one more snapshot: one that none of those to be kept has.
///
/// # Errors
/// The store cannot be read.
pub fn free_name(store: &Store, service: &ServiceId, held: &Held) -> anyhow::Result<String> {
    let kept: Vec<Digest> = held.state.iter().chain(&held.before).map(|s| s.digest).collect();
    for name in names(service) {
        let there = store.image(&name)?.map(|signed| Digest::of(signed.manifest.as_bytes()));
        if there.is_none_or(|digest| !kept.contains(&digest)) {
            return Ok(name);
        }
    }
    anyhow::bail!("every name for a snapshot of {service} is taken in {}", store.dir().display())
}

/// Believes a snapshot of `built`, or says what speaks against it.
///
/// # Errors
/// It is another than was named, is not signed, differs from the image where it may not, or does not fit `host`.
pub fn trust(signed: SignedManifest, named: &Snapshot, built: &Known, host: &Host) -> anyhow::Result<Known> {
    let (manifest, digest) = verify(&signed, std::slice::from_ref(&named.signer))?;
    ensure!(digest == named.digest, "snapshot {} came in the place of {}", digest.short(), named.digest.short());
    let image = &built.manifest;
    ensure!(
        fixed(&manifest, image) == fixed(image, image),
        "snapshot {} is not of image {}: it differs in more than what a guest changes; build that image again, and begin \
         the singleton anew",
        digest.short(),
        image.name
    );
    check_host(&manifest, host)?;
    let known = Known { signed, manifest, digest, key: tokio::sync::OnceCell::new() };
    if let Some(key) = built.key.get() {
        // It was made just now.
        let _ = known.key.set(key.clone());
    }
    Ok(known)
}

/// A manifest without what a guest changes, which is `image`'s instead.
fn fixed(manifest: &Manifest, image: &Manifest) -> Manifest {
    let part = |part: &manifest::Part| match image
        .part(part.kind)
        .filter(|i| part.kind == PartKind::Data && i.size == part.size)
    {
        Some(data) => data.clone(),
        None => part.clone(),
    };
    let same_size = manifest.memory.size == image.memory.size;
    Manifest {
        name: image.name.clone(),
        parent: image.parent,
        epoch: image.epoch,
        memory: if same_size { image.memory.clone() } else { manifest.memory.clone() },
        device: image.device,
        parts: manifest.parts.iter().map(part).collect(),
        ..manifest.clone()
    }
}

impl Machine {
    /// Removes snapshots that are not kept any more; their chunks go with the next collection.
    pub(super) fn drop_old_snapshots(&self, service: &ServiceId, held: &Held) {
        let store = &self.images.store;
        let kept: Vec<Digest> = held.state.iter().chain(&held.before).map(|s| s.digest).collect();
        for name in names(service) {
            let old = |signed: &SignedManifest| !kept.contains(&Digest::of(signed.manifest.as_bytes()));
            match store.image(&name) {
                Ok(Some(signed)) if old(&signed) => {
                    if let Err(e) = store.remove_image(&name) {
                        tracing::warn!(%service, error = %e, "an old snapshot stays");
                    }
                }
                Ok(_) => {}
                Err(e) => tracing::warn!(%service, error = %e, "an old snapshot stays"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> Held {
        Held {
            tenure: Tenure::first(),
            image: "ledger".to_owned(),
            built: Digest::of(b"built"),
            state: None,
            before: None,
            sources: vec!["198.18.0.1:8446".parse().unwrap()],
            taker: None,
        }
    }

    #[test]
    fn what_was_written_is_there_after_a_restart_and_what_cannot_be_understood_stops_it() {
        let dir = tempfile::tempdir().unwrap();
        let service: ServiceId = "ledger".parse().unwrap();
        let mut held = held();
        held.tenure.ask("tokyo-m1").unwrap();
        Tenures::open(dir.path()).unwrap().write(&service, &held).unwrap();
        let after = Tenures::open(dir.path()).unwrap();
        assert_eq!(after.get(&service), Some(held));
        assert_eq!(after.all()[0].1.tenure.part, Part::Saving { to: "tokyo-m1".to_owned() });
        std::fs::write(dir.path().join("ledger.json"), "{}").unwrap();
        assert!(format!("{:#}", Tenures::open(dir.path()).unwrap_err()).contains("ledger.json"));
    }

    #[test]
    fn names_of_snapshots_are_names_of_images_and_told_from_others() {
        let service: ServiceId = "a-service-of-the-longest-name".parse().unwrap();
        for name in names(&service) {
            assert!(vmatrix_vma_image::store::is_image_name(&name) && is_snapshot(&name), "{name}");
        }
        for image in ["held", "held-agenda-0", "held-0123456789abcdef-3", "ledger"] {
            assert!(!is_snapshot(image), "{image}");
        }
    }
}
