//! A disk image opened for reading: no byte of the file changes, whatever its log says.
//!
//! ```text
//! read(range) -> BAT -> [Data | Zero] -> file read -> pages that only the log has are put over it
//! ```
//! **Invariant:** an `Image` submits nothing but reads.

use std::sync::Arc;

use blockio::{BlockDevice, Completion, Geometry, IoBuf, IoError, IoOp, IoRequest};

use crate::error::VhdxError;
use crate::format::{bytes, index};
use crate::load::Loaded;
use crate::pieces::{check_request, submit_all};
use crate::resolve::{ReadSegment, push_read};

/// Read-only file system: what a write to a read-only image gets.
pub(crate) const EROFS: i32 = 30;

/// A disk image opened for reading.
#[derive(Clone, Debug)]
pub struct Image {
    loaded: Arc<Loaded>,
}

impl Image {
    pub(crate) fn new(loaded: Loaded) -> Self {
        Self { loaded: Arc::new(loaded) }
    }

    /// Where the bytes of a range of the disk are.
    ///
    /// Note that with a dirty log a part of the file may be outdated; reads through [`BlockDevice`] take that into account.
    ///
    /// # Errors
    /// [`IoError::OutOfRange`] when the range is not on the disk or not made of whole sectors.
    pub fn resolve_read(&self, offset: u64, len: u64) -> Result<Vec<ReadSegment>, IoError> {
        crate::pieces::check_range(self.geometry(), "read", offset, len)?;
        let mut segments = Vec::new();
        for part in self.loaded.bat.shape.parts(offset, len) {
            match self.loaded.bat.get(part.block).data_offset() {
                Some(block) => self.push_data(&mut segments, block + part.within, part.len),
                None => push_read(&mut segments, ReadSegment::Zero { len: part.len }),
            }
        }
        Ok(segments)
    }

    /// Where the file ends inside the last block, zeros follow.
    fn push_data(&self, segments: &mut Vec<ReadSegment>, file_offset: u64, len: u64) {
        let there = self.loaded.view.file_bytes.saturating_sub(file_offset).min(len);
        if there > 0 {
            push_read(segments, ReadSegment::Data { file_offset, len: there });
        }
        if there < len {
            self.push_missing(segments, file_offset + there, len - there);
        }
    }

    /// Space past the end of the file reads as zeros, unless the log has pages for it.
    fn push_missing(&self, segments: &mut Vec<ReadSegment>, file_offset: u64, len: u64) {
        if self.loaded.view.patches.touches(file_offset..file_offset + len) {
            push_read(segments, ReadSegment::Data { file_offset, len });
        } else {
            push_read(segments, ReadSegment::Zero { len });
        }
    }

    fn read(&self, offset: u64, buf: &IoBuf, done: Completion) {
        let segments = match self.resolve_read(offset, bytes(buf.len())) {
            Ok(segments) => segments,
            Err(error) => return done(Err(error)),
        };
        let (mut ops, mut patched, mut at) = (Vec::new(), Vec::new(), 0);
        for segment in segments {
            let part = buf.slice(at..at + index(segment.len()));
            at += part.len();
            match segment {
                ReadSegment::Zero { .. } => part.fill_zero(),
                ReadSegment::Data { file_offset, len } => {
                    if self.loaded.view.patches.touches(file_offset..file_offset + len) {
                        patched.push((file_offset, part.clone()));
                    }
                    if file_offset < self.loaded.view.file_bytes {
                        ops.push(IoOp::Read { offset: file_offset, buf: part });
                    } else {
                        part.fill_zero();
                    }
                }
            }
        }
        let done: Completion = if patched.is_empty() { done } else { self.patch_then(patched, done) };
        submit_all(&*self.loaded.view.file, ops, done);
    }

    fn patch_then(&self, patched: Vec<(u64, IoBuf)>, done: Completion) -> Completion {
        let loaded = Arc::clone(&self.loaded);
        Box::new(move |outcome| {
            for (file_offset, part) in patched {
                loaded.view.patches.apply(file_offset, &part);
            }
            done(outcome);
        })
    }

    /// What `info` shows.
    pub(crate) fn loaded(&self) -> &Loaded {
        &self.loaded
    }
}

impl BlockDevice for Image {
    fn geometry(&self) -> Geometry {
        let params = &self.loaded.params;
        Geometry { size_bytes: params.disk_bytes, block_bytes: params.logical_sector, can_discard: false }
    }

    fn submit(&self, request: IoRequest) {
        if let Err(error) = check_request(self.geometry(), &request.op) {
            return (request.done)(Err(error));
        }
        match request.op {
            IoOp::Read { offset, buf } => self.read(offset, &buf, request.done),
            IoOp::Flush => (request.done)(Ok(())),
            IoOp::Write { offset, .. } => {
                (request.done)(Err(IoError::Os { op: "write", offset, errno: EROFS }));
            }
            IoOp::Discard { offset, .. } => {
                (request.done)(Err(IoError::Os { op: "discard", offset, errno: EROFS }));
            }
            IoOp::WriteZeroes { offset, .. } => {
                (request.done)(Err(IoError::Os { op: "write-zeroes", offset, errno: EROFS }));
            }
        }
    }
}

/// Refuses a file whose own granularity is coarser than the sectors of the disk in it.
pub(crate) fn check_granularity(loaded: &Loaded) -> Result<(), VhdxError> {
    let (file, disk) = (loaded.view.file.geometry().block_bytes, loaded.params.logical_sector);
    if file > disk {
        return Err(VhdxError::Unsupported {
            what: format!(
                "a disk of {disk}-byte sectors in a file that can only be accessed in blocks of {file} bytes"
            ),
            hint: "open the file with buffered I/O",
        });
    }
    Ok(())
}
