//! Moving blocks inside the file while the guest uses them.
//!
//! ```text
//!   hold: writers of the block wait --> copy to the new place --> flush --> entry names the new place, page dirty --> release
//!         (readers go on at the old place)                        barrier   old place: free once the log says so
//! ```
//! A writer counts itself before it looks at the entry, and a mover marks the entry before it looks at the count: one of them
//! sees the other.
//!
//! **Invariant:** the log names a new place only after the content there is durable, and no write is lost between the copy
//! and the release.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;

use blockio::{IoBuf, IoError, IoOp};

use crate::bat::Entry;
use crate::convert::is_zero;
use crate::core::{Core, Ticket, lock};
use crate::disk::submit_modifying;
use crate::error::{VhdxError, doing};
use crate::flush::{FlushJob, For};
use crate::format::{MIB, index};
use crate::mutation::Mutation;
use crate::space::MetaPage;

/// Bytes per read and write of a copy.
const PIECE: u64 = 4 * MIB;

/// A block that was copied and waits for its release.
struct Copied {
    block: u64,
    from: u64,
    to: u64,
}

/// What became of the wish to move a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Move {
    /// It was copied.
    Copied,
    /// It is being written, or has no place any more.
    NotNow,
    /// No free place lies below its own.
    NoRoom,
}

/// A batch of moves. Writers of its blocks wait until it is finished or dropped.
pub(crate) struct Moves {
    ticket: Ticket,
    buf: IoBuf,
    /// Blocks whose writers wait.
    held: Vec<u64>,
    copied: Vec<Copied>,
}

impl Moves {
    /// Begins a batch; the log is live afterwards.
    pub(crate) fn begin(ticket: Ticket) -> Result<Self, VhdxError> {
        let (tell, told) = sync_channel(1);
        ticket.core().flushes.push(FlushJob::Begin(For::Housekeeping, tell));
        told.recv().unwrap_or(Ok(()))?;
        let piece = PIECE.min(ticket.core().bat.shape.block_bytes);
        Ok(Self { ticket, buf: IoBuf::zeroed(index(piece)), held: Vec::new(), copied: Vec::new() })
    }

    fn core(&self) -> &Arc<Core> {
        self.ticket.core()
    }

    /// Size of a block.
    pub(crate) fn block_bytes(&self) -> u64 {
        self.core().bat.shape.block_bytes
    }

    /// Lets writers of a block wait. None when one is at work, or the block has no place.
    fn hold(&mut self, block: u64) -> Option<Entry> {
        let core = self.ticket.core();
        let mut space = lock(&core.space);
        // The disk may have shrunk since the caller made its list.
        if block >= core.bat.shape.blocks {
            return None;
        }
        let entry = core.bat.get(block);
        if entry.place().is_none() || entry != entry.settled() {
            return None;
        }
        core.bat.set(block, entry.held());
        space.held += 1;
        self.held.push(block);
        drop(space);
        // The batch releases it in any case.
        core.writing.is_idle(block).then_some(entry)
    }

    /// Whether a block is all zeros: a look that a write may overtake.
    pub(crate) fn looks_zero(&self, block: u64) -> Result<bool, VhdxError> {
        match self.core().bat.get(block).data_offset() {
            Some(place) => self.is_zero(place),
            None => Ok(false),
        }
    }

    /// Gives up the space that a discarded block kept.
    pub(crate) fn drop_anchor(&mut self, block: u64) {
        let core = self.core();
        let mut space = lock(&core.space);
        let entry = core.bat.get(block);
        if let Some(anchor) =
            entry.owned_offset().filter(|_| entry.place().is_none() && !entry.in_transition())
        {
            core.bat.set(block, Entry::UNMAPPED);
            space.free_former(block, anchor);
            space.mark_dirty(MetaPage::Bat(core.bat.page_of(block)));
        }
    }

    fn is_zero(&self, place: u64) -> Result<bool, VhdxError> {
        let block_bytes = self.block_bytes();
        let step = MIB.min(block_bytes);
        for at in (0..block_bytes).step_by(index(step)) {
            let piece = self.buf.slice(0..index(step));
            self.read(place + at, &piece)?;
            if !is_zero(&piece.to_vec()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives the place of a block up that is all zeros. False when it is not, or is being written.
    pub(crate) fn drop_if_zero(&mut self, block: u64) -> Result<bool, VhdxError> {
        let Some(entry) = self.hold(block) else { return Ok(false) };
        let Some(place) = entry.data_offset() else { return Ok(false) };
        if !self.is_zero(place)? {
            return Ok(false);
        }
        let core = self.core();
        let mut space = lock(&core.space);
        let ours = core.bat.get(block) == entry.held();
        if ours {
            core.bat.set(block, Entry::ZERO);
            space.free(block, place);
            space.mark_dirty(MetaPage::Bat(core.bat.page_of(block)));
        }
        Ok(ours)
    }

    /// Copies a block to the lowest free place below its own.
    pub(crate) fn copy_down(&mut self, block: u64) -> Result<Move, VhdxError> {
        let Some(from) = self.hold(block).and_then(Entry::place) else { return Ok(Move::NotNow) };
        let core = self.core();
        let lowest = lock(&core.space).take_lowest(from, |block| core.busy.is_idle(block));
        let Some(to) = lowest else { return Ok(Move::NoRoom) };
        // From here on the place is written and must be zeroed before anyone else gets it: see the release.
        self.copied.push(Copied { block, from, to });
        let block_bytes = self.block_bytes();
        let step = PIECE.min(block_bytes);
        for at in (0..block_bytes).step_by(index(step)) {
            self.read(from + at, &self.buf)?;
            let op = IoOp::Write { offset: to + at, buf: self.buf.clone(), fua: false };
            let written = self.core().file.run(op);
            written.map_err(doing(format!("moving block {block} to {:#x}", to + at)))?;
        }
        Ok(Move::Copied)
    }

    /// Reads a piece of the file; what it lacks reads as zeros.
    fn read(&self, offset: u64, into: &IoBuf) -> Result<(), VhdxError> {
        let there = self.core().file_bytes.load(Ordering::SeqCst).saturating_sub(offset);
        let there = index(there.min(crate::format::bytes(into.len())));
        into.slice(there..into.len()).fill_zero();
        if there == 0 {
            return Ok(());
        }
        let op = IoOp::Read { offset, buf: into.slice(0..there) };
        self.core().file.run(op).map_err(doing(format!("reading blocks at {offset:#x}")))
    }

    /// Makes the copies durable, lets the table name them, and the log after that. The blocks that moved.
    pub(crate) fn finish(mut self) -> Result<u64, VhdxError> {
        let core = Arc::clone(self.core());
        if !self.copied.is_empty() && !core.skips(Mutation::UnflushedMove) {
            core.file.flush().map_err(|error| core.poison(&doing("flushing moved blocks")(error)))?;
        }
        let mut moved = 0;
        {
            let mut space = lock(&core.space);
            for Copied { block, from, to } in std::mem::take(&mut self.copied) {
                let entry = core.bat.get(block);
                // The guest may have given the block up meanwhile.
                if entry.is_held() && entry.place() == Some(from) {
                    core.bat.set(block, entry.at(to));
                    space.free_former(block, from);
                    space.mark_dirty(MetaPage::Bat(core.bat.page_of(block)));
                    moved += 1;
                } else {
                    space.put_back(to);
                }
            }
        }
        core.written.store(true, Ordering::SeqCst);
        self.release();
        // Only what the log has dropped is free again. Still admitted, so the flush thread is there.
        flush(&core).map_err(doing("flushing the log of moved blocks"))?;
        Ok(moved)
    }

    /// Lets waiting writers go on.
    fn release(&mut self) {
        let core = self.ticket.core();
        let parked = {
            let mut space = lock(&core.space);
            for block in &self.held {
                let entry = core.bat.get(*block);
                if entry.is_held() {
                    core.bat.set(*block, entry.settled());
                }
            }
            self.copied.drain(..).for_each(|copied| space.put_back(copied.to));
            space.held -= self.held.len();
            self.held.clear();
            core.space_changed.notify_all();
            std::mem::take(&mut space.parked)
        };
        for (ticket, request) in parked {
            submit_modifying(ticket, request);
        }
    }
}

impl Drop for Moves {
    fn drop(&mut self) {
        self.release();
    }
}

fn flush(core: &Core) -> Result<(), IoError> {
    let (tell, told) = sync_channel(1);
    core.flushes.push(FlushJob::Flush(Box::new(move |outcome| drop(tell.send(outcome)))));
    told.recv().unwrap_or(Err(IoError::Closed))
}
