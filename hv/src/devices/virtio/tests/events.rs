//! Who is told, and when: interrupts and notifications that nobody wants to hear of are left out, and none that somebody waits for.
//!
//! [VIRTIO 1.2] 2.7.7 and 2.7.10. Two threads on all of a disk's way are tried in `driven.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use blockio::MemoryDevice;
use proptest::prelude::*;

use crate::devices::virtio::queue::{Popped, RequestQueue};
use crate::devices::virtio::{DeviceInterrupt, VirtioDevice};
use crate::memory::GuestRam;
use crate::state;

use super::driver::{
    AVAIL, DATA, DESCRIPTORS, DISK_BYTES, Driver, EVENT_INDEX, FLUSH, HEADER, Line, NEXT, QUEUE_SIZE,
    RAM_BYTES, STATUS, Stuck, USED, VERSION_1, WRITE,
};

const USED_EVENT: u64 = AVAIL + 4 + QUEUE_SIZE as u64 * 2;
const AVAIL_EVENT: u64 = USED + 4 + QUEUE_SIZE as u64 * 8;
const SILENT: u16 = 1;
const BY_FLAGS: bool = false;
const BY_INDEX: bool = true;

/// A queue and its driver's side, nothing behind it.
struct Ring {
    ram: GuestRam,
    queue: RequestQueue,
    interrupt: DeviceInterrupt,
    line: Arc<Line>,
    available: u16,
}

impl Ring {
    /// Both sides have come to `start`, and the driver has heard of that.
    fn new(by_index: bool, start: u16) -> Self {
        let mut ring = Self::restored(by_index, start);
        ring.put(USED_EVENT, start);
        ring.post(1);
        ring.done(1);
        assert_eq!(ring.told(), 1);
        ring
    }

    /// As it comes out of a saved state.
    fn restored(by_index: bool, start: u16) -> Self {
        let line = Arc::new(Line::default());
        let interrupt = DeviceInterrupt::new(line.clone());
        let (ram, queue) = (GuestRam::new(RAM_BYTES).unwrap(), RequestQueue::new());
        let ring = Self { ram, queue, interrupt, line, available: start };
        ring.queue.restore(&saved(start), &ring.ram).unwrap();
        ring.queue.use_event_index(by_index);
        ring.queue.release();
        ring.put(AVAIL + 2, start);
        ring
    }

    fn put(&self, at: u64, value: u16) {
        self.ram.write(at, &value.to_le_bytes()).unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.ram.read(at, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// The driver posts; the queue does not hear of it.
    fn post(&mut self, count: u16) {
        self.available = self.available.wrapping_add(count);
        self.put(AVAIL + 2, self.available);
    }

    fn pop(&self) -> bool {
        matches!(self.queue.pop(&self.ram), Popped::Chain(_))
    }

    /// Takes so many requests and gives them back.
    fn done(&self, count: u16) {
        for _ in 0..count {
            assert!(self.pop(), "there is a request");
            self.queue.complete(&self.ram, 0, 0, &self.interrupt);
        }
    }

    /// Interrupts so far.
    fn told(&self) -> u32 {
        self.line.count()
    }

    /// Whether a driver that has posted one more request notifies of it.
    fn would_notify(&self, by_index: bool) -> bool {
        if by_index { self.get(AVAIL_EVENT) == self.available } else { self.get(USED) == 0 }
    }
}

fn saved(start: u16) -> state::Queue {
    state::Queue {
        size: QUEUE_SIZE.into(),
        ready: true,
        descriptors: DESCRIPTORS,
        avail: AVAIL,
        used: USED,
        next_avail: start.into(),
        next_used: start.into(),
    }
}

#[test]
fn a_driver_hears_of_the_completion_that_it_has_named_and_of_no_other() {
    for start in [0, 65_530] {
        let mut ring = Ring::new(BY_INDEX, start);
        ring.put(USED_EVENT, start.wrapping_add(3));
        ring.post(8);
        ring.done(2);
        assert_eq!(ring.told(), 1, "not yet, from {start}");
        ring.done(1);
        assert_eq!(ring.told(), 2, "now, from {start}");
        ring.done(5);
        assert_eq!(ring.told(), 2, "and not again, from {start}");
    }
}

#[test]
fn a_driver_without_the_index_hears_of_each_completion_unless_its_flag_is_set() {
    let mut ring = Ring::new(BY_FLAGS, 0);
    ring.post(3);
    ring.done(1);
    assert_eq!(ring.told(), 2);
    ring.put(AVAIL, SILENT);
    ring.done(1);
    assert_eq!((ring.told(), ring.interrupt.reasons()), (2, 1), "the reason is that of before");
    ring.put(AVAIL, 0);
    ring.done(1);
    assert_eq!(ring.told(), 3);
}

#[test]
fn a_device_wants_to_hear_of_a_request_when_it_has_taken_all() {
    for by_index in [BY_FLAGS, BY_INDEX] {
        let mut ring = Ring::new(by_index, 65_534);
        assert!(!ring.pop());
        assert!(ring.would_notify(by_index), "by index: {by_index}");
        ring.post(3);
        ring.done(2);
        assert!(!ring.would_notify(by_index), "it is at work: {by_index}");
        ring.done(1);
        assert!(!ring.would_notify(by_index), "it looks once more by itself: {by_index}");
        assert!(!ring.pop() && ring.would_notify(by_index), "by index: {by_index}");
        assert!(!ring.pop() && ring.would_notify(by_index), "by index: {by_index}");
    }
}

#[test]
fn a_look_at_a_queue_that_takes_nothing_from_it_asks_too() {
    for by_index in [BY_FLAGS, BY_INDEX] {
        let mut ring = Ring::new(by_index, 7);
        assert!(ring.queue.peek(&ring.ram).is_none() && ring.would_notify(by_index));
        ring.post(1);
        assert!(ring.queue.peek(&ring.ram).is_some());
        ring.done(1);
        assert!(ring.queue.peek(&ring.ram).is_none() && ring.would_notify(by_index));
    }
}

// Builds that know nothing of the flag take over the queue from a saved state: they would never hear of a request.
#[test]
fn a_held_queue_asks_no_driver_to_be_silent_and_says_nothing_more() {
    for by_index in [BY_FLAGS, BY_INDEX] {
        let mut ring = Ring::new(by_index, 0);
        ring.post(2);
        ring.done(1);
        ring.queue.hold_and_drain(&ring.ram).unwrap();
        assert_eq!(ring.get(USED), 0, "by index: {by_index}");
        ring.put(AVAIL_EVENT, 0x5555);
        ring.post(1);
        assert!(!ring.pop());
        assert_eq!((ring.get(USED), ring.get(AVAIL_EVENT)), (0, 0x5555), "by index: {by_index}");
        ring.queue.release();
        ring.done(2);
        assert!(!ring.pop() && ring.would_notify(by_index), "by index: {by_index}");
    }
}

// What a driver wanted to hear of is not in a saved state, nor whether it has been told.
#[test]
fn the_first_completion_after_a_restore_interrupts_whatever_was_said_before() {
    for by_index in [BY_FLAGS, BY_INDEX] {
        let mut ring = Ring::restored(by_index, 100);
        ring.put(AVAIL, SILENT);
        ring.put(USED_EVENT, 99);
        ring.post(3);
        ring.done(1);
        assert_eq!(ring.told(), 1, "by index: {by_index}");
        ring.done(2);
        assert_eq!(ring.told(), 1, "from then on by what the driver says: {by_index}");
    }
}

#[test]
fn what_a_driver_posts_without_a_word_while_its_device_is_away_is_found_at_the_other_node() {
    let stuck = Arc::new(Stuck::default());
    let mut driver = Driver::new(stuck.clone(), false);
    driver.start(VERSION_1 | FLUSH | EVENT_INDEX);
    driver
        .describe(DESCRIPTORS, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)]);
    driver.header(0, 0);
    driver.disk.take_requests();
    driver.disk.hold_and_drain().unwrap();
    driver.make_available(0);
    let saved = (driver.disk.save(), driver.transport.save());

    let other = Driver::new(stuck.clone(), false);
    for page in (0..RAM_BYTES).step_by(4096) {
        other.ram.write(page, &driver.bytes::<4096>(page)).unwrap();
    }
    other.disk.hold_and_drain().unwrap();
    other.disk.restore(&saved.0).unwrap();
    other.transport.restore(&saved.1).unwrap();
    // Far from where the queue is: as if the driver had heard of all.
    other.ram.write(USED_EVENT, &0x7fff_u16.to_le_bytes()).unwrap();
    drop(other.disk.wakeup().event().read());
    other.disk.release();
    assert!(other.disk.wakeup().event().read().is_ok(), "its thread is woken");
    other.disk.take_requests();
    let request = stuck.waiting.lock().unwrap().pop().expect("found");
    (request.done)(Ok(()));
    assert_eq!((other.used_index(), other.interrupts()), (1, 1), "and the driver hears of it");
    let asked: [u8; 2] = other.bytes(AVAIL_EVENT);
    assert_eq!(u16::from_le_bytes(asked), 1, "the device wants to hear of the next one");
}

// A request that is in flight when its queue is held completes as ever, and one that was told of but not heard of is told of again.
#[test]
fn an_interrupt_that_nobody_has_acknowledged_is_raised_again_after_a_hold() {
    let stuck = Arc::new(Stuck::default());
    let mut driver = Driver::new(stuck.clone(), false);
    driver.start(VERSION_1 | FLUSH | EVENT_INDEX);
    driver
        .describe(DESCRIPTORS, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)]);
    driver.header(0, 0);
    driver.post(0);
    let request = stuck.waiting.lock().unwrap().pop().expect("taken");
    std::thread::scope(|scope| {
        let drained = scope.spawn(|| driver.disk.hold_and_drain());
        (request.done)(Ok(()));
        drained.join().unwrap().unwrap();
    });
    assert_eq!(driver.interrupts(), 1);
    driver.disk.release();
    assert_eq!(driver.interrupts(), 2);
    driver.set(0x64, 1);
    driver.disk.hold_and_drain().unwrap();
    driver.disk.release();
    assert_eq!(driver.interrupts(), 2, "it was heard of");
}

#[test]
fn older_devices_do_not_offer_the_index_and_go_on_with_a_driver_that_has_it() {
    let memory = || Arc::new(MemoryDevice::new(DISK_BYTES));
    let mut older = Driver::offered(memory(), false, 0);
    older.set(0x14, 0);
    assert_eq!(u64::from(older.register(0x10)) & EVENT_INDEX, 0);
    older.start(VERSION_1 | EVENT_INDEX);
    assert_eq!(older.register(0x70) & 8, 0, "it is not theirs to give");

    // Such as a checkpoint of before the VM was started in a cluster with an older node.
    let mut driver = Driver::new(memory(), false);
    driver.start(VERSION_1 | FLUSH | EVENT_INDEX);
    assert_eq!(driver.register(0x70), 15);
    driver.disk.hold_and_drain().unwrap();
    let fresh = Driver::offered(memory(), false, 0);
    fresh.disk.restore(&driver.disk.save()).unwrap();
    fresh.transport.restore(&driver.transport.save()).unwrap();
    assert_eq!(fresh.transport.save(), driver.transport.save());
}

/// Times that a thread lets others run before it takes what it waits for to be lost.
const PATIENCE: u32 = 20_000_000;

fn comes(mut there: impl FnMut() -> bool) -> bool {
    (0..PATIENCE).any(|_| {
        there() || {
            std::thread::yield_now();
            false
        }
    })
}

// A driver posts its next request at the very moment when its device finds nothing more and says that it wants to hear of the next one.
#[test]
fn a_request_that_is_posted_while_the_device_says_what_it_wants_is_not_overlooked() {
    const REQUESTS: u16 = 60_000;
    for by_index in [BY_FLAGS, BY_INDEX] {
        let (ring, notified) = (&Ring::restored(by_index, 0), &AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut done = 0;
                while done < REQUESTS {
                    while ring.pop() {
                        ring.queue.complete(&ring.ram, 0, 0, &ring.interrupt);
                        done += 1;
                    }
                    if done < REQUESTS && !comes(|| notified.swap(false, Ordering::SeqCst)) {
                        return;
                    }
                }
            });
            for posted in 1..=REQUESTS {
                ring.put(AVAIL + 2, posted);
                fence(Ordering::SeqCst);
                let from = if by_index { ring.get(AVAIL_EVENT) } else { ring.get(USED) };
                if from == if by_index { posted - 1 } else { 0 } {
                    notified.store(true, Ordering::SeqCst);
                }
                let done = comes(|| ring.get(USED + 2) == posted);
                assert!(done, "request {posted} was overlooked, by index: {by_index}");
            }
        });
    }
}

/// The standard's own words on whether a step of the used index is told of.
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    // Invariant H7: whatever a driver says it is told by the standard's rule, and the queue works on.
    #[test]
    fn what_is_told_follows_the_standard_anywhere_in_the_ring(
        start in any::<u16>(),
        steps in proptest::collection::vec((any::<u16>(), -3_i16..20, any::<bool>(), 1_u16..16), 1..40),
    ) {
        let mut ring = Ring::new(BY_INDEX, start);
        let mut told = ring.told();
        for (noise, near, is_near, count) in steps {
            ring.post(count);
            let event = if is_near { ring.get(USED + 2).wrapping_add_signed(near) } else { noise };
            ring.put(USED_EVENT, event);
            // Whatever stands there is the device's to write, and hurts only who changes it.
            ring.put(AVAIL_EVENT, noise);
            for _ in 0..count {
                let old = ring.get(USED + 2);
                ring.done(1);
                told += u32::from(needs_event(event, old.wrapping_add(1), old));
                prop_assert_eq!(ring.told(), told);
            }
            prop_assert!(!ring.pop() && ring.would_notify(BY_INDEX));
        }
    }
}
