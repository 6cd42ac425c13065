//! What an answer says beyond what was asked: attributes of what changed, and grants that let the client remember it.
//!
//! ```text
//!   Lookup  -> PR of the directory (its names) and of the inode     Create -> EX of the new file, for the first write
//!   GetAttr -> PR of the inode                                      ReadDir -> PR of the directory and of its inodes
//!   MkDir   -> PR of the new directory, which is empty
//! ```
//! So what a client asks for again and again costs it one message. Nobody is disturbed for it: such a grant is given only
//! where it is free, and not where clients have lately taken things from each other, so that two who change a directory in
//! turn do not pay for recalls that help nobody.
//!
//! **Invariant:** a grant that is lent is one of the lock engine, with its number: recalls and claims know no other kind.

use lockmgr::engine::{Action, Event};
use lockmgr::{ClientId, Millis, Mode, ResourceId};

use super::core::{Core, Work};
use super::mailbox::Answer;
use crate::meta::{StoreError, Tables};
use crate::namespace::lookup;
use crate::proto::request::Op;
use crate::proto::{Attr, FileKind, GrantMode, Held, reply};
use crate::refusal::OpError;

/// For so long after a recall of an inode nobody is lent a grant on it, and twice as long after each further one, up to a bound:
/// a change now and then costs little memory, and who takes turns without end soon does so without recalls.
const COOL_MS_FIRST: u64 = 10;
const COOL_MS_MAX: u64 = 250;
/// Who has asked so often meanwhile is lent a grant all the same: that many answers have cost more than the recall will.
const ASKS_MAX: u32 = 8;
/// A recall is the first again when the one before it is so long ago.
const QUIET_MS: u64 = 1000;
/// Inodes of which a recall is remembered. Two that share a place only cool together.
const CONTENDED_SLOTS: usize = 4096;
/// Inodes on which anybody has a grant; beyond, none is lent. Bounds memory.
const HELD_MAX: usize = 4 << 20;

/// Where clients have lately taken things from each other.
pub(super) struct Contended(Vec<Heat>);

#[derive(Clone, Copy, Default)]
struct Heat {
    recalled: Millis,
    cool_ms: u64,
    /// Answers since then that could have brought a grant.
    asks: u32,
}

impl Default for Contended {
    fn default() -> Self {
        Self(vec![Heat::default(); CONTENDED_SLOTS])
    }
}

impl Contended {
    fn slot(ino: u64) -> usize {
        usize::try_from(ino % CONTENDED_SLOTS as u64).expect("below the number of slots")
    }

    /// An inode was recalled. Recalls of several clients at one moment are one.
    pub(super) fn note(&mut self, ino: u64, now: Millis) {
        let heat = &mut self.0[Self::slot(ino)];
        let ago = now.since(heat.recalled);
        if heat.cool_ms == 0 || ago > QUIET_MS {
            heat.cool_ms = COOL_MS_FIRST;
        } else if ago > 0 {
            heat.cool_ms = (heat.cool_ms * 2).min(COOL_MS_MAX);
        }
        heat.recalled = now;
        heat.asks = 0;
    }

    /// Whether a grant may be lent again, as somebody asks about the inode.
    fn cools(&mut self, ino: u64, now: Millis) -> bool {
        let heat = &mut self.0[Self::slot(ino)];
        heat.asks = heat.asks.saturating_add(1);
        now.since(heat.recalled) >= heat.cool_ms || heat.asks > ASKS_MAX
    }
}

/// Inodes that a change of names is about, found out before it is made.
#[derive(Default)]
pub(super) struct Touched {
    changed: Vec<u64>,
    /// Nothing has the name that a Create is for.
    new: bool,
}

impl Core {
    /// What `work` is going to change, beside what its answer is.
    pub(super) fn touched(&self, tables: &Tables<'_>, work: &Work) -> Result<Touched, OpError> {
        let child = |parent: u64, name: &[u8]| -> Result<Option<u64>, OpError> {
            Ok(lookup(tables, parent, name)?.map(|(ino, _)| ino))
        };
        Ok(match &work.request.op {
            Some(Op::Create(op)) if !op.unnamed => {
                Touched { changed: vec![op.parent], new: child(op.parent, &op.name)?.is_none() }
            }
            Some(Op::Link(op)) => Touched { changed: vec![op.parent], new: false },
            Some(Op::Unlink(op)) => {
                let found = child(op.parent, &op.name)?;
                Touched { changed: found.into_iter().chain([op.parent]).collect(), new: false }
            }
            Some(Op::Rename(op)) => {
                let found = [child(op.parent, &op.name)?, child(op.new_parent, &op.new_name)?];
                let parents = [op.parent, op.new_parent];
                Touched { changed: found.into_iter().flatten().chain(parents).collect(), new: false }
            }
            _ => Touched::default(),
        })
    }

    /// Attributes of what was changed.
    pub(super) fn known_after(tables: &Tables<'_>, touched: &Touched) -> Result<Vec<Attr>, StoreError> {
        let attr = |ino: &u64| Ok(tables.inode(*ino)?.map(|inode| inode.attr(*ino)));
        touched.changed.iter().filter_map(|ino| attr(ino).transpose()).collect()
    }

    /// Adds grants to the answer where the client wants them and they are free.
    pub(super) fn lend(
        &mut self,
        tables: &Tables<'_>,
        work: &Work,
        touched: &Touched,
        mut answer: Answer,
    ) -> Result<Answer, StoreError> {
        let client = work.client;
        let read = Mode::ProtectedRead;
        match (&work.request.op, &answer.result) {
            (Some(Op::Lookup(op)), reply::Result::Attr(attr)) if op.cache => {
                answer.held.extend(self.try_lend(client, op.parent, read));
                answer.held.extend(self.try_lend(client, attr.ino, read));
                answer.known.extend(tables.inode(op.parent)?.map(|dir| dir.attr(op.parent)));
            }
            (Some(Op::GetAttr(op)), reply::Result::Attr(_)) if op.cache => {
                answer.held.extend(self.try_lend(client, op.ino, read));
            }
            (Some(Op::ReadDir(op)), reply::Result::DirPage(page)) if op.cache => {
                answer.held.extend(self.try_lend(client, op.ino, read));
                for entry in &page.entries {
                    let ino = entry.attr.as_ref().map_or(0, |attr| attr.ino);
                    answer.held.extend(self.try_lend(client, ino, read));
                }
                answer.known.extend(tables.inode(op.ino)?.map(|dir| dir.attr(op.ino)));
            }
            (Some(Op::Create(op)), reply::Result::Attr(attr)) if op.cache && op.open && touched.new => {
                answer.held.extend(self.try_lend(client, attr.ino, Mode::Exclusive));
            }
            (Some(Op::Create(op)), reply::Result::Attr(attr))
                if op.cache && op.kind() == FileKind::Directory && touched.new =>
            {
                answer.held.extend(self.try_lend(client, attr.ino, read));
            }
            _ => {}
        }
        Ok(answer)
    }

    fn try_lend(&mut self, client: ClientId, ino: u64, mode: Mode) -> Option<Held> {
        let resource = ResourceId(ino);
        let full = self.engine.resources_in_use() >= HELD_MAX;
        if full || !self.engine.is_free_for(client, resource, mode) || !self.contended.cools(ino, self.now) {
            return None;
        }
        let wanted = self.next_id();
        let mut held = None;
        for action in
            self.engine.step(self.now, Event::Request { ticket: wanted, holder: client, resource, mode })
        {
            match action {
                Action::Grant { ticket, mode, seq, .. } if ticket == wanted => {
                    let mode: GrantMode = mode.into();
                    held = Some(Held { ino, mode: mode.into(), seq });
                }
                other => self.take_action(other),
            }
        }
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INO: u64 = 7;

    #[test]
    fn the_longer_clients_take_turns_the_longer_nothing_is_lent() {
        let mut contended = Contended::default();
        assert!(contended.cools(INO, Millis(0)), "nothing was recalled yet");
        let mut now = Millis(5000);
        for cool in [10, 20, 40, 80, 160, 250, 250] {
            contended.note(INO, now);
            contended.note(INO, now);
            assert!(!contended.cools(INO, now.plus(cool - 1)) && contended.cools(INO, now.plus(cool)));
            now = now.plus(cool);
        }
        now = now.plus(QUIET_MS + 1);
        contended.note(INO, now);
        assert!(contended.cools(INO, now.plus(COOL_MS_FIRST)), "after a quiet time it begins anew");
        assert!(contended.cools(INO + 1, now));
    }

    #[test]
    fn what_is_asked_about_again_and_again_is_lent_however_lately_it_was_recalled() {
        let mut contended = Contended::default();
        let now = Millis(5000);
        for _ in 0..3 {
            contended.note(INO, now);
            assert!((0..ASKS_MAX).all(|_| !contended.cools(INO, now)));
            assert!(contended.cools(INO, now) && contended.cools(INO, now));
        }
    }
}
