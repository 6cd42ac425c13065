//! Snapshots, merges, compactions and resizes below guests that go on: every read gives what was written last, and at the end
//! every image of the chain is what it must be. The target of a migration sees all of it.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockio::{BlockDevice, IoOp};
use common::{Folder, MIB, Random, assert_sound, bytes_at, path};
use vhdx::{Builder, Disk, ErrorKind, NewSize, Spec};

const GUESTS: u64 = 3;
const SIZE: u64 = 12 * MIB;

fn folder(names: &[&str]) -> Folder {
    let mut folder = Folder::default();
    folder.base("0.vhdx", &Spec { block_bytes: MIB, ..Spec::dynamic(SIZE) });
    names.iter().for_each(|name| drop(folder.add(name)));
    folder
}

/// Writes, zeroes and reads back sectors of its own, among those of the others in every block. What they hold at the end.
fn guest(disk: &Disk, owner: u64, stop: &AtomicBool, rounds: &AtomicU64) -> BTreeMap<u64, u64> {
    let (mut random, mut held) = (Random(owner + 77), BTreeMap::new());
    let mut stamp = owner << 40;
    while !stop.load(Ordering::SeqCst) {
        let sector = random.below(SIZE / 512 / GUESTS) * GUESTS + owner;
        stamp += 1;
        if random.below(6) == 0 {
            let op = IoOp::WriteZeroes { offset: sector * 512, len: 512, may_unmap: true };
            disk.run(op).expect("it zeroes");
            held.insert(sector, 0);
        } else {
            disk.write_at(sector * 512, &stamp.to_le_bytes().repeat(64)).expect("it is writable");
            held.insert(sector, stamp);
        }
        if random.below(16) == 0 {
            disk.flush().expect("it flushes");
        }
        let (other, stamp) = held
            .iter()
            .nth(usize::try_from(random.below(held.len() as u64)).expect("small"))
            .expect("it is there");
        assert_eq!(bytes_at(disk, other * 512, 512), stamp.to_le_bytes().repeat(64), "sector {other}");
        rounds.fetch_add(1, Ordering::SeqCst);
    }
    held
}

/// Runs `change` below guests at work; what every sector holds at the end.
fn below_guests(disk: &Disk, change: impl FnOnce(&dyn Fn())) -> BTreeMap<u64, u64> {
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    // Between two changes every guest gets something done.
    let settle = || {
        let wanted = rounds.load(Ordering::SeqCst) + 60;
        while rounds.load(Ordering::SeqCst) < wanted {
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        let (stop, rounds) = (&stop, &rounds);
        let guests: Vec<_> =
            (0..GUESTS).map(|owner| scope.spawn(move || guest(disk, owner, stop, rounds))).collect();
        change(&settle);
        stop.store(true, Ordering::SeqCst);
        guests.into_iter().flat_map(|guest| guest.join().expect("no guest fails")).collect()
    })
}

fn assert_holds(device: &dyn BlockDevice, held: &BTreeMap<u64, u64>, why: &str) {
    for (sector, stamp) in held {
        let found = bytes_at(device, sector * 512, 512);
        assert_eq!(found, stamp.to_le_bytes().repeat(64), "{why}: sector {sector}");
    }
}

#[test]
fn guests_lose_nothing_while_their_chain_grows_shrinks_and_moves() {
    let names = ["1.avhdx", "2.avhdx", "3.avhdx", "4.avhdx"];
    let mut folder = folder(&names);
    let disk = folder.disk("0.vhdx");
    let file = |name: &str| Arc::clone(&folder.0[&path(name)]);
    let held = below_guests(&disk, |settle| {
        settle();
        disk.snapshot(&file("1.avhdx"), &path("1.avhdx")).expect("it forks");
        settle();
        disk.snapshot(&file("2.avhdx"), &path("2.avhdx")).expect("it forks");
        settle();
        disk.merge_parent(&file("1.avhdx"), &file("0.vhdx"), &mut |_| settle()).expect("it merges");
        // Its file may go now: nobody may find it and take it for a child.
        file("1.avhdx").set_len(0).expect("memory shrinks");
        settle();
        disk.compact(&mut |_| ControlFlow::Continue(())).expect("it is compacted");
        disk.resize(NewSize::ExpandTo(SIZE + 3 * MIB)).expect("it grows");
        settle();
        disk.snapshot(&file("3.avhdx"), &path("3.avhdx")).expect("it forks");
        settle();
        // The parent below is shorter than what is merged into it.
        disk.merge_parent(&file("2.avhdx"), &file("0.vhdx"), &mut |_| settle()).expect("it merges");
        file("2.avhdx").set_len(0).expect("memory shrinks");
        disk.resize(NewSize::UnsafelyTo(SIZE)).expect("it shrinks");
        settle();
    });
    assert_holds(&disk, &held, "at work");
    assert_eq!(disk.parent().map(|parent| parent.parents()), Some(0));
    disk.close().expect("it closes");
    drop(disk);
    for name in ["1.avhdx", "2.avhdx"] {
        folder.0.remove(&path(name));
    }
    assert_holds(&folder.image("3.avhdx"), &held, "closed");
    for name in ["0.vhdx", "3.avhdx"] {
        assert_sound(&folder.0[&path(name)]);
    }
}

// Invariants E6, H2: what was read before the hand-over does not count, and another image is no surprise.
#[test]
fn the_target_of_a_migration_follows_a_snapshot_of_the_source() {
    let folder = folder(&["1.avhdx"]);
    let source = folder.disk("0.vhdx");
    source.write_at(0, &[1; 4096]).expect("it is writable");
    source.flush().expect("it flushes");
    let early = folder.open("0.vhdx").inactive().expect("a live log does not matter");
    let file = Arc::clone(&folder.0[&path("1.avhdx")]);
    let mut recorded = false;
    let record = || {
        recorded = true;
        Ok(())
    };
    source.snapshot_when(&file, &path("1.avhdx"), record).expect("it forks");
    assert!(recorded);
    // The target learns from the record which image it is now, and looks again as often as it likes.
    let target = folder.open("1.avhdx").inactive().expect("it is whole");
    assert_eq!((early.parents(), target.parents()), (0, 1));
    source.write_at(4096, &[2; 4096]).expect("it is writable");
    source.flush().expect("it flushes");
    let target = target.reread().expect("a live log does not matter").reread().expect("nor the second time");
    source.write_at(8192, &[3; 4096]).expect("it is writable");
    let closed = source.close().expect("it closes");
    drop(source);
    // The image that the source began in is not the one that was handed over; it has a child, too.
    let error = early.activate_handed_over(closed.file_write_id).expect_err("it is another image");
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let error = folder.open("0.vhdx").writable().expect_err("it has a child");
    assert_eq!(error.kind(), ErrorKind::HasChildren, "{error}");
    let disk = target.activate_handed_over(closed.file_write_id).expect("it was handed over");
    for (at, byte) in [(0, 1), (4096, 2), (8192, 3)] {
        assert_eq!(bytes_at(&disk, at, 4096), [byte; 4096]);
    }
    disk.write_at(0, &[4; 512]).expect("it is writable");
    disk.close().expect("it closes");
    assert_eq!(bytes_at(&folder.image("0.vhdx"), 0, 4096), [1; 4096], "the snapshot is what it was");
}

#[test]
fn a_standby_reads_through_a_merge_of_the_source() {
    let folder = folder(&["1.avhdx", "2.avhdx"]);
    let source = folder.disk("0.vhdx");
    let file = |name: &str| Arc::clone(&folder.0[&path(name)]);
    for (name, byte) in [("1.avhdx", 1), ("2.avhdx", 2)] {
        source.write_at(u64::from(byte) * MIB, &[byte; 4096]).expect("it is writable");
        source.snapshot(&file(name), &path(name)).expect("it forks");
    }
    let target = folder.open("2.avhdx").inactive().expect("it is whole");
    source.merge_parent(&file("1.avhdx"), &file("0.vhdx"), &mut |_| ()).expect("it merges");
    let closed = source.close().expect("it closes");
    assert_eq!(target.parents(), 2, "as it was when it was looked at");
    let target = target.reread().expect("the chain is one shorter");
    assert_eq!(target.parents(), 1);
    let disk = target.activate_handed_over(closed.file_write_id).expect("it was handed over");
    for byte in [1, 2] {
        assert_eq!(bytes_at(&disk, u64::from(byte) * MIB, 4096), [byte; 4096]);
    }
}

// Reads take no lock; a reader of the whole disk during a snapshot sees no moment without content.
#[test]
fn a_reader_never_sees_a_gap_while_images_are_exchanged() {
    let folder = folder(&["1.avhdx", "2.avhdx", "3.avhdx"]);
    let disk = folder.disk("0.vhdx");
    disk.write_at(0, &vec![9; 4 << 20]).expect("it is writable");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut reads = 0_u64;
                    while !stop.load(Ordering::SeqCst) || reads < 20 {
                        assert!(bytes_at(&disk, 0, 4 << 20).iter().all(|byte| *byte == 9), "read {reads}");
                        reads += 1;
                    }
                })
            })
            .collect();
        for name in ["1.avhdx", "2.avhdx", "3.avhdx"] {
            disk.snapshot(&Arc::clone(&folder.0[&path(name)]), &path(name)).expect("it forks");
            disk.give_back().expect("it is given back");
        }
        stop.store(true, Ordering::SeqCst);
        readers.into_iter().for_each(|reader| reader.join().expect("no read fails"));
    });
    drop(disk);
    drop(Builder::open(Arc::clone(&folder.0[&path("0.vhdx")])));
}
