//! What a server has to send on one connection, and which frame of it is next.
//!
//! ```text
//!   asked ─▶ Waiting ─take_loads─▶ Loading ─loaded─▶ Ready ─next_frame, again and again─▶ gone
//!              │ asked again, more urgent: moves ahead     │ cancelled: Reset
//!              └─ cancelled: gone                          └─ another class may come between any two frames
//! ```
//! Pure: bytes are read by whoever calls. Items are sent by class, within a class strictly in the order they were
//! asked, so what stands behind a push is read behind it; a chunk that is asked for again while it is here is
//! sent once.
//!
//! # Invariants
//! 1. A frame is never of a class while one of a more urgent class is ready.
//! 2. At most [`READ_AHEAD`] items of a class hold their bytes.

use crate::Class;
use crate::frame::{Answer, DATA_MAX, What};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use vmatrix_model::Digest;

/// Items of a class that are read before their turn, so that the wire does not wait for the disk.
pub const READ_AHEAD: usize = 4;
/// Small answers that wait to be sent; a peer that asks for more without reading is dropped.
const CONTROL_MAX: usize = 4096;

/// A number for an item, of this connection.
pub type Item = u32;

/// What stands in for a chunk: bytes are here, or the digest to read them by.
#[derive(Debug, Clone)]
pub enum Load {
    Chunk(Digest),
    Bytes(Arc<Vec<u8>>),
}

#[derive(Debug)]
enum State {
    Waiting(Load),
    Loading,
    Ready { bytes: Arc<Vec<u8>>, sent: usize, begun: bool },
}

#[derive(Debug)]
struct Entry {
    what: What,
    class: Class,
    state: State,
}

/// All that is to be sent on a connection.
#[derive(Debug, Default)]
pub struct Outbox {
    control: VecDeque<Vec<u8>>,
    /// Bytes of nothing that were asked for: sent when nothing else is.
    pad: u32,
    items: HashMap<Item, Entry>,
    queues: [VecDeque<Item>; 3],
    chunks: HashMap<Digest, Item>,
    last: Item,
}

/// A frame to send.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    pub class: Class,
    /// Length, kind, body.
    pub bytes: Vec<u8>,
    /// The chunk whose last bytes these are.
    pub ends: Option<Digest>,
}

/// The peer does not read what it asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Overrun;

impl Outbox {
    /// Items that wait or are under way.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Puts a small answer ahead of everything.
    ///
    /// # Errors
    /// More of them wait than a peer that reads would leave.
    pub fn answer(&mut self, answer: &Answer<'_>) -> Result<(), Overrun> {
        if self.control.len() >= CONTROL_MAX {
            return Err(Overrun);
        }
        self.control.push_back(answer.encode());
        Ok(())
    }

    /// Asks for `bytes` of nothing, at most `max` in all.
    pub fn pad(&mut self, bytes: u32, max: u32) {
        self.pad = self.pad.saturating_add(bytes).min(max);
    }

    /// Adds what is to be sent. A chunk that is here already moves to the more urgent of both classes.
    pub fn add(&mut self, what: What, class: Class, load: Load) {
        if let What::Chunk { digest } = what
            && let Some(item) = self.chunks.get(&digest).copied()
        {
            self.raise(item, class);
            return;
        }
        let item = self.last.wrapping_add(1);
        self.last = item;
        if let What::Chunk { digest } = what {
            self.chunks.insert(digest, item);
        }
        self.items.insert(item, Entry { what, class, state: State::Waiting(load) });
        self.queue(class).push_back(item);
    }

    /// Whether a chunk is among what is to be sent.
    pub fn has(&self, digest: &Digest) -> bool {
        self.chunks.contains_key(digest)
    }

    /// The chunk need not be sent, or not to its end. True if it had not been sent whole.
    pub fn cancel(&mut self, digest: &Digest) -> bool {
        let Some(item) = self.chunks.get(digest).copied() else { return false };
        if let Some(Entry { state: State::Ready { begun: true, .. }, .. }) = self.remove(item) {
            self.control.push_back(Answer::Reset { stream: item }.encode());
        }
        true
    }

    /// What is to be read now; each is given once.
    pub fn take_loads(&mut self) -> Vec<(Item, Load)> {
        let mut loads = Vec::new();
        for queue in &self.queues {
            for item in queue.iter().take(READ_AHEAD) {
                if let Some(entry) = self.items.get_mut(item)
                    && let State::Waiting(_) = entry.state
                    && let State::Waiting(load) = std::mem::replace(&mut entry.state, State::Loading)
                {
                    loads.push((*item, load));
                }
            }
        }
        loads
    }

    /// An item's bytes; `None`: they are not here, which for a chunk is said to the peer.
    pub fn loaded(&mut self, item: Item, bytes: Option<Arc<Vec<u8>>>) -> Option<What> {
        match bytes.filter(|b| u32::try_from(b.len()).is_ok()) {
            Some(bytes) => {
                // It may have been cancelled meanwhile.
                if let Some(entry) = self.items.get_mut(&item) {
                    entry.state = State::Ready { bytes, sent: 0, begun: false };
                }
                None
            }
            None => {
                let what = self.remove(item)?.what;
                if let What::Chunk { digest } = what {
                    self.control.push_back(Answer::Missing { digest }.encode());
                }
                Some(what)
            }
        }
    }

    /// The class of the next frame, if there is one.
    pub fn next_class(&self) -> Option<Class> {
        if !self.control.is_empty() {
            return Some(Class::Miss);
        }
        Class::ALL
            .into_iter()
            .find(|class| self.ready(*class).is_some())
            .or((self.pad > 0).then_some(Class::Background))
    }

    /// Takes the next frame.
    pub fn next_frame(&mut self) -> Option<Frame> {
        if let Some(bytes) = self.control.pop_front() {
            return Some(Frame { class: Class::Miss, bytes, ends: None });
        }
        let Some(item) = Class::ALL.into_iter().find_map(|class| self.ready(class)) else { return self.next_pad() };
        let entry = self.items.get_mut(&item)?;
        let class = entry.class;
        let State::Ready { bytes, sent, begun } = &mut entry.state else { return None };
        let mut frame = Vec::new();
        if !*begun {
            *begun = true;
            let length = u32::try_from(bytes.len()).ok()?;
            frame = Answer::Begin { stream: item, what: entry.what, length }.encode();
        }
        // Both in one TLS record: what begins takes its head's room from the data.
        let room = DATA_MAX - frame.len();
        let end = bytes.len().min(*sent + room);
        let data = bytes.get(*sent..end).unwrap_or_default();
        if !data.is_empty() {
            frame.extend_from_slice(&Answer::Data { stream: item, bytes: data }.encode());
        }
        *sent = end;
        let whole = end == bytes.len();
        let mut ends = None;
        if whole && let Some(Entry { what: What::Chunk { digest }, .. }) = self.remove(item) {
            ends = Some(digest);
        }
        Some(Frame { class, bytes: frame, ends })
    }

    fn next_pad(&mut self) -> Option<Frame> {
        let length = self.pad.min(DATA_MAX as u32);
        self.pad -= length;
        (length > 0).then(|| Frame {
            class: Class::Background,
            bytes: Answer::Pad { bytes: &vec![0; length as usize] }.encode(),
            ends: None,
        })
    }

    /// Chunks that are not sent yet, when the connection ends.
    pub fn unsent(&self) -> impl Iterator<Item = &Digest> {
        self.chunks.keys()
    }

    fn ready(&self, class: Class) -> Option<Item> {
        let first = self.queues.get(class.index())?.front()?;
        let entry = self.items.get(first)?;
        matches!(entry.state, State::Ready { .. }).then_some(*first)
    }

    fn raise(&mut self, item: Item, class: Class) {
        let Some(entry) = self.items.get_mut(&item).filter(|e| class < e.class) else { return };
        let before = std::mem::replace(&mut entry.class, class);
        self.unqueue(before, item);
        self.queue(class).push_back(item);
    }

    fn remove(&mut self, item: Item) -> Option<Entry> {
        let entry = self.items.remove(&item)?;
        self.unqueue(entry.class, item);
        if let What::Chunk { digest } = entry.what {
            self.chunks.remove(&digest);
        }
        Some(entry)
    }

    /// What leaves a queue is nearly always at its front.
    fn unqueue(&mut self, class: Class, item: Item) {
        let queue = self.queue(class);
        if let Some(place) = queue.iter().position(|i| *i == item) {
            queue.remove(place);
        }
    }

    fn queue(&mut self, class: Class) -> &mut VecDeque<Item> {
        let [miss, critical, background] = &mut self.queues;
        match class {
            Class::Miss => miss,
            Class::Critical => critical,
            Class::Background => background,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest(n: u32) -> Digest {
        Digest::of(&n.to_be_bytes())
    }

    fn chunk(n: u32) -> What {
        What::Chunk { digest: digest(n) }
    }

    fn add(outbox: &mut Outbox, n: u32, class: Class) {
        outbox.add(chunk(n), class, Load::Chunk(digest(n)));
    }

    /// Every chunk is `length` bytes of the first byte of its name.
    fn load(outbox: &mut Outbox, length: usize) {
        for (item, load) in outbox.take_loads() {
            let Load::Chunk(digest) = load else { continue };
            outbox.loaded(item, Some(Arc::new(vec![digest.0[0]; length])));
        }
    }

    /// Sends everything; chunks in the order they end, and their bytes.
    fn drain(outbox: &mut Outbox, length: usize) -> Vec<Digest> {
        let mut ends = Vec::new();
        loop {
            load(outbox, length);
            let Some(frame) = outbox.next_frame() else { return ends };
            assert!(frame.bytes.len() <= 16_384, "more than a TLS record");
            ends.extend(frame.ends);
        }
    }

    #[test]
    fn a_miss_waits_for_no_more_than_the_frame_under_way() {
        let mut outbox = Outbox::default();
        (0..1000).for_each(|n| add(&mut outbox, n, Class::Background));
        load(&mut outbox, 300_000);
        (0..7).for_each(|_| drop(outbox.next_frame()));
        add(&mut outbox, 5000, Class::Miss);
        load(&mut outbox, 20_000);
        let mut bytes_before = 0;
        loop {
            let frame = outbox.next_frame().unwrap();
            if frame.class == Class::Miss {
                break;
            }
            bytes_before += frame.bytes.len();
        }
        assert_eq!(bytes_before, 0, "bytes of the background went ahead");
        assert_eq!(outbox.next_frame().unwrap().ends, Some(digest(5000)));
    }

    #[test]
    fn a_pushed_chunk_that_is_missed_moves_ahead_and_is_sent_once() {
        let mut outbox = Outbox::default();
        (0..50).for_each(|n| add(&mut outbox, n, Class::Critical));
        add(&mut outbox, 40, Class::Miss);
        add(&mut outbox, 40, Class::Background);
        let ends = drain(&mut outbox, 1000);
        assert_eq!(ends[0], digest(40));
        assert_eq!(ends.len(), 50);
        assert_eq!(outbox.len(), 0);
    }

    #[test]
    fn what_is_cancelled_is_not_sent_and_one_begun_is_reset() {
        let mut outbox = Outbox::default();
        add(&mut outbox, 1, Class::Background);
        add(&mut outbox, 2, Class::Background);
        load(&mut outbox, 40_000);
        outbox.next_frame();
        assert!(outbox.cancel(&digest(1)) && outbox.cancel(&digest(2)) && !outbox.cancel(&digest(3)));
        let reset = outbox.next_frame().unwrap().bytes;
        assert_eq!(Answer::decode(&reset[4..]), Ok(Answer::Reset { stream: 1 }));
        assert!(outbox.next_frame().is_none());
    }

    #[test]
    fn a_chunk_that_is_not_here_is_said_to_be_missing() {
        let mut outbox = Outbox::default();
        add(&mut outbox, 1, Class::Miss);
        let (item, _) = outbox.take_loads().remove(0);
        outbox.loaded(item, None);
        let missing = outbox.next_frame().unwrap().bytes;
        assert_eq!(Answer::decode(&missing[4..]), Ok(Answer::Missing { digest: digest(1) }));
    }

    #[test]
    fn a_peer_that_does_not_read_its_answers_is_noticed() {
        let mut outbox = Outbox::default();
        let pong = Answer::Pong { token: 1 };
        (0..CONTROL_MAX).for_each(|_| outbox.answer(&pong).unwrap());
        assert_eq!(outbox.answer(&pong), Err(Overrun));
    }

    #[test]
    fn nothing_is_sent_only_where_nothing_else_is_to_be_sent() {
        let mut outbox = Outbox::default();
        outbox.pad(1 << 30, 40_000);
        add(&mut outbox, 1, Class::Background);
        load(&mut outbox, 100);
        assert_eq!(outbox.next_frame().unwrap().ends, Some(digest(1)));
        let mut pad = 0;
        while let Some(frame) = outbox.next_frame() {
            pad += frame.bytes.len() - 5;
        }
        assert_eq!(pad, 40_000);
    }

    proptest! {
        #[test]
        fn all_that_is_asked_is_sent_whole_and_once_by_class(
            asks in prop::collection::vec((0u32..40, 0usize..3), 1..80), length in 0usize..50_000,
        ) {
            let mut outbox = Outbox::default();
            let mut most_urgent = std::collections::BTreeMap::new();
            for (n, class) in asks {
                let class = Class::ALL[class];
                add(&mut outbox, n, class);
                let known = most_urgent.entry(digest(n)).or_insert(class);
                *known = class.min(*known);
            }
            let ends = drain(&mut outbox, length);
            prop_assert_eq!(ends.len(), most_urgent.len());
            let classes: Vec<Class> = ends.iter().map(|d| most_urgent[d]).collect();
            prop_assert!(classes.is_sorted(), "{:?}", classes);
            prop_assert_eq!(outbox.chunks.len() + outbox.queues.iter().map(VecDeque::len).sum::<usize>(), 0);
        }
    }
}
