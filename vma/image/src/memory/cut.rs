//! A memory file ─▶ packs in the store, and the two tables.
//!
//! ```text
//! pages ─▶ zero │ as the parent has them │ touched first ─▶ packs of 32, in order │ other ─▶ packs by address
//! ```

use super::{First, Map, Of, PAGE, Pack, Rest};
use crate::chunks::{Cutter, is_zero};
use crate::error::{Error, Result, io};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use vmatrix_model::Bytes;
use vmatrix_model::manifest::{Memory, WorkingSet};

/// Pages of a working-set pack: 128 KiB, some 50 KiB stored. Smaller ones compress worse, larger ones are
/// verified later.
pub const WORKING_SET_PAGES: usize = 32;
/// Pages of an aligned block whose pages that are not zero make one pack of the rest: a miss waits for one.
pub const REST_PAGES: u32 = 16;

/// What a snapshot is made from.
pub struct Parent<'a> {
    /// Where the parent has its pages; complete.
    pub map: &'a Map,
    /// Whether a page is as the parent has it. What this says of a page that is not in the file yet, and so was
    /// never written, must be true.
    pub unchanged: &'a (dyn Fn(u32) -> bool + Sync),
}

/// Cuts a guest's memory into packs, those of the pages in `order` of first touch first, and puts them into the
/// cutter's store with the tables that list them. `requests` is what the guest answered while that order was
/// recorded.
///
/// # Errors
/// The file cannot be read, or the store is full.
pub fn cut(cutter: &Cutter, file: &Path, order: &[u32], requests: u32, parent: Option<&Parent>) -> Result<Memory> {
    let source = File::open(file).map_err(io("open", file))?;
    let size = source.metadata().map_err(io("look at", file))?.len();
    let pages = u32::try_from(size / PAGE).map_err(|_| super::bad(format!("{size} bytes are too many")))?;
    let read = |page: u32, to: &mut [u8]| source.read_exact_at(to, u64::from(page) * PAGE).map_err(io("read", file));

    let kinds = kinds(&source, file, pages, order, parent, &read)?;
    let plan = Plan::new(&kinds, order, parent);
    let made = put(cutter, &plan.new, &read)?;
    let kept =
        |number: &u32| parent.and_then(|p| p.map.packs().get(*number as usize)).map(|p| keep(p, *number, &kinds));
    let (mut first, mut rest) = (First { zero: zero_runs(&kinds), packs: Vec::new() }, Rest::default());
    first.packs.extend(plan.kept_first.iter().filter_map(kept));
    let (working_set, others) = made.split_at(plan.working_set.min(made.len()));
    first.packs.extend(working_set.iter().cloned());
    rest.packs.extend(plan.kept_rest.iter().filter_map(kept));
    rest.packs.extend(others.iter().cloned());

    let stored = |packs: &[Pack]| packs.iter().map(|p| Bytes(p.stored.into())).sum::<Bytes>();
    let recorded = WorkingSet {
        pages: first.packs.iter().map(|p| p.pages().count() as u64).sum(),
        stored: stored(&first.packs),
        requests,
    };
    Ok(Memory {
        size: Bytes(size),
        zero_pages: kinds.iter().filter(|k| **k == Kind::Zero).count() as u64,
        parent_pages: kinds.iter().filter(|k| matches!(k, Kind::Parent(_))).count() as u64,
        first: cutter.blob(&first.encode(), false)?,
        rest: cutter.blob(&rest.encode(), false)?,
        working_set: recorded,
        stored: stored(&first.packs) + stored(&rest.packs),
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    /// In that pack of the parent.
    Parent(u32),
    Own,
}

type Read<'a> = dyn Fn(u32, &mut [u8]) -> Result<()> + Sync + 'a;

fn kinds(
    source: &File,
    file: &Path,
    pages: u32,
    order: &[u32],
    parent: Option<&Parent>,
    read: &Read,
) -> Result<Vec<Kind>> {
    // A page of the working set that the parent has among its rest is packed anew: it would bring its neighbours.
    let early = marked(pages as usize, order.iter().copied());
    let parents_working_set = parent.map_or(0, |p| p.map.working_set() as u32);
    let mut kinds: Vec<Option<Kind>> = (0..pages)
        .map(|page| {
            let parent = parent.filter(|p| (p.unchanged)(page))?;
            match parent.map.of(page) {
                Of::Zero => Some(Kind::Zero),
                Of::Pack { pack, .. } => Some(Kind::Parent(pack)),
                Of::Unknown => None,
            }
        })
        .collect();
    let mut bytes = vec![0; PAGE as usize];
    for run in data(source, pages).map_err(|e| io("look through", file)(e.into()))? {
        for page in run {
            let Some(kind) = kinds.get_mut(page as usize) else { continue };
            let anew = matches!(kind, Some(Kind::Parent(pack)) if *pack >= parents_working_set);
            if kind.is_none() || anew && has(&early, page) {
                read(page, &mut bytes)?;
                *kind = Some(if is_zero(&bytes) { Kind::Zero } else { Kind::Own });
            }
        }
    }
    // A hole is zeros.
    Ok(kinds.into_iter().map(|k| k.unwrap_or(Kind::Zero)).collect())
}

/// Runs of pages that the file has bytes for.
fn data(file: &File, pages: u32) -> std::result::Result<Vec<Range<u32>>, Errno> {
    let mut runs = Vec::new();
    let mut at = 0;
    let page = |offset: i64| u32::try_from(offset / PAGE as i64).unwrap_or(u32::MAX).min(pages);
    loop {
        let start = match lseek(file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(runs),
            Err(e) => return Err(e),
        };
        let end = lseek(file, start, Whence::SeekHole)?;
        if page(start) >= pages {
            return Ok(runs);
        }
        runs.push(page(start)..page(end + PAGE as i64 - 1));
        at = end;
    }
}

/// Which packs there will be.
struct Plan {
    /// Packs of the parent with pages of the working set.
    kept_first: Vec<u32>,
    /// Packs of the parent with other pages.
    kept_rest: Vec<u32>,
    /// Pages of each new pack; those of the working set come first.
    new: Vec<Vec<u32>>,
    working_set: usize,
}

impl Plan {
    fn new(kinds: &[Kind], order: &[u32], parent: Option<&Parent>) -> Plan {
        let parents_working_set = parent.map_or(0, |p| p.map.working_set() as u32);
        let mut seen = vec![false; kinds.len()];
        let (mut kept_first, mut first) = (Vec::new(), Vec::new());
        // Packs of the parent that are kept, and are in one of the lists.
        let mut kept = vec![false; parent.map_or(0, |p| p.map.packs().len())];
        for page in order.iter().copied().filter(|p| mark(&mut seen, *p)) {
            match kinds.get(page as usize) {
                Some(Kind::Own) => first.push(page),
                Some(Kind::Parent(pack)) if *pack < parents_working_set && mark(&mut kept, *pack) => {
                    kept_first.push(*pack)
                }
                // Zero, or not in the file yet: it waits where the parent has it.
                _ => {}
            }
        }
        let early = marked(kinds.len(), first.iter().copied());
        let mut new: Vec<Vec<u32>> = first.chunks(WORKING_SET_PAGES).map(<[u32]>::to_vec).collect();
        let working_set = new.len();
        let mut blocks: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        let mut kept_rest = Vec::new();
        for (page, kind) in (0u32..).zip(kinds) {
            match kind {
                Kind::Own if !has(&early, page) => blocks.entry(page / REST_PAGES).or_default().push(page),
                Kind::Parent(pack) if mark(&mut kept, *pack) => kept_rest.push(*pack),
                _ => {}
            }
        }
        new.extend(blocks.into_values());
        kept_rest.sort_unstable();
        Plan { kept_first, kept_rest, new, working_set }
    }
}

/// Marks by number, of as many as there are: all of a guest's pages are looked through while it stands still.
fn marked(count: usize, numbers: impl Iterator<Item = u32>) -> Vec<bool> {
    let mut marks = vec![false; count];
    for number in numbers {
        mark(&mut marks, number);
    }
    marks
}

/// Sets a mark; answers whether it was not set. One past the end is none.
fn mark(marks: &mut [bool], number: u32) -> bool {
    marks.get_mut(number as usize).is_some_and(|mark| !std::mem::replace(mark, true))
}

fn has(marks: &[bool], number: u32) -> bool {
    marks.get(number as usize).copied().unwrap_or(false)
}

/// A pack of the parent, with the slots that still count.
fn keep(pack: &Pack, number: u32, kinds: &[Kind]) -> Pack {
    let counts = |page: u32| kinds.get(page as usize) == Some(&Kind::Parent(number));
    Pack { slots: pack.slots.iter().map(|s| s.filter(|p| counts(*p))).collect(), ..pack.clone() }
}

fn zero_runs(kinds: &[Kind]) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for (page, _) in (0u32..).zip(kinds).filter(|(_, k)| **k == Kind::Zero) {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

/// Compresses and puts the new packs, on every processor.
fn put(cutter: &Cutter, packs: &[Vec<u32>], read: &Read) -> Result<Vec<Pack>> {
    let next = AtomicUsize::new(0);
    let made: Mutex<(Vec<Option<Pack>>, Option<Error>)> = Mutex::new((vec![None; packs.len()], None));
    let lock = || made.lock().unwrap_or_else(PoisonError::into_inner);
    let one = |pages: &[u32]| -> Result<Pack> {
        let mut plain = vec![0; pages.len() * PAGE as usize];
        for (page, to) in pages.iter().zip(plain.chunks_mut(PAGE as usize)) {
            read(*page, to)?;
        }
        let need = cutter.put(&plain, true)?;
        let stored = u32::try_from(need.stored).map_err(|_| super::bad("a pack is too large".to_owned()))?;
        Ok(Pack { digest: need.digest, stored, slots: pages.iter().copied().map(Some).collect() })
    };
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(pages) = packs.get(index) else { return };
            match one(pages) {
                Ok(pack) => {
                    if let Some(slot) = lock().0.get_mut(index) {
                        *slot = Some(pack);
                    }
                }
                Err(e) => {
                    lock().1 = Some(e);
                    // Nobody goes on with what is lost.
                    next.store(packs.len(), Ordering::Relaxed);
                    return;
                }
            }
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
    match made.into_inner().unwrap_or_else(PoisonError::into_inner) {
        (_, Some(error)) => Err(error),
        (packs, None) => Ok(packs.into_iter().flatten().collect()),
    }
}
