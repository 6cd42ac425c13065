//! Grants: clients acquire and lower them; the lock engine decides.
//!
//! **Invariant:** what a client gives up is committed in the same step as what it had buffered (E3, C6): the lock is free
//! only when the commit is in the transaction, and nobody is told before that is durable.

use lockmgr::engine::{Event, Holder, Waiting};
use lockmgr::{ClientId, Mode, ResourceId};

use super::core::{self, Core, Ticket, Work};
use crate::meta::{StoreError, Tables};
use crate::namespace::existing;
use crate::proto::{
    self as pb, Acquire, Done, FailureKind, GrantInfo, GrantList, GrantMode, Granted, ReleaseGrant, reply,
};
use crate::refusal::{OpError, errno, refused};

impl Core {
    /// Asks the lock engine; the answer comes when it grants, perhaps at once.
    pub(super) fn acquire(&mut self, tables: &Tables<'_>, work: Work, op: Acquire) -> Result<(), StoreError> {
        let Work { client, done, .. } = work;
        if let Err(error) = existing(tables, op.ino) {
            return self.refuse(done, error);
        }
        let ticket = self.next_id();
        self.tickets.insert(ticket, Ticket::Acquire(core::Acquire { client, ino: op.ino, done }));
        let (resource, mode) = (ResourceId(op.ino), Mode::from(op.mode()));
        self.lock_event(Event::Request { ticket, holder: client, resource, mode });
        Ok(())
    }

    /// The lock engine has granted.
    pub(super) fn hand_out(
        &mut self,
        tables: &Tables<'_>,
        acquire: core::Acquire,
        mode: Mode,
        seq: u64,
    ) -> Result<(), StoreError> {
        let core::Acquire { client, ino, done } = acquire;
        match tables.inode(ino)? {
            Some(inode) => {
                let granted = Granted { ino, mode: 0, seq, attr: Some(inode.attr(ino)) };
                let mode: GrantMode = mode.into();
                self.answer(done, reply::Result::Granted(Granted { mode: mode.into(), ..granted }));
                Ok(())
            }
            None => {
                let (holder, resource) = (client, ResourceId(ino));
                self.lock_event(Event::Lower { holder, resource, to: Mode::Null, recall_seq: 0 });
                self.refuse(done, errno(libc::ENOENT, "the file was removed while the grant was waited for"))
            }
        }
    }

    pub(super) fn release_grant(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        request_id: u64,
        op: &ReleaseGrant,
    ) -> Result<reply::Result, OpError> {
        let outcome = match &op.commit {
            Some(commit) if commit.ino != op.ino => {
                return Err(errno(libc::EINVAL, "the commit is for another inode than the grant"));
            }
            Some(commit) => Some(self.commit(tables, client, commit)?),
            None => None,
        };
        self.lower(client, op, request_id);
        Ok(outcome.unwrap_or(reply::Result::Done(Done {})))
    }

    /// Lowers once, however often the request comes.
    pub(super) fn lower(&mut self, client: ClientId, op: &ReleaseGrant, request_id: u64) {
        let Some(session) = self.sessions.get_mut(&client) else { return };
        if session.counted.insert(request_id) {
            let (resource, to) = (ResourceId(op.ino), Mode::from(op.to()));
            self.lock_event(Event::Lower { holder: client, resource, to, recall_seq: op.recall_seq });
        }
    }

    /// A client that changes the map of a file must hold it.
    pub(super) fn writing_grant(&self, client: ClientId, ino: u64) -> Result<Mode, OpError> {
        match self.engine.held(client, ResourceId(ino)) {
            mode @ (Mode::Exclusive | Mode::ConcurrentWrite) => Ok(mode),
            mode => Err(refused(
                FailureKind::NoGrant,
                format!("client {client} holds {mode} of inode {ino}; this needs EX or CW"),
            )),
        }
    }

    pub(super) fn list_grants(&self, ino: u64) -> reply::Result {
        let (holders, waiters) = (self.engine.holders(ResourceId(ino)), self.engine.waiters(ResourceId(ino)));
        let mut grants: Vec<GrantInfo> = holders.iter().map(|h| self.holder_info(h, &waiters)).collect();
        let waits_only = |w: &&Waiting| holders.iter().all(|h| h.client != w.client);
        grants.extend(waiters.iter().filter(waits_only).map(|w| self.waiting_info(w)));
        for grant in &mut grants {
            grant.next = self.next_for(grant, &holders, &waiters);
        }
        reply::Result::GrantList(GrantList { grants, locks: self.lock_infos(ino) })
    }

    /// What will become of a grant, held or waited for.
    fn next_for(&self, grant: &GrantInfo, holders: &[Holder], waiters: &[Waiting]) -> String {
        let who = grant.client.as_ref().and_then(pb::ClientId::checked);
        let held = holders.iter().find(|holder| Some(holder.client) == who);
        let turn = waiters.iter().position(|waiting| Some(waiting.client) == who);
        match (held.and_then(|holder| holder.recalled), turn) {
            (Some((to, until)), _) => format!(
                "goes down to {to} when its I/O has drained; its node is fenced if that takes more than {} ms more",
                until.since(self.now)
            ),
            (None, Some(turn)) => {
                let mode = waiters[turn].mode;
                let others = holders.iter().filter(|h| Some(h.client) != who && !h.mode.compatible(mode));
                let names: Vec<String> = others.map(|holder| self.name_of(holder.client)).collect();
                match (turn, names.is_empty()) {
                    (0, true) => "gets it now".to_owned(),
                    (0, false) => format!("gets it when {} has lowered its grant", names.join(", ")),
                    (before, _) => format!("gets it after {before} who wait longer"),
                }
            }
            (None, None) if waiters.is_empty() => "keeps it until somebody else needs the file".to_owned(),
            (None, None) => "keeps it for its minimum time, and is asked to lower it then".to_owned(),
        }
    }

    fn name_of(&self, client: ClientId) -> String {
        self.sessions
            .get(&client)
            .map_or_else(|| "a request at the coordinator".to_owned(), |s| s.name.clone())
    }

    fn holder_info(&self, holder: &Holder, waiters: &[Waiting]) -> GrantInfo {
        let wanted = waiters.iter().find(|w| w.client == holder.client).map_or(Mode::Null, |w| w.mode);
        self.info(holder.client, holder.mode, wanted, holder.since, holder.recalled.is_some())
    }

    fn waiting_info(&self, waiting: &Waiting) -> GrantInfo {
        self.info(waiting.client, Mode::Null, waiting.mode, waiting.since, false)
    }

    fn info(
        &self,
        client: ClientId,
        held: Mode,
        wanted: Mode,
        since: lockmgr::Millis,
        recalled: bool,
    ) -> GrantInfo {
        let (held, wanted): (GrantMode, GrantMode) = (held.into(), wanted.into());
        let name = self.sessions.get(&client).map_or("coordinator", |s| s.name.as_str());
        GrantInfo {
            client: Some(pb::ClientId::from(client)),
            held: held.into(),
            wanted: wanted.into(),
            since_ms: self.now.since(since),
            recalled,
            client_name: name.to_owned(),
            next: String::new(),
        }
    }
}
