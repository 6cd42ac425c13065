//! A guest that breaks the rules harms itself only (H7).

use std::sync::Arc;

use crate::devices::virtio::VirtioDevice;

use super::driver::{
    AVAIL, DATA, DESCRIPTORS, Descriptor, Driver, EVENT_INDEX, FLUSH, HEADER, INDIRECT, NEXT, QUEUE_SIZE,
    RAM_BYTES, STATUS, Stuck, USED, VERSION_1, WRITE,
};

const NEEDS_RESET: u32 = 64;

/// Runs a chain that must come back without a status.
fn comes_back_untouched(what: &str, descriptors: &[Descriptor]) {
    let (mut driver, _device) = Driver::on_memory();
    driver.header(0, 0);
    assert_eq!(driver.run(descriptors), 0, "{what}");
    assert_eq!(driver.status(), 0xee, "{what}");
    assert_eq!(driver.request(0, 0, 512, true), (0, 513), "after {what} the disk works");
}

#[test]
fn chains_that_make_no_sense_come_back_untouched() {
    comes_back_untouched("a chain that points to itself", &[(HEADER, 16, NEXT, 0)]);
    comes_back_untouched(
        "a loop of two",
        &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 0), (STATUS, 1, WRITE, 0)],
    );
    comes_back_untouched(
        "a next outside of the table",
        &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 999)],
    );
    comes_back_untouched("no place for a status", &[(HEADER, 16, NEXT, 1), (DATA, 512, 0, 0)]);
    comes_back_untouched("a header of 15 bytes", &[(HEADER, 15, NEXT, 1), (STATUS, 1, WRITE, 0)]);
    comes_back_untouched(
        "readable parts behind writable ones",
        &[(DATA, 512, NEXT | WRITE, 1), (HEADER, 16, NEXT, 2), (STATUS, 1, WRITE, 0)],
    );
    comes_back_untouched("a status outside of RAM", &[(HEADER, 16, NEXT, 1), (RAM_BYTES, 1, WRITE, 0)]);
    comes_back_untouched("a status at the end of all", &[(HEADER, 16, NEXT, 1), (u64::MAX, 2, WRITE, 0)]);
    comes_back_untouched("a header outside of RAM", &[(u64::MAX - 3, 16, NEXT, 1), (STATUS, 1, WRITE, 0)]);
    comes_back_untouched("only empty parts", &[(HEADER, 0, NEXT, 1), (STATUS, 0, WRITE, 0)]);
    comes_back_untouched("an indirect table of odd length", &[(DATA, 17, INDIRECT, 0)]);
    comes_back_untouched("an indirect table outside of RAM", &[(RAM_BYTES, 32, INDIRECT, 0)]);
}

#[test]
fn an_indirect_table_works_and_a_table_in_a_table_does_not() {
    let (mut driver, device) = Driver::on_memory();
    blockio::BlockDevice::write_at(&*device, 0, &[3; 512]).unwrap();
    let table = DATA + 0x8000;
    driver.header(0, 0);
    driver.describe(table, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)]);
    assert_eq!(driver.run(&[(table, 48, INDIRECT, 0)]), 513);
    assert_eq!((driver.status(), driver.bytes::<512>(DATA)), (0, [3; 512]));
    driver.describe(table, &[(table, 48, INDIRECT, 0)]);
    assert_eq!(driver.run(&[(table, 48, INDIRECT, 0)]), 0);
    // A table that loops among its own entries.
    driver.describe(table, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 1)]);
    assert_eq!(driver.run(&[(table, 32, INDIRECT, 0)]), 0);
    // A table with more entries than a request may have parts.
    let long: Vec<Descriptor> = (0..1000).map(|i| (DATA, 0, NEXT, i + 1)).collect();
    driver.describe(table, &long);
    assert_eq!(driver.run(&[(table, 16000, INDIRECT, 0)]), 0);
}

#[test]
fn data_outside_of_ram_and_huge_lengths_fail_the_request() {
    for (address, len) in [
        (RAM_BYTES, 512),
        (RAM_BYTES - 512, 1024),
        (u64::MAX - 511, 512),
        (DATA, u32::MAX),
        (DATA, 0xffff_fe00),
        (0xd000_0000, 512),
    ] {
        for (kind, flags) in [(0, WRITE), (1, 0), (8, WRITE), (13, 0)] {
            let (mut driver, _device) = Driver::on_memory();
            driver.header(kind, 0);
            driver.run(&[(HEADER, 16, NEXT, 1), (address, len, NEXT | flags, 2), (STATUS, 1, WRITE, 0)]);
            // A chain above 4 GiB in total is none at all.
            assert!([1, 0xee].contains(&driver.status()), "kind {kind}: {len} bytes at {address:#x}");
            assert_eq!(driver.request(0, 0, 512, true).0, 0);
        }
    }
}

#[test]
fn an_available_index_that_jumps_breaks_the_queue_until_a_reset() {
    let (mut driver, _device) = Driver::on_memory();
    driver.ram.write(AVAIL + 2, &(QUEUE_SIZE + 1).to_le_bytes()).unwrap();
    driver.disk.take_requests();
    assert_ne!(driver.register(0x70) & NEEDS_RESET, 0);
    assert_ne!(driver.register(0x60) & 2, 0, "told by a configuration interrupt");
    driver.start(VERSION_1 | FLUSH);
    assert_eq!(driver.register(0x70), 15);
    assert_eq!(driver.request(0, 0, 512, true), (0, 513));
}

#[test]
fn a_head_that_is_posted_again_and_again_is_bounded() {
    let stuck = Arc::new(Stuck::default());
    let mut driver = Driver::started(stuck.clone(), false);
    driver.header(0, 0);
    driver
        .describe(DESCRIPTORS, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)]);
    for _ in 0..100 {
        driver.post(0);
    }
    let taken = std::mem::take(&mut *stuck.waiting.lock().unwrap());
    assert_eq!(taken.len(), usize::from(QUEUE_SIZE));
    assert_ne!(driver.register(0x70) & NEEDS_RESET, 0);
    taken.into_iter().for_each(|request| (request.done)(Ok(())));
}

#[test]
fn rings_full_of_noise_do_no_harm() {
    noise_in_rings(VERSION_1 | FLUSH);
    noise_in_rings(VERSION_1 | FLUSH | EVENT_INDEX);
}

fn noise_in_rings(features: u64) {
    let mut noise = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        noise
    };
    let (mut driver, _device) = Driver::on_memory();
    driver.start(features);
    for round in 0..300 {
        // Whatever it says about what it wants to hear of, and about what the device wants.
        for at in [AVAIL, AVAIL + 4 + u64::from(QUEUE_SIZE) * 2, USED, USED + 4 + u64::from(QUEUE_SIZE) * 8] {
            driver.ram.write(at, &random().to_le_bytes()[..2]).unwrap();
        }
        for at in (DESCRIPTORS..DESCRIPTORS + 256).step_by(16) {
            // Mostly inside RAM, of small lengths and with sensible flags, so that many get far.
            let (a, b) = (random(), random());
            let address = if a & 7 == 0 { random() } else { a % RAM_BYTES };
            let len = if b & 7 == 0 { b >> 32 } else { b >> 32 & 0xfff };
            let tail = len & 0xffff_ffff | (b & 7) << 32 | (b >> 3 & 15) << 48;
            driver.ram.write(at, &address.to_le_bytes()).unwrap();
            driver.ram.write(at + 8, &tail.to_le_bytes()).unwrap();
        }
        driver.header(u32::try_from(random() % 14).unwrap(), random() % 4096);
        driver.post(u16::try_from(random() % 20).unwrap());
        driver.disk.hold_and_drain().unwrap();
        driver.disk.release();
        if round % 50 == 49 {
            driver.start(features);
            assert_eq!(driver.request(0, 0, 512, true), (0, 513), "round {round}");
        }
    }
}
