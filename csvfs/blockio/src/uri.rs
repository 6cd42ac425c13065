//! What a LUN is called: `/dev/...`, `file:PATH`, `nbd://...` or `nbd+unix://...`.

use std::path::Path;
use std::sync::Arc;

use crate::{BlockDevice, FileDevice, IoError, NbdAddress, NbdDevice, NbdOptions, OpenOptions};

/// Opens what `uri` names.
///
/// | form | meaning |
/// |---|---|
/// | `/dev/...` | a block device of this machine |
/// | `file:PATH` | a regular file (or block device) at an absolute or relative path |
/// | `nbd://HOST[:PORT]/EXPORT` | an export of an NBD server, over TCP in clear text: for networks of the storage alone |
/// | `nbd+unix:///EXPORT?socket=PATH` | an export of an NBD server of this machine |
///
/// # Errors
/// [`IoError::NotOpened`] for an unknown form, and those of [`FileDevice::open`] and [`NbdDevice::open`].
pub fn open_uri(uri: &str, options: OpenOptions) -> Result<Arc<dyn BlockDevice>, IoError> {
    let not_opened = |why| IoError::NotOpened { what: uri.to_owned(), why };
    if uri.starts_with("nbd://") || uri.starts_with("nbd+unix://") {
        let address = NbdAddress::parse(uri).map_err(not_opened)?;
        let options = NbdOptions { writable: options.writable, ..NbdOptions::default() };
        return Ok(Arc::new(NbdDevice::open(&address, options)?));
    }
    let path = path_of(uri).map_err(not_opened)?;
    Ok(Arc::new(FileDevice::open(path, options)?))
}

/// The file or block device that `uri` names; none when it is reached over a network or a server.
#[must_use]
pub fn file_of_uri(uri: &str) -> Option<&Path> {
    path_of(uri).ok().map(Path::new)
}

fn path_of(uri: &str) -> Result<&str, String> {
    if let Some(path) = uri.strip_prefix("file:") {
        return if path.is_empty() { Err("file: needs a path after it".to_owned()) } else { Ok(path) };
    }
    if uri.starts_with("/dev/") {
        return Ok(uri);
    }
    Err("a LUN is named /dev/NAME, file:PATH, nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_nodes_and_files_are_told_apart_by_their_form() {
        assert_eq!(path_of("/dev/sdb"), Ok("/dev/sdb"));
        assert_eq!(path_of("file:/srv/lun.img"), Ok("/srv/lun.img"));
        assert_eq!(path_of("file:lun.img"), Ok("lun.img"));
    }

    #[test]
    fn other_forms_are_refused_with_the_forms_that_work() {
        for uri in ["", "file:", "lun.img", "iscsi://host/x"] {
            let error = open_uri(uri, OpenOptions::default()).err().expect("refused").to_string();
            assert!(error.contains("file:"), "{uri}: {error}");
        }
    }
}
