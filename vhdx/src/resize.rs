//! Making the virtual disk larger or smaller.
//!
//! ```text
//! grow     zero what lies behind the old end (rest of the last block, BAT slots, or a new BAT at the end of the file)
//!          -> flush -> one log entry: size [+ both region tables]
//! shrink   one log entry: size -> flush -> zero what lies behind the new end, cut the file
//! ```
//! Slots of the table behind its last entry belong to nobody: they may be written in place, before the one log entry that
//! makes them count, or after the one that made them cease to.
//!
//! **Invariant:** at every crash point the disk has its old or its new size with all of its content, and nothing that a
//! shrink cut off ever comes back.

use std::sync::Arc;

use blockio::{ImageFile, IoOp};

use crate::amend::amend;
use crate::bat::{BatShape, Entry};
use crate::disk::Disk;
use crate::error::{VhdxError, doing};
use crate::format::{MIB, PAGE, REGION_TABLE_OFFSETS, index};
use crate::load::{Loaded, LogPolicy};
use crate::log::Page;
use crate::metadata::{self, DiskParams};
use crate::open::Options;
use crate::recover::recover;
use crate::region::{self, Area};
use crate::running::refuse_unwritable;
use crate::safe_size::minimum_safe_bytes;
use crate::words::WORDS_PER_PAGE;

/// The size that a disk is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This many bytes, no less than now.
    ExpandTo(u64),
    /// This many bytes; refused when that cuts off what [`minimum_safe_bytes`] keeps.
    To(u64),
    /// This many bytes, whatever that cuts off.
    UnsafelyTo(u64),
    /// As small as nothing is lost: see [`minimum_safe_bytes`]. Never larger than now.
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

/// Resizes the disk in a closed image. An image that others refer to as their parent must never be resized; who knows of
/// children must not call this.
///
/// # Errors
/// [`crate::ErrorKind::InvalidInput`] when the new size is not lawful or not safe, with nothing changed.
pub fn resize(file: &Arc<dyn ImageFile>, size: NewSize) -> Result<Resized, VhdxError> {
    recover(file, &Options::default())?;
    let (loaded, mut findings) = Loaded::open(file, LogPolicy::InMemory)?;
    if loaded.params.has_parent {
        return Err(VhdxError::Unsupported {
            what: "resizing a differencing image".to_owned(),
            hint: "merge it into its parent first",
        });
    }
    if let Some(error) = findings.write_blockers.pop() {
        return Err(error);
    }
    refuse_unwritable(&loaded)?;
    let old_bytes = loaded.params.disk_bytes;
    let new_bytes = wanted_bytes(file, &loaded, size)?;
    let params = DiskParams { disk_bytes: new_bytes, ..loaded.params };
    params.check().map_err(|found| VhdxError::InvalidInput(format!("cannot resize to {found}")))?;
    let mut resizing = Resizing { file: &**file, new: BatShape::of(&params), params, loaded };
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

impl Disk {
    /// Resizes the disk while it is in use: requests wait for a few flushes, then [`blockio::BlockDevice::geometry`] tells the
    /// new size. No guard of this disk may be held by the caller; see [`resize`] for images that others refer to.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidInput`] when the new size is not lawful or not safe: the disk goes on as it was.
    pub fn resize(&self, size: NewSize) -> Result<Resized, VhdxError> {
        self.exchange(|file| resize(file, size))
    }
}

fn wanted_bytes(file: &Arc<dyn ImageFile>, loaded: &Loaded, size: NewSize) -> Result<u64, VhdxError> {
    let now = loaded.params.disk_bytes;
    let refuse = |text: String| Err(VhdxError::InvalidInput(text));
    match size {
        NewSize::UnsafelyTo(wanted) => Ok(wanted),
        NewSize::ExpandTo(wanted) if wanted >= now => Ok(wanted),
        NewSize::ExpandTo(wanted) => refuse(format!(
            "the disk has {now} bytes, {wanted} would be less; a shrink must be asked for as such"
        )),
        NewSize::ToMinimumSafe => Ok(minimum_safe_bytes(file)?.min(now)),
        NewSize::To(wanted) if wanted >= now => Ok(wanted),
        NewSize::To(wanted) => match minimum_safe_bytes(file)? {
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
        let file_bytes = self.file_bytes_with_new_blocks(blocks_start);
        self.set_len(file_bytes)?;
        let first = if moved { 0 } else { self.old().entries / WORDS_PER_PAGE };
        self.write_slots(table, first, blocks_start)?;
        self.flush()?;
        let mut pages = self.size_pages()?;
        if moved {
            pages.extend(self.table_pages(table)?);
        }
        amend(self.file, &mut self.loaded.header, &pages, file_bytes, true)?;
        Ok(moved)
    }

    /// The blocks of a fixed image have their place from the start.
    fn file_bytes_with_new_blocks(&self, start: u64) -> u64 {
        let added = if self.params.fixed { self.new.blocks - self.old().blocks } else { 0 };
        start + added * self.new.block_bytes
    }

    fn shrink(&mut self) -> Result<(), VhdxError> {
        let pages = self.size_pages()?;
        let file_bytes = self.loaded.view.file_bytes / MIB * MIB;
        amend(self.file, &mut self.loaded.header, &pages, file_bytes, true)?;
        // The disk is smaller for good; what was behind its end goes now, or with the next growth at the latest.
        self.zero_rest_of_block(self.new)?;
        self.clear_slots()?;
        let (loaded, _) = Loaded::open(&self.loaded.view.file, LogPolicy::InMemory)?;
        self.set_len(loaded.used_end())?;
        self.flush()
    }

    /// Zeroes what the last block of a disk of this shape has behind the end of that disk.
    fn zero_rest_of_block(&self, shape: BatShape) -> Result<(), VhdxError> {
        let last = shape.blocks - 1;
        let Some(place) = self.loaded.bat.get(last).data_offset() else { return Ok(()) };
        let file_bytes = self.file.geometry().size_bytes;
        let (from, to) = (place + shape.bytes_in(last), (place + shape.block_bytes).min(file_bytes));
        self.zero(from, to)
    }

    /// Writes the pages of the new table from `first` on, live slots as they are.
    fn write_slots(&self, table: Area, first: u64, blocks_start: u64) -> Result<(), VhdxError> {
        let end = self.new.entries.div_ceil(WORDS_PER_PAGE);
        for page in first..end {
            let offset = table.offset + page * PAGE;
            if !self.is_live(page) && !self.params.fixed {
                // Nothing but empty slots from here on.
                return self.zero(offset, table.offset + end * PAGE);
            }
            self.write(offset, &self.page_with_new_blocks(page, blocks_start), "BAT")?;
        }
        Ok(())
    }

    /// Whether a page of the table holds entries of the disk as it is.
    fn is_live(&self, page: u64) -> bool {
        page * WORDS_PER_PAGE < self.old().entries
    }

    fn page_with_new_blocks(&self, page: u64, blocks_start: u64) -> Vec<u8> {
        let mut content =
            if self.is_live(page) { self.loaded.bat.page_bytes(page) } else { vec![0; index(PAGE)] };
        let old_blocks = self.old().blocks;
        for (at, slot) in (page * WORDS_PER_PAGE..).zip(content.chunks_exact_mut(8)) {
            let added = self.new.block_at(at).and_then(|block| block.checked_sub(old_blocks));
            if let Some(number) = added.filter(|_| self.params.fixed) {
                let entry = Entry::present(blocks_start + number * self.new.block_bytes);
                slot.copy_from_slice(&entry.word().to_le_bytes());
            }
        }
        content
    }

    /// Empties the slots that the shrunken disk no longer has.
    fn clear_slots(&self) -> Result<(), VhdxError> {
        let table = self.loaded.regions.bat;
        let page = self.new.entries / WORDS_PER_PAGE;
        let mut content = self.loaded.bat.page_bytes(page);
        content[index(self.new.entries % WORDS_PER_PAGE) * 8..].fill(0);
        self.write(table.offset + page * PAGE, &content, "BAT")?;
        let end = self.old().entries.div_ceil(WORDS_PER_PAGE);
        self.zero(table.offset + (page + 1) * PAGE, table.offset + end * PAGE)
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
        Ok(REGION_TABLE_OFFSETS.into_iter().flat_map(|offset| pages_of(offset, &table)).collect())
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

fn pages_of(offset: u64, content: &[u8]) -> Vec<Page> {
    let pages = (offset..).step_by(index(PAGE)).zip(content.chunks_exact(index(PAGE)));
    pages.map(|(file_offset, page)| Page { file_offset, content: page.to_vec() }).collect()
}
