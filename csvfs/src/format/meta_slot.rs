//! The metadata slot: how long the metadata store is, and of which chunks of the LUN it consists.
//!
//! Two copies, written in turn with a growing sequence number: a torn write leaves the other, older one.
//! **Invariant:** the store's length never exceeds the sum of its chunks, and chunks lie inside the LUN and do not overlap.

use lockmgr::VolumeId;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::{BLOCK_BYTES, FIRST_CHUNK_OFFSET, META_SLOT_BYTES};
use super::{Damaged, seal};

const MAGIC: [u8; 8] = *b"CSVFS\0MT";
const WHAT: &str = "csvfs metadata slot";
const VERSION: u32 = 1;

/// Most chunks that a slot can list.
pub(crate) const CHUNKS_MAX: usize = (META_SLOT_BYTES - size_of::<Head>() - 4) / size_of::<RawChunk>();

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Head {
    /// `CSVFS\0MT`.
    magic: [u8; 8],
    /// 1.
    version: U32,
    /// Number of chunks in use.
    chunk_count: U32,
    /// Where on the LUN this copy belongs.
    offset: U64,
    volume: [u8; 16],
    /// Counts the writes; the higher of two valid copies counts.
    sequence: U64,
    /// Length of the metadata store in bytes.
    len: U64,
    /// Bytes of the chunks from here on have been zero since the chunk was taken.
    used_high: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawChunk {
    /// First byte on the LUN.
    offset: U64,
    /// Size in bytes.
    bytes: U64,
}

/// A piece of the LUN that carries a part of the metadata store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// Length and chunks of the metadata store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MetaSlot {
    pub(crate) sequence: u64,
    pub(crate) len: u64,
    pub(crate) used_high: u64,
    pub(crate) chunks: Vec<Chunk>,
}

impl MetaSlot {
    pub(crate) fn capacity(&self) -> u64 {
        self.chunks.iter().map(|c| c.bytes).sum()
    }

    pub(crate) fn encode(&self, offset: u64, volume: VolumeId) -> Vec<u8> {
        let head = Head {
            magic: MAGIC,
            version: VERSION.into(),
            chunk_count: u32::try_from(self.chunks.len()).expect("at most CHUNKS_MAX").into(),
            offset: offset.into(),
            volume: *volume.0.as_bytes(),
            sequence: self.sequence.into(),
            len: self.len.into(),
            used_high: self.used_high.into(),
        };
        let mut bytes = head.as_bytes().to_vec();
        for chunk in &self.chunks {
            let raw = RawChunk { offset: chunk.offset.into(), bytes: chunk.bytes.into() };
            bytes.extend_from_slice(raw.as_bytes());
        }
        assert!(bytes.len() <= META_SLOT_BYTES - 4, "the caller keeps to CHUNKS_MAX");
        bytes.resize(META_SLOT_BYTES, 0);
        seal::seal(&mut bytes);
        bytes
    }

    pub(crate) fn decode(
        bytes: &[u8],
        offset: u64,
        volume: VolumeId,
        lun_bytes: u64,
    ) -> Result<Self, Damaged> {
        let field = |why: &str| Damaged::Field { what: WHAT, offset, why: why.into() };
        seal::check(bytes, MAGIC, WHAT, offset)?;
        let (head, rest) = Head::ref_from_prefix(bytes).map_err(|_| field("wrong length"))?;
        if head.version.get() != VERSION {
            return Err(field("unknown version"));
        }
        if head.offset.get() != offset || head.volume != *volume.0.as_bytes() {
            return Err(field("it belongs to another place or volume"));
        }
        let count = usize::try_from(head.chunk_count.get()).unwrap_or(usize::MAX);
        if count > CHUNKS_MAX {
            return Err(field("too many chunks"));
        }
        let (raw, _) =
            <[RawChunk]>::ref_from_prefix_with_elems(rest, count).map_err(|_| field("wrong length"))?;
        let chunks: Vec<Chunk> =
            raw.iter().map(|c| Chunk { offset: c.offset.get(), bytes: c.bytes.get() }).collect();
        if !chunks_fit(&chunks, lun_bytes) {
            return Err(field("its chunks overlap or lie outside the LUN"));
        }
        let slot = Self {
            sequence: head.sequence.get(),
            len: head.len.get(),
            used_high: head.used_high.get(),
            chunks,
        };
        if slot.len > slot.capacity() || slot.used_high > slot.capacity() {
            return Err(field("the store is longer than its chunks"));
        }
        Ok(slot)
    }
}

fn chunks_fit(chunks: &[Chunk], lun_bytes: u64) -> bool {
    let mut sorted = chunks.to_vec();
    sorted.sort_by_key(|c| c.offset);
    let mut end = FIRST_CHUNK_OFFSET;
    for chunk in sorted {
        let aligned = chunk.offset.is_multiple_of(BLOCK_BYTES) && chunk.bytes.is_multiple_of(BLOCK_BYTES);
        match chunk.offset.checked_add(chunk.bytes) {
            Some(next) if aligned && chunk.offset >= end && next <= lun_bytes => end = next,
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    const AT: u64 = 20 << 20;

    fn volume() -> VolumeId {
        VolumeId(Uuid::from_u128(9))
    }

    fn slot(chunks: Vec<Chunk>) -> MetaSlot {
        MetaSlot { sequence: 4, len: 4096, used_high: 8192, chunks }
    }

    #[test]
    fn a_slot_reads_back() {
        let chunks = (0..CHUNKS_MAX as u64).map(|i| Chunk { offset: (21 << 20) + i * 8192, bytes: 8192 });
        let slot = slot(chunks.collect());
        let bytes = slot.encode(AT, volume());
        assert_eq!(MetaSlot::decode(&bytes, AT, volume(), 1 << 30), Ok(slot));
    }

    // Invariant C10: numbers from the LUN are checked before use.
    #[test]
    fn chunks_outside_the_lun_or_overlapping_are_refused() {
        let outside = slot(vec![Chunk { offset: 63 << 20, bytes: 2 << 20 }]);
        assert!(MetaSlot::decode(&outside.encode(AT, volume()), AT, volume(), 64 << 20).is_err());
        let huge = slot(vec![Chunk { offset: u64::MAX - 4095, bytes: 8192 }]);
        assert!(MetaSlot::decode(&huge.encode(AT, volume()), AT, volume(), 64 << 20).is_err());
        let twice = slot(vec![Chunk { offset: 21 << 20, bytes: 8192 }; 2]);
        assert!(MetaSlot::decode(&twice.encode(AT, volume()), AT, volume(), 64 << 20).is_err());
    }
}
