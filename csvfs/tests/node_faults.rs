//! Power cuts, failing flushes, a full volume, requests that take their time.

mod world;

use std::sync::Arc;
use std::thread;

use blockio::{BlockDevice, FaultDevice, FileDevice, IoBuf, IoOp, MemoryDevice, OpKind, Unflushed};
use csvfs::node::ROOT_INO;
use world::{Dice, LUN_BYTES, World, buf_of, create, fsync, later, open, read, write};

type Faulty = Arc<FaultDevice<Arc<MemoryDevice>>>;

fn faulty() -> (Faulty, Arc<MemoryDevice>) {
    let stable = Arc::new(MemoryDevice::new(LUN_BYTES));
    (Arc::new(FaultDevice::new(stable.clone())), stable)
}

fn after_power_cut(choice: Unflushed) {
    let (device, stable) = faulty();
    // Old bytes everywhere: whatever is read without having been written shows.
    for at in (256 << 20..512 << 20).step_by(1 << 20) {
        stable.write_at(at, &vec![0xEE; 1 << 20]).expect("a write");
    }
    let world = World::on(device.clone());
    let node = world.node(1);
    let file = create(&node, "f");
    let mut dice = Dice(99);
    let content = dice.bytes(300_001);
    write(&file, 0, &content).expect("a write");
    fsync(&file).expect("an fsync");
    // Not synchronised: may be there or not, but never anybody else's bytes.
    write(&file, 400_000, &[7; 50_000]).expect("a write");
    file.allocate(1 << 20, 1 << 20, false).expect("space");
    let term = world.term();
    device.crash(choice).expect("a power cut");
    drop((file, node));
    world.kill_coordinator();

    let world = World::of_after(stable, world.volume, term);
    world.link.coordinator().expect("there").node_gone(lockmgr::NodeId(1), lockmgr::Epoch(1));
    let node = world.node(2);
    let file = open(&node, "f");
    assert!(read(&file, 0, 300_001).expect("a read") == content, "{choice:?}");
    let rest = read(&file, 300_001, 4 << 20).expect("a read");
    assert!(rest.iter().all(|byte| *byte == 0 || *byte == 7), "{choice:?}: old bytes of the LUN are seen");
    assert_eq!(world.problems(&node), Vec::<String>::new());
}

// Invariants C2, C3, C5.
#[test]
fn after_a_power_cut_synchronised_data_is_there_and_fresh_space_reads_zeros() {
    for choice in [
        Unflushed::None,
        Unflushed::All,
        Unflushed::Subset { seed: 1 },
        Unflushed::Torn { seed: 2 },
        Unflushed::Torn { seed: 3 },
    ] {
        after_power_cut(choice);
    }
}

// Invariant C6: in flight is counted; the recall waits for the last request.
#[test]
fn a_recall_is_answered_only_when_nothing_is_in_flight() {
    let (device, stable) = faulty();
    let world = World::on(stable.clone());
    let (a, b) = (world.node_on(1, device.clone()), world.node_on(2, device.clone()));
    let file = create(&a, "f");
    write(&file, 0, &[1; 8192]).expect("a write");
    fsync(&file).expect("an fsync");
    device.hold(Some(OpKind::Write));
    let slow = later(|tell| file.write(0, buf_of(&[2; 4096]), tell));
    device.wait_held(1);
    let reader = {
        let b = b.clone();
        thread::spawn(move || read(&open(&b, "f"), 0, 8192))
    };
    // The recall arrives; new writes wait behind it, and the reader waits for the held one.
    while a.stats().recalls == 0 {
        thread::yield_now();
    }
    let later_write = later(|tell| file.write(4096, buf_of(&[3; 4096]), tell));
    assert!(slow.try_recv().is_err() && later_write.try_recv().is_err() && !reader.is_finished());
    device.release();
    slow.recv().expect("a completion").expect("a write");
    let seen = reader.join().expect("no panic").expect("a read");
    assert!(seen[..4096] == [2; 4096]);
    later_write.recv().expect("a completion").expect("a write");
    assert!(read(&open(&b, "f"), 4096, 4096).expect("a read") == [3; 4096]);
}

// Invariant D6.
#[test]
fn after_a_failed_flush_the_node_writes_nothing_more() {
    let (device, stable) = faulty();
    let world = World::on(stable.clone());
    let node = world.node_on(1, device.clone());
    let file = create(&node, "f");
    let other = create(&node, "g");
    write(&file, 0, &[1; 4096]).expect("a write");
    device.fail(OpKind::Flush, 1, 5);
    assert_eq!(fsync(&file).expect_err("a failed flush").errno(), 5);
    assert!(node.stopped().is_some());
    assert!(write(&file, 0, &[2; 4096]).is_err());
    assert!(write(&other, 0, &[2; 4096]).is_err());
    assert!(fsync(&other).is_err());
    assert!(file.set_size(0).is_err());
    assert!(node.detach().is_err());
    // Nothing of it was committed: others see no block that may be missing.
    world.link.coordinator().expect("there").node_gone(lockmgr::NodeId(1), lockmgr::Epoch(1));
    let b = world.node(2);
    assert_eq!(b.lookup(ROOT_INO, b"f").expect("the name").size_bytes, 0);
    assert_eq!(world.problems(&b), Vec::<String>::new());
}

#[test]
fn a_failed_write_is_reported_and_commits_nothing() {
    let (device, stable) = faulty();
    let world = World::on(stable.clone());
    let node = world.node_on(1, device.clone());
    let file = create(&node, "f");
    device.fail(OpKind::Write, 1, 5);
    assert_eq!(write(&file, 0, &[1; 4096]).expect_err("a failed write").errno(), 5);
    assert_eq!(file.size().expect("a size"), 0);
    write(&file, 0, &[2; 100]).expect("a write");
    assert!(read(&file, 0, 4096).expect("a read") == [2; 100]);
    fsync(&file).expect("an fsync");
}

#[test]
fn a_full_volume_is_an_error_and_usable_again_after_deletes() {
    let world = World::on(Arc::new(MemoryDevice::new(96 << 20)));
    let (a, b) = (world.node(1), world.node(2));
    let file = create(&a, "big");
    let mut at = 0;
    let full = loop {
        match write(&file, at, &[1; 1 << 18]) {
            Ok(n) => at += n as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(full.errno(), 28);
    assert!(at > 8 << 20);
    assert_eq!(file.size().expect("a size"), at);
    // What is there can still be changed and read.
    write(&file, 0, &[2; 4096]).expect("a write in place");
    assert!(read(&open(&b, "big"), 0, 1).expect("a read") == [2]);
    drop(file);
    a.unlink(ROOT_INO, b"big").expect("an unlink");
    let again = create(&b, "again");
    write(&again, 0, &vec![3; 4 << 20]).expect("space is usable again");
    assert_eq!(world.problems(&a), Vec::<String>::new());
}

#[test]
fn as_a_device_a_file_has_fixed_bounds_and_zeroes_ranges() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "disk");
    blockio::ImageFile::set_len(&*file, 1 << 20).expect("a size");
    let beyond = file.run(IoOp::Write { offset: (1 << 20) - 512, buf: IoBuf::zeroed(1024), fua: false });
    assert!(matches!(beyond, Err(blockio::IoError::OutOfRange { .. })), "{beyond:?}");
    file.write_at(1000, &[5; 9000]).expect("a write");
    file.run(IoOp::WriteZeroes { offset: 2000, len: 5000, may_unmap: true }).expect("zeroes");
    let mut bytes = vec![0; 12_000];
    file.read_at(0, &mut bytes).expect("a read");
    let expected: Vec<u8> = (0..12_000)
        .map(|at| if (1000..2000).contains(&at) || (7000..10_000).contains(&at) { 5 } else { 0 })
        .collect();
    assert!(bytes == expected);
    file.run(IoOp::Write { offset: 0, buf: IoBuf::zeroed(512), fua: true }).expect("a write through");
    BlockDevice::flush(&*file).expect("a flush");
    assert_eq!(BlockDevice::geometry(&*file).size_bytes, 1 << 20);
}

// A device that addresses only whole blocks: every odd range is read, changed and written.
#[test]
fn any_range_works_on_a_lun_of_large_blocks() {
    let world = World::on(Arc::new(MemoryDevice::with_block_bytes(LUN_BYTES, 4096)));
    let (a, b) = (world.node(1), world.node(2));
    let file = create(&a, "f");
    let other = open(&b, "f");
    let (mut model, mut dice) = (world::Model::default(), Dice(4242));
    for _ in 0..150 {
        let (offset, len) = (dice.size(60_000), 1 + dice.size(10_000));
        let bytes = dice.bytes(len);
        write(&file, offset as u64, &bytes).expect("a write");
        model.write(offset, &bytes);
        let (at, many) = (dice.size(70_000), dice.size(9_000));
        assert!(read(&file, at as u64, many).expect("a read") == model.read(at, many));
    }
    assert!(read(&other, 0, 100_000).expect("a read") == model.0);
}

// Callers that come together share a flush.
#[test]
fn concurrent_fsyncs_share_flushes() {
    let (device, stable) = faulty();
    let world = World::on(stable.clone());
    let node = world.node_on(1, device.clone());
    let file = create(&node, "f");
    write(&file, 0, &[1; 4096]).expect("a write");
    device.hold(Some(OpKind::Flush));
    let first = later(|tell| file.fsync(tell));
    device.wait_held(1);
    let rest: Vec<_> = (0..50).map(|_| later(|tell| file.fsync(tell))).collect();
    device.release();
    first.recv().expect("a completion").expect("an fsync");
    for told in rest {
        told.recv().expect("a completion").expect("an fsync");
    }
    assert_eq!(node.stats().flushes, 2);
}

#[test]
fn a_bad_sector_costs_only_its_own_range_of_the_file() {
    let (device, _) = faulty();
    let world = World::on(device.clone());
    let node = world.node(1);
    let file = create(&node, "f");
    let bytes = Dice(5).bytes(200_000);
    write(&file, 0, &bytes).expect("a write");
    fsync(&file).expect("an fsync");
    let (tell, told) = std::sync::mpsc::channel();
    node.on_bad_range(move |bad| drop(tell.send(bad)));
    // One sector in block 20 of the file.
    let extent = file.map().expect("a map")[0];
    let bad = extent.lun_offset + 20 * 4096 + 512;
    device.break_range(bad..bad + 512);

    // A long read gives what lies before, the next one begins at the bad block and fails, the rest is there.
    let mut at = 0;
    while at < 20 * 4096 {
        let got = read(&file, at as u64, 200_000).expect("what lies before the bad block");
        assert_eq!(got, bytes[at..at + got.len()]);
        assert!(!got.is_empty(), "it goes on");
        at += got.len();
    }
    assert_eq!(at, 20 * 4096, "nothing of the bad block is given");
    let error = read(&file, at as u64, 200_000).expect_err("the bad block");
    assert_eq!(error.errno(), libc::EIO);
    assert_eq!(read(&file, 21 * 4096, 200_000).expect("what lies behind"), bytes[21 * 4096..]);
    let named = told.recv().expect("it is told");
    assert_eq!((named.ino, named.offset, named.write), (file.ino(), 20 * 4096, false), "{named:?}");
    assert!(named.length <= 4096, "{named:?}");
    assert_eq!(node.bad_ranges(), [named]);

    // Other places can be written, and the node goes on.
    write(&file, 0, &[9; 8192]).expect("a write beside it");
    fsync(&file).expect("an fsync");
    write(&file, 20 * 4096, &[9; 4096]).expect_err("a write to it");
    drop(create(&node, "another"));
    assert!(node.stopped().is_none());
    device.heal();
    assert_eq!(world.problems(&node), Vec::<String>::new());
}

// A disk is read whole or not at all; the place is found all the same, and a read that succeeds the second time is whole.
#[test]
fn a_read_of_a_disk_that_meets_a_bad_sector_fails_and_names_the_block() {
    let (device, _) = faulty();
    let world = World::on(device.clone());
    let node = world.node(1);
    let file = create(&node, "disk");
    let bytes = Dice(6).bytes(256 << 10);
    write(&file, 0, &bytes).expect("a write");
    let whole = || {
        let buf = IoBuf::zeroed(256 << 10);
        let disk: &dyn BlockDevice = &*file;
        disk.run(IoOp::Read { offset: 0, buf: buf.clone() }).map(|()| buf.to_vec())
    };
    device.fail(OpKind::Read, 1, libc::EIO);
    assert!(whole().expect("the second time") == bytes);
    assert_eq!(node.bad_ranges(), []);
    let bad = file.map().expect("a map")[0].lun_offset + 37 * 4096;
    device.break_range(bad..bad + 512);
    whole().expect_err("a bad sector in it");
    let named = node.bad_ranges();
    assert_eq!(named.iter().map(|bad| (bad.offset, bad.write)).collect::<Vec<_>>(), [(37 * 4096, false)]);
    // A write over the place is named as a write when it fails, and the place is good again when it does not.
    device.heal();
    write(&file, 37 * 4096, &bytes[37 * 4096..38 * 4096]).expect("a write to the place");
    assert!(whole().expect("it is good again") == bytes);
}

// Invariant D2, D6: what the metadata store cannot read is named, and ends the coordinator instead of being guessed.
#[test]
fn a_bad_sector_in_the_metadata_is_found_and_named() {
    let (device, _) = faulty();
    let world = World::on(device.clone());
    let node = world.node(1);
    for n in 0..50 {
        drop(create(&node, &format!("f{n}")));
    }
    node.detach().expect("an orderly leave");
    world.stop_coordinator();
    // The first metadata chunk: superblocks, owner blocks and logs are elsewhere.
    device.break_range((21 << 20) + 4096..29 << 20);
    let plain: Arc<dyn BlockDevice> = device.clone();
    let error = csvfs::check::check_device(&plain).expect_err("it cannot be opened").to_string();
    assert!(error.contains("metadata"), "{error}");
    device.heal();
    assert_eq!(csvfs::check::check_device(&plain).expect("it can be checked").problems, Vec::new());
}

// Invariant D4: what a client held whose log cannot be read stays its own, until somebody gives the log up by name.
#[test]
fn a_log_that_cannot_be_read_locks_what_its_client_held_and_can_be_given_up() {
    use lockmgr::{Epoch, NodeId};
    let (device, _) = faulty();
    let world = World::on(device.clone());
    let (node, other) = (world.node(1), world.node(2));
    let file = create(&node, "f");
    write(&file, 0, &[1; 8192]).expect("a write");
    fsync(&file).expect("an fsync");
    assert!(node.stats().log_writes > 0, "it has a log");
    // Where that log lies, the first one of the volume.
    device.break_range(4 << 20..(4 << 20) + (64 << 10));
    let coordinator = world.link.coordinator().expect("there");
    coordinator.node_gone(NodeId(1), Epoch(1));
    let problems = world.problems(&other);
    let named = problems.iter().find(|what| what.contains("give-up-log")).expect("it is named").clone();
    assert!(coordinator.stats().stopped.is_none(), "the others are served");
    drop(create(&other, "another"));
    let client =
        coordinator.clients().into_iter().find(|client| client.id.node == NodeId(1)).expect("it is kept").id;
    assert!(named.contains(&client.to_string()), "{named}");
    // Who only asks about it is told, and does not wait.
    let error = other.resolve_at_once("f").expect_err("it is locked");
    assert_eq!(error.errno(), libc::EBUSY);
    let told = error.to_string();
    assert!(told.contains(&client.to_string()) && told.contains("give-up-log"), "{told}");
    assert_eq!(other.give_up_log(world.client(7)).expect_err("no such client").errno(), libc::ENOENT);
    other.give_up_log(client).expect("it is given up");
    assert!(coordinator.clients().iter().all(|client| client.id.node != NodeId(1)));
    let file = open(&other, "f");
    write(&file, 0, &[2; 4096]).expect("nobody holds it any more");
    fsync(&file).expect("its own log does not lie where nothing can be written");
    assert!(other.stats().log_writes > 0, "it has a log");
    drop(file);
    device.heal();
    assert_eq!(world.problems(&other), Vec::<String>::new());
}

// Each failed read may be a reason to say once more that the client has ended: the coordinator would do nothing else.
#[test]
#[expect(clippy::disallowed_methods, reason = "a pause is what is tested")]
fn a_log_that_could_not_be_read_is_read_again_after_a_while_and_not_whenever_its_client_is_called_over() {
    use std::time::{Duration, Instant};

    use lockmgr::{Epoch, NodeId};
    const PAUSE: Duration = Duration::from_secs(2);
    let (device, _) = faulty();
    let world = World::on(device.clone());
    let (node, other) = (world.node(1), world.node(2));
    let file = create(&node, "f");
    write(&file, 0, &[1; 8192]).expect("a write");
    fsync(&file).expect("an fsync");
    device.break_range(4 << 20..20 << 20);
    let coordinator = world.link.coordinator().expect("there");
    let begun = Instant::now();
    let is_locked = || {
        coordinator.node_gone(NodeId(1), Epoch(1));
        world.problems(&other).iter().any(|what| what.contains("give-up-log"))
    };
    assert!(is_locked());
    device.heal();
    let mut asked = 0;
    while is_locked() {
        asked += 1;
        assert!(begun.elapsed() < Duration::from_secs(60), "it is readable again");
    }
    assert!(begun.elapsed() >= PAUSE && asked > 0, "it was read at once");
    assert!(read(&open(&other, "f"), 0, 8192).expect("a read") == [1; 8192], "the log was replayed");
}

// Of the flush, of what the log says after it, and of a write: nobody else is woken for any of them.
#[test]
fn who_waits_for_an_fsync_carries_it_out() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let lun = FileDevice::create(folder.path().join("lun"), LUN_BYTES).expect("a LUN");
    let world = World::on(Arc::new(lun));
    let node = world.node(1);
    let file = create(&node, "f");
    write(&file, 0, &[1; 10_000]).expect("a write");
    let (flushes, records) = (node.stats().flushes, node.stats().log_writes);
    let here = blockio::here();
    let synced = later(|tell| file.fsync(move |outcome| tell((outcome, thread::current().id()))));
    drop(here);
    let (outcome, by) = synced.try_recv().expect("it is done when the call returns");
    outcome.expect("an fsync");
    assert_eq!(by, thread::current().id());
    assert_eq!((node.stats().flushes, node.stats().log_writes), (flushes + 1, records + 1));
    assert!(read(&file, 0, 10_000).expect("a read") == [1; 10_000]);
}
