//! What a machine asks a store beside chunks.
//!
//! ```text
//! pages that guests waited for ─▶ blocks, each with its pages as bits ─▶ one question ─▶ the same pages, block by block
//! ```

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use vmatrix_model::Digest;

/// Pages of a block: memory outside of the working set lies in packs of so many neighbours.
pub const BLOCK_PAGES: u32 = 16;
/// Most blocks of a question: with the longest numbers that a guest's pages have they fit one frame.
pub const BLOCKS_MAX: usize = 1000;

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    /// To have pages in an image's working set, for guests had to wait for them. How many requests the guests answered
    /// until then nobody counts.
    Learn {
        image: String,
        /// The manifest that the guests run from.
        built: Digest,
        /// Blocks of [`BLOCK_PAGES`] by number, in the order in which they were first waited for, each with its pages:
        /// bit `n` is the `n`th.
        blocks: Vec<(u32, u16)>,
    },
}

/// What it is answered: an image's working set as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Learned {
    /// The manifest that has it.
    pub digest: Digest,
    /// Pages in it before.
    pub before: u64,
    /// Pages in it now.
    pub after: u64,
}

/// The blocks that hold these pages, in the order of the first page of each; those past [`BLOCKS_MAX`] are left out.
pub fn blocks(pages: &[u32]) -> Vec<(u32, u16)> {
    let mut found: Vec<(u32, u16)> = Vec::new();
    let mut at = HashMap::new();
    for page in pages {
        let (block, bit) = (page / BLOCK_PAGES, 1 << (page % BLOCK_PAGES));
        let index = *at.entry(block).or_insert(found.len());
        match found.get_mut(index) {
            Some((_, bits)) => *bits |= bit,
            None if index < BLOCKS_MAX => found.push((block, bit)),
            // The place of a block that is left out stays taken by the next, which is left out too.
            None => {}
        }
    }
    found
}

/// The pages of blocks; none where no guest has so many.
pub fn pages(blocks: &[(u32, u16)]) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    for (block, bits) in blocks {
        let first = block.checked_mul(BLOCK_PAGES)?;
        all.extend((0..BLOCK_PAGES).filter(|n| bits & (1 << n) != 0).map(|n| first + n));
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::QUESTION_MAX;

    #[test]
    fn pages_come_back_block_by_block_in_the_order_of_the_first_of_each() {
        let named = blocks(&[35, 3, 32, 0, 3, 47, 16]);
        assert_eq!(named, [(2, 0b1000_0000_0000_1001), (0, 0b1001), (1, 1)]);
        assert_eq!(pages(&named).unwrap(), [32, 35, 47, 0, 3, 16]);
        assert_eq!(pages(&[(u32::MAX, 1)]), None);
    }

    #[test]
    fn the_longest_question_fits_a_frame_and_what_is_too_much_is_left_out() {
        // Of a guest of 64 GiB, the largest there is.
        let last = (64 << 18) - 1;
        let all: Vec<u32> = (0..2000 * BLOCK_PAGES).map(|n| last - n).collect();
        let named = blocks(&all);
        assert_eq!(
            (named.len(), named[0], named[999]),
            (BLOCKS_MAX, (last / 16, u16::MAX), (last / 16 - 999, u16::MAX))
        );
        let ask = Question::Learn { image: "a".repeat(30), built: Digest::of(b"image"), blocks: named };
        let text = serde_json::to_vec(&ask).unwrap();
        assert!(text.len() <= QUESTION_MAX, "{} bytes", text.len());
        assert_eq!(serde_json::from_slice::<Question>(&text).unwrap(), ask);
        assert!(text.starts_with(br#"{"ask":"learn","image":"#), "{}", String::from_utf8_lossy(&text));
    }
}
