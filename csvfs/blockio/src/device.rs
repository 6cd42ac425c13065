//! The contract of a block device.
//!
//! One narrow trait, submit and complete. The blocking calls are built on it, so an implementation has two methods.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc;

use crate::{AlignedBuf, IoBuf, Reservations, WriteRight};

/// Size and granularity of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes from the first to the last; may grow while open.
    pub size_bytes: u64,
    /// Smallest unit of addressing, in bytes: offsets and lengths of requests are multiples of it. 1 where any will do.
    pub block_bytes: u32,
    /// Whether discard has an effect.
    pub can_discard: bool,
}

/// Why a request failed. Cloneable, because one failure may end many requests.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IoError {
    /// The request does not fit the device; nothing was done.
    #[error(
        "{op} of {len} bytes at {offset} does not fit a device of {size_bytes} bytes in blocks of {block_bytes}"
    )]
    OutOfRange {
        /// `read`, `write`, ...
        op: &'static str,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Size of the device.
        size_bytes: u64,
        /// Its granularity.
        block_bytes: u32,
    },
    /// The operating system reported an error.
    #[error("{op} at {offset} failed: {}", std::io::Error::from_raw_os_error(*errno))]
    Os {
        /// `read`, `write`, ...
        op: &'static str,
        /// First byte.
        offset: u64,
        /// The error number.
        errno: i32,
    },
    /// The right to write has ended: the lease ran out for good, the node was fenced, or the epoch changed.
    #[error("the right to do I/O on this device has ended: {reason}")]
    NotPermitted {
        /// What ended it.
        reason: String,
    },
    /// There is no room left (in the file behind an image, on the volume).
    #[error("no space left: {what}")]
    NoSpace {
        /// What is full.
        what: String,
    },
    /// A flush or metadata write failed earlier; nothing may be trusted until the device is opened anew.
    #[error("stopped after an earlier failure: {cause}")]
    Poisoned {
        /// The earlier failure.
        cause: String,
    },
    /// The content behind the device is not what it must be (an image whose structure is damaged).
    #[error("{0}")]
    Corrupt(String),
    /// There is no such device, or it cannot be used as one.
    #[error("cannot open {what}: {why}")]
    NotOpened {
        /// Path or URI.
        what: String,
        /// The reason, and what to do.
        why: String,
    },
    /// The connection to whoever serves the device is gone. What was in flight may or may not have been done.
    #[error("the connection to {what} is lost: {why}")]
    Lost {
        /// The device.
        what: String,
        /// How it was lost.
        why: String,
    },
    /// The device was closed.
    #[error("the device is closed")]
    Closed,
}

impl IoError {
    /// The error number that a POSIX caller gets.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::OutOfRange { .. } => libc::EINVAL,
            Self::Os { errno, .. } => *errno,
            Self::NoSpace { .. } => libc::ENOSPC,
            Self::NotOpened { .. } => libc::ENODEV,
            Self::Lost { .. } => libc::ENOTCONN,
            Self::NotPermitted { .. } | Self::Poisoned { .. } | Self::Corrupt(_) | Self::Closed => libc::EIO,
        }
    }
}

/// What to do. Offsets and lengths are in bytes.
#[derive(Clone, Debug)]
pub enum IoOp {
    /// Fill `buf` from `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Where to; its length is the length of the request.
        buf: IoBuf,
    },
    /// Write `buf` to `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// Where from; its length is the length of the request.
        buf: IoBuf,
        /// Complete only when these bytes are on stable media.
        fua: bool,
    },
    /// Complete when every write that had completed before this was submitted is on stable media.
    Flush,
    /// The content is no longer needed. Reads give old content or zeros until written again.
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Reads give zeros afterwards.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Whether the space may be given back.
        may_unmap: bool,
    },
}

/// Called once with the outcome. It may run on the device's own I/O thread, so it must not block and must not wait for
/// another request of the same device.
pub type Completion = Box<dyn FnOnce(Result<(), IoError>) + Send>;

/// One request.
pub struct IoRequest {
    /// What to do.
    pub op: IoOp,
    /// Whom to tell.
    pub done: Completion,
}

impl std::fmt::Debug for IoRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoRequest").field("op", &self.op).finish_non_exhaustive()
    }
}

/// A device of blocks.
///
/// - `submit` takes any number of requests at once, in any order, from any thread. Requests in flight that overlap have
///   no order among each other; a request submitted after another's completion comes after it.
/// - Exactly one completion per request, with success only when all of it was done (no short transfers).
/// - After a failed `Flush` everything since the last good one is to be taken as lost; the device fails all later writes
///   and flushes with [`IoError::Poisoned`].
/// - A buffer need not be aligned; an implementation that needs alignment copies. Aligned buffers ([`crate::IO_ALIGN`])
///   are never copied.
pub trait BlockDevice: Send + Sync {
    /// Size and granularity now.
    fn geometry(&self) -> Geometry;

    /// Starts a request. Errors too come through the completion. Blocks only when the device's queue is full.
    fn submit(&self, request: IoRequest);

    /// As `submit`, for a request that may start only under a right. The caller has just checked it. A device whose own
    /// thread starts the request later asks again there, right before it does: the caller's thread, or the device's, may
    /// have been stopped in between (B3).
    fn submit_under(&self, request: IoRequest, right: &Arc<dyn WriteRight>) {
        let _ = right;
        self.submit(request);
    }

    /// Rights have changed: what waits for one is looked at again.
    fn rights_changed(&self) {}

    /// The size in bytes, asked anew where somebody else may have changed it.
    fn size_now(&self) -> u64 {
        self.geometry().size_bytes
    }

    /// The persistent reservations of the device, by the way that leads to it now. Nothing where there are none by their
    /// nature; that a device knows them is seen only by asking it.
    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        None
    }

    /// Submits and waits.
    ///
    /// # Errors
    /// Those of the request.
    fn run(&self, op: IoOp) -> Result<(), IoError> {
        let (tell, told) = mpsc::sync_channel(1);
        self.submit(IoRequest { op, done: Box::new(move |outcome| drop(tell.send(outcome))) });
        told.recv().unwrap_or(Err(IoError::Closed))
    }

    /// Reads `into.len()` bytes at `offset`, waiting.
    ///
    /// # Errors
    /// Those of the request.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), IoError> {
        let buf = IoBuf::zeroed(into.len());
        self.run(IoOp::Read { offset, buf: buf.clone() })?;
        buf.copy_to(into);
        Ok(())
    }

    /// Writes `bytes` at `offset`, waiting.
    ///
    /// # Errors
    /// Those of the request.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
        self.run(IoOp::Write { offset, buf: AlignedBuf::copy_of(bytes).into(), fua: false })
    }

    /// Makes every completed write stable, waiting.
    ///
    /// # Errors
    /// Those of the request. A failed flush is final, see the trait.
    fn flush(&self) -> Result<(), IoError> {
        self.run(IoOp::Flush)
    }
}

/// A file that holds a disk image: a device that can change its size.
///
/// Contract: reads of a hole give zeros; a grown tail reads zeros, also after a crash; `flush` covers data *and* size.
pub trait ImageFile: BlockDevice {
    /// Changes the size in bytes, waiting. Durable with the next flush.
    ///
    /// # Errors
    /// [`IoError::NoSpace`] when there is no room, with nothing changed.
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError>;

    /// Something that two handles of one file have in common, whatever path led to them.
    fn identity(&self) -> String;

    /// The next range at or after `from` that may hold other bytes than zeros; none if only zeros follow. A file that does
    /// not know its holes names everything.
    fn data_from(&self, from: u64) -> Option<Range<u64>> {
        let end = self.geometry().size_bytes;
        (from < end).then_some(from..end)
    }
}

impl<T: BlockDevice + ?Sized> BlockDevice for Arc<T> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }
    fn submit(&self, request: IoRequest) {
        (**self).submit(request);
    }
    fn submit_under(&self, request: IoRequest, right: &Arc<dyn WriteRight>) {
        (**self).submit_under(request, right);
    }
    fn rights_changed(&self) {
        (**self).rights_changed();
    }
    fn size_now(&self) -> u64 {
        (**self).size_now()
    }
    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        (**self).reservations()
    }
}

impl<T: ImageFile + ?Sized> ImageFile for Arc<T> {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        (**self).set_len(size_bytes)
    }
    fn identity(&self) -> String {
        (**self).identity()
    }
    fn data_from(&self, from: u64) -> Option<Range<u64>> {
        (**self).data_from(from)
    }
}
