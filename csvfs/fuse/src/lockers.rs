//! Which ranges were locked with `fcntl` through which open file.
//!
//! Such a lock belongs to a process or to an open file. The kernel does not say to which, and names either by a number that it makes
//! of the owner's place in memory. What an open file has locked goes with it; but when the mount hears of its end, the next file that was opened
//! may have its place, its number, and locks. (`flock` has no such trouble: its owner is the open file, which has a handle.)
//!
//! **Invariant:** the end of an open file gives up what was locked through it, and nothing that was locked through another since. So
//! requests for locks and what an end gives up are sent in the order in which they are decided on here.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use csvfs::node::Lock;

/// See the module. Lock rank: above the node's, no call that waits is made under it.
#[derive(Debug, Default)]
pub(crate) struct Lockers {
    /// By inode.
    files: Mutex<HashMap<u64, Vec<Range>>>,
}

/// Both ends belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    owner: u64,
    start: u64,
    end: u64,
    handle: u64,
}

impl Range {
    /// Whether the other one ends where this one begins, or the other way round, and is of the same owner and handle.
    fn continues(&self, other: &Self) -> bool {
        let beside =
            other.end.checked_add(1) == Some(self.start) || self.end.checked_add(1) == Some(other.start);
        beside && (self.owner, self.handle) == (other.owner, other.handle)
    }

    /// What is left without `start` to `end`.
    fn without(self, start: u64, end: u64) -> impl Iterator<Item = Self> {
        let before = start.checked_sub(1).map(|last| Self { end: self.end.min(last), ..self });
        let after = end.checked_add(1).map(|first| Self { start: self.start.max(first), ..self });
        before.into_iter().chain(after).filter(|part| part.start <= part.end)
    }
}

impl Lockers {
    fn files(&self) -> MutexGuard<'_, HashMap<u64, Vec<Range>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A lock is asked for through `handle`, by `ask`, which does not wait.
    pub(crate) fn locking<T>(&self, lock: &Lock, handle: u64, ask: impl FnOnce() -> T) -> T {
        let mut files = self.files();
        let ranges = files.entry(lock.ino).or_default();
        cut(ranges, lock);
        let asked = Range { owner: lock.owner, start: lock.start, end: lock.end, handle };
        // Who locks one byte after the other has one range.
        let whole = ranges.extract_if(.., |other| asked.continues(other)).fold(asked, |whole, beside| {
            Range { start: whole.start.min(beside.start), end: whole.end.max(beside.end), ..whole }
        });
        ranges.push(whole);
        ask()
    }

    /// An owner gives up what it has locked in a range.
    pub(crate) fn unlocking(&self, lock: &Lock) {
        change(&mut self.files(), lock.ino, |ranges| cut(ranges, lock));
    }

    /// What was locked through `handle` is given up, each range by `give_up`, which does not wait.
    pub(crate) fn ended(&self, ino: u64, handle: u64, mut give_up: impl FnMut(Lock)) {
        change(&mut self.files(), ino, |ranges| {
            for gone in ranges.extract_if(.., |range| range.handle == handle) {
                let Range { owner, start, end, .. } = gone;
                give_up(Lock { ino, owner, start, end, write: false, flock: false, pid: 0 });
            }
        });
    }

    /// Whether the end of `handle` has nothing to give up.
    pub(crate) fn has_none(&self, ino: u64, handle: u64) -> bool {
        self.files().get(&ino).is_none_or(|ranges| ranges.iter().all(|range| range.handle != handle))
    }
}

fn change(files: &mut HashMap<u64, Vec<Range>>, ino: u64, change: impl FnOnce(&mut Vec<Range>)) {
    if let Some(ranges) = files.get_mut(&ino) {
        change(ranges);
        if ranges.is_empty() {
            files.remove(&ino);
        }
    }
}

/// Takes the owner's ranges away where `lock` is.
fn cut(ranges: &mut Vec<Range>, lock: &Lock) {
    let (owner, start, end) = (lock.owner, lock.start, lock.end);
    let meets = |range: &Range| range.owner == owner && range.start <= end && range.end >= start;
    let met: Vec<Range> = ranges.extract_if(.., |range| meets(range)).collect();
    ranges.extend(met.into_iter().flat_map(|range| range.without(start, end)));
}

#[cfg(test)]
mod tests {
    use super::*;

    const INO: u64 = 5;

    fn lock(owner: u64, start: u64, end: u64) -> Lock {
        Lock { ino: INO, owner, start, end, write: true, flock: false, pid: 1 }
    }

    fn end_of(lockers: &Lockers, handle: u64) -> Vec<(u64, u64, u64)> {
        let mut gone = Vec::new();
        lockers.ended(INO, handle, |lock| gone.push((lock.owner, lock.start, lock.end)));
        gone.sort_unstable();
        gone
    }

    #[test]
    fn the_end_of_a_file_gives_up_nothing_that_the_next_one_with_its_number_has_locked() {
        let lockers = Lockers::default();
        lockers.locking(&lock(7, 0, 99), 1, || ());
        lockers.locking(&lock(7, 40, 59), 2, || ());
        lockers.locking(&lock(8, 0, u64::MAX), 1, || ());
        assert_eq!(end_of(&lockers, 1), [(7, 0, 39), (7, 60, 99), (8, 0, u64::MAX)]);
        assert!(lockers.has_none(INO, 1) && !lockers.has_none(INO, 2));
        assert_eq!(end_of(&lockers, 2), [(7, 40, 59)]);
        assert!(lockers.files().is_empty());
    }

    #[test]
    fn what_is_locked_byte_by_byte_is_one_range() {
        let lockers = Lockers::default();
        for at in (0..1000).rev().step_by(2).chain((0..1000).step_by(2)) {
            lockers.locking(&lock(7, at, at), 1, || ());
        }
        lockers.locking(&lock(7, 1000, 1000), 2, || ());
        assert_eq!(lockers.files()[&INO].len(), 2);
        assert_eq!((end_of(&lockers, 1), end_of(&lockers, 2)), (vec![(7, 0, 999)], vec![(7, 1000, 1000)]));
    }

    #[test]
    fn what_its_owner_has_given_up_is_not_given_up_again() {
        let lockers = Lockers::default();
        lockers.locking(&lock(7, 0, u64::MAX), 1, || ());
        lockers.unlocking(&lock(7, 0, 9));
        lockers.unlocking(&lock(8, 0, u64::MAX));
        assert_eq!(end_of(&lockers, 1), [(7, 10, u64::MAX)]);
        lockers.locking(&lock(7, 5, 5), 1, || ());
        lockers.unlocking(&lock(7, 0, u64::MAX));
        assert!(lockers.has_none(INO, 1) && lockers.files().is_empty());
    }
}
