//! What one node has written is what another reads, as soon as the write has returned.

mod world;

use std::sync::Arc;
use std::thread;

use csvfs::node::{ROOT_INO, SeekFrom, SetAttr};
use world::{Dice, Model, PLAIN, World, append, create, fsync, open, read, write};

#[test]
fn a_file_has_what_was_written_to_it() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "f");
    assert_eq!(write(&file, 0, b"hello").expect("a write"), 5);
    assert_eq!(read(&file, 0, 100).expect("a read"), b"hello");
    assert_eq!(file.size().expect("a size"), 5);
    drop(file);
    let again = open(&node, "f");
    assert_eq!(read(&again, 1, 3).expect("a read"), b"ell");
    assert!(world.problems(&node).is_empty());
}

#[test]
fn a_reader_sees_each_write_of_another_node() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let writer = create(&a, "f");
    let reader = open(&b, "f");
    let mut model = Model::default();
    let mut dice = Dice(0x5eed);
    for round in 0..300 {
        let (offset, len) = (dice.size(200_000), 1 + dice.size(20_000));
        let bytes = dice.bytes(len);
        // Now and then the roles change.
        let (writer, reader) = if round % 7 == 0 { (&reader, &writer) } else { (&writer, &reader) };
        write(writer, offset as u64, &bytes).expect("a write");
        model.write(offset, &bytes);
        let (at, many) = (dice.size(220_000), dice.size(50_000));
        assert!(read(reader, at as u64, many).expect("a read") == model.read(at, many), "round {round}");
        assert_eq!(reader.size().expect("a size"), model.0.len() as u64, "round {round}");
    }
    assert!(read(&writer, 0, 300_000).expect("a read") == model.0);
    drop((writer, reader));
    a.detach().expect("a detach");
    assert!(world.problems(&b).is_empty(), "{:?}", world.problems(&b));
}

#[test]
fn attributes_agree_on_all_nodes_without_an_open() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let file = create(&a, "f");
    write(&file, 0, &[7; 5000]).expect("a write");
    let seen = b.lookup(ROOT_INO, b"f").expect("the name");
    assert_eq!(seen.size_bytes, 5000);
    assert_eq!(b.getattr(file.ino()).expect("attributes"), a.getattr(file.ino()).expect("attributes"));
    b.setattr(file.ino(), &SetAttr { mode: Some(0o600), ..SetAttr::default() }).expect("a chmod");
    assert_eq!(a.getattr(file.ino()).expect("attributes").mode, 0o600);
    a.link(file.ino(), ROOT_INO, b"g").expect("a link");
    assert_eq!(a.getattr(file.ino()).expect("attributes").nlink, 2);
    let other = open(&b, "g");
    assert_eq!(other.attr().expect("attributes").nlink, 2);
    a.unlink(ROOT_INO, b"g").expect("an unlink");
    assert_eq!(other.attr().expect("attributes").nlink, 1);
    assert_eq!(a.getattr(file.ino()).expect("attributes").nlink, 1);
    assert_eq!(other.attr().expect("attributes"), file.attr().expect("attributes"));
}

#[test]
fn who_makes_a_hole_or_a_clone_sees_the_time_of_it_that_all_others_see() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let (file, source) = (create(&a, "f"), create(&a, "source"));
    for file in [&file, &source] {
        write(file, 0, &[7; 40_960]).expect("a write");
        fsync(file).expect("an fsync");
    }
    let agree = |what: &str| {
        let own = a.getattr(file.ino()).expect("attributes");
        let others = b.getattr(file.ino()).expect("attributes");
        assert_eq!(
            (own.mtime, own.ctime),
            (others.mtime, others.ctime),
            "{what}, as told by the node that did it"
        );
        let own = a.getattr(file.ino()).expect("attributes");
        assert_eq!((own.mtime, own.ctime), (others.mtime, others.ctime), "{what}, asked again");
    };
    file.punch(4096, 8192).expect("a hole");
    agree("a hole");
    write(&file, 20_000, &[8; 100]).expect("a write in place");
    file.punch(4096, 20_480).expect("a hole after a write that nobody was told of");
    agree("a hole after a write");
    source.clone_range(&file, 0, 0, 40_960).expect("a clone");
    agree("a clone");
}

#[test]
fn a_truncated_file_shows_zeros_where_it_grows_again() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let file = create(&a, "f");
    let other = open(&b, "f");
    write(&file, 0, &[1; 20_000]).expect("a write");
    other.set_size(5_001).expect("a truncate");
    assert_eq!(file.size().expect("a size"), 5_001);
    file.set_size(12_000).expect("a growth");
    let mut expected = vec![1; 5_001];
    expected.resize(12_000, 0);
    assert!(read(&other, 0, 20_000).expect("a read") == expected);
    assert!(world.problems(&a).is_empty());
}

#[test]
fn nodes_that_append_to_one_file_lose_nothing() {
    let world = World::new();
    let first = world.node(1);
    drop(create(&first, "log"));
    let writers: Vec<_> = (1..=3u8)
        .map(|number| {
            let node = world.node(u16::from(number));
            thread::spawn(move || {
                let file = open(&node, "log");
                for _ in 0..40 {
                    append(&file, &[number; 100]).expect("an append");
                }
                drop(file);
                node.detach().expect("a detach");
            })
        })
        .collect();
    for writer in writers {
        writer.join().expect("no panic");
    }
    let content = read(&open(&first, "log"), 0, 100_000).expect("a read");
    assert_eq!(content.len(), 3 * 40 * 100);
    for number in 1..=3 {
        assert_eq!(content.iter().filter(|byte| **byte == number).count(), 4_000);
    }
    assert!(content.chunks(100).all(|chunk| chunk.iter().all(|byte| *byte == chunk[0])));
}

#[test]
fn writers_of_different_files_do_not_disturb_each_other() {
    let world = Arc::new(World::new());
    let writers: Vec<_> = (1..=3u16)
        .map(|number| {
            let world = world.clone();
            thread::spawn(move || {
                let node = world.node(number);
                let file = create(&node, &format!("f{number}"));
                let (mut model, mut dice) = (Model::default(), Dice(u64::from(number) * 77));
                for _ in 0..100 {
                    let (offset, len) = (dice.size(500_000), 1 + dice.size(30_000));
                    let bytes = dice.bytes(len);
                    write(&file, offset as u64, &bytes).expect("a write");
                    model.write(offset, &bytes);
                    if dice.roll(10) == 0 {
                        fsync(&file).expect("an fsync");
                    }
                }
                assert!(read(&file, 0, 600_000).expect("a read") == model.0);
            })
        })
        .collect();
    for writer in writers {
        writer.join().expect("no panic");
    }
    assert!(world.problems(&world.node(1)).is_empty());
}

#[test]
fn many_writes_at_once_into_one_block_all_arrive() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "f");
    let pending: Vec<_> = (0..64u8)
        .map(|n| world::later(|tell| file.write(u64::from(n) * 100, world::buf_of(&[n + 1; 100]), tell)))
        .collect();
    for told in pending {
        told.recv().expect("a completion").expect("a write");
    }
    let content = read(&file, 0, 10_000).expect("a read");
    assert_eq!(content.len(), 6_400);
    for (n, chunk) in content.chunks(100).enumerate() {
        assert!(chunk.iter().all(|byte| usize::from(*byte) == n + 1), "chunk {n}");
    }
}

// Repeated reads and getattr under a grant need no message.
#[test]
fn mapped_reads_and_writes_and_attributes_send_nothing() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "f");
    write(&file, 0, &vec![3; 1 << 20]).expect("a write");
    let before = node.stats().requests_sent;
    for n in 0..100 {
        write(&file, n * 4096, &[4; 4096]).expect("a write");
        read(&file, n * 4096, 4096).expect("a read");
        file.attr().expect("attributes");
        node.getattr(file.ino()).expect("attributes");
    }
    // The first getattr asks once for what the allocation changed.
    assert!(node.stats().requests_sent - before <= 1, "{} messages", node.stats().requests_sent - before);
}

#[test]
fn a_long_sequential_write_asks_for_space_rarely() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "f");
    let before = node.stats().requests_sent;
    for n in 0..512 {
        write(&file, n << 16, &vec![5; 1 << 16]).expect("a write");
    }
    let messages = node.stats().requests_sent - before;
    assert!(messages <= 8, "{messages} messages for 32 MiB");
    drop(file);
    node.detach().expect("a detach");
    let other = world.node(2);
    let attr = other.lookup(ROOT_INO, b"f").expect("the name");
    assert_eq!((attr.size_bytes, attr.allocated_bytes), (32 << 20, 32 << 20));
}

#[test]
fn holes_and_data_are_found() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "f");
    write(&file, 100_000, &[1; 10]).expect("a write");
    file.set_size(300_000).expect("a growth");
    let block = 100_000 / 4096 * 4096;
    assert_eq!(file.seek(SeekFrom::Data(0)).expect("data"), block);
    assert_eq!(file.seek(SeekFrom::Hole(0)).expect("a hole"), 0);
    assert_eq!(file.seek(SeekFrom::Hole(block)).expect("a hole"), block + 4096);
    assert_eq!(file.seek(SeekFrom::Data(block + 4096)).expect_err("none").errno(), 6);
    // An image asks for both at once, so that tables with holes are opened at the cost of what is used of them.
    assert_eq!(blockio::ImageFile::data_from(&*file, 0), Some(block..block + 4096));
    assert_eq!(blockio::ImageFile::data_from(&*file, block + 4096), None);
    file.allocate(0, 1 << 20, true).expect("space");
    assert_eq!(file.size().expect("a size"), 300_000);
    assert!(read(&file, 0, 100_000).expect("a read") == vec![0; 100_000]);
    let total: u64 = file.map().expect("a map").iter().map(|extent| extent.length).sum();
    assert!(total >= 1 << 20);
    drop(file);
    node.mkdir(ROOT_INO, b"d", &PLAIN).expect("a directory");
    let dir = node.lookup(ROOT_INO, b"d").expect("the name");
    assert_eq!(node.open(dir.ino).expect_err("a directory").errno(), 21);
}

// An answer about attributes that was given before a commit must not undo the size that was committed meanwhile.
#[test]
fn attributes_never_go_back_while_a_file_grows() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "f");
    let looker = {
        let (node, ino) = (node.clone(), file.ino());
        thread::spawn(move || {
            let mut last = 0;
            while last < 200 * 5000 {
                let set = SetAttr {
                    mode: Some(0o600 | u32::try_from(last % 8).expect("small")),
                    ..SetAttr::default()
                };
                let size = node.setattr(ino, &set).expect("a chmod").size_bytes;
                assert!(size >= last, "{size} after {last}");
                last = size.max(node.lookup(ROOT_INO, b"f").expect("the name").size_bytes);
            }
        })
    };
    for n in 0..200 {
        write(&file, n * 5000, &[1; 5000]).expect("a write");
        fsync(&file).expect("an fsync");
        assert_eq!(file.size().expect("a size"), (n + 1) * 5000);
    }
    looker.join().expect("no panic");
}

// A node that sets attributes without holding anything of the file hears of no later change: what it was told then is over.
#[test]
fn what_a_node_was_told_when_it_held_nothing_is_not_what_it_goes_by_later() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let on_a = create(&a, "f");
    let on_b = open(&b, "f");
    for round in 0..20_u64 {
        assert_eq!(append(&on_b, &[1; 100]).expect("an append"), round * 300);
        let mode = SetAttr { mode: Some(0o600), ..SetAttr::default() };
        assert_eq!(a.setattr(on_a.ino(), &mode).expect("a change").size_bytes, round * 300 + 100);
        assert_eq!(append(&on_b, &[2; 100]).expect("an append"), round * 300 + 100);
        assert_eq!(append(&on_a, &[3; 100]).expect("an append"), round * 300 + 200);
    }
}
