//! What happens next with a file: decided under its lock, carried out after it.
//!
//! ```text
//!   something ended / was granted / was recalled
//!        -> stalled requests are resolved again, waiting ones admitted
//!        -> then at most one of each: release, acquire, ask for the map or for space, flush and commit
//! ```
//! Each step is a message or a flush with a completion; none is waited for.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use lockmgr::Mode;
use pb::request::Op;

use super::FsError;
use super::grants::{OnRecall, Seq};
use super::inode::{Holding, Inode, State, Waiter};
use super::io::{DataOp, Done, Need, Plan};
use super::names::unexpected;
use super::session::Answered;
use super::sync::FlushDone;
use super::transfer::Transfer;
use crate::proto as pb;

/// Tells who waits to hold a file.
pub(super) type HoldDone = SyncSender<Result<(), FsError>>;

/// What to do once the lock is released.
#[derive(Default)]
pub(super) struct Out {
    pub(super) transfers: Vec<Transfer>,
    pub(super) ends: Vec<(Done, Result<u64, FsError>)>,
    pub(super) holds: Vec<(HoldDone, Result<(), FsError>)>,
    pub(super) syncs: Vec<(FlushDone, Result<(), FsError>)>,
    /// Kept requests to send.
    pub(super) requests: Vec<u64>,
    pub(super) flush: Option<FlushDone>,
    /// Bytes that the pool lacks, and who waits for them.
    pub(super) space: Option<(u64, FlushDone)>,
    /// A record of the log that must be merged, and who waits for that.
    pub(super) merge: Option<(u64, FlushDone)>,
    /// Nothing is held and nobody uses the file.
    pub(super) retire: bool,
    /// Nobody uses the file, and what is known of it is worth keeping.
    pub(super) remember: bool,
    /// The kernel is to give up its pages of the file.
    pub(super) drop_pages: bool,
    /// It is to give up those in this range.
    pub(super) clear_pages: Option<Range<u64>>,
    /// It is to forget the attributes.
    pub(super) forget_attr: bool,
}

impl Out {
    pub(super) fn carry_out(self, inode: &Arc<Inode>) {
        for id in self.requests {
            inode.core.session.dispatch(id);
        }
        for transfer in self.transfers {
            transfer.start(inode);
        }
        if let Some(done) = self.flush {
            inode.core.flush(done);
        }
        if let Some((need, done)) = self.space {
            inode.core.want_space(need, done);
        }
        if let Some((lsn, done)) = self.merge {
            inode.core.when_merged(lsn, done);
        }
        inode.core.refill_ahead();
        for (done, outcome) in self.ends {
            done(outcome);
        }
        for (tell, outcome) in self.holds {
            // Whoever waits for it does so until it comes.
            drop(tell.send(outcome));
        }
        for (done, outcome) in self.syncs {
            done(outcome);
        }
        if self.drop_pages {
            inode.core.drop_pages(inode);
        }
        if let Some(range) = self.clear_pages {
            inode.core.clear_pages(inode, range);
        }
        if self.forget_attr {
            inode.core.forget_attr(inode);
        }
        if self.remember {
            inode.core.remember(inode);
        }
        if self.retire {
            inode.core.retire(inode);
        }
    }
}

/// What requests lack, taken together.
#[derive(Default)]
struct Needs {
    mode: Option<Mode>,
    map: Option<u64>,
    space: Option<(u64, u64, bool)>,
    /// Where shared blocks are to be written, and how many bytes of them.
    copies: Option<(u64, u64)>,
    /// Where the kernel is to have no pages.
    pages: Option<Range<u64>>,
}

impl Needs {
    fn grant(&mut self, mode: Mode) {
        if self.mode.is_none_or(|have| !have.covers(mode)) {
            self.mode = Some(mode);
        }
    }

    fn note(&mut self, need: Need) {
        match need {
            Need::Turn => {}
            // The others have theirs cleared next.
            Need::Pages { from, to } => {
                self.pages.get_or_insert(from..to);
            }
            Need::Map(at) => self.map = Some(self.map.map_or(at, |have| have.min(at))),
            Need::Copies { from, bytes } => {
                self.copies.get_or_insert((from, bytes));
            }
            Need::Space { from, to, beyond_end } => {
                self.space = Some(match self.space {
                    // Requests that follow each other, as of a copy with several writes in flight.
                    Some((have, end, beyond)) if from <= end && to >= have => {
                        (have.min(from), end.max(to), beyond || beyond_end)
                    }
                    Some(first) => first,
                    None => (from, to, beyond_end),
                });
            }
        }
    }
}

impl Inode {
    /// Does whatever can be done now.
    pub(super) fn advance(self: &Arc<Self>) {
        let mut out = Out::default();
        let mut state = self.lock();
        state.advance_queued = false;
        self.step(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
    }

    /// Under the lock: decides all that follows from the state.
    pub(super) fn step(self: &Arc<Self>, state: &mut State, out: &mut Out) {
        if let Some(why) = self.core.stopped() {
            return state.fail_all(&why, out);
        }
        if state.leaving {
            state.fail_all(&FsError::Detached, out);
        }
        if state.promise.is_outdated() {
            state.take_back(out);
        }
        let mut needs = Needs::default();
        self.resume_stalled(state, &mut needs, out);
        self.admit_waiting(state, &mut needs, out);
        if state.grant.release.is_none() {
            if self.lower(state, out) {
                return;
            }
            if let Some(mode) = needs.mode
                && state.grant.acquiring.is_none()
                && state.grant.recall.is_none()
            {
                self.acquire(state, mode, out);
            }
        }
        if !state.mapping {
            match (needs.map, needs.space) {
                (Some(at), _) => self.get_map(state, at, out),
                (None, Some(space)) if self.core.space.may_come() => self.want_space(state, space, out),
                (None, Some((from, to, beyond_end))) => self.allocate(state, from, to, beyond_end, out),
                (None, None) => match needs.copies {
                    Some((from, bytes)) if self.core.space.may_come() => {
                        self.want_space(state, (from, from + bytes, false), out);
                    }
                    Some(copies) => self.unshare(state, copies, out),
                    None => {}
                },
            }
        }
        if let Some(range) = needs.pages {
            out.clear_pages = state.pages.begin_clear(range);
        }
        self.start_sync(state, out);
    }

    fn resume_stalled(&self, state: &mut State, needs: &mut Needs, out: &mut Out) {
        for op in std::mem::take(&mut state.stalled) {
            self.resolve(state, op, needs, out);
        }
    }

    fn resolve(&self, state: &mut State, mut op: DataOp, needs: &mut Needs, out: &mut Out) {
        match self.plan(state, &mut op) {
            Plan::Go { pieces, effect, outcome } => {
                out.transfers.push(Transfer { pieces, effect, outcome, done: op.done });
            }
            Plan::End(outcome) => {
                state.in_flight -= 1;
                out.ends.push((op.done, outcome));
            }
            Plan::Wait(need) => {
                needs.note(need);
                state.stalled.push(op);
            }
        }
    }

    fn admit_waiting(&self, state: &mut State, needs: &mut Needs, out: &mut Out) {
        state.freeze_wanted = false;
        for waiter in std::mem::take(&mut state.waiting) {
            let mode = match &waiter {
                Waiter::Data(op) => op.mode(state.pages.mappers),
                Waiter::Hold { mode, .. } => *mode,
            };
            if !state.grant.permits(mode) {
                needs.grant(mode);
            } else if mode == Mode::Exclusive {
                state.take_back(out);
            }
            match waiter {
                Waiter::Data(op) if state.admits_op(&op) => {
                    state.admitted(&op);
                    self.resolve(state, op, needs, out);
                }
                Waiter::Hold { how, tell, .. } if state.admits_hold(mode, how) => {
                    state.in_flight += 1;
                    state.frozen = how != Holding::Shared;
                    out.holds.push((tell, Ok(())));
                }
                waiter => {
                    let alone = matches!(waiter, Waiter::Hold { how: Holding::Alone | Holding::ForSize, .. });
                    state.freeze_wanted |= alone && state.grant.permits(mode);
                    state.waiting.push_back(waiter);
                }
            }
        }
    }

    /// Gives the grant back, as far as it was recalled or nobody uses the file, once nothing is in flight. Says whether
    /// that is what happens next.
    fn lower(self: &Arc<Self>, state: &mut State, out: &mut Out) -> bool {
        self.tell_access(state, out);
        if state.in_flight > 0 || state.sync.running || state.mapping {
            return false;
        }
        if let Some((to, at)) = state.grant.recall {
            self.begin_release(state, to, at, out);
            return true;
        }
        if (!state.is_unused() && !state.leaving) || state.grant.acquiring.is_some() {
            return false;
        }
        if state.grant.mode == Mode::Null {
            out.retire = true;
        } else if state.leaving || state.unwanted || !state.worth_keeping() {
            self.begin_release(state, Mode::Null, (0, 0), out);
        } else if state.is_unsaved(&self.core) {
            // What was buffered goes to the coordinator as the last user leaves; what is known stays.
            self.begin_release(state, Mode::ProtectedRead, (0, 0), out);
        } else {
            out.remember = true;
            return false;
        }
        true
    }

    fn acquire(self: &Arc<Self>, state: &mut State, mode: Mode, out: &mut Out) {
        state.grant.acquiring = Some(mode);
        let asked_at = self.core.names_now();
        let op = Op::Acquire(pb::Acquire { ino: self.ino, mode: pb::GrantMode::from(mode).into() });
        self.ask(op, out, move |inode, outcome| inode.acquired(asked_at, outcome));
    }

    /// Keeps a request whose outcome goes to `then`, on a worker.
    pub(super) fn ask(
        self: &Arc<Self>,
        op: Op,
        out: &mut Out,
        then: impl FnOnce(&Arc<Self>, Result<Answered, FsError>) + Send + 'static,
    ) -> u64 {
        let inode = self.clone();
        let id = self.core.session.keep(op, move |outcome| {
            let workers = inode.core.workers.clone();
            workers.run(move || then(&inode, outcome));
        });
        out.requests.push(id);
        id
    }

    fn acquired(self: &Arc<Self>, asked_at: u64, outcome: Result<Answered, FsError>) {
        let mut out = Out::default();
        let mut state = self.lock();
        let current = outcome.as_ref().map_or(true, |answered| self.core.session.is_current(answered));
        let stamp = outcome.as_ref().map_or((0, 0), Answered::stamp);
        match checked_grant(outcome) {
            // It is asked for again, from the coordinator of now.
            Ok(_) if !current => state.grant.acquiring = None,
            // What waits is admitted in the same step, so that a recall that is on its way finds some work done (E4).
            Ok((mode, at, attr)) => {
                let from_nothing = state.grant.mode == Mode::Null;
                if state.grant.granted(mode, at) {
                    if from_nothing {
                        state.holds_since(stamp);
                    }
                    state.merge_attr(attr, asked_at, stamp);
                }
            }
            Err(why) => {
                state.grant.acquiring = None;
                state.fail_waiting(&why, &mut out);
            }
        }
        self.step(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
    }

    /// The coordinator wants the grant lowered to `to`.
    pub(super) fn recalled(self: &Arc<Self>, to: Mode, at: Seq) {
        let mut out = Out::default();
        let mut state = self.lock();
        match state.grant.recalled(to, at) {
            OnRecall::Ignore => {}
            OnRecall::AnswerNow => out.requests.extend(self.core.answer(self.ino, state.grant.mode, at)),
            OnRecall::Drain => self.step(&mut state, &mut out),
        }
        drop(state);
        out.carry_out(self);
    }
}

impl State {
    /// Nothing more can be done for anybody.
    pub(super) fn fail_all(&mut self, why: &FsError, out: &mut Out) {
        self.fail_waiting(why, out);
        self.fail_stalled(why, out, |_| true);
        for waiter in std::mem::take(&mut self.sync.waiters) {
            out.syncs.push((waiter.done, Err(why.clone())));
        }
    }

    fn fail_waiting(&mut self, why: &FsError, out: &mut Out) {
        for waiter in std::mem::take(&mut self.waiting) {
            match waiter {
                Waiter::Data(op) => out.ends.push((op.done, Err(why.clone()))),
                Waiter::Hold { tell, .. } => out.holds.push((tell, Err(why.clone()))),
            }
        }
    }

    /// Ends the stalled requests that `concerned` picks.
    pub(super) fn fail_stalled(
        &mut self,
        why: &FsError,
        out: &mut Out,
        mut concerned: impl FnMut(&DataOp) -> bool,
    ) {
        for op in std::mem::take(&mut self.stalled) {
            if concerned(&op) {
                self.in_flight -= 1;
                out.ends.push((op.done, Err(why.clone())));
            } else {
                self.stalled.push(op);
            }
        }
    }
}

fn checked_grant(outcome: Result<Answered, FsError>) -> Result<(Mode, Seq, super::Attr), FsError> {
    let answered = outcome?;
    match answered.result {
        pb::reply::Result::Granted(granted) => {
            let attr = granted.attr.ok_or_else(|| FsError::Protocol("a grant without attributes".into()))?;
            Ok((granted.mode().into(), (answered.term, granted.seq), super::Attr::checked(&attr)?))
        }
        other => Err(unexpected("Acquire", &other)),
    }
}
