//! Clients and changes of the coordinator.

use csvfs::coordinator::OpenError;
use csvfs::pb::request::Op;
use csvfs::pb::{self, FailureKind, GrantMode, reply};
use lockmgr::{ClientId, Epoch};

use crate::world::{BLOCK, Client, ROOT, World, acquire, attr, create, granted, result, unlink};

fn claim(ino: u64, mode: GrantMode) -> pb::Claim {
    pb::Claim { ino, mode: mode.into(), ..pb::Claim::default() }
}

fn attach_with(claims: Vec<pb::Claim>, opens: Vec<pb::OpenClaim>) -> pb::Attach {
    pb::Attach { claims, opens, name: "again".into(), ..pb::Attach::default() }
}

#[test]
fn strangers_and_other_terms_are_turned_away() {
    let world = World::new();
    let c = world.stranger(1);
    assert_eq!(c.failure(create(ROOT, "a")), FailureKind::NotAttached);
    c.attach(pb::Attach::default());
    for term in [0, 2] {
        let request = pb::Request { term, ..c.request(create(ROOT, "a")) };
        let reply::Result::Failure(failure) = result(&c.send(request)) else { panic!() };
        assert_eq!(failure.kind(), FailureKind::WrongTerm);
    }
    let elsewhere = pb::Request { volume: vec![1; 16].into(), ..c.request(create(ROOT, "a")) };
    assert!(matches!(result(&c.send(elsewhere)), reply::Result::Failure(_)));
    let nothing = pb::Request { op: None, ..c.request(create(ROOT, "a")) };
    let reply::Result::Failure(failure) = result(&c.send(nothing)) else { panic!() };
    assert_eq!(failure.kind(), FailureKind::Unsupported);
    assert!(!c.exists(ROOT, "a"));
}

#[test]
fn a_move_loses_nothing_and_answers_the_rest() {
    let world = World::new();
    let c = world.client(1);
    let a = c.create(ROOT, "a");
    let report = world.coordinator.close().expect("a clean end");
    assert_eq!(report.clients, 1);
    assert_eq!(c.failure(create(ROOT, "b")), FailureKind::NotCoordinator);
    assert_eq!(world.coordinator.close().expect("twice is fine").held_ops, 0);
    let next = World::open(world.device.clone(), world.volume, 2);
    let c = c.follow(&next);
    c.attach(pb::Attach::default());
    assert_eq!(c.getattr(a.ino), a);
    next.assert_clean(&c);
}

#[test]
fn what_waits_is_told_that_the_coordinator_moves() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "a").ino;
    c.acquire(ino, GrantMode::Exclusive);
    let waiting = [
        d.start(acquire(ino, GrantMode::Exclusive)),
        d.start(Op::GetAttr(pb::GetAttr { ino, cache: false })),
    ];
    world.pushes.recall();
    assert_eq!(world.coordinator.close().expect("a clean end").held_ops, 2);
    for reply in waiting {
        let reply::Result::Failure(failure) = result(&reply) else { panic!() };
        assert_eq!(failure.kind(), FailureKind::NotCoordinator);
    }
}

// Invariant E2: a client is fenced for not answering only if it was asked.
#[test]
fn a_recall_that_was_lost_is_sent_again_when_the_client_attaches_again() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "a").ino;
    c.acquire(ino, GrantMode::Exclusive);
    let waiting = d.start(acquire(ino, GrantMode::Exclusive));
    let (_, lost) = world.pushes.recall();
    c.attach(attach_with(vec![claim(ino, GrantMode::Exclusive)], Vec::new()));
    let (to, again) = world.pushes.recall();
    assert_eq!((to, again), (c.id, lost));
    c.release(ino, GrantMode::Null, again.seq);
    assert_eq!(granted(result(&waiting)).mode(), GrantMode::Exclusive);
    d.attach(attach_with(vec![claim(ino, GrantMode::Exclusive)], Vec::new()));
    assert!(world.pushes.no_recall(), "nothing is recalled that was answered");
}

// Invariant C4: a request whose outcome is unknown is sent again and done once.
#[test]
fn a_request_sent_again_to_the_next_coordinator_is_done_once() {
    let world = World::new();
    let c = world.client(1);
    let mut op = create(ROOT, "a");
    if let Op::Create(create) = &mut op {
        create.open = true;
    }
    let requests = [c.request(op), c.request(create(ROOT, "b")), c.request(unlink(ROOT, "b", false))];
    let first: Vec<reply::Result> = requests.iter().map(|r| result(&c.send(r.clone()))).collect();
    let ino = attr(first[0].clone()).ino;
    let world = world.crashed();
    let c = c.follow(&world);
    c.attach(pb::Attach::default());
    for (request, first) in requests.iter().zip(&first) {
        let again = pb::Request { term: 2, ..request.clone() };
        assert_eq!(&result(&c.send(again.clone())), first);
        assert_eq!(&result(&c.send(again)), first);
    }
    // The open of the repeated create counts: the file outlives its name until it is closed, once.
    c.unlink(ROOT, "a");
    assert_eq!(c.getattr(ino).nlink, 0);
    c.done(Op::Close(pb::Close { ino }));
    c.stat();
    assert_eq!(c.errno(Op::GetAttr(pb::GetAttr { ino, cache: false })), libc::ENOENT);
    world.assert_clean(&c);
}

#[test]
fn replies_that_the_client_has_are_forgotten() {
    let world = World::new();
    let c = world.client(1);
    let first = c.request(create(ROOT, "a"));
    attr(result(&c.send(first.clone())));
    let next = pb::Request { completed_below: first.request_id + 1, ..c.request(create(ROOT, "b")) };
    attr(result(&c.send(next)));
    let reply::Result::Failure(failure) = result(&c.send(first)) else { panic!("it was forgotten") };
    assert_eq!(failure.errno, libc::EEXIST);
}

// Invariant E1.
#[test]
fn nothing_is_served_before_everybody_is_back() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "f").ino;
    c.acquire(ino, GrantMode::Exclusive);
    let world = world.crashed();
    let (c, d) = (c.follow(&world), d.follow(&world));
    d.attach(pb::Attach::default());
    let wants = d.start(acquire(ino, GrantMode::Exclusive));
    let asks =
        d.start(Op::Lookup(pb::Lookup { parent: ROOT, name: "f".into(), cache: false, at_once: false }));
    assert_eq!(world.coordinator.clients().iter().filter(|c| !c.attached).count(), 1);
    assert!(wants.try_recv().is_err() && asks.try_recv().is_err());
    c.attach(attach_with(vec![claim(ino, GrantMode::Exclusive)], vec![]));
    // Both wait for the one who has it, and get it in turn.
    let (to, recall) = world.pushes.recall();
    assert_eq!(to, c.id);
    c.release(ino, GrantMode::Null, recall.seq);
    assert_eq!(granted(result(&wants)).mode(), GrantMode::Exclusive);
    let (to, recall) = world.pushes.recall();
    assert_eq!((to, recall.to()), (d.id, GrantMode::ProtectedRead));
    d.release(ino, GrantMode::ProtectedRead, recall.seq);
    attr(result(&asks));
}

#[test]
fn who_does_not_come_back_is_reported_and_waited_for_until_it_is_gone() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let world = world.crashed();
    let d = d.follow(&world);
    d.attach(pb::Attach::default());
    let asks = d.start(Op::GetAttr(pb::GetAttr { ino: ROOT, cache: false }));
    world.clock.advance(60_000);
    let more = d.start(Op::GetAttr(pb::GetAttr { ino: ROOT, cache: false }));
    assert_eq!(world.coordinator.clients().len(), 2);
    // A second look, so that the batch that saw the time has ended.
    assert_eq!(world.coordinator.clients().len(), 2);
    assert_eq!(world.pushes.overdue(), [(c.id, 0)]);
    assert!(asks.try_recv().is_err() && more.try_recv().is_err());
    world.coordinator.node_gone(c.id.node, c.id.epoch);
    attr(result(&asks));
    attr(result(&more));
    // Given up, it cannot come back with what it had.
    let c = c.follow(&world);
    let late = c.errno(Op::Attach(attach_with(vec![claim(7, GrantMode::Exclusive)], vec![])));
    assert_eq!(late, libc::ESTALE);
}

#[test]
fn claims_that_exclude_each_other_are_refused() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "f").ino;
    let world = world.crashed();
    let (c, d) = (c.follow(&world), d.follow(&world));
    c.attach(attach_with(vec![claim(ino, GrantMode::Exclusive)], vec![]));
    let both = d.errno(Op::Attach(attach_with(vec![claim(ino, GrantMode::ProtectedRead)], vec![])));
    assert_eq!(both, libc::ESTALE);
}

#[test]
fn a_release_of_unknown_outcome_counts_if_it_was_committed() {
    for reached in [true, false] {
        let world = World::new();
        let (c, d) = (world.client(1), world.client(2));
        let ino = c.create(ROOT, "f").ino;
        c.acquire(ino, GrantMode::Exclusive);
        c.allocate(ino, 0, BLOCK);
        let commit = pb::Commit { ino, size_bytes: Some(77), ..pb::Commit::default() };
        let release =
            pb::ReleaseGrant { ino, to: GrantMode::Null.into(), recall_seq: 0, commit: Some(commit) };
        let request = c.request(Op::ReleaseGrant(release));
        if reached {
            attr(result(&c.send(request.clone())));
        }
        let world = world.crashed();
        let (c, d) = (c.follow(&world), d.follow(&world));
        d.attach(pb::Attach::default());
        let claim = pb::Claim {
            release_request: request.request_id,
            release_to: GrantMode::Null.into(),
            ..claim(ino, GrantMode::Exclusive)
        };
        c.attach(attach_with(vec![claim], vec![]));
        attr(result(&c.send(pb::Request { term: 2, ..request })));
        assert_eq!(d.acquire(ino, GrantMode::Exclusive).attr.expect("attributes").size_bytes, 77);
        assert!(world.pushes.no_recall());
    }
}

#[test]
fn orphans_outlive_a_crash_as_long_as_somebody_claims_them() {
    let world = World::new();
    let c = world.client(1);
    let orphan = |c: &Client, name: &str| {
        let ino = c.create(ROOT, name).ino;
        c.attr(Op::Open(pb::Open { ino }));
        c.acquire(ino, GrantMode::Exclusive);
        c.allocate(ino, 0, 8 * BLOCK);
        c.release(ino, GrantMode::Null, 0);
        c.unlink(ROOT, name);
        ino
    };
    let free = c.stat().blocks_free;
    let (kept, lost) = (orphan(&c, "kept"), orphan(&c, "lost"));
    let world = world.crashed();
    let c = c.follow(&world);
    c.attach(attach_with(vec![], vec![pb::OpenClaim { ino: kept, count: 1 }]));
    c.getattr(kept);
    c.stat();
    assert_eq!(c.errno(Op::GetAttr(pb::GetAttr { ino: lost, cache: false })), libc::ENOENT);
    assert_eq!(world.assert_clean(&c).orphans, 1);
    c.done(Op::Close(pb::Close { ino: kept }));
    assert_eq!(c.stat().blocks_free, free);
}

#[test]
fn a_client_that_attaches_anew_gets_its_old_questions_back() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "f").ino;
    c.acquire(ino, GrantMode::Exclusive);
    let old = d.start(acquire(ino, GrantMode::Exclusive));
    world.pushes.recall();
    d.attach(pb::Attach::default());
    let reply::Result::Failure(failure) = result(&old) else { panic!() };
    assert_eq!(failure.kind(), FailureKind::NotAttached);
    // What it does not claim any more, it does not have any more.
    c.attach(pb::Attach::default());
    assert_eq!(d.acquire(ino, GrantMode::Exclusive).mode(), GrantMode::Exclusive);
}

#[test]
fn a_new_epoch_of_a_node_ends_its_old_clients() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "f").ino;
    c.acquire(ino, GrantMode::Exclusive);
    let reborn = world.stranger(1).named(ClientId { epoch: Epoch(2), ..c.id });
    reborn.attach(pb::Attach::default());
    assert_eq!(d.acquire(ino, GrantMode::Exclusive).mode(), GrantMode::Exclusive);
    assert_eq!(c.errno(Op::Attach(pb::Attach::default())), libc::ESTALE);
    assert_eq!(c.failure(Op::GetAttr(pb::GetAttr { ino, cache: false })), FailureKind::NotAttached);
}

#[test]
fn who_has_left_is_not_waited_for() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    c.done(Op::Detach(pb::Detach {}));
    assert_eq!(c.failure(create(ROOT, "a")), FailureKind::NotAttached);
    let world = world.crashed();
    let d = d.follow(&world);
    d.attach(pb::Attach::default());
    d.getattr(ROOT);
}

// Invariant D5.
#[test]
fn a_term_that_is_over_does_not_open_the_volume() {
    let world = World::new();
    let world = world.moved().moved();
    let late = World::try_open(world.device.clone(), world.volume, 2);
    assert!(matches!(late.err(), Some(OpenError::Superseded { .. })));
    let other = lockmgr::VolumeId(uuid::Uuid::from_u128(5));
    let wrong = World::try_open(world.device.clone(), other, 9);
    assert!(matches!(wrong.err(), Some(OpenError::WrongVolume { .. })));
}

// Invariant D5.
#[test]
fn an_old_coordinator_notices_the_new_one_and_stops() {
    let old = World::new();
    let c = old.client(1);
    c.create(ROOT, "before");
    // The new one did not know that the old one lives; on a real device the fence has cut it off.
    let new = World::open(old.device.clone(), old.volume, 2);
    assert_eq!(c.failure(create(ROOT, "late")), FailureKind::Stopped);
    assert!(old.coordinator.stats().stopped.is_some());
    let d = new.client(2);
    new.coordinator.client_gone(c.id);
    assert!(d.exists(ROOT, "before") && !d.exists(ROOT, "late"));
    new.assert_clean(&d);
}

// Invariant E1: what a client claimed before it attached anew, or before it left, claims nothing any more.
#[test]
fn an_attach_that_was_overtaken_by_a_newer_one_or_a_goodbye_changes_nothing() {
    let world = World::new();
    let c = world.client(1);
    let overtaken = |newer: &dyn Fn()| {
        let late = c.request(Op::Attach(attach_with(vec![claim(ROOT, GrantMode::Exclusive)], vec![])));
        newer();
        let reply::Result::Failure(failure) = result(&c.send(late)) else { panic!("it was taken") };
        assert_eq!(failure.kind(), FailureKind::NotAttached);
    };
    overtaken(&|| c.attach(attach_with(vec![], vec![])));
    world.client(2).create(ROOT, "nobody holds the root");
    overtaken(&|| {
        c.attach(attach_with(vec![], vec![]));
        c.done(Op::Detach(pb::Detach {}));
    });
    assert_eq!(c.failure(create(ROOT, "a")), FailureKind::NotAttached);
    // Whoever comes back after a goodbye without an answer is a newer one.
    c.attach(attach_with(vec![], vec![]));
}
