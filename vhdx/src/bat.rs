//! The block allocation table: where each payload block lies.
//!
//! ```text
//! index:  0 .. CR-1       CR        CR+1 .. 2CR     2CR+1
//!         payload blocks  bitmap 0  payload blocks  bitmap 1 ...      CR = chunk ratio
//! entry:  bits 0-2 state, 3-19 zero, 20-63 file offset in MiB
//! ```
//! In memory an entry is one atomic word, so that reads and writes of allocated blocks take no lock. Bit 3, always zero on
//! disk, marks a block whose first write is in flight, bit 4 one whose content is being moved: the rest of the word is still
//! the old meaning.
//!
//! **Invariant:** the word of an allocated block, as long as bits 3 and 4 are clear, is what the disk says or will say with the next
//! log entry.

use std::fmt;

use crate::bitmap::PAGES_PER_CHUNK;
use crate::error::{VhdxError, corrupt};
use crate::format::{CHUNK_SECTORS, MIB, PAGE, bytes, index};
use crate::metadata::DiskParams;
use crate::region::Area;
use crate::view::View;
use crate::words::{Page, WORDS_PER_PAGE, WordTable};

/// In memory only: the block's first write is in flight.
const IN_TRANSITION: u64 = 1 << 3;
/// In memory only: the block's content is being moved, writers wait.
const HELD: u64 = 1 << 4;
/// The table is read in pieces of at least so many bytes, and of 1 MiB at most.
const PIECE_MIN: u64 = 64 << 10;
const STATE_BITS: u64 = 0b111;
const RESERVED_BITS: u64 = 0xF_FFF8;
const OFFSET_BITS: u64 = !0xF_FFFF;

/// State of a payload block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockState {
    NotPresent,
    Undefined,
    Zero,
    Unmapped,
    Reserved(u8),
    Present,
    Partial,
}

/// One BAT entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry(u64);

impl Entry {
    /// Reads as zeros and must; owns no space.
    pub(crate) const ZERO: Self = Self(2);
    /// Discarded; owns no space.
    pub(crate) const UNMAPPED: Self = Self(3);

    /// A block that lies at `offset`.
    pub(crate) fn present(offset: u64) -> Self {
        debug_assert!(offset.is_multiple_of(MIB) && offset > 0, "blocks are 1 MiB aligned");
        Self(offset | 6)
    }

    /// A block of which only the sectors that its bitmap names lie at `offset`.
    pub(crate) fn partial(offset: u64) -> Self {
        debug_assert!(offset.is_multiple_of(MIB) && offset > 0, "blocks are 1 MiB aligned");
        Self(offset | 7)
    }

    /// What the entry says.
    pub(crate) fn state(self) -> BlockState {
        match self.0 & STATE_BITS {
            0 => BlockState::NotPresent,
            1 => BlockState::Undefined,
            2 => BlockState::Zero,
            3 => BlockState::Unmapped,
            6 => BlockState::Present,
            7 => BlockState::Partial,
            other => BlockState::Reserved(if other == 4 { 4 } else { 5 }),
        }
    }

    /// Where the block lies, when its content, or the part that its bitmap names, is to be read from the file.
    pub(crate) fn place(self) -> Option<u64> {
        matches!(self.state(), BlockState::Present | BlockState::Partial).then_some(self.0 & OFFSET_BITS)
    }

    /// Where the block lies, when all of it is to be read from the file.
    pub(crate) fn data_offset(self) -> Option<u64> {
        (self.state() == BlockState::Present).then_some(self.0 & OFFSET_BITS)
    }

    /// Whether the block says nothing: in an image with a parent, the parent shows.
    pub(crate) fn is_unsaid(self) -> bool {
        self.state() == BlockState::NotPresent
    }

    /// The space that belongs to this entry: of a block, or of an anchor.
    pub(crate) fn owned_offset(self) -> Option<u64> {
        use BlockState::{Partial, Present, Undefined, Unmapped};
        let owns = matches!(self.state(), Present | Partial | Undefined | Unmapped);
        (owns && self.0 & OFFSET_BITS != 0).then_some(self.0 & OFFSET_BITS)
    }

    /// Whether it says "discarded" in the words of a draft of the format.
    pub(crate) fn is_draft_unmapped(self) -> bool {
        self.state() == BlockState::Reserved(5)
    }

    /// The same in the words of the format.
    pub(crate) fn without_draft(self) -> Self {
        Self(self.0 & !(STATE_BITS | RESERVED_BITS) | 3)
    }

    /// Whether it names a place although its state has none.
    pub(crate) fn has_stale_offset(self) -> bool {
        self.offset_field() != 0 && matches!(self.state(), BlockState::NotPresent | BlockState::Zero)
    }

    /// Whether its first write is in flight.
    pub(crate) fn in_transition(self) -> bool {
        self.0 & IN_TRANSITION != 0
    }

    /// The same with its first write in flight.
    pub(crate) fn with_transition(self) -> Self {
        Self(self.0 | IN_TRANSITION)
    }

    /// The same without any mark that is in memory only.
    pub(crate) fn settled(self) -> Self {
        Self(self.0 & !(IN_TRANSITION | HELD))
    }

    /// Whether its content is being moved.
    pub(crate) fn is_held(self) -> bool {
        self.0 & HELD != 0
    }

    /// The same with its content being moved.
    pub(crate) fn held(self) -> Self {
        Self(self.0 | HELD)
    }

    /// The same block with all of its sectors here; marks in memory stay.
    pub(crate) fn filled(self) -> Self {
        Self(self.0 & !STATE_BITS | 6)
    }

    /// The same block at another place.
    pub(crate) fn at(self, offset: u64) -> Self {
        Self(self.0 & STATE_BITS | offset)
    }

    /// The entry as it lies on disk.
    pub(crate) fn word(self) -> u64 {
        self.0
    }

    /// The bits that say where the block lies, whatever its state.
    pub(crate) fn offset_field(self) -> u64 {
        self.0 & OFFSET_BITS
    }

    /// Bits that must be zero and are not.
    pub(crate) fn reserved_bits(self) -> u64 {
        self.0 & RESERVED_BITS
    }

    /// The word as it is to be on disk: settled, and without a place where the state has none.
    fn on_disk(self) -> u64 {
        let settled = self.settled();
        if settled.owned_offset().is_some() { settled.0 } else { settled.0 & STATE_BITS }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:#x}", self.state(), self.offset_field())
    }
}

/// The arithmetic of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatShape {
    /// Size of a payload block.
    pub(crate) block_bytes: u64,
    /// Size of the disk.
    pub(crate) disk_bytes: u64,
    /// Payload blocks per bitmap block.
    pub(crate) chunk_ratio: u64,
    /// Payload blocks of the disk.
    pub(crate) blocks: u64,
    /// Entries, bitmap entries included.
    pub(crate) entries: u64,
}

impl BatShape {
    /// The shape for checked parameters.
    pub(crate) fn of(params: &DiskParams) -> Self {
        let chunk_ratio = CHUNK_SECTORS * u64::from(params.logical_sector) / params.block_bytes;
        let blocks = params.disk_bytes.div_ceil(params.block_bytes);
        let entries = if params.has_parent {
            blocks.div_ceil(chunk_ratio) * (chunk_ratio + 1)
        } else {
            blocks + (blocks - 1) / chunk_ratio
        };
        Self { block_bytes: params.block_bytes, disk_bytes: params.disk_bytes, chunk_ratio, blocks, entries }
    }

    /// Bytes of region that the table needs.
    pub(crate) fn region_bytes(&self) -> u64 {
        (self.entries * 8).next_multiple_of(MIB)
    }

    /// Runs of blocks that share a sector bitmap.
    pub(crate) fn chunks(&self) -> u64 {
        self.blocks.div_ceil(self.chunk_ratio)
    }

    /// Table index of the entry of a chunk's sector bitmap. Images without a parent may lack the last one.
    pub(crate) fn bitmap_index(&self, chunk: u64) -> u64 {
        chunk * (self.chunk_ratio + 1) + self.chunk_ratio
    }

    /// The chunk whose bitmap entry is at a table index.
    pub(crate) fn chunk_at(&self, at: u64) -> Option<u64> {
        let (chunk, within) = (at / (self.chunk_ratio + 1), at % (self.chunk_ratio + 1));
        (within == self.chunk_ratio).then_some(chunk)
    }

    /// The first table index at or after `at` that is that of a bitmap.
    pub(crate) fn next_bitmap_index(&self, at: u64) -> u64 {
        self.bitmap_index(at / (self.chunk_ratio + 1))
    }

    /// Table index of payload block `block`.
    pub(crate) fn payload_index(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// Payload blocks whose entries lie before a table index.
    pub(crate) fn blocks_before(&self, at: u64) -> u64 {
        let (chunk, within) = (at / (self.chunk_ratio + 1), at % (self.chunk_ratio + 1));
        (chunk * self.chunk_ratio + within).min(self.blocks)
    }

    /// The payload block at a table index; none for the index of a bitmap block or past the last block.
    pub(crate) fn block_at(&self, at: u64) -> Option<u64> {
        let (chunk, within) = (at / (self.chunk_ratio + 1), at % (self.chunk_ratio + 1));
        let block = chunk * self.chunk_ratio + within;
        (within < self.chunk_ratio && block < self.blocks).then_some(block)
    }

    /// The bytes of the disk that `block` has: first, and first behind it.
    pub(crate) fn span(&self, block: u64) -> (u64, u64) {
        let start = block * self.block_bytes;
        (start, start + self.bytes_in(block))
    }

    /// Bytes of the disk in `block`: less than a block only for the last.
    pub(crate) fn bytes_in(&self, block: u64) -> u64 {
        (self.disk_bytes - block * self.block_bytes).min(self.block_bytes)
    }
}

/// The table in memory.
pub(crate) struct Bat {
    /// Its arithmetic.
    pub(crate) shape: BatShape,
    /// Where it lies in the file.
    pub(crate) region: Area,
    table: WordTable,
}

impl Bat {
    /// Reads the table, its holes left out. The region is known to lie inside the file, so memory is bounded by what the
    /// file really holds.
    pub(crate) fn read(view: &View, region: Area, shape: BatShape) -> Result<Self, VhdxError> {
        if shape.entries * 8 > region.length {
            let found =
                format!("{} bytes for a disk that needs {} entries of 8 bytes", region.length, shape.entries);
            return Err(corrupt("BAT region (too small)", region.offset, found));
        }
        let mut table = WordTable::zeroed(shape.entries);
        let end = (shape.entries * 8).next_multiple_of(PAGE);
        let mut at = 0;
        while let Some(data) = view.data_in(region.offset + at..region.offset + end) {
            // Pieces large enough that a table in crumbs is not read crumb by crumb, and that nothing is read twice.
            let first = (data.start - region.offset) / PIECE_MIN * PIECE_MIN;
            at = (data.end - region.offset).next_multiple_of(PIECE_MIN).min(first + MIB).min(end);
            let piece = view.read(region.offset + first, index(at - first), "BAT")?;
            for (number, page) in piece.chunks_exact(index(PAGE)).enumerate() {
                table.load(first / PAGE + bytes(number), page);
            }
        }
        Ok(Self { shape, region, table })
    }

    /// The entry of payload block `block`.
    pub(crate) fn get(&self, block: u64) -> Entry {
        Entry(self.table.get(self.shape.payload_index(block)))
    }

    /// Replaces the entry of payload block `block`. Only under the lock of the space map.
    pub(crate) fn set(&self, block: u64, entry: Entry) {
        self.table.set(self.shape.payload_index(block), entry.0);
    }

    /// Where the sector bitmap of a chunk lies.
    pub(crate) fn bitmap_place(&self, chunk: u64) -> Option<u64> {
        let at = self.shape.bitmap_index(chunk);
        (at < self.shape.entries).then(|| Entry(self.table.get(at)).data_offset()).flatten()
    }

    /// Where a page of a sector bitmap lies in the file; pages are counted over all chunks.
    pub(crate) fn bitmap_page_offset(&self, page: u64) -> Option<u64> {
        let place = self.bitmap_place(page / PAGES_PER_CHUNK)?;
        Some(place + page % PAGES_PER_CHUNK * PAGE)
    }

    /// Gives the sector bitmap of a chunk its place. Only under the lock of the space map.
    pub(crate) fn set_bitmap(&self, chunk: u64, offset: u64) {
        self.table.set(self.shape.bitmap_index(chunk), Entry::present(offset).0);
    }

    /// The page of the table that holds `block`'s entry, counted from the start of the region.
    pub(crate) fn page_of(&self, block: u64) -> u64 {
        self.shape.payload_index(block) / WORDS_PER_PAGE
    }

    /// The page of the table that holds the entry of a chunk's sector bitmap.
    pub(crate) fn page_of_bitmap(&self, chunk: u64) -> u64 {
        self.shape.bitmap_index(chunk) / WORDS_PER_PAGE
    }

    /// Where a page lies in the file.
    pub(crate) fn page_offset(&self, page: u64) -> u64 {
        self.region.offset + page * PAGE
    }

    /// The bytes of a page as they must be on disk.
    ///
    /// Entries in transition keep their old meaning. An offset where none belongs is dropped.
    pub(crate) fn page_bytes(&self, page: u64) -> Vec<u8> {
        let words = self.table.words_of(page).map(|word| Entry(word).on_disk());
        let mut content: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        content.resize(index(PAGE), 0);
        content
    }

    /// Runs of equal entries: of the table index, how many, and what they say. Holes of the table cost one step.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u64, u64, Entry)> + '_ {
        (0..self.table.pages()).flat_map(move |page| {
            let first = page * WORDS_PER_PAGE;
            let (uniform, words) = match self.table.page(page) {
                Page::Uniform(word) => {
                    (Some((first, bytes(self.table.words_in(page)), Entry(word))), &[][..])
                }
                Page::Words(words) => (None, words),
            };
            let single = words
                .iter()
                .zip(first..)
                .map(|(word, at)| (at, 1, Entry(word.load(std::sync::atomic::Ordering::SeqCst))));
            uniform.into_iter().chain(single)
        })
    }

    /// Takes away what must not be set in an entry, so that it is not taken for something of ours.
    pub(crate) fn drop_reserved(&self, at: u64) {
        self.table.set(at, self.table.get(at) & !RESERVED_BITS);
    }

    /// End of the last byte that a block or a bitmap owns; zero if there is none.
    pub(crate) fn owned_end(&self) -> u64 {
        let end = |(at, _, entry): (u64, u64, Entry)| {
            let len = if self.shape.chunk_at(at).is_some() { MIB } else { self.shape.block_bytes };
            entry.owned_offset().map_or(0, |offset| offset.saturating_add(len))
        };
        self.runs().map(end).max().unwrap_or(0)
    }
}

impl fmt::Debug for Bat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bat")
            .field("shape", &self.shape)
            .field("region", &self.region)
            .finish_non_exhaustive()
    }
}
