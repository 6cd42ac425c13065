//! Writing into a child what differs from its parent.
//!
//! ```text
//!   workers:  next chunk -> read source and parent -> compare -> write what differs        several chunks in flight
//!   caller:   <--- how much is done, how much was written ---
//! ```
//! **Invariant:** afterwards the child reads as the source; what was equal is not written, so the child stays small. When this
//! returns nobody writes any more, also after an error.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use blockio::{BlockDevice, IoOp};

use crate::convert::{Progress, is_zero};
use crate::disk::Disk;
use crate::error::{VhdxError, doing};
use crate::format::{MIB, bytes, index};
use crate::image::Image;

/// Bytes compared at once.
const CHUNK: u64 = 2 * MIB;
/// What differs is written in pieces of this size.
const PIECE: usize = 64 * 1024;
/// Chunks in flight.
const WORKERS: usize = 4;

/// Writes into `child`, a new child of `parent`, what `source` has other than `parent`. Behind the end of the source the child
/// reads as zeros. Flushed when it returns.
///
/// # Errors
/// When one of the three fails, or the child is smaller than the source.
pub fn write_difference(
    source: &dyn BlockDevice,
    parent: &Image,
    child: &Disk,
    progress: &mut dyn FnMut(Progress),
) -> Result<Progress, VhdxError> {
    let total_bytes = child.geometry().size_bytes;
    let work =
        Work { source, parent, child, total_bytes, next: AtomicU64::new(0), stop: AtomicBool::new(false) };
    let (tell, told) = channel();
    let done = thread::scope(|scope| {
        for _ in 0..WORKERS {
            let (work, tell) = (&work, tell.clone());
            scope.spawn(move || work.run(&tell));
        }
        drop(tell);
        work.follow(&told, progress)
    })?;
    child.flush().map_err(doing("flushing the child"))?;
    Ok(done)
}

/// A chunk that is done: its length, and what of it was written.
type Chunk = Result<(u64, u64), VhdxError>;

struct Work<'a> {
    source: &'a dyn BlockDevice,
    parent: &'a Image,
    child: &'a Disk,
    total_bytes: u64,
    /// The first byte that nobody has begun with.
    next: AtomicU64,
    /// Somebody failed.
    stop: AtomicBool,
}

impl Work<'_> {
    fn run(&self, tell: &Sender<Chunk>) {
        while !self.stop.load(Ordering::Relaxed) {
            let offset = self.next.fetch_add(CHUNK, Ordering::Relaxed);
            if offset >= self.total_bytes {
                return;
            }
            let chunk = self.chunk(offset, CHUNK.min(self.total_bytes - offset));
            if chunk.is_err() {
                self.stop.store(true, Ordering::Relaxed);
            }
            drop(tell.send(chunk));
        }
    }

    fn chunk(&self, offset: u64, len: u64) -> Chunk {
        let (new, old) = (read(self.source, offset, len)?, read(self.parent, offset, len)?);
        let mut written = 0;
        for run in differing(&new, &old) {
            written += bytes(run.len());
            write(self.child, offset + bytes(run.start), &new[run])?;
        }
        Ok((len, written))
    }

    /// Adds up what the workers tell, until none is left; the first error counts.
    fn follow(
        &self,
        told: &Receiver<Chunk>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Progress, VhdxError> {
        let mut done = Progress { total_bytes: self.total_bytes, ..Progress::default() };
        let mut failed = None;
        for chunk in told {
            match chunk {
                Ok((len, written)) => {
                    done.done_bytes += len;
                    done.data_bytes += written;
                    progress(done);
                }
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        failed.map_or(Ok(done), Err)
    }
}

/// The bytes of a range; what lies behind the end of the device is zero.
fn read(device: &dyn BlockDevice, offset: u64, len: u64) -> Result<Vec<u8>, VhdxError> {
    let mut content = vec![0; index(len)];
    let there = index(device.geometry().size_bytes.saturating_sub(offset).min(len));
    if there > 0 {
        device
            .read_at(offset, &mut content[..there])
            .map_err(doing(format!("reading the disk at {offset:#x}")))?;
    }
    Ok(content)
}

fn write(child: &Disk, offset: u64, content: &[u8]) -> Result<(), VhdxError> {
    let outcome = if is_zero(content) {
        child.run(IoOp::WriteZeroes { offset, len: bytes(content.len()), may_unmap: true })
    } else {
        child.write_at(offset, content)
    };
    outcome.map_err(doing(format!("writing the child at {offset:#x}")))
}

/// Runs of pieces that differ.
fn differing(new: &[u8], old: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (number, (a, b)) in new.chunks(PIECE).zip(old.chunks(PIECE)).enumerate() {
        if a == b {
            continue;
        }
        let (start, end) = (number * PIECE, number * PIECE + a.len());
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}
