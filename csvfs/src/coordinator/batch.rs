//! The coordinator's thread: batches, each committed as one.
//!
//! ```text
//!   take jobs -> looks, answered at once -> the others in order -> chores (reclaim, growth, pruning) -> commit
//!             -> replies, pushes -> again
//! ```
//! Who only looks is told what was committed before, without waiting for the commit of what others change: all that was
//! acknowledged when it asked is in there. A look that comes after a change in the batch, because it had to wait for grants, is
//! answered at the end: it sees that change. **Invariant:** when the commit fails, nobody has heard of anything that the batch
//! changed, and nothing follows it (D6).

use std::sync::Arc;
use std::time::Duration;

use lockmgr::Millis;
use lockmgr::engine::Event;

use super::core::{Core, Errand, Outbox};
use super::mailbox::{Asker, Job, Mailbox, looks_first};
use super::open::{chunk, still_owner};
use super::{CloseReport, CoordinatorStats};
use crate::extents::Run;
use crate::meta::{Store, StoreError, Tables};
use crate::proto::{FailureKind, reply};
use crate::refusal::failure;

/// Most jobs of a batch: bounds how much the store can grow before chunks are added again.
const JOBS_MAX: usize = 256;

/// The thread's state.
pub(super) struct Server {
    store: Store,
    core: Core,
    mailbox: Arc<Mailbox>,
}

/// How a batch ends.
enum Next {
    Go,
    Close(std::sync::mpsc::SyncSender<Result<CloseReport, StoreError>>, Vec<Job>),
}

impl Server {
    pub(super) fn new(store: Store, core: Core, mailbox: Arc<Mailbox>) -> Self {
        mailbox.set_stats(core.stats());
        Self { store, core, mailbox }
    }

    pub(super) fn mailbox(&self) -> Arc<Mailbox> {
        self.mailbox.clone()
    }

    /// Serves until it is closed, dropped, or its store fails.
    pub(super) fn run(mut self) {
        loop {
            let jobs = self.mailbox.take(JOBS_MAX, self.patience());
            if self.mailbox.is_abandoned() {
                return self.end(FailureKind::NotCoordinator, "this coordinator was given up", jobs);
            }
            match self.batch(jobs) {
                Ok(Next::Go) => self.mailbox.set_stats(self.core.stats()),
                Ok(Next::Close(tell, rest)) => return self.close(&tell, rest),
                Err(error) => return self.stop(&error),
            }
        }
    }

    /// How long the thread may sleep.
    fn patience(&self) -> Option<Duration> {
        let core = &self.core;
        if core.has_work() {
            return Some(Duration::ZERO);
        }
        let grace = core.grace.as_ref().filter(|g| !g.reported).map(|g| g.deadline);
        let deadlines = core.engine.next_deadline().into_iter().chain(grace).chain(core.scarcity.deadline());
        let deadlines = deadlines.chain(core.reclaim_at);
        let at: Option<Millis> = deadlines.min();
        at.map(|at| Duration::from_millis(at.since(core.clock.now())))
    }

    fn batch(&mut self, jobs: Vec<Job>) -> Result<Next, StoreError> {
        let transaction = self.store.begin()?;
        let mut tables = transaction.tables()?;
        let next = self.execute(&mut tables, jobs)?;
        let chunks = self.chores(&mut tables)?;
        let changes = tables.into_changes();
        if changes.any() {
            self.check_owner()?;
            self.store.commit(transaction, &changes)?;
            self.core.commits += 1;
        } else {
            self.store.keep(transaction);
        }
        if !chunks.is_empty() {
            self.store.add_chunks(&chunks.into_iter().map(chunk).collect::<Vec<_>>())?;
        }
        self.deliver();
        self.start_checks();
        Ok(next)
    }

    fn execute(&mut self, tables: &mut Tables<'_>, jobs: Vec<Job>) -> Result<Next, StoreError> {
        let core = &mut self.core;
        core.now = core.clock.now();
        core.wall = core.clock.wall();
        core.lock_event(Event::Tick);
        core.check_grace();
        core.check_scarcity();
        for work in std::mem::take(&mut core.later) {
            core.proceed(tables, work)?;
        }
        core.take_ready(tables)?;
        let (looks, others) = looks_first(jobs);
        for job in looks {
            if let Job::Request(request, done) = job {
                core.request(tables, request, done)?;
                core.take_ready(tables)?;
            }
        }
        if !tables.changed() {
            self.deliver();
        }
        let core = &mut self.core;
        let mut jobs = others.into_iter();
        while let Some(job) = jobs.next() {
            match job {
                Job::Request(request, done) => core.request(tables, request, done)?,
                Job::ClientGone(client) => core.client_gone(tables, client)?,
                Job::NodeGone(node, epoch) => core.node_gone(tables, node, epoch)?,
                Job::Clients(tell) => drop(tell.send(core.client_infos())),
                Job::Close(tell) => return Ok(Next::Close(tell, jobs.collect())),
            }
            core.take_ready(tables)?;
        }
        Ok(Next::Go)
    }

    /// What a batch does beside its requests. Gives the chunks that the store is to get after the commit.
    fn chores(&mut self, tables: &mut Tables<'_>) -> Result<Vec<Run>, StoreError> {
        let core = &mut self.core;
        core.reclaim_in_time(tables)?;
        let chunks = core.grow_store(&self.store, tables)?;
        core.prune_replies(tables)?;
        core.store_space(tables)?;
        Ok(chunks)
    }

    /// Invariant D5: an old coordinator must not go on writing. Devices that can fence do the rest.
    fn check_owner(&mut self) -> Result<(), StoreError> {
        let core = &mut self.core;
        if core.now.since(core.owner_checked) < core.timing.owner_check_ms {
            return Ok(());
        }
        core.owner_checked = core.now;
        match still_owner(core.device.as_ref(), core) {
            Ok(true) => Ok(()),
            Ok(false) => {
                Err(StoreError::Superseded { how: "the owner block names a newer coordinator".into() })
            }
            Err(error) => Err(StoreError::Superseded { how: error.to_string() }),
        }
    }

    fn deliver(&mut self) {
        let checks = std::mem::take(&mut self.core.out.checks);
        let Outbox { replies, pushes, overdue, reclaimed, .. } =
            std::mem::replace(&mut self.core.out, Outbox { checks, ..Outbox::default() });
        for (done, reply) in replies {
            done.answer(reply);
        }
        for (client, push) in pushes {
            self.core.pushes.push(client, push);
        }
        if reclaimed {
            self.core.pushes.reclaimed();
        }
        for (client, ino) in overdue {
            self.core.pushes.overdue(client, ino);
        }
    }

    /// Only between transactions: a check reads a snapshot.
    fn start_checks(&mut self) {
        for done in std::mem::take(&mut self.core.out.checks) {
            self.core.start_check(&mut self.store, done);
        }
    }

    fn close(mut self, tell: &std::sync::mpsc::SyncSender<Result<CloseReport, StoreError>>, rest: Vec<Job>) {
        let clients = self.core.sessions.len() as u64;
        let held_ops = self.turn_away(FailureKind::NotCoordinator, "the volume is moving", rest);
        let outcome = self.store.close().map(|()| CloseReport { held_ops, clients });
        let _ = tell.send(outcome);
    }

    /// The store failed: nothing of this batch may be told, and nothing more may be written.
    fn stop(mut self, error: &StoreError) {
        self.store.end_writing();
        let reason = error.to_string();
        self.core.pushes.stopped(&reason);
        let stats = CoordinatorStats { stopped: Some(reason.clone()), ..self.core.stats() };
        self.mailbox.set_stats(stats);
        let silent = std::mem::take(&mut self.core.out);
        for (done, _) in silent.replies {
            done.answer(reply::Result::Failure(failure(FailureKind::Stopped, &reason)));
        }
        self.end(FailureKind::Stopped, &reason, Vec::new());
    }

    fn end(mut self, kind: FailureKind, why: &str, jobs: Vec<Job>) {
        self.store.end_writing();
        self.turn_away(kind, why, jobs);
    }

    /// Answers everything that is not done with a refusal, and takes nothing more.
    fn turn_away(&mut self, kind: FailureKind, why: &str, rest: Vec<Job>) -> u64 {
        let mut waiting = self.core.drain_waiting();
        for job in rest.into_iter().chain(self.mailbox.shut()) {
            match job {
                Job::Request(_, done) => waiting.push(done),
                Job::Close(tell) => drop(tell.send(Ok(CloseReport::default()))),
                Job::ClientGone(_) | Job::NodeGone(..) | Job::Clients(_) => {}
            }
        }
        let count = waiting.len() as u64;
        for done in waiting {
            done.answer(reply::Result::Failure(failure(kind, why)));
        }
        count
    }
}

impl Core {
    /// Whether there is something to do without a new job.
    fn has_work(&self) -> bool {
        !self.later.is_empty() || !self.ready.is_empty()
    }

    /// Everything that waits for something, taken out.
    fn drain_waiting(&mut self) -> Vec<Asker> {
        let mut waiting: Vec<Asker> = Vec::new();
        for (_, ticket) in std::mem::take(&mut self.tickets) {
            if let super::core::Ticket::Acquire(acquire) = ticket {
                waiting.push(acquire.done);
            }
        }
        for (_, parked) in std::mem::take(&mut self.parked) {
            if let Errand::Work(work) = parked.what {
                waiting.push(work.done);
            }
        }
        for ready in std::mem::take(&mut self.ready) {
            match ready {
                super::core::Ready::Granted { acquire, .. } => waiting.push(acquire.done),
                super::core::Ready::Refused { done, .. } => waiting.push(done),
                super::core::Ready::Parked(_) => {}
            }
        }
        waiting.extend(self.drain_lock_waits());
        waiting.extend(std::mem::take(&mut self.later).into_iter().map(|work| work.done));
        waiting.extend(self.scarcity.take(|_| true).into_iter().map(|work| work.done));
        waiting.extend(self.grace.take().into_iter().flat_map(|g| g.queue).map(|work| work.done));
        waiting.extend(std::mem::take(&mut self.out.checks));
        waiting
    }

    fn stats(&self) -> CoordinatorStats {
        CoordinatorStats {
            requests: self.requests,
            commits: self.commits,
            parked: self.parked.len() as u64,
            recalls: self.recalls,
            clients: self.sessions.len() as u64,
            missing: self.grace.as_ref().map_or(0, |g| g.missing.len() as u64),
            stopped: None,
        }
    }
}
