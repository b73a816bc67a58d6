//! What a caller hears while a disk moves: the step, and bytes done of bytes there are.
//!
//! The command line draws bars with the time left from it; a test counts.

use vmatrix_model::Bytes;

/// One thing to hear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A step begins; the bytes that follow are of this step.
    Step(&'a str),
    /// So many of so many bytes are done. `done` never falls within a step and never exceeds `total`.
    Done { done: Bytes, total: Bytes },
    /// Something to know that stops nothing.
    Note(&'a str),
}

/// Hears what happens. Called often and from any thread: it must return at once.
pub type Observer = dyn Fn(Event<'_>) + Send + Sync;

/// Counts bytes of one step and tells them, at most once every [`EVERY`] bytes.
pub(crate) struct Count<'a> {
    observer: &'a Observer,
    done: u64,
    told: u64,
    total: u64,
}

/// Some hundred times a second on a fast disk: smooth to look at, nothing to compute.
const EVERY: u64 = 4 << 20;

impl<'a> Count<'a> {
    pub(crate) fn new(observer: &'a Observer, total: u64) -> Count<'a> {
        observer(Event::Done { done: Bytes(0), total: Bytes(total) });
        Count { observer, done: 0, told: 0, total }
    }

    pub(crate) fn add(&mut self, bytes: u64) {
        self.reach(self.done.saturating_add(bytes));
    }

    /// Sets how many are done; what is fewer than before is not told.
    pub(crate) fn reach(&mut self, done: u64) {
        self.done = done.min(self.total).max(self.done);
        if self.done - self.told >= EVERY || (self.done == self.total && self.told != self.total) {
            self.told = self.done;
            (self.observer)(Event::Done { done: Bytes(self.done), total: Bytes(self.total) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn bytes_done_never_fall_never_pass_the_total_and_end_at_it() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let to = heard.clone();
        let observer = move |event: Event<'_>| {
            if let Event::Done { done, total } = event {
                to.lock().unwrap().push((done.0, total.0));
            }
        };
        let mut count = Count::new(&observer, 20 << 20);
        for done in [1 << 20, 9 << 20, 3 << 20, 19 << 20, 99 << 20, 20 << 20] {
            count.reach(done);
        }
        count.add(5);
        let heard = heard.lock().unwrap();
        assert!(heard.is_sorted() && heard.iter().all(|(done, total)| done <= total), "{heard:?}");
        assert_eq!(heard.last(), Some(&(20 << 20, 20 << 20)));
        assert_eq!(heard.len(), 4, "{heard:?}");
    }
}
