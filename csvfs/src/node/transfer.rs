//! Moving the bytes of one resolved request: all its pieces at the LUN, one completion.
//!
//! No thread is held meanwhile. A piece that must read before it can write is continued on a worker, because a device's
//! I/O thread may not submit to its own full queue.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use blockio::{BlockDevice, IoBuf, IoError, IoOp, IoRequest};

use super::FsError;
use super::cache::{Change, Fill};
use super::core::Core;
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
    /// Submits everything that is not in memory.
    pub(super) fn start(mut self, inode: &Arc<Inode>) {
        let device = inode.core.device.clone();
        let mut pieces = self.not_in_memory(inode);
        if pieces.is_empty() {
            return inode.ended(self.effect, Ok(self.outcome), self.done);
        }
        if pieces.len() == 1
            && let Some((piece, touch)) = pieces.pop()
        {
            let owner = inode.clone();
            let Self { effect, outcome, done, .. } = self;
            let end = move |result: Result<(), IoError>| {
                touch.ended(&owner.core, result.is_ok());
                owner.ended(effect, result.map(|()| outcome).map_err(FsError::Io), done);
            };
            return submit(inode, &*device, piece, Box::new(end));
        }
        let joint = Arc::new(Joint {
            left: AtomicUsize::new(pieces.len()),
            error: Mutex::new(None),
            transfer: Mutex::new(Some((inode.clone(), self))),
        });
        for (piece, touch) in pieces {
            let (joint, core) = (joint.clone(), inode.core.clone());
            let end = move |result: Result<(), IoError>| {
                touch.ended(&core, result.is_ok());
                joint.piece_ended(result);
            };
            submit(inode, &*device, piece, Box::new(end));
        }
    }

    /// Answers what the read cache has; gives the rest, each with what the cache has to know when it has ended.
    fn not_in_memory(&mut self, inode: &Arc<Inode>) -> Vec<(Piece, Touch)> {
        let life = if let Effect::Read { life, .. } = self.effect { life } else { 0 };
        let cache = &inode.core.cache;
        let look = |piece: Piece| {
            let touch = match &piece {
                Piece::Read { lun, buf } if life != 0 => match cache.read(*lun, buf, life) {
                    Ok(()) => return None,
                    Err(Some(fill)) => Touch::Fill(fill, buf.clone()),
                    Err(None) => Touch::Nothing,
                },
                Piece::ReadAround { lun, whole, skip, buf } if life != 0 => {
                    match cache.read(*lun, whole, life) {
                        Ok(()) => {
                            copy(whole, *skip, buf, 0, buf.len());
                            return None;
                        }
                        Err(Some(fill)) => Touch::Fill(fill, whole.clone()),
                        Err(None) => Touch::Nothing,
                    }
                }
                Piece::Read { .. } | Piece::ReadAround { .. } => Touch::Nothing,
                Piece::Write { lun, buf } => Touch::Change(cache.begin_change(*lun, buf.len() as u64)),
                Piece::Change { lun, block, .. } => {
                    Touch::Change(cache.begin_change(*lun, block.len() as u64))
                }
            };
            Some((piece, touch))
        };
        std::mem::take(&mut self.pieces).into_iter().filter_map(look).collect()
    }
}

/// What a piece means to the read cache.
enum Touch {
    Nothing,
    Fill(Fill, IoBuf),
    Change(Change),
}

impl Touch {
    /// Before anybody hears of the end.
    fn ended(self, core: &Core, well: bool) {
        match self {
            Self::Fill(fill, buf) if well => core.cache.keep(&fill, &buf),
            Self::Change(change) => core.cache.end_change(&change),
            Self::Nothing | Self::Fill(..) => {}
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
