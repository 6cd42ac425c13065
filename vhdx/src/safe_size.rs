//! How small a disk can become without losing anything.
//!
//! A disk with a GUID partition table needs its partitions and room for the backup table behind them, wherever that backup
//! lies now (partitioning tools put it back); any other disk needs everything up to its last byte that is not zero.
//!
//! **Invariant:** the answer is never too small: a table that makes no sense counts as data.

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, IoError};

use crate::error::{VhdxError, doing};
use crate::format::{MIB, bytes, index};
use crate::image::Image;
use crate::open::Builder;
use crate::resolve::Said;

/// Longest list of partitions that is read; the usual one has 16 KiB.
const PARTITIONS_BYTES_MAX: u64 = MIB;

/// The smallest size that keeps the partitions of the disk in `file`, or all of its data where there are none; a multiple of
/// 1 MiB, never more than the disk has.
///
/// # Errors
/// By [`VhdxError::kind`]; nothing is changed. For an image with a parent see [`Image::minimum_safe_bytes`].
pub fn minimum_safe_bytes(file: &Arc<dyn ImageFile>) -> Result<u64, VhdxError> {
    Builder::open(Arc::clone(file)).read_only()?.minimum_safe_bytes()
}

impl Image {
    /// The smallest size that keeps the partitions of this disk, parents included; see [`minimum_safe_bytes`].
    ///
    /// # Errors
    /// When a file fails.
    pub fn minimum_safe_bytes(&self) -> Result<u64, VhdxError> {
        minimum_of(self)
    }
}

fn minimum_of(image: &Image) -> Result<u64, VhdxError> {
    let end = match partitions_end(image)? {
        Some(end) => end,
        None => data_end(image)?,
    };
    Ok(end.max(1).next_multiple_of(MIB).min(image.geometry().size_bytes))
}

/// End of the last byte that is not zero.
fn data_end(image: &Image) -> Result<u64, VhdxError> {
    let block_bytes = image.loaded().params.block_bytes;
    let mut end = image.geometry().size_bytes;
    while end > 0 {
        let block = (end - 1) / block_bytes * block_bytes;
        if !has_data(image, block, end - block) {
            end = block;
            continue;
        }
        let start = (end - 1) / MIB * MIB;
        let mut piece = vec![0; index(end - start)];
        image.read_at(start, &mut piece).map_err(reading(start))?;
        if let Some(last) = piece.iter().rposition(|byte| *byte != 0) {
            return Ok(start + bytes(last) + 1);
        }
        end = start;
    }
    Ok(0)
}

fn has_data(image: &Image, offset: u64, len: u64) -> bool {
    let mut data = false;
    image.say(offset, len, &mut |_, said, _| data |= matches!(said, Said::Data(_)));
    data
}

/// Where the last partition and a backup of the table behind it end; none without a plausible table.
fn partitions_end(image: &Image) -> Result<Option<u64>, VhdxError> {
    let sector = u64::from(image.geometry().block_bytes);
    let disk_bytes = image.geometry().size_bytes;
    if disk_bytes < 2 * sector {
        return Ok(None);
    }
    let header = read(image, sector, sector)?;
    let u32_at = |at: usize| u64::from(u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes")));
    let table_bytes = u32_at(80) * u32_at(84);
    let entry_bytes = index(u32_at(84));
    let plausible = header.starts_with(b"EFI PART")
        && u64_at(&header, 24) == 1
        && entry_bytes >= 128
        && entry_bytes.is_multiple_of(8)
        && (1..=PARTITIONS_BYTES_MAX).contains(&table_bytes);
    let list_start = u64_at(&header, 72).checked_mul(sector);
    let list_bytes = table_bytes.next_multiple_of(sector);
    let inside = |start: &u64| start.checked_add(list_bytes).is_some_and(|end| end <= disk_bytes);
    let Some(list_start) = list_start.filter(|start| plausible && inside(start)) else { return Ok(None) };
    let list = read(image, list_start, list_bytes)?;
    let mut end = list_start + list_bytes;
    for entry in list[..index(table_bytes)].chunks_exact(entry_bytes) {
        if entry[..16].iter().all(|byte| *byte == 0) {
            continue;
        }
        let last = u64_at(entry, 40).checked_add(1).and_then(|sectors| sectors.checked_mul(sector));
        match last.filter(|last| *last <= disk_bytes) {
            Some(last) => end = end.max(last),
            None => return Ok(None),
        }
    }
    Ok(Some(end.saturating_add(list_bytes + sector).min(disk_bytes)))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn read(image: &Image, offset: u64, len: u64) -> Result<Vec<u8>, VhdxError> {
    let mut piece = vec![0; index(len)];
    image.read_at(offset, &mut piece).map_err(reading(offset))?;
    Ok(piece)
}

fn reading(offset: u64) -> impl FnOnce(IoError) -> VhdxError {
    doing(format!("reading the disk at {offset:#x}"))
}
