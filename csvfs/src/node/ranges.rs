//! A set of byte ranges: what is known of a map, what was written and not committed yet.
//!
//! **Invariant:** ranges are not empty, do not overlap and do not touch.

use std::collections::BTreeMap;
use std::ops::Range;

/// Starts and ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RangeSet {
    ends: BTreeMap<u64, u64>,
}

impl RangeSet {
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Number of separate ranges.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn clear(&mut self) {
        self.ends.clear();
    }

    pub(super) fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        while let Some((&s, &e)) = self.ends.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.ends.remove(&s);
        }
        self.ends.insert(start, end);
    }

    /// Takes out `range`.
    pub(super) fn remove(&mut self, range: Range<u64>) {
        for (start, end) in self.touching(&range) {
            self.ends.remove(&start);
            self.add(start..range.start.min(end));
            self.add(range.end.max(start)..end);
        }
    }

    /// The parts of the set that lie in `range`, in order.
    pub(super) fn parts_in(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let cut = |(start, end): (u64, u64)| start.max(range.start)..end.min(range.end);
        self.touching(range).into_iter().map(cut).collect()
    }

    /// All parts, in order.
    pub(super) fn all(&self) -> Vec<Range<u64>> {
        self.ends.iter().map(|(start, end)| *start..*end).collect()
    }

    fn touching(&self, range: &Range<u64>) -> Vec<(u64, u64)> {
        if range.is_empty() {
            return Vec::new();
        }
        let before = self.ends.range(..range.start).next_back().filter(|(_, end)| **end > range.start);
        let inside = self.ends.range(range.clone());
        before.into_iter().chain(inside).map(|(start, end)| (*start, *end)).collect()
    }

    /// Takes out everything from `from` on.
    pub(super) fn cut(&mut self, from: u64) {
        self.ends.split_off(&from);
        if let Some((_, end)) = self.ends.range_mut(..from).next_back() {
            *end = (*end).min(from);
        }
    }

    /// The first byte of `range` that is not in the set.
    pub(super) fn first_missing(&self, range: Range<u64>) -> Option<u64> {
        if range.is_empty() {
            return None;
        }
        match self.ends.range(..=range.start).next_back() {
            Some((_, &end)) if end >= range.end => None,
            Some((_, &end)) if end > range.start => Some(end),
            _ => Some(range.start),
        }
    }

    /// Takes out up to `most` ranges, lowest first.
    pub(super) fn take(&mut self, most: usize) -> Vec<Range<u64>> {
        let mut taken = Vec::with_capacity(most.min(self.ends.len()));
        while taken.len() < most {
            let Some((start, end)) = self.ends.pop_first() else { break };
            taken.push(start..end);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(set: &RangeSet) -> Vec<bool> {
        (0..64).map(|at| set.first_missing(at..at + 1).is_none()).collect()
    }

    proptest! {
        #[test]
        fn a_range_set_is_what_a_row_of_flags_is(
            steps in proptest::collection::vec((0u64..60, 0u64..8, 0u8..8), 0..40),
        ) {
            let mut set = RangeSet::default();
            let mut flags = vec![false; 64];
            for (start, len, kind) in steps {
                if kind == 1 {
                    let end = (start + len).min(64);
                    let inside: u64 = set.parts_in(&(start..end)).iter().map(|part| part.end - part.start).sum();
                    set.remove(start..end);
                    let flags = &mut flags[usize::try_from(start).expect("small")..usize::try_from(end).expect("small")];
                    prop_assert_eq!(inside, flags.iter().filter(|flag| **flag).count() as u64);
                    flags.fill(false);
                    continue;
                }
                if kind == 0 {
                    set.cut(start);
                    for flag in flags.iter_mut().skip(usize::try_from(start).expect("small")) {
                        *flag = false;
                    }
                    continue;
                }
                let end = (start + len).min(64);
                set.add(start..end);
                for at in start..end {
                    flags[usize::try_from(at).expect("small")] = true;
                }
            }
            prop_assert_eq!(bytes(&set), flags.clone());
            let runs = flags.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
            prop_assert_eq!(set.len(), runs);
        }
    }
}
