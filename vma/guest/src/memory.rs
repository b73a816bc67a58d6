//! Free memory, lent to the host before the suspend and taken back as zeros; and what each page is in use for.
//!
//! ```text
//! free blocks of 2 MiB ─huge page pool─▶ nobody's, and they stay so ─▶ the host makes them zeros ─▶ given back
//! free pieces between ─▶ taken, hence cleared, and given back
//! ```
//! A page that was freed holds what was in it. In the kernel's pool of huge pages it cannot come into use while
//! the host empties it, and pages that were never touched are not touched now.

use std::fs;
use std::hint::black_box;
use std::sync::{Mutex, PoisonError};

const HUGE_KIB: u64 = 2048;
/// Pages of a huge page.
const HUGE_PAGES: u64 = 512;
/// Order of a huge page among free blocks: 2 MiB are 2⁹ pages.
const HUGE_ORDER: u32 = 9;
/// Blocks that are left where they are, and cleared with the pieces: some cannot be had (they are kept for devices),
/// and asking for one too many has the kernel drop its page cache.
const LEFT: u64 = 4;
const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Free memory that stays free besides what the kernel keeps for itself, KiB; without it, it would drop the page
/// cache.
const SPARE_KIB: u64 = 1024;
/// What the kernel keeps free for itself would keep its old bytes, and be given out first after the resume. So it
/// keeps next to nothing while memory is lent: each setting with its smallest effect.
const LOWERED: [(&str, &str); 3] = [
    ("/proc/sys/vm/min_free_kbytes", "128"),
    ("/proc/sys/vm/watermark_scale_factor", "1"),
    ("/proc/sys/vm/lowmem_reserve_ratio", "1000000 1000000 1000000 1000000"),
];
/// What they were before, while memory is lent.
static BEFORE: Mutex<Vec<(&str, String)>> = Mutex::new(Vec::new());

/// A run of pages: the first one's frame number, and how many.
pub type Run = (u64, u64);

/// Moves all free blocks of 2 MiB into the pool and tells where they are. What was written is on its disk before: the
/// suspend follows.
pub fn lend() -> Result<Vec<Run>, String> {
    nix::unistd::sync();
    lower()?;
    let text = read("/proc/buddyinfo")?;
    let keep = reserved_kib(&read("/proc/zoneinfo")?) + SPARE_KIB;
    let most = free_kib()?.saturating_sub(keep) / HUGE_KIB;
    let blocks = free_blocks(&text).saturating_sub(LEFT).min(most);
    write(POOL, blocks)?;
    clear_pieces(keep)?;
    let mut runs: Vec<Run> = Vec::new();
    flags(|frame, flags| {
        if flags & HUGE != 0 {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == frame => *count += 1,
                _ => runs.push((frame, 1)),
            }
        }
    })?;
    let huge: u64 = runs.iter().map(|r| r.1).sum();
    if huge != number(POOL)? * HUGE_PAGES {
        return Err(format!("{huge} pages are huge, the pool has {} blocks", number(POOL)?));
    }
    Ok(runs)
}

/// Gives the pool back to whoever needs memory.
pub fn take_back() -> Result<(), String> {
    write(POOL, 0)?;
    let before = std::mem::take(&mut *BEFORE.lock().unwrap_or_else(PoisonError::into_inner));
    before.into_iter().try_for_each(|(path, text)| fs::write(path, text).map_err(|e| format!("{path}: {e}")))
}

fn lower() -> Result<(), String> {
    let mut before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    for (path, lowest) in LOWERED {
        // One that is lowered already was so by a host that did not come back.
        if !before.iter().any(|(known, _)| *known == path) {
            before.push((path, read(path)?));
        }
        fs::write(path, lowest).map_err(|e| format!("{path}: {e}"))?;
    }
    Ok(())
}

/// Takes what is free in smaller pieces, down to `keep` KiB: the kernel clears what it gives to a program.
fn clear_pieces(keep: u64) -> Result<(), String> {
    let bytes = usize::try_from(free_kib()?.saturating_sub(keep) * 1024).map_err(|e| e.to_string())?;
    let mut pieces = vec![0u8; bytes];
    for byte in pieces.iter_mut().step_by(4096) {
        // Only a page that is written is really given.
        *black_box(byte) = 0;
    }
    Ok(())
}

/// Free blocks of 2 MiB, by the kernel's count of free blocks of each order.
fn free_blocks(buddyinfo: &str) -> u64 {
    let zone = |line: &str| -> u64 {
        // Node 0, zone Normal, then one count per order.
        let counts = line.split_whitespace().skip(4).filter_map(|word| word.parse::<u64>().ok());
        (0u32..).zip(counts).filter(|(o, _)| *o >= HUGE_ORDER).map(|(o, n)| n << (o - HUGE_ORDER)).sum()
    };
    buddyinfo.lines().map(zone).sum()
}

/// Free memory that programs do not get: in each zone what the kernel never goes below, and what it saves for those
/// that can use no other zone.
fn reserved_kib(zoneinfo: &str) -> u64 {
    let pages = |line: &str| -> u64 {
        let mut words = line.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty());
        match words.next() {
            // With a colon it is of one processor's list.
            Some("high") if !line.contains(':') => words.next().and_then(|w| w.parse().ok()).unwrap_or(0),
            Some("protection") => words.filter_map(|w| w.parse().ok()).max().unwrap_or(0),
            _ => 0,
        }
    };
    zoneinfo.lines().map(pages).sum::<u64>() * 4
}

fn free_kib() -> Result<u64, String> {
    let text = read("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemFree:"));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| "/proc/meminfo has no MemFree".to_owned())
}

const HUGE: u64 = 1 << 17;

/// What a page is in use for, in the order they are asked for; by bits of /proc/kpageflags.
const KINDS: [(&str, u64); 9] = [
    ("absent", 1 << 20),
    ("free", 1 << 10),
    ("huge", HUGE),
    ("slab", 1 << 7),
    ("page-table", 1 << 26),
    ("program", 1 << 12),
    ("tmpfs", 1 << 14),
    ("file", 1 << 5 | 1 << 11),
    ("reserved", 1 << 32),
];
/// Allocated by the kernel without a mark: stacks, modules, the page table of the pages themselves.
const KERNEL: &str = "kernel";

/// Every page's kind, as runs in order from frame 0.
pub fn kinds() -> Result<Vec<(&'static str, u64)>, String> {
    let mut runs: Vec<(&'static str, u64)> = Vec::new();
    flags(|_, flags| {
        let kind = kind(flags);
        match runs.last_mut() {
            Some((last, count)) if *last == kind => *count += 1,
            _ => runs.push((kind, 1)),
        }
    })?;
    Ok(runs)
}

fn kind(flags: u64) -> &'static str {
    KINDS.iter().find(|(_, bits)| flags & bits != 0).map_or(KERNEL, |(name, _)| name)
}

/// Calls `each` with every page's frame number and flags.
fn flags(mut each: impl FnMut(u64, u64)) -> Result<(), String> {
    use std::io::Read;
    let mut file = fs::File::open("/proc/kpageflags").map_err(|e| format!("/proc/kpageflags: {e}"))?;
    let mut buffer = [0; 8192];
    let mut frame = 0;
    loop {
        // The file is read in whole numbers.
        let length = file.read(&mut buffer).map_err(|e| format!("/proc/kpageflags: {e}"))?;
        if length == 0 {
            return Ok(());
        }
        for bytes in buffer.get(..length).unwrap_or_default().as_chunks::<8>().0 {
            each(frame, u64::from_ne_bytes(*bytes));
            frame += 1;
        }
    }
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))
}

fn number(path: &str) -> Result<u64, String> {
    read(path)?.trim().parse().map_err(|e| format!("{path}: {e}"))
}

fn write(path: &str, number: u64) -> Result<(), String> {
    fs::write(path, number.to_string()).map_err(|e| format!("{path}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_block_of_order_ten_is_two_huge_pages() {
        let text = "Node 0, zone      DMA      0      0      0      0      0      0      0      0      0      1      3 \n\
                    Node 0, zone    DMA32      9      8      7      6      5      4      3      2      1      2     50 \n";
        assert_eq!(free_blocks(text), 1 + 2 * 3 + 2 + 2 * 50);
        assert_eq!(free_blocks(""), 0);
    }

    #[test]
    fn what_a_zone_keeps_is_its_mark_and_what_it_saves_for_others() {
        let text = "Node 0, zone    DMA32\n  pages free     500\n        min      10\n        low      12\n        \
                    high     14\n        protection: (0, 0, 5900, 5900)\n  pagesets\n    cpu: 0\n              \
                    high:  378\n";
        assert_eq!(reserved_kib(text), (14 + 5900) * 4);
    }

    #[test]
    fn a_page_has_the_first_kind_that_fits() {
        assert_eq!(kind(1 << 10), "free");
        assert_eq!(kind(1 << 5 | 1 << 12 | 1 << 14), "program", "anonymous pages are swap-backed too");
        assert_eq!(kind(1 << 5 | 1 << 14), "tmpfs");
        assert_eq!(kind(1 << 5), "file");
        assert_eq!(kind(0), "kernel");
    }
}
