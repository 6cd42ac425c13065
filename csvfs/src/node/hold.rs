//! Calls that need a file to stand still under a grant while they wait for the coordinator or the LUN: attributes, size,
//! space, holes. They run on the caller's thread.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

use blockio::{IoBuf, IoOp};
use lockmgr::Mode;
use pb::request::Op;

use super::grants::Seq;
use super::inode::{Holding, Inode, State, Waiter};
use super::io::CopyRun;
use super::map::{BLOCK_BYTES, FILE_BYTES_MAX, Place, SIZE_BYTES_MAX, block_ceil, block_floor, end_of};
use super::space::EXTENTS_MAX;
use super::{Attr, Extent, FsError, SeekFrom, SetAttr, names};
use crate::proto as pb;

/// A grant that stays until this is dropped.
pub(super) struct Hold<'a> {
    inode: &'a Arc<Inode>,
    alone: bool,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.inode.leave(self.alone);
    }
}

impl Inode {
    /// Waits for a grant of `mode` and keeps it.
    pub(super) fn hold(self: &Arc<Self>, mode: Mode, how: Holding) -> Result<Hold<'_>, FsError> {
        let alone = how != Holding::Shared;
        let mut state = self.lock();
        if state.admits_hold(mode, how) {
            state.in_flight += 1;
            state.frozen = alone;
        } else {
            let (tell, told) = mpsc::sync_channel(1);
            state.waiting.push_back(Waiter::Hold { mode, how, tell });
            drop(state);
            self.kick();
            told.recv().unwrap_or(Err(FsError::Detached))?;
        }
        Ok(Hold { inode: self, alone })
    }

    /// Attributes now; without a message if a grant is held and no link count can have changed.
    pub(super) fn attr(self: &Arc<Self>) -> Result<Attr, FsError> {
        if let Some(attr) = self.cached_attr(&mut self.lock()) {
            return Ok(attr);
        }
        let _hold = self.hold(Mode::ProtectedRead, Holding::Shared)?;
        if let Some(attr) = self.cached_attr(&mut self.lock()) {
            return Ok(attr);
        }
        let asked_at = self.core.names_now();
        let (fresh, at) = self.ask_attr(Op::GetAttr(pb::GetAttr { ino: self.ino, cache: false }))?;
        let mut state = self.lock();
        state.merge_attr(fresh, asked_at, at);
        let told = state.attr_to_tell().unwrap_or(fresh);
        let outdated = state.promise.is_outdated();
        drop(state);
        if outdated {
            self.kick();
        }
        Ok(told)
    }

    /// Size in bytes now.
    pub(super) fn size_now(self: &Arc<Self>) -> Result<u64, FsError> {
        let state = self.lock();
        if state.grant.permits(Mode::ProtectedRead) {
            return Ok(state.size());
        }
        drop(state);
        let _hold = self.hold(Mode::ProtectedRead, Holding::Shared)?;
        Ok(self.lock().size())
    }

    /// Attributes, if they are known here without a message.
    pub(super) fn attr_at_hand(&self) -> Option<Attr> {
        let mut state = self.lock();
        state.used = true;
        self.cached_attr(&mut state)
    }

    pub(super) fn cached_attr(&self, state: &mut State) -> Option<Attr> {
        let unknown = self.core.unknown_changes.load(Ordering::Acquire) > 0;
        let valid = state.grant.permits(Mode::ProtectedRead)
            && state.changing == 0
            && !unknown
            && self.core.may_tell()
            && state.attr_asked_at >= self.core.names_now();
        state.attr_to_tell().filter(|_| valid)
    }

    /// What an answer at `stamp` said, with what only this node knows yet; nothing if this node has given up writing since,
    /// or is about to.
    pub(super) fn with_local_changes(&self, attr: Attr, stamp: Seq) -> Option<Attr> {
        let mut state = self.lock();
        match state.attr_to_tell() {
            Some(own) if state.grant.mode == Mode::Exclusive => Some(own.over(attr)),
            _ => {
                let leaving = state.grant.release.is_some_and(|release| release.from == Mode::Exclusive);
                (!leaving && self.core.memory.written_up_to(self.ino) <= stamp).then_some(attr)
            }
        }
    }

    /// Attributes, and the answer's place among others.
    pub(super) fn ask_attr(&self, op: Op) -> Result<(Attr, Seq), FsError> {
        let answered = self.core.ask(op)?;
        let stamp = answered.stamp();
        match answered.result {
            pb::reply::Result::Attr(attr) => Ok((Attr::checked(&attr)?, stamp)),
            other => Err(names::unexpected("a request for attributes", &other)),
        }
    }

    /// Changes attributes.
    pub(super) fn set_attr(self: &Arc<Self>, set: &SetAttr) -> Result<Attr, FsError> {
        // The times that come with a new size are a part of it.
        let how = if set.size_bytes.is_some() { Holding::ForSize } else { Holding::Shared };
        let told = set.size_bytes.map(|size| self.set_size(size)).transpose()?.flatten();
        let set = SetAttr { size_bytes: None, ..*set };
        if set == SetAttr::default() {
            return told.map_or_else(|| self.attr(), Ok);
        }
        let _changing = self.core.changing([self.ino], false);
        if self.lock().grant.mode != Mode::Exclusive {
            // Nothing is buffered here.
            return self.ask_set_attr(&set);
        }
        let _hold = self.hold(Mode::Exclusive, how)?;
        // A record that is merged later must not undo what is set now.
        self.merge_blocking()?;
        if set.mtime.is_some() {
            // What the caller sets counts, not when something was written before.
            self.lock().pending.mtime = false;
        }
        self.ask_set_attr(&set)
    }

    fn ask_set_attr(&self, set: &SetAttr) -> Result<Attr, FsError> {
        let asked_at = self.core.names_now();
        let (fresh, at) = self.ask_attr(Op::SetAttr(names::set_attr_request(self.ino, set)))?;
        let mut state = self.lock();
        match (state.grant.mode, &mut state.attr) {
            // Others change the file as they like, and nobody tells.
            (Mode::Null, _) => return Ok(fresh),
            (Mode::Exclusive, Some(own)) => {
                own.mtime = set.mtime.unwrap_or(own.mtime);
                own.size_bytes = set.size_bytes.unwrap_or(own.size_bytes);
            }
            _ => {}
        }
        state.merge_attr(fresh, asked_at, at);
        Ok(state.attr_to_tell().unwrap_or(fresh))
    }

    /// Changes the size: grows here and is committed later, or shrinks at the coordinator. Gives the attributes after that, unless
    /// links may have changed: to ask for them may have to wait for the kernel, which waits for this.
    pub(super) fn set_size(self: &Arc<Self>, size: u64) -> Result<Option<Attr>, FsError> {
        if size > SIZE_BYTES_MAX {
            return Err(FsError::invalid(libc::EFBIG, "a file cannot be that large"));
        }
        if let Some(why) = self.core.stopped() {
            return Err(why);
        }
        let _hold = self.hold(Mode::Exclusive, Holding::ForSize)?;
        let mut state = self.lock();
        if size >= state.size() {
            if size > state.size() {
                state.set_size(size);
            }
            state.touched(&self.core.times);
            return Ok(self.told_after(&mut state));
        }
        drop(state);
        // The coordinator cuts off what it knows of.
        self.settle()?;
        self.zero_tail(size)?;
        let set =
            SetAttr { size_bytes: Some(size), mtime: Some(self.core.times.now()), ..SetAttr::default() };
        self.lock().pending.mtime = false;
        self.ask_set_attr(&set)?;
        let mut state = self.lock();
        state.let_go(&self.core, block_ceil(size)..state.map.end().max(block_ceil(size)));
        state.map.cut(block_ceil(size));
        state.pending.written.cut(block_ceil(size));
        Ok(self.told_after(&mut state))
    }

    /// Attributes after a change, under the grant that it was made under.
    fn told_after(&self, state: &mut State) -> Option<Attr> {
        let known = state.changing == 0 && state.attr_asked_at >= self.core.names_now();
        state.attr_to_tell().filter(|_| known)
    }

    /// Brings all that only this node, or its log, knows of the file to the coordinator. Alone with the file.
    pub(super) fn settle(self: &Arc<Self>) -> Result<(), FsError> {
        let mut state = self.lock();
        state.give_up_ahead(&self.core);
        let unsaved = state.pending.size || !state.pending.written.is_empty();
        drop(state);
        if unsaved {
            self.sync_blocking()?;
        }
        self.merge_blocking()
    }

    /// Waits until the coordinator has what the log says of the file.
    pub(super) fn merge_blocking(self: &Arc<Self>) -> Result<(), FsError> {
        let logged = self.lock().logged;
        if self.core.log.is_merged(logged) {
            return Ok(());
        }
        let (tell, told) = mpsc::sync_channel(1);
        self.core.when_merged(logged, Box::new(move |outcome| drop(tell.send(outcome))));
        told.recv().unwrap_or(Err(FsError::Detached))
    }

    fn sync_blocking(self: &Arc<Self>) -> Result<(), FsError> {
        let (tell, told) = mpsc::sync_channel(1);
        self.sync(false, Box::new(move |outcome| drop(tell.send(outcome))));
        told.recv().unwrap_or(Err(FsError::Detached))
    }

    /// Zeros what follows `size` in its block, so that a file that grows again shows zeros there.
    fn zero_tail(self: &Arc<Self>, size: u64) -> Result<(), FsError> {
        if size.is_multiple_of(BLOCK_BYTES) {
            return Ok(());
        }
        let block = block_floor(size);
        let (from, lun) = match self.place(block)? {
            Place::Data(lun) => (lun, lun),
            Place::Shared(lun) => match self.block_of_pool() {
                Err(_) if !self.core.space.may_come() => {
                    let own = self.unshare_blocking(block)?;
                    (own, own)
                }
                new => (lun, new?),
            },
            _ => return Ok(()),
        };
        let device = &*self.core.device;
        let buf = IoBuf::zeroed(usize::try_from(BLOCK_BYTES).unwrap_or_default());
        device.run(IoOp::Read { offset: from, buf: buf.clone() })?;
        let keep = usize::try_from(size - block).unwrap_or_default();
        buf.slice(keep..buf.len()).fill_zero();
        let change = self.core.cache.begin_change(lun, BLOCK_BYTES);
        let written = device.run(IoOp::Write { offset: lun, buf, fua: false });
        self.core.cache.end_change(&change);
        written?;
        if from != lun {
            self.lock().took_copies(&self.core, &[CopyRun { file: block, len: BLOCK_BYTES, lun }]);
            return self.settle();
        }
        let (tell, told) = mpsc::sync_channel(1);
        self.core.flush(Box::new(move |outcome| drop(tell.send(outcome))));
        told.recv().unwrap_or(Err(FsError::Detached))
    }

    /// A free block of this client's pool, waiting for one.
    fn block_of_pool(&self) -> Result<u64, FsError> {
        loop {
            if let Some((lun, _)) =
                self.core.space.take(None, BLOCK_BYTES, BLOCK_BYTES).and_then(|r| r.first().copied())
            {
                return Ok(lun);
            }
            let (tell, told) = mpsc::sync_channel(1);
            self.core.want_space(BLOCK_BYTES, Box::new(move |outcome| drop(tell.send(outcome))));
            told.recv().unwrap_or(Err(FsError::Detached))?;
        }
    }

    /// Has the coordinator copy a shared block: gives where it lies then.
    fn unshare_blocking(&self, block: u64) -> Result<u64, FsError> {
        let op = pb::Unshare { ino: self.ino, offset: block, length: BLOCK_BYTES };
        let answer = self.core.session.call_blocking(Op::Unshare(op)).map(|answered| answered.result);
        self.learn_copies(&mut self.lock(), block, answer)?;
        match self.place(block)? {
            Place::Data(lun) => Ok(lun),
            _ => Err(FsError::Protocol(format!("block {block} of inode {} was copied nowhere", self.ino))),
        }
    }

    /// Where a block is, asking if it is not known. Under a hold.
    fn place(&self, at: u64) -> Result<Place, FsError> {
        let place = self.lock().map.part(at, at + BLOCK_BYTES).place;
        if place != Place::Unknown {
            return Ok(place);
        }
        self.learn_from(at)?;
        Ok(self.lock().map.part(at, at + BLOCK_BYTES).place)
    }

    /// Asks for the map from `at` on; gives the end of what is known then.
    fn learn_from(&self, at: u64) -> Result<u64, FsError> {
        let op = Op::GetMap(pb::GetMap { ino: self.ino, offset: at, max_extents: EXTENTS_MAX });
        let answer = self.core.session.call_blocking(op).map(|answered| answered.result);
        self.learn(&mut self.lock(), at, answer)
    }

    /// Allocates `offset..offset + len`.
    pub(super) fn allocate_range(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        keep_size: bool,
    ) -> Result<(), FsError> {
        let blocks = block_floor(offset)..block_ceil(end_of(offset, len)?);
        // Alone, so that no write places blocks where the coordinator is asked to.
        let _hold = self.hold(Mode::Exclusive, Holding::Alone)?;
        let mut state = self.lock();
        // Space that only this node knows of would be lost with it.
        if !state.map.has_space(blocks.clone()) || !state.own.parts_in(&blocks).is_empty() {
            drop(state);
            self.ask_for_space(blocks.clone())?;
            state = self.lock();
        }
        state.growth.keep(blocks.end);
        if !keep_size && offset + len > state.size() {
            state.set_size(offset + len);
            state.touched(&self.core.times);
        }
        Ok(())
    }

    fn ask_for_space(self: &Arc<Self>, blocks: Range<u64>) -> Result<(), FsError> {
        self.settle()?;
        let mut at = blocks.start;
        while at < blocks.end {
            let need = blocks.end - at;
            let op = Op::Allocate(pb::Allocate { ino: self.ino, offset: at, need, want: need });
            let answer = self.core.session.call_blocking(op).map(|answered| answered.result);
            at = self.learn(&mut self.lock(), at, answer)?;
        }
        Ok(())
    }

    /// `SEEK_DATA` and `SEEK_HOLE`. What a program may have stored in a mapping is data, also where the file has no space yet.
    pub(super) fn seek(self: &Arc<Self>, from: SeekFrom) -> Result<u64, FsError> {
        let (SeekFrom::Hole(start) | SeekFrom::Data(start)) = from;
        let want_data = matches!(from, SeekFrom::Data(_));
        let _hold = self.hold(Mode::ProtectedRead, Holding::Shared)?;
        let nothing = || FsError::invalid(libc::ENXIO, "nothing there before the end of the file");
        let mut at = start;
        loop {
            let state = self.lock();
            let size = state.size();
            if at >= size {
                return if want_data || start >= size { Err(nothing()) } else { Ok(size) };
            }
            let part = state.map.part(at, size);
            let end = part.start + part.len;
            let stored = state.pages.changed_in(at..end);
            drop(state);
            match part.place {
                Place::Unknown => drop(self.learn_from(at)?),
                Place::Data(_) | Place::Shared(_) if want_data => return Ok(at),
                Place::Data(_) | Place::Shared(_) => at = end,
                Place::Hole | Place::Fresh(_) => match stored {
                    Some(stored) if want_data => return Ok(stored.start),
                    Some(stored) if stored.start == at => at = stored.end,
                    None if want_data => at = end,
                    _ => return Ok(at),
                },
            }
        }
    }

    /// All extents.
    pub(super) fn extents(self: &Arc<Self>) -> Result<Vec<Extent>, FsError> {
        let _hold = self.hold(Mode::ProtectedRead, Holding::Shared)?;
        let mut at = 0;
        while at < FILE_BYTES_MAX {
            let part = self.lock().map.part(at, FILE_BYTES_MAX);
            at = if part.place == Place::Unknown { self.learn_from(at)? } else { part.start + part.len };
        }
        Ok(self.lock().map.extents().collect())
    }
}
