//! Making an image, in the layout that Windows uses.
//!
//! ```text
//! 0      file identifier, headers, region tables      written last: without them the file is no VHDX yet
//! 1 MiB  log, 1 MiB
//! 2 MiB  metadata region, 1 MiB
//! 3 MiB  BAT, rounded up to 1 MiB
//! ...    payload blocks (fixed: all of them, in order)
//! ```
//! **Invariant:** a crash while creating leaves a file that is not a VHDX, never half of one.

use blockio::ImageFile;
use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::bat::{BatShape, Entry};
use crate::error::{VhdxError, doing};
use crate::format::{
    CREATOR_BYTES, FILE_SIGNATURE, HEADER_OFFSETS, Header, MIB, PAGE, REGION_TABLE_OFFSETS, bytes, index,
};
use crate::metadata::DiskParams;
use crate::region::{self, Area};

const LOG: Area = Area { offset: MIB, length: MIB, owner: "log" };
const METADATA: Area = Area { offset: 2 * MIB, length: MIB, owner: "metadata region" };
const BAT_OFFSET: u64 = 3 * MIB;
/// Step by which a file grows while blocks are placed.
const GROWTH: u64 = 1024 * MIB;
const CREATOR: &str = concat!("csv vhdx ", env!("CARGO_PKG_VERSION"));

/// What to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Size of the virtual disk; a multiple of the sector size, up to 64 TiB.
    pub size_bytes: u64,
    /// Size of a payload block; a power of two from 1 MiB to 256 MiB.
    pub block_bytes: u64,
    /// Whether all blocks get their place now.
    pub fixed: bool,
    /// Sector size that the guest sees: 512 or 4096.
    pub logical_sector: u32,
    /// Physical sector size, a hint to the guest: 512 or 4096.
    pub physical_sector: u32,
    /// Identity of the disk (SCSI page 83); random if none is given.
    pub disk_id: Option<Uuid>,
}

impl Spec {
    /// A dynamic disk as Hyper-V makes it: blocks of 32 MiB, sectors of 512 bytes on 4096.
    #[must_use]
    pub fn dynamic(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            block_bytes: 32 * MIB,
            fixed: false,
            logical_sector: 512,
            physical_sector: 4096,
            disk_id: None,
        }
    }

    /// A fixed disk.
    #[must_use]
    pub fn fixed(size_bytes: u64) -> Self {
        Self { fixed: true, ..Self::dynamic(size_bytes) }
    }

    fn params(&self) -> Result<DiskParams, VhdxError> {
        let params = DiskParams {
            disk_bytes: self.size_bytes,
            block_bytes: self.block_bytes,
            logical_sector: self.logical_sector,
            physical_sector: self.physical_sector,
            disk_id: self.disk_id.unwrap_or_else(Uuid::new_v4),
            fixed: self.fixed,
            has_parent: false,
        };
        params
            .check()
            .map_err(|found| VhdxError::InvalidInput(format!("cannot create a disk with {found}")))?;
        Ok(params)
    }
}

/// An image whose structures are not yet written; blocks may be placed and filled before [`Draft::finish`].
pub(crate) struct Draft<'a> {
    file: &'a dyn ImageFile,
    params: DiskParams,
    pub(crate) shape: BatShape,
    entries: Vec<u64>,
    next_block: u64,
    file_bytes: u64,
}

/// Makes an image in `file`. Everything that was in the file is lost.
///
/// # Errors
/// [`crate::ErrorKind::InvalidInput`] before anything changes, [`crate::ErrorKind::Io`] later.
pub fn create(file: &dyn ImageFile, spec: &Spec) -> Result<(), VhdxError> {
    Draft::begin(file, spec)?.finish()
}

impl<'a> Draft<'a> {
    /// Empties the file and places the blocks of a fixed disk.
    pub(crate) fn begin(file: &'a dyn ImageFile, spec: &Spec) -> Result<Self, VhdxError> {
        let params = spec.params()?;
        let shape = BatShape::of(&params);
        let data_start = BAT_OFFSET + shape.region_bytes();
        let mut draft = Self {
            file,
            params,
            shape,
            entries: vec![0; index(shape.entries)],
            next_block: data_start,
            file_bytes: data_start,
        };
        // What was there must not shine through a block that is never written.
        file.set_len(0).map_err(doing("emptying the file"))?;
        draft.grow(data_start)?;
        if params.fixed {
            draft.file_bytes = data_start + shape.blocks * shape.block_bytes;
            draft.grow(draft.file_bytes)?;
            for block in 0..shape.blocks {
                draft.place(block);
            }
        }
        Ok(draft)
    }

    /// Gives a block its place, the one it has if it has one.
    pub(crate) fn place(&mut self, block: u64) -> u64 {
        let entry = &mut self.entries[index(self.shape.payload_index(block))];
        if *entry == 0 {
            *entry = Entry::present(self.next_block).word();
            self.next_block += self.shape.block_bytes;
        }
        *entry & !0xF_FFFF
    }

    /// Makes the file longer in steps; [`Draft::finish`] cuts the surplus.
    pub(crate) fn grow_ahead(&mut self) -> Result<(), VhdxError> {
        if self.next_block > self.file_bytes {
            self.file_bytes = self.next_block + GROWTH;
            self.grow(self.file_bytes)?;
        }
        Ok(())
    }

    /// Makes the file long enough for all placed blocks.
    pub(crate) fn grow_to_placed(&self) -> Result<(), VhdxError> {
        self.grow(self.next_block)
    }

    fn grow(&self, size_bytes: u64) -> Result<(), VhdxError> {
        self.file.set_len(size_bytes).map_err(doing(format!("growing the file to {size_bytes} bytes")))
    }

    /// Writes the structures: what they point to first, then what makes the file a VHDX.
    pub(crate) fn finish(self) -> Result<(), VhdxError> {
        self.grow_to_placed()?;
        self.write_bat()?;
        let bat = Area { offset: BAT_OFFSET, length: self.shape.region_bytes(), owner: "BAT region" };
        self.write(METADATA.offset, &self.params.encode(), "metadata region")?;
        let table = region::encode(bat, METADATA);
        for offset in REGION_TABLE_OFFSETS {
            self.write(offset, &table, "region table")?;
        }
        self.file.flush().map_err(doing("flushing the new image"))?;
        let log_length = u32::try_from(LOG.length).expect("1 MiB");
        let header = Header::new(LOG.offset, log_length);
        self.write(HEADER_OFFSETS[0], header.sealed(1).as_bytes(), "header")?;
        self.write(HEADER_OFFSETS[1], header.sealed(2).as_bytes(), "header")?;
        self.write(0, &file_identifier(), "file identifier")?;
        self.file.flush().map_err(doing("flushing the new image"))
    }

    fn write_bat(&self) -> Result<(), VhdxError> {
        for (number, entries) in self.entries.chunks(index(MIB / 8)).enumerate() {
            if entries.iter().all(|entry| *entry == 0) {
                continue;
            }
            let mut piece: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            piece.resize(piece.len().next_multiple_of(index(PAGE)), 0);
            self.write(BAT_OFFSET + bytes(number) * MIB, &piece, "BAT")?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, content: &[u8], structure: &str) -> Result<(), VhdxError> {
        // Whole pages, so that any granularity of the file below is served.
        let mut padded = content.to_vec();
        padded.resize(content.len().next_multiple_of(index(PAGE)), 0);
        self.file.write_at(offset, &padded).map_err(doing(format!("writing the {structure} at {offset:#x}")))
    }
}

fn file_identifier() -> Vec<u8> {
    let mut page = vec![0; index(PAGE)];
    page[..8].copy_from_slice(&FILE_SIGNATURE);
    let creator = &mut page[8..8 + CREATOR_BYTES];
    for (slot, unit) in creator.chunks_exact_mut(2).zip(CREATOR.encode_utf16()) {
        slot.copy_from_slice(&unit.to_le_bytes());
    }
    page
}
