//! The second reader and the crate read the same from every sample, and both read what is expected.

mod common;
mod slow;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, MemoryDevice};
use common::{MIB, read_only, sha256, unpack};
use slow::Slow;

/// An unpacked sample in memory, without its zeros.
fn sample(name: &str, folder: &Path) -> Arc<dyn ImageFile> {
    let file = File::open(unpack(name, folder)).expect("it was just unpacked");
    let size = file.metadata().expect("it has a size").len();
    let memory = MemoryDevice::with_block_bytes(0, 1);
    memory.set_len(size).expect("it grows");
    let mut piece = vec![0; 1 << 16];
    for at in (0..size).step_by(piece.len()) {
        let len = file.read_at(&mut piece, at).expect("it is readable");
        if piece[..len].iter().any(|byte| *byte != 0) {
            memory.write_at(at, &piece[..len]).expect("it fits");
        }
    }
    Arc::new(memory)
}

/// Pieces of the disk that may hold something.
fn pieces(slow: &Slow) -> impl Iterator<Item = (u64, u64)> + '_ {
    let piece = |at: u64| (at, MIB.min(slow.disk_bytes - at));
    let holds = |(at, len): &(u64, u64)| slow.may_hold_data(*at, *len).expect("the BAT is sound");
    (0..slow.disk_bytes.div_ceil(MIB)).map(move |number| piece(number * MIB)).filter(holds)
}

/// SHA-256 of the whole disk. Long disks are mostly holes, but hashing them takes long.
fn hash(slow: &Slow, folder: &Path) -> String {
    let path = folder.join("slow.raw");
    let raw = File::create(&path).expect("the test folder is writable");
    raw.set_len(slow.disk_bytes).expect("it is sparse");
    for (at, len) in pieces(slow) {
        raw.write_all_at(&slow.read(at, len).expect("it is readable"), at).expect("there is room");
    }
    sha256(&path)
}

fn check(name: &str, expected: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let slow = Slow::open(&sample(name, folder.path())).expect("the second reader opens it");
    assert_eq!(hash(&slow, folder.path()), expected, "{name}");
}

/// The same pieces, read by both: all of a small image, up to some hundred of a large one, spread over it.
fn compare(name: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = sample(name, folder.path());
    let slow = Slow::open(&file).expect("the second reader opens it");
    let image = read_only(&file);
    assert_eq!(image.geometry().size_bytes, slow.disk_bytes);
    let mut compared = 0;
    let pieces: Vec<_> = pieces(&slow).collect();
    for (at, len) in pieces.iter().copied().step_by(pieces.len().div_ceil(128).max(1)) {
        let mut ours = vec![0; usize::try_from(len).expect("a piece")];
        image.read_at(at, &mut ours).expect("it is readable");
        assert!(ours == slow.read(at, len).expect("it is readable"), "{name}: the readers differ at {at}");
        compared += 1;
    }
    assert!(compared > 0, "{name} holds nothing");
}

#[test]
fn the_second_reader_reads_windows_images_as_expected() {
    check("iotest-dynamic-1G.vhdx", "d3d112d8dab7fd360609f7d5a7b769904b7a2a7d7b6b8c535f65a23293c05478");
    check("test-disk2vhd.vhdx", "96d964042be9b58dda1725567abfb0cf9fd8380e2118754afa979c2ad445938a");
    check("discutils-btrfs.vhdx", "0b959f9cb4e18348ad8b646f152178282542c8304f02fddf765e3fd1a1de6864");
}

#[test]
fn the_second_reader_reads_made_up_images_as_expected() {
    check("syn-4kn-dynamic.vhdx", "8a45e8cfe57463150f32b4bbba6814f15b48895dc442570457d02a41b8b1e4eb");
    check("syn-512e-states.vhdx", "81f8a6570a413a7528df89e4ccbe05720a256478995c95d964b9b7fe61e316c3");
    check("syn-parent.vhdx", "0ecb56fb46fddbd1645b9224a1a04f1301f133e60846c89532a87374b1350c57");
}

#[test]
fn the_second_reader_replays_logs_as_expected() {
    check("syn-dirtylog-half.vhdx", "565800fba2f9b461d3f9381283a6c442d4873ad911ebb65b5ac0a2d87d0b314b");
    check("syn-dirtylog-wrap.vhdx", "190f6b83f2ae3dcf5de111d27e01939bc92e6aa5d31a1bbbbc5d3f977c7167db");
}

#[test]
fn the_second_reader_reads_through_a_chain() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files = ["syn-child.avhdx", "syn-parent.vhdx"].map(|name| sample(name, folder.path()));
    let slow = Slow::chain(&files).expect("the chain fits together");
    let expected = "d18586bbe25e891b3a70ce2372861080cf356ed9ddedeae274b0a1b26c7b8e6c";
    assert_eq!(hash(&slow, folder.path()), expected);
    let wrong = [Arc::clone(&files[0]), sample("syn-512e-states.vhdx", folder.path())];
    assert!(Slow::chain(&wrong).is_err(), "another image is not the parent");
}

#[test]
fn both_readers_read_long_disks_alike() {
    for name in [
        "iotest-dirtylog-10G-4M.vhdx",
        "syn-2chunk-dynamic.vhdx",
        "qemu-killed-guid-no-entry.vhdx",
        "discutils-lvm2.vhdx",
        "discutils-swap.vhdx",
    ] {
        compare(name);
    }
}
