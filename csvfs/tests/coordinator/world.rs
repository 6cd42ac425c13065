//! A volume in memory, a coordinator on it, and clients that talk to it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex};

use blockio::{BlockDevice, MemoryDevice};
use csvfs::coordinator::{CoordinatorTiming, OpenError};
use csvfs::pb::request::Op;
use csvfs::pb::{self, FileKind, Reply, Request, reply};
use csvfs::{Coordinator, CreateParams, OpenParams, PushTarget, Volume, check};
use lockmgr::{ClientId, ClusterId, Epoch, Millis, NodeId, Term, VolumeId};
use uuid::Uuid;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const BLOCK: u64 = 4096;
pub(crate) const ROOT: u64 = csvfs::ROOT_INO;

/// Keeps what a coordinator says unasked.
#[derive(Default)]
pub(crate) struct Pushes {
    recalls: Mutex<VecDeque<(ClientId, pb::Recall)>>,
    overdue: Mutex<Vec<(ClientId, u64)>>,
    changed: Condvar,
}

impl Pushes {
    /// The next recall, waiting for it.
    pub(crate) fn recall(&self) -> (ClientId, pb::Recall) {
        let recalls = self.recalls.lock().expect("no panic");
        let mut recalls = self.changed.wait_while(recalls, |r| r.is_empty()).expect("no panic");
        recalls.pop_front().expect("it is not empty")
    }

    pub(crate) fn no_recall(&self) -> bool {
        self.recalls.lock().expect("no panic").is_empty()
    }

    pub(crate) fn overdue(&self) -> Vec<(ClientId, u64)> {
        self.overdue.lock().expect("no panic").clone()
    }
}

impl PushTarget for Pushes {
    fn push(&self, to: ClientId, push: pb::Push) {
        if let Some(pb::push::What::Recall(recall)) = push.what {
            self.recalls.lock().expect("no panic").push_back((to, recall));
            self.changed.notify_all();
        }
    }

    fn overdue(&self, client: ClientId, ino: u64) {
        self.overdue.lock().expect("no panic").push((client, ino));
    }
}

/// A clock that the test moves.
#[derive(Default)]
pub(crate) struct ManualClock(AtomicU64);

impl ManualClock {
    pub(crate) fn advance(&self, ms: u64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

impl csvfs::clock::Clock for ManualClock {
    fn now(&self) -> Millis {
        Millis(self.0.load(Ordering::SeqCst))
    }

    fn wall(&self) -> pb::Timestamp {
        let passed = self.0.load(Ordering::SeqCst) / 1000;
        pb::Timestamp { seconds: 1_000_000 + i64::try_from(passed).expect("a short test"), nanos: 0 }
    }
}

/// See the module.
pub(crate) struct World {
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) volume: VolumeId,
    pub(crate) term: u64,
    pub(crate) pushes: Arc<Pushes>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) coordinator: Arc<Coordinator>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::of_size(256 * MIB)
    }

    pub(crate) fn of_size(bytes: u64) -> Self {
        Self::on(Arc::new(MemoryDevice::new(bytes)))
    }

    pub(crate) fn on(device: Arc<dyn BlockDevice>) -> Self {
        let volume = format(&device);
        Self::open(device, volume, 1)
    }

    pub(crate) fn open(device: Arc<dyn BlockDevice>, volume: VolumeId, term: u64) -> Self {
        Self::try_open(device, volume, term).expect("the volume opens")
    }

    pub(crate) fn try_open(
        device: Arc<dyn BlockDevice>,
        volume: VolumeId,
        term: u64,
    ) -> Result<Self, OpenError> {
        let (pushes, clock) = (Arc::new(Pushes::default()), Arc::new(ManualClock::default()));
        let node = u16::try_from(term % 60).expect("small") + 1;
        let who = (NodeId(node), Epoch(1), Term(term));
        let mut params = OpenParams::new(device.clone(), volume, who, pushes.clone());
        params.clock = clock.clone();
        params.timing = CoordinatorTiming::default();
        params.timing.locks.hold_min_ms = 0;
        params.timing.owner_check_ms = 0;
        let coordinator = Coordinator::open(params)?;
        Ok(Self { device, volume, term, pushes, clock, coordinator })
    }

    /// Ends this coordinator as asked and opens the next one, as on another node.
    pub(crate) fn moved(self) -> Self {
        self.coordinator.close().expect("a clean end");
        Self::open(self.device, self.volume, self.term + 1)
    }

    /// The coordinator dies without a word; the next one takes over.
    pub(crate) fn crashed(self) -> Self {
        self.coordinator.revoke();
        drop(self.coordinator);
        Self::open(self.device, self.volume, self.term + 1)
    }

    /// A client, attached.
    pub(crate) fn client(&self, node: u16) -> Client {
        let client = self.stranger(node);
        client.attach(pb::Attach { name: format!("client {node}"), ..pb::Attach::default() });
        client
    }

    /// A client that has not attached.
    pub(crate) fn stranger(&self, node: u16) -> Client {
        let id = ClientId { node: NodeId(node), epoch: Epoch(1), serial: 1 };
        Client {
            id,
            coordinator: self.coordinator.clone(),
            volume: self.volume,
            term: self.term,
            last_id: AtomicU64::new(0),
        }
    }

    pub(crate) fn check(&self, client: &Client) -> pb::CheckReport {
        match client.ask(Op::Check(pb::Check {})) {
            reply::Result::CheckReport(report) => report,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn assert_clean(&self, client: &Client) -> pb::CheckReport {
        let report = self.check(client);
        assert_eq!(report.problems, Vec::new());
        report
    }
}

pub(crate) fn format(device: &Arc<dyn BlockDevice>) -> VolumeId {
    let cluster = ClusterId(Uuid::from_u128(77));
    let params = CreateParams { name: "vol1".into(), cluster, force: false };
    Volume::create(device.clone(), params).expect("the LUN is empty").volume
}

pub(crate) fn assert_clean_offline(device: &Arc<dyn BlockDevice>) -> pb::CheckReport {
    let report = check::check_device(device).expect("the volume can be checked");
    assert_eq!(report.problems, Vec::new());
    report
}

/// One user of the volume.
pub(crate) struct Client {
    pub(crate) id: ClientId,
    pub(crate) coordinator: Arc<Coordinator>,
    volume: VolumeId,
    term: u64,
    last_id: AtomicU64,
}

impl Client {
    /// The same client, talking to the coordinator of `world`.
    pub(crate) fn follow(self, world: &World) -> Self {
        Self { coordinator: world.coordinator.clone(), term: world.term, ..self }
    }

    pub(crate) fn named(self, id: ClientId) -> Self {
        Self { id, ..self }
    }

    pub(crate) fn request(&self, op: Op) -> Request {
        let request_id = self.last_id.fetch_add(1, Ordering::SeqCst) + 1;
        self.request_with(request_id, op)
    }

    pub(crate) fn request_with(&self, request_id: u64, op: Op) -> Request {
        Request {
            volume: self.volume.0.as_bytes().to_vec().into(),
            term: self.term,
            client: Some(self.id.into()),
            request_id,
            completed_below: 0,
            op: Some(op),
        }
    }

    pub(crate) fn send(&self, request: Request) -> Receiver<Reply> {
        let (tell, told) = sync_channel(1);
        self.coordinator.submit(request, Box::new(move |reply| drop(tell.send(reply))));
        told
    }

    pub(crate) fn start(&self, op: Op) -> Receiver<Reply> {
        self.send(self.request(op))
    }

    pub(crate) fn ask(&self, op: Op) -> reply::Result {
        result(&self.start(op))
    }

    pub(crate) fn attach(&self, attach: pb::Attach) {
        match self.ask(Op::Attach(attach)) {
            reply::Result::Attached(_) => {}
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn attr(&self, op: Op) -> pb::Attr {
        attr(self.ask(op))
    }

    pub(crate) fn errno(&self, op: Op) -> i32 {
        match self.ask(op) {
            reply::Result::Failure(f) if f.kind() == pb::FailureKind::Errno => f.errno,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn failure(&self, op: Op) -> pb::FailureKind {
        match self.ask(op) {
            reply::Result::Failure(f) => f.kind(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn done(&self, op: Op) {
        match self.ask(op) {
            reply::Result::Done(_) => {}
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn create(&self, parent: u64, name: &str) -> pb::Attr {
        self.attr(create(parent, name))
    }

    pub(crate) fn mkdir(&self, parent: u64, name: &str) -> pb::Attr {
        self.attr(make(parent, name, FileKind::Directory))
    }

    pub(crate) fn lookup(&self, parent: u64, name: &str) -> reply::Result {
        self.ask(Op::Lookup(pb::Lookup {
            parent,
            name: name.to_owned().into(),
            cache: false,
            at_once: false,
        }))
    }

    pub(crate) fn exists(&self, parent: u64, name: &str) -> bool {
        matches!(self.lookup(parent, name), reply::Result::Attr(_))
    }

    pub(crate) fn getattr(&self, ino: u64) -> pb::Attr {
        self.attr(Op::GetAttr(pb::GetAttr { ino, cache: false }))
    }

    pub(crate) fn unlink(&self, parent: u64, name: &str) {
        self.done(unlink(parent, name, false));
    }

    pub(crate) fn acquire(&self, ino: u64, mode: pb::GrantMode) -> pb::Granted {
        granted(self.ask(acquire(ino, mode)))
    }

    pub(crate) fn release(&self, ino: u64, to: pb::GrantMode, recall_seq: u64) {
        let release = pb::ReleaseGrant { ino, to: to.into(), recall_seq, commit: None };
        self.done(Op::ReleaseGrant(release));
    }

    pub(crate) fn allocate(&self, ino: u64, offset: u64, need: u64) -> Vec<pb::Extent> {
        map(self.ask(Op::Allocate(pb::Allocate { ino, offset, need, want: 0 })))
    }

    pub(crate) fn map(&self, ino: u64) -> Vec<pb::Extent> {
        map(self.ask(Op::GetMap(pb::GetMap { ino, offset: 0, max_extents: 0 })))
    }

    pub(crate) fn stat(&self) -> pb::VolumeStat {
        match self.ask(Op::StatFs(pb::StatFs {})) {
            reply::Result::VolumeStat(stat) => stat,
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) fn result(reply: &Receiver<Reply>) -> reply::Result {
    reply.recv().expect("every request is answered").result.expect("a reply has a result")
}

pub(crate) fn attr(result: reply::Result) -> pb::Attr {
    match result {
        reply::Result::Attr(attr) => attr,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn granted(result: reply::Result) -> pb::Granted {
    match result {
        reply::Result::Granted(granted) => granted,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn map(result: reply::Result) -> Vec<pb::Extent> {
    match result {
        reply::Result::Map(map) => map.extents,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn make(parent: u64, name: &str, kind: FileKind) -> Op {
    Op::Create(pb::Create {
        parent,
        name: name.to_owned().into(),
        kind: kind.into(),
        mode: 0o644,
        exclusive: true,
        ..pb::Create::default()
    })
}

pub(crate) fn create(parent: u64, name: &str) -> Op {
    make(parent, name, FileKind::Regular)
}

pub(crate) fn unlink(parent: u64, name: &str, directory: bool) -> Op {
    Op::Unlink(pb::Unlink { parent, name: name.to_owned().into(), directory, parting: None })
}

pub(crate) fn rename(from: (u64, &str), to: (u64, &str), flags: u32) -> Op {
    Op::Rename(pb::Rename {
        parent: from.0,
        name: from.1.to_owned().into(),
        new_parent: to.0,
        new_name: to.1.to_owned().into(),
        flags,
        ..pb::Rename::default()
    })
}

pub(crate) fn acquire(ino: u64, mode: pb::GrantMode) -> Op {
    Op::Acquire(pb::Acquire { ino, mode: mode.into() })
}
