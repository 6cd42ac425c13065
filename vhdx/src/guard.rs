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
use crate::bitmap::Bitmaps;
use crate::core::{Core, Ticket, lock};
use crate::grow::GrowthJob;
use crate::image::Image;
use crate::mutation::Mutation;
use crate::resolve::{BlockPart, ReadSegment, WriteSegment, push_write};
use crate::space::{MetaPage, Space};

/// Pins the blocks of a range.
pub(crate) struct Pin {
    ticket: Ticket,
    blocks: Range<u64>,
    writes: bool,
}

impl Pin {
    pub(crate) fn new(ticket: Ticket, offset: u64, len: u64, writes: bool) -> Self {
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
    pin: Pin,
    segments: Vec<ReadSegment>,
}

impl ReadGuard {
    /// Where the bytes are, in order.
    #[must_use]
    pub fn segments(&self) -> &[ReadSegment] {
        &self.segments
    }

    /// What [`ReadSegment::Parent`] refers to.
    #[must_use]
    pub fn parent(&self) -> Option<Image> {
        self.pin.core().chain.parent()
    }

    /// The read is done.
    pub fn complete(self) {}
}

/// A write that is being done.
#[must_use = "a write that is not completed is undone"]
pub struct WriteGuard {
    pin: Pin,
    segments: Vec<WriteSegment>,
    /// Parts of blocks in transition that this write takes part in, and the places of the blocks.
    first_writes: Vec<(BlockPart, u64)>,
    /// Parts of partially present blocks of which some sectors are new, and the places of the blocks.
    new_sectors: Vec<(BlockPart, u64)>,
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
        if self.pin.core().skips(Mutation::TrustMapping) {
            return true;
        }
        if !self.first_writes.is_empty() || !self.new_sectors.is_empty() {
            return false;
        }
        let core = self.pin.core();
        let space = lock(&core.space);
        let bits = |block| core.bitmaps.iter().flat_map(move |bitmaps| bitmaps.pages_of(block));
        self.pin.blocks.clone().all(|block| {
            space.is_durable(MetaPage::Bat(core.bat.page_of(block)))
                && bits(block).all(|page| space.is_durable(MetaPage::Bitmap(page)))
        })
    }

    /// The bytes are written: new blocks and sectors become visible. They are durable with the next flush.
    pub fn complete(mut self) {
        let first_writes = std::mem::take(&mut self.first_writes);
        let new_sectors = std::mem::take(&mut self.new_sectors);
        if first_writes.is_empty() && new_sectors.is_empty() {
            return;
        }
        let core = self.pin.core();
        let mut space = lock(&core.space);
        for (part, place) in first_writes {
            if space.settle(part.block, place) {
                core.publish(&mut space, &part, place);
            } else {
                // Another writer was first and spoke for its own sectors only.
                core.add_sectors(&mut space, &part, place);
            }
        }
        for (part, place) in new_sectors {
            core.add_sectors(&mut space, &part, place);
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
        for (part, offset) in &self.first_writes {
            if space.abort(part.block, *offset) {
                core.bat.set(part.block, core.bat.get(part.block).settled());
            }
        }
    }
}

/// Resolves a read. Takes no lock.
pub(crate) fn resolve_read(ticket: Ticket, offset: u64, len: u64) -> ReadGuard {
    let pin = Pin::new(ticket, offset, len, false);
    let segments = pin.core().layer().segments(offset, len);
    ReadGuard { pin, segments }
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
    let mut guard =
        WriteGuard { pin, segments: Vec::new(), first_writes: Vec::new(), new_sectors: Vec::new() };
    let shape = guard.pin.core().bat.shape;
    for part in shape.parts(offset, len) {
        let entry = guard.pin.core().bat.get(part.block);
        match entry.place() {
            Some(_) if entry.is_held() => return Resolved::Held(guard.pin.ticket.clone()),
            Some(place) => guard.add_placed(part, entry, place),
            None => return place_blocks(guard, offset, len),
        }
    }
    Resolved::Ready(guard)
}

impl WriteGuard {
    /// A part of a block that has its place.
    fn add_placed(&mut self, part: BlockPart, entry: Entry, place: u64) {
        push_write(&mut self.segments, place + part.within, part.len);
        let bitmaps = &self.pin.core().bitmaps;
        let is_new = |bitmaps: &Bitmaps| entry.data_offset().is_none() && !bitmaps.holds(&part);
        if bitmaps.as_ref().is_some_and(is_new) {
            self.new_sectors.push((part, place));
        }
    }
}

/// The slow half: some block has no place yet.
fn place_blocks(mut guard: WriteGuard, offset: u64, len: u64) -> Resolved {
    guard.segments.clear();
    guard.new_sectors.clear();
    let ticket = guard.pin.ticket.clone();
    let core = ticket.core();
    let mut space = lock(&core.space);
    let shape = core.bat.shape;
    if shape.parts(offset, len).any(|part| core.bat.get(part.block).is_held()) {
        drop(space);
        return Resolved::Held(guard.pin.ticket.clone());
    }
    let blocks = lacking(core, offset, len);
    if space.fresh_blocks() < blocks {
        drop(space);
        return Resolved::Wait { blocks, ticket: guard.pin.ticket.clone() };
    }
    for part in core.bat.shape.parts(offset, len) {
        let entry = core.bat.get(part.block);
        if let Some(place) = entry.place() {
            guard.add_placed(part, entry, place);
            continue;
        }
        let place = if entry.in_transition() {
            space.join(part.block)
        } else {
            if core.shows_parent(entry) && !core.bat.shape.covers(&part) {
                place_bitmap(core, &mut space, part.block);
            }
            core.bat.set(part.block, entry.with_transition());
            space.allocate(part.block).expect("the space was counted under this lock")
        };
        guard.first_writes.push((part, place));
        push_write(&mut guard.segments, place + part.within, part.len);
    }
    let ahead = space.runs_out();
    drop(space);
    if ahead {
        core.growth.push(GrowthJob::Ahead);
    }
    Resolved::Ready(guard)
}

/// Blocks that a write needs space for. A sector bitmap counts as one: it takes no more.
pub(crate) fn lacking(core: &Core, offset: u64, len: u64) -> u64 {
    let (mut blocks, mut bitmap) = (0, None);
    for part in core.bat.shape.parts(offset, len) {
        let entry = core.bat.get(part.block);
        if entry.place().is_some() || entry.in_transition() {
            continue;
        }
        blocks += 1;
        let chunk = part.block / core.bat.shape.chunk_ratio;
        let partly = core.shows_parent(entry) && !core.bat.shape.covers(&part);
        if partly && bitmap != Some(chunk) && core.bat.bitmap_place(chunk).is_none() {
            bitmap = Some(chunk);
            blocks += 1;
        }
    }
    blocks
}

/// Makes sure that the chunk of `block` has a sector bitmap. One without any bit does no harm, so nothing undoes this.
fn place_bitmap(core: &Core, space: &mut Space, block: u64) {
    let chunk = block / core.bat.shape.chunk_ratio;
    if core.bat.bitmap_place(chunk).is_none() {
        let place = space.allocate_bitmap().expect("the space was counted under this lock");
        core.bat.set_bitmap(chunk, place);
        space.mark_dirty(MetaPage::Bat(core.bat.page_of_bitmap(chunk)));
    }
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
