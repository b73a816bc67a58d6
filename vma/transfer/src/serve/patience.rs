//! Chunks that are asked for here while they are on their way to here.
//!
//! ```text
//! ask by one that was sent here ─▶ waits ─┬─ our own sources have kept it ─▶ sent
//!                                         ├─ another process has put it into the store (looked for) ─▶ sent
//!                                         └─ PATIENCE is over ─▶ missing
//! ```

use super::peer::Peer;
use super::{Shared, lock};
use crate::Class;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, broadcast};
use vmatrix_model::Digest;

/// How long a chunk is waited for: as long as two windows of a source take over 10 Mbit/s.
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

    fn give_up(&self, now: Instant) {
        let mut late = Vec::new();
        lock(&self.waits).retain(|digest, waits| {
            waits.retain(|wait| {
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
pub(super) async fn run(shared: Arc<Shared>, mut kept: Option<broadcast::Receiver<Digest>>) {
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
                shared.patience.give_up(Instant::now());
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
