//! Taking content away: discards and zeroing.
//!
//! ```text
//!                 whole block                     part of a block            block without a place
//!   discard       UNMAPPED, place freed           nothing: it is a hint      nothing
//!   write zeroes  ZERO, place freed (may_unmap)   zeros written in place     nothing: it reads as zeros
//!   fixed image   discard: nothing; zeroing: zeros written in place
//!   in a child    ZERO for both                   zeros written, bits set    ZERO where the parent showed
//! ```
//! The last block is whole when the request covers what the disk has of it.
//!
//! In a child a block that was taken away must stop the parent from showing, so it never goes back to "not present".
//!
//! **Invariant:** once a block has read as zeros, it reads as zeros until it is written; the place that it gave up goes to
//! nobody before the log has dropped it durably, nobody reads it any more, and it was zeroed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockio::{Completion, IoError, IoOp, IoRequest};

use crate::bat::Entry;
use crate::core::{Core, Ticket, lock};
use crate::disk::defer;
use crate::guard::{Resolved, WriteGuard, lacking, try_resolve_write};
use crate::pieces::submit_all;
use crate::resolve::{BlockPart, WriteSegment};
use crate::space::MetaPage;

/// Gives whole blocks up. Parts of blocks stay: a discard is a hint.
pub(crate) fn discard(ticket: Ticket, offset: u64, len: u64, done: Completion) {
    let core = Arc::clone(ticket.core());
    let shape = core.bat.shape;
    // A walk, not a list: a guest may discard a disk of 64 TiB in one request.
    let has_content = |block| {
        let entry = core.bat.get(block);
        entry.place().is_some() || (core.shows_parent(entry) && core.chain.has_data(shape.span(block)))
    };
    let whole = || shape.parts(offset, len).filter(|part| shape.covers(part) && has_content(part.block));
    if core.params.fixed || whole().next().is_none() {
        return done(Ok(()));
    }
    if !core.session.load(Ordering::SeqCst) {
        return defer(ticket, 0, IoOp::Discard { offset, len }, done);
    }
    let becomes = if core.bitmaps.is_some() { Entry::ZERO } else { Entry::UNMAPPED };
    for part in whole() {
        drop_block(&core, part.block, becomes);
    }
    done(Ok(()));
}

/// Takes the place of a block away, or hides the parent. Blocks whose first write is in flight are left alone.
fn drop_block(core: &Core, block: u64, becomes: Entry) -> bool {
    let mut space = lock(&core.space);
    let entry = core.bat.get(block);
    match entry.place() {
        Some(place) => space.free(block, place),
        None if core.shows_parent(entry) && !entry.in_transition() => (),
        None => return false,
    }
    core.bat.set(block, becomes);
    space.mark_dirty(MetaPage::Bat(core.bat.page_of(block)));
    core.written.store(true, Ordering::SeqCst);
    true
}

/// Makes a range read as zeros, with as little work as its blocks allow.
pub(crate) fn write_zeroes(ticket: Ticket, offset: u64, len: u64, may_unmap: bool, done: Completion) {
    let core = Arc::clone(ticket.core());
    let shape = core.bat.shape;
    if shape.parts(offset, len).all(|part| reads_zero(&core, part.block)) {
        return done(Ok(()));
    }
    if !core.session.load(Ordering::SeqCst) {
        return defer(ticket, 0, IoOp::WriteZeroes { offset, len, may_unmap }, done);
    }
    // Space that a fixed image promised to its guest stays reserved in the file too.
    let may_unmap = may_unmap && !core.params.fixed;
    let (mut ops, mut guards) = (Vec::new(), Vec::new());
    for part in shape.parts(offset, len) {
        // Where the parent shows there is no space to keep.
        let may_drop = shape.covers(&part) && (may_unmap || core.shows_parent(core.bat.get(part.block)));
        let dropped = may_drop && drop_block(&core, part.block, Entry::ZERO);
        if dropped || reads_zero(&core, part.block) {
            continue;
        }
        let guard = match pin_part(&ticket, part, shape.block_bytes) {
            Resolved::Ready(guard) => guard,
            // All of it again later: what was given up so far stays so, what was pinned is undone and done again.
            Resolved::Held(ticket) => {
                drop(guards);
                let op = IoOp::WriteZeroes { offset, len, may_unmap };
                return Core::park(ticket, IoRequest { op, done });
            }
            // The same once there is space for all of it at once.
            Resolved::Wait { ticket, .. } => {
                drop(guards);
                let blocks = partly_lacking(&core, offset, len);
                return defer(ticket, blocks, IoOp::WriteZeroes { offset, len, may_unmap }, done);
            }
        };
        let segments = guard.segments().iter();
        ops.extend(segments.map(|WriteSegment::Data { file_offset, len }| {
            (&*core.file, IoOp::WriteZeroes { offset: *file_offset, len: *len, may_unmap })
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
    submit_all(ops, Box::new(finish));
}

fn reads_zero(core: &Core, block: u64) -> bool {
    let entry = core.bat.get(block);
    entry.place().is_none() && !entry.in_transition() && !core.shows_parent(entry)
}

/// The block has its place or is about to, or the parent shows and it needs one.
fn pin_part(ticket: &Ticket, part: BlockPart, block_bytes: u64) -> Resolved {
    try_resolve_write(ticket.clone(), part.block * block_bytes + part.within, part.len)
}

/// Blocks of space that zeroing the partly covered blocks of a range needs: at most the first and the last of them.
fn partly_lacking(core: &Core, offset: u64, len: u64) -> u64 {
    let shape = core.bat.shape;
    let partly = shape.parts(offset, len).filter(|part| !shape.covers(part));
    partly.map(|part| lacking(core, part.block * shape.block_bytes + part.within, part.len)).sum()
}
