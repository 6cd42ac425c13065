//! Reading directories.

use std::sync::Mutex;

use super::Ops;
use crate::attr::{errno, errno_of_inode};
use crate::data::BAD_HANDLE;
use crate::directory;
use crate::handles::OpenDirectory;
use crate::shared::Shared;
use crate::wire::abi::{ReadIn, ReleaseIn};
use crate::wire::listing::Listing;
use crate::wire::reply::Reply;
use crate::wire::request::Header;

impl Ops {
    pub(super) fn opendir(&self, header: Header, reply: Reply) {
        let opened = |shared: &Shared, directory| {
            shared.directories.insert(OpenDirectory { directory, ahead: Mutex::default() })
        };
        if let Some(directory) = self.shared.node.open_directory_at_hand(header.ino) {
            return reply.opened(opened(&self.shared, directory), 0);
        }
        self.wait(move |shared| match shared.node.open_directory(header.ino) {
            Ok(directory) => reply.opened(opened(shared, directory), 0),
            Err(error) => reply.error(errno_of_inode(&error)),
        });
    }

    /// Names and types; with `plus`, all attributes.
    pub(super) fn readdir(&self, header: Header, args: ReadIn, plus: bool, reply: Reply) {
        let Some(open) = self.shared.directories.get(args.fh) else { return reply.error(BAD_HANDLE) };
        self.wait(move |shared| {
            let mut listing = Listing::new(args.size);
            match directory::fill(
                header.ino,
                args.offset,
                &open,
                plus.then_some(&*shared.known),
                &mut listing,
            ) {
                Ok(()) => reply.data(listing.bytes()),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    pub(super) fn releasedir(&self, args: ReleaseIn, reply: Reply) {
        drop(self.shared.directories.remove(args.fh));
        reply.ok();
    }
}
