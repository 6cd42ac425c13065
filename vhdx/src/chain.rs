//! The parents of an image: opened for reading by type, each proved to be the one that its child was made from.
//!
//! ```text
//!   top (Disk or Image)     layer 0           layer 1          ...  base
//!     block says nothing --> block 7: bits --> block 0 ----------->  data | zeros
//!              \___________ hint: layers that say nothing about this block are skipped ____/
//! ```
//! Parents never change while they are open here, so what was once found out about a block of the top stays true: the first
//! layer that says anything about it is kept in one byte per block, in pages that exist only where somebody read.
//!
//! **Invariant:** nothing in this module or below it writes. A dirty parent is replayed in memory only.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use tracing::warn;

use crate::error::VhdxError;
use crate::format::index;
use crate::image::{Image, check_granularity};
use crate::load::{Loaded, LogPolicy};
use crate::open::Options;
use crate::resolve::Said;
use crate::resolver::{Found, ParentResolver};

/// Parents that are followed.
pub(crate) const DEPTH_MAX: usize = 64;
/// Parents from which on the log says that it is time to merge.
const DEPTH_WARNED: usize = 16;
/// Blocks of the top in a page of hints.
const BLOCKS_PER_PAGE: u64 = 4096;

/// Where to look for parents, and where the image that has them is.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) resolver: ParentResolver,
    pub(crate) path: String,
}

impl Origin {
    /// The same for another image of the chain.
    pub(crate) fn at(&self, path: &str) -> Self {
        Self { resolver: self.resolver.clone(), path: path.to_owned() }
    }
}

/// The parents of an image, nearest first.
#[derive(Debug)]
pub(crate) struct Chain {
    layers: Vec<Arc<Loaded>>,
    /// Where each of them was found.
    paths: Vec<String>,
    hints: Hints,
}

impl Chain {
    /// Opens the parents of `top`, down to the one that has none.
    pub(crate) fn open(top: &Loaded, options: &Options) -> Result<Self, VhdxError> {
        let seen = HashSet::from([top.name()]);
        let mut search = Search { options, seen, layers: Vec::new(), paths: Vec::new() };
        search.follow(top, options.origin.as_ref())?;
        if search.layers.len() >= DEPTH_WARNED {
            warn!(file = %top.name(), parents = search.layers.len(), "long chain: reads and opens get slow, merge some of them");
        }
        Ok(Self::of(top, search.layers, search.paths))
    }

    /// A chain of layers that are known to belong together.
    pub(crate) fn of(top: &Loaded, layers: Vec<Arc<Loaded>>, paths: Vec<String>) -> Self {
        let hints = if layers.is_empty() { Hints::none() } else { Hints::of(top.bat.shape.blocks) };
        Self { layers, paths, hints }
    }

    /// The layers, nearest first.
    pub(crate) fn layers(&self) -> &[Arc<Loaded>] {
        &self.layers
    }

    /// Where the layers were found.
    pub(crate) fn paths(&self) -> &[String] {
        &self.paths
    }

    /// The nearest parent with its own parents.
    pub(crate) fn parent(&self) -> Option<Image> {
        let (first, rest) = self.layers.split_first()?;
        let paths = self.paths.get(1..).unwrap_or_default().to_vec();
        Some(Image::new(Arc::clone(first), Self::of(first, rest.to_vec(), paths)))
    }

    /// Tells `each` who says what about bytes in block `block` of the top, about which the top says nothing.
    ///
    /// `span` are the bytes of the disk that the block has.
    pub(crate) fn say<'a>(
        &'a self,
        block: u64,
        span: impl FnOnce() -> (u64, u64),
        (offset, len): (u64, u64),
        each: &mut dyn FnMut(Option<&'a Arc<Loaded>>, Said, u64),
    ) {
        let first = self.hints.get_or_find(block, || {
            let (start, end) = span();
            self.layers.iter().position(|layer| layer.says_anything(start, end)).unwrap_or(self.layers.len())
        });
        self.say_from(first, offset, len, each);
    }

    /// Whether any parent has bytes of its own in a range of the disk.
    pub(crate) fn has_data(&self, (start, end): (u64, u64)) -> bool {
        self.layers.iter().any(|layer| {
            let end = end.min(layer.params.disk_bytes);
            let mut blocks = start / layer.params.block_bytes..end.div_ceil(layer.params.block_bytes);
            blocks.any(|block| layer.bat.get(block).place().is_some())
        })
    }

    fn say_from<'a>(
        &'a self,
        depth: usize,
        offset: u64,
        len: u64,
        each: &mut dyn FnMut(Option<&'a Arc<Loaded>>, Said, u64),
    ) {
        let Some(layer) = self.layers.get(depth) else { return each(None, Said::Zero, len) };
        // A parent may be shorter than its child: zeros past its end.
        let inside = layer.params.disk_bytes.saturating_sub(offset).min(len);
        let mut at = offset;
        for part in layer.bat.shape.parts(offset, inside) {
            layer.layer().say(&part, &mut |said, len| {
                match said {
                    Said::Nothing => self.say_from(depth + 1, at, len, each),
                    said => each(Some(layer), said, len),
                }
                at += len;
            });
        }
        if inside < len {
            each(None, Said::Zero, len - inside);
        }
    }
}

struct Search<'a> {
    options: &'a Options,
    seen: HashSet<String>,
    layers: Vec<Arc<Loaded>>,
    paths: Vec<String>,
}

impl Search<'_> {
    fn follow(&mut self, top: &Loaded, origin: Option<&Origin>) -> Result<(), VhdxError> {
        let mut child_path = origin.map(|origin| origin.path.clone());
        loop {
            let child = self.layers.last().map_or(top, |layer| layer);
            let Some(locator) = &child.locator else { return Ok(()) };
            let (Some(origin), Some(path)) = (origin, &child_path) else {
                return Err(VhdxError::ParentNotFound {
                    child: child.name(),
                    tried: "no folder was named in which it may be looked for".to_owned(),
                    hint: "name the folders that hold the chain",
                });
            };
            if self.layers.len() == DEPTH_MAX {
                return Err(VhdxError::ChainTooDeep { child: top.name(), max: DEPTH_MAX });
            }
            let (layer, path) =
                origin.resolver.find(path, locator, |found| self.accept(child, path, found))?;
            self.seen.insert(layer.name());
            self.layers.push(Arc::new(layer));
            self.paths.push(path.clone());
            child_path = Some(path);
        }
    }

    /// Opens what a path led to and proves that it is the parent.
    fn accept(&self, child: &Loaded, child_path: &str, found: Found) -> Result<(Loaded, String), VhdxError> {
        let Found { path, file } = found;
        // By the identity of the file: two names of one file are the same parent.
        if self.seen.contains(&file.identity()) {
            return Err(VhdxError::ChainCycle { file: path });
        }
        let (parent, _) = Loaded::open_as(&file, LogPolicy::InMemory, self.options)?;
        check_granularity(&parent)?;
        let mismatch = |found: String| {
            Err(VhdxError::ParentMismatch { child: child_path.to_owned(), parent: path.clone(), found })
        };
        let locator = child.locator.as_ref().expect("it has a parent");
        let id = parent.data_write_id();
        if !locator.matches(id) {
            let wanted = locator.linkage().map_or_else(|| "none".to_owned(), |id| id.to_string());
            return mismatch(format!(
                "its data write id is {id}, wanted is {wanted}; it was written since, or is another disk"
            ));
        }
        let (ours, theirs) = (child.params.logical_sector, parent.params.logical_sector);
        if ours != theirs {
            return mismatch(format!("its sectors have {theirs} bytes, those of the child {ours}"));
        }
        Ok((parent, path))
    }
}

impl Loaded {
    /// Whether this image says anything about a range of the disk. That it ends before the range does counts.
    fn says_anything(&self, start: u64, end: u64) -> bool {
        let block_bytes = self.params.block_bytes;
        end > self.params.disk_bytes
            || self.bitmaps.is_none()
            || (start / block_bytes..end.div_ceil(block_bytes)).any(|block| !self.bat.get(block).is_unsaid())
    }
}

/// For each block of the top, the first layer that says anything about it, as far as somebody asked.
struct Hints {
    pages: Box<[OnceLock<Box<[AtomicU8]>>]>,
}

impl Hints {
    fn none() -> Self {
        Self { pages: Box::default() }
    }

    fn of(blocks: u64) -> Self {
        Self { pages: (0..blocks.div_ceil(BLOCKS_PER_PAGE)).map(|_| OnceLock::new()).collect() }
    }

    /// Zero means not asked yet, so layers are counted from one.
    fn get_or_find(&self, block: u64, find: impl FnOnce() -> usize) -> usize {
        let Some(page) = self.pages.get(index(block / BLOCKS_PER_PAGE)) else { return find() };
        let page = page.get_or_init(|| (0..BLOCKS_PER_PAGE).map(|_| AtomicU8::new(0)).collect());
        let hint = &page[index(block % BLOCKS_PER_PAGE)];
        match hint.load(Ordering::Relaxed) {
            0 => {
                let found = find();
                hint.store(u8::try_from(found + 1).expect("at most 64 layers"), Ordering::Relaxed);
                found
            }
            known => usize::from(known) - 1,
        }
    }
}

impl std::fmt::Debug for Hints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hints").field("pages", &self.pages.len()).finish()
    }
}
