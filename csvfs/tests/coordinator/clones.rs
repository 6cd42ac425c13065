//! Clones as the coordinator makes them: in bounded steps, by the extents and not by the bytes.

use csvfs::pb::request::Op;
use csvfs::pb::{self, FailureKind, GrantMode, reply};

use crate::world::{BLOCK, Client, MIB, ROOT, World};

/// What one step may touch, as the coordinator has it.
const STEP_EXTENTS: u64 = 1024;

fn step(c: &Client, ino: u64, to_ino: u64, offset: u64, end: u64) -> u64 {
    let length = end - offset;
    let op = pb::Clone { ino, offset, to_ino, to_offset: offset, length, size_bytes: end };
    match c.ask(Op::Clone(op)) {
        reply::Result::Cloned(cloned) => cloned.length,
        other => panic!("{other:?}"),
    }
}

fn held(c: &Client, name: &str) -> u64 {
    let ino = c.create(ROOT, name).ino;
    c.acquire(ino, GrantMode::Exclusive);
    ino
}

/// A file of `pieces` extents of `piece` bytes each, none of which continues another on the LUN.
fn fragmented(c: &Client, pieces: u64, piece: u64) -> u64 {
    let (ino, between) = (held(c, "source"), held(c, "between"));
    for n in 0..pieces {
        c.allocate(ino, n * piece, piece);
        c.allocate(between, n * BLOCK, BLOCK);
    }
    let written = vec![pb::ByteRange { offset: 0, length: pieces * piece }];
    let size_bytes = Some(pieces * piece);
    c.attr(Op::Commit(pb::Commit { ino, written, size_bytes, ..pb::Commit::default() }));
    ino
}

#[test]
fn a_tebibyte_is_cloned_in_a_few_steps_and_takes_no_space() {
    let world = World::of_size(3 << 40);
    let c = world.client(1);
    let (pieces, piece) = (2500, 420 * MIB);
    let (source, end) = (fragmented(&c, pieces, piece), pieces * piece);
    assert!(end >= 1 << 40);
    let target = held(&c, "target");
    let before = c.stat().blocks_free;
    let (mut at, mut steps) = (0, 0);
    while at < end {
        at += step(&c, source, target, at, end);
        steps += 1;
    }
    assert_eq!(steps, pieces.div_ceil(STEP_EXTENTS), "as many extents in each step as may be");
    assert_eq!(c.getattr(target).size_bytes, end);
    // The store may have grown; the data has not.
    assert!(before - c.stat().blocks_free < 16_384, "{before}, then {}", c.stat().blocks_free);
    let report = world.assert_clean(&c);
    assert_eq!(report.shared_blocks, end / BLOCK);
    for (name, ino) in [("source", source), ("target", target)] {
        c.release(ino, GrantMode::Null, 0);
        c.unlink(ROOT, name);
    }
    c.done(Op::Detach(pb::Detach {}));
    let world = world.moved();
    let c = world.client(2);
    assert_eq!(world.assert_clean(&c).shared_blocks, 0);
}

#[test]
fn only_who_is_alone_with_both_files_clones_and_a_step_may_come_twice() {
    let world = World::new();
    let c = world.client(1);
    let source = fragmented(&c, 3, 64 * BLOCK);
    let target = c.create(ROOT, "target").ino;
    let op = |length| pb::Clone {
        ino: source,
        offset: 0,
        to_ino: target,
        to_offset: 0,
        length,
        size_bytes: length,
    };
    assert_eq!(c.failure(Op::Clone(op(BLOCK))), FailureKind::NoGrant);
    c.acquire(target, GrantMode::ConcurrentWrite);
    assert_eq!(c.errno(Op::Clone(op(BLOCK))), libc::EINVAL);
    c.acquire(target, GrantMode::Exclusive);
    for bad in [0, 100] {
        assert_eq!(c.errno(Op::Clone(op(bad))), libc::EINVAL);
    }
    // The reply was lost: the same request comes again.
    let request = c.request(Op::Clone(op(192 * BLOCK)));
    let first = crate::world::result(&c.send(request.clone()));
    assert_eq!(crate::world::result(&c.send(request)), first);
    assert_eq!(world.assert_clean(&c).shared_blocks, 192);
    // As a new request it changes nothing more either.
    assert_eq!(step(&c, source, target, 0, 192 * BLOCK), 192 * BLOCK);
    assert_eq!(world.assert_clean(&c).shared_blocks, 192);
}

#[test]
fn a_client_without_a_pool_has_what_it_shares_copied_by_the_coordinator() {
    let world = World::new();
    let c = world.client(1);
    let source = fragmented(&c, 2, 8 * BLOCK);
    let target = held(&c, "target");
    step(&c, source, target, 0, 16 * BLOCK);
    let place = c.map(source)[0].lun_offset;
    world.device.write_at(place, &[7; 4096]).expect("a write");
    let map = c.ask(Op::Unshare(pb::Unshare { ino: target, offset: 0, length: 4 * BLOCK }));
    let map = crate::world::map(map);
    assert_eq!((map[0].state(), map[0].length), (pb::ExtentState::Data, 4 * BLOCK));
    assert_ne!(map[0].lun_offset, place);
    let mut copy = vec![0; 4096];
    world.device.read_at(map[0].lun_offset, &mut copy).expect("a read");
    assert_eq!(copy, [7; 4096]);
    // The source keeps its mark there, without a count, until it is written.
    assert_eq!(world.assert_clean(&c).shared_blocks, 16);
}
