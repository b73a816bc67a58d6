//! Free memory ─▶ holes in the guest's memory file, so that an image does not store it and a clone does not fetch it.
//!
//! ```text
//! guest: free blocks into its pool ─lend─▶ here: holes where they are ─▶ guest: take them back, as zeros
//! ```

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vmatrix_vma_image::error::{Error, Result};
use vmatrix_vma_image::guest;
use vmatrix_vma_image::memory::PAGE;

/// The machine puts what does not fit below its devices above 4 GiB: so much lies below, if there is as much.
const LOW: u64 = 2 << 30;
/// Guests with less have all of it below.
const SPLIT: u64 = 0xb000_0000;
const HIGH: u64 = 4 << 30;

/// Where in a memory file of `size` bytes the page with this frame number is; none where the machine has no memory.
fn offset(frame: u64, size: u64) -> Option<u64> {
    let (address, low) = (frame.checked_mul(PAGE)?, if size >= SPLIT { LOW } else { size });
    let offset = if address >= HIGH { address - HIGH + low } else { Some(address).filter(|a| *a < low)? };
    (offset < size).then_some(offset)
}

/// Empties the free memory of a running guest.
///
/// # Errors
/// The guest does not lend, or the file takes no holes.
pub async fn free_memory(agent: &Path, memory: &File) -> Result<()> {
    let bad = |problem: String| Error::Guest(format!("its free memory cannot be emptied: {problem}"));
    let size = memory.metadata().map_err(|e| bad(e.to_string()))?.len();
    let runs = guest::lend(agent).await?;
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let mut emptied = Ok(());
    for (first, count) in runs {
        let (Some(start), Some(last)) = (offset(first, size), offset((first + count).saturating_sub(1), size)) else {
            emptied = Err(bad(format!("it lent frames {first} to {} that it does not have", first + count)));
            break;
        };
        let length = last + PAGE - start;
        if length != count * PAGE {
            emptied = Err(bad(format!("frames {first} to {} are not side by side", first + count)));
            break;
        }
        let done = fallocate(memory, mode, start as i64, length as i64);
        emptied = emptied.and(done.map_err(|e| bad(format!("no hole can be made in its file: {e}"))));
    }
    // Also when something went wrong: a guest whose memory is lent is of no use.
    guest::take_back(agent).await?;
    emptied
}

/// What each page of a guest is in use for, by its place in the memory file.
#[derive(Debug, Clone, Default)]
pub struct Kinds {
    names: Vec<String>,
    /// By page: which of the names.
    of: Vec<u8>,
}

impl Kinds {
    /// Asks a running guest with so much memory.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn ask(agent: &Path, size: u64) -> Result<Kinds> {
        let mut kinds = Kinds { names: Vec::new(), of: vec![u8::MAX; (size / PAGE) as usize] };
        let mut frame = 0u64;
        for (name, count) in guest::kinds(agent).await? {
            let known = kinds.names.iter().position(|n| *n == name);
            let number = known.unwrap_or_else(|| {
                kinds.names.push(name);
                kinds.names.len() - 1
            });
            // Past the last frame there is nothing, whatever the guest says.
            for at in (frame..frame.saturating_add(count).min((HIGH + size) / PAGE)).filter_map(|f| offset(f, size)) {
                if let Some(of) = kinds.of.get_mut((at / PAGE) as usize) {
                    *of = u8::try_from(number).unwrap_or(u8::MAX);
                }
            }
            frame = frame.saturating_add(count);
        }
        Ok(kinds)
    }

    /// What these pages are in use for, MiB of each kind, the largest first.
    pub fn table(&self, pages: impl Iterator<Item = u32>) -> String {
        let mut count: BTreeMap<&str, u64> = BTreeMap::new();
        for page in pages {
            let name = self.of.get(page as usize).and_then(|n| self.names.get(usize::from(*n)));
            *count.entry(name.map_or("unknown", String::as_str)).or_default() += 1;
        }
        let mut list: Vec<(&str, u64)> = count.into_iter().collect();
        list.sort_by_key(|(_, pages)| std::cmp::Reverse(*pages));
        let mib = |pages: u64| format!("{:.1}", (pages * PAGE) as f64 / f64::from(1 << 20));
        list.iter().map(|(kind, pages)| format!("{kind} {}", mib(*pages))).collect::<Vec<_>>().join(", ")
    }
}

/// The pages of a memory file that are not zeros.
///
/// # Errors
/// It cannot be read.
pub fn not_zero(memory: &File) -> std::io::Result<Vec<u32>> {
    let mut bytes = [0; PAGE as usize];
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        // Most of a large guest is holes.
        let start = match lseek(memory, at, Whence::SeekData) {
            Ok(start) => start as u64 / PAGE,
            Err(Errno::ENXIO) => return Ok(found),
            Err(e) => return Err(e.into()),
        };
        at = lseek(memory, (start * PAGE) as i64, Whence::SeekHole)?;
        for page in start..(at as u64).div_ceil(PAGE) {
            memory.read_exact_at(&mut bytes, page * PAGE)?;
            if !is_zero(&bytes) {
                found.extend(u32::try_from(page));
            }
        }
    }
}

/// Whether a page is zeros: one comparison, fast however this is compiled.
pub fn is_zero(page: &[u8; PAGE as usize]) -> bool {
    page == &[0; PAGE as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_guests_frames_lie_in_its_file_in_order() {
        assert_eq!(offset(0, 128 << 20), Some(0));
        assert_eq!(offset(32767, 128 << 20), Some((128 << 20) - PAGE));
        assert_eq!(offset(32768, 128 << 20), None);
    }

    #[test]
    fn a_large_guest_has_a_gap_between_two_and_four_gib() {
        let size = 8 << 30;
        assert_eq!(offset(LOW / PAGE - 1, size), Some(LOW - PAGE));
        assert_eq!(offset(LOW / PAGE, size), None);
        assert_eq!(offset(HIGH / PAGE, size), Some(LOW));
        assert_eq!(offset((HIGH + size - LOW) / PAGE - 1, size), Some(size - PAGE));
        assert_eq!(offset((HIGH + size - LOW) / PAGE, size), None);
        assert_eq!(offset(u64::MAX, size), None);
    }
}
