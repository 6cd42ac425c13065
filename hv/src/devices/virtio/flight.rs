//! A disk request on its way: submitted in parts, completed once.
//!
//! **Invariant:** the status byte and the used ring are written after the last part has completed, whatever happened to
//! each of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use blockio::{BlockDevice, Completion, IoBuf, IoError, IoOp, IoRequest};

use super::block::Disk;
use super::queue::Part;
use super::request::{ID_BYTES, Range, Status};

/// Most bytes that are copied for a request whose parts do not fit the disk's blocks.
const BOUNCE_BYTES_MAX: usize = 1 << 20;

/// One request in flight.
pub(super) struct Flight {
    disk: Arc<Disk>,
    head: u16,
    status_at: u64,
    /// Parts of the device's work that are not done yet.
    pending: AtomicUsize,
    /// The first failure; protects the text only.
    failure: Mutex<Option<IoError>>,
    /// Where a read goes to in guest RAM.
    into: Vec<Part>,
    /// What the disk read, when it could not go there directly.
    bounce: Option<IoBuf>,
}

impl Flight {
    /// Answers without work.
    pub(super) fn refuse(disk: &Arc<Disk>, head: u16, status_at: u64, status: Status) {
        disk.counters.failed(format!("a request was refused: {status:?}"));
        finish(disk, head, status_at, status, 0);
    }

    /// Answers with the disk's serial.
    pub(super) fn identify(disk: &Arc<Disk>, head: u16, status_at: u64, parts: &[Part]) {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(disk.serial().into_bytes()) {
            *to = from;
        }
        let written = scatter(disk, parts, &id);
        finish(disk, head, status_at, Status::Ok, written);
    }

    /// Reads from the disk into guest RAM.
    pub(super) fn read(
        disk: &Arc<Disk>,
        head: u16,
        status_at: u64,
        backend: &dyn BlockDevice,
        offset: u64,
        parts: Vec<Part>,
    ) {
        disk.counters.reads.fetch_add(1, Ordering::Relaxed);
        let Some((buffers, bounce)) = buffers(disk, &parts) else {
            return Self::refuse(disk, head, status_at, Status::IoError);
        };
        let bounced = bounce.then(|| buffers[0].clone());
        let ops = at_offsets(offset, buffers).map(|(offset, buf)| IoOp::Read { offset, buf });
        Self::submit(disk, head, status_at, backend, ops.collect(), parts, bounced);
    }

    /// Writes from guest RAM to the disk.
    pub(super) fn write(
        disk: &Arc<Disk>,
        head: u16,
        status_at: u64,
        backend: &dyn BlockDevice,
        offset: u64,
        parts: &[Part],
        fua: bool,
    ) {
        disk.counters.writes.fetch_add(1, Ordering::Relaxed);
        let Some((buffers, bounce)) = buffers(disk, parts) else {
            return Self::refuse(disk, head, status_at, Status::IoError);
        };
        if bounce {
            gather(disk, parts, &buffers[0]);
        }
        let ops = at_offsets(offset, buffers).map(|(offset, buf)| IoOp::Write { offset, buf, fua });
        Self::submit(disk, head, status_at, backend, ops.collect(), Vec::new(), None);
    }

    /// Makes completed writes stable.
    pub(super) fn flush(disk: &Arc<Disk>, head: u16, status_at: u64, backend: &dyn BlockDevice) {
        disk.counters.flushes.fetch_add(1, Ordering::Relaxed);
        Self::submit(disk, head, status_at, backend, vec![IoOp::Flush], Vec::new(), None);
    }

    /// Tells the disk which ranges are no longer needed.
    pub(super) fn discard(
        disk: &Arc<Disk>,
        head: u16,
        status_at: u64,
        backend: &dyn BlockDevice,
        ranges: &[Range],
    ) {
        let ops = ranges.iter().map(|range| IoOp::Discard { offset: range.offset, len: range.len });
        Self::submit(disk, head, status_at, backend, ops.collect(), Vec::new(), None);
    }

    /// Makes ranges read as zeros.
    pub(super) fn write_zeroes(
        disk: &Arc<Disk>,
        head: u16,
        status_at: u64,
        backend: &dyn BlockDevice,
        ranges: &[Range],
    ) {
        disk.counters.writes.fetch_add(1, Ordering::Relaxed);
        let ops = ranges.iter().map(|range| IoOp::WriteZeroes {
            offset: range.offset,
            len: range.len,
            may_unmap: range.may_unmap,
        });
        Self::submit(disk, head, status_at, backend, ops.collect(), Vec::new(), None);
    }

    fn submit(
        disk: &Arc<Disk>,
        head: u16,
        status_at: u64,
        backend: &dyn BlockDevice,
        ops: Vec<IoOp>,
        into: Vec<Part>,
        bounce: Option<IoBuf>,
    ) {
        if ops.is_empty() {
            return finish(disk, head, status_at, Status::Ok, 0);
        }
        let flight = Arc::new(Self {
            disk: Arc::clone(disk),
            head,
            status_at,
            pending: AtomicUsize::new(ops.len()),
            failure: Mutex::default(),
            into,
            bounce,
        });
        for op in ops {
            let flight = Arc::clone(&flight);
            let done: Completion = Box::new(move |outcome| flight.part_done(outcome));
            backend.submit(IoRequest { op, done });
        }
    }

    /// Runs on the device's own thread: short, and waits for nothing.
    fn part_done(&self, outcome: Result<(), IoError>) {
        if let Err(error) = outcome {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
        if self.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish();
        }
    }

    fn finish(&self) {
        let disk = &self.disk;
        if let Some(error) = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            tracing::warn!(disk = disk.slot(), %error, "a disk request of the guest failed");
            disk.counters.failed(error.to_string());
            // Some parts may have arrived all the same.
            mark_dirty(disk, &self.into);
            return finish(disk, self.head, self.status_at, Status::IoError, 0);
        }
        if let Some(bounce) = &self.bounce {
            scatter(disk, &self.into, &bounce.to_vec());
        }
        mark_dirty(disk, &self.into);
        let written = self.into.iter().map(|part| part.len).sum();
        finish(disk, self.head, self.status_at, Status::Ok, written);
    }
}

fn finish(disk: &Disk, head: u16, status_at: u64, status: Status, written: u32) {
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
