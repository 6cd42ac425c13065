//! The map of a file: which blocks of the LUN carry which blocks of the file, and in what state.
//!
//! ```text
//!   file   |DDDDDDDD|FFFF|........|SSSS|      D data   S shared data   F fresh (allocated, reads zeros)   . hole
//!   LUN     500..508 508..512      90..94
//! ```
//! Pure functions over a window of a file's extents: the ones that touch the range in question and their neighbours.
//! The caller loads the window, and stores the difference.
//!
//! **Invariant:** extents of a file are sorted, do not overlap, are not empty, and neighbours that could be one are one.

use std::ops::Range;

/// What reading a block gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The content of the LUN.
    Data,
    /// Zeros: allocated, but what the LUN holds there belonged to somebody else.
    Fresh,
    /// The content of the LUN, which other files may have too: it is never written in place. The counts of references
    /// tell whether somebody still has it.
    Shared,
}

/// A run of blocks that is contiguous in the file and on the LUN. All numbers count blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First block in the file.
    pub file: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// First block on the LUN.
    pub lun: u64,
    /// What reading gives.
    pub state: State,
}

impl Extent {
    /// One past the last block in the file.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.file + self.blocks
    }

    /// The part of it in `range`, if any.
    #[must_use]
    pub fn part(&self, range: &Range<u64>) -> Option<Self> {
        let (from, to) = (self.file.max(range.start), self.end().min(range.end));
        let skip = from.checked_sub(self.file)?;
        (from < to).then(|| Self { file: from, blocks: to - from, lun: self.lun + skip, state: self.state })
    }

    fn when_written(self) -> Self {
        let state = if self.state == State::Fresh { State::Data } else { self.state };
        Self { state, ..self }
    }

    fn continued_by(&self, next: &Self) -> bool {
        self.end() == next.file && self.lun + self.blocks == next.lun && self.state == next.state
    }
}

/// A run of blocks on the LUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// First block.
    pub start: u64,
    /// Number of blocks.
    pub blocks: u64,
}

/// The parts of `range` that no extent covers.
#[must_use]
pub fn holes(window: &[Extent], range: Range<u64>) -> Vec<Range<u64>> {
    let (mut holes, mut at) = (Vec::new(), range.start);
    for extent in window.iter().filter_map(|e| e.part(&range)) {
        if extent.file > at {
            holes.push(at..extent.file);
        }
        at = extent.end();
    }
    if at < range.end {
        holes.push(at..range.end);
    }
    holes
}

/// The window with `runs` put into its `holes`, as fresh blocks, in order. Stops when either is used up.
#[must_use]
pub fn fill(window: &[Extent], holes: &[Range<u64>], runs: &[Run]) -> Vec<Extent> {
    let mut filled = window.to_vec();
    let mut runs = runs.iter().copied();
    let mut run = runs.next();
    for hole in holes {
        let mut at = hole.start;
        while at < hole.end {
            let Some(current) = &mut run else { return merged(filled) };
            let blocks = current.blocks.min(hole.end - at);
            filled.push(Extent { file: at, blocks, lun: current.start, state: State::Fresh });
            at += blocks;
            current.start += blocks;
            current.blocks -= blocks;
            if current.blocks == 0 {
                run = runs.next();
            }
        }
    }
    merged(filled)
}

/// The window with the fresh blocks of `range` turned into data.
#[must_use]
pub fn written(window: &[Extent], range: &Range<u64>) -> Vec<Extent> {
    let mut next = Vec::with_capacity(window.len() + 2);
    for extent in window {
        next.extend(extent.part(&(0..range.start)));
        next.extend(extent.part(range).map(Extent::when_written));
        next.extend(extent.part(&(range.end..u64::MAX)));
    }
    merged(next)
}

/// The window with the data of `range` marked as shared.
#[must_use]
pub fn shared(window: &[Extent], range: &Range<u64>) -> Vec<Extent> {
    let mut next = Vec::with_capacity(window.len() + 2);
    for extent in window {
        let state = if extent.state == State::Data { State::Shared } else { extent.state };
        next.extend(extent.part(&(0..range.start)));
        next.extend(extent.part(range).map(|part| Extent { state, ..part }));
        next.extend(extent.part(&(range.end..u64::MAX)));
    }
    merged(next)
}

/// The window without the blocks of `range` whose state `gone` accepts, and what the file no longer has.
#[must_use]
pub fn without(
    window: &[Extent],
    range: &Range<u64>,
    gone: impl Fn(State) -> bool,
) -> (Vec<Extent>, Vec<Extent>) {
    let (mut kept, mut freed) = (Vec::with_capacity(window.len()), Vec::new());
    for extent in window {
        let Some(part) = extent.part(range).filter(|part| gone(part.state)) else {
            kept.push(*extent);
            continue;
        };
        kept.extend(extent.part(&(0..range.start)));
        kept.extend(extent.part(&(range.end..u64::MAX)));
        freed.push(part);
    }
    (merged(kept), freed)
}

/// Sorted, and with neighbours joined.
#[must_use]
pub fn merged(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_by_key(|e| e.file);
    let mut out: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match out.last_mut() {
            Some(last) if last.continued_by(&extent) => last.blocks += extent.blocks,
            _ => out.push(extent),
        }
    }
    out
}

/// Why `extents` cannot be the map of a file on a LUN whose data area is `area`; `None` when they can.
#[must_use]
pub fn fault(extents: &[Extent], area: &Range<u64>) -> Option<String> {
    let mut end = 0;
    for e in extents {
        let lun_end = e.lun.checked_add(e.blocks);
        if e.blocks == 0 || e.file.checked_add(e.blocks).is_none() {
            return Some(format!("an extent of {} blocks at {}", e.blocks, e.file));
        }
        if e.file < end {
            return Some(format!("extents overlap at block {}", e.file));
        }
        if e.lun < area.start || lun_end.is_none_or(|at| at > area.end) {
            return Some(format!("block {} lies outside the data area, at {}", e.file, e.lun));
        }
        end = e.end();
    }
    None
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "the model's files have 64 blocks")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE_BLOCKS: u64 = 64;

    /// A file as an array: for each block the LUN block and its state.
    type Model = Vec<Option<(u64, State)>>;

    fn model_of(extents: &[Extent]) -> Model {
        let mut model = vec![None; FILE_BLOCKS as usize];
        for e in extents {
            for i in 0..e.blocks {
                let slot = &mut model[(e.file + i) as usize];
                assert!(slot.is_none(), "extents overlap");
                *slot = Some((e.lun + i, e.state));
            }
        }
        model
    }

    #[derive(Clone, Debug)]
    enum Step {
        Fill { from: u64, len: u64, pieces: Vec<u64> },
        Written { from: u64, len: u64 },
        Share { from: u64, len: u64 },
        Truncate { from: u64 },
        TrimFresh { from: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let (at, len) = (0..FILE_BLOCKS, 1..20_u64);
        prop_oneof![
            3 => (at.clone(), len.clone(), prop::collection::vec(1..9_u64, 1..8))
                .prop_map(|(from, len, pieces)| Step::Fill { from, len, pieces }),
            3 => (at.clone(), len).prop_map(|(from, len)| Step::Written { from, len }),
            1 => (at.clone(), 1..20_u64).prop_map(|(from, len)| Step::Share { from, len }),
            1 => at.clone().prop_map(|from| Step::Truncate { from }),
            1 => at.prop_map(|from| Step::TrimFresh { from }),
        ]
    }

    /// LUN blocks given out by the test, sometimes contiguous with the ones before.
    fn runs(next: &mut u64, pieces: &[u64]) -> Vec<Run> {
        let mut runs = Vec::new();
        for (i, blocks) in pieces.iter().enumerate() {
            *next += if i % 2 == 0 { 0 } else { 3 };
            runs.push(Run { start: *next, blocks: *blocks });
            *next += blocks;
        }
        runs
    }

    fn apply(extents: &[Extent], model: &mut Model, step: &Step, next: &mut u64) -> Vec<Extent> {
        match step {
            Step::Fill { from, len, pieces } => {
                let range = *from..(from + len).min(FILE_BLOCKS);
                let (holes, runs) = (holes(extents, range.clone()), runs(next, pieces));
                let mut blocks = runs.iter().flat_map(|r| r.start..r.start + r.blocks);
                for at in range {
                    let slot = &mut model[at as usize];
                    if slot.is_none() {
                        *slot = blocks.next().map(|lun| (lun, State::Fresh));
                    }
                }
                fill(extents, &holes, &runs)
            }
            Step::Written { from, len } => {
                let range = *from..(from + len).min(FILE_BLOCKS);
                for slot in &mut model[range.start as usize..range.end as usize] {
                    *slot = slot.map(|(lun, old)| (lun, if old == State::Fresh { State::Data } else { old }));
                }
                written(extents, &range)
            }
            Step::Share { from, len } => {
                let range = *from..(from + len).min(FILE_BLOCKS);
                for slot in &mut model[range.start as usize..range.end as usize] {
                    *slot =
                        slot.map(|(lun, old)| (lun, if old == State::Data { State::Shared } else { old }));
                }
                shared(extents, &range)
            }
            Step::Truncate { from } => cut(extents, model, *from, |_| true),
            Step::TrimFresh { from } => cut(extents, model, *from, |state| state == State::Fresh),
        }
    }

    fn cut(extents: &[Extent], model: &mut Model, from: u64, gone: impl Fn(State) -> bool) -> Vec<Extent> {
        let mut expected = Vec::new();
        for slot in &mut model[from as usize..] {
            if let Some((lun, _)) = slot.take_if(|(_, state)| gone(*state)) {
                expected.push(lun);
            }
        }
        let (kept, freed) = without(extents, &(from..u64::MAX), gone);
        let freed: Vec<u64> = freed.iter().flat_map(|e| e.lun..e.lun + e.blocks).collect();
        assert_eq!(freed, expected, "exactly what was cut is freed");
        kept
    }

    proptest! {
        // Invariant C3: validity is kept per block, whatever the order of operations.
        #[test]
        fn the_map_of_a_file_behaves_like_an_array_of_blocks(steps in prop::collection::vec(step(), 1..60)) {
            let (mut extents, mut model, mut next) = (Vec::new(), vec![None; FILE_BLOCKS as usize], 1000);
            for step in &steps {
                extents = apply(&extents, &mut model, step, &mut next);
                prop_assert_eq!(&model_of(&extents), &model);
                prop_assert_eq!(fault(&extents, &(1000..u64::MAX)), None);
                prop_assert!(extents.windows(2).all(|w| !w[0].continued_by(&w[1])), "not merged");
            }
        }
    }

    // Invariant C10.
    #[test]
    fn impossible_maps_are_told() {
        let e = |file, blocks, lun| Extent { file, blocks, lun, state: State::Data };
        let area = 100..200;
        assert_eq!(fault(&[e(0, 10, 100), e(10, 90, 110)], &area), None);
        assert!(fault(&[e(0, 0, 100)], &area).is_some());
        assert!(fault(&[e(0, 10, 100), e(9, 1, 150)], &area).is_some());
        assert!(fault(&[e(0, 10, 99)], &area).is_some());
        assert!(fault(&[e(0, 10, 191)], &area).is_some());
        assert!(fault(&[e(0, 2, u64::MAX)], &area).is_some());
        assert!(fault(&[e(u64::MAX, 2, 100)], &area).is_some());
    }
}
