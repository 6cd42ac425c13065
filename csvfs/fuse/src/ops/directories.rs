//! Reading directories.

use super::Ops;
use crate::attr::errno;
use crate::data::BAD_HANDLE;
use crate::directory;
use crate::handles::OpenDirectory;
use crate::wire::abi::{ReadIn, ReleaseIn};
use crate::wire::listing::Listing;
use crate::wire::reply::Reply;
use crate::wire::request::Header;

impl Ops {
    pub(super) fn opendir(&self, reply: Reply) {
        reply.opened(self.shared.directories.insert(OpenDirectory::default()), 0);
    }

    /// Names and types; with `plus`, all attributes.
    pub(super) fn readdir(&self, header: Header, args: ReadIn, plus: bool, reply: Reply) {
        let Some(open) = self.shared.directories.get(args.fh) else { return reply.error(BAD_HANDLE) };
        self.wait(move |shared| {
            let mut listing = Listing::new(args.size);
            match directory::fill(&shared.node, header.ino, args.offset, &open, plus, &mut listing) {
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
