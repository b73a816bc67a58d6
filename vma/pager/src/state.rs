//! Who waits for which page, and what to fetch next. Pure: no clock, no kernel, no network.
//!
//! ```text
//! fault(page) ─▶ Wake (it is there) │ Zeros (put them) │ Wait ─▶ its pack is wanted
//! next()      ─▶ Ask { pack, class }: misses, then the working set, then the rest, within bounds
//! arrived()   ─▶ which slots go to which pages      filled(page) ─▶ who is woken
//! failed()    ─▶ the same pack is asked for again, later each time
//! missed()    ─▶ what nothing foresaw: pages that were waited for, and that are neither zero nor in the working set
//! ```
//! # Invariants
//! 1. A page that is present is in no list of pages to write.
//! 2. Who waits for a page is told when it is there, and never before.
//! 3. Nothing is fetched ahead while a fault waits for something that is not asked for yet.

use crate::bits::Bits;
use crate::rate::Bucket;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::Duration;
use vmatrix_vma_image::memory::{Map, Of, Pack, Rest};

/// How urgent a pack is, the most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A guest stands still until it is here.
    Miss,
    /// A guest is about to be started, and will want it first.
    Critical,
    /// It will be wanted some time.
    Background,
}

/// What one resume wants of its pages.
#[derive(Debug, Clone)]
pub struct Hydrate {
    /// Fetch the recorded working set ahead of the first fault.
    pub working_set: bool,
    /// Then fetch everything else, so that the guest no longer depends on its sources.
    pub background: bool,
    /// Cap on the rate of the background, megabits a second of stored bytes.
    pub background_mbit: Option<u64>,
    /// Which pack the background begins with, modulo all there are: machines that begin at different ones have
    /// something for each other.
    pub background_from: u32,
    /// Put in nothing but what is asked for, page by page, so that every first touch is seen and recorded.
    pub precise: bool,
    /// Note the pages that are missed. Of a pack that was missed nothing is put in then but what is waited for, for
    /// a neighbour that is there already is touched unseen; the background puts in the rest.
    pub notes: bool,
}

impl Default for Hydrate {
    fn default() -> Hydrate {
        Hydrate {
            working_set: true,
            background: true,
            background_mbit: None,
            background_from: 0,
            precise: false,
            notes: false,
        }
    }
}

/// Most packs asked for by faults at once; a guest has fewer processors.
const MISSES_MAX: usize = 64;
/// Stored bytes of the working set asked for at once: a link of 1 Gbit/s and 20 ms holds 2.5 MB.
const CRITICAL_BYTES: u64 = 4 << 20;
/// Stored bytes of the background asked for at once: a link of 1 Gbit/s and 5 ms holds 0.6 MB, and what is on
/// its way is in the way of a miss.
const BACKGROUND_BYTES: u64 = 1 << 20;
/// Pages round a fault on a zero page that are answered with it: as many as one 64 KiB block has.
const ZERO_RUN: u32 = 16;
/// Before a pack is asked for again: doubled at each failure from the first to the second.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Most first touches that are kept: 1 GiB of guest memory.
pub const RECORDED_MAX: usize = 1 << 18;

/// Most pages that are noted as missed: 16 MiB, more than the whole working set of a usual guest. One that misses more
/// than these reads its memory through, which no list foresees.
pub const MISSED_MAX: usize = 4096;

/// A guest's process, by a number that is never used twice.
pub(crate) type Who = u32;

/// What is to be done about a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The page is there: let it try again.
    Wake,
    /// These pages are zeros: put them in.
    Zeros(Range<u32>),
    /// It will be told by [`State::filled`].
    Wait,
}

/// A pack to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ask {
    pub pack: u32,
    pub class: Class,
}

/// One pack on its way.
#[derive(Debug, Clone, Default)]
struct Flight {
    /// Its pages that are not present.
    left: u16,
    /// Whether it is asked for, by class.
    out: [bool; 3],
    queued: bool,
    failures: u8,
    again_at: Duration,
}

impl Flight {
    fn is_out(&self) -> bool {
        self.out.iter().any(|out| *out)
    }
}

#[derive(Debug)]
struct Wait {
    since: Duration,
    who: Vec<Who>,
}

/// The pages and packs of one memory file.
#[derive(Debug)]
pub(crate) struct State {
    map: Map,
    want: Hydrate,
    present: Bits,
    flights: Vec<Flight>,
    waiting: BTreeMap<u32, Wait>,
    /// Packs that faults wait for, the longest wait first.
    misses: VecDeque<u32>,
    /// Where to look for the next pack of the background.
    cursor: usize,
    /// Whether the background has begun.
    began: bool,
    /// Stored bytes asked for, by class; for a miss: packs.
    out: [u64; 3],
    bucket: Option<Bucket>,
    paused: bool,
    /// Packs with pages that are not present: of the working set, and of all.
    left: (usize, usize),
    touched: Bits,
    order: Vec<u32>,
    /// What nothing foresaw, in the order in which it was first waited for.
    missed: Vec<u32>,
}

impl State {
    /// Of a guest whose map is known (or half of it), and of whose pages these are present.
    pub fn new(map: Map, want: Hydrate, present: Bits) -> State {
        let (touched, bucket) = (Bits::new(map.pages()), want.background_mbit.map(Bucket::new));
        let mut state = State {
            map,
            want,
            present,
            flights: Vec::new(),
            waiting: BTreeMap::new(),
            misses: VecDeque::new(),
            cursor: 0,
            began: false,
            out: [0; 3],
            bucket,
            paused: false,
            left: (0, 0),
            touched,
            order: Vec::new(),
            missed: Vec::new(),
        };
        state.count();
        state
    }

    /// Begins to follow the packs that the map has and this does not.
    fn count(&mut self) {
        for pack in self.map.packs().iter().skip(self.flights.len()) {
            let left = pack.pages().filter(|(_, page)| !self.present.has(*page)).count() as u16;
            let in_set = self.flights.len() < self.map.working_set();
            self.left.0 += usize::from(left > 0 && in_set);
            self.left.1 += usize::from(left > 0);
            self.flights.push(Flight { left, ..Flight::default() });
        }
    }

    /// Takes the rest of the map. Who waited for a page that turns out to be none of its packs' is given back, to be
    /// judged again.
    ///
    /// # Errors
    /// The two tables do not fit together: then this is of no use any more.
    pub fn complete(&mut self, rest: Rest) -> vmatrix_vma_image::Result<Vec<(Who, u32)>> {
        self.map.complete(rest)?;
        self.count();
        let mut again = Vec::new();
        let mut waiting: Vec<(u32, Wait)> = std::mem::take(&mut self.waiting).into_iter().collect();
        // The longest wait first: they are noted in that order.
        waiting.sort_by_key(|(_, wait)| wait.since);
        for (page, wait) in waiting {
            match self.map.of(page) {
                Of::Zero | Of::Unknown => again.extend(wait.who.into_iter().map(|who| (who, page))),
                Of::Pack { pack, .. } => {
                    self.note(page, pack);
                    self.queue(pack);
                    self.waiting.insert(page, wait);
                }
            }
        }
        Ok(again)
    }

    /// A thread of `who` waits for `page` since `now`.
    pub fn fault(&mut self, now: Duration, who: Who, private: bool, page: u32) -> Verdict {
        // One that was there before and was given back is not missed: its guest throws away what it held.
        let first = self.touch(page);
        if self.present.has(page) {
            return Verdict::Wake;
        }
        match self.map.of(page) {
            Of::Zero if private && !self.want.precise => return Verdict::Zeros(self.zeros_round(page)),
            Of::Zero => return Verdict::Zeros(page..page + 1),
            Of::Pack { pack, .. } => {
                if first {
                    self.note(page, pack);
                }
                self.queue(pack);
            }
            Of::Unknown => {}
        }
        let wait = self.waiting.entry(page).or_insert(Wait { since: now, who: Vec::new() });
        if !wait.who.contains(&who) {
            wait.who.push(who);
        }
        Verdict::Wait
    }

    /// Notes that a page was touched; answers whether it is the first time.
    pub fn touch(&mut self, page: u32) -> bool {
        let first = self.touched.insert(page);
        if first && self.order.len() < RECORDED_MAX {
            self.order.push(page);
        }
        first
    }

    /// How many pages were touched, as far as that is noted.
    pub fn recorded_pages(&self) -> usize {
        self.order.len()
    }

    /// Notes that a page was missed, if nothing foresaw it.
    fn note(&mut self, page: u32, pack: u32) {
        if self.notes_more() && pack as usize >= self.map.working_set() {
            self.missed.push(page);
        }
    }

    fn notes_more(&self) -> bool {
        self.want.notes && self.missed.len() < MISSED_MAX
    }

    fn zeros_round(&self, page: u32) -> Range<u32> {
        let block = page - page % ZERO_RUN;
        let zero = |p: &u32| self.map.of(*p) == Of::Zero;
        let start = (block..page).rev().take_while(zero).last().unwrap_or(page);
        let end = (page..block + ZERO_RUN).take_while(zero).last().unwrap_or(page);
        start..end + 1
    }

    fn queue(&mut self, pack: u32) {
        if let Some(flight) = self.flights.get_mut(pack as usize)
            && !flight.queued
            && !flight.out[Class::Miss as usize]
        {
            flight.queued = true;
            self.misses.push_back(pack);
        }
    }

    /// What to fetch next, if anything may be fetched at `now`; it counts as asked for from then on.
    pub fn next(&mut self, now: Duration) -> Option<Ask> {
        let ask = self.next_miss(now).or_else(|| self.next_critical(now)).or_else(|| self.next_background(now))?;
        let cost = self.cost(ask);
        if let Some(flight) = self.flights.get_mut(ask.pack as usize) {
            flight.out[ask.class as usize] = true;
        }
        self.out[ask.class as usize] += cost;
        Some(ask)
    }

    fn cost(&self, ask: Ask) -> u64 {
        match ask.class {
            Class::Miss => 1,
            _ => self.pack(ask.pack).map_or(0, |pack| pack.stored.into()),
        }
    }

    fn next_miss(&mut self, now: Duration) -> Option<Ask> {
        if self.out[Class::Miss as usize] >= MISSES_MAX as u64 {
            return None;
        }
        let pack = loop {
            let ready = |pack: &u32| self.flights.get(*pack as usize).is_some_and(|f| f.again_at <= now);
            let at = self.misses.iter().position(ready)?;
            let pack = self.misses.remove(at)?;
            if let Some(flight) = self.flights.get_mut(pack as usize) {
                flight.queued = false;
            }
            // It may have come meanwhile, asked for in another class, or who waited may be gone.
            if self.is_waited_for(pack) {
                break pack;
            }
        };
        // What lies round a miss is likely to be touched next.
        self.cursor = pack as usize + 1;
        Some(Ask { pack, class: Class::Miss })
    }

    fn next_critical(&self, now: Duration) -> Option<Ask> {
        if !self.want.working_set || self.left.0 == 0 || self.out[Class::Critical as usize] >= CRITICAL_BYTES {
            return None;
        }
        let set = self.flights.iter().take(self.map.working_set());
        let pack = set.enumerate().find(|(_, f)| wanted(f, now)).map(|(i, _)| i as u32)?;
        Some(Ask { pack, class: Class::Critical })
    }

    fn next_background(&mut self, now: Duration) -> Option<Ask> {
        let set_first = self.want.working_set && self.left.0 > 0;
        let full = self.out[Class::Background as usize] >= BACKGROUND_BYTES;
        if !self.want.background || self.paused || full || set_first || self.left.1 == 0 || !self.waiting.is_empty() {
            return None;
        }
        // Half a map has nothing but the working set.
        if !self.map.is_complete() {
            return None;
        }
        let all = self.flights.len();
        if !std::mem::replace(&mut self.began, true) && self.cursor == 0 {
            self.cursor = self.want.background_from as usize % all.max(1);
        }
        let from = if self.cursor < all { self.cursor } else { 0 };
        let mut round = (from..all).chain(0..from);
        let at = round.find(|i| self.flights.get(*i).is_some_and(|f| wanted(f, now)))?;
        let pack = at as u32;
        let stored = self.pack(pack).map_or(0, |p| p.stored.into());
        if self.bucket.as_mut().is_some_and(|bucket| !bucket.take(now, stored)) {
            self.cursor = at;
            return None;
        }
        self.cursor = at + 1;
        Some(Ask { pack, class: Class::Background })
    }

    /// A pack came: the slots whose pages are to be written, in slot order.
    pub fn arrived(&mut self, ask: Ask) -> Vec<(usize, u32)> {
        self.landed(ask);
        if let Some(flight) = self.flights.get_mut(ask.pack as usize) {
            flight.failures = 0;
        }
        let Some(pack) = self.pack(ask.pack) else { return Vec::new() };
        let missed = ask.class == Class::Miss && ask.pack as usize >= self.map.working_set();
        let only_waited = self.want.precise || missed && self.notes_more();
        let put = |page: u32| !self.present.has(page) && (!only_waited || self.waiting.contains_key(&page));
        pack.pages().filter(|(_, page)| put(*page)).collect()
    }

    /// A pack did not come, or could not be written; it is asked for again after a while if it is still wanted.
    pub fn failed(&mut self, now: Duration, ask: Ask) {
        self.landed(ask);
        let Some(flight) = self.flights.get_mut(ask.pack as usize) else { return };
        flight.again_at = now + AGAIN.0.saturating_mul(1 << flight.failures.min(8)).min(AGAIN.1);
        flight.failures = flight.failures.saturating_add(1);
        if self.is_waited_for(ask.pack) {
            self.queue(ask.pack);
        }
    }

    fn landed(&mut self, ask: Ask) {
        let cost = self.cost(ask);
        if let Some(flight) = self.flights.get_mut(ask.pack as usize)
            && std::mem::take(&mut flight.out[ask.class as usize])
        {
            self.out[ask.class as usize] = self.out[ask.class as usize].saturating_sub(cost);
        }
    }

    fn is_waited_for(&self, pack: u32) -> bool {
        let pages = self.pack(pack).into_iter().flat_map(Pack::pages);
        pages.into_iter().any(|(_, page)| self.waiting.contains_key(&page))
    }

    /// A page is in the file now: who waited for it.
    pub fn filled(&mut self, page: u32) -> Vec<Who> {
        if self.present.insert(page) {
            self.pages_left(page, false);
        }
        self.waiting.remove(&page).map_or_else(Vec::new, |wait| wait.who)
    }

    /// A page that was in the file is not any more: whoever gave it back will get it anew.
    pub fn lost(&mut self, page: u32) {
        if self.present.remove(page) {
            self.pages_left(page, true);
        }
    }

    fn pages_left(&mut self, page: u32, more: bool) {
        let Of::Pack { pack, .. } = self.map.of(page) else { return };
        let in_set = (pack as usize) < self.map.working_set();
        let Some(flight) = self.flights.get_mut(pack as usize) else { return };
        if more {
            self.left.0 += usize::from(flight.left == 0 && in_set);
            self.left.1 += usize::from(flight.left == 0);
            flight.left += 1;
        } else {
            flight.left = flight.left.saturating_sub(1);
            self.left.0 -= usize::from(flight.left == 0 && in_set);
            self.left.1 -= usize::from(flight.left == 0);
        }
    }

    /// A process has ended: nobody waits in it.
    pub fn gone(&mut self, who: Who) {
        self.waiting.retain(|_, wait| {
            wait.who.retain(|w| *w != who);
            !wait.who.is_empty()
        });
    }

    /// Stops the background, or lets it go on.
    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    pub fn pack(&self, number: u32) -> Option<&Pack> {
        self.map.packs().get(number as usize)
    }

    /// The page that has been waited for longest, and since when.
    pub fn oldest(&self) -> Option<(u32, Duration)> {
        self.waiting.iter().map(|(page, wait)| (*page, wait.since)).min_by_key(|(_, since)| *since)
    }

    /// The pack of a page, as far as it is known.
    pub fn pack_of(&self, page: u32) -> Option<&Pack> {
        match self.map.of(page) {
            Of::Pack { pack, .. } => self.pack(pack),
            Of::Zero | Of::Unknown => None,
        }
    }

    /// Whether something is to be fetched that is not on its way: then time alone may let it be asked for.
    pub fn is_held_back(&self) -> bool {
        let background = self.want.background && !self.paused && self.left.1 > 0;
        !self.misses.is_empty() || (self.want.working_set && self.left.0 > 0) || background
    }

    /// Whether the working set is here, if it is wanted ahead.
    pub fn has_working_set(&self) -> bool {
        !self.want.working_set || self.left.0 == 0
    }

    /// Whether every page is here that is not zeros.
    pub fn is_whole(&self) -> bool {
        self.map.is_complete() && self.left.1 == 0
    }

    pub fn present(&self) -> u32 {
        self.present.len()
    }

    /// Pages that are waited for.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn pages(&self) -> u32 {
        self.map.pages()
    }

    /// Whether pages of the pack are not there, although it came: a touch of them is to be seen.
    pub fn is_held_apart(&self, pack: u32) -> bool {
        let missed = pack as usize >= self.map.working_set();
        missed && self.notes_more() && self.flights.get(pack as usize).is_some_and(|flight| flight.left > 0)
    }

    /// The pages that nothing foresaw, in the order in which they were first waited for: neither zero nor in the
    /// working set, and not there when they were touched. At most [`MISSED_MAX`].
    pub fn missed(&self) -> &[u32] {
        &self.missed
    }

    /// Pages in the order in which they were first touched; those that came ahead of the first touch are not in it.
    pub fn recorded(&self) -> &[u32] {
        &self.order
    }
}

/// Whether a pack may be asked for ahead of a fault.
fn wanted(flight: &Flight, now: Duration) -> bool {
    flight.left > 0 && !flight.is_out() && flight.again_at <= now
}

#[cfg(test)]
mod tests;
