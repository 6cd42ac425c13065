//! Clones: ranges of files that share their blocks, and copies when one of them is written.
//!
//! ```text
//!   Clone    source  |DDDD|FFFF|....|  -->  source |SSSS|FFFF|....|   target |SSSS|........|   counts + 1
//!   write    target  |SSSS|         -->  data to a block of the pool, flush, Commit{placed}: that block instead, counts - 1
//!   Unshare  target  |SSSS|         -->  |DDDD|, copied by the coordinator, for clients without a pool
//! ```
//! A clone is done in steps of a bounded number of extents. Who asks holds both files in EX all the time, so that what it
//! gets is the source at one moment; what it has not finished when it dies is a part of a file without a name.
//!
//! **Invariant:** a block that several extents have is marked in each of them, is counted in the same transaction, and is
//! free only when its last extent lets it go (C7).

use std::ops::Range;

use blockio::IoError;
use lockmgr::{ClientId, Mode};

use super::core::{Core, Work};
use super::space::{block_range, regular};
use crate::extents::{Extent, Run, State, merged, shared, without};
use crate::format::layout::BLOCK_BYTES;
use crate::format::superblock::INCOMPAT_CLONES;
use crate::meta::{StoreError, Tables};
use crate::proto::{Clone as CloneRange, Cloned, Unshare, reply};
use crate::refcounts::{referenced, released};
use crate::refusal::{OpError, errno};
use crate::volume;

/// Most extents of the source, or of what the target loses, in one step: bounds the transaction.
const STEP_EXTENTS: usize = 1024;
/// Most blocks that the coordinator copies for one request.
const UNSHARE_BLOCKS_MAX: u64 = 64;

/// A clone, in blocks.
struct Ask {
    from: Range<u64>,
    to: u64,
}

impl Ask {
    /// Where a block of the source comes to lie.
    fn target(&self, block: u64) -> u64 {
        self.to + (block - self.from.start)
    }
}

impl Core {
    /// One step of a clone; says how far it came.
    pub(super) fn clone_range(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        op: &CloneRange,
    ) -> Result<reply::Result, OpError> {
        for ino in [op.ino, op.to_ino] {
            if self.writing_grant(client, ino)? != Mode::Exclusive {
                return Err(errno(libc::EINVAL, "only who is alone with both files may clone"));
            }
            regular(tables, ino)?;
        }
        let ask = checked_clone(op)?;
        self.room_for_metadata()?;
        self.announce_clones()?;
        let (source, end) = step_of(tables, op, &ask)?;
        let range = ask.from.start..end;
        self.share_source(tables, op.ino, &source, &range)?;
        self.replace_target(tables, op, &ask, &source, end)?;
        let inode = regular(tables, op.to_ino)?;
        let length = (range.end - range.start) * BLOCK_BYTES;
        Ok(reply::Result::Cloned(Cloned { length, attr: Some(inode.attr(op.to_ino)) }))
    }

    /// Counts one more reference to what the source has in `range`, and marks it.
    fn share_source(
        &mut self,
        tables: &mut Tables<'_>,
        ino: u64,
        source: &[Extent],
        range: &Range<u64>,
    ) -> Result<(), StoreError> {
        for part in source {
            let run = Run { start: part.lun, blocks: part.blocks };
            let window = tables.shared_runs(&(run.start..run.start + run.blocks), usize::MAX)?;
            tables.replace_shared_runs(&window, &referenced(&window, run))?;
        }
        let window = tables.extents(ino, range.start.saturating_sub(1), range.end + 1, usize::MAX)?;
        tables.replace_extents(ino, &window, &shared(&window, range))
    }

    /// Puts what the source has in the place of what the target had.
    fn replace_target(
        &mut self,
        tables: &mut Tables<'_>,
        op: &CloneRange,
        ask: &Ask,
        source: &[Extent],
        end: u64,
    ) -> Result<(), OpError> {
        let (ino, range) = (op.to_ino, ask.to..ask.target(end));
        let mut inode = regular(tables, ino)?;
        let window = tables.extents(ino, range.start.saturating_sub(1), range.end + 1, usize::MAX)?;
        let (kept, gone) = without(&window, &range, |_| true);
        let new =
            source.iter().map(|part| Extent { file: ask.target(part.file), state: State::Shared, ..*part });
        let next = merged(kept.into_iter().chain(new).collect());
        tables.replace_extents(ino, &window, &next)?;
        self.release_blocks(tables, &gone)?;
        inode.blocks = inode.blocks.saturating_sub(blocks_of(&gone)) + blocks_of(source);
        let reached = (range.end * BLOCK_BYTES).min(op.size_bytes);
        inode.size_bytes = inode.size_bytes.max(reached);
        (inode.mtime, inode.ctime) = (self.wall, self.wall);
        Ok(tables.put_inode(ino, &inode)?)
    }

    /// Gives back what a file no longer has: blocks that nobody else has become free.
    pub(super) fn release_blocks(
        &mut self,
        tables: &mut Tables<'_>,
        gone: &[Extent],
    ) -> Result<(), StoreError> {
        for part in gone {
            let run = Run { start: part.lun, blocks: part.blocks };
            if part.state != State::Shared {
                self.alloc.free(run);
                continue;
            }
            let window = tables.shared_runs(&(run.start..run.start + run.blocks), usize::MAX)?;
            let (left, free) = released(&window, run);
            tables.replace_shared_runs(&window, &left)?;
            self.free_runs(&free);
        }
        Ok(())
    }

    /// Gives a range blocks of its own, with what it holds: for who has no pool to copy to.
    pub(super) fn unshare(
        &mut self,
        tables: &mut Tables<'_>,
        work: &Work,
        op: &Unshare,
    ) -> Result<reply::Result, OpError> {
        if self.writing_grant(work.client, op.ino)? != Mode::Exclusive {
            return Err(errno(libc::EINVAL, "only who is alone with the file may have it copied"));
        }
        regular(tables, op.ino)?;
        self.room_for_metadata()?;
        let asked = block_range(op.offset, op.length)?;
        let range = asked.start..asked.end.min(asked.start + UNSHARE_BLOCKS_MAX);
        let window = tables.extents(op.ino, range.start.saturating_sub(1), range.end + 1, usize::MAX)?;
        let (kept, gone) = without(&window, &range, |state| state == State::Shared);
        self.check_room(work, None, blocks_of(&gone))?;
        let mut next = kept;
        for part in &gone {
            next.extend(self.copied(part)?);
        }
        if !gone.is_empty() {
            // What the new map names is on stable media before the map is (C2).
            self.device.flush().map_err(copy_failed)?;
            tables.replace_extents(op.ino, &window, &merged(next))?;
            self.release_blocks(tables, &gone)?;
        }
        self.map_after(tables, op.ino, range.start, range.end)
    }

    /// New blocks with what the old ones hold.
    fn copied(&mut self, part: &Extent) -> Result<Vec<Extent>, OpError> {
        let runs = self.alloc.take(None, part.blocks);
        let runs = runs.ok_or_else(|| errno(libc::ENOSPC, "the volume is full: no space for a copy"))?;
        let mut new = Vec::with_capacity(runs.len());
        let (mut file, mut old) = (part.file, part.lun);
        for run in runs {
            let len = usize::try_from(run.blocks * BLOCK_BYTES).expect("a copy is of few blocks");
            let mut bytes = vec![0; len];
            self.device.read_at(old * BLOCK_BYTES, &mut bytes).map_err(copy_failed)?;
            self.device.write_at(run.start * BLOCK_BYTES, &bytes).map_err(copy_failed)?;
            new.push(Extent { file, blocks: run.blocks, lun: run.start, state: State::Data });
            (file, old) = (file + run.blocks, old + run.blocks);
        }
        Ok(new)
    }

    /// An older program would free blocks that others have.
    pub(super) fn announce_clones(&mut self) -> Result<(), StoreError> {
        if self.incompat & INCOMPAT_CLONES == 0 {
            volume::add_incompat(self.device.as_ref(), INCOMPAT_CLONES).map_err(|error| {
                StoreError::Superseded { how: format!("no feature bit written: {error}") }
            })?;
            self.incompat |= INCOMPAT_CLONES;
            self.hold_back();
        }
        Ok(())
    }
}

pub(super) fn blocks_of(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.blocks).sum()
}

/// The blocks of a clone, checked to be whole and not to overlap within one file.
fn checked_clone(op: &CloneRange) -> Result<Ask, OpError> {
    let numbers = [op.offset, op.to_offset, op.length];
    if !numbers.iter().all(|n| n.is_multiple_of(BLOCK_BYTES)) || op.length == 0 {
        return Err(errno(libc::EINVAL, "a clone is of whole blocks"));
    }
    let from = block_range(op.offset, op.length)?;
    let to = block_range(op.to_offset, op.length)?;
    if op.ino == op.to_ino && from.start < to.end && to.start < from.end {
        return Err(errno(libc::EINVAL, "a range cannot be cloned onto itself"));
    }
    Ok(Ask { from, to: to.start })
}

/// What one step takes of the source, and where it ends: bounded by the extents on both sides.
fn step_of(tables: &Tables<'_>, op: &CloneRange, ask: &Ask) -> Result<(Vec<Extent>, u64), StoreError> {
    let source = tables.extents(op.ino, ask.from.start, ask.from.end, STEP_EXTENTS + 1)?;
    let mut end = if source.len() > STEP_EXTENTS { source[STEP_EXTENTS].file } else { ask.from.end };
    let target = tables.extents(op.to_ino, ask.to, ask.target(ask.from.end), STEP_EXTENTS + 1)?;
    if target.len() > STEP_EXTENTS {
        end = end.min(ask.from.start + (target[STEP_EXTENTS].file - ask.to));
    }
    let range = ask.from.start..end;
    let has_data = |part: &Extent| part.state != State::Fresh;
    Ok((source.iter().filter_map(|extent| extent.part(&range)).filter(has_data).collect(), end))
}

fn copy_failed(error: IoError) -> OpError {
    errno(libc::EIO, format!("a shared block cannot be copied: {error}"))
}
