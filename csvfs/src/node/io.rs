//! Resolving a read or write: from a range of the file to pieces of the LUN, under the file's lock and without I/O.
//!
//! | place of a block | read | write, whole block | write, part of a block |
//! |---|---|---|---|
//! | Data | LUN | LUN | LUN if it can address that part, else read, change, write (alone on that block) |
//! | Fresh | zeros | LUN | the rest is filled with zeros (alone on that block) |
//! | Shared | LUN | a block of the pool, alone on it | same, with the rest read from the shared block |
//! | hole | zeros | allocate first, then Fresh | same |
//!
//! A shared block is let go when it was replaced, and may be somebody else's then: so no read of it is in flight while it
//! is replaced, and none begins (C7).
//!
//! **Invariant:** a block of the LUN is read only if it was written (C2), and becomes readable only as a whole (C3).

use std::ops::Range;

use blockio::{AlignedBuf, IoBuf, IoError};

use super::FsError;
use super::bad::Again;
use super::inode::State;
use super::map::{BLOCK_BYTES, Place, SIZE_BYTES_MAX, block_ceil, block_floor};
use super::pool::LunRun;

/// Called with the number of bytes done; for an append, with the offset.
pub(super) type Done = Box<dyn FnOnce(Result<u64, FsError>) + Send>;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Read,
    Write,
    /// Writes where the file ends.
    Append,
    /// Writes zeros where data is; `buf` holds them.
    Zero,
}

/// A read or write as it came.
pub(super) struct DataOp {
    pub(super) what: What,
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
    /// Fails when it is not wholly inside the file, as on a device.
    pub(super) exact: bool,
    /// It moves a page between the LUN and the kernel's memory, for a mapping.
    pub(super) page: bool,
    pub(super) done: Done,
}

/// One request to the LUN.
pub(super) enum Piece {
    Read {
        lun: u64,
        buf: IoBuf,
    },
    /// Into `whole`, of which the bytes from `skip` on are wanted in `buf`.
    ReadAround {
        lun: u64,
        whole: IoBuf,
        skip: usize,
        buf: IoBuf,
    },
    Write {
        lun: u64,
        buf: IoBuf,
    },
    /// Reads a block at `from` into `block`, puts `part` at `skip`, writes it at `lun`.
    Change {
        from: u64,
        lun: u64,
        block: IoBuf,
        skip: usize,
        part: IoBuf,
    },
}

/// What is to be recorded when a request has ended.
#[derive(Debug)]
pub(super) enum Effect {
    Read {
        /// In the list of reads of shared blocks.
        shared: Option<usize>,
        /// The grant's number in the read cache; 0 when it has none.
        life: u64,
        /// What it was, should the medium fail.
        again: Again,
    },
    Write {
        range: Range<u64>,
        /// In the list of writes in flight.
        slot: usize,
        /// Blocks that it has for itself.
        alone_on: Vec<u64>,
        append: bool,
        zero: bool,
        /// Shared blocks that it replaces, by the blocks of the pool that it has written instead.
        copies: Vec<CopyRun>,
    },
}

/// A part of a file that moves to blocks of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CopyRun {
    pub(super) file: u64,
    pub(super) len: u64,
    pub(super) lun: u64,
}

/// What a request needs before it can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// The map from here on.
    Map(u64),
    /// Space in `from..to`.
    Space { from: u64, to: u64, beyond_end: bool },
    /// Blocks to copy `bytes` to that are shared, the first of them at `from`.
    Copies { from: u64, bytes: u64 },
    /// The kernel to give up its pages of these blocks.
    Pages { from: u64, to: u64 },
    /// Another request to end.
    Turn,
}

/// Outcome of resolving.
pub(super) enum Plan {
    Go { pieces: Vec<Piece>, effect: Effect, outcome: u64 },
    Wait(Need),
    End(Result<u64, FsError>),
}

impl DataOp {
    pub(super) fn is_read(&self) -> bool {
        self.what == What::Read
    }

    /// The blocks that it touches.
    pub(super) fn blocks(&self) -> Range<u64> {
        block_floor(self.offset)..block_ceil(self.offset.saturating_add(self.buf.len() as u64))
    }

    fn part(&self, range: Range<u64>) -> IoBuf {
        self.buf.slice(index(range.start - self.offset)..index(range.end - self.offset))
    }

    fn out_of_range(&self, size_bytes: u64) -> FsError {
        let op = if self.is_read() { "read" } else { "write" };
        let (offset, len) = (self.offset, self.buf.len() as u64);
        FsError::Io(IoError::OutOfRange { op, offset, len, size_bytes, block_bytes: 1 })
    }
}

/// A length inside a buffer.
fn index(len: u64) -> usize {
    usize::try_from(len).expect("offsets into a buffer fit the address space")
}

impl State {
    /// Resolves `op`. `lun_unit`: what the LUN can address, in bytes.
    pub(super) fn plan(&mut self, op: &mut DataOp, lun_unit: u64) -> Plan {
        if op.what == What::Read {
            self.plan_read(op, lun_unit)
        } else {
            self.plan_write(op, lun_unit, &mut Vec::new())
        }
    }

    /// Resolves a write that needs copies, of which `targets` are to take the bytes. What it leaves there is not needed.
    pub(super) fn plan_copies(&mut self, op: &mut DataOp, lun_unit: u64, targets: &mut Vec<LunRun>) -> Plan {
        self.plan_write(op, lun_unit, targets)
    }

    fn plan_read(&mut self, op: &DataOp, lun_unit: u64) -> Plan {
        let size = self.size();
        let end = op.offset.saturating_add(op.buf.len() as u64);
        if op.exact && end > size {
            return Plan::End(Err(op.out_of_range(size)));
        }
        let end = end.min(size);
        if op.offset >= end {
            return Plan::End(Ok(0));
        }
        if op.page && self.writes.overlap(op.blocks()) {
            // See `pages`: a page must not be older than what is being written.
            return Plan::Wait(Need::Turn);
        }
        let mut pieces = Vec::with_capacity(1);
        let mut shares = false;
        for part in self.map.parts(op.offset..end) {
            match part.place {
                Place::Unknown => return Plan::Wait(Need::Map(part.start)),
                Place::Hole | Place::Fresh(_) => op.part(part.start..part.start + part.len).fill_zero(),
                Place::Data(lun) => pieces.push(read_piece(op, part.start, part.len, lun, lun_unit)),
                Place::Shared(lun) => {
                    shares = true;
                    pieces.push(read_piece(op, part.start, part.len, lun, lun_unit));
                }
            }
        }
        let bytes = end - op.offset;
        if pieces.is_empty() {
            return Plan::End(Ok(bytes));
        }
        let range = op.offset..end;
        if shares && self.is_being_replaced(&range) {
            return Plan::Wait(Need::Turn);
        }
        let shared = shares.then(|| self.shared_reads.add(range));
        let (offset, exact, page) = (op.offset, op.exact, op.page);
        let again = Again { offset, buf: op.buf.clone(), exact, page };
        Plan::Go { pieces, effect: Effect::Read { shared, life: self.cache_life, again }, outcome: bytes }
    }

    /// Whether a write that may replace shared blocks of `range` is under way or waits for its turn: a read lets it go first,
    /// or reads without end would hold it up.
    fn is_being_replaced(&self, range: &Range<u64>) -> bool {
        let blocks = block_floor(range.start)..block_ceil(range.end);
        let overlaps = |op: &DataOp| {
            let its = op.blocks();
            !op.is_read() && its.start < blocks.end && blocks.start < its.end
        };
        self.alone.range(blocks.clone()).next().is_some() || self.stalled.iter().any(overlaps)
    }

    fn plan_write(&mut self, op: &mut DataOp, lun_unit: u64, targets: &mut Vec<LunRun>) -> Plan {
        let len = op.buf.len() as u64;
        if op.what == What::Append {
            op.offset = self.append_at();
        }
        let size = self.size();
        let Some(end) = op.offset.checked_add(len).filter(|end| *end <= SIZE_BYTES_MAX) else {
            return Plan::End(Err(FsError::invalid(libc::EFBIG, "a file cannot be that large")));
        };
        if op.exact && end > size {
            return Plan::End(Err(op.out_of_range(size)));
        }
        if len == 0 {
            return Plan::End(Ok(0));
        }
        let blocks = op.blocks();
        if !op.page && self.pages.are_in(&blocks) {
            return Plan::Wait(Need::Pages { from: blocks.start, to: blocks.end });
        }
        let range = op.offset..end;
        match self.resolve_write(op, range.clone(), lun_unit, targets) {
            Err(need) => Plan::Wait(need),
            Ok(draft) if draft.pieces.is_empty() => Plan::End(Ok(len)),
            Ok(Resolved { pieces, alone_on, copies }) => {
                let (append, zero) = (op.what == What::Append, op.what == What::Zero);
                if append {
                    self.append_end = end;
                    self.appends += 1;
                }
                self.alone.extend(alone_on.iter().copied());
                let slot = self.writes.add(range.clone());
                let outcome = if append { op.offset } else { len };
                let effect = Effect::Write { range, slot, alone_on, append, zero, copies };
                Plan::Go { pieces, effect, outcome }
            }
        }
    }

    fn resolve_write(
        &self,
        op: &DataOp,
        range: Range<u64>,
        lun_unit: u64,
        targets: &mut Vec<LunRun>,
    ) -> Result<Resolved, Need> {
        let blocks = block_floor(range.start)..block_ceil(range.end);
        if self.alone.range(blocks.clone()).next().is_some() {
            return Err(Need::Turn);
        }
        let mut draft = Draft::new(op, lun_unit);
        for part in self.map.parts(blocks.clone()) {
            let here = part.start..part.start + part.len;
            let wanted = here.start.max(range.start)..here.end.min(range.end);
            match part.place {
                Place::Unknown => return Err(Need::Map(part.start)),
                Place::Hole | Place::Fresh(_) if op.what == What::Zero => {}
                Place::Hole => {
                    let beyond_end = range.end > self.size();
                    return Err(Need::Space { from: part.start, to: blocks.end, beyond_end });
                }
                Place::Data(lun) => draft.over_data(here.start, lun, wanted),
                Place::Fresh(lun) => draft.over_fresh(here.start, lun, wanted),
                Place::Shared(lun) => draft.shared.push((here, lun)),
            }
        }
        let shared = draft.shared_bytes();
        draft.alone_on_shared();
        let busy = |block: &u64| self.writes.overlap(*block..*block + BLOCK_BYTES);
        let read = |(here, _): &(Range<u64>, u64)| self.shared_reads.overlap(here.clone());
        if draft.alone_on.iter().any(busy) || draft.shared.iter().any(read) {
            return Err(Need::Turn);
        }
        if shared > targets.iter().map(|(_, len)| *len).sum::<u64>() {
            let from = draft.shared.first().map_or(range.start, |(here, _)| here.start);
            return Err(Need::Copies { from, bytes: shared });
        }
        draft.over_shared(&range, targets);
        Ok(Resolved { pieces: draft.pieces, alone_on: draft.alone_on, copies: draft.copies })
    }
}

fn read_piece(op: &DataOp, start: u64, len: u64, lun: u64, unit: u64) -> Piece {
    let (from, to) = (lun - lun % unit, (lun + len).next_multiple_of(unit));
    let at = start - op.offset;
    // Only the end of the request or of the file is not at a block boundary. What lies behind the end of the file in its
    // last block are zeros, and nobody looks at them.
    if from == lun && at + (to - from) <= op.buf.len() as u64 {
        return Piece::Read { lun, buf: op.buf.slice(index(at)..index(at + (to - from))) };
    }
    let whole = IoBuf::zeroed(index(to - from));
    Piece::ReadAround { lun: from, whole, skip: index(lun - from), buf: op.part(start..start + len) }
}

/// What a write comes to.
struct Resolved {
    pieces: Vec<Piece>,
    alone_on: Vec<u64>,
    copies: Vec<CopyRun>,
}

/// The pieces of a write as they are found.
struct Draft<'a> {
    op: &'a DataOp,
    lun_unit: u64,
    pieces: Vec<Piece>,
    alone_on: Vec<u64>,
    /// Whole blocks that are shared, and where they lie.
    shared: Vec<(Range<u64>, u64)>,
    copies: Vec<CopyRun>,
}

impl<'a> Draft<'a> {
    fn new(op: &'a DataOp, lun_unit: u64) -> Self {
        let (pieces, alone_on) = (Vec::with_capacity(1), Vec::new());
        Self { op, lun_unit, pieces, alone_on, shared: Vec::new(), copies: Vec::new() }
    }
}

impl Draft<'_> {
    fn shared_bytes(&self) -> u64 {
        self.shared.iter().map(|(here, _)| here.end - here.start).sum()
    }

    /// A shared block is replaced by one write at a time.
    fn alone_on_shared(&mut self) {
        for (here, _) in &self.shared {
            self.alone_on.extend((here.start..here.end).step_by(index(BLOCK_BYTES)));
        }
    }

    /// Writes what is shared to `targets` instead, of which it takes as much as it needs.
    fn over_shared(&mut self, range: &Range<u64>, targets: &mut Vec<LunRun>) {
        for (here, old) in std::mem::take(&mut self.shared) {
            let mut at = here.start;
            while at < here.end
                && let Some((lun, len)) = targets.pop()
            {
                let step = len.min(here.end - at);
                let wanted = at.max(range.start)..(at + step).min(range.end);
                self.copy_to(at, old + (at - here.start), lun, wanted);
                self.copies.push(CopyRun { file: at, len: step, lun });
                at += step;
                if step < len {
                    targets.push((lun + step, len - step));
                }
            }
        }
    }

    /// Blocks that start at `start` lie at `old`, and are to lie at `lun` with `wanted` written.
    fn copy_to(&mut self, start: u64, old: u64, lun: u64, wanted: Range<u64>) {
        let lun_of = |base: u64, at: u64| base + (at - start);
        let mut from = wanted.start;
        if !from.is_multiple_of(BLOCK_BYTES) {
            let block = block_floor(from);
            let head = from..wanted.end.min(block + BLOCK_BYTES);
            self.change_to(lun_of(old, block), lun_of(lun, block), head.clone());
            from = head.end;
        }
        let to = block_floor(wanted.end).max(from);
        if from < to {
            self.write(lun_of(lun, from), self.op.part(from..to));
        }
        if to < wanted.end {
            let block = block_floor(to);
            self.change_to(lun_of(old, block), lun_of(lun, block), to..wanted.end);
        }
    }

    /// A part that starts at block `start` and lies at `lun`, of which `wanted` is written.
    fn over_data(&mut self, start: u64, lun: u64, wanted: Range<u64>) {
        let unit = self.lun_unit;
        let lun_of = |at: u64| lun + (at - start);
        let mut from = wanted.start;
        if !from.is_multiple_of(unit) {
            let head = from..wanted.end.min(block_floor(from) + BLOCK_BYTES);
            self.change(lun_of(block_floor(from)), head.clone());
            from = head.end;
        }
        let mut to = wanted.end;
        if to > from && !to.is_multiple_of(unit) {
            let tail = block_floor(to).max(from)..to;
            self.change(lun_of(block_floor(to)), tail.clone());
            to = tail.start;
        }
        if from < to {
            self.write(lun_of(from), self.op.part(from..to));
        }
    }

    fn over_fresh(&mut self, start: u64, lun: u64, wanted: Range<u64>) {
        let lun_of = |at: u64| lun + (at - start);
        let mut from = wanted.start;
        if !from.is_multiple_of(BLOCK_BYTES) {
            let head = from..wanted.end.min(block_floor(from) + BLOCK_BYTES);
            self.fill(lun_of(block_floor(from)), head.clone());
            from = head.end;
        }
        let to = block_floor(wanted.end).max(from);
        if from < to {
            self.write(lun_of(from), self.op.part(from..to));
        }
        if to < wanted.end {
            self.fill(lun_of(block_floor(to)), to..wanted.end);
        }
    }

    fn write(&mut self, lun: u64, buf: IoBuf) {
        self.pieces.push(Piece::Write { lun, buf });
    }

    fn change(&mut self, lun: u64, part: Range<u64>) {
        self.alone_on.push(block_floor(part.start));
        self.change_to(lun, lun, part);
    }

    /// Puts `part` into the block that lies at `from`, and writes it at `lun`.
    fn change_to(&mut self, from: u64, lun: u64, part: Range<u64>) {
        let skip = index(part.start - block_floor(part.start));
        let block = IoBuf::zeroed(index(BLOCK_BYTES));
        self.pieces.push(Piece::Change { from, lun, block, skip, part: self.op.part(part) });
    }

    fn fill(&mut self, lun: u64, part: Range<u64>) {
        let block = block_floor(part.start);
        self.alone_on.push(block);
        let skip = index(part.start - block);
        let mut whole = AlignedBuf::zeroed(index(BLOCK_BYTES));
        let len = index(part.end - part.start);
        self.op.part(part).copy_to(&mut whole[skip..skip + len]);
        self.write(lun, whole.into());
    }
}

/// Ranges of requests in flight, by slot.
#[derive(Debug, Default)]
pub(super) struct Writes {
    slots: Vec<Range<u64>>,
    free: Vec<usize>,
}

impl Writes {
    pub(super) fn add(&mut self, range: Range<u64>) -> usize {
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = range;
            return slot;
        }
        self.slots.push(range);
        self.slots.len() - 1
    }

    pub(super) fn remove(&mut self, slot: usize) {
        self.slots[slot] = 0..0;
        self.free.push(slot);
    }

    /// Whether there are any.
    pub(super) fn any(&self) -> bool {
        self.slots.len() > self.free.len()
    }

    fn overlap(&self, range: Range<u64>) -> bool {
        self.slots.iter().any(|slot| slot.start < range.end && range.start < slot.end)
    }
}
