//! The order in which locks are taken, asserted in debug builds (E7).
//!
//! | rank | lock |
//! |---|---|
//! | 1 | table of files |
//! | 2 | one file |
//! | 3 | pool |
//! | 3 | locks of programs |
//! | 3 | list of what may be forgotten, floors, what has lost a name |
//! | 4 | flusher |
//! | 5 | session |
//! | 6 | intent log |
//! | 9 | workers' queue |
//!
//! **Invariant:** a thread takes locks with growing ranks, one of each rank at most.

use std::ops::{Deref, DerefMut};

/// Table of files.
pub(super) const FILES: u8 = 1;
/// One file.
pub(super) const FILE: u8 = 2;
/// Pool.
pub(super) const POOL: u8 = 3;
/// Locks of programs.
pub(super) const LOCKS: u8 = 3;
/// What is remembered of unused files.
pub(super) const MEMORY: u8 = 3;
/// Flusher.
pub(super) const FLUSHER: u8 = 4;
/// Session.
pub(super) const SESSION: u8 = 5;
/// Intent log.
pub(super) const LOG: u8 = 6;
/// Workers' queue.
pub(super) const WORKERS: u8 = 9;

#[cfg(debug_assertions)]
thread_local! {
    static HELD: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// A rank that this thread holds.
#[must_use]
pub(super) struct Held {
    #[cfg(debug_assertions)]
    rank: u8,
}

impl Held {
    /// Says that a lock of `rank` is about to be taken.
    pub(super) fn enter(rank: u8) -> Self {
        #[cfg(debug_assertions)]
        HELD.with_borrow_mut(|held| {
            assert!(held.iter().all(|below| *below < rank), "a lock of rank {rank} is taken under {held:?}");
            held.push(rank);
        });
        #[cfg(not(debug_assertions))]
        let _ = rank;
        Self {
            #[cfg(debug_assertions)]
            rank,
        }
    }
}

#[cfg(debug_assertions)]
impl Drop for Held {
    fn drop(&mut self) {
        // A thread that ends has dropped its list already.
        let _ = HELD.try_with(|held| {
            let mut held = held.borrow_mut();
            if let Some(at) = held.iter().rposition(|rank| *rank == self.rank) {
                held.remove(at);
            }
        });
    }
}

/// The guard of a lock, with its rank.
pub(super) struct Ranked<G> {
    guard: G,
    _held: Held,
}

impl<G> Ranked<G> {
    /// Takes a lock of `rank` by `lock`.
    pub(super) fn take(rank: u8, lock: impl FnOnce() -> G) -> Self {
        let held = Held::enter(rank);
        Self { guard: lock(), _held: held }
    }
}

impl<G: Deref> Deref for Ranked<G> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Ranked<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;

    // Invariant E7.
    #[test]
    #[should_panic(expected = "a lock of rank 1 is taken under [2]")]
    fn a_lock_taken_against_the_order_is_noticed() {
        let _file = Held::enter(FILE);
        let _files = Held::enter(FILES);
    }

    #[test]
    fn locks_in_order_may_be_released_in_any_order() {
        let files = Held::enter(FILES);
        let file = Held::enter(FILE);
        drop(files);
        let session = Held::enter(SESSION);
        drop(file);
        drop(session);
        let _again = Held::enter(FILES);
    }
}
