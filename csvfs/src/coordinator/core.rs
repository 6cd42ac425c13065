//! What the coordinator's thread keeps in memory.
//!
//! Everything here can be rebuilt: from the store, and from what clients claim when they attach.
//! **Invariant:** only the coordinator's thread touches it, one request at a time.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use blockio::BlockDevice;
use lockmgr::engine::{Action, Event, LockEngine};
use lockmgr::range::{Owner, RangeTable};
use lockmgr::{ClientId, Epoch, Millis, Mode, NodeId, ResourceId, Term, VolumeId};

use super::lend::Contended;
use super::locks::LockWait;
use super::mailbox::{Answer, Asker};
use super::pools::Pools;
use super::repair::Unreadable;
use super::scarcity::Scarcity;
use super::sessions::Session;
use super::{CoordinatorTiming, PushTarget};
use crate::alloc::Allocator;
use crate::clock::Clock;
use crate::format::meta_slot::Chunk;
use crate::meta::Globals;
use crate::proto::{self as pb, Failure, Push, Request, Timestamp, push, reply};

/// See the module.
pub(super) struct Core {
    pub(super) volume: VolumeId,
    pub(super) term: Term,
    pub(super) lun_bytes: u64,
    /// Features of the superblock that a program must know to write.
    pub(super) ro_compat: u64,
    /// Features that a program must know to do anything.
    pub(super) incompat: u64,
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) pushes: Arc<dyn PushTarget>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) timing: CoordinatorTiming,
    pub(super) alloc: Allocator,
    /// Blocks that files do not get, beside what the metadata may need for pools.
    pub(super) held_back: u64,
    pub(super) pools: Pools,
    pub(super) scarcity: Scarcity,
    pub(super) globals: Globals,
    pub(super) globals_changed: bool,
    pub(super) engine: LockEngine,
    pub(super) sessions: BTreeMap<ClientId, Session>,
    /// Clients that have left, the last ones, and the requests by which they had attached.
    pub(super) departed: VecDeque<(ClientId, u64)>,
    /// How often each file is open, by all clients.
    pub(super) open_counts: HashMap<u64, u64>,
    /// Inodes without a name.
    pub(super) orphans: BTreeSet<u64>,
    /// Those of them that nobody has open: their blocks are to be freed.
    pub(super) reclaimable: BTreeSet<u64>,
    /// When that is done at the latest, also if nothing else is committed.
    pub(super) reclaim_at: Option<Millis>,
    /// What waits in the lock engine.
    pub(super) tickets: HashMap<u64, Ticket>,
    /// Locks of programs.
    pub(super) range_locks: RangeTable,
    /// Since when somebody has locks on a file.
    pub(super) lock_since: HashMap<(u64, Owner), Millis>,
    /// Requests that wait for one, by ticket.
    pub(super) lock_waits: BTreeMap<u64, LockWait>,
    /// What waits for others' grants to be lowered.
    pub(super) parked: BTreeMap<u64, Parked>,
    /// What the lock engine has granted in this batch.
    pub(super) ready: VecDeque<Ready>,
    /// Requests that need what this batch frees.
    pub(super) later: Vec<Work>,
    pub(super) grace: Option<Grace>,
    pub(super) next_id: u64,
    /// Counts answers: what a later one says is newer.
    pub(super) answers: u64,
    /// What clients have fought for lately.
    pub(super) contended: Contended,
    pub(super) out: Outbox,
    /// Time of this batch.
    pub(super) now: Millis,
    pub(super) wall: Timestamp,
    pub(super) owner_checked: Millis,
    /// The metadata store cannot grow: only what frees space is let in.
    pub(super) tight: bool,
    /// The metadata store can list more chunks.
    pub(super) growable: bool,
    /// What the metadata slot lists.
    pub(super) chunks: Box<dyn Fn() -> Vec<Chunk> + Send>,
    /// Clients that have ended and whose logs cannot be read.
    pub(super) unreadable: BTreeMap<ClientId, Unreadable>,
    /// Clients whose logs are not looked at any more.
    pub(super) given_up: BTreeSet<ClientId>,
    /// A check is under way.
    pub(super) checking: Arc<AtomicBool>,
    pub(super) requests: u64,
    pub(super) commits: u64,
    pub(super) recalls: u64,
}

/// A request on its way.
pub(super) struct Work {
    pub(super) client: ClientId,
    pub(super) request: Box<Request>,
    pub(super) done: Asker,
    /// It has waited for space from pools already.
    pub(super) last_try: bool,
}

/// What stands behind a request to the lock engine.
pub(super) enum Ticket {
    /// A client wants a grant.
    Acquire(Acquire),
    /// Something parked needs others to lower theirs.
    Parked(u64),
}

/// A client's request for a grant.
pub(super) struct Acquire {
    pub(super) client: ClientId,
    pub(super) ino: u64,
    pub(super) done: Asker,
}

/// A grant of the lock engine.
pub(super) enum Ready {
    Granted { acquire: Acquire, mode: Mode, seq: u64 },
    Refused { done: Asker, why: String },
    Parked(u64),
}

/// Something that waits until nobody else may have a file's state cached. It takes part in the lock engine's queue as a
/// client of its own, so that it gets its turn.
pub(super) struct Parked {
    pub(super) what: Errand,
    /// Inodes that are quiet now, and how much.
    pub(super) held: BTreeMap<u64, Mode>,
}

/// What is parked.
pub(super) enum Errand {
    Work(Work),
    /// Free the blocks of an orphan.
    Reclaim(u64),
    /// Nothing itself: others lower their grants in the meantime.
    Nudge,
}

/// The time in which clients of the previous term come back.
pub(super) struct Grace {
    pub(super) missing: BTreeSet<ClientId>,
    pub(super) deadline: Millis,
    pub(super) reported: bool,
    pub(super) queue: Vec<Work>,
}

impl Grace {
    pub(super) fn new(missing: BTreeSet<ClientId>, deadline: Millis) -> Self {
        Self { missing, deadline, reported: false, queue: Vec::new() }
    }
}

/// What leaves after the commit.
#[derive(Default)]
pub(super) struct Outbox {
    pub(super) replies: Vec<(Asker, Answer)>,
    pub(super) pushes: Vec<(ClientId, Push)>,
    pub(super) overdue: Vec<(ClientId, u64)>,
    /// The grace time has ended.
    pub(super) reclaimed: bool,
    pub(super) checks: Vec<Asker>,
}

/// The name under which something parked takes part in the lock engine's queues. No node has number 0.
pub(super) fn stand_in(id: u64) -> ClientId {
    ClientId { node: NodeId(0), epoch: Epoch(0), serial: id }
}

fn is_stand_in(client: ClientId) -> bool {
    client.node == NodeId(0)
}

impl Core {
    pub(super) fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn answer(&mut self, done: Asker, result: reply::Result) {
        self.answer_with(done, result.into());
    }

    /// Answers, at this moment in the order of answers.
    pub(super) fn answer_with(&mut self, done: Asker, answer: Answer) {
        self.answers += 1;
        self.out.replies.push((done, Answer { at: self.answers, ..answer }));
    }

    pub(super) fn fail(&mut self, done: Asker, failure: Failure) {
        self.answer(done, reply::Result::Failure(failure));
    }

    pub(super) fn open_count(&self, ino: u64) -> u64 {
        self.open_counts.get(&ino).copied().unwrap_or(0)
    }

    /// Tells the lock engine something, and takes up what follows.
    pub(super) fn lock_event(&mut self, event: Event) {
        for action in self.engine.step(self.now, event) {
            self.take_action(action);
        }
    }

    pub(super) fn take_action(&mut self, action: Action) {
        match action {
            Action::Grant { ticket, resource, mode, seq, .. } => self.granted(ticket, resource, mode, seq),
            Action::Recall { holder, resource, to, seq, .. } => self.recall(holder, resource, to, seq),
            Action::Overdue { holder, resource } if !is_stand_in(holder) => {
                self.out.overdue.push((holder, resource.0));
            }
            Action::Overdue { .. } => {}
            Action::Refuse { ticket, reason } => match self.tickets.remove(&ticket) {
                Some(Ticket::Acquire(acquire)) => {
                    self.ready.push_back(Ready::Refused { done: acquire.done, why: reason.to_string() });
                }
                Some(Ticket::Parked(id)) => self.refuse_parked(id, &reason.to_string()),
                None => {}
            },
            // Claims are made by `attach`, which judges the answer itself.
            Action::ClaimConflict { .. } => {}
        }
    }

    fn granted(&mut self, ticket: u64, resource: ResourceId, mode: Mode, seq: u64) {
        match self.tickets.remove(&ticket) {
            Some(Ticket::Acquire(acquire)) => {
                self.ready.push_back(Ready::Granted { acquire, mode, seq });
            }
            Some(Ticket::Parked(id)) => {
                if let Some(parked) = self.parked.get_mut(&id) {
                    parked.held.insert(resource.0, mode);
                    self.ready.push_back(Ready::Parked(id));
                }
            }
            None => {}
        }
    }

    /// A stand-in needs no recall: it ends by itself, soon.
    pub(super) fn recall(&mut self, holder: ClientId, resource: ResourceId, to: Mode, seq: u64) {
        if is_stand_in(holder) {
            return;
        }
        self.recalls += 1;
        // A reader that had to make way for a change; a writer that makes way for readers is no reason to keep them away.
        if to == Mode::Null {
            self.contended.note(resource.0, self.now);
        }
        let to: pb::GrantMode = to.into();
        let recall = pb::Recall { ino: resource.0, to: to.into(), seq };
        let push = Push {
            volume: bytes::Bytes::copy_from_slice(self.volume.0.as_bytes()),
            term: self.term.0,
            what: Some(push::What::Recall(recall)),
        };
        self.out.pushes.push((holder, push));
    }

    fn refuse_parked(&mut self, id: u64, why: &str) {
        if let Some(Parked { what: Errand::Work(work), .. }) = self.parked.remove(&id) {
            self.ready.push_back(Ready::Refused { done: work.done, why: why.to_owned() });
        }
        // An orphan is taken up again by the next coordinator, or when it is closed next.
    }
}
