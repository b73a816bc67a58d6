//! What will happen, in order of time; at the same time, in the order in which it was put in.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use vmatrix_model::Time;

/// A queue of things to come. Its length is bounded by what is under way: one entry per open request,
/// timer, step and message.
pub struct Queue<T> {
    order: BinaryHeap<Reverse<(Time, u64)>>,
    things: BTreeMap<u64, T>,
    next: u64,
}

impl<T> Queue<T> {
    pub fn new() -> Queue<T> {
        Queue { order: BinaryHeap::new(), things: BTreeMap::new(), next: 0 }
    }

    pub fn put(&mut self, at: Time, thing: T) {
        self.order.push(Reverse((at, self.next)));
        self.things.insert(self.next, thing);
        self.next += 1;
    }

    /// Takes the earliest.
    pub fn take(&mut self) -> Option<(Time, T)> {
        let Reverse((at, number)) = self.order.pop()?;
        self.things.remove(&number).map(|thing| (at, thing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earlier_comes_first_and_equals_keep_their_order() {
        let mut q = Queue::new();
        for (at, name) in [(5, "c"), (1, "a"), (5, "d"), (3, "b")] {
            q.put(Time(at), name);
        }
        let taken: String = std::iter::from_fn(|| q.take()).map(|(_, name)| name).collect();
        assert_eq!(taken, "abcd");
    }
}
