//! Taking content away: discards and zeroing.
//!
//! ```text
//!                 whole block                     part of a block            block without a place
//!   discard       UNMAPPED, place freed           nothing: it is a hint      nothing
//!   write zeroes  ZERO, place freed (may_unmap)   zeros written in place     nothing: it reads as zeros
//!   fixed image   discard: nothing; zeroing: zeros written in place
//! ```
//! The last block is whole when the request covers what the disk has of it.
//!
//! **Invariant:** once a block has read as zeros, it reads as zeros until it is written; the place that it gave up goes to
//! nobody before the log has dropped it durably, nobody reads it any more, and it was zeroed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockio::{Completion, IoError, IoOp, IoRequest};

use crate::bat::Entry;
use crate::core::{Core, Ticket, lock};
use crate::disk::defer;
use crate::guard::{Resolved, WriteGuard, try_resolve_write};
use crate::pieces::submit_all;
use crate::resolve::WriteSegment;

/// Gives whole blocks up. Parts of blocks stay: a discard is a hint.
pub(crate) fn discard(ticket: Ticket, offset: u64, len: u64, done: Completion) {
    let core = Arc::clone(ticket.core());
    let shape = core.bat.shape;
    // A walk, not a list: a guest may discard a disk of 64 TiB in one request.
    let whole = || shape.parts(offset, len).filter(|part| shape.covers(part));
    let nothing = core.params.fixed || whole().all(|part| core.bat.get(part.block).data_offset().is_none());
    if nothing {
        return done(Ok(()));
    }
    if !core.session.load(Ordering::SeqCst) {
        return defer(ticket, 0, IoOp::Discard { offset, len }, done);
    }
    for part in whole() {
        drop_block(&core, part.block, Entry::UNMAPPED);
    }
    done(Ok(()));
}

/// Takes the place of a block away. Blocks whose first write is in flight are left alone.
fn drop_block(core: &Core, block: u64, becomes: Entry) -> bool {
    let mut space = lock(&core.space);
    let Some(place) = core.bat.get(block).data_offset() else { return false };
    core.bat.set(block, becomes);
    space.free(block, place);
    space.mark_dirty(core.bat.page_of(block));
    core.written.store(true, Ordering::SeqCst);
    true
}

/// Makes a range read as zeros, with as little work as its blocks allow.
pub(crate) fn write_zeroes(ticket: Ticket, offset: u64, len: u64, may_unmap: bool, done: Completion) {
    let core = Arc::clone(ticket.core());
    let shape = core.bat.shape;
    if shape.parts(offset, len).all(|part| reads_zero(core.bat.get(part.block))) {
        return done(Ok(()));
    }
    if !core.session.load(Ordering::SeqCst) {
        return defer(ticket, 0, IoOp::WriteZeroes { offset, len, may_unmap }, done);
    }
    // Space that a fixed image promised to its guest stays reserved in the file too.
    let may_unmap = may_unmap && !core.params.fixed;
    let (mut ops, mut guards) = (Vec::new(), Vec::new());
    for part in shape.parts(offset, len) {
        let unmapped = may_unmap && shape.covers(&part) && drop_block(&core, part.block, Entry::ZERO);
        if unmapped || reads_zero(core.bat.get(part.block)) {
            continue;
        }
        let start = part.block * shape.block_bytes + part.within;
        let guard = match try_resolve_write(ticket.clone(), start, part.len) {
            Resolved::Ready(guard) => guard,
            // It was given up in between, and reads as zeros.
            Resolved::Wait { .. } => continue,
            // All of it again later: what was given up so far stays so.
            Resolved::Held(ticket) => {
                return Core::park(
                    ticket,
                    IoRequest { op: IoOp::WriteZeroes { offset, len, may_unmap }, done },
                );
            }
        };
        let segments = guard.segments().iter();
        ops.extend(segments.map(|WriteSegment::Data { file_offset, len }| IoOp::WriteZeroes {
            offset: *file_offset,
            len: *len,
            may_unmap,
        }));
        guards.push(guard);
    }
    let finish = move |outcome: Result<(), IoError>| {
        if outcome.is_ok() {
            guards.into_iter().for_each(WriteGuard::complete);
        } else {
            drop(guards);
        }
        done(outcome);
    };
    submit_all(&*core.file, ops, Box::new(finish));
}

fn reads_zero(entry: Entry) -> bool {
    entry.data_offset().is_none() && !entry.in_transition()
}
