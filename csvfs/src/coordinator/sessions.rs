//! Clients: attaching, coming back after a change of coordinator, leaving, and being gone.
//!
//! ```text
//!   store: clients of the last term --> missing --attach with claims--> attached --detach, gone--> forgotten
//!                                          |                               ^
//!                                          +------- gone (fenced) -----> forgotten
//! ```
//! **Invariant:** nothing is served before every client of the last term has said what it holds or is gone for certain
//! (E1); claims that exclude each other are refused.

use std::collections::{BTreeMap, BTreeSet};

use lockmgr::engine::{Action, Event};
use lockmgr::{ClientId, Epoch, Mode, NodeId, ResourceId};

use super::ClientInfo;
use super::core::{Core, Errand, Ticket, Work, stand_in};
use crate::format::layout::BLOCK_BYTES;
use crate::meta::{ClientRecord, StoreError, Tables};
use crate::proto::request::Op;
use crate::proto::{Attach, Attached, Claim, FailureKind, GrantMode, reply};
use crate::refusal::{errno, failure};

/// Longest name of a client in bytes; what is longer is cut.
const NAME_BYTES_MAX: usize = 128;

/// Replies kept for one client, however few it says that it has. No client has as many requests under way.
const REPLIES_MAX: usize = 1 << 16;

/// Clients that have left, of which this is remembered.
const DEPARTED_MAX: usize = 1024;

/// What the coordinator knows of a client.
#[derive(Debug, Default)]
pub(super) struct Session {
    pub(super) name: String,
    pub(super) attached: bool,
    /// The request by which it did so last.
    pub(super) attached_by: u64,
    /// Files it has open, and how often.
    pub(super) opens: BTreeMap<u64, u32>,
    /// Requests whose replies are kept in the store.
    pub(super) stored: BTreeSet<u64>,
    /// Requests whose effect on `opens` or on its grants has happened since it attached.
    pub(super) counted: BTreeSet<u64>,
    /// It has the replies of all requests below.
    pub(super) completed_below: u64,
}

impl Session {
    /// Replies of requests below this need not be kept.
    pub(super) fn forget_below(&self) -> u64 {
        if self.stored.len() <= REPLIES_MAX {
            return self.completed_below;
        }
        // A little more than is too much, so that this is rare.
        let oldest = self.stored.iter().nth(self.stored.len() - REPLIES_MAX / 2);
        self.completed_below.max(oldest.copied().unwrap_or(0))
    }
}

impl Core {
    /// First request of a client to this coordinator, with what it holds.
    pub(super) fn attach(&mut self, tables: &mut Tables<'_>, work: Work) -> Result<(), StoreError> {
        let Some(Op::Attach(attach)) = &work.request.op else { return Ok(()) };
        let client = work.client;
        if work.request.request_id < self.attached_by(client) {
            // It was overtaken by a newer one, and perhaps by the client's goodbye: what it claims is outdated.
            self.fail(work.done, failure(FailureKind::NotAttached, "the client has attached anew since"));
            return Ok(());
        }
        if let Some(why) = self.attach_objection(client, attach) {
            return self.refuse(work.done, errno(libc::ESTALE, why));
        }
        self.older_clients_gone(tables, client)?;
        self.drop_waiting_of(client);
        let taken = self.take_claims(client, attach);
        if let Err(why) = taken.and_then(|()| self.take_lock_claims(client, &attach.locks)) {
            tracing::error!(%client, why, "refusing the claims of a client");
            return self.refuse(work.done, errno(libc::ESTALE, why));
        }
        if !self.sessions.contains_key(&client) {
            let record = ClientRecord { name: short_name(&attach.name), term: self.term.0 };
            tables.put_client(client, &record)?;
        }
        self.begin_session(client, attach, work.request.request_id);
        let (term, lun_bytes) = (self.term.0, self.lun_bytes);
        let attached = Attached { term, block_bytes: BLOCK_BYTES, lun_bytes, parts: true };
        self.answer(work.done, reply::Result::Attached(attached));
        self.recall_again(client);
        self.no_longer_missing(tables, client)
    }

    fn attach_objection(&self, client: ClientId, attach: &Attach) -> Option<String> {
        let newer = self.sessions.keys().any(|id| id.node == client.node && id.epoch > client.epoch);
        if newer {
            return Some(format!("node {} has a newer epoch than {}", client.node, client.epoch));
        }
        let known = self.sessions.contains_key(&client);
        let claims_nothing = attach.claims.is_empty() && attach.locks.is_empty() && attach.readers.is_empty();
        (!known && !claims_nothing).then(|| {
            format!("client {client} was given up: its grants are not its own any more; it must start anew")
        })
    }

    /// A higher epoch means that the lower one is over, and its clients with it.
    fn older_clients_gone(&mut self, tables: &mut Tables<'_>, client: ClientId) -> Result<(), StoreError> {
        match client.epoch.0.checked_sub(1) {
            Some(older) => self.node_gone(tables, client.node, Epoch(older)),
            None => Ok(()),
        }
    }

    /// Makes the lock engine agree with what the client says. It comes first, so that nobody gets what it still holds.
    fn take_claims(&mut self, client: ClientId, attach: &Attach) -> Result<(), String> {
        let mut claims: BTreeMap<u64, Mode> =
            attach.claims.iter().map(|claim| (claim.ino, self.claimed_mode(client, claim))).collect();
        for ino in readers(attach) {
            claims.entry(ino).or_insert(Mode::ProtectedRead);
        }
        for (&ino, &mode) in &claims {
            let (holder, resource) = (client, ResourceId(ino));
            if self.engine.held(client, resource).covers(mode) {
                continue;
            }
            for action in self.engine.step(self.now, Event::Claim { holder, resource, mode }) {
                if let Action::ClaimConflict { with, held, .. } = action {
                    return Err(format!("client {client} claims {mode} of inode {ino}, {with} has {held}"));
                }
            }
        }
        let held: Vec<ResourceId> = self.engine.resources_of(client).collect();
        for resource in held {
            let to = claims.get(&resource.0).copied().unwrap_or_default();
            self.lock_event(Event::Lower { holder: client, resource, to, recall_seq: 0 });
        }
        Ok(())
    }

    /// A client attaches again because messages were lost: recalls may be among them, and it is fenced for not answering.
    fn recall_again(&mut self, client: ClientId) {
        let open: Vec<_> = self
            .engine
            .resources_of(client)
            .filter_map(|resource| Some((resource, self.engine.open_recall(client, resource)?)))
            .collect();
        for (resource, (to, seq)) in open {
            self.recall(client, resource, to, seq);
        }
    }

    /// A release whose outcome the client does not know counts if it was committed.
    fn claimed_mode(&self, client: ClientId, claim: &Claim) -> Mode {
        let released = claim.release_request != 0
            && self.sessions.get(&client).is_some_and(|s| s.stored.contains(&claim.release_request));
        let mode: GrantMode = if released { claim.release_to() } else { claim.mode() };
        mode.into()
    }

    /// The request by which a client has attached, also one that has left since.
    fn attached_by(&self, client: ClientId) -> u64 {
        let left = || self.departed.iter().rev().find(|(id, _)| *id == client).map(|(_, request)| *request);
        self.sessions.get(&client).map(|session| session.attached_by).or_else(left).unwrap_or(0)
    }

    fn begin_session(&mut self, client: ClientId, attach: &Attach, attached_by: u64) {
        self.forget_opens(client);
        let mut opens = BTreeMap::new();
        for open in attach.opens.iter().filter(|open| open.count > 0) {
            *opens.entry(open.ino).or_insert(0_u32) += open.count;
            *self.open_counts.entry(open.ino).or_insert(0) += u64::from(open.count);
        }
        let session = self.sessions.entry(client).or_default();
        session.name = short_name(&attach.name);
        session.attached = true;
        session.attached_by = attached_by;
        session.opens = opens;
        session.counted.clear();
    }

    /// Requests of an earlier attachment that still wait: the client sends them again.
    fn drop_waiting_of(&mut self, client: ClientId) {
        self.drop_lock_waits(client);
        let why = || failure(FailureKind::NotAttached, "the client attached anew");
        let parked: Vec<u64> = self
            .parked
            .iter()
            .filter(|(_, p)| matches!(&p.what, Errand::Work(work) if work.client == client))
            .map(|(id, _)| *id)
            .collect();
        for id in parked {
            if let Some(Errand::Work(work)) = self.unpark_what(id) {
                self.fail(work.done, why());
            }
            self.tickets.retain(|_, ticket| !matches!(ticket, Ticket::Parked(of) if *of == id));
            self.parked.remove(&id);
            self.lock_event(Event::HolderGone { holder: stand_in(id) });
        }
        let acquires: Vec<u64> = self
            .tickets
            .iter()
            .filter(|(_, t)| matches!(t, Ticket::Acquire(acquire) if acquire.client == client))
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in acquires {
            if let Some(Ticket::Acquire(acquire)) = self.tickets.remove(&ticket) {
                self.fail(acquire.done, why());
            }
            self.lock_event(Event::Cancel { ticket });
        }
        let (theirs, others) =
            std::mem::take(&mut self.later).into_iter().partition(|work| work.client == client);
        self.later = others;
        let theirs: Vec<Work> = theirs;
        let starved = self.scarcity.take(|work| work.client == client);
        theirs.into_iter().chain(starved).for_each(|work| self.fail(work.done, why()));
    }

    /// A clean leave: nothing is held any more.
    pub(super) fn detach(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
    ) -> Result<reply::Result, StoreError> {
        let attached_by = self.attached_by(client);
        self.client_gone(tables, client)?;
        if self.departed.len() == DEPARTED_MAX {
            self.departed.pop_front();
        }
        self.departed.push_back((client, attached_by));
        Ok(reply::Result::Done(crate::proto::Done {}))
    }

    /// A client has ended for certain.
    pub(super) fn client_gone(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
    ) -> Result<(), StoreError> {
        if self.rests(client) {
            return Ok(());
        }
        // What it had acknowledged comes before anybody may have what it held (D4).
        if !self.given_up.contains(&client)
            && let Err(error) = self.replay_log(tables, client)?
        {
            self.log_unreadable(client, &error);
            return self.refuse_what_is_locked(tables);
        }
        self.unreadable.remove(&client);
        self.dissolve_pool(tables, client)?;
        let Some(session) = self.sessions.get(&client) else { return Ok(()) };
        for id in session.stored.clone() {
            tables.remove_reply(client, id)?;
        }
        tables.remove_client(client)?;
        self.drop_waiting_of(client);
        self.forget_opens(client);
        self.forget_locks(client);
        self.sessions.remove(&client);
        self.lock_event(Event::HolderGone { holder: client });
        self.no_longer_missing(tables, client)
    }

    /// All clients of a node up to an epoch have ended for certain.
    pub(super) fn node_gone(
        &mut self,
        tables: &mut Tables<'_>,
        node: NodeId,
        epoch: Epoch,
    ) -> Result<(), StoreError> {
        let gone: Vec<ClientId> =
            self.sessions.keys().filter(|id| id.node == node && id.epoch <= epoch).copied().collect();
        gone.into_iter().try_for_each(|client| self.client_gone(tables, client))
    }

    /// Ends the grace time with the last missing client, and does what has waited for it.
    fn no_longer_missing(&mut self, tables: &mut Tables<'_>, client: ClientId) -> Result<(), StoreError> {
        let Some(grace) = &mut self.grace else { return Ok(()) };
        grace.missing.remove(&client);
        if !grace.missing.is_empty() {
            return Ok(());
        }
        let queue = self.grace.take().map(|grace| grace.queue).unwrap_or_default();
        self.out.reclaimed = true;
        let unused: Vec<u64> =
            self.orphans.iter().copied().filter(|ino| self.open_count(*ino) == 0).collect();
        self.reclaimable.extend(unused);
        queue.into_iter().try_for_each(|work| self.proceed(tables, work))
    }

    /// Reports clients that have not come back in time. They keep what they had until they are gone for certain.
    pub(super) fn check_grace(&mut self) {
        let Some(grace) = self.grace.as_mut().filter(|g| !g.reported && g.deadline <= self.now) else {
            return;
        };
        grace.reported = true;
        self.out.overdue.extend(grace.missing.iter().map(|client| (*client, 0)));
    }

    pub(super) fn client_infos(&self) -> Vec<ClientInfo> {
        let info = |(id, session): (&ClientId, &Session)| ClientInfo {
            id: *id,
            name: session.name.clone(),
            open_files: session.opens.len() as u64,
            attached: session.attached,
        };
        self.sessions.iter().map(info).collect()
    }
}

/// The inodes that a client holds in PR without using them, written as distances.
fn readers(attach: &Attach) -> impl Iterator<Item = u64> {
    attach.readers.iter().scan(0_u64, |last, distance| {
        *last = last.checked_add(*distance)?;
        Some(*last)
    })
}

fn short_name(name: &str) -> String {
    let mut end = name.len().min(NAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].to_owned()
}
