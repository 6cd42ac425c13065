//! What was last sent of pages, as far as the memory for it goes.
//!
//! ```text
//!   page --index--> slot --> its place in one long piece of memory, 4 KiB each, taken from the system as it fills
//! ```
//! While there is room every page is remembered. Then a page that is sent again takes the place of one that was sent once: it is
//! likely to be written once more. Pages that were sent again keep their places: of a set that is too large and is written in
//! turn, the part that fits is found each time, where making room for the newest would find none.
//!
//! **Invariant:** what is remembered of a page is what the target has of it; whoever sends a page says so here, or has it
//! forgotten.

use std::collections::HashMap;

use super::record::PAGE;

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    /// A page that was sent once.
    Once(u64),
    /// A page that was sent again.
    Again(u64),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Remembered {
    slots_max: usize,
    slots: Vec<Slot>,
    content: Vec<u8>,
    index: HashMap<u64, usize>,
    free: Vec<usize>,
    /// Slots of pages that were sent once; some may have become something else.
    once: Vec<usize>,
}

impl Remembered {
    /// With room for so many bytes of pages.
    pub(super) fn new(bytes_max: usize) -> Self {
        let slots_max = bytes_max / PAGE;
        Self {
            slots_max,
            slots: Vec::new(),
            content: Vec::with_capacity(slots_max * PAGE),
            index: HashMap::new(),
            free: Vec::new(),
            once: Vec::new(),
        }
    }

    /// What was sent of this page.
    pub(super) fn get(&self, page: u64) -> Option<&[u8]> {
        self.index.get(&page).map(|slot| &self.content[slot * PAGE..][..PAGE])
    }

    /// The page was sent like this, for the first time or `again`.
    pub(super) fn put(&mut self, page: u64, content: &[u8], again: bool) {
        let holds = if again { Slot::Again(page) } else { Slot::Once(page) };
        let known = self.index.get(&page).copied();
        let Some(slot) = known.or_else(|| self.room(again)) else { return };
        if !again && self.slots.get(slot) != Some(&holds) {
            self.once.push(slot);
        }
        if slot == self.slots.len() {
            self.slots.push(holds);
            self.content.extend_from_slice(content);
        } else {
            self.slots[slot] = holds;
            self.content[slot * PAGE..][..PAGE].copy_from_slice(content);
        }
        if known.is_none() {
            self.index.insert(page, slot);
        }
    }

    /// The page was sent in another way.
    pub(super) fn forget(&mut self, page: u64) {
        if let Some(slot) = self.index.remove(&page) {
            self.slots[slot] = Slot::Free;
            self.free.push(slot);
        }
    }

    /// A slot for a page that has none.
    fn room(&mut self, again: bool) -> Option<usize> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.slots.len() < self.slots_max {
            return Some(self.slots.len());
        }
        if !again {
            return None;
        }
        while let Some(slot) = self.once.pop() {
            if let Slot::Once(page) = self.slots[slot] {
                self.index.remove(&page);
                return Some(slot);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn content(with: u8) -> Vec<u8> {
        vec![with; PAGE]
    }

    #[test]
    fn pages_that_are_sent_again_take_the_room_of_those_that_were_sent_once_and_keep_it() {
        let mut remembered = Remembered::new(4 * PAGE + 1);
        for page in 0..6 {
            remembered.put(page, &content(1), false);
        }
        let known = |remembered: &Remembered, pages: &[u64]| {
            pages.iter().filter(|page| remembered.get(**page).is_some()).count()
        };
        assert_eq!(known(&remembered, &[0, 1, 2, 3]), 4);
        assert_eq!(known(&remembered, &[4, 5]), 0, "there is no room");
        for page in 10..13 {
            remembered.put(page, &content(2), true);
        }
        remembered.put(0, &content(3), true);
        assert_eq!(remembered.get(0), Some(&content(3)[..]));
        for page in 20..30 {
            remembered.put(page, &content(4), true);
        }
        assert_eq!(known(&remembered, &[0, 10, 11, 12]), 4, "{remembered:?}");
        remembered.forget(11);
        remembered.forget(11);
        remembered.put(30, &content(5), false);
        assert_eq!((known(&remembered, &[0, 10, 12, 30]), known(&remembered, &[11])), (4, 0));
        assert_eq!(remembered.content.len(), 4 * PAGE);
    }

    proptest! {
        #[test]
        fn what_is_remembered_is_what_was_put_last_and_never_more_than_there_is_room_for(
            steps in proptest::collection::vec((0_u64..12, 0_u8..8), 0..300)
        ) {
            let mut remembered = Remembered::new(5 * PAGE);
            let mut last = HashMap::new();
            for (number, (page, what)) in steps.into_iter().enumerate() {
                let with = number.to_le_bytes()[0];
                match what {
                    0 | 1 => {
                        remembered.forget(page);
                        last.remove(&page);
                    }
                    what => {
                        remembered.put(page, &content(with), what > 4);
                        last.insert(page, with);
                    }
                }
                let mut known = 0;
                for page in 0..12 {
                    if let Some(found) = remembered.get(page) {
                        known += 1;
                        prop_assert_eq!(Some(&found[0]), last.get(&page));
                    }
                }
                prop_assert!(known <= 5 && remembered.content.len() <= 5 * PAGE);
            }
        }
    }
}
