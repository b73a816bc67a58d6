//! A list that learns: pages that guests had to wait for come into their image's working set.
//!
//! ```text
//! machine: pages ─▶ Learner: whose image? its list by now? one at a time ─▶ learn: packs of these pages, new manifest
//! ```
//! Nothing of the image is laid out but these pages: every other pack stays as it is, so that whoever has the image
//! fetches the new packs alone, and guests that run from it find theirs. A pack of which every page was learned, and the
//! tables before, are named by nothing then: they go with the store's next collection, after its grace.
//!
//! # Invariants
//! 1. Memory is the same, byte for byte, whatever is asked: a machine that lies makes a list longer, no page wrong.
//! 2. A list grows to [`LIST_MAX`] pages at most, and no more often than each [`LEARN_EVERY`].

use crate::record::Recorded;
use crate::workshop::{Scratch, blocking, memory_place};
use nix::sys::statvfs::statvfs;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use vmatrix_model::Digest;
use vmatrix_vma_image::chunks::{self, Cutter};
use vmatrix_vma_image::error::{Error, Result, io};
use vmatrix_vma_image::memory::{self, Map, Of, PAGE, Parent};
use vmatrix_vma_image::{Store, inspect, sign};
use vmatrix_vma_transfer::Answerer;
use vmatrix_vma_transfer::identity::{Name, Role};
use vmatrix_vma_transfer::question::{Learned, Question, pages};

/// Most pages of a list that learns. A list is sent before anything else: 64 MiB of memory are some 25 MB as stored,
/// two seconds at 100 Mbit/s, as long as the rest of a resume may take. A recorded one may be longer; it stays as it is.
pub const LIST_MAX: u64 = 16_384;
/// Between two new lists of one image: each has every machine that keeps the image ready fetch it and make it ready
/// anew, and half a minute passes until all have looked.
pub const LEARN_EVERY: Duration = Duration::from_secs(600);
/// Room that stays free in the store beside what a new list may take.
const SPARE: u64 = 64 << 20;

/// Adds pages to the list of image `name`: those that a resumed VM had to wait for. `requests` is what it answered
/// until then. With `built` only if that is the image's manifest. Zero pages, and those that are in the list, are left
/// out; where none is left the image stays as it is.
///
/// # Errors
/// There is no such image, it is not the store's own, it has another manifest, a page is past its end, its list is
/// full, or so is the store; then nothing is left behind.
pub fn learn(name: &str, store: &Path, built: Option<&Digest>, misses: &[u32], requests: u32) -> Result<Recorded> {
    learn_up_to(LIST_MAX, name, store, built, misses, requests)
}

fn learn_up_to(
    most: u64,
    name: &str,
    store: &Path,
    built: Option<&Digest>,
    misses: &[u32],
    requests: u32,
) -> Result<Recorded> {
    let store = Store::read(store)?;
    store.folder()?;
    // First: a build may be putting another image in its place.
    let _alone = store.lock()?;
    let (mut manifest, digest) = current(&store, name, built)?;
    let key = inspect::owner_key(&manifest, &store)?;
    let map = memory::map(&manifest, &store)?;
    let before = manifest.memory.working_set;
    let new = fresh(&map, misses).map_err(|page| no(format!("page {page} is past the end of image {name}")))?;
    let room = most.saturating_sub(before.pages) as usize;
    if new.is_empty() {
        return Ok(Recorded { digest, before, after: before });
    }
    if room == 0 {
        return Err(no(format!(
            "the list of image {name} has {} pages, as many as it may; record it anew with `vmatrix image record`",
            before.pages
        )));
    }
    let new = new.get(..room.min(new.len())).unwrap_or_default();
    let bytes = new.len() as u64 * PAGE;
    let tables = manifest.memory.first.plain.0 + manifest.memory.rest.plain.0;
    let free = statvfs(store.dir()).map_err(|e| io("look for room in", store.dir())(e.into()))?;
    if free.blocks_available().saturating_mul(free.fragment_size()) < bytes + tables + SPARE {
        return Err(Error::DiskFull { what: "put a new list into", path: store.dir().to_owned() });
    }
    let scratch = Scratch::within(&memory_place(bytes >> 20), &format!("learn-{name}"))?;
    let file = scratch.file("memory");
    lay_out(&map, new, &store, key.as_ref(), &file, manifest.memory.size.0)?;
    let listed = map.packs().iter().take(map.working_set()).flat_map(|p| p.pages().map(|(_, page)| page));
    let order: Vec<u32> = listed.chain(new.iter().copied()).collect();
    let cutter = Cutter::new(&store, key.as_ref());
    let parent = Parent { map: &map, unchanged: &|_| true };
    let put = memory::cut(&cutter, &file, &order, before.requests.max(requests), Some(&parent)).and_then(|memory| {
        // Of the snapshot that this image may be, it says as much as before.
        let parent_pages = manifest.memory.parent_pages;
        manifest.memory = vmatrix_model::manifest::Memory { parent_pages, ..memory };
        let signed = sign::sign(&store, &manifest)?;
        store.publish(name, &signed)?;
        Ok(Digest::of(signed.manifest.as_bytes()))
    });
    match put {
        Ok(digest) => Ok(Recorded { digest, before, after: manifest.memory.working_set }),
        Err(error) => {
            cutter.undo();
            Err(error)
        }
    }
}

/// The manifest of an image that is the store's own, and, with `built`, still that one.
fn current(store: &Store, name: &str, built: Option<&Digest>) -> Result<(vmatrix_model::manifest::Manifest, Digest)> {
    let seen = inspect::inspect(store.dir(), name, &[]).map_err(|error| match error {
        Error::NoKey { .. } => no(format!(
            "this store has no builder's key, so it makes no lists: run `vmatrix image record {name}` where the image \
             was built, and push it"
        )),
        Error::Untrusted { .. } => no(format!(
            "image {name} is not the store's own: run `vmatrix image record {name}` where it was built, and push it"
        )),
        other => other,
    })?;
    if built.is_some_and(|built| *built != seen.digest) {
        return Err(no(format!("image {name} has another list by now, or was built anew: {}", seen.digest.short())));
    }
    Ok((seen.manifest, seen.digest))
}

fn no(why: String) -> Error {
    Error::Unhealthy(why)
}

/// Those of the pages that a list would bring: once each, neither zero nor listed. An error: one that is past the end.
fn fresh(map: &Map, misses: &[u32]) -> std::result::Result<Vec<u32>, u32> {
    let mut seen = BTreeSet::new();
    let mut fresh = Vec::new();
    for page in misses {
        match map.of(*page) {
            Of::Pack { pack, .. } if pack as usize >= map.working_set() && seen.insert(*page) => fresh.push(*page),
            Of::Pack { .. } | Of::Zero => {}
            Of::Unknown => return Err(*page),
        }
    }
    Ok(fresh)
}

/// A memory file in which nothing is but these pages.
fn lay_out(
    map: &Map,
    wanted: &[u32],
    store: &Store,
    key: Option<&vmatrix_vma_image::seal::OwnerKey>,
    to: &Path,
    size: u64,
) -> Result<()> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(to);
    let file = file.and_then(|f| f.set_len(size).map(|()| f)).map_err(io("create", to))?;
    let mut packs: BTreeMap<u32, Vec<(u32, u16)>> = BTreeMap::new();
    for page in wanted {
        if let Of::Pack { pack, slot } = map.of(*page) {
            packs.entry(pack).or_default().push((*page, slot));
        }
    }
    for (number, pages) in packs {
        let Some(pack) = map.packs().get(number as usize) else { continue };
        let need = pack.need(key.is_some());
        let plain = chunks::open(&store.chunk(&need.digest)?, &need, key)?;
        for (page, slot) in pages {
            let at = usize::from(slot) * PAGE as usize;
            let bytes = plain.get(at..at + PAGE as usize).unwrap_or_default();
            file.write_all_at(bytes, u64::from(page) * PAGE).map_err(io("write", to))?;
        }
    }
    Ok(())
}

/// Answers machines that ask a store to learn.
pub struct Learner {
    store: Store,
    /// When an image's list was last made anew; as many as the store has images.
    made: Mutex<BTreeMap<String, Instant>>,
    /// One at a time: it takes the processor that chunks are served with.
    turn: Arc<Semaphore>,
}

impl Learner {
    /// Answers for `store`.
    pub fn answerer(store: Store) -> Answerer {
        let learner = Arc::new(Learner { store, made: Mutex::default(), turn: Arc::new(Semaphore::new(1)) });
        Answerer::new(move |name, question| learner.clone().answer(name, question))
    }

    async fn answer(self: Arc<Self>, name: Name, question: Vec<u8>) -> std::result::Result<Vec<u8>, String> {
        if name.role != Role::Machine {
            return Err("only machines are answered".to_owned());
        }
        let Question::Learn { image, built, blocks } =
            serde_json::from_slice(&question).map_err(|e| format!("the question cannot be understood: {e}"))?;
        let misses = pages(&blocks).ok_or("no guest has so many pages")?;
        let Ok(turn) = self.turn.clone().try_acquire_owned() else {
            return Err("another list is being made; ask again in a minute".to_owned());
        };
        let learned = blocking(move || {
            let _turn = turn;
            self.learn(&name, &image, &built, &misses)
        });
        let learned = learned.await.and_then(|learned| learned).map_err(|e| e.to_string())?;
        serde_json::to_vec(&learned).map_err(|e| e.to_string())
    }

    fn learn(&self, asker: &Name, image: &str, built: &Digest, misses: &[u32]) -> Result<Learned> {
        let began = Instant::now();
        let learned = self.folder(image).and_then(|folder| {
            let store = Store::read(folder)?;
            current(&store, image, Some(built))?;
            self.may(image)?;
            learn(image, folder, Some(built), misses, 0)
        });
        let learned = learned.inspect_err(|e| {
            tracing::info!(image, asker = asker.id, pages = misses.len(), problem = %e, "a list stays as it is");
        })?;
        let Recorded { digest, before, after } = learned;
        if digest != *built {
            self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(image.to_owned(), Instant::now());
            tracing::info!(
                asker = asker.id,
                digest = digest.short(),
                took_ms = began.elapsed().as_millis(),
                "working set of {image}: {} -> {} pages, asked by {}",
                before.pages,
                after.pages,
                asker.id
            );
        }
        Ok(Learned { digest, before: before.pages, after: after.pages })
    }

    /// The store's folder: of a bucket's images the keys are elsewhere.
    fn folder(&self, image: &str) -> Result<&Path> {
        self.store.folder().map_err(|_| {
            no(format!(
                "this store is a bucket, and makes no lists: run `vmatrix image record {image}` where the image was \
                 built, and push it"
            ))
        })
    }

    /// Whether an image's list may be made anew: not if it just was.
    fn may(&self, image: &str) -> Result<()> {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ago) = made.get(image).map(Instant::elapsed).filter(|ago| *ago < LEARN_EVERY) {
            return Err(no(format!(
                "the list of image {image} was made {} s ago, and is left alone for {}",
                ago.as_secs(),
                LEARN_EVERY.as_secs()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{
        order,
        tests::{Image, image},
    };
    use std::fs;
    use vmatrix_vma_testing::Small;
    use vmatrix_vma_transfer::question::blocks;

    fn list(image: &Image) -> Vec<u32> {
        let seen = inspect::inspect(image.store.dir(), "tiny", &[]).unwrap();
        inspect::verify(image.store.dir(), "tiny", &[]).unwrap();
        order(&memory::map(&seen.manifest, &image.store).unwrap())
    }

    fn packs(image: &Image) -> BTreeSet<Digest> {
        let seen = inspect::inspect(image.store.dir(), "tiny", &[]).unwrap();
        memory::map(&seen.manifest, &image.store).unwrap().packs().iter().map(|p| p.digest).collect()
    }

    fn chunks(image: &Image) -> usize {
        let folders = fs::read_dir(image.store.dir().join("chunks")).unwrap().map(|entry| entry.unwrap().path());
        folders.map(|folder| fs::read_dir(folder).map_or(1, Iterator::count)).sum()
    }

    fn machine() -> Name {
        Name::new(Role::Machine, "m1").unwrap()
    }

    /// Asks a learner for `image`, of manifest `built`, to learn these pages.
    fn ask(learner: &Arc<Learner>, name: Name, built: Digest, misses: &[u32]) -> std::result::Result<Learned, String> {
        let question = Question::Learn { image: "tiny".to_owned(), built, blocks: blocks(misses) };
        let answer = learner.clone().answer(name, serde_json::to_vec(&question).unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(answer).map(|bytes| serde_json::from_slice(&bytes).unwrap())
    }

    fn learner(store: &Path) -> Arc<Learner> {
        let (store, turn) = (Store::read(store).unwrap(), Arc::new(Semaphore::new(1)));
        Arc::new(Learner { store, made: Mutex::default(), turn })
    }

    #[test]
    fn a_miss_that_was_seen_is_in_the_list_from_then_on_after_what_was_there() {
        let image = image();
        let (before, all) = (packs(&image), chunks(&image));
        let learned = learn("tiny", image.store.dir(), Some(&image.digest), &[5000, 4096, 5000, 9], 90).unwrap();
        assert_eq!((learned.before.pages, learned.after.pages, learned.after.requests), (2, 3, 90));
        assert_eq!(list(&image), [4097, 4096, 5000]);
        let seen = inspect::inspect(image.store.dir(), "tiny", &[]).unwrap();
        assert_eq!(seen.digest, learned.digest);
        assert_eq!(seen.manifest.device, image.manifest.device);
        let new: Vec<Digest> = packs(&image).difference(&before).copied().collect();
        assert_eq!(new.len(), 1, "whoever has the image fetches one page anew, and two tables");
        assert_eq!(chunks(&image), all + 3);
        assert!(before.is_subset(&packs(&image)), "guests that run from it miss what they have not read yet");
        let (was, is) = (image.dir.path().join("memory"), image.dir.path().join("is"));
        memory::assemble(&seen.manifest, &image.store, Some(&image.key), &is).unwrap();
        assert!(fs::read(was).unwrap() == fs::read(is).unwrap(), "other memory comes back");
    }

    #[test]
    fn what_is_zero_or_listed_already_changes_nothing() {
        let image = image();
        let all = chunks(&image);
        let learned = learn("tiny", image.store.dir(), None, &[4097, 1, 2, 4096], 5).unwrap();
        assert_eq!((learned.digest, learned.before), (image.digest, learned.after));
        assert_eq!(chunks(&image), all);
    }

    #[test]
    fn a_page_past_the_end_and_a_manifest_of_before_are_refused_and_nothing_is_left_behind() {
        let image = image();
        let all = chunks(&image);
        let past = learn("tiny", image.store.dir(), None, &[5000, 1 << 20], 0).unwrap_err().to_string();
        assert!(past.contains("1048576 is past the end"), "{past}");
        let other = learn("tiny", image.store.dir(), Some(&Digest::of(b"x")), &[5000], 0).unwrap_err().to_string();
        assert!(other.contains("another list by now"), "{other}");
        assert_eq!((list(&image), chunks(&image)), (vec![4097, 4096], all));
    }

    #[test]
    fn a_list_grows_to_its_bound_by_what_was_waited_for_first_and_then_learns_nothing() {
        let image = image();
        let grow = |misses: &[u32]| learn_up_to(4, "tiny", image.store.dir(), None, misses, 0);
        assert_eq!(grow(&[5001, 5000, 5002]).unwrap().after.pages, 4);
        assert_eq!(list(&image), [4097, 4096, 5001, 5000]);
        let full = grow(&[5002]).unwrap_err().to_string();
        assert!(full.contains("has 4 pages, as many as it may") && full.contains("image record"), "{full}");
        assert_eq!(grow(&[5001]).unwrap().after.pages, 4, "what is listed is no reason to refuse");
    }

    #[test]
    fn machine_a_store_without_room_says_so_and_keeps_its_list() {
        let image = image();
        let small = Small::new(image.dir.path().join("small"), "32m");
        let from = image.store.dir();
        let store = image.dir.path().join("small/store");
        let copied = std::process::Command::new("cp").arg("-r").args([from, &store]).status().unwrap();
        assert!(copied.success());
        let full = learn("tiny", &store, None, &[5000], 0).unwrap_err().to_string();
        assert!(full.contains("no space left to put a new list into"), "{full}");
        assert_eq!(inspect::inspect(&store, "tiny", &[]).unwrap().digest, image.digest);
        drop(small);
    }

    #[test]
    fn a_list_is_left_alone_for_a_while_after_it_was_made() {
        let image = image();
        let learner = learner(image.store.dir());
        let learned = ask(&learner, machine(), image.digest, &[5000, 5001]).unwrap();
        assert_eq!((learned.before, learned.after), (2, 4));
        let stale = ask(&learner, machine(), image.digest, &[5002]).unwrap_err();
        assert!(stale.contains("another list by now"), "{stale}");
        let soon = ask(&learner, machine(), learned.digest, &[5002]).unwrap_err();
        assert!(soon.contains("left alone for 600"), "{soon}");
        assert_eq!(list(&image), [4097, 4096, 5000, 5001]);
    }

    #[test]
    fn one_list_is_made_at_a_time_and_only_machines_are_heard() {
        let image = image();
        let learner = learner(image.store.dir());
        let turn = learner.turn.clone().try_acquire_owned().unwrap();
        let busy = ask(&learner, machine(), image.digest, &[5000]).unwrap_err();
        assert!(busy.contains("another list is being made"), "{busy}");
        drop(turn);
        let operator = Name::new(Role::Operator, "o1").unwrap();
        assert!(ask(&learner, operator, image.digest, &[5000]).unwrap_err().contains("only machines"));
        assert_eq!(list(&image), [4097, 4096]);
    }

    #[test]
    fn an_image_of_another_builder_and_a_store_without_a_key_are_refused_with_what_to_do() {
        let image = image();
        let learner = learner(image.store.dir());
        let key = image.store.dir().join("keys/builder");
        fs::write(&key, "11".repeat(32)).unwrap();
        let foreign = ask(&learner, machine(), image.digest, &[5000]).unwrap_err();
        assert!(foreign.contains("not the store's own") && foreign.contains("image record tiny"), "{foreign}");
        fs::remove_file(&key).unwrap();
        let without = ask(&learner, machine(), image.digest, &[5000]).unwrap_err();
        assert!(without.contains("no builder's key") && without.contains("image record tiny"), "{without}");
        assert!(!key.exists(), "a key was made");
        assert!(foreign.len() <= 240 && without.len() <= 240, "a refusal is cut off");
    }
}
