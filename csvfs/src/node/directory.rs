//! An open directory.

use std::sync::Arc;

use super::core::Pin;
use super::{DirPage, FsError, Node};

/// An open directory. As long as this lives, the directory does: removed by anybody, it has no name, no entries, and takes
/// no new ones. Dropping it closes it.
pub struct Directory {
    // Before `node`: a directory is closed while its node is there.
    pin: Pin,
    node: Arc<Node>,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory").field("ino", &self.pin.inode.ino).finish_non_exhaustive()
    }
}

impl Directory {
    pub(super) fn new(node: Arc<Node>, pin: Pin) -> Self {
        Self { pin, node }
    }

    /// Up to `max_entries` entries after `cookie` (0: from the start), see [`Node::readdir`].
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn read(&self, cookie: u64, max_entries: u32) -> Result<DirPage, FsError> {
        self.node.readdir(self.pin.inode.ino, cookie, max_entries)
    }
}
