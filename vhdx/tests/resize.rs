//! Disks grow and shrink: offline, under a running guest, and with the power cut at any moment.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockio::{BlockDevice, ImageFile, MemoryDevice, Recorder, Unflushed};
use common::{MIB, assert_sound, bytes_at, image_file, qemu_img, read_only, text};
use vhdx::{Builder, Disk, ErrorKind, NewSize, Spec, minimum_safe_bytes, resize};

const GIB: u64 = 1024 * MIB;
/// Where the layout of ours puts the table.
const BAT: u64 = 3 * MIB;

fn image(spec: Spec) -> Arc<dyn ImageFile> {
    let file = MemoryDevice::with_block_bytes(0, 1);
    vhdx::create(&file, &Spec { block_bytes: MIB, ..spec }).expect("it is created");
    Arc::new(file)
}

fn open(file: &Arc<dyn ImageFile>) -> Disk {
    Builder::open(Arc::clone(file)).growth_bytes(2 * MIB).writable().expect("it opens for writing")
}

fn write(file: &Arc<dyn ImageFile>, offset: u64, content: &[u8]) {
    let disk = open(file);
    disk.write_at(offset, content).expect("it is writable");
    disk.close().expect("it closes");
}

fn size(file: &Arc<dyn ImageFile>) -> u64 {
    assert_sound(file);
    vhdx::info(file).expect("it is an image").disk_bytes
}

#[test]
fn a_grown_disk_has_its_old_content_and_zeros_behind_it() {
    for spec in [Spec::dynamic(4 * MIB), Spec::fixed(4 * MIB)] {
        let fixed = spec.fixed;
        let file = image(spec);
        write(&file, 4 * MIB - 512, &[5; 512]);
        let before = vhdx::info(&file).expect("it is an image");
        let resized = resize(&file, NewSize::ExpandTo(9 * MIB + 512)).expect("it grows");
        assert_eq!(
            (resized.old_bytes, resized.new_bytes, resized.table_moved),
            (4 * MIB, 9 * MIB + 512, false)
        );
        assert_eq!(size(&file), 9 * MIB + 512);
        let after = vhdx::info(&file).expect("it is an image");
        assert_ne!(before.data_write_id, after.data_write_id, "its children no longer fit");
        assert_eq!(before.disk_id, after.disk_id);
        assert_eq!(after.blocks.present, if fixed { 10 } else { 1 });
        let image = read_only(&file);
        assert_eq!(bytes_at(&image, 4 * MIB - 512, 512), [5; 512]);
        assert_eq!(bytes_at(&image, 4 * MIB, 5 * 1024 * 1024 + 512), vec![0; 5 * 1024 * 1024 + 512]);
        write(&file, 9 * MIB, &[6; 512]);
        assert_eq!(bytes_at(&read_only(&file), 9 * MIB, 512), [6; 512]);
    }
}

#[test]
fn a_table_that_no_longer_fits_its_place_moves() {
    let file = image(Spec::dynamic(GIB));
    write(&file, GIB - 4096, &[5; 4096]);
    // 1 MiB of table describes 128 GiB of 1 MiB blocks.
    let resized = resize(&file, NewSize::To(300 * GIB)).expect("it grows");
    assert!(resized.table_moved);
    assert_eq!(size(&file), 300 * GIB);
    write(&file, 299 * GIB, &[6; 512]);
    // The old place of the table is free now and is used again, zeroed.
    let disk = open(&file);
    for block in 0..8 {
        disk.write_at(block * MIB, &[7; 512]).expect("it is writable");
        assert_eq!(bytes_at(&disk, block * MIB + 512, 4096), [0; 4096]);
    }
    disk.close().expect("it closes");
    assert_sound(&file);
    let image = read_only(&file);
    assert_eq!(bytes_at(&image, GIB - 4096, 4096), [5; 4096]);
    assert_eq!(bytes_at(&image, 299 * GIB, 512), [6; 512]);
}

#[test]
fn what_lay_behind_the_old_end_never_shows() {
    let file = image(Spec::dynamic(4 * MIB + MIB / 2));
    write(&file, 4 * MIB, &[5; 4096]);
    // Another program's leftovers: bytes of the last block behind the end of the disk, and a table entry behind the last.
    let end = file.geometry().size_bytes;
    file.write_at(end - MIB / 2, &vec![0xEE; 1 << 19]).expect("it is writable");
    file.write_at(BAT + 5 * 8, &(end - MIB + 6).to_le_bytes()).expect("it is writable");
    assert_sound(&file);
    resize(&file, NewSize::To(8 * MIB)).expect("it grows");
    assert_eq!(size(&file), 8 * MIB);
    let image = read_only(&file);
    assert_eq!(bytes_at(&image, 4 * MIB, 4096), [5; 4096]);
    assert!(bytes_at(&image, 4 * MIB + 4096, 4 * 1024 * 1024 - 4096).iter().all(|byte| *byte == 0));
}

#[test]
fn what_a_shrink_cut_off_does_not_come_back() {
    let file = image(Spec::dynamic(8 * MIB));
    write(&file, 0, &vec![5; 8 * 1024 * 1024]);
    let full = file.geometry().size_bytes;
    resize(&file, NewSize::UnsafelyTo(2 * MIB + 512)).expect("it shrinks");
    assert_eq!(size(&file), 2 * MIB + 512);
    assert!(file.geometry().size_bytes <= full - 5 * MIB, "the file shrank too");
    resize(&file, NewSize::ExpandTo(8 * MIB)).expect("it grows");
    assert_eq!(size(&file), 8 * MIB);
    let content = bytes_at(&read_only(&file), 0, 8 * 1024 * 1024);
    let kept = 2 * 1024 * 1024 + 512;
    assert!(content[..kept].iter().all(|byte| *byte == 5) && content[kept..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_shrink_is_done_only_as_it_was_allowed() {
    let file = image(Spec::dynamic(64 * MIB));
    write(&file, 9 * MIB + 512, &[5; 512]);
    assert_eq!(minimum_safe_bytes(&file).expect("it is readable"), 10 * MIB);
    for refused in
        [NewSize::ExpandTo(63 * MIB), NewSize::To(9 * MIB), NewSize::To(100), NewSize::UnsafelyTo(0)]
    {
        let error = resize(&file, refused).expect_err("it is not allowed");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{refused:?}: {error}");
        assert_eq!(size(&file), 64 * MIB);
    }
    resize(&file, NewSize::To(12 * MIB)).expect("it is safe");
    resize(&file, NewSize::ToMinimumSafe).expect("it is safe");
    assert_eq!(size(&file), 10 * MIB);
    assert_eq!(bytes_at(&read_only(&file), 9 * MIB + 512, 512), [5; 512]);
}

#[test]
fn partitions_count_for_the_safe_size_and_the_backup_of_their_table_does_not() {
    let file = image(Spec::dynamic(64 * MIB));
    let disk = open(&file);
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"EFI PART");
    for (at, value) in [(24, 1_u64), (32, 64 * 2048 - 1), (72, 2)] {
        header[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    header[80..88].copy_from_slice(&[128, 0, 0, 0, 128, 0, 0, 0]);
    let mut entry = [0; 512];
    entry[..16].fill(1);
    entry[40..48].copy_from_slice(&(20 * 2048_u64 - 1).to_le_bytes());
    disk.write_at(512, &header).expect("it is writable");
    disk.write_at(1024, &entry).expect("it is writable");
    disk.write_at(64 * MIB - 512, &header).expect("it is writable");
    disk.close().expect("it closes");
    assert_eq!(minimum_safe_bytes(&file).expect("it is readable"), 21 * MIB, "20 MiB and the backup");
    // A table that makes no sense counts as data.
    entry[40..48].fill(0xFF);
    write(&file, 1024, &entry);
    assert_eq!(minimum_safe_bytes(&file).expect("it is readable"), 64 * MIB);
}

#[test]
fn a_running_guest_gets_a_larger_disk_and_loses_nothing() {
    let file = image(Spec::dynamic(8 * MIB));
    let disk = open(&file);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut stamp = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                stamp += 1;
                let block = stamp % 8;
                disk.write_at(block * MIB, &stamp.to_le_bytes().repeat(64)).expect("it is writable");
                assert_eq!(bytes_at(&disk, block * MIB, 512)[..8], stamp.to_le_bytes());
            }
            stamp
        });
        for step in 1..20 {
            disk.resize(NewSize::ExpandTo((8 + step) * MIB)).expect("it grows");
            assert_eq!(disk.geometry().size_bytes, (8 + step) * MIB);
            disk.write_at((7 + step) * MIB, &[9; 512]).expect("the new part is writable");
        }
        let error = disk.resize(NewSize::ExpandTo(MIB)).expect_err("it is no growth");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        stop.store(true, Ordering::SeqCst);
        assert!(guest.join().expect("the guest ends") > 0);
    });
    disk.resize(NewSize::UnsafelyTo(8 * MIB)).expect("it shrinks");
    disk.read_at(8 * MIB, &mut [0; 512]).expect_err("it is past the end");
    disk.close().expect("it closes");
    assert_eq!(size(&file), 8 * MIB);
}

/// A child over a parent full of sevens; some of its blocks are here, some in part, some zero.
fn family(parent_bytes: u64, child_bytes: u64) -> common::Folder {
    let mut folder = common::Folder::default();
    folder.base("base", &Spec { block_bytes: 2 * MIB, ..Spec::dynamic(parent_bytes) });
    let disk = folder.disk("base");
    disk.write_at(0, &vec![7; usize::try_from(parent_bytes).expect("small")]).expect("it is writable");
    disk.close().expect("it closes");
    drop(disk);
    folder.child("child", "base", |spec| spec.size_bytes = Some(child_bytes));
    folder
}

// What a child gains is zeros, whatever its parent has there: [MS-VHDX] leaves NOT_PRESENT to the parent.
#[test]
fn a_child_that_grows_shows_nothing_of_its_parent_in_what_it_gains() {
    type Prepare = fn(&Disk);
    let last_block: [(&str, Prepare); 4] = [
        ("the parent shows", |_| ()),
        ("some sectors are here", |disk| disk.write_at(3 * MIB, &[1; 1024]).expect("it is writable")),
        ("all that the disk has of it is here", |disk| {
            disk.write_at(3 * MIB, &[1; 4096]).expect("it is writable");
        }),
        ("it is zero", |disk| {
            let op = blockio::IoOp::WriteZeroes { offset: 3 * MIB, len: 4096, may_unmap: true };
            disk.run(op).expect("it zeroes");
        }),
    ];
    for (name, prepare) in last_block {
        for wanted in [3 * MIB + 8192, 6 * MIB, 9 * MIB + 512, 300 * GIB] {
            let folder = family(7 * MIB, 3 * MIB + 4096);
            let disk = folder.disk("child");
            disk.write_at(512, &[2; 512]).expect("it is writable");
            prepare(&disk);
            disk.close().expect("it closes");
            drop(disk);
            let mut model = bytes_at(&folder.image("child"), 0, 3 << 20 | 4096);
            let resized = folder.open("child").resize(NewSize::ExpandTo(wanted)).expect("it grows");
            assert_eq!(resized.new_bytes, wanted);
            assert_sound(&folder.0[&common::path("child")]);
            let seen = usize::try_from(wanted.min(10 * MIB)).expect("small");
            model.resize(seen, 0);
            let image = folder.image("child");
            assert!(bytes_at(&image, 0, seen) == model, "{name}, {wanted}");
            assert_eq!(image.parents(), 1);
            drop(image);
            // The rest goes on as any block does.
            let disk = folder.disk("child");
            disk.write_at(3 * MIB + 4096, &[3; 512]).expect("it is writable");
            disk.write_at(wanted - 512, &[4; 512]).expect("it is writable");
            disk.close().expect("it closes");
            model[3 << 20 | 4096..][..512].fill(3);
            if wanted <= 10 * MIB {
                model[seen - 512..].fill(4);
            }
            assert!(bytes_at(&folder.image("child"), 0, seen) == model, "{name}, {wanted}, written");
        }
    }
}

#[test]
fn what_a_child_lost_does_not_come_back_from_its_parent() {
    for cut in [MIB + 512, 2 * MIB, 4 * MIB + 8192] {
        let folder = family(7 * MIB, 7 * MIB);
        let disk = folder.disk("child");
        disk.write_at(4 * MIB + 512, &[2; 512]).expect("it is writable");
        disk.write_at(5 * MIB, &vec![3; 2 << 20]).expect("it is writable");
        // In use, as a guest sees it.
        disk.resize(NewSize::UnsafelyTo(cut)).expect("it shrinks");
        assert_eq!(disk.geometry().size_bytes, cut);
        disk.resize(NewSize::ExpandTo(7 * MIB)).expect("it grows");
        let content = bytes_at(&disk, 0, 7 << 20);
        disk.close().expect("it closes");
        drop(disk);
        let kept = usize::try_from(cut).expect("small");
        let mut wanted = vec![7; kept];
        if cut > 4 * MIB {
            wanted[4 << 20 | 512..][..512].fill(2);
        }
        wanted.resize(7 << 20, 0);
        assert!(content == wanted, "{cut}");
        assert!(bytes_at(&folder.image("child"), 0, 7 << 20) == wanted, "{cut}, after a close");
        assert_sound(&folder.0[&common::path("child")]);
    }
}

#[test]
fn the_safe_size_of_a_child_counts_what_its_parent_has() {
    let folder = family(4 * MIB, 9 * MIB);
    let disk = folder.disk("child");
    disk.write_at(5 * MIB, &[1; 512]).expect("it is writable");
    let op = blockio::IoOp::WriteZeroes { offset: 5 * MIB, len: MIB, may_unmap: true };
    disk.run(op).expect("it zeroes");
    disk.close().expect("it closes");
    drop(disk);
    assert_eq!(folder.image("child").minimum_safe_bytes().expect("it is readable"), 4 * MIB);
    folder.open("child").resize(NewSize::To(3 * MIB)).expect_err("the parent has data there");
    folder.open("child").resize(NewSize::ToMinimumSafe).expect("it is safe");
    assert_eq!(folder.image("child").geometry().size_bytes, 4 * MIB);
    // Without leave to look for its parent nobody knows what is safe.
    let file = Arc::clone(&folder.0[&common::path("child")]);
    let error = resize(&file, NewSize::ExpandTo(9 * MIB)).expect_err("where is the parent?");
    assert_eq!(error.kind(), ErrorKind::ParentNotFound);
}

#[test]
fn qemu_reads_a_resized_image() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk.vhdx");
    vhdx::create(&*common::new_file(&path), &Spec { block_bytes: MIB, ..Spec::dynamic(4 * MIB) })
        .expect("it is created");
    write(&image_file(&path), 3 * MIB, &[5; 4096]);
    for (step, size) in [6 * MIB + 512, 200 * GIB, 5 * MIB].into_iter().enumerate() {
        resize(&image_file(&path), NewSize::UnsafelyTo(size)).expect("it is resized");
        qemu_img(&["check", "-f", "vhdx", text(&path)]);
        assert!(
            qemu_img(&["info", "-f", "vhdx", text(&path)]).contains(&format!("({size} bytes)")),
            "step {step}"
        );
    }
    let raw = folder.path().join("disk.raw");
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", text(&path), text(&raw)]);
    assert_eq!(bytes_at(&image_file(&raw), 3 * MIB, 4096), [5; 4096]);
}

/// A copy of a file, all of it durable, that records what happens to it.
fn recorder_of(file: &Arc<dyn ImageFile>) -> Arc<Recorder<MemoryDevice>> {
    let size = file.geometry().size_bytes;
    let copy = MemoryDevice::with_block_bytes(0, 1);
    copy.set_len(size).expect("memory grows");
    copy.write_at(0, &bytes_at(file, 0, usize::try_from(size).expect("small"))).expect("it is writable");
    copy.flush().expect("it flushes");
    Arc::new(Recorder::with_base(copy.fork(), copy))
}

/// Every power cut during `change` leaves the disk at its old or its new size, with what is common to both.
fn cut_anywhere(spec: Spec, prepare: impl FnOnce(&Arc<dyn ImageFile>), size: NewSize) {
    let file = image(spec);
    prepare(&file);
    let old = bytes_at(&read_only(&file), 0, usize::try_from(self::size(&file)).expect("small"));
    let recorder = recorder_of(&file);
    let resized = resize(&(Arc::clone(&recorder) as Arc<dyn ImageFile>), size).expect("it is resized");
    for prefix in 0..=recorder.position() {
        let seed = prefix as u64;
        let mut choices = vec![Unflushed::None, Unflushed::All, Unflushed::Torn { seed }];
        choices.extend((0..4).map(|more| Unflushed::Subset { seed: seed + 1_000_003 * more }));
        for choice in choices {
            let cut: Arc<dyn ImageFile> = Arc::new(recorder.replay_prefix(prefix, choice));
            let why = format!("prefix {prefix} of {}, {choice:?}", recorder.position());
            assert!(vhdx::check(&cut).is_sound(), "{why}: {:?}", vhdx::check(&cut).errors);
            drop(open(&cut));
            let found = self::size(&cut);
            assert!([resized.old_bytes, resized.new_bytes].contains(&found), "{why}: {found}");
            judge(&cut, &old, &why);
            // Growing over what a torn shrink left shows nothing of it.
            resize(&cut, NewSize::UnsafelyTo(found.max(resized.old_bytes) + 2 * MIB)).expect("it grows");
            judge(&cut, &old[..kept(found, &old)], &why);
        }
    }
}

fn kept(size: u64, old: &[u8]) -> usize {
    usize::try_from(size).expect("small").min(old.len())
}

fn judge(file: &Arc<dyn ImageFile>, old: &[u8], why: &str) {
    let image = read_only(file);
    let size = image.geometry().size_bytes;
    let content = bytes_at(&image, 0, usize::try_from(size).expect("small"));
    let (before, after) = content.split_at(kept(size, old));
    assert!(before == &old[..before.len()], "{why}: what was there");
    assert!(after == vec![0; after.len()], "{why}: what is new");
}

// Invariants D1, D3, G1: one log entry is the commit point, and replaying it again changes nothing.
#[test]
fn a_power_cut_during_a_growth_leaves_the_old_or_the_new_disk() {
    let prepare = |file: &Arc<dyn ImageFile>| {
        write(file, MIB, &vec![5; 1 << 20]);
        write(file, 2 * MIB, &[6; 4096]);
    };
    cut_anywhere(Spec::dynamic(2 * MIB + MIB / 2), prepare, NewSize::To(5 * MIB));
    cut_anywhere(Spec::fixed(2 * MIB + MIB / 2), prepare, NewSize::To(5 * MIB));
}

#[test]
fn a_power_cut_while_the_table_moves_leaves_the_old_or_the_new_disk() {
    let start = image(Spec::dynamic(2 * MIB));
    write(&start, MIB, &[5; 4096]);
    let recorder = recorder_of(&start);
    resize(&(Arc::clone(&recorder) as Arc<dyn ImageFile>), NewSize::To(130 * GIB)).expect("it grows");
    for prefix in 0..=recorder.position() {
        for seed in 0..2_u64 {
            let choice = if seed == 0 {
                Unflushed::None
            } else {
                Unflushed::Subset { seed: seed * 77 + prefix as u64 }
            };
            let cut: Arc<dyn ImageFile> = Arc::new(recorder.replay_prefix(prefix, choice));
            drop(open(&cut));
            assert!([2 * MIB, 130 * GIB].contains(&size(&cut)), "prefix {prefix}, {choice:?}");
            assert_eq!(bytes_at(&read_only(&cut), MIB, 4096), [5; 4096], "prefix {prefix}, {choice:?}");
        }
    }
}

#[test]
fn a_power_cut_during_a_shrink_leaves_the_old_or_the_new_disk() {
    let prepare = |file: &Arc<dyn ImageFile>| write(file, 0, &vec![5; 5 << 20]);
    cut_anywhere(Spec::dynamic(5 * MIB), prepare, NewSize::UnsafelyTo(2 * MIB + MIB / 2));
}
