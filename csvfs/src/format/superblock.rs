//! The superblock: what this LUN is.
//!
//! Two copies; the newest valid one counts. They are written one after the other with a flush between, so a crash tears
//! at most one. **Invariant:** a copy knows its own address, so a block that landed in the wrong place is not taken.

use lockmgr::{ClusterId, VolumeId};
use uuid::Uuid;
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Damaged, layout, seal};

const MAGIC: [u8; 8] = *b"CSVFS\0SB";
const WHAT: &str = "csvfs superblock";
/// Version of the layout of this record and of the fixed areas.
pub const FORMAT_VERSION: u32 = 1;
/// Longest name of a volume in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Size of a copy in bytes.
pub const SUPERBLOCK_BYTES: usize = 4096;

/// Features that a program may ignore.
pub const COMPAT_KNOWN: u64 = 0;
/// Features that a program must know to write. Bit 0: inodes have extended attributes and access control lists, in a
/// table that goes with them.
pub const RO_COMPAT_KNOWN: u64 = RO_COMPAT_XATTRS;
/// See [`RO_COMPAT_KNOWN`].
pub const RO_COMPAT_XATTRS: u64 = 1;
/// Features that a program must know to do anything. Bit 0: the metadata store is redb, file format 3, at the chunks of
/// the metadata slot. Bit 1: pools and intent logs: blocks and records that an older program would take for lost ones. Bit 2:
/// clones: blocks that several files have, with counts of references. Bit 3: changes of the metadata are in the journal before
/// they are in the store.
pub const INCOMPAT_KNOWN: u64 = INCOMPAT_REDB3 | INCOMPAT_POOLS | INCOMPAT_CLONES | INCOMPAT_JOURNAL;
/// See [`INCOMPAT_KNOWN`].
pub const INCOMPAT_REDB3: u64 = 1;
/// See [`INCOMPAT_KNOWN`].
pub const INCOMPAT_POOLS: u64 = 2;
/// See [`INCOMPAT_KNOWN`].
pub const INCOMPAT_CLONES: u64 = 4;
/// See [`INCOMPAT_KNOWN`].
pub const INCOMPAT_JOURNAL: u64 = 8;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    /// `CSVFS\0SB`.
    magic: [u8; 8],
    /// [`FORMAT_VERSION`].
    version: U32,
    /// Unit of allocation in bytes: 4096.
    block_bytes: U32,
    /// Where on the LUN this copy belongs, in bytes.
    offset: U64,
    /// Counts the writes of the superblock; the higher of two valid copies counts.
    generation: U64,
    /// Feature bits that may be ignored.
    compat: U64,
    /// Feature bits that forbid writing to who does not know them.
    ro_compat: U64,
    /// Feature bits that forbid everything to who does not know them.
    incompat: U64,
    volume: [u8; 16],
    cluster: [u8; 16],
    /// Size of the LUN in bytes that the volume uses.
    lun_bytes: U64,
    /// When the volume was made, seconds since 1970.
    created_seconds: I64,
    /// Offset and size of the heartbeat area, the intent logs, the metadata slots, and the area of chunks and data.
    regions: [RawRegion; 4],
    /// Size of one intent log in bytes.
    ring_bytes: U64,
    /// Number of bytes of `name` in use.
    name_len: U16,
    name: [u8; NAME_BYTES_MAX],
    /// Zero.
    reserved: [u8; REST],
    /// CRC-32C of all before.
    checksum: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawRegion {
    offset: U64,
    bytes: U64,
}

const REST: usize = SUPERBLOCK_BYTES - 4 - (104 + 4 * 16 + 8 + 2 + NAME_BYTES_MAX);
const _: () = assert!(size_of::<Raw>() == SUPERBLOCK_BYTES && core::mem::offset_of!(Raw, checksum) == 4092);

/// What a LUN is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Identity of the volume.
    pub volume: VolumeId,
    /// The cluster that may use it.
    pub cluster: ClusterId,
    /// Name for people.
    pub name: String,
    /// Bytes of the LUN that the volume uses.
    pub lun_bytes: u64,
    /// When it was made, seconds since 1970.
    pub created_seconds: i64,
    /// Feature bits that may be ignored.
    pub compat: u64,
    /// Feature bits that must be known for writing.
    pub ro_compat: u64,
    /// Feature bits that must be known.
    pub incompat: u64,
    /// Number of this version of the superblock.
    pub generation: u64,
}

impl Superblock {
    /// The bytes of the copy at `offset`.
    #[must_use]
    pub fn encode(&self, offset: u64) -> Vec<u8> {
        let name_len = self.name.len().min(NAME_BYTES_MAX);
        let mut name = [0; NAME_BYTES_MAX];
        name[..name_len].copy_from_slice(&self.name.as_bytes()[..name_len]);
        let raw = Raw {
            magic: MAGIC,
            version: FORMAT_VERSION.into(),
            block_bytes: U32::new(4096),
            offset: offset.into(),
            generation: self.generation.into(),
            compat: self.compat.into(),
            ro_compat: self.ro_compat.into(),
            incompat: self.incompat.into(),
            volume: *self.volume.0.as_bytes(),
            cluster: *self.cluster.0.as_bytes(),
            lun_bytes: self.lun_bytes.into(),
            created_seconds: self.created_seconds.into(),
            regions: regions(self.lun_bytes),
            ring_bytes: layout::INTENT_RING_BYTES.into(),
            name_len: u16::try_from(name_len).expect("NAME_BYTES_MAX is small").into(),
            name,
            reserved: [0; REST],
            checksum: U32::ZERO,
        };
        let mut bytes = raw.as_bytes().to_vec();
        seal::seal(&mut bytes);
        bytes
    }

    /// What the copy at `offset` says. The bits it sets are not judged here, see [`Superblock::unknown_incompat`].
    ///
    /// # Errors
    /// [`Damaged`] when these bytes are no superblock of this place.
    pub fn decode(bytes: &[u8], offset: u64) -> Result<Self, Damaged> {
        let field = |why: String| Damaged::Field { what: WHAT, offset, why };
        seal::check(bytes, MAGIC, WHAT, offset)?;
        let raw = Raw::ref_from_bytes(bytes).map_err(|_| field("wrong length".into()))?;
        if raw.version.get() != FORMAT_VERSION {
            let why = format!("format version {}, this program knows {FORMAT_VERSION}", raw.version);
            return Err(field(why));
        }
        if raw.offset.get() != offset {
            return Err(field(format!("it belongs to offset {}", raw.offset)));
        }
        if u64::from(raw.block_bytes.get()) != layout::BLOCK_BYTES {
            return Err(field(format!("blocks of {} bytes", raw.block_bytes)));
        }
        if raw.lun_bytes.get() < layout::LUN_BYTES_MIN {
            return Err(field(format!("a volume of {} bytes", raw.lun_bytes)));
        }
        let name = raw.name.get(..usize::from(raw.name_len.get()));
        let name = name.and_then(|n| std::str::from_utf8(n).ok()).ok_or_else(|| field("its name".into()))?;
        Ok(Self {
            volume: VolumeId(Uuid::from_bytes(raw.volume)),
            cluster: ClusterId(Uuid::from_bytes(raw.cluster)),
            name: name.to_owned(),
            lun_bytes: raw.lun_bytes.get(),
            created_seconds: raw.created_seconds.get(),
            compat: raw.compat.get(),
            ro_compat: raw.ro_compat.get(),
            incompat: raw.incompat.get(),
            generation: raw.generation.get(),
        })
    }

    /// Incompatible features of this volume that this program does not know, by name; empty when it may be opened.
    #[must_use]
    pub fn unknown_incompat(&self) -> Vec<String> {
        unknown_bits("incompat", self.incompat & !INCOMPAT_KNOWN)
    }

    /// Features that forbid writing to this program, by name.
    #[must_use]
    pub fn unknown_ro_compat(&self) -> Vec<String> {
        unknown_bits("ro-compat", self.ro_compat & !RO_COMPAT_KNOWN)
    }
}

fn unknown_bits(kind: &str, bits: u64) -> Vec<String> {
    (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| format!("{kind} bit {bit}")).collect()
}

fn regions(lun_bytes: u64) -> [RawRegion; 4] {
    let region = |offset: u64, bytes: u64| RawRegion { offset: offset.into(), bytes: bytes.into() };
    [
        region(layout::HEARTBEAT_OFFSET, layout::HEARTBEAT_BYTES),
        region(layout::INTENT_OFFSET, layout::NODE_SLOTS * layout::INTENT_RING_BYTES),
        region(layout::META_SLOT_OFFSETS[0], 2 * layout::META_SLOT_BYTES as u64),
        region(layout::FIRST_CHUNK_OFFSET, lun_bytes.saturating_sub(layout::FIRST_CHUNK_OFFSET)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Superblock {
        Superblock {
            volume: VolumeId(Uuid::from_u128(7)),
            cluster: ClusterId(Uuid::from_u128(8)),
            name: "vol1".into(),
            lun_bytes: 1 << 30,
            created_seconds: 1_700_000_000,
            compat: 0,
            ro_compat: 0,
            incompat: INCOMPAT_REDB3,
            generation: 3,
        }
    }

    #[test]
    fn a_superblock_reads_back() {
        let block = sample();
        assert_eq!(Superblock::decode(&block.encode(0), 0), Ok(block));
    }

    // Invariant D2.
    #[test]
    fn a_copy_in_the_wrong_place_is_not_taken() {
        let bytes = sample().encode(0);
        assert!(matches!(Superblock::decode(&bytes, 1 << 20), Err(Damaged::Field { .. })));
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        let good = sample().encode(0);
        for at in (0..good.len()).step_by(7) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x40;
            assert!(Superblock::decode(&bytes, 0).is_err(), "byte {at}");
        }
    }

    // Invariant G4.
    #[test]
    fn unknown_features_are_named() {
        let mut block = sample();
        block.incompat |= 1 << 5;
        assert_eq!(block.unknown_incompat(), ["incompat bit 5"]);
    }
}
