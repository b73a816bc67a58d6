//! Tables of pages as bytes: variable-length numbers, page numbers as runs.
//!
//! ```text
//! First: zero runs { gap, length }…, then packs        Rest: packs
//! pack:  digest, stored, { kind, first, length }…      until the slots are full
//! ```
//! A reader allocates for what it has read, never for what it is told will come.

use super::{First, PACK_PAGES_MAX, PAGE, Pack, Rest, bad};
use crate::chunks::STORED_MORE;
use crate::error::Result;
use std::ops::Range;
use vmatrix_model::Digest;

impl First {
    /// The table as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        number(&mut out, self.zero.len() as u64);
        let mut at = 0;
        for run in &self.zero {
            number(&mut out, u64::from(run.start - at));
            number(&mut out, u64::from(run.end - run.start));
            at = run.end;
        }
        packs(&mut out, &self.packs);
        out
    }

    /// Reads the table of a guest of so many pages.
    ///
    /// # Errors
    /// [`crate::Error::BadTable`]: it is cut short, or says what cannot be.
    pub fn decode(plain: &[u8], pages: u32) -> Result<First> {
        let mut input = Input { rest: plain };
        let mut zero = Vec::new();
        let mut at = 0u32;
        for _ in 0..input.count(pages)? {
            let start = at.checked_add(input.number32()?);
            let end = start.and_then(|s| s.checked_add(input.number32().ok()?));
            let (Some(start), Some(end)) = (start, end) else { return Err(bad("a run of zeros is cut short".into())) };
            if start == end || end > pages {
                return Err(bad(format!("zeros from page {start} to {end} of {pages}")));
            }
            zero.push(Range { start, end });
            at = end;
        }
        Ok(First { zero, packs: input.packs(pages)? })
    }
}

impl Rest {
    /// The table as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        packs(&mut out, &self.packs);
        out
    }

    /// Reads the table of a guest of so many pages.
    ///
    /// # Errors
    /// [`crate::Error::BadTable`]: it is cut short, or says what cannot be.
    pub fn decode(plain: &[u8], pages: u32) -> Result<Rest> {
        Ok(Rest { packs: Input { rest: plain }.packs(pages)? })
    }
}

/// Seven bits a byte, the low ones first.
fn number(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn packs(out: &mut Vec<u8>, packs: &[Pack]) {
    number(out, packs.len() as u64);
    for pack in packs {
        out.extend(pack.digest.0);
        number(out, pack.stored.into());
        number(out, pack.slots.len() as u64);
        let mut slot = 0;
        while let Some(first) = pack.slots.get(slot) {
            let run =
                1 + pack.slots.iter().skip(slot + 1).zip(1u32..).take_while(|(s, i)| follows(first, s, *i)).count();
            number(out, first.map_or(0, |page| u64::from(page) + 1));
            number(out, run as u64);
            slot += run;
        }
    }
}

/// Whether slot `i` after `first` goes on with what it began.
fn follows(first: &Option<u32>, slot: &Option<u32>, i: u32) -> bool {
    match (first, slot) {
        (Some(first), Some(page)) => first.checked_add(i) == Some(*page),
        (None, None) => true,
        _ => false,
    }
}

struct Input<'a> {
    rest: &'a [u8],
}

impl Input<'_> {
    fn number(&mut self) -> Result<u64> {
        let mut n = 0;
        for shift in (0..63).step_by(7) {
            let (byte, rest) = self.rest.split_first().ok_or_else(|| bad("it is cut short".into()))?;
            self.rest = rest;
            n |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(n);
            }
        }
        Err(bad("a number has more than 63 bits".into()))
    }

    fn number32(&mut self) -> Result<u32> {
        let n = self.number()?;
        u32::try_from(n).map_err(|_| bad(format!("{n} is no number of pages")))
    }

    /// A count of things of which there is at most one a page.
    fn count(&mut self, pages: u32) -> Result<u32> {
        let n = self.number32()?;
        if n > pages { Err(bad(format!("{n} entries for {pages} pages"))) } else { Ok(n) }
    }

    fn packs(&mut self, pages: u32) -> Result<Vec<Pack>> {
        let mut packs = Vec::new();
        for _ in 0..self.count(pages)? {
            let (digest, rest) = self.rest.split_first_chunk::<32>().ok_or_else(|| bad("it is cut short".into()))?;
            self.rest = rest;
            let stored = self.number32()?;
            let length = self.number32()? as usize;
            if !(1..=PACK_PAGES_MAX).contains(&length) {
                return Err(bad(format!("a pack of {length} pages")));
            }
            if stored == 0 || u64::from(stored) > length as u64 * PAGE + STORED_MORE as u64 {
                return Err(bad(format!("a pack of {length} pages in {stored} bytes")));
            }
            packs.push(Pack { digest: Digest(*digest), stored, slots: self.slots(length, pages)? });
        }
        if self.rest.is_empty() { Ok(packs) } else { Err(bad(format!("{} bytes follow its end", self.rest.len()))) }
    }

    fn slots(&mut self, length: usize, pages: u32) -> Result<Vec<Option<u32>>> {
        let mut slots = Vec::with_capacity(length);
        while slots.len() < length {
            let first = self.number32()?;
            let run = self.number32()?;
            if run == 0 || run as usize > length - slots.len() {
                return Err(bad(format!("a run of {run} slots in a pack of {length}")));
            }
            let past = |first: u32| first.checked_add(run).is_none_or(|end| end > pages);
            match first.checked_sub(1) {
                Some(first) if past(first) => return Err(bad(format!("pages from {first} on are past the end"))),
                Some(first) => slots.extend((first..first + run).map(Some)),
                None => slots.extend((0..run).map(|_| None)),
            }
        }
        Ok(slots)
    }
}
