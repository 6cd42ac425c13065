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
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{VhdxError, corrupt};
use crate::findings::Findings;
use crate::format::{CHUNK_SECTORS, MIB, PAGE, bytes, index};
use crate::metadata::DiskParams;
use crate::region::Area;
use crate::view::View;

/// BAT entries in one page of the log.
pub(crate) const ENTRIES_PER_PAGE: u64 = PAGE / 8;
/// In memory only: the block's first write is in flight.
const IN_TRANSITION: u64 = 1 << 3;
/// In memory only: the block's content is being moved, writers wait.
const HELD: u64 = 1 << 4;
/// Overlaps reported one by one.
const OVERLAPS_NAMED_MAX: usize = 16;
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

    /// Where the block lies, when its content is to be read from the file.
    pub(crate) fn data_offset(self) -> Option<u64> {
        (self.state() == BlockState::Present).then_some(self.0 & OFFSET_BITS)
    }

    /// The space that belongs to this entry: of a block, or of an anchor.
    pub(crate) fn owned_offset(self) -> Option<u64> {
        use BlockState::{Partial, Present, Undefined, Unmapped};
        let owns = matches!(self.state(), Present | Partial | Undefined | Unmapped);
        (owns && self.0 & OFFSET_BITS != 0).then_some(self.0 & OFFSET_BITS)
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

    /// Where the block lies, in whole or in part.
    pub(crate) fn place(self) -> Option<u64> {
        self.owned_offset().filter(|_| matches!(self.state(), BlockState::Present | BlockState::Partial))
    }

    /// The same block at another place.
    pub(crate) fn at(self, offset: u64) -> Self {
        Self(self.0 & STATE_BITS | offset)
    }

    /// The entry as it lies on disk.
    pub(crate) fn word(self) -> u64 {
        self.0
    }

    fn offset_field(self) -> u64 {
        self.0 & OFFSET_BITS
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

    /// Table index of payload block `block`.
    pub(crate) fn payload_index(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// The payload block at a table index; none for the index of a bitmap block or past the last block.
    pub(crate) fn block_at(&self, at: u64) -> Option<u64> {
        let (chunk, within) = (at / (self.chunk_ratio + 1), at % (self.chunk_ratio + 1));
        let block = chunk * self.chunk_ratio + within;
        (within < self.chunk_ratio && block < self.blocks).then_some(block)
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
    entries: Vec<AtomicU64>,
}

impl Bat {
    /// Reads the whole table. The region is known to lie inside the file, so memory is bounded by the file's size.
    pub(crate) fn read(view: &View, region: Area, shape: BatShape) -> Result<Self, VhdxError> {
        if shape.entries * 8 > region.length {
            let found =
                format!("{} bytes for a disk that needs {} entries of 8 bytes", region.length, shape.entries);
            return Err(corrupt("BAT region (too small)", region.offset, found));
        }
        let mut entries = Vec::with_capacity(index(shape.entries));
        let mut at = 0;
        while at < shape.entries * 8 {
            let len = (shape.entries * 8 - at).min(MIB).next_multiple_of(PAGE);
            let piece = view.read(region.offset + at, index(len), "BAT")?;
            let words =
                piece.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
            let missing = index(shape.entries) - entries.len();
            entries.extend(words.take(missing).map(AtomicU64::new));
            at += len;
        }
        Ok(Self { shape, region, entries })
    }

    /// The entry of payload block `block`.
    pub(crate) fn get(&self, block: u64) -> Entry {
        Entry(self.entries[index(self.shape.payload_index(block))].load(Ordering::SeqCst))
    }

    /// Replaces the entry of payload block `block`. Only under the lock of the space map.
    pub(crate) fn set(&self, block: u64, entry: Entry) {
        self.entries[index(self.shape.payload_index(block))].store(entry.0, Ordering::SeqCst);
    }

    /// The page of the table that holds `block`'s entry, counted from the start of the region.
    pub(crate) fn page_of(&self, block: u64) -> u64 {
        self.shape.payload_index(block) / ENTRIES_PER_PAGE
    }

    /// Where a page lies in the file.
    pub(crate) fn page_offset(&self, page: u64) -> u64 {
        self.region.offset + page * PAGE
    }

    /// The bytes of a page as they must be on disk.
    ///
    /// Entries in transition keep their old meaning. An offset where none belongs is dropped.
    pub(crate) fn page_bytes(&self, page: u64) -> Vec<u8> {
        let first = index(page * ENTRIES_PER_PAGE);
        let last = (first + index(ENTRIES_PER_PAGE)).min(self.entries.len());
        let mut content = vec![0; index(PAGE)];
        for (slot, entry) in content.chunks_exact_mut(8).zip(&self.entries[first..last]) {
            let entry = Entry(entry.load(Ordering::SeqCst)).settled();
            let word = if entry.owned_offset().is_some() { entry.0 } else { entry.0 & STATE_BITS };
            slot.copy_from_slice(&word.to_le_bytes());
        }
        content
    }

    /// Checks every entry and returns the file offsets that belong to blocks, ascending, in MiB.
    ///
    /// Together with `areas` this is the interval map of the whole file: no two owners may share a byte.
    pub(crate) fn check(
        &self,
        view: &View,
        params: &DiskParams,
        areas: &[Area],
        findings: &mut Findings,
    ) -> Vec<u64> {
        let mut payload = Vec::new();
        for (at, word) in self.entries.iter().enumerate() {
            let (at, word) = (bytes(at), word.load(Ordering::SeqCst));
            let entry = Entry(word);
            match self.shape.block_at(at) {
                Some(block) => payload.extend(self.check_payload(block, at, entry, view, params, findings)),
                None => self.check_bitmap(at, entry, params, findings),
            }
        }
        payload.sort_unstable();
        self.check_overlap(&payload, areas, findings);
        payload
    }

    fn check_payload(
        &self,
        block: u64,
        at: u64,
        entry: Entry,
        view: &View,
        params: &DiskParams,
        findings: &mut Findings,
    ) -> Option<u64> {
        let place = self.region.offset + at * 8;
        let bad = |found: String| corrupt("BAT entry", place, format!("block {block}: {found}"));
        if entry.0 & RESERVED_BITS != 0 {
            let error = bad(format!("reserved bits are set: {:#x}", entry.0 & RESERVED_BITS));
            findings.warn(error.to_string());
            findings.block_writing(error);
            self.entries[index(at)].store(entry.0 & !RESERVED_BITS, Ordering::SeqCst);
        }
        match entry.state() {
            BlockState::Reserved(state) => findings.error(bad(format!("state {state} is reserved"))),
            BlockState::Partial if !params.has_parent => {
                findings.error(bad("it is partially present, but the image has no parent".to_owned()));
            }
            BlockState::NotPresent | BlockState::Zero if entry.offset_field() != 0 => {
                findings.warn(format!(
                    "block {block} is {entry:?}: a state that has no place; the place is ignored"
                ));
            }
            BlockState::Present | BlockState::Partial if entry.offset_field() == 0 => {
                findings.error(bad("it is present but has no place in the file".to_owned()));
            }
            _ => (),
        }
        let offset = entry.owned_offset()?;
        // Old qemu files end where the disk ends, inside the last block.
        let is_last = block + 1 == self.shape.blocks;
        let needed = if is_last { self.shape.bytes_in(block) } else { self.shape.block_bytes };
        match offset.checked_add(needed) {
            Some(end) if end <= view.view_bytes => Some(offset / MIB),
            _ => {
                findings.error(bad(format!(
                    "it lies at {offset:#x} and needs {needed} bytes, past the end of the file at {:#x}",
                    view.view_bytes
                )));
                None
            }
        }
    }

    fn check_bitmap(&self, at: u64, entry: Entry, params: &DiskParams, findings: &mut Findings) {
        let place = self.region.offset + at * 8;
        match entry.state() {
            BlockState::NotPresent => (),
            BlockState::Present if params.has_parent => (),
            BlockState::Present => {
                let error =
                    corrupt("BAT entry", place, "a sector bitmap is present, but the image has no parent");
                findings.warn(error.to_string());
                findings.block_writing(error);
            }
            _ => findings.error(corrupt("BAT entry", place, format!("a sector bitmap entry is {entry:?}"))),
        }
    }

    fn check_overlap(&self, payload: &[u64], areas: &[Area], findings: &mut Findings) {
        let block_mib = self.shape.block_bytes / MIB;
        // Naming an owner costs a walk, so only a few are named.
        for pair in payload.windows(2).filter(|pair| pair[1] - pair[0] < block_mib).take(OVERLAPS_NAMED_MAX) {
            findings.error(corrupt(
                "BAT",
                self.region.offset,
                format!("{} overlaps {}", self.owner_of(pair[1]), self.owner_of(pair[0])),
            ));
        }
        for area in areas {
            let from = payload.partition_point(|start| (start + block_mib) * MIB <= area.offset);
            if let Some(start) = payload.get(from).filter(|start| **start * MIB < area.end()) {
                findings.error(corrupt(
                    "BAT",
                    self.region.offset,
                    format!("{} overlaps the {} at {:#x}", self.owner_of(*start), area.owner, area.offset),
                ));
            }
        }
    }

    fn owner_of(&self, start_mib: u64) -> String {
        let block =
            (0..self.shape.blocks).find(|block| self.get(*block).owned_offset() == Some(start_mib * MIB));
        format!(
            "block {} at {:#x}",
            block.map_or_else(|| "?".to_owned(), |block| block.to_string()),
            start_mib * MIB
        )
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
