//! Making things durable: flush of the LUN, commit to the coordinator, and the release that carries a commit.
//!
//! ```text
//!   fsync    -> snapshot of what is pending -> flush -> Commit ------------------> done
//!   recall   -> drained -> snapshot ---------> flush -> ReleaseGrant { Commit } -> lowered
//! ```
//! The snapshot is taken before the flush and holds only completed writes, so what a commit names is on stable media
//! when it is sent (C2), and it is one message (C4). Callers that come while a round is under way share the next one.
//!
//! A client with a log writes the snapshot there, and tells the coordinator later: an fsync of new blocks needs no message.
//! A file without a byte has nothing to flush: that it is there was durable when it was made.
//!
//! **Invariant:** an fsync is acknowledged when both the data and what is needed to find it are durable (C5); after a
//! failed flush nothing is (D6).

use std::ops::Range;
use std::sync::Arc;

use lockmgr::Mode;
use pb::request::Op;

use super::advance::Out;
use super::core::Core;
use super::grants::Seq;
use super::inode::{Inode, State};
use super::log::APPEND_ENTRIES_MAX;
use super::map::Place;
use super::names::unexpected;
use super::ranges::RangeSet;
use super::session::Answered;
use super::{Attr, FsError};
use crate::proto as pb;

/// Ranges in one commit; more are sent in several, the size with the last.
const COMMIT_RANGES_MAX: usize = 32_768;

/// Called when what was asked for is durable.
pub(super) type FlushDone = Box<dyn FnOnce(Result<(), FsError>) + Send>;

/// What this node has changed and the coordinator has not heard of.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Whole blocks that were Fresh.
    pub(super) written: RangeSet,
    pub(super) size: bool,
    pub(super) mtime: bool,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.written.is_empty() && !self.size && !self.mtime
    }
}

/// Rounds of flush and commit.
#[derive(Default)]
pub(super) struct Rounds {
    pub(super) running: bool,
    pub(super) waiters: Vec<SyncWaiter>,
}

pub(super) struct SyncWaiter {
    /// Whether the times are wanted too.
    pub(super) times: bool,
    pub(super) done: FlushDone,
}

/// A part of the file that was written to blocks of the pool.
#[derive(Clone, Copy, Debug)]
struct Placed {
    file: u64,
    len: u64,
    lun: u64,
}

/// What one commit carries.
#[derive(Clone, Debug, Default)]
struct Snapshot {
    /// Blocks that the coordinator allocated.
    written: Vec<Range<u64>>,
    /// Blocks of the pool.
    placed: Vec<Placed>,
    size: Option<u64>,
    mtime: Option<pb::Timestamp>,
    trim_from: Option<u64>,
    /// More was pending than fits one commit.
    more: bool,
}

/// What made a round durable.
enum Durable {
    /// There was nothing to tell.
    Nothing,
    /// This record of the log.
    Logged(u64),
    /// The coordinator, who says what the attributes are now.
    Committed(Attr, Seq),
}

impl Snapshot {
    fn entries(&self) -> usize {
        self.written.len() + self.placed.len()
    }

    fn needs_flush(&self) -> bool {
        self.entries() > 0 || self.size.is_some()
    }

    fn is_empty(&self) -> bool {
        !self.needs_flush() && self.mtime.is_none() && self.trim_from.is_none()
    }

    fn commit(&self, ino: u64) -> pb::Commit {
        let range =
            |range: &Range<u64>| pb::ByteRange { offset: range.start, length: range.end - range.start };
        let extent = |placed: &Placed| pb::Extent {
            file_offset: placed.file,
            length: placed.len,
            lun_offset: placed.lun,
            state: pb::ExtentState::Data.into(),
        };
        pb::Commit {
            ino,
            written: self.written.iter().map(range).collect(),
            size_bytes: self.size,
            mtime: self.mtime,
            trim_from: self.trim_from,
            atime: None,
            placed: self.placed.iter().map(extent).collect(),
        }
    }
}

impl State {
    /// What is pending, as far as `most` entries hold it.
    fn snapshot(&mut self, times: bool, most: usize) -> Snapshot {
        if self.grant.mode != Mode::Exclusive {
            return Snapshot::default();
        }
        let mut snapshot = Snapshot::default();
        while snapshot.entries() < most
            && let Some(range) = self.pending.written.take(1).pop()
        {
            self.add_written(&mut snapshot, range, most);
        }
        snapshot.more = !self.pending.written.is_empty();
        if !snapshot.more && std::mem::take(&mut self.pending.size) {
            snapshot.size = Some(self.size());
        }
        let with_times = times || snapshot.needs_flush();
        if with_times && std::mem::take(&mut self.pending.mtime) {
            snapshot.mtime = self.attr.map(|attr| attr.mtime);
        }
        snapshot
    }

    /// Nothing is held any more.
    pub(super) fn know_nothing(&mut self, core: &Core) {
        debug_assert!(!self.promise.is_out(), "the kernel tells what is not known any more");
        core.cache.end_life(std::mem::take(&mut self.cache_life));
        self.map.clear();
        self.growth = Default::default();
        (self.attr, self.untold) = (None, None);
        self.names = None;
    }

    /// Whether there is no byte in the file on any node, so that no write to it can be on its way to stable media. Attributes that
    /// are too old to be told (`merge_attr`), or that this node is about to change, do not say so.
    fn is_known_empty(&self) -> bool {
        let known =
            self.grant.mode.covers(Mode::ProtectedRead) && self.attr_asked_at > 0 && self.changing == 0;
        known && self.attr.is_some_and(|attr| attr.size_bytes == 0)
    }

    /// Adds a written range, told apart by whose blocks carry it. What does not fit is pending again.
    fn add_written(&mut self, snapshot: &mut Snapshot, range: Range<u64>, most: usize) {
        let mut at = range.start;
        for own in self.own.parts_in(&range).into_iter().chain(std::iter::once(range.end..range.end)) {
            if at < own.start && snapshot.entries() < most {
                snapshot.written.push(at..own.start);
                at = own.start;
            }
            for part in self.map.parts(own) {
                if at != part.start || snapshot.entries() == most {
                    break;
                }
                if let Place::Data(lun) = part.place {
                    snapshot.placed.push(Placed { file: part.start, len: part.len, lun });
                }
                at += part.len;
            }
        }
        self.pending.written.add(at..range.end);
    }

    /// A commit was refused: what it named is pending again.
    fn snapshot_failed(&mut self, snapshot: Snapshot) {
        self.pending.size |= snapshot.size.is_some();
        self.pending.mtime |= snapshot.mtime.is_some();
        let placed = snapshot.placed.iter().map(|placed| placed.file..placed.file + placed.len);
        for range in placed.chain(snapshot.written) {
            self.pending.written.add(range);
        }
    }

    /// What a snapshot says is known elsewhere now.
    fn snapshot_told(&mut self, snapshot: &Snapshot) {
        for placed in &snapshot.placed {
            self.own.remove(placed.file..placed.file + placed.len);
        }
    }
}

impl Inode {
    /// Completes `done` when all that was completed before is durable.
    pub(super) fn sync(self: &Arc<Self>, times: bool, done: FlushDone) {
        if let Some(why) = self.core.stopped() {
            return done(Err(why));
        }
        let mut out = Out::default();
        let mut state = self.lock();
        state.sync.waiters.push(SyncWaiter { times, done });
        if state.leaving || state.sync.running || state.grant.release.is_some() {
            drop(state);
            return self.kick();
        }
        self.start_sync(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
    }

    /// Starts a round for those who wait.
    pub(super) fn start_sync(self: &Arc<Self>, state: &mut State, out: &mut Out) {
        if state.sync.running || state.sync.waiters.is_empty() || state.grant.release.is_some() {
            return;
        }
        self.run_sync(state, out);
    }

    fn run_sync(self: &Arc<Self>, state: &mut State, out: &mut Out) {
        state.sync.running = true;
        let waiters = std::mem::take(&mut state.sync.waiters);
        let most = if self.core.log.is_open() { APPEND_ENTRIES_MAX } else { COMMIT_RANGES_MAX };
        let snapshot = state.snapshot(waiters.iter().any(|waiter| waiter.times), most);
        if snapshot.is_empty() && state.is_known_empty() {
            state.sync.running = false;
            return out.syncs.extend(waiters.into_iter().map(|waiter| (waiter.done, Ok(()))));
        }
        let inode = self.clone();
        out.flush = Some(Box::new(move |flushed| inode.sync_flushed(snapshot, waiters, flushed)));
    }

    fn sync_flushed(
        self: &Arc<Self>,
        snapshot: Snapshot,
        waiters: Vec<SyncWaiter>,
        flushed: Result<(), FsError>,
    ) {
        if flushed.is_err() || snapshot.is_empty() {
            return self.sync_ended(snapshot, waiters, flushed.map(|()| Durable::Nothing));
        }
        let commit = snapshot.commit(self.ino);
        let inode = self.clone();
        if self.core.log.is_open() && snapshot.entries() <= APPEND_ENTRIES_MAX {
            let logged = move |outcome: Result<u64, FsError>| {
                inode.sync_ended(snapshot, waiters, outcome.map(Durable::Logged));
            };
            return self.core.append_log(commit, Box::new(logged));
        }
        let mut out = Out::default();
        self.ask(Op::Commit(commit), &mut out, move |inode, outcome| {
            let durable = checked_commit(outcome).map(|(attr, stamp)| Durable::Committed(attr, stamp));
            inode.sync_ended(snapshot, waiters, durable);
        });
        out.carry_out(self);
    }

    fn sync_ended(
        self: &Arc<Self>,
        snapshot: Snapshot,
        waiters: Vec<SyncWaiter>,
        outcome: Result<Durable, FsError>,
    ) {
        let mut out = Out::default();
        let mut state = self.lock();
        state.sync.running = false;
        match outcome {
            Ok(durable) => {
                state.snapshot_told(&snapshot);
                match durable {
                    Durable::Nothing => {}
                    Durable::Logged(lsn) => state.logged = lsn,
                    Durable::Committed(attr, stamp) => {
                        // Links may have changed since it was asked for.
                        let asked_at = state.attr_asked_at;
                        state.merge_attr(attr, asked_at, stamp);
                    }
                }
                if snapshot.more {
                    state.sync.waiters.extend(waiters);
                } else {
                    out.syncs.extend(waiters.into_iter().map(|waiter| (waiter.done, Ok(()))));
                }
            }
            Err(why) => {
                state.snapshot_failed(snapshot);
                out.syncs.extend(waiters.into_iter().map(|waiter| (waiter.done, Err(why.clone()))));
            }
        }
        self.step(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
    }

    /// Lowers the grant for a recall to `to` with number `at`; nothing is in flight.
    pub(super) fn begin_release(self: &Arc<Self>, state: &mut State, to: Mode, at: Seq, out: &mut Out) {
        let promised = state.take_back(out);
        if state.pages.must_go() {
            out.drop_pages = state.pages.begin_drop();
            return;
        }
        if promised {
            return;
        }
        if state.pending.written.len() > COMMIT_RANGES_MAX {
            return self.run_sync(state, out);
        }
        if !self.core.log.is_merged(state.logged) {
            return self.wait_for_merge(state, out);
        }
        state.give_up_ahead(&self.core);
        let to = state.grant.lowered(to);
        let exclusive = state.grant.mode == Mode::Exclusive;
        state.grant.recall = None;
        // Who gets the grant next may look.
        state.untold = None;
        let mut snapshot = state.snapshot(true, usize::MAX);
        state.own.clear();
        if exclusive {
            snapshot.trim_from = state.growth.trim_from(state.size(), state.map.end());
        }
        let number = state.grant.begin_release(to);
        if snapshot.needs_flush() {
            let inode = self.clone();
            out.flush = Some(Box::new(move |flushed| {
                // After a failed flush the node has stopped, and the recall stays without an answer (E3).
                if flushed.is_ok() {
                    let mut out = Out::default();
                    let mut state = inode.lock();
                    inode.send_release(&mut state, (number, to, at), snapshot, &mut out);
                    drop(state);
                    out.carry_out(&inode);
                }
            }));
        } else {
            self.send_release(state, (number, to, at), snapshot, out);
        }
    }

    /// What the log says of the file is with the coordinator before the grant goes: the next holder sees it, and a
    /// replay never finds a record older than what others did.
    fn wait_for_merge(self: &Arc<Self>, state: &mut State, out: &mut Out) {
        let inode = self.clone();
        // After a failure the node has stopped, and the recall stays without an answer (E3).
        let merged = move |outcome: Result<(), FsError>| {
            if outcome.is_ok() {
                inode.kick();
            }
        };
        out.merge = Some((state.logged, Box::new(merged)));
    }

    fn send_release(
        self: &Arc<Self>,
        state: &mut State,
        (number, to, at): (u64, Mode, Seq),
        snapshot: Snapshot,
        out: &mut Out,
    ) {
        let release = pb::ReleaseGrant {
            ino: self.ino,
            to: pb::GrantMode::from(to).into(),
            recall_seq: self.core.recall_number(at),
            commit: (!snapshot.is_empty()).then(|| snapshot.commit(self.ino)),
        };
        let (carried, wrote) = (release.commit.is_some(), state.grant.mode == Mode::Exclusive);
        let id = self.ask(Op::ReleaseGrant(release), out, move |inode, outcome| {
            inode.released(number, (carried, wrote), outcome);
        });
        state.grant.releasing(carried.then_some(id));
        if to == Mode::Null {
            state.know_nothing(&self.core);
        } else if carried {
            state.attr_asked_at = 0;
            if let Some(from) = snapshot.trim_from {
                state.map.cut_fresh(from);
            }
        }
    }

    fn released(
        self: &Arc<Self>,
        number: u64,
        (carried, wrote): (bool, bool),
        outcome: Result<Answered, FsError>,
    ) {
        let stamp = outcome.as_ref().map_or((0, 0), Answered::stamp);
        if wrote {
            self.core.memory.raise_written(self.ino, stamp);
        }
        let asked_at = self.core.names_now();
        let attr = outcome.as_ref().ok().and_then(|answered| match &answered.result {
            pb::reply::Result::Attr(attr) => Attr::checked(attr).ok(),
            _ => None,
        });
        match outcome {
            Err(FsError::Detached) | Ok(_) => {}
            // What was written is on the LUN and cannot be found again: nobody may go on as if it could.
            Err(why) if carried => {
                self.core
                    .stop(&format!("the coordinator refused what was written to inode {}: {why}", self.ino));
            }
            Err(why) => tracing::warn!(ino = self.ino, error = %why, "a release was refused"),
        }
        let mut out = Out::default();
        let mut state = self.lock();
        if let Some(at) = state.grant.released(number, stamp) {
            out.requests.extend(self.core.answer(self.ino, state.grant.mode, at));
        }
        // What it committed is what the attributes are, for who keeps some of the grant.
        if let Some(attr) = attr.filter(|_| state.grant.mode != Mode::Null) {
            state.merge_attr(attr, asked_at, stamp);
        }
        self.step(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
    }
}

fn checked_commit(outcome: Result<Answered, FsError>) -> Result<(Attr, Seq), FsError> {
    let answered = outcome?;
    let stamp = answered.stamp();
    match answered.result {
        pb::reply::Result::Attr(attr) => Ok((Attr::checked(&attr)?, stamp)),
        other => Err(unexpected("Commit", &other)),
    }
}
