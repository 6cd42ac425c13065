//! From a request of the trait to requests that the server understands.
//!
//! | asked for | what the server cannot do | instead |
//! |---|---|---|
//! | a transfer | so much at once | several, of which the last to complete completes the whole |
//! | FUA | FUA | the write, then a flush |
//! | flush | flush | nothing: without the command a server promises that writes are stable |
//! | zeros | zeroing | writes of zeros |
//! | discard | trim | nothing |

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use super::connection::Order;
use super::device::Core;
use super::pending::Flight;
use crate::nbd::format::{Command, command_flag};
use crate::{Completion, IoBuf, IoError, IoOp, IoRequest};

/// Longest trim or zeroing: the protocol's length has 32 bits.
const RANGE_BYTES_MAX: u64 = 1 << 30;

/// Source of zeros for servers that cannot zero.
static ZEROS: LazyLock<IoBuf> = LazyLock::new(|| IoBuf::zeroed(1 << 20));

/// Starts a request.
pub(super) fn start(core: &Arc<Core>, request: IoRequest) {
    let IoRequest { op, done } = request;
    if let Err(error) = admit(core, &op) {
        return core.finish(done, Err(error));
    }
    let export = core.export;
    match op {
        IoOp::Read { offset, buf } => {
            let piece = |at: usize, len: u32| Piece {
                at,
                len,
                out: None,
                into: Some(buf.slice(at..at + len as usize)),
            };
            let pieces = pieces(buf.len() as u64, core.piece_bytes, piece);
            // From here on the pieces alone refer to it.
            drop(buf);
            let what = What { op: "read", command: Command::Read, flags: 0, offset };
            submit_all(core, what, pieces, done);
        }
        IoOp::Write { offset, buf, fua } => {
            let piece = |at: usize, len: u32| Piece {
                at,
                len,
                out: Some(buf.slice(at..at + len as usize)),
                into: None,
            };
            let pieces = pieces(buf.len() as u64, core.piece_bytes, piece);
            drop(buf);
            let flags = if fua && export.can_fua() { command_flag::FUA } else { 0 };
            let done = written(core, fua, done);
            submit_all(core, What { op: "write", command: Command::Write, flags, offset }, pieces, done);
        }
        IoOp::Flush => flush(core, done),
        IoOp::Discard { .. } if !export.can_trim() => core.finish(done, Ok(())),
        IoOp::Discard { offset, len } => {
            let what = What { op: "discard", command: Command::Trim, flags: 0, offset };
            submit_all(core, what, pieces(len, RANGE_BYTES_MAX, range), written(core, false, done));
        }
        IoOp::WriteZeroes { offset, len, may_unmap } => zero(core, offset, len, may_unmap, done),
    }
}

/// Whether the request fits the export and may write.
fn admit(core: &Core, op: &IoOp) -> Result<(), IoError> {
    let (name, offset, len, writes) = match op {
        IoOp::Read { offset, buf } => ("read", *offset, buf.len() as u64, false),
        IoOp::Write { offset, buf, .. } => ("write", *offset, buf.len() as u64, true),
        IoOp::Discard { offset, len } => ("discard", *offset, *len, true),
        IoOp::WriteZeroes { offset, len, .. } => ("write-zeroes", *offset, *len, true),
        IoOp::Flush => return core.ledger.poison.check(),
    };
    if writes {
        core.ledger.poison.check()?;
        if !core.writable {
            return Err(IoError::Os { op: name, offset, errno: libc::EROFS });
        }
    }
    let (size_bytes, block_bytes) = (core.export.size_bytes, core.export.block_bytes);
    let block = u64::from(block_bytes);
    let inside = offset.checked_add(len).is_some_and(|end| end <= size_bytes);
    if inside && offset.is_multiple_of(block) && len.is_multiple_of(block) {
        return Ok(());
    }
    Err(IoError::OutOfRange { op: name, offset, len, size_bytes, block_bytes })
}

/// What is the same for all pieces of a request.
#[derive(Clone, Copy)]
struct What {
    op: &'static str,
    command: Command,
    flags: u16,
    offset: u64,
}

/// A part of a request that the server takes at once.
struct Piece {
    at: usize,
    len: u32,
    out: Option<IoBuf>,
    into: Option<IoBuf>,
}

fn range(at: usize, len: u32) -> Piece {
    Piece { at, len, out: None, into: None }
}

fn pieces(len: u64, most: u64, piece: impl Fn(usize, u32) -> Piece) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(1);
    let mut at = 0;
    while at < len {
        let part = (len - at).min(most);
        let (start, length) = (usize::try_from(at), u32::try_from(part));
        pieces.push(piece(
            start.expect("addresses have 64 bits"),
            length.expect("no piece is longer than 1 GiB"),
        ));
        at += part;
    }
    pieces
}

/// Submits all pieces; `done` learns the first failure, after the last has completed.
fn submit_all(core: &Arc<Core>, what: What, mut pieces: Vec<Piece>, done: Completion) {
    match pieces.len() {
        0 => core.finish(done, Ok(())),
        1 => submit(core, what, pieces.remove(0), done),
        count => {
            let whole =
                Arc::new(Whole { left: AtomicUsize::new(count), state: Mutex::new((Ok(()), Some(done))) });
            for piece in pieces {
                let whole = Arc::clone(&whole);
                submit(core, what, piece, Box::new(move |outcome| whole.part_done(outcome)));
            }
        }
    }
}

/// A request that was cut into pieces.
struct Whole {
    left: AtomicUsize,
    /// Lock rank: a leaf. The first failure, and whom to tell.
    state: Mutex<(Result<(), IoError>, Option<Completion>)>,
}

impl Whole {
    fn part_done(&self, outcome: Result<(), IoError>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0.is_ok() {
            state.0 = outcome;
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let (outcome, done) = (state.0.clone(), state.1.take());
            drop(state);
            done.expect("the last part comes once")(outcome);
        }
    }
}

fn submit(core: &Arc<Core>, what: What, piece: Piece, done: Completion) {
    let offset = what.offset + piece.at as u64;
    let flight = Flight::new(what.op, offset, piece.into, done);
    let order =
        Order { command: what.command, flags: what.flags, offset, length: piece.len, body: piece.out };
    let refused = match core.connection() {
        Ok(connection) => connection.submit(order, flight),
        Err(lost) => Err(Box::new((flight, lost))),
    };
    if let Err(refused) = refused {
        let (flight, lost) = *refused;
        core.finish(flight.done, Err(lost));
    }
}

/// Notes a completed change, and makes it stable when that was asked for and did not come with it.
fn written(core: &Arc<Core>, fua: bool, done: Completion) -> Completion {
    let core = Arc::clone(core);
    Box::new(move |outcome| {
        if outcome.is_err() {
            return done(outcome);
        }
        match (fua, core.export.can_fua()) {
            (true, true) => done(Ok(())),
            (true, false) => {
                core.ledger.wrote();
                flush(&core, done);
            }
            (false, _) => {
                core.ledger.wrote();
                done(Ok(()));
            }
        }
    })
}

fn flush(core: &Arc<Core>, done: Completion) {
    let covered = core.ledger.written();
    if !core.export.can_flush() {
        core.ledger.flushed(covered);
        return core.finish(done, Ok(()));
    }
    let ledger = Arc::clone(core);
    let done: Completion = Box::new(move |outcome| {
        match &outcome {
            // A flush that was under way when another failed proves nothing (D6).
            Ok(()) if ledger.ledger.poison.check().is_err() => {
                return done(ledger.ledger.poison.check());
            }
            Ok(()) => ledger.ledger.flushed(covered),
            Err(error) => ledger.note_failed_flush(error),
        }
        done(outcome);
    });
    submit(core, What { op: "flush", command: Command::Flush, flags: 0, offset: 0 }, range(0, 0), done);
}

fn zero(core: &Arc<Core>, offset: u64, len: u64, may_unmap: bool, done: Completion) {
    let done = written(core, false, done);
    if core.export.can_zero() {
        let flags = if may_unmap { 0 } else { command_flag::NO_HOLE };
        let what = What { op: "write-zeroes", command: Command::WriteZeroes, flags, offset };
        return submit_all(core, what, pieces(len, RANGE_BYTES_MAX, range), done);
    }
    let most = (ZEROS.len() as u64).min(core.piece_bytes);
    let piece = |at: usize, len: u32| Piece { at, len, out: Some(ZEROS.slice(0..len as usize)), into: None };
    let what = What { op: "write-zeroes", command: Command::Write, flags: 0, offset };
    submit_all(core, what, pieces(len, most, piece), done);
}
