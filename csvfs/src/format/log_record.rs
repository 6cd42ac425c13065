//! A block of an intent log: what a client has done to files and the coordinator has not merged yet.
//!
//! ```text
//!   ring of a slot   [ header | lane 0: 15 records ][ - | lane 1: 15 records ][ - | lane 2 .. ][ - | lane 3 .. ]   4 x 64 KiB
//!   record           [ whose, which number | File, Placed, Written, Size, Time, File, ... | CRC-32C ]              4 KiB
//! ```
//! Record `n` of a log lies in block `1 + n mod 15` of its lane. A record stands for itself: it begins with the file that
//! its entries are about. **Invariant:** a record counts only in its own place, for the log whose number it carries, and
//! whole; what a former user of the lane left there is of another log.

use lockmgr::{Term, VolumeId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Damaged, layout, seal};

const MAGIC: [u8; 8] = *b"CSVFS\0IR";
const WHAT: &str = "intent log record";
const VERSION: u32 = 1;
/// Size of a record.
pub const RECORD_BYTES: usize = 4096;
/// Entries of one record.
pub const ENTRIES_MAX: usize = 124;
/// Size of a lane: what one client has of a ring.
pub const LANE_BYTES: u64 = 64 * 1024;
/// Number of lanes of a volume.
pub const LANES: u16 = 256;
/// Records of a lane.
pub const LANE_RECORDS: u64 = LANE_BYTES / RECORD_BYTES as u64 - 1;

const _: () = assert!(LANES as u64 * LANE_BYTES == layout::NODE_SLOTS * layout::INTENT_RING_BYTES);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawEntry {
    /// 1 file, 2 placed, 3 written, 4 size, 5 time.
    kind: U32,
    /// Nanoseconds of a time; zero otherwise.
    nanos: U32,
    /// File: inode. Placed, written: first block in the file. Size: bytes. Time: seconds since 1970, signed.
    a: U64,
    /// Placed, written: number of blocks.
    b: U64,
    /// Placed: first block on the LUN.
    c: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    /// `CSVFS\0IR`.
    magic: [u8; 8],
    /// 1.
    version: U32,
    /// Which lane, 0 to 255.
    lane: U16,
    /// Entries in use.
    entries: U16,
    /// Where on the LUN this record belongs.
    offset: U64,
    volume: [u8; 16],
    /// Number of the log: given once, with the pool.
    log: U64,
    /// Number of the record, from 1.
    lsn: U64,
    /// The coordinator's term as the writer knew it.
    term: U64,
    /// Epoch of the writer's node.
    epoch: U64,
    /// Zero.
    reserved: [u8; 16],
    entry: [RawEntry; ENTRIES_MAX],
    /// Zero.
    rest: [u8; 36],
    /// CRC-32C of all before.
    checksum: U32,
}

const _: () = assert!(size_of::<RawEntry>() == 32 && size_of::<Raw>() == RECORD_BYTES);

/// One thing that was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// What follows is about this inode.
    File {
        /// Its number.
        ino: u64,
    },
    /// A hole was filled with blocks of the writer's pool, and they were written.
    Placed {
        /// First block in the file.
        file: u64,
        /// Number of blocks.
        blocks: u64,
        /// First block on the LUN.
        lun: u64,
    },
    /// Fresh blocks were written.
    Written {
        /// First block in the file.
        file: u64,
        /// Number of blocks.
        blocks: u64,
    },
    /// The file has at least this size.
    Size {
        /// In bytes.
        bytes: u64,
    },
    /// When its content changed.
    Time {
        /// Seconds since 1970.
        seconds: i64,
        /// And nanoseconds.
        nanos: u32,
    },
}

/// Whose log a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogId {
    /// Which volume.
    pub volume: VolumeId,
    /// Where the log lies.
    pub lane: u16,
    /// Its number.
    pub log: u64,
}

/// A record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRecord {
    /// Number of the record.
    pub lsn: u64,
    /// Term, as the writer knew it.
    pub term: Term,
    /// Epoch of the writer's node.
    pub epoch: u64,
    /// What was done, in order.
    pub entries: Vec<Entry>,
}

/// Where record `lsn` of a lane lies on the LUN.
#[must_use]
pub fn record_offset(lane: u16, lsn: u64) -> u64 {
    let block = 1 + lsn % LANE_RECORDS;
    layout::INTENT_OFFSET + u64::from(lane) * LANE_BYTES + block * RECORD_BYTES as u64
}

impl LogRecord {
    /// The bytes of this record.
    ///
    /// # Panics
    /// With more than [`ENTRIES_MAX`] entries.
    #[must_use]
    pub fn encode(&self, id: &LogId) -> Vec<u8> {
        assert!(self.entries.len() <= ENTRIES_MAX, "the writer cuts its entries into records");
        let mut entry = [raw_entry(0, 0, [0; 3]); ENTRIES_MAX];
        for (raw, entry) in entry.iter_mut().zip(&self.entries) {
            *raw = to_raw(entry);
        }
        let raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            lane: id.lane.into(),
            entries: u16::try_from(self.entries.len()).expect("at most ENTRIES_MAX").into(),
            offset: record_offset(id.lane, self.lsn).into(),
            volume: *id.volume.0.as_bytes(),
            log: id.log.into(),
            lsn: self.lsn.into(),
            term: self.term.0.into(),
            epoch: self.epoch.into(),
            reserved: [0; 16],
            entry,
            rest: [0; 36],
            checksum: U32::ZERO,
        };
        let mut bytes = raw.as_bytes().to_vec();
        seal::seal(&mut bytes);
        bytes
    }

    /// The record `lsn` of the log `id`, from the bytes of its place.
    ///
    /// # Errors
    /// [`Damaged`] when it is not there: never written, torn, or of another log.
    pub fn decode(bytes: &[u8], id: &LogId, lsn: u64) -> Result<Self, Damaged> {
        let offset = record_offset(id.lane, lsn);
        let field = |why: &str| Damaged::Field { what: WHAT, offset, why: why.into() };
        seal::check(bytes, MAGIC, WHAT, offset)?;
        let raw = Raw::ref_from_bytes(bytes).map_err(|_| field("wrong length"))?;
        if raw.version.get() != VERSION {
            return Err(field("its version is not known"));
        }
        let placed = raw.offset.get() == offset && raw.lane.get() == id.lane;
        let ours = raw.volume == *id.volume.0.as_bytes() && raw.log.get() == id.log;
        if !placed || !ours || raw.lsn.get() != lsn {
            return Err(field("it is of another log, or an older one"));
        }
        let used =
            raw.entry.get(..usize::from(raw.entries.get())).ok_or_else(|| field("too many entries"))?;
        let entries: Option<Vec<Entry>> = used.iter().map(from_raw).collect();
        let entries = entries.ok_or_else(|| field("an entry that cannot be"))?;
        Ok(Self { lsn, term: Term(raw.term.get()), epoch: raw.epoch.get(), entries })
    }
}

fn raw_entry(kind: u32, nanos: u32, [a, b, c]: [u64; 3]) -> RawEntry {
    RawEntry { kind: kind.into(), nanos: nanos.into(), a: a.into(), b: b.into(), c: c.into() }
}

fn to_raw(entry: &Entry) -> RawEntry {
    match *entry {
        Entry::File { ino } => raw_entry(1, 0, [ino, 0, 0]),
        Entry::Placed { file, blocks, lun } => raw_entry(2, 0, [file, blocks, lun]),
        Entry::Written { file, blocks } => raw_entry(3, 0, [file, blocks, 0]),
        Entry::Size { bytes } => raw_entry(4, 0, [bytes, 0, 0]),
        Entry::Time { seconds, nanos } => raw_entry(5, nanos, [seconds.cast_unsigned(), 0, 0]),
    }
}

fn from_raw(raw: &RawEntry) -> Option<Entry> {
    let (a, b, c) = (raw.a.get(), raw.b.get(), raw.c.get());
    let run = |file: u64, blocks: u64| blocks > 0 && file.checked_add(blocks).is_some();
    match raw.kind.get() {
        1 => Some(Entry::File { ino: a }),
        2 if run(a, b) && run(c, b) => Some(Entry::Placed { file: a, blocks: b, lun: c }),
        3 if run(a, b) => Some(Entry::Written { file: a, blocks: b }),
        4 => Some(Entry::Size { bytes: a }),
        5 => Some(Entry::Time { seconds: a.cast_signed(), nanos: raw.nanos.get() }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn id() -> LogId {
        LogId { volume: VolumeId(Uuid::from_u128(9)), lane: 7, log: 33 }
    }

    fn record(lsn: u64) -> LogRecord {
        let entries = vec![
            Entry::File { ino: 5 },
            Entry::Placed { file: 10, blocks: 3, lun: 9000 },
            Entry::Written { file: 1, blocks: 1 },
            Entry::Size { bytes: 123_456 },
            Entry::Time { seconds: -3, nanos: 17 },
        ];
        LogRecord { lsn, term: Term(4), epoch: 2, entries }
    }

    #[test]
    fn a_record_reads_back_in_its_place_only() {
        let bytes = record(40).encode(&id());
        assert_eq!(LogRecord::decode(&bytes, &id(), 40), Ok(record(40)));
        assert!(
            LogRecord::decode(&bytes, &id(), 40 + LANE_RECORDS).is_err(),
            "an older one in the same block"
        );
        assert!(LogRecord::decode(&bytes, &LogId { log: 34, ..id() }, 40).is_err(), "of another log");
        assert!(LogRecord::decode(&bytes, &LogId { lane: 8, ..id() }, 40).is_err(), "of another lane");
    }

    // Invariant D2: a torn record is none.
    #[test]
    fn every_changed_sector_of_a_record_is_noticed() {
        let bytes = record(1).encode(&id());
        for at in (0..RECORD_BYTES).step_by(8) {
            let mut torn = bytes.clone();
            torn[at] ^= 1;
            assert!(LogRecord::decode(&torn, &id(), 1).is_err(), "byte {at}");
        }
        assert!(LogRecord::decode(&[], &id(), 1).is_err());
        assert!(LogRecord::decode(&[0; RECORD_BYTES], &id(), 1).is_err());
    }

    #[test]
    fn records_of_a_lane_do_not_touch_the_headers_or_each_other() {
        let headers = (0..lockmgr::NODES_MAX).map(super::super::intent::ring_offset);
        let mut places: Vec<u64> = headers.collect();
        for lane in 0..LANES {
            places.extend((0..LANE_RECORDS).map(|lsn| record_offset(lane, lsn)));
        }
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[0] + RECORD_BYTES as u64 <= pair[1]));
        let end = layout::INTENT_OFFSET + layout::NODE_SLOTS * layout::INTENT_RING_BYTES;
        assert!(places.last().is_some_and(|last| last + RECORD_BYTES as u64 <= end));
    }
}
