//! A disk image opened for reading: no byte of the file changes, whatever its log says.
//!
//! ```text
//! read(range) -> BAT -> [data | zeros | ask the parent] -> file reads -> pages that only a log has are put over it
//! ```
//! **Invariant:** an `Image` submits nothing but reads.

use std::sync::Arc;

use blockio::{BlockDevice, Completion, Geometry, IoBuf, IoError, IoOp, IoRequest};

use crate::chain::Chain;
use crate::error::VhdxError;
use crate::format::bytes;
use crate::load::Loaded;
use crate::pieces::{check_range, check_request};
use crate::plan::{Plan, Source};
use crate::resolve::{Layer, ReadSegment, Said};

/// Read-only file system: what a write to a read-only image gets.
pub(crate) const EROFS: i32 = 30;

/// A disk image opened for reading, with its parents.
#[derive(Clone)]
pub struct Image {
    loaded: Arc<Loaded>,
    chain: Arc<Chain>,
}

impl Image {
    pub(crate) fn new(loaded: Arc<Loaded>, chain: Chain) -> Self {
        Self { loaded, chain: Arc::new(chain) }
    }

    /// Where the bytes of a range of the disk are.
    ///
    /// Note that with a dirty log a part of the file may be outdated; reads through [`BlockDevice`] take that into account.
    ///
    /// # Errors
    /// [`IoError::OutOfRange`] when the range is not on the disk or not made of whole sectors.
    pub fn resolve_read(&self, offset: u64, len: u64) -> Result<Vec<ReadSegment>, IoError> {
        check_range(self.geometry(), "read", offset, len)?;
        Ok(self.loaded.layer().segments(offset, len))
    }

    /// The image that this one differs from, with its own parents.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        self.chain.parent()
    }

    /// Number of parents below each other.
    #[must_use]
    pub fn parents(&self) -> usize {
        self.chain.layers().len()
    }

    /// Where the parents were found, the nearest first.
    #[must_use]
    pub fn parent_paths(&self) -> Vec<String> {
        self.chain.paths().to_vec()
    }

    /// The parents.
    pub(crate) fn chain(&self) -> &Chain {
        &self.chain
    }

    fn read(&self, offset: u64, buf: &IoBuf, done: Completion) {
        let mut plan = Plan::new(buf);
        self.say(offset, bytes(buf.len()), &mut |image, said, len| match (image, said) {
            (Some(image), Said::Data(file_offset)) => plan.data(Source::Image(image), file_offset, len),
            _ => plan.zero(len),
        });
        plan.submit(done);
    }

    /// Tells `each` which image of the chain says what about a range, in order, with the number of bytes.
    pub(crate) fn say<'a>(
        &'a self,
        offset: u64,
        len: u64,
        each: &mut dyn FnMut(Option<&'a Arc<Loaded>>, Said, u64),
    ) {
        let shape = self.loaded.bat.shape;
        let mut at = offset;
        for part in shape.parts(offset, len) {
            self.loaded.layer().say(&part, &mut |said, len| {
                match said {
                    Said::Nothing => self.chain.say(part.block, || shape.span(part.block), (at, len), each),
                    said => each(Some(&self.loaded), said, len),
                }
                at += len;
            });
        }
    }

    /// What `info` shows.
    pub(crate) fn loaded(&self) -> &Loaded {
        &self.loaded
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("file", &self.loaded.name())
            .field("params", &self.loaded.params)
            .field("parents", &self.chain.paths())
            .finish_non_exhaustive()
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

impl Loaded {
    /// The image without its parents.
    pub(crate) fn layer(&self) -> Layer<'_> {
        Layer {
            bat: &self.bat,
            bitmaps: self.bitmaps.as_ref(),
            file_bytes: self.view.file_bytes,
            patches: Some(&self.view.patches),
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
