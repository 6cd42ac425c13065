//! What guests do whose disk is a chain of images.

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile};
use vhdx::{Builder, ChildSpec, Disk, Spec, create, create_child};

use crate::common::{MIB, Random};
use crate::guest::{BLOCK, Guest, Open, SECTOR, USED, sector_of, stamped};
use crate::stage::{Stage, path, resolver};

const BLOCKS: u64 = 16;
/// Blocks of a parent that is shorter than its child.
const SHORT: u64 = 11;

/// What a parent has in a sector: three of four blocks bear stamps of their own.
fn inherited(sector: u64) -> u64 {
    if sector / 2048 % 4 == 3 { 0 } else { 1 << 40 | sector }
}

fn inherited_from_short(sector: u64) -> u64 {
    if sector / 2048 < SHORT { inherited(sector) } else { 0 }
}

/// The parent, whose blocks are twice as large as those of its child.
fn parent(file: &Arc<dyn ImageFile>, blocks: u64) {
    let spec = Spec { block_bytes: 2 * MIB, ..Spec::dynamic(blocks * BLOCK) };
    create(file, &spec).expect("it is created");
    let disk = Builder::open(Arc::clone(file)).growth_bytes(2 * MIB).writable().expect("it opens");
    for block in (0..blocks).filter(|block| block % 4 != 3) {
        let sectors = block * 2048..(block + 1) * 2048;
        let bytes: Vec<u8> = sectors.flat_map(|sector| stamped(inherited(sector))).collect();
        disk.write_at(block * BLOCK, &bytes).expect("it is writable");
    }
    disk.close().expect("it closes");
}

/// A child of a parent of so many blocks.
fn child(open: Open, parent_blocks: u64, inherited: fn(u64) -> u64) -> Guest {
    let mut stage = Stage::default();
    let base = stage.make("0", |file| parent(file, parent_blocks));
    let paths = resolver(&stage.files()).paths(&path("1"), &path("0")).expect("both are paths");
    let size_bytes = Some(BLOCKS * BLOCK);
    let spec = ChildSpec { block_bytes: BLOCK, size_bytes, ..ChildSpec::new(paths) };
    let base = Builder::open(base).read_only().expect("it opens");
    stage.make("1", |file| create_child(file, &base, &spec).expect("it is created"));
    Guest::on(stage, "1", 0..BLOCKS, open, inherited)
}

/// Requests of every kind to a child, through an orderly end, a kill and the replay after it.
pub(crate) fn child_sessions(open: Open) -> Guest {
    let (mut guest, mut random) = (child(open, BLOCKS, inherited), Random(0x5eed_0c01));
    let disk = guest.open();
    guest.play(&disk, &mut random, 25);
    guest.fill(&disk, 5);
    guest.close(disk);
    let disk = guest.open();
    guest.play(&disk, &mut random, 25);
    drop(disk);
    let disk = guest.reopen();
    guest.fill(&disk, 6);
    guest.play(&disk, &mut random, 12);
    guest.close(disk);
    guest
}

/// A child shrinks and grows under its guest. What it lost never comes back, from the parent either.
pub(crate) fn resized_child(open: Open) -> Guest {
    let (mut guest, mut random) = (child(open, BLOCKS, inherited), Random(0x5eed_0c02));
    let disk = guest.open();
    guest.play(&disk, &mut random, 10);
    // The cut goes through a block of which the parent shows all, then through one that is here in part, then in full.
    for (number, block) in [9, 5, 2].into_iter().enumerate() {
        match number {
            0 => (),
            1 => guest.write(&disk, &[(sector_of(block, 0), 3)], false),
            _ => guest.fill(&disk, block),
        }
        guest.resize(&disk, block * BLOCK + 5 * SECTOR);
        guest.write(&disk, &[(sector_of(1, USED[number]), 1), (sector_of(block, 0), 2)], false);
        guest.flush(&disk);
        guest.resize(&disk, BLOCKS * BLOCK);
        guest.play(&disk, &mut random, 3);
    }
    guest.close(disk);
    guest
}

/// Blocks of a child move to the front of its file.
pub(crate) fn compacted_child(open: Open) -> Guest {
    let (mut guest, mut random) = (child(open, BLOCKS, inherited), Random(0x5eed_0c03));
    let disk = guest.open();
    for block in 0..BLOCKS {
        guest.write(&disk, &USED.map(|within| (sector_of(block, within), 1)), false);
    }
    guest.flush(&disk);
    for block in 0..BLOCKS / 2 {
        guest.drop_block(&disk, block * 2, block % 2 == 0);
    }
    guest.judged_from = guest.now();
    guest.compact(&disk);
    guest.play(&disk, &mut random, 8);
    drop(disk);
    guest
}

/// A guest on an image without a parent, and files for the children that it gets.
fn base(open: Open) -> (Guest, Disk) {
    let spec = Spec { block_bytes: BLOCK, ..Spec::dynamic(BLOCKS * BLOCK) };
    let mut guest = Guest::new(&spec, 0..BLOCKS, open);
    // The disk looks for images among the files that are there when it is opened.
    drop([guest.stage.add("1"), guest.stage.add("2")]);
    let disk = guest.open();
    (guest, disk)
}

/// Two snapshots under a guest that goes on, and a kill.
pub(crate) fn snapshots(open: Open) -> Guest {
    let ((mut guest, disk), mut random) = (base(open), Random(0x5eed_0c04));
    guest.play(&disk, &mut random, 12);
    for name in ["1", "2"] {
        // Something that no flush of the guest covers: the snapshot does.
        guest.write(&disk, &[(sector_of(3, 1), 1)], false);
        guest.snapshot(&disk, name);
        guest.play(&disk, &mut random, 12);
    }
    drop(disk);
    let disk = guest.reopen();
    guest.play(&disk, &mut random, 4);
    guest.close(disk);
    guest
}

/// A closed child, longer than its parent, is merged into it.
pub(crate) fn merged_child(open: Open) -> Guest {
    let (mut guest, mut random) = (child(open, SHORT, inherited_from_short), Random(0x5eed_0c05));
    let disk = guest.open();
    guest.play(&disk, &mut random, 20);
    guest.drop_block(&disk, 2, true);
    guest.fill(&disk, 13);
    guest.close(disk);
    guest.judged_from = guest.now();
    let (files, parent) = (guest.stage.files(), guest.stage.file("0"));
    let builder = guest.builder(&files, &path("1"));
    builder.merge(&parent, &mut |_| ()).expect("it merges");
    // From here on the parent alone is the disk.
    guest.promise();
    guest.moves_to(guest.now(), "0");
    let disk = guest.open();
    guest.play(&disk, &mut random, 4);
    drop(disk);
    guest
}

/// The image in the middle of a chain is merged into the base, while the guest goes on in the top.
pub(crate) fn merged_in_use(open: Open) -> Guest {
    let ((mut guest, disk), mut random) = (base(open), Random(0x5eed_0c06));
    guest.play(&disk, &mut random, 10);
    guest.snapshot(&disk, "1");
    guest.play(&disk, &mut random, 14);
    guest.drop_block(&disk, 4, true);
    guest.snapshot(&disk, "2");
    guest.play(&disk, &mut random, 6);
    guest.judged_from = guest.now();
    let (middle, bottom) = (guest.stage.file("1"), guest.stage.file("0"));
    let mut rounds = 0..6;
    let mut meanwhile = |_| {
        if rounds.next().is_some() {
            guest.play(&disk, &mut random, 2);
        }
    };
    disk.merge_parent(&middle, &bottom, &mut meanwhile).expect("it merges");
    guest.play(&disk, &mut random, 4);
    guest.close(disk);
    guest
}

/// The table of a disk that grows by much moves, under its guest.
pub(crate) fn moved_table(open: Open) -> Guest {
    let spec = Spec { block_bytes: BLOCK, ..Spec::dynamic(4 * BLOCK) };
    // The last one is there only after the growth.
    let mut guest = Guest::new(&spec, [0, 1, 2, 3], open);
    let disk = guest.open();
    for block in 0..4 {
        guest.write(&disk, &[(sector_of(block, 0), 3)], false);
    }
    guest.flush(&disk);
    guest.judged_from = guest.now();
    guest.resize(&disk, 140 * 1024 * BLOCK);
    guest.blocks.push(139 * 1024);
    guest.write(&disk, &[(sector_of(139 * 1024, 0), 1), (sector_of(2, 7), 1)], false);
    guest.flush(&disk);
    drop(disk);
    guest
}
