//! Attributes of inodes, and numbers of the volume.

use std::time::Duration;

use csvfs::node::SetAttr;

use super::Ops;
use crate::attr::{errno, errno_of_inode, to_kernel, to_statx, wanted};
use crate::wire::abi::{Kstatfs, SetattrIn, fattr};
use crate::wire::reply::Reply;
use crate::wire::request::Header;

const NAME_BYTES_MAX: u32 = 255;

impl Ops {
    pub(super) fn getattr(&self, header: Header, reply: Reply) {
        if let Some((attr, keep)) = self.shared.attr_at_hand(&header) {
            return reply.attr(&to_kernel(&attr), keep);
        }
        self.wait(move |shared| {
            match shared.node.getattr(header.ino).map(|attr| shared.to_keep(attr, &header)) {
                Ok((attr, keep)) => reply.attr(&to_kernel(&attr), keep),
                Err(error) => reply.error(errno_of_inode(&error)),
            }
        });
    }

    /// As `getattr`, with the time of birth.
    pub(super) fn statx(&self, header: Header, reply: Reply) {
        if let Some((attr, keep)) = self.shared.attr_at_hand(&header) {
            return reply.statx(&to_statx(&attr), keep);
        }
        self.wait(move |shared| {
            match shared.node.getattr(header.ino).map(|attr| shared.to_keep(attr, &header)) {
                Ok((attr, keep)) => reply.statx(&to_statx(&attr), keep),
                Err(error) => reply.error(errno_of_inode(&error)),
            }
        });
    }

    pub(super) fn setattr(&self, header: Header, args: SetattrIn, reply: Reply) {
        let set: SetAttr = wanted(&args);
        let handle = (args.valid & fattr::FH != 0).then_some(args.fh);
        self.wait(move |shared| match shared.set_attributes(header.ino, &set, handle) {
            // The kernel would take it for newer than what it was told to forget before it takes it up.
            Ok(attr) => reply.attr(&to_kernel(&attr), Duration::ZERO),
            Err(error) => reply.error(errno(&error)),
        });
    }

    pub(super) fn statfs(&self, reply: Reply) {
        self.wait(move |shared| match shared.node.statfs() {
            Ok(stat) => {
                let (blocks, free) = (stat.blocks, stat.blocks_free);
                let block = u32::try_from(stat.block_bytes).unwrap_or(u32::MAX);
                reply.statfs(&Kstatfs {
                    blocks,
                    bfree: free,
                    bavail: free,
                    // Inodes are made as needed: as many as there is room for.
                    files: stat.inodes.saturating_add(free),
                    ffree: free,
                    bsize: block,
                    namelen: NAME_BYTES_MAX,
                    frsize: block,
                    _pad: 0,
                    _spare: [0; 6],
                });
            }
            Err(error) => reply.error(errno(&error)),
        });
    }
}
