//! From ranges of the disk to ranges of the file.
//!
//! Resolving moves no bytes: the caller does the I/O and then completes. Neighbouring blocks that also lie next to each other
//! in the file come out as one segment.

use crate::bat::BatShape;

/// What a part of a read is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReadSegment {
    /// These bytes of the file.
    Data {
        /// First byte in the file.
        file_offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Zeros.
    Zero {
        /// Number of bytes.
        len: u64,
    },
}

/// What a part of a write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WriteSegment {
    /// To be written at this place of the file. The rest of a block that is new there reads zero already.
    Data {
        /// First byte in the file.
        file_offset: u64,
        /// Number of bytes.
        len: u64,
    },
}

impl ReadSegment {
    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Data { len, .. } | Self::Zero { len } => *len,
        }
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A part of a request that lies in one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockPart {
    /// Which block.
    pub(crate) block: u64,
    /// First byte within the block.
    pub(crate) within: u64,
    /// Number of bytes.
    pub(crate) len: u64,
}

impl BatShape {
    /// The parts of a range of the disk, ascending. The range is known to lie on the disk.
    pub(crate) fn parts(self, offset: u64, len: u64) -> impl Iterator<Item = BlockPart> {
        let (mut at, end) = (offset, offset + len);
        std::iter::from_fn(move || {
            let left = end.checked_sub(at).filter(|left| *left > 0)?;
            let (block, within) = (at / self.block_bytes, at % self.block_bytes);
            let len = left.min(self.block_bytes - within);
            at += len;
            Some(BlockPart { block, within, len })
        })
    }

    /// Whether `part` is all of its block that the disk has.
    pub(crate) fn covers(self, part: &BlockPart) -> bool {
        part.within == 0 && part.len == self.bytes_in(part.block)
    }
}

/// Appends a segment, merged with the one before where both continue each other.
pub(crate) fn push_read(segments: &mut Vec<ReadSegment>, next: ReadSegment) {
    match (segments.last_mut(), next) {
        (Some(ReadSegment::Zero { len }), ReadSegment::Zero { len: more }) => *len += more,
        (Some(ReadSegment::Data { file_offset, len }), ReadSegment::Data { file_offset: at, len: more })
            if *file_offset + *len == at =>
        {
            *len += more;
        }
        _ => segments.push(next),
    }
}

/// The same for writes.
pub(crate) fn push_write(segments: &mut Vec<WriteSegment>, file_offset: u64, more: u64) {
    match segments.last_mut() {
        Some(WriteSegment::Data { file_offset: at, len }) if *at + *len == file_offset => *len += more,
        _ => segments.push(WriteSegment::Data { file_offset, len: more }),
    }
}
