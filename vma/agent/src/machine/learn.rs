//! What guests had to wait for, told to the store that their image is from: the next resume elsewhere does not wait.
//!
//! ```text
//! healthy for 5 s │ all is here ─▶ the pager's misses ─▶ more than ten round trips ─▶ ask the store to learn them
//!                                                                  ▲                     │ it cannot
//!                                                                  └── later, and later ─┘
//! ```
//! Nothing of this is in a guest's way. The image here stays as it is; the store's new one comes as any newer one does.

use super::Machine;
use super::pager::{ANSWER_LIMIT, Pager};
use anyhow::Context;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmatrix_vma_pager::{Control, Status};
use vmatrix_vma_transfer::identity::Name;
use vmatrix_vma_transfer::question::{Learned, Question, blocks};

/// A guest that was let go so long ago has answered its first requests.
const FIRST_REQUESTS: Duration = Duration::from_secs(5);
/// Round trips that a list may have left out. Some code runs by chance, and is waited for once; ten over 80 ms are what a
/// whole resume over a slow link takes.
const WAITS_MAX: u64 = 10;
/// A list is made within a second or two, but may have to wait for a build at that store.
const LEARN_LIMIT: Duration = Duration::from_secs(60);
/// Before a store is asked again: doubled at each refusal from the first to the second.
const AGAIN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));
/// Refusals after which it is not asked any more: by then it was asked for half a day.
const REFUSALS_MAX: u32 = 16;

/// What the store was told of one image.
#[derive(Debug, Default)]
pub struct Told {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Inner {
    /// Misses that were looked at: told, or too few.
    looked: u64,
    /// Nobody asks before then.
    again_at: Option<Instant>,
    refusals: u32,
    asks: bool,
    /// The store has another list by now: this image's is not its concern any more.
    done: bool,
}

impl Inner {
    /// Whether so many misses are to be looked at.
    fn is_due(&self, now: Instant, missed: u64) -> bool {
        let open = !self.asks && !self.done && self.refusals < REFUSALS_MAX;
        open && missed > self.looked + WAITS_MAX && self.again_at.is_none_or(|at| at <= now)
    }

    /// Whether a list without these is worth a question: each block is one round trip.
    fn begin(&mut self, missed: u64, blocks: u64) -> bool {
        self.asks = blocks > WAITS_MAX;
        if !self.asks {
            self.looked = missed;
        }
        self.asks
    }

    /// The store has `missed` in its list, and perhaps a new one.
    fn learned(&mut self, missed: u64, new: bool) {
        *self = Inner { looked: missed, done: new, ..Inner::default() };
    }

    /// The store did not learn; answers whether that is news.
    fn refused(&mut self, now: Instant) -> bool {
        let wait = AGAIN.0.saturating_mul(1 << self.refusals.min(8)).min(AGAIN.1);
        (self.asks, self.again_at) = (false, Some(now + wait));
        self.refusals = self.refusals.saturating_add(1);
        self.refusals == 1
    }
}

impl Told {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine {
    /// Answers another machine's question; lists are made where images are signed.
    ///
    /// # Errors
    /// Why not, for that machine.
    pub(super) async fn answer_unless_learn(self: Arc<Self>, name: Name, question: Vec<u8>) -> Result<Vec<u8>, String> {
        if serde_json::from_slice::<Question>(&question).is_ok() {
            return Err("a machine makes no lists; its store does".to_owned());
        }
        self.answer(name, question).await
    }

    /// Asks the store to learn what clones of an image had to wait for, if that is worth it now. `woke`: when the last of
    /// them was let go.
    ///
    /// # Errors
    /// The pager does not say what it knows.
    pub(super) async fn tell_missed(
        self: &Arc<Self>,
        pager: &Pager,
        control: &mut Control,
        status: &Status,
        woke: Option<Instant>,
    ) -> anyhow::Result<()> {
        let answered = woke.is_some_and(|woke| woke.elapsed() > FIRST_REQUESTS);
        let time = pager.one.is_none() && (answered || status.hydrated);
        if !time || !pager.told.lock().is_due(Instant::now(), status.missed) {
            return Ok(());
        }
        let missed = tokio::time::timeout(ANSWER_LIMIT, control.missed()).await;
        let missed = missed.map_err(anyhow::Error::from).and_then(|m| Ok(m?));
        let missed = missed.context("it does not say what guests waited for")?;
        let (count, blocks) = (missed.len() as u64, blocks(&missed));
        if !pager.told.lock().begin(count, blocks.len() as u64) {
            return Ok(());
        }
        let (image, built) = (pager.known.manifest.name.clone(), pager.known.digest);
        let (sources, told) = (self.sources.clone(), Told { inner: pager.told.inner.clone() });
        tokio::spawn(async move {
            let waits = blocks.len();
            let question = Question::Learn { image: image.clone(), built, blocks };
            match sources.ask_each::<_, Learned>(&question, LEARN_LIMIT).await {
                Ok(learned) => {
                    told.lock().learned(count, learned.digest != built);
                    let Learned { before, after, digest } = learned;
                    let digest = digest.short();
                    tracing::info!(image, waits, before, after, digest, "the store's list has what guests waited for");
                }
                Err(e) if told.lock().refused(Instant::now()) => tracing::warn!(
                    image,
                    waits,
                    error = %e,
                    "guests wait for pages that are not in the image's list, and no source learns them; asked again now and then"
                ),
                Err(e) => tracing::debug!(image, waits, error = %e, "no source learns what guests wait for"),
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_waits_are_nothing_and_many_pages_of_few_blocks_neither() {
        let (now, mut told) = (Instant::now(), Inner::default());
        assert!(!told.is_due(now, WAITS_MAX));
        assert!(told.is_due(now, 100));
        assert!(!told.begin(100, WAITS_MAX));
        assert!(!told.is_due(now, 100 + WAITS_MAX), "looked at again though little came");
        assert!(told.is_due(now, 101 + WAITS_MAX));
        assert!(told.begin(101 + WAITS_MAX, WAITS_MAX + 1));
    }

    #[test]
    fn what_was_told_is_not_told_again_and_a_new_list_ends_it() {
        let (now, mut told) = (Instant::now(), Inner::default());
        assert!(told.begin(50, 50));
        assert!(!told.is_due(now, 500), "asked twice at once");
        told.learned(50, false);
        assert!(!told.is_due(now, 50) && told.is_due(now, 500));
        assert!(told.begin(500, 100));
        told.learned(500, true);
        assert!(!told.is_due(now + AGAIN.1, 4000));
    }

    #[test]
    fn a_refusal_is_news_once_and_each_waits_longer_and_there_is_an_end() {
        let (mut now, mut told) = (Instant::now(), Inner::default());
        let mut waits = Vec::new();
        while told.is_due(now, 50) {
            assert!(told.begin(50, 50));
            assert_eq!(told.refused(now), waits.is_empty());
            let at = told.again_at.unwrap();
            assert!(!told.is_due(at - Duration::from_millis(1), 50));
            waits.push((at - now).as_secs());
            now = at;
        }
        assert_eq!(waits.len(), REFUSALS_MAX as usize);
        assert_eq!((waits[..7].to_vec(), waits[15]), (vec![60, 120, 240, 480, 960, 1920, 3600], 3600));
    }
}
