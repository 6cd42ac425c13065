//! A virtio disk with its driver's side, both in memory: the path from a queue to a device and back, without a machine.
//!
//! ```text
//!   next() -> chain in the available ring -> wake --> disk's thread: pop, parse, submit --> device
//!     ^                                                                                       |
//!     '---- used ring <----------------- interrupt <------------------- completion <----------'
//! ```
//! The driver acts inside of the interrupt, as a processor would that takes no time, or on a thread that the interrupt wakes. How often
//! either side is told is counted: on a machine each interrupt is one for the guest, and each notification an exit from it.

use std::sync::atomic::{AtomicU64, Ordering, fence};
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
/// Behind the rings: where the driver wants to hear of completions, and the disk of requests.
const USED_EVENT: u64 = AVAILABLE + 4 + QUEUE_SIZE_MAX as u64 * 2;
const AVAILABLE_EVENT: u64 = USED + 4 + QUEUE_SIZE_MAX as u64 * 8;
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

/// How a driver uses its queue.
#[derive(Clone, Copy, Debug)]
pub struct DriverSetup {
    /// Requests at a time.
    pub depth: u16,
    /// Bytes of each.
    pub bytes: u32,
    /// When either side is told.
    pub telling: Telling,
    /// Whether the driver acts inside of the interrupt; else on a thread of its own.
    pub at_once: bool,
}

/// When the driver and its disk tell each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Telling {
    /// Of everything.
    Always,
    /// Unless the other one says by a flag that it does not want to hear.
    ByFlags,
    /// When the place is reached from which on the other one wants to hear: the ring event index.
    ByIndex,
}

/// What a drive came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverCounts {
    /// Requests that came back.
    pub requests: u64,
    /// How often the driver was told.
    pub interrupts: u64,
    /// How often the disk was told.
    pub notifications: u64,
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

/// Drives a disk on `backend`: with as many requests as the setup says at first, and the one that `next` gives for each that comes
/// back, until it gives none. Returns when all are back.
///
/// # Errors
/// When the disk cannot be driven like that, or some request has failed.
pub fn drive_disk(
    backend: Arc<dyn BlockDevice>,
    setup: DriverSetup,
    next: impl FnMut() -> Option<DriverRequest> + Send + 'static,
) -> Result<DriverCounts, DriveError> {
    let DriverSetup { depth, bytes, telling, at_once } = setup;
    if depth == 0 || depth > QUEUE_SIZE_MAX / PARTS || !u64::from(bytes).is_multiple_of(SECTOR_BYTES) {
        return Err(DriveError::Size { depth, bytes });
    }
    let stride = u64::from(bytes).next_multiple_of(PAGE_BYTES);
    let ram = GuestRam::new((DATA + u64::from(depth) * stride).max(RAM_MIN))?;
    let processor = if at_once { None } else { Some(Arc::new(Wakeup::new()?)) };
    let driver = Arc::new(Driver::new(ram.clone(), setup, stride, (Box::new(next), processor.clone())));
    let shape = shape_of(&backend.geometry(), false);
    let disk = Disk::new(0, String::new(), shape, ram.clone(), Arc::clone(&driver) as Arc<dyn Interrupt>)?;
    disk.attach(backend)?;
    // The driver takes all of them, and flushes among them: else each write would be a forced one.
    disk.activate(disk.features());
    disk.queue.restore(&queue(), &ram)?;
    disk.queue.use_event_index(telling == Telling::ByIndex);
    disk.release();
    let disk = Arc::new(disk);
    let wakeup = disk.wakeup();
    drop(driver.wakeup.set(Arc::clone(&wakeup)));
    let _worker = Worker::spawn("driven-disk".into(), wakeup, move || disk.take_requests())?;
    let acts = Arc::clone(&driver);
    let work = move || {
        acts.act();
        None
    };
    let _processor = processor.map(|told| Worker::spawn("driver".into(), told, work)).transpose()?;
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
    setup: DriverSetup,
    /// From one request's data to the next.
    stride: u64,
    /// The disk's thread, once there is one.
    wakeup: OnceLock<Arc<Wakeup>>,
    /// The driver's thread, if it has one.
    processor: Option<Arc<Wakeup>>,
    interrupts: AtomicU64,
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
    counts: DriverCounts,
    failed: u64,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl Driver {
    fn new(
        ram: GuestRam,
        setup: DriverSetup,
        stride: u64,
        (next, processor): (Next, Option<Arc<Wakeup>>),
    ) -> Self {
        let (writes, counts) = (Vec::new(), DriverCounts::default());
        let state = State { next, writes, posted: 0, seen: 0, in_flight: 0, counts, failed: 0 };
        let (wakeup, all_back) = (OnceLock::new(), Condvar::new());
        let (state, interrupts) = (Mutex::new(state), AtomicU64::new(0));
        Self { ram, setup, stride, wakeup, processor, interrupts, state, all_back }
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
            self.describe(head + 1, DATA + at * self.stride, self.setup.bytes, NEXT);
            self.describe(head + 2, STATUSES + at, 1, DEVICE_WRITES);
            state.writes.push(true);
            if let Some(request) = (state.next)() {
                self.post(&mut state, slot, request);
                state.in_flight += 1;
            }
        }
        let tells = self.is_to_tell(&mut state, 0);
        drop(state);
        if tells {
            self.wake();
        }
    }

    /// Waits until nothing is in flight.
    fn wait(&self) -> Result<DriverCounts, DriveError> {
        let waited = self.all_back.wait_while(self.lock(), |state| state.in_flight > 0);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        match state.failed {
            0 => Ok(DriverCounts { interrupts: self.interrupts.load(Ordering::SeqCst), ..state.counts }),
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
            self.describe(head + 1, DATA + at * self.stride, self.setup.bytes, flags);
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

    /// Takes what has come back, and posts what comes next; true when the disk is to be told.
    fn look(&self, state: &mut State) -> bool {
        let before = state.posted;
        self.want_interrupts(state, false);
        loop {
            while self.used_index() != state.seen {
                self.take_back(state);
            }
            self.want_interrupts(state, true);
            // What has come back before the disk could see that is not told of.
            fence(Ordering::SeqCst);
            if self.used_index() == state.seen {
                return self.is_to_tell(state, before);
            }
        }
    }

    fn want_interrupts(&self, state: &State, wanted: bool) {
        match self.setup.telling {
            Telling::ByFlags => self.put(AVAILABLE, &u16::from(!wanted).to_le_bytes()),
            Telling::ByIndex if wanted => self.put(USED_EVENT, &state.seen.to_le_bytes()),
            // Behind the place where it wanted to hear a driver hears of nothing, until it names the next one.
            Telling::ByIndex | Telling::Always => {}
        }
    }

    fn used_index(&self) -> u16 {
        u16::from_le_bytes(self.get(USED + 2))
    }

    fn take_back(&self, state: &mut State) {
        fence(Ordering::SeqCst);
        let entry: [u8; 8] = self.get(USED + 4 + u64::from(state.seen % QUEUE_SIZE_MAX) * 8);
        let [low, high, ..] = entry;
        let slot = u16::from_le_bytes([low, high]) / PARTS;
        state.seen = state.seen.wrapping_add(1);
        state.counts.requests += 1;
        state.failed += u64::from(self.get::<1>(STATUSES + u64::from(slot)) != [0]);
        match (state.next)() {
            Some(request) => self.post(state, slot, request),
            None => state.in_flight -= 1,
        }
    }

    /// Whether the disk wants to hear of what was posted since.
    fn is_to_tell(&self, state: &mut State, before: u16) -> bool {
        // The index before the look at where the disk wants to hear.
        fence(Ordering::SeqCst);
        let posted = state.posted.wrapping_sub(before);
        let place = |at| u16::from_le_bytes(self.get(at));
        let wanted = match self.setup.telling {
            Telling::Always => true,
            Telling::ByFlags => place(USED) == 0,
            Telling::ByIndex => state.posted.wrapping_sub(place(AVAILABLE_EVENT)).wrapping_sub(1) < posted,
        };
        let tells = posted > 0 && wanted;
        state.counts.notifications += u64::from(tells);
        tells
    }
}

impl Interrupt for Driver {
    fn trigger(&self) {
        self.interrupts.fetch_add(1, Ordering::SeqCst);
        match &self.processor {
            Some(processor) => processor.wake(),
            None => self.act(),
        }
    }
}

impl Driver {
    fn act(&self) {
        let mut state = self.lock();
        let tells = self.look(&mut state);
        let over = state.in_flight == 0;
        drop(state);
        if tells {
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

    use super::Telling::{ByFlags, ByIndex};
    use super::*;

    fn setup(depth: u16, bytes: u32, telling: Telling) -> DriverSetup {
        DriverSetup { depth, bytes, telling, at_once: true }
    }

    // A wake-up that is lost on either side would leave requests where they are, for ever.
    #[test]
    fn a_driver_that_is_told_only_when_it_asks_gets_everything_back_on_many_rounds_of_the_rings() {
        let depths = [1, 2, 7, 32].into_iter().flat_map(|depth| [(depth, true), (depth, false)]);
        for ((depth, at_once), telling) in depths.flat_map(|it| [(it, ByFlags), (it, ByIndex)]) {
            let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(1 << 20));
            let mut places = 0..20_000_u64;
            let next =
                move || places.next().map(|place| DriverRequest { write: false, offset: place % 256 * 4096 });
            let counts = drive_disk(device, DriverSetup { at_once, ..setup(depth, 4096, telling) }, next);
            let counts = counts.expect("driven");
            let whose = format!("{telling:?} at depth {depth}, at once: {at_once}");
            assert_eq!(counts.requests, 20_000, "{whose}");
            assert!(counts.interrupts <= 20_000, "{whose}: {counts:?}");
        }
    }

    #[test]
    fn a_driver_without_a_processor_reads_and_writes_what_it_is_told() {
        let device = Arc::new(MemoryDevice::new(1 << 20));
        device.write_at(0, &[7; 1 << 20]).expect("a write");
        let mut places = 0..64_u64;
        let next =
            move || places.next().map(|place| DriverRequest { write: place % 2 == 0, offset: place * 4096 });
        let backend = Arc::clone(&device) as Arc<dyn BlockDevice>;
        let counts = drive_disk(backend, setup(8, 4096, Telling::Always), next).expect("driven");
        assert_eq!(
            counts,
            DriverCounts { requests: 64, interrupts: 64, notifications: counts.notifications }
        );
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
        let outcome = drive_disk(Arc::clone(&device), setup(2, 4096, ByIndex), beyond);
        assert!(matches!(outcome, Err(DriveError::Failed(3))), "{outcome:?}");
        for (depth, bytes) in [(0, 4096), (100, 4096), (1, 1000)] {
            let refused = drive_disk(Arc::clone(&device), setup(depth, bytes, Telling::Always), || None);
            assert!(matches!(refused, Err(DriveError::Size { .. })), "{refused:?}");
        }
    }
}
