//! Reading metadata as it is after replay, whether or not the replay was written to the file.
//!
//! ```text
//!   file:      [ ........... page as it lies on the medium ........ ]
//!   patches:             [ page of the log ]      [ zeros ]           (read-only open of a dirty image)
//!   view:      [ ........[ page of the log ]......[ zeros ].... 0000 ]  zeros past the end
//! ```
//! **Invariant:** a view never reads past the file and never allocates more than it was asked for.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use blockio::{ImageFile, IoBuf};

use crate::error::{VhdxError, doing};
use crate::format::{bytes, index};

/// New content of a range of the file.
#[derive(Clone, Debug)]
pub(crate) enum Patch {
    /// These bytes; as long as the range.
    Bytes(Arc<Vec<u8>>, usize),
    /// Zeros.
    Zero,
}

/// Ranges of the file with other content than the medium has. They never overlap.
#[derive(Clone, Debug, Default)]
pub(crate) struct Patches {
    by_start: BTreeMap<u64, (u64, Patch)>,
}

impl Patches {
    /// Adds a page; it wins over what was there.
    pub(crate) fn put_bytes(&mut self, offset: u64, content: Vec<u8>) {
        let end = offset + bytes(content.len());
        self.cut(offset..end);
        self.by_start.insert(offset, (end, Patch::Bytes(Arc::new(content), 0)));
    }

    /// Adds a range of zeros; it wins over what was there.
    pub(crate) fn put_zero(&mut self, range: Range<u64>) {
        self.cut(range.clone());
        self.by_start.insert(range.start, (range.end, Patch::Zero));
    }

    /// Whether any part of the range differs from the medium.
    pub(crate) fn touches(&self, range: Range<u64>) -> bool {
        self.overlapping(range).next().is_some()
    }

    /// The ranges with other content, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Range<u64>, &Patch)> {
        self.by_start.iter().map(|(start, (end, patch))| (*start..*end, patch))
    }

    /// Brings `buf`, read at `offset`, to the state after replay.
    pub(crate) fn apply(&self, offset: u64, buf: &IoBuf) {
        let whole = offset..offset + bytes(buf.len());
        for (start, end, patch) in self.overlapping(whole.clone()) {
            let part = start.max(whole.start)..end.min(whole.end);
            let target = buf.slice(index(part.start - offset)..index(part.end - offset));
            match patch {
                Patch::Zero => target.fill_zero(),
                Patch::Bytes(content, from) => {
                    let from = from + index(part.start - start);
                    target.copy_from(&content[from..from + target.len()]);
                }
            }
        }
    }

    fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64, &Patch)> {
        let before = self.by_start.range(..range.start).next_back();
        let first =
            before.filter(|(_, (end, _))| *end > range.start).map_or(range.start, |(start, _)| *start);
        let empty = range.is_empty();
        self.by_start
            .range(first..range.end.max(first))
            .filter(move |_| !empty)
            .map(|(start, (end, patch))| (*start, *end, patch))
    }

    /// Removes `range` from what is there, splitting at its ends.
    fn cut(&mut self, range: Range<u64>) {
        let hit: Vec<u64> = self.overlapping(range.clone()).map(|(start, ..)| start).collect();
        for start in hit {
            let Some((end, patch)) = self.by_start.remove(&start) else { continue };
            if start < range.start {
                self.by_start.insert(start, (range.start, patch.clone()));
            }
            if end > range.end {
                let rest = match patch {
                    Patch::Bytes(content, from) => Patch::Bytes(content, from + index(range.end - start)),
                    Patch::Zero => Patch::Zero,
                };
                self.by_start.insert(range.end, (end, rest));
            }
        }
    }
}

/// A file as its metadata reader sees it.
#[derive(Clone)]
pub(crate) struct View {
    /// The file below.
    pub(crate) file: Arc<dyn ImageFile>,
    /// Bytes really there.
    pub(crate) file_bytes: u64,
    /// Size after replay; reads between the two give zeros.
    pub(crate) view_bytes: u64,
    /// Content that only the log has.
    pub(crate) patches: Patches,
}

impl View {
    /// The file as it lies on the medium.
    pub(crate) fn of(file: &Arc<dyn ImageFile>) -> Self {
        let file_bytes = file.geometry().size_bytes;
        Self { file: Arc::clone(file), file_bytes, view_bytes: file_bytes, patches: Patches::default() }
    }

    /// The first part of the range that may hold other bytes than zeros, found without reading; none if there is none.
    pub(crate) fn data_in(&self, range: Range<u64>) -> Option<Range<u64>> {
        let inside = |part: Range<u64>| part.start.max(range.start)..part.end.min(range.end);
        let data = self.file.data_from(range.start).map(&inside);
        let patch = self.patches.overlapping(range.clone()).next();
        let patch = patch.map(|(start, end, _)| inside(start..end));
        data.into_iter().chain(patch).filter(|part| !part.is_empty()).min_by_key(|part| part.start)
    }

    /// Reads `len` bytes of `structure`. The range must lie in the file as it is after replay.
    pub(crate) fn read(
        &self,
        offset: u64,
        len: usize,
        structure: &'static str,
    ) -> Result<Vec<u8>, VhdxError> {
        let end = offset.saturating_add(bytes(len));
        if end > self.view_bytes {
            return Err(VhdxError::Truncated { structure, need: end, have: self.view_bytes });
        }
        // Whole units of the file below, whatever the structure's own size.
        let unit = u64::from(self.file.geometry().block_bytes.max(1));
        let start = offset / unit * unit;
        let whole = IoBuf::zeroed(index(end.next_multiple_of(unit) - start));
        let there = index(self.file_bytes.saturating_sub(start).min(bytes(whole.len())));
        if there > 0 {
            self.file
                .run(blockio::IoOp::Read { offset: start, buf: whole.slice(0..there) })
                .map_err(doing(format!("reading the {structure} at {offset:#x}")))?;
        }
        let skip = index(offset - start);
        let buf = whole.slice(skip..skip + len);
        self.patches.apply(offset, &buf);
        Ok(buf.to_vec())
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("file_bytes", &self.file_bytes).field("patches", &self.patches).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_patch_wins_and_splits_an_earlier_one() {
        let mut patches = Patches::default();
        patches.put_bytes(0, vec![1; 12]);
        patches.put_zero(4..8);
        patches.put_bytes(20, vec![3; 4]);
        let buf = IoBuf::zeroed(26);
        buf.copy_from(&[9; 26]);
        patches.apply(0, &buf);
        let expected = [&[1; 4][..], &[0; 4], &[1; 4], &[9; 8], &[3; 4], &[9; 2]].concat();
        assert_eq!(buf.to_vec(), expected);
        assert!(patches.touches(23..24) && !patches.touches(12..20));
    }

    #[test]
    fn what_only_the_log_has_is_data_too() {
        let file: Arc<dyn ImageFile> = Arc::new(blockio::MemoryDevice::with_block_bytes(1 << 20, 1));
        file.write_at(512 << 10, &[1; 4096]).expect("it is writable");
        let mut view = View::of(&file);
        view.patches.put_bytes(8192, vec![2; 4096]);
        view.patches.put_bytes(900 << 10, vec![3; 4096]);
        let parts = |range: Range<u64>| {
            let mut parts = Vec::new();
            let mut at = range.start;
            while let Some(part) = view.data_in(at..range.end) {
                at = part.end;
                parts.push(part);
            }
            parts
        };
        let all = parts(0..1 << 20);
        let holds = |at: u64| all.iter().any(|part| part.contains(&at));
        assert!(holds(8192) && holds(12287) && holds(512 << 10) && holds(900 << 10), "{all:?}");
        assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start), "{all:?}");
        assert_eq!(parts(9000..9001).first(), Some(&(9000..9001)));
    }
}
