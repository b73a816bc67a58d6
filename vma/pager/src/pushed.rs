//! Waiting for what somebody else is bringing.
//!
//! The machine's agent opens an image and gets what a guest needs first pushed into the local store. A pager that is
//! started at the same moment would ask for the same bytes again; so it looks for them in the store for as long as
//! they keep coming, and fills memory while they do.

use std::collections::BTreeSet;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep};
use vmatrix_model::Digest;
use vmatrix_vma_image::Store;

/// Set in the environment of a pager whose starter is putting what is needed first (device state, tables, working set)
/// into the store: milliseconds without any of it after which the sources are asked.
pub const PUSHED_VARIABLE: &str = "VMATRIX_PUSHED_MS";
/// Between looks into the store; a look costs microseconds.
const LOOK: Duration = Duration::from_millis(2);

/// A push into a store, by another process.
#[derive(Debug)]
pub(crate) struct Pushed {
    store: Store,
    /// It is over when nothing has come for so long.
    silent_after: Duration,
    /// When something came last.
    came: Mutex<Instant>,
    /// Packs that it brings, once the first table has told them.
    packs: OnceLock<BTreeSet<Digest>>,
}

impl Pushed {
    /// The push that the environment tells of, if it does.
    pub fn from_environment(store: &Store) -> Option<Pushed> {
        let silent_ms = std::env::var(PUSHED_VARIABLE).ok()?.parse().ok().filter(|ms| *ms > 0)?;
        Some(Pushed::new(store.clone(), Duration::from_millis(silent_ms)))
    }

    pub fn new(store: Store, silent_after: Duration) -> Pushed {
        Pushed { store, silent_after, came: Mutex::new(Instant::now()), packs: OnceLock::new() }
    }

    /// Notes what it brings: the working set.
    pub fn expect(&self, packs: impl Iterator<Item = Digest>) {
        // Told once, by the one task that reads the first table.
        let _ = self.packs.set(packs.collect());
    }

    /// Whether this is known to come.
    pub fn brings(&self, digest: &Digest) -> bool {
        self.packs.get().is_some_and(|packs| packs.contains(digest))
    }

    /// Waits until the chunk is in the store, or the push is over.
    pub async fn wait(&self, digest: &Digest) {
        loop {
            if self.store.has(digest) {
                *self.came.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                return;
            }
            if self.came.lock().unwrap_or_else(PoisonError::into_inner).elapsed() > self.silent_after {
                return;
            }
            sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_keeps_coming_is_waited_for_and_silence_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digests: Vec<Digest> = (0..5u8).map(|n| Digest::of(&[n])).collect();
        let pushed = Pushed::new(store.clone(), Duration::from_millis(300));
        let (last, missing) = (digests[4], Digest::of(b"never"));
        let push = async {
            for digest in &digests {
                sleep(Duration::from_millis(150)).await;
                store.put_chunk(digest, b"bytes").unwrap();
            }
        };
        let each = async {
            for digest in &digests {
                pushed.wait(digest).await;
                assert!(store.has(digest), "gave up on what comes");
            }
        };
        tokio::join!(push, each, async {
            pushed.wait(&last).await;
            assert!(store.has(&last), "gave up though others came");
        });
        let began = Instant::now();
        pushed.wait(&missing).await;
        assert!(began.elapsed() < Duration::from_secs(2), "waited {:?} for nothing", began.elapsed());
    }
}
