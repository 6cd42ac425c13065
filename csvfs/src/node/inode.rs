//! One file on this node: its grant, map, attributes and everything that is under way.
//!
//! ```text
//!   read, write --> admitted? --no--> waiting (for a grant)
//!                      | yes: counted in flight
//!                      v
//!                  resolved? --no--> stalled (for the map, for space, for another write)
//!                      | yes
//!                      v
//!                  transfer --> ended: recorded, no longer in flight
//! ```
//! A request is admitted once per grant and then ends under it, whatever it still needs: so each grant gets some work
//! done, and a recall waits for a bounded number of requests (E4).
//!
//! **Invariant:** a grant is lowered only when nothing is in flight (C6).

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lockmgr::Mode;

use super::advance::HoldDone;
use super::bad::{self, BadRange};
use super::core::Core;
use super::grants::{Grant, Seq};
use super::growth::Growth;
use super::io::{CopyRun, DataOp, Done, Effect, Plan, What, Writes};
use super::map::{ExtentMap, Place, block_ceil, block_floor};
use super::pages::Pages;
use super::promise::Promise;
use super::ranges::RangeSet;
use super::rank::{self, Ranked};
use super::remember::Names;
use super::sync::{Pending, Rounds};
use super::times::Times;
use super::transfer::Transfer;
use super::{Attr, FileKind, FsError};
use crate::proto as pb;

/// See the module.
pub(super) struct Inode {
    pub(super) core: Arc<Core>,
    pub(super) ino: u64,
    /// Rank 2. Short: no I/O, no message, no callback under it.
    state: Mutex<State>,
}

/// How a file is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holding {
    /// Beside others.
    Shared,
    /// Only with nothing else in flight.
    Alone,
    /// Alone, for a new size: the kernel writes back no page until it has its answer.
    ForSize,
}

/// What waits for a grant.
pub(super) enum Waiter {
    Data(DataOp),
    Hold { mode: Mode, how: Holding, tell: HoldDone },
}

#[derive(Default)]
pub(super) struct State {
    pub(super) grant: Grant,
    pub(super) in_flight: usize,
    /// Somebody has the file for itself.
    pub(super) frozen: bool,
    /// Somebody waits to have it for itself: nothing else is admitted, so that this comes to pass.
    pub(super) freeze_wanted: bool,
    /// The node gives everything back: nothing is admitted any more.
    pub(super) leaving: bool,
    pub(super) waiting: VecDeque<Waiter>,
    pub(super) stalled: Vec<DataOp>,
    pub(super) advance_queued: bool,
    pub(super) map: ExtentMap,
    /// A GetMap or Allocate is under way.
    pub(super) mapping: bool,
    pub(super) growth: Growth,
    /// Where blocks of this client's pool lie of which the coordinator was not told, and the log neither.
    pub(super) own: RangeSet,
    /// The last record of the intent log that is about this file.
    pub(super) logged: u64,
    pub(super) writes: Writes,
    /// Reads in flight of blocks that other files have too.
    pub(super) shared_reads: Writes,
    /// Blocks that one write has for itself.
    pub(super) alone: BTreeSet<u64>,
    pub(super) append_end: u64,
    pub(super) appends: usize,
    /// Valid while a grant is held.
    pub(super) attr: Option<Attr>,
    /// The node's count of changes of names when `attr` was asked for: link counts may be older than later changes.
    pub(super) attr_asked_at: u64,
    /// The answer that `attr` is from.
    pub(super) attr_at: Seq,
    /// The answer since which the grant is held without a gap: what older answers say may have changed unnoticed.
    pub(super) since: Seq,
    /// Calls of this node that are changing the inode or, of a directory, its names: meanwhile nothing is told from memory,
    /// as others may see the change already.
    pub(super) changing: u32,
    /// Of a directory, what is remembered of its names. Of others, their target and extended attributes.
    pub(super) names: Option<Box<Names>>,
    /// It is in the list of those that may be forgotten.
    pub(super) listed: bool,
    /// It was used since the list was last looked through.
    pub(super) used: bool,
    /// The grant's number in the read cache; 0 as long as nothing was read under it.
    pub(super) cache_life: u64,
    /// Pages in the kernel's memory.
    pub(super) pages: Pages,
    /// Attributes in the kernel's memory.
    pub(super) promise: Promise,
    /// It was read, and its time of access is to say so.
    pub(super) accessed: bool,
    /// The time of the last change of the content, as long as nobody was told of it.
    pub(super) untold: Option<pb::Timestamp>,
    /// It is to be forgotten as soon as nobody uses it.
    pub(super) unwanted: bool,
    pub(super) pending: Pending,
    pub(super) sync: Rounds,
    /// Handles, and calls that use the file without one.
    pub(super) users: usize,
    /// Opens that the coordinator counts.
    pub(super) registered: u32,
    /// The attach that has claimed those that there were then, or that there were none.
    pub(super) claimed_in: u64,
    /// What it was opened as: a number stands for one inode for ever.
    pub(super) opened_as: Option<FileKind>,
}

impl State {
    pub(super) fn size(&self) -> u64 {
        self.attr.map_or(0, |attr| attr.size_bytes)
    }

    pub(super) fn append_at(&self) -> u64 {
        if self.appends == 0 { self.size() } else { self.append_end.max(self.size()) }
    }

    /// Whether something that needs `mode` may start. What may change attributes waits until the kernel tells none.
    pub(super) fn admits(&self, mode: Mode) -> bool {
        self.admits_page(mode) && (mode != Mode::Exclusive || !self.promise.is_out())
    }

    /// Whether somebody may hold it so now.
    pub(super) fn admits_hold(&self, mode: Mode, how: Holding) -> bool {
        let admitted = self.admits(mode) || (how == Holding::ForSize && self.admits_size());
        admitted && (how == Holding::Shared || self.in_flight == 0)
    }

    /// Whether a page that needs `mode` may be read or written. The kernel may wait for it before it forgets anything.
    pub(super) fn admits_page(&self, mode: Mode) -> bool {
        self.grant.permits(mode) && !self.frozen && !self.freeze_wanted && !self.leaving
    }

    /// A grant has come where none was, with an answer at `stamp`: what was known before may not be true.
    pub(super) fn holds_since(&mut self, stamp: Seq) {
        self.since = stamp;
        self.attr = None;
    }

    /// Takes over attributes from the coordinator, under a grant. Who has EX decides about size and times itself: an answer may have been
    /// given before a commit that is known by now.
    pub(super) fn merge_attr(&mut self, fresh: Attr, asked_at: u64, at: Seq) {
        debug_assert!(self.grant.mode != Mode::Null, "nobody tells when they change");
        if at.1 != 0 && at < self.attr_at {
            // Better than nothing, for the size that a writer goes by; not to be told.
            if self.attr.is_none() {
                (self.attr, self.attr_asked_at) = (Some(fresh), 0);
            }
            return;
        }
        self.attr_at = self.attr_at.max(at);
        let merged = match self.attr {
            Some(own) if self.grant.mode == Mode::Exclusive => own.over(fresh),
            _ => fresh,
        };
        if self.grant.mode == Mode::Exclusive && merged.allocated_bytes == 0 && self.pending.is_empty() {
            // Nothing to ask for: a new file is one hole.
            self.map.know_all();
        }
        if self.attr != Some(merged) {
            self.promise.outdate();
        }
        self.attr = Some(merged);
        self.attr_asked_at = asked_at;
    }

    /// The content was changed by this node.
    pub(super) fn touched(&mut self, times: &Times) {
        let Some(attr) = &mut self.attr else {
            self.pending.mtime = true;
            return;
        };
        if let Some(time) = times.of_change(attr, self.untold) {
            (attr.mtime, attr.ctime) = (time, time);
            (self.untold, self.pending.mtime) = (Some(time), true);
        }
    }

    /// Attributes for somebody who looks at them: a later change shows.
    pub(super) fn attr_to_tell(&mut self) -> Option<Attr> {
        self.untold = None;
        self.attr
    }

    /// The coordinator has changed the content, of a file that this node is alone with: its time counts, for all nodes, and
    /// replaces what was to be told of earlier changes.
    pub(super) fn touched_there(&mut self, fresh: &Attr) {
        self.pending.mtime = false;
        if let Some(own) = &mut self.attr {
            own.mtime = fresh.mtime;
        }
    }

    pub(super) fn set_size(&mut self, size: u64) {
        if let Some(attr) = &mut self.attr {
            attr.size_bytes = size;
        }
        self.pending.size = true;
    }

    /// A request has ended: whether anything waits for that.
    fn leaves(&mut self) -> bool {
        self.in_flight -= 1;
        let others = !self.stalled.is_empty() || !self.waiting.is_empty();
        others || (self.in_flight == 0 && (self.grant.recall.is_some() || self.users == 0 || self.leaving))
    }

    /// The file lets go of what lies in `range`: it is not answered from memory any more. Before the map forgets it.
    pub(super) fn let_go(&self, core: &Core, range: Range<u64>) {
        if !core.cache.is_on() || range.is_empty() {
            return;
        }
        for part in self.map.parts(range) {
            if let Place::Data(lun) | Place::Shared(lun) = part.place {
                core.cache.forget(lun, part.len);
            }
        }
    }

    /// Shared blocks were written elsewhere: the file has its own from now on.
    pub(super) fn took_copies(&mut self, core: &Core, copies: &[CopyRun]) {
        for CopyRun { file, len, lun } in copies {
            self.let_go(core, *file..*file + *len);
            self.map.copied(*file, *len, *lun);
            self.own.add(*file..*file + *len);
            self.pending.written.add(*file..*file + *len);
        }
    }

    fn written(&mut self, range: &Range<u64>, times: &Times) {
        let blocks = block_floor(range.start)..block_ceil(range.end);
        for fresh in self.map.written(blocks) {
            self.pending.written.add(fresh);
        }
        if range.end > self.size() {
            self.set_size(range.end);
        }
        self.touched(times);
    }
}

/// What became of a request that was offered to the file.
enum Offer {
    Go(Transfer),
    End(Done, Result<u64, FsError>, bool),
    Parked,
}

impl Inode {
    pub(super) fn new(core: Arc<Core>, ino: u64) -> Arc<Self> {
        let state = State { grant: Grant::above(core.memory.floor(ino)), ..State::default() };
        Arc::new(Self { core, ino, state: Mutex::new(state) })
    }

    pub(super) fn lock(&self) -> Ranked<MutexGuard<'_, State>> {
        Ranked::take(rank::FILE, || self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Starts a read or write. Never blocks for a message.
    pub(super) fn submit(self: &Arc<Self>, op: DataOp) {
        if !op.is_read()
            && let Some(why) = self.core.stopped()
        {
            return (op.done)(Err(why));
        }
        let mut state = self.lock();
        let offer = self.offer(&mut state, op);
        let kick = match &offer {
            Offer::Parked | Offer::End(_, _, true) => !std::mem::replace(&mut state.advance_queued, true),
            _ => false,
        };
        drop(state);
        self.core.refill_ahead();
        if kick {
            self.advance_soon();
        }
        match offer {
            Offer::Go(transfer) => transfer.start(self),
            Offer::End(done, outcome, _) => done(outcome),
            Offer::Parked => {}
        }
    }

    fn offer(&self, state: &mut State, mut op: DataOp) -> Offer {
        if !state.admits_op(&op) {
            state.waiting.push_back(Waiter::Data(op));
            return Offer::Parked;
        }
        state.admitted(&op);
        match self.plan(state, &mut op) {
            Plan::Go { pieces, effect, outcome } => {
                Offer::Go(Transfer { pieces, effect, outcome, done: op.done })
            }
            Plan::End(outcome) => {
                let kick = state.leaves();
                Offer::End(op.done, outcome, kick)
            }
            Plan::Wait(_) => {
                state.stalled.push(op);
                Offer::Parked
            }
        }
    }

    /// A transfer has ended, on the device's I/O thread. Its effect is recorded before anybody hears of it.
    pub(super) fn ended(self: &Arc<Self>, effect: Effect, outcome: Result<u64, FsError>, done: Done) {
        let mut state = self.lock();
        let mut failed_read = None;
        let mut failed_write = None;
        let on_medium = outcome.as_ref().err().filter(|error| bad::is_medium(error));
        match effect {
            Effect::Read { shared, again, .. } => {
                if let Some(slot) = shared {
                    state.shared_reads.remove(slot);
                }
                failed_read = on_medium.map(|error| (again, error.clone()));
            }
            Effect::Write { range, slot, alone_on, append, zero, copies } => {
                state.writes.remove(slot);
                for block in alone_on {
                    state.alone.remove(&block);
                }
                if append {
                    state.appends -= 1;
                }
                if outcome.is_ok() {
                    state.took_copies(&self.core, &copies);
                    let times = &self.core.times;
                    if zero { state.touched(times) } else { state.written(&range, times) }
                } else {
                    self.core.space.put(copies.iter().map(|copy| (copy.lun, copy.len)));
                }
                failed_write = on_medium.map(|error| (range, error.to_string()));
            }
        }
        let kick = state.leaves() && !std::mem::replace(&mut state.advance_queued, true);
        drop(state);
        if kick {
            self.advance_soon();
        }
        if let Some((Range { start: offset, end }, why)) = failed_write {
            let bad = BadRange { ino: self.ino, offset, length: end - offset, write: true, why };
            self.core.bad.note(bad);
        }
        match failed_read {
            Some((again, error)) => self.look_closer(again, error, done),
            None => done(outcome),
        }
    }

    /// Looks on a worker at what can go on now.
    pub(super) fn advance_soon(self: &Arc<Self>) {
        let inode = self.clone();
        self.core.workers.run(move || inode.advance());
    }

    /// As [`Inode::advance_soon`], unless that is queued.
    pub(super) fn kick(self: &Arc<Self>) {
        let queued = std::mem::replace(&mut self.lock().advance_queued, true);
        if !queued {
            self.advance_soon();
        }
    }

    /// Somebody who was admitted leaves.
    pub(super) fn leave(self: &Arc<Self>, alone: bool) {
        let mut state = self.lock();
        if alone {
            state.frozen = false;
        }
        let kick = state.leaves() && !std::mem::replace(&mut state.advance_queued, true);
        drop(state);
        if kick {
            self.advance_soon();
        }
    }

    /// What this node has, for the Attach of this number.
    /// The last: it is a PR that nobody uses.
    pub(super) fn holding(&self, attempt: u64) -> (Option<pb::Claim>, Option<pb::OpenClaim>, bool) {
        let mut state = self.lock();
        state.claimed_in = attempt;
        let open = (state.registered > 0).then_some(pb::OpenClaim { ino: self.ino, count: state.registered });
        let merely_remembered = state.grant.mode == Mode::ProtectedRead && state.is_merely_remembered();
        (state.grant.claim(self.ino), open, merely_remembered)
    }
}

impl DataOp {
    /// What it needs. A page that a program can write to without asking is read under EX.
    pub(super) fn mode(&self, mappers: usize) -> Mode {
        let reads = self.what == What::Read && !(self.page && mappers > 0);
        if reads { Mode::ProtectedRead } else { Mode::Exclusive }
    }
}
