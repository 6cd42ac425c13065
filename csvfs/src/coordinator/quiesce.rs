//! Whose grants must be lowered before a request may be done.
//!
//! | request | needs |
//! |---|---|
//! | reads the attributes of an inode | nobody else has EX: size and times may be buffered there |
//! | changes an inode or its map | nobody else has anything: all of it may be cached there |
//!
//! What waits takes part in the lock engine's queue as a client of its own (a stand-in), in the mode that pushes the
//! others aside. **Invariant:** stand-ins that have something take their further needs in the order of inode numbers.
//!
//! A page of a directory that another client has just filled needs hundreds of grants lowered. To wait for one recall after
//! the other would take as many round trips. So a request that only reads has others recalled at once, by stand-ins that let go of
//! what they get: these never have one thing and wait for another.

use std::collections::BTreeMap;

use lockmgr::engine::Event;
use lockmgr::{ClientId, Mode, ResourceId};

use super::core::{Core, Errand, Parked, Ticket, Work, stand_in};
use crate::ROOT_INO;
use crate::check::repair::LOST_FOUND;
use crate::meta::Tables;
use crate::namespace::lookup;
use crate::proto::request::Op;
use crate::refusal::OpError;

/// An inode, and the mode that keeps others from disturbing.
pub(super) type Need = (u64, Mode);

/// What a request needs, before it is known who disturbs.
#[derive(Default)]
struct Wishes {
    /// Inodes whose attributes are read.
    read: Vec<u64>,
    /// Inodes that change.
    change: Vec<u64>,
    /// Whether the requester must itself hold EX on what changes, or nothing.
    alone: bool,
    /// Whether the requester too must hold nothing on what changes.
    everybody: bool,
}

impl Core {
    /// What stands in the way of `work`, lowest inode first.
    pub(super) fn needs(&self, tables: &Tables<'_>, work: &Work) -> Result<Vec<Need>, OpError> {
        self.needs_of(tables, work, None)
    }

    /// As `needs`, for something parked that holds a part already.
    pub(super) fn needs_beyond(
        &self,
        tables: &Tables<'_>,
        work: &Work,
        id: u64,
    ) -> Result<Vec<Need>, OpError> {
        self.needs_of(tables, work, Some(stand_in(id)))
    }

    fn needs_of(
        &self,
        tables: &Tables<'_>,
        work: &Work,
        own: Option<ClientId>,
    ) -> Result<Vec<Need>, OpError> {
        if self.engine.resources_in_use() == 0 {
            return Ok(Vec::new());
        }
        let Some(op) = &work.request.op else { return Ok(Vec::new()) };
        let wishes = wishes(tables, op)?;
        let mut needs: BTreeMap<u64, Mode> = BTreeMap::new();
        for ino in wishes.read {
            if self.disturbed(ino, work.client, own, |mode| mode == Mode::Exclusive) {
                needs.insert(ino, Mode::ProtectedRead);
            }
        }
        for ino in wishes.change {
            let resource = ResourceId(ino);
            let covered = !wishes.everybody && self.engine.held(work.client, resource) == Mode::Exclusive;
            let disturbed = self.disturbed(ino, work.client, own, |_| true);
            let itself =
                (wishes.alone || wishes.everybody) && self.engine.held(work.client, resource) != Mode::Null;
            let quiet = own.is_some_and(|own| self.engine.held(own, resource) == Mode::Exclusive);
            if !covered && !quiet && (disturbed || itself) {
                needs.insert(ino, Mode::Exclusive);
            }
        }
        Ok(needs.into_iter().collect())
    }

    fn disturbed(
        &self,
        ino: u64,
        client: ClientId,
        own: Option<ClientId>,
        by: impl Fn(Mode) -> bool,
    ) -> bool {
        let holders = self.engine.holders(ResourceId(ino));
        holders.iter().any(|h| h.client != client && Some(h.client) != own && by(h.mode))
    }

    /// Sets something aside; gives the number of its stand-in.
    pub(super) fn park(&mut self, what: Errand) -> u64 {
        let id = self.next_id();
        self.parked.insert(id, Parked { what, held: BTreeMap::new() });
        id
    }

    /// Asks the lock engine for what something parked needs next.
    pub(super) fn wait_for(&mut self, id: u64, (ino, mode): Need) {
        let ticket = self.next_id();
        self.tickets.insert(ticket, Ticket::Parked(id));
        let (holder, resource) = (stand_in(id), ResourceId(ino));
        self.lock_event(Event::Request { ticket, holder, resource, mode });
    }

    /// Has those who are in the way of reading these too lower their grants, while the first need is waited for.
    pub(super) fn nudge(&mut self, further: &[Need]) {
        for &need in further.iter().filter(|(_, mode)| *mode == Mode::ProtectedRead) {
            let id = self.park(Errand::Nudge);
            self.wait_for(id, need);
        }
    }

    /// Takes the errand out; its stand-in stays.
    pub(super) fn unpark_what(&mut self, id: u64) -> Option<Errand> {
        let parked = self.parked.get_mut(&id)?;
        Some(std::mem::replace(&mut parked.what, Errand::Reclaim(0)))
    }

    pub(super) fn repark(&mut self, id: u64, what: Errand) {
        if let Some(parked) = self.parked.get_mut(&id) {
            parked.what = what;
        }
    }

    /// The highest inode that something parked keeps quiet.
    pub(super) fn parked_held(&self, id: u64) -> Option<u64> {
        self.parked.get(&id).and_then(|p| p.held.keys().next_back().copied())
    }
}

fn wishes(tables: &Tables<'_>, op: &Op) -> Result<Wishes, OpError> {
    let child = |parent: u64, name: &[u8]| -> Result<Option<u64>, OpError> {
        Ok(lookup(tables, parent, name)?.map(|(ino, _)| ino))
    };
    let reads = |read: Vec<u64>| Wishes { read, ..Wishes::default() };
    let changes = |change: Vec<u64>| Wishes { change, ..Wishes::default() };
    Ok(match op {
        Op::Lookup(op) => reads(child(op.parent, &op.name)?.into_iter().collect()),
        Op::GetAttr(op) => reads(vec![op.ino]),
        Op::Open(op) => reads(vec![op.ino]),
        Op::ReadDir(op) => {
            let page = tables.list(op.ino, op.cookie, super::names::page_entries(op.max_entries))?;
            reads(page.into_iter().map(|entry| entry.ino).collect())
        }
        Op::SetAttr(op) => {
            Wishes { change: vec![op.ino], alone: op.size_bytes.is_some(), ..Wishes::default() }
        }
        Op::SetXattr(op) => changes(vec![op.ino]),
        Op::RemoveXattr(op) => changes(vec![op.ino]),
        // It gets no name: the directory gives only what it inherits.
        Op::Create(op) if op.unnamed => Wishes::default(),
        Op::Create(op) => {
            let found = child(op.parent, &op.name)?;
            Wishes { read: found.into_iter().collect(), change: vec![op.parent], ..Wishes::default() }
        }
        Op::Repair(op) => {
            // What is found gets a name in a folder under the root, which may be new.
            let places = child(ROOT_INO, LOST_FOUND)?.into_iter().chain([ROOT_INO]);
            let change = op.inos.iter().copied().chain(places).collect();
            Wishes { change, everybody: true, ..Wishes::default() }
        }
        Op::Link(op) => changes(vec![op.ino, op.parent]),
        Op::Unlink(op) => {
            let found = child(op.parent, &op.name)?;
            changes(found.into_iter().chain([op.parent]).collect())
        }
        Op::Rename(op) => {
            let found = [child(op.parent, &op.name)?, child(op.new_parent, &op.new_name)?];
            changes(found.into_iter().flatten().chain([op.parent, op.new_parent]).collect())
        }
        _ => Wishes::default(),
    })
}
