//! Requests about extended attributes. The rules are in [`crate::xattrs`].
//!
//! **Invariant:** the superblock forbids the volume to programs that do not know of attributes before the first is kept.

use super::core::Core;
use crate::format::superblock::RO_COMPAT_XATTRS;
use crate::meta::{StoreError, Tables};
use crate::namespace::existing;
use crate::proto::{GetXattr, RemoveXattr, SetXattr, XattrNames, XattrValue, reply};
use crate::refusal::OpError;
use crate::volume;
use crate::xattrs;

impl Core {
    pub(super) fn get_xattr(tables: &Tables<'_>, op: &GetXattr) -> Result<reply::Result, OpError> {
        existing(tables, op.ino)?;
        let value = tables.xattr(op.ino, &op.name)?.ok_or_else(xattrs::absent)?;
        Ok(reply::Result::XattrValue(XattrValue { value: value.into() }))
    }

    pub(super) fn list_xattrs(tables: &Tables<'_>, ino: u64) -> Result<reply::Result, OpError> {
        existing(tables, ino)?;
        let names = tables.xattr_names(ino)?.into_iter().map(Into::into).collect();
        Ok(reply::Result::XattrNames(XattrNames { names }))
    }

    pub(super) fn set_xattr(
        &mut self,
        tables: &mut Tables<'_>,
        op: &SetXattr,
    ) -> Result<reply::Result, OpError> {
        self.room_for_metadata()?;
        let mut inode = existing(tables, op.ino)?;
        self.announce_xattrs()?;
        xattrs::set(tables, op.ino, &mut inode, op)?;
        inode.ctime = self.wall;
        tables.put_inode(op.ino, &inode)?;
        Ok(reply::Result::Attr(inode.attr(op.ino)))
    }

    pub(super) fn remove_xattr(
        &mut self,
        tables: &mut Tables<'_>,
        op: &RemoveXattr,
    ) -> Result<reply::Result, OpError> {
        let mut inode = existing(tables, op.ino)?;
        xattrs::remove(tables, op.ino, &mut inode, &op.name)?;
        inode.ctime = self.wall;
        tables.put_inode(op.ino, &inode)?;
        Ok(reply::Result::Attr(inode.attr(op.ino)))
    }

    /// An older program would ignore who may do what, and leave attributes of removed inodes behind.
    fn announce_xattrs(&mut self) -> Result<(), StoreError> {
        if self.ro_compat & RO_COMPAT_XATTRS == 0 {
            volume::add_ro_compat(self.device.as_ref(), RO_COMPAT_XATTRS).map_err(|error| {
                StoreError::Superseded { how: format!("no feature bit written: {error}") }
            })?;
            self.ro_compat |= RO_COMPAT_XATTRS;
        }
        Ok(())
    }
}
