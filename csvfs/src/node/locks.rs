//! Locks of programs on this node: asked of the coordinator, and kept here as a copy, which is claimed from the next one.
//!
//! | moment | the copy |
//! |---|---|
//! | a lock is asked for | loses what the new one would take from the owner's old ones |
//! | it is granted | has it |
//! | it is given up | loses it before the request leaves |
//!
//! So the copy never has more than the coordinator may have granted: what it lacks is asked for again by the request that
//! is still under way. **Invariant:** claims of two clients never exclude each other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lockmgr::ClientId;
use lockmgr::range::{Access, Family, HeldLocks, Owner, RangeLock, Span};
use pb::reply::Result as Answer;
use pb::request::Op;

use super::core::Core;
use super::names::wait_for;
use super::rank::{self, Ranked};
use super::session::Answered;
use super::{FsError, Node};
use crate::proto as pb;

/// Calls that may wait at the coordinator: each takes one of the places for requests on the way there. Further ones ask
/// again and again instead.
const WAITING_MAX: usize = 512;
/// How often those ask.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// After this an interrupt that found nothing to end is sent again, as long as the lock is waited for.
const CANCEL_AGAIN: Duration = Duration::from_millis(20);

/// A lock of a program on this node. Both ends belong to the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// The file.
    pub ino: u64,
    /// Who has it: a process, or an open file; any number that is the same for the same one.
    pub owner: u64,
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// For writing: nobody else may have one there.
    pub write: bool,
    /// Of `flock`, not of `fcntl`.
    pub flock: bool,
    /// The process that asks.
    pub pid: u32,
}

/// Somebody's lock that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockInTheWay {
    /// What is locked.
    pub lock: Lock,
    /// Whether a program of this node has it: its process number means something here.
    pub here: bool,
}

/// What programs of this node have locked, and wait for.
#[derive(Debug, Default)]
pub(super) struct Locks {
    /// Rank 3.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By inode.
    held: HashMap<u64, HeldLocks>,
    /// Calls without an outcome yet.
    calls: HashMap<u64, Call>,
    next_call: u64,
}

#[derive(Debug, Default)]
struct Call {
    /// The session's request; a call that asks again has another one.
    request: Option<u64>,
    interrupted: bool,
}

impl State {
    fn change(&mut self, ino: u64, change: impl FnOnce(&mut HeldLocks)) {
        if let Some(locks) = self.held.get_mut(&ino) {
            change(locks);
            if locks.is_empty() {
                self.held.remove(&ino);
            }
        }
    }
}

impl Locks {
    fn lock(&self) -> Ranked<MutexGuard<'_, State>> {
        Ranked::take(rank::LOCKS, || self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What to claim from a new coordinator.
    pub(super) fn claims(&self) -> Vec<pb::RangeLock> {
        let state = self.lock();
        state.held.iter().flat_map(|(ino, locks)| locks.iter().map(|lock| to_wire(*ino, lock))).collect()
    }

    /// A lock is about to be asked for. Gives the number of the call.
    fn asking(&self, ino: u64, lock: RangeLock) -> u64 {
        let mut state = self.lock();
        state.change(ino, |locks| match lock.owner.family {
            Family::Flock => {
                locks.unset(lock.owner, Span::ALL);
            }
            Family::Range => locks.weaken(lock),
        });
        state.next_call += 1;
        let call = state.next_call;
        state.calls.insert(call, Call::default());
        call
    }

    fn give_up(&self, ino: u64, owner: Owner, span: Span) {
        self.lock().change(ino, |locks| {
            locks.unset(owner, span);
        });
    }
}

/// Owners are told apart per client by the coordinator; here there is one client.
fn owner(lock: &Lock) -> Owner {
    let here = ClientId { node: lockmgr::NodeId(0), epoch: lockmgr::Epoch(0), serial: 0 };
    Owner { client: here, number: lock.owner, family: if lock.flock { Family::Flock } else { Family::Range } }
}

fn range_lock(lock: &Lock) -> RangeLock {
    let access = if lock.write { Access::Write } else { Access::Read };
    RangeLock { owner: owner(lock), span: Span { start: lock.start, end: lock.end }, access, pid: lock.pid }
}

fn to_wire(ino: u64, lock: &RangeLock) -> pb::RangeLock {
    pb::RangeLock {
        ino,
        owner: lock.owner.number,
        start: lock.span.start,
        end: lock.span.end,
        write: lock.access == Access::Write,
        flock: lock.owner.family == Family::Flock,
        pid: lock.pid,
    }
}

/// A call that wants a lock.
struct LockCall {
    call: u64,
    lock: Lock,
    wait: bool,
    done: Box<dyn FnOnce(Result<(), FsError>) + Send>,
}

impl Node {
    /// Asks for a lock; `done` hears the outcome, which with `wait` may take as long as others have it: `EAGAIN`,
    /// `EDEADLK`, `EINTR` after [`Node::interrupt_lock`], and the like. Gives the number that names the call there.
    pub fn lock(
        &self,
        lock: &Lock,
        wait: bool,
        done: impl FnOnce(Result<(), FsError>) + Send + 'static,
    ) -> u64 {
        let call = self.core.locks.asking(lock.ino, range_lock(lock));
        self.core.ask_lock(LockCall { call, lock: *lock, wait, done: Box::new(done) });
        call
    }

    /// Ends the waiting for a lock, if it still waits.
    pub fn interrupt_lock(&self, call: u64) {
        self.core.interrupt_lock(call);
    }

    /// Gives up what an owner has locked in a range.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn unlock(&self, lock: &Lock) -> Result<(), FsError> {
        wait_for(|done| self.unlock_then(lock, done))
    }

    /// As [`Node::unlock`], without waiting.
    pub fn unlock_then(&self, lock: &Lock, done: impl FnOnce(Result<(), FsError>) + Send + 'static) {
        let known = range_lock(lock);
        self.core.locks.give_up(lock.ino, known.owner, known.span);
        let op = Op::Unlock(pb::Unlock { lock: Some(to_wire(lock.ino, &known)) });
        self.core.ask_then(op, move |outcome| done(outcome.map(drop)));
    }

    /// Gives up all that an owner has locked of a file; without a message when that is nothing.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn unlock_all(&self, ino: u64, owner: u64, flock: bool) -> Result<(), FsError> {
        let all = Lock { ino, owner, start: 0, end: u64::MAX, write: false, flock, pid: 0 };
        if !self.has_locks(ino, owner, flock) {
            return Ok(());
        }
        self.unlock(&all)
    }

    /// Whether an owner has locked anything of a file.
    #[must_use]
    pub fn has_locks(&self, ino: u64, number: u64, flock: bool) -> bool {
        let state = self.core.locks.lock();
        let family = if flock { Family::Flock } else { Family::Range };
        state
            .held
            .get(&ino)
            .is_some_and(|locks| locks.iter().any(|l| l.owner.number == number && l.owner.family == family))
    }

    /// Somebody's lock that stands in the way of `lock`.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn query_lock(&self, lock: &Lock) -> Result<Option<LockInTheWay>, FsError> {
        let wanted = Some(to_wire(lock.ino, &range_lock(lock)));
        match self.ask(Op::QueryLock(pb::QueryLock { lock: wanted }))? {
            Answer::LockHolder(holder) => Ok(holder.lock.map(|lock| LockInTheWay {
                here: holder.client.is_some_and(|client| client == self.core.session.client()),
                lock: from_wire(&lock),
            })),
            other => Err(super::names::unexpected("QueryLock", &other)),
        }
    }
}

fn from_wire(lock: &pb::RangeLock) -> Lock {
    let pb::RangeLock { ino, owner, start, end, write, flock, pid } = *lock;
    Lock { ino, owner, start, end, write, flock, pid }
}

impl Core {
    fn ask_lock(self: &Arc<Self>, call: LockCall) {
        let number = call.call;
        let wire = to_wire(call.lock.ino, &range_lock(&call.lock));
        let mut state = self.locks.lock();
        if state.calls.get(&number).is_some_and(|call| call.interrupted) {
            state.calls.remove(&number);
            drop(state);
            return (call.done)(Err(FsError::invalid(libc::EINTR, "interrupted while waiting for a lock")));
        }
        let wait = call.wait && state.calls.len() <= WAITING_MAX;
        let core = self.clone();
        let op = Op::Lock(pb::Lock { lock: Some(wire), wait });
        let request = self.session.keep(op, move |outcome| core.lock_answered(call, outcome));
        state.calls.entry(number).or_default().request = Some(request);
        drop(state);
        self.session.dispatch(request);
    }

    fn lock_answered(self: &Arc<Self>, call: LockCall, outcome: Result<Answered, FsError>) {
        let mut state = self.locks.lock();
        state.calls.entry(call.call).or_default().request = None;
        let outcome = match outcome {
            // It was granted under an attach that is over, and is not among what was claimed since.
            Ok(answered) if !self.session.is_current(&answered) => {
                drop(state);
                return self.ask_lock(call);
            }
            Ok(_) => {
                state.held.entry(call.lock.ino).or_default().set(range_lock(&call.lock));
                Ok(())
            }
            Err(why) if call.wait && why.errno() == libc::EAGAIN => {
                drop(state);
                let core = self.clone();
                return self.workers.after(ASK_AGAIN, move || core.ask_lock(call));
            }
            Err(why) => Err(why),
        };
        state.calls.remove(&call.call);
        drop(state);
        (call.done)(outcome);
    }

    fn interrupt_lock(self: &Arc<Self>, number: u64) {
        let mut state = self.locks.lock();
        let Some(call) = state.calls.get_mut(&number) else { return };
        call.interrupted = true;
        let Some(request_id) = call.request else { return };
        drop(state);
        let core = self.clone();
        self.session.call(Op::CancelLock(pb::CancelLock { request_id }), move |outcome| {
            // The request may still be on its way, or have been sent anew; if it was answered, this ends at once.
            if outcome.is_err_and(|error| error.errno() == libc::ENOENT) {
                let workers = core.workers.clone();
                workers.after(CANCEL_AGAIN, move || core.interrupt_lock(number));
            }
        });
    }
}
