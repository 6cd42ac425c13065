//! Many clients of one coordinator: how the cost of what they do grows with their number, up to the limit of 64 nodes.
//!
//! `clients [--files N] [--dir DIR]`: a volume on a file in DIR, coordinator and clients in this process, so that only the
//! protocol and the disk count, not a network. For 1, 4, 16 and 64 clients: durable creates, each client in a folder of its own;
//! looks at what all remember; a change that every client must forget something for; and a new coordinator to which every
//! client tells what it remembers.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a harness: it measures time and talks to people"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use benchmarks::median;
use blockio::{BlockDevice, FileDevice};
use csvfs::local::{LocalLink, LocalPushes};
use csvfs::node::{Creation, Node, NodeParams, ROOT_INO, SetAttr};
use csvfs::{Coordinator, CreateParams, OpenParams, Volume};
use lockmgr::{ClientId, ClusterId, Epoch, NodeId, Term, VolumeId};
use uuid::Uuid;

type Failure = Box<dyn std::error::Error>;

const LUN_BYTES: u64 = 8 << 30;
const CREATION: Creation = Creation { mode: 0o755, umask: 0, uid: 0, gid: 0 };
const CLIENTS: [u16; 4] = [1, 4, 16, 64];
/// Changes of which the median counts.
const CHANGES: usize = 31;

/// A volume, its coordinator, and clients.
struct World {
    device: Arc<dyn BlockDevice>,
    volume: VolumeId,
    pushes: Arc<LocalPushes>,
    link: Arc<LocalLink>,
    nodes: Vec<Arc<Node>>,
}

impl World {
    fn new(device: Arc<dyn BlockDevice>, clients: u16) -> Result<Self, Failure> {
        let name = "bench".to_owned();
        let params = CreateParams { name, cluster: ClusterId(Uuid::from_u128(1)), force: true };
        let volume = Volume::create(device.clone(), params)?.volume;
        let (pushes, link) = (LocalPushes::new(), Arc::new(LocalLink::default()));
        let mut world = Self { device, volume, pushes, link, nodes: Vec::new() };
        world.coordinate(1)?;
        for number in 1..=clients {
            let client = ClientId { node: NodeId(number), epoch: Epoch(1), serial: 1 };
            let (device, link) = (world.device.clone(), world.link.clone());
            let name = format!("client {number}");
            let node = Node::attach(NodeParams { device, link, client, volume, term: Term(1), name })?;
            world.pushes.add(client, &node);
            world.nodes.push(node);
        }
        Ok(world)
    }

    /// The coordinator of a term, after the end of the one before, as in a crash.
    fn coordinate(&self, term: u64) -> Result<(), Failure> {
        drop(self.link.set(None));
        let who = (NodeId(1), Epoch(1), Term(term));
        let params = OpenParams::new(self.device.clone(), self.volume, who, self.pushes.clone());
        self.link.set(Some(Coordinator::open(params)?));
        self.pushes.announce(self.volume, Term(term), NodeId(1));
        Ok(())
    }

    /// All clients at once; gives the time until the last is done.
    fn together(&self, work: impl Fn(&Arc<Node>, usize) + Sync) -> Duration {
        let started = Instant::now();
        thread::scope(|scope| {
            for (number, node) in self.nodes.iter().enumerate() {
                let work = &work;
                scope.spawn(move || work(node, number));
            }
        });
        started.elapsed()
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn measure(clients: u16, files: usize, lun: &std::path::Path) -> Result<(), Failure> {
    let world = World::new(Arc::new(FileDevice::create(lun, LUN_BYTES)?), clients)?;
    let first = &world.nodes[0];
    let name = |number: usize| format!("f{number}").into_bytes();
    let folder = |number: usize| -> Result<u64, Failure> {
        Ok(first.mkdir(ROOT_INO, format!("client{number}").as_bytes(), &CREATION)?.ino)
    };
    let folders: Vec<u64> = (0..world.nodes.len()).map(folder).collect::<Result<_, _>>()?;
    let each = (files / world.nodes.len()).max(1);
    let created = world.together(|node, number| {
        for file in 0..each {
            drop(node.create(folders[number], &name(file), &CREATION, true).expect("a file"));
        }
    });
    let shared: Vec<u64> = (0..256)
        .map(|number| Ok(first.mkdir(ROOT_INO, &name(number), &CREATION)?.ino))
        .collect::<Result<_, Failure>>()?;
    let look = |node: &Arc<Node>, _: usize| {
        for (number, ino) in shared.iter().enumerate() {
            assert_eq!(node.lookup(ROOT_INO, &name(number)).expect("it is there").ino, *ino);
        }
    };
    world.together(look);
    // Some were refused a grant because the folder had just changed.
    world.together(look);
    let sent = || world.nodes.iter().map(|node| node.stats().requests_sent).sum::<u64>();
    let before = sent();
    let looked = world.together(look);
    let messages = sent() - before;
    let mut changes: Vec<f64> = (0..CHANGES).map(|number| change(first, shared[number])).collect();
    let started = Instant::now();
    world.coordinate(2)?;
    first.statfs()?;
    let taken_over = started.elapsed();
    println!(
        "  {clients:>7} {:>12.0} {:>14.0} {messages:>9} {:>14.0} {:>15.1}",
        (each * world.nodes.len()) as f64 / created.as_secs_f64(),
        (shared.len() * world.nodes.len()) as f64 / looked.as_secs_f64(),
        median(&mut changes),
        taken_over.as_secs_f64() * 1e3,
    );
    for node in &world.nodes {
        node.detach()?;
    }
    Ok(())
}

/// Microseconds of a change of what every client remembers.
fn change(node: &Arc<Node>, ino: u64) -> f64 {
    let started = Instant::now();
    node.setattr(ino, &SetAttr { mode: Some(0o700), ..SetAttr::default() }).expect("a change");
    started.elapsed().as_secs_f64() * 1e6
}

fn main() -> Result<(), Failure> {
    let (mut files, mut dir) = (20_000, std::env::temp_dir());
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--files" => files = value()?.parse()?,
            "--dir" => dir = PathBuf::from(value()?),
            _ => return Err(format!("{word}: not known; use --files N, --dir DIR").into()),
        }
    }
    let folder = tempfile::tempdir_in(dir)?;
    println!("clients of one coordinator");
    println!("  clients  creates /s  remembered /s  messages  change by one, us  take-over, ms");
    for clients in CLIENTS {
        measure(clients, files, &folder.path().join(format!("lun{clients}")))?;
    }
    println!("reproduce: cargo xtask bench clients");
    Ok(())
}
