//! A disk request on its way: submitted in parts, completed once.
//!
//! **Invariant:** the status byte and the used ring are written after the last part has completed, whatever happened to
//! each of them. A request that is to be done again later has neither.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use blockio::{BlockDevice, Completion, IoBuf, IoError, IoOp, IoRequest};

use super::block::Disk;
use super::queue::Part;
use super::request::{ID_BYTES, Op, Range, Status};

/// Most bytes that are copied for a request whose parts do not fit the disk's blocks.
const BOUNCE_BYTES_MAX: usize = 1 << 20;

/// A request as the driver has posted it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Posted {
    pub(super) head: u16,
    /// Guest address of the status byte.
    pub(super) status_at: u64,
    /// Its place in the order of the guest's requests.
    pub(super) number: u64,
}

/// What becomes of a request.
#[derive(Default)]
struct Fate {
    /// The failure that counts: one that time does not mend before one that it may.
    failure: Option<IoError>,
    /// What to do again when there was no space; only changes of the disk can find none.
    again: Option<Op>,
}

/// One request in flight.
pub(super) struct Flight {
    disk: Arc<Disk>,
    posted: Posted,
    /// Parts of the device's work that are not done yet.
    pending: AtomicUsize,
    /// A leaf.
    fate: Mutex<Fate>,
    /// Where a read goes to in guest RAM.
    into: Vec<Part>,
    /// What the disk read, when it could not go there directly.
    bounce: Option<IoBuf>,
}

impl Flight {
    /// Answers without work.
    pub(super) fn refuse(disk: &Arc<Disk>, posted: Posted, status: Status) {
        disk.counters.failed(format!("a request was refused: {status:?}"));
        finish(disk, posted, status, 0);
    }

    /// Answers with the disk's serial.
    pub(super) fn identify(disk: &Arc<Disk>, posted: Posted, parts: &[Part]) {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(disk.serial().into_bytes()) {
            *to = from;
        }
        let written = scatter(disk, parts, &id);
        finish(disk, posted, Status::Ok, written);
    }

    /// Reads from the disk into guest RAM.
    pub(super) fn read(
        disk: &Arc<Disk>,
        posted: Posted,
        backend: &dyn BlockDevice,
        offset: u64,
        parts: Vec<Part>,
    ) {
        let Some((buffers, bounce)) = buffers(disk, &parts) else {
            return Self::refuse(disk, posted, Status::IoError);
        };
        let bounced = bounce.then(|| buffers[0].clone());
        let ops = at_offsets(offset, buffers).map(|(offset, buf)| IoOp::Read { offset, buf });
        let flight = Self { into: parts, bounce: bounced, ..Self::new(disk, posted, None) };
        flight.submit(backend, ops.collect());
    }

    /// Writes from guest RAM to the disk.
    pub(super) fn write(
        disk: &Arc<Disk>,
        posted: Posted,
        backend: &dyn BlockDevice,
        offset: u64,
        parts: Vec<Part>,
        fua: bool,
    ) {
        let Some((buffers, bounce)) = buffers(disk, &parts) else {
            return Self::refuse(disk, posted, Status::IoError);
        };
        if bounce {
            gather(disk, &parts, &buffers[0]);
        }
        let ops = at_offsets(offset, buffers).map(|(offset, buf)| IoOp::Write { offset, buf, fua }).collect();
        Self::new(disk, posted, Some(Op::Write { offset, parts })).submit(backend, ops);
    }

    /// Makes completed writes stable.
    pub(super) fn flush(disk: &Arc<Disk>, posted: Posted, backend: &dyn BlockDevice) {
        Self::new(disk, posted, Some(Op::Flush)).submit(backend, vec![IoOp::Flush]);
    }

    /// Tells the disk which ranges are no longer needed.
    pub(super) fn discard(disk: &Arc<Disk>, posted: Posted, backend: &dyn BlockDevice, ranges: Vec<Range>) {
        let op = |range: &Range| IoOp::Discard { offset: range.offset, len: range.len };
        let ops = ranges.iter().map(op).collect();
        Self::new(disk, posted, Some(Op::Discard(ranges))).submit(backend, ops);
    }

    /// Makes ranges read as zeros.
    pub(super) fn write_zeroes(
        disk: &Arc<Disk>,
        posted: Posted,
        backend: &dyn BlockDevice,
        ranges: Vec<Range>,
    ) {
        let op = |range: &Range| IoOp::WriteZeroes {
            offset: range.offset,
            len: range.len,
            may_unmap: range.may_unmap,
        };
        let ops = ranges.iter().map(op).collect();
        Self::new(disk, posted, Some(Op::WriteZeroes(ranges))).submit(backend, ops);
    }

    fn new(disk: &Arc<Disk>, posted: Posted, again: Option<Op>) -> Self {
        Self {
            disk: Arc::clone(disk),
            posted,
            pending: AtomicUsize::new(0),
            fate: Mutex::new(Fate { failure: None, again }),
            into: Vec::new(),
            bounce: None,
        }
    }

    fn submit(mut self, backend: &dyn BlockDevice, ops: Vec<IoOp>) {
        if ops.is_empty() {
            return finish(&self.disk, self.posted, Status::Ok, 0);
        }
        self.pending = AtomicUsize::new(ops.len());
        let flight = Arc::new(self);
        for op in ops {
            let flight = Arc::clone(&flight);
            let done: Completion = Box::new(move |outcome| flight.part_done(outcome));
            backend.submit(IoRequest { op, done });
        }
    }

    /// Runs on the device's own thread: short, and waits for nothing.
    fn part_done(&self, outcome: Result<(), IoError>) {
        if let Err(error) = outcome {
            let mut fate = self.fate.lock().unwrap_or_else(PoisonError::into_inner);
            if fate.failure.is_none() || !matches!(error, IoError::NoSpace { .. }) {
                fate.failure = Some(error);
            }
        }
        if self.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish();
        }
    }

    fn finish(&self) {
        let disk = &self.disk;
        let fate = std::mem::take(&mut *self.fate.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(error) = fate.failure {
            if let (IoError::NoSpace { .. }, Some(op)) = (&error, fate.again) {
                return disk.stall(self.posted, op, error.to_string());
            }
            tracing::warn!(disk = disk.slot(), %error, "a disk request of the guest failed");
            disk.counters.failed(error.to_string());
            // Some parts may have arrived all the same.
            mark_dirty(disk, &self.into);
            return finish(disk, self.posted, Status::IoError, 0);
        }
        if let Some(bounce) = &self.bounce {
            scatter(disk, &self.into, &bounce.to_vec());
        }
        mark_dirty(disk, &self.into);
        let written = self.into.iter().map(|part| part.len).sum();
        finish(disk, self.posted, Status::Ok, written);
    }
}

fn finish(disk: &Disk, posted: Posted, status: Status, written: u32) {
    let Posted { head, status_at, .. } = posted;
    // The address was checked when the request was parsed, and RAM does not shrink.
    drop(disk.ram.write(status_at, &[status as u8]));
    disk.queue.complete(&disk.ram, head, written.saturating_add(1), &disk.interrupt);
}

fn mark_dirty(disk: &Disk, parts: &[Part]) {
    for part in parts {
        disk.ram.mark_dirty(part.address, part.len as usize);
    }
}

/// The parts as buffers of I/O, or one buffer to copy through (true) when a part is no multiple of the disk's block.
fn buffers(disk: &Disk, parts: &[Part]) -> Option<(Vec<IoBuf>, bool)> {
    let block = disk.shape().block_bytes;
    if parts.iter().all(|part| part.len.is_multiple_of(block)) {
        let direct = |part: &Part| disk.ram.io_buf(part.address, part.len as usize).ok();
        return Some((parts.iter().map(direct).collect::<Option<_>>()?, false));
    }
    let total: usize = parts.iter().map(|part| part.len as usize).sum();
    (total <= BOUNCE_BYTES_MAX).then(|| (vec![IoBuf::zeroed(total)], true))
}

fn at_offsets(offset: u64, buffers: Vec<IoBuf>) -> impl Iterator<Item = (u64, IoBuf)> {
    buffers.into_iter().scan(offset, |next, buf| {
        let at = *next;
        *next += buf.len() as u64;
        Some((at, buf))
    })
}

fn gather(disk: &Disk, parts: &[Part], into: &IoBuf) {
    let mut at = 0;
    for part in parts {
        let mut bytes = vec![0; part.len as usize];
        drop(disk.ram.read(part.address, &mut bytes));
        into.slice(at..at + bytes.len()).copy_from(&bytes);
        at += bytes.len();
    }
}

/// Copies as much as fits; gives the number of bytes.
fn scatter(disk: &Disk, parts: &[Part], bytes: &[u8]) -> u32 {
    let mut rest = bytes;
    let mut written = 0;
    for part in parts {
        let (now, later) = rest.split_at(rest.len().min(part.len as usize));
        drop(disk.ram.write(part.address, now));
        written += u32::try_from(now.len()).expect("no longer than the part");
        rest = later;
    }
    written
}
