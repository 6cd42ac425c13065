//! Who owns which part of the file: the proof that no byte has two owners.
//!
//! ```text
//!   header area | log | metadata | BAT | unknown region | block | bitmap | block ...      sorted starts, neighbours compared
//! ```
//! Every BAT entry is checked on the way. Runs of equal entries that own nothing are one step, so the work is bounded by what
//! the file really holds, whatever size the disk claims.
//!
//! **Invariant:** what passes has lawful states, lies inside the file, and shares no byte.

use std::collections::HashMap;

use crate::bat::{Bat, BlockState, Entry};
use crate::bitmap::BITMAP_BYTES;
use crate::error::{VhdxError, corrupt};
use crate::findings::Findings;
use crate::format::MIB;
use crate::metadata::DiskParams;
use crate::region::Area;

/// Overlaps reported one by one.
const OVERLAPS_NAMED_MAX: usize = 16;

/// What blocks and bitmaps own.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    /// Starts of blocks, anchors included, ascending, in MiB.
    pub(crate) payload_mib: Vec<u64>,
    /// Starts of sector bitmaps, ascending, in MiB.
    pub(crate) bitmap_mib: Vec<u64>,
    /// Blocks of which some bytes lie in the file.
    pub(crate) placed: u64,
    /// Blocks in state 7, ascending.
    pub(crate) partial: Vec<u64>,
}

/// Reads the owners off the BAT of a file of `file_bytes`.
pub(crate) fn find(
    bat: &Bat,
    file_bytes: u64,
    params: &DiskParams,
    areas: &[Area],
    findings: &mut Findings,
) -> Owners {
    let mut search =
        Search { bat, file_bytes, params, findings, owners: Owners::default(), partial_chunk: None };
    for (at, count, entry) in bat.runs() {
        // A table of nothing but errors need not be read to its end.
        if search.findings.is_full() {
            break;
        }
        search.run(at, count, entry);
    }
    let mut owners = search.owners;
    owners.payload_mib.sort_unstable();
    owners.bitmap_mib.sort_unstable();
    owners.check_overlap(bat, areas, findings);
    owners
}

struct Search<'a> {
    bat: &'a Bat,
    file_bytes: u64,
    params: &'a DiskParams,
    findings: &'a mut Findings,
    owners: Owners,
    /// The chunk that was last seen to need a bitmap.
    partial_chunk: Option<u64>,
}

impl Search<'_> {
    fn run(&mut self, at: u64, count: u64, entry: Entry) {
        if entry.word() == 0 {
            // Bitmap entries at the end of a chunk come one by one when anything in the chunk is not zero.
            return self.missing_bitmap(at, count);
        }
        let nothing_to_say =
            matches!(entry.state(), BlockState::Undefined | BlockState::Zero | BlockState::Unmapped)
                && entry.offset_field() == 0
                && entry.reserved_bits() == 0;
        let has_bitmap = self.bat.shape.next_bitmap_index(at) < at + count;
        if count > 1 && nothing_to_say && !has_bitmap {
            return;
        }
        for at in at..at + count {
            match self.bat.shape.block_at(at) {
                Some(block) => self.payload(block, at, entry),
                None => self.bitmap(at, entry),
            }
        }
    }

    fn bad(&self, at: u64, found: impl std::fmt::Display) -> VhdxError {
        let place = self.bat.region.offset + at * 8;
        match self.bat.shape.block_at(at) {
            Some(block) => corrupt("BAT entry", place, format!("block {block}: {found}")),
            None => corrupt("BAT entry", place, found.to_string()),
        }
    }

    fn payload(&mut self, block: u64, at: u64, entry: Entry) {
        self.reserved_bits(at, entry);
        let mut entry = entry;
        if entry.is_draft_unmapped() && self.findings.tolerate_draft_states {
            entry = entry.without_draft();
            self.bat.set(block, entry);
            self.findings.warn_with(|| format!("block {block} is discarded in the words of a draft"));
        }
        match entry.state() {
            BlockState::Reserved(state) => {
                let error = self.bad(at, format!("state {state} is reserved"));
                self.findings.error(error);
            }
            BlockState::Partial if !self.params.has_parent => {
                let error = self.bad(at, "it is partially present, but the image has no parent");
                self.findings.error(error);
            }
            BlockState::NotPresent | BlockState::Zero if entry.offset_field() != 0 => {
                self.findings.warn_with(|| {
                    format!("block {block} is {entry:?}: a state that has no place; the place is ignored")
                });
            }
            BlockState::Present | BlockState::Partial if entry.offset_field() == 0 => {
                let error = self.bad(at, "it is present but has no place in the file");
                self.findings.error(error);
            }
            _ => (),
        }
        let Some(offset) = entry.owned_offset() else { return };
        // Old qemu files end where the disk ends, inside the last block.
        let is_last = block + 1 == self.bat.shape.blocks;
        let needed = if is_last { self.bat.shape.bytes_in(block) } else { self.bat.shape.block_bytes };
        if !self.fits(at, offset, needed) {
            return;
        }
        self.owners.payload_mib.push(offset / MIB);
        self.owners.placed += u64::from(entry.place().is_some());
        if entry.state() == BlockState::Partial {
            self.partial_chunk = Some(block / self.bat.shape.chunk_ratio);
            self.owners.partial.push(block);
        }
    }

    fn fits(&mut self, at: u64, offset: u64, needed: u64) -> bool {
        let fits = offset.checked_add(needed).is_some_and(|end| end <= self.file_bytes);
        if !fits {
            let found = format!(
                "it lies at {offset:#x} and needs {needed} bytes, past the end of the file at {:#x}",
                self.file_bytes
            );
            let error = self.bad(at, found);
            self.findings.error(error);
        }
        fits
    }

    fn reserved_bits(&mut self, at: u64, entry: Entry) {
        if entry.reserved_bits() != 0 {
            let error = self.bad(at, format!("reserved bits are set: {:#x}", entry.reserved_bits()));
            self.findings.unknown_meaning(error);
            self.bat.drop_reserved(at);
        }
    }

    fn bitmap(&mut self, at: u64, entry: Entry) {
        let Some(_) = self.bat.shape.chunk_at(at) else { return };
        self.reserved_bits(at, entry);
        match entry.state() {
            BlockState::NotPresent => return self.missing_bitmap(at, 1),
            BlockState::Present => (),
            _ => {
                let error = self.bad(at, format!("a sector bitmap entry is {entry:?}"));
                return self.findings.error(error);
            }
        }
        if !self.params.has_parent {
            self.findings.warn(
                self.bad(at, "a sector bitmap is present, but the image has no parent; its space is kept")
                    .to_string(),
            );
        }
        let Some(offset) = entry.owned_offset() else {
            let error = self.bad(at, "a sector bitmap is present but has no place in the file");
            return self.findings.error(error);
        };
        if self.fits(at, offset, BITMAP_BYTES) {
            self.owners.bitmap_mib.push(offset / MIB);
        }
    }

    /// Entries say that there is no bitmap; is one needed?
    fn missing_bitmap(&mut self, at: u64, count: u64) {
        let Some(chunk) = self.partial_chunk else { return };
        if (at..at + count).contains(&self.bat.shape.bitmap_index(chunk)) {
            let error = self.bad(
                self.bat.shape.bitmap_index(chunk),
                format!(
                    "blocks of chunk {chunk} are partially present, but there is no sector bitmap for them"
                ),
            );
            self.findings.error(error);
        }
    }
}

/// Two owners of one byte: starts of blocks or bitmaps in MiB, or an area.
enum Overlap {
    Spans(u64, u64),
    Area(u64, Area),
}

impl Owners {
    /// Everything that is owned, as (offset, length).
    pub(crate) fn spans(&self, block_bytes: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let blocks = self.payload_mib.iter().map(move |start| (start * MIB, block_bytes));
        blocks.chain(self.bitmap_mib.iter().map(|start| (start * MIB, BITMAP_BYTES)))
    }

    fn check_overlap(&self, bat: &Bat, areas: &[Area], findings: &mut Findings) {
        let block_mib = bat.shape.block_bytes / MIB;
        let overlaps = overlapping(&self.payload_mib, block_mib)
            .chain(overlapping(&self.bitmap_mib, 1))
            .chain(self.bitmap_mib.iter().filter_map(|bitmap| {
                let area = Area { offset: bitmap * MIB, length: BITMAP_BYTES, owner: "sector bitmap" };
                block_in(&self.payload_mib, block_mib, &area).map(|start| Overlap::Spans(start, *bitmap))
            }))
            .chain(areas.iter().flat_map(|area| {
                let block = block_in(&self.payload_mib, block_mib, area);
                let bitmap = block_in(&self.bitmap_mib, 1, area);
                block.into_iter().chain(bitmap).map(|start| Overlap::Area(start, *area))
            }));
        let overlaps: Vec<Overlap> = overlaps.take(OVERLAPS_NAMED_MAX).collect();
        if overlaps.is_empty() {
            return;
        }
        let names = names(bat, &overlaps);
        let name = |start: &u64| names.get(start).cloned().unwrap_or_default();
        for overlap in &overlaps {
            let found = match overlap {
                Overlap::Spans(a, b) if a == b => name(a),
                Overlap::Spans(a, b) => format!("{} overlaps {}", name(b), name(a)),
                Overlap::Area(start, area) => {
                    format!("{} overlaps the {} at {:#x}", name(start), area.owner, area.offset)
                }
            };
            findings.error(corrupt("BAT (overlap)", bat.region.offset, found));
        }
    }
}

fn overlapping(starts: &[u64], len: u64) -> impl Iterator<Item = Overlap> + '_ {
    starts.windows(2).filter(move |pair| pair[1] - pair[0] < len).map(|pair| Overlap::Spans(pair[0], pair[1]))
}

fn block_in(starts: &[u64], len: u64, area: &Area) -> Option<u64> {
    let from = starts.partition_point(|start| (start + len) * MIB <= area.offset);
    starts.get(from).copied().filter(|start| start * MIB < area.end())
}

/// The owners at the places that overlap, by one walk through the table.
fn names(bat: &Bat, overlaps: &[Overlap]) -> HashMap<u64, String> {
    let mut names: HashMap<u64, String> = HashMap::new();
    for overlap in overlaps {
        let starts = match overlap {
            Overlap::Spans(a, b) => [*a, *b],
            Overlap::Area(start, _) => [*start, *start],
        };
        names.extend(starts.map(|start| (start, String::new())));
    }
    for (at, _, entry) in bat.runs() {
        let Some(offset) = entry.owned_offset() else { continue };
        let Some(name) = names.get_mut(&(offset / MIB)) else { continue };
        let owner = match bat.shape.block_at(at) {
            Some(block) => format!("block {block} at {offset:#x}"),
            None => format!("a sector bitmap at {offset:#x}"),
        };
        match name.len() {
            0 => *name = owner,
            short if short < 200 => *name = format!("{name} overlaps {owner}"),
            _ => (),
        }
    }
    names
}
