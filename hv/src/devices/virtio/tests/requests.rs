//! What a driver that follows the rules gets.

use std::sync::Arc;

use blockio::{BlockDevice, MemoryDevice};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::devices::virtio::VirtioDevice;

use super::driver::{DATA, DESCRIPTORS, DISK_BYTES, Driver, HEADER, NEXT, STATUS, Stuck, VERSION_1, WRITE};

#[test]
fn what_is_written_is_read_back() {
    let (mut driver, device) = Driver::on_memory();
    driver.ram.write(DATA, &[7; 4096]).unwrap();
    assert_eq!(driver.request(1, 16, 4096, false), (0, 1));
    assert_eq!(driver.request(4, 0, 0, false), (0, 1));
    driver.ram.write(DATA, &[0; 4096]).unwrap();
    assert_eq!(driver.request(0, 16, 4096, true), (0, 4097));
    assert_eq!(driver.bytes::<4096>(DATA), [7; 4096]);
    let mut on_disk = [0; 512];
    device.read_at(16 * 512, &mut on_disk).unwrap();
    assert_eq!(on_disk, [7; 512]);
    let stats = driver.disk.stats();
    assert_eq!((stats.reads, stats.writes, stats.flushes, stats.errors), (1, 1, 1, 0));
    assert!(driver.interrupts() >= 3);
}

#[test]
fn parts_may_be_cut_anywhere() {
    let (mut driver, device) = Driver::on_memory();
    device.write_at(0, &[5; 1024]).unwrap();
    driver.header(0, 0);
    // Header in two, data in three uneven parts, of which two are neighbours.
    let used = driver.run(&[
        (HEADER, 5, NEXT, 1),
        (HEADER + 5, 11, NEXT, 2),
        (DATA, 100, NEXT | WRITE, 3),
        (DATA + 100, 411, NEXT | WRITE, 4),
        (DATA + 0x1000, 513, NEXT | WRITE, 5),
        (STATUS, 1, WRITE, 0),
    ]);
    assert_eq!((driver.status(), used), (0, 1025));
    assert_eq!(driver.bytes::<511>(DATA), [5; 511]);
    assert_eq!(driver.bytes::<514>(DATA + 0x1000)[512..], [5, 0]);

    driver.ram.write(DATA, &[9; 100]).unwrap();
    driver.ram.write(DATA + 0x1000, &[8; 412]).unwrap();
    driver.header(1, 2);
    driver.run(&[
        (HEADER, 16, NEXT, 1),
        (DATA, 100, NEXT, 2),
        (DATA + 0x1000, 412, NEXT, 3),
        (STATUS, 1, WRITE, 0),
    ]);
    assert_eq!(driver.status(), 0);
    let mut sector = [0; 512];
    device.read_at(1024, &mut sector).unwrap();
    assert_eq!((sector[99], sector[100]), (9, 8));
}

#[test]
fn the_serial_zeroes_and_discard_work() {
    let (mut driver, device) = Driver::on_memory();
    assert_eq!(driver.request(8, 0, 20, true), (0, 21));
    assert!(driver.bytes::<20>(DATA).starts_with(b"serial-7\0"));
    for kind in [13, 11] {
        device.write_at(4096, &[1; 8192]).unwrap();
        let mut range = 8_u64.to_le_bytes().to_vec();
        range.extend(8_u32.to_le_bytes());
        range.extend(0_u32.to_le_bytes());
        driver.ram.write(DATA, &range).unwrap();
        assert_eq!(driver.request(kind, 0, 16, false).0, 0, "kind {kind}");
        let mut after = [1; 512];
        device.read_at(8192, &mut after).unwrap();
        assert_eq!(after, [1; 512], "only the range");
    }
    let mut zeroed = [1; 4096];
    device.write_at(4096, &[1; 4096]).unwrap();
    assert_eq!(driver.request(13, 0, 16, false).0, 0);
    device.read_at(4096, &mut zeroed).unwrap();
    assert_eq!(zeroed, [0; 4096]);
}

#[test]
fn a_request_beyond_the_disk_fails_and_the_next_one_works() {
    let (mut driver, _device) = Driver::on_memory();
    let last = DISK_BYTES / 512 - 1;
    for (sector, len) in [(last, 1024), (last + 1, 512), (u64::MAX, 512), (u64::MAX / 512, 4096), (0, 511)] {
        for (kind, to_guest) in [(0, true), (1, false)] {
            assert_eq!(driver.request(kind, sector, len, to_guest), (1, 1), "{len} bytes at sector {sector}");
        }
    }
    assert_eq!(driver.request(99, 0, 512, true).0, 2, "an unknown kind is unsupported");
    assert_eq!(driver.request(0, last, 512, true), (0, 513));
    assert!(driver.disk.stats().errors >= 10);
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let mut driver = Driver::started(Arc::new(MemoryDevice::new(DISK_BYTES)), true);
    assert_ne!(driver.register(0x10) & 1 << 5, 0, "it says so");
    for kind in [1, 11, 13] {
        assert_eq!(driver.request(kind, 0, 16 * 512, false).0, 1, "kind {kind}");
    }
    assert_eq!(driver.request(0, 0, 512, true).0, 0);
}

#[test]
fn without_the_flush_feature_a_write_is_stable_when_it_completes() {
    let stuck = Arc::new(Stuck::default());
    let mut driver = Driver::new(stuck.clone(), false);
    driver.start(VERSION_1);
    driver.header(1, 0);
    driver.describe(DESCRIPTORS, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT, 2), (STATUS, 1, WRITE, 0)]);
    driver.post(0);
    let request = stuck.waiting.lock().unwrap().pop().unwrap();
    assert!(matches!(request.op, blockio::IoOp::Write { fua: true, .. }), "{request:?}");
    (request.done)(Ok(()));
}

// Invariant H3: drained means that the device has nothing in flight, not that it takes nothing new.
#[test]
fn a_drain_waits_for_what_is_in_flight() {
    let stuck = Arc::new(Stuck::default());
    let mut driver = Driver::started(stuck.clone(), false);
    driver.header(0, 0);
    driver
        .describe(DESCRIPTORS, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)]);
    driver.post(0);
    let request = stuck.waiting.lock().unwrap().pop().unwrap();
    std::thread::scope(|scope| {
        let drained = scope.spawn(|| driver.disk.hold_and_drain());
        assert_eq!(driver.used_index(), 0);
        (request.done)(Ok(()));
        drained.join().unwrap().unwrap();
    });
    assert_eq!(driver.used_index(), 1);
    driver.post(0);
    assert!(stuck.waiting.lock().unwrap().is_empty(), "a held disk takes no request");
    driver.disk.release();
    driver.disk.take_requests();
    assert_eq!(stuck.waiting.lock().unwrap().len(), 1, "and finds it afterwards");
}

// Invariant H4: the mark comes after the data.
#[test]
fn a_page_is_dirty_after_the_disk_has_filled_it() {
    let stuck = Arc::new(Stuck::default());
    let mut driver = Driver::started(stuck.clone(), false);
    let dirty = |driver: &Driver| {
        let slice = driver.ram.map().get_slice(GuestAddress(DATA), 4096).unwrap();
        slice.bitmap().dirty_at(0)
    };
    driver.header(0, 0);
    driver.describe(
        DESCRIPTORS,
        &[(HEADER, 16, NEXT, 1), (DATA, 4096, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)],
    );
    driver.post(0);
    assert!(!dirty(&driver));
    let request = stuck.waiting.lock().unwrap().pop().unwrap();
    (request.done)(Ok(()));
    assert!(dirty(&driver));
}

#[test]
fn a_failed_part_fails_the_request() {
    let stuck = Arc::new(Stuck::default());
    let mut driver = Driver::started(stuck.clone(), false);
    driver.header(0, 0);
    driver.describe(
        DESCRIPTORS,
        &[
            (HEADER, 16, NEXT, 1),
            (DATA, 512, NEXT | WRITE, 2),
            (DATA + 0x1000, 512, NEXT | WRITE, 3),
            (STATUS, 1, WRITE, 0),
        ],
    );
    driver.post(0);
    let mut parts = std::mem::take(&mut *stuck.waiting.lock().unwrap());
    assert_eq!(parts.len(), 2, "each part goes straight to its memory");
    (parts.remove(0).done)(Err(blockio::IoError::Closed));
    assert_eq!(driver.used_index(), 0, "not before all parts are done");
    (parts.remove(0).done)(Ok(()));
    assert_eq!((driver.used_index(), driver.status()), (1, 1));
    assert!(driver.disk.stats().last_error.is_some());
}

/// A device that has no space for changes, until it is given some.
struct Full {
    inner: MemoryDevice,
    full: std::sync::atomic::AtomicBool,
    done: std::sync::Mutex<Vec<u64>>,
}

impl BlockDevice for Full {
    fn geometry(&self) -> blockio::Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: blockio::IoRequest) {
        if let blockio::IoOp::Write { offset, .. } = request.op {
            if self.full.load(std::sync::atomic::Ordering::SeqCst) {
                return (request.done)(Err(blockio::IoError::NoSpace { what: "the volume is full".into() }));
            }
            self.done.lock().unwrap().push(offset);
        }
        self.inner.submit(request);
    }
}

// Nothing is acknowledged that is not written; what waits is done in the guest's order, once there is space.
#[test]
fn a_request_without_space_waits_unanswered_and_is_done_in_order_when_there_is_some() {
    use std::sync::atomic::Ordering::SeqCst;
    let device = Arc::new(Full {
        inner: MemoryDevice::new(DISK_BYTES),
        full: true.into(),
        done: std::sync::Mutex::default(),
    });
    let mut driver = Driver::started(device.clone(), false);
    driver.ram.write(DATA, &[6; 512]).unwrap();
    // Two writes with headers of their own, so that both can be in flight.
    for (number, sector) in [(0_u16, 8_u64), (1, 2)] {
        let header = HEADER + u64::from(number) * 16;
        let mut bytes = 1_u32.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        driver.ram.write(header, &bytes).unwrap();
        driver.ram.write(STATUS + u64::from(number), &[0xee]).unwrap();
        let first = number * 3;
        driver.describe(
            DESCRIPTORS + u64::from(first) * 16,
            &[
                (header, 16, NEXT, first + 1),
                (DATA, 512, NEXT, first + 2),
                (STATUS + u64::from(number), 1, WRITE, 0),
            ],
        );
        driver.post(first);
    }
    assert_eq!((driver.used_index(), driver.bytes::<2>(STATUS)), (0, [0xee; 2]), "nothing is answered");
    let why = driver.disk.stall_reason().expect("they wait");
    assert!(why.starts_with("2 requests wait") && why.contains("the volume is full"), "{why}");
    let drained = driver.disk.hold_and_drain().expect_err("a drain says at once that it cannot be");
    assert_eq!(drained.in_flight, 2);
    driver.disk.release();

    driver.disk.retry();
    assert_eq!((driver.used_index(), driver.disk.stall_reason().is_some()), (0, true), "still full");
    device.full.store(false, SeqCst);
    driver.disk.retry();
    driver.disk.hold_and_drain().expect("all is done");
    assert_eq!((driver.used_index(), driver.bytes::<2>(STATUS)), (2, [0; 2]));
    assert_eq!(*device.done.lock().unwrap(), [8 * 512, 2 * 512], "in the guest's order");
    assert_eq!((driver.disk.stats().writes, driver.disk.stats().errors), (2, 0));
    // Reads and failures of another kind are answered as ever.
    assert!(driver.disk.stall_reason().is_none());
}

#[test]
fn a_driver_that_waits_for_each_request_is_told_from_one_that_does_not() {
    let device = Arc::new(Stuck::default());
    let mut driver = Driver::started(device.clone(), false);
    driver.header(0, 0);
    let complete = || {
        let request = device.waiting.lock().unwrap().remove(0);
        (request.done)(Ok(()));
    };
    for head in [0, 3] {
        let at = DESCRIPTORS + u64::from(head) * 16;
        driver.describe(
            at,
            &[
                (HEADER, 16, NEXT, head + 1),
                (DATA, 512, NEXT | WRITE, head + 2),
                (STATUS + u64::from(head), 1, WRITE, 0),
            ],
        );
    }
    for _ in 0..8 {
        assert!(!driver.disk.queue.one_at_a_time());
        driver.post(0);
        complete();
    }
    assert!(driver.disk.queue.one_at_a_time());
    driver.post(0);
    driver.post(3);
    complete();
    assert!(!driver.disk.queue.one_at_a_time(), "another one is in flight");
    complete();
    assert!(!driver.disk.queue.one_at_a_time(), "it has to show that again");
}
