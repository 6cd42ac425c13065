//! Writing into a child what differs from its parent.
//!
//! **Invariant:** afterwards the child reads as the source; what was equal is not written, so the child stays small.

use blockio::{BlockDevice, IoOp};

use crate::convert::{Progress, is_zero};
use crate::disk::Disk;
use crate::error::{VhdxError, doing};
use crate::format::{MIB, bytes, index};
use crate::image::Image;

/// Bytes compared at once.
const CHUNK: u64 = 4 * MIB;
/// What differs is written in pieces of this size.
const PIECE: usize = 64 * 1024;

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
    let mut done = Progress { total_bytes: child.geometry().size_bytes, ..Progress::default() };
    while done.done_bytes < done.total_bytes {
        let (offset, len) = (done.done_bytes, CHUNK.min(done.total_bytes - done.done_bytes));
        let (new, old) = (read(source, offset, len)?, read(parent, offset, len)?);
        for run in differing(&new, &old) {
            let at = offset + bytes(run.start);
            done.data_bytes += bytes(run.len());
            write(child, at, &new[run])?;
        }
        done.done_bytes += len;
        progress(done);
    }
    child.flush().map_err(doing("flushing the child"))?;
    Ok(done)
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
