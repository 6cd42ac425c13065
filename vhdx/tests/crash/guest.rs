//! The guest of the crash tests: what it asked for, what it was promised, and when.
//!
//! ```text
//!   write A ---- flush ---- write B ---- cut        after the cut A is there; B is old or new; nothing else is allowed
//! ```
//! Each sector that it writes bears a stamp that no other write has, repeated through the sector, so that torn sectors and
//! bytes of others show.
//!
//! **Invariant:** an effect is promised only by a flush that was asked for after it was complete, or by itself if forced.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::channel;

use blockio::{BlockDevice, ImageFile, IoBuf, IoOp, IoRequest};
use vhdx::{Builder, Disk, NewSize, Spec};

use crate::common::{MIB, Random, bytes_at};
use crate::stage::{Files, Stage, path, resolver};

pub(crate) const SECTOR: u64 = 512;
pub(crate) const BLOCK: u64 = MIB;
const SECTORS_PER_BLOCK: u64 = BLOCK / SECTOR;

/// The sectors that the guest uses of a block. Two of each block's neighbours among them make runs across blocks.
pub(crate) const USED: [u64; 6] = [0, 1, 2, 7, 1000, 2047];
/// Sectors that it never writes, and that must stay zero.
pub(crate) const WATCHED: [u64; 2] = [3, 1500];

/// What one request did to one sector.
#[derive(Clone, Copy, Debug)]
struct Effect {
    /// The guest's own time.
    tick: u64,
    /// The moment when it was asked for.
    from: u64,
    /// The moment when it was acknowledged, if it was to be durable by then.
    forced: Option<u64>,
    stamp: u64,
}

/// An acknowledged flush: what was complete at `tick` is durable from the moment `done` on.
#[derive(Clone, Copy, Debug)]
struct Flushed {
    tick: u64,
    done: u64,
}

/// How the guest opens its disk.
pub(crate) type Open = fn(Arc<dyn ImageFile>) -> Builder;

/// The guest and the record of its files.
pub(crate) struct Guest {
    pub(crate) stage: Stage,
    /// Blocks that it uses, by number.
    pub(crate) blocks: Vec<u64>,
    pub(crate) open: Open,
    /// Cuts before this moment are not worth judging.
    pub(crate) judged_from: u64,
    /// Judge every so many cuts, besides those behind a header; for long scenarios.
    pub(crate) judged_every: u64,
    /// What a sector holds before the guest writes it.
    inherited: fn(u64) -> u64,
    /// Which image is its disk, from which moment on.
    tops: Vec<(u64, String)>,
    effects: BTreeMap<u64, Vec<Effect>>,
    flushes: Vec<Flushed>,
    tick: u64,
    stamp: u64,
}

pub(crate) fn sector_of(block: u64, within: u64) -> u64 {
    block * SECTORS_PER_BLOCK + within
}

pub(crate) fn stamped(stamp: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat(64)
}

/// A small step of growth, so that growth happens often.
pub(crate) fn small_steps(file: Arc<dyn ImageFile>) -> Builder {
    Builder::open(file).growth_bytes(3 * MIB)
}

impl Guest {
    /// A guest that uses `blocks` of a new disk.
    pub(crate) fn new(spec: &Spec, blocks: impl IntoIterator<Item = u64>, open: Open) -> Self {
        let mut stage = Stage::default();
        stage.make("0", |file| vhdx::create(file, spec).expect("it is created"));
        Self::on(stage, "0", blocks, open, |_| 0)
    }

    /// A guest that uses `blocks` of the disk in the file `top` of the stage, whose sectors hold what `inherited` says.
    pub(crate) fn on(
        stage: Stage,
        top: &str,
        blocks: impl IntoIterator<Item = u64>,
        open: Open,
        inherited: fn(u64) -> u64,
    ) -> Self {
        Self {
            stage,
            blocks: blocks.into_iter().collect(),
            open,
            judged_from: 0,
            judged_every: 1,
            inherited,
            tops: vec![(0, path(top))],
            effects: BTreeMap::new(),
            flushes: Vec::new(),
            tick: 0,
            stamp: 0,
        }
    }

    /// The image that is the disk at a moment.
    pub(crate) fn top_at(&self, moment: u64) -> &str {
        let top = self.tops.iter().rfind(|(from, _)| *from <= moment);
        &top.expect("there is one from the start").1
    }

    fn top(&self) -> &str {
        self.top_at(u64::MAX)
    }

    /// From the moment `from` on the image `name` is the disk.
    pub(crate) fn moves_to(&mut self, from: u64, name: &str) {
        self.tops.push((from, path(name)));
    }

    pub(crate) fn now(&self) -> u64 {
        self.stage.now()
    }

    /// How the image `top` among `files` is opened.
    pub(crate) fn builder(&self, files: &Files, top: &str) -> Builder {
        (self.open)(Arc::clone(&files[top])).parents(resolver(files), top)
    }

    pub(crate) fn open(&self) -> Disk {
        self.builder(&self.stage.files(), self.top()).writable().expect("it opens for writing")
    }

    /// Opens after a kill: what was not flushed may be lost, and from now on what is there is what counts.
    pub(crate) fn reopen(&mut self) -> Disk {
        let disk = self.open();
        for block in self.blocks.clone() {
            for within in USED.into_iter().chain(WATCHED) {
                let sector = sector_of(block, within);
                let bytes = bytes_at(&disk, sector * SECTOR, 512);
                self.note(sector, u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")));
            }
        }
        disk
    }

    fn note(&mut self, sector: u64, stamp: u64) {
        self.tick += 1;
        let effect = Effect { tick: self.tick, from: self.now(), forced: None, stamp };
        self.effects.entry(sector).or_default().push(effect);
    }

    /// Writes runs of sectors, all in flight at once. The runs do not overlap.
    pub(crate) fn write(&mut self, disk: &Disk, runs: &[(u64, u64)], fua: bool) {
        let (tell, told) = channel();
        for (first, count) in runs {
            let mut content = Vec::new();
            for sector in *first..first + count {
                self.stamp += 1;
                self.note(sector, self.stamp);
                content.extend(stamped(self.stamp));
            }
            let buf = IoBuf::zeroed(content.len());
            buf.copy_from(&content);
            let tell = tell.clone();
            let done = Box::new(move |outcome| drop(tell.send(outcome)));
            disk.submit(IoRequest { op: IoOp::Write { offset: first * SECTOR, buf, fua }, done });
        }
        drop(tell);
        told.iter().for_each(|outcome: Result<(), _>| outcome.expect("it is writable"));
        let done = fua.then(|| self.now());
        for sector in runs.iter().flat_map(|(first, count)| *first..first + count) {
            let effects = self.effects.get_mut(&sector).expect("it was noted");
            effects.last_mut().expect("it was noted").forced = done;
        }
    }

    /// Gives a block up, or zeroes it.
    pub(crate) fn drop_block(&mut self, disk: &Disk, block: u64, zero: bool) {
        for within in USED.into_iter().chain(WATCHED) {
            self.note(sector_of(block, within), 0);
        }
        let (offset, len) = (block * BLOCK, BLOCK);
        // Blocks of a child that a snapshot made are larger than this: giving a part of one up would be a hint only.
        let op = if zero || self.tops.len() > 1 {
            IoOp::WriteZeroes { offset, len, may_unmap: true }
        } else {
            IoOp::Discard { offset, len }
        };
        disk.run(op).expect("it takes discards");
    }

    /// Zeroes the first eight sectors of a block.
    pub(crate) fn zero_start(&mut self, disk: &Disk, block: u64) {
        for within in USED.into_iter().chain(WATCHED).filter(|within| *within < 8) {
            self.note(sector_of(block, within), 0);
        }
        let op = IoOp::WriteZeroes { offset: block * BLOCK, len: 8 * SECTOR, may_unmap: false };
        disk.run(op).expect("it zeroes");
    }

    pub(crate) fn flush(&mut self, disk: &Disk) {
        self.tick += 1;
        let tick = self.tick;
        disk.flush().expect("it flushes");
        self.flushes.push(Flushed { tick, done: self.now() });
    }

    /// Ends the session in order: whatever was complete is promised.
    pub(crate) fn close(&mut self, disk: Disk) {
        self.tick += 1;
        disk.close().expect("it closes");
        self.flushes.push(Flushed { tick: self.tick, done: self.now() });
    }

    /// Changes the size of the disk: what this cuts off is gone, what it adds is zero.
    pub(crate) fn resize(&mut self, disk: &Disk, bytes: u64) {
        for sector in self.sectors().into_iter().filter(|sector| (sector + 1) * SECTOR > bytes) {
            self.note(sector, 0);
        }
        self.tick += 1;
        disk.resize(NewSize::UnsafelyTo(bytes)).expect("it is resized");
        self.flushes.push(Flushed { tick: self.tick, done: self.now() });
    }

    /// Keeps the image as it is and goes on in the empty file `name`.
    pub(crate) fn snapshot(&mut self, disk: &Disk, name: &str) {
        let file = self.stage.file(name);
        self.tick += 1;
        let mut recorded = 0;
        let record = || {
            recorded = self.stage.now();
            Ok(())
        };
        disk.snapshot_when(&file, &path(name), record).expect("it forks");
        self.flushes.push(Flushed { tick: self.tick, done: recorded });
        self.moves_to(recorded, name);
    }

    /// Everything that was asked for so far is promised now.
    pub(crate) fn promise(&mut self) {
        self.tick += 1;
        self.flushes.push(Flushed { tick: self.tick, done: self.now() });
    }

    /// Gives space back and moves blocks: for the guest, nothing happens.
    pub(crate) fn compact(&mut self, disk: &Disk) {
        disk.compact(&mut |_| ControlFlow::Continue(())).expect("it is compacted");
    }

    /// Writes all of a block.
    pub(crate) fn fill(&mut self, disk: &Disk, block: u64) {
        self.write(disk, &[(sector_of(block, 0), SECTORS_PER_BLOCK)], false);
    }

    /// Random requests, with a flush after two of three.
    pub(crate) fn play(&mut self, disk: &Disk, random: &mut Random, rounds: u64) {
        for _ in 0..rounds {
            self.step(disk, random);
            if random.below(3) > 0 {
                self.flush(disk);
            }
        }
    }

    fn step(&mut self, disk: &Disk, random: &mut Random) {
        let (block, other) = (self.any_block(random), self.any_block(random));
        match random.below(12) {
            0 => self.drop_block(disk, block, false),
            1 => self.drop_block(disk, block, true),
            2 => self.zero_start(disk, block),
            3 => self.write(disk, &[(sector_of(block, USED[2]), 1)], true),
            4 => self.write(disk, &[(sector_of(block, 0), 3)], random.below(2) == 0),
            // The end of a block and the start of the next, in one request.
            5 if self.blocks.contains(&(block + 1)) => {
                self.write(disk, &[(sector_of(block, 2047), 3)], false);
            }
            _ => {
                let mut runs = vec![(sector_of(block, USED[0]), 1), (sector_of(block, USED[3]), 1)];
                if other != block {
                    runs.extend([(sector_of(other, USED[4]), 1), (sector_of(other, USED[1]), 2)]);
                }
                self.write(disk, &runs, false);
            }
        }
    }

    pub(crate) fn any_block(&self, random: &mut Random) -> u64 {
        self.blocks[usize::try_from(random.below(self.blocks.len() as u64)).expect("small")]
    }

    /// Stamps that a sector may have after a cut at the moment `prefix`.
    pub(crate) fn allowed(&self, sector: u64, prefix: u64) -> Vec<u64> {
        let promised = self.flushes.iter().rfind(|flush| flush.done <= prefix).map_or(0, |flush| flush.tick);
        let effects = self.effects.get(&sector).map_or(&[][..], Vec::as_slice);
        let is_certain =
            |effect: &Effect| effect.tick < promised || effect.forced.is_some_and(|done| done <= prefix);
        let certain = effects.iter().rposition(is_certain);
        let later = effects[certain.map_or(0, |at| at + 1)..].iter().filter(|effect| effect.from <= prefix);
        let before = certain.map_or_else(|| (self.inherited)(sector), |at| effects[at].stamp);
        later.map(|effect| effect.stamp).chain([before]).collect()
    }

    /// All sectors that are looked at.
    pub(crate) fn sectors(&self) -> Vec<u64> {
        let of = |block: &u64| {
            let block = *block;
            USED.into_iter().chain(WATCHED).map(move |within| sector_of(block, within))
        };
        self.blocks.iter().flat_map(of).collect()
    }
}
