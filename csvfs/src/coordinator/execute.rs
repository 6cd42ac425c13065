//! One request to the function that does it.
//!
//! **Invariant:** when this refuses, nothing has changed.

use super::core::{Core, Work};
use crate::meta::Tables;
use crate::namespace::Names;
use crate::proto::request::Op;
use crate::proto::{FailureKind, reply};
use crate::refusal::{OpError, refused};

impl Core {
    pub(super) fn execute(&mut self, tables: &mut Tables<'_>, work: &Work) -> Result<reply::Result, OpError> {
        let (client, id) = (work.client, work.request.request_id);
        let Some(op) = &work.request.op else {
            return Err(refused(FailureKind::Unsupported, "this coordinator does not know the request"));
        };
        match op {
            Op::Lookup(op) => Self::lookup(tables, op),
            Op::GetAttr(op) => Self::get_attr(tables, op.ino),
            Op::ReadLink(op) => Self::read_link(tables, op.ino),
            Op::ReadDir(op) => Self::read_dir(tables, op),
            Op::SetAttr(op) => self.set_attr(tables, op),
            Op::Create(op) => self.create(tables, client, id, op),
            Op::Link(op) => self.link(tables, op),
            Op::Unlink(op) => self.unlink(tables, op),
            Op::Rename(op) => self.rename(tables, op),
            Op::Open(op) => self.open(tables, client, id, op.ino),
            Op::Close(op) => Ok(self.close(client, id, op.ino)),
            Op::ReleaseGrant(op) => self.release_grant(tables, client, id, op),
            Op::GetMap(op) => Self::get_map(tables, op),
            Op::Allocate(op) => self.allocate(tables, work, op),
            Op::Commit(op) => self.commit(tables, client, op),
            Op::TakePool(op) => self.take_pool(tables, work, op),
            Op::ReturnPool(op) => self.return_pool(tables, client, op),
            Op::Merge(op) => self.merge(tables, client, op),
            Op::Extend(_) => self.extend(tables),
            Op::StatFs(_) => self.stat_fs(client),
            Op::ListGrants(op) => Ok(self.list_grants(op.ino)),
            Op::GetXattr(op) => Self::get_xattr(tables, op),
            Op::ListXattrs(op) => Self::list_xattrs(tables, op.ino),
            Op::SetXattr(op) => self.set_xattr(tables, op),
            Op::RemoveXattr(op) => self.remove_xattr(tables, op),
            Op::Punch(op) => self.punch(tables, client, op),
            Op::Access(op) => Self::access(tables, op),
            Op::Clone(op) => self.clone_range(tables, client, op),
            Op::Unshare(op) => self.unshare(tables, work, op),
            Op::Repair(_) => self.repair(tables),
            Op::GiveUpLog(op) => self.give_up_log(tables, op),
            Op::Unlock(op) => self.unlock(client, op),
            Op::QueryLock(op) => self.query_lock(client, op),
            Op::CancelLock(op) => self.cancel_lock(client, op.request_id),
            Op::Detach(_) => Ok(self.detach(tables, client)?),
            Op::Attach(_) | Op::Acquire(_) | Op::Lock(_) | Op::Check(_) => {
                Err(refused(FailureKind::Unsupported, "these requests take another way"))
            }
        }
    }

    /// What adds to the metadata is refused while the store cannot grow.
    pub(super) fn room_for_metadata(&self) -> Result<(), OpError> {
        if !self.tight {
            Ok(())
        } else if self.growable && self.alloc.total_free() > 0 {
            // The chores of this batch take it.
            Err(OpError::Later)
        } else {
            Err(crate::refusal::errno(libc::ENOSPC, "the volume is full: no space for metadata"))
        }
    }

    pub(super) fn names<'a, 't>(&'a mut self, tables: &'a mut Tables<'t>) -> Names<'a, 't> {
        self.globals_changed = true;
        Names { tables, globals: &mut self.globals, now: self.wall }
    }
}
