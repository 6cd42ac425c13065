//! A LUN that fails, and a right that is lost.

use std::sync::Arc;

use blockio::{FaultDevice, MemoryDevice, OpKind};
use csvfs::pb::{self, FailureKind};

use crate::world::{MIB, ROOT, World, create, format};

// Invariant D6.
#[test]
fn after_a_failed_flush_nothing_is_acknowledged_any_more() {
    let disk = Arc::new(MemoryDevice::new(64 * MIB));
    let volume = format(&(disk.clone() as Arc<dyn blockio::BlockDevice>));
    for kind in [OpKind::Flush, OpKind::Write] {
        let image = disk.fork();
        let device = Arc::new(FaultDevice::new(image.fork()));
        let world = World::open(device.clone(), volume, 1);
        let c = world.client(1);
        c.create(ROOT, "before");
        device.fail(kind, 1, libc::EIO);
        // A commit is one forced write; a flush comes with the checkpoint, when the journal is full.
        let mut refusals = (0..3_000).filter_map(|i| match c.ask(create(ROOT, &format!("lost-{i}"))) {
            pb::reply::Result::Failure(refusal) => Some(refusal.kind()),
            _ => None,
        });
        assert_eq!(refusals.next(), Some(FailureKind::Stopped), "{kind:?}");
        device.heal();
        for _ in 0..3 {
            let kind = c.failure(create(ROOT, "after"));
            assert!(matches!(kind, FailureKind::Stopped | FailureKind::NotCoordinator), "{kind:?}");
        }
        assert!(world.coordinator.stats().stopped.is_some());
    }
}

// Invariant D5: who lost the right to coordinate writes nothing.
#[test]
fn a_revoked_coordinator_writes_nothing() {
    let device = Arc::new(MemoryDevice::new(64 * MIB));
    let world = World::on(device.clone());
    let c = world.client(1);
    c.create(ROOT, "before");
    let before = device.to_bytes();
    world.coordinator.revoke();
    for op in [create(ROOT, "late"), pb::request::Op::StatFs(pb::StatFs {})] {
        let kind = c.failure(op);
        assert!(matches!(kind, FailureKind::Stopped | FailureKind::NotCoordinator), "{kind:?}");
    }
    drop(world);
    assert!(device.to_bytes() == before, "nothing was written after the end");
}

#[test]
fn garbage_requests_are_refused_and_do_no_harm() {
    let world = World::new();
    let c = world.client(1);
    let extremes = [0, 1, 2, 1 << 40, u64::MAX];
    for &ino in &extremes {
        for op in [
            pb::request::Op::GetAttr(pb::GetAttr { ino, cache: false }),
            pb::request::Op::ReadDir(pb::ReadDir {
                ino,
                cookie: u64::MAX,
                max_entries: u32::MAX,
                cache: false,
            }),
            pb::request::Op::GetMap(pb::GetMap { ino, offset: u64::MAX, max_extents: u32::MAX }),
            pb::request::Op::Close(pb::Close { ino }),
            pb::request::Op::Acquire(pb::Acquire { ino, mode: 99 }),
            pb::request::Op::Allocate(pb::Allocate { ino, offset: u64::MAX, need: u64::MAX, want: u64::MAX }),
            pb::request::Op::Rename(pb::Rename {
                parent: ino,
                name: vec![0xff; 300].into(),
                new_parent: ino,
                new_name: "x".into(),
                flags: u32::MAX,
                ..pb::Rename::default()
            }),
            pb::request::Op::ReleaseGrant(pb::ReleaseGrant { ino, to: 77, recall_seq: 5, commit: None }),
        ] {
            drop(c.ask(op));
        }
    }
    let nobody = pb::Request {
        client: Some(pb::ClientId { node: u32::MAX, epoch: 0, serial: 0 }),
        ..c.request(create(ROOT, "a"))
    };
    drop(c.send(nobody).recv());
    world.assert_clean(&c);
}
