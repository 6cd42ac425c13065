//! The parents of a VM's disks: files of the volume that the disk lies on.
//!
//! **Invariant:** no path in an image leads to another volume, to a device or to this host's own files.

use std::sync::Arc;

use blockio::ImageFile;
use csvfs::node::{DirEntry, FileKind, FsError, Node};
use vhdx::{FolderEntry, OpenFailure, ParentFiles, ParentResolver};

/// Entries of a folder that are asked for at once.
const ENTRIES_AT_ONCE: u32 = 1000;

/// The files of one volume, as the parents of images.
struct VolumeFiles {
    node: Arc<Node>,
    /// Folders are listed, so that children are found.
    lists: bool,
}

/// Finds parents anywhere on the volume `name`. The path by which Windows knows a cluster volume means this one.
///
/// Children are not looked for: reading the images beside a disk takes the grants of the VMs that write them, which is too
/// dear for each start and each move.
pub(crate) fn on_volume(name: &str, node: &Arc<Node>) -> ParentResolver {
    resolver(name, VolumeFiles { node: Arc::clone(node), lists: false })
}

/// The same, and finds children too.
pub(crate) fn with_children(name: &str, node: &Arc<Node>) -> ParentResolver {
    resolver(name, VolumeFiles { node: Arc::clone(node), lists: true })
}

fn resolver(name: &str, files: VolumeFiles) -> ParentResolver {
    ParentResolver::new(Arc::new(files)).root("/").map(&format!(r"C:\ClusterStorage\{name}"), "/")
}

impl ParentFiles for VolumeFiles {
    fn open(&self, _root: &str, below: &str) -> Result<Arc<dyn ImageFile>, OpenFailure> {
        open(&self.node, below)
    }

    fn list(&self, _root: &str, below: &str) -> Result<Option<Vec<FolderEntry>>, OpenFailure> {
        if !self.lists {
            return Ok(None);
        }
        let folder = self.node.resolve(below).map_err(failure)?.ino;
        let (mut entries, mut cookie) = (Vec::new(), 0);
        loop {
            let page = self.node.readdir(folder, cookie, ENTRIES_AT_ONCE).map_err(failure)?;
            entries.extend(page.entries.iter().filter_map(folder_entry));
            match page.entries.last() {
                Some(last) if !page.end => cookie = last.cookie,
                _ => return Ok(Some(entries)),
            }
        }
    }
}

/// A file or folder. Names that are no text cannot be in a locator either.
fn folder_entry(entry: &DirEntry) -> Option<FolderEntry> {
    let is_folder = entry.attr.kind == FileKind::Directory;
    let counts = is_folder || entry.attr.kind == FileKind::Regular;
    let name = String::from_utf8(entry.name.clone()).ok().filter(|_| counts)?;
    Some(FolderEntry { name, is_folder })
}

/// Opens a file of the volume. Its symbolic links are not followed: a lookup of a name below one fails.
pub(crate) fn open(node: &Arc<Node>, below: &str) -> Result<Arc<dyn ImageFile>, OpenFailure> {
    let attr = node.resolve(below).map_err(failure)?;
    let file = node.open(attr.ino).map_err(failure)?;
    Ok(file as Arc<dyn ImageFile>)
}

fn failure(error: FsError) -> OpenFailure {
    match error.errno() {
        libc::ENOENT | libc::ENOTDIR => OpenFailure::NotFound,
        libc::EINVAL | libc::EISDIR => OpenFailure::Outside("it is no regular file".to_owned()),
        libc::EBUSY | libc::EAGAIN => OpenFailure::Locked(error.into_io("open", 0)),
        _ => OpenFailure::Io(error.into_io("open", 0)),
    }
}
