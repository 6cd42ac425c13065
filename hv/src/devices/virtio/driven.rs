//! A virtio disk with its driver's side, both in memory: the path from a queue to a device and back, without a machine.
//!
//! ```text
//!   next() -> chain in the available ring -> wake --> disk's thread: pop, parse, submit --> device
//!     ^                                                                                       |
//!     '---- used ring <----------------- interrupt <------------------- completion <----------'
//! ```
//! The driver acts inside of the interrupt, as a processor would that takes no time.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use blockio::BlockDevice;

use super::VirtioDevice;
use super::block::{Disk, shape_of};
use super::queue::QUEUE_SIZE_MAX;
use super::request::SECTOR_BYTES;
use super::worker::{Wakeup, Worker};
use crate::devices::Interrupt;
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES};
use crate::state::{self, StateError};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Headers of the requests, and behind them one status byte for each.
const HEADERS: u64 = 0x4000;
const HEADER_BYTES: u64 = 16;
const STATUSES: u64 = 0x5000;
const DATA: u64 = 1 << 16;
/// Header, data, status.
const PARTS: u16 = 3;
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
/// No VM has less.
const RAM_MIN: u64 = 4 << 20;
/// A status byte that no device writes.
const UNTOUCHED: u8 = 0xee;

/// What a driver asks for.
#[derive(Clone, Copy, Debug)]
pub struct DriverRequest {
    /// Whether it writes.
    pub write: bool,
    /// Where on the disk, in bytes: a multiple of 512.
    pub offset: u64,
}

/// Why a disk could not be driven.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// So many requests at once, or of that length, do not fit the queue.
    #[error("{depth} requests of {bytes} bytes do not fit a queue of {QUEUE_SIZE_MAX} descriptors")]
    Size {
        /// Requests.
        depth: u16,
        /// Bytes of each.
        bytes: u32,
    },
    /// There is no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The queue was refused.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is no thread for it.
    #[error("a device's thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
    /// Requests came back with another status than success.
    #[error("{0} requests failed")]
    Failed(u64),
}

/// Drives a disk on `backend` with requests of `bytes`: `depth` at first, and the one that `next` gives for each that comes back,
/// until it gives none. Returns when all are back, with their number.
///
/// # Errors
/// When the disk cannot be driven like that, or some request has failed.
pub fn drive_disk(
    backend: Arc<dyn BlockDevice>,
    (depth, bytes): (u16, u32),
    next: impl FnMut() -> Option<DriverRequest> + Send + 'static,
) -> Result<u64, DriveError> {
    if depth == 0 || depth > QUEUE_SIZE_MAX / PARTS || !u64::from(bytes).is_multiple_of(SECTOR_BYTES) {
        return Err(DriveError::Size { depth, bytes });
    }
    let stride = u64::from(bytes).next_multiple_of(PAGE_BYTES);
    let ram = GuestRam::new((DATA + u64::from(depth) * stride).max(RAM_MIN))?;
    let driver = Arc::new(Driver::new(ram.clone(), (bytes, stride), Box::new(next)));
    let shape = shape_of(&backend.geometry(), false);
    let disk = Disk::new(0, String::new(), shape, ram.clone(), Arc::clone(&driver) as Arc<dyn Interrupt>)?;
    disk.attach(backend)?;
    // The driver takes all of them, and flushes among them: else each write would be a forced one.
    disk.activate(disk.features());
    disk.queue.restore(&queue(), &ram)?;
    disk.release();
    let disk = Arc::new(disk);
    let wakeup = disk.wakeup();
    drop(driver.wakeup.set(Arc::clone(&wakeup)));
    let _worker = Worker::spawn("driven-disk".into(), wakeup, move || disk.take_requests())?;
    driver.begin(depth);
    driver.wait()
}

/// The queue as a driver has set it up.
fn queue() -> state::Queue {
    state::Queue {
        size: QUEUE_SIZE_MAX.into(),
        ready: true,
        descriptors: DESCRIPTORS,
        avail: AVAILABLE,
        used: USED,
        next_avail: 0,
        next_used: 0,
    }
}

type Next = Box<dyn FnMut() -> Option<DriverRequest> + Send>;

/// The driver's side.
struct Driver {
    ram: GuestRam,
    bytes: u32,
    /// From one request's data to the next.
    stride: u64,
    /// The disk's thread, once there is one.
    wakeup: OnceLock<Arc<Wakeup>>,
    /// Protects the driver's places in the rings. Below the queue's lock.
    state: Mutex<State>,
    all_back: Condvar,
}

struct State {
    next: Next,
    /// By slot: whether its chain is one of a write.
    writes: Vec<bool>,
    posted: u16,
    seen: u16,
    in_flight: u16,
    back: u64,
    failed: u64,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl Driver {
    fn new(ram: GuestRam, (bytes, stride): (u32, u64), next: Next) -> Self {
        let state = State { next, writes: Vec::new(), posted: 0, seen: 0, in_flight: 0, back: 0, failed: 0 };
        let (wakeup, all_back) = (OnceLock::new(), Condvar::new());
        Self { ram, bytes, stride, wakeup, state: Mutex::new(state), all_back }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Some(wakeup) = self.wakeup.get() {
            wakeup.wake();
        }
    }

    /// Posts the first requests.
    fn begin(&self, depth: u16) {
        let mut state = self.lock();
        for slot in 0..depth {
            let (head, at) = (slot * PARTS, u64::from(slot));
            self.describe(head, HEADERS + at * HEADER_BYTES, 16, NEXT);
            self.describe(head + 1, DATA + at * self.stride, self.bytes, NEXT);
            self.describe(head + 2, STATUSES + at, 1, DEVICE_WRITES);
            state.writes.push(true);
            if let Some(request) = (state.next)() {
                self.post(&mut state, slot, request);
                state.in_flight += 1;
            }
        }
        drop(state);
        self.wake();
    }

    /// Waits until nothing is in flight; gives how many came back.
    fn wait(&self) -> Result<u64, DriveError> {
        let waited = self.all_back.wait_while(self.lock(), |state| state.in_flight > 0);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        match state.failed {
            0 => Ok(state.back),
            failed => Err(DriveError::Failed(failed)),
        }
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.write(address, bytes).expect("the driver's own places lie in its memory");
    }

    fn get<const BYTES: usize>(&self, address: u64) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        self.ram.read(address, &mut bytes).expect("the driver's own places lie in its memory");
        bytes
    }

    /// Makes the chain of a slot available.
    fn post(&self, state: &mut State, slot: u16, request: DriverRequest) {
        let (head, at) = (slot * PARTS, u64::from(slot));
        if std::mem::replace(&mut state.writes[usize::from(slot)], request.write) != request.write {
            let flags = if request.write { NEXT } else { NEXT | DEVICE_WRITES };
            self.describe(head + 1, DATA + at * self.stride, self.bytes, flags);
        }
        let [kind, sector] = [u64::from(request.write), request.offset / SECTOR_BYTES].map(u64::to_le_bytes);
        self.put(HEADERS + at * HEADER_BYTES, [kind, sector].as_flattened());
        self.put(STATUSES + at, &[UNTOUCHED]);
        self.put(AVAILABLE + 4 + u64::from(state.posted % QUEUE_SIZE_MAX) * 2, &head.to_le_bytes());
        state.posted = state.posted.wrapping_add(1);
        // The chain before the index that shows it.
        fence(Ordering::SeqCst);
        self.put(AVAILABLE + 2, &state.posted.to_le_bytes());
    }

    fn describe(&self, number: u16, address: u64, len: u32, flags: u16) {
        let mut fields = address.to_le_bytes().to_vec();
        fields.extend(len.to_le_bytes());
        fields.extend(flags.to_le_bytes());
        fields.extend((number + 1).to_le_bytes());
        self.put(DESCRIPTORS + u64::from(number) * 16, &fields);
    }

    /// Takes what has come back, and posts what comes next.
    fn look(&self, state: &mut State) -> bool {
        let mut posts = false;
        while u16::from_le_bytes(self.get(USED + 2)) != state.seen {
            fence(Ordering::SeqCst);
            let entry: [u8; 8] = self.get(USED + 4 + u64::from(state.seen % QUEUE_SIZE_MAX) * 8);
            let [low, high, ..] = entry;
            let slot = u16::from_le_bytes([low, high]) / PARTS;
            state.seen = state.seen.wrapping_add(1);
            state.back += 1;
            state.failed += u64::from(self.get::<1>(STATUSES + u64::from(slot)) != [0]);
            match (state.next)() {
                Some(request) => {
                    self.post(state, slot, request);
                    posts = true;
                }
                None => state.in_flight -= 1,
            }
        }
        posts
    }
}

impl Interrupt for Driver {
    fn trigger(&self) {
        let mut state = self.lock();
        let posts = self.look(&mut state);
        let over = state.in_flight == 0;
        drop(state);
        if posts {
            self.wake();
        }
        if over {
            self.all_back.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use blockio::MemoryDevice;

    use super::*;

    #[test]
    fn a_driver_without_a_processor_reads_and_writes_what_it_is_told() {
        let device = Arc::new(MemoryDevice::new(1 << 20));
        device.write_at(0, &[7; 1 << 20]).expect("a write");
        let mut places = 0..64_u64;
        let next =
            move || places.next().map(|place| DriverRequest { write: place % 2 == 0, offset: place * 4096 });
        let back = drive_disk(Arc::clone(&device) as Arc<dyn BlockDevice>, (8, 4096), next).expect("driven");
        assert_eq!(back, 64);
        for place in 0..64 {
            let mut block = [1; 4096];
            device.read_at(place * 4096, &mut block).expect("a read");
            // What was read last into the slot's memory, or nothing yet, is what is written from it.
            assert!(place % 2 == 0 || block == [7; 4096], "{place} was read only");
        }
    }

    #[test]
    fn requests_that_fail_are_counted_and_impossible_ones_refused() {
        let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(1 << 20));
        let mut times = 0..3;
        let beyond = move || times.next().map(|_| DriverRequest { write: false, offset: 1 << 20 });
        let outcome = drive_disk(Arc::clone(&device), (2, 4096), beyond);
        assert!(matches!(outcome, Err(DriveError::Failed(3))), "{outcome:?}");
        for (depth, bytes) in [(0, 4096), (100, 4096), (1, 1000)] {
            let refused = drive_disk(Arc::clone(&device), (depth, bytes), || None);
            assert!(matches!(refused, Err(DriveError::Size { .. })), "{refused:?}");
        }
    }
}
