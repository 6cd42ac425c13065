//! Making an image, in the layout that Windows uses.
//!
//! ```text
//! 0      file identifier, headers, region tables      written last: without them the file is no VHDX yet
//! 1 MiB  log, 1 MiB
//! 2 MiB  metadata region, 1 MiB (more if a child inherits more)
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
use crate::image::Image;
use crate::locator::{Locator, ParentPaths};
use crate::metadata::{self, DiskParams, Item};
use crate::region::{self, Area};

const LOG: Area = Area { offset: MIB, length: MIB, owner: "log" };
const METADATA_OFFSET: u64 = 2 * MIB;
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

/// A child to create: only what differs from its parent will lie in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildSpec {
    /// Size of the virtual disk, if it is not to be that of the parent.
    pub size_bytes: Option<u64>,
    /// Size of a payload block; need not be that of the parent.
    pub block_bytes: u64,
    /// Where the parent is, seen from the child. See [`crate::ParentResolver::paths`].
    pub parent: ParentPaths,
}

impl ChildSpec {
    /// A child as Hyper-V makes it: blocks of 2 MiB, as large as its parent.
    #[must_use]
    pub fn new(parent: ParentPaths) -> Self {
        Self { size_bytes: None, block_bytes: 2 * MIB, parent }
    }
}

/// An image whose structures are not yet written; blocks may be placed and filled before [`Draft::finish`].
pub(crate) struct Draft<'a> {
    file: &'a dyn ImageFile,
    /// The first bytes of the metadata region.
    metadata: Vec<u8>,
    bat_offset: u64,
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

/// Makes a child of `parent` in `file`. Everything that was in the file is lost; the parent is not touched.
///
/// The child refers to the parent by its data write id: from now on the parent must not be written any more.
///
/// # Errors
/// [`crate::ErrorKind::InvalidInput`] before anything changes, [`crate::ErrorKind::Io`] later.
pub fn create_child(file: &dyn ImageFile, parent: &Image, spec: &ChildSpec) -> Result<(), VhdxError> {
    let origin = parent.loaded();
    let params = DiskParams {
        disk_bytes: spec.size_bytes.unwrap_or(origin.params.disk_bytes),
        block_bytes: spec.block_bytes,
        fixed: false,
        has_parent: true,
        ..origin.params
    };
    let invalid = |found: String| VhdxError::InvalidInput(format!("cannot create a child with {found}"));
    params.check().map_err(invalid)?;
    if spec.parent == ParentPaths::default() {
        return Err(invalid("no path to its parent".to_owned()));
    }
    let linkage = origin.data_write_id();
    if linkage.is_nil() {
        return Err(invalid(
            "a parent whose data write id is zero; open the parent for writing once".to_owned(),
        ));
    }
    let inherited = metadata::inherited_items(&origin.view, origin.regions.metadata)?;
    let locator = Locator::new(linkage, &spec.parent);
    Draft::begin_with(file, params, Some(&locator), &inherited)?.finish()
}

impl<'a> Draft<'a> {
    /// Empties the file and places the blocks of a fixed disk.
    pub(crate) fn begin(file: &'a dyn ImageFile, spec: &Spec) -> Result<Self, VhdxError> {
        Self::begin_with(file, spec.params()?, None, &[])
    }

    /// The same for checked parameters, perhaps of a child.
    pub(crate) fn begin_with(
        file: &'a dyn ImageFile,
        params: DiskParams,
        locator: Option<&Locator>,
        inherited: &[Item],
    ) -> Result<Self, VhdxError> {
        let shape = BatShape::of(&params);
        let metadata = params.encode(locator, inherited);
        let bat_offset = METADATA_OFFSET + bytes(metadata.len()).next_multiple_of(MIB);
        let data_start = bat_offset + shape.region_bytes();
        let mut draft = Self {
            file,
            metadata,
            bat_offset,
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
        let bat = Area { offset: self.bat_offset, length: self.shape.region_bytes(), owner: "BAT region" };
        let length = self.bat_offset - METADATA_OFFSET;
        let metadata = Area { offset: METADATA_OFFSET, length, owner: "metadata region" };
        self.write(METADATA_OFFSET, &self.metadata, "metadata region")?;
        let table = region::encode(bat, metadata);
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
            self.write(self.bat_offset + bytes(number) * MIB, &piece, "BAT")?;
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
