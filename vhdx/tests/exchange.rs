//! The image behind a disk is closed, changed and opened again while the guest goes on.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use blockio::{BlockDevice, FaultDevice, ImageFile, IoBuf, IoError, IoOp, IoRequest, MemoryDevice, OpKind};
use common::{MIB, Random, assert_sound, bytes_at, read_only};
use vhdx::{Builder, Disk, ErrorKind, Spec};

fn memory() -> Arc<dyn ImageFile> {
    let file = MemoryDevice::new(0);
    vhdx::create(&file, &Spec { block_bytes: MIB, ..Spec::dynamic(64 * MIB) }).expect("it is created");
    Arc::new(file)
}

fn open(file: &Arc<dyn ImageFile>) -> Disk {
    Builder::open(Arc::clone(file)).growth_bytes(8 * MIB).writable().expect("it opens for writing")
}

/// Writes its own sectors until told to stop; what they hold at the end.
fn guest(disk: &Disk, owner: u64, stop: &AtomicBool) -> Vec<(u64, [u8; 8])> {
    let mut random = Random(owner + 7);
    let mut content = std::collections::BTreeMap::new();
    let mut stamp = 0_u64;
    while !stop.load(Ordering::SeqCst) {
        stamp += 1;
        let sector = random.below(64 * MIB / 512 / 4) * 4 + owner;
        let buf = IoBuf::zeroed(512);
        buf.copy_from(&stamp.to_le_bytes().repeat(64));
        disk.run(IoOp::Write { offset: sector * 512, buf, fua: stamp.is_multiple_of(16) })
            .expect("it is writable");
        content.insert(sector, stamp.to_le_bytes());
        assert_eq!(bytes_at(disk, sector * 512, 512)[..8], stamp.to_le_bytes());
    }
    content.into_iter().collect()
}

#[test]
fn no_request_is_lost_or_refused_while_the_image_is_exchanged() {
    let file = memory();
    let disk = open(&file);
    let stop = AtomicBool::new(false);
    let content: Vec<_> = std::thread::scope(|scope| {
        let guests: Vec<_> = (0..4)
            .map(|owner| {
                scope.spawn({
                    let (disk, stop) = (&disk, &stop);
                    move || guest(disk, owner, stop)
                })
            })
            .collect();
        for _ in 0..50 {
            disk.give_back().expect("it is closed and opened again");
        }
        stop.store(true, Ordering::SeqCst);
        guests.into_iter().flat_map(|guest| guest.join().expect("a guest ends")).collect()
    });
    disk.close().expect("it closes");
    assert_sound(&file);
    let image = read_only(&file);
    for (sector, stamp) in content {
        assert_eq!(bytes_at(&image, sector * 512, 512)[..8], stamp, "sector {sector}");
    }
}

#[test]
fn space_that_was_grown_and_not_used_is_given_back_without_a_close() {
    let file = memory();
    let disk = open(&file);
    disk.write_at(0, &[1; 512]).expect("it is writable");
    let grown = file.geometry().size_bytes;
    disk.give_back().expect("it is closed and opened again");
    let cut = file.geometry().size_bytes;
    assert!(cut < grown, "{cut} is not less than {grown}");
    disk.write_at(5 * MIB, &[2; 512]).expect("the disk goes on");
    disk.close().expect("it closes");
    assert_eq!(bytes_at(&read_only(&file), 5 * MIB, 512), [2; 512]);
}

// Invariant D6: what is durable after a failed flush is not known, so nobody may go on.
#[test]
fn a_file_that_fails_during_an_exchange_stops_the_disk_and_answers_everyone() {
    let inner = MemoryDevice::new(0);
    vhdx::create(&inner, &Spec { block_bytes: MIB, ..Spec::dynamic(64 * MIB) }).expect("it is created");
    let fault = Arc::new(FaultDevice::new(inner));
    let disk = open(&(Arc::clone(&fault) as Arc<dyn ImageFile>));
    disk.write_at(0, &[1; 512]).expect("it is writable");
    disk.flush().expect("it flushes");
    fault.fail(OpKind::Flush, 1, 5);
    disk.give_back().expect_err("the file failed");
    let (tell, told) = channel();
    let done = Box::new(move |outcome| drop(tell.send(outcome)));
    disk.submit(IoRequest { op: IoOp::Flush, done });
    let outcome = told.recv().expect("it is answered");
    assert!(matches!(outcome, Err(IoError::Poisoned { .. })), "{outcome:?}");
    assert_eq!(disk.close().expect_err("it is stopped").kind(), ErrorKind::Poisoned);
    drop(disk);
    let survivor: Arc<dyn ImageFile> = Arc::new(fault.inner().fork());
    assert_eq!(bytes_at(&open(&survivor), 0, 512), [1; 512]);
    assert_sound(&survivor);
}

#[test]
fn a_closed_disk_is_not_opened_again() {
    let file = memory();
    let disk = open(&file);
    let closed = disk.close().expect("it closes");
    disk.give_back().expect_err("it is closed");
    assert_eq!(disk.close().expect("closing again changes nothing"), closed);
}
