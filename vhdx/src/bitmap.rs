//! Sector bitmaps of a differencing image: which sectors of a partially present block are here, and which in the parent.
//!
//! ```text
//!   chunk (2^23 sectors)   |block 0 |block 1 | ...            bit k of a chunk's bitmap = its sector k; 1: here, 0: parent
//!   bitmap block (1 MiB)   |bits    |bits    | ...            a page of 4 KiB holds the bits of 32768 sectors
//! ```
//! Bits mean something only while their block is in state 7. When a block becomes state 6 they stay as they are; before one
//! becomes state 7 they are cleared, on disk too.
//!
//! **Invariant:** a bit is set here only after its sector was written, and in the log only after that is durable.

use std::ops::Range;
use std::sync::OnceLock;

use crate::bat::{Bat, BatShape};
use crate::error::VhdxError;
use crate::format::{CHUNK_SECTORS, MIB, PAGE, bytes, index};
use crate::metadata::DiskParams;
use crate::resolve::BlockPart;
use crate::view::View;
use crate::words::WordTable;

/// Bytes of a bitmap block.
pub(crate) const BITMAP_BYTES: u64 = MIB;
/// Pages of a bitmap block.
pub(crate) const PAGES_PER_CHUNK: u64 = BITMAP_BYTES / PAGE;
const BITS_PER_PAGE: u64 = PAGE * 8;
const WORDS_PER_CHUNK: u64 = CHUNK_SECTORS / 64;
/// Pages read at once.
const PAGES_PER_READ: u64 = 64;

/// The bitmaps in memory: a page for each page of a bitmap that says something about a partially present block.
///
/// That is one byte for eight sectors of such blocks, 1/4096 of what they take in the file.
pub(crate) struct Bitmaps {
    sector: u64,
    sectors_per_block: u64,
    chunk_ratio: u64,
    chunks: Box<[OnceLock<WordTable>]>,
}

impl Bitmaps {
    /// Bitmaps of a disk without any partially present block.
    pub(crate) fn empty(shape: &BatShape, params: &DiskParams) -> Self {
        let sector = u64::from(params.logical_sector);
        Self {
            sector,
            sectors_per_block: shape.block_bytes / sector,
            chunk_ratio: shape.chunk_ratio,
            chunks: (0..shape.chunks()).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Reads the bits of the blocks in `partial`, ascending, which are in state 7.
    pub(crate) fn read(
        view: &View,
        bat: &Bat,
        params: &DiskParams,
        partial: &[u64],
    ) -> Result<Self, VhdxError> {
        let mut bitmaps = Self::empty(&bat.shape, params);
        let mut done = 0;
        for block in partial {
            let pages = bitmaps.pages_of(*block);
            let wanted = pages.start.max(done)..pages.end;
            for first in wanted.clone().step_by(index(PAGES_PER_READ)) {
                bitmaps.read_pages(view, bat, first..(first + PAGES_PER_READ).min(wanted.end))?;
            }
            done = pages.end.max(done);
        }
        Ok(bitmaps)
    }

    /// Reads pages of one chunk.
    fn read_pages(&mut self, view: &View, bat: &Bat, pages: Range<u64>) -> Result<(), VhdxError> {
        let chunk = pages.start / PAGES_PER_CHUNK;
        let Some(place) = bat.bitmap_place(chunk) else { return Ok(()) };
        let offset = place + pages.start % PAGES_PER_CHUNK * PAGE;
        let len = (pages.end - pages.start) * PAGE;
        if view.data_in(offset..offset + len).is_none() {
            return Ok(());
        }
        let content = view.read(offset, index(len), "sector bitmap")?;
        let slot = &mut self.chunks[index(chunk)];
        slot.get_or_init(|| WordTable::zeroed(WORDS_PER_CHUNK));
        let table = slot.get_mut().expect("just made");
        for (number, page) in content.chunks_exact(index(PAGE)).enumerate() {
            table.load(pages.start % PAGES_PER_CHUNK + bytes(number), page);
        }
        Ok(())
    }

    /// The pages, counted over all chunks, that hold the bits of a block.
    pub(crate) fn pages_of(&self, block: u64) -> Range<u64> {
        self.pages_in(&self.bits(block, 0..self.sectors_per_block))
    }

    /// The pages that hold the bits of a part of a block.
    pub(crate) fn pages_of_part(&self, part: &BlockPart) -> Range<u64> {
        self.pages_in(&self.bits_of(part))
    }

    fn pages_in(&self, bits: &Bits) -> Range<u64> {
        let first = bits.chunk * PAGES_PER_CHUNK;
        first + bits.range.start / BITS_PER_PAGE..first + bits.range.end.div_ceil(BITS_PER_PAGE)
    }

    /// The bytes of a page as they must be on disk.
    pub(crate) fn page_bytes(&self, page: u64) -> Vec<u8> {
        match self.chunks[index(page / PAGES_PER_CHUNK)].get() {
            Some(table) => table.words_of(page % PAGES_PER_CHUNK).flat_map(u64::to_le_bytes).collect(),
            None => vec![0; index(PAGE)],
        }
    }

    /// Calls `each` for the runs of sectors that are here (true) or in the parent (false), with their length in bytes.
    pub(crate) fn runs(&self, part: &BlockPart, mut each: impl FnMut(bool, u64)) {
        let bits = self.bits_of(part);
        let Some(table) = self.chunks[index(bits.chunk)].get() else { return each(false, part.len) };
        let mut at = bits.range.start;
        while at < bits.range.end {
            let (here, end) = run_from(table, at, bits.range.end);
            each(here, (end - at) * self.sector);
            at = end;
        }
    }

    /// Whether all sectors of a part are here.
    pub(crate) fn holds(&self, part: &BlockPart) -> bool {
        self.all_set(&self.bits_of(part))
    }

    /// Whether the first `len` bytes of a block, all that the disk has of it, are here.
    pub(crate) fn is_full(&self, block: u64, len: u64) -> bool {
        self.all_set(&self.bits(block, 0..len / self.sector))
    }

    fn all_set(&self, bits: &Bits) -> bool {
        let Some(table) = self.chunks[index(bits.chunk)].get() else { return bits.range.is_empty() };
        bits.words().all(|(at, mask)| table.get(at) & mask == mask)
    }

    /// Says that a part is here.
    pub(crate) fn set(&self, part: &BlockPart) {
        let bits = self.bits_of(part);
        let table = self.chunks[index(bits.chunk)].get_or_init(|| WordTable::zeroed(WORDS_PER_CHUNK));
        bits.words().for_each(|(at, mask)| table.set_bits(at, mask));
    }

    /// Says that nothing of a block is here.
    pub(crate) fn clear(&self, block: u64) {
        let bits = self.bits(block, 0..self.sectors_per_block);
        if let Some(table) = self.chunks[index(bits.chunk)].get() {
            bits.words().for_each(|(at, mask)| table.clear_bits(at, mask));
        }
    }

    fn bits_of(&self, part: &BlockPart) -> Bits {
        self.bits(part.block, part.within / self.sector..(part.within + part.len) / self.sector)
    }

    fn bits(&self, block: u64, sectors: Range<u64>) -> Bits {
        let first = block % self.chunk_ratio * self.sectors_per_block;
        Bits { chunk: block / self.chunk_ratio, range: first + sectors.start..first + sectors.end }
    }
}

/// Some bits of one chunk.
struct Bits {
    chunk: u64,
    range: Range<u64>,
}

impl Bits {
    /// The words that hold them, each with its mask.
    fn words(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let Range { start, end } = self.range;
        (start / 64..end.div_ceil(64)).map(move |word| {
            let from = start.saturating_sub(word * 64);
            let to = (end - word * 64).min(64);
            (word, ones(to) & !ones(from))
        })
    }
}

/// The lowest `count` bits, up to 64.
fn ones(count: u64) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// Whether the sector at `at` is here, and where that changes, at most at `end`.
fn run_from(table: &WordTable, at: u64, end: u64) -> (bool, u64) {
    let here = table.get(at / 64) >> (at % 64) & 1 == 1;
    let mut from = at;
    while from < end {
        let word = table.get(from / 64);
        let other = if here { !word } else { word } & !ones(from % 64);
        if other != 0 {
            return (here, (from / 64 * 64 + u64::from(other.trailing_zeros())).min(end));
        }
        from = (from / 64 + 1) * 64;
    }
    (here, end)
}

impl std::fmt::Debug for Bitmaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bitmaps").field("chunks", &self.chunks.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmaps() -> Bitmaps {
        let params = DiskParams {
            disk_bytes: 64 * MIB,
            block_bytes: 2 * MIB,
            logical_sector: 512,
            physical_sector: 512,
            disk_id: uuid::Uuid::nil(),
            fixed: false,
            has_parent: true,
        };
        Bitmaps::empty(&BatShape::of(&params), &params)
    }

    fn runs(bitmaps: &Bitmaps, part: &BlockPart) -> Vec<(bool, u64)> {
        let mut runs = Vec::new();
        bitmaps.runs(part, |here, len| runs.push((here, len)));
        runs
    }

    #[test]
    fn runs_begin_and_end_at_any_sector() {
        let bitmaps = bitmaps();
        for (first, count) in [(0, 1), (3, 61), (63, 2), (64, 64), (5, 200), (4095, 1)] {
            let part = BlockPart { block: 3, within: first * 512, len: count * 512 };
            bitmaps.clear(3);
            bitmaps.set(&part);
            let whole = BlockPart { block: 3, within: 0, len: 2 * MIB };
            let rest = 2 * MIB - (first + count) * 512;
            let wanted = [(false, first * 512), (true, count * 512), (false, rest)];
            let wanted: Vec<_> = wanted.into_iter().filter(|(_, len)| *len > 0).collect();
            assert_eq!(runs(&bitmaps, &whole), wanted, "{count} sectors from {first}");
            assert!(bitmaps.holds(&part) && !bitmaps.is_full(3, 2 * MIB));
        }
    }

    #[test]
    fn clearing_a_block_leaves_its_neighbours_alone() {
        let bitmaps = bitmaps();
        for block in 1..4 {
            bitmaps.set(&BlockPart { block, within: 0, len: 2 * MIB });
        }
        bitmaps.clear(2);
        assert!(bitmaps.is_full(1, 2 * MIB) && bitmaps.is_full(3, 2 * MIB));
        assert_eq!(runs(&bitmaps, &BlockPart { block: 2, within: 0, len: MIB }), [(false, MIB)]);
        // 512 bytes of bits for each block of 2 MiB, so the four share a page.
        assert_eq!(bitmaps.pages_of(2), 0..1);
    }
}
