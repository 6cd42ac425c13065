//! Images go back and forth between this library and qemu, and neither finds fault with the other's.

mod common;

use std::path::Path;
use std::sync::Arc;

use blockio::{BlockDevice, ImageFile};
use common::{
    MIB, Random, assert_sound, bytes_at, content_hash, image_file, new_file, qemu_img, read_only, run,
    sha256, text,
};
use vhdx::{Builder, Spec, from_raw};

/// What both sides must agree on, in memory.
struct Model(Vec<u8>);

impl Model {
    fn new(len: u64) -> Self {
        Self(vec![0; usize::try_from(len).expect("small disk")])
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let at = usize::try_from(offset).expect("small disk");
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn hash(&self, folder: &Path) -> String {
        let path = folder.join("model.raw");
        std::fs::write(&path, &self.0).expect("the test folder is writable");
        sha256(&path)
    }
}

fn qemu_hash(path: &Path, folder: &Path) -> String {
    let raw = folder.join("qemu.raw");
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", text(path), text(&raw)]);
    sha256(&raw)
}

fn qemu_check(path: &Path) {
    qemu_img(&["check", "-q", "-f", "vhdx", text(path)]);
}

fn qemu_write(path: &Path, writes: &[(u64, u64, u8)]) {
    let mut command = std::process::Command::new("qemu-io");
    command.args(["-f", "vhdx"]);
    for (offset, len, value) in writes {
        command.args(["-c", &format!("write -q -P {value} {offset} {len}")]);
    }
    run(command.arg(path));
}

/// Writes by us, then by qemu, in turns; each reads the other's.
fn take_turns(path: &Path, folder: &Path, size: u64, rounds: u64, seed: u64) {
    let (mut random, mut model) = (Random(seed), Model::new(size));
    let writes = |random: &mut Random| -> Vec<(u64, u64, u8)> {
        let one = |_| {
            let offset = random.below(size / 512) * 512;
            let len = ((random.below(300) + 1) * 512).min(size - offset);
            (offset, len, u8::try_from(random.below(250) + 1).expect("small"))
        };
        (0..8).map(one).collect()
    };
    for round in 0..rounds {
        // The size that a device knows is of the time when it was opened: anew after each of qemu's turns.
        let file = image_file(path);
        let disk = Builder::open(Arc::clone(&file)).writable().expect("it opens for writing");
        for (number, (offset, len, value)) in writes(&mut random).into_iter().enumerate() {
            let bytes = vec![value; usize::try_from(len).expect("small")];
            disk.write_at(offset, &bytes).expect("it is writable");
            model.put(offset, &bytes);
            if number % 3 == 0 {
                disk.flush().expect("it flushes");
            }
        }
        disk.close().expect("it closes");
        assert_sound(&file);
        qemu_check(path);
        assert_eq!(qemu_hash(path, folder), model.hash(folder), "round {round}: qemu reads what we wrote");

        let theirs = writes(&mut random);
        qemu_write(path, &theirs);
        for (offset, len, value) in theirs {
            model.put(offset, &vec![value; usize::try_from(len).expect("small")]);
        }
        let file = image_file(path);
        assert_sound(&file);
        assert_eq!(
            content_hash(&read_only(&file), folder),
            model.hash(folder),
            "round {round}: we read what qemu wrote"
        );
    }
}

fn ours_and_theirs(spec: &Spec, seed: u64) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("disk.vhdx");
    vhdx::create(&*new_file(&path), spec).expect("it is created");
    qemu_check(&path);
    take_turns(&path, folder.path(), spec.size_bytes, 4, seed);
}

#[test]
fn dynamic_images_of_ours_live_with_qemu() {
    ours_and_theirs(&Spec { block_bytes: MIB, ..Spec::dynamic(23 * MIB + 512) }, 1);
    ours_and_theirs(&Spec { block_bytes: 2 * MIB, physical_sector: 512, ..Spec::dynamic(24 * MIB) }, 2);
    ours_and_theirs(&Spec::dynamic(40 * MIB), 3);
}

#[test]
fn a_hundred_turns_of_each_leave_nothing_to_complain_of() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("disk.vhdx");
    let spec = Spec { block_bytes: MIB, ..Spec::dynamic(12 * MIB) };
    vhdx::create(&*new_file(&path), &spec).expect("it is created");
    take_turns(&path, folder.path(), spec.size_bytes, 100, 9);
}

#[test]
fn images_of_a_killed_qemu_are_read_and_go_on() {
    for at in 0..12 {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("disk.vhdx");
        qemu_img(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M", text(&path), "200M"]);
        killed_while_allocating(&path, 12 * MIB + at * 3 * MIB);
        let content = |file: &Arc<dyn ImageFile>| -> Vec<u8> {
            let image = read_only(file);
            (0..200).map(|block| uniform(&bytes_at(&image, block * MIB, 65536))).collect()
        };
        let file = image_file(&path);
        let before = content(&file);
        // Its log may name no entry at all: that is what repair is for, and only for that.
        let disk = Builder::open(Arc::clone(&file)).repair(true).writable().expect("it opens for writing");
        disk.write_at(199 * MIB, &[9; 65536]).expect("it goes on");
        disk.close().expect("it closes");
        drop(disk);
        let file = image_file(&path);
        assert_sound(&file);
        qemu_check(&path);
        let after = content(&file);
        assert_eq!((&after[..199], after[199]), (&before[..199], 9), "killed at {at}");
    }
}

/// Lets qemu write to one new block after the other, and kills it as soon as the file has some size.
fn killed_while_allocating(path: &Path, file_bytes: u64) {
    let mut command = std::process::Command::new("qemu-io");
    command.args(["-f", "vhdx", "-t", "writethrough"]).stdout(std::process::Stdio::null());
    for block in 0..199 {
        command.args(["-c", &format!("write -q -P 7 {block}M 64k")]);
    }
    let mut qemu = command.arg(path).spawn().expect("qemu-io starts");
    while std::fs::metadata(path).expect("the image is there").len() < file_bytes {
        if qemu.try_wait().expect("it is our child").is_some() {
            break;
        }
        std::thread::yield_now();
    }
    qemu.kill().expect("it is our child");
    qemu.wait().expect("it ends");
}

/// The byte that all of them are; nothing of a block is there without the rest.
fn uniform(bytes: &[u8]) -> u8 {
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a block is mixed");
    bytes[0]
}

#[test]
fn fixed_images_of_ours_live_with_qemu() {
    ours_and_theirs(&Spec { block_bytes: 2 * MIB, ..Spec::fixed(21 * MIB) }, 4);
}

#[test]
fn images_of_qemu_live_with_us() {
    for (seed, options) in [
        (5, "subformat=dynamic,block_size=1M"),
        (6, "subformat=fixed"),
        (7, "block_size=0"),
        (10, "block_size=2M"),
        (11, "block_size=32M"),
        (12, "block_size=256M"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("disk.vhdx");
        let size = 20 * MIB + 1536;
        qemu_img(&["create", "-q", "-f", "vhdx", "-o", options, text(&path), &size.to_string()]);
        take_turns(&path, folder.path(), size, 4, seed);
    }
}

#[test]
fn a_converted_image_is_the_same_in_qemu_and_back() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (size, mut random) = (37 * MIB + 4096 + 512, Random(8));
    let mut model = Model::new(size);
    for _ in 0..60 {
        let offset = random.below(size / 512 - 400) * 512;
        model.put(offset, &vec![u8::try_from(random.below(255) + 1).expect("small"); 130_000]);
    }
    let raw = folder.path().join("source.raw");
    std::fs::write(&raw, &model.0).expect("the test folder is writable");
    for (name, spec) in [
        ("dynamic", Spec { block_bytes: MIB, ..Spec::dynamic(size) }),
        ("windows", Spec::dynamic(size)),
        ("fixed", Spec { block_bytes: 2 * MIB, ..Spec::fixed(size) }),
    ] {
        let path = folder.path().join(name);
        let (mut calls, mut last) = (0, None);
        let done = from_raw(&*image_file(&raw), None, &*new_file(&path), &spec, &mut |progress| {
            calls += 1;
            last = Some(progress);
        });
        assert_eq!(Some(done.expect("it converts")), last);
        assert!(calls > 30, "progress is told along the way");
        qemu_check(&path);
        let file = image_file(&path);
        assert_sound(&file);
        let hash = model.hash(folder.path());
        assert_eq!(qemu_hash(&path, folder.path()), hash, "{name} read by qemu");
        assert_eq!(content_hash(&read_only(&file), folder.path()), hash, "{name} read by us");
    }
}

#[test]
fn a_disk_of_zeros_converts_to_an_image_without_blocks() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let raw = new_file(&folder.path().join("zeros.raw"));
    raw.set_len(64 * MIB).expect("it grows");
    let file = new_file(&folder.path().join("zeros.vhdx"));
    let done = from_raw(&raw, None, &*file, &Spec::dynamic(64 * MIB), &mut |_| ()).expect("it converts");
    assert_eq!(done.data_bytes, 0);
    assert_eq!(vhdx::info(&file).expect("it is an image").blocks.present, 0);
}

#[test]
fn a_dirty_image_of_ours_is_replayed_by_qemu_and_by_us_alike() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("disk.vhdx");
    let spec = Spec { block_bytes: MIB, ..Spec::dynamic(200 * MIB) };
    vhdx::create(&*new_file(&path), &spec).expect("it is created");
    let file = image_file(&path);
    let disk = Builder::open(Arc::clone(&file)).writable().expect("it opens for writing");
    // More flushes than one half of the ring takes, so the run lies in the second half, behind another one.
    for block in 0..100_u8 {
        disk.write_at(u64::from(block) * 2 * MIB, &[block + 1; 4096]).expect("it is writable");
        disk.flush().expect("it flushes");
    }
    // As a kill: nothing more is written.
    drop(disk);
    let ours = content_hash(&read_only(&file), folder.path());
    qemu_img(&["check", "-q", "-r", "all", "-f", "vhdx", text(&path)]);
    assert_eq!(qemu_hash(&path, folder.path()), ours);
    let file = image_file(&path);
    assert_eq!(bytes_at(&read_only(&file), 198 * MIB, 4096), [100; 4096]);
}

#[test]
fn disks_with_4096_byte_sectors_work_without_qemu() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = new_file(&folder.path().join("disk.vhdx"));
    let spec = Spec { logical_sector: 4096, block_bytes: 256 * MIB, ..Spec::dynamic(1000 * MIB) };
    vhdx::create(&*file, &spec).expect("it is created");
    let disk = Builder::open(Arc::clone(&file)).writable().expect("it opens for writing");
    disk.write_at(0, &[1; 512]).expect_err("half a sector is refused");
    disk.write_at(999 * MIB, &[9; 8192]).expect("it is writable");
    disk.close().expect("it closes");
    assert_sound(&file);
    assert_eq!(bytes_at(&read_only(&file), 999 * MIB, 8192), [9; 8192]);
}
