//! A power cut at any moment loses nothing that a flush acknowledged, shows nobody foreign bytes, and leaves a sound image.
//!
//! Everything that reaches the file is recorded. For each prefix of the record several images are built, with none, some or
//! torn parts of what was not flushed, and each is opened and compared with what the guest was promised.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::channel;

use blockio::{
    BlockDevice, Change, ImageFile, IoBuf, IoOp, IoRequest, MemoryDevice, Record, Recorder, Unflushed,
};
use common::{MIB, Random, assert_sound, bytes_at, read_only};
use vhdx::{Builder, Disk, LogInfo, Spec};

const SECTOR: u64 = 512;
const BLOCK: u64 = MIB;
const BLOCKS: u64 = 24;

/// What one request did to one sector, and when.
#[derive(Clone, Copy, Debug)]
struct Effect {
    /// Length of the record when it was submitted.
    from: usize,
    stamp: u64,
}

/// A flush that was acknowledged.
#[derive(Clone, Copy, Debug)]
struct Flushed {
    /// Requests submitted after this position are not covered.
    began: usize,
    /// Length of the record when it was acknowledged.
    done: usize,
}

/// The guest: what it did and what it was promised.
struct Guest {
    recorder: Arc<Recorder<MemoryDevice>>,
    effects: BTreeMap<u64, Vec<Effect>>,
    flushes: Vec<Flushed>,
    stamp: u64,
}

/// The sectors that the guest uses of each block; the others must stay zero, two of them are looked at.
const USED: [u64; 6] = [0, 1, 2, 7, 1000, 2047];
const WATCHED: [u64; 2] = [3, 1500];

fn sector_of(block: u64, within: u64) -> u64 {
    block * BLOCK / SECTOR + within
}

fn stamped(stamp: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat(64)
}

impl Guest {
    fn new(spec: &Spec) -> Self {
        let made = MemoryDevice::with_block_bytes(0, 1);
        vhdx::create(&made, spec).expect("it is created");
        let base = made.fork();
        Self {
            recorder: Arc::new(Recorder::with_base(made, base)),
            effects: BTreeMap::new(),
            flushes: vec![],
            stamp: 0,
        }
    }

    fn file(&self) -> Arc<dyn ImageFile> {
        Arc::clone(&self.recorder) as Arc<dyn ImageFile>
    }

    fn open(&self) -> Disk {
        Builder::open(self.file()).growth_bytes(3 * MIB).writable().expect("it opens for writing")
    }

    /// Opens after a kill: what was not flushed may be lost, and from now on what is there is what counts.
    fn reopen(&mut self) -> Disk {
        let disk = self.open();
        for block in 0..BLOCKS {
            for within in USED {
                let sector = sector_of(block, within);
                let bytes = bytes_at(&disk, sector * SECTOR, 512);
                self.note(sector, u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")));
            }
        }
        disk
    }

    fn note(&mut self, sector: u64, stamp: u64) {
        let from = self.recorder.position();
        self.effects.entry(sector).or_default().push(Effect { from, stamp });
    }

    /// Several writes in flight at once, to different sectors.
    fn write(&mut self, disk: &Disk, sectors: &[u64], fua: bool) {
        let (tell, told) = channel();
        for sector in sectors {
            self.stamp += 1;
            self.note(*sector, self.stamp);
            let buf = IoBuf::zeroed(512);
            buf.copy_from(&stamped(self.stamp));
            let tell = tell.clone();
            let done = Box::new(move |outcome| drop(tell.send(outcome)));
            disk.submit(IoRequest { op: IoOp::Write { offset: sector * SECTOR, buf, fua }, done });
        }
        drop(tell);
        told.iter().for_each(|outcome: Result<(), _>| outcome.expect("it is writable"));
    }

    fn drop_block(&mut self, disk: &Disk, block: u64, zero: bool) {
        for within in USED {
            self.note(sector_of(block, within), 0);
        }
        let (offset, len) = (block * BLOCK, BLOCK);
        let op = if zero {
            IoOp::WriteZeroes { offset, len, may_unmap: true }
        } else {
            IoOp::Discard { offset, len }
        };
        disk.run(op).expect("it takes discards");
    }

    fn flush(&mut self, disk: &Disk) {
        let began = self.recorder.position();
        disk.flush().expect("it flushes");
        self.flushes.push(Flushed { began, done: self.recorder.position() });
    }

    fn run(&mut self, disk: &Disk, random: &mut Random, rounds: u64) {
        for _ in 0..rounds {
            let block = random.below(BLOCKS);
            match random.below(10) {
                0 => self.drop_block(disk, block, false),
                1 => self.drop_block(disk, block, true),
                2 => {
                    let began = self.recorder.position();
                    let sector = sector_of(block, USED[2]);
                    self.write(disk, &[sector], true);
                    // Only that sector is promised, so this counts as no flush of the others.
                    let done = self.recorder.position();
                    assert!(done > began);
                }
                _ => {
                    let count = random.below(4) + 1;
                    let other = random.below(BLOCKS);
                    let mut sectors: Vec<u64> = (0..count)
                        .map(|n| {
                            sector_of(
                                if n % 2 == 0 { block } else { other },
                                USED[usize::try_from(n).expect("small")],
                            )
                        })
                        .collect();
                    sectors.dedup();
                    self.write(disk, &sectors, false);
                }
            }
            if random.below(3) > 0 {
                self.flush(disk);
            }
        }
    }

    /// Stamps that a sector may have after a cut when the record had `prefix` entries.
    fn allowed(&self, sector: u64, prefix: usize) -> Vec<u64> {
        let promised = self.flushes.iter().rfind(|flush| flush.done <= prefix).map_or(0, |flush| flush.began);
        let effects = self.effects.get(&sector).map_or(&[][..], Vec::as_slice);
        let covered = effects.iter().rfind(|effect| effect.from < promised).map_or(0, |effect| effect.stamp);
        let later = effects.iter().filter(|effect| effect.from >= promised && effect.from <= prefix);
        later.map(|effect| effect.stamp).chain([covered]).collect()
    }

    fn judge(&self, prefix: usize, choice: Unflushed) {
        let image: Arc<dyn ImageFile> = Arc::new(self.recorder.replay_prefix(prefix, choice));
        let why = || format!("prefix {prefix} of {}, {choice:?}", self.recorder.position());
        let report = vhdx::check(&image);
        assert!(report.is_sound(), "{}: {:?}", why(), report.errors);
        let before = self.content(&image, prefix, &why);
        // Replay into the file, twice: the second finds nothing to do, and both read as the replay in memory did.
        for _ in 0..2 {
            let disk = Builder::open(Arc::clone(&image)).writable();
            drop(disk.unwrap_or_else(|error| panic!("{}: {error}", why())));
            assert_eq!(vhdx::info(&image).expect("it is an image").log, LogInfo::Clean, "{}", why());
            assert_eq!(self.content(&image, prefix, &why), before, "{}", why());
        }
        assert_sound(&image);
    }

    fn content(&self, file: &Arc<dyn ImageFile>, prefix: usize, why: &dyn Fn() -> String) -> Vec<u64> {
        let image = read_only(file);
        let mut content = Vec::new();
        for block in 0..BLOCKS {
            for within in USED.into_iter().chain(WATCHED) {
                let sector = sector_of(block, within);
                let bytes = bytes_at(&image, sector * SECTOR, 512);
                let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
                assert_eq!(bytes, stamped(stamp), "{}: sector {sector} is torn", why());
                let allowed = self.allowed(sector, prefix);
                assert!(
                    allowed.contains(&stamp),
                    "{}: sector {sector} holds {stamp}, not {allowed:?}",
                    why()
                );
                content.push(stamp);
            }
        }
        content
    }

    fn ends_with_header(&self, prefix: usize) -> bool {
        let log = self.recorder.log();
        let last = prefix.checked_sub(1).and_then(|last| log.get(last));
        matches!(last, Some(Record::Change(Change::Write { offset, .. })) if *offset < 192 << 10)
    }

    fn judge_all(&self, every: usize) {
        for prefix in (0..=self.recorder.position()).step_by(every) {
            let seed = prefix as u64;
            self.judge(prefix, Unflushed::None);
            self.judge(prefix, Unflushed::Torn { seed });
            // Where a header was just written, every combination of it with the rest must be harmless.
            let subsets = if self.ends_with_header(prefix) { 12 } else { 1 };
            for more in 0..subsets {
                self.judge(prefix, Unflushed::Subset { seed: seed + 77 + more * 1_000_003 });
            }
        }
        self.judge(self.recorder.position(), Unflushed::All);
    }
}

fn spec() -> Spec {
    Spec { block_bytes: BLOCK, ..Spec::dynamic(BLOCKS * BLOCK) }
}

// Invariants C2, C5, D1, D2, D3: mapping after data, acknowledged after both, idempotent replay.
#[test]
fn no_power_cut_loses_what_was_flushed() {
    let mut guest = Guest::new(&spec());
    let mut random = Random(0x5eed_0001);
    let disk = guest.open();
    guest.run(&disk, &mut random, 30);
    disk.close().expect("it closes");
    // Whatever was complete at the close is promised.
    let done = guest.recorder.position();
    guest.flushes.push(Flushed { began: done, done });
    let disk = guest.open();
    guest.run(&disk, &mut random, 40);
    // Killed: the next opener replays, and a cut may hit that too.
    drop(disk);
    let disk = guest.reopen();
    guest.run(&disk, &mut random, 20);
    disk.close().expect("it closes");
    guest.judge_all(1);
}

#[test]
fn no_power_cut_at_the_end_of_a_log_generation_loses_anything() {
    let mut guest = Guest::new(&spec());
    let mut random = Random(0x5eed_0002);
    let disk = guest.open();
    for _ in 0..150 {
        let block = random.below(BLOCKS);
        if random.below(2) == 0 {
            guest.drop_block(&disk, block, false);
        }
        guest.write(&disk, &[sector_of(block, USED[0])], false);
        guest.flush(&disk);
    }
    drop(disk);
    guest.judge_all(3);
}

#[test]
fn unflushed_payload_of_a_killed_session_is_never_shown_in_another_block() {
    let mut guest = Guest::new(&spec());
    let disk = guest.open();
    guest.write(&disk, &[sector_of(0, 0)], false);
    guest.flush(&disk);
    for block in 1..4 {
        guest.write(&disk, &USED.map(|within| sector_of(block, within)), false);
    }
    // Killed: three blocks of payload lie behind the end of what the log knows.
    drop(disk);
    let disk = guest.reopen();
    for block in 4..8 {
        guest.write(&disk, &[sector_of(block, 1)], false);
    }
    guest.flush(&disk);
    drop(disk);
    guest.judge_all(1);
}

// Invariant C7: freed space is not reused before what freed it is durable.
#[test]
fn space_of_a_discarded_block_goes_to_nobody_before_the_discard_is_durable() {
    let mut guest = Guest::new(&spec());
    let disk = guest.open();
    for block in 0..12 {
        guest.write(&disk, &USED.map(|within| sector_of(block, within)), false);
    }
    guest.flush(&disk);
    for block in 0..6 {
        guest.drop_block(&disk, block, block % 2 == 0);
    }
    // More than the fresh space holds, so the file must grow, or take what was freed.
    for block in 12..BLOCKS {
        guest.write(&disk, &[sector_of(block, 0)], false);
    }
    drop(disk);
    guest.judge_all(1);
}
