//! Growth without a round trip: pools, the intent log, and what becomes of them when nodes and coordinators end.

mod world;

use std::sync::Arc;

use blockio::MemoryDevice;
use csvfs::node::{Node, ROOT_INO};
use lockmgr::{Epoch, NodeId};
use world::{Dice, Model, World, append, create, fsync, open, read, write};

const BLOCK: u64 = 4096;

/// A file with a pool behind it: from here on it grows without the coordinator.
fn grown(node: &Arc<Node>, name: &str) -> Arc<csvfs::node::File> {
    let file = create(node, name);
    write(&file, 0, &[1; 4096]).expect("a write");
    fsync(&file).expect("an fsync");
    assert!(node.stats().pool_bytes > 0, "the node has a pool");
    file
}

/// The node ends without a word, and its fence is confirmed.
fn dies(world: &World, node: Arc<Node>) {
    drop(node);
    world.link.coordinator().expect("there").node_gone(NodeId(1), Epoch(1));
}

// Invariant C5: what makes a flush durable is on the LUN, without the coordinator.
#[test]
fn new_blocks_are_written_and_flushed_while_no_coordinator_answers() {
    let world = World::new();
    let node = world.node(1);
    let file = grown(&node, "f");
    world.kill_coordinator();
    let (mut model, mut dice) = (Model(vec![1; 4096]), Dice(5));
    for round in 0..6 {
        let (at, bytes) = (dice.size(1 << 20), dice.bytes(20_000));
        write(&file, at as u64, &bytes).expect("a write to new space");
        model.write(at, &bytes);
        fsync(&file).unwrap_or_else(|error| panic!("fsync {round}: {error}"));
    }
    assert!(node.stats().log_writes >= 6);
    world.start_coordinator();
    // Another node makes the grant go, and with it all that the log says.
    let other = world.node(2);
    assert!(read(&open(&other, "f"), 0, 2 << 20).expect("a read") == model.0);
    assert_eq!(world.problems(&other), Vec::<String>::new());
}

// Invariants D1, D3, D4: nothing of it was with the coordinator when the node died.
#[test]
fn what_a_dead_node_had_flushed_is_replayed_from_its_log() {
    let world = World::new();
    let node = world.node(1);
    let free = node.statfs().expect("numbers").blocks_free;
    let file = grown(&node, "f");
    world.kill_coordinator();
    let (mut model, mut dice) = (Model(vec![1; 4096]), Dice(77));
    for _ in 0..6 {
        let (at, bytes) = (dice.size(1 << 20), dice.bytes(30_000));
        write(&file, at as u64, &bytes).expect("a write to new space");
        model.write(at, &bytes);
        fsync(&file).expect("an fsync");
    }
    // Never flushed: it may be lost, and its blocks are free again.
    write(&file, 8 << 20, &[9; 1 << 20]).expect("a write");
    drop(file);
    world.start_coordinator();
    dies(&world, node);
    let other = world.node(2);
    let file = open(&other, "f");
    let seen = read(&file, 0, 16 << 20).expect("a read");
    assert!(seen == model.0);
    let report = other.check().expect("a check");
    assert_eq!((report.problems, report.pools, report.pool_blocks), (Vec::new(), 0, 0));
    let left = other.statfs().expect("numbers").blocks_free;
    let used = other.getattr(file.ino()).expect("attributes").allocated_bytes / BLOCK;
    assert_eq!(left + used, free, "every block of the pool is free or in the file");
}

// Invariant E3: a recall waits until the log is merged.
#[test]
fn another_node_sees_what_the_log_says_as_soon_as_it_has_the_grant() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let (mine, theirs) = (grown(&a, "f"), open(&b, "f"));
    for round in 0..40_u8 {
        let at = u64::from(round) * 8192;
        write(&mine, at, &[round + 1; 4096]).expect("a write");
        fsync(&mine).expect("an fsync");
        assert!(read(&theirs, at, 4096).expect("a read") == [round + 1; 4096]);
        append(&theirs, &[0xAA; 10]).expect("an append");
    }
    assert_eq!(world.problems(&a), Vec::<String>::new());
}

// The ring is much smaller than what is logged: it goes round, and merges make room.
#[test]
fn the_log_goes_round_and_everything_is_found_again() {
    let world = World::new();
    let node = world.node(1);
    let files: Vec<_> = (0..4).map(|n| grown(&node, &format!("f{n}"))).collect();
    let mut models: Vec<Model> = (0..4).map(|_| Model(vec![1; 4096])).collect();
    let mut dice = Dice(31);
    for _ in 0..120 {
        let (which, at, len) = (dice.size(4), dice.size(1 << 20), 1 + dice.size(60_000));
        let bytes = dice.bytes(len);
        write(&files[which], at as u64, &bytes).expect("a write");
        models[which].write(at, &bytes);
        fsync(&files[which]).expect("an fsync");
    }
    assert!(node.stats().log_writes >= 100);
    drop(files);
    dies(&world, node);
    let other = world.node(2);
    for (n, model) in models.iter().enumerate() {
        let seen = read(&open(&other, &format!("f{n}")), 0, 2 << 20).expect("a read");
        assert!(seen == model.0, "file {n}");
    }
    assert_eq!(world.problems(&other), Vec::<String>::new());
}

// A write with more pieces than a log holds, then a death.
#[test]
fn a_flush_with_more_pieces_than_the_log_holds_is_durable_too() {
    let world = World::new();
    let node = world.node(1);
    let file = grown(&node, "f");
    const PIECES: u64 = 5000;
    for piece in 0..PIECES {
        write(&file, piece * 8192, &[7; 4096]).expect("a write");
    }
    fsync(&file).expect("an fsync");
    drop(file);
    dies(&world, node);
    let other = world.node(2);
    let file = open(&other, "f");
    for piece in 0..PIECES {
        assert!(read(&file, piece * 8192, 4096).expect("a read") == [7; 4096], "piece {piece}");
    }
    assert_eq!(world.problems(&other), Vec::<String>::new());
}

#[test]
fn cutting_and_preallocating_know_what_only_the_log_says() {
    let world = World::new();
    let node = world.node(1);
    let file = grown(&node, "f");
    write(&file, 0, &[3; 100_000]).expect("a write");
    fsync(&file).expect("an fsync");
    file.set_size(50_001).expect("a smaller size");
    file.allocate(0, 1 << 20, false).expect("space");
    write(&file, 200_000, &[4; 1000]).expect("a write");
    file.set_size(2 << 20).expect("a larger size");
    fsync(&file).expect("an fsync");
    drop(file);
    dies(&world, node);
    let other = world.node(2);
    let seen = read(&open(&other, "f"), 0, 4 << 20).expect("a read");
    let mut model = Model(vec![3; 50_001]);
    model.write(200_000, &[4; 1000]);
    model.0.resize(2 << 20, 0);
    assert!(seen == model.0);
    assert_eq!(world.problems(&other), Vec::<String>::new());
}

#[test]
fn what_is_allocated_already_is_allocated_without_a_message() {
    let world = World::new();
    let (node, other) = (world.node(1), world.node(2));
    let file = grown(&node, "f");
    fsync(&file).expect("an fsync");
    file.allocate(0, 1 << 20, true).expect("space");
    let before = node.stats().requests_sent;
    for piece in 0..100 {
        file.allocate(piece * 10_000, 10_000, false).expect("space that is there");
        write(&file, piece * 10_000, &[5; 100]).expect("a write");
    }
    assert_eq!(node.stats().requests_sent - before, 0);
    assert_eq!(file.size().expect("its size"), 1_000_000);
    file.punch(500_000, 10_000).expect("a hole");
    let before = node.stats().requests_sent;
    file.allocate(0, 1 << 20, true).expect("space");
    assert!(node.stats().requests_sent > before, "a hole needs space");
    drop(file);
    dies(&world, node);
    let kept = other.resolve("f").expect("the file").allocated_bytes;
    assert!(kept >= 1 << 20, "what was asked for stays: {kept}");
    assert_eq!(world.problems(&other), Vec::<String>::new());
}

#[test]
fn a_node_that_leaves_in_order_leaves_no_pool() {
    let world = World::new();
    let (node, other) = (world.node(1), world.node(2));
    let free = other.statfs().expect("numbers").blocks_free;
    let file = grown(&node, "f");
    drop(file);
    node.detach().expect("an orderly end");
    let report = other.check().expect("a check");
    assert_eq!((report.problems, report.pools, report.pool_blocks), (Vec::new(), 0, 0));
    other.unlink(ROOT_INO, b"f").expect("an unlink");
    assert_eq!(other.check().expect("a check").orphans, 0);
    assert_eq!(other.statfs().expect("numbers").blocks_free, free);
}

// Full means full: what an idle node has in its pool is asked back before a write fails.
#[test]
fn a_busy_node_gets_what_an_idle_one_has_in_its_pool() {
    let world = World::on(Arc::new(MemoryDevice::new(128 << 20)));
    let (idle, busy) = (world.node(1), world.node(2));
    let kept = grown(&idle, "idle");
    // Room ahead, in a file that nobody writes to just now.
    write(&kept, 4096, &[2; 4096]).expect("a write");
    let file = create(&busy, "busy");
    let mut at = 0;
    let error = loop {
        match write(&file, at, &[3; 4096]) {
            Ok(n) => at += n as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(error.errno(), 28, "{error}");
    let stat = busy.statfs().expect("numbers");
    // The block that the idle node has written and not told anybody about.
    assert!(stat.blocks_free <= 1, "{stat:?}: space is left when somebody hears that the volume is full");
    assert_eq!(idle.stats().pool_bytes + busy.stats().pool_bytes, 0);
    assert!(read(&kept, 0, 4096).expect("a read") == [1; 4096]);
    assert!(write(&kept, 0, &[5; 4096]).is_ok(), "what is there can be changed");
    // Deleting works, and gives everything back.
    drop(file);
    idle.unlink(ROOT_INO, b"busy").expect("an unlink on a full volume");
    let again = create(&idle, "again");
    write(&again, 0, &vec![6; 8 << 20]).expect("space again");
    assert_eq!(world.problems(&busy), Vec::<String>::new());
}

// Invariant C5: what another node may have written is flushed; where there is no byte, there is nothing to flush.
#[test]
fn an_fsync_of_a_file_without_a_byte_asks_the_lun_for_nothing() {
    let world = World::new();
    let (node, other) = (world.node(1), world.node(2));
    let file = create(&node, "f");
    let flushes = |node: &Arc<Node>| node.stats().flushes;
    fsync(&file).expect("an fsync");
    assert_eq!(flushes(&node), 0, "that the file is there was durable when it was made");
    write(&file, 0, b"x").expect("a write");
    fsync(&file).expect("an fsync");
    assert_eq!(flushes(&node), 1);

    let file = create(&node, "g");
    write(&open(&other, "g"), 0, b"x").expect("a write");
    fsync(&file).expect("an fsync");
    assert_eq!(flushes(&node), 2, "the grant is gone: nobody knows here that the file is empty");
}
