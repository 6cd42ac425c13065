//! Files behind images: opened without caching tricks, made anew without overwriting by accident.

use std::path::Path;
use std::sync::Arc;

use api::Error;
use blockio::{FileDevice, ImageFile, OpenOptions};

/// Opens an existing file for reading.
pub(super) fn open(path: &Path) -> Result<Arc<dyn ImageFile>, Error> {
    let found = std::fs::metadata(path).map_err(|error| {
        let kind = match error.kind() {
            std::io::ErrorKind::NotFound => api::Kind::NotFound,
            _ => api::Kind::Failed,
        };
        Error::new(kind, format!("open {}: {error}", path.display()))
    })?;
    if found.is_dir() {
        return Err(Error::usage(format!("open {}: it is a folder", path.display())));
    }
    let options = OpenOptions { writable: false, ..OpenOptions::buffered() };
    let file = FileDevice::open(path, options)
        .map_err(|error| Error::failed(format!("open {}: {error}", path.display())))?;
    Ok(Arc::new(file))
}

/// Makes a new, empty file. An existing one is replaced only with `force`.
pub(super) fn make(path: &Path, force: bool) -> Result<FileDevice, Error> {
    let cannot = |error: std::io::Error| {
        let failed = Error::failed(format!("make {}: {error}", path.display()));
        match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::conflict(format!("make {}: the file exists", path.display()))
                    .hint("choose another name, or add --force to replace it")
            }
            _ => failed,
        }
    };
    let mut options = std::fs::OpenOptions::new();
    options.write(true).read(true);
    if force {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    drop(options.open(path).map_err(cannot)?);
    FileDevice::open(path, OpenOptions::buffered())
        .map_err(|error| Error::failed(format!("open {}: {error}", path.display())))
}

/// Removes what a failed command has begun.
pub(super) fn clear_away(path: &Path) {
    drop(std::fs::remove_file(path));
}
