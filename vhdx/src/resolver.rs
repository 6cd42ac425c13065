//! From the paths in a parent locator to a file, never outside of the folders that the user allows.
//!
//! ```text
//!   ..\base\disk.vhdx            child's folder + path, `..` resolved ---+
//!   \\?\Volume{id}\base\...      mapping table: prefix -> folder --------+--> below an allowed root? --> ParentFiles::open
//!   \\?\C:\ClusterStorage\...    mapping table: prefix -> folder --------+        no: PathOutsideRoot
//! ```
//! Paths come from the image and are hostile: an image that a user uploaded must not make a node open `/etc/shadow` as a disk.
//!
//! **Invariant:** [`ParentFiles::open`] is asked only for a path that lies below a root when read as text; that it stays
//! there (symbolic links) is the duty of the implementation.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockio::{ImageFile, IoError};

use crate::error::VhdxError;
use crate::locator::{Locator, ParentPaths, PathKind};

/// Where the files of a chain are kept.
pub trait ParentFiles: Send + Sync {
    /// Opens the regular file at `below`, a `/`-separated path without `.` and `..`, seen from the folder `root`.
    ///
    /// Symbolic links may be followed as long as they stay below `root`. The file is only read.
    ///
    /// # Errors
    /// [`OpenFailure::NotFound`] when there is none, [`OpenFailure::Outside`] when a link leads out of `root` or when it is
    /// no regular file.
    fn open(&self, root: &str, below: &str) -> Result<Arc<dyn ImageFile>, OpenFailure>;

    /// What the folder `below` of `root` holds, in which children of an image are looked for; an empty `below` is `root`
    /// itself. Symbolic links are left out. None when files are known by name only.
    ///
    /// # Errors
    /// As [`Self::open`].
    fn list(&self, root: &str, below: &str) -> Result<Option<Vec<FolderEntry>>, OpenFailure> {
        let _ = (root, below);
        Ok(None)
    }
}

/// A file or folder in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderEntry {
    /// Its name.
    pub name: String,
    /// It is a folder, not a file.
    pub is_folder: bool,
}

/// Why a parent could not be opened.
#[derive(Clone, Debug)]
pub enum OpenFailure {
    /// There is no such file.
    NotFound,
    /// The path leads out of the root, or to something else than a file.
    Outside(String),
    /// Somebody else keeps it from being read.
    Locked(IoError),
    /// It cannot be read.
    Io(IoError),
}

/// Files by their whole path: for tests, and for callers that opened the chain themselves.
impl ParentFiles for BTreeMap<String, Arc<dyn ImageFile>> {
    fn open(&self, root: &str, below: &str) -> Result<Arc<dyn ImageFile>, OpenFailure> {
        self.get(&join(root, below)).cloned().ok_or(OpenFailure::NotFound)
    }

    fn list(&self, root: &str, folder: &str) -> Result<Option<Vec<FolderEntry>>, OpenFailure> {
        let folder = join(root, folder);
        let mut entries: Vec<FolderEntry> = Vec::new();
        for rest in self.keys().filter_map(|path| below(&folder, path)) {
            let (name, is_folder) = rest.split_once('/').map_or((rest, false), |(name, _)| (name, true));
            let entry = FolderEntry { name: name.to_owned(), is_folder };
            if !name.is_empty() && entries.last() != Some(&entry) {
                entries.push(entry);
            }
        }
        Ok(Some(entries))
    }
}

/// Finds the parents of images.
///
/// Without any root nothing is found: name the folders that images may refer to.
#[derive(Clone)]
pub struct ParentResolver {
    files: Arc<dyn ParentFiles>,
    roots: Vec<String>,
    mapped: Vec<(String, String)>,
}

/// A parent that was found.
pub(crate) struct Found {
    /// Where, as [`ParentResolver`] paths are written.
    pub(crate) path: String,
    /// What.
    pub(crate) file: Arc<dyn ImageFile>,
}

/// Paths that lead nowhere, for the message.
#[derive(Default)]
pub(crate) struct Tried {
    missing: Vec<String>,
    outside: Option<VhdxError>,
}

impl ParentResolver {
    /// A resolver over `files` that allows nothing yet.
    #[must_use]
    pub fn new(files: Arc<dyn ParentFiles>) -> Self {
        Self { files, roots: Vec::new(), mapped: Vec::new() }
    }

    /// Allows everything below the folder `root`, an absolute path.
    #[must_use]
    pub fn root(mut self, root: &str) -> Self {
        self.roots.push(normal(root).unwrap_or_else(|| "/".to_owned()));
        self
    }

    /// Reads Windows paths that begin with `prefix` (`C:\ClusterStorage\Volume1`, `\\server\share`,
    /// `\\?\Volume{...}`) as paths below `folder`. What comes out must still lie below a root.
    #[must_use]
    pub fn map(mut self, prefix: &str, folder: &str) -> Self {
        let folder = normal(folder).unwrap_or_else(|| "/".to_owned());
        self.mapped.push((plain(prefix).trim_end_matches('\\').to_owned(), folder));
        self
    }

    /// How a child at `child` is told where its parent at `parent` is.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidInput`] when one of the two is no absolute path.
    pub fn paths(&self, child: &str, parent: &str) -> Result<ParentPaths, VhdxError> {
        let parse = |path: &str| {
            normal(path)
                .ok_or_else(|| VhdxError::InvalidInput(format!("{path:?} is no absolute path of a file")))
        };
        let (child, parent) = (parse(child)?, parse(parent)?);
        Ok(ParentPaths {
            relative: Some(relative(&child, &parent)),
            volume: self.windows_path(&parent, true),
            absolute: self.windows_path(&parent, false),
        })
    }

    /// Opens the parent of the image at `child` by the first of its paths that leads to a file `accepts` takes.
    pub(crate) fn find<T>(
        &self,
        child: &str,
        locator: &Locator,
        mut accepts: impl FnMut(Found) -> Result<T, VhdxError>,
    ) -> Result<T, VhdxError> {
        let (mut tried, mut refused) = (Tried::default(), None);
        for kind in PathKind::ALL {
            let Some(text) = locator.path(kind) else { continue };
            let opened = self.locate(child, kind, text).and_then(|place| self.open(child, text, &place));
            match opened {
                Ok(Some(found)) => match accepts(found) {
                    Ok(accepted) => return Ok(accepted),
                    // A stale path may lead to another disk, a later one to the right one.
                    Err(error) => drop(refused.get_or_insert(error)),
                },
                Ok(None) => tried.missing.push(text.to_owned()),
                Err(error @ VhdxError::PathOutsideRoot { .. }) => drop(tried.outside.get_or_insert(error)),
                Err(error) => return Err(error),
            }
        }
        Err(refused.or(tried.outside).unwrap_or_else(|| VhdxError::ParentNotFound {
            child: child.to_owned(),
            tried: format!("no file at {}", tried.missing.join(", ")),
            hint: "bring the parent back to one of these places",
        }))
    }

    /// The locator with paths that lead to the parent where it was found, if its relative one does not. The others stay when
    /// nothing better is known: they may be right on another host.
    pub(crate) fn refreshed(&self, child: &str, locator: &Locator, parent: &str) -> Option<Locator> {
        let place = locator.path(PathKind::Relative).map(|text| self.locate(child, PathKind::Relative, text));
        if place.is_some_and(|place| place.is_ok_and(|(root, rest)| join(&root, &rest) == parent)) {
            return None;
        }
        let (fresh, old) = (self.paths(child, parent).ok()?, locator.paths());
        let mut locator = locator.clone();
        locator.set_paths(&ParentPaths {
            relative: fresh.relative,
            volume: fresh.volume.or(old.volume),
            absolute: fresh.absolute.or(old.absolute),
        });
        Some(locator)
    }

    /// The allowed folders.
    pub(crate) fn roots(&self) -> &[String] {
        &self.roots
    }

    /// The root and the path below it of the folder of a file; none when it is in none of them.
    pub(crate) fn folder_of(&self, path: &str) -> Option<(String, String)> {
        let path = normal(path)?;
        let (folder, _) = path.rsplit_once('/')?;
        let root = self.roots.iter().find(|root| below(root, folder).is_some())?;
        Some((root.clone(), below(root, folder)?.to_owned()))
    }

    /// What an allowed folder holds.
    pub(crate) fn list(&self, root: &str, below: &str) -> Result<Option<Vec<FolderEntry>>, OpenFailure> {
        self.files.list(root, below)
    }

    /// A file in an allowed folder.
    pub(crate) fn open_file(&self, root: &str, below: &str) -> Result<Arc<dyn ImageFile>, OpenFailure> {
        self.files.open(root, below)
    }

    /// The root and the path below it that a locator's path means.
    fn locate(&self, child: &str, kind: PathKind, text: &str) -> Result<(String, String), VhdxError> {
        let outside = |why: &str| VhdxError::PathOutsideRoot {
            child: child.to_owned(),
            path: text.to_owned(),
            why: why.to_owned(),
        };
        let path = match kind {
            PathKind::Relative => {
                let folder = child.rsplit_once('/').map_or("", |(folder, _)| folder);
                let is_relative = !text.starts_with(['\\', '/']) && !text.contains(':');
                is_relative.then(|| format!("{folder}/{text}"))
            }
            PathKind::Volume | PathKind::Absolute => self.mapped_path(text),
        };
        let path =
            path.ok_or_else(|| outside("its prefix is a drive, share or device that is not mapped"))?;
        let path = normal(&path).ok_or_else(|| outside("it leads above the top folder"))?;
        let root = self.roots.iter().find(|root| below(root, &path).is_some());
        let root = root.ok_or_else(|| outside(&format!("{path} is in none of them")))?;
        let rest =
            below(root, &path).filter(|rest| !rest.is_empty()).ok_or_else(|| outside("it is a folder"))?;
        Ok((root.clone(), rest.to_owned()))
    }

    fn open(
        &self,
        child: &str,
        text: &str,
        (root, rest): &(String, String),
    ) -> Result<Option<Found>, VhdxError> {
        let path = join(root, rest);
        match self.files.open(root, rest) {
            Ok(file) => Ok(Some(Found { path, file })),
            Err(OpenFailure::NotFound) => Ok(None),
            Err(OpenFailure::Outside(why)) => {
                Err(VhdxError::PathOutsideRoot { child: child.to_owned(), path: text.to_owned(), why })
            }
            Err(OpenFailure::Locked(source)) => {
                Err(VhdxError::ParentLocked { child: child.to_owned(), parent: path, source })
            }
            Err(OpenFailure::Io(source)) => {
                Err(VhdxError::Io { doing: format!("opening the parent {path} of {child}"), source })
            }
        }
    }

    /// A Windows path by the mapping table.
    fn mapped_path(&self, text: &str) -> Option<String> {
        let text = plain(text);
        self.mapped.iter().find_map(|(prefix, folder)| {
            let (start, rest) = (text.get(..prefix.len())?, text.get(prefix.len()..)?);
            let whole = rest.is_empty() || rest.starts_with('\\');
            (whole && start.eq_ignore_ascii_case(prefix)).then(|| format!("{folder}{rest}"))
        })
    }

    /// The reverse, as Windows writes it: by the id of a volume, or by drive or share.
    fn windows_path(&self, path: &str, by_volume: bool) -> Option<String> {
        self.mapped.iter().find_map(|(prefix, folder)| {
            let rest = below(folder, path)?.replace('/', "\\");
            let prefix =
                prefix.strip_prefix(r"\\").map_or_else(|| prefix.clone(), |share| format!(r"UNC\{share}"));
            (prefix.starts_with("Volume{") == by_volume).then(|| format!(r"\\?\{prefix}\{rest}"))
        })
    }
}

/// A Windows path without the prefix that only switches its parsing, and with one kind of separator.
fn plain(path: &str) -> String {
    let path = path.replace('/', "\\");
    let Some(literal) = path.strip_prefix(r"\\?\") else { return path };
    literal.strip_prefix(r"UNC\").map_or_else(|| literal.to_owned(), |share| format!(r"\\{share}"))
}

/// The absolute path with `.` and `..` resolved as text; none if it leads above the top or is not absolute.
fn normal(path: &str) -> Option<String> {
    let path = path.replace('\\', "/");
    let mut parts: Vec<&str> = Vec::new();
    for part in path.strip_prefix('/')?.split('/') {
        match part {
            "" | "." => (),
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(format!("/{}", parts.join("/")))
}

/// The rest of `path` behind the folder `root`.
fn below<'a>(root: &str, path: &'a str) -> Option<&'a str> {
    let rest = path.strip_prefix(root.trim_end_matches('/'))?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('/') }
}

pub(crate) fn join(root: &str, below: &str) -> String {
    format!("{}/{below}", root.trim_end_matches('/'))
}

/// The way from the folder of `child` to `parent`.
fn relative(child: &str, parent: &str) -> String {
    let (child, parent): (Vec<&str>, Vec<&str>) = (child.split('/').collect(), parent.split('/').collect());
    let folders = child.len() - 1;
    let common = child[..folders].iter().zip(&parent[..parent.len() - 1]).take_while(|(a, b)| a == b).count();
    let up = std::iter::repeat_n("..", folders - common);
    let here = (folders == common).then_some(".");
    let way: Vec<&str> = here.into_iter().chain(up).chain(parent[common..].iter().copied()).collect();
    way.join("\\")
}

impl std::fmt::Debug for ParentResolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParentResolver")
            .field("roots", &self.roots)
            .field("mapped", &self.mapped)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolver() -> ParentResolver {
        ParentResolver::new(Arc::new(BTreeMap::new()))
            .root("/vms")
            .root("/base/")
            .map(r"C:\ClusterStorage\Volume1", "/vms")
            .map(r"\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\", "/base")
            .map(r"D:\", "/outside")
    }

    fn located(kind: PathKind, text: &str) -> Option<String> {
        resolver().locate("/vms/a/child.avhdx", kind, text).ok().map(|(root, rest)| join(&root, &rest))
    }

    #[test]
    fn paths_of_windows_lead_to_files_below_the_roots() {
        for (kind, text, wanted) in [
            (PathKind::Relative, r".\parent.vhdx", "/vms/a/parent.vhdx"),
            (PathKind::Relative, r"..\b\parent.vhdx", "/vms/b/parent.vhdx"),
            (PathKind::Relative, r"..\..\base\parent.vhdx", "/base/parent.vhdx"),
            (PathKind::Absolute, r"\\?\C:\ClusterStorage\Volume1\b\p.vhdx", "/vms/b/p.vhdx"),
            (PathKind::Absolute, r"c:\clusterstorage\volume1\p.vhdx", "/vms/p.vhdx"),
            (PathKind::Volume, r"\\?\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\p.vhdx", "/base/p.vhdx"),
        ] {
            assert_eq!(located(kind, text).as_deref(), Some(wanted), "{text}");
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for (kind, text) in [
            (PathKind::Relative, r"..\..\etc\shadow"),
            (PathKind::Relative, r"..\..\..\..\vms\p.vhdx"),
            (PathKind::Relative, r"..\..\vms2\p.vhdx"),
            (PathKind::Relative, r"\vms\p.vhdx"),
            (PathKind::Relative, "/vms/p.vhdx"),
            (PathKind::Relative, r"C:p.vhdx"),
            (PathKind::Relative, r".."),
            (PathKind::Absolute, r"C:\Windows\p.vhdx"),
            (PathKind::Absolute, r"C:\ClusterStorage\Volume10\p.vhdx"),
            (PathKind::Absolute, r"C:\ClusterStorage\Volume1\..\..\etc\p.vhdx"),
            (PathKind::Absolute, r"D:\p.vhdx"),
            (PathKind::Absolute, r"\\server\share\p.vhdx"),
            (PathKind::Absolute, r"\\?\UNC\server\share\p.vhdx"),
            (PathKind::Absolute, r"\\.\PhysicalDrive0"),
            (PathKind::Absolute, "/dev/sda"),
            (PathKind::Volume, r"\\?\Volume{00000000-0000-0000-0000-000000000000}\p.vhdx"),
            (PathKind::Volume, r"\\?\GLOBALROOT\Device\Harddisk0"),
        ] {
            let refused = resolver().locate("/vms/a/child.avhdx", kind, text).expect_err(text);
            assert_eq!(refused.kind(), crate::ErrorKind::PathOutsideRoot, "{text}");
        }
    }

    #[test]
    fn the_way_to_the_parent_leads_back_to_it() {
        for (child, parent, wanted) in [
            ("/vms/a/c.avhdx", "/vms/a/p.vhdx", r".\p.vhdx"),
            ("/vms/a/c.avhdx", "/vms/p.vhdx", r"..\p.vhdx"),
            ("/vms/c.avhdx", "/vms/a/b/p.vhdx", r".\a\b\p.vhdx"),
            ("/vms/a/c.avhdx", "/base/p.vhdx", r"..\..\base\p.vhdx"),
        ] {
            let paths = resolver().paths(child, parent).expect("both are absolute");
            assert_eq!(paths.relative.as_deref(), Some(wanted));
            let (root, rest) = resolver().locate(child, PathKind::Relative, wanted).expect("it is allowed");
            assert_eq!(join(&root, &rest), parent);
        }
        let paths = resolver().paths("/vms/a/c.avhdx", "/vms/b/p.vhdx").expect("both are absolute");
        assert_eq!(paths.absolute.as_deref(), Some(r"\\?\C:\ClusterStorage\Volume1\b\p.vhdx"));
    }
}
