//! A long table of 64-bit words, of which most are alike.
//!
//! ```text
//!   page 0         page 1         page 2          ...        512 words each, as a page of the log carries them
//!   all 0          words          all 2                      a page whose words are equal takes 24 bytes
//! ```
//! The block table of a 64 TiB disk has 67 million entries, and nearly all of them say the same. The same holds for sector
//! bitmaps. Reading takes no lock.
//!
//! **Invariant:** the memory taken is that of the pages whose words differ, which the file must really hold.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::{bytes, index};

/// Words in a page of 4 KiB.
pub(crate) const WORDS_PER_PAGE: u64 = 512;

type Words = [AtomicU64; 512];

struct Slot {
    /// Every word, as long as there are no `words`.
    uniform: u64,
    words: OnceLock<Box<Words>>,
}

impl Slot {
    fn words(&self) -> &Words {
        self.words.get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(self.uniform))))
    }
}

/// The table.
pub(crate) struct WordTable {
    len: u64,
    slots: Box<[Slot]>,
}

/// A page of the table.
#[derive(Clone, Copy)]
pub(crate) enum Page<'a> {
    /// All words are this one.
    Uniform(u64),
    /// These words.
    Words(&'a [AtomicU64]),
}

impl WordTable {
    /// `len` words, all zero.
    pub(crate) fn zeroed(len: u64) -> Self {
        let slots = (0..len.div_ceil(WORDS_PER_PAGE)).map(|_| Slot { uniform: 0, words: OnceLock::new() });
        Self { len, slots: slots.collect() }
    }

    /// Fills a page from its bytes on disk, before the table is shared.
    pub(crate) fn load(&mut self, page: u64, content: &[u8]) {
        let words = |at: usize| {
            let word = content.get(at * 8..at * 8 + 8).map(|word| word.try_into().expect("8 bytes"));
            u64::from_le_bytes(word.unwrap_or_default())
        };
        let first = words(0);
        let there = self.words_in(page);
        let uniform = (1..there).all(|at| words(at) == first);
        let slot = if uniform {
            Slot { uniform: first, words: OnceLock::new() }
        } else {
            Slot {
                uniform: 0,
                words: OnceLock::from(Box::new(std::array::from_fn(|at| AtomicU64::new(words(at))))),
            }
        };
        self.slots[index(page)] = slot;
    }

    /// The word at `at`.
    pub(crate) fn get(&self, at: u64) -> u64 {
        let slot = &self.slots[index(at / WORDS_PER_PAGE)];
        match slot.words.get() {
            Some(words) => words[index(at % WORDS_PER_PAGE)].load(Ordering::SeqCst),
            None => slot.uniform,
        }
    }

    /// Replaces the word at `at`.
    pub(crate) fn set(&self, at: u64, word: u64) {
        self.change(at, |slot| slot.store(word, Ordering::SeqCst));
    }

    /// Sets the bits of `mask` in the word at `at`.
    pub(crate) fn set_bits(&self, at: u64, mask: u64) {
        self.change(at, |slot| {
            slot.fetch_or(mask, Ordering::SeqCst);
        });
    }

    /// Clears the bits of `mask` in the word at `at`.
    pub(crate) fn clear_bits(&self, at: u64, mask: u64) {
        if self.get(at) & mask != 0 {
            self.change(at, |slot| {
                slot.fetch_and(!mask, Ordering::SeqCst);
            });
        }
    }

    fn change(&self, at: u64, change: impl FnOnce(&AtomicU64)) {
        debug_assert!(at < self.len, "word {at} of {}", self.len);
        change(&self.slots[index(at / WORDS_PER_PAGE)].words()[index(at % WORDS_PER_PAGE)]);
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> u64 {
        bytes(self.slots.len())
    }

    /// Words of a page that belong to the table: fewer only in the last.
    pub(crate) fn words_in(&self, page: u64) -> usize {
        index((self.len - page * WORDS_PER_PAGE).min(WORDS_PER_PAGE))
    }

    /// A page as it is now.
    pub(crate) fn page(&self, page: u64) -> Page<'_> {
        let slot = &self.slots[index(page)];
        match slot.words.get() {
            Some(words) => Page::Words(&words[..self.words_in(page)]),
            None => Page::Uniform(slot.uniform),
        }
    }

    /// The words of a page, one by one.
    pub(crate) fn words_of(&self, page: u64) -> impl Iterator<Item = u64> + '_ {
        let first = page * WORDS_PER_PAGE;
        (first..first + bytes(self.words_in(page))).map(|at| self.get(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_equal_words_takes_no_room_until_one_changes() {
        let mut table = WordTable::zeroed(1000);
        table.load(0, &2_u64.to_le_bytes().repeat(512));
        assert!(matches!(table.page(0), Page::Uniform(2)));
        table.set(7, 9);
        assert!(matches!(table.page(0), Page::Words(_)));
        assert_eq!((table.get(6), table.get(7), table.get(8)), (2, 9, 2));
    }

    #[test]
    fn a_short_last_page_is_uniform_whatever_lies_behind_it() {
        let mut table = WordTable::zeroed(514);
        let content = [[5_u64, 5, 6].map(u64::to_le_bytes).concat(), vec![0; 4072]].concat();
        table.load(1, &content);
        assert!(matches!(table.page(1), Page::Uniform(5)));
        assert_eq!(table.words_of(1).collect::<Vec<_>>(), [5, 5]);
    }

    #[test]
    fn bits_change_alone() {
        let table = WordTable::zeroed(1);
        table.set_bits(0, 0b1010);
        table.clear_bits(0, 0b0010);
        assert_eq!(table.get(0), 0b1000);
    }
}
