//! Power cuts: at every flush of a recorded workload, with every kind of loss of what was not flushed.
//!
//! ```text
//!   workload (seeded) -> log of writes and flushes -> for each flush: image before it -> check -> compare with the model
//! ```
//! The oracle is a model of what the client was promised: after a cut, the volume is as after the last acknowledged
//! request, or as after the one that was on its way. The LUN is full of old data at first, so that a fresh block that is
//! readable would be seen.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockio::{BlockDevice, MemoryDevice, Record, Recorder, Unflushed};
use csvfs::format::layout::{JOURNAL_BYTES, JOURNAL_OFFSET};
use csvfs::pb::request::Op;
use csvfs::pb::{self, ExtentState, FileKind, GrantMode, reply};
use lockmgr::VolumeId;

use crate::world::{
    BLOCK, Client, MIB, ROOT, World, assert_clean_offline, attr, create, format, make, rename, result, unlink,
};

const LUN: u64 = 64 * MIB;
const BLOCKS_MAX: u64 = 6;

/// What a file or directory must look like: path to content (`None`: a directory).
type Model = BTreeMap<String, Option<Vec<u8>>>;

/// A small generator of the same numbers for the same seed.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

struct Workload<'a> {
    client: &'a Client,
    device: &'a dyn BlockDevice,
    rng: Rng,
    model: Model,
    inos: BTreeMap<String, u64>,
    made: u64,
}

impl Workload<'_> {
    fn dir_of(&self, path: &str) -> u64 {
        path.rsplit_once('/').map_or(ROOT, |(dir, _)| self.inos[dir])
    }

    fn name_of(path: &str) -> &str {
        path.rsplit('/').next().expect("a path has a last part")
    }

    fn pick(&mut self, files: bool) -> Option<String> {
        let fits = |c: &&Option<Vec<u8>>| c.is_some() == files;
        let paths: Vec<&String> = self.model.iter().filter(|(_, c)| fits(c)).map(|(p, _)| p).collect();
        let at = self.rng.below(paths.len().max(1) as u64);
        paths.get(usize::try_from(at).expect("small")).map(|p| (*p).clone())
    }

    fn new_path(&mut self) -> String {
        self.made += 1;
        match self.pick(false) {
            Some(dir) if self.rng.below(2) == 0 => format!("{dir}/n{}", self.made),
            _ => format!("n{}", self.made),
        }
    }

    /// One step: requests, the model changed when the promise is made. Only the last request of a step changes it.
    fn step(&mut self) {
        match self.rng.below(10) {
            0 | 1 => self.create_file(),
            2 => self.create_dir(),
            3..=6 => self.write(),
            7 => self.rename(),
            8 => self.truncate(),
            _ => self.remove(),
        }
    }

    fn create_file(&mut self) {
        let path = self.new_path();
        let ino = self.client.attr(create(self.dir_of(&path), Self::name_of(&path))).ino;
        self.inos.insert(path.clone(), ino);
        self.model.insert(path, Some(Vec::new()));
    }

    fn create_dir(&mut self) {
        let path = self.new_path();
        let ino = self.client.attr(make(self.dir_of(&path), Self::name_of(&path), FileKind::Directory)).ino;
        self.inos.insert(path.clone(), ino);
        self.model.insert(path, None);
    }

    /// Appends blocks: allocate, write to the LUN, flush, commit. What was allocated is invisible until the commit.
    fn write(&mut self) {
        let Some(path) = self.pick(true) else { return };
        let ino = self.inos[&path];
        let mut content = self.model[&path].clone().expect("a file");
        let start = (content.len() as u64).div_ceil(BLOCK) * BLOCK;
        let blocks = 1 + self.rng.below(BLOCKS_MAX);
        self.client.acquire(ino, GrantMode::Exclusive);
        let extents = self.client.allocate(ino, start, blocks * BLOCK);
        content.resize(usize::try_from(start).expect("small"), 0);
        for i in 0..blocks {
            let at = start + i * BLOCK;
            let fill = u8::try_from(1 + self.rng.below(200)).expect("small");
            let block = [fill; 4096];
            let extent = extents.iter().find(|e| e.file_offset <= at && at < e.file_offset + e.length);
            let extent = extent.expect("it was allocated");
            self.device.write_at(extent.lun_offset + (at - extent.file_offset), &block).expect("good");
            content.extend_from_slice(&block);
        }
        self.device.flush().expect("good");
        let commit = pb::Commit {
            ino,
            written: vec![pb::ByteRange { offset: start, length: blocks * BLOCK }],
            size_bytes: Some(content.len() as u64),
            ..pb::Commit::default()
        };
        let release =
            pb::ReleaseGrant { ino, to: GrantMode::Null.into(), recall_seq: 0, commit: Some(commit) };
        self.client.attr(Op::ReleaseGrant(release));
        self.model.insert(path, Some(content));
    }

    fn rename(&mut self) {
        let Some(from) = self.pick(true) else { return };
        let onto = self.rng.below(2) == 0;
        let to = if onto { self.pick(true).expect("there is one") } else { self.new_path() };
        if from == to {
            return;
        }
        let (a, b) = ((self.dir_of(&from), Self::name_of(&from)), (self.dir_of(&to), Self::name_of(&to)));
        self.client.done(rename(a, b, 0));
        let (content, ino) =
            (self.model.remove(&from).expect("there"), self.inos.remove(&from).expect("there"));
        self.model.insert(to.clone(), content);
        self.inos.insert(to, ino);
    }

    fn truncate(&mut self) {
        let Some(path) = self.pick(true) else { return };
        let len = self.model[&path].as_ref().map_or(0, Vec::len) as u64;
        let size = self.rng.below(len + 1) / BLOCK * BLOCK;
        let set = pb::SetAttr { ino: self.inos[&path], size_bytes: Some(size), ..pb::SetAttr::default() };
        self.client.attr(Op::SetAttr(set));
        let content = self.model.get_mut(&path).and_then(Option::as_mut).expect("a file");
        content.truncate(usize::try_from(size).expect("small"));
    }

    fn remove(&mut self) {
        let Some(path) = self.pick(true) else { return };
        self.client.done(unlink(self.dir_of(&path), Self::name_of(&path), false));
        self.model.remove(&path);
    }
}

/// The tree as a client reads it, following the states of extents.
fn read_tree(client: &Client, device: &dyn BlockDevice) -> Model {
    let (mut tree, mut todo) = (Model::new(), vec![(ROOT, String::new())]);
    while let Some((dir, prefix)) = todo.pop() {
        let reply::Result::DirPage(page) =
            client.ask(Op::ReadDir(pb::ReadDir { ino: dir, cookie: 0, max_entries: 0, cache: false }))
        else {
            panic!("a directory can be listed")
        };
        assert!(page.end);
        for entry in page.entries {
            let path = format!("{prefix}{}", String::from_utf8_lossy(&entry.name));
            let attr = entry.attr.expect("entries have attributes");
            if attr.kind() == FileKind::Directory {
                todo.push((attr.ino, format!("{path}/")));
                tree.insert(path, None);
            } else {
                tree.insert(path, Some(read_file(client, device, &attr)));
            }
        }
    }
    tree
}

fn read_file(client: &Client, device: &dyn BlockDevice, attr: &pb::Attr) -> Vec<u8> {
    let size = usize::try_from(attr.size_bytes).expect("small");
    let mut content = vec![0; size.next_multiple_of(4096)];
    for extent in client.map(attr.ino) {
        let start = usize::try_from(extent.file_offset).expect("small");
        let end = (start + usize::try_from(extent.length).expect("small")).min(content.len());
        if extent.state() == ExtentState::Data && start < end {
            device.read_at(extent.lun_offset, &mut content[start..end]).expect("good");
        }
    }
    content.truncate(size);
    content
}

/// A LUN on which somebody else's data was: every block that is not written is recognisable.
fn used_lun() -> MemoryDevice {
    let lun = MemoryDevice::new(LUN);
    let old = vec![0xee; 1 << 20];
    for at in 29..45 {
        lun.write_at(at * MIB, &old).expect("good");
    }
    lun
}

struct Recorded {
    recorder: Arc<Recorder<MemoryDevice>>,
    volume: VolumeId,
    /// Log position and model, after each acknowledged step.
    promises: Vec<(usize, Model)>,
    client: lockmgr::ClientId,
}

fn record(seed: u64, steps: usize) -> Recorded {
    let base = used_lun();
    let recorder = Arc::new(Recorder::with_base(base.fork(), base));
    let device: Arc<dyn BlockDevice> = recorder.clone();
    let volume = format(&device);
    let world = World::open(device.clone(), volume, 1);
    let client = world.client(1);
    let mut work = Workload {
        client: &client,
        device: device.as_ref(),
        rng: Rng(seed),
        model: Model::new(),
        inos: BTreeMap::new(),
        made: 0,
    };
    let mut promises = vec![(recorder.position(), work.model.clone())];
    for _ in 0..steps {
        work.step();
        promises.push((recorder.position(), work.model.clone()));
    }
    let client = client.id;
    Recorded { recorder, volume, promises, client }
}

impl Recorded {
    fn check(&self, prefix: usize, choice: Unflushed) {
        let done = self.promises.iter().rposition(|(at, _)| *at <= prefix).expect("the volume was made");
        let image = self.recorder.replay_prefix(prefix, choice);
        let device: Arc<dyn BlockDevice> = Arc::new(image);
        assert_clean_offline(&device);
        let world = World::open(device.clone(), self.volume, 2);
        world.coordinator.client_gone(self.client);
        let reader = world.client(2);
        let tree = read_tree(&reader, device.as_ref());
        let allowed = &self.promises[done..(done + 2).min(self.promises.len())];
        let fits = allowed.iter().any(|(_, model)| *model == tree);
        assert!(fits, "at {prefix} with {choice:?}: {}", difference(&allowed[0].1, &tree));
        world.assert_clean(&reader);
    }

    /// Positions right before each flush: there, the most is at stake.
    fn cuts(&self) -> Vec<usize> {
        let log = self.recorder.log();
        let start = self.promises[0].0;
        let flush = |(at, record): (usize, &Record)| {
            (at > start && matches!(record, Record::Flush { .. })).then_some(at)
        };
        log.iter().enumerate().filter_map(flush).collect()
    }
}

fn difference(expected: &Model, found: &Model) -> String {
    let of = |m: &Model| -> BTreeMap<String, Option<(usize, u32)>> {
        m.iter().map(|(p, c)| (p.clone(), c.as_ref().map(|c| (c.len(), crc32c::crc32c(c))))).collect()
    };
    format!("expected {:?}, found {:?}", of(expected), of(found))
}

// Invariants C1, C2, C4, C7, D2, D3.
#[test]
fn a_power_cut_at_any_flush_loses_nothing_that_was_promised() {
    let recorded = record(0x5eed_0001, 40);
    for (i, cut) in recorded.cuts().into_iter().enumerate() {
        let seed = i as u64;
        let choices = [Unflushed::None, Unflushed::All, Unflushed::Subset { seed }, Unflushed::Torn { seed }];
        recorded.check(cut, choices[i % 4]);
        recorded.check(cut, choices[(i + 2) % 4]);
    }
}

// Invariant D3: what was done again in part is done again as a whole.
#[test]
fn a_replay_of_the_journal_that_is_cut_short_loses_nothing() {
    let recorded = record(0x5eed_0002, 40);
    let (end, model) = recorded.promises.last().expect("steps were made");
    let image = recorded.recorder.replay_prefix(*end, Unflushed::None);
    let again = Arc::new(Recorder::with_base(image.fork(), image));
    let device: Arc<dyn BlockDevice> = again.clone();
    drop(World::open(device, recorded.volume, 2));
    let flushes: Vec<usize> =
        (0..again.position()).filter(|at| matches!(again.log()[*at], Record::Flush { .. })).collect();
    assert!(flushes.len() > 2, "the opening has written something: {}", flushes.len());
    for (i, &cut) in flushes.iter().enumerate() {
        let seed = i as u64;
        for choice in [Unflushed::None, Unflushed::All, Unflushed::Torn { seed }] {
            let image: Arc<dyn BlockDevice> = Arc::new(again.replay_prefix(cut, choice));
            assert_clean_offline(&image);
            let world = World::open(image.clone(), recorded.volume, 3);
            world.coordinator.client_gone(recorded.client);
            let reader = world.client(2);
            let tree = read_tree(&reader, image.as_ref());
            assert!(tree == *model, "at {cut} with {choice:?}: {}", difference(model, &tree));
            world.assert_clean(&reader);
        }
    }
}

// Invariant D5: what an older coordinator appends late is no record.
#[test]
fn a_record_of_an_older_term_is_not_done_again() {
    let lun = Arc::new(MemoryDevice::new(LUN));
    let volume = format(&(lun.clone() as Arc<dyn BlockDevice>));
    let late = Arc::new(lun.fork());
    let old = World::open(late.clone(), volume, 2);
    let client = old.client(2);
    client.create(ROOT, "late");
    let mut record = vec![0; usize::try_from(JOURNAL_BYTES).expect("small")];
    late.read_at(JOURNAL_OFFSET, &mut record).expect("good");
    let follows = |term: u64| {
        let lun = Arc::new(lun.fork());
        drop(World::open(lun.clone(), volume, 2));
        if term > 2 {
            drop(World::open(lun.clone(), volume, term));
        }
        lun.write_at(JOURNAL_OFFSET, &record).expect("good");
        let world = World::open(lun.clone(), volume, term + 1);
        world.coordinator.client_gone(client.id);
        let reader = world.client(3);
        read_tree(&reader, lun.as_ref()).contains_key("late")
    };
    assert!(follows(2), "it is a record while no newer term has begun");
    assert!(!follows(3));
}

#[test]
fn torn_writes_of_many_seeds_lose_nothing_that_was_promised() {
    for seed in 1..9 {
        let recorded = record(0xabcd_0000 + seed, 16);
        for (i, cut) in recorded.cuts().into_iter().enumerate().step_by(3) {
            recorded.check(cut, Unflushed::Torn { seed: seed * 1000 + i as u64 });
        }
    }
}

// A creation that is cut short leaves either no volume or a whole one.
#[test]
fn a_power_cut_while_formatting_leaves_no_half_volume() {
    let recorder = Arc::new(Recorder::new(MemoryDevice::new(LUN)));
    let device: Arc<dyn BlockDevice> = recorder.clone();
    format(&device);
    for cut in (0..=recorder.position()).step_by(5).chain([recorder.position()]) {
        for choice in [Unflushed::None, Unflushed::Torn { seed: cut as u64 }] {
            let image: Arc<dyn BlockDevice> = Arc::new(recorder.replay_prefix(cut, choice));
            if csvfs::Superblock::read(image.as_ref()).is_ok() {
                let report = csvfs::check::check_device(&image).expect("a volume is whole");
                // One copy of the superblock may still be on its way.
                let other = report.problems.iter().filter(|p| !p.what.contains("superblock")).count();
                assert_eq!(other, 0, "{report:?}");
            }
        }
    }
}

/// Waves of creates with long names, so that the metadata takes further chunks of the LUN.
fn record_growth() -> (Arc<Recorder<MemoryDevice>>, VolumeId, Vec<(usize, u64)>) {
    let base = used_lun();
    let recorder = Arc::new(Recorder::with_base(base.fork(), base));
    let device: Arc<dyn BlockDevice> = recorder.clone();
    let volume = format(&device);
    let world = World::open(device, volume, 1);
    let client = world.client(1);
    let mut promises = vec![(recorder.position(), 0)];
    for wave in 0..8_u64 {
        let name = |i: u64| format!("{wave}-{i}-{:0>200}", 0);
        let started: Vec<_> = (0..400).map(|i| client.start(create(ROOT, &name(i)))).collect();
        started.iter().for_each(|reply| assert_eq!(attr(result(reply)).nlink, 1));
        promises.push((recorder.position(), (wave + 1) * 400));
    }
    let blocks = world.assert_clean(&client).metadata_blocks;
    assert!(blocks * BLOCK > 8 * MIB, "the store has taken no chunk");
    (recorder, volume, promises)
}

// A crash between the commit that takes a chunk and the slot that lists it loses neither the chunk nor the store.
#[test]
fn a_power_cut_while_the_metadata_grows_loses_nothing() {
    let (recorder, volume, promises) = record_growth();
    let flushes: Vec<usize> = recorder
        .log()
        .iter()
        .enumerate()
        .filter_map(|(at, r)| (at > promises[0].0 && matches!(r, Record::Flush { .. })).then_some(at))
        .collect();
    for (i, &cut) in flushes.iter().enumerate() {
        let seed = i as u64;
        let choice = [Unflushed::Torn { seed }, Unflushed::None, Unflushed::Subset { seed }][i % 3];
        let image: Arc<dyn BlockDevice> = Arc::new(recorder.replay_prefix(cut, choice));
        let found = assert_clean_offline(&image).inodes - 1;
        let done = promises.iter().rposition(|(at, _)| *at <= cut).expect("the volume was made");
        let most = promises.get(done + 1).map_or(promises[done].1, |(_, count)| *count);
        assert!((promises[done].1..=most).contains(&found), "{found} files at {cut} with {choice:?}");
        // The next coordinator finishes the growth, and goes on.
        let world = World::open(image, volume, 2);
        let reader = world.client(2);
        world.coordinator.client_gone(world.stranger(1).id);
        reader.create(ROOT, "goes on");
        world.assert_clean(&reader);
    }
}
