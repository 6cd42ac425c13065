//! The locks that are held on one file.
//!
//! ```text
//!   owner 1   [ read ............ ]        one owner's locks never overlap: a new one replaces what it covers,
//!   owner 2          [ read ...... ]       and joins neighbours of the same kind
//! ```
//! **Invariant:** two locks of different owners overlap only when both are for reading, or of different families.

use super::{Access, Owner, RangeLock, Span};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldLocks(Vec<RangeLock>);

impl HeldLocks {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &RangeLock> {
        self.0.iter()
    }

    /// Those of others that exclude `wanted`.
    pub fn conflicts<'a>(&'a self, wanted: &'a RangeLock) -> impl Iterator<Item = &'a RangeLock> {
        self.0.iter().filter(|held| held.excludes(wanted))
    }

    /// Gives `lock` to its owner, in place of what it has there.
    pub fn set(&mut self, lock: RangeLock) {
        self.unset(lock.owner, lock.span);
        let mut joined = lock;
        self.0.retain(|held| {
            let same = held.owner == lock.owner && held.access == lock.access && held.pid == lock.pid;
            let joins = same && held.span.touches(joined.span);
            if joins {
                joined.span = joined.span.joined(held.span);
            }
            !joins
        });
        self.0.push(joined);
    }

    /// Takes what `owner` has within `span`; parts outside stay. Says whether anything was taken.
    pub fn unset(&mut self, owner: Owner, span: Span) -> bool {
        let mut rest = Vec::new();
        let before = self.0.len();
        self.0.retain(|held| {
            let hit = held.owner == owner && held.span.overlaps(span);
            if hit {
                rest.extend(held.span.without(span).map(|span| RangeLock { span, ..*held }));
            }
            !hit
        });
        let taken = self.0.len() < before;
        self.0.extend(rest);
        taken
    }

    /// Weakens what the owner of `lock` has within its span to no more than `lock` allows: reading, or (for writing) as
    /// it is. The first half of a change that somebody else has still to confirm.
    pub fn weaken(&mut self, lock: RangeLock) {
        if lock.access == Access::Write {
            return;
        }
        let stronger: Vec<Span> = self
            .0
            .iter()
            .filter(|held| held.owner == lock.owner && held.access == Access::Write)
            .filter_map(|held| held.span.common(lock.span))
            .collect();
        for span in stronger {
            self.set(RangeLock { span, ..lock });
        }
    }

    /// Takes all locks of the owners that `gone` picks. Says whether there were any.
    pub fn drop_owners(&mut self, gone: impl Fn(&Owner) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|held| !gone(&held.owner));
        self.0.len() < before
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{lock, owner};
    use super::*;

    const BYTES: u64 = 24;

    /// The same by one cell per byte and owner.
    type Model = Vec<Vec<Option<Access>>>;

    fn agrees(held: &HeldLocks, model: &Model) {
        for (number, cells) in model.iter().enumerate() {
            for (at, cell) in cells.iter().enumerate() {
                let there: Vec<Access> = held
                    .iter()
                    .filter(|l| l.owner == owner(number as u64) && l.span.contains(at as u64))
                    .map(|l| l.access)
                    .collect();
                assert_eq!(there, cell.iter().copied().collect::<Vec<_>>(), "owner {number} byte {at}");
            }
        }
    }

    proptest! {
        #[test]
        fn locks_of_ranges_behave_like_locks_of_bytes(
            steps in proptest::collection::vec((0..3_u64, 0..BYTES, 1..8_u64, 0..3_u8), 1..60)
        ) {
            let mut held = HeldLocks::default();
            let mut model: Model = vec![vec![None; 40]; 3];
            for (number, start, len, what) in steps {
                let span = Span { start, end: start + len - 1 };
                let access = [None, Some(Access::Read), Some(Access::Write)][usize::from(what)];
                match access {
                    None => {
                        held.unset(owner(number), span);
                    }
                    Some(access) => held.set(lock(number, span, access)),
                }
                let cells = usize::try_from(span.start).unwrap()..=usize::try_from(span.end).unwrap();
                model[usize::try_from(number).unwrap()][cells].fill(access);
                agrees(&held, &model);
            }
        }
    }

    #[test]
    fn neighbours_of_a_kind_are_one_lock() {
        let mut held = HeldLocks::default();
        for start in [0, 20, 10] {
            held.set(lock(1, Span { start, end: start + 9 }, Access::Read));
        }
        assert_eq!(held.len(), 1);
        held.set(lock(1, Span { start: 12, end: 15 }, Access::Write));
        assert_eq!(held.len(), 3);
        held.weaken(lock(1, Span { start: 0, end: 13 }, Access::Read));
        assert_eq!(
            held.iter().filter(|l| l.access == Access::Write).map(|l| l.span.start).collect::<Vec<_>>(),
            [14]
        );
    }
}
