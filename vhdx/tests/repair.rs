//! A check names what is wrong, a repair puts right what needs no guess, and nothing else is touched.

mod common;

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, MemoryDevice, Recorder, Unflushed};
use common::{MIB, assert_sound, bytes_at, image_file, read_only, unpack};
use vhdx::{Builder, Defect, Report, Spec, check, repair};

const KIB: u64 = 1024;
const BAT: u64 = 3 * MIB;

fn image() -> Arc<dyn ImageFile> {
    let file = MemoryDevice::with_block_bytes(0, 1);
    vhdx::create(&file, &Spec { block_bytes: MIB, ..Spec::dynamic(8 * MIB) }).expect("it is created");
    let file: Arc<dyn ImageFile> = Arc::new(file);
    let disk = Builder::open(Arc::clone(&file)).writable().expect("it opens for writing");
    disk.write_at(2 * MIB, &[5; 4096]).expect("it is writable");
    disk.close().expect("it closes");
    file
}

fn damage(file: &Arc<dyn ImageFile>, offset: u64) {
    let byte = bytes_at(file, offset, 1)[0];
    file.write_at(offset, &[!byte]).expect("it is writable");
}

/// One way to damage an image, and what the check calls it.
type Case = (&'static str, fn(&Arc<dyn ImageFile>));

const CASES: [Case; 6] = [
    ("header_copy", |file| damage(file, 64 * KIB + 200)),
    ("header_copy", |file| damage(file, 128 * KIB + 8)),
    ("region_table_copy", |file| damage(file, 192 * KIB + 20)),
    ("region_table_copy", |file| damage(file, 256 * KIB)),
    // A block that says zero, with a place in the middle of another.
    ("stale_offsets", |file| file.write_at(BAT, &((4 * MIB) | 2).to_le_bytes()).expect("it is writable")),
    ("leaked_space", |file| file.set_len(file.geometry().size_bytes + 3 * MIB + 512).expect("it grows")),
];

fn codes(report: &Report) -> Vec<&'static str> {
    report.defects.iter().map(Defect::code).collect()
}

#[test]
fn each_defect_is_named_and_put_right() {
    assert_eq!(codes(&assert_sound(&image())), [""; 0]);
    for (code, break_it) in CASES {
        let file = image();
        let before = vhdx::info(&file).expect("it is an image");
        break_it(&file);
        assert_eq!(codes(&assert_sound(&file)), [code]);
        let done = repair(&file).expect("it is repaired");
        assert_eq!(done.repaired.iter().map(Defect::code).collect::<Vec<_>>(), [code]);
        assert!(
            done.report.is_sound() && done.report.defects.is_empty(),
            "{code}: {:?}",
            done.report.defects
        );
        assert_eq!(bytes_at(&read_only(&file), 2 * MIB, 4096), [5; 4096]);
        let after = vhdx::info(&file).expect("it is an image");
        assert_eq!(before.data_write_id, after.data_write_id, "{code}: children refer to this");
        assert!(repair(&file).expect("there is nothing to do").repaired.is_empty());
    }
}

#[test]
fn several_defects_are_put_right_at_once() {
    let file = image();
    for (_, break_it) in [CASES[1], CASES[2], CASES[4], CASES[5]] {
        break_it(&file);
    }
    assert_eq!(repair(&file).expect("it is repaired").repaired.len(), 4);
    assert_eq!(codes(&assert_sound(&file)), [""; 0]);
}

#[test]
fn what_a_killed_writer_left_is_replayed_or_cleared() {
    let file = image();
    let disk = Builder::open(Arc::clone(&file)).writable().expect("it opens for writing");
    disk.write_at(5 * MIB, &[6; 4096]).expect("it is writable");
    disk.flush().expect("it flushes");
    drop(disk);
    assert_eq!(codes(&check(&file))[0], "dirty_log");
    repair(&file).expect("it is repaired");
    assert_eq!(codes(&assert_sound(&file)), [""; 0]);
    assert_eq!(bytes_at(&read_only(&file), 5 * MIB, 4096), [6; 4096]);

    let folder = tempfile::tempdir().expect("a folder");
    let file = image_file(&unpack("qemu-killed-guid-no-entry.vhdx", folder.path()));
    assert!(codes(&check(&file)).contains(&"orphan_log_id"));
    repair(&file).expect("it is repaired");
    assert_eq!(codes(&assert_sound(&file)), [""; 0]);
    Builder::open(file).writable().expect("it opens without an option now");
}

#[test]
fn an_image_with_an_error_is_not_touched() {
    let file = image();
    damage(&file, 64 * KIB + 200);
    // Two blocks in one place: whose is it?
    let place = (4 * MIB) | 6;
    file.write_at(BAT, &[place.to_le_bytes(), place.to_le_bytes()].concat()).expect("it is writable");
    let size = usize::try_from(file.geometry().size_bytes).expect("small");
    let before = bytes_at(&file, 0, size);
    assert!(!check(&file).is_sound());
    repair(&file).expect_err("content would have to be guessed");
    assert!(bytes_at(&file, 0, size) == before, "it was touched");
}

// Invariant D3: a repair that was cut off can be done again.
#[test]
fn a_power_cut_during_a_repair_does_no_harm() {
    let file = image();
    for (_, break_it) in [CASES[1], CASES[2], CASES[4], CASES[5]] {
        break_it(&file);
    }
    let size = file.geometry().size_bytes;
    let copy = MemoryDevice::with_block_bytes(0, 1);
    copy.set_len(size).expect("memory grows");
    copy.write_at(0, &bytes_at(&file, 0, usize::try_from(size).expect("small"))).expect("it is writable");
    copy.flush().expect("it flushes");
    let recorder = Arc::new(Recorder::with_base(copy.fork(), copy));
    repair(&(Arc::clone(&recorder) as Arc<dyn ImageFile>)).expect("it is repaired");
    for prefix in 0..=recorder.position() {
        for choice in [
            Unflushed::None,
            Unflushed::Torn { seed: prefix as u64 },
            Unflushed::Subset { seed: prefix as u64 },
        ] {
            let cut: Arc<dyn ImageFile> = Arc::new(recorder.replay_prefix(prefix, choice));
            assert_sound(&cut);
            repair(&cut).unwrap_or_else(|error| panic!("prefix {prefix}, {choice:?}: {error}"));
            assert_eq!(codes(&assert_sound(&cut)), [""; 0], "prefix {prefix}, {choice:?}");
            assert_eq!(bytes_at(&read_only(&cut), 2 * MIB, 4096), [5; 4096]);
        }
    }
}
