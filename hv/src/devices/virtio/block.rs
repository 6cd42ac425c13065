//! virtio-blk: a disk of the guest on any [`BlockDevice`], without a copy.
//!
//! ```text
//!   guest: notify --ioeventfd--> worker thread: pop, parse, submit --> BlockDevice
//!   guest: interrupt <--irqfd--- completion (on the device's thread): status, used ring, dirty bitmap
//! ```
//! **Invariants:** the backend is only used by requests that are counted as in flight, so it can be taken away after a
//! drain; a read marks its pages dirty after the data is there (H4).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use blockio::{BlockDevice, Geometry};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Popped, RequestQueue};
use super::request::{self, Op, RANGES_MAX, Request, SECTOR_BYTES, Shape, Status};
use super::{DeviceInterrupt, FEATURE_INDIRECT, FEATURE_VERSION_1, VirtioDevice};
use crate::devices::Interrupt;
use crate::devices::virtio::flight::Flight;
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

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) flushes: AtomicU64,
    errors: AtomicU64,
    /// Protects the text only.
    last_error: Mutex<Option<String>>,
}

/// One disk of the guest.
pub(crate) struct Disk {
    slot: u32,
    serial: String,
    /// Protects the size; it may grow.
    shape: RwLock<Shape>,
    /// Protects the handle; `None` while the disk belongs to another process or is being closed.
    backend: RwLock<Option<Arc<dyn BlockDevice>>>,
    features: AtomicU64,
    stopped: AtomicBool,
    wake: EventFd,
    pub(super) queue: RequestQueue,
    pub(super) interrupt: DeviceInterrupt,
    pub(super) ram: GuestRam,
    pub(super) counters: Counters,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("slot", &self.slot).field("serial", &self.serial).finish_non_exhaustive()
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
        Ok(Self {
            slot,
            serial,
            shape: RwLock::new(shape),
            backend: RwLock::default(),
            features: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            wake: EventFd::new(libc::EFD_CLOEXEC)?,
            queue: RequestQueue::new(),
            interrupt: DeviceInterrupt::new(line),
            ram,
            counters: Counters::default(),
        })
    }

    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }

    /// Written to when the guest notifies.
    pub(crate) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Body of the worker thread; ends after [`Disk::stop`].
    pub(crate) fn serve(self: &Arc<Self>) {
        while !self.stopped.load(Ordering::SeqCst) {
            if self.wake.read().is_ok() {
                self.take_requests();
            }
        }
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.notify();
    }

    /// Hands everything that the driver has posted to the backend.
    pub(crate) fn take_requests(self: &Arc<Self>) {
        loop {
            match self.queue.pop(&self.ram) {
                Popped::Empty => return,
                Popped::Broken => {
                    tracing::warn!(
                        disk = self.slot,
                        "the driver broke its queue; the disk waits for a reset"
                    );
                    return self.interrupt.config_changed();
                }
                Popped::Chain(chain) => match request::parse(&self.ram, &chain, &self.shape()) {
                    Some(request) => self.start(chain.head, request),
                    None => self.queue.complete(&self.ram, chain.head, 0, &self.interrupt),
                },
            }
        }
    }

    fn start(self: &Arc<Self>, head: u16, request: Request) {
        let Some(backend) = self.backend() else {
            return Flight::refuse(self, head, request.status_at, Status::IoError);
        };
        match request.op {
            Op::Refuse(status) => Flight::refuse(self, head, request.status_at, status),
            Op::Identify { parts } => Flight::identify(self, head, request.status_at, &parts),
            Op::Read { offset, parts } => {
                Flight::read(self, head, request.status_at, &*backend, offset, parts);
            }
            Op::Write { offset, parts } => {
                // Without the flush feature the driver takes every completed write as stable.
                let fua = self.features.load(Ordering::Relaxed) & FEATURE_FLUSH == 0;
                Flight::write(self, head, request.status_at, &*backend, offset, &parts, fua);
            }
            Op::Flush => Flight::flush(self, head, request.status_at, &*backend),
            Op::Discard(ranges) => Flight::discard(self, head, request.status_at, &*backend, &ranges),
            Op::WriteZeroes(ranges) => {
                Flight::write_zeroes(self, head, request.status_at, &*backend, &ranges);
            }
        }
    }

    /// Stops taking requests and waits for those in flight.
    pub(crate) fn hold_and_drain(&self) -> Result<(), super::queue::DrainTimeout> {
        self.queue.hold_and_drain()
    }

    /// Goes on, with a look at the queue: a notification may have been consumed without being served.
    pub(crate) fn release(&self) {
        self.queue.release();
        self.interrupt.raise_again();
        self.notify();
    }

    /// Gives the disk its backend, which must have the size that the guest knows.
    pub(crate) fn attach(&self, backend: Arc<dyn BlockDevice>) -> Result<(), StateError> {
        let (known, found) = (self.shape(), backend.geometry());
        let what = |name: &str| format!("{name} of disk {}", self.slot);
        if known.size_bytes == 0 {
            // No guest has seen this disk yet.
            *self.shape.write().unwrap_or_else(PoisonError::into_inner) = shape_of(&found, known.read_only);
            *self.backend.write().unwrap_or_else(PoisonError::into_inner) = Some(backend);
            return Ok(());
        }
        if found.size_bytes != known.size_bytes {
            return Err(StateError::mismatch(what("the size"), known.size_bytes, found.size_bytes));
        }
        if block_bytes(&found) != known.block_bytes {
            return Err(StateError::mismatch(what("the block size"), known.block_bytes, block_bytes(&found)));
        }
        *self.backend.write().unwrap_or_else(PoisonError::into_inner) = Some(backend);
        Ok(())
    }

    /// Takes the backend away. The disk must be drained.
    pub(crate) fn detach(&self) {
        *self.backend.write().unwrap_or_else(PoisonError::into_inner) = None;
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
        let shape = self.shape();
        state::Disk {
            slot: self.slot,
            serial: self.serial.clone(),
            size_bytes: shape.size_bytes,
            block_bytes: shape.block_bytes,
            read_only: shape.read_only,
            can_discard: shape.can_discard,
            transport: None,
            queue: Some(self.queue.save()),
        }
    }

    /// Takes over what was saved. The guest keeps the shape that it has seen.
    pub(crate) fn restore(&self, saved: &state::Disk) -> Result<(), StateError> {
        if saved.serial != self.serial {
            let what = format!("the serial of disk {}", self.slot);
            return Err(StateError::mismatch(what, &saved.serial, &self.serial));
        }
        let known = self.shape().read_only;
        if saved.read_only != known {
            let what = format!("write protection of disk {}", self.slot);
            return Err(StateError::mismatch(what, saved.read_only, known));
        }
        if !saved.size_bytes.is_multiple_of(SECTOR_BYTES) || !saved.block_bytes.is_power_of_two() {
            return Err(StateError::Invalid("a disk's size is not in whole sectors"));
        }
        self.queue.restore(state::part(saved.queue.as_ref(), "queue of a disk")?, &self.ram)?;
        *self.shape.write().unwrap_or_else(PoisonError::into_inner) = Shape {
            size_bytes: saved.size_bytes,
            block_bytes: saved.block_bytes,
            read_only: saved.read_only,
            can_discard: saved.can_discard,
        };
        Ok(())
    }

    pub(super) fn serial(&self) -> &str {
        &self.serial
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
        let shape = self.shape();
        let mut features =
            FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_SEG_MAX | FEATURE_BLOCK_SIZE | FEATURE_FLUSH;
        if shape.read_only {
            features |= FEATURE_READ_ONLY;
        } else {
            features |= FEATURE_WRITE_ZEROES;
        }
        if shape.can_discard {
            features |= FEATURE_DISCARD;
        }
        features
    }

    fn queue(&self) -> &RequestQueue {
        &self.queue
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
        // Fails only when the counter is about to overflow, and then the worker has been woken anyway.
        drop(self.wake.write(1));
    }

    fn reset(&self) {
        if let Err(error) = self.queue.hold_and_drain() {
            // The worker still owns guest memory: the driver must not get it back. It sees a device that failed.
            tracing::error!(disk = self.slot, %error, "reset of a disk refused");
            return;
        }
        self.queue.reset();
        self.features.store(0, Ordering::Relaxed);
        self.queue.release();
    }
}
