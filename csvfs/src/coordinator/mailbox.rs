//! The queue between the outside and the coordinator's thread.
//!
//! **Invariant:** a job is either taken by the thread or given back to who put it in; none is lost when the thread ends.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use lockmgr::{ClientId, Epoch, NodeId};

use super::{ClientInfo, CloseReport, CoordinatorStats, ReplyTo};
use crate::meta::StoreError;
use crate::proto::request::Op;
use crate::proto::{self as pb, Attr, FailureKind, Held, Reply, Request, reply};
use crate::refusal::failure;

/// Requests that wait to be taken; more are refused, and their clients try again.
const WAITING_MAX: usize = 1 << 16;

/// Who asked. Dropped without an answer, as when the thread fails halfway, it says so: every request is answered once.
pub(super) struct Asker {
    tell: Option<ReplyTo>,
    term: u64,
}

impl Asker {
    pub(super) fn new(tell: ReplyTo, term: u64) -> Self {
        Self { tell: Some(tell), term }
    }

    pub(super) fn answer(mut self, answer: impl Into<Answer>) {
        self.send(answer.into());
    }

    fn send(&mut self, answer: Answer) {
        if let Some(tell) = self.tell.take() {
            let Answer { result, at, known, held } = answer;
            tell(Reply { term: self.term, at, known, held, result: Some(result) });
        }
    }
}

/// What is told to who asked.
pub(super) struct Answer {
    pub(super) result: reply::Result,
    /// Orders answers by when they were true.
    pub(super) at: u64,
    /// Attributes of further inodes.
    pub(super) known: Vec<Attr>,
    /// Grants that come along.
    pub(super) held: Vec<Held>,
}

impl From<reply::Result> for Answer {
    fn from(result: reply::Result) -> Self {
        Self { result, at: 0, known: Vec::new(), held: Vec::new() }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        let stopped = failure(FailureKind::Stopped, "the coordinator has stopped");
        self.send(reply::Result::Failure(stopped).into());
    }
}

/// What the thread is asked to do.
pub(super) enum Job {
    Request(Box<Request>, Asker),
    ClientGone(ClientId),
    NodeGone(NodeId, Epoch),
    Clients(SyncSender<Vec<ClientInfo>>),
    Close(SyncSender<Result<CloseReport, StoreError>>),
}

impl Job {
    fn place(&self) -> Place {
        let Self::Request(request, _) = self else { return Place::Kept };
        match &request.op {
            Some(
                Op::Lookup(_)
                | Op::GetAttr(_)
                | Op::ReadDir(_)
                | Op::ReadLink(_)
                | Op::GetXattr(_)
                | Op::ListXattrs(_)
                | Op::StatFs(_),
            ) => Place::Looks,
            Some(
                Op::Create(_)
                | Op::Link(_)
                | Op::Unlink(_)
                | Op::Rename(_)
                | Op::SetXattr(_)
                | Op::RemoveXattr(_),
            ) => Place::Changes,
            _ => Place::Kept,
        }
    }

    fn client(&self) -> Option<&pb::ClientId> {
        match self {
            Self::Request(request, _) => request.client.as_ref(),
            _ => None,
        }
    }
}

/// What a job may do to the order of a batch.
#[derive(PartialEq, Eq)]
enum Place {
    /// It changes nothing.
    Looks,
    /// It changes files, and its client waits for the answer: who asks for something meanwhile does not count on it.
    Changes,
    /// It is about grants or clients, or what comes after it may count on it.
    Kept,
}

/// Takes those out that only look and may go first: past changes, and past nothing else of their own clients.
pub(super) fn looks_first(jobs: Vec<Job>) -> (Vec<Job>, Vec<Job>) {
    let mut kept: HashSet<Option<pb::ClientId>> = HashSet::new();
    jobs.into_iter().partition(|job| {
        let place = job.place();
        if place == Place::Kept {
            kept.insert(job.client().copied());
        }
        // What comes from nobody is about clients as such.
        let free = !kept.contains(&None) && !kept.contains(&job.client().copied());
        place == Place::Looks && free
    })
}

/// See the module.
pub(super) struct Mailbox {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Ends all writing to the store.
    revoke: Box<dyn Fn() + Send + Sync>,
    abandoned: AtomicBool,
}

struct Inner {
    jobs: VecDeque<Job>,
    open: bool,
    stats: CoordinatorStats,
}

impl Mailbox {
    pub(super) fn new(revoke: Box<dyn Fn() + Send + Sync>) -> Arc<Self> {
        let inner = Inner { jobs: VecDeque::new(), open: true, stats: CoordinatorStats::default() };
        let changed = Condvar::new();
        Arc::new(Self { inner: Mutex::new(inner), changed, revoke, abandoned: AtomicBool::new(false) })
    }

    /// Queues a job.
    ///
    /// # Errors
    /// Gives the job back when nobody will take it, and why.
    pub(super) fn put(&self, job: Job) -> Result<(), (FailureKind, Job)> {
        let mut inner = self.inner();
        if !inner.open {
            return Err((FailureKind::NotCoordinator, job));
        }
        if inner.jobs.len() >= WAITING_MAX && matches!(job, Job::Request(..)) {
            return Err((FailureKind::InGrace, job));
        }
        inner.jobs.push_back(job);
        self.changed.notify_one();
        Ok(())
    }

    /// Up to `max` jobs; waits for the first one, but not longer than `patience`.
    pub(super) fn take(&self, max: usize, patience: Option<Duration>) -> Vec<Job> {
        let idle = |inner: &mut Inner| inner.jobs.is_empty() && !self.is_abandoned();
        let mut inner = match patience {
            None => self.changed.wait_while(self.inner(), idle).expect("no panic while it is held"),
            Some(time) => {
                let waited = self.changed.wait_timeout_while(self.inner(), time, idle);
                waited.expect("no panic while it is held").0
            }
        };
        let count = inner.jobs.len().min(max);
        inner.jobs.drain(..count).collect()
    }

    /// Takes no more jobs; gives out what is left.
    pub(super) fn shut(&self) -> Vec<Job> {
        let mut inner = self.inner();
        inner.open = false;
        inner.jobs.drain(..).collect()
    }

    /// The thread has ended, by itself or by a panic; whoever still asks is told.
    pub(super) fn ended(&self, panicked: bool) {
        if panicked {
            self.revoke();
            self.inner().stats.stopped = Some("an internal error, see the log".into());
        }
        drop(self.shut());
    }

    pub(super) fn revoke(&self) {
        (self.revoke)();
    }

    /// Lets the thread end as soon as it looks.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        drop(self.inner());
        self.changed.notify_all();
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::SeqCst)
    }

    pub(super) fn stats(&self) -> CoordinatorStats {
        self.inner().stats.clone()
    }

    pub(super) fn set_stats(&self, stats: CoordinatorStats) {
        self.inner().stats = stats;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic while it is held")
    }
}
