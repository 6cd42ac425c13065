//! The owner block: which coordinator, with which term, may serve this volume.
//!
//! Written (alternating between A and B) and flushed before a coordinator serves; a coordinator whose term is below the
//! newest valid block does not open the volume. **Invariant:** terms on the LUN only grow.

use lockmgr::{Epoch, NodeId, Term, VolumeId};
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Damaged, seal};

const MAGIC: [u8; 8] = *b"CSVFS\0OW";
const WHAT: &str = "csvfs owner block";
const VERSION: u32 = 1;
/// Size of a copy in bytes.
pub const OWNER_BYTES: usize = 4096;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    /// `CSVFS\0OW`.
    magic: [u8; 8],
    /// 1.
    version: U32,
    /// The coordinator's node, 0 for none.
    node: U16,
    /// Zero.
    pad: U16,
    /// Where on the LUN this copy belongs.
    offset: U64,
    volume: [u8; 16],
    /// Reign of the coordinator.
    term: U64,
    /// Incarnation of the coordinator's node.
    epoch: U64,
    /// Counts the writes of owner blocks; the higher of two valid copies counts.
    generation: U64,
    /// Zero.
    reserved: [u8; OWNER_BYTES - 68],
    /// CRC-32C of all before.
    checksum: U32,
}

const _: () = assert!(size_of::<Raw>() == OWNER_BYTES && core::mem::offset_of!(Raw, checksum) == 4092);

/// Who coordinates a volume, as the LUN tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerBlock {
    /// The volume.
    pub volume: VolumeId,
    /// The coordinator's node; `None` before the first one.
    pub node: Option<NodeId>,
    /// Its incarnation.
    pub epoch: Epoch,
    /// Its reign.
    pub term: Term,
    /// Number of this version.
    pub generation: u64,
}

impl OwnerBlock {
    /// The bytes of the copy at `offset`.
    #[must_use]
    pub fn encode(&self, offset: u64) -> Vec<u8> {
        let raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            node: self.node.map_or(0, |n| n.0).into(),
            pad: U16::ZERO,
            offset: offset.into(),
            volume: *self.volume.0.as_bytes(),
            term: self.term.0.into(),
            epoch: self.epoch.0.into(),
            generation: self.generation.into(),
            reserved: [0; OWNER_BYTES - 68],
            checksum: U32::ZERO,
        };
        let mut bytes = raw.as_bytes().to_vec();
        seal::seal(&mut bytes);
        bytes
    }

    /// What the copy at `offset` says.
    ///
    /// # Errors
    /// [`Damaged`] when these bytes are no owner block of this place and volume.
    pub fn decode(bytes: &[u8], offset: u64, volume: VolumeId) -> Result<Self, Damaged> {
        let field = |why: String| Damaged::Field { what: WHAT, offset, why };
        seal::check(bytes, MAGIC, WHAT, offset)?;
        let raw = Raw::ref_from_bytes(bytes).map_err(|_| field("wrong length".into()))?;
        if raw.version.get() != VERSION {
            return Err(field(format!("version {}, this program knows {VERSION}", raw.version)));
        }
        if raw.offset.get() != offset {
            return Err(field(format!("it belongs to offset {}", raw.offset)));
        }
        if raw.volume != *volume.0.as_bytes() {
            return Err(field(format!("it belongs to volume {}", Uuid::from_bytes(raw.volume))));
        }
        Ok(Self {
            volume,
            node: Some(NodeId(raw.node.get())).filter(|n| n.0 != 0),
            epoch: Epoch(raw.epoch.get()),
            term: Term(raw.term.get()),
            generation: raw.generation.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_block_reads_back_and_only_as_its_own_volume() {
        let volume = VolumeId(Uuid::from_u128(1));
        let block =
            OwnerBlock { volume, node: Some(NodeId(2)), epoch: Epoch(3), term: Term(4), generation: 5 };
        let bytes = block.encode(2 << 20);
        assert_eq!(OwnerBlock::decode(&bytes, 2 << 20, volume), Ok(block));
        assert!(OwnerBlock::decode(&bytes, 2 << 20, VolumeId(Uuid::from_u128(2))).is_err());
        assert!(OwnerBlock::decode(&[0; OWNER_BYTES], 2 << 20, volume).is_err());
    }
}
