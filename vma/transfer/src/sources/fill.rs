//! Many chunks in the background.

use super::{Arrived, Sources};
use crate::{Class, Error, Result};
use std::hash::{BuildHasher, RandomState};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use vmatrix_vma_image::chunks::Need;
use vmatrix_vma_image::seal::OwnerKey;

/// Chunks wanted at once: with packs of some 30 KiB as stored, more than a wide link holds.
const AT_ONCE: usize = 256;
/// Chunks that wait for whoever fills.
const ARRIVED_MAX: usize = 32;

/// Chunks of a background fill, as they arrive. Dropping it ends the fill.
#[derive(Debug)]
pub struct Fill {
    arrived: mpsc::Receiver<(Need, Result<Vec<u8>>)>,
}

impl Fill {
    /// The next chunk, in the order they come; `None` after the last.
    ///
    /// # Errors
    /// Of one chunk, that no source gave; the others go on.
    pub async fn next(&mut self) -> Option<Result<Arrived>> {
        let (need, plain) = self.arrived.recv().await?;
        Some(plain.map(|plain| Arrived { need, plain }))
    }
}

/// Begins to fill.
pub(super) fn start(sources: Sources, mut needs: Vec<Need>, key: Option<OwnerKey>) -> Fill {
    shuffle(&mut needs);
    let (send, arrived) = mpsc::channel(ARRIVED_MAX);
    tokio::spawn(async move {
        let mut getting = JoinSet::new();
        let mut needs = needs.into_iter();
        loop {
            while getting.len() < AT_ONCE
                && let Some(need) = needs.next()
            {
                let (sources, key) = (sources.clone(), key.clone());
                getting.spawn(async move {
                    let plain = sources.get(&need, Class::Background, key.as_ref()).await;
                    (need, plain)
                });
            }
            let Some(done) = getting.join_next().await else { return };
            // A task that panicked has no chunk to name.
            let Ok(done) = done else { continue };
            let closed = matches!(done.1, Err(Error::Closed));
            if send.send(done).await.is_err() || closed {
                return;
            }
        }
    });
    Fill { arrived }
}

/// By a hash that every process seeds anew.
fn shuffle(needs: &mut [Need]) {
    let order = RandomState::new();
    needs.sort_by_cached_key(|need| order.hash_one(need.digest.0));
}
