//! The map of one file in memory: where its bytes are on the LUN.
//!
//! ```text
//!   file   0        64K      128K            1M                  ?
//!          | Data    | Fresh  |  hole         |    not known yet
//!   LUN     ^ 7 GiB   ^ 9 GiB
//! ```
//! Parts become known as they are asked for. A `Fresh` part turns into `Data` here as soon as this node has written it;
//! the coordinator hears of that with the next commit.
//!
//! **Invariant:** what the coordinator says only fills gaps: it never undoes what this node has written (C2).

use std::collections::BTreeMap;
use std::ops::Range;

use super::ranges::RangeSet;
use super::{Extent, ExtentState, FsError};
use crate::proto as pb;

/// Unit of allocation and of validity, in bytes.
pub(super) const BLOCK_BYTES: u64 = 4096;

/// Largest offset in a file. Far from where sums overflow.
pub(super) const FILE_BYTES_MAX: u64 = 1 << 62;

/// Largest size of a file, whatever makes it grow.
pub(super) const SIZE_BYTES_MAX: u64 = FILE_BYTES_MAX - BLOCK_BYTES;

/// The end of a range that something is to be done to: `EFBIG` where no file can have it, `EINVAL` for none.
pub(super) fn end_of(offset: u64, len: u64) -> Result<u64, FsError> {
    if len == 0 {
        return Err(FsError::invalid(libc::EINVAL, "a range of no bytes"));
    }
    let end = offset.checked_add(len).filter(|end| *end <= SIZE_BYTES_MAX);
    end.ok_or_else(|| FsError::invalid(libc::EFBIG, "a file cannot be that large"))
}

pub(super) fn block_floor(offset: u64) -> u64 {
    offset & !(BLOCK_BYTES - 1)
}

pub(super) fn block_ceil(offset: u64) -> u64 {
    block_floor(offset.saturating_add(BLOCK_BYTES - 1))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    len: u64,
    lun: u64,
    state: ExtentState,
}

/// What a part of the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At this offset of the LUN.
    Data(u64),
    /// There too, but nothing was written yet.
    Fresh(u64),
    /// There too, and not to be written: other files may have it.
    Shared(u64),
    /// Nowhere.
    Hole,
    /// Not asked yet.
    Unknown,
}

/// A part of the file that is in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) place: Place,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct ExtentMap {
    runs: BTreeMap<u64, Run>,
    known: RangeSet,
}

impl ExtentMap {
    pub(super) fn clear(&mut self) {
        self.runs.clear();
        self.known.clear();
    }

    /// All that was not heard of is a hole.
    pub(super) fn know_all(&mut self) {
        self.known.add(0..FILE_BYTES_MAX);
    }

    /// What is at `at`, and how far it goes; not beyond `end`.
    pub(super) fn part(&self, at: u64, end: u64) -> Part {
        debug_assert!(at < end, "a part has a length");
        if let Some((&start, run)) = self.runs.range(..=at).next_back()
            && at < start + run.len
        {
            let lun = run.lun + (at - start);
            let place = match run.state {
                ExtentState::Data => Place::Data(lun),
                ExtentState::Fresh => Place::Fresh(lun),
                ExtentState::Shared => Place::Shared(lun),
            };
            return Part { start: at, len: end.min(start + run.len) - at, place };
        }
        let next = self.runs.range(at..end).next().map_or(end, |(&start, _)| start);
        match self.known.first_missing(at..next) {
            Some(missing) if missing == at => Part { start: at, len: next - at, place: Place::Unknown },
            Some(missing) => Part { start: at, len: missing - at, place: Place::Hole },
            None => Part { start: at, len: next - at, place: Place::Hole },
        }
    }

    /// All parts of a range, in order.
    pub(super) fn parts(&self, range: Range<u64>) -> impl Iterator<Item = Part> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            (at < range.end).then(|| {
                let part = self.part(at, range.end);
                at += part.len;
                part
            })
        })
    }

    /// Takes over an answer to `GetMap` or `Allocate` about the file from `from` on. Gives the end of what is known
    /// now, and how many bytes were new.
    ///
    /// # Errors
    /// When an extent is not inside a LUN of `lun_bytes` (C10), out of order, or not of whole blocks; nothing is
    /// changed then.
    pub(super) fn learn(
        &mut self,
        from: u64,
        answer: &pb::Map,
        lun_bytes: u64,
    ) -> Result<(u64, u64), FsError> {
        let mut last = 0;
        for extent in &answer.extents {
            check_extent(extent, last, lun_bytes)?;
            last = extent.file_offset + extent.length;
        }
        let mut new_bytes = 0;
        for extent in &answer.extents {
            new_bytes += self.fill(extent);
        }
        let end = if answer.end { FILE_BYTES_MAX } else { last.max(from) };
        self.known.add(from..end);
        Ok((end, new_bytes))
    }

    fn fill(&mut self, extent: &pb::Extent) -> u64 {
        let state = match extent.state() {
            pb::ExtentState::Data => ExtentState::Data,
            pb::ExtentState::Fresh => ExtentState::Fresh,
            pb::ExtentState::Shared => ExtentState::Shared,
            pb::ExtentState::Hole => return 0,
        };
        let range = extent.file_offset..extent.file_offset + extent.length;
        let gaps: Vec<Part> = self
            .parts(range.clone())
            .filter(|part| matches!(part.place, Place::Hole | Place::Unknown))
            .collect();
        for gap in &gaps {
            let lun = extent.lun_offset + (gap.start - range.start);
            self.put(gap.start, Run { len: gap.len, lun, state });
        }
        self.known.add(range);
        gaps.iter().map(|gap| gap.len).sum()
    }

    /// Puts a run where there is none, joined with its neighbours if they continue it.
    fn put(&mut self, start: u64, run: Run) {
        let (mut start, mut run) = (start, run);
        if let Some((&before, left)) = self.runs.range(..start).next_back()
            && before + left.len == start
            && left.lun + left.len == run.lun
            && left.state == run.state
        {
            run = Run { len: left.len + run.len, lun: left.lun, state: run.state };
            start = before;
        }
        let end = start + run.len;
        if let Some(right) = self.runs.get(&end)
            && run.lun + run.len == right.lun
            && right.state == run.state
        {
            run.len += right.len;
            self.runs.remove(&end);
        }
        self.runs.insert(start, run);
    }

    /// This node has written the whole blocks of `range`: what was Fresh is Data. Gives what was Fresh.
    pub(super) fn written(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        debug_assert!(range.start.is_multiple_of(BLOCK_BYTES) && range.end.is_multiple_of(BLOCK_BYTES));
        let fresh: Vec<Part> =
            self.parts(range).filter(|part| matches!(part.place, Place::Fresh(_))).collect();
        for part in &fresh {
            let Place::Fresh(lun) = part.place else { continue };
            self.carve(part.start, part.len);
            self.put(part.start, Run { len: part.len, lun, state: ExtentState::Data });
        }
        fresh.iter().map(|part| part.start..part.start + part.len).collect()
    }

    /// The known holes of `range`, in order.
    pub(super) fn holes(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let hole = |part: Part| (part.place == Place::Hole).then(|| part.start..part.start + part.len);
        if range.is_empty() { Vec::new() } else { self.parts(range).filter_map(hole).collect() }
    }

    /// Whether all of `range` is known to lie somewhere.
    pub(super) fn has_space(&self, range: Range<u64>) -> bool {
        self.parts(range).all(|part| !matches!(part.place, Place::Hole | Place::Unknown))
    }

    /// Fills a part of a known hole with fresh blocks at `lun`.
    pub(super) fn place(&mut self, start: u64, len: u64, lun: u64) {
        debug_assert_eq!(self.part(start, start + len), Part { start, len, place: Place::Hole });
        self.put(start, Run { len, lun, state: ExtentState::Fresh });
    }

    /// Makes the fresh blocks of `range` a hole again: gives where they lay, with their lengths.
    pub(super) fn take_fresh(&mut self, range: Range<u64>) -> Vec<(u64, u64)> {
        let fresh = |part: Part| match part.place {
            Place::Fresh(lun) => Some((part.start, part.len, lun)),
            _ => None,
        };
        let taken: Vec<(u64, u64, u64)> = self.parts(range).filter_map(fresh).collect();
        for (start, len, _) in &taken {
            self.carve(*start, *len);
        }
        taken.into_iter().map(|(_, len, lun)| (lun, len)).collect()
    }

    /// Makes `range` a hole, known as one where it was known.
    pub(super) fn punch(&mut self, range: Range<u64>) {
        let placed = |part: &Part| matches!(part.place, Place::Data(_) | Place::Fresh(_) | Place::Shared(_));
        let gone: Vec<Part> = self.parts(range).filter(placed).collect();
        for part in gone {
            self.carve(part.start, part.len);
        }
    }

    /// The data of `range` is shared with another file from now on.
    pub(super) fn share(&mut self, range: Range<u64>) {
        let data = |part: &Part| matches!(part.place, Place::Data(_));
        let parts: Vec<Part> = self.parts(range).filter(data).collect();
        for part in parts {
            let Place::Data(lun) = part.place else { continue };
            self.carve(part.start, part.len);
            self.put(part.start, Run { len: part.len, lun, state: ExtentState::Shared });
        }
    }

    /// What is shared at `start` was copied to `lun`, where it is the file's own.
    pub(super) fn copied(&mut self, start: u64, len: u64, lun: u64) {
        let shared = |part: &Part| matches!(part.place, Place::Shared(_));
        let parts: Vec<Part> = self.parts(start..start + len).filter(shared).collect();
        for part in parts {
            self.carve(part.start, part.len);
            let lun = lun + (part.start - start);
            self.put(part.start, Run { len: part.len, lun, state: ExtentState::Data });
        }
    }

    /// Takes over an answer to `Unshare`: what is shared here and the file's own there was copied.
    ///
    /// # Errors
    /// As [`ExtentMap::learn`].
    pub(super) fn learn_copies(&mut self, answer: &pb::Map, lun_bytes: u64) -> Result<(), FsError> {
        let mut last = 0;
        for extent in &answer.extents {
            check_extent(extent, last, lun_bytes)?;
            last = extent.file_offset + extent.length;
        }
        for extent in answer.extents.iter().filter(|e| e.state() == pb::ExtentState::Data) {
            self.copied(extent.file_offset, extent.length, extent.lun_offset);
        }
        Ok(())
    }

    /// Forgets what is known of `range`.
    pub(super) fn forget(&mut self, range: Range<u64>) {
        self.punch(range.clone());
        self.known.remove(range);
    }

    /// Where on the LUN the run ends that ends at `at`: what is placed there continues it.
    pub(super) fn goal(&self, at: u64) -> Option<u64> {
        let (start, run) = self.runs.range(..at).next_back()?;
        (start + run.len == at).then_some(run.lun + run.len)
    }

    /// Takes `[start, start + len)` out of the run that contains it.
    fn carve(&mut self, start: u64, len: u64) {
        let Some((&at, &run)) = self.runs.range(..=start).next_back() else { return };
        self.runs.remove(&at);
        if at < start {
            self.runs.insert(at, Run { len: start - at, ..run });
        }
        let (end, run_end) = (start + len, at + run.len);
        if end < run_end {
            self.runs.insert(end, Run { len: run_end - end, lun: run.lun + (end - at), state: run.state });
        }
    }

    /// Forgets all runs from `from` (a block boundary) on: they were given back. Known as a hole afterwards.
    pub(super) fn cut(&mut self, from: u64) {
        self.runs.split_off(&from);
        if let Some((&start, run)) = self.runs.range_mut(..from).next_back() {
            run.len = run.len.min(from - start);
        }
    }

    /// As [`ExtentMap::cut`], but written runs stay.
    pub(super) fn cut_fresh(&mut self, from: u64) {
        let tail: Vec<Part> =
            self.parts(from..FILE_BYTES_MAX).filter(|part| matches!(part.place, Place::Fresh(_))).collect();
        for part in tail {
            self.carve(part.start, part.len);
        }
    }

    /// End of the last run.
    pub(super) fn end(&self) -> u64 {
        self.runs.last_key_value().map_or(0, |(start, run)| start + run.len)
    }

    /// All runs, in order.
    pub(super) fn extents(&self) -> impl Iterator<Item = Extent> {
        self.runs.iter().map(|(&file_offset, run)| Extent {
            file_offset,
            length: run.len,
            lun_offset: run.lun,
            state: run.state,
        })
    }
}

fn check_extent(extent: &pb::Extent, last: u64, lun_bytes: u64) -> Result<(), FsError> {
    let whole =
        [extent.file_offset, extent.length, extent.lun_offset].iter().all(|n| n.is_multiple_of(BLOCK_BYTES));
    let in_file = extent.file_offset >= last
        && extent.file_offset.checked_add(extent.length).is_some_and(|end| end <= FILE_BYTES_MAX);
    let on_lun = extent.state() == pb::ExtentState::Hole
        || (extent.lun_offset > 0
            && extent.lun_offset.checked_add(extent.length).is_some_and(|end| end <= lun_bytes));
    if whole && in_file && on_lun && extent.length > 0 {
        return Ok(());
    }
    Err(FsError::Protocol(format!("an extent that cannot be: {extent:?} on a LUN of {lun_bytes} bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const B: u64 = BLOCK_BYTES;
    const LUN: u64 = 1 << 30;

    fn extent(at: u64, len: u64, lun: u64, state: pb::ExtentState) -> pb::Extent {
        pb::Extent { file_offset: at * B, length: len * B, lun_offset: lun * B, state: state.into() }
    }

    fn answer(extents: Vec<pb::Extent>, end: bool) -> pb::Map {
        pb::Map { extents, end }
    }

    #[test]
    fn parts_of_a_map_follow_each_other() {
        let mut map = ExtentMap::default();
        let extents =
            vec![extent(1, 2, 100, pb::ExtentState::Data), extent(4, 1, 200, pb::ExtentState::Fresh)];
        map.learn(0, &answer(extents, false), LUN).expect("a good map");
        let parts: Vec<_> =
            map.parts(0..6 * B).map(|part| (part.start / B, part.len / B, part.place)).collect();
        let expected = [
            (0, 1, Place::Hole),
            (1, 2, Place::Data(100 * B)),
            (3, 1, Place::Hole),
            (4, 1, Place::Fresh(200 * B)),
            (5, 1, Place::Unknown),
        ];
        assert_eq!(parts, expected);
    }

    // Invariant C2: what was written is not undone by an answer that is older.
    #[test]
    fn an_answer_never_undoes_what_was_written_here() {
        let mut map = ExtentMap::default();
        let fresh = answer(vec![extent(0, 8, 100, pb::ExtentState::Fresh)], true);
        map.learn(0, &fresh, LUN).expect("a good map");
        assert_eq!(map.written(2 * B..3 * B), vec![2 * B..3 * B]);
        map.learn(0, &fresh, LUN).expect("a good map");
        assert_eq!(map.part(2 * B, 8 * B), Part { start: 2 * B, len: B, place: Place::Data(102 * B) });
        assert_eq!(map.part(3 * B, 8 * B).place, Place::Fresh(103 * B));
    }

    // Invariant C10: an extent outside the LUN is refused.
    #[test]
    fn an_extent_outside_the_lun_is_refused_and_changes_nothing() {
        let bad = [
            extent(0, 1, LUN / B, pb::ExtentState::Data),
            extent(0, 0, 1, pb::ExtentState::Data),
            extent(0, 1, 0, pb::ExtentState::Data),
            pb::Extent { file_offset: 1, ..extent(0, 1, 1, pb::ExtentState::Data) },
            pb::Extent { length: u64::MAX - (B - 1), ..extent(1, 1, 1, pb::ExtentState::Fresh) },
        ];
        for extent in bad {
            let mut map = ExtentMap::default();
            assert!(map.learn(0, &answer(vec![extent], true), LUN).is_err(), "{extent:?}");
            assert_eq!(map.part(0, B).place, Place::Unknown);
        }
    }

    #[test]
    fn neighbours_that_continue_each_other_are_one_run() {
        let mut map = ExtentMap::default();
        map.learn(0, &answer(vec![extent(0, 64, 100, pb::ExtentState::Fresh)], true), LUN)
            .expect("a good map");
        for block in [1, 3, 2, 0] {
            map.written(block * B..(block + 1) * B);
        }
        assert_eq!(map.extents().count(), 2);
    }

    #[test]
    fn a_trim_leaves_what_was_written() {
        let mut map = ExtentMap::default();
        map.learn(0, &answer(vec![extent(0, 8, 100, pb::ExtentState::Fresh)], true), LUN)
            .expect("a good map");
        map.written(4 * B..5 * B);
        map.cut_fresh(2 * B);
        let left: Vec<_> = map.extents().map(|e| (e.file_offset / B, e.length / B)).collect();
        assert_eq!(left, [(0, 2), (4, 1)]);
    }

    #[test]
    fn what_is_shared_becomes_the_files_own_only_where_it_was_copied() {
        let mut map = ExtentMap::default();
        let extents =
            vec![extent(0, 4, 100, pb::ExtentState::Data), extent(6, 2, 200, pb::ExtentState::Fresh)];
        map.learn(0, &answer(extents, true), LUN).expect("a good map");
        map.share(0..8 * B);
        assert_eq!(map.part(0, 4 * B).place, Place::Shared(100 * B));
        assert_eq!(map.part(6 * B, 8 * B).place, Place::Fresh(200 * B), "nothing was written there");
        map.copied(B, 2 * B, 300 * B);
        let parts: Vec<_> = map.parts(0..4 * B).map(|part| (part.start / B, part.place)).collect();
        let expected = [(0, Place::Shared(100 * B)), (1, Place::Data(300 * B)), (3, Place::Shared(103 * B))];
        assert_eq!(parts, expected);
        map.forget(0..2 * B);
        assert_eq!(map.part(0, 4 * B), Part { start: 0, len: 2 * B, place: Place::Unknown });
    }

    proptest! {
        #[test]
        fn a_map_agrees_with_a_row_of_blocks(
            steps in proptest::collection::vec((0u64..32, 1u64..8, 0u8..3), 0..40),
        ) {
            let mut map = ExtentMap::default();
            map.known.add(0..FILE_BYTES_MAX);
            let mut row = vec![Place::Hole; 40];
            for (n, (at, len, kind)) in steps.into_iter().enumerate() {
                let lun = 1000 * (n as u64 + 1);
                let blocks = at..at + len;
                match kind {
                    0 => {
                        map.learn(at * B, &answer(vec![extent(at, len, lun, pb::ExtentState::Fresh)], false), LUN)
                            .expect("a good map");
                        for block in blocks {
                            let slot = &mut row[usize::try_from(block).expect("small")];
                            if *slot == Place::Hole {
                                *slot = Place::Fresh((lun + block - at) * B);
                            }
                        }
                    }
                    1 => {
                        map.written(at * B..(at + len) * B);
                        for block in blocks {
                            let slot = &mut row[usize::try_from(block).expect("small")];
                            if let Place::Fresh(lun) = *slot {
                                *slot = Place::Data(lun);
                            }
                        }
                    }
                    _ => {
                        map.cut(at * B);
                        for slot in row.iter_mut().skip(usize::try_from(at).expect("small")) {
                            *slot = Place::Hole;
                        }
                    }
                }
            }
            for (block, place) in row.iter().enumerate() {
                let at = block as u64 * B;
                prop_assert_eq!(map.part(at, at + B).place, *place);
            }
        }
    }
}
