//! Merging a child into its parent, so that the chain gets shorter.
//!
//! ```text
//!   child: "my parent is P now, and soon F"      parent: id F, then the child's blocks and sectors      others: "my parent is F"
//!   ------- one log entry, durable ------- --------- any number of writes, then closed --------- -- one log entry, durable --
//! ```
//! F is drawn before anything changes. Whatever the child says hides what is written below it, so the chain reads the same
//! at every moment, through the child and through images above it, also while they are open.
//!
//! **Invariant:** at every crash point the child opens over its parent with the content that it had, and doing the merge again
//! finishes it. The child's file is of no use to anybody only after this returned.

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, IoBuf, IoOp};
use uuid::Uuid;

use crate::amend::amend;
use crate::chain::Origin;
use crate::convert::Progress;
use crate::disk::Disk;
use crate::error::{VhdxError, doing};
use crate::exchange::Next;
use crate::format::{MIB, bytes, index};
use crate::image::Image;
use crate::load::{Loaded, LogPolicy};
use crate::locator::Locator;
use crate::metadata;
use crate::open::{Builder, Options};
use crate::recover::recover;
use crate::resolve::{BlockPart, Said};
use crate::resolver::ParentResolver;
use crate::running::refuse_unwritable;

/// Bytes that are copied at once.
const PIECE: u64 = MIB;

/// Writes everything that the closed image in `child`, at `path`, says into its parent, of which `parent` is a writable
/// handle. Afterwards the parent alone is the disk, and the child's file may go. The parent must have no other child.
///
/// # Errors
/// [`crate::ErrorKind::InvalidInput`] when `parent` is another file or the sizes of the disks differ, with nothing changed.
/// After any other error the child is still the disk; merge again.
pub fn merge(
    child: &Arc<dyn ImageFile>,
    resolver: &ParentResolver,
    path: &str,
    parent: &Arc<dyn ImageFile>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Progress, VhdxError> {
    let origin = Origin { resolver: resolver.clone(), path: path.to_owned() };
    let merge = Merge::prepare(child, origin, parent)?;
    merge.run(progress).map(|done| done.progress)
}

impl Disk {
    /// Merges the parent of this disk into its own parent, while the disk is in use, and takes it out of the chain; `child` and
    /// `parent` are writable handles of the two. The guest's requests wait only for the last step, a handful of flushes.
    ///
    /// To merge what the guest writes now, make a [`Disk::snapshot`] first. Neither of the two files may have other children.
    /// The file of `child` may go afterwards.
    ///
    /// # Errors
    /// As [`merge`]. The disk goes on as it was, unless that fails too.
    pub fn merge_parent(
        &self,
        child: &Arc<dyn ImageFile>,
        parent: &Arc<dyn ImageFile>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Progress, VhdxError> {
        let chain = Arc::clone(&self.core().chain);
        let places = (chain.layers().first(), chain.paths().first(), self.origin());
        let (Some(below), Some(path), Some(origin)) = places else {
            return Err(VhdxError::InvalidInput("the disk has no parent that could be merged".to_owned()));
        };
        same_file(child, &below.name(), "child")?;
        let done = Merge::prepare(child, origin.at(path), parent)?.run(progress)?;
        self.exchange_for(|file, options| {
            let next = Next::new(Arc::clone(file), options.clone());
            relink(file, |locator| {
                locator.set_linkage(done.data_write_id);
                locator.set_linkage2(None);
                locator.set_paths(&origin.resolver.paths(&origin.path, &done.parent_path)?);
                Ok(())
            })?;
            Ok((done.progress, Some(next)))
        })
    }
}

fn same_file(file: &Arc<dyn ImageFile>, identity: &str, what: &str) -> Result<(), VhdxError> {
    if file.identity() == identity {
        return Ok(());
    }
    Err(VhdxError::InvalidInput(format!(
        "{} is not the {what} to be merged, that is {identity}; open the right file",
        file.identity()
    )))
}

/// Replaces the parent locator of a closed image, all of it or nothing. What a guest reads stays the same.
fn relink(
    file: &Arc<dyn ImageFile>,
    change: impl FnOnce(&mut Locator) -> Result<(), VhdxError>,
) -> Result<(), VhdxError> {
    recover(file, &Options::default())?;
    let (mut loaded, _) = Loaded::open(file, LogPolicy::InMemory)?;
    refuse_unwritable(&loaded)?;
    let mut locator = loaded
        .locator
        .clone()
        .ok_or_else(|| VhdxError::InvalidInput(format!("{} has no parent", loaded.name())))?;
    change(&mut locator)?;
    if loaded.locator.as_ref() == Some(&locator) {
        return Ok(());
    }
    let pages = metadata::locator_pages(&loaded.view, loaded.regions.metadata, &locator)?;
    let file_bytes = loaded.view.file_bytes / MIB * MIB;
    amend(&**file, &mut loaded.header, &pages, file_bytes, false)
}

/// A merge that can be done.
struct Merge {
    child: Image,
    child_file: Arc<dyn ImageFile>,
    parent: Arc<dyn ImageFile>,
    /// How the parent is opened for writing.
    options: Options,
    parent_path: String,
    /// The parent's id before.
    old_id: Uuid,
    /// The parent's id from the first write on.
    new_id: Uuid,
}

/// What a merge came to.
struct Merged {
    progress: Progress,
    data_write_id: Uuid,
    parent_path: String,
}

impl Merge {
    /// Finds out whether the two belong together. Changes nothing.
    fn prepare(
        child_file: &Arc<dyn ImageFile>,
        origin: Origin,
        parent: &Arc<dyn ImageFile>,
    ) -> Result<Self, VhdxError> {
        let builder = Builder::open(Arc::clone(child_file)).parents(origin.resolver.clone(), &origin.path);
        let child = builder.read_only()?;
        refuse_unwritable(child.loaded())?;
        let (Some(below), Some(path)) = (child.chain().layers().first(), child.chain().paths().first())
        else {
            return Err(VhdxError::InvalidInput(format!("{} has no parent to be merged into", origin.path)));
        };
        same_file(parent, &below.name(), "parent")?;
        refuse_unwritable(below)?;
        let (ours, theirs) = (child.loaded().params.disk_bytes, below.params.disk_bytes);
        if ours != theirs {
            return Err(VhdxError::InvalidInput(format!(
                "the child's disk has {ours} bytes, the parent's {theirs}: a merge keeps the parent's size, so it would lose or \
                 make up data; convert the chain to one image instead"
            )));
        }
        let new_id = Uuid::new_v4();
        let (old_id, path) = (below.data_write_id(), path.clone());
        let options =
            Options { origin: Some(origin.at(&path)), data_write_id: Some(new_id), ..Options::default() };
        let (child_file, parent) = (Arc::clone(child_file), Arc::clone(parent));
        Ok(Self { child, child_file, parent, options, parent_path: path, old_id, new_id })
    }

    fn run(self, progress: &mut dyn FnMut(Progress)) -> Result<Merged, VhdxError> {
        // The id that the parent bears comes with it: an earlier attempt may have changed it.
        relink(&self.child_file, |locator| {
            locator.set_linkage(self.old_id);
            locator.set_linkage2(Some(self.new_id));
            Ok(())
        })?;
        let parent = Disk::open(&self.parent, self.options.clone())?;
        let progress = self.copy(&parent, progress)?;
        parent.close()?;
        drop(parent);
        let (parent, _) = Loaded::open(&self.parent, LogPolicy::InMemory)?;
        Ok(Merged { progress, data_write_id: parent.data_write_id(), parent_path: self.parent_path })
    }

    /// Puts everything that the child says into the parent.
    fn copy(&self, parent: &Disk, progress: &mut dyn FnMut(Progress)) -> Result<Progress, VhdxError> {
        let loaded = self.child.loaded();
        let shape = loaded.bat.shape;
        let mut done = Progress { total_bytes: shape.disk_bytes, ..Progress::default() };
        for (at, count, entry) in loaded.bat.runs() {
            let (first, end) = (shape.blocks_before(at), shape.blocks_before(at + count));
            if !entry.is_unsaid() {
                for block in first..end {
                    done.data_bytes += self.copy_block(parent, block)?;
                }
            }
            if end > first {
                done.done_bytes = shape.span(end - 1).1;
                progress(done);
            }
        }
        Ok(done)
    }

    fn copy_block(&self, parent: &Disk, block: u64) -> Result<u64, VhdxError> {
        let loaded = self.child.loaded();
        let (start, end) = loaded.bat.shape.span(block);
        let mut runs = Vec::new();
        loaded
            .layer()
            .say(&BlockPart { block, within: 0, len: end - start }, &mut |said, len| runs.push((said, len)));
        let (mut at, mut copied) = (start, 0);
        for (said, len) in runs {
            match said {
                Said::Data(_) => {
                    self.copy_range(parent, at, len)?;
                    copied += len;
                }
                Said::Zero => {
                    let op = IoOp::WriteZeroes { offset: at, len, may_unmap: true };
                    parent.run(op).map_err(doing(format!("zeroing {len} bytes of the parent at {at:#x}")))?;
                }
                Said::Nothing => (),
            }
            at += len;
        }
        Ok(copied)
    }

    fn copy_range(&self, parent: &Disk, offset: u64, len: u64) -> Result<(), VhdxError> {
        for at in (offset..offset + len).step_by(index(PIECE)) {
            let buf = IoBuf::zeroed(index((offset + len - at).min(PIECE)));
            self.child
                .run(IoOp::Read { offset: at, buf: buf.clone() })
                .map_err(doing(format!("reading {} bytes of the child at {at:#x}", bytes(buf.len()))))?;
            parent
                .run(IoOp::Write { offset: at, buf, fua: false })
                .map_err(doing(format!("writing to the parent at {at:#x}")))?;
        }
        Ok(())
    }
}
