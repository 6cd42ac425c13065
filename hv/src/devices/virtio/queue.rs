//! A virtqueue with a count of what is in flight.
//!
//! The guest owns the rings and may write anything into them. A chain that makes no sense is given back untouched; an
//! available index that makes no sense breaks the queue until the driver resets the device.
//!
//! **Invariant:** what was popped is completed exactly once, and while the queue is held nothing new is popped, so
//! `in_flight == 0` under a hold means that no device thread touches guest RAM (H3).

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

use super::DeviceInterrupt;
use crate::memory::GuestRam;
use crate::state::{self, StateError};

/// Most descriptors of a queue.
pub(crate) const QUEUE_SIZE_MAX: u16 = 128;
/// Most parts of one chain, also of one in an indirect table.
const PARTS_MAX: usize = 128;
/// Requests in a row that must have been alone before the driver is taken to go on like that.
const ALONE_MIN: u32 = 8;
/// How long a drain waits for one round before it says so.
const DRAIN_ROUND: Duration = Duration::from_secs(1);
/// Rounds before a drain gives up.
const DRAIN_ROUNDS_MAX: u32 = 30;

/// A piece of guest memory named by a descriptor. Not checked against the memory map yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// A request as the driver posted it.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    /// Empty when the chain was malformed: it loops, leaves the table, or is too long.
    pub(crate) parts: Vec<Part>,
}

#[derive(Debug)]
pub(crate) enum Popped {
    Chain(Chain),
    Empty,
    /// The driver broke the rules; nothing more comes out until a reset.
    Broken,
}

/// Requests did not finish in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{in_flight} disk requests are still in flight; is the storage reachable?")]
pub struct DrainTimeout {
    /// How many.
    pub in_flight: u16,
}

/// One queue.
#[derive(Debug)]
pub(crate) struct RequestQueue {
    /// Protects the ring positions and the count. Innermost lock: nothing else is taken under it.
    inner: Mutex<Inner>,
    idle: Condvar,
}

#[derive(Debug)]
struct Inner {
    queue: Queue,
    held: bool,
    broken: bool,
    in_flight: u16,
    /// Of those in flight, how many wait for something that no drain brings.
    stalled: u16,
    /// Requests in a row that were completed with no other one in flight or posted.
    alone: u32,
}

impl RequestQueue {
    /// An unconfigured queue, held.
    pub(crate) fn new() -> Self {
        let queue = Queue::new(QUEUE_SIZE_MAX).expect("the size is a power of two");
        Self {
            inner: Mutex::new(Inner { queue, held: true, broken: false, in_flight: 0, stalled: 0, alone: 0 }),
            idle: Condvar::new(),
        }
    }

    /// Takes the next request, unless the queue is held.
    pub(crate) fn pop(&self, ram: &GuestRam) -> Popped {
        let mut inner = self.lock();
        if inner.held || inner.broken || !inner.queue.ready() {
            return Popped::Empty;
        }
        let full = inner.in_flight >= inner.queue.size();
        let chain = match inner.queue.iter(ram.map()) {
            Ok(mut available) => available.next(),
            Err(_) => return inner.fall(),
        };
        match chain {
            None => Popped::Empty,
            // More requests than descriptors: some head is used twice.
            Some(_) if full => inner.fall(),
            Some(chain) => {
                inner.in_flight += 1;
                Popped::Chain(Chain { head: chain.head_index(), parts: parts_of(chain) })
            }
        }
    }

    /// The next request, which stays where the driver has posted it.
    pub(crate) fn peek(&self, ram: &GuestRam) -> Option<Chain> {
        let mut inner = self.lock();
        if inner.held || inner.broken || !inner.queue.ready() {
            return None;
        }
        let chain = inner.queue.iter(ram.map()).ok()?.next()?;
        inner.queue.go_to_previous_position();
        Some(Chain { head: chain.head_index(), parts: parts_of(chain) })
    }

    /// Gives a request back to the driver and tells it.
    pub(crate) fn complete(&self, ram: &GuestRam, head: u16, written: u32, interrupt: &DeviceInterrupt) {
        let mut inner = self.lock();
        // Before the driver hears of it, and posts the next one.
        inner.alone = if inner.is_alone(ram) { inner.alone.saturating_add(1) } else { 0 };
        if inner.queue.add_used(ram.map(), head, written).is_err() {
            inner.broken = true;
        }
        drop(inner);
        // Interrupt before the count: a drained queue has nothing left to say. Not under the lock, which who takes requests wants.
        interrupt.used();
        let mut inner = self.lock();
        inner.in_flight -= 1;
        if inner.in_flight == 0 {
            self.idle.notify_all();
        }
    }

    /// Whether the driver waits for each request before it posts the next.
    pub(crate) fn one_at_a_time(&self) -> bool {
        self.lock().alone >= ALONE_MIN
    }

    /// One of those in flight will not complete by itself: a drain does not wait for it.
    pub(crate) fn stall(&self) {
        self.lock().stalled += 1;
        self.idle.notify_all();
    }

    /// So many of them are under way again.
    pub(crate) fn unstall(&self, count: usize) {
        let mut inner = self.lock();
        inner.stalled = inner.stalled.saturating_sub(u16::try_from(count).unwrap_or(u16::MAX));
    }

    /// Stops taking requests, and waits until those in flight are completed.
    pub(crate) fn hold_and_drain(&self) -> Result<(), DrainTimeout> {
        let mut inner = self.lock();
        inner.held = true;
        for round in 1..=DRAIN_ROUNDS_MAX {
            let waits = |inner: &mut Inner| inner.in_flight > inner.stalled;
            let waited = self.idle.wait_timeout_while(inner, DRAIN_ROUND, waits);
            let (after, over) = waited.unwrap_or_else(PoisonError::into_inner);
            if !over.timed_out() {
                return match after.in_flight {
                    0 => Ok(()),
                    in_flight => Err(DrainTimeout { in_flight }),
                };
            }
            tracing::warn!(in_flight = after.in_flight, seconds = round, "disk requests are slow to drain");
            inner = after;
        }
        Err(DrainTimeout { in_flight: inner.in_flight })
    }

    /// Takes requests again. The caller kicks the worker.
    pub(crate) fn release(&self) {
        self.lock().held = false;
    }

    /// Whether it takes no requests.
    pub(crate) fn is_held(&self) -> bool {
        self.lock().held
    }

    /// Back to power-on. Nothing may be in flight.
    pub(crate) fn reset(&self) {
        let mut inner = self.lock();
        assert_eq!(inner.in_flight, 0, "a queue is drained before it is reset");
        inner.queue.reset();
        inner.broken = false;
    }

    /// Changes the configuration; ignored once the queue is ready, as the standard asks of drivers.
    pub(crate) fn configure(&self, change: impl FnOnce(&mut Queue)) {
        let mut inner = self.lock();
        if !inner.queue.ready() {
            change(&mut inner.queue);
        }
    }

    pub(crate) fn set_ready(&self, ready: bool) {
        self.lock().queue.set_ready(ready);
    }

    /// Whether the driver has broken the rules since the last reset.
    pub(crate) fn is_broken(&self) -> bool {
        self.lock().broken
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.lock().queue.ready()
    }

    /// Whether the rings are where memory is.
    pub(crate) fn is_valid(&self, ram: &GuestRam) -> bool {
        self.lock().queue.is_valid(ram.map())
    }

    pub(crate) fn save(&self) -> state::Queue {
        let queue = self.lock().queue.state();
        state::Queue {
            size: queue.size.into(),
            ready: queue.ready,
            descriptors: queue.desc_table,
            avail: queue.avail_ring,
            used: queue.used_ring,
            next_avail: queue.next_avail.into(),
            next_used: queue.next_used.into(),
        }
    }

    pub(crate) fn restore(&self, saved: &state::Queue, ram: &GuestRam) -> Result<(), StateError> {
        let (next_avail, next_used) = (state::half(saved.next_avail)?, state::half(saved.next_used)?);
        let positions = QueueState {
            max_size: QUEUE_SIZE_MAX,
            next_avail,
            next_used,
            event_idx_enabled: false,
            size: state::half(saved.size)?,
            ready: saved.ready,
            desc_table: saved.descriptors,
            avail_ring: saved.avail,
            used_ring: saved.used,
        };
        let queue = Queue::try_from(positions)
            .map_err(|_| StateError::Invalid("a queue's size or addresses are impossible"))?;
        if saved.ready && !queue.is_valid(ram.map()) {
            return Err(StateError::Invalid("a queue's rings are outside of guest RAM"));
        }
        if next_avail != next_used {
            return Err(StateError::Invalid("a queue was saved with requests in flight"));
        }
        let mut inner = self.lock();
        inner.queue = queue;
        inner.broken = false;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Whether the request that is about to be completed is the only one.
    fn is_alone(&self, ram: &GuestRam) -> bool {
        let posted = self.queue.avail_idx(ram.map(), Ordering::Acquire);
        self.in_flight == 1 && posted.is_ok_and(|posted| posted.0 == self.queue.next_avail())
    }

    fn fall(&mut self) -> Popped {
        self.broken = true;
        Popped::Broken
    }
}

fn parts_of(chain: virtio_queue::DescriptorChain<&crate::memory::RamMap>) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut complete = false;
    for descriptor in chain.take(PARTS_MAX) {
        parts.push(Part {
            address: descriptor.addr().0,
            len: descriptor.len(),
            writable: descriptor.is_write_only(),
        });
        complete = !descriptor.has_next();
    }
    // The iterator ends silently where a chain loops or leaves its table.
    if complete { parts } else { Vec::new() }
}
