//! One record of the metadata store's journal: what one transaction changed.
//!
//! Records lie one after the other from the start of the journal, each in whole blocks. **Invariant:** a record that is torn, of
//! another volume, term or place, or not the next one, is none: what follows it was never acknowledged.

use lockmgr::{Term, VolumeId};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::{BLOCK_BYTES, JOURNAL_BYTES, JOURNAL_OFFSET};
use super::{Damaged, seal};

const MAGIC: [u8; 8] = *b"CSVFS\0JR";
const WHAT: &str = "csvfs journal record";
const VERSION: u32 = 1;
/// Bytes of the checksum.
const SEAL_BYTES: usize = 4;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Head {
    /// `CSVFS\0JR`.
    magic: [u8; 8],
    /// 1.
    version: U32,
    /// Length of what was changed, in bytes. Zeros follow it, up to the checksum at the end of the last block.
    changes_bytes: U32,
    /// Where on the LUN this record belongs.
    offset: U64,
    volume: [u8; 16],
    /// Term of the coordinator that wrote it.
    term: U64,
    /// Counts the records of all terms.
    number: U64,
    /// Zero.
    reserved: [u8; 8],
}

const HEAD_BYTES: usize = size_of::<Head>();
const _: () = assert!(HEAD_BYTES == 64);

/// Which record is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordId {
    pub(crate) volume: VolumeId,
    pub(crate) term: Term,
    pub(crate) number: u64,
    /// Where on the LUN it begins, in bytes.
    pub(crate) offset: u64,
}

/// How many bytes of the journal a record takes.
pub(crate) fn record_bytes(changes_bytes: usize) -> u64 {
    (HEAD_BYTES as u64 + changes_bytes as u64 + SEAL_BYTES as u64).next_multiple_of(BLOCK_BYTES)
}

/// The bytes of a record. It must fit the journal.
pub(crate) fn encode(id: &RecordId, changes: &[u8]) -> Vec<u8> {
    let head = Head {
        magic: MAGIC,
        version: VERSION.into(),
        changes_bytes: u32::try_from(changes.len()).expect("less than the journal").into(),
        offset: id.offset.into(),
        volume: *id.volume.0.as_bytes(),
        term: id.term.0.into(),
        number: id.number.into(),
        reserved: [0; 8],
    };
    let size = usize::try_from(record_bytes(changes.len())).expect("less than the journal");
    let mut bytes = Vec::with_capacity(size);
    bytes.extend_from_slice(head.as_bytes());
    bytes.extend_from_slice(changes);
    bytes.resize(size, 0);
    seal::seal(&mut bytes);
    bytes
}

/// How many bytes the record that begins with this block takes, as it says; none if no record can.
pub(crate) fn claimed_bytes(first_block: &[u8], offset: u64) -> Option<u64> {
    let (head, _) = Head::ref_from_prefix(first_block).ok()?;
    let bytes = record_bytes(usize::try_from(head.changes_bytes.get()).ok()?);
    let end = JOURNAL_OFFSET + JOURNAL_BYTES;
    (head.magic == MAGIC && offset < end && bytes <= end - offset).then_some(bytes)
}

/// What the record `id` changed, from the bytes of its place.
pub(crate) fn decode<'b>(bytes: &'b [u8], id: &RecordId) -> Result<&'b [u8], Damaged> {
    let field = |why: &str| Damaged::Field { what: WHAT, offset: id.offset, why: why.into() };
    if !(bytes.len() as u64).is_multiple_of(BLOCK_BYTES) {
        return Err(field("wrong length"));
    }
    seal::check(bytes, MAGIC, WHAT, id.offset)?;
    let (head, rest) = Head::ref_from_prefix(bytes).map_err(|_| field("wrong length"))?;
    if head.version.get() != VERSION {
        return Err(field("its version is not known"));
    }
    let ours = head.volume == *id.volume.0.as_bytes() && head.offset.get() == id.offset;
    if !ours || head.term.get() != id.term.0 || head.number.get() != id.number {
        return Err(field("it is not the next one"));
    }
    let changes = usize::try_from(head.changes_bytes.get()).unwrap_or(usize::MAX);
    rest.get(..changes)
        .filter(|_| record_bytes(changes) == bytes.len() as u64)
        .ok_or_else(|| field("it is longer than its blocks"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn id() -> RecordId {
        RecordId {
            volume: VolumeId(Uuid::from_u128(3)),
            term: Term(4),
            number: 17,
            offset: JOURNAL_OFFSET + BLOCK_BYTES,
        }
    }

    #[test]
    fn a_record_reads_back_in_its_place_and_its_turn_only() {
        for len in [0, 1, 4028, 4029, 20_000] {
            let changes = vec![7; len];
            let bytes = encode(&id(), &changes);
            assert_eq!(claimed_bytes(&bytes, id().offset), Some(bytes.len() as u64));
            assert_eq!(decode(&bytes, &id()), Ok(&changes[..]));
        }
        let bytes = encode(&id(), &[7; 100]);
        let elsewhere = [
            RecordId { number: 18, ..id() },
            RecordId { term: Term(3), ..id() },
            RecordId { offset: JOURNAL_OFFSET, ..id() },
            RecordId { volume: VolumeId(Uuid::from_u128(4)), ..id() },
        ];
        assert!(elsewhere.iter().all(|other| decode(&bytes, other).is_err()));
    }

    // Invariant D2: a torn record is none.
    #[test]
    fn every_changed_sector_is_noticed() {
        let bytes = encode(&id(), &[7; 9000]);
        for at in (0..bytes.len()).step_by(512) {
            let mut torn = bytes.clone();
            torn[at] ^= 1;
            assert!(decode(&torn, &id()).is_err(), "byte {at}");
        }
    }

    proptest! {
        // Invariant E: what is on the LUN may be anything.
        #[test]
        fn nothing_that_is_on_the_lun_is_more_than_refused(
            noise in proptest::collection::vec(any::<u8>(), 0..8192),
            claimed: u32,
            offset: u64,
        ) {
            prop_assert!(decode(&noise, &id()).is_err());
            let mut block = encode(&id(), &[]);
            block[12..16].copy_from_slice(&claimed.to_le_bytes());
            let told = claimed_bytes(&block, offset);
            prop_assert!(told.is_none_or(|bytes| bytes <= JOURNAL_BYTES));
            prop_assert_eq!(decode(&block, &id()).is_ok(), claimed == 0);
        }
    }
}
