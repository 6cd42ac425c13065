//! What the guests of the crash tests do. Each scenario leads the writer through one part of its protocol.

use vhdx::Spec;

use crate::common::{MIB, Random};
use crate::guest::{BLOCK, Guest, Open, SECTOR, USED, sector_of};

const BLOCKS: u64 = 20;

fn spec() -> Spec {
    Spec { block_bytes: BLOCK, ..Spec::dynamic(BLOCKS * BLOCK) }
}

fn guest(open: Open) -> Guest {
    Guest::new(&spec(), 0..BLOCKS, open)
}

/// Requests of every kind, through an orderly end, a kill and the replay after it.
pub(crate) fn three_sessions(open: Open) -> Guest {
    let (mut guest, mut random) = (guest(open), Random(0x5eed_0001));
    let disk = guest.open();
    guest.play(&disk, &mut random, 20);
    guest.close(disk);
    let disk = guest.open();
    guest.play(&disk, &mut random, 30);
    drop(disk);
    let disk = guest.reopen();
    guest.play(&disk, &mut random, 15);
    guest.close(disk);
    guest
}

/// More log entries than a generation holds, twice over.
pub(crate) fn ends_of_generations(open: Open) -> Guest {
    let (mut guest, mut random) = (guest(open), Random(0x5eed_0002));
    guest.judged_every = 2;
    let disk = guest.open();
    for round in 0..135_u64 {
        // Few blocks are given up, so that those that are find room: every round changes the mapping.
        let block = round % BLOCKS;
        if round >= BLOCKS {
            guest.drop_block(&disk, block, random.below(2) == 0);
        }
        guest.write(&disk, &[(sector_of(block, USED[0]), 1)], false);
        guest.flush(&disk);
    }
    drop(disk);
    guest
}

/// A kill leaves payload behind the end of what the log knows; the next session grows over it.
pub(crate) fn leftovers_of_a_kill(open: Open) -> Guest {
    let mut guest = guest(open);
    let disk = guest.open();
    guest.write(&disk, &[(sector_of(0, 0), 1)], false);
    guest.flush(&disk);
    for block in 1..5 {
        guest.write(&disk, &USED.map(|within| (sector_of(block, within), 1)), false);
    }
    drop(disk);
    let disk = guest.reopen();
    for block in 5..9 {
        guest.write(&disk, &[(sector_of(block, 1), 1)], false);
    }
    guest.flush(&disk);
    drop(disk);
    guest
}

/// Space that blocks gave up goes to others.
pub(crate) fn recycled_space(open: Open) -> Guest {
    let mut guest = guest(open);
    let disk = guest.open();
    for block in 0..10 {
        guest.write(&disk, &USED.map(|within| (sector_of(block, within), 1)), false);
    }
    guest.flush(&disk);
    for block in 0..6 {
        guest.drop_block(&disk, block, block % 2 == 0);
    }
    // More than the fresh space holds, before and after the log drops what was given up.
    for block in 10..14 {
        guest.write(&disk, &[(sector_of(block, 0), 1)], false);
    }
    guest.flush(&disk);
    for block in 14..BLOCKS {
        guest.write(&disk, &[(sector_of(block, 1), 1)], false);
    }
    guest.flush(&disk);
    for block in 0..6 {
        guest.write(&disk, &[(sector_of(block, 2), 1)], false);
    }
    drop(disk);
    guest
}

/// Forced writes among others.
pub(crate) fn forced_writes(open: Open) -> Guest {
    let (mut guest, mut random) = (guest(open), Random(0x5eed_0005));
    let disk = guest.open();
    for round in 0..40 {
        let block = guest.any_block(&mut random);
        match round % 4 {
            0 => guest.drop_block(&disk, block, false),
            1 => guest.write(&disk, &[(sector_of(block, 7), 1)], false),
            _ => guest.write(&disk, &[(sector_of(block, 0), 3)], true),
        }
    }
    drop(disk);
    guest
}

/// The disk shrinks and grows under its guest.
pub(crate) fn resized_disk(open: Open) -> Guest {
    let (mut guest, mut random) = (guest(open), Random(0x5eed_0007));
    let disk = guest.open();
    guest.play(&disk, &mut random, 12);
    guest.resize(&disk, 12 * BLOCK + 4 * SECTOR);
    guest.write(&disk, &[(sector_of(3, 0), 3), (sector_of(12, 0), 1)], false);
    guest.flush(&disk);
    guest.resize(&disk, BLOCKS * BLOCK);
    guest.play(&disk, &mut random, 12);
    guest.close(disk);
    guest
}

/// Blocks move to the front of the file while the guest goes on.
pub(crate) fn compacted_disk(open: Open) -> Guest {
    let (mut guest, mut random) = (guest(open), Random(0x5eed_0008));
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
    guest.compact(&disk);
    drop(disk);
    guest
}

/// One flush with more pages of the BAT than an entry, and half of the ring, can hold.
pub(crate) fn a_wide_flush(open: Open) -> Guest {
    const PAGES: u64 = 130;
    let spec = Spec { block_bytes: BLOCK, ..Spec::dynamic(PAGES * 512 * MIB) };
    // A few of them are looked at: of the first entry, of the second, and where one ends.
    let watched = [0, 1, 60, 124, 125, 126, 127, 129].map(|page| page * 512);
    let mut guest = Guest::new(&spec, watched, open);
    let disk = guest.open();
    for page in 0..PAGES {
        guest.write(&disk, &[(sector_of(page * 512, 0), 1)], false);
    }
    (guest.judged_from, guest.judged_every) = (guest.now(), 2);
    guest.flush(&disk);
    guest.write(&disk, &[(sector_of(0, 1), 1)], false);
    guest.flush(&disk);
    drop(disk);
    guest
}
