//! Blocks that several files have, and the counts of them.
//!
//! **Invariant:** the references are counted from the extents, never believed: a block that `n >= 2` marked extents have
//! has the count `n`, and no other block has one.

use std::collections::BTreeMap;

use super::Findings;
use crate::meta::{Snapshot, StoreError};
use crate::refcounts::SharedRun;

/// A run of blocks with its number of references.
type Counted = (u64, u64, u64);

/// Compares the counts with `references`, the runs that marked extents have. Gives each block that any of them has once.
pub(super) fn check(
    snapshot: &Snapshot,
    references: &[(u64, u64)],
    findings: &mut Findings,
) -> Result<Vec<(u64, u64)>, StoreError> {
    let there = counted(references);
    let mut kept: Vec<SharedRun> = Vec::new();
    snapshot.each_shared_run(|run| {
        if kept.last().is_some_and(|last| last.end() > run.start) {
            findings.problem(0, format!("the references to block {} are counted twice", run.start));
        }
        kept.push(run);
        Ok(())
    })?;
    for (start, end, found, kept) in differences(&there, &kept) {
        let last = end - 1;
        findings.problem(0, format!("blocks {start} to {last} have {found} references, {kept} are counted"));
    }
    let owned: Vec<(u64, u64)> = there.into_iter().map(|(start, end, _)| (start, end - start)).collect();
    findings.report.shared_blocks = owned.iter().map(|(_, blocks)| blocks).sum();
    Ok(owned)
}

/// How often each block is in `runs`, as runs of equal number.
pub(super) fn counted(runs: &[(u64, u64)]) -> Vec<Counted> {
    let mut changes: BTreeMap<u64, i64> = BTreeMap::new();
    for (start, blocks) in runs {
        *changes.entry(*start).or_default() += 1;
        *changes.entry(start.saturating_add(*blocks)).or_default() -= 1;
    }
    let (mut counted, mut depth, mut at) = (Vec::new(), 0_i64, 0);
    for (place, change) in changes {
        if depth > 0 && at < place {
            counted.push((at, place, depth.unsigned_abs()));
        }
        (at, depth) = (place, depth + change);
    }
    counted
}

/// Where the two disagree: the blocks, how many references are there, how many are counted. One reference needs no count.
pub(super) fn differences(there: &[Counted], kept: &[SharedRun]) -> Vec<(u64, u64, u64, u64)> {
    let mut changes: BTreeMap<u64, (i64, i64)> = BTreeMap::new();
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    for (start, end, count) in there.iter().filter(|(_, _, count)| *count >= 2) {
        changes.entry(*start).or_default().0 += number(*count);
        changes.entry(*end).or_default().0 -= number(*count);
    }
    for run in kept {
        let change = changes.entry(run.start).or_default();
        change.1 = change.1.saturating_add(number(run.count));
        let change = changes.entry(run.end()).or_default();
        change.1 = change.1.saturating_sub(number(run.count));
    }
    let (mut found, mut at, mut now) = (Vec::new(), 0, (0_i64, 0_i64));
    for (place, change) in changes {
        if now.0 != now.1 && at < place {
            found.push((at, place, now.0.unsigned_abs(), now.1.unsigned_abs()));
        }
        at = place;
        now = (now.0.saturating_add(change.0), now.1.saturating_add(change.1));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_counted_block_by_block() {
        assert_eq!(
            counted(&[(10, 10), (15, 10), (30, 1)]),
            [(10, 15, 1), (15, 20, 2), (20, 25, 1), (30, 31, 1)]
        );
    }

    #[test]
    fn a_count_that_is_wrong_missing_or_left_over_is_told() {
        let there = [(0, 10, 2), (10, 20, 1), (20, 30, 3)];
        let run = |start, blocks, count| SharedRun { start, blocks, count };
        assert_eq!(differences(&there, &[run(0, 10, 2), run(20, 10, 3)]), []);
        assert_eq!(
            differences(&there, &[run(0, 5, 2), run(12, 2, 2), run(20, 10, 2)]),
            [(5, 10, 2, 0), (12, 14, 0, 2), (20, 30, 3, 2)]
        );
    }
}
