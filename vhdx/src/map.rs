//! Which ranges of a disk an image says something about, and which ranges changed since an older image of its chain.
//!
//! ```text
//!   top     [data][   ask the parent   ][zero]         map of the top: data, parent, zero
//!   parent  [ask       ][data][ask    ][data ]         changed since the base: [data][data] and [zero], from top and parent
//!   base    [..............................  ]
//! ```
//! **Invariant:** ranges come in ascending order, do not overlap, and two that continue each other come as one.

use std::ops::Range;

use blockio::{BlockDevice, IoError};

use crate::image::Image;
use crate::resolve::ReadSegment;

/// What an image says about a range of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// The bytes lie here in the file.
    Data {
        /// Where the first one lies.
        file_offset: u64,
    },
    /// The bytes are zero.
    Zero,
    /// Nothing: the parent's bytes show.
    Parent,
}

/// A range of the disk and what the image says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapExtent {
    /// First byte of the disk.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// What the image says.
    pub mapped: Mapped,
}

impl MapExtent {
    /// This one with `next` at its end, if the two are one.
    fn joined(self, next: Self) -> Option<Self> {
        let continues = match (self.mapped, next.mapped) {
            (Mapped::Data { file_offset }, Mapped::Data { file_offset: at }) => file_offset + self.len == at,
            (a, b) => a == b,
        };
        (continues && self.offset + self.len == next.offset)
            .then(|| Self { len: self.len + next.len, ..self })
    }
}

impl Image {
    /// Something that two images in one file have in common.
    #[must_use]
    pub fn identity(&self) -> String {
        self.loaded().view.file.identity()
    }

    /// Tells `each` what this image alone, without its parents, says about its disk.
    ///
    /// # Errors
    /// When the file fails.
    pub fn map(&self, each: &mut dyn FnMut(MapExtent)) -> Result<(), IoError> {
        let mut last: Option<MapExtent> = None;
        self.walk(&mut |extent| {
            last = match last {
                None => Some(extent),
                Some(before) => before.joined(extent).or_else(|| {
                    each(before);
                    Some(extent)
                }),
            };
        })?;
        last.into_iter().for_each(each);
        Ok(())
    }

    /// Tells `each` the ranges about which this image or one of the next `layers - 1` parents says something: what may differ
    /// from the image below those.
    ///
    /// # Errors
    /// When a file fails.
    pub fn changed_above(&self, layers: usize, each: &mut dyn FnMut(Range<u64>)) -> Result<(), IoError> {
        let mut images = Vec::new();
        let mut next = Some(self.clone());
        while let Some(image) = next.filter(|_| images.len() < layers) {
            next = image.parent();
            images.push(image);
        }
        let mut last: Option<Range<u64>> = None;
        let mut tell = |range: Range<u64>| match &mut last {
            Some(before) if before.end == range.start => before.end = range.end,
            other => other.replace(range).into_iter().for_each(&mut *each),
        };
        for range in self.steps() {
            changed(&images, range, &mut tell)?;
        }
        last.into_iter().for_each(each);
        Ok(())
    }

    fn walk(&self, each: &mut dyn FnMut(MapExtent)) -> Result<(), IoError> {
        for Range { start, end } in self.steps() {
            let mut offset = start;
            for segment in self.resolve_read(start, end - start)? {
                let mapped = match segment {
                    ReadSegment::Data { file_offset, .. } => Mapped::Data { file_offset },
                    ReadSegment::Zero { .. } => Mapped::Zero,
                    ReadSegment::Parent { .. } => Mapped::Parent,
                };
                each(MapExtent { offset, len: segment.len(), mapped });
                offset += segment.len();
            }
        }
        Ok(())
    }

    /// The disk in pieces of a block, so that the memory for the answer is bounded.
    fn steps(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let (size, step) = (self.geometry().size_bytes, self.loaded().params.block_bytes);
        (0..size.div_ceil(step)).map(move |block| block * step..((block + 1) * step).min(size))
    }
}

fn changed(images: &[Image], range: Range<u64>, tell: &mut dyn FnMut(Range<u64>)) -> Result<(), IoError> {
    let Some((image, below)) = images.split_first() else { return Ok(()) };
    // Behind the end of a parent there is nothing that it could say.
    let end = range.end.min(image.geometry().size_bytes);
    let mut at = range.start;
    if at >= end {
        return Ok(());
    }
    for segment in image.resolve_read(at, end - at)? {
        let part = at..at + segment.len();
        at = part.end;
        match segment {
            ReadSegment::Parent { .. } => changed(below, part, tell)?,
            ReadSegment::Data { .. } | ReadSegment::Zero { .. } => tell(part),
        }
    }
    Ok(())
}
