//! Space is given back while the guest goes on, and nobody notices but the file system below.

mod common;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockio::{BlockDevice, ImageFile, IoBuf, IoOp, MemoryDevice, Recorder, Unflushed};
use common::{MIB, Random, assert_sound, bytes_at, read_only};
use vhdx::{Builder, Compacted, Disk, ErrorKind, Spec};

const BLOCKS: u64 = 32;

fn image(spec: Spec) -> Arc<dyn ImageFile> {
    let file = MemoryDevice::with_block_bytes(0, 1);
    vhdx::create(&file, &Spec { block_bytes: MIB, ..spec }).expect("it is created");
    Arc::new(file)
}

fn open(file: &Arc<dyn ImageFile>) -> Disk {
    Builder::open(Arc::clone(file)).growth_bytes(4 * MIB).writable().expect("it opens for writing")
}

fn compact(disk: &Disk) -> Compacted {
    disk.compact(&mut |_| ControlFlow::Continue(())).expect("it is compacted")
}

fn stamp(block: u64) -> Vec<u8> {
    (block + 1).to_le_bytes().repeat(64)
}

/// Every block written, then every other one given up, and each eighth zeroed by hand.
fn swiss_cheese(file: &Arc<dyn ImageFile>) {
    let disk = open(file);
    for block in 0..BLOCKS {
        disk.write_at(block * MIB + 512, &stamp(block)).expect("it is writable");
        // The last sector too, so that a copy that is cut short shows.
        disk.write_at((block + 1) * MIB - 512, &stamp(block)).expect("it is writable");
    }
    disk.flush().expect("it flushes");
    for block in (0..BLOCKS).step_by(2) {
        disk.run(IoOp::Discard { offset: block * MIB, len: MIB }).expect("it takes discards");
    }
    for block in (1..BLOCKS).step_by(8) {
        disk.write_at(block * MIB, &vec![0; 1 << 20]).expect("it is writable");
    }
    disk.close().expect("it closes");
}

fn expected(block: u64) -> Vec<u8> {
    if block.is_multiple_of(2) || block % 8 == 1 { vec![0; 512] } else { stamp(block) }
}

fn assert_cheese(file: &Arc<dyn ImageFile>, why: &str) {
    let image = read_only(file);
    for block in 0..BLOCKS {
        assert_eq!(bytes_at(&image, block * MIB + 512, 512), expected(block), "{why}: block {block}");
        assert_eq!(
            bytes_at(&image, (block + 1) * MIB - 512, 512),
            expected(block),
            "{why}: end of block {block}"
        );
        assert_eq!(bytes_at(&image, block * MIB + 1024, 4096), [0; 4096], "{why}: rest of block {block}");
    }
}

#[test]
fn gaps_and_zero_blocks_are_given_back_and_children_still_fit() {
    let file = image(Spec::dynamic(BLOCKS * MIB));
    swiss_cheese(&file);
    let before = vhdx::info(&file).expect("it is an image");
    let disk = open(&file);
    let done = compact(&disk);
    disk.close().expect("it closes");
    let after = vhdx::info(&file).expect("it is an image");
    assert_sound(&file);
    assert_cheese(&file, "compacted");
    assert_eq!((done.zero_blocks, done.cancelled), (4, false));
    assert!(done.moved_blocks > 0);
    assert_eq!(after.blocks.present, BLOCKS / 2 - 4);
    assert_eq!(
        after.file_bytes,
        4 * MIB + after.blocks.present * MIB,
        "nothing but areas and blocks is left"
    );
    assert_eq!((done.old_file_bytes, done.new_file_bytes), (before.file_bytes, after.file_bytes));
    assert_eq!(before.data_write_id, after.data_write_id, "children refer to this");
    assert_ne!(before.file_write_id, after.file_write_id);
}

#[test]
fn a_guest_that_writes_after_a_compaction_is_announced_to_children() {
    let file = image(Spec::dynamic(BLOCKS * MIB));
    swiss_cheese(&file);
    let before = vhdx::info(&file).expect("it is an image").data_write_id;
    let disk = open(&file);
    let mut wrote = false;
    disk.compact(&mut |progress| {
        // In the session that the compaction began.
        if progress.moved_blocks > 0 && !wrote {
            disk.write_at(MIB * 3 + 512, &stamp(3)).expect("it is writable");
            wrote = true;
        }
        ControlFlow::Continue(())
    })
    .expect("it is compacted");
    assert!(wrote);
    disk.close().expect("it closes");
    assert_ne!(before, vhdx::info(&file).expect("it is an image").data_write_id);
    assert_cheese(&file, "written meanwhile");
}

#[test]
fn guests_that_write_meanwhile_lose_nothing() {
    let file = image(Spec::dynamic(BLOCKS * MIB));
    swiss_cheese(&file);
    let disk = open(&file);
    let stop = AtomicBool::new(false);
    let content: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let guests: Vec<_> = (0..3)
            .map(|owner| {
                scope.spawn({
                    let (disk, stop) = (&disk, &stop);
                    move || guest(disk, owner, stop)
                })
            })
            .collect();
        for _ in 0..6 {
            compact(&disk);
        }
        stop.store(true, Ordering::SeqCst);
        guests.into_iter().flat_map(|guest| guest.join().expect("a guest ends")).collect()
    });
    disk.close().expect("it closes");
    assert_sound(&file);
    let image = read_only(&file);
    for (sector, stamp) in content {
        assert_eq!(bytes_at(&image, sector * 512, 512)[..8], stamp.to_le_bytes(), "sector {sector}");
    }
}

/// Writes, zeroes and discards; what its own sectors hold at the end. Discards hit only blocks of its own.
fn guest(disk: &Disk, owner: u64, stop: &AtomicBool) -> Vec<(u64, u64)> {
    let mut random = Random(owner + 3);
    let mut content = std::collections::BTreeMap::new();
    let mut stamp = 0_u64;
    while !stop.load(Ordering::SeqCst) {
        stamp += 1;
        let sector = random.below(BLOCKS * MIB / 512 / 3 - 1) * 3 + owner;
        match random.below(8) {
            0 => {
                let op = IoOp::WriteZeroes { offset: sector * 512, len: 512, may_unmap: true };
                disk.run(op).expect("it zeroes");
                content.insert(sector, 0);
            }
            more => {
                let buf = IoBuf::zeroed(512);
                buf.copy_from(&stamp.to_le_bytes().repeat(64));
                disk.run(IoOp::Write { offset: sector * 512, buf, fua: more == 1 }).expect("it is writable");
                content.insert(sector, stamp);
            }
        }
        assert_eq!(bytes_at(disk, sector * 512, 512)[..8], content[&sector].to_le_bytes(), "sector {sector}");
    }
    content.into_iter().collect()
}

// Invariants C5, C7, D1: a place is named only after its content is durable, and reused only after it was dropped durably.
#[test]
fn a_power_cut_during_a_compaction_loses_nothing() {
    let file = image(Spec::dynamic(BLOCKS * MIB));
    swiss_cheese(&file);
    let size = file.geometry().size_bytes;
    let copy = MemoryDevice::with_block_bytes(0, 1);
    copy.set_len(size).expect("memory grows");
    copy.write_at(0, &bytes_at(&file, 0, usize::try_from(size).expect("small"))).expect("it is writable");
    copy.flush().expect("it flushes");
    let recorder = Arc::new(Recorder::with_base(copy.fork(), copy));
    let disk = open(&(Arc::clone(&recorder) as Arc<dyn ImageFile>));
    // Twice, so that places which were given up are written again.
    compact(&disk);
    compact(&disk);
    disk.close().expect("it closes");
    for prefix in 0..=recorder.position() {
        let seed = prefix as u64;
        let choices = [
            Unflushed::None,
            Unflushed::Torn { seed },
            Unflushed::Subset { seed },
            Unflushed::Subset { seed: seed + 9_999 },
        ];
        for choice in choices {
            let cut: Arc<dyn ImageFile> = Arc::new(recorder.replay_prefix(prefix, choice));
            let why = format!("prefix {prefix} of {}, {choice:?}", recorder.position());
            assert!(vhdx::check(&cut).is_sound(), "{why}: {:?}", vhdx::check(&cut).errors);
            assert_cheese(&cut, &why);
        }
    }
}

#[test]
fn a_compaction_can_be_cancelled_and_what_it_did_stays() {
    let file = image(Spec::dynamic(BLOCKS * MIB));
    swiss_cheese(&file);
    let disk = open(&file);
    let mut seen = 0;
    let done = disk
        .compact(&mut |progress| {
            seen = progress.zero_blocks;
            if progress.zero_blocks == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .expect("it stops in order");
    assert!(done.cancelled && done.zero_blocks == 2 && seen == 2);
    disk.close().expect("it closes");
    assert_sound(&file);
    assert_cheese(&file, "cancelled");
}

#[test]
fn a_fixed_image_is_not_compacted() {
    let file = image(Spec::fixed(4 * MIB));
    let disk = open(&file);
    let error = disk.compact(&mut |_| ControlFlow::Continue(())).expect_err("it keeps its space");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    disk.close().expect("it closes");
}
