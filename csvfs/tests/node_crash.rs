//! Power cuts while nodes work: data, pools, the intent log, merges, clones, recalls and moves of the coordinator, cut at sampled
//! points of the recorded writes, with every kind of loss of what was not flushed.
//!
//! ```text
//!   two nodes, one client thread, seeded  -> log of writes and flushes -> image at a cut -> new coordinator, replay
//!                                                                      -> check, compare with what was promised
//! ```
//! The oracle knows for each sector which values it may have: what the last fsync promised, or anything that was written
//! since. The LUN is full of old bytes at first, so that fresh space that shows would be seen.
//!
//! `CSVFS_CRASH_SEEDS=N` takes N seeds instead of a few, `CSVFS_CRASH_EVERY=1` cuts at each write.

mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blockio::{BlockDevice, MemoryDevice, Recorder, Unflushed};
use csvfs::node::{File, Node, ROOT_INO};
use lockmgr::{Epoch, NodeId, VolumeId};
use world::{Dice, PLAIN, World, create, fsync, open, read, write};

const LUN_BYTES: u64 = 96 << 20;
const SECTOR: u64 = 512;
const FILES: usize = 4;
const FILE_SECTORS: u64 = 2048;
const OLD: u8 = 0xEE;

/// Something that was done: when it was begun, and when it was acknowledged, as positions in the log.
struct Step {
    begun: usize,
    done: usize,
    file: usize,
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    Write {
        sector: u64,
        sectors: u64,
        tag: u8,
    },
    Sync,
    Cut {
        sectors: u64,
    },
    Remove,
    /// The file is a clone of another one from now on.
    CloneOf {
        from: usize,
    },
}

/// What a file may look like.
#[derive(Clone, Default)]
struct Promise {
    /// Values that a sector may have; what is not here reads zeros.
    sectors: BTreeMap<u64, BTreeSet<u8>>,
    last: BTreeMap<u64, u8>,
    size_min: u64,
    size_max: u64,
    size: u64,
    may_be_gone: bool,
    gone: bool,
}

impl Promise {
    fn apply(&mut self, what: What, acknowledged: bool) {
        match what {
            What::Write { sector, sectors, tag } => self.write(sector..sector + sectors, tag),
            What::Sync if acknowledged => self.sync(),
            What::Sync => {}
            What::Cut { sectors } => self.cut(sectors, acknowledged),
            What::Remove => {
                self.may_be_gone = true;
                self.gone = acknowledged;
            }
            What::CloneOf { .. } => unreachable!("it concerns two files"),
        }
    }

    /// A clone of this file, which has its name when it is whole.
    fn cloned(&mut self, acknowledged: bool) -> Self {
        let mut clone = self.clone();
        clone.sync();
        (clone.gone, clone.may_be_gone) = (false, !acknowledged);
        if acknowledged {
            // Cloning brings all of the source to the coordinator first.
            self.sync();
        }
        clone
    }

    fn write(&mut self, range: std::ops::Range<u64>, tag: u8) {
        for sector in range.clone() {
            let values = self.sectors.entry(sector).or_insert_with(|| [0].into());
            values.insert(tag);
            self.last.insert(sector, tag);
        }
        self.size = self.size.max(range.end);
        self.size_max = self.size_max.max(range.end);
    }

    fn sync(&mut self) {
        for (sector, values) in &mut self.sectors {
            *values = [self.last[sector]].into();
        }
        (self.size_min, self.size_max) = (self.size, self.size);
    }

    fn cut(&mut self, sectors: u64, acknowledged: bool) {
        if acknowledged {
            // Cutting brings everything to the coordinator first.
            self.sync();
            self.sectors.split_off(&sectors);
            self.last.split_off(&sectors);
            self.size = sectors;
            (self.size_min, self.size_max) = (sectors, sectors);
            return;
        }
        self.size_min = self.size_min.min(sectors);
        for values in self.sectors.range_mut(sectors..).map(|(_, values)| values) {
            values.insert(0);
        }
    }

    fn objection(&self, bytes: &[u8]) -> Option<String> {
        let size = bytes.len() as u64 / SECTOR;
        if !(self.size_min..=self.size_max).contains(&size) {
            return Some(format!("{size} sectors, not {} to {}", self.size_min, self.size_max));
        }
        let zero: BTreeSet<u8> = [0].into();
        for (sector, found) in (0_u64..).zip(bytes.chunks(512)) {
            let allowed = self.sectors.get(&sector).unwrap_or(&zero);
            let whole = found.iter().all(|byte| *byte == found[0]);
            if !whole || !allowed.contains(&found[0]) {
                return Some(format!("sector {sector} holds {}, not one of {allowed:?}", found[0]));
            }
        }
        None
    }
}

/// A LUN on which every byte of the data area is somebody's old one.
fn used_lun() -> MemoryDevice {
    let device = MemoryDevice::new(LUN_BYTES);
    for at in (29 << 20..LUN_BYTES).step_by(1 << 20) {
        device.write_at(at, &vec![OLD; 1 << 20]).expect("a write");
    }
    device
}

struct Recorded {
    recorder: Arc<Recorder<MemoryDevice>>,
    volume: VolumeId,
    term: u64,
    start: usize,
    steps: Vec<Step>,
}

struct Workload {
    world: World,
    recorder: Arc<Recorder<MemoryDevice>>,
    nodes: Vec<Arc<Node>>,
    files: Vec<Option<Arc<File>>>,
    sizes: Vec<u64>,
    dice: Dice,
    tag: u8,
    steps: Vec<Step>,
}

impl Workload {
    fn step(&mut self, file: usize, what: What, act: impl FnOnce(&mut Self)) {
        let begun = self.recorder.position();
        act(self);
        self.steps.push(Step { begun, done: self.recorder.position(), file, what });
    }

    fn random(&mut self) {
        let file = self.dice.size(FILES);
        let Some(handle) = self.files[file].clone() else { return };
        match self.dice.roll(28) {
            0..=10 => self.write(file, &handle),
            11..=17 => self.step(file, What::Sync, |_| fsync(&handle).expect("an fsync")),
            18 => self.cut(file, &handle),
            19 => {
                let at = self.dice.roll(FILE_SECTORS) * SECTOR;
                handle.allocate(at, 100_000, true).expect("space");
            }
            20 => self.elsewhere(file),
            21 => self.new_coordinator(),
            22 => self.churn(),
            23..=26 => self.clone_over(file, &handle),
            _ => self.remove(file),
        }
    }

    fn write(&mut self, file: usize, handle: &Arc<File>) {
        let (sector, sectors) = (self.dice.roll(FILE_SECTORS), 1 + self.dice.roll(40));
        self.tag = self.tag % 200 + 1;
        let tag = self.tag;
        self.sizes[file] = self.sizes[file].max(sector + sectors);
        self.step(file, What::Write { sector, sectors, tag }, |_| {
            let bytes = vec![tag; usize::try_from(sectors * SECTOR).expect("small")];
            write(handle, sector * SECTOR, &bytes).expect("a write");
        });
    }

    fn cut(&mut self, file: usize, handle: &Arc<File>) {
        let sectors = self.dice.roll(self.sizes[file] + 1);
        if sectors >= self.sizes[file] {
            return;
        }
        self.sizes[file] = sectors;
        self.step(file, What::Cut { sectors }, |_| {
            handle.set_size(sectors * SECTOR).expect("a smaller size");
        });
    }

    /// The other node takes the file over: the first one's log is merged, what it buffered is committed.
    fn elsewhere(&mut self, file: usize) {
        self.files[file] = None;
        let node = self.nodes[self.dice.size(2)].clone();
        self.files[file] = Some(open(&node, &name(file)));
    }

    /// Another file becomes a clone of this one.
    fn clone_over(&mut self, from: usize, handle: &Arc<File>) {
        let file = (from + 1 + self.dice.size(FILES - 1)) % FILES;
        let node = self.nodes[self.dice.size(2)].clone();
        if self.files[file].take().is_some() {
            let act = |_: &mut Self| node.unlink(ROOT_INO, name(file).as_bytes()).expect("an unlink");
            self.step(file, What::Remove, act);
        }
        // Who clones has the source open: it takes it over from the node that writes to it.
        let source = node.open(handle.ino()).expect("it is there");
        self.step(file, What::CloneOf { from }, |_| {
            node.clone_file(&source, ROOT_INO, name(file).as_bytes(), &PLAIN).expect("a clone");
        });
        self.sizes[file] = self.sizes[from];
        self.files[file] = Some(open(&node, &name(file)));
    }

    fn new_coordinator(&mut self) {
        if self.dice.roll(2) == 0 {
            self.world.stop_coordinator();
        } else {
            self.world.kill_coordinator();
        }
        self.world.start_coordinator();
    }

    /// A file that comes and goes: its blocks are used again.
    fn churn(&mut self) {
        let node = &self.nodes[0];
        let file = create(node, "churn");
        write(&file, 0, &vec![201; 300_000]).expect("a write");
        fsync(&file).expect("an fsync");
        drop(file);
        node.unlink(ROOT_INO, b"churn").expect("an unlink");
    }

    fn remove(&mut self, file: usize) {
        if self.files.iter().flatten().count() < 3 {
            return;
        }
        self.files[file] = None;
        let node = self.nodes[0].clone();
        let act = |_: &mut Self| node.unlink(ROOT_INO, name(file).as_bytes()).expect("an unlink");
        self.step(file, What::Remove, act);
    }
}

fn name(file: usize) -> String {
    format!("f{file}")
}

fn record(seed: u64, steps: usize) -> Recorded {
    let base = used_lun();
    let recorder = Arc::new(Recorder::with_base(base.fork(), base));
    let device: Arc<dyn BlockDevice> = recorder.clone();
    let world = World::on(device);
    let nodes = vec![world.node(1), world.node(2)];
    let files: Vec<_> = (0..FILES).map(|n| Some(create(&nodes[n % 2], &name(n)))).collect();
    let start = recorder.position();
    let volume = world.volume;
    let (dice, sizes) = (Dice(seed), vec![0; FILES]);
    let mut work =
        Workload { world, recorder: recorder.clone(), nodes, files, sizes, dice, tag: 0, steps: Vec::new() };
    for _ in 0..steps {
        work.random();
    }
    let Workload { world, steps, files, nodes, .. } = work;
    let term = world.term();
    drop((files, nodes));
    world.kill_coordinator();
    Recorded { recorder, volume, term, start, steps }
}

impl Recorded {
    fn promises(&self, cut: usize) -> Vec<Promise> {
        let mut promises = vec![Promise::default(); FILES];
        for step in self.steps.iter().filter(|step| step.begun < cut) {
            match step.what {
                What::CloneOf { from } => promises[step.file] = promises[from].cloned(step.done <= cut),
                what => promises[step.file].apply(what, step.done <= cut),
            }
        }
        promises
    }

    fn check(&self, cut: usize, choice: Unflushed) {
        let place = format!("cut at {cut} with {choice:?}");
        let image: Arc<dyn BlockDevice> = Arc::new(self.recorder.replay_prefix(cut, choice));
        let offline = csvfs::check::check_device(&image).expect("the volume can be checked");
        assert_eq!(offline.problems, Vec::new(), "{place}, before the replay");
        let world = World::of_after(image, self.volume, self.term);
        let coordinator = world.link.coordinator().expect("there");
        coordinator.node_gone(NodeId(1), Epoch(1));
        coordinator.node_gone(NodeId(2), Epoch(1));
        let node = world.node(3);
        for (file, promise) in self.promises(cut).iter().enumerate() {
            match node.lookup(ROOT_INO, name(file).as_bytes()) {
                Ok(_) => {
                    assert!(!promise.gone, "{place}: file {file} is back");
                    let bytes = read(&open(&node, &name(file)), 0, 4 << 20).expect("a read");
                    if let Some(why) = promise.objection(&bytes) {
                        panic!("{place}: file {file}: {why}");
                    }
                }
                Err(error) => assert!(promise.may_be_gone, "{place}: file {file}: {error}"),
            }
        }
        let report = node.check().expect("a check");
        assert_eq!((report.problems, report.pools), (Vec::new(), 0), "{place}");
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

// Invariants C1, C2, C3, C5, C7, D1, D2, D3, D4.
#[test]
fn a_power_cut_anywhere_loses_nothing_that_was_acknowledged_and_leaks_nothing() {
    let (seeds, every) = (number("CSVFS_CRASH_SEEDS", 3), number("CSVFS_CRASH_EVERY", 23));
    for seed in 1..=seeds {
        let recorded = record(0x0bad_cafe ^ (seed * 7919), 120);
        let last = recorded.recorder.position();
        let step = usize::try_from(every).expect("small");
        for (n, cut) in (recorded.start..=last).rev().step_by(step.max(1)).enumerate() {
            let seed = seed * 10_000 + n as u64;
            let choices =
                [Unflushed::Torn { seed }, Unflushed::None, Unflushed::Subset { seed }, Unflushed::All];
            recorded.check(cut, choices[n % 4]);
        }
    }
}
