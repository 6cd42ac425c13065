//! The coordinator goes and comes back: nobody who uses the volume notices.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use blockio::{FaultDevice, IoBuf, MemoryDevice, OpKind};
use csvfs::node::{File, Node, ROOT_INO};
use world::{Dice, LUN_BYTES, Model, PLAIN, World, create, fsync, later, open, read, write};

/// Works until told to stop: every call must succeed. Gives what the file must contain.
fn worker(node: Arc<Node>, number: u64, end: Arc<AtomicBool>, steps: Arc<AtomicU64>) -> JoinHandle<Model> {
    thread::spawn(move || {
        let file = create(&node, &format!("own{number}"));
        let shared = open(&node, "shared");
        let (mut model, mut dice) = (Model::default(), Dice(number * 31 + 7));
        let mut round = 0u64;
        while !end.load(Ordering::SeqCst) {
            step(&node, &file, &shared, (number, round), &mut model, &mut dice);
            round += 1;
            steps.fetch_add(1, Ordering::SeqCst);
        }
        assert!(read(&file, 0, 3 << 20).expect("a read") == model.0);
        drop((file, shared));
        node.detach().expect("a detach");
        model
    })
}

fn step(
    node: &Arc<Node>,
    file: &File,
    shared: &File,
    (number, round): (u64, u64),
    model: &mut Model,
    dice: &mut Dice,
) {
    let (offset, len) = (dice.size(2 << 20), 1 + dice.size(40_000));
    let bytes = dice.bytes(len);
    write(file, offset as u64, &bytes).expect("a write");
    model.write(offset, &bytes);
    assert!(read(file, offset as u64, len).expect("a read") == bytes);
    // Everybody writes into the shared file: grants travel all the time.
    write(shared, number * 1000, &round.to_le_bytes()).expect("a shared write");
    if dice.roll(5) == 0 {
        fsync(file).expect("an fsync");
    }
    let name = format!("n{number}-{round}");
    node.mkdir(ROOT_INO, name.as_bytes(), &PLAIN).expect("a mkdir");
    if dice.roll(2) == 0 {
        node.rename(ROOT_INO, name.as_bytes(), ROOT_INO, format!("m{name}").as_bytes(), 0).expect("a rename");
        node.rmdir(ROOT_INO, format!("m{name}").as_bytes()).expect("a rmdir");
    }
}

fn under_load(change: impl Fn(&World)) {
    let world = World::new();
    let first = world.node(1);
    drop(create(&first, "shared"));
    let end = Arc::new(AtomicBool::new(false));
    let steps = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> =
        (1..=3u16).map(|n| worker(world.node(n), u64::from(n), end.clone(), steps.clone())).collect();
    for _ in 0..5 {
        let before = steps.load(Ordering::SeqCst);
        change(&world);
        // Everybody goes on under the new coordinator before the next change.
        while steps.load(Ordering::SeqCst) < before + 12 {
            assert!(!workers.iter().any(JoinHandle::is_finished), "a worker failed");
            thread::yield_now();
        }
    }
    end.store(true, Ordering::SeqCst);
    let models: Vec<_> = workers.into_iter().map(|worker| worker.join().expect("no error seen")).collect();
    for (number, model) in models.iter().enumerate() {
        let file = open(&first, &format!("own{}", number + 1));
        assert!(read(&file, 0, 3 << 20).expect("a read") == model.0);
    }
    assert_eq!(world.problems(&first), Vec::<String>::new());
}

// Invariants C4, E1.
#[test]
fn a_coordinator_that_is_closed_and_followed_by_another_is_not_noticed() {
    under_load(|world| {
        world.stop_coordinator();
        world.start_coordinator();
    });
}

// Invariants C4, E1: outcomes of requests under way are unknown; each is done once all the same.
#[test]
fn a_coordinator_that_dies_and_is_followed_by_another_is_not_noticed() {
    under_load(|world| {
        world.kill_coordinator();
        world.start_coordinator();
    });
}

#[test]
fn mapped_files_are_read_and_written_without_a_coordinator() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "f");
    write(&file, 0, &vec![1; 1 << 20]).expect("a write");
    world.stop_coordinator();
    for n in 0..50 {
        write(&file, n * 4096, &[2; 4096]).expect("a write");
        assert!(read(&file, n * 4096, 4096).expect("a read") == [2; 4096]);
    }
    let waiting = later(|tell| file.fsync(tell));
    world.start_coordinator();
    waiting.recv().expect("a completion").expect("an fsync");
    drop(file);
    node.detach().expect("a detach");
}

#[test]
fn a_call_made_without_a_coordinator_is_answered_by_the_next_one() {
    let world = World::new();
    let node = world.node(1);
    world.stop_coordinator();
    let caller = {
        let node = node.clone();
        thread::spawn(move || node.mkdir(ROOT_INO, b"d", &PLAIN))
    };
    let before = node.stats().requests_sent;
    assert!(!caller.is_finished() || before > 0);
    world.start_coordinator();
    caller.join().expect("no panic").expect("a directory");
    assert!(node.lookup(ROOT_INO, b"d").is_ok());
}

#[test]
fn an_open_file_that_was_removed_lives_until_its_last_close_also_over_a_change_of_coordinator() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "f");
    write(&file, 0, &[9; 10_000]).expect("a write");
    node.unlink(ROOT_INO, b"f").expect("an unlink");
    world.kill_coordinator();
    world.start_coordinator();
    assert!(read(&file, 0, 20_000).expect("a read") == [9; 10_000]);
    write(&file, 50_000, &[8; 5_000]).expect("a write");
    assert_eq!(file.attr().expect("attributes").nlink, 0);
    drop(file);
    node.detach().expect("a detach");
    let other = world.node(2);
    let report = other.check().expect("a check");
    assert_eq!((report.orphans, report.problems.len()), (0, 0), "{report:?}");
}

// What was given up with a request counts once, also when that is sent again and the file was opened in between.
#[test]
fn a_file_that_is_opened_while_its_last_name_goes_survives_an_attach() {
    let stable = Arc::new(MemoryDevice::new(LUN_BYTES));
    let device = Arc::new(FaultDevice::new(stable.clone()));
    let world = World::on(stable);
    let (a, b) = (world.node(1), world.node_on(2, device.clone()));
    let file = create(&a, "f");
    write(&file, 0, &[9; 10_000]).expect("a write");
    let ino = file.ino();
    drop(file);
    // A second node that reads keeps the removal waiting.
    let elsewhere = open(&b, "f");
    read(&elsewhere, 0, 4096).expect("a read");
    a.resolve("f").expect("the name");
    a.getattr(ino).expect("attributes");
    device.hold(Some(OpKind::Read));
    let slow = later(|tell| elsewhere.read(0, IoBuf::zeroed(4096), tell));
    device.wait_held(1);
    let recalls = b.stats().recalls;
    let remover = {
        let a = a.clone();
        thread::spawn(move || a.unlink(ROOT_INO, b"f"))
    };
    while b.stats().recalls == recalls {
        thread::yield_now();
    }
    let file = a.open(ino).expect("it has its name still");
    world.pushes.announce(world.volume, lockmgr::Term(world.term()), lockmgr::NodeId(1));
    // Answered after the attach, so after the removal was sent again.
    a.statfs().expect("an answer");
    device.release();
    slow.recv().expect("a completion").expect("a read");
    remover.join().expect("no panic").expect("an unlink");
    drop(elsewhere);
    // What nobody has open any more is freed before this is answered.
    b.statfs().expect("an answer");
    assert!(read(&file, 0, 20_000).expect("a read") == [9; 10_000]);
    assert_eq!(file.attr().expect("attributes").nlink, 0);
}

#[test]
fn a_coordinator_announced_again_is_attached_to_again() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "f");
    write(&file, 0, &[1; 4096]).expect("a write");
    let before = node.stats().requests_sent;
    let term = lockmgr::Term(world.term());
    world.pushes.announce(world.volume, term, lockmgr::NodeId(1));
    write(&file, 8 << 20, &[2; 4096]).expect("a write");
    fsync(&file).expect("an fsync");
    let other = create(&node, "g");
    // Attach, Create; the write and the fsync need nobody.
    assert!(node.stats().requests_sent >= before + 2);
    drop(other);
    assert!(read(&file, 8 << 20, 4096).expect("a read") == [2; 4096]);
}
