//! Group commit: requests that arrive together share a transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockio::{BlockDevice, FaultDevice, Geometry, IoOp, IoRequest, MemoryDevice, OpKind};

use crate::world::{MIB, ROOT, World, attr, create, result};

/// Counts flushes.
struct Counted<D> {
    inner: D,
    flushes: AtomicU64,
}

impl<D: BlockDevice> BlockDevice for Counted<D> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        if matches!(request.op, IoOp::Flush) {
            self.flushes.fetch_add(1, Ordering::SeqCst);
        }
        self.inner.submit(request);
    }
}

#[test]
fn parallel_creates_share_commits() {
    const CLIENTS: u16 = 32;
    const EACH: usize = 4;
    let inner = FaultDevice::new(MemoryDevice::new(256 * MIB));
    let device = Arc::new(Counted { inner, flushes: AtomicU64::new(0) });
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
        device.inner.hold(Some(OpKind::Flush));
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

#[test]
fn reads_need_no_commit() {
    let device = Arc::new(Counted { inner: MemoryDevice::new(64 * MIB), flushes: AtomicU64::new(0) });
    let world = World::on(device.clone());
    let c = world.client(1);
    let before = device.flushes.load(Ordering::SeqCst);
    for _ in 0..10 {
        c.getattr(ROOT);
        c.stat();
    }
    assert_eq!(device.flushes.load(Ordering::SeqCst), before);
}
