//! Clones: a range of one file becomes one of another, and both share its blocks until either is written.
//!
//! ```text
//!   hold both files alone, lower inode first -> settle both -> Clone, step by step -> maps: shared here, forgotten there
//! ```
//! While both are held nothing of theirs is in flight anywhere, so the clone is the source at one moment: what had been
//! acknowledged before is in it, on whichever node it was written.
//!
//! **Invariant:** files are held in the order of their inodes, so clones that cross never wait for each other.

use std::ops::Range;
use std::sync::{Arc, mpsc};

use blockio::IoBuf;
use lockmgr::Mode;
use pb::request::Op;

use super::grants::Seq;
use super::hold::Hold;
use super::inode::{Holding, Inode};
use super::io::{DataOp, What};
use super::map::{BLOCK_BYTES, SIZE_BYTES_MAX, block_ceil, block_floor};
use super::names::unexpected;
use super::{Attr, Creation, File, FsError, Node};
use crate::proto as pb;

/// Most that one call clones: callers of the kernel hear of 32 bits.
const CLONE_BYTES_MAX: u64 = (1 << 32) - BLOCK_BYTES;
/// Most that one call copies.
const COPY_BYTES_MAX: u64 = 1 << 20;

/// A range of one file, and where it goes in another.
#[derive(Clone, Copy, Debug)]
struct Span {
    from: u64,
    to: u64,
    len: u64,
}

impl File {
    /// Makes `len` bytes at `to_offset` of `to` the same as those at `offset` here, without copying them. Offsets are of
    /// whole blocks, and so is the length, unless it reaches the end of this file and the other does not go on behind it.
    /// Gives how many bytes there were to clone.
    ///
    /// # Errors
    /// `EINVAL` for other ranges, `ENOSPC` when there is no room for the metadata, and when the coordinator refuses.
    pub fn clone_range(&self, to: &Self, offset: u64, to_offset: u64, len: u64) -> Result<u64, FsError> {
        let (source, target) = (self.inode(), to.inode());
        let _holds = hold_both(source, target)?;
        let span = checked(source, target, Span { from: offset, to: to_offset, len })?;
        source.clone_held(target, span)
    }

    /// What `copy_file_range` does: shares blocks where both offsets lie alike in their blocks, and copies the rest. Gives
    /// how many bytes were done; 0 at the end of this file.
    ///
    /// # Errors
    /// As for reads and writes of these ranges.
    pub fn copy_range(&self, to: &Self, offset: u64, to_offset: u64, len: u64) -> Result<u64, FsError> {
        let into_block = offset % BLOCK_BYTES;
        if to_offset % BLOCK_BYTES != into_block {
            return self.copy_bytes(to, offset, to_offset, len);
        }
        if into_block != 0 {
            return self.copy_bytes(to, offset, to_offset, len.min(BLOCK_BYTES - into_block));
        }
        let (source, target) = (self.inode(), to.inode());
        let holds = hold_both(source, target)?;
        let size = source.lock().size();
        let there = len.min(size.saturating_sub(offset)).min(CLONE_BYTES_MAX);
        let whole = offset + there == size && to_offset + there >= target.lock().size();
        let len = if whole { there } else { block_floor(there) };
        if len == 0 {
            drop(holds);
            return self.copy_bytes(to, offset, to_offset, there);
        }
        let span = checked(source, target, Span { from: offset, to: to_offset, len })?;
        source.clone_held(target, span)
    }

    fn copy_bytes(&self, to: &Self, offset: u64, to_offset: u64, len: u64) -> Result<u64, FsError> {
        let len = usize::try_from(len.min(COPY_BYTES_MAX)).unwrap_or_default();
        let buf = IoBuf::zeroed(len);
        let read = run(self.inode(), What::Read, offset, buf.clone())?;
        let got = usize::try_from(read).unwrap_or_default();
        if got == 0 {
            return Ok(0);
        }
        run(to.inode(), What::Write, to_offset, buf.slice(0..got))
    }
}

impl Node {
    /// Makes `path`, walked from the root, a clone of `file`: same owner, same permissions.
    ///
    /// # Errors
    /// As [`Node::clone_file`], and those of the lookups.
    pub fn clone_as(self: &Arc<Self>, file: &File, path: &str) -> Result<Attr, FsError> {
        let path = path.trim_end_matches('/');
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = self.resolve(folder)?.ino;
        let Attr { mode, uid, gid, .. } = file.attr()?;
        self.clone_file(file, parent, name.as_bytes(), &Creation { mode, umask: 0, uid, gid })
    }

    /// Makes a new file `name` that is the same as `file` at one moment and shares its blocks. It has a name only when it is
    /// whole, so nobody ever sees a part of it.
    ///
    /// # Errors
    /// `EEXIST`, `ENOSPC`, and when the coordinator refuses.
    pub fn clone_file(
        self: &Arc<Self>,
        file: &File,
        parent: u64,
        name: &[u8],
        creation: &Creation,
    ) -> Result<Attr, FsError> {
        // Before the work: whether the name is free is decided by the link.
        match self.lookup(parent, name) {
            Err(error) if error.errno() == libc::ENOENT => {}
            Ok(_) => return Err(FsError::invalid(libc::EEXIST, "the name exists already")),
            Err(error) => return Err(error),
        }
        let (_, clone) = self.create_unnamed(parent, creation, true)?;
        file.clone_range(&clone, 0, 0, SIZE_BYTES_MAX - BLOCK_BYTES)?;
        clone.settle()?;
        self.link(clone.ino(), parent, name)
    }
}

/// Has both files alone.
fn hold_both<'a>(
    source: &'a Arc<Inode>,
    target: &'a Arc<Inode>,
) -> Result<(Hold<'a>, Option<Hold<'a>>), FsError> {
    if !Arc::ptr_eq(&source.core, &target.core) {
        return Err(FsError::invalid(libc::EXDEV, "the files are of different volumes"));
    }
    if let Some(why) = source.core.stopped() {
        return Err(why);
    }
    let (first, second) = if source.ino <= target.ino { (source, target) } else { (target, source) };
    let held = first.hold(Mode::Exclusive, Holding::Alone)?;
    let other =
        if first.ino == second.ino { None } else { Some(second.hold(Mode::Exclusive, Holding::Alone)?) };
    Ok((held, other))
}

/// The range as far as the source has it, if it may be cloned. Both files are held.
fn checked(source: &Inode, target: &Inode, span: Span) -> Result<Span, FsError> {
    let size = source.lock().size();
    let to_size = target.lock().size();
    let len = span.len.min(size.saturating_sub(span.from));
    let whole = |n: u64| n.is_multiple_of(BLOCK_BYTES);
    let ends_well = whole(len) || (span.from + len == size && span.to.saturating_add(len) >= to_size);
    if !whole(span.from) || !whole(span.to) || !ends_well {
        return Err(FsError::invalid(libc::EINVAL, "a clone is of whole blocks, or goes to the end"));
    }
    if span.to.checked_add(len).is_none_or(|end| end > SIZE_BYTES_MAX) {
        return Err(FsError::invalid(libc::EFBIG, "a file cannot be that large"));
    }
    if source.ino == target.ino && span.from < span.to + len && span.to < span.from + len {
        return Err(FsError::invalid(libc::EINVAL, "a range cannot be cloned onto itself"));
    }
    Ok(Span { len, ..span })
}

impl Inode {
    /// Clones while both files are held alone.
    fn clone_held(self: &Arc<Self>, target: &Arc<Self>, span: Span) -> Result<u64, FsError> {
        if span.len == 0 {
            return Ok(0);
        }
        self.settle()?;
        target.settle()?;
        let length = block_ceil(span.len);
        let mut done = 0;
        while done < length {
            let (from, to) = (span.from + done, span.to + done);
            let asked_at = self.core.names_now();
            let step = self.clone_step(target.ino, (from, to, length - done), span.to + span.len);
            // Also when the outcome is not known: nothing is written in place, and the map is asked for again.
            self.lock().map.share(from..span.from + length);
            target.forget_map(to..span.to + length);
            let (step, fresh, at) = step?;
            target.grew_by_clone(fresh, (to + step).min(span.to + span.len), (asked_at, at));
            done += step;
        }
        Ok(span.len)
    }

    fn clone_step(
        &self,
        to_ino: u64,
        (offset, to_offset, length): (u64, u64, u64),
        size_bytes: u64,
    ) -> Result<(u64, Attr, Seq), FsError> {
        let op = pb::Clone { ino: self.ino, offset, to_ino, to_offset, length, size_bytes };
        let answered = self.core.session.call_blocking(Op::Clone(op))?;
        let stamp = answered.stamp();
        match answered.result {
            pb::reply::Result::Cloned(pb::Cloned { length: step, attr: Some(attr) })
                if step > 0 && step <= length && step.is_multiple_of(BLOCK_BYTES) =>
            {
                Ok((step, Attr::checked(&attr)?, stamp))
            }
            other => Err(unexpected("Clone", &other)),
        }
    }

    /// What lies in `range` may have been replaced.
    fn forget_map(&self, range: Range<u64>) {
        let mut state = self.lock();
        state.let_go(&self.core, range.start..range.end.min(state.map.end()).max(range.start));
        state.map.forget(range);
    }

    fn grew_by_clone(&self, fresh: Attr, end: u64, (asked_at, at): (u64, Seq)) {
        let mut state = self.lock();
        if let Some(own) = &mut state.attr {
            own.size_bytes = own.size_bytes.max(end);
        }
        state.touched_there(&fresh);
        state.merge_attr(fresh, asked_at, at);
    }
}

/// One read or write, waited for.
fn run(inode: &Arc<Inode>, what: What, offset: u64, buf: IoBuf) -> Result<u64, FsError> {
    let (tell, told) = mpsc::sync_channel(1);
    let done = Box::new(move |outcome: Result<u64, FsError>| drop(tell.send(outcome)));
    inode.submit(DataOp { what, offset, buf, exact: false, page: false, done });
    told.recv().unwrap_or(Err(FsError::Detached))
}
