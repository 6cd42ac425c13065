//! Grants: who may cache what, and who waits for whom.

use csvfs::pb::request::Op;
use csvfs::pb::{self, GrantMode, reply};

use crate::world::{BLOCK, ROOT, World, acquire, attr, granted, rename, result};

#[test]
fn readers_share_and_a_writer_is_alone() {
    let world = World::new();
    let (c, d, e) = (world.client(1), world.client(2), world.client(3));
    let ino = c.create(ROOT, "f").ino;
    let first = c.acquire(ino, GrantMode::ProtectedRead);
    assert!(d.acquire(ino, GrantMode::ProtectedRead).seq > first.seq);
    assert_eq!(first.attr.expect("it comes with attributes").ino, ino);
    let writer = e.start(acquire(ino, GrantMode::Exclusive));
    for _ in 0..2 {
        let (to, recall) = world.pushes.recall();
        assert_eq!((recall.ino, recall.to()), (ino, GrantMode::Null));
        let client = if to == c.id { &c } else { &d };
        client.release(ino, GrantMode::Null, recall.seq);
    }
    assert_eq!(granted(result(&writer)).mode(), GrantMode::Exclusive);
    assert_eq!(c.errno(acquire(999, GrantMode::Exclusive)), libc::ENOENT);
}

// Invariants C6, E3: what was buffered is there before anybody else looks.
#[test]
fn who_asks_for_attributes_sees_what_a_writer_has_buffered() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "f").ino;
    c.acquire(ino, GrantMode::Exclusive);
    c.allocate(ino, 0, BLOCK);
    let list = Op::ReadDir(pb::ReadDir { ino: ROOT, cookie: 0, max_entries: 0, cache: false });
    let asked = [
        d.start(Op::GetAttr(pb::GetAttr { ino, cache: false })),
        d.start(Op::Lookup(pb::Lookup { parent: ROOT, name: "f".into(), cache: false, at_once: false })),
        d.start(list),
    ];
    let (to, recall) = world.pushes.recall();
    assert_eq!((to, recall.to()), (c.id, GrantMode::ProtectedRead));
    assert!(!d.exists(ROOT, "other"), "others are not held up");
    let written = vec![pb::ByteRange { offset: 0, length: BLOCK }];
    let commit = pb::Commit { ino, written, size_bytes: Some(123), ..pb::Commit::default() };
    let release = pb::ReleaseGrant {
        ino,
        to: GrantMode::ProtectedRead.into(),
        recall_seq: recall.seq,
        commit: Some(commit),
    };
    assert_eq!(c.attr(Op::ReleaseGrant(release)).size_bytes, 123);
    let [get, lookup, list] = asked.map(|reply| result(&reply));
    assert_eq!((attr(get).size_bytes, attr(lookup).size_bytes), (123, 123));
    match list {
        reply::Result::DirPage(page) => {
            assert_eq!(page.entries[0].attr.as_ref().map(|a| a.size_bytes), Some(123));
        }
        other => panic!("{other:?}"),
    }
}

// What another client has just made is listed at the price of one round trip, not of one for each file.
#[test]
fn a_listing_recalls_all_that_stands_in_its_way_at_once() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let inos: Vec<u64> = (0..20).map(|number| c.create(ROOT, &format!("f{number}")).ino).collect();
    for ino in &inos {
        c.acquire(*ino, GrantMode::Exclusive);
    }
    let list = d.start(Op::ReadDir(pb::ReadDir { ino: ROOT, cookie: 0, max_entries: 0, cache: false }));
    // None is answered before all have come.
    let recalls: Vec<pb::Recall> = inos.iter().map(|_| world.pushes.recall().1).collect();
    assert!(recalls.iter().all(|recall| recall.to() == GrantMode::ProtectedRead));
    for recall in recalls.iter().rev() {
        c.release(recall.ino, GrantMode::ProtectedRead, recall.seq);
    }
    let reply::Result::DirPage(page) = result(&list) else { panic!("no page") };
    assert_eq!(page.entries.len(), inos.len());
    // Nothing of it is left in the way of a writer.
    for ino in &inos {
        let writer = d.start(acquire(*ino, GrantMode::Exclusive));
        let (_, recall) = world.pushes.recall();
        c.release(*ino, GrantMode::Null, recall.seq);
        assert_eq!(granted(result(&writer)).mode(), GrantMode::Exclusive);
    }
    world.assert_clean(&c);
}

#[test]
fn a_writers_own_questions_recall_nobody() {
    let world = World::new();
    let c = world.client(1);
    let ino = c.create(ROOT, "f").ino;
    c.acquire(ino, GrantMode::Exclusive);
    c.getattr(ino);
    c.attr(Op::SetAttr(pb::SetAttr { ino, size_bytes: Some(5), mode: Some(0o600), ..Default::default() }));
    assert!(world.pushes.no_recall());
}

#[test]
fn a_change_of_attributes_recalls_who_has_them_cached() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "f").ino;
    c.acquire(ino, GrantMode::ProtectedRead);
    let chmod = d.start(Op::SetAttr(pb::SetAttr { ino, mode: Some(0o600), ..pb::SetAttr::default() }));
    let (to, recall) = world.pushes.recall();
    assert_eq!((to, recall.to()), (c.id, GrantMode::Null));
    let again = c.start(acquire(ino, GrantMode::ProtectedRead));
    c.release(ino, GrantMode::Null, recall.seq);
    assert_eq!(attr(result(&chmod)).mode, 0o600);
    assert_eq!(granted(result(&again)).attr.expect("attributes").mode, 0o600);
}

#[test]
fn requests_about_several_files_wait_in_order_and_not_in_a_circle() {
    let world = World::new();
    let (c, d, e) = (world.client(1), world.client(2), world.client(3));
    let (a, b) = (c.create(ROOT, "a").ino, c.create(ROOT, "b").ino);
    c.acquire(a, GrantMode::Exclusive);
    c.acquire(b, GrantMode::Exclusive);
    let one = d.start(rename((ROOT, "a"), (ROOT, "b"), 2));
    let two = e.start(rename((ROOT, "b"), (ROOT, "a"), 2));
    for _ in 0..2 {
        let (_, recall) = world.pushes.recall();
        c.release(recall.ino, GrantMode::Null, recall.seq);
    }
    for reply in [one, two] {
        assert_eq!(result(&reply), reply::Result::Done(pb::Done {}));
    }
    assert_eq!(
        c.attr(Op::Lookup(pb::Lookup { parent: ROOT, name: "a".into(), cache: false, at_once: false })).ino,
        a
    );
    world.assert_clean(&c);
}

#[test]
fn writers_that_share_a_file_may_both_commit() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "shared").ino;
    for client in [&c, &d] {
        client.acquire(ino, GrantMode::ConcurrentWrite);
    }
    c.allocate(ino, 0, BLOCK);
    d.allocate(ino, BLOCK, BLOCK);
    for (client, at) in [(&c, 0), (&d, BLOCK)] {
        let written = vec![pb::ByteRange { offset: at, length: BLOCK }];
        // One of them must not give back what the other one works on.
        let commit = pb::Commit {
            ino,
            written,
            trim_from: Some(0),
            size_bytes: Some(at + BLOCK),
            ..Default::default()
        };
        client.attr(Op::Commit(commit));
    }
    assert_eq!(c.getattr(ino).allocated_bytes, 2 * BLOCK);
    assert_eq!(c.getattr(ino).size_bytes, 2 * BLOCK);
}

// Invariant E2.
#[test]
fn an_unanswered_recall_is_reported_and_not_broken() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "f").ino;
    c.acquire(ino, GrantMode::Exclusive);
    let waiting = d.start(acquire(ino, GrantMode::Exclusive));
    world.pushes.recall();
    world.clock.advance(20_000);
    d.stat();
    // A second look, so that the batch that saw the time has ended.
    d.stat();
    assert_eq!(world.pushes.overdue(), [(c.id, ino)]);
    assert!(waiting.try_recv().is_err(), "nothing is granted before the fence");
    world.coordinator.node_gone(c.id.node, c.id.epoch);
    assert_eq!(granted(result(&waiting)).mode(), GrantMode::Exclusive);
}

#[test]
fn grants_are_listed_for_people() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "f").ino;
    c.acquire(ino, GrantMode::Exclusive);
    let _waiting = d.start(acquire(ino, GrantMode::Exclusive));
    world.pushes.recall();
    let reply::Result::GrantList(list) = c.ask(Op::ListGrants(pb::ListGrants { ino })) else { panic!() };
    let told: Vec<_> =
        list.grants.iter().map(|g| (g.client_name.as_str(), g.held(), g.wanted(), g.recalled)).collect();
    let expected = [
        ("client 1", GrantMode::Exclusive, GrantMode::Null, true),
        ("client 2", GrantMode::Null, GrantMode::Exclusive, false),
    ];
    assert_eq!(told, expected);
}
