//! Names: finding, making, moving and removing them.

use std::sync::Arc;

use csvfs::node::{AtHand, Attr, FsError, Node};

use super::{Ops, creation};
use crate::attr::{errno, kind_of_mode};
use crate::wire::abi::{MkdirIn, MknodIn};
use crate::wire::reply::Reply;
use crate::wire::request::Header;

impl Ops {
    /// A name that is not there is not remembered by the kernel (F6): the error leaves no entry behind.
    pub(super) fn lookup(&self, header: Header, name: &[u8], reply: Reply) {
        if name == b"." {
            // Of any inode, by its number: somebody opens it by a handle.
            return self.find(header, reply, move |node| node.getattr(header.ino));
        }
        match self.shared.node.lookup_at_hand(header.ino, name) {
            AtHand::Is(attr) => return self.shared.found(*attr, &header, reply),
            AtHand::Absent => return reply.error(libc::ENOENT),
            AtHand::Unknown => {}
        }
        let name = name.to_vec();
        self.find(header, reply, move |node| node.lookup(header.ino, &name));
    }

    fn find(
        &self,
        header: Header,
        reply: Reply,
        call: impl FnOnce(&Node) -> Result<Attr, FsError> + Send + 'static,
    ) {
        self.wait(move |shared| match call(&shared.node) {
            Ok(attr) => shared.found(attr, &header, reply),
            Err(error) => reply.error(errno(&error)),
        });
    }

    pub(super) fn readlink(&self, header: Header, reply: Reply) {
        self.wait(move |shared| match shared.node.readlink(header.ino) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(&error)),
        });
    }

    pub(super) fn symlink(&self, header: Header, name: &[u8], target: &[u8], reply: Reply) {
        let (name, target) = (name.to_vec(), target.to_vec());
        let creation = creation(&header, 0o777, 0);
        self.make(reply, move |node| node.symlink(header.ino, &name, &target, &creation));
    }

    pub(super) fn mknod(&self, header: Header, args: MknodIn, name: &[u8], reply: Reply) {
        let Some(kind) = kind_of_mode(args.mode) else { return reply.error(libc::EINVAL) };
        let (name, creation) = (name.to_vec(), creation(&header, args.mode, args.umask));
        self.make(reply, move |node| node.mknod(header.ino, &name, kind, args.rdev, &creation));
    }

    pub(super) fn mkdir(&self, header: Header, args: MkdirIn, name: &[u8], reply: Reply) {
        let creation = creation(&header, args.mode, args.umask);
        let shared = Arc::clone(&self.shared);
        self.shared.node.mkdir_then(header.ino, name, &creation, move |made| match made {
            Ok(attr) => shared.made(&attr, reply),
            Err(error) => reply.error(errno(&error)),
        });
    }

    pub(super) fn remove(&self, header: Header, name: &[u8], directory: bool, reply: Reply) {
        self.shared.node.remove_then(header.ino, name, directory, done_with(reply));
    }

    pub(super) fn rename(
        &self,
        header: Header,
        name: &[u8],
        (new_dir, new_name): (u64, &[u8]),
        flags: u32,
        reply: Reply,
    ) {
        let by = [header.uid, header.gid];
        self.shared.node.rename_then((header.ino, name), (new_dir, new_name), (flags, by), done_with(reply));
    }

    pub(super) fn link(&self, header: Header, old: u64, name: &[u8], reply: Reply) {
        let name = name.to_vec();
        self.make(reply, move |node| node.link(old, header.ino, &name));
    }
}

/// Answers with the outcome of a call that does not wait.
fn done_with(reply: Reply) -> impl FnOnce(Result<(), FsError>) + Send {
    move |outcome| reply.done(outcome.map_err(|error| errno(&error)))
}
