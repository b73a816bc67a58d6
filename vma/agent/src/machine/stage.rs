//! Images on this machine: manifest ─▶ trusted, fits this host ─▶ missing chunks, eight at a time ─▶ whole.
//!
//! ```text
//! state_dir/images/<name>-<16 hex of the digest>/{manifest.json, memory, device, disk, kernel, initrd}
//!                                                 whole: written last, when nothing is missing
//! ```
//! What broke off goes on where it was: a part's file is read again, and what is there is not fetched.
//!
//! Of a whole image that no cell runs from, the origin is asked now and then whether it has another: that is
//! staged beside it, and takes its place once it is whole and still no cell runs from the old one.

use super::{Machine, fault};
use crate::http;
use anyhow::{Context, bail};
use futures_util::TryStreamExt;
use reqwest::{Method, StatusCode, header};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::AbortHandle;
use vmatrix_model::inventory::ImageSeen;
use vmatrix_model::manifest::{Chunk, MANIFEST_MAX, Manifest, Part, PartKind, SignedManifest};
use vmatrix_model::{Bytes, Digest};
use vmatrix_vma_core::steps::{Fault, StagedSeen};
use vmatrix_vma_image::chunks::PartFile;
use vmatrix_vma_image::machine::{Files, check_host};
use vmatrix_vma_image::sign::verify;
use vmatrix_vma_image::store::STORED_MAX;

/// Chunks asked for at the same time. A stored chunk is some 90 KiB, so 32 keep 150 Mbit/s full at a round
/// trip of 150 ms; with 8 the far side of the world staged at 5 MB/s whatever its link could carry.
const AT_ONCE: usize = 32;
/// A chunk that does not come after so many tries stops the staging; it may be asked for again.
const TRIES: u32 = 5;
/// First pause between tries; it doubles.
const TRY_PAUSE: Duration = Duration::from_millis(200);
/// A chunk of a MiB over a 1 Mbit/s link takes eight seconds.
const CHUNK_LIMIT: Duration = Duration::from_secs(60);
/// A manifest of the largest size over such a link.
const MANIFEST_LIMIT: Duration = Duration::from_secs(180);

/// Longest name of a manifest's version that is kept.
const TAG_MAX: usize = 128;

/// An image that is here, whole.
#[derive(Debug)]
pub struct Staged {
    pub manifest: Manifest,
    pub digest: Digest,
    pub files: Files,
}

/// An image as far as it is here.
#[derive(Debug, Default)]
struct Image {
    whole: Option<Arc<Staged>>,
    /// Digest and stored bytes, once the manifest is here.
    known: Option<(Digest, Bytes)>,
    counts: Arc<Counts>,
    task: Option<AbortHandle>,
    trouble: Option<Fault>,
    /// What the origin called the version of its manifest that was looked at last.
    tag: Option<String>,
}

/// A manifest that is trusted and fits this host.
struct Trusted {
    signed: SignedManifest,
    manifest: Manifest,
    digest: Digest,
}

#[derive(Debug, Default)]
pub struct Counts {
    present: AtomicU64,
    fetched: AtomicU64,
}

/// All images of a machine. Its bound is the disk: what is not wanted the VM agent drops.
#[derive(Debug)]
pub struct Stages {
    dir: PathBuf,
    images: Mutex<BTreeMap<String, Image>>,
}

impl Stages {
    /// Finds the images an earlier run staged. One begun and not whole is kept, to be gone on with.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(dir: &Path) -> io::Result<Stages> {
        std::fs::create_dir_all(dir)?;
        let mut images = BTreeMap::new();
        let mut folders = std::fs::read_dir(dir)?.map(|e| Ok(e?.path())).collect::<io::Result<Vec<PathBuf>>>()?;
        // A daemon killed while a newer image took the place of an older one, which nothing ran from, leaves
        // both whole: the newer counts.
        folders.sort_by_key(|f| std::fs::metadata(f.join("whole")).and_then(|m| m.modified()).ok());
        for folder in folders {
            let Some(name) = image_of(&folder) else { continue };
            let image: &mut Image = images.entry(name).or_default();
            if !folder.join("whole").exists() {
                continue;
            }
            match read_whole(&folder) {
                Ok(staged) => {
                    let total = stored(&staged.manifest);
                    image.counts.present.store(total.0, Ordering::Relaxed);
                    image.known = Some((staged.digest, total));
                    let older = image.whole.replace(Arc::new(staged));
                    if let Some(folder) = older.as_ref().and_then(|o| o.files.memory.parent()) {
                        std::fs::remove_dir_all(folder)?;
                    }
                }
                Err(e) => {
                    tracing::warn!(folder = %folder.display(), error = format!("{e:#}"), "a staged image cannot be read; staging it anew")
                }
            }
        }
        Ok(Stages { dir: dir.to_owned(), images: Mutex::new(images) })
    }

    /// The image, if it is here whole.
    pub fn whole(&self, image: &str) -> Option<Arc<Staged>> {
        self.lock().get(image)?.whole.clone()
    }

    pub fn seen(&self) -> Vec<StagedSeen> {
        let images = self.lock();
        images
            .iter()
            .map(|(name, i)| StagedSeen {
                image: name.clone(),
                seen: i.known.map(|(digest, total)| {
                    let present = Bytes(i.counts.present.load(Ordering::Relaxed)).min(total);
                    // Complete is said of what was checked and written to the end, not of a sum.
                    let present = if i.whole.is_some() { total } else { present.min(Bytes(total.0.saturating_sub(1))) };
                    ImageSeen { digest, present, total, fetched: i.counts.fetched() }
                }),
                fetching: i.is_fetching(),
                trouble: i.trouble.clone(),
            })
            .collect()
    }

    /// Checks that every file still has its size: QEMU would read zeros, or die, past the end of one cut short.
    ///
    /// # Errors
    /// The file that is not what it should be; the image then counts as not staged.
    pub fn check_sizes(&self, image: &str) -> anyhow::Result<()> {
        let Some(staged) = self.whole(image) else { return Ok(()) };
        for (part, path) in parts(&staged.manifest, &staged.files) {
            let has = std::fs::metadata(path).map_or(0, |m| m.len());
            if has != part.size.0 {
                if let Some(i) = self.lock().get_mut(image) {
                    i.whole = None;
                }
                let _ = path.parent().map(|dir| std::fs::remove_file(dir.join("whole")));
                bail!(
                    "{} has {has} bytes and should have {}; the image is being staged anew",
                    path.display(),
                    part.size.0
                );
            }
        }
        Ok(())
    }

    /// Names of images that are here whole.
    pub fn whole_names(&self) -> Vec<String> {
        self.lock().iter().filter(|(_, i)| i.whole.is_some()).map(|(name, _)| name.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Image>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, image: &str, f: impl FnOnce(&mut Image)) {
        if let Some(i) = self.lock().get_mut(image) {
            f(i);
        }
    }

    fn remove_folders(&self, image: &str, but: Option<&Path>) -> anyhow::Result<()> {
        for entry in std::fs::read_dir(&self.dir).with_context(|| format!("cannot read {}", self.dir.display()))? {
            let folder = entry?.path();
            if image_of(&folder).as_deref() == Some(image) && but != Some(folder.as_path()) {
                std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
            }
        }
        Ok(())
    }
}

impl Image {
    fn is_fetching(&self) -> bool {
        is_running(self.task.as_ref())
    }
}

impl Counts {
    fn fetched(&self) -> Bytes {
        Bytes(self.fetched.load(Ordering::Relaxed))
    }
}

fn is_running(task: Option<&AbortHandle>) -> bool {
    task.is_some_and(|t| !t.is_finished())
}

impl Machine {
    /// Begins to fetch the image, unless it is here or on its way.
    pub(super) fn stage(self: &Arc<Self>, image: &str) -> anyhow::Result<()> {
        let mut images = self.stages.lock();
        let i = images.entry(image.to_owned()).or_default();
        if i.whole.is_some() || i.is_fetching() {
            return Ok(());
        }
        i.trouble = None;
        i.counts.present.store(0, Ordering::Relaxed);
        let (machine, name, counts) = (self.clone(), image.to_owned(), i.counts.clone());
        let task = tokio::spawn(async move {
            let began = std::time::Instant::now();
            match machine.fetch(&name, &counts).await {
                Ok(digest) => {
                    tracing::info!(image = name, digest = digest.short(), fetched = %counts.fetched(), took_ms = began.elapsed().as_millis(), "staged");
                }
                Err(e) => {
                    tracing::warn!(image = name, error = format!("{e:#}"), "staging stopped");
                    machine.stages.change(&name, |i| i.trouble = Some(fault(&e)));
                }
            }
        });
        i.task = Some(task.abort_handle());
        Ok(())
    }

    /// Asks the origin whether it has another image of this name than the one here, and if so stages it
    /// and lets it take the old one's place. Does nothing while a cell runs from the old one.
    ///
    /// # Errors
    /// The origin does not answer, what it has is not trusted or does not fit this host, or it cannot be
    /// fetched; the old one stays.
    pub(super) async fn renew(self: &Arc<Self>, name: &str) -> anyhow::Result<()> {
        if self.runs_from(name) {
            return Ok(());
        }
        let (old, tag) = match self.stages.lock().get(name) {
            Some(Image { whole: Some(whole), tag, task, .. }) if !is_running(task.as_ref()) => {
                (whole.digest, tag.clone())
            }
            _ => return Ok(()),
        };
        let Some((signed, tag)) = self.fetch_manifest(name, tag.as_deref()).await? else { return Ok(()) };
        let trusted = self.trust(name, signed);
        if !matches!(&trusted, Ok(t) if t.digest != old) {
            // The same, or refused: not worth another look until it changes.
            self.stages.change(name, |i| i.tag = tag);
            return trusted.map(|_| ());
        }
        let trusted = trusted?;
        tracing::info!(
            image = name,
            old = old.short(),
            new = trusted.digest.short(),
            "the origin has another image; staging it beside the old one"
        );
        let task = {
            let mut images = self.stages.lock();
            // Something may have happened to the old one while the origin was asked.
            let Some(i) = images.get_mut(name).filter(|i| i.whole.is_some() && !i.is_fetching()) else {
                return Ok(());
            };
            let (machine, image, counts) = (self.clone(), name.to_owned(), Arc::new(Counts::default()));
            let task = tokio::spawn(async move { machine.fetch_parts(&image, trusted, &counts).await });
            i.task = Some(task.abort_handle());
            task
        };
        match task.await {
            Ok(Ok(_)) => {
                // Where a cell was begun meanwhile, the newcomer waits: the origin is asked again as if anew.
                let taken = self.stages.whole(name).is_some_and(|w| w.digest != old);
                self.stages.change(name, |i| i.tag = tag.filter(|_| taken));
                Ok(())
            }
            Ok(Err(e)) => Err(e),
            // Dropped meanwhile.
            Err(_) => Ok(()),
        }
    }

    fn runs_from(&self, image: &str) -> bool {
        self.records.all().iter().any(|r| r.spec.image == image)
    }

    /// Removes the image, unless a cell runs from it.
    pub(super) fn drop_image(&self, image: &str) -> anyhow::Result<()> {
        if let Some(cell) = self.records.all().iter().find(|r| r.spec.image == image) {
            bail!("image {image} is in use by {}; release that first", cell.spec.instance);
        }
        if let Some(task) = self.stages.lock().remove(image).and_then(|i| i.task) {
            task.abort();
        }
        self.stages.remove_folders(image, None)
    }

    async fn fetch(&self, name: &str, counts: &Arc<Counts>) -> anyhow::Result<Digest> {
        let (signed, tag) = self
            .fetch_manifest(name, None)
            .await?
            .context("the origin says that nothing changed, and nothing is here")?;
        let trusted = self.trust(name, signed)?;
        let known = (trusted.digest, stored(&trusted.manifest));
        self.stages.change(name, |i| (i.known, i.tag) = (Some(known), tag));
        self.fetch_parts(name, trusted, counts).await
    }

    fn trust(&self, name: &str, signed: SignedManifest) -> anyhow::Result<Trusted> {
        let (manifest, digest) = verify(&signed, &self.config.signers)?;
        if manifest.name != name {
            bail!("the image asked for is {name} and the manifest is of {}; build it again", manifest.name);
        }
        check_host(&manifest, &self.host)?;
        Ok(Trusted { signed, manifest, digest })
    }

    async fn fetch_parts(&self, name: &str, trusted: Trusted, counts: &Arc<Counts>) -> anyhow::Result<Digest> {
        let Trusted { signed, manifest, digest } = trusted;
        let hex = digest.to_string();
        let folder = self.stages.dir.join(format!("{name}-{}", hex.get(..16).unwrap_or(&hex)));
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        crate::replace(&folder.join("manifest.json"), &serde_json::to_vec(&signed)?)
            .with_context(|| format!("cannot write to {}", folder.display()))?;
        let files = Files::within(&folder);
        for (part, path) in parts(&manifest, &files) {
            self.fetch_part(part, path, counts).await.with_context(|| format!("cannot stage {name}"))?;
        }
        if self.put_in_place(name, Staged { manifest, digest, files }, &folder, counts)? {
            self.stages.remove_folders(name, Some(&folder))?;
        }
        Ok(digest)
    }

    /// From here on cells are made from `staged`; answers false where a cell still runs from another, and
    /// then the newcomer waits in its folder for the next time the origin is asked.
    pub(super) fn put_in_place(
        &self,
        name: &str,
        staged: Staged,
        folder: &Path,
        counts: &Arc<Counts>,
    ) -> anyhow::Result<bool> {
        // Held throughout: a cell that is begun meanwhile is either seen here, or sees the new image.
        let mut images = self.stages.lock();
        let Some(image) = images.get_mut(name) else { return Ok(false) };
        if image.whole.as_ref().is_some_and(|old| old.digest != staged.digest) && self.runs_from(name) {
            return Ok(false);
        }
        crate::replace(&folder.join("whole"), b"").with_context(|| format!("cannot write to {}", folder.display()))?;
        let total = stored(&staged.manifest);
        if !Arc::ptr_eq(&image.counts, counts) {
            image.counts.fetched.fetch_add(counts.fetched().0, Ordering::Relaxed);
        }
        image.counts.present.store(total.0, Ordering::Relaxed);
        image.known = Some((staged.digest, total));
        image.whole = Some(Arc::new(staged));
        Ok(true)
    }

    /// The manifest and what the origin calls this version of it; none if that is still `known`.
    async fn fetch_manifest(
        &self,
        name: &str,
        known: Option<&str>,
    ) -> anyhow::Result<Option<(SignedManifest, Option<String>)>> {
        let url = format!("{}/v1/images/{name}", self.config.images);
        let asked = self.client.request(Method::GET, &url).timeout(MANIFEST_LIMIT);
        let answer = known
            .into_iter()
            .fold(asked, |asked, tag| asked.header(header::IF_NONE_MATCH, tag))
            .send()
            .await
            .map_err(reqwest::Error::without_url)
            .with_context(|| format!("cannot ask {url}"))?;
        let status = answer.status();
        if status == StatusCode::NOT_MODIFIED && known.is_some() {
            return Ok(None);
        }
        if status == StatusCode::NOT_FOUND {
            bail!("there is no image {name} at {}; build it with `vmatrix image build`", self.config.images);
        }
        if !status.is_success() {
            bail!("{url} answered {status}");
        }
        let tag = answer.headers().get(header::ETAG).and_then(|t| t.to_str().ok());
        let tag = tag.filter(|t| t.len() <= TAG_MAX).map(str::to_owned);
        // JSON text within JSON: quotes and newlines are escaped, so it may be larger than the manifest.
        let bytes = http::body(answer, 2 * MANIFEST_MAX).await.with_context(|| format!("cannot read {url}"))?;
        let signed = serde_json::from_slice(&bytes).with_context(|| format!("{url} is not a signed manifest"))?;
        Ok(Some((signed, tag)))
    }

    async fn fetch_part(&self, part: &Part, path: &Path, counts: &Arc<Counts>) -> anyhow::Result<()> {
        let (wanted, at) = (part.clone(), path.to_owned());
        let file = Arc::new(tokio::task::spawn_blocking(move || PartFile::create(&at, &wanted)).await??);
        let missing = file.missing();
        let lacking: Bytes = missing.iter().map(|(_, c)| c.stored).sum();
        let all: Bytes = part.chunks.iter().flatten().map(|c| c.stored).sum();
        counts.present.fetch_add((all - lacking).0, Ordering::Relaxed);
        futures_util::stream::iter(missing.into_iter().map(Ok::<_, anyhow::Error>))
            .try_for_each_concurrent(AT_ONCE, |(index, chunk)| {
                let file = file.clone();
                async move {
                    let bytes = self.fetch_chunk(&file, index, &chunk, counts).await?;
                    counts.present.fetch_add(bytes, Ordering::Relaxed);
                    Ok(())
                }
            })
            .await?;
        let file = Arc::into_inner(file).context("a part's file is still being written")?;
        Ok(tokio::task::spawn_blocking(move || file.finish()).await??)
    }

    /// Fetches a chunk until it is the right one; answers its stored bytes.
    async fn fetch_chunk(
        &self,
        file: &Arc<PartFile>,
        index: usize,
        chunk: &Chunk,
        counts: &Counts,
    ) -> anyhow::Result<u64> {
        let url = format!("{}/v1/chunks/{}", self.config.images, chunk.digest);
        let mut pause = TRY_PAUSE;
        let mut tried = 0;
        loop {
            tried += 1;
            let once = async {
                let answer = self
                    .client
                    .request(Method::GET, &url)
                    .timeout(CHUNK_LIMIT)
                    .send()
                    .await
                    .and_then(reqwest::Response::error_for_status)
                    .map_err(reqwest::Error::without_url)?;
                let bytes = http::body(answer, STORED_MAX).await?;
                counts.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                let file = file.clone();
                let put = move || file.put(index, &bytes);
                Ok::<_, anyhow::Error>(tokio::task::spawn_blocking(put).await??)
            };
            match once.await {
                Ok(()) => return Ok(chunk.stored.0),
                Err(e)
                    if e.chain()
                        .any(|c| matches!(c.downcast_ref(), Some(vmatrix_vma_image::Error::DiskFull { .. }))) =>
                {
                    return Err(e);
                }
                Err(e) if tried == TRIES => {
                    return Err(e)
                        .with_context(|| format!("cannot get chunk {} after {TRIES} tries", chunk.digest.short()));
                }
                Err(e) => tracing::debug!(chunk = chunk.digest.short(), tried, error = format!("{e:#}"), "again"),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }
}

/// The parts a guest runs from, with their files; what the origin seeds its back end with is not among them.
fn parts<'a>(manifest: &'a Manifest, files: &'a Files) -> impl Iterator<Item = (&'a Part, &'a PathBuf)> {
    manifest.parts.iter().filter_map(move |part| {
        let path = match part.kind {
            PartKind::Memory => &files.memory,
            PartKind::Device => &files.device,
            PartKind::Disk => &files.disk,
            PartKind::Kernel => &files.kernel,
            PartKind::Initrd => &files.initrd,
            PartKind::BackendSeed => return None,
        };
        Some((part, path))
    })
}

/// Stored bytes that staging fetches. A chunk that lies in two places is counted, and fetched, twice.
fn stored(manifest: &Manifest) -> Bytes {
    manifest
        .parts
        .iter()
        .filter(|p| p.kind != PartKind::BackendSeed)
        .flat_map(|p| p.chunks.iter().flatten())
        .map(|c| c.stored)
        .sum()
}

/// `maps` of `…/maps-0123456789abcdef`.
fn image_of(folder: &Path) -> Option<String> {
    let (name, digest) = folder.file_name()?.to_str()?.rsplit_once('-')?;
    (digest.len() == 16 && digest.bytes().all(|b| b.is_ascii_hexdigit())).then(|| name.to_owned())
}

/// Reads what an earlier run staged and checked: signature and chunks were verified then.
fn read_whole(folder: &Path) -> anyhow::Result<Staged> {
    let signed: SignedManifest = serde_json::from_slice(&std::fs::read(folder.join("manifest.json"))?)?;
    let digest = Digest::of(signed.manifest.as_bytes());
    Ok(Staged { manifest: serde_json::from_str(&signed.manifest)?, digest, files: Files::within(folder) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_names_its_image_even_with_a_dash_in_it() {
        assert_eq!(image_of(Path::new("/s/maps-eu-0123456789abcdef")).as_deref(), Some("maps-eu"));
        assert_eq!(image_of(Path::new("/s/maps-eu")), None);
    }
}
