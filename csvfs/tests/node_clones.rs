//! Clones of files: blocks that are shared until one of the files is written.

mod world;

use std::sync::Arc;

use csvfs::node::{ExtentState, File, Node, ROOT_INO};
use world::{Dice, Model, PLAIN, World, create, fsync, open, read, write};

const BLOCK: u64 = 4096;

fn clone_as(node: &Arc<Node>, file: &File, name: &str) -> Arc<File> {
    node.clone_file(file, ROOT_INO, name.as_bytes(), &PLAIN).expect("a clone");
    open(node, name)
}

fn free(node: &Node) -> u64 {
    node.statfs().expect("numbers").blocks_free
}

fn states(file: &File) -> Vec<(u64, u64, ExtentState)> {
    let map = file.map().expect("a map");
    map.iter().map(|e| (e.file_offset / BLOCK, e.length / BLOCK, e.state)).collect()
}

#[test]
fn a_clone_takes_no_space_and_each_side_keeps_its_own_content() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "source");
    let mut old = Dice(7).bytes(200_000);
    write(&file, 0, &old).expect("a write");
    fsync(&file).expect("an fsync");
    // The first clone of a volume has more kept back for metadata.
    drop(clone_as(&node, &file, "first"));
    let before = free(&node);
    let clone = clone_as(&node, &file, "clone");
    assert_eq!(free(&node), before, "a clone shares all blocks");
    assert_eq!(clone.size().expect("a size"), 200_000);
    assert_eq!(read(&clone, 0, 300_000).expect("a read"), old);
    assert_eq!(states(&clone), [(0, 49, ExtentState::Shared)]);
    assert_eq!(states(&file), [(0, 49, ExtentState::Shared)]);

    // A part of a block, whole blocks, and the end.
    let mut new = old.clone();
    for (at, len) in [(5_000_usize, 10), (40_960, 8192), (199_000, 3_000), (70_001, 20_000)] {
        let bytes = vec![0xAB; len];
        write(&clone, at as u64, &bytes).expect("a write");
        let end = at + len;
        new.resize(new.len().max(end), 0);
        new[at..end].copy_from_slice(&bytes);
    }
    assert_eq!(read(&clone, 0, 300_000).expect("a read"), new);
    assert_eq!(read(&file, 0, 300_000).expect("a read"), old, "the source is as it was");
    // And the other way round.
    write(&file, 100_000, b"the source goes on").expect("a write");
    old[100_000..100_018].copy_from_slice(b"the source goes on");
    fsync(&clone).expect("an fsync");
    drop((file, clone));
    assert_eq!(world.problems(&node), Vec::<String>::new());
    let other = world.node(2);
    assert_eq!(read(&open(&other, "source"), 0, 300_000).expect("a read"), old);
    assert_eq!(read(&open(&other, "clone"), 0, 300_000).expect("a read"), new);
}

// Invariant C7: a block that several files have is free only when the last of them lets it go.
#[test]
fn space_comes_back_with_the_last_of_the_clones() {
    let world = World::new();
    let node = world.node(1);
    let start = free(&node);
    let file = create(&node, "a");
    write(&file, 0, &vec![1; 1 << 20]).expect("a write");
    fsync(&file).expect("an fsync");
    let b = clone_as(&node, &file, "b");
    let c = clone_as(&node, &b, "c");
    drop((file, b));
    node.unlink(ROOT_INO, b"a").expect("an unlink");
    c.punch(0, 64 * BLOCK).expect("a hole");
    c.set_size(200 * BLOCK + 17).expect("a smaller size");
    assert_eq!(read(&open(&node, "b"), 0, 2 << 20).expect("a read"), vec![1; 1 << 20]);
    let mut expected = vec![0; 64 * 4096];
    expected.resize(200 * 4096 + 17, 1);
    assert_eq!(read(&c, 0, 2 << 20).expect("a read"), expected);
    assert_eq!(world.problems(&node), Vec::<String>::new());
    drop(c);
    node.unlink(ROOT_INO, b"b").expect("an unlink");
    node.unlink(ROOT_INO, b"c").expect("an unlink");
    let again = world.node(2);
    node.detach().expect("an orderly leave");
    assert_eq!(world.problems(&again), Vec::<String>::new());
    assert_eq!(free(&again), start);
}

#[test]
fn what_nobody_else_has_any_more_is_written_in_place() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "a");
    write(&file, 0, &vec![1; 64 * 4096]).expect("a write");
    drop(clone_as(&node, &file, "b"));
    node.unlink(ROOT_INO, b"b").expect("an unlink");
    drop(file);
    // What was removed is freed when the grant on it has come back, a little later.
    let inodes = || node.statfs().expect("numbers of the volume").inodes;
    assert!((0..1_000_000).any(|_| inodes() == 2), "the root and one file are left");
    // Another node asks for the map anew.
    let other = world.node(2);
    let file = open(&other, "a");
    let place = file.map().expect("a map")[0].lun_offset;
    write(&file, 0, &vec![2; 64 * 4096]).expect("a write");
    fsync(&file).expect("an fsync");
    let map = file.map().expect("a map");
    assert_eq!((map.len(), map[0].lun_offset), (1, place), "no copy was needed");
    drop(file);
    assert_eq!(world.problems(&other), Vec::<String>::new());
}

#[test]
fn a_clone_is_the_source_at_one_moment_whoever_writes_to_it() {
    let world = World::new();
    let (writer, cloner) = (world.node(1), world.node(2));
    let file = create(&writer, "source");
    write(&file, 0, &[0; 8 * 4096]).expect("a write");
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let file = &file;
        // Each round writes its number to the last block first and then to the first: a clone never has a newer first one.
        scope.spawn(move || {
            for round in 1..=200_u8 {
                write(file, 7 * BLOCK, &[round; 4096]).expect("a write");
                write(file, 0, &[round; 4096]).expect("a write");
            }
            drop(tell);
        });
        let mut clones = 0;
        while matches!(told.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty)) || clones == 0 {
            let source = open(&cloner, "source");
            let clone = clone_as(&cloner, &source, &format!("clone{clones}"));
            let bytes = read(&clone, 0, 8 * 4096).expect("a read");
            let (first, last) = (bytes[0], bytes[7 * 4096]);
            assert!(bytes[..4096].iter().all(|byte| *byte == first), "a write is whole in a clone");
            assert!(last == first || last == first + 1, "{first} and {last} were never there together");
            clones += 1;
        }
    });
    drop(file);
    assert_eq!(world.problems(&cloner), Vec::<String>::new());
}

#[test]
fn ranges_that_cannot_be_cloned_are_refused_and_change_nothing() {
    let world = World::new();
    let node = world.node(1);
    let (a, b) = (create(&node, "a"), create(&node, "b"));
    write(&a, 0, &vec![1; 10_000]).expect("a write");
    write(&b, 0, &vec![2; 50_000]).expect("a write");
    let errno = |outcome: Result<u64, csvfs::node::FsError>| outcome.expect_err("refused").errno();
    assert_eq!(errno(a.clone_range(&b, 1, 0, 4096)), libc::EINVAL);
    assert_eq!(errno(a.clone_range(&b, 0, 1, 4096)), libc::EINVAL);
    assert_eq!(errno(a.clone_range(&b, 0, 0, 5000)), libc::EINVAL);
    // To its end, which is in the middle of what the other has.
    assert_eq!(errno(a.clone_range(&b, 0, 0, 10_000)), libc::EINVAL);
    assert_eq!(errno(b.clone_range(&b, 0, 4096, 8192)), libc::EINVAL);
    assert_eq!(errno(world.node(2).open(b.ino()).expect("open").clone_range(&a, 0, 0, 4096)), libc::EXDEV);
    assert_eq!(a.clone_range(&b, 20_480, 0, 4096).expect("nothing there"), 0);
    assert_eq!(read(&b, 0, 100_000).expect("a read"), vec![2; 50_000]);
    assert_eq!(b.clone_range(&b, 0, 65_536, 8192).expect("within one file"), 8192);
    assert_eq!(a.clone_range(&b, 0, 73_728, 10_000).expect("to the end of both"), 10_000);
    assert_eq!(node.clone_file(&a, ROOT_INO, b"b", &PLAIN).expect_err("taken").errno(), libc::EEXIST);
    drop((a, b));
    assert_eq!(world.problems(&node), Vec::<String>::new());
}

#[test]
fn a_copied_range_shares_what_it_can_and_copies_the_rest() {
    let world = World::new();
    let node = world.node(1);
    let (a, b) = (create(&node, "a"), create(&node, "b"));
    let bytes = Dice(3).bytes(100_000);
    write(&a, 0, &bytes).expect("a write");
    for (offset, to_offset, len) in
        [(0, 0, 100_000), (4_096, 8_192, 40_000), (100, 4_196, 20_000), (3, 0, 9_999)]
    {
        let (mut model, mut done) = (Model(read(&b, 0, 200_000).expect("a read")), 0);
        model.write(to_offset, &bytes[offset..offset + len]);
        while done < len as u64 {
            let (from, to) = (offset as u64 + done, to_offset as u64 + done);
            let step = a.copy_range(&b, from, to, len as u64 - done).expect("a copy");
            assert!(step > 0, "it goes on");
            done += step;
        }
        assert_eq!(read(&b, 0, 200_000).expect("a read"), model.0, "{offset} to {to_offset}, {len} bytes");
    }
    assert_eq!(a.copy_range(&b, 100_000, 0, 10).expect("at the end"), 0);
    assert!(states(&b).iter().any(|(.., state)| *state == ExtentState::Shared));
    drop((a, b));
    assert_eq!(world.problems(&node), Vec::<String>::new());
}

// Random work on clones of clones by two nodes, with changes of the coordinator, against arrays of bytes.
#[test]
fn clones_of_clones_behave_like_copies() {
    for seed in 1..=4 {
        let world = World::new();
        let nodes = [world.node(1), world.node(2)];
        let mut dice = Dice(0x5eed_0000 + seed);
        let mut models: Vec<Model> = vec![Model::default()];
        drop(create(&nodes[0], "f0"));
        for step in 0..120 {
            let at = dice.size(models.len());
            let node = &nodes[dice.size(2)];
            let file = open(node, &format!("f{at}"));
            match dice.roll(12) {
                0..=5 => {
                    let (offset, len) = (dice.size(150_000), 1 + dice.size(30_000));
                    let bytes = dice.bytes(len);
                    write(&file, offset as u64, &bytes).expect("a write");
                    models[at].write(offset, &bytes);
                }
                6 | 7 if models.len() < 12 => {
                    drop(clone_as(node, &file, &format!("f{}", models.len())));
                    models.push(Model(models[at].0.clone()));
                }
                8 => {
                    let size = dice.size(models[at].0.len() + 1);
                    file.set_size(size as u64).expect("a smaller size");
                    models[at].0.truncate(size);
                }
                9 => {
                    let (offset, len) = (dice.size(150_000), 1 + dice.size(60_000));
                    file.punch(offset as u64, len as u64).expect("a hole");
                    let end = (offset + len).min(models[at].0.len());
                    if offset < end {
                        models[at].0[offset..end].fill(0);
                    }
                }
                10 if step % 3 == 0 => {
                    world.kill_coordinator();
                    world.start_coordinator();
                }
                _ => {
                    let other = dice.size(models.len());
                    if other != at {
                        let to = open(node, &format!("f{other}"));
                        let len = 1 + dice.size(20);
                        let (from, into) = (dice.roll(30) * BLOCK, dice.roll(30) * BLOCK);
                        let len = (len as u64 * BLOCK).min((models[at].0.len() as u64).saturating_sub(from));
                        let len = len - len % BLOCK;
                        if len > 0 {
                            assert_eq!(file.clone_range(&to, from, into, len).expect("a clone"), len);
                            let (from, len) =
                                (usize::try_from(from).expect("small"), usize::try_from(len).expect("small"));
                            let bytes = models[at].0[from..from + len].to_vec();
                            models[other].write(usize::try_from(into).expect("small"), &bytes);
                        }
                    }
                }
            }
            let looked_at = dice.size(models.len());
            let file = open(&nodes[dice.size(2)], &format!("f{looked_at}"));
            assert_eq!(
                read(&file, 0, 300_000).expect("a read"),
                models[looked_at].0,
                "seed {seed}, step {step}, file {looked_at}"
            );
        }
        assert_eq!(world.problems(&nodes[0]), Vec::<String>::new(), "seed {seed}");
        for (n, model) in models.iter().enumerate() {
            assert_eq!(read(&open(&nodes[1], &format!("f{n}")), 0, 300_000).expect("a read"), model.0);
        }
    }
}

// The space of a clone is exact: all of it can be written until the volume is full, and then nothing is lost.
#[test]
fn a_clone_on_a_full_volume_is_written_as_far_as_there_is_space() {
    let world = World::on(Arc::new(blockio::MemoryDevice::new(80 << 20)));
    let node = world.node(1);
    let file = create(&node, "a");
    write(&file, 0, &vec![1; 24 << 20]).expect("a write");
    fsync(&file).expect("an fsync");
    let clone = clone_as(&node, &file, "b");
    let mut written = 0;
    let full = loop {
        match write(&clone, written, &vec![2; 1 << 20]) {
            Ok(_) => written += 1 << 20,
            Err(error) => break error,
        }
    };
    assert_eq!(full.errno(), libc::ENOSPC);
    assert!(written >= 8 << 20, "only {written} bytes fit");
    fsync(&clone).expect("an fsync");
    let bytes = read(&clone, 0, 24 << 20).expect("a read");
    let edge = usize::try_from(written).expect("small");
    assert!(bytes[..edge].iter().all(|byte| *byte == 2), "what was acknowledged is there");
    assert!(bytes[edge..].iter().all(|byte| *byte == 1), "what was not is as it was");
    assert!(read(&file, 0, 24 << 20).expect("a read").iter().all(|byte| *byte == 1));
    // Deleting works, and gives room again.
    drop(file);
    node.unlink(ROOT_INO, b"a").expect("an unlink on a full volume");
    // The room comes back when the node has given up what it held of the file, which it does by itself.
    while let Err(error) = write(&clone, written, &vec![3; 1 << 20]) {
        assert_eq!(error.errno(), libc::ENOSPC);
        std::thread::yield_now();
    }
    drop(clone);
    assert_eq!(world.problems(&node), Vec::<String>::new());
}
