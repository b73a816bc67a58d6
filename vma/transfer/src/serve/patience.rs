//! Chunks that are asked for here while they are on their way to here.
//!
//! ```text
//! ask by one that was sent here ─▶ waits ─┬─ our own sources have kept it ─▶ sent
//!                                         ├─ another process has put it into the store (looked for) ─▶ sent
//!                                         └─ PATIENCE is over, and our own sources do not wait for it ─▶ missing
//! ```
//! Nobody waits in a circle, for nobody is sent to one that asked later ([`crate::holders`]); and a want that takes too
//! long is ended by the plan of whoever has it ([`crate::plan`]).

use super::peer::Peer;
use super::{Follows, Shared, lock};
use crate::Class;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, broadcast};
use vmatrix_model::Digest;

/// How long a chunk is waited for that may not be on its way: as long as two windows of a source take over 10 Mbit/s.
const PATIENCE: Duration = Duration::from_secs(8);
/// How often the store is looked into.
const LOOK_EVERY: Duration = Duration::from_millis(30);
/// How often it is where our own sources say what they keep.
const LOOK_SELDOM: Duration = Duration::from_millis(500);
/// Chunks that are waited for, and peers that wait for one.
const CHUNKS_MAX: usize = 16_384;
const OF_CHUNK_MAX: usize = 64;

struct Wait {
    peer: Weak<Peer>,
    class: Class,
    until: Instant,
}

/// All asks that wait.
#[derive(Default)]
pub(super) struct Patience {
    waits: Mutex<HashMap<Digest, Vec<Wait>>>,
    wake: Notify,
}

impl std::fmt::Debug for Patience {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Patience({} chunks)", lock(&self.waits).len())
    }
}

impl Patience {
    /// Has a peer wait for a chunk; false if too many do.
    pub fn wait(&self, peer: &Arc<Peer>, digest: Digest, class: Class) -> bool {
        let mut waits = lock(&self.waits);
        if waits.len() >= CHUNKS_MAX && !waits.contains_key(&digest) {
            return false;
        }
        let of_chunk = waits.entry(digest).or_default();
        if of_chunk.len() >= OF_CHUNK_MAX {
            return false;
        }
        of_chunk.push(Wait { peer: Arc::downgrade(peer), class, until: Instant::now() + PATIENCE });
        self.wake.notify_one();
        true
    }

    /// A peer does not wait any more.
    pub fn leave(&self, peer: &Arc<Peer>, digest: &Digest) {
        let mut waits = lock(&self.waits);
        if let Some(of_chunk) = waits.get_mut(digest) {
            of_chunk.retain(|wait| !std::ptr::eq(wait.peer.as_ptr(), Arc::as_ptr(peer)));
            if of_chunk.is_empty() {
                waits.remove(digest);
            }
        }
    }

    /// The chunk is here.
    fn came(&self, digest: &Digest) {
        for wait in lock(&self.waits).remove(digest).unwrap_or_default() {
            if let Some(peer) = wait.peer.upgrade() {
                peer.is_here(*digest, wait.class);
            }
        }
    }

    /// Chunks that somebody has waited for long enough.
    fn late(&self, now: Instant) -> Vec<Digest> {
        let waits = lock(&self.waits);
        waits.iter().filter(|(_, waits)| waits.iter().any(|w| w.until <= now)).map(|(digest, _)| *digest).collect()
    }

    /// Ends the waits that are long enough; for what is on its way it is waited as long again.
    fn give_up(&self, now: Instant, on_their_way: &HashSet<Digest>) {
        let mut late = Vec::new();
        lock(&self.waits).retain(|digest, waits| {
            waits.retain_mut(|wait| {
                if wait.until <= now && on_their_way.contains(digest) {
                    wait.until = now + PATIENCE;
                }
                let waits_on = now < wait.until;
                if !waits_on {
                    late.extend(wait.peer.upgrade().map(|peer| (peer, *digest)));
                }
                waits_on
            });
            !waits.is_empty()
        });
        late.into_iter().for_each(|(peer, digest)| peer.is_missing(digest));
    }
}

/// Looks, listens and gives up until the server ends.
pub(super) async fn run(shared: Arc<Shared>, follows: Option<Follows>) {
    let (mut kept, sources) = follows.map(|f| (f.kept, f.sources)).unzip();
    let every = if kept.is_some() { LOOK_SELDOM } else { LOOK_EVERY };
    let mut look = tokio::time::interval(every);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        if lock(&shared.patience.waits).is_empty() {
            tokio::select! {
                () = shared.patience.wake.notified() => {}
                // Nobody waits for it; but what is not taken is lost, and then all would have to be looked for.
                _ = next(&mut kept) => continue,
            }
            // It may have come between the ask and now.
            look.reset_immediately();
        }
        tokio::select! {
            digest = next(&mut kept) => match digest {
                Some(digest) => shared.patience.came(&digest),
                None => look.reset_immediately(),
            },
            () = shared.patience.wake.notified() => look.reset_after(every.min(LOOK_EVERY)),
            _ = look.tick() => {
                let wanted: Vec<Digest> = lock(&shared.patience.waits).keys().copied().collect();
                let store = shared.store.clone();
                let here = move || wanted.into_iter().filter(|digest| store.has(digest)).collect::<Vec<_>>();
                let here = tokio::task::spawn_blocking(here).await.unwrap_or_default();
                here.iter().for_each(|digest| shared.patience.came(digest));
                let now = Instant::now();
                let late = shared.patience.late(now);
                let wanted = match &sources {
                    Some(sources) if !late.is_empty() => sources.wanted(late).await,
                    _ => Vec::new(),
                };
                shared.patience.give_up(now, &wanted.into_iter().collect());
            }
        }
    }
}

/// What our own sources have kept; `None` if some of it was missed. Without such sources it never returns.
async fn next(kept: &mut Option<broadcast::Receiver<Digest>>) -> Option<Digest> {
    let Some(receiver) = kept else { return std::future::pending().await };
    match receiver.recv().await {
        Ok(digest) => Some(digest),
        Err(broadcast::error::RecvError::Lagged(_)) => None,
        Err(broadcast::error::RecvError::Closed) => {
            *kept = None;
            None
        }
    }
}
