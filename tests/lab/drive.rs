//! Disks for machines: raw files with a filesystem, made by mke2fs from a folder.

use std::fs::File;
use std::path::Path;

use crate::tool::{Doing, LabError, run, text};

/// A sparse file of so many MiB.
pub(crate) fn empty(image: &Path, mib: u64) -> Result<(), LabError> {
    let file = File::create(image).doing("making a drive")?;
    file.set_len(mib << 20).doing("sizing a drive")
}

/// The same with an ext4 that holds what is in `content`.
pub(crate) fn ext4(image: &Path, mib: u64, content: &Path) -> Result<(), LabError> {
    empty(image, mib)?;
    // No 64bit and no metadata_csum: busybox' tools can look at it, too.
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-O", "^64bit", "-d", text(content), text(image)]).map(drop)
}
