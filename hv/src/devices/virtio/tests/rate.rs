//! What the way through the queue costs beside the device alone: a measurement, run by hand on a release build.
#![expect(clippy::print_stdout, clippy::disallowed_methods, reason = "a measurement, for people")]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use blockio::{BlockDevice, FileDevice, IoBuf, IoOp, IoRequest};

use super::driver::{AVAIL, DATA, DESCRIPTORS, Driver, FLUSH, HEADER, NEXT, STATUS, USED, VERSION_1, WRITE};

const QUEUE: u16 = 128;
const DEPTH: u16 = 32;
const BLOCK: u64 = 4096;
const DISK_BYTES: u64 = 256 << 20;
const REQUESTS: u32 = 60_000;
const ROUNDS: usize = 5;
const GOAL: f64 = 0.9;

/// Places in no order, the same for both sides.
fn place(number: u32) -> u64 {
    u64::from(number.wrapping_mul(2_654_435_761)) % (DISK_BYTES / BLOCK) * BLOCK
}

fn device_alone(device: &Arc<FileDevice>) -> f64 {
    let (tell, told) = channel();
    let begun = Instant::now();
    for number in 0..REQUESTS {
        if number >= u32::from(DEPTH) {
            told.recv().unwrap();
        }
        let tell = tell.clone();
        let op = IoOp::Read { offset: place(number), buf: IoBuf::zeroed(4096) };
        let done = move |outcome: Result<(), _>| {
            outcome.unwrap();
            tell.send(()).unwrap();
        };
        device.submit(IoRequest { op, done: Box::new(done) });
    }
    (0..DEPTH).for_each(|_| told.recv().unwrap());
    f64::from(REQUESTS) / begun.elapsed().as_secs_f64()
}

/// A driver that keeps so many reads posted, with descriptors that stay as they are.
fn through_the_queue(device: &Arc<FileDevice>) -> f64 {
    let mut driver = Driver::new(device.clone(), false);
    driver.start_with(VERSION_1 | FLUSH, QUEUE);
    for slot in 0..u64::from(DEPTH) {
        let first = u16::try_from(slot * 3).unwrap();
        driver.describe(
            DESCRIPTORS + slot * 48,
            &[
                (HEADER + slot * 16, 16, NEXT, first + 1),
                (DATA + slot * BLOCK, 4096, NEXT | WRITE, first + 2),
                (STATUS + slot, 1, WRITE, 0),
            ],
        );
    }
    let begun = Instant::now();
    let (mut posted, mut seen) = (0, 0u16);
    let mut free: Vec<u16> = (0..DEPTH).collect();
    while posted < REQUESTS || free.len() < usize::from(DEPTH) {
        let before = free.len();
        while posted < REQUESTS
            && let Some(slot) = free.pop()
        {
            let mut header = [0; 16];
            header[8..].copy_from_slice(&(place(posted) / 512).to_le_bytes());
            driver.ram.write(HEADER + u64::from(slot) * 16, &header).unwrap();
            let at = AVAIL + 4 + u64::from(posted % u32::from(QUEUE)) * 2;
            driver.ram.write(at, &(slot * 3).to_le_bytes()).unwrap();
            posted += 1;
        }
        if free.len() < before {
            let index = u16::try_from(posted & 0xffff).unwrap();
            driver.ram.write(AVAIL + 2, &index.to_le_bytes()).unwrap();
            driver.disk.take_requests();
        }
        while driver.used_index() == seen {
            std::hint::spin_loop();
        }
        while driver.used_index() != seen {
            let head: [u8; 4] = driver.bytes(USED + 4 + u64::from(seen % QUEUE) * 8);
            free.push(u16::try_from(u32::from_le_bytes(head) / 3).unwrap());
            seen = seen.wrapping_add(1);
        }
    }
    f64::from(REQUESTS) / begun.elapsed().as_secs_f64()
}

#[test]
#[ignore = "a measurement: cargo test --release -p hv --lib rate -- --ignored --nocapture"]
fn the_queue_keeps_nine_tenths_of_what_the_device_can_do() {
    let folder = std::env::temp_dir().join(format!("hv-rate-{}", std::process::id()));
    let device = Arc::new(FileDevice::create(&folder, DISK_BYTES).unwrap());
    for at in (0..DISK_BYTES).step_by(1 << 20) {
        device.write_at(at, &vec![7; 1 << 20]).unwrap();
    }
    let (mut alone, mut queued) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        alone.push(device_alone(&device));
        queued.push(through_the_queue(&device));
    }
    std::fs::remove_file(folder).unwrap();
    let middle = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[ROUNDS / 2]
    };
    let (alone, queued) = (middle(&mut alone), middle(&mut queued));
    println!(
        "4 KiB reads, depth {DEPTH}: device {alone:.0} IOPS, through the queue {queued:.0}: {:.2}",
        queued / alone
    );
    assert!(queued / alone >= GOAL);
}
