//! An open file: the handle that FUSE, images and virtual machines do I/O through.

use std::sync::Arc;

use blockio::{BlockDevice, Geometry, ImageFile, IoBuf, IoError, IoOp, IoRequest};

use super::{Attr, FsError, Node};

/// State of a run of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentState {
    /// Reads come from the LUN.
    Data,
    /// Allocated and never written: reads give zeros.
    Fresh,
}

/// A run of a file on the LUN. Numbers in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where in the file.
    pub file_offset: u64,
    /// How long.
    pub length: u64,
    /// Where on the LUN.
    pub lun_offset: u64,
    /// Whether it was written.
    pub state: ExtentState,
}

/// What to look for, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekFrom {
    /// The next hole (the end of the file is one).
    Hole(u64),
    /// The next data.
    Data(u64),
}

/// An open file. Dropping it closes it; what is buffered goes to the coordinator then.
///
/// Completions run on the device's I/O thread or on a worker of the node: they must not block.
pub struct File {
    node: Arc<Node>,
    ino: u64,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File").field("ino", &self.ino).finish_non_exhaustive()
    }
}

impl File {
    pub(super) fn new(node: Arc<Node>, ino: u64) -> Arc<Self> {
        Arc::new(Self { node, ino })
    }

    /// Inode number.
    #[must_use]
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Fills `buf` from `offset`; completes with the number of bytes, fewer only at the end of the file.
    pub fn read(&self, offset: u64, buf: IoBuf, done: impl FnOnce(Result<usize, FsError>) + Send + 'static) {
        drop((offset, buf));
        done(Err(unfinished()));
    }

    /// Writes `buf` at `offset`, growing the file if needed. When it has completed, every node's read sees it.
    pub fn write(&self, offset: u64, buf: IoBuf, done: impl FnOnce(Result<usize, FsError>) + Send + 'static) {
        drop((offset, buf));
        done(Err(unfinished()));
    }

    /// Writes `buf` at the end of the file, wherever other nodes have moved it; completes with the offset.
    pub fn append(&self, buf: IoBuf, done: impl FnOnce(Result<u64, FsError>) + Send + 'static) {
        drop(buf);
        done(Err(unfinished()));
    }

    /// Completes when all completed writes, the size and the times are durable.
    pub fn fsync(&self, done: impl FnOnce(Result<(), FsError>) + Send + 'static) {
        done(Err(unfinished()));
    }

    /// Like [`File::fsync`], without what is not needed to find the data again: the times.
    pub fn datasync(&self, done: impl FnOnce(Result<(), FsError>) + Send + 'static) {
        done(Err(unfinished()));
    }

    /// Attributes now.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn attr(&self) -> Result<Attr, FsError> {
        self.node.getattr(self.ino)
    }

    /// Size in bytes now.
    ///
    /// # Errors
    /// As for [`File::attr`].
    pub fn size(&self) -> Result<u64, FsError> {
        Ok(self.attr()?.size_bytes)
    }

    /// Changes the size: cuts off the end, or grows with a hole.
    ///
    /// # Errors
    /// When the coordinator refuses, or the LUN fails.
    pub fn set_size(&self, size_bytes: u64) -> Result<(), FsError> {
        let _ = size_bytes;
        Err(unfinished())
    }

    /// Allocates space for a range, so that writes there cannot fail for want of it.
    ///
    /// # Errors
    /// When there is no space.
    pub fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> Result<(), FsError> {
        let _ = (offset, len, keep_size);
        Err(unfinished())
    }

    /// The next hole or data at or after an offset; `ENXIO` when there is none before the end.
    ///
    /// # Errors
    /// `ENXIO`, or when the coordinator refuses.
    pub fn seek(&self, from: SeekFrom) -> Result<u64, FsError> {
        let _ = from;
        Err(unfinished())
    }

    /// Where the file lies on the LUN, holes left out.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn map(&self) -> Result<Vec<Extent>, FsError> {
        Err(unfinished())
    }
}

fn unfinished() -> FsError {
    FsError::invalid(libc::ENOSYS, "not there yet")
}

impl BlockDevice for File {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: self.size().unwrap_or(0), block_bytes: 1, can_discard: false }
    }

    fn submit(&self, request: IoRequest) {
        let IoRequest { op, done } = request;
        match op {
            IoOp::Read { offset, buf } => {
                self.read(offset, buf, move |r| done(r.map(drop).map_err(|e| e.into_io("read", offset))));
            }
            IoOp::Write { offset, buf, .. } => {
                self.write(offset, buf, move |r| done(r.map(drop).map_err(|e| e.into_io("write", offset))));
            }
            IoOp::Flush => self.datasync(move |r| done(r.map_err(|e| e.into_io("flush", 0)))),
            IoOp::Discard { .. } => done(Ok(())),
            IoOp::WriteZeroes { offset, .. } => done(Err(unfinished().into_io("write zeroes", offset))),
        }
    }
}

impl ImageFile for File {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        self.set_size(size_bytes).map_err(|error| error.into_io("set size", size_bytes))
    }

    fn identity(&self) -> String {
        self.node.file_identity(self.ino)
    }
}
