//! Chains of images on a volume, for those who do not run the VM: what an image is made of, new children, merges.

use std::sync::Arc;

use csvfs::node::{Creation, Node};
use vhdx::{Builder, ChildSpec, OpenFailure, VhdxError};

use crate::parents;

/// Images belong to root alone.
const FILE: Creation = Creation { mode: 0o600, umask: 0, uid: 0, gid: 0 };

/// Where the parents of the image at `path` lie, below the root of the volume, the nearest first. Nothing is changed.
///
/// # Errors
/// When it is no image, or a parent cannot be found.
pub fn parents_of(volume: &str, node: &Arc<Node>, path: &str) -> Result<Vec<String>, VhdxError> {
    let image = open(node, path)?.parents(parents::on_volume(volume, node), &absolute(path)).read_only()?;
    Ok(image.parent_paths().iter().map(|path| path.trim_start_matches('/').to_owned()).collect())
}

fn cannot_open(path: &str, failure: &OpenFailure) -> VhdxError {
    VhdxError::InvalidInput(format!("{path} cannot be opened: {failure:?}"))
}

/// Makes a new image that differs from the one at `parent`, which nobody has open for writing. Durable when it returns.
///
/// # Errors
/// When there is such a file already, or one of the two fails.
pub fn fork(volume: &str, node: &Arc<Node>, parent: &str, child: &str) -> Result<(), VhdxError> {
    let resolver = parents::on_volume(volume, node);
    let (above, below) = (absolute(child), absolute(parent));
    let paths = resolver.paths(&above, &below)?;
    let image = open(node, parent)?.parents(resolver, &below).read_only()?;
    let (folder, name) = child.rsplit_once('/').unwrap_or(("", child));
    let made = node.resolve(folder).and_then(|folder| node.create(folder.ino, name.as_bytes(), &FILE, true));
    let (_, file) = made.map_err(|error| VhdxError::Io {
        doing: format!("making {child}"),
        source: error.into_io("create", 0),
    })?;
    vhdx::create_child(&*file, &image, &ChildSpec::new(paths))
}

/// Merges the closed image at `child` into its parent; `top` is the child of `child`, if there is one, and rests on the parent
/// afterwards. The file of `child` stays, of no use to anybody.
///
/// # Errors
/// As [`vhdx::merge`]: the images are as they were, or the merge can be done again.
pub fn merge(
    volume: &str,
    node: &Arc<Node>,
    (child, parent): (&str, &str),
    top: Option<&str>,
) -> Result<(), VhdxError> {
    let resolver = || parents::on_volume(volume, node);
    let handle = |path: &str| parents::open(node, path).map_err(|failure| cannot_open(path, &failure));
    let (lower, upper) = (handle(parent)?, handle(child)?);
    match top {
        None => vhdx::merge(&upper, &resolver(), &absolute(child), &lower, &mut |_| ()).map(drop),
        Some(top) => {
            let disk = open(node, top)?.parents(resolver(), &absolute(top)).writable()?;
            let merged = disk.merge_parent(&upper, &lower, &mut |_| ());
            disk.close()?;
            merged.map(drop)
        }
    }
}

fn open(node: &Arc<Node>, path: &str) -> Result<Builder, VhdxError> {
    Ok(Builder::open(parents::open(node, path).map_err(|failure| cannot_open(path, &failure))?))
}

fn absolute(path: &str) -> String {
    format!("/{}", path.trim_start_matches('/'))
}
