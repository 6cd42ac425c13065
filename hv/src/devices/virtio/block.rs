//! virtio-blk: a disk of the guest on any [`BlockDevice`], without a copy.
//!
//! ```text
//!   guest: notify --ioeventfd--> worker thread: pop, parse, submit --> BlockDevice
//!   guest: interrupt <--irqfd--- completion (on the device's thread): status, used ring, dirty bitmap
//! ```
//! A slot may be empty: the guest then sees a disk of no capacity. A medium that comes or goes changes the capacity, which
//! the guest learns by a configuration interrupt; features and block size stay what its driver has found at boot.
//!
//! A request that finds no space is not failed: it stays in flight, unanswered, and is done again from its beginning, in the
//! guest's order, when somebody says that there may be room ([`Disk::retry`]). What it has written so far was not acknowledged.
//!
//! **Invariants:** the backend is only used by requests that are counted as in flight, so it can be taken away after a
//! drain; a read marks its pages dirty after the data is there (H4).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use blockio::{BlockDevice, Geometry};
use rustix::time::{ClockId, clock_gettime};

use super::limiter::{DiskLimits, Limiter};
use super::queue::{DrainTimeout, Popped, RequestQueue};
use super::request::{self, Op, RANGES_MAX, Request, SECTOR_BYTES, Shape, Status};
use super::worker::Wakeup;
use super::{DeviceInterrupt, FEATURES_OF_ALL, VirtioDevice};
use crate::devices::Interrupt;
use crate::devices::virtio::flight::{Flight, Posted};
use crate::memory::GuestRam;
use crate::state::{self, StateError};

const KIND_BLOCK: u32 = 2;
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
/// Data parts of one request: a queue's worth, without header and status.
const SEGMENTS_MAX: u32 = 126;
/// Sectors of one discard or write-zeroes range.
const RANGE_SECTORS_MAX: u32 = 1 << 20;
const CONFIG_BYTES: usize = 60;

/// What a disk has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Requests that read.
    pub reads: u64,
    /// Requests that wrote.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// The last failure.
    pub last_error: Option<String>,
}

/// What an empty slot looks like: a driver may later be given any medium with sectors of 512 bytes.
const NO_MEDIUM: Shape = Shape { size_bytes: 0, block_bytes: 512, read_only: false, can_discard: true };

/// Why a medium cannot come or go.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// There is one already.
    #[error("slot {0} holds a disk already")]
    Occupied(u32),
    /// There is none.
    #[error("slot {0} holds no disk")]
    Empty(u32),
    /// The driver has found another block size, and keeps to it.
    #[error(
        "a disk with blocks of {found} bytes cannot come into slot {slot} while the VM runs: its driver uses {expected}"
    )]
    BlockSize {
        /// Which.
        slot: u32,
        /// Of the medium.
        found: u32,
        /// Of the driver.
        expected: u32,
    },
    /// Requests in flight did not end.
    #[error(transparent)]
    Drain(#[from] DrainTimeout),
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) flushes: AtomicU64,
    errors: AtomicU64,
    /// Protects the text only.
    last_error: Mutex<Option<String>>,
}

/// Requests that found no space.
#[derive(Debug, Default)]
struct Stalled {
    /// By the order in which the guest made them.
    requests: BTreeMap<u64, (Posted, Op)>,
    why: String,
}

/// What a driver finds when it looks at its device, and then keeps to.
#[derive(Clone, Copy, Debug)]
struct Offer {
    block_bytes: u32,
    read_only: bool,
    can_discard: bool,
}

/// One disk of the guest.
pub(crate) struct Disk {
    slot: u32,
    /// Protects the text; it is the medium's.
    serial: RwLock<String>,
    /// Changed only by a restore, before the driver goes on.
    offer: RwLock<Offer>,
    /// The medium as requests are checked against it; no bytes when there is none.
    shape: RwLock<Shape>,
    /// Protects the handle; `None` while the disk belongs to another process or is being closed, or the slot is empty.
    backend: RwLock<Option<Arc<dyn BlockDevice>>>,
    /// Whether the slot has a medium, here or in another process.
    occupied: AtomicBool,
    features: AtomicU64,
    /// Whether there are limits: without any no clock is read.
    limited: AtomicBool,
    /// Protects what is owed. A leaf.
    limiter: Mutex<Limiter>,
    wakeup: Arc<Wakeup>,
    /// Number of the next request.
    next_number: AtomicU64,
    /// A leaf, but for the queue's lock.
    stalled: Mutex<Stalled>,
    pub(super) queue: RequestQueue,
    pub(super) interrupt: DeviceInterrupt,
    pub(super) ram: GuestRam,
    pub(super) counters: Counters,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("slot", &self.slot).finish_non_exhaustive()
    }
}

impl Disk {
    /// A disk without a backend, held: nothing moves before [`Disk::attach`] and [`Disk::release`].
    pub(crate) fn new(
        slot: u32,
        serial: String,
        shape: Shape,
        ram: GuestRam,
        line: Arc<dyn Interrupt>,
    ) -> std::io::Result<Self> {
        let Shape { block_bytes, read_only, can_discard, .. } = shape;
        Ok(Self {
            slot,
            serial: RwLock::new(serial),
            offer: RwLock::new(Offer { block_bytes, read_only, can_discard }),
            shape: RwLock::new(shape),
            backend: RwLock::default(),
            occupied: AtomicBool::new(true),
            features: AtomicU64::new(0),
            limited: AtomicBool::new(false),
            limiter: Mutex::default(),
            wakeup: Arc::new(Wakeup::new()?),
            next_number: AtomicU64::new(0),
            stalled: Mutex::default(),
            queue: RequestQueue::new(),
            interrupt: DeviceInterrupt::new(line),
            ram,
            counters: Counters::default(),
        })
    }

    /// A slot without a medium.
    pub(crate) fn empty(slot: u32, ram: GuestRam, line: Arc<dyn Interrupt>) -> std::io::Result<Self> {
        let disk = Self::new(slot, String::new(), NO_MEDIUM, ram, line)?;
        disk.occupied.store(false, Ordering::SeqCst);
        Ok(disk)
    }

    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }

    pub(crate) fn wakeup(&self) -> Arc<Wakeup> {
        Arc::clone(&self.wakeup)
    }

    /// Hands everything that the driver has posted, and that the limits allow, to the backend. Says when it wants to be
    /// called again without a notification.
    pub(crate) fn take_requests(self: &Arc<Self>) -> Option<Duration> {
        loop {
            if let Some(wait) = self.limit_wait() {
                return Some(wait);
            }
            match self.queue.pop(&self.ram) {
                Popped::Empty => return None,
                Popped::Broken => {
                    tracing::warn!(
                        disk = self.slot,
                        "the driver broke its queue; the disk waits for a reset"
                    );
                    self.interrupt.config_changed();
                    return None;
                }
                Popped::Chain(chain) => match request::parse(&self.ram, &chain, &self.shape()) {
                    Some(request) => {
                        self.charge(&request);
                        self.count(&request.op);
                        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
                        let Request { status_at, op } = request;
                        // This thread has nothing else to do then: to wake the device's would cost more.
                        let _here = self.queue.one_at_a_time().then(blockio::here_if_alone);
                        self.start(Posted { head: chain.head, status_at, number }, op);
                    }
                    None => self.queue.complete(&self.ram, chain.head, 0, &self.interrupt),
                },
            }
        }
    }

    fn start(self: &Arc<Self>, posted: Posted, op: Op) {
        let Some(backend) = self.backend() else {
            return Flight::refuse(self, posted, Status::IoError);
        };
        match op {
            Op::Refuse(status) => Flight::refuse(self, posted, status),
            Op::Identify { parts } => Flight::identify(self, posted, &parts),
            Op::Read { offset, parts } => Flight::read(self, posted, &*backend, offset, parts),
            Op::Write { offset, parts } => {
                // Without the flush feature the driver takes every completed write as stable.
                let fua = self.features.load(Ordering::Relaxed) & FEATURE_FLUSH == 0;
                Flight::write(self, posted, &*backend, offset, parts, fua);
            }
            Op::Flush => Flight::flush(self, posted, &*backend),
            Op::Discard(ranges) => Flight::discard(self, posted, &*backend, ranges),
            Op::WriteZeroes(ranges) => Flight::write_zeroes(self, posted, &*backend, ranges),
        }
    }

    fn count(&self, op: &Op) {
        let counters = &self.counters;
        let counter = match op {
            Op::Read { .. } => &counters.reads,
            Op::Write { .. } | Op::WriteZeroes(_) => &counters.writes,
            Op::Flush => &counters.flushes,
            Op::Identify { .. } | Op::Discard(_) | Op::Refuse(_) => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// A request that found no space waits for it. It stays in flight.
    pub(super) fn stall(&self, posted: Posted, op: Op, why: String) {
        let mut stalled = self.stalled();
        if stalled.requests.is_empty() {
            tracing::warn!(disk = self.slot, why, "a disk request of the guest waits");
        }
        stalled.why = why;
        stalled.requests.insert(posted.number, (posted, op));
        self.queue.stall();
    }

    /// How many requests wait for space, and for which.
    pub(crate) fn stall_reason(&self) -> Option<String> {
        let stalled = self.stalled();
        let count = stalled.requests.len();
        (count > 0).then(|| format!("{count} requests wait: {}", stalled.why))
    }

    /// Does the requests that wait once more, in the guest's order.
    pub(crate) fn retry(self: &Arc<Self>) {
        let requests = {
            let mut stalled = self.stalled();
            let requests = std::mem::take(&mut stalled.requests);
            self.queue.unstall(requests.len());
            requests
        };
        for (posted, op) in requests.into_values() {
            self.start(posted, op);
        }
    }

    fn stalled(&self) -> MutexGuard<'_, Stalled> {
        self.stalled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets or lifts limits, at any time.
    pub(crate) fn set_limits(&self, limits: DiskLimits) {
        self.limiter().set(limits);
        self.limited.store(!limits.is_none(), Ordering::SeqCst);
        // A request that waits under the old limits is looked at again.
        self.wakeup.wake();
    }

    pub(crate) fn limits(&self) -> DiskLimits {
        self.limiter().limits()
    }

    fn limit_wait(&self) -> Option<Duration> {
        if !self.limited.load(Ordering::Relaxed) {
            return None;
        }
        self.limiter().wait(monotonic_now())
    }

    fn charge(&self, request: &Request) {
        if self.limited.load(Ordering::Relaxed) {
            self.limiter().charge(monotonic_now(), request.op.transfer_bytes());
        }
    }

    fn limiter(&self) -> MutexGuard<'_, Limiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the disk its backend, which must have the size that the guest knows.
    pub(crate) fn attach(&self, backend: Arc<dyn BlockDevice>) -> Result<(), StateError> {
        let (known, found) = (self.shape(), backend.geometry());
        let what = |name: &str| format!("{name} of disk {}", self.slot);
        if known.size_bytes == 0 {
            // No guest has seen this disk yet.
            let shape = shape_of(&found, known.read_only);
            let Shape { block_bytes, read_only, can_discard, .. } = shape;
            *self.offer.write().unwrap_or_else(PoisonError::into_inner) =
                Offer { block_bytes, read_only, can_discard };
            self.set_shape(shape);
            self.set_backend(Some(backend));
            return Ok(());
        }
        if found.size_bytes != known.size_bytes {
            return Err(StateError::mismatch(what("the size"), known.size_bytes, found.size_bytes));
        }
        if block_bytes(&found) != known.block_bytes {
            return Err(StateError::mismatch(what("the block size"), known.block_bytes, block_bytes(&found)));
        }
        self.set_backend(Some(backend));
        Ok(())
    }

    /// Takes the backend away. The disk must be drained.
    pub(crate) fn detach(&self) {
        self.set_backend(None);
    }

    /// Puts a medium into an empty slot, while the guest runs.
    pub(crate) fn insert(
        &self,
        backend: Arc<dyn BlockDevice>,
        read_only: bool,
        serial: String,
    ) -> Result<(), SlotError> {
        let offer = self.offer();
        let found = shape_of(&backend.geometry(), read_only || offer.read_only);
        if found.block_bytes != offer.block_bytes {
            return Err(SlotError::BlockSize {
                slot: self.slot,
                found: found.block_bytes,
                expected: offer.block_bytes,
            });
        }
        if self.occupied.swap(true, Ordering::SeqCst) {
            return Err(SlotError::Occupied(self.slot));
        }
        *self.serial.write().unwrap_or_else(PoisonError::into_inner) = serial;
        self.set_backend(Some(backend));
        self.set_shape(found);
        self.interrupt.config_changed();
        Ok(())
    }

    /// Takes the medium out. Requests in flight are waited for; those that the guest makes afterwards fail.
    pub(crate) fn eject(&self) -> Result<(), SlotError> {
        if !self.occupied.load(Ordering::SeqCst) {
            return Err(SlotError::Empty(self.slot));
        }
        let (before, was_held) = (self.shape(), self.queue.is_held());
        self.set_shape(Shape { block_bytes: before.block_bytes, ..NO_MEDIUM });
        let drained = self.queue.hold_and_drain(&self.ram);
        if drained.is_ok() {
            self.set_backend(None);
            self.occupied.store(false, Ordering::SeqCst);
            self.serial.write().unwrap_or_else(PoisonError::into_inner).clear();
            self.interrupt.config_changed();
        } else {
            self.set_shape(before);
        }
        if !was_held {
            self.queue.release();
            self.wakeup.wake();
        }
        Ok(drained?)
    }

    /// The backend may have another size now: the guest learns it.
    pub(crate) fn remeasure(&self) -> Result<u64, SlotError> {
        let size_bytes = self.backend().ok_or(SlotError::Empty(self.slot))?.geometry().size_bytes;
        let shape = self.shape();
        if shape.size_bytes != size_bytes {
            self.set_shape(Shape { size_bytes, ..shape });
            self.interrupt.config_changed();
        }
        Ok(size_bytes)
    }

    /// Whether its content is missing: it has some, but not in this process.
    pub(crate) fn lacks_content(&self) -> bool {
        self.occupied.load(Ordering::SeqCst) && !self.is_attached()
    }

    pub(crate) fn is_attached(&self) -> bool {
        self.backend().is_some()
    }

    pub(crate) fn stats(&self) -> DiskStats {
        let counters = &self.counters;
        DiskStats {
            reads: counters.reads.load(Ordering::Relaxed),
            writes: counters.writes.load(Ordering::Relaxed),
            flushes: counters.flushes.load(Ordering::Relaxed),
            errors: counters.errors.load(Ordering::Relaxed),
            last_error: counters.last_error().clone(),
        }
    }

    /// The parts of the saved state that this device owns; the transport adds its own.
    pub(crate) fn save(&self) -> state::Disk {
        let (shape, offer) = (self.shape(), self.offer());
        state::Disk {
            slot: self.slot,
            serial: self.serial(),
            size_bytes: shape.size_bytes,
            block_bytes: offer.block_bytes,
            read_only: offer.read_only,
            can_discard: offer.can_discard,
            medium_read_only: shape.read_only,
            medium_no_discard: !shape.can_discard,
            transport: None,
            queue: Some(self.queue.save()),
        }
    }

    /// Takes over what was saved. The guest keeps the shape that it has seen.
    pub(crate) fn restore(&self, saved: &state::Disk) -> Result<(), StateError> {
        let what = |name: &str| format!("the {name} of disk {}", self.slot);
        let occupied = self.occupied.load(Ordering::SeqCst);
        if occupied != (saved.size_bytes > 0) {
            let content = |is_there| if is_there { "a medium" } else { "nothing" };
            let (found, expected) = (content(saved.size_bytes > 0), content(occupied));
            return Err(StateError::mismatch(what("content"), found, expected));
        }
        if saved.serial != self.serial() {
            return Err(StateError::mismatch(what("serial"), &saved.serial, self.serial()));
        }
        let read_only = saved.read_only || saved.medium_read_only;
        if occupied && read_only != self.shape().read_only {
            return Err(StateError::mismatch(what("write protection"), read_only, self.shape().read_only));
        }
        if !saved.size_bytes.is_multiple_of(SECTOR_BYTES) || !saved.block_bytes.is_power_of_two() {
            return Err(StateError::Invalid("a disk's size is not in whole sectors"));
        }
        self.queue.restore(state::part(saved.queue.as_ref(), "queue of a disk")?, &self.ram)?;
        *self.offer.write().unwrap_or_else(PoisonError::into_inner) = Offer {
            block_bytes: saved.block_bytes,
            read_only: saved.read_only,
            can_discard: saved.can_discard,
        };
        self.set_shape(Shape {
            size_bytes: saved.size_bytes,
            block_bytes: saved.block_bytes,
            read_only,
            can_discard: saved.can_discard && !saved.medium_no_discard,
        });
        Ok(())
    }

    pub(super) fn serial(&self) -> String {
        self.serial.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn offer(&self) -> Offer {
        *self.offer.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_shape(&self, shape: Shape) {
        *self.shape.write().unwrap_or_else(PoisonError::into_inner) = shape;
    }

    fn set_backend(&self, backend: Option<Arc<dyn BlockDevice>>) {
        *self.backend.write().unwrap_or_else(PoisonError::into_inner) = backend;
    }

    pub(crate) fn shape(&self) -> Shape {
        *self.shape.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn backend(&self) -> Option<Arc<dyn BlockDevice>> {
        self.backend.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let shape = self.shape();
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let sectors = shape.size_bytes / SECTOR_BYTES;
        put(0, u32::try_from(sectors & 0xffff_ffff).expect("the upper half was masked out"));
        put(4, u32::try_from(sectors >> 32).expect("the lower half was shifted out"));
        put(12, SEGMENTS_MAX);
        put(20, shape.block_bytes);
        put(36, RANGE_SECTORS_MAX);
        put(40, RANGES_MAX);
        put(44, shape.block_bytes / 512); // discard alignment, in sectors
        put(48, RANGE_SECTORS_MAX);
        put(52, RANGES_MAX);
        config[56] = 1; // write-zeroes may unmap
        config
    }
}

impl Counters {
    pub(super) fn failed(&self, why: String) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        *self.last_error() = Some(why);
    }

    fn last_error(&self) -> MutexGuard<'_, Option<String>> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A monotonic clock for the limits.
fn monotonic_now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// What the guest sees of a backend.
pub(crate) fn shape_of(geometry: &Geometry, read_only: bool) -> Shape {
    Shape {
        size_bytes: geometry.size_bytes,
        block_bytes: block_bytes(geometry),
        read_only,
        can_discard: geometry.can_discard && !read_only,
    }
}

fn block_bytes(geometry: &Geometry) -> u32 {
    geometry.block_bytes.max(512)
}

impl VirtioDevice for Disk {
    fn kind(&self) -> u32 {
        KIND_BLOCK
    }

    fn features(&self) -> u64 {
        let offer = self.offer();
        let mut features = FEATURES_OF_ALL | FEATURE_SEG_MAX | FEATURE_BLOCK_SIZE | FEATURE_FLUSH;
        if offer.read_only {
            features |= FEATURE_READ_ONLY;
        } else {
            features |= FEATURE_WRITE_ZEROES;
        }
        if offer.can_discard {
            features |= FEATURE_DISCARD;
        }
        features
    }

    fn queues(&self) -> &[RequestQueue] {
        std::slice::from_ref(&self.queue)
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn interrupt(&self) -> &DeviceInterrupt {
        &self.interrupt
    }

    fn read_config(&self, offset: u64, into: &mut [u8]) {
        let config = self.config();
        for (at, byte) in (offset..).zip(into) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn activate(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        self.notify();
    }

    fn notify(&self) {
        self.wakeup.wake();
    }
}
