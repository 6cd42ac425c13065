//! The way of a guest's request beside the node library: virtio queue, VHDX, file of the volume, LUN. The queue is in memory, its
//! driver acts inside of the interrupt, and no guest takes processor time; the node library is asked for the same on another file.
//!
//! `disk_io [--seconds S] [--rounds N] [--dir DIR]`: turns of S seconds, N of each side. The disk's image is written once before,
//! so that every block has its place.
//!
//! Then how often driver and disk tell each other for a thousand requests, when of everything and when by the ring event index, in turn: on
//! a machine each interrupt is one for the guest, and each notification an exit from it. There the driver is a thread of its own.
//!
//! Goal: at depth 32 at least 0.9 of the node library's requests per second.
#![expect(clippy::disallowed_methods, reason = "a harness: it measures time")]

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use benchmarks::{LocalVolume, Row, Turns, fill, median, print_heading, print_row, write_once};
use blockio::{BlockDevice, ImageFile, IoBuf, IoError, IoOp, IoRequest};
use csvfs::node::{Creation, ROOT_INO};
use hv::{DriverCounts, DriverRequest, DriverSetup, Telling, drive_disk};

type Failure = Box<dyn std::error::Error>;

const LUN_BYTES: u64 = 3 << 30;
const DISK_BYTES: u64 = 1 << 30;
const REQUEST_BYTES: u32 = 4096;
const CREATION: Creation = Creation { mode: 0o644, umask: 0, uid: 0, gid: 0 };

struct Load {
    name: &'static str,
    write: bool,
    depth: u16,
    goal: f64,
}

const LOADS: [Load; 4] = [
    Load { name: "4 KiB random read, depth 1", write: false, depth: 1, goal: 0.0 },
    Load { name: "4 KiB random write, depth 1", write: true, depth: 1, goal: 0.0 },
    Load { name: "4 KiB random read, depth 32", write: false, depth: 32, goal: 0.9 },
    Load { name: "4 KiB random write, depth 32", write: true, depth: 32, goal: 0.9 },
];

/// Places in the order in which both sides visit them, until the time is over.
struct Places {
    state: u64,
    ends_at: Instant,
}

impl Places {
    fn new(length: Duration) -> Self {
        Self { state: 0x9E37_79B9, ends_at: Instant::now() + length }
    }

    fn next(&mut self) -> Option<u64> {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let slot = self.state % (DISK_BYTES / u64::from(REQUEST_BYTES));
        (Instant::now() < self.ends_at).then_some(slot * u64::from(REQUEST_BYTES))
    }
}

/// What a turn of the disk came to.
#[derive(Clone, Copy)]
struct Turn {
    per_second: f64,
    interrupts: f64,
    notifications: f64,
}

fn by_queue(
    disk: &Arc<dyn BlockDevice>,
    load: &Load,
    length: Duration,
    (telling, at_once): (Telling, bool),
) -> Result<Turn, Failure> {
    let (start, mut places, write) = (Instant::now(), Places::new(length), load.write);
    let next = move || places.next().map(|offset| DriverRequest { write, offset });
    let setup = DriverSetup { depth: load.depth, bytes: REQUEST_BYTES, telling, at_once };
    let DriverCounts { requests, interrupts, notifications } = drive_disk(Arc::clone(disk), setup, next)?;
    let per_second = f64::from(u32::try_from(requests)?) / start.elapsed().as_secs_f64();
    let per_thousand =
        |count: u64| Ok::<_, Failure>(f64::from(u32::try_from(count * 1000 / requests.max(1))?));
    Ok(Turn {
        per_second,
        interrupts: per_thousand(interrupts)?,
        notifications: per_thousand(notifications)?,
    })
}

/// How often either side is told, and what that is worth.
fn compare_telling(disk: &Arc<dyn BlockDevice>, turns: &Turns) -> Result<(), Failure> {
    print_heading("driver and disk tell each other", "of everything", "by the index");
    for load in &LOADS {
        let mut found = [Vec::new(), Vec::new()];
        for round in 0..turns.rounds {
            for side in [round % 2, 1 - round % 2] {
                let telling = [Telling::Always, Telling::ByIndex][side];
                found[side].push(by_queue(disk, load, turns.length, (telling, false))?);
            }
        }
        let middle =
            |of: fn(&Turn) -> f64, side: usize| median(&mut found[side].iter().map(of).collect::<Vec<_>>());
        let row = |what: &str, of: fn(&Turn) -> f64| {
            let name = format!("{}: {what}", load.name.trim_start_matches("4 KiB random "));
            print_row(&Row { name, base: middle(of, 0), ours: middle(of, 1), goal: 0.0 });
        };
        row("requests a second", |turn| turn.per_second);
        row("interrupts for 1000", |turn| turn.interrupts);
        row("notifications for 1000", |turn| turn.notifications);
    }
    Ok(())
}

/// The same of a device without a queue: each completion submits the next request.
struct ByHand {
    device: Arc<dyn BlockDevice>,
    write: bool,
    state: Mutex<(Places, u32)>,
    tell: mpsc::Sender<Result<(), IoError>>,
}

impl ByHand {
    fn run(device: &Arc<dyn BlockDevice>, load: &Load, length: Duration) -> Result<f64, Failure> {
        let (tell, told) = mpsc::channel();
        let start = Instant::now();
        let state = Mutex::new((Places::new(length), 0));
        let all = Arc::new(Self { device: Arc::clone(device), write: load.write, state, tell });
        for _ in 0..load.depth {
            Self::go_on(&all, IoBuf::zeroed(REQUEST_BYTES as usize));
        }
        (0..load.depth).try_for_each(|_| told.recv().map_err(Failure::from)?.map_err(Failure::from))?;
        let done = all.state.lock().unwrap_or_else(PoisonError::into_inner).1;
        Ok(f64::from(done) / start.elapsed().as_secs_f64())
    }

    fn go_on(self: &Arc<Self>, buf: IoBuf) {
        let next = self.state.lock().unwrap_or_else(PoisonError::into_inner).0.next();
        let Some(offset) = next else { return drop(self.tell.send(Ok(()))) };
        let (all, again) = (Arc::clone(self), buf.clone());
        let op =
            if self.write { IoOp::Write { offset, buf, fua: false } } else { IoOp::Read { offset, buf } };
        let done = Box::new(move |outcome: Result<(), IoError>| match outcome {
            Ok(()) => {
                all.state.lock().unwrap_or_else(PoisonError::into_inner).1 += 1;
                all.go_on(again);
            }
            failed => drop(all.tell.send(failed)),
        });
        self.device.submit(IoRequest { op, done });
    }
}

fn main() -> Result<(), Failure> {
    let turns = Turns::of_command_line(9)?;
    let length = turns.length;
    let dir = tempfile::tempdir_in(&turns.dir)?;
    let volume = LocalVolume::new(&dir.path().join("lun"), LUN_BYTES)?;
    let create = |name: &[u8]| volume.node.create(ROOT_INO, name, &CREATION, true).map(|made| made.1);
    let plain = create(b"plain")?;
    fill(&plain, DISK_BYTES)?;
    let image: Arc<dyn ImageFile> = create(b"disk.vhdx")?;
    vhdx::create(&image, &vhdx::Spec::dynamic(DISK_BYTES))?;
    let disk: Arc<dyn BlockDevice> = Arc::new(vhdx::Builder::open(image).writable()?);
    write_once(&*disk, DISK_BYTES)?;
    let plain: Arc<dyn BlockDevice> = plain;
    print_heading("requests of a guest's disk per second", "node library", "disk");
    for load in &LOADS {
        let (mut base, mut ours) = (Vec::new(), Vec::new());
        for round in 0..turns.rounds {
            // Who goes first changes, so that neither gains from the other's wake.
            for by_disk in [round % 2 == 1, round % 2 == 0] {
                if by_disk {
                    ours.push(by_queue(&disk, load, length, (Telling::ByIndex, true))?.per_second);
                } else {
                    base.push(ByHand::run(&plain, load, length)?);
                }
            }
        }
        let (base, ours) = (median(&mut base), median(&mut ours));
        print_row(&Row { name: load.name.into(), base, ours, goal: load.goal });
    }
    compare_telling(&disk, &turns)?;
    drop((disk, plain));
    volume.node.detach()?;
    Ok(())
}
