//! Free space: which blocks of the data area nobody owns.
//!
//! ```text
//!   take  <--  [ free: ordered by place and by size ]  <-- settle --  [ pending: freed in this transaction ]  <-- free
//!                          \__ changes since the last settle: mirrored into the store's table of free runs
//! ```
//! A part is held back from files, so that the metadata store can grow and deletes work when the volume is full.
//!
//! **Invariant:** a block that was freed is not given out again before the transaction that freed it is durable (C7).

use std::collections::{BTreeMap, BTreeSet};

use crate::extents::Run;

/// How many runs after the goal are tried before the best fit of the whole volume is taken.
const NEAR_TRIES: usize = 32;

/// Free space of a volume, in blocks.
#[derive(Debug, Default)]
pub struct Allocator {
    free: BTreeMap<u64, u64>,
    /// The same runs as (blocks, start).
    by_size: BTreeSet<(u64, u64)>,
    free_blocks: u64,
    pending: Vec<Run>,
    pending_blocks: u64,
    held_back: u64,
    /// Runs that the store's table must get (blocks) or lose (`None`).
    changes: BTreeMap<u64, Option<u64>>,
}

/// The free runs cannot be: they overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("block {block} is free twice")]
pub struct FreeTwice {
    /// The block.
    pub block: u64,
}

impl Allocator {
    /// Free space as the store's table has it, in order.
    ///
    /// # Errors
    /// [`FreeTwice`] when runs overlap.
    pub fn new(runs: impl IntoIterator<Item = (u64, u64)>) -> Result<Self, FreeTwice> {
        let mut this = Self::default();
        for (start, blocks) in runs {
            this.put_back(Run { start, blocks })?;
        }
        this.changes.clear();
        Ok(this)
    }

    /// Sets how many blocks files do not get.
    pub fn hold_back(&mut self, blocks: u64) {
        self.held_back = blocks;
    }

    /// Blocks that files can get now.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.free_blocks.saturating_sub(self.held_back)
    }

    /// All free blocks, with those held back and those that become free with this transaction.
    #[must_use]
    pub fn total_free(&self) -> u64 {
        self.free_blocks + self.pending_blocks
    }

    /// Blocks that become usable when the current transaction is durable.
    #[must_use]
    pub fn pending(&self) -> u64 {
        self.pending_blocks
    }

    /// Takes exactly `blocks` for a file, near `goal` and in as few runs as possible; `None` when there are not as many.
    pub fn take(&mut self, goal: Option<u64>, blocks: u64) -> Option<Vec<Run>> {
        (blocks <= self.available()).then(|| self.take_runs(goal, blocks, usize::MAX))
    }

    /// Takes up to `blocks` in at most `runs_max` runs, from what is held back too.
    pub fn take_held_back(&mut self, blocks: u64, runs_max: usize) -> Vec<Run> {
        self.take_runs(None, blocks.min(self.free_blocks), runs_max)
    }

    fn take_runs(&mut self, mut goal: Option<u64>, blocks: u64, runs_max: usize) -> Vec<Run> {
        let (mut runs, mut left) = (Vec::new(), blocks);
        while left > 0 && runs.len() < runs_max {
            let Some(run) = self.pick(goal, left) else { break };
            self.cut(run);
            left -= run.blocks;
            goal = Some(run.start + run.blocks);
            runs.push(run);
        }
        runs
    }

    /// The run to take next: at the goal, else the next large enough one after it, else the best fit, else the largest.
    fn pick(&self, goal: Option<u64>, blocks: u64) -> Option<Run> {
        let cap = |(start, len): (u64, u64)| Run { start, blocks: len.min(blocks) };
        if let Some(goal) = goal {
            let around = self.free.range(..=goal).next_back().filter(|(start, len)| *start + **len > goal);
            if let Some((start, len)) = around {
                return Some(cap((goal, start + len - goal)));
            }
            let near = self.free.range(goal..).take(NEAR_TRIES).find(|(_, len)| **len >= blocks);
            if let Some((start, len)) = near {
                return Some(cap((*start, *len)));
            }
        }
        let fit = self.by_size.range((blocks, 0)..).next().or_else(|| self.by_size.last());
        fit.map(|(len, start)| cap((*start, *len)))
    }

    fn cut(&mut self, run: Run) {
        let (start, len) = self
            .free
            .range(..=run.start)
            .next_back()
            .map(|(start, len)| (*start, *len))
            .expect("the run was picked from the free ones");
        self.drop_run(start, len);
        let (end, run_end) = (start + len, run.start + run.blocks);
        if start < run.start {
            self.add_run(start, run.start - start);
        }
        if run_end < end {
            self.add_run(run_end, end - run_end);
        }
    }

    /// Gives blocks back. They are usable after the next [`Allocator::settle`].
    pub fn free(&mut self, run: Run) {
        self.pending_blocks += run.blocks;
        self.pending.push(run);
    }

    /// Ends the transaction's allocations: what it freed joins the free runs. Nothing may be taken between this and the
    /// end of the commit.
    ///
    /// # Errors
    /// [`FreeTwice`] when something was freed that is free: the metadata is damaged.
    pub fn settle(&mut self) -> Result<BTreeMap<u64, Option<u64>>, FreeTwice> {
        for run in std::mem::take(&mut self.pending) {
            self.put_back(run)?;
        }
        self.pending_blocks = 0;
        Ok(std::mem::take(&mut self.changes))
    }

    fn put_back(&mut self, run: Run) -> Result<(), FreeTwice> {
        let (mut start, mut blocks) = (run.start, run.blocks);
        let end = start.checked_add(blocks).ok_or(FreeTwice { block: start })?;
        let before = self.free.range(..end).next_back().map(|(s, l)| (*s, *l));
        if let Some((s, l)) = before.filter(|(s, l)| s + l > start) {
            return Err(FreeTwice { block: s.max(start).min(s + l - 1) });
        }
        if let Some((s, l)) = before.filter(|(s, l)| s + l == start) {
            self.drop_run(s, l);
            (start, blocks) = (s, blocks + l);
        }
        if let Some(len) = self.free.get(&end).copied() {
            self.drop_run(end, len);
            blocks += len;
        }
        self.add_run(start, blocks);
        Ok(())
    }

    fn add_run(&mut self, start: u64, blocks: u64) {
        self.free.insert(start, blocks);
        self.by_size.insert((blocks, start));
        self.free_blocks += blocks;
        self.changes.insert(start, Some(blocks));
    }

    fn drop_run(&mut self, start: u64, blocks: u64) {
        self.free.remove(&start);
        self.by_size.remove(&(blocks, start));
        self.free_blocks -= blocks;
        self.changes.insert(start, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(start: u64, blocks: u64) -> Run {
        Run { start, blocks }
    }

    #[test]
    fn growth_at_the_goal_is_contiguous() {
        let mut a = Allocator::new([(100, 100)]).expect("no overlap");
        assert_eq!(a.take(None, 10), Some(vec![run(100, 10)]));
        assert_eq!(a.take(Some(150), 10), Some(vec![run(150, 10)]));
        assert_eq!(a.take(Some(160), 10), Some(vec![run(160, 10)]));
    }

    // Invariant C7.
    #[test]
    fn freed_blocks_are_reusable_only_after_the_transaction() {
        let mut a = Allocator::new([(0, 10)]).expect("no overlap");
        let runs = a.take(None, 10).expect("ten are free");
        runs.into_iter().for_each(|r| a.free(r));
        assert_eq!(a.take(None, 1), None);
        a.settle().expect("freed once");
        assert_eq!(a.take(None, 10), Some(vec![run(0, 10)]));
    }

    #[test]
    fn what_is_held_back_is_not_for_files() {
        let mut a = Allocator::new([(0, 10)]).expect("no overlap");
        a.hold_back(4);
        assert_eq!(a.take(None, 7), None);
        assert!(a.take(None, 6).is_some());
        assert_eq!(a.take_held_back(10, 8), vec![run(6, 4)]);
    }

    #[test]
    fn a_block_freed_twice_is_noticed() {
        let mut a = Allocator::new([(0, 10)]).expect("no overlap");
        a.free(run(9, 3));
        assert_eq!(a.settle(), Err(FreeTwice { block: 9 }));
        assert!(Allocator::new([(0, 10), (5, 1)]).is_err());
    }

    proptest! {
        // The store's table, kept by the changes alone, always equals the free runs; no block is given out twice.
        #[test]
        fn the_mirrored_table_equals_the_free_runs(
            steps in prop::collection::vec((0..3_u8, 0..400_u64, 1..60_u64), 1..80),
        ) {
            let mut a = Allocator::new([(0, 300), (320, 80)]).expect("no overlap");
            let mut table: BTreeMap<u64, u64> = [(0, 300), (320, 80)].into();
            let mut used: Vec<Run> = Vec::new();
            for (what, goal, blocks) in steps {
                match what {
                    0 => if let Some(runs) = a.take(Some(goal), blocks) {
                        prop_assert_eq!(runs.iter().map(|r| r.blocks).sum::<u64>(), blocks);
                        used.extend(runs);
                    },
                    1 if !used.is_empty() => {
                        let at = usize::try_from(goal).expect("small") % used.len();
                        a.free(used.swap_remove(at));
                    }
                    _ => for (start, blocks) in a.settle().expect("nothing is freed twice") {
                        match blocks {
                            Some(blocks) => table.insert(start, blocks),
                            None => table.remove(&start),
                        };
                    },
                }
                let mut seen = used.clone();
                seen.sort();
                prop_assert!(seen.windows(2).all(|w| w[0].start + w[0].blocks <= w[1].start), "given out twice");
            }
            for (start, blocks) in a.settle().expect("nothing is freed twice") {
                match blocks {
                    Some(blocks) => table.insert(start, blocks),
                    None => table.remove(&start),
                };
            }
            prop_assert_eq!(&table, &a.free);
            prop_assert_eq!(table.values().sum::<u64>() + used.iter().map(|r| r.blocks).sum::<u64>(), 380);
        }
    }
}
