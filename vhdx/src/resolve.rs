//! From ranges of the disk to ranges of the file.
//!
//! ```text
//!   part of a block --BAT--> data here | zeros | --sector bitmap--> run here, run in the parent, ...
//! ```
//! Resolving moves no bytes: the caller does the I/O and then completes. Neighbouring blocks that also lie next to each other
//! in the file come out as one segment.

use crate::bat::{Bat, BatShape, BlockState};
use crate::bitmap::Bitmaps;
use crate::view::Patches;

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
    /// These bytes of the parent's disk; zeros past its end.
    Parent {
        /// First byte on the disk.
        disk_offset: u64,
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
            Self::Data { len, .. } | Self::Zero { len } | Self::Parent { len, .. } => *len,
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

/// What an image says about some bytes of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// They lie here in the file.
    Data(u64),
    /// They are zeros.
    Zero,
    /// Nothing: ask the parent.
    Nothing,
}

/// An image without its parents, as a read sees it.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) bat: &'a Bat,
    /// There are some only in an image with a parent.
    pub(crate) bitmaps: Option<&'a Bitmaps>,
    /// Bytes that are really in the file.
    pub(crate) file_bytes: u64,
    /// What only the log has, if the log was not replayed into the file.
    pub(crate) patches: Option<&'a Patches>,
}

impl Layer<'_> {
    /// Tells `each` what the image says about a part of a block, in order, with the number of bytes. Takes no lock.
    pub(crate) fn say(&self, part: &BlockPart, each: &mut dyn FnMut(Said, u64)) {
        let entry = self.bat.get(part.block);
        match (entry.state(), self.bitmaps) {
            (BlockState::Present, _) => self.data(entry.offset_field() + part.within, part.len, each),
            (BlockState::Partial, Some(bitmaps)) => {
                let mut at = entry.offset_field() + part.within;
                bitmaps.runs(part, |here, len| {
                    if here {
                        self.data(at, len, each);
                    } else {
                        each(Said::Nothing, len);
                    }
                    at += len;
                });
            }
            (BlockState::NotPresent, Some(_)) => each(Said::Nothing, part.len),
            _ => each(Said::Zero, part.len),
        }
    }

    /// Some files end where the disk ends, inside the last block; what is missing is zero, unless the log has it.
    fn data(&self, file_offset: u64, len: u64, each: &mut dyn FnMut(Said, u64)) {
        let there = self.file_bytes.saturating_sub(file_offset).min(len);
        if there > 0 {
            each(Said::Data(file_offset), there);
        }
        if there < len {
            let missing = file_offset + there..file_offset + len;
            let in_log = self.patches.is_some_and(|patches| patches.touches(missing.clone()));
            each(if in_log { Said::Data(missing.start) } else { Said::Zero }, len - there);
        }
    }

    /// The segments of a range of the disk, the parents left to the caller.
    pub(crate) fn segments(&self, offset: u64, len: u64) -> Vec<ReadSegment> {
        let (mut segments, mut at) = (Vec::new(), offset);
        for part in self.bat.shape.parts(offset, len) {
            self.say(&part, &mut |said, len| {
                push_read(
                    &mut segments,
                    match said {
                        Said::Data(file_offset) => ReadSegment::Data { file_offset, len },
                        Said::Zero => ReadSegment::Zero { len },
                        Said::Nothing => ReadSegment::Parent { disk_offset: at, len },
                    },
                );
                at += len;
            });
        }
        segments
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
        (
            Some(ReadSegment::Parent { disk_offset, len }),
            ReadSegment::Parent { disk_offset: at, len: more },
        ) if *disk_offset + *len == at => *len += more,
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
