//! Extended attributes of files, directories and everything else.
//!
//! They are not cached, but their number is, with the other attributes: that there is none costs no message where a grant
//! is held.

use bytes::Bytes;
use lockmgr::Mode;
use pb::reply::Result as Answer;
use pb::request::Op;

use super::names::unexpected;
use super::{Attr, FsError, Node};
use crate::proto as pb;

/// How an attribute is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XattrFlags {
    /// Those of setxattr(2): `XATTR_CREATE`, `XATTR_REPLACE`.
    pub flags: u32,
    /// With an access control list, the set-group-id bit goes.
    pub kill_setgid: bool,
}

impl Node {
    /// The value of an attribute.
    ///
    /// # Errors
    /// `ENODATA` when there is none of that name.
    pub fn get_xattr(&self, ino: u64, name: &[u8]) -> Result<Bytes, FsError> {
        if self.surely_without_xattrs(ino) {
            return Err(FsError::invalid(libc::ENODATA, "there is no such attribute"));
        }
        match self.ask(Op::GetXattr(pb::GetXattr { ino, name: Bytes::copy_from_slice(name) }))? {
            Answer::XattrValue(found) => Ok(found.value),
            other => Err(unexpected("GetXattr", &other)),
        }
    }

    /// The names of all attributes, in order.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn list_xattrs(&self, ino: u64) -> Result<Vec<Bytes>, FsError> {
        if self.surely_without_xattrs(ino) {
            return Ok(Vec::new());
        }
        match self.ask(Op::ListXattrs(pb::ListXattrs { ino }))? {
            Answer::XattrNames(list) => Ok(list.names),
            other => Err(unexpected("ListXattrs", &other)),
        }
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// `EEXIST`, `ENODATA`, `ENOSPC`, `E2BIG`, `EOPNOTSUPP` and the like.
    pub fn set_xattr(&self, ino: u64, name: &[u8], value: &[u8], how: XattrFlags) -> Result<(), FsError> {
        let (name, value) = (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value));
        let XattrFlags { flags, kill_setgid } = how;
        self.change_xattrs(ino, Op::SetXattr(pb::SetXattr { ino, name, value, flags, kill_setgid }))
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// `ENODATA` when there is none of that name.
    pub fn remove_xattr(&self, ino: u64, name: &[u8]) -> Result<(), FsError> {
        let name = Bytes::copy_from_slice(name);
        self.change_xattrs(ino, Op::RemoveXattr(pb::RemoveXattr { ino, name }))
    }

    fn change_xattrs(&self, ino: u64, op: Op) -> Result<(), FsError> {
        match self.core.find(ino) {
            // What is cached here must know of the change: mode, time and number.
            Some(pin) => {
                let _hold = pin.inode.hold(Mode::Exclusive, false)?;
                // A record that is merged later must not undo the time of change.
                pin.inode.merge_blocking()?;
                let asked_at = self.core.names_now();
                let fresh: Attr = self.ask_attr(op)?;
                pin.inode.lock().merge_attr(fresh, asked_at);
                Ok(())
            }
            None => self.ask_attr(op).map(drop),
        }
    }

    fn surely_without_xattrs(&self, ino: u64) -> bool {
        let attr = self.core.find(ino).and_then(|pin| pin.inode.attr_at_hand());
        attr.is_some_and(|attr| attr.xattrs == 0)
    }
}
