//! Blocks: allocation, commits, orphans, full volumes.

use csvfs::pb::request::Op;
use csvfs::pb::{self, ExtentState, FailureKind, GrantMode};

use crate::world::{BLOCK, Client, MIB, ROOT, World, attr, create, map, result, unlink};

fn commit(ino: u64, written: &[(u64, u64)], size_bytes: u64) -> pb::Commit {
    let written = written.iter().map(|&(offset, length)| pb::ByteRange { offset, length }).collect();
    pb::Commit { ino, written, size_bytes: Some(size_bytes), ..pb::Commit::default() }
}

fn states(extents: &[pb::Extent]) -> Vec<(u64, u64, ExtentState)> {
    extents.iter().map(|e| (e.file_offset / BLOCK, e.length / BLOCK, e.state())).collect()
}

fn file_with_grant(c: &Client, name: &str) -> u64 {
    let ino = c.create(ROOT, name).ino;
    c.acquire(ino, GrantMode::Exclusive);
    ino
}

// Invariants C1, C2, C3.
#[test]
fn blocks_are_fresh_until_what_was_written_is_committed() {
    let world = World::new();
    let c = world.client(1);
    let ino = file_with_grant(&c, "f");
    assert_eq!(states(&c.allocate(ino, 0, 10 * BLOCK)), [(0, 10, ExtentState::Fresh)]);
    let after = c.attr(Op::Commit(commit(ino, &[(2 * BLOCK, 3 * BLOCK)], 20_000)));
    assert_eq!((after.size_bytes, after.allocated_bytes), (20_000, 10 * BLOCK));
    let expected = [(0, 2, ExtentState::Fresh), (2, 3, ExtentState::Data), (5, 5, ExtentState::Fresh)];
    assert_eq!(states(&c.map(ino)), expected);
    c.attr(Op::Commit(commit(ino, &[(0, 2 * BLOCK), (5 * BLOCK, 5 * BLOCK)], 0)));
    assert_eq!(states(&c.map(ino)), [(0, 10, ExtentState::Data)]);
    assert_eq!(c.getattr(ino).size_bytes, 20_000, "a commit never makes a file shorter");
    let report = world.assert_clean(&c);
    assert_eq!((report.data_blocks, report.fresh_blocks), (10, 0));
}

// A commit may come long after the change: of a record of a log, for one.
#[test]
fn a_file_was_changed_when_its_writer_says_so_but_not_in_the_future_and_not_before_an_earlier_change() {
    let world = World::new();
    let c = world.client(1);
    let ino = file_with_grant(&c, "f");
    let at = |seconds| pb::Timestamp { seconds, nanos: 0 };
    let made = c.getattr(ino).ctime.expect("a time").seconds;
    let commit_at = |seconds| {
        let commit = pb::Commit { mtime: Some(at(seconds)), ..commit(ino, &[], 1) };
        let after = c.attr(Op::Commit(commit));
        (after.mtime.expect("a time").seconds - made, after.ctime.expect("a time").seconds - made)
    };
    world.clock.advance(10_000);
    assert_eq!(commit_at(made + 4), (4, 4));
    assert_eq!(commit_at(made + 2), (2, 4), "not before an earlier change");
    assert_eq!(commit_at(made + 99), (99, 10), "not in the future");
    world.clock.advance(10_000);
    assert_eq!(commit_at(made + 12), (12, 12));
    let longer = c.attr(Op::Commit(commit(ino, &[], 2)));
    assert_eq!(
        (longer.mtime, longer.ctime),
        (Some(at(made + 12)), Some(at(made + 12))),
        "of the same moment"
    );
}

#[test]
fn allocation_fills_holes_only_and_gives_room_ahead() {
    let world = World::new();
    let c = world.client(1);
    let ino = file_with_grant(&c, "f");
    let first = c.allocate(ino, 5 * BLOCK, BLOCK);
    let all = c.allocate(ino, 4 * BLOCK, 3 * BLOCK);
    assert_eq!(states(&all), states(&c.map(ino)));
    let at = 5 * BLOCK;
    let kept = all.iter().find(|e| e.file_offset <= at && at < e.file_offset + e.length);
    let kept = kept.expect("block 5 is there");
    assert_eq!(kept.lun_offset + (at - kept.file_offset), first[0].lun_offset, "block 5 has not moved");
    let op = pb::Allocate { ino, offset: 100 * BLOCK, need: BLOCK, want: 64 * BLOCK };
    assert_eq!(states(&map(c.ask(Op::Allocate(op)))), [(100, 64, ExtentState::Fresh)]);
    c.attr(Op::Commit(pb::Commit { ino, trim_from: Some(101 * BLOCK), ..pb::Commit::default() }));
    assert_eq!(c.getattr(ino).allocated_bytes, 4 * BLOCK);
    world.assert_clean(&c);
}

#[test]
fn growth_is_contiguous() {
    let world = World::new();
    let c = world.client(1);
    let ino = file_with_grant(&c, "f");
    for i in 0..20 {
        c.allocate(ino, i * 16 * BLOCK, 16 * BLOCK);
    }
    assert_eq!(c.map(ino).len(), 1);
}

#[test]
fn the_map_of_a_file_is_changed_only_with_a_grant() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = file_with_grant(&c, "f");
    c.allocate(ino, 0, BLOCK);
    let allocate = || Op::Allocate(pb::Allocate { ino, offset: 0, need: BLOCK, want: 0 });
    assert_eq!(d.failure(allocate()), FailureKind::NoGrant);
    assert_eq!(d.failure(Op::Commit(commit(ino, &[(0, BLOCK)], 10))), FailureKind::NoGrant);
    assert_eq!(states(&c.map(ino)), [(0, 1, ExtentState::Fresh)]);
}

#[test]
fn a_commit_that_cannot_be_is_refused_as_a_whole() {
    let world = World::new();
    let c = world.client(1);
    let ino = file_with_grant(&c, "f");
    c.allocate(ino, 0, 2 * BLOCK);
    let before = c.getattr(ino);
    for written in [[(0, BLOCK), (BLOCK, 100)], [(0, BLOCK), (7 * BLOCK, BLOCK)]] {
        assert_eq!(c.errno(Op::Commit(commit(ino, &written, 999))), libc::EINVAL);
    }
    assert_eq!(c.errno(Op::Commit(commit(ino, &[(0, BLOCK)], u64::MAX))), libc::EFBIG);
    assert_eq!(c.getattr(ino), before);
    assert_eq!(states(&c.map(ino)), [(0, 2, ExtentState::Fresh)]);
    let far = Op::Allocate(pb::Allocate { ino, offset: u64::MAX - BLOCK, need: 2 * BLOCK, want: u64::MAX });
    assert_eq!(c.errno(far), libc::EFBIG);
}

#[test]
fn a_smaller_size_frees_blocks_and_a_larger_one_is_a_hole() {
    let world = World::new();
    let c = world.client(1);
    let ino = file_with_grant(&c, "f");
    c.allocate(ino, 0, 10 * BLOCK);
    c.attr(Op::Commit(commit(ino, &[(0, 10 * BLOCK)], 10 * BLOCK)));
    let free = c.stat().blocks_free;
    let size = |bytes| Op::SetAttr(pb::SetAttr { ino, size_bytes: Some(bytes), ..pb::SetAttr::default() });
    assert_eq!(c.attr(size(3 * BLOCK + 1)).allocated_bytes, 4 * BLOCK);
    assert_eq!(c.stat().blocks_free, free + 6);
    assert_eq!(c.attr(size(100 * BLOCK)).size_bytes, 100 * BLOCK);
    assert_eq!(states(&c.map(ino)), [(0, 4, ExtentState::Data)]);
    assert_eq!(c.errno(size(u64::MAX)), libc::EFBIG);
    let of_dir = Op::SetAttr(pb::SetAttr { ino: ROOT, size_bytes: Some(0), ..pb::SetAttr::default() });
    assert_eq!(c.errno(of_dir), libc::EISDIR);
    world.assert_clean(&c);
}

#[test]
fn an_open_file_survives_its_last_name_until_its_last_close() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = file_with_grant(&c, "f");
    c.allocate(ino, 0, 10 * BLOCK);
    let free = c.stat().blocks_free;
    let (open, close) = (|| Op::Open(pb::Open { ino }), || Op::Close(pb::Close { ino }));
    c.release(ino, GrantMode::Null, 0);
    c.attr(open());
    d.attr(open());
    d.unlink(ROOT, "f");
    assert_eq!(c.getattr(ino).nlink, 0);
    assert_eq!(world.assert_clean(&c).orphans, 1);
    c.done(close());
    assert_eq!(d.getattr(ino).nlink, 0);
    d.done(close());
    assert_eq!(c.stat().blocks_free, free + 10);
    assert_eq!(c.errno(Op::GetAttr(pb::GetAttr { ino, cache: false })), libc::ENOENT);
    assert_eq!(world.assert_clean(&c).orphans, 0);
}

#[test]
fn what_a_vanished_client_had_open_is_closed() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = c.create(ROOT, "f").ino;
    d.attr(Op::Open(pb::Open { ino }));
    c.unlink(ROOT, "f");
    c.getattr(ino);
    world.coordinator.client_gone(d.id);
    c.stat();
    assert_eq!(c.errno(Op::GetAttr(pb::GetAttr { ino, cache: false })), libc::ENOENT);
    assert_eq!(world.assert_clean(&c).orphans, 0);
}

// Invariant C7: blocks go to somebody else only when nobody can have I/O in flight on them.
#[test]
fn a_removed_file_keeps_its_blocks_while_somebody_has_a_grant() {
    let world = World::new();
    let (c, d) = (world.client(1), world.client(2));
    let ino = file_with_grant(&c, "f");
    c.allocate(ino, 0, 10 * BLOCK);
    let unlinked = d.start(unlink(ROOT, "f", false));
    let (to, recall) = world.pushes.recall();
    assert_eq!((to, recall.ino), (c.id, ino));
    assert_eq!(c.getattr(ino).nlink, 1, "others are not held up, and nothing has happened yet");
    c.release(ino, GrantMode::Null, recall.seq);
    result(&unlinked);
    c.stat();
    assert_eq!(c.errno(Op::GetAttr(pb::GetAttr { ino, cache: false })), libc::ENOENT);
    // By the one who holds the grant itself: the name goes at once, the blocks when the grant is given up.
    let own = file_with_grant(&c, "own");
    c.allocate(own, 0, 10 * BLOCK);
    let free = c.stat().blocks_free;
    c.unlink(ROOT, "own");
    let (_, recall) = world.pushes.recall();
    assert_eq!((recall.ino, c.stat().blocks_free), (own, free));
    c.release(own, GrantMode::Null, recall.seq);
    assert_eq!(c.stat().blocks_free, free + 10);
    world.assert_clean(&c);
}

#[test]
fn a_full_volume_says_so_exactly_and_is_usable_again_after_deletes() {
    let world = World::of_size(64 * MIB);
    let c = world.client(1);
    // Names first, so that metadata does not change how much fits.
    let inos: Vec<u64> = (0..4).map(|i| file_with_grant(&c, &format!("f{i}"))).collect();
    let free = c.stat().blocks_free;
    let part = free / 4;
    for &ino in &inos[..3] {
        c.allocate(ino, 0, part * BLOCK);
    }
    let left = c.stat().blocks_free;
    assert_eq!(left, free - 3 * part);
    let need = |blocks: u64| {
        Op::Allocate(pb::Allocate { ino: inos[3], offset: 0, need: blocks * BLOCK, want: 1 << 40 })
    };
    assert_eq!(c.errno(need(left + 1)), libc::ENOSPC);
    assert_eq!(c.map(inos[3]), []);
    map(c.ask(need(left)));
    assert_eq!(c.stat().blocks_free, 0);
    world.assert_clean(&c);
    // Names still go, and their space comes back. A grant that is held keeps it until it is given up.
    for (i, &ino) in inos.iter().enumerate() {
        c.release(ino, GrantMode::Null, 0);
        c.unlink(ROOT, &format!("f{i}"));
    }
    assert_eq!(c.stat().blocks_free, free);
    let again = file_with_grant(&c, "again");
    c.allocate(again, 0, (free - 8) * BLOCK);
    world.assert_clean(&c);
}

// Invariant C7, and the volume is not reported as full for what a delete just before gives back.
#[test]
fn space_freed_in_a_batch_is_given_out_in_the_next_one() {
    let world = World::of_size(64 * MIB);
    let c = world.client(1);
    let (old, new) = (file_with_grant(&c, "old"), file_with_grant(&c, "new"));
    let free = c.stat().blocks_free;
    c.allocate(old, 0, free * BLOCK);
    c.release(old, GrantMode::Null, 0);
    let gone = c.start(unlink(ROOT, "old", false));
    let taken = c.start(Op::Allocate(pb::Allocate { ino: new, offset: 0, need: free * BLOCK, want: 0 }));
    result(&gone);
    assert_eq!(map(result(&taken)).iter().map(|e| e.length / BLOCK).sum::<u64>(), free);
    world.assert_clean(&c);
}

#[test]
fn a_volume_without_room_for_metadata_refuses_names_but_not_deletes() {
    let world = World::of_size(64 * MIB);
    let c = world.client(1);
    let ino = file_with_grant(&c, "big");
    let free = c.stat().blocks_free;
    c.allocate(ino, 0, free * BLOCK);
    let mut made = Vec::new();
    let refused = loop {
        let name = format!("{:0>200}", made.len());
        match c.ask(create(ROOT, &name)) {
            pb::reply::Result::Attr(_) => made.push(name),
            pb::reply::Result::Failure(f) => break f.errno,
            other => panic!("{other:?}"),
        }
        assert!(made.len() < 200_000, "the metadata cannot grow for ever");
    };
    assert_eq!(refused, libc::ENOSPC);
    for name in &made {
        c.unlink(ROOT, name);
    }
    c.release(ino, GrantMode::Null, 0);
    c.unlink(ROOT, "big");
    c.create(ROOT, "again");
    world.assert_clean(&c);
}

#[test]
fn many_files_make_the_metadata_grow() {
    let world = World::of_size(512 * MIB);
    let c = world.client(1);
    let started: Vec<_> = (0..20_000).map(|i| c.start(create(ROOT, &format!("file-{i:0>60}")))).collect();
    started.iter().for_each(|reply| assert_eq!(attr(result(reply)).nlink, 1));
    let report = world.assert_clean(&c);
    assert_eq!(report.inodes, 20_001);
    assert!(report.metadata_blocks * BLOCK > 8 * MIB, "{report:?}");
    let world = world.moved();
    let c = c.follow(&world);
    c.attach(pb::Attach::default());
    assert!(c.exists(ROOT, &format!("file-{:0>60}", 19_999)));
    world.assert_clean(&c);
}
