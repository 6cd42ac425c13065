//! The parents of a VM's disks: files of the volume that the disk lies on.
//!
//! **Invariant:** no path in an image leads to another volume, to a device or to this host's own files.

use std::sync::Arc;

use blockio::ImageFile;
use csvfs::node::{FsError, Node};
use vhdx::{OpenFailure, ParentFiles, ParentResolver};

/// The files of one volume, as the parents of images.
struct VolumeFiles(Arc<Node>);

/// Finds parents anywhere on the volume `name`. The path by which Windows knows a cluster volume means this one.
pub(crate) fn on_volume(name: &str, node: &Arc<Node>) -> ParentResolver {
    let files = VolumeFiles(Arc::clone(node));
    ParentResolver::new(Arc::new(files)).root("/").map(&format!(r"C:\ClusterStorage\{name}"), "/")
}

impl ParentFiles for VolumeFiles {
    fn open(&self, _root: &str, below: &str) -> Result<Arc<dyn ImageFile>, OpenFailure> {
        open(&self.0, below)
    }
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
