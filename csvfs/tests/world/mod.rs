//! A volume with its coordinator and several nodes in one process, for tests of the node library.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    reason = "each test file uses a part of it, so no part is unused everywhere"
)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use blockio::{BlockDevice, IoBuf, MemoryDevice};
use csvfs::local::{LocalLink, LocalPushes};
use csvfs::node::{CoordinatorLink, Creation, File, FsError, Node, NodeParams, ROOT_INO};
use csvfs::{Coordinator, CreateParams, OpenParams, Volume};
use lockmgr::{ClientId, ClusterId, Epoch, NodeId, Term, VolumeId};

/// Permissions of whatever a test creates.
pub const PLAIN: Creation = Creation { mode: 0o644, umask: 0, uid: 1000, gid: 1000 };

/// Large enough for metadata and some files.
pub const LUN_BYTES: u64 = 1 << 30;

/// See the module.
pub struct World {
    pub device: Arc<dyn BlockDevice>,
    pub volume: VolumeId,
    pub link: Arc<LocalLink>,
    pub pushes: Arc<LocalPushes>,
    term: AtomicU64,
    serial: AtomicU64,
}

impl World {
    pub fn new() -> Self {
        Self::on(Arc::new(MemoryDevice::new(LUN_BYTES)))
    }

    /// Makes a volume on the device and coordinates it.
    pub fn on(device: Arc<dyn BlockDevice>) -> Self {
        let params =
            CreateParams { name: "vol".into(), cluster: ClusterId(uuid::Uuid::new_v4()), force: false };
        let superblock = Volume::create(device.clone(), params).expect("an empty device takes a volume");
        Self::of(device, superblock.volume)
    }

    /// Coordinates the volume that is on the device, as after a restart of everything.
    pub fn of(device: Arc<dyn BlockDevice>, volume: VolumeId) -> Self {
        let world = Self {
            device,
            volume,
            link: Arc::new(LocalLink::default()),
            pushes: LocalPushes::new(),
            term: AtomicU64::new(0),
            serial: AtomicU64::new(1),
        };
        world.start_coordinator();
        world
    }

    /// As [`World::of`], where terms up to `term` are over.
    pub fn of_after(device: Arc<dyn BlockDevice>, volume: VolumeId, term: u64) -> Self {
        let world = Self {
            device,
            volume,
            link: Arc::new(LocalLink::default()),
            pushes: LocalPushes::new(),
            term: AtomicU64::new(term),
            serial: AtomicU64::new(1000),
        };
        world.start_coordinator();
        world
    }

    pub fn term(&self) -> u64 {
        self.term.load(Ordering::SeqCst)
    }

    pub fn start_coordinator(&self) {
        let term = Term(self.term.fetch_add(1, Ordering::SeqCst) + 1);
        let who = (NodeId(1), Epoch(1), term);
        let params = OpenParams::new(self.device.clone(), self.volume, who, self.pushes.clone());
        let coordinator = Coordinator::open(params).expect("the volume is sound");
        self.link.set(Some(coordinator));
        self.pushes.announce(self.volume, term, NodeId(1));
    }

    /// Ends the coordinator in order.
    pub fn stop_coordinator(&self) {
        if let Some(coordinator) = self.link.set(None) {
            coordinator.close().expect("an orderly close");
        }
    }

    /// Ends it as a crash would.
    pub fn kill_coordinator(&self) {
        drop(self.link.set(None));
    }

    pub fn client(&self, node: u16) -> ClientId {
        let serial = self.serial.fetch_add(1, Ordering::SeqCst);
        ClientId { node: NodeId(node), epoch: Epoch(1), serial }
    }

    /// A node on the world's device.
    pub fn node(&self, number: u16) -> Arc<Node> {
        self.node_on(number, self.device.clone())
    }

    /// A node with its own way to the LUN.
    pub fn node_on(&self, number: u16, device: Arc<dyn BlockDevice>) -> Arc<Node> {
        self.node_with(number, device, self.link.clone())
    }

    /// A node with its own way to the coordinator.
    pub fn node_by(&self, number: u16, link: Arc<dyn CoordinatorLink>) -> Arc<Node> {
        self.node_with(number, self.device.clone(), link)
    }

    fn node_with(
        &self,
        number: u16,
        device: Arc<dyn BlockDevice>,
        link: Arc<dyn CoordinatorLink>,
    ) -> Arc<Node> {
        let client = self.client(number);
        let params = NodeParams {
            device,
            link,
            client,
            volume: self.volume,
            term: Term(self.term()),
            name: format!("node {number}"),
        };
        let node = Node::attach(params).expect("the coordinator takes a new client");
        self.pushes.add(client, &node);
        node
    }

    /// What the coordinator finds wrong with the volume.
    pub fn problems(&self, node: &Node) -> Vec<String> {
        let report = node.check().expect("a check");
        report.problems.into_iter().map(|problem| problem.what).collect()
    }
}

pub fn create(node: &Arc<Node>, name: &str) -> Arc<File> {
    node.create(ROOT_INO, name.as_bytes(), &PLAIN, true).expect("a new file").1
}

pub fn open(node: &Arc<Node>, name: &str) -> Arc<File> {
    let attr = node.lookup(ROOT_INO, name.as_bytes()).expect("the file is there");
    node.open(attr.ino).expect("it opens")
}

pub fn buf_of(bytes: &[u8]) -> IoBuf {
    let buf = IoBuf::zeroed(bytes.len());
    buf.copy_from(bytes);
    buf
}

pub fn write(file: &File, offset: u64, bytes: &[u8]) -> Result<usize, FsError> {
    wait(|tell| file.write(offset, buf_of(bytes), tell))
}

pub fn read(file: &File, offset: u64, len: usize) -> Result<Vec<u8>, FsError> {
    let buf = IoBuf::zeroed(len);
    let got = wait(|tell| file.read(offset, buf.clone(), tell))?;
    Ok(buf.slice(0..got).to_vec())
}

pub fn append(file: &File, bytes: &[u8]) -> Result<u64, FsError> {
    wait(|tell| file.append(buf_of(bytes), tell))
}

pub fn fsync(file: &File) -> Result<(), FsError> {
    wait(|tell| file.fsync(tell))
}

/// Starts something and waits for its completion.
pub fn wait<T: Send + 'static>(start: impl FnOnce(Box<dyn FnOnce(T) + Send>)) -> T {
    later(start).recv().expect("each request completes")
}

/// Starts something; the outcome comes through the channel.
pub fn later<T: Send + 'static>(start: impl FnOnce(Box<dyn FnOnce(T) + Send>)) -> mpsc::Receiver<T> {
    let (tell, told) = mpsc::channel();
    start(Box::new(move |outcome| drop(tell.send(outcome))));
    told
}

/// Numbers that look random and are the same in each run.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    pub fn size(&mut self, below: usize) -> usize {
        usize::try_from(self.roll(below as u64)).expect("below a usize")
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let seed = self.roll(251);
        (0..len as u64).map(|at| u8::try_from((at * 7 + seed) % 251 + 1).expect("at most 251")).collect()
    }
}

/// The content that a file should have.
#[derive(Default)]
pub struct Model(pub Vec<u8>);

impl Model {
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        if self.0.len() < end {
            self.0.resize(end, 0);
        }
        self.0[offset..end].copy_from_slice(bytes);
    }

    pub fn read(&self, offset: usize, len: usize) -> &[u8] {
        let start = offset.min(self.0.len());
        &self.0[start..(offset + len).min(self.0.len()).max(start)]
    }
}
