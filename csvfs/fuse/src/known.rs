//! Which inodes the kernel may know.
//!
//! It counts how often an answer named an inode to it, and says so when it forgets the inode: as long as the counts differ it has the
//! inode, or an answer that names it is on its way, or the word that it was forgotten.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Parts that are locked apart.
const PARTS: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Only for a kernel that is promised something.
    counts: AtomicBool,
    /// Lock rank: leaf.
    parts: [Mutex<Counts>; PARTS],
}

type Counts = HashMap<u64, u64>;

impl Known {
    fn part(&self, ino: u64) -> MutexGuard<'_, Counts> {
        let part = usize::try_from(ino % PARTS as u64).unwrap_or_default();
        self.parts[part].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts from now on, before the first request.
    pub(crate) fn begin(&self) {
        self.counts.store(true, Ordering::Relaxed);
    }

    /// Whether it counts.
    pub(crate) fn counts(&self) -> bool {
        self.counts.load(Ordering::Relaxed)
    }

    /// An answer that names the inode is about to go out.
    pub(crate) fn named(&self, ino: u64) {
        if !self.counts() {
            return;
        }
        *self.part(ino).entry(ino).or_default() += 1;
    }

    /// The kernel has forgotten the inode, which it had been named so often.
    pub(crate) fn forgotten(&self, ino: u64, names: u64) {
        if let Entry::Occupied(mut count) = self.part(ino).entry(ino) {
            match count.get().checked_sub(names) {
                None | Some(0) => drop(count.remove()),
                Some(rest) => *count.get_mut() = rest,
            }
        }
    }

    /// Whether the kernel may have the inode, now or when it takes up an answer.
    pub(crate) fn has(&self, ino: u64) -> bool {
        self.part(ino).contains_key(&ino)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_is_known_until_it_was_forgotten_as_often_as_it_was_named() {
        let known = Known::default();
        known.named(7);
        assert!(!known.has(7), "nothing is counted yet");
        known.begin();
        known.named(7);
        known.named(7);
        known.named(7 + PARTS as u64);
        known.forgotten(7, 1);
        assert!(known.has(7), "another answer is on its way");
        known.forgotten(7, 1);
        assert!(!known.has(7) && known.has(7 + PARTS as u64));
        // More than it was named: the kernel's word counts.
        known.named(7);
        known.forgotten(7, 9);
        known.forgotten(7, 1);
        assert!(!known.has(7));
    }
}
