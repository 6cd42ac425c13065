//! Blocks of files: allocation, commits of what was written, maps, size.
//!
//! ```text
//!   hole --Allocate--> Fresh (durable before the client learns it, C1) --Commit after its flush--> Data (C2)
//!    |   '------------- placed by the client from its pool, told by a Commit after its flush ------>  |
//!    ^                   |                                                                          |
//!    +---- trim, truncate, unlink: reusable after the transaction (C7) <----------------------------+
//! ```
//! What files share is in [`super::clones`].
//! **Invariant:** a commit is one atomic snapshot of ranges, size and times (C4).

use std::ops::Range;

use lockmgr::{ClientId, Mode};

use super::clones::blocks_of;
use super::core::{Core, Work};
use crate::extents::{Extent, Run, State, fill, holes, merged, without, written};
use crate::format::layout::BLOCK_BYTES;
use crate::meta::{InodeRecord, StoreError, Tables};
use crate::namespace::existing;
use crate::proto::{self as pb, Allocate, ByteRange, Commit, Done, ExtentState, GetMap, Map, Merge, reply};
use crate::refusal::{OpError, errno};

/// Largest file: what an offset of POSIX can name.
const FILE_BYTES_MAX: u64 = i64::MAX as u64 - (BLOCK_BYTES - 1);
/// Most extents of a reply.
const MAP_EXTENTS_MAX: usize = 2048;
/// Room ahead is given while at least this many times as much stays free.
const AHEAD_PART: u64 = 8;

impl Core {
    pub(super) fn get_map(tables: &Tables<'_>, op: &GetMap) -> Result<reply::Result, OpError> {
        regular(tables, op.ino)?;
        let wanted = usize::try_from(op.max_extents).unwrap_or(MAP_EXTENTS_MAX);
        let max = if wanted == 0 { MAP_EXTENTS_MAX } else { wanted.min(MAP_EXTENTS_MAX) };
        let extents = tables.extents(op.ino, op.offset / BLOCK_BYTES, u64::MAX, max + 1)?;
        let mut extents = as_shared_now(tables, extents, max + 1)?;
        let end = extents.len() <= max;
        extents.truncate(max);
        Ok(map(&extents, end))
    }

    pub(super) fn allocate(
        &mut self,
        tables: &mut Tables<'_>,
        work: &Work,
        op: &Allocate,
    ) -> Result<reply::Result, OpError> {
        self.writing_grant(work.client, op.ino)?;
        let mut inode = regular(tables, op.ino)?;
        let need = block_range(op.offset, op.need)?;
        let want = need.start..block_range(op.offset, op.want.max(op.need)).map_or(need.end, |r| r.end);
        let window =
            tables.extents(op.ino, need.start.saturating_sub(1), want.end.saturating_add(1), usize::MAX)?;
        let needed = holes(&window, need.clone());
        let needed_blocks = count(&needed);
        if needed_blocks > 0 {
            self.room_for_metadata()?;
            self.check_room(work, None, needed_blocks)?;
            let ahead = self.ahead(&window, need.end..want.end, needed_blocks);
            let gaps = joined(needed, ahead);
            let runs = self.take_blocks(&window, &gaps)?;
            let filled = fill(&window, &gaps, &runs);
            tables.replace_extents(op.ino, &window, &filled)?;
            inode.blocks += count(&gaps);
            tables.put_inode(op.ino, &inode)?;
        }
        self.map_after(tables, op.ino, need.start, want.end)
    }

    /// The map from `from` on, as far as was asked for.
    pub(super) fn map_after(
        &self,
        tables: &Tables<'_>,
        ino: u64,
        from: u64,
        to: u64,
    ) -> Result<reply::Result, OpError> {
        let extents = tables.extents(ino, from, to, MAP_EXTENTS_MAX + 1)?;
        let mut extents = as_shared_now(tables, extents, MAP_EXTENTS_MAX + 1)?;
        let cut = extents.len() > MAP_EXTENTS_MAX;
        extents.truncate(MAP_EXTENTS_MAX);
        let last = extents.last().map_or(from, Extent::end);
        let end = !cut && tables.extents(ino, last, u64::MAX, 1)?.is_empty();
        Ok(map(&extents, end))
    }

    /// Holes beyond the need that are filled too, so that growth asks rarely; none when space is short.
    fn ahead(&self, window: &[Extent], beyond: Range<u64>, needed: u64) -> Vec<Range<u64>> {
        let more = if beyond.is_empty() { Vec::new() } else { holes(window, beyond) };
        let left = self.alloc.available() - needed;
        let room = count(&more).checked_mul(AHEAD_PART).is_some_and(|blocks| blocks <= left);
        if room { more } else { Vec::new() }
    }

    fn take_blocks(&mut self, window: &[Extent], gaps: &[Range<u64>]) -> Result<Vec<Run>, OpError> {
        let first = gaps.first().map_or(0, |gap| gap.start);
        let before = window.iter().rev().find(|e| e.end() <= first);
        let goal = before.map(|e| e.lun + e.blocks + (first - e.end()));
        self.alloc.take(goal, count(gaps)).ok_or_else(|| errno(libc::ENOSPC, "the volume is full"))
    }

    pub(super) fn commit(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        op: &Commit,
    ) -> Result<reply::Result, OpError> {
        let grant = self.writing_grant(client, op.ino)?;
        if grant != Mode::Exclusive && !op.placed.is_empty() {
            return Err(errno(libc::EINVAL, "only who is alone with a file may place blocks in it"));
        }
        self.apply_commit(tables, client, op, grant == Mode::Exclusive)
    }

    /// The records of a client's log, as commits: one step (C4).
    pub(super) fn merge(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        op: &Merge,
    ) -> Result<reply::Result, OpError> {
        if self.pools.of(client).is_none() {
            return Err(errno(libc::EINVAL, format!("client {client} has no intent log")));
        }
        for commit in &op.commits {
            self.commit(tables, client, commit)?;
        }
        self.pools.merged(tables, client, op.lsn)?;
        Ok(reply::Result::Done(Done {}))
    }

    /// Does what a commit says. `alone`: nobody else writes to the file.
    pub(super) fn apply_commit(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        op: &Commit,
        alone: bool,
    ) -> Result<reply::Result, OpError> {
        let mut inode = regular(tables, op.ino)?;
        let ranges = checked_ranges(tables, op.ino, &op.written)?;
        let placed = self.checked_placed(tables, client, op)?;
        if op.size_bytes.is_some_and(|size| size > FILE_BYTES_MAX) {
            return Err(errno(libc::EFBIG, "a file cannot be as large"));
        }
        for range in &ranges {
            mark_written(tables, op.ino, range)?;
        }
        for extent in placed {
            let replaced = self.place(tables, client, op.ino, extent)?;
            inode.blocks = inode.blocks.saturating_sub(replaced) + extent.blocks;
        }
        // Another writer may be using the blocks ahead; only who is alone may give them back.
        if let Some(from) = op.trim_from.filter(|_| alone) {
            self.trim(tables, op.ino, &mut inode, from)?;
        }
        inode.size_bytes = inode.size_bytes.max(op.size_bytes.unwrap_or(0));
        inode.mtime = op.mtime.unwrap_or(inode.mtime);
        inode.atime = op.atime.unwrap_or(inode.atime);
        if op.mtime.is_some() || op.size_bytes.is_some() {
            // When it was changed, not when this is told; but not in the future, where a program may have put the other time. A change
            // that brings no time was one of the same moment as the last that did.
            inode.ctime = inode.ctime.later(inode.mtime.earlier(self.wall));
        }
        tables.put_inode(op.ino, &inode)?;
        Ok(reply::Result::Attr(inode.attr(op.ino)))
    }

    /// What is placed, each checked to fill a hole, or to replace shared blocks, with blocks of the client's pool. What is
    /// there already is left out: a record that was merged may come again (D3).
    fn checked_placed(
        &self,
        tables: &Tables<'_>,
        client: ClientId,
        op: &Commit,
    ) -> Result<Vec<Extent>, OpError> {
        let mut placed: Vec<Extent> = Vec::with_capacity(op.placed.len());
        for extent in &op.placed {
            let extent = checked_extent(extent)?;
            let window = tables.extents(op.ino, extent.file, extent.end(), usize::MAX)?;
            if is_there(&window, &extent) {
                continue;
            }
            let run = Run { start: extent.lun, blocks: extent.blocks };
            let twice = placed.iter().any(|p| p.file < extent.end() && extent.file < p.end());
            let taken = window.iter().any(|there| there.state != State::Shared);
            if taken || twice || !self.pools.holds(client, run) {
                let (at, lun) = (extent.file, extent.lun);
                let what = format!(
                    "block {at} cannot be placed at {lun}: something is there, or it is not of the pool"
                );
                return Err(errno(libc::EINVAL, what));
            }
            placed.push(extent);
        }
        Ok(placed)
    }

    /// Puts an extent into the file; gives how many blocks it replaces.
    fn place(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        ino: u64,
        extent: Extent,
    ) -> Result<u64, OpError> {
        self.pools.cut(tables, client, Run { start: extent.lun, blocks: extent.blocks })?;
        let window = tables.extents(ino, extent.file.saturating_sub(1), extent.end() + 1, usize::MAX)?;
        let (mut next, gone) = without(&window, &(extent.file..extent.end()), |_| true);
        next.push(extent);
        tables.replace_extents(ino, &window, &merged(next))?;
        self.release_blocks(tables, &gone)?;
        Ok(blocks_of(&gone))
    }

    fn trim(
        &mut self,
        tables: &mut Tables<'_>,
        ino: u64,
        inode: &mut InodeRecord,
        from: u64,
    ) -> Result<(), OpError> {
        self.drop_blocks(tables, ino, inode, from.div_ceil(BLOCK_BYTES), |state| state == State::Fresh)
    }

    /// Changes the size; what lies beyond a smaller one is freed.
    pub(super) fn set_size(
        &mut self,
        tables: &mut Tables<'_>,
        ino: u64,
        inode: &mut InodeRecord,
        size: u64,
    ) -> Result<(), OpError> {
        if inode.is_dir() {
            return Err(errno(libc::EISDIR, "a directory has no size to set"));
        }
        if !inode.is_regular() {
            return Err(errno(libc::EINVAL, "only a regular file has a size to set"));
        }
        if size > FILE_BYTES_MAX {
            return Err(errno(libc::EFBIG, "a file cannot be as large"));
        }
        if size < inode.size_bytes {
            self.drop_blocks(tables, ino, inode, size.div_ceil(BLOCK_BYTES), |_| true)?;
        }
        inode.size_bytes = size;
        Ok(())
    }

    fn drop_blocks(
        &mut self,
        tables: &mut Tables<'_>,
        ino: u64,
        inode: &mut InodeRecord,
        from: u64,
        gone: impl Fn(State) -> bool,
    ) -> Result<(), OpError> {
        let window = tables.extents(ino, from.saturating_sub(1), u64::MAX, usize::MAX)?;
        let (kept, gone) = without(&window, &(from..u64::MAX), gone);
        tables.replace_extents(ino, &window, &kept)?;
        inode.blocks = inode.blocks.saturating_sub(blocks_of(&gone));
        Ok(self.release_blocks(tables, &gone)?)
    }
}

pub(super) fn regular(tables: &Tables<'_>, ino: u64) -> Result<InodeRecord, OpError> {
    let inode = existing(tables, ino)?;
    if inode.is_regular() { Ok(inode) } else { Err(errno(libc::EINVAL, "only a regular file has blocks")) }
}

/// The blocks that a range of bytes touches.
pub(super) fn block_range(offset: u64, len: u64) -> Result<Range<u64>, OpError> {
    let end = offset.checked_add(len).filter(|end| *end <= FILE_BYTES_MAX);
    let end = end.ok_or_else(|| errno(libc::EFBIG, "a file cannot be as large"))?;
    Ok(offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES))
}

fn count(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|r| r.end - r.start).sum()
}

/// Two lists of gaps, where the last of the first and the first of the second may be one.
fn joined(mut first: Vec<Range<u64>>, second: Vec<Range<u64>>) -> Vec<Range<u64>> {
    for gap in second {
        match first.last_mut() {
            Some(last) if last.end == gap.start => last.end = gap.end,
            _ => first.push(gap),
        }
    }
    first
}

/// The block ranges of a commit, each checked to be whole blocks that are allocated.
fn checked_ranges(tables: &Tables<'_>, ino: u64, ranges: &[ByteRange]) -> Result<Vec<Range<u64>>, OpError> {
    let check = |range: &ByteRange| {
        let whole = range.offset.is_multiple_of(BLOCK_BYTES) && range.length.is_multiple_of(BLOCK_BYTES);
        if !whole {
            return Err(errno(libc::EINVAL, "a commit names whole blocks"));
        }
        let blocks = block_range(range.offset, range.length)?;
        let window = tables.extents(ino, blocks.start, blocks.end, usize::MAX)?;
        match holes(&window, blocks.clone()).first() {
            Some(hole) => {
                let at = hole.start * BLOCK_BYTES;
                Err(errno(libc::EINVAL, format!("nothing is allocated at {at}: it cannot have been written")))
            }
            None => Ok(blocks),
        }
    };
    ranges.iter().filter(|range| range.length > 0).map(check).collect()
}

/// One placed extent, of whole blocks and in bounds.
fn checked_extent(extent: &pb::Extent) -> Result<Extent, OpError> {
    let numbers = [extent.file_offset, extent.length, extent.lun_offset];
    let whole = numbers.iter().all(|n| n.is_multiple_of(BLOCK_BYTES)) && extent.length > 0;
    if !whole || extent.lun_offset.checked_add(extent.length).is_none() {
        return Err(errno(libc::EINVAL, "what is placed is not of whole blocks"));
    }
    let blocks = block_range(extent.file_offset, extent.length)?;
    let lun = extent.lun_offset / BLOCK_BYTES;
    Ok(Extent { file: blocks.start, blocks: blocks.end - blocks.start, lun, state: State::Data })
}

fn is_there(window: &[Extent], extent: &Extent) -> bool {
    let range = extent.file..extent.end();
    window.iter().filter_map(|e| e.part(&range)).any(|part| part == *extent)
}

fn mark_written(tables: &mut Tables<'_>, ino: u64, range: &Range<u64>) -> Result<(), OpError> {
    let window = tables.extents(ino, range.start.saturating_sub(1), range.end + 1, usize::MAX)?;
    Ok(tables.replace_extents(ino, &window, &written(&window, range))?)
}

/// Extents that are marked as shared, told apart by what is shared still: the mark stays when the others have gone. Up to
/// `max` of them.
fn as_shared_now(tables: &Tables<'_>, extents: Vec<Extent>, max: usize) -> Result<Vec<Extent>, StoreError> {
    if extents.iter().all(|extent| extent.state != State::Shared) {
        return Ok(extents);
    }
    let mut told = Vec::with_capacity(extents.len());
    for extent in extents {
        if told.len() >= max {
            break;
        }
        if extent.state != State::Shared {
            told.push(extent);
            continue;
        }
        let mut at = extent.lun;
        for row in tables.shared_runs(&(at..extent.lun + extent.blocks), max)? {
            let (from, to) = (row.start.max(extent.lun), row.end().min(extent.lun + extent.blocks));
            if from < to {
                told.extend(lun_part(&extent, at, from, State::Data));
                told.extend(lun_part(&extent, from, to, State::Shared));
                at = to;
            }
        }
        // With more counts than fit, the rest is told as it is marked.
        let rest = if told.len() >= max { State::Shared } else { State::Data };
        told.extend(lun_part(&extent, at, extent.lun + extent.blocks, rest));
    }
    Ok(told)
}

/// The part of an extent that lies at `from..to` on the LUN.
fn lun_part(extent: &Extent, from: u64, to: u64, state: State) -> Option<Extent> {
    let file = extent.file + (from - extent.lun);
    (from < to).then_some(Extent { file, blocks: to - from, lun: from, state })
}

fn map(extents: &[Extent], end: bool) -> reply::Result {
    let extents = extents
        .iter()
        .map(|e| pb::Extent {
            file_offset: e.file * BLOCK_BYTES,
            length: e.blocks * BLOCK_BYTES,
            lun_offset: e.lun * BLOCK_BYTES,
            state: match e.state {
                State::Data => ExtentState::Data.into(),
                State::Fresh => ExtentState::Fresh.into(),
                State::Shared => ExtentState::Shared.into(),
            },
        })
        .collect();
    reply::Result::Map(Map { extents, end })
}
