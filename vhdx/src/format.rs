//! The bytes of a VHDX file, and nothing else ([MS-VHDX] 2).
//!
//! ```text
//! 0        file identifier   never rewritten
//! 64 KiB   header 1          4 KiB; of the two valid ones the greater sequence number is current
//! 128 KiB  header 2
//! 192 KiB  region table 1    64 KiB
//! 256 KiB  region table 2
//! 1 MiB    ...               log, BAT, metadata, payload blocks: 1 MiB aligned, in any order, never overlapping
//! ```
//! Everything is little-endian. Reserved fields are written as zero.
//!
//! **Invariant:** no other module knows an offset inside a structure.

use std::mem::{offset_of, size_of};

use uuid::{Uuid, uuid};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes in a KiB.
pub(crate) const KIB: u64 = 1024;
/// Bytes in a MiB: the grain of everything but the headers.
pub(crate) const MIB: u64 = 1024 * KIB;
/// Bytes in a TiB.
pub(crate) const TIB: u64 = 1024 * 1024 * MIB;
/// A page of metadata: the unit of the log.
pub(crate) const PAGE: u64 = 4 * KIB;

/// `vhdxfile`.
pub(crate) const FILE_SIGNATURE: [u8; 8] = *b"vhdxfile";
/// Bytes of UTF-16LE creator text behind the signature.
pub(crate) const CREATOR_BYTES: usize = 512;
/// Where the two headers are.
pub(crate) const HEADER_OFFSETS: [u64; 2] = [64 * KIB, 128 * KIB];
/// Where the two region tables are.
pub(crate) const REGION_TABLE_OFFSETS: [u64; 2] = [192 * KIB, 256 * KIB];
/// Size of a region table and of the metadata table.
pub(crate) const TABLE_BYTES: u64 = 64 * KIB;
/// The fixed first part of the file; nothing else may lie in it.
pub(crate) const HEADER_AREA_BYTES: u64 = MIB;
/// The lowest offset that a log entry may rewrite: the headers are out of its reach.
pub(crate) const LOG_TARGET_MIN: u64 = REGION_TABLE_OFFSETS[0];
/// Entries in a region or metadata table.
pub(crate) const TABLE_ENTRIES_MAX: u16 = 2047;
/// Largest virtual disk.
pub(crate) const DISK_BYTES_MAX: u64 = 64 * TIB;
/// Smallest and largest payload block.
pub(crate) const BLOCK_BYTES_MIN: u64 = MIB;
/// See [`BLOCK_BYTES_MIN`].
pub(crate) const BLOCK_BYTES_MAX: u64 = 256 * MIB;
/// Longest log that is read: replay work must not be chosen by the file.
pub(crate) const LOG_BYTES_MAX: u64 = 256 * MIB;
/// Largest metadata region, the bound that Microsoft's parser has too.
pub(crate) const METADATA_BYTES_MAX: u64 = 128 * MIB;
/// Logical sectors that one sector bitmap block describes.
pub(crate) const CHUNK_SECTORS: u64 = 1 << 23;

/// The block allocation table.
pub(crate) const REGION_BAT: Uuid = uuid!("2DC27766-F623-4200-9D64-115E9BFD4A08");
/// The metadata region.
pub(crate) const REGION_METADATA: Uuid = uuid!("8B7CA206-4790-4B9A-B8FE-575F050F886E");
/// Block size and flags.
pub(crate) const ITEM_FILE_PARAMETERS: Uuid = uuid!("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
/// Size of the virtual disk.
pub(crate) const ITEM_DISK_SIZE: Uuid = uuid!("2FA54224-CD1B-4876-B211-5DBED83BF4B8");
/// SCSI page 83 identity.
pub(crate) const ITEM_DISK_ID: Uuid = uuid!("BECA12AB-B2E6-4523-93EF-C309E000C746");
/// Logical sector size.
pub(crate) const ITEM_LOGICAL_SECTOR: Uuid = uuid!("8141BF1D-A96F-4709-BA47-F233A8FAAB5F");
/// Physical sector size.
pub(crate) const ITEM_PHYSICAL_SECTOR: Uuid = uuid!("CDA348C7-445D-4471-9CC9-E9885251C556");
/// Where the parent is.
pub(crate) const ITEM_PARENT_LOCATOR: Uuid = uuid!("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C");
/// Seen in Microsoft's code: cylinders, heads and sectors.
pub(crate) const ITEM_CHS: Uuid = uuid!("DA02D7BC-3D3A-423C-AC88-2A36AB21479B");
/// Seen in Microsoft's code: labels of persistent memory.
pub(crate) const ITEM_PMEM_LABELS: Uuid = uuid!("10E1AE8A-4B7E-4169-A40F-CD70DE928393");
/// Seen in Microsoft's code: creation is unfinished.
pub(crate) const ITEM_INCOMPLETE: Uuid = uuid!("71CC85F0-1B69-4E28-9558-C3BF83AE75D3");

/// File parameters: blocks stay allocated (a fixed disk).
pub(crate) const PARAM_LEAVE_ALLOCATED: u32 = 1;
/// File parameters: a differencing disk.
pub(crate) const PARAM_HAS_PARENT: u32 = 2;
/// Metadata entry: user item.
pub(crate) const ITEM_IS_USER: u32 = 1;
/// Metadata entry: describes the virtual disk, not the file.
pub(crate) const ITEM_IS_VIRTUAL_DISK: u32 = 2;
/// Metadata entry: a reader that does not know it must refuse.
pub(crate) const ITEM_IS_REQUIRED: u32 = 4;

/// One of the two copies of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    /// `head`.
    pub(crate) signature: [u8; 4],
    /// CRC-32C over the 4 KiB with this field zero.
    pub(crate) checksum: U32,
    /// The greater one is current.
    pub(crate) sequence: U64,
    /// Changes before the first byte of any kind changes in a session.
    pub(crate) file_write_id: [u8; 16],
    /// Changes before the first change that a guest could see.
    pub(crate) data_write_id: [u8; 16],
    /// Zero: nothing to replay. Else only entries that bear it count.
    pub(crate) log_id: [u8; 16],
    /// 0.
    pub(crate) log_version: U16,
    /// 1.
    pub(crate) version: U16,
    /// Multiple of 1 MiB.
    pub(crate) log_length: U32,
    /// Multiple of 1 MiB.
    pub(crate) log_offset: U64,
    /// Zero.
    pub(crate) reserved: [u8; 4016],
}
const _: () = assert!(size_of::<Header>() == 4096 && offset_of!(Header, log_offset) == 72);

/// Start of a region table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RegionTableHeader {
    /// `regi`.
    pub(crate) signature: [u8; 4],
    /// CRC-32C over the 64 KiB with this field zero.
    pub(crate) checksum: U32,
    /// At most 2047.
    pub(crate) entry_count: U32,
    /// Zero.
    pub(crate) reserved: U32,
}
const _: () = assert!(size_of::<RegionTableHeader>() == 16);

/// One region.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RegionEntry {
    /// Which region.
    pub(crate) id: [u8; 16],
    /// Multiple of 1 MiB, at least 1 MiB.
    pub(crate) file_offset: U64,
    /// Non-zero multiple of 1 MiB.
    pub(crate) length: U32,
    /// Bit 0: a reader that does not know the region must refuse.
    pub(crate) required: U32,
}
const _: () = assert!(size_of::<RegionEntry>() == 32);

/// Start of the metadata table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct MetadataTableHeader {
    /// `metadata`.
    pub(crate) signature: [u8; 8],
    /// Zero.
    pub(crate) reserved: U16,
    /// At most 2047.
    pub(crate) entry_count: U16,
    /// Zero.
    pub(crate) reserved2: [u8; 20],
}
const _: () = assert!(size_of::<MetadataTableHeader>() == 32);

/// One metadata item.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct MetadataEntry {
    /// Which item.
    pub(crate) id: [u8; 16],
    /// At least 64 KiB, from the start of the region; zero for an empty item.
    pub(crate) offset: U32,
    /// At most 1 MiB.
    pub(crate) length: U32,
    /// `ITEM_IS_*`.
    pub(crate) flags: U32,
    /// Zero.
    pub(crate) reserved: U32,
}
const _: () = assert!(size_of::<MetadataEntry>() == 32);

/// Start of a parent locator.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct LocatorHeader {
    /// What kind of parent it is.
    pub(crate) kind: [u8; 16],
    /// Zero.
    pub(crate) reserved: U16,
    /// Pairs of key and value.
    pub(crate) pair_count: U16,
}
const _: () = assert!(size_of::<LocatorHeader>() == 20);

/// One pair of a parent locator. Offsets count from the start of the item, lengths are in bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct LocatorPair {
    /// Where the key is.
    pub(crate) key_offset: U32,
    /// Where the value is.
    pub(crate) value_offset: U32,
    /// Its length.
    pub(crate) key_length: U16,
    /// Its length.
    pub(crate) value_length: U16,
}
const _: () = assert!(size_of::<LocatorPair>() == 12);

/// Start of a log entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct LogEntryHeader {
    /// `loge`.
    pub(crate) signature: [u8; 4],
    /// CRC-32C over the whole entry with this field zero.
    pub(crate) checksum: U32,
    /// Multiple of 4 KiB.
    pub(crate) entry_length: U32,
    /// Ring offset of the oldest entry whose effects are not yet in place.
    pub(crate) tail: U32,
    /// Greater than zero, one more than the entry before.
    pub(crate) sequence: U64,
    /// May be zero.
    pub(crate) descriptor_count: U32,
    /// Zero.
    pub(crate) reserved: U32,
    /// Must equal the header's.
    pub(crate) log_id: [u8; 16],
    /// A file size that was durable when this was written.
    pub(crate) flushed_file_bytes: U64,
    /// A file size that everything allocated fits in.
    pub(crate) last_file_bytes: U64,
}
const _: () = assert!(size_of::<LogEntryHeader>() == 64);

/// What one descriptor of a log entry rewrites.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct LogDescriptor {
    /// `desc` or `zero`.
    pub(crate) signature: [u8; 4],
    /// `desc`: last four bytes of the page.
    pub(crate) trailing: [u8; 4],
    /// `desc`: first eight bytes of the page. `zero`: number of bytes, little-endian.
    pub(crate) leading: [u8; 8],
    /// Target, multiple of 4 KiB.
    pub(crate) file_offset: U64,
    /// Equal to the entry's.
    pub(crate) sequence: U64,
}
const _: () = assert!(size_of::<LogDescriptor>() == 32);

/// The rest of a page that a `desc` descriptor rewrites.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct LogDataSector {
    /// `data`.
    pub(crate) signature: [u8; 4],
    /// Upper half of the entry's sequence number.
    pub(crate) sequence_high: U32,
    /// Bytes 8 to 4091 of the page.
    pub(crate) middle: [u8; 4084],
    /// Lower half of the entry's sequence number.
    pub(crate) sequence_low: U32,
}
const _: () = assert!(size_of::<LogDataSector>() == 4096);

/// CRC-32C of `bytes` with the four bytes at `at` taken as zero.
pub(crate) fn checksum_without(bytes: &[u8], at: usize) -> u32 {
    let head = crc32c::crc32c(&bytes[..at]);
    let gap = crc32c::crc32c_append(head, &[0; 4]);
    crc32c::crc32c_append(gap, &bytes[at + 4..])
}

/// A file quantity as an index into memory. Sizes are bounded before they come here.
pub(crate) fn index(value: u64) -> usize {
    usize::try_from(value).expect("a bounded size fits the address space")
}

/// A length in memory as a file quantity.
pub(crate) fn bytes(len: usize) -> u64 {
    u64::try_from(len).expect("memory is smaller than 2^64 bytes")
}
