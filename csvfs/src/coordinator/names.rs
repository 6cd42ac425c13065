//! Requests about names and attributes.
//!
//! The rules are in [`crate::namespace`]; here is what they mean for open files, orphans and replies.
//! **Invariant:** a file that loses its last name stays until nobody has it open.

use lockmgr::ClientId;

use super::core::Core;
use crate::meta::{StoreError, Tables};
use crate::namespace::{directory, existing, lookup};
use crate::proto::{
    Access, Create, DirEntry, DirPage, Done, FileKind, Link, LinkTarget, Lookup, ReadDir, Rename, SetAttr,
    Timestamp, Unlink, reply,
};
use crate::refusal::{OpError, errno};
use crate::xattrs;

/// Most entries of a page of a directory.
const PAGE_ENTRIES_MAX: u32 = 1024;

/// How many entries a client gets that asks for `wanted` (0: as many as it may).
pub(super) fn page_entries(wanted: u32) -> usize {
    let entries = if wanted == 0 { PAGE_ENTRIES_MAX } else { wanted.min(PAGE_ENTRIES_MAX) };
    usize::try_from(entries).expect("the bound is small")
}

impl Core {
    pub(super) fn lookup(tables: &Tables<'_>, op: &Lookup) -> Result<reply::Result, OpError> {
        let dir = directory(tables, op.parent)?;
        if op.name == b".."[..] || op.name == b"."[..] {
            let ino = if op.name.len() == 2 { dir.parent } else { op.parent };
            return Self::get_attr(tables, ino);
        }
        let (ino, inode) = lookup(tables, op.parent, &op.name)?.ok_or_else(|| {
            errno(libc::ENOENT, format!("'{}' does not exist", String::from_utf8_lossy(&op.name)))
        })?;
        Ok(reply::Result::Attr(inode.attr(ino)))
    }

    pub(super) fn get_attr(tables: &Tables<'_>, ino: u64) -> Result<reply::Result, OpError> {
        Ok(reply::Result::Attr(existing(tables, ino)?.attr(ino)))
    }

    /// A time of access: it goes forward only, and nothing else of the inode changes.
    pub(super) fn access(tables: &mut Tables<'_>, op: &Access) -> Result<reply::Result, OpError> {
        let mut inode = existing(tables, op.ino)?;
        let order = |time: Timestamp| (time.seconds, time.nanos);
        if let Some(atime) = op.atime.filter(|atime| order(*atime) > order(inode.atime)) {
            inode.atime = atime;
            tables.put_inode(op.ino, &inode)?;
        }
        Ok(reply::Result::Done(Done {}))
    }

    pub(super) fn read_link(tables: &Tables<'_>, ino: u64) -> Result<reply::Result, OpError> {
        let inode = existing(tables, ino)?;
        if inode.kind() != FileKind::Symlink {
            return Err(errno(libc::EINVAL, format!("inode {ino} is no symlink")));
        }
        Ok(reply::Result::LinkTarget(LinkTarget { target: inode.target.into() }))
    }

    pub(super) fn read_dir(tables: &Tables<'_>, op: &ReadDir) -> Result<reply::Result, OpError> {
        let dir = directory(tables, op.ino)?;
        let max = page_entries(op.max_entries);
        let mut listed = tables.list(op.ino, op.cookie, max + 1)?;
        let end = listed.len() <= max;
        listed.truncate(max);
        let mut entries = Vec::with_capacity(listed.len());
        for entry in listed {
            let missing = || StoreError::Damaged { what: format!("inode {} is missing", entry.ino) };
            let inode = tables.inode(entry.ino)?.ok_or_else(missing)?;
            let attr = Some(inode.attr(entry.ino));
            entries.push(DirEntry { name: entry.name.into(), cookie: entry.cookie, attr });
        }
        Ok(reply::Result::DirPage(DirPage { entries, end, parent: dir.parent }))
    }

    pub(super) fn create(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        request_id: u64,
        op: &Create,
    ) -> Result<reply::Result, OpError> {
        if op.unnamed || lookup(tables, op.parent, &op.name)?.is_none() {
            self.room_for_metadata()?;
        }
        let (ino, inode) = if op.unnamed {
            let unnamed = self.names(tables).create_unnamed(op)?;
            self.orphaned(Some(unnamed.0));
            unnamed
        } else {
            self.names(tables).create(op)?
        };
        if op.open {
            self.count_open(client, ino, request_id);
        }
        Ok(reply::Result::Attr(inode.attr(ino)))
    }

    pub(super) fn link(&mut self, tables: &mut Tables<'_>, op: &Link) -> Result<reply::Result, OpError> {
        self.room_for_metadata()?;
        let (ino, inode) = self.names(tables).link(op.ino, op.parent, &op.name)?;
        self.orphans.remove(&ino);
        self.reclaimable.remove(&ino);
        Ok(reply::Result::Attr(inode.attr(ino)))
    }

    pub(super) fn unlink(&mut self, tables: &mut Tables<'_>, op: &Unlink) -> Result<reply::Result, OpError> {
        let nameless = self.names(tables).unlink(op.parent, &op.name, op.directory)?;
        self.orphaned(nameless);
        Ok(reply::Result::Done(Done {}))
    }

    pub(super) fn rename(&mut self, tables: &mut Tables<'_>, op: &Rename) -> Result<reply::Result, OpError> {
        self.room_for_metadata()?;
        let nameless = self.names(tables).rename(op)?;
        self.orphaned(nameless);
        Ok(reply::Result::Done(Done {}))
    }

    pub(super) fn set_attr(
        &mut self,
        tables: &mut Tables<'_>,
        op: &SetAttr,
    ) -> Result<reply::Result, OpError> {
        let mut inode = existing(tables, op.ino)?;
        if let Some(size) = op.size_bytes {
            self.set_size(tables, op.ino, &mut inode, size)?;
        }
        self.names(tables).set_attr(&mut inode, op);
        if op.size_bytes.is_some() && op.mtime.is_none() {
            inode.mtime = self.wall;
        }
        if op.mode.is_some() {
            xattrs::follow_mode(tables, op.ino, &inode)?;
        }
        tables.put_inode(op.ino, &inode)?;
        Ok(reply::Result::Attr(inode.attr(op.ino)))
    }
}
