//! One request on its way through the operating system, whatever engine makes the calls.
//!
//! ```text
//!   IoRequest -> Job::plan -> [ call() -> engine -> returned() ]* -> finish()
//! ```
//!
//! Deciding is here, calling is in `uring` and `pool`: a short transfer, an interrupted call or a missing feature of the
//! file system leads to a further call of the same job.
//!
//! **Invariant:** a job reports success only after all its bytes were transferred.

use std::sync::LazyLock;
use std::sync::atomic::Ordering;

use crate::file::Target;
use crate::{Completion, IoBuf, IoError, IoOp, IoRequest};

/// Longest single transfer; the kernel takes a little less than 2 GiB.
const CALL_BYTES_MAX: u64 = 1 << 30;

/// Source of zeros for file systems that cannot zero a range by themselves.
static ZEROS: LazyLock<IoBuf> = LazyLock::new(|| IoBuf::zeroed(1 << 20));

/// A system call to make. Pointers are good until the job is finished.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    Read { into: *mut u8, len: u32, offset: u64 },
    Write { from: *const u8, len: u32, offset: u64, durable: bool },
    Sync,
    Fallocate { mode: i32, offset: u64, len: u64 },
    DiscardBlocks { offset: u64, len: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write { durable: bool },
    Zeros,
    Punch { mode: i32 },
    DiscardBlocks,
    Sync,
}

/// A request and how far it has come.
pub(crate) struct Job {
    kind: Kind,
    name: &'static str,
    offset: u64,
    left: u64,
    memory: Option<IoBuf>,
    /// Bytes of `memory` that are done.
    filled: usize,
    /// Where bytes that were read into an aligned copy go in the end.
    bounced: Option<IoBuf>,
    done: Completion,
    /// Found unfit before any call.
    refused: Option<IoError>,
}

impl Job {
    /// Checks the request against the device and lays out its first call.
    pub(crate) fn plan(request: IoRequest, target: &Target) -> Self {
        let refused = target.admit(&request.op).err();
        let mut job = match request.op {
            IoOp::Read { offset, buf } => Self::transfer(Kind::Read, "read", offset, buf, request.done),
            IoOp::Write { offset, buf, fua } => {
                Self::transfer(Kind::Write { durable: fua }, "write", offset, buf, request.done)
            }
            IoOp::Flush => Self::ranged(Kind::Sync, "flush", 0, 0, request.done),
            IoOp::Discard { offset, len } => {
                Self::ranged(target.discard_kind(), "discard", offset, len, request.done)
            }
            IoOp::WriteZeroes { offset, len, may_unmap } => {
                let keep = libc::FALLOC_FL_KEEP_SIZE;
                let how = if may_unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
                Self::ranged(Kind::Punch { mode: how | keep }, "write-zeroes", offset, len, request.done)
            }
        };
        job.refused = refused;
        if job.refused.is_none() {
            job.bounce(target.memory_align);
        }
        job
    }

    fn transfer(kind: Kind, name: &'static str, offset: u64, buf: IoBuf, done: Completion) -> Self {
        let left = buf.len() as u64;
        Self { kind, name, offset, left, memory: Some(buf), filled: 0, bounced: None, done, refused: None }
    }

    fn ranged(kind: Kind, name: &'static str, offset: u64, len: u64, done: Completion) -> Self {
        Self { kind, name, offset, left: len, memory: None, filled: 0, bounced: None, done, refused: None }
    }

    /// Replaces memory that the device cannot reach by an aligned copy.
    fn bounce(&mut self, align: usize) {
        let Some(given) = self.memory.take_if(|memory| !memory.is_aligned(align)) else { return };
        let copy = IoBuf::zeroed(given.len());
        if self.kind == Kind::Read {
            self.bounced = Some(given);
        } else {
            copy_between(&given, &copy);
        }
        self.memory = Some(copy);
    }

    /// The next call, or how the job ended without one.
    pub(crate) fn call(&self) -> Result<Call, Result<(), IoError>> {
        if let Some(error) = &self.refused {
            return Err(Err(error.clone()));
        }
        let offset = self.offset;
        match self.kind {
            Kind::Sync => return Ok(Call::Sync),
            _ if self.left == 0 => return Err(Ok(())),
            Kind::Punch { mode } => return Ok(Call::Fallocate { mode, offset, len: self.left }),
            Kind::DiscardBlocks => return Ok(Call::DiscardBlocks { offset, len: self.left }),
            Kind::Read | Kind::Write { .. } | Kind::Zeros => {}
        }
        let memory = self.memory.as_ref().expect("a transfer has memory");
        let part = memory.slice(self.filled..memory.len());
        let len = self.left.min(part.len() as u64).min(CALL_BYTES_MAX);
        let len = u32::try_from(len).expect("at most CALL_BYTES_MAX");
        Ok(match self.kind {
            Kind::Read => Call::Read { into: part.as_ptr(), len, offset },
            kind => {
                let durable = kind == Kind::Write { durable: true };
                Call::Write { from: part.as_ptr(), len, offset, durable }
            }
        })
    }

    /// Takes the outcome of a call: bytes moved, or a negated error number. `Some` when the job has ended.
    pub(crate) fn returned(&mut self, target: &Target, outcome: i32) -> Option<Result<(), IoError>> {
        match u32::try_from(outcome) {
            Ok(count) => self.moved(target, count),
            Err(_) => self.failed(target, -outcome),
        }
    }

    fn moved(&mut self, target: &Target, count: u32) -> Option<Result<(), IoError>> {
        if !matches!(self.kind, Kind::Read | Kind::Write { .. } | Kind::Zeros) {
            return Some(Ok(()));
        }
        // Direct I/O can only go on at a block boundary; the part of a block that was done is done again.
        let count = u64::from(count) / u64::from(target.block_bytes) * u64::from(target.block_bytes);
        if count == 0 {
            // The file became shorter than the device it was opened as, or the device takes nothing.
            return Some(Err(self.os_error(libc::EIO)));
        }
        self.offset += count;
        self.left = self.left.checked_sub(count).expect("the kernel moves at most what was asked");
        if self.kind != Kind::Zeros {
            self.filled += usize::try_from(count).expect("at most the length of a buffer");
        }
        (self.left == 0).then_some(Ok(()))
    }

    fn failed(&mut self, target: &Target, errno: i32) -> Option<Result<(), IoError>> {
        match (errno, self.kind) {
            (libc::EINTR | libc::EAGAIN, _) => None,
            (libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL, Kind::Punch { .. })
                if self.name == "write-zeroes" =>
            {
                self.kind = Kind::Zeros;
                self.memory = Some(ZEROS.clone());
                None
            }
            // A discard is a hint: where there is none, the old content stays.
            (libc::EOPNOTSUPP | libc::ENOTTY, Kind::Punch { .. } | Kind::DiscardBlocks) => {
                target.can_discard.store(false, Ordering::Relaxed);
                Some(Ok(()))
            }
            (libc::ENOSPC | libc::EDQUOT, _) => {
                Some(Err(IoError::NoSpace { what: format!("the file system of {}", target.path.display()) }))
            }
            _ => Some(Err(self.os_error(errno))),
        }
    }

    fn os_error(&self, errno: i32) -> IoError {
        IoError::Os { op: self.name, offset: self.offset, errno }
    }

    /// Tells the submitter.
    pub(crate) fn finish(self, target: &Target, mut outcome: Result<(), IoError>) {
        if let Err(cause @ IoError::Os { .. }) = &outcome
            && self.refused.is_none()
            && matches!(self.kind, Kind::Sync | Kind::Write { durable: true })
        {
            target.poison.set(cause);
        }
        // A flush that succeeds after another has failed says nothing about the data that was lost in between.
        if self.kind == Kind::Sync && outcome.is_ok() {
            outcome = target.poison.check();
        }
        if let (Ok(()), Some(given), Some(memory)) = (&outcome, &self.bounced, &self.memory) {
            copy_between(memory, given);
        }
        // Whoever waits may want the buffer back as its only owner.
        drop((self.memory, self.bounced));
        (self.done)(outcome);
    }

    /// Takes the job apart when the engine is lost: whom to tell, and memory that the kernel may still write to.
    pub(crate) fn abandon(self) -> (Completion, Option<IoBuf>) {
        (self.done, self.memory)
    }
}

impl Target {
    fn discard_kind(&self) -> Kind {
        if self.is_block {
            Kind::DiscardBlocks
        } else {
            Kind::Punch { mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE }
        }
    }
}

/// Copies by pieces: neither side may be borrowed as a slice, its memory may be shared.
fn copy_between(from: &IoBuf, to: &IoBuf) {
    let mut piece = [0; 4096];
    let mut at = 0;
    while at < from.len() {
        let end = from.len().min(at + piece.len());
        let part = &mut piece[..end - at];
        from.slice(at..end).copy_to(part);
        to.slice(at..end).copy_from(part);
        at = end;
    }
}
