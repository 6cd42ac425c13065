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

use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};

use crate::file::Target;
use crate::{Completion, IoBuf, IoError, IoOp, IoRequest, Permission, WriteRight};

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
    /// Must be granted when a call is made.
    right: Option<Arc<dyn WriteRight>>,
}

impl Job {
    /// Checks the request against the device and lays out its first call.
    pub(crate) fn plan(request: IoRequest, target: &Target) -> Self {
        target.jobs.fetch_add(1, Ordering::Relaxed);
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

    /// The same job, whose calls may be made only under `right`.
    pub(crate) fn under(self, right: &Arc<dyn WriteRight>) -> Self {
        Self { right: Some(Arc::clone(right)), ..self }
    }

    /// Whether its next call may be made now.
    pub(crate) fn permission(&self) -> Permission {
        self.right.as_ref().map_or(Permission::Granted, |right| right.check())
    }

    fn transfer(kind: Kind, name: &'static str, offset: u64, buf: IoBuf, done: Completion) -> Self {
        let left = buf.len() as u64;
        Self {
            kind,
            name,
            offset,
            left,
            memory: Some(buf),
            filled: 0,
            bounced: None,
            done,
            refused: None,
            right: None,
        }
    }

    fn ranged(kind: Kind, name: &'static str, offset: u64, len: u64, done: Completion) -> Self {
        Self {
            kind,
            name,
            offset,
            left: len,
            memory: None,
            filled: 0,
            bounced: None,
            done,
            refused: None,
            right: None,
        }
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

    /// Bytes that it moves, if it is a read, or a write that need not be stable.
    pub(crate) fn transfer_bytes(&self) -> Option<u64> {
        matches!(self.kind, Kind::Read | Kind::Write { durable: false }).then_some(self.left)
    }

    /// Whether io_uring does not know its call.
    pub(crate) fn is_slow(&self) -> bool {
        self.kind == Kind::DiscardBlocks
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
        target.jobs.fetch_sub(1, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::file::tests::target;

    type Outcome = Receiver<Result<(), IoError>>;

    fn planned(target: &Target, op: IoOp) -> (Job, Outcome) {
        let (tell, told) = channel();
        let done = Box::new(move |outcome| drop(tell.send(outcome)));
        (Job::plan(IoRequest { op, done }, target), told)
    }

    #[test]
    fn a_short_transfer_goes_on_at_the_last_whole_block() {
        let (_folder, target) = target(1 << 20);
        let (mut job, told) = planned(&target, IoOp::Read { offset: 4096, buf: IoBuf::zeroed(4096) });
        assert_eq!(job.returned(&target, 1000).map(drop_error), None);
        assert!(matches!(job.call(), Ok(Call::Read { offset: 4608, len: 3584, .. })));
        assert_eq!(job.returned(&target, -libc::EINTR).map(drop_error), None);
        assert!(matches!(job.call(), Ok(Call::Read { offset: 4608, len: 3584, .. })));
        let ended = job.returned(&target, 3584).expect("all was read");
        job.finish(&target, ended);
        told.recv().expect("an answer").expect("success");
    }

    #[test]
    fn a_transfer_that_moves_nothing_is_an_error_and_no_endless_loop() {
        let (_folder, target) = target(1 << 20);
        let (mut job, _told) = planned(&target, IoOp::Read { offset: 0, buf: IoBuf::zeroed(4096) });
        assert!(matches!(job.returned(&target, 0), Some(Err(IoError::Os { errno: libc::EIO, .. }))));
    }

    #[test]
    fn zeros_are_written_where_the_file_system_cannot_zero() {
        let (_folder, target) = target(8 << 20);
        let zero = IoOp::WriteZeroes { offset: 512, len: 3 << 20, may_unmap: false };
        let (mut job, _told) = planned(&target, zero);
        assert!(matches!(job.call(), Ok(Call::Fallocate { .. })));
        assert_eq!(job.returned(&target, -libc::EOPNOTSUPP).map(drop_error), None);
        for written in 0..3 {
            let Ok(Call::Write { len, offset, .. }) = job.call() else { panic!("a write of zeros") };
            assert_eq!((offset, len), (512 + (written << 20), 1 << 20));
            assert_eq!(job.returned(&target, 1 << 20).is_some(), written == 2);
        }
    }

    #[test]
    fn a_discard_that_is_not_there_is_no_error_and_is_not_offered_again() {
        let (_folder, target) = target(1 << 20);
        let (mut job, _told) = planned(&target, IoOp::Discard { offset: 0, len: 4096 });
        assert!(matches!(job.returned(&target, -libc::EOPNOTSUPP), Some(Ok(()))));
        assert!(!target.can_discard.load(Ordering::Relaxed));
    }

    // Invariant D6: after a failed flush nothing later is reported as done, not even a flush that was under way.
    #[test]
    fn a_failed_flush_fails_all_later_writes_and_flushes() {
        let (_folder, target) = target(1 << 20);
        let (mut first, first_told) = planned(&target, IoOp::Flush);
        let (second, second_told) = planned(&target, IoOp::Flush);
        let ended = first.returned(&target, -libc::EIO).expect("ended");
        first.finish(&target, ended);
        assert!(matches!(first_told.recv(), Ok(Err(IoError::Os { errno: libc::EIO, .. }))));
        second.finish(&target, Ok(()));
        assert!(matches!(second_told.recv(), Ok(Err(IoError::Poisoned { .. }))));
        let buf = IoBuf::zeroed(512);
        for op in [IoOp::Write { offset: 0, buf, fua: false }, IoOp::Flush] {
            let (job, _told) = planned(&target, op);
            assert!(matches!(job.call(), Err(Err(IoError::Poisoned { .. }))));
        }
        let (job, _told) = planned(&target, IoOp::Read { offset: 0, buf: IoBuf::zeroed(512) });
        assert!(job.call().is_ok(), "reads go on");
    }

    #[test]
    fn a_forced_write_that_fails_for_want_of_space_does_not_poison() {
        let (_folder, target) = target(1 << 20);
        let write = IoOp::Write { offset: 0, buf: IoBuf::zeroed(512), fua: true };
        let (mut job, told) = planned(&target, write);
        let ended = job.returned(&target, -libc::ENOSPC).expect("ended");
        job.finish(&target, ended);
        assert!(matches!(told.recv(), Ok(Err(IoError::NoSpace { .. }))));
        target.poison.check().expect("not poisoned");
    }

    fn drop_error(outcome: Result<(), IoError>) -> bool {
        outcome.is_ok()
    }
}
