//! One request of a guest as several requests to the file.
//!
//! **Invariant:** the guest's completion runs once, after the last piece, with the first error if there was any.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use blockio::{Completion, Geometry, ImageFile, IoError, IoOp, IoRequest};

struct Join {
    left: AtomicUsize,
    outcome: Mutex<(Result<(), IoError>, Option<Completion>)>,
}

impl Join {
    fn finished(&self, outcome: Result<(), IoError>) {
        if outcome.is_err() {
            let mut state = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
            if state.0.is_ok() {
                state.0 = outcome;
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let mut state = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
            let done = state.1.take().expect("the last piece finishes once");
            let outcome = std::mem::replace(&mut state.0, Ok(()));
            drop(state);
            done(outcome);
        }
    }
}

/// Submits all `ops`, each to its file; `done` learns the outcome of all.
pub(crate) fn submit_all(mut ops: Vec<(&dyn ImageFile, IoOp)>, done: Completion) {
    match ops.len() {
        0 => done(Ok(())),
        1 => {
            let (file, op) = ops.remove(0);
            file.submit(IoRequest { op, done });
        }
        many => {
            let join =
                Arc::new(Join { left: AtomicUsize::new(many), outcome: Mutex::new((Ok(()), Some(done))) });
            for (file, op) in ops {
                let join = Arc::clone(&join);
                file.submit(IoRequest { op, done: Box::new(move |outcome| join.finished(outcome)) });
            }
        }
    }
}

/// Refuses what does not fit the disk: never clamp silently.
pub(crate) fn check_request(disk: Geometry, op: &IoOp) -> Result<(), IoError> {
    let (name, offset, len) = match op {
        IoOp::Read { offset, buf } => ("read", *offset, crate::format::bytes(buf.len())),
        IoOp::Write { offset, buf, .. } => ("write", *offset, crate::format::bytes(buf.len())),
        IoOp::Discard { offset, len } => ("discard", *offset, *len),
        IoOp::WriteZeroes { offset, len, .. } => ("write-zeroes", *offset, *len),
        IoOp::Flush => return Ok(()),
    };
    check_range(disk, name, offset, len)
}

/// The same for a range.
pub(crate) fn check_range(disk: Geometry, op: &'static str, offset: u64, len: u64) -> Result<(), IoError> {
    let sector = u64::from(disk.block_bytes);
    let inside = offset.checked_add(len).is_some_and(|end| end <= disk.size_bytes);
    if inside && offset.is_multiple_of(sector) && len.is_multiple_of(sector) {
        return Ok(());
    }
    Err(IoError::OutOfRange { op, offset, len, size_bytes: disk.size_bytes, block_bytes: disk.block_bytes })
}
