//! Extended attributes of files, directories and everything else.
//!
//! Remembered under a grant, as their number is: neither what was asked for before nor that there is none costs a message.

use bytes::Bytes;
use lockmgr::Mode;
use pb::reply::Result as Answer;
use pb::request::Op;

use super::inode::Holding;
use super::names::unexpected;
use super::{File, FsError, Node, remember};
use crate::proto as pb;

/// What a program may do beyond what its user may, given by whoever knew what it does.
const CAPABILITIES: &[u8] = b"security.capability";

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
        if let Some(at_hand) = self.xattr_at_hand(ino, name) {
            return at_hand;
        }
        let name = Bytes::copy_from_slice(name);
        let answered = self.core.ask(Op::GetXattr(pb::GetXattr { ino, name: name.clone() }))?;
        let stamp = answered.stamp();
        match answered.result {
            Answer::XattrValue(found) => {
                self.core.learn(ino, stamp, |known| known.set_xattr(name, found.value.clone()));
                Ok(found.value)
            }
            other => Err(unexpected("GetXattr", &other)),
        }
    }

    /// As [`Node::get_xattr`], if that takes no message. Never blocks.
    #[must_use]
    pub fn xattr_at_hand(&self, ino: u64, name: &[u8]) -> Option<Result<Bytes, FsError>> {
        if self.surely_without_xattrs(ino) {
            return Some(Err(FsError::invalid(libc::ENODATA, "there is no such attribute")));
        }
        self.core.remembered(ino, |known| known.xattr(name)).map(Ok)
    }

    /// The names of all attributes, in order.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn list_xattrs(&self, ino: u64) -> Result<Vec<Bytes>, FsError> {
        if self.surely_without_xattrs(ino) {
            return Ok(Vec::new());
        }
        if let Some(names) = self.core.remembered(ino, remember::Names::xattr_names) {
            return Ok(names);
        }
        let answered = self.core.ask(Op::ListXattrs(pb::ListXattrs { ino }))?;
        let stamp = answered.stamp();
        match answered.result {
            Answer::XattrNames(list) => {
                self.core.learn(ino, stamp, |known| known.set_xattr_names(list.names.clone()));
                Ok(list.names)
            }
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
        let _changing = self.core.changing([ino], false);
        let writer = self.core.find(ino).filter(|pin| pin.inode.lock().grant.mode == Mode::Exclusive);
        let hold = writer.as_ref().map(|pin| pin.inode.hold(Mode::Exclusive, Holding::Shared)).transpose()?;
        if let Some(pin) = &writer {
            // A record that is merged later must not undo the time of change.
            pin.inode.merge_blocking()?;
        }
        let answered = self.core.ask(op)?;
        self.core.changed_here(ino, &[], answered.stamp());
        drop(hold);
        Ok(())
    }

    fn surely_without_xattrs(&self, ino: u64) -> bool {
        self.attr_at_hand(ino).is_some_and(|attr| attr.xattrs == 0)
    }
}

impl File {
    /// Whether the file may have capabilities, as far as is known without asking. Never blocks.
    #[must_use]
    pub fn may_have_capabilities(&self) -> bool {
        if self.inode().lock().attr.is_some_and(|attr| attr.xattrs == 0) {
            return false;
        }
        let are_there = |known: &remember::Names| known.has_xattr_name(CAPABILITIES);
        self.node().core.remembered(self.ino(), are_there).unwrap_or(true)
    }

    /// Takes the capabilities away, as a write by anybody must.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn clear_capabilities(&self) -> Result<(), FsError> {
        let node = self.node();
        if !node.list_xattrs(self.ino())?.iter().any(|name| name == CAPABILITIES) {
            return Ok(());
        }
        match node.remove_xattr(self.ino(), CAPABILITIES) {
            Err(error) if error.errno() == libc::ENODATA => Ok(()),
            outcome => outcome,
        }
    }
}
