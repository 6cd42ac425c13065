//! Discards and zeroing: which blocks give their place up, what the guest reads afterwards, and who gets the place.

mod common;

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, IoOp, MemoryDevice};
use common::{MIB, assert_sound, bytes_at, read_only};
use vhdx::{BlockCounts, Builder, Disk, Spec};

/// Four and a half blocks.
const SIZE: u64 = 4 * MIB + MIB / 2;
const BAT: u64 = 3 * MIB;

fn image(spec: Spec) -> Arc<dyn ImageFile> {
    let file = MemoryDevice::new(0);
    vhdx::create(&file, &Spec { block_bytes: MIB, ..spec }).expect("it is created");
    Arc::new(file)
}

fn open(file: &Arc<dyn ImageFile>) -> Disk {
    Builder::open(Arc::clone(file)).growth_bytes(MIB).writable().expect("it opens for writing")
}

fn filled(file: &Arc<dyn ImageFile>) -> Disk {
    let disk = open(file);
    disk.write_at(0, &vec![7; usize::try_from(SIZE).expect("small")]).expect("it is writable");
    disk.flush().expect("it flushes");
    disk
}

fn discard(disk: &Disk, offset: u64, len: u64) {
    disk.run(IoOp::Discard { offset, len }).expect("it takes discards");
}

fn zero(disk: &Disk, offset: u64, len: u64, may_unmap: bool) {
    disk.run(IoOp::WriteZeroes { offset, len, may_unmap }).expect("it zeroes");
}

/// The states after a close, and whether each range of the disk is zero or as it was filled.
fn check(file: &Arc<dyn ImageFile>, disk: Disk, counts: BlockCounts, zeros: &[(u64, u64)]) {
    disk.close().expect("it closes");
    assert_sound(file);
    assert_eq!(vhdx::info(file).expect("it is an image").blocks, counts);
    let image = read_only(file);
    for sector in 0..SIZE / 512 {
        let at = sector * 512;
        let expected = if zeros.iter().any(|(start, end)| (*start..*end).contains(&at)) { 0 } else { 7 };
        assert_eq!(bytes_at(&image, at, 512), [expected; 512], "at {at:#x}");
    }
}

fn counts(present: u64, zero: u64, unmapped: u64) -> BlockCounts {
    BlockCounts { total: 5, present, zero, unmapped, ..BlockCounts::default() }
}

#[test]
fn a_discard_gives_up_the_blocks_that_it_covers_and_no_byte_of_others() {
    let file = image(Spec::dynamic(SIZE));
    let disk = filled(&file);
    // From the middle of block 0 to the middle of block 2.
    discard(&disk, MIB / 2, 2 * MIB);
    check(&file, disk, counts(4, 0, 1), &[(MIB, 2 * MIB)]);
}

#[test]
fn the_last_block_is_whole_when_the_request_reaches_the_end_of_the_disk() {
    let file = image(Spec::dynamic(SIZE));
    let disk = filled(&file);
    discard(&disk, 4 * MIB, MIB / 2 - 512);
    assert_eq!(disk.allocated_blocks(), 5, "a sector is left");
    discard(&disk, 4 * MIB, MIB / 2);
    zero(&disk, 3 * MIB, MIB, true);
    check(&file, disk, counts(3, 1, 1), &[(3 * MIB, SIZE)]);
}

#[test]
fn zeroing_writes_zeros_into_parts_of_blocks_and_gives_whole_ones_up_only_where_it_may() {
    let file = image(Spec::dynamic(SIZE));
    let disk = filled(&file);
    zero(&disk, MIB / 2, 2 * MIB, true);
    zero(&disk, 3 * MIB, MIB, false);
    check(&file, disk, counts(4, 1, 0), &[(MIB / 2, 2 * MIB + MIB / 2), (3 * MIB, 4 * MIB)]);
}

#[test]
fn a_fixed_image_keeps_its_places() {
    let file = image(Spec::fixed(SIZE));
    let disk = filled(&file);
    assert!(!disk.geometry().can_discard);
    discard(&disk, 0, SIZE);
    zero(&disk, MIB, MIB, true);
    check(&file, disk, counts(5, 0, 0), &[(MIB, 2 * MIB)]);
}

#[test]
fn a_block_that_was_given_up_and_written_again_shows_nothing_of_before() {
    let file = image(Spec::dynamic(SIZE));
    let disk = filled(&file);
    let full = file.geometry().size_bytes;
    discard(&disk, 0, SIZE);
    disk.flush().expect("it flushes");
    for block in 0..5 {
        disk.write_at(block * MIB + 512, &[7; 512]).expect("it is writable");
    }
    assert!(file.geometry().size_bytes <= full + MIB, "the places were used again");
    let zeros: Vec<_> = (0..5)
        .flat_map(|block| {
            let start = block * MIB;
            [(start, start + 512), (start + 1024, start + MIB)]
        })
        .collect();
    check(&file, disk, counts(5, 0, 0), &zeros);
}

#[test]
fn an_anchored_block_gets_a_fresh_place_and_nobody_sees_what_lies_in_the_old_one() {
    let file = image(Spec::dynamic(SIZE));
    filled(&file).close().expect("it closes");
    // Windows may leave the place of a discarded block in its entry: state 3, still with the offset.
    let mut page = bytes_at(&file, BAT, 4096);
    for entry in page[..16].chunks_mut(8) {
        assert_eq!(entry[0], 6, "it is present");
        entry[0] = 3;
    }
    file.write_at(BAT, &page).expect("it is writable");
    assert_sound(&file);
    let disk = open(&file);
    assert_eq!(bytes_at(&disk, 0, 4096), [0; 4096]);
    discard(&disk, 0, MIB);
    disk.write_at(512, &[7; 512]).expect("it is writable");
    // The place of block 0 is free now; block 2 gives its own up and may get that one.
    disk.flush().expect("it flushes");
    discard(&disk, 2 * MIB, MIB);
    disk.flush().expect("it flushes");
    disk.write_at(2 * MIB, &[7; 512]).expect("it is writable");
    let zeros = [(0, 512), (1024, 2 * MIB), (2 * MIB + 512, 3 * MIB)];
    check(&file, disk, counts(4, 0, 1), &zeros);
}
