//! The part of the LUN that carries the metadata store: a linear space made of chunks.
//!
//! ```text
//!   store offset   0 ........... len ........ used_high ............ capacity
//!                  | in use      | was in use | zero since taken     |
//!   chunks         [ chunk 0      ][ chunk 1        ][ chunk 2        ]      each anywhere on the LUN
//! ```
//! Length and chunk table are in the metadata slot, of which there are two copies, one flushed before the other is written. Chunks are added ahead of
//! need, so that growth inside a commit never asks the allocator.
//!
//! **Invariant:** after `revoke`, or after any failed write or flush, nothing is written any more (D5, D6).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, mpsc};

use blockio::{AlignedBuf, BlockDevice, IoBuf, IoError, IoOp, IoRequest};
use lockmgr::VolumeId;

use crate::format::layout::{META_SLOT_BYTES, META_SLOT_OFFSETS};
use crate::format::meta_slot::{CHUNKS_MAX, Chunk, MetaSlot};

/// Writes in flight before the writer waits: bounds the memory of a large commit.
const IN_FLIGHT_MAX: usize = 256;

/// The linear space. See the module.
pub(super) struct Region {
    device: Arc<dyn BlockDevice>,
    volume: VolumeId,
    /// Rank 1: taken before `flight`. Length and chunks, and whether the copy on the LUN is older.
    state: Mutex<State>,
    flight: Arc<Flight>,
    revoked: AtomicBool,
}

struct State {
    slot: MetaSlot,
    /// The LUN has an older length or chunk table.
    slot_dirty: bool,
    /// Zeroes were written that must be stable before the slot that makes them reachable.
    zeroes_unflushed: bool,
}

/// Writes that have not completed, by their place on the LUN.
struct Flight {
    /// Rank 2.
    ranges: Mutex<BTreeMap<u64, u64>>,
    landed: Condvar,
    failed: OnceLock<String>,
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("volume", &self.volume).finish_non_exhaustive()
    }
}

impl Region {
    /// A new, empty store on `chunks`, which read zeros.
    pub(super) fn create(
        device: Arc<dyn BlockDevice>,
        volume: VolumeId,
        chunks: Vec<Chunk>,
    ) -> Result<Self, IoError> {
        let slot = MetaSlot { sequence: 0, len: 0, used_high: 0, chunks };
        let region = Self::new(device, volume, slot, true);
        region.sync()?;
        Ok(region)
    }

    /// The store that the newer of the two slots describes.
    pub(super) fn open(
        device: Arc<dyn BlockDevice>,
        volume: VolumeId,
        lun_bytes: u64,
    ) -> Result<Self, IoError> {
        let mut newest: Option<MetaSlot> = None;
        let mut damage = Vec::new();
        for offset in META_SLOT_OFFSETS {
            let mut bytes = vec![0; META_SLOT_BYTES];
            device.read_at(offset, &mut bytes)?;
            match MetaSlot::decode(&bytes, offset, volume, lun_bytes) {
                Ok(slot) if newest.as_ref().is_none_or(|n| n.sequence < slot.sequence) => newest = Some(slot),
                Ok(_) => {}
                Err(damaged) => damage.push(damaged.to_string()),
            }
        }
        let slot = newest.ok_or_else(|| {
            IoError::Corrupt(format!("no whole metadata slot ({}); run volume check", damage.join("; ")))
        })?;
        Ok(Self::new(device, volume, slot, false))
    }

    fn new(device: Arc<dyn BlockDevice>, volume: VolumeId, slot: MetaSlot, slot_dirty: bool) -> Self {
        let flight =
            Flight { ranges: Mutex::new(BTreeMap::new()), landed: Condvar::new(), failed: OnceLock::new() };
        Self {
            device,
            volume,
            state: Mutex::new(State { slot, slot_dirty, zeroes_unflushed: false }),
            flight: Arc::new(flight),
            revoked: AtomicBool::new(false),
        }
    }

    /// Ends all writing, for good: this coordinator's term is over.
    pub(super) fn revoke(&self) {
        self.revoked.store(true, Ordering::SeqCst);
    }

    /// Returns when nothing is in flight any more. After `revoke`, nothing reaches the LUN from here on.
    pub(super) fn settle(&self) {
        self.flight.drain();
    }

    pub(super) fn volume(&self) -> VolumeId {
        self.volume
    }

    pub(super) fn device(&self) -> &dyn BlockDevice {
        self.device.as_ref()
    }

    pub(super) fn len(&self) -> u64 {
        self.state().slot.len
    }

    pub(super) fn capacity(&self) -> u64 {
        self.state().slot.capacity()
    }

    pub(super) fn chunks(&self) -> Vec<Chunk> {
        self.state().slot.chunks.clone()
    }

    /// Reads whole blocks, after the writes in flight to them have landed.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), IoError> {
        let _here = blockio::here();
        let mut done = 0;
        for (at, len) in self.pieces(offset, into.len() as u64)? {
            self.flight.wait_for(at, len);
            let next = done + usize::try_from(len).expect("a piece of a slice");
            self.device.read_at(at, &mut into[done..next])?;
            done = next;
        }
        Ok(())
    }

    /// Queues a write of whole blocks; it is stable after the next [`Region::sync`].
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
        self.check_writable()?;
        let whole = IoBuf::from(AlignedBuf::copy_of(bytes));
        let mut done = 0;
        for (at, len) in self.pieces(offset, bytes.len() as u64)? {
            let next = done + usize::try_from(len).expect("a piece of a slice");
            self.submit_write(at, whole.slice(done..next));
            done = next;
        }
        Ok(())
    }

    fn submit_write(&self, at: u64, buf: IoBuf) {
        self.flight.depart(at, buf.len() as u64);
        let flight = self.flight.clone();
        let done = Box::new(move |outcome| flight.land(at, outcome));
        self.device.submit(IoRequest { op: IoOp::Write { offset: at, buf, fua: false }, done });
    }

    /// Writes whole blocks to a place on the LUN beside the store, past its cache, and returns when they are stable.
    pub(super) fn force(&self, at: u64, bytes: &[u8]) -> Result<(), IoError> {
        self.check_writable()?;
        let buf = IoBuf::from(AlignedBuf::copy_of(bytes));
        self.flight.depart(at, buf.len() as u64);
        let (tell, told) = mpsc::sync_channel(1);
        let flight = self.flight.clone();
        let done = Box::new(move |outcome: Result<(), IoError>| {
            let _ = tell.send(outcome.as_ref().map_or_else(|error| Err(error.to_string()), |()| Ok(())));
            flight.land(at, outcome);
        });
        // This thread waits for it, and nobody has anything before it is there.
        let here = blockio::here();
        self.device.submit(IoRequest { op: IoOp::Write { offset: at, buf, fua: true }, done });
        drop(here);
        let lost = || Err("the device has dropped the write".to_owned());
        told.recv().unwrap_or_else(|_| lost()).map_err(|cause| IoError::Poisoned { cause })
    }

    /// Makes everything written so far stable, the length and the chunk table too.
    pub(super) fn sync(&self) -> Result<(), IoError> {
        self.flight.drain();
        self.check_writable()?;
        let _here = blockio::here();
        let mut state = self.state();
        if state.slot_dirty && state.zeroes_unflushed {
            // The slot makes the new space reachable, so its zeros must be there first.
            self.noting(self.device.flush())?;
            state.zeroes_unflushed = false;
        }
        if state.slot_dirty {
            state.slot.sequence += 1;
            let [first, second] = slot_order(state.slot.sequence);
            self.write_slot(&state.slot, first)?;
            self.noting(self.device.flush())?;
            // The first copy is stable now, so a crash that tears the second one costs nothing.
            self.write_slot(&state.slot, second)?;
            state.slot_dirty = false;
            return Ok(());
        }
        self.noting(self.device.flush())
    }

    fn write_slot(&self, slot: &MetaSlot, offset: u64) -> Result<(), IoError> {
        let bytes = slot.encode(offset, self.volume);
        self.noting(self.device.write_at(offset, &bytes))
    }

    /// Changes the length; what is new reads zeros. Stable after the next [`Region::sync`].
    pub(super) fn set_len(&self, len: u64) -> Result<(), IoError> {
        self.check_writable()?;
        let (old, used_high) = {
            let state = self.state();
            if len > state.slot.capacity() {
                let what = format!(
                    "the metadata store needs {len} bytes, its chunks have {}",
                    state.slot.capacity()
                );
                return Err(IoError::NoSpace { what });
            }
            (state.slot.len, state.slot.used_high)
        };
        let dirty_end = len.min(used_high);
        if old < dirty_end {
            self.zero(old, dirty_end - old)?;
        }
        let mut state = self.state();
        state.slot.len = len;
        state.slot.used_high = state.slot.used_high.max(len);
        state.slot_dirty = true;
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), IoError> {
        for (at, len) in self.pieces(offset, len)? {
            self.flight.wait_for(at, len);
            self.noting(self.device.run(IoOp::WriteZeroes { offset: at, len, may_unmap: true }))?;
        }
        self.state().zeroes_unflushed = true;
        Ok(())
    }

    /// Adds chunks that belong to the store already (the store's own table says so), zeroed here, and makes that stable.
    pub(super) fn add_chunks(&self, chunks: &[Chunk]) -> Result<(), IoError> {
        self.check_writable()?;
        for chunk in chunks {
            let op = IoOp::WriteZeroes { offset: chunk.offset, len: chunk.bytes, may_unmap: true };
            self.noting(self.device.run(op))?;
        }
        {
            let mut state = self.state();
            assert!(
                state.slot.chunks.len() + chunks.len() <= CHUNKS_MAX,
                "the caller asked chunk_slots_free"
            );
            state.slot.chunks.extend_from_slice(chunks);
            state.slot_dirty = true;
            state.zeroes_unflushed = true;
        }
        self.sync()
    }

    pub(super) fn chunk_slots_free(&self) -> usize {
        CHUNKS_MAX - self.state().slot.chunks.len()
    }

    fn check_writable(&self) -> Result<(), IoError> {
        if self.revoked.load(Ordering::SeqCst) {
            return Err(IoError::NotPermitted { reason: "this coordinator's term has ended".into() });
        }
        match self.flight.failed.get() {
            Some(cause) => Err(IoError::Poisoned { cause: cause.clone() }),
            None => Ok(()),
        }
    }

    fn noting(&self, outcome: Result<(), IoError>) -> Result<(), IoError> {
        if let Err(error) = &outcome {
            let _ = self.flight.failed.set(error.to_string());
        }
        outcome
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }

    /// The places on the LUN of a range of the linear space.
    fn pieces(&self, offset: u64, len: u64) -> Result<Vec<(u64, u64)>, IoError> {
        let state = self.state();
        let end = offset.checked_add(len).filter(|end| *end <= state.slot.capacity());
        let Some(end) = end else {
            return Err(IoError::OutOfRange {
                op: "metadata access",
                offset,
                len,
                size_bytes: state.slot.capacity(),
                block_bytes: 4096,
            });
        };
        let (mut pieces, mut chunk_start) = (Vec::new(), 0);
        for chunk in &state.slot.chunks {
            let chunk_end = chunk_start + chunk.bytes;
            let (from, to) = (offset.max(chunk_start), end.min(chunk_end));
            if from < to {
                pieces.push((chunk.offset + (from - chunk_start), to - from));
            }
            chunk_start = chunk_end;
        }
        Ok(pieces)
    }
}

impl Flight {
    fn ranges(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.ranges.lock().expect("no panic while it is held")
    }

    fn depart(&self, at: u64, len: u64) {
        let busy =
            |ranges: &mut BTreeMap<u64, u64>| ranges.len() >= IN_FLIGHT_MAX || overlaps(ranges, at, len);
        let mut ranges = self.landed.wait_while(self.ranges(), busy).expect("no panic while it is held");
        ranges.insert(at, len);
    }

    fn land(&self, at: u64, outcome: Result<(), IoError>) {
        if let Err(error) = outcome {
            let _ = self.failed.set(error.to_string());
        }
        self.ranges().remove(&at);
        self.landed.notify_all();
    }

    fn wait_for(&self, at: u64, len: u64) {
        let busy = |ranges: &mut BTreeMap<u64, u64>| overlaps(ranges, at, len);
        drop(self.landed.wait_while(self.ranges(), busy).expect("no panic while it is held"));
    }

    fn drain(&self) {
        let busy = |ranges: &mut BTreeMap<u64, u64>| !ranges.is_empty();
        drop(self.landed.wait_while(self.ranges(), busy).expect("no panic while it is held"));
    }
}

/// Which copy is written first: in turn, so that the other one is always whole.
fn slot_order(sequence: u64) -> [u64; 2] {
    let [a, b] = META_SLOT_OFFSETS;
    if sequence.is_multiple_of(2) { [a, b] } else { [b, a] }
}

/// Ranges in flight never overlap each other, so only the nearest one that starts before the end matters.
fn overlaps(ranges: &BTreeMap<u64, u64>, at: u64, len: u64) -> bool {
    ranges.range(..at + len).next_back().is_some_and(|(start, bytes)| start + bytes > at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockio::{FaultDevice, MemoryDevice, OpKind};
    use uuid::Uuid;

    const MIB: u64 = 1 << 20;

    fn volume() -> VolumeId {
        VolumeId(Uuid::from_u128(3))
    }

    fn chunks() -> Vec<Chunk> {
        // Not in the order of the LUN, and not next to each other.
        vec![Chunk { offset: 40 * MIB, bytes: MIB }, Chunk { offset: 21 * MIB, bytes: MIB }]
    }

    fn region(device: Arc<dyn BlockDevice>) -> Region {
        let region = Region::create(device, volume(), Vec::new()).expect("good");
        region.add_chunks(&chunks()).expect("good");
        region
    }

    fn block(region: &Region, offset: u64) -> u8 {
        let mut bytes = [0; 4096];
        region.read(offset, &mut bytes).expect("good");
        assert!(bytes.iter().all(|b| *b == bytes[0]));
        bytes[0]
    }

    #[test]
    fn writes_find_their_chunks_and_survive_reopening() {
        let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(64 * MIB));
        let store = region(device.clone());
        store.set_len(2 * MIB).expect("there is room");
        store.write(MIB - 4096, &[7; 8192]).expect("good");
        store.sync().expect("good");
        let again = Region::open(device.clone(), volume(), 64 * MIB).expect("good");
        assert_eq!((again.len(), again.capacity()), (2 * MIB, 2 * MIB));
        assert_eq!([MIB - 4096, MIB].map(|at| block(&again, at)), [7, 7]);
        let mut on_lun = [0; 4096];
        device.read_at(21 * MIB, &mut on_lun).expect("good");
        assert_eq!(on_lun, [7; 4096]);
    }

    #[test]
    fn space_that_was_used_before_grows_back_as_zeros() {
        let store = region(Arc::new(MemoryDevice::new(64 * MIB)));
        store.set_len(MIB).expect("there is room");
        store.write(MIB - 4096, &[7; 4096]).expect("good");
        store.set_len(4096).expect("smaller is fine");
        store.set_len(2 * MIB).expect("there is room");
        assert_eq!([MIB - 4096, MIB].map(|at| block(&store, at)), [0, 0]);
        assert!(matches!(store.set_len(2 * MIB + 4096), Err(IoError::NoSpace { .. })));
        assert!(store.read(2 * MIB, &mut [0; 4096]).is_err());
    }

    #[test]
    fn chunks_are_zeroed_before_they_are_used() {
        let device = Arc::new(MemoryDevice::new(64 * MIB));
        device.write_at(40 * MIB, &[0xee; 8192]).expect("good");
        let store = region(device);
        store.set_len(8192).expect("there is room");
        assert_eq!(block(&store, 4096), 0);
    }

    #[test]
    fn a_read_sees_the_write_that_is_still_in_flight() {
        let device = Arc::new(FaultDevice::new(MemoryDevice::new(64 * MIB)));
        let store = Arc::new(region(device.clone()));
        store.set_len(MIB).expect("there is room");
        device.hold(Some(OpKind::Write));
        store.write(0, &[1; 4096]).expect("queued");
        device.wait_held(1);
        let second = {
            let store = store.clone();
            std::thread::spawn(move || store.write(0, &[2; 4096]))
        };
        // The second write to the same place waits for the first one, and the read for both.
        device.release();
        second.join().expect("no panic").expect("queued");
        assert_eq!(block(&store, 0), 2);
    }

    // Invariant D5: the next coordinator may open the store as soon as this one says that it has ended.
    #[test]
    fn nothing_lands_after_a_revoked_region_has_settled() {
        let device = Arc::new(FaultDevice::new(MemoryDevice::new(64 * MIB)));
        let store = Arc::new(region(device.clone()));
        store.set_len(MIB).expect("there is room");
        device.hold(Some(OpKind::Write));
        store.write(0, &[1; 4096]).expect("queued");
        device.wait_held(1);
        let settled = {
            let store = store.clone();
            std::thread::spawn(move || {
                store.revoke();
                store.settle();
                store.flight.ranges().len()
            })
        };
        device.release();
        assert_eq!(settled.join().expect("no panic"), 0);
        assert_eq!(block(&store, 0), 1);
    }

    // Invariants D5, D6.
    #[test]
    fn after_the_end_of_the_term_or_an_error_nothing_is_written() {
        let device = Arc::new(FaultDevice::new(MemoryDevice::new(64 * MIB)));
        let store = region(device.clone());
        store.set_len(MIB).expect("there is room");
        store.revoke();
        assert!(matches!(store.write(0, &[1; 4096]), Err(IoError::NotPermitted { .. })));
        assert!(store.sync().is_err() && store.set_len(0).is_err());
        let store = Region::open(device.clone(), volume(), 64 * MIB).expect("good");
        device.fail(OpKind::Write, 1, 5);
        store.write(0, &[1; 4096]).expect("queued");
        assert!(store.sync().is_err(), "the failed write shows at the next sync");
        device.heal();
        assert!(matches!(store.write(0, &[1; 4096]), Err(IoError::Poisoned { .. })));
        assert!(matches!(store.sync(), Err(IoError::Poisoned { .. })));
    }
}
