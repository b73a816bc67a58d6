//! A set of page numbers, a bit each.

/// Pages below a fixed number; what lies beyond is never in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bits {
    words: Vec<u64>,
    set: u32,
}

impl Bits {
    /// Room for `pages`, none of them in it.
    pub fn new(pages: u32) -> Bits {
        Bits { words: vec![0; pages.div_ceil(64) as usize], set: 0 }
    }

    pub fn has(&self, page: u32) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|w| w & bit(page) != 0)
    }

    /// Puts a page in; whether it is new.
    pub fn insert(&mut self, page: u32) -> bool {
        let Some(word) = self.words.get_mut((page / 64) as usize) else { return false };
        let new = *word & bit(page) == 0;
        *word |= bit(page);
        self.set += u32::from(new);
        new
    }

    /// Takes a page out; whether it was in.
    pub fn remove(&mut self, page: u32) -> bool {
        let Some(word) = self.words.get_mut((page / 64) as usize) else { return false };
        let was = *word & bit(page) != 0;
        *word &= !bit(page);
        self.set -= u32::from(was);
        was
    }

    /// Those in it, in order.
    pub fn all(&self) -> Vec<u32> {
        let words = (0u32..).zip(&self.words).filter(|(_, word)| **word != 0);
        words.flat_map(|(at, word)| (0..64).filter(move |b| word & (1 << b) != 0).map(move |b| at * 64 + b)).collect()
    }

    /// Pages in it.
    pub fn len(&self) -> u32 {
        self.set
    }
}

fn bit(page: u32) -> u64 {
    1 << (page % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_in_from_its_first_insert_to_its_remove_and_counted_once() {
        let mut bits = Bits::new(130);
        assert!(bits.insert(129) && !bits.insert(129) && bits.has(129) && !bits.has(128));
        assert_eq!(bits.len(), 1);
        assert!(bits.insert(0) && bits.all() == [0, 129] && bits.remove(0));
        assert!(bits.remove(129) && !bits.remove(129) && !bits.has(129));
        assert_eq!(bits.len(), 0);
    }
}
