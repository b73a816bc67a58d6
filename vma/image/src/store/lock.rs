//! Who may do what in a bucket, which has no locks: publishers put a manifest, a collector takes chunks out.
//!
//! ```text
//! publisher  put locks/publish-ID ─▶ list ─▶ no live sweep ─▶ publish ─▶ remove it
//!                                     └─▶ a live sweep: wait, list again
//! collector  put locks/sweep-ID ───▶ list ─▶ nobody else's live lock ─▶ one batch ─▶ remove it
//!                                     └─▶ somebody's: remove it at once, try later
//! ```
//!
//! Each shows its own lock before it looks for others', so of two at least one sees the other, and it is always
//! the collector who gives way. That needs of the bucket only that what was put is listed.
//!
//! A lock whose holder died counts for [`LEASE`](super::bucket::LEASE) by the bucket's own clock. A holder that
//! was stopped in between must not go on when its lock may be over: it looks at its own clock before each step,
//! and a step has an end ([`REQUEST`]).

use super::Entry;
use super::bucket::{Bucket, REQUEST};
use crate::error::{Error, Result};
use std::time::{Duration, Instant, SystemTime};

const PUBLISH: &str = "publish-";
const SWEEP: &str = "sweep-";
/// Between two looks of a publisher that waits: a batch takes about a second.
const AGAIN: Duration = Duration::from_millis(250);
/// Buckets tell times in whole seconds.
const GRAIN: Duration = Duration::from_secs(2);

/// A lock in a bucket; removed when dropped.
pub(crate) struct Lock {
    bucket: Bucket,
    key: String,
    /// Before it was put the first time, by this machine's clock, and when it was put by the bucket's.
    clocks: (Instant, SystemTime),
    /// Before it was put the last time.
    since: Instant,
}

/// Waits until no collector is at a batch, and keeps them out.
pub(super) fn publishing(bucket: &Bucket) -> Result<Lock> {
    let mut lock = Lock::put(bucket, PUBLISH)?;
    let begun = Instant::now();
    while lock.others()?.iter().any(|other| other.name.starts_with(SWEEP)) {
        if begun.elapsed() > 2 * bucket.lease + GRAIN {
            return Err(Error::Busy { place: bucket.place().to_owned() });
        }
        pause(AGAIN);
        if lock.since.elapsed() > bucket.lease / 3 {
            lock = Lock::put(bucket, PUBLISH)?;
        }
    }
    Ok(lock)
}

/// A lock for one batch; `None` if somebody else has one.
pub(super) fn sweeping(bucket: &Bucket) -> Result<Option<Lock>> {
    let mut lock = Lock::put(bucket, SWEEP)?;
    Ok(lock.others()?.is_empty().then_some(lock))
}

/// Waits a while.
#[allow(clippy::disallowed_methods, reason = "all calls of a store block, as its documentation says")]
pub(crate) fn pause(time: Duration) {
    std::thread::sleep(time);
}

impl Lock {
    fn put(bucket: &Bucket, kind: &str) -> Result<Lock> {
        let mut id = [0; 8];
        getrandom::fill(&mut id).map_err(|e| Error::Bucket {
            what: "draw a lock's name for",
            place: bucket.place().to_owned(),
            source: e.to_string().into(),
        })?;
        let key = format!("locks/{kind}{:016x}", u64::from_le_bytes(id));
        let since = Instant::now();
        bucket.put(&key, b"")?;
        Ok(Lock { bucket: bucket.clone(), key, clocks: (since, SystemTime::UNIX_EPOCH), since })
    }

    /// Live locks of others. Learns the bucket's time from its own.
    fn others(&mut self) -> Result<Vec<Entry>> {
        let own = self.key.rsplit('/').next().unwrap_or_default().to_owned();
        let (mine, others): (Vec<Entry>, Vec<Entry>) =
            self.bucket.list("locks")?.into_iter().partition(|e| e.name == own);
        // Not listed: the bucket does not do what it must, or the lock was removed as one of a dead holder.
        let mine = mine.first().ok_or_else(|| Error::Busy { place: self.bucket.place().to_owned() })?;
        self.clocks.1 = mine.modified;
        let now = self.now();
        let age = |e: &Entry| now.duration_since(e.modified).unwrap_or_default();
        let lease = self.bucket.lease + GRAIN;
        let (live, dead): (Vec<Entry>, Vec<Entry>) = others.into_iter().partition(|e| age(e) < lease);
        let long_dead: Vec<String> =
            dead.iter().filter(|e| age(e) > 10 * lease).map(|e| format!("locks/{}", e.name)).collect();
        self.bucket.remove(&long_dead)?;
        Ok(live)
    }

    /// What time it is by the bucket's clock, or a second before.
    pub(super) fn now(&self) -> SystemTime {
        self.clocks.1 + self.clocks.0.elapsed()
    }

    /// Whether a step that begins now ends while the lock counts.
    pub(super) fn still_for_sweeping(&self) -> Result<()> {
        if self.since.elapsed() + REQUEST.min(self.bucket.lease / 3) < self.bucket.lease {
            Ok(())
        } else {
            Err(self.over())
        }
    }

    /// Puts the lock again if it is getting old.
    ///
    /// # Errors
    /// It may have ended meanwhile, and a collector may have been at work.
    pub(crate) fn renew(&mut self) -> Result<()> {
        if self.since.elapsed() > self.bucket.lease / 3 {
            let since = Instant::now();
            let before = self.since;
            self.bucket.put(&self.key, b"")?;
            if before.elapsed() >= self.bucket.lease {
                return Err(self.over());
            }
            self.since = since;
        }
        Ok(())
    }

    /// Whether it counted all the time until now.
    pub(crate) fn is_held(&self) -> bool {
        self.since.elapsed() < self.bucket.lease
    }

    fn over(&self) -> Error {
        Error::Busy { place: self.bucket.place().to_owned() }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // One that stays counts for a lease, no longer.
        if let Err(error) = self.bucket.remove(std::slice::from_ref(&self.key)) {
            tracing::debug!("lock {} stays: {error}", self.key);
        }
    }
}
