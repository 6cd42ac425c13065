//! The node library beside the raw LUN: the same io_uring engine, the same bytes of the LUN, turns taken in one run.
//!
//! `node_io [--seconds S] [--rounds N] [--dir DIR]`: makes a LUN in a file in DIR, a volume on it and a
//! file that is written once. Raw requests go to where that file lies on the LUN; ours go through the file. Turns are short
//! and many (S seconds, N of each), so that whatever else the machine does meets both sides.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a harness: it measures time and talks to people"
)]

use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use benchmarks::{LocalVolume, Row, Turns, median, print_table};
use blockio::{BlockDevice, FileDevice, IoBuf, IoOp, IoRequest};
use csvfs::node::{Creation, File, Node, ROOT_INO};

type Failure = Box<dyn std::error::Error>;

const LUN_BYTES: u64 = 3 << 30;
const FILE_BYTES: u64 = 1 << 30;
const CREATION: Creation = Creation { mode: 0o644, umask: 0, uid: 0, gid: 0 };

/// Where the file lies on the LUN, as a device: what the node library does, done by hand.
struct Raw {
    device: Arc<FileDevice>,
    start: u64,
}

impl BlockDevice for Raw {
    fn geometry(&self) -> blockio::Geometry {
        self.device.geometry()
    }

    fn submit(&self, request: IoRequest) {
        let op = match request.op {
            IoOp::Read { offset, buf } => IoOp::Read { offset: self.start + offset, buf },
            IoOp::Write { offset, buf, fua } => IoOp::Write { offset: self.start + offset, buf, fua },
            other => other,
        };
        self.device.submit(IoRequest { op, done: request.done });
    }
}

#[derive(Clone, Copy)]
struct Workload {
    name: &'static str,
    write: bool,
    bytes: usize,
    depth: usize,
    order: Order,
    goal: f64,
}

/// In which order a file is visited.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    Sequential,
    Random,
    /// As random, each place once.
    Scattered,
}

const fn load(
    name: &'static str,
    write: bool,
    bytes: usize,
    depth: usize,
    order: Order,
    goal: f64,
) -> Workload {
    Workload { name, write, bytes, depth, order, goal }
}

const WORKLOADS: [Workload; 6] = [
    load("4 KiB random read QD1 (IOPS)", false, 4096, 1, Order::Random, 0.92),
    load("4 KiB random write QD1 (IOPS)", true, 4096, 1, Order::Random, 0.92),
    load("4 KiB random read QD32 (IOPS)", false, 4096, 32, Order::Random, 0.95),
    load("4 KiB random write QD32 (IOPS)", true, 4096, 32, Order::Random, 0.95),
    load("1 MiB seq read QD4 (MiB/s)", false, 1 << 20, 4, Order::Sequential, 0.95),
    load("1 MiB seq write QD4 (MiB/s)", true, 1 << 20, 4, Order::Sequential, 0.95),
];

/// Every write goes to a hole of a new file: blocks come from the node's pool.
const GROWTH: [Workload; 3] = [
    load("4 KiB write, new space QD1 (IOPS)", true, 4096, 1, Order::Scattered, 0.7),
    load("4 KiB write, new space QD32", true, 4096, 32, Order::Scattered, 0.7),
    load("1 MiB write, new space QD4", true, 1 << 20, 4, Order::Sequential, 0.7),
];

/// Offsets of a workload, the same for both sides.
struct Offsets {
    state: u64,
    next: u64,
}

impl Offsets {
    fn next(&mut self, load: &Workload) -> u64 {
        let slots = FILE_BYTES / load.bytes as u64;
        self.next += 1;
        let slot = match load.order {
            Order::Random => {
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
                self.state % slots
            }
            Order::Sequential => (self.next - 1) % slots,
            // An odd factor visits each of a power of two slots once.
            Order::Scattered => self.next.wrapping_mul(0x9E37_79B1) % slots,
        };
        slot * load.bytes as u64
    }

    /// Whether every place was visited once.
    fn round_is_over(&self, load: &Workload) -> bool {
        self.next >= FILE_BYTES / load.bytes as u64
    }
}

/// What one side did in one turn.
struct Turn {
    per_second: f64,
    /// Processor time of the whole process, in microseconds.
    cpu_us_per_io: f64,
}

fn cpu_us() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let nanos = time.tv_sec * 1_000_000_000 + time.tv_nsec;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(0)).as_secs_f64() * 1e6
}

/// Keeps `depth` requests in flight for a while, or until each place of the file was visited once if `once`.
fn drive(device: &dyn BlockDevice, load: &Workload, length: Duration, once: bool) -> Result<Turn, Failure> {
    let (tell, told) = mpsc::channel();
    let bufs: Vec<IoBuf> = (0..load.depth).map(|_| IoBuf::zeroed(load.bytes)).collect();
    let mut offsets = Offsets { state: 0x9E37_79B9, next: 0 };
    let submit = |offsets: &mut Offsets, slot: usize| {
        let (tell, buf, offset) = (tell.clone(), bufs[slot].clone(), offsets.next(load));
        let op =
            if load.write { IoOp::Write { offset, buf, fua: false } } else { IoOp::Read { offset, buf } };
        device.submit(IoRequest { op, done: Box::new(move |outcome| drop(tell.send((slot, outcome)))) });
    };
    let (start, cpu) = (Instant::now(), cpu_us());
    (0..load.depth).for_each(|slot| submit(&mut offsets, slot));
    let (mut ended, mut in_flight) = (0u32, load.depth);
    while in_flight > 0 {
        let (slot, outcome) = told.recv()?;
        outcome?;
        ended += 1;
        if start.elapsed() < length && !(once && offsets.round_is_over(load)) {
            submit(&mut offsets, slot);
        } else {
            in_flight -= 1;
        }
    }
    let per_second = f64::from(ended) / start.elapsed().as_secs_f64();
    Ok(Turn { per_second, cpu_us_per_io: (cpu_us() - cpu) / f64::from(ended) })
}

/// The turns of both sides.
#[derive(Default)]
struct Sides {
    base: Vec<Turn>,
    ours: Vec<Turn>,
}

impl Sides {
    fn row(&self, load: &Workload) -> Row {
        let middle = |turns: &[Turn]| median(&mut turns.iter().map(|t| t.per_second).collect::<Vec<_>>());
        Row { name: load.name.into(), base: middle(&self.base), ours: middle(&self.ours), goal: load.goal }
    }

    /// How much more processor time one of our requests takes.
    fn print_cpu(&self, load: &Workload) {
        let middle = |turns: &[Turn]| median(&mut turns.iter().map(|t| t.cpu_us_per_io).collect::<Vec<_>>());
        let (base, ours) = (middle(&self.base), middle(&self.ours));
        println!("  {:34} {base:6.2} us {ours:6.2} us, {:+.2} us more", load.name, ours - base);
    }
}

fn compare(load: &Workload, raw: &Raw, file: &File, turns: &Turns) -> Result<Sides, Failure> {
    let length = turns.length;
    let mut sides = Sides::default();
    drive(raw, load, length / 4, false)?;
    for round in 0..turns.rounds {
        // Who goes first changes, so that neither gains from the other's wake.
        for node in [round % 2 == 1, round % 2 == 0] {
            if node {
                sides.ours.push(drive(file, load, length, false)?);
            } else {
                sides.base.push(drive(raw, load, length, false)?);
            }
        }
    }
    Ok(sides)
}

/// The same, where our side writes to holes of a new file each time.
fn compare_growth(load: &Workload, raw: &Raw, world: &LocalVolume, turns: &Turns) -> Result<Sides, Failure> {
    let length = turns.length;
    let mut sides = Sides::default();
    for _ in 0..turns.rounds {
        sides.base.push(drive(raw, load, length, true)?);
        let free = world.node.statfs()?.blocks_free;
        let file = world.node.create(ROOT_INO, b"growing", &CREATION, true)?.1;
        blockio::ImageFile::set_len(&*file, FILE_BYTES)?;
        sides.ours.push(drive(&*file, load, length, true)?);
        drop(file);
        world.node.unlink(ROOT_INO, b"growing")?;
        // Not all of it: a larger pool has the volume keep more for its metadata.
        while world.node.statfs()?.blocks_free < free / 16 * 15 {
            thread::yield_now();
        }
    }
    Ok(sides)
}

/// Has every block of the LUN's free space written once: a sparse file below would make new space slower for us alone.
fn fill_free_space(world: &LocalVolume) -> Result<(), Failure> {
    let file = world.node.create(ROOT_INO, b"filler", &CREATION, true)?.1;
    let bytes = world.node.statfs()?.blocks_free / 10 * 9 * 4096 / (4 << 20) * (4 << 20);
    blockio::ImageFile::set_len(&*file, bytes)?;
    let chunk = IoBuf::zeroed(4 << 20);
    for offset in (0..bytes).step_by(chunk.len()) {
        file.run(IoOp::Write { offset, buf: chunk.clone(), fua: false })?;
    }
    BlockDevice::flush(&*file)?;
    drop(file);
    Ok(world.node.unlink(ROOT_INO, b"filler")?)
}

/// Durable creates per second in one directory by `clients` threads.
fn creates(node: &Arc<Node>, clients: usize, length: Duration, tag: &str) -> Result<f64, Failure> {
    let dir = node.mkdir(ROOT_INO, tag.as_bytes(), &CREATION)?.ino;
    let start_line = Arc::new(Barrier::new(clients + 1));
    let workers: Vec<_> = (0..clients)
        .map(|client| {
            let (node, start_line) = (node.clone(), start_line.clone());
            thread::spawn(move || {
                start_line.wait();
                let (start, mut count) = (Instant::now(), 0u32);
                while start.elapsed() < length {
                    let name = format!("{client}-{count}");
                    node.create(dir, name.as_bytes(), &CREATION, true).map(drop)?;
                    count += 1;
                }
                Ok::<u32, csvfs::node::FsError>(count)
            })
        })
        .collect();
    start_line.wait();
    let mut total = 0;
    for worker in workers {
        total += worker.join().map_err(|_| "a client panicked")??;
    }
    Ok(f64::from(total) / length.as_secs_f64())
}

fn compare_creates(node: &Arc<Node>, turns: &Turns) -> Result<Row, Failure> {
    let length = turns.length;
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for round in 0..turns.rounds {
        alone.push(creates(node, 1, length, &format!("one{round}"))?);
        together.push(creates(node, 32, length, &format!("many{round}"))?);
    }
    let name = "durable creates (1/s)".into();
    Ok(Row { name, base: median(&mut alone), ours: median(&mut together), goal: 8.0 })
}

/// Writes the whole file once; gives where it lies, which must be in one piece.
fn place(file: &File) -> Result<u64, Failure> {
    benchmarks::fill(file, FILE_BYTES)?;
    match file.map()?.as_slice() {
        [whole] if whole.length >= FILE_BYTES => Ok(whole.lun_offset),
        pieces => Err(format!("the file lies in {} pieces on a fresh volume", pieces.len()).into()),
    }
}

fn main() -> Result<(), Failure> {
    let turns = Turns::of_command_line(15)?;
    let dir = tempfile::tempdir_in(&turns.dir)?;
    let world = LocalVolume::new(&dir.path().join("lun"), LUN_BYTES)?;
    let file = world.node.create(ROOT_INO, b"file", &CREATION, true)?.1;
    let start = place(&file)?;
    let raw = Raw { device: world.device.clone(), start };
    let before = world.node.stats().requests_sent;
    let mapped: Vec<Sides> =
        WORKLOADS.iter().map(|load| compare(load, &raw, &file, &turns)).collect::<Result<_, _>>()?;
    let messages = world.node.stats().requests_sent - before;
    fill_free_space(&world)?;
    let grown: Vec<Sides> =
        GROWTH.iter().map(|load| compare_growth(load, &raw, &world, &turns)).collect::<Result<_, _>>()?;
    let all = || WORKLOADS.iter().chain(&GROWTH).zip(mapped.iter().chain(&grown));
    let rows: Vec<Row> = all().map(|(load, sides)| sides.row(load)).collect();
    print_table("node library and raw LUN", "raw", "node", &rows);
    println!("  messages to the coordinator during the first {}: {messages}", WORKLOADS.len());
    println!("processor time of a request, raw and node (goal: at most 2 us more)");
    all().for_each(|(load, sides)| sides.print_cpu(load));
    let creates = compare_creates(&world.node, &turns)?;
    print_table("grouped commits", "1 client", "32 clients", &[creates]);
    drop(file);
    world.node.detach()?;
    Ok(())
}
