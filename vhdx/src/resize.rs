//! Making the virtual disk larger or smaller.
//!
//! ```text
//! grow     zero what lies behind the old end (rest of the last block, BAT slots, or a new BAT at the end of the file)
//!          -> flush -> one log entry: size [+ both region tables] [+ the last block of a child, see `cover`]
//! shrink   one log entry: size -> flush -> zero what lies behind the new end, cut the file
//! ```
//! Slots of the table behind its last entry belong to nobody: they may be written in place, before the one log entry that
//! makes them count, or after the one that made them cease to.
//!
//! What a child gains reads as zeros, however long its parent is: blocks that the parent would show are ZERO from the start.
//!
//! **Invariant:** at every crash point the disk has its old or its new size with all of its content, and nothing that a
//! shrink cut off ever comes back.

use std::sync::Arc;

use blockio::{ImageFile, IoOp};
use uuid::Uuid;

use crate::amend::amend;
use crate::bat::{BatShape, Entry};
use crate::chain::Chain;
use crate::children::{self, Reach};
use crate::cover::Cover;
use crate::disk::Disk;
use crate::error::{VhdxError, doing};
use crate::format::{MIB, PAGE, REGION_TABLE_OFFSETS, index};
use crate::load::{Loaded, LogPolicy};
use crate::log::Page;
use crate::metadata::{self, DiskParams};
use crate::mutation::Mutation;
use crate::open::{Builder, Options};
use crate::recover::recover;
use crate::region::{self, Area};
use crate::running::refuse_unwritable;
use crate::words::WORDS_PER_PAGE;

/// The size that a disk is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This many bytes, no less than now.
    ExpandTo(u64),
    /// This many bytes; refused when that cuts off what [`crate::minimum_safe_bytes`] keeps.
    To(u64),
    /// This many bytes, whatever that cuts off.
    UnsafelyTo(u64),
    /// As small as nothing is lost: see [`crate::minimum_safe_bytes`]. Never larger than now.
    ToMinimumSafe,
}

/// What a resize did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resized {
    /// Size of the disk before.
    pub old_bytes: u64,
    /// Size of the disk now.
    pub new_bytes: u64,
    /// The block table did not fit its place any more and lies elsewhere now.
    pub table_moved: bool,
}

/// Resizes the disk in a closed image that has no parent and no children. For all others there is [`Builder::resize`].
///
/// # Errors
/// As [`Builder::resize`].
pub fn resize(file: &Arc<dyn ImageFile>, size: NewSize) -> Result<Resized, VhdxError> {
    resize_image(file, &Options::default(), size, None)
}

impl Builder {
    /// Resizes the disk in the closed image. A differencing image keeps its parent, whose size may be another: what the child
    /// gains reads as zeros.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidInput`] when the new size is not lawful or not safe, [`crate::ErrorKind::HasChildren`] when
    /// other images need this one as it is; nothing was changed then.
    pub fn resize(self, size: NewSize) -> Result<Resized, VhdxError> {
        children::refuse(&self.file, &self.options, Reach::Everywhere, &[])?;
        resize_image(&self.file, &self.options, size, None)
    }
}

impl Disk {
    /// Resizes the disk while it is in use: requests wait for a few flushes, then [`blockio::BlockDevice::geometry`] tells the
    /// new size. No guard of this disk may be held by the caller.
    ///
    /// # Errors
    /// As [`Builder::resize`]: the disk goes on as it was.
    pub fn resize(&self, size: NewSize) -> Result<Resized, VhdxError> {
        children::refuse(&self.core().file, &self.options(), Reach::Everywhere, &[])?;
        self.exchange_for(|file, options| Ok((resize_image(file, options, size, None)?, None)))
    }
}

/// The same for those who know of all children. The data write id is drawn unless one is given.
pub(crate) fn resize_image(
    file: &Arc<dyn ImageFile>,
    options: &Options,
    size: NewSize,
    data_write_id: Option<Uuid>,
) -> Result<Resized, VhdxError> {
    recover(file, &Options::default())?;
    let (loaded, mut findings) = Loaded::open_as(file, LogPolicy::InMemory, options)?;
    if let Some(error) = findings.write_blockers.pop() {
        return Err(error);
    }
    refuse_unwritable(&loaded)?;
    let chain = Chain::open(&loaded, options)?;
    let shown_bytes = chain.layers().first().map_or(0, |parent| parent.params.disk_bytes);
    let old_bytes = loaded.params.disk_bytes;
    let new_bytes = wanted_bytes(file, options, old_bytes, size)?;
    let params = DiskParams { disk_bytes: new_bytes, ..loaded.params };
    params.check().map_err(|found| VhdxError::InvalidInput(format!("cannot resize to {found}")))?;
    let data_write_id = data_write_id.unwrap_or_else(Uuid::new_v4);
    let new = BatShape::of(&params);
    let mutation = options.mutation;
    let mut resizing = Resizing { file: &**file, new, params, loaded, shown_bytes, data_write_id, mutation };
    let table_moved = match new_bytes.cmp(&old_bytes) {
        std::cmp::Ordering::Equal => false,
        std::cmp::Ordering::Greater => resizing.grow()?,
        std::cmp::Ordering::Less => {
            resizing.shrink()?;
            false
        }
    };
    Ok(Resized { old_bytes, new_bytes, table_moved })
}

fn wanted_bytes(
    file: &Arc<dyn ImageFile>,
    options: &Options,
    now: u64,
    size: NewSize,
) -> Result<u64, VhdxError> {
    let refuse = |text: String| Err(VhdxError::InvalidInput(text));
    let minimum = || Builder::with(Arc::clone(file), options.clone()).read_only()?.minimum_safe_bytes();
    match size {
        NewSize::UnsafelyTo(wanted) => Ok(wanted),
        NewSize::ExpandTo(wanted) if wanted >= now => Ok(wanted),
        NewSize::ExpandTo(wanted) => refuse(format!(
            "the disk has {now} bytes, {wanted} would be less; a shrink must be asked for as such"
        )),
        NewSize::ToMinimumSafe => Ok(minimum()?.min(now)),
        NewSize::To(wanted) if wanted >= now => Ok(wanted),
        NewSize::To(wanted) => match minimum()? {
            safe if wanted >= safe => Ok(wanted),
            safe => refuse(format!(
                "{wanted} bytes would cut off data: the smallest safe size is {safe}; shrink the partitions and file systems \
                 inside first, or allow an unsafe shrink"
            )),
        },
    }
}

/// An image between two sizes.
struct Resizing<'a> {
    file: &'a dyn ImageFile,
    loaded: Loaded,
    params: DiskParams,
    new: BatShape,
    /// Bytes of the disk that the parent would show.
    shown_bytes: u64,
    data_write_id: Uuid,
    mutation: Option<Mutation>,
}

impl Resizing<'_> {
    fn old(&self) -> BatShape {
        self.loaded.bat.shape
    }

    /// True when the table had to move.
    fn grow(&mut self) -> Result<bool, VhdxError> {
        // Behind this there is nothing that anyone owns; what a crashed session left there must not count as zero.
        let used_end = self.loaded.used_end();
        self.set_len(used_end)?;
        self.zero_rest_of_block(self.old())?;
        let old_table = self.loaded.regions.bat;
        let moved = self.new.entries * 8 > old_table.length;
        let length = self.new.region_bytes();
        let table = if moved { Area { offset: used_end, length, ..old_table } } else { old_table };
        let blocks_start = used_end.max(table.end());
        let cover = Cover::needed(&self.loaded, self.shown_bytes);
        let file_bytes = self.file_bytes_with_new_blocks(blocks_start) + cover.room_bytes();
        self.set_len(file_bytes)?;
        // A table at its old place is live: what it says about the old disk changes with the log entry only.
        let first = if moved { 0 } else { first_free_page(self.old()) };
        if moved {
            cover.place(&self.loaded, blocks_start);
            self.write_slots(table, first, blocks_start)?;
        } else {
            self.write_slots(table, first, blocks_start)?;
            cover.place(&self.loaded, blocks_start);
        }
        // All this is durable with the log entry, before a header names it.
        let mut pages = self.size_pages()?;
        if moved {
            pages.extend(self.table_pages(table)?);
        } else {
            pages.extend(cover.bat_pages(&self.loaded).map(|page| Page {
                file_offset: table.offset + page * PAGE,
                content: self.page_with_new_blocks(page, blocks_start),
            }));
        }
        pages.extend(cover.bitmap_pages(&self.loaded));
        self.amend(&pages, file_bytes)?;
        Ok(moved)
    }

    fn amend(&mut self, pages: &[Page], file_bytes: u64) -> Result<(), VhdxError> {
        let id = Some(self.data_write_id);
        amend(self.file, &mut self.loaded.header, pages, file_bytes, id, self.mutation)
    }

    /// The blocks of a fixed image have their place from the start.
    fn file_bytes_with_new_blocks(&self, start: u64) -> u64 {
        let added = if self.params.fixed { self.new.blocks - self.old().blocks } else { 0 };
        start + added * self.new.block_bytes
    }

    fn shrink(&mut self) -> Result<(), VhdxError> {
        let pages = self.size_pages()?;
        let file_bytes = self.loaded.view.file_bytes / MIB * MIB;
        self.amend(&pages, file_bytes)?;
        // The disk is smaller for good; what was behind its end goes now, or with the next growth at the latest.
        self.zero_rest_of_block(self.new)?;
        self.clear_slots()?;
        let tolerant = Options { tolerate_draft_states: true, ..Options::default() };
        let (loaded, _) = Loaded::open_as(&self.loaded.view.file, LogPolicy::InMemory, &tolerant)?;
        self.set_len(loaded.used_end())?;
        self.flush()
    }

    /// Zeroes what the last block of a disk of this shape has behind the end of that disk.
    fn zero_rest_of_block(&self, shape: BatShape) -> Result<(), VhdxError> {
        let last = shape.blocks - 1;
        let Some(place) = self.loaded.bat.get(last).place() else { return Ok(()) };
        let file_bytes = self.file.geometry().size_bytes;
        let (from, to) = (place + shape.bytes_in(last), (place + shape.block_bytes).min(file_bytes));
        self.zero(from, to)
    }

    /// Writes the pages of the new table from `first` on, live slots as they are.
    fn write_slots(&self, table: Area, first: u64, blocks_start: u64) -> Result<(), VhdxError> {
        let end = self.new.entries.div_ceil(WORDS_PER_PAGE);
        let said_end = self.said_slots().div_ceil(WORDS_PER_PAGE);
        for page in first..end {
            let offset = table.offset + page * PAGE;
            if page >= said_end {
                // Nothing but empty slots from here on.
                return self.zero(offset, table.offset + end * PAGE);
            }
            self.write(offset, &self.page_with_new_blocks(page, blocks_start), "BAT")?;
        }
        Ok(())
    }

    /// Slots up to the last that says anything about the new disk.
    fn said_slots(&self) -> u64 {
        let shown = self.shown_bytes.min(self.new.disk_bytes).div_ceil(self.new.block_bytes);
        let new = match (self.params.fixed, shown.checked_sub(1)) {
            (true, _) => self.new.entries,
            (false, Some(last)) => self.new.payload_index(last) + 1,
            (false, None) => 0,
        };
        self.old().entries.max(new)
    }

    fn page_with_new_blocks(&self, page: u64, blocks_start: u64) -> Vec<u8> {
        let is_live = page * WORDS_PER_PAGE < self.old().entries;
        let mut content = if is_live { self.loaded.bat.page_bytes(page) } else { vec![0; index(PAGE)] };
        for (at, slot) in (page * WORDS_PER_PAGE..).zip(content.chunks_exact_mut(8)) {
            if let Some(entry) = self.new_slot(at, blocks_start) {
                slot.copy_from_slice(&entry.to_le_bytes());
            }
        }
        content
    }

    /// What a slot says that the old disk did not have; none for those that it had.
    fn new_slot(&self, at: u64, blocks_start: u64) -> Option<u64> {
        let (old, new) = (self.old(), self.new);
        if let Some(chunk) = new.chunk_at(at) {
            return (chunk >= old.chunks()).then_some(0);
        }
        let Some(block) = new.block_at(at) else { return Some(0) };
        let number = block.checked_sub(old.blocks)?;
        if self.params.fixed {
            return Some(Entry::present(blocks_start + number * new.block_bytes).word());
        }
        let is_shown = new.span(block).0 < self.shown_bytes;
        Some(if is_shown { Entry::ZERO.word() } else { 0 })
    }

    /// Empties the slots that the shrunken disk no longer has.
    fn clear_slots(&self) -> Result<(), VhdxError> {
        let table = self.loaded.regions.bat;
        let end = self.old().entries.div_ceil(WORDS_PER_PAGE);
        // In a child the slot of the last sector bitmap stands behind those of blocks that are gone.
        let bitmap = self.new.bitmap_index(self.new.chunks() - 1);
        let bitmap = (bitmap < self.new.entries).then_some(bitmap / WORDS_PER_PAGE);
        let mut at = first_free_page(self.new);
        for page in [Some(at), bitmap].into_iter().flatten().filter(|page| *page < end) {
            self.zero(table.offset + at * PAGE, table.offset + page * PAGE)?;
            self.write(table.offset + page * PAGE, &self.page_without_lost_blocks(page), "BAT")?;
            at = page + 1;
        }
        self.zero(table.offset + at * PAGE, table.offset + end * PAGE)
    }

    fn page_without_lost_blocks(&self, page: u64) -> Vec<u8> {
        let mut content = self.loaded.bat.page_bytes(page);
        for (at, slot) in (page * WORDS_PER_PAGE..).zip(content.chunks_exact_mut(8)) {
            let bitmap = self.new.chunk_at(at).is_some_and(|chunk| chunk < self.new.chunks());
            if self.new.block_at(at).is_none() && !(bitmap && at < self.new.entries) {
                slot.fill(0);
            }
        }
        content
    }

    /// The pages of the metadata region that hold the size, with the new one.
    fn size_pages(&self) -> Result<Vec<Page>, VhdxError> {
        let view = &self.loaded.view;
        let at = metadata::size_offset(view, self.loaded.regions.metadata)?;
        // The item may lie across two pages.
        let start = at / PAGE * PAGE;
        let mut content =
            view.read(start, index((at + 8).next_multiple_of(PAGE) - start), "virtual disk size")?;
        content[index(at - start)..][..8].copy_from_slice(&self.new.disk_bytes.to_le_bytes());
        Ok(pages_of(start, &content))
    }

    /// Both region tables, with the BAT at its new place.
    fn table_pages(&self, bat: Area) -> Result<Vec<Page>, VhdxError> {
        let table = region::with_bat_at(&self.loaded.view, bat)?;
        let copies = if self.mutation == Some(Mutation::OneRegionTable) { 1 } else { 2 };
        let offsets = REGION_TABLE_OFFSETS.into_iter().take(copies);
        Ok(offsets.flat_map(|offset| pages_of(offset, &table)).collect())
    }

    fn set_len(&self, size_bytes: u64) -> Result<(), VhdxError> {
        if self.file.geometry().size_bytes == size_bytes {
            return Ok(());
        }
        self.file.set_len(size_bytes).map_err(doing(format!("setting the file's size to {size_bytes}")))
    }

    fn zero(&self, from: u64, to: u64) -> Result<(), VhdxError> {
        if from >= to {
            return Ok(());
        }
        let op = IoOp::WriteZeroes { offset: from, len: to - from, may_unmap: false };
        self.file.run(op).map_err(doing(format!("zeroing {} bytes at {from:#x}", to - from)))
    }

    fn write(&self, offset: u64, content: &[u8], structure: &str) -> Result<(), VhdxError> {
        self.file.write_at(offset, content).map_err(doing(format!("writing the {structure} at {offset:#x}")))
    }

    fn flush(&self) -> Result<(), VhdxError> {
        self.file.flush().map_err(doing("flushing the resized image"))
    }
}

/// The first page of the table whose slots are not all those of blocks of a disk of this shape.
fn first_free_page(shape: BatShape) -> u64 {
    (shape.payload_index(shape.blocks - 1) + 1) / WORDS_PER_PAGE
}

fn pages_of(offset: u64, content: &[u8]) -> Vec<Page> {
    let pages = (offset..).step_by(index(PAGE)).zip(content.chunks_exact(index(PAGE)));
    pages.map(|(file_offset, page)| Page { file_offset, content: page.to_vec() }).collect()
}
