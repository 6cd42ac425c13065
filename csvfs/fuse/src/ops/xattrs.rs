//! Extended attributes. The kernel has checked who may use which, except that it lists all names to everybody.

use csvfs::node::{FsError, XattrFlags};

use super::Ops;
use crate::attr::errno;
use crate::wire::abi::{SETXATTR_ACL_KILL_SGID, SetxattrIn};
use crate::wire::reply::Reply;
use crate::wire::request::Header;

/// Names that only the superuser sees.
const TRUSTED: &[u8] = b"trusted.";

impl Ops {
    pub(super) fn setxattr(&self, header: Header, args: SetxattrIn, name: &[u8], value: &[u8], reply: Reply) {
        let (name, value) = (name.to_vec(), value.to_vec());
        let kill_setgid = args.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0;
        let how = XattrFlags { flags: args.flags, kill_setgid };
        self.done(reply, move |shared| shared.node.set_xattr(header.ino, &name, &value, how));
    }

    pub(super) fn getxattr(&self, header: Header, room: u32, name: &[u8], reply: Reply) {
        if let Some(found) = self.shared.node.xattr_at_hand(header.ino, name) {
            return answer(found, room, reply);
        }
        let name = name.to_vec();
        self.wait(move |shared| answer(shared.node.get_xattr(header.ino, &name), room, reply));
    }

    pub(super) fn listxattr(&self, header: Header, room: u32, reply: Reply) {
        self.wait(move |shared| match shared.node.list_xattrs(header.ino) {
            Ok(names) => {
                let shown = names.iter().filter(|name| header.uid == 0 || !name.starts_with(TRUSTED));
                let list: Vec<u8> = shown.flat_map(|name| name.iter().copied().chain([0])).collect();
                reply.xattr(room, &list);
            }
            Err(error) => reply.error(errno(&error)),
        });
    }

    pub(super) fn removexattr(&self, header: Header, name: &[u8], reply: Reply) {
        let name = name.to_vec();
        self.done(reply, move |shared| shared.node.remove_xattr(header.ino, &name));
    }
}

fn answer(found: Result<impl AsRef<[u8]>, FsError>, room: u32, reply: Reply) {
    match found {
        Ok(value) => reply.xattr(room, value.as_ref()),
        Err(error) => reply.error(errno(&error)),
    }
}
