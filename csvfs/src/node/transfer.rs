//! Moving the bytes of one resolved request: all its pieces at the LUN, one completion.
//!
//! No thread is held meanwhile. A piece that must read before it can write is continued on a worker, because a device's
//! I/O thread may not submit to its own full queue.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use blockio::{BlockDevice, IoBuf, IoError, IoOp, IoRequest};

use super::FsError;
use super::inode::Inode;
use super::io::{Done, Effect, Piece};

/// A resolved request.
pub(super) struct Transfer {
    pub(super) pieces: Vec<Piece>,
    pub(super) effect: Effect,
    pub(super) outcome: u64,
    pub(super) done: Done,
}

/// Called when one piece has ended.
type PieceDone = Box<dyn FnOnce(Result<(), IoError>) + Send>;

impl Transfer {
    /// Submits everything.
    pub(super) fn start(mut self, inode: &Arc<Inode>) {
        let device = inode.core.device.clone();
        if self.pieces.len() == 1
            && let Some(piece) = self.pieces.pop()
        {
            let owner = inode.clone();
            let Self { effect, outcome, done, .. } = self;
            let end = move |result: Result<(), IoError>| {
                owner.ended(effect, result.map(|()| outcome).map_err(FsError::Io), done);
            };
            return submit(inode, &*device, piece, Box::new(end));
        }
        let pieces = std::mem::take(&mut self.pieces);
        let joint = Arc::new(Joint {
            left: AtomicUsize::new(pieces.len()),
            error: Mutex::new(None),
            transfer: Mutex::new(Some((inode.clone(), self))),
        });
        for piece in pieces {
            let joint = joint.clone();
            submit(inode, &*device, piece, Box::new(move |result| joint.piece_ended(result)));
        }
    }
}

/// Several pieces, one end.
struct Joint {
    left: AtomicUsize,
    /// Rank: leaf.
    error: Mutex<Option<IoError>>,
    /// Rank: leaf. Taken by whoever ends last.
    transfer: Mutex<Option<(Arc<Inode>, Transfer)>>,
}

impl Joint {
    fn piece_ended(&self, result: Result<(), IoError>) {
        if let Err(error) = result {
            self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let error = self.error.lock().unwrap_or_else(PoisonError::into_inner).take();
        let last = self.transfer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((inode, Transfer { effect, outcome, done, .. })) = last else { return };
        let result = error.map_or(Ok(outcome), |error| Err(FsError::Io(error)));
        inode.ended(effect, result, done);
    }
}

fn submit(inode: &Arc<Inode>, device: &dyn BlockDevice, piece: Piece, done: PieceDone) {
    match piece {
        Piece::Read { lun, buf } => device.submit(IoRequest { op: IoOp::Read { offset: lun, buf }, done }),
        Piece::Write { lun, buf } => {
            device.submit(IoRequest { op: IoOp::Write { offset: lun, buf, fua: false }, done });
        }
        Piece::ReadAround { lun, whole, skip, buf } => {
            let source = whole.clone();
            let done = Box::new(move |result: Result<(), IoError>| {
                if result.is_ok() {
                    copy(&source, skip, &buf, 0, buf.len());
                }
                done(result);
            });
            device.submit(IoRequest { op: IoOp::Read { offset: lun, buf: whole }, done });
        }
        Piece::Change { from, lun, block, skip, part } => {
            change(inode, device, (from, lun), (block, skip, part), done);
        }
    }
}

/// Reads a block, puts the part into it, writes it back, or where it belongs from now on.
fn change(
    inode: &Arc<Inode>,
    device: &dyn BlockDevice,
    (from, lun): (u64, u64),
    (block, skip, part): (IoBuf, usize, IoBuf),
    done: PieceDone,
) {
    let core = inode.core.clone();
    let buf = block.clone();
    let read = Box::new(move |result: Result<(), IoError>| {
        if result.is_err() {
            return done(result);
        }
        let workers = core.workers.clone();
        workers.run(move || {
            copy(&part, 0, &block, skip, part.len());
            core.device.submit(IoRequest { op: IoOp::Write { offset: lun, buf: block, fua: false }, done });
        });
    });
    device.submit(IoRequest { op: IoOp::Read { offset: from, buf }, done: read });
}

/// Copies `len` bytes from one buffer to another, through a small one on the stack: buffers that are shared with a device
/// or a guest are never borrowed.
fn copy(from: &IoBuf, from_at: usize, to: &IoBuf, to_at: usize, len: usize) {
    let mut chunk = [0; 4096];
    let mut at = 0;
    while at < len {
        let step = chunk.len().min(len - at);
        from.slice(from_at + at..from_at + at + step).copy_to(&mut chunk[..step]);
        to.slice(to_at + at..to_at + at + step).copy_from(&chunk[..step]);
        at += step;
    }
}
