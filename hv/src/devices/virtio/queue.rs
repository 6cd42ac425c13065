//! A virtqueue with a count of what is in flight.
//!
//! The guest owns the rings and may write anything into them. A chain that makes no sense is given back untouched; an
//! available index that makes no sense breaks the queue until the driver resets the device.
//!
//! ```text
//!   driver: post, "do you want to hear?" --notify--> pop ... pop, none: "I want to hear of the next", look once more
//!   driver: "I want to hear", look once more <--interrupt-- complete, "do you want to hear?"
//! ```
//! Each side says when it wants to hear of the other [VIRTIO 1.2] 2.7.7, 2.7.10: with the event index from which place in the ring on,
//! without it by a flag. Who says so looks once more afterwards, and who asks has shown its work before, so of two at the same moment one
//! sees the other. A driver is asked for nothing while requests are being taken: whoever leaves off before [`Popped::Empty`] comes back by
//! itself.
//!
//! **Invariants:** what was popped is completed exactly once, and while the queue is held nothing new is popped and nothing is said, so
//! `in_flight == 0` under a hold means that no device thread touches guest RAM (H3). After [`Popped::Empty`] the driver notifies of
//! its next request, unless the queue is held, and then it is looked at when it is released. No driver is asked to be silent by a saved
//! state, for builds that do not know of it go on from there too. After a restore the first completion interrupts, whatever was said.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::DeviceInterrupt;
use crate::memory::{GuestRam, RamMap};
use crate::state::{self, StateError};

/// Most descriptors of a queue.
pub(crate) const QUEUE_SIZE_MAX: u16 = 128;
/// Most parts of one chain, also of one in an indirect table.
const PARTS_MAX: usize = 128;
/// Requests in a row that must have been alone before the driver is taken to go on like that.
const ALONE_MIN: u32 = 8;
/// In the available ring's flags: the driver does not want to hear of completions.
const NO_INTERRUPT: u16 = 1;
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

type Found<'a> = DescriptorChain<&'a RamMap>;

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
    /// By its flag the driver is asked not to notify. Without the event index only.
    hushed: bool,
    /// The next completion interrupts: what the driver wanted to hear of before, nobody knows any more.
    must_tell: bool,
}

impl Inner {
    fn new(queue: Queue) -> Self {
        let (held, broken, hushed, must_tell) = (true, false, false, false);
        Self { queue, held, broken, in_flight: 0, stalled: 0, alone: 0, hushed, must_tell }
    }
}

impl RequestQueue {
    /// An unconfigured queue, held.
    pub(crate) fn new() -> Self {
        let queue = Queue::new(QUEUE_SIZE_MAX).expect("the size is a power of two");
        Self { inner: Mutex::new(Inner::new(queue)), idle: Condvar::new() }
    }

    /// Takes the next request, unless the queue is held. When there is none, the driver notifies of the next one.
    pub(crate) fn pop(&self, ram: &GuestRam) -> Popped {
        let mut inner = self.lock();
        if inner.held || inner.broken || !inner.queue.ready() {
            return Popped::Empty;
        }
        let full = inner.in_flight >= inner.queue.size();
        match inner.next(ram).and_then(|next| inner.ask_for_notifications(ram, next)) {
            Err(_) => inner.fall(),
            Ok(None) => Popped::Empty,
            // More requests than descriptors: some head is used twice.
            Ok(Some(_)) if full => inner.fall(),
            Ok(Some(chain)) => {
                inner.in_flight += 1;
                Popped::Chain(Chain { head: chain.head_index(), parts: parts_of(chain) })
            }
        }
    }

    /// The next request, which stays where the driver has posted it. When there is none, the driver notifies of the next one.
    pub(crate) fn peek(&self, ram: &GuestRam) -> Option<Chain> {
        let mut inner = self.lock();
        if inner.held || inner.broken || !inner.queue.ready() {
            return None;
        }
        let chain = inner.next(ram).and_then(|next| inner.ask_for_notifications(ram, next)).ok()??;
        inner.queue.go_to_previous_position();
        Some(Chain { head: chain.head_index(), parts: parts_of(chain) })
    }

    /// Gives a request back to the driver, and tells it unless it does not want to hear of it.
    pub(crate) fn complete(&self, ram: &GuestRam, head: u16, written: u32, interrupt: &DeviceInterrupt) {
        self.complete_all(ram, &[(head, written)], interrupt);
    }

    /// The same for several at once, heads and lengths: the driver sees all of them or none, and hears of them once.
    pub(crate) fn complete_all(&self, ram: &GuestRam, done: &[(u16, u32)], interrupt: &DeviceInterrupt) {
        let mut inner = self.lock();
        // Before the driver hears of it, and posts the next one.
        inner.alone = if inner.is_alone(ram) { inner.alone.saturating_add(1) } else { 0 };
        let tell = inner.give_back(ram, done);
        drop(inner);
        // Interrupt before the count: a drained queue has nothing left to say. Not under the lock, which who takes requests wants.
        if tell {
            interrupt.used();
        }
        self.lock().end(done.len(), &self.idle);
    }

    /// The requests that were taken last, so many of them, stay where the driver has posted them.
    pub(crate) fn put_back(&self, count: usize) {
        let mut inner = self.lock();
        for _ in 0..count {
            inner.queue.go_to_previous_position();
        }
        inner.end(count, &self.idle);
    }

    /// How many requests a driver can have posted at a time.
    pub(crate) fn size(&self) -> usize {
        self.lock().queue.size().into()
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
    pub(crate) fn hold_and_drain(&self, ram: &GuestRam) -> Result<(), DrainTimeout> {
        let mut inner = self.lock();
        inner.held = true;
        inner.unhush(ram);
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
        (inner.broken, inner.hushed, inner.must_tell) = (false, false, false);
    }

    /// The driver has accepted its device, and says by places in the rings (`true`) or by flags what it wants to hear of.
    pub(crate) fn use_event_index(&self, accepted: bool) {
        self.lock().queue.set_event_idx(accepted);
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
            // Follows from the features that the driver has accepted, which come later.
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
        (inner.broken, inner.hushed, inner.must_tell) = (false, false, true);
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

    fn next<'a>(&mut self, ram: &'a GuestRam) -> Result<Option<Found<'a>>, virtio_queue::Error> {
        Ok(self.queue.iter(ram.map())?.next())
    }

    /// While there are requests none is to be notified of. When there are no more, the next one is; and it may have been posted before
    /// the driver could see that.
    fn ask_for_notifications<'a>(
        &mut self,
        ram: &'a GuestRam,
        next: Option<Found<'a>>,
    ) -> Result<Option<Found<'a>>, virtio_queue::Error> {
        if next.is_some() {
            if !self.hushed {
                self.queue.disable_notification(ram.map())?;
                self.hushed = true;
            }
            return Ok(next);
        }
        self.hushed = false;
        if self.queue.enable_notification(ram.map())? { self.next(ram) } else { Ok(None) }
    }

    /// The driver notifies again. What it has posted meanwhile is found by the look that follows a release.
    fn unhush(&mut self, ram: &GuestRam) {
        if std::mem::take(&mut self.hushed) {
            // A ring that cannot be written to is found by that look too.
            drop(self.queue.enable_notification(ram.map()));
        }
    }

    /// So many requests are no longer under way.
    fn end(&mut self, count: usize, idle: &Condvar) {
        let ended = u16::try_from(count).expect("no more than were taken");
        self.in_flight = self.in_flight.checked_sub(ended).expect("they were taken");
        if self.in_flight == 0 {
            idle.notify_all();
        }
    }

    /// Shows the driver that requests are done; true when it is to be told.
    fn give_back(&mut self, ram: &GuestRam, done: &[(u16, u32)]) -> bool {
        let before = self.queue.next_used();
        if self.show(ram, done).is_none() {
            self.broken = true;
            return true;
        }
        let wanted = self.wants_interrupts(ram, before);
        std::mem::take(&mut self.must_tell) || wanted
    }

    /// The index that goes on with the last one shows all of them.
    fn show(&mut self, ram: &GuestRam, done: &[(u16, u32)]) -> Option<()> {
        let ((head, written), others) = done.split_last()?;
        for (head, written) in others {
            let at = 4 + u64::from(self.queue.next_used() % self.queue.size()) * 8;
            let entry = [u32::from(*head), *written].map(u32::to_le_bytes);
            ram.write(self.queue.used_ring().checked_add(at)?, entry.as_flattened()).ok()?;
            self.queue.set_next_used(self.queue.next_used().wrapping_add(1));
        }
        self.queue.add_used(ram.map(), *head, *written).ok()
    }

    /// Whether the driver wants to hear of what it was shown since the index was `before`.
    fn wants_interrupts(&self, ram: &GuestRam, before: u16) -> bool {
        // The used ring before the look at what the driver wants.
        fence(Ordering::SeqCst);
        let by_index = self.queue.event_idx_enabled();
        let behind = if by_index { 4 + u64::from(self.queue.size()) * 2 } else { 0 };
        let at = GuestAddress(self.queue.avail_ring().wrapping_add(behind));
        let Ok(said) = ram.map().load(at, Ordering::Relaxed).map(u16::from_le) else { return true };
        if !by_index {
            return said & NO_INTERRUPT == 0;
        }
        let now = self.queue.next_used();
        now.wrapping_sub(said).wrapping_sub(1) < now.wrapping_sub(before)
    }

    fn fall(&mut self) -> Popped {
        self.broken = true;
        Popped::Broken
    }
}

fn parts_of(chain: Found<'_>) -> Vec<Part> {
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
