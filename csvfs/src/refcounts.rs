//! How many extents have a block: what clones share.
//!
//! ```text
//!   file a   |SSSSSSSS|DDDD|           LUN     100......108   108..112   300..304
//!   file b   |SSSS|SSSS|DDDD|          counts      2          -          -        blocks with one reference have no count
//! ```
//! Pure functions over a window of the counts: the runs that touch the blocks in question. The caller loads the window
//! and stores the difference.
//!
//! **Invariant:** runs do not overlap, and each has a count of two or more; a block without a count has one reference at
//! most, and is free when that goes.

use crate::extents::Run;

/// Blocks that several extents have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SharedRun {
    /// First block on the LUN.
    pub(crate) start: u64,
    /// Number of blocks.
    pub(crate) blocks: u64,
    /// Number of extents that have them.
    pub(crate) count: u64,
}

impl SharedRun {
    /// One past the last block.
    #[must_use]
    pub(crate) fn end(&self) -> u64 {
        self.start + self.blocks
    }
}

/// A piece of a run of blocks, and what its count is: 1 for blocks without one.
struct Piece {
    start: u64,
    end: u64,
    count: u64,
    /// Whether it lies in the run in question.
    inside: bool,
}

/// The window and `run`, cut where either begins or ends.
fn pieces(window: &[SharedRun], run: Run) -> Vec<Piece> {
    let (from, to) = (run.start, run.start + run.blocks);
    let mut pieces = Vec::with_capacity(window.len() + 2);
    let mut at = from;
    for row in window {
        let (low, high) = (row.start.clamp(from, to), row.end().clamp(from, to));
        let parts = [
            (row.start, row.end().min(from), row.count, false),
            (at, low, 1, true),
            (low, high, row.count, true),
            (row.start.max(to), row.end(), row.count, false),
        ];
        let whole = parts.into_iter().filter(|(start, end, ..)| start < end);
        pieces.extend(whole.map(|(start, end, count, inside)| Piece { start, end, count, inside }));
        at = at.max(high);
    }
    if at < to {
        pieces.push(Piece { start: at, end: to, count: 1, inside: true });
    }
    pieces.sort_by_key(|piece| piece.start);
    pieces
}

/// The window when one more extent has `run`.
#[must_use]
pub(crate) fn referenced(window: &[SharedRun], run: Run) -> Vec<SharedRun> {
    let one_more = |piece: &Piece| piece.count + u64::from(piece.inside);
    joined(pieces(window, run).iter().map(|piece| (piece.start, piece.end, one_more(piece))))
}

/// The window when one extent less has `run`, and what nobody has then.
#[must_use]
pub(crate) fn released(window: &[SharedRun], run: Run) -> (Vec<SharedRun>, Vec<Run>) {
    let pieces = pieces(window, run);
    let free = pieces.iter().filter(|piece| piece.inside && piece.count == 1);
    let free = free.map(|piece| Run { start: piece.start, blocks: piece.end - piece.start }).collect();
    let one_less = |piece: &Piece| piece.count - u64::from(piece.inside);
    let left = joined(pieces.iter().map(|piece| (piece.start, piece.end, one_less(piece))));
    (left, free)
}

/// Runs with a count, neighbours of the same count joined.
fn joined(pieces: impl Iterator<Item = (u64, u64, u64)>) -> Vec<SharedRun> {
    let mut runs: Vec<SharedRun> = Vec::new();
    for (start, end, count) in pieces.filter(|(_, _, count)| *count >= 2) {
        match runs.last_mut() {
            Some(last) if last.end() == start && last.count == count => last.blocks += end - start,
            _ => runs.push(SharedRun { start, blocks: end - start, count }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const BLOCKS: u64 = 64;

    /// Runs that touch `run`, as the table gives them.
    fn window(table: &[SharedRun], run: Run) -> Vec<SharedRun> {
        let touches = |row: &&SharedRun| row.end() >= run.start && row.start <= run.start + run.blocks;
        table.iter().filter(touches).copied().collect()
    }

    fn replace(table: &mut Vec<SharedRun>, old: &[SharedRun], new: Vec<SharedRun>) {
        table.retain(|row| !old.contains(row));
        table.extend(new);
        table.sort();
    }

    fn counts(table: &[SharedRun]) -> BTreeMap<u64, u64> {
        let blocks = |row: SharedRun| (row.start..row.end()).map(move |block| (block, row.count));
        let all: Vec<(u64, u64)> = table.iter().copied().flat_map(blocks).collect();
        let counts: BTreeMap<u64, u64> = all.iter().copied().collect();
        assert_eq!(counts.len(), all.len(), "runs overlap");
        counts
    }

    proptest! {
        #[test]
        fn counts_agree_with_a_row_of_blocks(
            steps in prop::collection::vec((any::<bool>(), 0..BLOCKS - 1, 1..20_u64), 1..80),
        ) {
            let mut table = Vec::new();
            let mut model: BTreeMap<u64, u64> = (0..BLOCKS).map(|block| (block, 1)).collect();
            for (more, start, blocks) in steps {
                let run = Run { start, blocks: blocks.min(BLOCKS - start) };
                let range = run.start..run.start + run.blocks;
                let old = window(&table, run);
                if more {
                    replace(&mut table, &old, referenced(&old, run));
                    range.for_each(|block| *model.entry(block).or_default() += 1);
                } else {
                    // Only what somebody has is released.
                    if range.clone().any(|block| model[&block] == 0) {
                        continue;
                    }
                    let (left, free) = released(&old, run);
                    replace(&mut table, &old, left);
                    let freed: Vec<u64> = free.iter().flat_map(|r| r.start..r.start + r.blocks).collect();
                    let expected: Vec<u64> = range.clone().filter(|block| model[block] == 1).collect();
                    prop_assert_eq!(freed, expected);
                    range.for_each(|block| *model.entry(block).or_default() -= 1);
                }
                // A block that is free is given to somebody before it is used again.
                model.values_mut().filter(|count| **count == 0).for_each(|count| *count = 1);
                let shared: BTreeMap<u64, u64> =
                    model.iter().filter(|(_, count)| **count >= 2).map(|(b, c)| (*b, *c)).collect();
                prop_assert_eq!(counts(&table), shared);
                prop_assert!(table.windows(2).all(|w| w[0].end() < w[1].start || w[0].count != w[1].count));
            }
        }
    }
}
