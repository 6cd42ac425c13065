//! Finding what the log promises, and keeping the promise ([MS-VHDX] 2.3).
//!
//! ```text
//! ring: | other id | e1 | e2 | e3 | torn | other id |        live id = the header's
//!                    ^ run of valid entries, each number one more than the one before
//!         replay from the tail that e3 names up to e3, in order
//! ```
//! The same run is either written to the file (a writable open) or kept as patches in memory (a read-only open).
//!
//! **Invariant:** nothing below the region tables and nothing inside the ring is ever a target, and the work done for a ring
//! is bounded by four times its length.

use std::borrow::Cow;
use std::collections::HashMap;

use blockio::ImageFile;
use uuid::Uuid;
use zerocopy::FromBytes;

use crate::error::{VhdxError, corrupt, doing};
use crate::format::{
    LOG_TARGET_MIN, LogDataSector, LogDescriptor, LogEntryHeader, MIB, PAGE, TIB, bytes, checksum_without,
    index,
};
use crate::header::CurrentHeader;
use crate::view::{Patch, Patches, View};

/// How far past the end of the file a log may promise space.
const GROWTH_MAX: u64 = 64 * TIB + TIB;
/// Checksum work per byte of ring.
const CHECKSUM_PASSES_MAX: usize = 4;

/// What the log says at open.
#[derive(Debug)]
pub(crate) enum LogState {
    /// No log id: nothing to do.
    Clean,
    /// The header names a log of which no entry exists.
    Orphan(Uuid),
    /// Changes that are not yet all in place.
    Dirty(Replay),
}

/// The changes of the active sequence.
#[derive(Debug)]
pub(crate) struct Replay {
    /// New content of the file.
    pub(crate) patches: Patches,
    /// Size that the file must have at least.
    pub(crate) file_bytes: u64,
    /// Entries from the tail to the head.
    pub(crate) entries: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct EntryPlace {
    at: usize,
    len: usize,
    sequence: u64,
    tail: usize,
    flushed_file_bytes: u64,
    last_file_bytes: u64,
}

struct Ring {
    bytes: Vec<u8>,
    id: Uuid,
    checksum_budget: usize,
    seen: HashMap<usize, Option<EntryPlace>>,
}

/// Reads the log of a file as it lies on the medium.
pub(crate) fn read_log(view: &View, current: &CurrentHeader) -> Result<LogState, VhdxError> {
    let Some(id) = current.header.log_id() else { return Ok(LogState::Clean) };
    let (offset, length) = current.log_area();
    let mut ring = Ring {
        bytes: view.read(offset, index(length), "log")?,
        id,
        checksum_budget: index(length).saturating_mul(CHECKSUM_PASSES_MAX),
        seen: HashMap::new(),
    };
    match ring.active_run()? {
        Some(run) => replay_of(&ring, &run, view, (offset, offset + length)).map(LogState::Dirty),
        None if ring.bears_id() => Err(VhdxError::LogUnrecoverable { log_id: id, file_offset: offset }),
        None => Ok(LogState::Orphan(id)),
    }
}

impl Ring {
    /// The run with the highest last number, from its tail on.
    fn active_run(&mut self) -> Result<Option<Vec<EntryPlace>>, VhdxError> {
        let mut best: Option<Vec<EntryPlace>> = None;
        let mut start = 0;
        while start < self.bytes.len() {
            let run = self.run_from(start)?;
            let Some(head) = run.last().copied() else {
                start += index(PAGE);
                continue;
            };
            let Some(tail) = run.iter().position(|entry| entry.at == head.tail) else {
                start += index(PAGE);
                continue;
            };
            start += run.iter().map(|entry| entry.len).sum::<usize>();
            if best.as_ref().and_then(|run| run.last()).is_none_or(|last| last.sequence < head.sequence) {
                best = Some(run[tail..].to_vec());
            }
        }
        Ok(best)
    }

    /// Valid entries that follow each other from `start` on, at most once around the ring.
    fn run_from(&mut self, start: usize) -> Result<Vec<EntryPlace>, VhdxError> {
        let mut run: Vec<EntryPlace> = Vec::new();
        let (mut at, mut room) = (start, self.bytes.len());
        while room > 0 {
            let Some(entry) = self.entry_at(at)? else { break };
            let follows = run.last().is_none_or(|last| last.sequence.checked_add(1) == Some(entry.sequence));
            if !follows || entry.len > room {
                break;
            }
            room -= entry.len;
            at = (at + entry.len) % self.bytes.len();
            run.push(entry);
        }
        Ok(run)
    }

    fn entry_at(&mut self, at: usize) -> Result<Option<EntryPlace>, VhdxError> {
        if let Some(known) = self.seen.get(&at) {
            return Ok(*known);
        }
        let found = self.parse(at)?;
        self.seen.insert(at, found);
        Ok(found)
    }

    /// Cheap checks first: the checksum is what a hostile ring would make us compute for ever.
    fn parse(&mut self, at: usize) -> Result<Option<EntryPlace>, VhdxError> {
        let Some((header, descriptors)) = self.header_at(at) else { return Ok(None) };
        let len = header.entry_length.get() as usize;
        let entry = self.slice(at, len);
        if !self.descriptors_fit(&entry, &header, descriptors) {
            return Ok(None);
        }
        let Some(rest) = self.checksum_budget.checked_sub(len) else {
            return Err(VhdxError::Limit {
                what: "the checksum work of the log scan",
                found: bytes(self.bytes.len() * (CHECKSUM_PASSES_MAX + 1)),
                bound: bytes(self.bytes.len() * CHECKSUM_PASSES_MAX),
            });
        };
        let valid = header.checksum.get() == checksum_without(&entry, 4);
        self.checksum_budget = rest;
        Ok(valid.then(|| EntryPlace {
            at,
            len,
            sequence: header.sequence.get(),
            tail: header.tail.get() as usize,
            flushed_file_bytes: header.flushed_file_bytes.get(),
            last_file_bytes: header.last_file_bytes.get(),
        }))
    }

    fn header_at(&self, at: usize) -> Option<(LogEntryHeader, usize)> {
        let (header, _) = LogEntryHeader::read_from_prefix(&self.bytes[at..]).ok()?;
        let page = index(PAGE);
        let len = header.entry_length.get() as usize;
        let tail = header.tail.get() as usize;
        let descriptors = header.descriptor_count.get() as usize;
        let plausible = header.signature == *b"loge"
            && header.log_id == self.id.to_bytes_le()
            && header.sequence.get() > 0
            && len.is_multiple_of(page)
            && (page..=self.bytes.len()).contains(&len)
            && tail.is_multiple_of(page)
            && tail < self.bytes.len()
            && descriptors <= len / 32
            && descriptor_sectors(descriptors) * page <= len
            && header.flushed_file_bytes.get().is_multiple_of(MIB)
            && header.last_file_bytes.get().is_multiple_of(MIB);
        plausible.then_some((header, descriptors))
    }

    fn descriptors_fit(&self, entry: &[u8], header: &LogEntryHeader, count: usize) -> bool {
        let page = index(PAGE);
        let sequence = header.sequence.get();
        let mut sectors = entry[descriptor_sectors(count) * page..].chunks_exact(page);
        let (high, low) = halves(sequence);
        for descriptor in descriptors(entry, count) {
            if descriptor.sequence.get() != sequence || !descriptor.file_offset.get().is_multiple_of(PAGE) {
                return false;
            }
            match &descriptor.signature {
                b"zero" if u64::from_le_bytes(descriptor.leading).is_multiple_of(PAGE) => (),
                b"desc" => {
                    let Some(sector) = sectors.next() else { return false };
                    let sector = LogDataSector::ref_from_bytes(sector).expect("a whole page");
                    let whole = sector.signature == *b"data"
                        && sector.sequence_high.get() == high
                        && sector.sequence_low.get() == low;
                    if !whole {
                        return false;
                    }
                }
                _ => return false,
            }
        }
        sectors.next().is_none()
    }

    /// `len` bytes from ring offset `at`, wrapping at the end.
    fn slice(&self, at: usize, len: usize) -> Cow<'_, [u8]> {
        let first = len.min(self.bytes.len() - at);
        if first == len {
            return Cow::Borrowed(&self.bytes[at..at + len]);
        }
        Cow::Owned([&self.bytes[at..], &self.bytes[..len - first]].concat())
    }

    fn bears_id(&self) -> bool {
        let id = self.id.to_bytes_le();
        self.bytes.chunks_exact(index(PAGE)).any(|sector| sector.starts_with(b"loge") && sector[32..48] == id)
    }
}

/// Sectors that the header and `count` descriptors fill.
pub(crate) fn descriptor_sectors(count: usize) -> usize {
    (count + 2).div_ceil(128)
}

fn descriptors(entry: &[u8], count: usize) -> impl Iterator<Item = LogDescriptor> + '_ {
    entry[64..]
        .chunks_exact(32)
        .take(count)
        .map(|bytes| LogDescriptor::read_from_bytes(bytes).expect("a descriptor has 32 bytes"))
}

/// A sequence number in the two halves that frame a data sector.
pub(crate) fn halves(sequence: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = sequence.to_be_bytes();
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
}

fn replay_of(ring: &Ring, run: &[EntryPlace], view: &View, log: (u64, u64)) -> Result<Replay, VhdxError> {
    let head = run.last().expect("a run has entries");
    if head.flushed_file_bytes > view.file_bytes {
        return Err(VhdxError::Truncated {
            structure: "log",
            need: head.flushed_file_bytes,
            have: view.file_bytes,
        });
    }
    if head.last_file_bytes > view.file_bytes.saturating_add(GROWTH_MAX) {
        let found =
            format!("it promises a file of {} bytes, the file has {}", head.last_file_bytes, view.file_bytes);
        return Err(corrupt("log entry", log.0 + bytes(head.at), found));
    }
    let file_bytes = head.last_file_bytes.max(view.file_bytes);
    let mut patches = Patches::default();
    for place in run {
        let entry = ring.slice(place.at, place.len);
        let count = u32::from_le_bytes(entry[24..28].try_into().expect("4 bytes")) as usize;
        let mut sectors = entry[descriptor_sectors(count) * index(PAGE)..].chunks_exact(index(PAGE));
        for descriptor in descriptors(&entry, count) {
            let start = descriptor.file_offset.get();
            let is_zero = descriptor.signature == *b"zero";
            let len = if is_zero { u64::from_le_bytes(descriptor.leading) } else { PAGE };
            check_target(start, len, log, file_bytes, log.0 + bytes(place.at))?;
            if is_zero {
                patches.put_zero(start..start + len);
            } else {
                patches.put_bytes(start, page_of(&descriptor, sectors.next().expect("counted at parsing")));
            }
        }
    }
    Ok(Replay { patches, file_bytes, entries: run.len() })
}

fn check_target(start: u64, len: u64, log: (u64, u64), file_bytes: u64, at: u64) -> Result<(), VhdxError> {
    let end = start.checked_add(len).filter(|end| *end <= file_bytes);
    let outside_log = end.is_some_and(|end| end <= log.0 || start >= log.1);
    if start < LOG_TARGET_MIN || !outside_log {
        let found = format!(
            "it rewrites {len:#x} bytes at {start:#x}: headers, the log itself or past the end of the file"
        );
        return Err(corrupt("log target", at, found));
    }
    Ok(())
}

fn page_of(descriptor: &LogDescriptor, sector: &[u8]) -> Vec<u8> {
    let sector = LogDataSector::ref_from_bytes(sector).expect("a whole page");
    [&descriptor.leading[..], &sector.middle, &descriptor.trailing].concat()
}

impl Replay {
    /// Writes the changes in place. Repeating it changes nothing more. Not flushed.
    pub(crate) fn write_to(&self, file: &dyn ImageFile, file_bytes: u64) -> Result<(), VhdxError> {
        if self.file_bytes > file_bytes {
            file.set_len(self.file_bytes)
                .map_err(doing(format!("growing the file to {} bytes", self.file_bytes)))?;
        }
        for (range, patch) in self.patches.iter() {
            let outcome = match patch {
                Patch::Bytes(content, from) => {
                    let len = index(range.end - range.start);
                    file.write_at(range.start, &content[*from..from + len])
                }
                Patch::Zero => file.run(blockio::IoOp::WriteZeroes {
                    offset: range.start,
                    len: range.end - range.start,
                    may_unmap: false,
                }),
            };
            outcome.map_err(doing(format!("replaying the log at {:#x}", range.start)))?;
        }
        Ok(())
    }
}
