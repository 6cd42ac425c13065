//! Images that other programs made, or that a generator made from the specification, read as they must be.

mod common;

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile};
use common::{assert_sound, bytes_at, content_hash, image_file, read_only, sha256, text, unpack};
use vhdx::{Builder, ErrorKind, HostFiles, LogInfo, ParentResolver};

/// Content as expected, read-only (nothing written), and again after a writable open has replayed the log.
fn check(name: &str, contents: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = unpack(name, folder.path());
    let before = sha256(&path);
    let file = image_file(&path);
    assert_sound(&file);
    assert_eq!(content_hash(&read_only(&file), folder.path()), contents, "{name} opened for reading");
    assert_eq!(sha256(&path), before, "{name}: reading wrote to the file");

    let disk = Builder::open(Arc::clone(&file)).writable().expect("it opens for writing");
    disk.close().expect("it closes");
    assert_eq!(vhdx::info(&file).expect("it is an image").log, LogInfo::Clean);
    assert_sound(&file);
    assert_eq!(content_hash(&read_only(&file), folder.path()), contents, "{name} after replay");
}

#[test]
fn a_dynamic_image_of_windows_reads_right() {
    check("iotest-dynamic-1G.vhdx", "d3d112d8dab7fd360609f7d5a7b769904b7a2a7d7b6b8c535f65a23293c05478");
}

#[test]
fn an_image_of_disk2vhd_with_equal_headers_and_odd_size_reads_right() {
    check("test-disk2vhd.vhdx", "96d964042be9b58dda1725567abfb0cf9fd8380e2118754afa979c2ad445938a");
}

#[test]
fn an_image_with_4096_byte_sectors_reads_right() {
    check("syn-4kn-dynamic.vhdx", "8a45e8cfe57463150f32b4bbba6814f15b48895dc442570457d02a41b8b1e4eb");
}

#[test]
fn anchors_of_unmapped_blocks_read_as_zeros() {
    check("syn-512e-states.vhdx", "81f8a6570a413a7528df89e4ccbe05720a256478995c95d964b9b7fe61e316c3");
}

#[test]
fn a_log_in_the_second_half_of_the_ring_is_replayed() {
    check("syn-dirtylog-half.vhdx", "565800fba2f9b461d3f9381283a6c442d4873ad911ebb65b5ac0a2d87d0b314b");
}

#[test]
fn a_log_that_wraps_and_grows_the_file_is_replayed() {
    check("syn-dirtylog-wrap.vhdx", "190f6b83f2ae3dcf5de111d27e01939bc92e6aa5d31a1bbbbc5d3f977c7167db");
}

/// The disks of these are too long to be hashed in a test: a checksum over the blocks that hold data stands for the hash.
fn data_checksum(file: &Arc<dyn ImageFile>) -> u32 {
    let image = read_only(file);
    let (mut at, mut sum) = (0, 0);
    while let Some(data) = image.data_from(at) {
        let len = usize::try_from(data.end - data.start).expect("a block fits into memory");
        sum = crc32c::crc32c_append(sum, &data.start.to_le_bytes());
        sum = crc32c::crc32c_append(sum, &bytes_at(&image, data.start, len));
        at = data.end;
    }
    sum
}

#[test]
fn the_log_of_an_old_qemu_is_replayed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = unpack("iotest-dirtylog-10G-4M.vhdx", folder.path());
    let before = sha256(&path);
    let file = image_file(&path);
    assert_eq!(vhdx::info(&file).expect("it is an image").log, LogInfo::Dirty { entries: 1 });
    assert_eq!(data_checksum(&file), DIRTYLOG_10G);
    assert_eq!(sha256(&path), before, "reading wrote to the file");
    Builder::open(Arc::clone(&file)).writable().expect("it opens for writing").close().expect("it closes");
    assert_eq!(data_checksum(&file), DIRTYLOG_10G);
}

#[test]
fn blocks_behind_the_first_chunk_are_found() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = image_file(&unpack("syn-2chunk-dynamic.vhdx", folder.path()));
    assert_eq!(data_checksum(&file), TWO_CHUNKS);
}

// Recorded when the SHA-256 of the whole disk was right.
const DIRTYLOG_10G: u32 = 1_309_197_320;
const TWO_CHUNKS: u32 = 2_311_422_526;

#[test]
fn an_orphan_log_id_is_named_and_repaired_only_on_demand() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = image_file(&unpack("qemu-killed-guid-no-entry.vhdx", folder.path()));
    assert_eq!(vhdx::info(&file).expect("it is an image").log, LogInfo::Orphan);
    let content = data_checksum(&file);
    let refused = Builder::open(Arc::clone(&file)).writable().expect_err("its log is gone");
    assert_eq!(refused.kind(), ErrorKind::OrphanLogId);
    assert!(refused.to_string().contains("repair"), "{refused}");
    let disk = Builder::open(Arc::clone(&file)).repair(true).writable().expect("repair clears the id");
    disk.write_at(0, &[7; 512]).expect("it is writable again");
    disk.close().expect("it closes");
    assert_eq!(bytes_at(&read_only(&file), 0, 512), [7; 512]);
    assert_sound(&file);
    assert_ne!(data_checksum(&file), content);
}

#[test]
fn a_child_and_its_parent_read_as_one_disk() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let parent = unpack("syn-parent.vhdx", folder.path());
    let child = unpack("syn-child.avhdx", folder.path());
    let before = (sha256(&parent), sha256(&child));
    let file = image_file(&child);
    assert_eq!(vhdx::info(&file).expect("it is an image").kind, vhdx::ImageKind::Differencing);
    let allowed = ParentResolver::new(Arc::new(HostFiles::default())).root(text(folder.path()));
    let open = || Builder::open(Arc::clone(&file)).parents(allowed.clone(), text(&child));

    let content = "d18586bbe25e891b3a70ce2372861080cf356ed9ddedeae274b0a1b26c7b8e6c";
    assert_eq!(content_hash(&open().read_only().expect("it opens"), folder.path()), content);
    assert_eq!(open().inactive().expect("it opens").parents(), 1);
    open().writable().expect("it opens").close().expect("it closes");
    assert_eq!((sha256(&parent), sha256(&child)), before, "nothing was written");

    // Where only the parent speaks, a write changes its own sectors and no others.
    let disk = open().writable().expect("it opens");
    let whole = bytes_at(&disk, 0, 12 << 20);
    disk.write_at(7 << 20, &[0xab; 512]).expect("it is writable");
    disk.close().expect("it closes");
    let mut wanted = whole;
    wanted[7 << 20..(7 << 20) + 512].fill(0xab);
    assert!(bytes_at(&open().read_only().expect("it opens"), 0, 12 << 20) == wanted);
    assert_sound(&file);
    assert_eq!(sha256(&parent), before.0, "a parent is never written");
}

#[test]
fn without_leave_to_look_for_parents_a_child_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = image_file(&unpack("syn-child.avhdx", folder.path()));
    let open = || Builder::open(Arc::clone(&file));
    for refused in [open().read_only().err(), open().writable().err(), open().inactive().err()] {
        assert_eq!(refused.expect("it has a parent").kind(), ErrorKind::ParentNotFound);
    }
}
