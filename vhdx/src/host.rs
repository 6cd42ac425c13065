//! Parents in folders of this machine.
//!
//! **Invariant:** the kernel itself keeps every step of the path below the root, symbolic links and races included; nothing
//! but a regular file is opened.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use blockio::{FileDevice, ImageFile, IoError, OpenOptions};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::resolver::{FolderEntry, OpenFailure, ParentFiles};

/// Files of this machine, opened for reading.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostFiles {
    /// Whether to go past the page cache.
    pub direct: bool,
}

impl ParentFiles for HostFiles {
    fn open(&self, root: &str, below: &str) -> Result<Arc<dyn ImageFile>, OpenFailure> {
        let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, folder, Mode::empty()).map_err(|errno| failure(errno, below))?;
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let found = rustix::fs::openat2(&root, below, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), inside)
            .map_err(|errno| failure(errno, below))?;
        let about = rustix::fs::fstat(&found).map_err(|errno| failure(errno, below))?;
        if FileType::from_raw_mode(about.st_mode) != FileType::RegularFile {
            return Err(OpenFailure::Outside("it is no regular file".to_owned()));
        }
        // The very file that was found, whatever the path means by now.
        let path = format!("/proc/self/fd/{}", found.as_raw_fd());
        let options = OpenOptions { direct: self.direct, ..OpenOptions::read_only() };
        match FileDevice::open(path, options) {
            Ok(file) => Ok(Arc::new(file)),
            Err(error) => Err(OpenFailure::Io(error)),
        }
    }

    fn list(&self, root: &str, below: &str) -> Result<Option<Vec<FolderEntry>>, OpenFailure> {
        let folder = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| failure(errno, below))?;
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let below = if below.is_empty() { "." } else { below };
        let found = rustix::fs::openat2(&root, below, folder, Mode::empty(), inside)
            .map_err(|errno| failure(errno, below))?;
        let mut entries = Vec::new();
        let io = |error: std::io::Error| {
            OpenFailure::Io(IoError::Os { op: "list", offset: 0, errno: error.raw_os_error().unwrap_or(0) })
        };
        for entry in std::fs::read_dir(format!("/proc/self/fd/{}", found.as_raw_fd())).map_err(io)? {
            let entry = entry.map_err(io)?;
            let kind = entry.file_type().map_err(io)?;
            // Names that are no text cannot be in a locator either.
            let Ok(name) = entry.file_name().into_string() else { continue };
            if kind.is_dir() || kind.is_file() {
                entries.push(FolderEntry { name, is_folder: kind.is_dir() });
            }
        }
        Ok(Some(entries))
    }
}

fn failure(errno: Errno, below: &str) -> OpenFailure {
    match errno {
        Errno::NOENT | Errno::NOTDIR => OpenFailure::NotFound,
        Errno::XDEV | Errno::LOOP => OpenFailure::Outside("a symbolic link leads out".to_owned()),
        Errno::BUSY | Errno::AGAIN | Errno::TXTBSY => OpenFailure::Locked(os(errno)),
        _ => {
            tracing::debug!(below, %errno, "a parent cannot be opened");
            OpenFailure::Io(os(errno))
        }
    }
}

fn os(errno: Errno) -> IoError {
    IoError::Os { op: "open", offset: 0, errno: errno.raw_os_error() }
}
