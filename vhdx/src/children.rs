//! Images that refer to this one as their parent. They need it as it is: whoever writes, resizes or merges it breaks them.
//!
//! ```text
//!   base.vhdx  (data write id D)          scan: every .vhdx and .avhdx below the allowed folders whose locator names D
//!     a.avhdx  (parent: D)   <- found             and whose paths lead here, or nowhere
//!     b.avhdx  (parent: D)   <- found
//! ```
//! The format keeps no list of children, so they are looked for: beside the image before it is opened for writing, in all
//! folders that the caller allows before a resize or a merge. Of each candidate only the header, the log and the metadata
//! are read. Children elsewhere, or in folders that cannot be listed, are not found; the id that they refer to changes with
//! the first write, so that they are refused later rather than read wrongly.
//!
//! **Invariant:** a scan opens for reading only, and its work is bounded.

use std::sync::Arc;

use blockio::ImageFile;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::error::VhdxError;
use crate::findings::Findings;
use crate::header::CurrentHeader;
use crate::load::{LogPolicy, read_front};
use crate::locator::Locator;
use crate::open::{Builder, Options};
use crate::resolver::{FolderEntry, ParentResolver, join};
use crate::view::View;

/// Folders and files that a scan looks at.
const ENTRIES_MAX: usize = 20_000;
/// Folders below each other that a scan enters.
const DEPTH_MAX: usize = 16;
/// Children that a message names.
const NAMED_MAX: usize = 3;

/// Where children are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// In the folder of the image.
    Beside,
    /// In all folders that the caller allows, and those below them.
    Everywhere,
}

impl Builder {
    /// Where the images are that refer to this one as their parent, as far as the allowed folders hold them.
    ///
    /// # Errors
    /// When the image cannot be read, or the folders hold more files than a scan looks at.
    pub fn children(&self) -> Result<Vec<String>, VhdxError> {
        let view = View::of(&self.file);
        let header = CurrentHeader::read(&view)?;
        let id = Uuid::from_bytes_le(header.header.data_write_id);
        let found = find(&self.file, id, &self.options, Reach::Everywhere)?;
        Ok(found.into_iter().map(|child| child.path).collect())
    }
}

/// An image that refers to the one that is looked at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Child {
    path: String,
    identity: String,
}

/// Refuses to change an image that has children other than the files `known`, unless the caller insists.
pub(crate) fn refuse(
    file: &Arc<dyn ImageFile>,
    options: &Options,
    reach: Reach,
    known: &[&dyn ImageFile],
) -> Result<(), VhdxError> {
    let Some(origin) = options.origin.as_ref().filter(|_| !options.despite_children) else { return Ok(()) };
    // An image that cannot be read is not changed either; opening it says why.
    let Ok(header) = CurrentHeader::read(&View::of(file)) else { return Ok(()) };
    let found = find(file, Uuid::from_bytes_le(header.header.data_write_id), options, reach)?;
    let is_known = |child: &Child| known.iter().any(|file| file.identity() == child.identity);
    let found: Vec<String> =
        found.into_iter().filter(|child| !is_known(child)).map(|child| child.path).collect();
    if found.is_empty() {
        return Ok(());
    }
    Err(VhdxError::HasChildren { image: origin.path.clone(), children: named(&found) })
}

fn named(found: &[String]) -> String {
    let named = found.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
    match found.len().saturating_sub(NAMED_MAX) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

fn find(
    file: &Arc<dyn ImageFile>,
    data_write_id: Uuid,
    options: &Options,
    reach: Reach,
) -> Result<Vec<Child>, VhdxError> {
    let Some(origin) = &options.origin else { return Ok(Vec::new()) };
    // Such an id matches no child.
    if data_write_id.is_nil() {
        return Ok(Vec::new());
    }
    let mut scan = Scan {
        resolver: &origin.resolver,
        parent: file.identity(),
        data_write_id,
        deep: reach == Reach::Everywhere,
        looked: 0,
        found: Vec::new(),
    };
    match reach {
        Reach::Beside => {
            if let Some((root, folder)) = origin.resolver.folder_of(&origin.path) {
                scan.folder(&root, &folder, 0)?;
            }
        }
        Reach::Everywhere => {
            for root in origin.resolver.roots() {
                scan.folder(root, "", 0)?;
            }
        }
    }
    scan.found.sort();
    scan.found.dedup();
    Ok(scan.found)
}

struct Scan<'a> {
    resolver: &'a ParentResolver,
    /// Identity of the image whose children are looked for.
    parent: String,
    data_write_id: Uuid,
    /// Whether folders in folders are entered.
    deep: bool,
    looked: usize,
    found: Vec<Child>,
}

impl Scan<'_> {
    fn folder(&mut self, root: &str, below: &str, depth: usize) -> Result<(), VhdxError> {
        let entries = match self.resolver.list(root, below) {
            Ok(Some(entries)) => entries,
            Ok(None) => {
                debug!(root, "its files cannot be listed, so children there are not found");
                return Ok(());
            }
            Err(error) => {
                warn!(root, below, ?error, "a folder cannot be listed, so children there are not found");
                return Ok(());
            }
        };
        self.looked += entries.len();
        if self.looked > ENTRIES_MAX || depth > DEPTH_MAX {
            return Err(VhdxError::Limit {
                what: "the number of files among which children are looked for",
                found: crate::format::bytes(self.looked),
                bound: crate::format::bytes(ENTRIES_MAX),
            });
        }
        for FolderEntry { name, is_folder } in entries {
            let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
            if is_folder && self.deep {
                self.folder(root, &path, depth + 1)?;
            } else if !is_folder && is_image_name(&name) {
                self.found.extend(self.child(root, &path));
            }
        }
        Ok(())
    }

    /// The file at a path, if it is a child.
    fn child(&self, root: &str, below: &str) -> Option<Child> {
        let path = join(root, below);
        let Ok(file) = self.resolver.open_file(root, below) else {
            warn!(%path, "it cannot be opened, so whether it is a child is not known");
            return None;
        };
        let identity = file.identity();
        if identity == self.parent {
            return None;
        }
        let front = read_front(&file, LogPolicy::InMemory, &mut Findings::default());
        let locator = front.ok()?.metadata.locator?;
        (locator.matches(self.data_write_id) && self.leads_here(&path, &locator))
            .then_some(Child { path, identity })
    }

    /// Whether the paths of a child lead to this image and not to a copy of it. Those that lead nowhere count as such.
    fn leads_here(&self, child: &str, locator: &Locator) -> bool {
        let identity = self.resolver.find(child, locator, |found| {
            let header = CurrentHeader::read(&View::of(&found.file))?;
            match Uuid::from_bytes_le(header.header.data_write_id) {
                id if locator.matches(id) => Ok(found.file.identity()),
                id => Err(VhdxError::InvalidInput(format!("{} bears the id {id}", found.path))),
            }
        });
        identity.map_or(true, |identity| identity == self.parent)
    }
}

fn is_image_name(name: &str) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    ["vhdx", "avhdx"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}
