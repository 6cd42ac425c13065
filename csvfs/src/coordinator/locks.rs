//! Byte-range locks and `flock` of programs on all nodes. The rules are in [`lockmgr::range`].
//!
//! ```text
//!   Lock --granted--> Done                      Lock --waits--> [ asker kept by ticket ] --granted--> Done
//!                                                                       '--CancelLock--> EINTR
//! ```
//! Locks live in memory. A client has a copy of its own and claims them from the next coordinator, before anything is
//! served. **Invariant:** whoever waits is answered: with the lock, with a refusal, or by being told to attach anew.

use lockmgr::range::{Access, Family, Granted, Owner, RangeLock, Refusal, Span, Verdict};
use lockmgr::{ClientId, Millis, ResourceId};

use super::core::{Core, Work};
use super::mailbox::Asker;
use crate::meta::{StoreError, Tables};
use crate::namespace::existing;
use crate::proto::{self as pb, Done, FailureKind, LockHolder, LockInfo, reply};
use crate::refusal::{OpError, errno, failure};

/// A request that waits for a lock.
pub(super) struct LockWait {
    pub(super) client: ClientId,
    request_id: u64,
    done: Asker,
    resource: ResourceId,
    lock: RangeLock,
    since: Millis,
}

/// A lock as a message has it, of `client`.
fn from_wire(client: ClientId, lock: &pb::RangeLock) -> Option<RangeLock> {
    let family = if lock.flock { Family::Flock } else { Family::Range };
    let access = if lock.write { Access::Write } else { Access::Read };
    let span = Span { start: lock.start, end: lock.end };
    let owner = Owner { client, number: lock.owner, family };
    (span.start <= span.end).then_some(RangeLock { owner, span, access, pid: lock.pid })
}

fn checked(client: ClientId, lock: Option<&pb::RangeLock>) -> Result<(ResourceId, RangeLock), OpError> {
    let lock = lock.and_then(|lock| Some((ResourceId(lock.ino), from_wire(client, lock)?)));
    lock.ok_or_else(|| errno(libc::EINVAL, "a lock must begin before it ends"))
}

impl Core {
    /// Gives a lock, now or when it is free.
    pub(super) fn lock(&mut self, tables: &Tables<'_>, work: Work, op: &pb::Lock) -> Result<(), StoreError> {
        let found = checked(work.client, op.lock.as_ref())
            .and_then(|found| existing(tables, found.0.0).map(|_| found));
        let (resource, lock) = match found {
            Ok(found) => found,
            Err(error) => return self.refuse(work.done, error),
        };
        let ticket = self.next_id();
        let (verdict, granted) = self.range_locks.request(ticket, resource, lock, op.wait);
        match verdict {
            Verdict::Granted => {
                self.lock_since.entry((resource.0, lock.owner)).or_insert(self.now);
                self.answer(work.done, reply::Result::Done(Done {}));
            }
            Verdict::Waits => {
                let Work { client, request, done, .. } = work;
                let (request_id, since) = (request.request_id, self.now);
                let wait = LockWait { client, request_id, done, resource, lock, since };
                self.lock_waits.insert(ticket, wait);
            }
            Verdict::Refused(why) => self.refuse(work.done, refusal(why))?,
        }
        self.locks_granted(granted);
        Ok(())
    }

    fn locks_granted(&mut self, tickets: Granted) {
        for ticket in tickets {
            if let Some(wait) = self.lock_waits.remove(&ticket) {
                self.lock_since.entry((wait.resource.0, wait.lock.owner)).or_insert(self.now);
                self.answer(wait.done, reply::Result::Done(Done {}));
            }
        }
    }

    pub(super) fn unlock(&mut self, client: ClientId, op: &pb::Unlock) -> Result<reply::Result, OpError> {
        let (resource, lock) = checked(client, op.lock.as_ref())?;
        let granted = self.range_locks.unlock(resource, lock.owner, lock.span);
        if self.range_locks.held(resource).all(|held| held.owner != lock.owner) {
            self.lock_since.remove(&(resource.0, lock.owner));
        }
        self.locks_granted(granted);
        Ok(reply::Result::Done(Done {}))
    }

    pub(super) fn query_lock(&self, client: ClientId, op: &pb::QueryLock) -> Result<reply::Result, OpError> {
        let (resource, lock) = checked(client, op.lock.as_ref())?;
        let holder = self.range_locks.conflict(resource, &lock).map(|lock| holder(resource, &lock));
        Ok(reply::Result::LockHolder(holder.unwrap_or_default()))
    }

    /// Ends the waiting of an earlier request. `ENOENT`: it does not wait, or has not come yet.
    pub(super) fn cancel_lock(
        &mut self,
        client: ClientId,
        request_id: u64,
    ) -> Result<reply::Result, OpError> {
        let waits = |wait: &LockWait| wait.client == client && wait.request_id == request_id;
        let ticket = self.lock_waits.iter().find(|(_, wait)| waits(wait)).map(|(ticket, _)| *ticket);
        let Some(wait) = ticket.and_then(|ticket| self.stop_waiting(ticket)) else {
            return Err(errno(libc::ENOENT, "no such request waits for a lock"));
        };
        let interrupted = errno(libc::EINTR, "the caller was interrupted while it waited for the lock");
        if let OpError::Refused(failure) = interrupted {
            self.fail(wait.done, failure);
        }
        Ok(reply::Result::Done(Done {}))
    }

    fn stop_waiting(&mut self, ticket: u64) -> Option<LockWait> {
        self.range_locks.cancel(ticket);
        self.lock_waits.remove(&ticket)
    }

    /// Makes the table agree with what a client says that it holds, whatever it held here.
    pub(super) fn take_lock_claims(
        &mut self,
        client: ClientId,
        claims: &[pb::RangeLock],
    ) -> Result<(), String> {
        let checked = |lock: &pb::RangeLock| Some((ResourceId(lock.ino), from_wire(client, lock)?));
        let claims = claims.iter().map(checked).collect::<Option<Vec<_>>>();
        let claims =
            claims.ok_or_else(|| format!("client {client} claims a lock that ends before it begins"))?;
        match self.range_locks.claim(client, &claims) {
            Ok(granted) => {
                self.locks_granted(granted);
                Ok(())
            }
            Err(other) => Err(format!("client {client} claims a lock that {} has", other.owner.client)),
        }
    }

    /// Requests of a client that still wait: it attaches anew and sends them again, or has ended.
    pub(super) fn drop_lock_waits(&mut self, client: ClientId) {
        let theirs: Vec<u64> = self
            .lock_waits
            .iter()
            .filter(|(_, wait)| wait.client == client)
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in theirs {
            if let Some(wait) = self.stop_waiting(ticket) {
                self.fail(wait.done, failure(FailureKind::NotAttached, "the client attached anew"));
            }
        }
    }

    /// A client has ended for certain.
    pub(super) fn forget_locks(&mut self, client: ClientId) {
        let granted = self.range_locks.client_gone(client);
        self.lock_since.retain(|(_, owner), _| owner.client != client);
        self.locks_granted(granted);
    }

    /// Who has locks on a file and who waits for one, for people.
    pub(super) fn lock_infos(&self, ino: u64) -> Vec<LockInfo> {
        let resource = ResourceId(ino);
        let held = self.range_locks.held(resource).map(|lock| {
            let since = self.lock_since.get(&(ino, lock.owner)).copied();
            let waiters = self.lock_waits.values().filter(|wait| wait.resource == resource);
            let next = match waiters.count() {
                0 => "keeps it until it unlocks or ends".to_owned(),
                count => format!("keeps it until it unlocks or ends; {count} wait for locks of the file"),
            };
            self.lock_info(lock, false, since, next)
        });
        let waits = self.lock_waits.values().filter(|wait| wait.resource == resource).map(|wait| {
            let next = match self.range_locks.conflict(resource, &wait.lock) {
                Some(other) => {
                    format!("gets it when process {} of {} unlocks", other.pid, other.owner.client)
                }
                None => "is next".to_owned(),
            };
            self.lock_info(&wait.lock, true, Some(wait.since), next)
        });
        held.chain(waits).collect()
    }

    fn lock_info(&self, lock: &RangeLock, waits: bool, since: Option<Millis>, next: String) -> LockInfo {
        let client = lock.owner.client;
        LockInfo {
            lock: Some(on_wire(ResourceId(0), lock)),
            client: Some(client.into()),
            client_name: self.sessions.get(&client).map(|session| session.name.clone()).unwrap_or_default(),
            waits,
            since_ms: since.map_or(0, |since| self.now.since(since)),
            next,
        }
    }

    /// Everybody who waits for a lock, taken out.
    pub(super) fn drain_lock_waits(&mut self) -> Vec<Asker> {
        std::mem::take(&mut self.lock_waits).into_values().map(|wait| wait.done).collect()
    }
}

fn holder(resource: ResourceId, lock: &RangeLock) -> LockHolder {
    LockHolder { lock: Some(on_wire(resource, lock)), client: Some(lock.owner.client.into()) }
}

fn on_wire(resource: ResourceId, lock: &RangeLock) -> pb::RangeLock {
    pb::RangeLock {
        ino: resource.0,
        owner: lock.owner.number,
        start: lock.span.start,
        end: lock.span.end,
        write: lock.access == Access::Write,
        flock: lock.owner.family == Family::Flock,
        pid: lock.pid,
    }
}

fn refusal(why: Refusal) -> OpError {
    match why {
        Refusal::Busy => errno(libc::EAGAIN, "somebody else has a lock there"),
        Refusal::Deadlock => errno(libc::EDEADLK, "those who have the lock wait for one of this caller"),
        Refusal::TooMany => errno(libc::ENOLCK, "too many locks, or too many who wait for one"),
    }
}
