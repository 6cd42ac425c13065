//! Odd but lawful images read right, can be written, and are sound afterwards; what is odd and unlawful is refused by name.
//!
//! Both readers read each of them, the crate's and the second one, and what is written goes past everything that is unknown.

#[path = "../common/mod.rs"]
mod common;
mod forge;
#[path = "../slow/mod.rs"]
mod slow;

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, MemoryDevice};
use common::{MIB, assert_sound, bytes_at, read_only};
use forge::{Change, Forge, Item, Region, entry};
use slow::Slow;
use uuid::Uuid;
use vhdx::{Builder, ErrorKind, LogInfo};

const ID: [u8; 16] = [0x5a; 16];
const OTHER_ID: [u8; 16] = [0xa5; 16];
/// A block that no case uses: it is written later.
const LATER: u64 = 7;

/// Places of the disk and the byte that is there.
type Content = Vec<(u64, u8)>;

fn content_is(file: &Arc<dyn ImageFile>, content: &Content, why: &str) {
    let image = Builder::open(Arc::clone(file)).read_only().unwrap_or_else(|error| panic!("{why}: {error}"));
    let slow = Slow::open(file).unwrap_or_else(|fault| panic!("{why}: the second reader: {fault}"));
    for (at, byte) in content {
        assert_eq!(bytes_at(&image, *at, 4096), [*byte; 4096], "{why}: at {at:#x}");
        let theirs = slow.read(*at, 4096).unwrap_or_else(|fault| panic!("{why}: {fault}"));
        assert_eq!(theirs, [*byte; 4096], "{why}: the second reader at {at:#x}");
    }
}

/// Read, checked, written, and all of it again.
fn works(why: &str, image: MemoryDevice, content: Content) -> Arc<dyn ImageFile> {
    let pristine = image.fork();
    let file: Arc<dyn ImageFile> = Arc::new(image);
    content_is(&file, &content, why);
    let size = usize::try_from(pristine.geometry().size_bytes.min(12 * MIB)).expect("small");
    assert!(bytes_at(&file, 0, size) == bytes_at(&pristine, 0, size), "{why}: reading wrote");
    assert_sound(&file);
    let disk = Builder::open(Arc::clone(&file)).growth_bytes(2 * MIB).writable();
    let disk = disk.unwrap_or_else(|error| panic!("{why}: {error}"));
    let block_bytes = vhdx::info(&file).expect("it is an image").block_bytes;
    let later = (LATER * block_bytes).min(disk.geometry().size_bytes - 4096);
    disk.write_at(later, &[0x77; 4096]).unwrap_or_else(|error| panic!("{why}: {error}"));
    disk.close().unwrap_or_else(|error| panic!("{why}: {error}"));
    drop(disk);
    assert_sound(&file);
    let content: Content =
        content.into_iter().filter(|(at, _)| *at != later).chain([(later, 0x77)]).collect();
    content_is(&file, &content, &format!("{why}, written"));
    file
}

fn refused(why: &str, image: MemoryDevice, kind: ErrorKind) {
    let file: Arc<dyn ImageFile> = Arc::new(image);
    let open = || Builder::open(Arc::clone(&file));
    let error = open().read_only().expect_err(why);
    assert_eq!(error.kind(), kind, "{why}: {error}");
    assert_eq!(open().writable().expect_err(why).kind(), kind, "{why}");
    assert!(!vhdx::check(&file).is_sound(), "{why}");
}

fn unknown(number: u128) -> Uuid {
    Uuid::from_u128(0xDEAD_0000 + number)
}

#[test]
fn regions_and_blocks_lie_in_any_order() {
    let mut forge = Forge::new();
    // Blocks first, then the table, the log in the middle, the metadata last.
    forge.bat = (5 * MIB, 1 << 20);
    forge.log = (9 * MIB, 3 << 20);
    forge.metadata = (20 * MIB, 1 << 20);
    forge.file_bytes = 21 * MIB;
    forge
        .holds(0, 14 * MIB, 1)
        .holds(1, MIB, 2)
        .holds(2, 6 * MIB, 3)
        .holds(3, 2 * MIB, 4)
        .says(4, 2)
        .says(5, 3);
    works(
        "any order",
        forge.made(),
        vec![(0, 1), (MIB, 2), (2 * MIB, 3), (3 * MIB + 4096, 4), (4 * MIB, 0), (5 * MIB, 0), (6 * MIB, 0)],
    );
}

#[test]
fn the_known_regions_are_known_by_their_id_and_one_table_is_enough() {
    for (required, tables, sequences) in
        [(0, [true, true], [9, 2]), (1, [false, true], [2, 9]), (1, [true, false], [0, u64::MAX - (1 << 40)])]
    {
        let mut forge = Forge::new();
        (forge.required, forge.tables, forge.sequences) = (required, tables, sequences);
        forge.holds(2, 4 * MIB, 5);
        works("one table", forge.made(), vec![(2 * MIB, 5), (0, 0)]);
    }
}

#[test]
fn what_is_unknown_and_optional_is_kept_and_never_written_over() {
    let mut forge = Forge::new();
    // A region in a gap between blocks, where a writer would like to put the next.
    forge.holds(0, 4 * MIB, 1).holds(1, 7 * MIB, 2).puts(5 * MIB, &vec![0xCC; 2 << 20]);
    forge.regions = vec![Region(unknown(1), 5 * MIB, 2 << 20, 0)];
    forge.items.reverse();
    forge.items.insert(0, Item(unknown(2), 0, vec![0xDD; 100]));
    forge.items.push(Item(unknown(3), 1, vec![0xDD; 5000]));
    forge.items.push(Item(unknown(4), 2, Vec::new()));
    forge.gap = 24;
    let file = works("unknown", forge.made(), vec![(0, 1), (MIB, 2)]);
    assert!(bytes_at(&file, 5 * MIB, 2 << 20) == vec![0xCC; 2 << 20], "the unknown region");
    assert!(bytes_at(&file, 2 * MIB, 1 << 20) == bytes_at(&forge.made(), 2 * MIB, 1 << 20), "the metadata");
}

#[test]
fn what_is_unknown_and_required_is_refused() {
    let mut region = Forge::new();
    region.regions = vec![Region(unknown(1), 4 * MIB, 1 << 20, 1)];
    region.file_bytes = 5 * MIB;
    refused("a region", region.made(), ErrorKind::Unsupported);
    let mut item = Forge::new();
    item.items.insert(0, Item(unknown(1), 4, vec![1; 8]));
    refused("an item", item.made(), ErrorKind::Unsupported);
    let mut disk_item = Forge::new();
    disk_item.items.push(Item(unknown(1), 6, Vec::new()));
    refused("an item of the disk", disk_item.made(), ErrorKind::Unsupported);
}

#[test]
fn every_block_size_with_every_pair_of_sector_sizes_reads_right() {
    for shift in 0..9 {
        for (logical, physical) in [(512, 512), (512, 4096), (4096, 512), (4096, 4096)] {
            let block_bytes = MIB << shift;
            // Two blocks and a part of a third.
            let mut forge = Forge::of(8 * block_bytes + 8192, block_bytes, logical, physical);
            forge.holds(1, 4 * MIB, 1).holds(8, 4 * MIB + block_bytes, 2);
            let content =
                vec![(block_bytes, 1), (block_bytes + MIB - 4096, 1), (8 * block_bytes + 4096, 2), (0, 0)];
            works(&format!("{block_bytes} {logical} {physical}"), forge.made(), content);
        }
    }
}

#[test]
fn blocks_behind_many_chunks_are_found() {
    // 16 blocks of 256 MiB in a chunk: the slots of the bitmaps come often.
    let mut forge = Forge::of(200 * 256 * MIB, 256 * MIB, 512, 4096);
    forge.holds(15, 4 * MIB, 1).holds(16, 260 * MIB, 2).holds(199, 516 * MIB, 3);
    let at = |block: u64| block * 256 * MIB;
    works("chunks", forge.made(), vec![(at(15), 1), (at(16), 2), (at(199), 3), (at(17), 0)]);
}

#[test]
fn a_sector_bitmap_that_nobody_needs_keeps_its_space() {
    // The slot of the first chunk's bitmap, in an image without a parent that has a second chunk.
    let mut forge = Forge::of(5000 * MIB, MIB, 512, 512);
    forge.holds(0, 4 * MIB, 1).holds(4999, 6 * MIB, 2).puts(5 * MIB, &vec![0xCC; 1 << 20]);
    forge.entries.insert(4096, (5 * MIB) | 6);
    let file = works("a bitmap", forge.made(), vec![(0, 1), (4999 * MIB, 2), (4096 * MIB, 0)]);
    assert!(bytes_at(&file, 5 * MIB, 1 << 20) == vec![0xCC; 1 << 20], "somebody took it");
    let warnings = vhdx::check(&file).warnings;
    assert!(warnings.iter().any(|text| text.contains("bitmap")), "{warnings:?}");
}

#[test]
fn a_file_that_ends_inside_its_last_block_reads_zeros_there() {
    let mut forge = Forge::of(2 * MIB + 8192, MIB, 512, 512);
    forge.holds(0, 4 * MIB, 1).holds(2, 5 * MIB, 2);
    forge.file_bytes = 5 * MIB + 8192;
    works("cut at the end of the disk", forge.made(), vec![(0, 1), (2 * MIB, 2), (2 * MIB + 4096, 2)]);
    forge.file_bytes = 5 * MIB + 4096;
    refused("cut before the end of the disk", forge.made(), ErrorKind::Corrupt);
}

/// An image whose table says nothing: all that it says is in the log.
fn logged(forge: &mut Forge) -> u64 {
    forge.log_id = ID;
    for (number, place) in (1..).zip([4, 5, 6, 8]) {
        forge.holds(6, place * MIB, number);
    }
    forge.entries.clear();
    forge.file_bytes
}

#[test]
fn a_run_that_wraps_the_ring_is_replayed_from_its_tail() {
    let mut forge = Forge::new();
    let size = logged(&mut forge);
    let page = |forge: &Forge, words: &[(u64, u64)]| Change::Page(3 * MIB, forge.page_with(words));
    // An entry lies across the end of the ring, and the tail of the last leaves out the first.
    let start = (1 << 20) - 3 * 4096;
    let first = entry(ID, 11, start, (size, size), &[Change::Zero(3 * MIB, 4096)]);
    let second = entry(ID, 12, start, (size, size), &[page(&forge, &[(0, (4 * MIB) | 6)])]);
    let at_third = start + 4096 + 8192;
    let words = [(0, (4 * MIB) | 6), (1, (5 * MIB) | 6)];
    let third = entry(ID, 13, start + 4096, (size, size), &[page(&forge, &words)]);
    forge.logs(start, &first).logs(start + 4096, &second).logs(at_third, &third);
    let file: Arc<dyn ImageFile> = Arc::new(forge.made());
    assert_eq!(vhdx::info(&file).expect("it is an image").log, LogInfo::Dirty { entries: 2 });
    works("wraps", forge.made(), vec![(0, 1), (MIB, 2), (2 * MIB, 0)]);
    // The same, and one entry alone is torn over the end.
    let mut forge = Forge::new();
    let size = logged(&mut forge);
    let start = (1 << 20) - 4096;
    let words = [(0, (5 * MIB) | 6)];
    let alone = entry(ID, 1, start, (size, size), &[Change::Page(3 * MIB, forge.page_with(&words))]);
    forge.logs(start, &alone);
    works("wraps alone", forge.made(), vec![(0, 2), (MIB, 0)]);
}

#[test]
fn of_several_runs_the_one_with_the_newest_end_counts() {
    let mut forge = Forge::new();
    let size = logged(&mut forge);
    let run = |forge: &Forge, sequence, at, place: u64| {
        entry(ID, sequence, at, (size, size), &[Change::Page(3 * MIB, forge.page_with(&[(0, place | 6)]))])
    };
    // Old and complete; new and complete; newer, but its tail is lost; of another id; torn.
    let old = run(&forge, 20, 0, 4 * MIB);
    let new = run(&forge, 31, 0x10000, 5 * MIB);
    let lost_tail = run(&forge, 50, 0x20000 - 4096, 6 * MIB);
    let mut foreign = run(&forge, 90, 0x30000, 6 * MIB);
    foreign[32..48].copy_from_slice(&OTHER_ID);
    let mut torn = run(&forge, 99, 0x40000, 6 * MIB);
    torn[5000] ^= 1;
    forge
        .logs(0, &old)
        .logs(0x10000, &new)
        .logs(0x20000, &lost_tail)
        .logs(0x30000, &foreign)
        .logs(0x40000, &torn);
    works("several runs", forge.made(), vec![(0, 2), (MIB, 0)]);
}

#[test]
fn an_entry_may_change_nothing_or_more_than_one_sector_of_descriptors_names() {
    let mut forge = Forge::new();
    let size = logged(&mut forge);
    forge.log.1 = 2 << 20;
    forge.log.0 = 9 * MIB;
    forge.file_bytes = size.max(11 * MIB);
    let size = forge.file_bytes;
    // Zeroes nothing, nothing at all, then 130 pages, of which the first is the table.
    let nothing = entry(ID, 1, 0, (size, size), &[Change::Zero(3 * MIB, 0), Change::Zero(4 * MIB, 0)]);
    let empty = entry(ID, 2, 0, (size, size), &[]);
    let mut changes = vec![Change::Page(3 * MIB, forge.page_with(&[(3, (6 * MIB) | 6)]))];
    changes.extend((1..130).map(|page| Change::Page(3 * MIB + page * 4096, vec![0; 4096])));
    let wide = entry(ID, 3, 0, (size, size), &changes);
    forge.logs(0, &nothing).logs(8192 - 4096, &empty).logs(8192, &wide);
    works("wide", forge.made(), vec![(3 * MIB, 3), (0, 0)]);
}

#[test]
fn a_log_that_moves_the_table_and_grows_the_file_is_replayed() {
    let mut forge = Forge::new();
    let size = logged(&mut forge);
    let moved = Forge { bat: (9 * MIB, 1 << 20), ..forge.clone() };
    let table = moved.region_table();
    let mut changes: Vec<Change> = [192 << 10, 256 << 10]
        .into_iter()
        .flat_map(|at| (at..).step_by(4096).zip(table.chunks(4096)))
        .map(|(at, page)| Change::Page(at, page.to_vec()))
        .collect();
    changes.push(Change::Page(9 * MIB, forge.page_with(&[(1, (8 * MIB) | 6)])));
    forge.logs(0, &entry(ID, 7, 0, (size, size + 3 * MIB), &changes));
    let file = works("moved", forge.made(), vec![(MIB, 4), (0, 0)]);
    assert!(read_only(&file).resolve_read(MIB, 4096).is_ok());
}

#[test]
fn sequence_numbers_do_not_wrap() {
    // The largest number is the newest, never the one before zero.
    let mut forge = Forge::new();
    forge.holds(0, 4 * MIB, 1);
    forge.sequences = [u64::MAX, 0];
    let file: Arc<dyn ImageFile> = Arc::new(forge.made());
    content_is(&file, &vec![(0, 1)], "the last number");
    let error = Builder::open(file).writable().expect_err("there is no next number");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    // Nor in the log.
    let mut forge = Forge::new();
    let size = logged(&mut forge);
    let page = Change::Page(3 * MIB, forge.page_with(&[(0, (4 * MIB) | 6)]));
    forge.logs(0, &entry(ID, u64::MAX, 0, (size, size), &[page]));
    let stale = Change::Page(3 * MIB, forge.page_with(&[(0, (5 * MIB) | 6)]));
    forge.logs(8192, &entry(ID, 0, 0, (size, size), &[stale]));
    works("the last entry", forge.made(), vec![(0, 1)]);
}

#[test]
fn states_of_a_draft_are_read_only_where_that_was_asked_for() {
    let mut forge = Forge::new();
    forge.holds(0, 4 * MIB, 1).says(1, 5).says(2, (5 * MIB) | 5).puts(5 * MIB, &vec![0xEE; 1 << 20]);
    forge.file_bytes = 6 * MIB;
    refused("a draft", forge.made(), ErrorKind::Corrupt);
    let file: Arc<dyn ImageFile> = Arc::new(forge.made());
    let open = || Builder::open(Arc::clone(&file)).tolerate_draft_states(true);
    let image = open().read_only().expect("it was asked for");
    for (at, byte) in [(0, 1), (MIB, 0), (2 * MIB, 0)] {
        assert_eq!(bytes_at(&image, at, 4096), [byte; 4096]);
    }
    // Written once, it says the same in the words of the format.
    let disk = open().writable().expect("it was asked for");
    disk.write_at(3 * MIB, &[3; 4096]).expect("it is writable");
    disk.close().expect("it closes");
    drop(disk);
    content_is(&file, &vec![(0, 1), (MIB, 0), (2 * MIB, 0), (3 * MIB, 3)], "no draft any more");
    // State 4 was never anything.
    forge.says(1, 4);
    let file: Arc<dyn ImageFile> = Arc::new(forge.made());
    let error = Builder::open(file).tolerate_draft_states(true).read_only().expect_err("state 4");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}
