//! `csvctl file`.

mod clone;
mod grants;
mod map;
mod stat;

use std::path::{Path, PathBuf};

use api::Error;
use api::pb::{FileCloneRequest, FileRequest};
use clap::{Args, Subcommand};

use crate::context::Context;

#[derive(Debug, Subcommand)]
pub(crate) enum FileCommand {
    /// Show a file's inode
    Stat(FilePath),
    /// Show where a file's bytes lie on the LUN
    Map(FilePath),
    /// Show who holds or waits for a file, and for how long
    Grants(FilePath),
    /// Make a copy at once that shares all blocks with the file until either is written
    ///
    /// The copy is the file at one moment. When a VM runs from the file, its guest is held still for that moment and the
    /// copy is a clean image.
    Clone(ClonePaths),
}

impl FileCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Stat(path) => stat::run(path.request()?, context).await,
            Self::Map(path) => map::run(path.request()?, context).await,
            Self::Grants(path) => grants::run(path.request()?, context).await,
            Self::Clone(paths) => clone::run(paths.request()?, context).await,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct FilePath {
    /// A path below a mount of the volume, or VOLUME:/PATH
    path: String,
}

impl FilePath {
    fn request(self) -> Result<FileRequest, Error> {
        Ok(FileRequest { path: on_volume(&self.path)? })
    }
}

#[derive(Debug, Args)]
pub(crate) struct ClonePaths {
    /// The file: a path below a mount of the volume, or VOLUME:/PATH
    from: String,
    /// The new file, on the same volume
    to: String,
}

impl ClonePaths {
    fn request(self) -> Result<FileCloneRequest, Error> {
        Ok(FileCloneRequest { from: on_volume(&self.from)?, to: on_volume(&self.to)? })
    }
}

/// What the daemon understands: `VOLUME:/PATH` as it is, any other path absolute and without symlinks on the way to it.
pub(crate) fn on_volume(path: &str) -> Result<String, Error> {
    if is_volume_path(path) {
        return Ok(path.to_owned());
    }
    let absolute =
        std::path::absolute(path).map_err(|error| Error::usage(format!("path {path}: {error}")))?;
    let resolved = resolve_parent(&absolute);
    resolved
        .into_os_string()
        .into_string()
        .map_err(|path| Error::usage(format!("path {} is not UTF-8", path.display())))
}

fn is_volume_path(path: &str) -> bool {
    path.split_once(":/").is_some_and(|(volume, _)| !volume.is_empty() && !volume.contains('/'))
}

/// The last name stays as it is: it may be a symlink itself, or not exist.
fn resolve_parent(path: &Path) -> PathBuf {
    match (path.parent().map(std::fs::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path.to_path_buf(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_path_is_left_alone() {
        assert_eq!(on_volume("vol1:/a/b").as_deref(), Ok("vol1:/a/b"));
    }

    #[test]
    fn another_path_becomes_absolute() {
        assert!(on_volume("a:b").expect("a plain name").starts_with('/'));
    }
}
