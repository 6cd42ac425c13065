//! Files behind images: opened without caching tricks, made anew without overwriting by accident.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::Error;
use blockio::{FileDevice, ImageFile, OpenOptions};
use vhdx::{Builder, HostFiles, Image, ParentPaths, ParentResolver, VhdxError};

use super::Roots;

/// Opens an existing file for reading.
pub(super) fn open(path: &Path) -> Result<Arc<dyn ImageFile>, Error> {
    open_with(path, OpenOptions { writable: false, ..OpenOptions::buffered() })
}

/// Opens an existing file for writing. The caller holds a claim on it.
pub(super) fn open_writable(path: &Path) -> Result<Arc<dyn ImageFile>, Error> {
    open_with(path, OpenOptions::buffered())
}

fn open_with(path: &Path, options: OpenOptions) -> Result<Arc<dyn ImageFile>, Error> {
    let found = std::fs::metadata(path).map_err(|error| cannot_open(path, &error))?;
    if found.is_dir() {
        return Err(Error::usage(format!("open {}: it is a folder", path.display())));
    }
    let file = FileDevice::open(path, options)
        .map_err(|error| Error::failed(format!("open {}: {error}", path.display())))?;
    Ok(Arc::new(file))
}

/// Why a path cannot be opened, for the user.
pub(super) fn cannot_open(path: &Path, error: &std::io::Error) -> Error {
    let (kind, hint) = why(error);
    Error::new(kind, format!("open {}: {error}", path.display())).hint(hint)
}

/// What kind of failure a path leads to, and what to do next.
fn why(error: &std::io::Error) -> (api::Kind, &'static str) {
    match error.kind() {
        std::io::ErrorKind::NotFound => (api::Kind::NotFound, "check the path"),
        std::io::ErrorKind::PermissionDenied => (api::Kind::Failed, "are you allowed to use it?"),
        _ => (api::Kind::Failed, "is the file system that it lies on all right?"),
    }
}

/// Refuses to change an image on which others rest besides the one in `known`, as far as they can be found.
pub(super) fn refuse_other_children(
    doing: &str,
    path: &Path,
    roots: &Roots,
    known: Option<&Path>,
) -> Result<(), Error> {
    let known = known.map(open).transpose()?.map(|file| file.identity());
    let found = with_parents(open(path)?, path, roots).children();
    for child in found.map_err(|error| super::failed(doing, path, &error))? {
        if Some(open(Path::new(&child))?.identity()) != known {
            return Err(Error::conflict(format!(
                "vhdx {doing}: {} is the parent of {child}, which needs it as it is",
                path.display()
            ))
            .hint("merge that child first, or remove it if it is of no use any more"));
        }
    }
    Ok(())
}

/// Opens an image with its parents, for reading.
pub(super) fn open_image(path: &Path, roots: &Roots) -> Result<Image, VhdxError> {
    let file = open(path).map_err(|error| VhdxError::InvalidInput(error.message))?;
    with_parents(file, path, roots).read_only()
}

/// An image whose parents are looked for in its own folder and below `roots`.
pub(super) fn with_parents(file: Arc<dyn ImageFile>, path: &Path, roots: &Roots) -> Builder {
    let (resolver, path) = place_of(path, roots);
    Builder::open(file).parents(resolver, &path)
}

/// Where an image lies, and where its parents may.
pub(super) fn place_of(path: &Path, roots: &Roots) -> (ParentResolver, String) {
    let all = roots.with(path).roots;
    let allowed = all.iter().filter_map(|root| std::fs::canonicalize(root).ok());
    let resolver = allowed.fold(resolver(), |resolver, root| resolver.root(&root.to_string_lossy()));
    (resolver, absolute(path).to_string_lossy().into_owned())
}

/// What a child at `child` says about where its parent is.
pub(super) fn paths_to(child: &Path, parent: &Path) -> Result<ParentPaths, VhdxError> {
    resolver().paths(&absolute(child).to_string_lossy(), &absolute(parent).to_string_lossy())
}

/// The folder that a path lies in, whether or not it exists yet.
pub(super) fn folder_of(path: &Path) -> PathBuf {
    absolute(path).parent().map_or_else(|| PathBuf::from("/"), Path::to_owned)
}

fn resolver() -> ParentResolver {
    ParentResolver::new(Arc::new(HostFiles::default()))
}

fn absolute(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned())
}

/// Makes a new, empty file. An existing one is replaced only with `force`.
pub(super) fn make(path: &Path, force: bool) -> Result<FileDevice, Error> {
    let cannot = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::conflict(format!("make {}: the file exists", path.display()))
                .hint("choose another name; create and convert replace a file with --force")
        }
        _ => {
            let (kind, hint) = why(&error);
            Error::new(kind, format!("make {}: {error}", path.display())).hint(hint)
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
