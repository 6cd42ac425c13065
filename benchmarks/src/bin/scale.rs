//! Large numbers: a directory with a million entries, what a client takes to remember all of them, and a clone of a TiB.
//!
//! `scale [--entries N] [--dir DIR]`: a volume on a sparse file in DIR, coordinator and clients in this process. What the last
//! client takes is the growth of the process while it asks for everything, after another client has done so and remembers it too: the
//! coordinator's caches are full by then, so the growth is the client's memory and the coordinator's grants for it. While files are
//! made by a client that remembers 1,000, the process grows by what the coordinator keeps for them.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a harness: it measures time and talks to people"
)]

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use blockio::{BlockDevice, FileDevice};
use csvfs::local::{LocalLink, LocalPushes};
use csvfs::node::{CoordinatorLink, Creation, Node, NodeParams, ROOT_INO};
use csvfs::pb::request::Op;
use csvfs::pb::{self, reply};
use csvfs::{Coordinator, CreateParams, OpenParams, Volume};
use lockmgr::{ClientId, ClusterId, Epoch, NodeId, Term, VolumeId};
use uuid::Uuid;

type Failure = Box<dyn std::error::Error>;

const LUN_BYTES: u64 = 4 << 40;
const CREATION: Creation = Creation { mode: 0o755, umask: 0, uid: 0, gid: 0 };
/// Callers that create at once.
const CREATORS: usize = 64;
const PAGE_ENTRIES: u32 = 4096;
/// Extents of the file that is cloned, and the length of each: more than a TiB.
const PIECES: u64 = 2500;
const PIECE_BYTES: u64 = 420 << 20;
const BLOCK_BYTES: u64 = 4096;

/// A volume and its coordinator.
struct World {
    device: Arc<dyn BlockDevice>,
    volume: VolumeId,
    pushes: Arc<LocalPushes>,
    link: Arc<LocalLink>,
}

impl World {
    fn new(device: Arc<dyn BlockDevice>) -> Result<Self, Failure> {
        let name = "bench".to_owned();
        let params = CreateParams { name, cluster: ClusterId(Uuid::from_u128(1)), force: true };
        let volume = Volume::create(device.clone(), params)?.volume;
        let (pushes, link) = (LocalPushes::new(), Arc::new(LocalLink::default()));
        let who = (NodeId(1), Epoch(1), Term(1));
        let params = OpenParams::new(device.clone(), volume, who, pushes.clone());
        link.set(Some(Coordinator::open(params)?));
        Ok(Self { device, volume, pushes, link })
    }

    fn node(&self, number: u16, remembered: usize) -> Result<Arc<Node>, Failure> {
        let client = ClientId { node: NodeId(number), epoch: Epoch(1), serial: 1 };
        let (device, link, volume) = (self.device.clone(), self.link.clone(), self.volume);
        let name = format!("client {number}");
        let node = Node::attach(NodeParams { device, link, client, volume, term: Term(1), name })?;
        self.pushes.add(client, &node);
        node.set_memory(remembered);
        Ok(node)
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let value = work();
    (value, started.elapsed())
}

fn name(number: usize) -> Vec<u8> {
    format!("entry{number}").into_bytes()
}

/// Makes files, many at once.
fn create(writer: &Arc<Node>, folder: u64, numbers: Range<usize>) {
    thread::scope(|scope| {
        for part in 0..CREATORS {
            let numbers = numbers.clone();
            scope.spawn(move || {
                for number in numbers.skip(part).step_by(CREATORS) {
                    drop(writer.create(folder, &name(number), &CREATION, true).expect("a file"));
                }
            });
        }
    });
}

/// All entries with their attributes; gives how many.
fn list(node: &Node, folder: u64) -> usize {
    let (mut cookie, mut found) = (0, 0);
    loop {
        let page = node.readdir(folder, cookie, PAGE_ENTRIES).expect("a page");
        found += page.entries.len();
        cookie = page.entries.last().map_or(cookie, |entry| entry.cookie);
        if page.end {
            return found;
        }
    }
}

/// Looks at each entry by its name.
fn look(node: &Node, folder: u64, entries: usize) {
    for number in 0..entries {
        node.lookup(folder, &name(number)).expect("it is there");
    }
}

fn resident_mib() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: f64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0.0);
    pages * 4096.0 / f64::from(1 << 20)
}

fn directory(world: &World, entries: usize) -> Result<(), Failure> {
    let writer = world.node(1, 1000)?;
    let folder = writer.mkdir(ROOT_INO, b"many", &CREATION)?.ino;
    let (half, empty) = (entries / 2, resident_mib());
    let ((), first_half) = timed(|| create(&writer, folder, 0..half));
    let at_half = resident_mib();
    let ((), second_half) = timed(|| create(&writer, folder, half..entries));
    let at_end = resident_mib();
    writer.detach()?;
    let rate = |time: Duration| entries as f64 / time.as_secs_f64();
    println!("  durable creates in one directory    {:12.0} /s", rate(first_half + second_half));
    println!("  coordinator's growth, first half    {:12.0} MiB", at_half - empty);
    println!("  coordinator's growth, second half   {:12.0} MiB", at_end - at_half);
    let first = world.node(2, entries + 10)?;
    assert_eq!(list(&first, folder), entries);
    look(&first, folder, entries);
    let client = world.node(3, entries + 10)?;
    let before = resident_mib();
    let (found, cold) = timed(|| list(&client, folder));
    assert_eq!(found, entries);
    let ((), by_name) = timed(|| look(&client, folder, entries));
    let sent = client.stats().requests_sent;
    let (found, warm) = timed(|| list(&client, folder));
    assert_eq!(found, entries);
    let ((), again) = timed(|| look(&client, folder, entries));
    println!("  entries listed, cold                {:12.0} /s", rate(cold));
    println!("  entries looked up after that        {:12.0} /s", rate(by_name));
    println!("  entries listed, warm                {:12.0} /s", rate(warm));
    println!("  entries looked up, warm             {:12.0} /s", rate(again));
    println!("  messages of the warm half           {:12}", client.stats().requests_sent - sent);
    println!("  files that the client remembers     {:12}", client.stats().files);
    println!("  memory of the client and its grants {:12.0} MiB (goal: under 1024)", resident_mib() - before);
    client.detach()?;
    first.detach()?;
    Ok(())
}

/// A client that says what it likes.
struct Raw {
    link: Arc<LocalLink>,
    volume: VolumeId,
    last_id: AtomicU64,
}

impl Raw {
    fn ask(&self, op: Op) -> reply::Result {
        let request = pb::Request {
            volume: self.volume.0.as_bytes().to_vec().into(),
            term: 1,
            client: Some(ClientId { node: NodeId(9), epoch: Epoch(1), serial: 1 }.into()),
            request_id: self.last_id.fetch_add(1, Ordering::SeqCst) + 1,
            completed_below: 0,
            op: Some(op),
        };
        let (tell, told) = sync_channel(1);
        self.link.send(request, Box::new(move |reply| drop(tell.send(reply))));
        let reply = told.recv().expect("an answer").expect("a coordinator");
        match reply.result.expect("a result") {
            reply::Result::Failure(failure) => panic!("{failure:?}"),
            result => result,
        }
    }

    /// A new file that this client holds alone.
    fn file(&self, name: &str) -> u64 {
        let create = pb::Create {
            parent: ROOT_INO,
            name: name.to_owned().into(),
            kind: pb::FileKind::Regular.into(),
            mode: 0o644,
            ..pb::Create::default()
        };
        let reply::Result::Attr(attr) = self.ask(Op::Create(create)) else { panic!("no attributes") };
        let mode = pb::GrantMode::Exclusive.into();
        self.ask(Op::Acquire(pb::Acquire { ino: attr.ino, mode }));
        attr.ino
    }

    fn allocate(&self, ino: u64, offset: u64, need: u64) {
        self.ask(Op::Allocate(pb::Allocate { ino, offset, need, want: need }));
    }
}

/// What the coordinator does to clone a file of which no two extents lie together.
fn clone(world: &World) {
    let raw = Raw { link: world.link.clone(), volume: world.volume, last_id: AtomicU64::new(0) };
    raw.ask(Op::Attach(pb::Attach::default()));
    let (source, between, target) = (raw.file("source"), raw.file("between"), raw.file("target"));
    for piece in 0..PIECES {
        raw.allocate(source, piece * PIECE_BYTES, PIECE_BYTES);
        raw.allocate(between, piece * BLOCK_BYTES, BLOCK_BYTES);
    }
    let size = PIECES * PIECE_BYTES;
    let written = vec![pb::ByteRange { offset: 0, length: size }];
    let size_bytes = Some(size);
    raw.ask(Op::Commit(pb::Commit { ino: source, written, size_bytes, ..pb::Commit::default() }));
    let ((), took) = timed(|| {
        let mut at = 0;
        while at < size {
            let (ino, to_ino, length) = (source, target, size - at);
            let op = pb::Clone { ino, offset: at, to_ino, to_offset: at, length, size_bytes: size };
            let reply::Result::Cloned(step) = raw.ask(Op::Clone(op)) else { panic!("no clone") };
            at += step.length;
        }
    });
    println!(
        "  clone of {:.2} TiB in {PIECES} extents  {:12.0} ms (goal: under 1000), {:.1} us for each",
        size as f64 / (1_u64 << 40) as f64,
        took.as_secs_f64() * 1e3,
        took.as_secs_f64() * 1e6 / PIECES as f64,
    );
}

fn main() -> Result<(), Failure> {
    let (mut entries, mut dir) = (1_000_000, std::env::temp_dir());
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--entries" => entries = value()?.parse()?,
            "--dir" => dir = PathBuf::from(value()?),
            _ => return Err(format!("{word}: not known; use --entries N, --dir DIR").into()),
        }
    }
    let folder = tempfile::tempdir_in(dir)?;
    let world = World::new(Arc::new(FileDevice::create(folder.path().join("lun"), LUN_BYTES)?))?;
    println!("large numbers: {entries} entries");
    clone(&world);
    directory(&world, entries)?;
    println!("reproduce: cargo xtask bench scale");
    Ok(())
}
