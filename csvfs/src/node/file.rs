//! An open file: the handle that FUSE, images and virtual machines do I/O through.

use std::ops::Range;
use std::sync::Arc;

use blockio::{BlockDevice, Completion, Geometry, ImageFile, IoBuf, IoError, IoOp, IoRequest};
use lockmgr::Mode;

use super::core::Pin;
use super::inode::{Holding, Inode};
use super::io::{self, DataOp, What};
use super::pages::Mapper;
use super::{Attr, FsError, Node, SetAttr, attr};

/// State of a run of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentState {
    /// Reads come from the LUN.
    Data,
    /// Allocated and never written: reads give zeros.
    Fresh,
    /// As `Data`, and other files may have the same blocks: a write goes to new ones.
    Shared,
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
/// Completions run on the device's I/O thread or on a worker of the node: they must not block. The calls that return a
/// result wait for the coordinator and must not be made from a completion.
pub struct File {
    // Before `node`: a file is closed while its node is there.
    pin: Pin,
    node: Arc<Node>,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File").field("ino", &self.ino()).finish_non_exhaustive()
    }
}

impl File {
    pub(super) fn new(node: Arc<Node>, pin: Pin) -> Arc<Self> {
        Arc::new(Self { pin, node })
    }

    pub(super) fn inode(&self) -> &Arc<Inode> {
        &self.pin.inode
    }

    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// Brings all that only this node knows of the file to the coordinator.
    pub(super) fn settle(&self) -> Result<(), FsError> {
        let _hold = self.pin.inode.hold(Mode::Exclusive, Holding::Alone)?;
        self.pin.inode.settle()
    }

    /// Inode number.
    #[must_use]
    pub fn ino(&self) -> u64 {
        self.pin.inode.ino
    }

    /// Fills `buf` from `offset`; completes with the number of bytes, fewer only at the end of the file.
    pub fn read(&self, offset: u64, buf: IoBuf, done: impl FnOnce(Result<usize, FsError>) + Send + 'static) {
        self.submit_op(What::Read, offset, buf, false, bytes_to(done));
    }

    /// Writes `buf` at `offset`, growing the file if needed. When it has completed, every node's read sees it.
    pub fn write(&self, offset: u64, buf: IoBuf, done: impl FnOnce(Result<usize, FsError>) + Send + 'static) {
        self.submit_op(What::Write, offset, buf, false, bytes_to(done));
    }

    /// As [`File::read`], for a page that the kernel keeps, of a mapping.
    pub fn read_page(
        &self,
        offset: u64,
        buf: IoBuf,
        done: impl FnOnce(Result<usize, FsError>) + Send + 'static,
    ) {
        let done = bytes_to(done);
        self.pin.inode.submit(DataOp { what: What::Read, offset, buf, exact: false, page: true, done });
    }

    /// As [`File::write`], of what a program has changed in pages that the kernel keeps.
    pub fn write_page(
        &self,
        offset: u64,
        buf: IoBuf,
        done: impl FnOnce(Result<usize, FsError>) + Send + 'static,
    ) {
        let done = bytes_to(done);
        self.pin.inode.submit(DataOp { what: What::Write, offset, buf, exact: false, page: true, done });
    }

    /// Says that pages of the file may be written to without asking, as long as the answer lives.
    ///
    /// # Errors
    /// When the coordinator refuses what that needs.
    pub fn map_writable(&self) -> Result<Mapper, FsError> {
        Mapper::new(&self.node.core, self.ino())
    }

    /// Notes that a program has read the file: its time of access follows, now and then and not at once.
    pub fn accessed(&self) {
        self.pin.inode.accessed();
    }

    /// Writes `buf` at the end of the file, wherever other nodes have moved it; completes with the offset.
    pub fn append(&self, buf: IoBuf, done: impl FnOnce(Result<u64, FsError>) + Send + 'static) {
        self.submit_op(What::Append, 0, buf, false, Box::new(done));
    }

    fn submit_op(&self, what: What, offset: u64, buf: IoBuf, exact: bool, done: io::Done) {
        self.pin.inode.submit(DataOp { what, offset, buf, exact, page: false, done });
    }

    /// Completes when all completed writes, the size and the times are durable.
    pub fn fsync(&self, done: impl FnOnce(Result<(), FsError>) + Send + 'static) {
        self.pin.inode.sync(true, Box::new(done));
    }

    /// Like [`File::fsync`], without what is not needed to find the data again: the times.
    pub fn datasync(&self, done: impl FnOnce(Result<(), FsError>) + Send + 'static) {
        self.pin.inode.sync(false, Box::new(done));
    }

    /// Whether the file may run as somebody else, as far as is known without asking.
    #[must_use]
    pub fn may_have_set_ids(&self) -> bool {
        self.pin.inode.lock().attr.is_none_or(|attr| attr.mode != attr::without_set_ids(attr.mode))
    }

    /// Takes the set-user-id and set-group-id bits away, as a write by somebody without the right to keep them must.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn clear_set_ids(&self) -> Result<(), FsError> {
        let mode = self.attr()?.mode;
        let cleared = attr::without_set_ids(mode);
        if cleared == mode {
            return Ok(());
        }
        self.pin.inode.set_attr(&SetAttr { mode: Some(cleared), ..SetAttr::default() }).map(drop)
    }

    /// Attributes now.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn attr(&self) -> Result<Attr, FsError> {
        self.pin.inode.attr()
    }

    /// Size in bytes now.
    ///
    /// # Errors
    /// As for [`File::attr`].
    pub fn size(&self) -> Result<u64, FsError> {
        self.pin.inode.size_now()
    }

    /// Changes the size: cuts off the end, or grows with a hole.
    ///
    /// # Errors
    /// When the coordinator refuses, or the LUN fails.
    pub fn set_size(&self, size_bytes: u64) -> Result<(), FsError> {
        self.pin.inode.set_size(size_bytes).map(drop)
    }

    /// Allocates space for a range, so that writes there cannot fail for want of it.
    ///
    /// # Errors
    /// When there is no space.
    pub fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> Result<(), FsError> {
        self.pin.inode.allocate_range(offset, len, keep_size)
    }

    /// Frees the space of a range, which reads zeros then; the size stays.
    ///
    /// # Errors
    /// When the coordinator refuses, or the LUN fails.
    pub fn punch(&self, offset: u64, len: u64) -> Result<(), FsError> {
        self.pin.inode.punch(offset, len)
    }

    /// Makes a range read zeros, with space allocated for it.
    ///
    /// # Errors
    /// When there is no space, or the LUN fails.
    pub fn zero_range(&self, offset: u64, len: u64, keep_size: bool) -> Result<(), FsError> {
        self.pin.inode.zero_range(offset, len, keep_size)
    }

    /// The next hole or data at or after an offset; `ENXIO` when there is none before the end.
    ///
    /// # Errors
    /// `ENXIO`, or when the coordinator refuses.
    pub fn seek(&self, from: SeekFrom) -> Result<u64, FsError> {
        self.pin.inode.seek(from)
    }

    /// Where the file lies on the LUN, holes left out. Extents beyond the end of the file were allocated ahead.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn map(&self) -> Result<Vec<Extent>, FsError> {
        self.pin.inode.extents()
    }
}

fn bytes_to(done: impl FnOnce(Result<usize, FsError>) + Send + 'static) -> io::Done {
    Box::new(move |outcome| done(outcome.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX))))
}

/// As a device a file has fixed bounds: requests beyond its size are refused, and only [`ImageFile::set_len`] changes it.
impl BlockDevice for File {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: self.size().unwrap_or(0), block_bytes: 1, can_discard: false }
    }

    fn submit(&self, request: IoRequest) {
        let IoRequest { op, done } = request;
        match op {
            IoOp::Read { offset, buf } => {
                let done = Box::new(move |r: Result<u64, FsError>| done(ended(r, "read", offset)));
                self.submit_op(What::Read, offset, buf, true, done);
            }
            IoOp::Write { offset, buf, fua: false } => {
                let done = Box::new(move |r: Result<u64, FsError>| done(ended(r, "write", offset)));
                self.submit_op(What::Write, offset, buf, true, done);
            }
            IoOp::Write { offset, buf, fua: true } => self.write_through(offset, buf, done),
            IoOp::Flush => self.datasync(move |r| done(ended(r, "flush", 0))),
            IoOp::Discard { .. } => done(Ok(())),
            IoOp::WriteZeroes { offset, len, .. } => Zeroing::start(&self.pin.inode, offset, len, done),
        }
    }
}

fn ended<T>(outcome: Result<T, FsError>, op: &'static str, offset: u64) -> Result<(), IoError> {
    outcome.map(drop).map_err(|error| error.into_io(op, offset))
}

impl File {
    fn write_through(&self, offset: u64, buf: IoBuf, done: Completion) {
        let inode = self.pin.inode.clone();
        let written = Box::new(move |r: Result<u64, FsError>| match r {
            Err(error) => done(Err(error.into_io("write", offset))),
            Ok(_) => inode.sync(false, Box::new(move |r| done(ended(r, "write", offset)))),
        });
        self.submit_op(What::Write, offset, buf, true, written);
    }
}

/// Zeros a range step by step; what was never written is left alone.
struct Zeroing {
    inode: Arc<Inode>,
    zeros: IoBuf,
    at: u64,
    end: u64,
    done: Completion,
}

impl Zeroing {
    const STEP_BYTES: u64 = 1 << 20;

    fn start(inode: &Arc<Inode>, offset: u64, len: u64, done: Completion) {
        let Some(end) = offset.checked_add(len) else {
            return done(Err(
                FsError::invalid(libc::EINVAL, "beyond any file").into_io("write zeroes", offset)
            ));
        };
        let step = usize::try_from(len.min(Self::STEP_BYTES)).unwrap_or_default();
        let zeros = IoBuf::zeroed(step);
        Self { inode: inode.clone(), zeros, at: offset, end, done }.step();
    }

    fn step(mut self) {
        if self.at >= self.end {
            return (self.done)(Ok(()));
        }
        let offset = self.at;
        let len = usize::try_from(self.end - offset).unwrap_or(usize::MAX).min(self.zeros.len());
        self.at += len as u64;
        let inode = self.inode.clone();
        let buf = self.zeros.slice(0..len);
        let next = Box::new(move |r: Result<u64, FsError>| match r {
            Err(error) => (self.done)(Err(error.into_io("write zeroes", offset))),
            Ok(_) => {
                let workers = self.inode.core.workers.clone();
                workers.run(move || self.step());
            }
        });
        inode.submit(DataOp { what: What::Zero, offset, buf, exact: true, page: false, done: next });
    }
}

impl ImageFile for File {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        self.set_size(size_bytes).map_err(|error| error.into_io("set size", size_bytes))
    }

    fn identity(&self) -> String {
        format!("csvfs:{}:{}", self.node.volume, self.ino())
    }

    /// Fresh parts read as zeros, like holes. Where it cannot be told, everything may be data.
    fn data_from(&self, from: u64) -> Option<Range<u64>> {
        match self.seek(SeekFrom::Data(from)) {
            Ok(start) => Some(start..self.seek(SeekFrom::Hole(start)).unwrap_or(u64::MAX)),
            Err(error) if error.errno() == libc::ENXIO => None,
            Err(_) => Some(from..u64::MAX),
        }
    }
}
