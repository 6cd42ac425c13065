//! The header of a node's intent log.
//!
//! The rings are reserved and formatted from the first version on, so that a later release can map new blocks without a
//! round trip on volumes made today. This version writes no records. **Invariant:** a ring whose header is not valid
//! holds no records.

use lockmgr::VolumeId;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Damaged, layout, seal};

const MAGIC: [u8; 8] = *b"CSVFS\0IL";
const WHAT: &str = "csvfs intent log";
const VERSION: u32 = 1;
/// Size of the header in bytes.
pub const RING_HEADER_BYTES: usize = 4096;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    /// `CSVFS\0IL`.
    magic: [u8; 8],
    /// 1.
    version: U32,
    /// Node slot, 0 to 63.
    slot: U16,
    /// Zero.
    pad: U16,
    /// Where on the LUN this ring starts.
    offset: U64,
    volume: [u8; 16],
    /// Size of the ring with its header, in bytes.
    ring_bytes: U64,
    /// First record that is not yet merged into the metadata store; 0 for none.
    tail_lsn: U64,
    /// Zero.
    reserved: [u8; RING_HEADER_BYTES - 60],
    /// CRC-32C of all before.
    checksum: U32,
}

const _: () = assert!(size_of::<Raw>() == RING_HEADER_BYTES);

/// First byte of the ring of node slot `slot`.
#[must_use]
pub fn ring_offset(slot: u16) -> u64 {
    layout::INTENT_OFFSET + u64::from(slot) * layout::INTENT_RING_BYTES
}

/// The header of an empty ring of node slot `slot`.
#[must_use]
pub fn empty_ring(slot: u16, volume: VolumeId) -> Vec<u8> {
    let raw = Raw {
        magic: MAGIC,
        version: VERSION.into(),
        slot: slot.into(),
        pad: U16::ZERO,
        offset: ring_offset(slot).into(),
        volume: *volume.0.as_bytes(),
        ring_bytes: layout::INTENT_RING_BYTES.into(),
        tail_lsn: U64::ZERO,
        reserved: [0; RING_HEADER_BYTES - 60],
        checksum: U32::ZERO,
    };
    let mut bytes = raw.as_bytes().to_vec();
    seal::seal(&mut bytes);
    bytes
}

/// Checks the header of the ring of node slot `slot`.
///
/// # Errors
/// [`Damaged`] when these bytes are no such header.
pub fn check_ring(bytes: &[u8], slot: u16, volume: VolumeId) -> Result<(), Damaged> {
    let offset = ring_offset(slot);
    let field = |why: &str| Damaged::Field { what: WHAT, offset, why: why.into() };
    seal::check(bytes, MAGIC, WHAT, offset)?;
    let raw = Raw::ref_from_bytes(bytes).map_err(|_| field("wrong length"))?;
    if raw.offset.get() != offset || raw.slot.get() != slot || raw.volume != *volume.0.as_bytes() {
        return Err(field("it belongs to another place or volume"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_ring_header_is_good_only_in_its_place() {
        let volume = VolumeId(Uuid::from_u128(1));
        let bytes = empty_ring(5, volume);
        assert_eq!(check_ring(&bytes, 5, volume), Ok(()));
        assert!(check_ring(&bytes, 6, volume).is_err());
        assert!(check_ring(&bytes, 5, VolumeId(Uuid::from_u128(2))).is_err());
    }
}
