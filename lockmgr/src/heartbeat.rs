//! Heartbeats on the LUN: one slot per node, written by that node alone.
//!
//! ```text
//!   area + 0        node 1     512 bytes of record, the rest of 4096 zero
//!   area + 4096     node 2
//!   ...             ...        64 slots
//! ```
//! Only the first sector of a slot carries a record, because one sector is all that a device writes as a whole. Whoever
//! reads compares epoch and counter with what it saw last and times the difference on its own clock; no clock of another
//! node is ever looked at (B1).
//!
//! Version 1: first version.
//!
//! **Invariant:** a record is believed only if checksum, volume, own address and slot number are all right: what another
//! volume, a copied slot or a torn write left there is no sign of life.

use std::sync::Arc;

use blockio::{AlignedBuf, BlockDevice, IoError, IoOp};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Epoch, NODES_MAX, NodeId, VolumeId};

/// Distance between two slots in bytes: no device has larger sectors.
pub const SLOT_BYTES: u64 = 4096;
/// Size of the area of all slots in bytes.
pub const AREA_BYTES: u64 = SLOT_BYTES * NODES_MAX as u64;

const RECORD_BYTES: usize = 512;
const MAGIC: [u8; 8] = *b"CSVBEAT\0";
const VERSION: u32 = 1;

/// A slot's first sector.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Record {
    magic: [u8; 8],
    version: U32,
    node: U16,
    reserved_a: U16,
    volume: [u8; 16],
    /// Where on the LUN this record belongs, in bytes.
    address: U64,
    epoch: U64,
    counter: U64,
    /// Length of the writer's lease in milliseconds; others wait by this one, not by their own (B2).
    lease_ms: U64,
    reserved_b: [u8; 444],
    /// CRC-32C of all bytes before.
    checksum: U32,
}

const CHECKSUM_AT: usize = RECORD_BYTES - 4;
const _: () = assert!(size_of::<Record>() == RECORD_BYTES);
const _: () = assert!(std::mem::offset_of!(Record, checksum) == CHECKSUM_AT);

/// What a node says with a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Who.
    pub node: NodeId,
    /// Which incarnation.
    pub epoch: Epoch,
    /// Grows with each heartbeat of an incarnation.
    pub counter: u64,
    /// Length of its lease in milliseconds.
    pub lease_ms: u64,
}

/// One slot, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// Whose slot it is.
    pub node: NodeId,
    /// What is in it.
    pub content: SlotContent,
}

/// What is in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotContent {
    /// Never written.
    Empty,
    /// A heartbeat.
    Beat(Beat),
    /// Something that is no heartbeat of this slot, and why not.
    Unreadable(&'static str),
}

/// The heartbeat area of a volume.
pub struct LunSlots {
    device: Arc<dyn BlockDevice>,
    area_offset: u64,
    volume: VolumeId,
}

impl LunSlots {
    /// The area at `area_offset` of the LUN of `volume`. The device needs a queue of its own, so that heartbeats do not
    /// wait behind other I/O (B4).
    #[must_use]
    pub fn new(device: Arc<dyn BlockDevice>, area_offset: u64, volume: VolumeId) -> Self {
        Self { device, area_offset, volume }
    }

    /// Writes a node's slot. Returns when the device has completed it: only then is it a sign of life (B4).
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// When the node's id is not from 1 to [`NODES_MAX`].
    pub fn write(&self, beat: Beat) -> Result<(), IoError> {
        assert!((1..=NODES_MAX).contains(&beat.node.0), "node {} has no heartbeat slot", beat.node);
        let offset = self.offset_of(beat.node);
        let mut slot = AlignedBuf::zeroed(usize::try_from(SLOT_BYTES).expect("4096"));
        slot[..RECORD_BYTES].copy_from_slice(self.encode(beat, offset).as_bytes());
        self.device.run(IoOp::Write { offset, buf: slot.into(), fua: false })
    }

    /// Reads all slots with one request.
    ///
    /// # Errors
    /// Those of the device. Then nothing is known about the others: their silence does not count.
    pub fn read_all(&self) -> Result<Vec<SlotView>, IoError> {
        let mut area = vec![0; usize::try_from(AREA_BYTES).expect("256 KiB")];
        self.device.read_at(self.area_offset, &mut area)?;
        let slots = area.chunks(usize::try_from(SLOT_BYTES).expect("4096"));
        Ok((1..=NODES_MAX).zip(slots).map(|(id, slot)| self.decode(NodeId(id), slot)).collect())
    }

    fn offset_of(&self, node: NodeId) -> u64 {
        self.area_offset + u64::from(node.0 - 1) * SLOT_BYTES
    }

    fn encode(&self, beat: Beat, address: u64) -> Record {
        let mut record = Record {
            magic: MAGIC,
            version: VERSION.into(),
            node: beat.node.0.into(),
            reserved_a: 0.into(),
            volume: *self.volume.0.as_bytes(),
            address: address.into(),
            epoch: beat.epoch.0.into(),
            counter: beat.counter.into(),
            lease_ms: beat.lease_ms.into(),
            reserved_b: [0; 444],
            checksum: 0.into(),
        };
        record.checksum = crc32c::crc32c(&record.as_bytes()[..CHECKSUM_AT]).into();
        record
    }

    fn decode(&self, node: NodeId, slot: &[u8]) -> SlotView {
        let content = match self.beat_in(node, slot) {
            _ if slot.iter().all(|byte| *byte == 0) => SlotContent::Empty,
            Ok(beat) => SlotContent::Beat(beat),
            Err(why) => SlotContent::Unreadable(why),
        };
        SlotView { node, content }
    }

    fn beat_in(&self, node: NodeId, slot: &[u8]) -> Result<Beat, &'static str> {
        let (record, _) = Record::ref_from_prefix(slot).map_err(|_| "the slot is too short")?;
        let must = |holds, why| if holds { Ok(()) } else { Err(why) };
        must(record.magic == MAGIC, "the magic number is wrong")?;
        let checksum = crc32c::crc32c(&record.as_bytes()[..CHECKSUM_AT]);
        must(record.checksum.get() == checksum, "the checksum is wrong")?;
        must(record.version.get() == VERSION, "the version is unknown")?;
        must(record.volume == *self.volume.0.as_bytes(), "it belongs to another volume")?;
        must(record.address.get() == self.offset_of(node), "it belongs to another place")?;
        must(record.node.get() == node.0, "it belongs to another node")?;
        let reserved_zero = record.reserved_a.get() == 0 && record.reserved_b.iter().all(|byte| *byte == 0);
        must(reserved_zero, "reserved bytes are not zero")?;
        Ok(Beat {
            node,
            epoch: Epoch(record.epoch.get()),
            counter: record.counter.get(),
            lease_ms: record.lease_ms.get(),
        })
    }
}

impl std::fmt::Debug for LunSlots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LunSlots")
            .field("area_offset", &self.area_offset)
            .field("volume", &self.volume)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use blockio::MemoryDevice;
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    const AREA: u64 = 3 << 20;

    fn slots_of(device: &Arc<MemoryDevice>, volume: u128) -> LunSlots {
        LunSlots::new(device.clone(), AREA, VolumeId(Uuid::from_u128(volume)))
    }

    fn lun() -> Arc<MemoryDevice> {
        Arc::new(MemoryDevice::with_block_bytes(4 << 20, 4096))
    }

    fn beat(node: u16, counter: u64) -> Beat {
        Beat { node: NodeId(node), epoch: Epoch(3), counter, lease_ms: 2000 }
    }

    fn content(slots: &LunSlots, node: u16) -> SlotContent {
        slots.read_all().expect("read")[usize::from(node) - 1].content
    }

    #[test]
    fn each_node_reads_what_the_others_wrote() {
        let lun = lun();
        let slots = slots_of(&lun, 1);
        assert_eq!(content(&slots, 1), SlotContent::Empty);
        for node in [1, 2, NODES_MAX] {
            slots.write(beat(node, 10)).expect("written");
            slots.write(beat(node, 11)).expect("written");
        }
        let seen = slots.read_all().expect("read");
        assert_eq!(seen.len(), usize::from(NODES_MAX));
        let alive: Vec<_> = seen.iter().filter(|slot| slot.content != SlotContent::Empty).collect();
        assert_eq!(alive.iter().map(|slot| slot.node.0).collect::<Vec<_>>(), [1, 2, NODES_MAX]);
        assert!(alive.iter().all(|slot| slot.content == SlotContent::Beat(beat(slot.node.0, 11))));
    }

    // Invariant G2
    #[test]
    fn a_beat_of_another_volume_or_another_slot_is_no_sign_of_life() {
        let lun = lun();
        slots_of(&lun, 1).write(beat(1, 10)).expect("written");
        let other = slots_of(&lun, 2);
        assert_eq!(content(&other, 1), SlotContent::Unreadable("it belongs to another volume"));
        let mut slot = [0; 4096];
        lun.read_at(AREA, &mut slot).expect("read");
        lun.write_at(AREA + SLOT_BYTES, &slot).expect("copied");
        assert_eq!(content(&slots_of(&lun, 1), 2), SlotContent::Unreadable("it belongs to another place"));
    }

    // Invariant D2
    #[test]
    fn every_changed_bit_is_noticed() {
        let lun = lun();
        let slots = slots_of(&lun, 1);
        slots.write(beat(1, 10)).expect("written");
        let mut whole = [0; 4096];
        lun.read_at(AREA, &mut whole).expect("read");
        for bit in 0..RECORD_BYTES * 8 {
            let mut slot = whole;
            slot[bit / 8] ^= 1 << (bit % 8);
            let view = slots.decode(NodeId(1), &slot);
            assert!(matches!(view.content, SlotContent::Unreadable(_)), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_never_a_beat_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), node in 1..=NODES_MAX) {
            let view = slots_of(&lun(), 1).decode(NodeId(node), &bytes);
            prop_assert!(!matches!(view.content, SlotContent::Beat(_)));
        }
    }
}
