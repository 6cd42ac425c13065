//! What a guest can do to its disk, as a function of bytes: it panics when a promise is broken, whatever the bytes are.
//!
//! The bytes are steps: descriptors, headers, heads, indexes and registers, mostly sensible, so that many get far. Promises: no
//! request leaves the disk's bounds or guest RAM, a disk that is only read is never changed, and after a reset the disk works.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use blockio::{BlockDevice, Geometry, IoOp, IoRequest, MemoryDevice};
use proptest::prelude::*;

use crate::devices::virtio::VirtioDevice;

use super::driver::{
    AVAIL, DATA, DESCRIPTORS, DISK_BYTES, Driver, EVENT_INDEX, FLUSH, HEADER, NEXT, QUEUE_SIZE, RAM_BYTES,
    STATUS, VERSION_1, WRITE,
};

const STEPS_MAX: usize = 40;
/// Registers of the transport that a driver writes, and some that it must not.
const REGISTERS: [u64; 14] =
    [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0xa0, 0x104];

/// A disk that sees whether a request breaks its bounds.
struct Watched {
    inner: MemoryDevice,
    read_only: bool,
    broken: AtomicBool,
    requests: AtomicUsize,
}

impl BlockDevice for Watched {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        let (offset, len, changes) = match &request.op {
            IoOp::Read { offset, buf } => (*offset, buf.len() as u64, false),
            IoOp::Write { offset, buf, .. } => (*offset, buf.len() as u64, true),
            IoOp::Discard { offset, len } | IoOp::WriteZeroes { offset, len, .. } => (*offset, *len, true),
            IoOp::Flush => (0, 0, false),
        };
        let inside = offset.checked_add(len).is_some_and(|end| end <= DISK_BYTES);
        if !inside || !offset.is_multiple_of(512) || !len.is_multiple_of(512) || changes && self.read_only {
            self.broken.store(true, Ordering::SeqCst);
        }
        self.requests.fetch_add(1, Ordering::SeqCst);
        self.inner.submit(request);
    }
}

/// Choices read off bytes; zeros when they run out.
struct Feed<'a>(&'a [u8]);

impl Feed<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> u64 {
        u64::from(self.byte()) << 8 | u64::from(self.byte())
    }

    /// An address: mostly one that the driver uses, sometimes at an edge.
    fn address(&mut self) -> u64 {
        let near = self.number();
        match self.byte() % 16 {
            0 => u64::MAX - near,
            1 => RAM_BYTES - near % 1024,
            2 => RAM_BYTES + near,
            3..=5 => HEADER,
            6..=8 => STATUS,
            9 => DESCRIPTORS + near % 512,
            _ => DATA + near * 16 % (RAM_BYTES - DATA),
        }
    }

    fn len(&mut self) -> u32 {
        let near = u32::try_from(self.number()).expect("two bytes");
        match self.byte() % 8 {
            0 => u32::MAX - near,
            1 => near,
            2 | 3 => 16,
            4 => 1,
            _ => near % 64 * 512,
        }
    }
}

/// Lets a guest do what the bytes say; gives the number of requests that its disk got from that.
fn guest(data: &[u8]) -> usize {
    let mut feed = Feed(data);
    let read_only = feed.byte().is_multiple_of(4);
    let disk = Arc::new(Watched {
        inner: MemoryDevice::new(DISK_BYTES),
        read_only,
        broken: AtomicBool::new(false),
        requests: AtomicUsize::new(0),
    });
    let mut driver = Driver::new(disk.clone(), read_only);
    let by_index = if feed.byte().is_multiple_of(2) { EVENT_INDEX } else { 0 };
    driver.start(VERSION_1 | FLUSH | by_index);
    for _ in 0..STEPS_MAX {
        if feed.0.is_empty() {
            break;
        }
        step(&mut driver, &mut feed);
    }
    let requests = disk.requests.load(Ordering::SeqCst);
    driver.start(VERSION_1 | FLUSH);
    assert_eq!(driver.request(0, 0, 512, true), (0, 513), "it works after a reset");
    assert!(!disk.broken.load(Ordering::SeqCst), "a request broke the bounds of the disk");
    if read_only {
        let mut content = vec![1; usize::try_from(DISK_BYTES).expect("small")];
        disk.inner.read_at(0, &mut content).expect("memory");
        assert!(content.iter().all(|byte| *byte == 0), "a disk that is only read was changed");
    }
    requests
}

fn step(driver: &mut Driver, feed: &mut Feed<'_>) {
    match feed.byte() % 8 {
        0..=4 => request(driver, feed),
        5 => {
            let head = u16::from(feed.byte()) % (QUEUE_SIZE + 2);
            driver.post(head);
        }
        6 => {
            let index = u16::try_from(feed.number()).expect("two bytes");
            driver.ram.write(AVAIL + 2, &index.to_le_bytes()).expect("in RAM");
            driver.disk.take_requests();
        }
        _ => {
            let register = REGISTERS[usize::from(feed.byte()) % REGISTERS.len()];
            let value = u32::from(feed.byte()) | u32::from(feed.byte()) << 24;
            driver.set(register, value);
            driver.disk.take_requests();
        }
    }
    driver.disk.hold_and_drain().expect("memory answers at once");
    driver.disk.release();
}

/// A request as drivers make them, with some parts of it put to something else.
fn request(driver: &mut Driver, feed: &mut Feed<'_>) {
    let kinds = [0, 1, 0, 1, 4, 8, 11, 13, 2, u32::MAX];
    let kind = kinds[usize::from(feed.byte()) % kinds.len()];
    let sector = if feed.byte().is_multiple_of(8) { u64::MAX - feed.number() } else { feed.number() % 2100 };
    driver.header(kind, sector);
    let to_guest = if matches!(kind, 0 | 8) { WRITE } else { 0 };
    let parts = u16::from(feed.byte() % 4);
    let mut chain = vec![(HEADER, 16, NEXT, 1)];
    for part in 0..parts {
        let len = if kind == 11 || kind == 13 { 16 } else { u32::from(feed.byte() % 16) * 512 };
        chain.push((DATA + u64::from(part) * 8192, len, NEXT | to_guest, part + 2));
    }
    chain.push((STATUS, 1, WRITE, 0));
    // Ranges of a discard or of zeroes.
    driver.ram.write(DATA, &(feed.number() % 2100).to_le_bytes()).expect("in RAM");
    driver.ram.write(DATA + 8, &(feed.number() % 64).to_le_bytes()).expect("in RAM");
    for _ in 0..feed.byte() % 3 {
        let at = usize::from(feed.byte()) % chain.len();
        match feed.byte() % 4 {
            0 => chain[at].0 = feed.address(),
            1 => chain[at].1 = feed.len(),
            2 => chain[at].2 ^= 1 << (feed.byte() % 3),
            _ => chain[at].3 = u16::from(feed.byte()) % (QUEUE_SIZE + 2),
        }
    }
    driver.describe(DESCRIPTORS, &chain);
    driver.post(0);
}

#[test]
fn the_guests_that_bytes_make_get_as_far_as_the_disk() {
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    let mut reached = 0;
    for _ in 0..300 {
        let mut byte = || {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            noise.to_le_bytes()[0]
        };
        let data: Vec<u8> = (0..300).map(|_| byte()).collect();
        reached += guest(&data);
    }
    assert!(reached > 200, "only {reached} requests came to the disk");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    // Invariant H7
    #[test]
    fn no_guest_gets_its_disk_to_break_a_promise(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        guest(&data);
    }
}
