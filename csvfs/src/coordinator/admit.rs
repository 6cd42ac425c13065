//! The way of a request: is it for us, is it known already, must others be quiet first, then do it.
//!
//! ```text
//!   request -> admit -> (grace: queue) -> proceed -> known? -> quiet? -> execute -> finish
//!                                            ^                   |
//!                                            +---- granted ---- park
//! ```
//! **Invariant:** a request that was answered is never done a second time (C4): its reply is in the store, in the same
//! transaction as what it did.

use bytes::Bytes;
use lockmgr::ClientId;
use lockmgr::engine::Event;
use prost::Message;

use super::core::{Core, Errand, Ready, Work, stand_in};
use super::lend::Touched;
use super::mailbox::{Answer, Asker};
use crate::meta::{StoreError, Tables};
use crate::proto::request::Op;
use crate::proto::{Failure, FailureKind, Reply, Request, reply};
use crate::refusal::{OpError, failure};

/// Most requests that wait for the end of the grace time.
const GRACE_QUEUE_MAX: usize = 1 << 16;

impl Core {
    /// Takes a new request.
    pub(super) fn request(
        &mut self,
        tables: &mut Tables<'_>,
        request: Box<Request>,
        done: Asker,
    ) -> Result<(), StoreError> {
        self.requests += 1;
        let client = match self.admit(&request) {
            Ok(client) => client,
            Err(refusal) => {
                self.fail(done, refusal);
                return Ok(());
            }
        };
        let work = Work { client, request, done, last_try: false };
        if matches!(work.request.op, Some(Op::Attach(_))) {
            return self.attach(tables, work);
        }
        // What may end the grace time cannot wait for its end.
        let ends_grace = matches!(work.request.op, Some(Op::GiveUpLog(_)));
        let locked = self.grace.as_ref().filter(|_| is_at_once(&work)).and_then(|grace| {
            let ended = grace.missing.iter().find(|client| self.unreadable.contains_key(client));
            ended.map(|client| self.locked_by(*client))
        });
        if let Some(refusal) = locked {
            return self.refuse(work.done, refusal);
        }
        if let Some(grace) = self.grace.as_mut().filter(|_| !ends_grace) {
            if grace.queue.len() < GRACE_QUEUE_MAX {
                grace.queue.push(work);
            } else {
                self.fail(work.done, failure(FailureKind::InGrace, "too many requests wait"));
            }
            return Ok(());
        }
        self.proceed(tables, work)
    }

    /// Whether the request is for this coordinator, from a client that it knows.
    fn admit(&mut self, request: &Request) -> Result<ClientId, Failure> {
        if request.volume != self.volume.0.as_bytes()[..] {
            return Err(failure(FailureKind::NotCoordinator, "this is the coordinator of another volume"));
        }
        if request.term != self.term.0 {
            let message = format!("the request is for term {}, this is term {}", request.term, self.term);
            return Err(failure(FailureKind::WrongTerm, message));
        }
        let client = request.client.as_ref().and_then(crate::pb::ClientId::checked);
        let Some(client) = client else {
            return Err(failure(FailureKind::NotAttached, "the request names no possible client"));
        };
        if matches!(request.op, Some(Op::Attach(_))) {
            return Ok(client);
        }
        match self.sessions.get_mut(&client).filter(|session| session.attached) {
            Some(session) => {
                session.completed_below = session.completed_below.max(request.completed_below);
                Ok(client)
            }
            None => Err(failure(FailureKind::NotAttached, format!("client {client} is not attached"))),
        }
    }

    /// Does a request, now or when others have lowered their grants.
    pub(super) fn proceed(&mut self, tables: &mut Tables<'_>, work: Work) -> Result<(), StoreError> {
        if !self.sessions.get(&work.client).is_some_and(|session| session.attached) {
            self.fail(work.done, failure(FailureKind::NotAttached, "the client has ended"));
            return Ok(());
        }
        if let Some(result) = self.known_reply(tables, &work)? {
            self.answer(work.done, result);
            return Ok(());
        }
        // Not as it is performed: whoever waits for the grant may have what the request waits for.
        self.part(&work);
        let needs = match self.needs(tables, &work) {
            Ok(needs) => needs,
            Err(error) => return self.refuse(work.done, error),
        };
        let locked = if is_at_once(&work) { self.lock_of_the_ended(&needs) } else { None };
        if let Some(refusal) = locked {
            return self.refuse(work.done, refusal);
        }
        match needs.split_first() {
            Some((&need, further)) => {
                let id = self.park(Errand::Work(work));
                self.wait_for(id, need);
                self.nudge(further);
                Ok(())
            }
            None => self.perform(tables, work),
        }
    }

    /// Takes up what the lock engine has granted.
    pub(super) fn take_ready(&mut self, tables: &mut Tables<'_>) -> Result<(), StoreError> {
        while let Some(ready) = self.ready.pop_front() {
            match ready {
                Ready::Granted { acquire, mode, seq } => self.hand_out(tables, acquire, mode, seq)?,
                Ready::Refused { done, why } => {
                    self.refuse(done, crate::refusal::errno(libc::ENOLCK, why))?;
                }
                Ready::Parked(id) => self.resume(tables, id)?,
            }
        }
        Ok(())
    }

    /// Something parked got one of its needs; perhaps it needs more.
    fn resume(&mut self, tables: &mut Tables<'_>, id: u64) -> Result<(), StoreError> {
        let Some(parked) = self.parked.get(&id) else { return Ok(()) };
        match &parked.what {
            Errand::Reclaim(ino) => {
                let ino = *ino;
                // Its blocks are freed by the chores of this batch; the grant ends with the inode.
                self.reclaimable.insert(ino);
                Ok(())
            }
            Errand::Work(_) => self.resume_work(tables, id),
            Errand::Nudge => {
                self.release(id);
                Ok(())
            }
        }
    }

    fn resume_work(&mut self, tables: &mut Tables<'_>, id: u64) -> Result<(), StoreError> {
        let Some(Errand::Work(work)) = self.unpark_what(id) else { return Ok(()) };
        let needs = match self.needs_beyond(tables, &work, id) {
            Ok(needs) => needs,
            Err(error) => {
                self.release(id);
                return self.refuse(work.done, error);
            }
        };
        let Some(&need) = needs.first() else {
            let outcome = self.perform(tables, work);
            self.release(id);
            return outcome;
        };
        // Waiting in order of inode numbers only, nobody waits in a circle.
        let first_held = self.parked_held(id);
        if first_held.is_some_and(|highest| need.0 < highest) {
            self.release(id);
            return self.proceed(tables, work);
        }
        self.repark(id, Errand::Work(work));
        self.wait_for(id, need);
        Ok(())
    }

    /// Ends a stand-in: others may have what it kept quiet.
    pub(super) fn release(&mut self, id: u64) {
        self.parked.remove(&id);
        self.lock_event(Event::HolderGone { holder: stand_in(id) });
    }

    fn perform(&mut self, tables: &mut Tables<'_>, work: Work) -> Result<(), StoreError> {
        match work.request.op {
            Some(Op::Acquire(op)) => return self.acquire(tables, work, op),
            Some(Op::Lock(op)) => return self.lock(tables, work, &op),
            Some(Op::Check(_)) => {
                self.out.checks.push(work.done);
                return Ok(());
            }
            _ => {}
        }
        let touched = match self.touched(tables, &work) {
            Ok(touched) => touched,
            Err(error) => return self.refuse(work.done, error),
        };
        match self.execute(tables, &work) {
            Ok(result) => self.finish(tables, work, result, &touched),
            Err(OpError::Later) => {
                self.later.push(work);
                Ok(())
            }
            Err(OpError::Scarce) => {
                self.wait_for_pools(work);
                Ok(())
            }
            Err(error) => self.refuse(work.done, error),
        }
    }

    pub(super) fn refuse(&mut self, done: Asker, error: OpError) -> Result<(), StoreError> {
        match error {
            OpError::Refused(refusal) => self.fail(done, refusal),
            OpError::Later | OpError::Scarce => self.fail(done, failure(FailureKind::InGrace, "try again")),
            OpError::Store(error) => return Err(error),
        }
        Ok(())
    }

    /// Keeps the reply with what was done, when doing it twice would be wrong.
    fn finish(
        &mut self,
        tables: &mut Tables<'_>,
        work: Work,
        result: reply::Result,
        touched: &Touched,
    ) -> Result<(), StoreError> {
        if kept(work.request.op.as_ref()) {
            let reply = Reply { term: self.term.0, result: Some(result.clone()), ..Reply::default() };
            let id = work.request.request_id;
            tables.put_reply(work.client, id, Bytes::from(reply.encode_to_vec()))?;
            if let Some(session) = self.sessions.get_mut(&work.client) {
                session.stored.insert(id);
            }
        }
        let known = Self::known_after(tables, touched)?;
        let answer = self.lend(tables, &work, touched, Answer { known, ..result.into() })?;
        self.answer_with(work.done, answer);
        Ok(())
    }

    /// The reply that this request got before, with what of it lives in memory only made true again.
    fn known_reply(&mut self, tables: &Tables<'_>, work: &Work) -> Result<Option<reply::Result>, StoreError> {
        let id = work.request.request_id;
        let known = self.sessions.get(&work.client).is_some_and(|session| session.stored.contains(&id));
        if !known {
            return Ok(None);
        }
        let Some(bytes) = tables.reply(work.client, id)? else { return Ok(None) };
        let reply = Reply::decode(bytes)
            .map_err(|error| StoreError::Damaged { what: format!("a kept reply: {error}") })?;
        let Some(result) = reply.result else { return Ok(None) };
        self.repeat_in_memory(work, &result);
        Ok(Some(result))
    }

    fn repeat_in_memory(&mut self, work: &Work, result: &reply::Result) {
        let id = work.request.request_id;
        match (&work.request.op, result) {
            (Some(Op::Create(create)), reply::Result::Attr(attr)) if create.open => {
                self.count_open(work.client, attr.ino, id);
            }
            (Some(Op::ReleaseGrant(release)), _) => self.lower(work.client, release, id),
            _ => {}
        }
    }
}

/// Requests that rather fail than wait for a client that has ended with a log that cannot be read.
pub(super) fn is_at_once(work: &Work) -> bool {
    match &work.request.op {
        Some(Op::Lookup(op)) => op.at_once,
        Some(Op::ListGrants(_)) => true,
        _ => false,
    }
}

/// Requests whose replies are kept. The others may be done again without harm.
fn kept(op: Option<&Op>) -> bool {
    match op {
        Some(Op::ReleaseGrant(release)) => release.commit.is_some(),
        Some(
            Op::SetAttr(_)
            | Op::Create(_)
            | Op::Link(_)
            | Op::Unlink(_)
            | Op::Rename(_)
            | Op::Commit(_)
            | Op::SetXattr(_)
            | Op::RemoveXattr(_)
            | Op::TakePool(_)
            | Op::ReturnPool(_)
            | Op::Merge(_)
            | Op::Clone(_)
            | Op::Extend(_),
        ) => true,
        _ => false,
    }
}
