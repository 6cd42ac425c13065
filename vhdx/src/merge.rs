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
use crate::children::{self, Reach};
use crate::convert::Progress;
use crate::disk::Disk;
use crate::error::{VhdxError, doing};
use crate::format::{MIB, bytes, index};
use crate::image::Image;
use crate::load::{Loaded, LogPolicy};
use crate::locator::Locator;
use crate::metadata;
use crate::mutation::Mutation;
use crate::open::{Builder, Options};
use crate::recover::recover;
use crate::resize::{NewSize, resize_image};
use crate::resolve::{BlockPart, Said};
use crate::resolver::ParentResolver;
use crate::running::refuse_unwritable;

/// Bytes that are copied at once.
const PIECE: u64 = MIB;

/// Writes everything that the closed image in `child`, at `path`, says into its parent, of which `parent` is a writable
/// handle. Afterwards the parent alone is the disk, as large as the child was, and the child's file may go.
///
/// # Errors
/// [`crate::ErrorKind::InvalidInput`] when `parent` is another file, [`crate::ErrorKind::HasChildren`] when it has other
/// children or the child has any, with nothing changed. After any other error the child is still the disk; merge again.
pub fn merge(
    child: &Arc<dyn ImageFile>,
    resolver: &ParentResolver,
    path: &str,
    parent: &Arc<dyn ImageFile>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Progress, VhdxError> {
    Builder::open(Arc::clone(child)).parents(resolver.clone(), path).merge(parent, progress)
}

impl Builder {
    /// Merges the closed image into its parent: [`merge`], with options.
    ///
    /// # Errors
    /// As [`merge`].
    pub fn merge(
        self,
        parent: &Arc<dyn ImageFile>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Progress, VhdxError> {
        children::refuse(&self.file, &self.options, Reach::Everywhere, &[])?;
        let merge = Merge::prepare(&self.file, &self.options, parent)?;
        merge.run(progress).map(|done| done.progress)
    }
}

impl Disk {
    /// Merges the parent of this disk into its own parent, while the disk is in use, and takes it out of the chain; `child` and
    /// `parent` are writable handles of the two. The guest's requests wait only for the last step, a handful of flushes.
    ///
    /// To merge what the guest writes now, make a [`Disk::snapshot`] first. Neither of the two files may have other children,
    /// unless the disk was opened despite them. The file of `child` may go afterwards.
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
        let options = Options { origin: Some(origin.at(path)), ..self.options() };
        children::refuse(child, &options, Reach::Everywhere, &[&*self.core().file])?;
        let done = Merge::prepare(child, &options, parent)?.run(progress)?;
        self.exchange_for(|file, options| {
            relink(file, options.mutation, |locator| {
                locator.set_linkage(done.data_write_id);
                locator.set_linkage2(None);
                locator.set_paths(&origin.resolver.paths(&origin.path, &done.parent_path)?);
                Ok(())
            })?;
            Ok((done.progress, None))
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
    mutation: Option<Mutation>,
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
    amend(&**file, &mut loaded.header, &pages, file_bytes, None, mutation)
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
        options: &Options,
        parent: &Arc<dyn ImageFile>,
    ) -> Result<Self, VhdxError> {
        let child = Builder::with(Arc::clone(child_file), options.clone()).read_only()?;
        refuse_unwritable(child.loaded())?;
        let (Some(below), Some(path)) = (child.chain().layers().first(), child.chain().paths().first())
        else {
            let name = child_file.identity();
            return Err(VhdxError::InvalidInput(format!("{name} has no parent to be merged into")));
        };
        let origin = options.origin.as_ref().expect("its parent was found");
        same_file(parent, &below.name(), "parent")?;
        refuse_unwritable(below)?;
        let new_id = Uuid::new_v4();
        let (old_id, path) = (below.data_write_id(), path.clone());
        let options = Options {
            origin: Some(origin.at(&path)),
            data_write_id: Some(new_id),
            tolerate_draft_states: options.tolerate_draft_states,
            despite_children: options.despite_children,
            mutation: options.mutation,
            ..Options::default()
        };
        children::refuse(parent, &options, Reach::Everywhere, &[&**child_file])?;
        let (child_file, parent) = (Arc::clone(child_file), Arc::clone(parent));
        Ok(Self { child, child_file, parent, options, parent_path: path, old_id, new_id })
    }

    fn run(self, progress: &mut dyn FnMut(Progress)) -> Result<Merged, VhdxError> {
        // The id that the parent bears comes with it: an earlier attempt may have changed it.
        if self.options.mutation != Some(Mutation::UnannouncedMerge) {
            relink(&self.child_file, self.options.mutation, |locator| {
                locator.set_linkage(self.old_id);
                locator.set_linkage2(Some(self.new_id));
                Ok(())
            })?;
        }
        // Whatever the parent gains reads as zeros, and the child shows nothing of what it loses.
        let size = NewSize::UnsafelyTo(self.child.loaded().params.disk_bytes);
        resize_image(&self.parent, &self.options, size, Some(self.new_id))?;
        let parent = Disk::open(&self.parent, self.options.clone())?;
        let progress = self.copy(&parent, progress)?;
        parent.close()?;
        drop(parent);
        let data_write_id = self.adopt()?;
        Ok(Merged { progress, data_write_id, parent_path: self.parent_path })
    }

    /// Gives the closed parent what the child says about the disk besides its content. The parent's id after that.
    fn adopt(&self) -> Result<Uuid, VhdxError> {
        let (mut parent, _) = Loaded::open_as(&self.parent, LogPolicy::InMemory, &self.options)?;
        let child = self.child.loaded();
        let pages = metadata::adopted_pages(
            (&parent.view, parent.regions.metadata),
            (&child.view, child.regions.metadata),
        )?;
        if !pages.is_empty() {
            let file_bytes = parent.view.file_bytes / MIB * MIB;
            amend(&*self.parent, &mut parent.header, &pages, file_bytes, None, self.options.mutation)?;
        }
        Ok(parent.data_write_id())
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
