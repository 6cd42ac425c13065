//! The read cache of a node: what comes from memory is what the LUN would give.

mod world;

use std::collections::BTreeSet;
use std::sync::Arc;

use blockio::{BlockDevice, MemoryDevice, OpKind};
use csvfs::node::{Extent, File, Node, ROOT_INO};
use world::{Dice, Model, PLAIN, World, create, fsync, open, read, write};

const BLOCK: u64 = 4096;
const ON: u64 = 8 << 20;

#[test]
fn what_was_read_comes_from_memory_until_it_is_turned_off() {
    let device = Arc::new(blockio::FaultDevice::new(MemoryDevice::new(128 << 20)));
    let world = World::on(device.clone());
    let node = world.node(1);
    let file = create(&node, "a");
    write(&file, 0, &Dice(1).bytes(40_000)).expect("a write");
    fsync(&file).expect("an fsync");
    node.set_read_cache(ON, None);
    let first = read(&file, 0, 40_960).expect("a read");
    // From now on the LUN reads nothing any more.
    device.fail_from(OpKind::Read, 1, libc::EIO);
    assert!(read(&file, 0, 40_960).expect("from memory") == first);
    assert_eq!(read(&file, 8192, 100).expect("a part of it"), first[8192..8292]);
    let stats = node.read_cache();
    assert!(stats.hits >= 2 && stats.misses >= 1 && stats.used_bytes > 0, "{stats:?}");
    node.set_read_cache(0, None);
    read(&file, 0, 4096).expect_err("there is no memory of it");
    device.heal();
}

#[test]
fn clones_share_what_is_in_memory() {
    let device = Arc::new(blockio::FaultDevice::new(MemoryDevice::new(128 << 20)));
    let world = World::on(device.clone());
    let node = world.node(1);
    let file = create(&node, "image");
    let bytes = Dice(2).bytes(65_536);
    write(&file, 0, &bytes).expect("a write");
    node.clone_file(&file, ROOT_INO, b"clone", &PLAIN).expect("a clone");
    node.set_read_cache(ON, None);
    assert_eq!(read(&file, 0, 65_536).expect("a read"), bytes);
    let clone = open(&node, "clone");
    // The map comes from the coordinator, the bytes from memory.
    read(&clone, 65_536, 1).expect("the end");
    assert_eq!(read(&clone, 0, 65_536).expect("a read"), bytes);
    assert!(node.read_cache().hits >= 1, "{:?}", node.read_cache());
}

// Invariants C6, E3: strict coherence with the cache on: a read on one node sees each write that was acknowledged on another.
#[test]
fn a_write_on_another_node_is_seen_by_the_next_read() {
    let world = World::new();
    let nodes = [world.node(1), world.node(2)];
    nodes.iter().for_each(|node| node.set_read_cache(ON, None));
    drop(create(&nodes[0], "a"));
    let files = nodes.each_ref().map(|node| open(node, "a"));
    for round in 1..=120_u8 {
        let writer = usize::from(round % 2);
        write(&files[writer], u64::from(round % 8) * BLOCK, &[round; 4096]).expect("a write");
        for file in &files {
            // The second time from memory.
            for _ in 0..2 {
                let got = read(file, u64::from(round % 8) * BLOCK, 4096).expect("a read");
                assert_eq!(got, [round; 4096], "round {round}");
            }
        }
    }
    assert!(nodes.iter().any(|node| node.read_cache().hits > 0));
}

fn turn_on(nodes: &[Arc<Node>; 2]) {
    nodes[0].set_read_cache(40 * BLOCK, None);
    nodes[1].set_read_cache(ON, None);
}

/// Has `file`, on `node`, let go of all that it has.
type LetGo = fn(&Arc<Node>, &Arc<File>);

// Blocks that a file has let go of go to another node, which writes to them under a grant that this one knows nothing of.
#[test]
fn what_a_file_let_go_of_is_never_answered_for_the_next_file_that_has_it() {
    let ways: [(&str, LetGo); 4] = [
        ("punched", |_, file| file.punch(0, SIZE as u64).expect("a hole")),
        ("cut", |_, file| file.set_size(0).expect("a smaller size")),
        ("replaced by copies", |node, file| {
            node.clone_file(file, ROOT_INO, b"clone", &PLAIN).expect("a clone");
            write(file, 0, &vec![2; SIZE]).expect("a write");
            fsync(file).expect("an fsync");
            node.unlink(ROOT_INO, b"clone").expect("an unlink");
        }),
        ("cloned over", |node, file| {
            let other = create(node, "other");
            write(&other, 0, &vec![3; SIZE]).expect("a write");
            other.clone_range(file, 0, 0, SIZE as u64).expect("a clone");
        }),
    ];
    for (way, let_go) in ways {
        let world = World::on(Arc::new(MemoryDevice::new(96 << 20)) as Arc<dyn BlockDevice>);
        let nodes = [world.node(1), world.node(2)];
        nodes[0].set_read_cache(4 * ON, None);
        let file = create(&nodes[0], "a");
        write(&file, 0, &vec![1; SIZE]).expect("a write");
        fsync(&file).expect("an fsync");
        assert!(all(&file, SIZE).iter().all(|byte| *byte == 1));
        let lay = places(&file);
        let_go(&nodes[0], &file);
        let big = create(&nodes[1], "big");
        let mut size = 0;
        // Room that was given back comes a moment later.
        while places(&big).is_disjoint(&lay) {
            while write(&big, size as u64, &vec![9; 1 << 20]).is_ok() {
                size += 1 << 20;
            }
            std::thread::yield_now();
        }
        let seen = all(&open(&nodes[0], "big"), size);
        assert!(seen.iter().all(|byte| *byte == 9), "{way}: the past is read");
        assert_eq!(world.problems(&nodes[0]), Vec::<String>::new());
    }
}

const SIZE: usize = 4 << 20;

/// A file in pieces that may be kept.
fn all(file: &File, size: usize) -> Vec<u8> {
    let piece = |at| read(file, at as u64, 64 << 10).expect("a read");
    (0..size).step_by(64 << 10).flat_map(piece).collect()
}

/// Where the blocks of a file lie.
fn places(file: &File) -> BTreeSet<u64> {
    let map = file.map().expect("a map");
    let blocks = |extent: &Extent| (extent.lun_offset..extent.lun_offset + extent.length).step_by(4096);
    map.iter().flat_map(blocks).collect()
}

// Everything that changes what a block holds or whose it is, on two nodes, with memory that is now and then too small.
#[test]
fn files_behave_as_without_a_cache() {
    for seed in 1..=6 {
        let world = World::on(Arc::new(MemoryDevice::new(96 << 20)) as Arc<dyn BlockDevice>);
        let nodes = [world.node(1), world.node(2)];
        turn_on(&nodes);
        let mut dice = Dice(0xcac4_e000 + seed);
        let mut models: Vec<Option<Model>> = (0..4).map(|_| Some(Model::default())).collect();
        (0..4).for_each(|n| drop(create(&nodes[0], &format!("f{n}"))));
        for step in 0..250 {
            let at = dice.size(4);
            let node = &nodes[dice.size(2)];
            let name = format!("f{at}");
            let Some(model) = &mut models[at] else {
                drop(create(node, &name));
                models[at] = Some(Model::default());
                continue;
            };
            let file = open(node, &name);
            match dice.roll(14) {
                0..=5 => {
                    let (offset, len) = (dice.size(100_000), 1 + dice.size(20_000));
                    let bytes = dice.bytes(len);
                    write(&file, offset as u64, &bytes).expect("a write");
                    model.write(offset, &bytes);
                }
                6 => {
                    let size = dice.size(model.0.len() + 1);
                    file.set_size(size as u64).expect("a smaller size");
                    model.0.truncate(size);
                }
                7 => {
                    let (offset, len) = (dice.size(100_000), 1 + dice.size(40_000));
                    file.punch(offset as u64, len as u64).expect("a hole");
                    let end = (offset + len).min(model.0.len());
                    if offset < end {
                        model.0[offset..end].fill(0);
                    }
                }
                8 => {
                    drop(file);
                    node.unlink(ROOT_INO, name.as_bytes()).expect("an unlink");
                    models[at] = None;
                    continue;
                }
                9 => {
                    let copy = Model(model.0.clone());
                    let to = (at + 1) % 4;
                    let other = format!("f{to}");
                    if models[to].take().is_some() {
                        node.unlink(ROOT_INO, other.as_bytes()).expect("an unlink");
                    }
                    node.clone_file(&file, ROOT_INO, other.as_bytes(), &PLAIN).expect("a clone");
                    models[to] = Some(copy);
                }
                10 => fsync(&file).expect("an fsync"),
                11 if step % 5 == 0 => turn_on(&nodes),
                12 if step % 10 == 0 => {
                    world.kill_coordinator();
                    world.start_coordinator();
                }
                _ => {}
            }
            for _ in 0..3 {
                let looked_at = dice.size(4);
                let Some(model) = &models[looked_at] else { continue };
                let file = open(&nodes[dice.size(2)], &format!("f{looked_at}"));
                let (offset, len) = (dice.size(100_000), 1 + dice.size(60_000));
                for _ in 0..2 {
                    assert_eq!(
                        read(&file, offset as u64, len).expect("a read"),
                        model.read(offset, len),
                        "seed {seed}, step {step}, file {looked_at} at {offset}"
                    );
                }
            }
        }
        assert!(nodes.iter().any(|node| node.read_cache().hits > 0), "seed {seed}");
        assert_eq!(world.problems(&nodes[0]), Vec::<String>::new());
    }
}

// Many threads read one file of which two change parts: a read is whole, and never older than what was there before it began.
#[test]
fn readers_beside_writers_see_no_block_that_is_older_than_their_read() {
    use std::sync::atomic::{AtomicU8, Ordering};
    let world = World::new();
    let node = world.node(1);
    node.set_read_cache(ON, None);
    let file = create(&node, "a");
    write(&file, 0, &[0; 16 * 4096]).expect("a write");
    let newest: Vec<AtomicU8> = (0..16).map(|_| AtomicU8::new(0)).collect();
    std::thread::scope(|scope| {
        for writer in 0..2_u64 {
            let (file, newest) = (&file, &newest);
            scope.spawn(move || {
                for round in 1..=120_u8 {
                    for block in (0..16).filter(|block| block % 2 == writer) {
                        write(file, block * BLOCK, &[round; 4096]).expect("a write");
                        newest[usize::try_from(block).expect("small")].store(round, Ordering::SeqCst);
                    }
                }
            });
        }
        for reader in 0..3_u64 {
            let (file, newest) = (&file, &newest);
            scope.spawn(move || {
                let mut dice = Dice(77 + reader);
                for _ in 0..2000 {
                    let block = dice.size(16);
                    let floor = newest[block].load(Ordering::SeqCst);
                    let got = read(file, block as u64 * BLOCK, 4096).expect("a read");
                    assert!(got[0] >= floor, "block {block}: {} after {floor}", got[0]);
                }
            });
        }
    });
}
