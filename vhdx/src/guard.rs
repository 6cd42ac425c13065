//! Resolved requests: the range is pinned until the caller has done its I/O and says so.
//!
//! ```text
//! resolve_write -> WriteGuard { segments } -> caller writes them -> complete()   the block becomes visible, its page dirty
//!                                                      \-> drop       nothing happened; the space is free again
//! ```
//! **Invariant:** a block is published only after the I/O of one of its first writers succeeded; until then reads see the
//! old meaning. While a guard lives, the space that it names belongs to nobody else.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockio::IoError;

use crate::bat::Entry;
use crate::core::{Core, Ticket, lock};
use crate::grow::GrowthJob;
use crate::resolve::{BlockPart, ReadSegment, WriteSegment, push_read, push_write};

/// Pins the blocks of a range.
struct Pin {
    ticket: Ticket,
    blocks: Range<u64>,
    writes: bool,
}

impl Pin {
    fn new(ticket: Ticket, offset: u64, len: u64, writes: bool) -> Self {
        let core = ticket.core();
        let block_bytes = core.bat.shape.block_bytes;
        let blocks = offset / block_bytes..(offset + len).div_ceil(block_bytes);
        for block in blocks.clone() {
            core.busy.enter(block);
            if writes {
                core.writing.enter(block);
            }
        }
        Self { ticket, blocks, writes }
    }

    fn core(&self) -> &Core {
        self.ticket.core()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        for block in self.blocks.clone() {
            self.core().busy.leave(block);
            if self.writes {
                self.core().writing.leave(block);
            }
        }
    }
}

/// A read that is being done.
#[must_use = "the segments are pinned only as long as the guard lives"]
pub struct ReadGuard {
    _pin: Pin,
    segments: Vec<ReadSegment>,
}

impl ReadGuard {
    /// Where the bytes are, in order.
    #[must_use]
    pub fn segments(&self) -> &[ReadSegment] {
        &self.segments
    }

    /// The read is done.
    pub fn complete(self) {}
}

/// A write that is being done.
#[must_use = "a write that is not completed is undone"]
pub struct WriteGuard {
    pin: Pin,
    segments: Vec<WriteSegment>,
    /// Blocks in transition that this write takes part in, and their places.
    first_writes: Vec<(u64, u64)>,
}

impl WriteGuard {
    /// Where the bytes go, in order.
    #[must_use]
    pub fn segments(&self) -> &[WriteSegment] {
        &self.segments
    }

    /// Keeps the disk from being closed beyond the life of the guard.
    pub(crate) fn ticket(&self) -> Ticket {
        self.pin.ticket.clone()
    }

    /// Whether finding these bytes after a crash needs nothing more than what is durable already.
    pub(crate) fn mapping_is_durable(&self) -> bool {
        let bat = &self.pin.core().bat;
        let space = lock(&self.pin.core().space);
        self.first_writes.is_empty()
            && self.pin.blocks.clone().all(|block| space.is_durable(bat.page_of(block)))
    }

    /// The bytes are written: new blocks become visible. They are durable with the next flush.
    pub fn complete(mut self) {
        let first_writes = std::mem::take(&mut self.first_writes);
        if first_writes.is_empty() {
            return;
        }
        let core = self.pin.core();
        let mut space = lock(&core.space);
        for (block, offset) in first_writes {
            if space.settle(block, offset) {
                if let Some(anchor) = core.bat.get(block).owned_offset() {
                    space.free_former(block, anchor);
                }
                core.bat.set(block, Entry::present(offset));
                space.mark_dirty(core.bat.page_of(block));
            }
        }
    }
}

impl Drop for WriteGuard {
    fn drop(&mut self) {
        let core = self.pin.core();
        // After the bytes, before the caller hears of it: a flush that it asks for then covers them.
        core.written.store(true, Ordering::SeqCst);
        if self.first_writes.is_empty() {
            return;
        }
        let mut space = lock(&core.space);
        for (block, offset) in &self.first_writes {
            if space.abort(*block, *offset) {
                core.bat.set(*block, core.bat.get(*block).settled());
            }
        }
    }
}

/// Resolves a read. Takes no lock.
pub(crate) fn resolve_read(ticket: Ticket, offset: u64, len: u64) -> ReadGuard {
    let pin = Pin::new(ticket, offset, len, false);
    let core = pin.core();
    let file_bytes = core.file_bytes.load(Ordering::SeqCst);
    let mut segments = Vec::new();
    for BlockPart { block, within, len } in core.bat.shape.parts(offset, len) {
        let Some(place) = core.bat.get(block).data_offset() else {
            push_read(&mut segments, ReadSegment::Zero { len });
            continue;
        };
        // Some files end where the disk ends, inside the last block.
        let there = file_bytes.saturating_sub(place + within).min(len);
        if there > 0 {
            push_read(&mut segments, ReadSegment::Data { file_offset: place + within, len: there });
        }
        if there < len {
            push_read(&mut segments, ReadSegment::Zero { len: len - there });
        }
    }
    ReadGuard { _pin: pin, segments }
}

/// What resolving a write came to.
pub(crate) enum Resolved {
    /// Go ahead.
    Ready(WriteGuard),
    /// The growth thread must act first: begin the session, or find space for this many blocks.
    Wait {
        /// Blocks to be handed out.
        blocks: u64,
        /// The request goes on with it.
        ticket: Ticket,
    },
    /// A block of the range is being moved: see [`Core::park`].
    Held(Ticket),
}

/// Resolves a write, without waiting. Takes no lock when every block has its place.
pub(crate) fn try_resolve_write(ticket: Ticket, offset: u64, len: u64) -> Resolved {
    if !ticket.core().session.load(Ordering::SeqCst) {
        return Resolved::Wait { blocks: 0, ticket };
    }
    let pin = Pin::new(ticket, offset, len, true);
    let mut guard = WriteGuard { pin, segments: Vec::new(), first_writes: Vec::new() };
    let bat = &guard.pin.core().bat;
    for part in bat.shape.parts(offset, len) {
        let entry = bat.get(part.block);
        match entry.data_offset() {
            Some(_) if entry.is_held() => return Resolved::Held(guard.pin.ticket.clone()),
            Some(place) => push_write(&mut guard.segments, place + part.within, part.len),
            None => return place_blocks(guard, offset, len),
        }
    }
    Resolved::Ready(guard)
}

/// The slow half: some block has no place yet.
fn place_blocks(mut guard: WriteGuard, offset: u64, len: u64) -> Resolved {
    guard.segments.clear();
    let core = guard.pin.ticket.core();
    let mut space = lock(&core.space);
    let shape = core.bat.shape;
    if shape.parts(offset, len).any(|part| core.bat.get(part.block).is_held()) {
        drop(space);
        return Resolved::Held(guard.pin.ticket.clone());
    }
    let lacks_place = |entry: Entry| entry.data_offset().is_none() && !entry.in_transition();
    let lacking = shape.parts(offset, len).filter(|part| lacks_place(core.bat.get(part.block))).count();
    let blocks = crate::format::bytes(lacking);
    if space.fresh_blocks() < blocks {
        drop(space);
        return Resolved::Wait { blocks, ticket: guard.pin.ticket.clone() };
    }
    for part in shape.parts(offset, len) {
        let entry = core.bat.get(part.block);
        let place = if let Some(place) = entry.data_offset() {
            place
        } else {
            let place = if entry.in_transition() {
                space.join(part.block)
            } else {
                core.bat.set(part.block, entry.with_transition());
                space.allocate(part.block).expect("the space was counted under this lock")
            };
            guard.first_writes.push((part.block, place));
            place
        };
        push_write(&mut guard.segments, place + part.within, part.len);
    }
    let ahead = space.runs_out();
    drop(space);
    if ahead {
        core.growth.push(GrowthJob::Ahead);
    }
    Resolved::Ready(guard)
}

/// Resolves a write and waits for space if need be.
pub(crate) fn resolve_write(mut ticket: Ticket, offset: u64, len: u64) -> Result<WriteGuard, IoError> {
    let core = Arc::clone(ticket.core());
    loop {
        match try_resolve_write(ticket, offset, len) {
            Resolved::Ready(guard) => return Ok(guard),
            Resolved::Wait { blocks, ticket: same } => {
                ticket = same;
                let (tell, told) = std::sync::mpsc::sync_channel(1);
                core.growth.push(GrowthJob::Reserve { blocks, tell });
                told.recv().unwrap_or(Err(IoError::Closed))?;
            }
            Resolved::Held(same) => {
                ticket = same;
                core.wait_for_moves();
            }
        }
    }
}

impl std::fmt::Debug for ReadGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadGuard").field("segments", &self.segments).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for WriteGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteGuard").field("segments", &self.segments).finish_non_exhaustive()
    }
}
