//! Snapshots and merges: the guest reads the same bytes before, during and after, and a cut anywhere leaves a chain that does.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockio::{BlockDevice, ImageFile, IoOp, MemoryDevice, Recorder, Unflushed};
use common::{Folder, MIB, Random, assert_sound, bytes_at, path};
use vhdx::{Disk, ErrorKind, Spec, merge};

const SIZE: u64 = 6 * MIB;

fn folder() -> Folder {
    let mut folder = Folder::default();
    folder.base("0", &Spec { block_bytes: 2 * MIB, ..Spec::dynamic(SIZE) });
    folder
}

/// Random writes, zeroes and discards; the model follows.
fn scribble(disk: &Disk, model: &mut [u8], random: &mut Random, rounds: u64) {
    let index = |value: u64| usize::try_from(value).expect("small");
    for _ in 0..rounds {
        let sector = random.below(SIZE / 512);
        let sectors = (random.below(40) + 1).min(SIZE / 512 - sector);
        let range = index(sector * 512)..index((sector + sectors) * 512);
        let value = u8::try_from(random.below(255) + 1).expect("small");
        match random.below(8) {
            0 => {
                let op = IoOp::WriteZeroes { offset: sector * 512, len: sectors * 512, may_unmap: true };
                disk.run(op).expect("it zeroes");
                model[range].fill(0);
            }
            1 => {
                let block = random.below(SIZE / (2 * MIB)) * 2 * MIB;
                disk.run(IoOp::WriteZeroes { offset: block, len: 2 * MIB, may_unmap: true })
                    .expect("it zeroes");
                model[index(block)..index(block + 2 * MIB)].fill(0);
            }
            _ => {
                disk.write_at(sector * 512, &vec![value; range.len()]).expect("it is writable");
                model[range].fill(value);
            }
        }
    }
}

fn content(device: &dyn BlockDevice) -> Vec<u8> {
    bytes_at(device, 0, usize::try_from(SIZE).expect("small"))
}

#[test]
fn a_guest_does_not_notice_a_snapshot_and_the_snapshot_keeps_what_was() {
    let mut folder = folder();
    let (mut model, mut random) = (vec![0; usize::try_from(SIZE).expect("small")], Random(11));
    let file = folder.add("1");
    let disk = folder.disk("0");
    scribble(&disk, &mut model, &mut random, 60);
    let kept = model.clone();
    disk.snapshot(&file, &path("1")).expect("it forks");
    assert!(content(&disk) == model);
    scribble(&disk, &mut model, &mut random, 60);
    assert!(content(&disk) == model);
    disk.close().expect("it closes");
    drop(disk);
    assert!(content(&folder.image("1")) == model);
    assert!(content(&folder.image("0")) == kept);
    assert_eq!(folder.image("1").parents(), 1);
}

// Whoever keeps a record of which image is the disk changes it between the last byte of the old image and the first of the new.
#[test]
fn a_snapshot_asks_when_its_child_is_whole_and_serves_no_request_before_the_answer() {
    let mut folder = folder();
    let (mut model, mut random) = (vec![0; usize::try_from(SIZE).expect("small")], Random(12));
    let (child, disk) = (folder.add("1"), folder.disk("0"));
    scribble(&disk, &mut model, &mut random, 60);
    let (tell, told) = std::sync::mpsc::channel();
    disk.snapshot_when(&child, &path("1"), || {
        let done =
            Box::new(move |outcome: Result<(), _>| tell.send(outcome.is_ok()).expect("the test listens"));
        let buf = blockio::IoBuf::zeroed(512);
        buf.copy_from(&[0xAB; 512]);
        disk.submit(blockio::IoRequest { op: IoOp::Write { offset: 0, buf, fua: false }, done });
        assert!(content(&folder.image("1")) == model, "the child is the disk already");
        assert!(content(&folder.image("0")) == model, "and so is the image that was closed");
        assert!(told.try_recv().is_err(), "the write waits");
        Ok(())
    })
    .expect("it forks");
    assert!(told.recv().expect("it is answered"), "it was done in the child");
    model[..512].fill(0xAB);
    assert!(content(&disk) == model);
    assert_eq!(disk.parent_paths(), [path("0")]);
}

#[test]
fn a_snapshot_that_is_refused_at_the_last_moment_leaves_the_old_image_as_the_disk() {
    let mut folder = folder();
    let (mut model, mut random) = (vec![0; usize::try_from(SIZE).expect("small")], Random(13));
    let (child, disk) = (folder.add("1"), folder.disk("0"));
    scribble(&disk, &mut model, &mut random, 60);
    let no = || Err(vhdx::VhdxError::InvalidInput("the record did not change".to_owned()));
    let refused = disk.snapshot_when(&child, &path("1"), no).expect_err("it was refused");
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    assert!(content(&disk) == model && disk.parent().is_none());
    scribble(&disk, &mut model, &mut random, 60);
    disk.snapshot(&folder.add("2"), &path("2")).expect("another one is made");
    scribble(&disk, &mut model, &mut random, 60);
    assert!(content(&disk) == model);
    disk.close().expect("it closes");
}

#[test]
fn who_looks_at_a_disk_in_use_sees_a_closed_image() {
    let mut folder = folder();
    let (mut model, mut random) = (vec![0; usize::try_from(SIZE).expect("small")], Random(14));
    folder.child("1", "0", |_| ());
    let disk = folder.disk("1");
    for _ in 0..3 {
        scribble(&disk, &mut model, &mut random, 20);
        let info = disk.look(vhdx::info).expect("it is read");
        assert_eq!(info.log, vhdx::LogInfo::Clean);
        let report = disk.look(|file| Ok(vhdx::check(file))).expect("it is checked");
        assert!(report.is_sound() && report.defects.is_empty(), "{report:?}");
        let seen = disk.look_at_image(|image| Ok(content(image))).expect("it is read");
        assert!(seen == model);
    }
}

#[test]
fn requests_that_come_during_a_snapshot_are_done_after_it() {
    let mut folder = folder();
    let files = [folder.add("1"), folder.add("2"), folder.add("3")];
    let disk = folder.disk("0");
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = 0_u64;
            while !stop.load(Ordering::SeqCst) || written < 100 {
                let sector = written % (SIZE / 512);
                disk.write_at(sector * 512, &[u8::try_from(written % 251).expect("small"); 512])
                    .expect("it is writable");
                assert_eq!(
                    bytes_at(&disk, sector * 512, 512)[0],
                    u8::try_from(written % 251).expect("small")
                );
                written += 1;
            }
            written
        });
        for (number, file) in files.iter().enumerate() {
            disk.snapshot(file, &path(&(number + 1).to_string())).expect("it forks");
        }
        stop.store(true, Ordering::SeqCst);
        writer.join().expect("no write fails")
    });
    assert_eq!(disk.parent().map(|parent| parent.parents()), Some(2));
    for last in written.saturating_sub(50)..written {
        let sector = last % (SIZE / 512);
        assert_eq!(bytes_at(&disk, sector * 512, 512)[0], u8::try_from(last % 251).expect("small"));
    }
    disk.close().expect("it closes");
}

#[test]
fn a_snapshot_that_cannot_be_made_leaves_the_guest_where_it_was() {
    let folder = folder();
    let disk = folder.disk("0");
    disk.write_at(0, &[1; 512]).expect("it is writable");
    let itself = Arc::clone(&folder.0[&path("0")]);
    let error = disk.snapshot(&itself, &path("0")).expect_err("the image itself is no new file");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    disk.write_at(512, &[2; 512]).expect("it goes on");
    disk.close().expect("it closes");
    assert_eq!(bytes_at(&folder.image("0"), 0, 1024), [[1; 512], [2; 512]].concat());
}

#[test]
fn a_closed_child_is_merged_into_its_parent() {
    let mut folder = folder();
    let (mut model, mut random) = (vec![0; usize::try_from(SIZE).expect("small")], Random(12));
    let disk = folder.disk("0");
    scribble(&disk, &mut model, &mut random, 50);
    disk.close().expect("it closes");
    drop(disk);
    folder.child("1", "0", |_| ());
    let disk = folder.disk("1");
    scribble(&disk, &mut model, &mut random, 50);
    disk.close().expect("it closes");
    drop(disk);
    let (child, parent) = (Arc::clone(&folder.0[&path("1")]), Arc::clone(&folder.0[&path("0")]));
    let mut told = 0;
    merge(&child, &folder.resolver(), &path("1"), &parent, &mut |_| told += 1).expect("it merges");
    assert!(told > 0);
    assert!(content(&folder.image("0")) == model);
    assert!(content(&folder.image("1")) == model, "the child reads on until it goes");
    // Again: nothing is different, nothing is lost.
    merge(&child, &folder.resolver(), &path("1"), &parent, &mut |_| ()).expect("it merges again");
    assert!(content(&folder.image("0")) == model);
    assert_sound(&parent);
}

#[test]
fn the_parent_of_a_disk_in_use_is_merged_away() {
    let mut folder = folder();
    let (mut model, mut random) = (vec![0; usize::try_from(SIZE).expect("small")], Random(13));
    let files = [folder.add("1"), folder.add("2")];
    let disk = folder.disk("0");
    for (number, file) in files.iter().enumerate() {
        scribble(&disk, &mut model, &mut random, 40);
        disk.snapshot(file, &path(&(number + 1).to_string())).expect("it forks");
    }
    scribble(&disk, &mut model, &mut random, 20);
    let base = Arc::clone(&folder.0[&path("0")]);
    // The guest goes on while blocks are copied.
    disk.merge_parent(&files[0], &base, &mut |_| scribble(&disk, &mut model, &mut random, 3))
        .expect("it merges");
    assert!(content(&disk) == model);
    assert_eq!(disk.parent().map(|parent| parent.parents()), Some(0), "one link less");
    scribble(&disk, &mut model, &mut random, 20);
    disk.close().expect("it closes");
    drop(disk);
    folder.0.remove(&path("1"));
    assert!(content(&folder.image("2")) == model, "without the file that was merged away");
    for name in ["0", "2"] {
        assert_sound(&folder.0[&path(name)]);
    }
}

#[test]
fn the_merged_disk_is_as_large_as_the_child_was() {
    for size in [3 * MIB + 512, SIZE - 2 * MIB, SIZE + MIB, SIZE + 4 * MIB + 512] {
        let mut folder = folder();
        let (mut model, mut random) = (vec![0; usize::try_from(SIZE).expect("small")], Random(size));
        let disk = folder.disk("0");
        disk.write_at(0, &vec![7; model.len()]).expect("it is writable");
        model.fill(7);
        scribble(&disk, &mut model, &mut random, 20);
        disk.close().expect("it closes");
        drop(disk);
        folder.child("1", "0", |spec| spec.size_bytes = Some(size));
        let disk = folder.disk("1");
        model.resize(usize::try_from(size).expect("small"), 0);
        disk.write_at(size - 512, &[9; 512]).expect("it is writable");
        let end = model.len();
        model[end - 512..].fill(9);
        disk.run(IoOp::WriteZeroes { offset: MIB, len: MIB, may_unmap: true }).expect("it zeroes");
        model[1 << 20..2 << 20].fill(0);
        disk.close().expect("it closes");
        drop(disk);
        let (child, parent) = (Arc::clone(&folder.0[&path("1")]), Arc::clone(&folder.0[&path("0")]));
        merge(&child, &folder.resolver(), &path("1"), &parent, &mut |_| ()).expect("it merges");
        for name in ["0", "1"] {
            let image = folder.image(name);
            assert_eq!(image.geometry().size_bytes, size);
            assert!(bytes_at(&image, 0, model.len()) == model, "{name} of {size}");
        }
        assert_sound(&parent);
    }
}

// A merge drops what the parent says about the virtual disk and keeps what the child says.
#[test]
fn the_merged_disk_is_what_the_child_said_that_it_is() {
    const ITEMS: u64 = 2 * MIB + (64 << 10);
    let mut folder = folder();
    folder.child("1", "0", |_| ());
    let (child, parent) = (Arc::clone(&folder.0[&path("1")]), Arc::clone(&folder.0[&path("0")]));
    // Another identity and physical sector, as an administrator gives them to a child; and an item that nobody knows.
    let mut items = bytes_at(&child, ITEMS, 512);
    items[20..24].copy_from_slice(&512_u32.to_le_bytes());
    items[24..40].fill(0xAB);
    child.write_at(ITEMS, &items).expect("it is writable");
    let mut table = bytes_at(&child, 2 * MIB, 512);
    table[10] = 7;
    table[32 + 6 * 32..][..16].fill(0xCD);
    table[32 + 6 * 32 + 24] = 2;
    child.write_at(2 * MIB, &table).expect("it is writable");
    let before = vhdx::info(&parent).expect("it is an image");
    merge(&child, &folder.resolver(), &path("1"), &parent, &mut |_| ()).expect("it merges");
    let after = vhdx::info(&parent).expect("it is an image");
    assert_eq!((before.physical_sector, after.physical_sector), (4096, 512));
    assert_eq!(after.disk_id, uuid::Uuid::from_bytes([0xAB; 16]));
    assert!(assert_sound(&parent).warnings.is_empty());
    let table = bytes_at(&parent, 2 * MIB, 512);
    assert_eq!((table[10], &table[32 + 5 * 32..][..16]), (6, &[0xCD; 16][..]), "the item came along");
    folder.image("0");
}

#[test]
fn files_that_do_not_belong_together_are_not_merged() {
    let mut folder = folder();
    folder.base("other", &Spec { block_bytes: MIB, ..Spec::dynamic(SIZE) });
    folder.child("1", "0", |_| ());
    let refuse = |child: &str, parent: &str| {
        let (child_file, parent_file) = (&folder.0[&path(child)], &folder.0[&path(parent)]);
        merge(child_file, &folder.resolver(), &path(child), parent_file, &mut |_| ())
            .expect_err("it must not")
            .kind()
    };
    assert_eq!(refuse("1", "other"), ErrorKind::InvalidInput);
    assert_eq!(refuse("0", "other"), ErrorKind::InvalidInput, "it has no parent");
}

/// The cut hits one of the two files; the other is as it was at that moment, which the record of the one bounds.
#[test]
fn a_merge_that_is_cut_anywhere_loses_nothing_and_can_be_done_again() {
    let mut folder = folder();
    let (mut model, mut random) = (vec![0; usize::try_from(SIZE).expect("small")], Random(14));
    let disk = folder.disk("0");
    scribble(&disk, &mut model, &mut random, 12);
    disk.close().expect("it closes");
    drop(disk);
    folder.child("1", "0", |_| ());
    let disk = folder.disk("1");
    scribble(&disk, &mut model, &mut random, 12);
    disk.close().expect("it closes");
    drop(disk);

    let record = |name: &str| {
        let file = MemoryDevice::with_block_bytes(0, 1);
        let all = bytes_at(
            &folder.0[&path(name)],
            0,
            usize::try_from(folder.0[&path(name)].geometry().size_bytes).expect("small"),
        );
        file.set_len(all.len() as u64).expect("it grows");
        file.write_at(0, &all).expect("it is writable");
        let base = file.fork();
        Arc::new(Recorder::with_base(file, base))
    };
    let (parent, child) = (record("0"), record("1"));
    let mut live = Folder::default();
    live.0.insert(path("0"), Arc::clone(&parent) as Arc<dyn ImageFile>);
    live.0.insert(path("1"), Arc::clone(&child) as Arc<dyn ImageFile>);
    let files = (Arc::clone(&live.0[&path("1")]), Arc::clone(&live.0[&path("0")]));
    merge(&files.0, &live.resolver(), &path("1"), &files.1, &mut |_| ()).expect("it merges");

    let judge = |parent_cut: (usize, Unflushed), child_cut: (usize, Unflushed)| {
        let why = format!("parent {parent_cut:?}, child {child_cut:?}");
        let mut after = Folder::default();
        after.0.insert(path("0"), Arc::new(parent.replay_prefix(parent_cut.0, parent_cut.1)));
        after.0.insert(path("1"), Arc::new(child.replay_prefix(child_cut.0, child_cut.1)));
        let image = after.open("1").read_only().unwrap_or_else(|error| panic!("{why}: {error}"));
        assert!(content(&image) == model, "{why}");
        drop(image);
        let (child, parent) = (&after.0[&path("1")], &after.0[&path("0")]);
        merge(child, &after.resolver(), &path("1"), parent, &mut |_| ())
            .unwrap_or_else(|error| panic!("{why}: {error}"));
        assert!(content(&after.image("0")) == model, "{why}, merged again");
    };
    // First the child is told what the parent will be called, then the parent changes.
    let (parent_end, child_end) = (parent.position(), child.position());
    for cut in 0..=child_end {
        for choice in [Unflushed::None, Unflushed::Subset { seed: cut as u64 }] {
            judge((0, Unflushed::None), (cut, choice));
        }
    }
    for cut in 0..=parent_end {
        for choice in
            [Unflushed::None, Unflushed::Torn { seed: cut as u64 }, Unflushed::Subset { seed: cut as u64 }]
        {
            judge((cut, choice), (child_end, Unflushed::All));
        }
    }
}
