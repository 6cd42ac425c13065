//! Group commit: requests that arrive together share a transaction.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use blockio::{BlockDevice, FaultDevice, Geometry, IoOp, IoRequest, MemoryDevice, OpKind};
use csvfs::pb::request::Op;
use csvfs::pb::{GetAttr, GrantMode};

use crate::world::{BLOCK, MIB, ROOT, World, assert_clean_offline, attr, create, result};

/// Whether a request makes something stable: a flush, or a forced write.
fn makes_stable(request: &IoRequest) -> bool {
    matches!(request.op, IoOp::Flush | IoOp::Write { fua: true, .. })
}

/// Counts what makes something stable, and the other writes.
struct Counted<D> {
    inner: D,
    flushes: AtomicU64,
    writes: AtomicU64,
}

impl<D> Counted<D> {
    fn new(inner: D) -> Arc<Self> {
        Arc::new(Self { inner, flushes: AtomicU64::new(0), writes: AtomicU64::new(0) })
    }
}

impl<D: BlockDevice> BlockDevice for Counted<D> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        if makes_stable(&request) {
            self.flushes.fetch_add(1, Ordering::SeqCst);
        } else if matches!(request.op, IoOp::Write { .. }) {
            self.writes.fetch_add(1, Ordering::SeqCst);
        }
        self.inner.submit(request);
    }
}

#[test]
fn parallel_creates_share_commits() {
    const CLIENTS: u16 = 32;
    const EACH: usize = 4;
    let inner = FaultDevice::new(MemoryDevice::new(256 * MIB));
    let device = Counted::new(inner);
    let world = World::on(device.clone());
    let clients: Vec<_> = (1..=CLIENTS).map(|node| world.client(node)).collect();
    let flushes_of = |work: &dyn Fn()| {
        let before = device.flushes.load(Ordering::SeqCst);
        work();
        device.flushes.load(Ordering::SeqCst) - before
    };
    let alone = flushes_of(&|| assert_eq!(clients[0].create(ROOT, "alone").nlink, 1));
    let together = flushes_of(&|| {
        // While the first commit hangs, all the others arrive.
        device.inner.hold(Some(OpKind::Write));
        let first = clients[0].start(create(ROOT, "first"));
        device.inner.wait_held(1);
        let started: Vec<_> = clients
            .iter()
            .flat_map(|c| (0..EACH).map(move |i| c.start(create(ROOT, &format!("{}-{i}", c.id)))))
            .collect();
        device.inner.release();
        started.iter().chain([&first]).for_each(|reply| assert_eq!(attr(result(reply)).nlink, 1));
    });
    let requests = u64::from(CLIENTS) * EACH as u64 + 1;
    assert!(together * 8 < requests * alone, "{together} flushes for {requests} requests, {alone} for one");
    assert!(together <= 4 * alone, "{together} flushes, one commit has {alone}");
    world.assert_clean(&clients[0]);
}

/// Lets flushes through one by one.
struct Gated<D> {
    inner: D,
    waiting: Mutex<VecDeque<IoRequest>>,
    came: Condvar,
    open: AtomicBool,
}

impl<D: BlockDevice> Gated<D> {
    /// Waits for a flush, and lets it through.
    fn let_one_through(&self) {
        let waiting = self.waiting.lock().unwrap();
        let flush = self.came.wait_while(waiting, |waiting| waiting.is_empty()).unwrap().pop_front();
        self.inner.submit(flush.expect("one has come"));
    }

    fn wait_for_flush(&self) {
        let waiting = self.waiting.lock().unwrap();
        drop(self.came.wait_while(waiting, |waiting| waiting.is_empty()).unwrap());
    }

    fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
        self.waiting.lock().unwrap().drain(..).for_each(|flush| self.inner.submit(flush));
    }
}

impl<D: BlockDevice> BlockDevice for Gated<D> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        let mut waiting = self.waiting.lock().unwrap();
        if makes_stable(&request) && !self.open.load(Ordering::SeqCst) {
            waiting.push_back(request);
            self.came.notify_all();
        } else {
            drop(waiting);
            self.inner.submit(request);
        }
    }
}

#[test]
fn who_only_looks_does_not_wait_for_the_commit_of_what_others_change() {
    let (inner, waiting) = (MemoryDevice::new(64 * MIB), Mutex::default());
    let gate = Gated { inner, waiting, came: Condvar::new(), open: AtomicBool::new(true) };
    let device = Arc::new(gate);
    let world = World::on(device.clone());
    let (changing, looking) = (world.client(1), world.client(2));
    device.open.store(false, Ordering::SeqCst);
    let first = changing.start(create(ROOT, "first"));
    device.wait_for_flush();
    // Both come while the first commit is under way: one batch, the change before the look.
    let second = changing.start(create(ROOT, "second"));
    let look = looking.start(Op::GetAttr(GetAttr { ino: ROOT, cache: false }));
    // The flushes of the first commit, until one comes that is the second's.
    while first.try_recv().is_err() {
        device.let_one_through();
        device.wait_for_flush();
    }
    assert!(look.try_recv().is_ok(), "it was told what was committed before");
    assert!(second.try_recv().is_err(), "it is not durable yet");
    device.open();
    assert_eq!(attr(result(&second)).nlink, 1);
    world.assert_clean(&looking);
}

// The blocks of one file are freed along with the name of the next.
#[test]
fn removing_one_file_after_the_other_takes_a_commit_for_each() {
    const FILES: u64 = 50;
    let device = Counted::new(MemoryDevice::new(64 * MIB));
    let world = World::on(device.clone());
    let c = world.client(1);
    let names: Vec<String> = (0..FILES).map(|i| format!("f{i}")).collect();
    let free = c.stat().blocks_free;
    for name in &names {
        let ino = c.create(ROOT, name).ino;
        c.acquire(ino, GrantMode::Exclusive);
        c.allocate(ino, 0, BLOCK);
        c.release(ino, GrantMode::Null, 0);
    }
    let before = device.flushes.load(Ordering::SeqCst);
    names.iter().for_each(|name| c.unlink(ROOT, name));
    let made = device.flushes.load(Ordering::SeqCst) - before;
    assert!(made < FILES + FILES / 2, "{made} for {FILES} files");
    assert_eq!(c.stat().blocks_free, free, "who looks for the space finds it");
    world.assert_clean(&c);
}

#[test]
fn reads_need_no_commit() {
    let device = Counted::new(MemoryDevice::new(64 * MIB));
    let world = World::on(device.clone());
    let c = world.client(1);
    let before = device.flushes.load(Ordering::SeqCst);
    for _ in 0..10 {
        c.getattr(ROOT);
        c.stat();
    }
    assert_eq!(device.flushes.load(Ordering::SeqCst), before);
}

// A page that many commits changed is written by the checkpoint after them, once.
#[test]
fn between_checkpoints_a_commit_writes_no_page() {
    const FILES: u64 = 100;
    let device = Counted::new(MemoryDevice::new(64 * MIB));
    let world = World::on(device.clone());
    let c = world.client(1);
    c.create(ROOT, "first");
    let writes = || device.writes.load(Ordering::SeqCst);
    let before = writes();
    (0..FILES).for_each(|i| assert_eq!(c.create(ROOT, &format!("f{i}")).nlink, 1));
    assert_eq!(writes(), before);
    assert_eq!(world.assert_clean(&c).inodes, FILES + 2, "a check sees what only the journal has");
    c.create(ROOT, "last");
    let (device_, before) = (world.device.clone(), writes());
    world.coordinator.close().expect("a clean end");
    let pages = writes() - before;
    assert!(pages < FILES, "{pages} pages for {FILES} commits");
    assert_eq!(assert_clean_offline(&device_).inodes, FILES + 3);
}
