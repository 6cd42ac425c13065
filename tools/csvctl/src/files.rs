//! Files that only their owner may read, and errors about files.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use api::Error;

/// Writes a file that only its owner may read, in one step: it is there whole or not at all.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    let fresh = path.with_extension("new");
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&fresh)
        .map_err(|error| cannot("write", &fresh, &error))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&fresh, path))
        .map_err(|error| cannot("write", path, &error))
}

/// Makes a folder that others may enter.
pub(crate) fn make_dir(path: &Path) -> Result<(), Error> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.map_err(|error| cannot("make", path, &error))
}

/// An error about a file.
pub(crate) fn cannot(doing: &str, path: &Path, error: &std::io::Error) -> Error {
    let failed = Error::failed(format!("{doing} {}: {error}", path.display()));
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => failed.hint("run it as root, or choose another folder"),
        std::io::ErrorKind::StorageFull => failed.hint("the disk behind the folder is full"),
        _ => failed,
    }
}
